"""Invertible 1x1 convolution and ActNorm: modules, caches, initialisation, parity."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F

from fastflow import nn, ops


def rotations(count=3, channels=6, lu=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.InvertibleConv1x1(channels, lu=lu, generator=generator) for _ in range(count)]


def perturb(layer, size=0.1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return layer


def initialised(channels=6, seed=2):
    layer = nn.ActNorm(channels, gain=2.0)
    layer.initialize(3 + 2 * torch.randn(32, channels, 4, 4, generator=torch.Generator().manual_seed(seed)))
    return layer


def image(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def explicit(layer):
    """W in float64."""
    if not layer.lu:
        return layer.weight.detach().double()
    left = layer.lower.detach().double().tril(-1) + torch.eye(layer.channels, dtype=torch.float64)
    right = layer.upper.detach().double().triu(1) + torch.diag(
        layer.sign_s.double() * layer.log_s.detach().double().exp()
    )
    return (left @ right)[layer.permutation]


# --- the cache --------------------------------------------------------------------------------------

WAYS = {
    "in place": lambda layer, p, new: p.detach().copy_(new),
    "through data": lambda layer, p, new: p.data.mul_(0).add_(new),
    "corners of data": lambda layer, p, new: [p.data.view(-1)[i].add_(0.25) for i in (4, -5)],  # of 5 x 5
    "data swapped": lambda layer, p, new: setattr(p, "data", new.clone()),
    "data transposed": lambda layer, p, new: setattr(p, "data", new.t().contiguous().t() if new.dim() > 1 else new),
    "parameter replaced": lambda layer, p, new: [
        setattr(layer, k, torch.nn.Parameter(new.clone())) for k, v in list(layer._parameters.items()) if v is p
    ],
    "numpy": lambda layer, p, new: p.detach().numpy().__iadd__(0.25 * new.numpy()),
    "load_state_dict": lambda layer, p, new: layer.load_state_dict(perturb(copy.deepcopy(layer), seed=9).state_dict()),
    "load_state_dict assign": lambda layer, p, new: layer.load_state_dict(
        perturb(copy.deepcopy(layer), seed=9).state_dict(), assign=True
    ),
    "to float64": lambda layer, p, new: layer.double(),
    "to float16": lambda layer, p, new: layer.half(),
}


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("name", ["lower", "upper", "log_s", "weight"])
@pytest.mark.parametrize("way", WAYS)
def test_cache_is_never_stale(way, name, inverse):
    layer = perturb(nn.InvertibleConv1x1(5, lu=name != "weight", generator=torch.Generator().manual_seed(0)))
    parameter = getattr(layer, name)
    nn.weights([layer], inverse=inverse)
    new = parameter.detach() + 0.1 * image(*parameter.shape)
    WAYS[way](layer, parameter, new)
    matrix, _, logdet = nn.weights([layer], inverse=inverse)[0]
    truth = explicit(layer)
    truth = torch.linalg.inv(truth) if inverse else truth
    assert torch.allclose(matrix.double(), truth, atol=1e-5)
    assert torch.allclose(logdet.double(), torch.linalg.slogdet(truth).logabsdet, atol=1e-5)


@pytest.mark.parametrize("name", ["permutation", "sign_s"])
def test_cache_sees_the_buffers(name):
    layer = nn.InvertibleConv1x1(5, generator=torch.Generator().manual_seed(0))
    nn.weights([layer])
    buffer = getattr(layer, name)
    buffer.data.copy_(buffer.flip(0) if name == "permutation" else -buffer)
    assert torch.allclose(nn.weights([layer])[0].matrix.double(), explicit(layer), atol=1e-6)


def test_cache_sees_an_optimiser_step():
    layer = nn.InvertibleConv1x1(6)
    optimiser = torch.optim.Adam(layer.parameters(), 0.1, fused=True)
    x = image(4, 6, 3, 3)
    for _ in range(3):
        z, logdet = layer(x)
        assert torch.allclose(z, F.conv2d(x, explicit(layer).float()[:, :, None, None]), atol=1e-5)
        optimiser.zero_grad()
        (z.square().sum() - logdet.sum()).backward()
        optimiser.step()


@pytest.mark.parametrize("lu", [True, False])
def test_sampling_and_accumulation_never_rebuild(lu):
    layers, actnorms = rotations(lu=lu), [initialised(seed=k) for k in range(3)]
    z = image(4, 6, 3, 3)
    for _ in range(3):
        for layer, piece in zip(layers, nn.weights(layers, actnorms, inverse=True), strict=True):
            layer.inverse(z, weights=piece)
    assert layers[0]._cache.builds == 1
    grads = []
    for _ in range(3):  # training accumulates gradients over several batches
        x = z
        for layer, piece in zip(layers, nn.weights(layers, actnorms), strict=True):
            x, logdet = layer(x, weights=piece)
        (x.square().sum() + logdet.sum()).backward()
        grads.append([p.grad.clone() for layer in (*layers, *actnorms) for p in layer.parameters()])
    assert layers[0]._cache.builds == 2
    for first, third in zip(grads[0], grads[2], strict=True):
        assert torch.allclose(3 * first, third, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lu", [True, False])
def test_a_cached_gradient_is_the_gradient(lu):
    (layer,) = rotations(1, lu=lu)
    x = image(4, 6, 3, 3).double()
    layer.double()
    grads = []
    for backend in ("cpu", "cpu", "reference"):
        with ops.use_backend(backend):
            z, logdet = layer(x)
            loss = (z.pow(3).sum(), logdet.sum())
            first = torch.autograd.grad(sum(loss), list(layer.parameters()), create_graph=True)
            second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), list(layer.parameters()))
            grads.append([*first, *second])
    assert layer._cache.builds == 1
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_cache_holds_no_graph_and_does_not_travel():
    layer = nn.InvertibleConv1x1(6)
    layer(image(2, 6, 3, 3))
    ((_, (value, pieces)),) = layer._cache._entries.values()
    assert not any(t.requires_grad or t.grad_fn for t in (*value, *pieces[0]))
    assert set(layer.state_dict()) == {"lower", "upper", "log_s", "permutation", "sign_s"}
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False))
    for other in copies:
        assert other._cache is not layer._cache and other._cache.builds == 0 and not other._cache._entries
        assert torch.equal(other(image(2, 6, 3, 3))[0], layer(image(2, 6, 3, 3))[0])


def test_a_value_made_under_inference_mode_can_be_trained():
    layer = nn.InvertibleConv1x1(6)
    with torch.inference_mode():
        layer(image(2, 6, 3, 3))
    layer(image(2, 6, 3, 3))[0].sum().backward()
    assert layer._cache.builds == 1 and layer.lower.grad is not None


def test_concurrent_readers():
    layers = rotations(8, 12)
    truth = [(p.matrix.detach(), p.logdet.detach()) for p in nn.weights(layers, inverse=True)]
    for layer in layers:
        layer._cache = nn.conv1x1.Cache()
    failures = []

    def read():
        for _ in range(50):
            for piece, (matrix, logdet) in zip(nn.weights(layers, inverse=True), truth, strict=True):
                if not (torch.equal(piece.matrix, matrix) and torch.equal(piece.logdet, logdet)):
                    failures.append(1)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_snapshot_without_the_library(monkeypatch):
    from fastflow.ops import cpu, snapshot

    monkeypatch.setattr(cpu, "unavailable", lambda: "not here")
    x = torch.zeros(3, 4)
    saved = snapshot.snapshot([x, x.t()])
    assert saved.matches([x, x.t()]) and not saved.matches([x]) and not saved.matches([x, x.double().t()])
    x.data[1, 2] = 1
    assert not saved.matches([x, x.t()])


# --- values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lu", [True, False])
@pytest.mark.parametrize("channels", [1, 2, 7, 12, 48])
def test_starts_as_a_rotation(channels, lu):
    layer = nn.InvertibleConv1x1(channels, lu=lu)
    w = explicit(layer)
    assert torch.allclose(w @ w.T, torch.eye(channels, dtype=torch.float64), atol=1e-5)
    assert abs(nn.weights([layer])[0].logdet.item()) < 1e-6


def test_generator_decides():
    a, b = rotations(1, seed=5), rotations(1, seed=5)
    assert all(torch.equal(x, y) for x, y in zip(a[0].parameters(), b[0].parameters(), strict=True))


@pytest.mark.parametrize("lu", [True, False])
def test_logdet_is_the_slogdet_after_updates(lu):
    layer = nn.InvertibleConv1x1(12, lu=lu).double()
    optimiser = torch.optim.SGD(layer.parameters(), 1e-2)
    for k in range(100):
        optimiser.zero_grad()
        z, logdet = layer(image(8, 12, seed=k).double())
        (z.square().sum(1) / 2 - logdet).mean().backward()
        optimiser.step()
    _, logdet = layer(image(3, 12, 4, 5).double())
    truth = 20 * torch.linalg.slogdet(explicit(layer)).logabsdet
    assert torch.allclose(logdet, truth.expand(3), atol=1e-6, rtol=0)


# the largest error of a round trip in float32 with an inverse computed in float64
@pytest.mark.parametrize("channels, condition, budget", [(12, 2, 7e-7), (48, 18, 4e-6), (96, 30, 8e-6)])
def test_round_trip_budget(channels, condition, budget):
    generator = torch.Generator().manual_seed(0)
    u, v = (
        torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64, generator=generator)).Q for _ in range(2)
    )
    layer = nn.InvertibleConv1x1(channels)
    layer.set_weight(
        u @ torch.diag(torch.logspace(0, 1, channels, condition, dtype=torch.float64)) @ v / condition**0.5
    )
    x = image(16, channels, 8, 8)
    z, logdet = layer(x)
    back, minus = layer.inverse(z)
    assert (back - x).abs().max() < 2 * budget  # twice: the budget is for one matrix of that condition, not for any
    assert torch.allclose(minus, -logdet)


@pytest.mark.parametrize("lu", [True, False])
def test_actnorm_folded_is_one_after_the_other(lu):
    (layer,), actnorm = rotations(1, lu=lu), nn.ActNorm(6, gain=3.0)
    x = 2 + image(8, 6, 4, 4)
    z, logdet = layer(x, actnorm=actnorm)  # initialises it
    assert actnorm.ready
    y, first = actnorm(x)
    expected, second = layer(y)
    assert torch.allclose(z, expected, atol=1e-5) and torch.allclose(logdet, first + second, atol=1e-4)
    back, minus = layer.inverse(z, actnorm=actnorm)
    assert torch.allclose(back, x, atol=1e-5) and torch.allclose(minus, -logdet)


@pytest.mark.parametrize("lu", [True, False])
def test_parity_with_normflows(lu):
    theirs = pytest.importorskip("normflows").flows.Invertible1x1Conv(7, use_lu=lu)
    ours = nn.InvertibleConv1x1(7, lu=lu)
    with torch.no_grad():
        if lu:
            theirs.L.add_(0.1 * image(7, 7))
            theirs.log_S.add_(0.1 * image(7))
            ours.permutation.copy_(theirs.P.argmax(1))
            ours.lower.copy_(theirs.L)
            ours.upper.copy_(theirs.U)
            ours.log_s.copy_(theirs.log_S)
            ours.sign_s.copy_(theirs.sign_S)
        else:
            ours.set_weight(theirs.W)
    x = image(4, 7, 3, 5)
    for mine, other in ((ours, theirs.inverse), (ours.inverse, theirs)):
        z, logdet = mine(x)
        expected, total = other(x)
        assert torch.allclose(z, expected, atol=1e-5) and torch.allclose(logdet, total.expand(4), atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 6, 4, 5), (5, 6), (0, 6, 4, 4), (0, 6), (3, 6, 7), (2, 6, 2, 3, 2)])
def test_shapes(shape):
    layer, actnorm, x = nn.InvertibleConv1x1(6), initialised(), image(*shape)
    for one in (layer, actnorm):
        z, logdet = one(x)
        back, _ = one.inverse(z)
        assert z.shape == x.shape and logdet.shape == shape[:1]
        assert torch.allclose(back, x, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_memory_format_is_kept(backend):
    x = image(3, 6, 4, 5).contiguous(memory_format=torch.channels_last)
    with ops.use_backend(backend):
        for layer in (nn.InvertibleConv1x1(6), initialised()):
            assert layer(x)[0].is_contiguous(memory_format=torch.channels_last)
            assert layer(x.contiguous())[0].is_contiguous()


@pytest.mark.parametrize("channels", [300])
def test_many_channels_go_to_the_library(channels):
    weight = torch.linalg.qr(image(channels, channels)).Q
    for x in (image(2, channels, 3, 3), image(2, channels, 3, 3).contiguous(memory_format=torch.channels_last)):
        z, _ = ops.conv1x1(x, weight, torch.ones(channels))
        assert torch.allclose(z, F.conv2d(x, weight[:, :, None, None], torch.ones(channels)), atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_leaves_it_alone(backend):
    layer, x = nn.InvertibleConv1x1(6), image(3, 6, 4, 5)
    with ops.use_backend(backend):
        expected, total = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            z, logdet = layer(x)
            half, _ = layer(x.bfloat16())
    assert torch.equal(z, expected) and torch.equal(logdet, total)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), expected, atol=0.05)


@pytest.mark.parametrize("lu", [True, False])
def test_compiles_whole(lu):
    layer, actnorm, x = nn.InvertibleConv1x1(6, lu=lu), initialised(), image(3, 6, 4, 5)

    def step(x):
        z, logdet = layer(x, actnorm=actnorm)
        back, minus = actnorm(z)
        return back, logdet + minus

    def gradients(f):
        for p in (*layer.parameters(), *actnorm.parameters()):
            p.grad = None
        z, logdet = f(x)
        (z.square().sum() + logdet.sum()).backward()
        return z, logdet, *(p.grad for p in (*layer.parameters(), *actnorm.parameters()))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled), gradients(step), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_torch_func():
    layer, x = nn.InvertibleConv1x1(4).double(), image(3, 4, 2, 2).double()
    parameters = dict(layer.named_parameters())

    def f(x, parameters=parameters):
        return torch.func.functional_call(layer, parameters, (x[None],))[0][0]

    jacobian = torch.func.vmap(torch.func.jacrev(f))(x).reshape(3, 16, 16)
    truth = torch.linalg.slogdet(jacobian).logabsdet
    assert torch.allclose(layer(x)[1], truth, atol=1e-9)
    grads = torch.func.grad(lambda p: f(x[0], p).square().sum())(parameters)
    (layer(x[:1])[0].square().sum()).backward()
    assert all(torch.allclose(grads[k], p.grad) for k, p in layer.named_parameters())


# --- errors -----------------------------------------------------------------------------------------


def test_a_singular_matrix_is_named():
    layers = rotations(3, lu=False)
    with torch.no_grad():
        layers[1].weight[0] = layers[1].weight[1]
    for inverse in (False, True):
        with pytest.raises(ValueError, match=r"weight\[1\].*singular.*condition"):
            nn.weights(layers, inverse=inverse)
    with pytest.raises(ValueError, match=r"weight\[0\].*singular"):
        ops.conv1x1(image(2, 3), torch.zeros(3, 3))
    layers = rotations(3)
    with torch.no_grad():
        layers[2].log_s[0] = -float("inf")
    with pytest.raises(ValueError, match=r"log_s\[2\].*singular"):
        nn.weights(layers)
    with pytest.raises(ValueError, match="singular"):
        layers[0].set_weight(torch.ones(6, 6))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"weight": torch.ones(3, 4)}, ValueError, r"weight: expected shape \[4, 4\].*got \[3, 4\]"),
        ({"weight": torch.eye(4).double()}, TypeError, "weight: float64 goes with float64 only"),
        ({"weight": torch.ones(4, 4, dtype=torch.int64)}, TypeError, "weight: expected float32"),
        ({"weight": torch.eye(4, device="meta")}, ValueError, "weight: expected device cpu"),
        ({"bias": torch.ones(3)}, ValueError, r"bias: expected shape \[4\]"),
        ({"weight_logdet": torch.ones(1)}, ValueError, r"weight_logdet: expected shape \[\]"),
        ({"logdet": torch.ones(3)}, ValueError, r"logdet: expected \[2\]"),
        ({"x": torch.ones(4)}, ValueError, "x: expected at least 2 dimensions"),
        ({"x": torch.ones(2, 4, dtype=torch.int64)}, TypeError, "x: expected float32"),
    ],
)
def test_errors_of_conv1x1(change, error, message):
    arguments = {"x": torch.ones(2, 4), "weight": torch.eye(4)} | change
    with pytest.raises(error, match=message):
        ops.conv1x1(**arguments)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"lower": []}, ValueError, "lower: expected 1 tensors.*got 0"),
        ({"upper": [torch.ones(4, 3)]}, ValueError, r"upper\[0\]: expected shape \[4, 4\], got \[4, 3\]"),
        ({"log_s": [torch.ones(4, 4)]}, ValueError, r"log_s\[0\]: expected shape \[C\]"),
        ({"permutation": [torch.ones(4)]}, TypeError, r"permutation\[0\]: expected torch.int64"),
        ({"permutation": [torch.tensor([0, 1, 2, 4])]}, ValueError, r"permutation\[0\] holds 4"),
        ({"sign_s": [torch.ones(4).double()]}, TypeError, r"sign_s\[0\]: expected torch.float32"),
        ({"actnorm_bias": [torch.ones(4)]}, ValueError, "actnorm_log_scale: expected 1 tensors"),
    ],
)
def test_errors_of_lu_weights(change, error, message):
    arguments = {"lower": [torch.eye(4)], "upper": [torch.eye(4)], "log_s": [torch.zeros(4)]}
    arguments |= {"permutation": [torch.arange(4)], "sign_s": [torch.ones(4)]} | change
    with pytest.raises(error, match=message):
        ops.lu_weights(**arguments, backend="cpu")


# --- ActNorm ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(64, 5, 6, 7), (256, 5)])
@pytest.mark.parametrize("gain", [1.0, 3.0])
def test_actnorm_sets_itself_by_the_first_batch(shape, training, gain):
    layer = nn.ActNorm(shape[1], gain=gain).train(training)
    scale, shift = image(1, shape[1], *[1] * (len(shape) - 2)).exp(), 10 * image(1, shape[1], *[1] * (len(shape) - 2))
    x = shift + scale * image(*shape)
    z, logdet = layer(x)
    z = z.detach().transpose(0, 1).flatten(1)
    assert z.mean(1).abs().max() < 1e-5 and (z.std(1, correction=0) - 1).abs().max() < 1e-4
    per_position = logdet / x[0, 0].numel()
    assert torch.allclose(per_position.exp(), (1 / scale.prod()).expand(shape[0]), rtol=0.1)
    layer(0 * x)  # a second batch changes nothing
    assert torch.equal(layer(x)[0].detach().transpose(0, 1).flatten(1), z)


def test_actnorm_of_a_constant_channel_stays_finite():
    layer = nn.ActNorm(3)
    z, logdet = layer(torch.full((8, 3, 2, 2), 5.0))
    assert torch.equal(z, torch.zeros_like(z)) and logdet.isfinite().all()


def test_actnorm_before_and_after_initialisation():
    layer = nn.ActNorm(3)
    with pytest.raises(RuntimeError, match="not initialised"):
        layer.inverse(image(2, 3))
    with pytest.raises(RuntimeError, match="not initialised"):
        nn.weights([nn.InvertibleConv1x1(3)], [layer])
    with pytest.raises(ValueError, match="empty batch"):
        layer(image(0, 3))
    layer.initialize(image(8, 3))
    with pytest.raises(RuntimeError, match="initialised already"):
        layer.initialize(image(8, 3))
    layer.initialize(5 + image(8, 3), force=True)
    assert layer(5 + image(8, 3))[0].mean().abs() < 1e-5


@pytest.mark.parametrize("assign", [False, True])
def test_actnorm_state_travels(assign):
    layer = initialised(3)
    fresh = nn.ActNorm(3, gain=2.0)
    fresh.load_state_dict(layer.state_dict(), assign=assign)
    x = 100 + image(8, 3, 2, 2)
    others = (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).to(torch.float32))
    for other in others:
        assert torch.equal(other(x)[0], layer(x)[0])
    fresh.load_state_dict(nn.ActNorm(3).state_dict())
    assert not fresh.ready
    with torch.device("meta"):
        later = nn.ActNorm(3, gain=2.0)
    later.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(later(x)[0], layer(x)[0])
