"""The trace's identities: unbiased, its variance, the same number by every route; and the layers' conventions."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

import fastflow
from fastflow import ops, testing
from fastflow.ops.trace_mlp import ACTIVATIONS, FUSED_WIDTH, LAYERS, reference


def linear(a):
    """The function x -> A x, whose Jacobian is A."""
    return lambda x: x @ a.T


def matrix(n, m=None, seed=0):
    return testing.case.randn(n, m or n, seed=seed)


def mlp(layer="concat_squash", dim=3, hidden=(7, 5), dtype=torch.float64, seed=0):
    """Layers of random parameters that require gradients."""
    widths = (dim, *hidden, dim)
    made = []
    for i, (n, m) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        shapes = ((m, n + (layer == "concat")), (m,), (m, 1), (m,), (m, 1))[: 5 if layer == "concat_squash" else 2]
        gains = (1.5 * n**-0.5, 0.7, 0.7, 0.7, 0.7)
        drawn = [gain * testing.case.randn(*s, seed=seed + i) for gain, s in zip(gains, shapes, strict=False)]
        made.append([p.to(dtype).requires_grad_() for p in drawn])
    return made


def dynamics(x, t, layers, layer, activation):
    """The layers as FFJORD's diffeq layers compute them."""
    phi = {"tanh": torch.tanh, "softplus": F.softplus, "elu": F.elu, "silu": F.silu}[activation]
    for i, (weight, bias, *gating) in enumerate(layers):
        if layer == "concat":
            x = F.linear(torch.cat([torch.ones_like(x[:, :1]) * t, x], 1), weight, bias)
        elif layer == "ignore":
            x = F.linear(x, weight, bias)
        else:
            gate_weight, gate_bias, hyper_weight = gating
            gate = torch.sigmoid(F.linear(t.view(1, 1), gate_weight, gate_bias))
            x = F.linear(x, weight, bias) * gate + F.linear(t.view(1, 1), hyper_weight)
        x = phi(x) if i + 1 < len(layers) else x
    return x


# --- the estimator ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vjp", "jvp"])
def test_mean_over_all_signs_is_the_trace(method):
    a = matrix(6)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6)), dtype=torch.float64)[:, None]
    estimate = ops.hutchinson(linear(a), torch.zeros(1, 6, dtype=torch.float64), probes=signs, method=method)
    assert abs(estimate.trace.item() - a.trace().item()) < 1e-12


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_variance(kind):
    a, draws = matrix(5), 200_000
    e = ops.probes((draws, 1, 5), kind, seed=1, dtype=torch.float64)
    estimate = ops.hutchinson(linear(a), torch.zeros(1, 5, dtype=torch.float64), probes=e)
    symmetric = (a + a.T) / 2
    variance = 2 * (symmetric.square().sum() - (kind == "rademacher") * a.diagonal().square().sum())
    assert abs(estimate.standard_error.item() ** 2 * draws / variance.item() - 1) < 0.05
    assert abs(estimate.trace.item() - a.trace().item()) < 4 * estimate.standard_error.item()


def test_standard_error_is_honest():
    """Over many samples the deviation in units of the standard error has mean square about one (Student, 31)."""
    a, samples, count = matrix(8), 4000, 32
    estimate = ops.hutchinson(linear(a), torch.zeros(samples, 8, dtype=torch.float64), probes=count, seed=3)
    square = ((estimate.trace - a.trace()) / estimate.standard_error).square()
    # Student's t of n = 31: variance n / (n - 2), the mean of 4000 squares scatters by about sqrt(2.3 / 4000)
    assert abs(square.mean().item() / (31 / 29) - 1) < 5 * math.sqrt(2.3 / samples)
    assert ops.hutchinson(linear(a), torch.zeros(2, 8, dtype=torch.float64), seed=0).standard_error.isnan().all()


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_vjp_and_jvp_give_the_same_number(count, dtype):
    layers = mlp(dtype=dtype)
    x, t = testing.case.randn(6, 3).to(dtype), torch.tensor(0.4, dtype=dtype)
    e = ops.probes((count, 6, 3), "gaussian", seed=0, dtype=dtype)
    params = [p for layer in layers for p in layer]
    results = []
    for method in ("vjp", "jvp"):
        y = x.clone().requires_grad_()
        value, trace, _ = ops.hutchinson(
            lambda z: dynamics(z, t, layers, "concat_squash", "softplus"), y, probes=e, method=method
        )
        grads = torch.autograd.grad((value * x).sum() + trace.sum(), [y, *params])
        results.append((value, trace, *grads))
    for a, b in zip(*results, strict=True):
        # two orders of at most a few hundred roundings of terms of the size of the largest entry
        assert (a - b).abs().max() <= 100 * torch.finfo(dtype).eps * max(1, a.abs().max().item())


