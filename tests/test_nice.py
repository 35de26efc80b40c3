"""NICE: what it is made of, the peers with its weights, its volume, its samples."""

import copy
import json
import math
import pickle

import pytest
import torch
from torch import nn

import fastflow
from fastflow.models import NICE
from fastflow.models.nice import PRESETS
from fastflow.nn import AdditiveCoupling, Flow, Logistic, Scaling
from fastflow.testing.case import randn


def random_nice(shape=(1, 4, 4), dtype=torch.float64, scale=0.3, **options):
    """A model whose networks and diagonal are not small."""
    torch.manual_seed(0)
    model = NICE(shape, **{"hidden": 16, "layers": 2, **options}).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def images(n, shape, dtype=torch.float64):
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype) - 0.5


# --- layers -------------------------------------------------------------------------------------------


def test_scaling():
    layer, x = Scaling((2, 3)).double(), randn(4, 2, 3)
    layer.log_scale.data.copy_(randn(6))
    z, logdet = layer(x)
    torch.testing.assert_close(z, x * layer.log_scale.exp().view(2, 3), rtol=1e-14, atol=0)
    torch.testing.assert_close(logdet, layer.log_scale.sum().expand(4), rtol=1e-15, atol=0)
    back, minus = layer.inverse(z)
    torch.testing.assert_close(back, x)
    assert torch.equal(minus, -logdet)
    assert layer(x[:0])[0].shape == (0, 2, 3)
    assert torch.autograd.gradcheck(lambda x, d: torch.func.functional_call(layer, {"log_scale": d}, x),
                                    (x.requires_grad_(), randn(6).requires_grad_()))  # fmt: skip
    with pytest.raises(ValueError, match=r"x: expected \[B, 2, 3\], got \[4, 6\]"):
        layer(torch.zeros(4, 6))
    with pytest.raises(ValueError, match="shape: expected the sizes"):
        Scaling(())