def test_without_gradients():
    x = torch.randn(4, 3, requires_grad=True)
    with torch.no_grad():
        for estimate in (
            ops.hutchinson(torch.sin, x, probes=3),
            ops.hutchinson(torch.sin, x, method="jvp"),
            ops.bottleneck_trace(torch.sin, torch.cos, x),
            ops.exact_trace(torch.sin, x),
        ):
            assert not any(t.requires_grad for t in estimate)


def test_images_and_the_exact_trace():
    x = testing.case.randn(3, 2, 3, 2)
    kernel = testing.case.randn(2, 2, 3, 3)

    def f(z):
        return torch.tanh(F.conv2d(z, kernel, padding=1))

    jacobian = torch.autograd.functional.jacobian(lambda z: f(z).sum(0), x).flatten(4).flatten(0, 2)  # [D, B, 2, 6]
    expected = torch.einsum("dbd->b", jacobian.view(12, 3, 12))
    for method in ("vjp", "jvp"):
        value, trace = ops.exact_trace(f, x, method=method)
        assert torch.allclose(value, f(x)) and (trace - expected).abs().max() < 1e-12
        estimate = ops.hutchinson(f, x, probes=500, seed=0, method=method)
        assert ((estimate.trace - expected).abs() < 5 * estimate.standard_error).all()


@pytest.mark.parametrize("method", ["vjp", "jvp"])
def test_bottleneck(method):
    """f = G H x: the same trace from probes of 3 numbers instead of 10, with the variance of the matrix H G."""
    down, up = matrix(3, 10), matrix(10, 3, seed=1)
    x = torch.zeros(1, 10, dtype=torch.float64)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)[:, None]
    h, g = linear(down), linear(up)
    every = ops.bottleneck_trace(h, g, x, probes=signs, method=method)
    assert abs(every.trace.item() - (up @ down).trace().item()) < 1e-12
    assert every.value.shape == x.shape
    small = down @ up
    drawn = ops.bottleneck_trace(h, g, x, probes=200_000, kind="gaussian", seed=0, method=method)
    variance = 2 * ((small + small.T) / 2).square().sum().item()
    assert abs(drawn.standard_error.item() ** 2 * 200_000 / variance - 1) < 0.05


@pytest.mark.parametrize("method", ["vjp", "jvp"])
def test_bottleneck_gradient(method):
    down, up = matrix(3, 5).requires_grad_(), matrix(5, 3, seed=1).requires_grad_()
    x, e = testing.case.randn(2, 5).requires_grad_(), ops.probes((2, 2, 3), seed=0, dtype=torch.float64)

    def run(x, down, up):
        return ops.bottleneck_trace(
            lambda z: torch.tanh(z @ down.T), lambda h: torch.sin(h @ up.T), x, probes=e, method=method
        )[:2]

    assert torch.autograd.gradcheck(run, (x, down, up))


def test_probes():
    for kind in ("rademacher", "gaussian"):
        drawn = ops.probes((4000, 5), kind, seed=2)
        assert torch.equal(drawn, ops.probes((4000, 5), kind, seed=2))
        assert torch.equal(drawn.double(), ops.probes((4000, 5), kind, seed=2, dtype=torch.float64))
        assert not torch.equal(drawn, ops.probes((4000, 5), kind, seed=3))
        assert abs(drawn.mean()) < 0.05 and abs(drawn.square().mean() - 1) < 0.05
    assert set(ops.probes((100,), seed=0).tolist()) == {-1.0, 1.0}
    one, two = (ops.probes((7,), "gaussian", generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two)


# --- fused dynamics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [(7, 5), (FUSED_WIDTH["cpu"] + 3, 9), ()])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_conventions_and_hutchinson(layer, activation, hidden):
    """Value, estimate and all gradients are those of the layers written out, with the trace by autograd."""
    layers = mlp(layer, hidden=hidden)
    x, t = testing.case.randn(6, 3).requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    e = ops.probes((2, 6, 3), "gaussian", seed=0, dtype=torch.float64)
    inputs = [x, *([] if layer == "ignore" else [t]), *(p for given in layers for p in given)]

    def f(z):
        return dynamics(z, t, layers, layer, activation)

    value, trace = ops.mlp_trace(x, t, layers, layer=layer, activation=activation, probes=e)
    expected = [ops.hutchinson(f, x, probes=e[s : s + 1]) for s in range(2)]
    outputs = [(value, trace), (expected[0].value, torch.stack([one.trace for one in expected]))]
    grads = [torch.autograd.grad(v.sin().sum() + t.square().sum(), inputs) for v, t in outputs]
    for a, b in zip((*outputs[0], *grads[0]), (*outputs[1], *grads[1]), strict=True):
        assert (a - b).abs().max() <= 1e-12 * max(1, b.abs().max().item())
    exact = ops.mlp_trace(x, t, layers, layer=layer, activation=activation, exact=True)
    for a, b in zip(exact, ops.exact_trace(f, x), strict=True):
        assert (a - b).abs().max() <= 1e-12 * max(1, b.abs().max().item())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saturated_units(activation):
    """Far from 0 on both sides the fused slopes are those of the reference, and nothing overflows."""
    weight = torch.tensor([[-1e4], [-40.0], [-12.0], [0.0], [12.0], [40.0], [1e4]], dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        layers = [(weight.to(dtype), torch.zeros(7, dtype=dtype)), (torch.ones(1, 7), torch.zeros(1))]
        layers = [tuple(p.to(dtype).requires_grad_() for p in given) for given in layers]
        x = torch.ones(2, 1, dtype=dtype, requires_grad=True)
        results = []
        for backend in (None, "reference"):
            outputs = ops.mlp_trace(
                x, 0, layers, layer="ignore", activation=activation, probes=torch.ones_like(x), backend=backend
            )
            grads = torch.autograd.grad([o.sum() for o in outputs], [x, *layers[0], *layers[1]])
            results.append((*outputs, *grads))
        for a, b in zip(*results, strict=True):
            assert torch.isfinite(a).all()
            # a slope at 40 has terms of 40: a few roundings of those
            assert (a - b).abs().max() <= 200 * torch.finfo(dtype).eps * max(1, b.abs().max().item())


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5])
def test_few_variables_and_many_units(dim):
    """Products with few columns have a loop of their own on the CPU."""
    layers = mlp(dim=dim, hidden=(40, 65))
    x, e = testing.case.randn(21, dim), testing.case.randn(2, 21, dim, seed=1)
    inputs = [p.detach().requires_grad_() for p in (x, *(p for given in layers for p in given))]
    given = [inputs[1 + 5 * i : 6 + 5 * i] for i in range(len(layers))]
    found = []
    for backend in (None, "reference"):
        outputs = ops.mlp_trace(inputs[0], 0.3, given, layer="concat_squash", probes=e, backend=backend)
        found.append([*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), inputs)])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-13 * (1 + b.abs().max())


@pytest.mark.parametrize("hidden", [(64, 33), (FUSED_WIDTH["cpu"] + 200, 40)])
@pytest.mark.parametrize("samples", [1, 700])
def test_gradients_are_the_same_bits_on_any_number_of_threads(samples, hidden):
    layers = mlp(hidden=hidden, dtype=torch.float32)
    x, e = testing.case.randn(samples, 3).float(), ops.probes((2, samples, 3), seed=0)
    params = [p for given in layers for p in given]
    threads, found = torch.get_num_threads(), []
    try:
        for n in (threads, 1, 3):
            torch.set_num_threads(n)
            value, trace = ops.mlp_trace(x, 0.3, layers, layer="concat_squash", probes=e)
            found.append(torch.autograd.grad(value.sum() + trace.square().sum(), params))
    finally:
        torch.set_num_threads(threads)
    for grads in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], grads, strict=True))


@pytest.mark.parametrize("hidden", [(8,), (FUSED_WIDTH["cpu"] + 1,)])
def test_compile(hidden):
    layers = mlp("concat", hidden=hidden, dtype=torch.float32)
    x, e = testing.case.randn(5, 3).float().requires_grad_(), ops.probes((2, 5, 3), seed=0)
    params = [x, *(p for given in layers for p in given)]

    def run(x, t, layers):
        value, trace = ops.mlp_trace(x, t, layers, probes=e)
        return value.sum() + trace.square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    t = torch.tensor(0.3)
    expected = torch.autograd.grad(run(x, t, layers), params)
    assert torch.equal(run(x, t, layers), compiled(x, t, layers))
    for a, b in zip(torch.autograd.grad(compiled(x, t, layers), params), expected, strict=True):
        assert torch.equal(a, b)


def test_torch_func():
    layers = [tuple(p.detach() for p in given) for given in mlp()]
    x, e = testing.case.randn(4, 3), ops.probes((4, 3), seed=0, dtype=torch.float64)

    def trace(x, e):
        return ops.mlp_trace(x, 0.3, layers, layer="concat_squash", probes=e)[1].sum()

    whole = torch.func.grad(trace)(x, e)
    each = torch.func.vmap(torch.func.grad(lambda x, e: trace(x[None], e[None])))(x, e)
    assert (whole - each).abs().max() < 1e-12