def test_logistic():
    base = Logistic(3).double()
    line = torch.linspace(-40, 40, 8001, dtype=torch.float64)
    density = Logistic(1).double().log_prob(line[:, None]).exp()
    torch.testing.assert_close(torch.trapezoid(density, line), torch.ones_like(line[0]))
    far = base.log_prob(torch.full((1, 3), -800.0, dtype=torch.float64))
    torch.testing.assert_close(far, torch.full_like(far, -2400.0))  # softplus does not overflow
    z, log_prob = base.sample_and_log_prob(20000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(log_prob, base.log_prob(z))
    assert abs(z.std().item() * math.sqrt(3) / math.pi - 1) < 0.02 and abs(z.mean().item()) < 0.03
    half = base.sample(20000, temperature=0.5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(half, 0.5 * z)
    assert torch.equal(base.sample(2, temperature=0), torch.zeros(2, 3, dtype=torch.float64))
    assert base.sample(0).shape == (0, 3) and Logistic(2).bfloat16().sample(3).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="temperature: expected a number >= 0, got -1"):
        base.sample(2, temperature=-1)
    with pytest.raises(ValueError, match=r"z: expected \[B, 3\], got \[2, 4\]"):
        base.log_prob(torch.zeros(2, 4))


def test_an_additive_coupling_inverts_to_two_units_in_the_last_place():
    x, shift = 3 * torch.randn(64, 8), torch.randn(64, 4)
    layer = AdditiveCoupling(nn.Linear(4, 4))
    layer.network.forward = lambda kept: shift
    back = layer.inverse(layer(x)[0])[0]
    largest = torch.maximum(x[:, 4:].abs(), shift.abs())
    ulp = torch.nextafter(largest, torch.tensor(math.inf)) - largest
    assert torch.equal(back[:, :4], x[:, :4]) and ((back - x)[:, 4:].abs() <= 2 * ulp).all()


# --- the model ----------------------------------------------------------------------------------------

VARIANTS = [
    {},
    {"prior": "normal", "partition": "halves", "couplings": 3, "layers": (1, 0, 2)},
    {"interval": (-1.0, 1.0), "couplings": 5},
    {"context_features": 3},
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(o) or "default")
def test_every_variant_inverts_and_counts_its_volume(options):
    model = random_nice(**options)
    x, context = images(5, (1, 4, 4)), randn(5, 3) if "context_features" in options else None
    z, logdet = model.bijection(x, context)
    back, minus = model.bijection.inverse(z, context)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(minus, -logdet)
    volume = model.scaling.log_scale.sum() + (16 * math.log(2) if "interval" in options else 0)
    torch.testing.assert_close(logdet, volume.expand(5), rtol=1e-14, atol=0)
    given = None if context is None else context[:1]
    jacobian = torch.autograd.functional.jacobian(lambda v: model.bijection(v[None], given)[0].flatten(), x[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian.view(16, 16)).logabsdet, logdet[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.log_prob(x, context), model.base.log_prob(z) + logdet)
    n = 5 if context is not None else 4
    sample, density = model.sample_and_log_prob(n, context, 0.8, torch.Generator().manual_seed(3))
    assert sample.shape == (n, 1, 4, 4)
    torch.testing.assert_close(model.log_prob(sample, context), density, rtol=1e-9, atol=1e-9)


def test_the_logdet_is_the_sum_of_the_diagonal_and_the_round_trip_exact_in_float32():
    model = random_nice((1, 28, 28), torch.float32, scale=0.02, hidden=64, layers=5)
    x = images(8, (1, 28, 28), torch.float32)
    z, logdet = model.bijection(x)
    assert torch.equal(logdet, model.scaling.log_scale.double().sum().float().expand(8))
    assert (model.bijection.inverse(z)[0] - x).abs().max() < 1e-5


@pytest.mark.parametrize("partition", ["interleaved", "halves"])
def test_reversing_the_features_behind_every_coupling_is_an_order_of_weights(partition):
    """The code of the paper: even indices before odd ones, four times a coupling and a reversal, the diagonal."""
    model, x = random_nice((12,), partition=partition), images(5, (12,))
    order = [*range(0, 12, 2), *range(1, 12, 2)] if partition == "interleaved" else list(range(12))
    h = x[:, order]
    for k, coupling in enumerate(model.couplings):
        network = copy.deepcopy(coupling.network.mlp)
        if k % 2:  # the features lie reversed: columns of the first, rows of the last layer
            network[0].weight.data = network[0].weight.data.flip(1)
            network[-1].weight.data = network[-1].weight.data.flip(0)
            network[-1].bias.data = network[-1].bias.data.flip(0)
        h = torch.cat([h[:, :6], h[:, 6:] + network(h[:, :6])], 1).flip(1)
    z = h * model.scaling.log_scale[order].exp()
    torch.testing.assert_close(model.bijection(x)[0][:, order], z, rtol=1e-12, atol=1e-12)


def test_freia_nice_block():
    blocks = pytest.importorskip("FrEIA.modules")
    model, x = random_nice((8,), partition="halves", couplings=2), images(5, (8,))
    theirs = blocks.NICECouplingBlock([(8,)], subnet_constructor=lambda i, o: nn.Linear(i, o)).double()
    theirs.F, theirs.G = (coupling.network.mlp for coupling in model.couplings)
    swapped = x.roll(4, 1)  # their first coupling changes the first half
    (h,), logdet = theirs([swapped])
    torch.testing.assert_close(model.bijection(x)[0], model.scaling(h.roll(4, 1))[0], rtol=0, atol=1e-12)
    assert torch.as_tensor(logdet).sum() == 0


def test_nflows_additive_coupling():
    transforms = pytest.importorskip("nflows.transforms")
    model, x = random_nice((8,), partition="halves", couplings=2), images(5, (8,))
    h = x
    for k, coupling in enumerate(model.couplings):
        mask = torch.arange(8) >= 4 if k == 0 else torch.arange(8) < 4
        theirs = transforms.AdditiveCouplingTransform(mask.int(), lambda i, o: nn.Linear(i, o)).double()
        mlp = coupling.network.mlp
        theirs.transform_net.forward = lambda kept, context=None, mlp=mlp: mlp(kept)
        h, logdet = theirs(h)
        assert torch.equal(logdet, torch.zeros_like(logdet))
    torch.testing.assert_close(model.bijection(x)[0], model.scaling(h)[0], rtol=0, atol=1e-12)


def test_gradients_agree_with_the_reference():
    model, x = random_nice(), images(4, (1, 4, 4))
    grads = []
    for backend in (None, "reference"):
        with fastflow.use_backend(backend):
            grads.append(torch.autograd.grad(model.log_prob(x).sum(), list(model.parameters())))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_the_density_integrates_to_one():
    model = random_nice((2,), hidden=8)
    line = torch.linspace(-15, 15, 601, dtype=torch.float64)
    density = model.log_prob(torch.cartesian_prod(line, line)).exp().view(601, 601)
    assert abs(torch.trapezoid(torch.trapezoid(density, line), line).item() - 1) < 1e-2


def test_spectrum_is_the_spread_found():
    """A diagonal alone learns the standard deviations of independent dimensions, largest first."""
    model = NICE((4,), couplings=2, hidden=4, layers=1, prior="normal").double()
    deviations = torch.tensor([0.5, 4.0, 1.0, 2.0], dtype=torch.float64)
    x = randn(4000, 4) * deviations
    for p in (p for coupling in model.couplings for p in coupling.parameters()):
        p.data.zero_()
        p.requires_grad_(False)
    optimiser = torch.optim.Adam([model.scaling.log_scale], 0.1)
    for _ in range(120):
        optimiser.zero_grad()
        model(x).mean().neg().backward()
        optimiser.step()
    torch.testing.assert_close(model.spectrum(), deviations.sort(descending=True).values, rtol=0.05, atol=0)


def test_two_runs_are_bit_identical():
    def train():
        torch.manual_seed(0)
        model = NICE((1, 8, 8), hidden=32, layers=2)
        optimiser = torch.optim.Adam(model.parameters(), 1e-3)
        losses = []
        for _ in range(10):
            optimiser.zero_grad()
            loss = -model(images(32, (1, 8, 8), torch.float32)).mean()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return losses, model.sample(2, generator=torch.Generator().manual_seed(0))

    (first, x), (second, y) = train(), train()
    assert first == second and first[-1] < first[0] and torch.equal(x, y)


# --- state, samples, input ----------------------------------------------------------------------------


def test_state_survives_saving_copying_pickling():
    model, x = random_nice(dtype=torch.float32, layers=(1, 2, 1, 1)), images(3, (1, 4, 4), torch.float32)
    again = NICE(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    for other in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.log_prob(x), model.log_prob(x))
    assert isinstance(model, Flow)


def test_temperature():
    model = random_nice()
    spread = [model.sample(64, temperature=t, generator=torch.Generator().manual_seed(0)).std() for t in (0, 0.5, 1)]
    assert spread == sorted(spread)
    mode = model.sample(2, temperature=0)
    assert torch.equal(mode[0], mode[1])


def test_bad_input_and_empty_batches():
    with pytest.raises(ValueError, match=r"image_shape: expected an even number of dimensions, got 9 in \(1, 3, 3\)"):
        NICE((1, 3, 3))
    with pytest.raises(ValueError, match="layers: expected one number or 4"):
        NICE((1, 4, 4), layers=(1, 2))
    with pytest.raises(ValueError, match="prior: expected one of logistic, normal, got 'cauchy'"):
        NICE((1, 4, 4), prior="cauchy")
    with pytest.raises(ValueError, match="interval: expected low < high"):
        NICE((1, 4, 4), hidden=4, interval=(1.0, 0.0))
    with pytest.raises(ValueError, match="preset: expected one of mnist, cifar10"):
        NICE.preset("svhn")
    model = random_nice()
    with pytest.raises(ValueError, match=r"x: expected \[B, 1, 4, 4\], got \[2, 16\]"):
        model.log_prob(torch.zeros(2, 16))
    with pytest.raises(ValueError, match=r"context: expected None, got \[2, 3\]"):
        model.sample(2, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"context: expected \[2, 3\], got None"):
        random_nice(context_features=3).sample(2)
    assert model.log_prob(torch.zeros(0, 1, 4, 4).double()).shape == (0,)
    assert model.sample(0).shape == (0, 1, 4, 4)


def test_presets():
    for name in PRESETS:
        model = NICE.preset(name, image_shape=(1, 2, 2), hidden=4)
        assert len(model.couplings) == PRESETS[name]["couplings"]
    layers = [sum(isinstance(m, nn.ReLU) for m in c.network.mlp) for c in model.couplings]
    assert layers == [1, 1, 3, 3, 2, 2, 1, 1]
    assert max(p.abs().max() for p in model.parameters()) <= 0.01


def test_compiles():
    model, x = random_nice(dtype=torch.float32), images(3, (1, 4, 4), torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