def test_shapes_and_half_precision():
    layers = mlp("ignore", dtype=torch.float32)
    x = torch.randn(4, 3)
    value, trace = ops.mlp_trace(x, 0, layers, layer="ignore", probes=torch.ones(4, 3))
    assert value.shape == (4, 3) and trace.shape == (4,)
    half = ops.mlp_trace(x.bfloat16(), 0, layers, layer="ignore", probes=torch.ones(4, 3))
    assert half[0].dtype == torch.bfloat16 and half[1].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        inside = ops.mlp_trace(x, 0, layers, layer="ignore", probes=torch.ones(4, 3))
    assert torch.equal(inside[0], value) and torch.equal(inside[1], trace)
    for backend in ("cpu", "reference"):
        empty = ops.mlp_trace(x[:0], 0, layers, layer="ignore", exact=True, backend=backend)
        assert empty[0].shape == (0, 3) and empty[1].shape == (0,)
        grads = torch.autograd.grad(empty[1].sum(), layers[0], allow_unused=True, materialize_grads=True)
        assert all(not g.any() for g in grads)


X = torch.zeros(4, 3)
PLAIN = [(torch.zeros(5, 3), torch.zeros(5)), (torch.zeros(3, 5), torch.zeros(3))]


def run(x=X, t=0.0, layers=PLAIN, layer="ignore", **options):
    return ops.mlp_trace(x, t, layers, layer=layer, **options)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (TypeError, "x: expected float32", lambda: run(X.long(), exact=True)),
        (ValueError, r"x: expected \[B, D\]", lambda: run(X[None], exact=True)),
        (ValueError, "probes: expected either .* neither", lambda: run()),
        (ValueError, "probes: expected either .* both", lambda: run(exact=True, probes=X)),
        (ValueError, r"probes: expected \[S, 4, 3\]", lambda: run(probes=X[:2])),
        (TypeError, "probes: expected a tensor", lambda: run(probes=3)),
        (ValueError, "activation: expected one of tanh", lambda: run(exact=True, activation="relu")),
        (ValueError, "layer: expected one of concat", lambda: run(exact=True, layer="blend")),
        (ValueError, "t: expected one element", lambda: run(t=torch.zeros(2), exact=True)),
        (ValueError, "layers: expected at least one", lambda: run(layers=[], exact=True)),
        (ValueError, r"layers\[0\] weight: expected \[5, 4\], got", lambda: run(layer="concat", exact=True)),
        (ValueError, r"layers\[0\]: expected \(weight, bias, gate", lambda: run(layer="concat_squash", exact=True)),
        (ValueError, r"layers\[0\]: expected 3 outputs", lambda: run(layers=PLAIN[:1], exact=True)),
        (TypeError, r"layers\[0\] weight: expected a dtype", lambda: run(X.double(), exact=True)),
        (ValueError, "kind: expected one of", lambda: ops.probes((2,), "uniform")),
        (ValueError, "seed: expected a seed or", lambda: ops.probes((2,), seed=0, generator=torch.Generator())),
        (ValueError, "method: expected one of", lambda: ops.hutchinson(torch.sin, X, method="fd")),
        (ValueError, "probes: expected at least one", lambda: ops.hutchinson(torch.sin, X, probes=0)),
        (ValueError, r"probes: expected \[S, 4, 3\]", lambda: ops.hutchinson(torch.sin, X, probes=X)),
        (ValueError, r"f: expected an output of shape \[4, 3\]", lambda: ops.hutchinson(lambda x: x[:, :1], X)),
        (TypeError, "x: expected float32", lambda: ops.hutchinson(torch.sin, X.long())),
    ],
)
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_backend_by_name():
    with fastflow.use_backend("reference"):
        value, trace = run(exact=True)
    params = [p for given in PLAIN for p in given]
    expected = reference(X, torch.tensor(0.0), torch.eye(3)[:, None].expand(3, 4, 3), *params, layer=2, activation=0)
    assert torch.equal(value, expected[0]) and torch.equal(trace, expected[1].sum(0))


def test_signs_are_those_of_philox():
    """The words that its authors give for the key and the counter 0."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    expected = [1.0 - 2 * (word >> i & 1) for word in words for i in range(32)]
    assert fastflow.probes((128,), seed=0).tolist() == expected
    assert fastflow.probes((4, 40), seed=0).flatten()[:128].tolist() == expected
    assert fastflow.probes((128,), seed=1).tolist() != expected
