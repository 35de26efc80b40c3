"""Planar flows, and what they have in common with radial flows."""

import math

import pytest
import torch

import fastflow
from fastflow import models, nn, ops
from fastflow.bench.measure import peak_memory
from fastflow.ops._root import derivative, log_derivative, tanh_root
from fastflow.ops.planar import constrained
from fastflow.testing.case import randn

FLOWS = ("planar", "radial")


def parameters(flow, *sizes, dtype=torch.float64, gain=1.0):
    """Of ``sizes`` = [..., K, D], as the op takes them."""
    *rows, dim = sizes
    vector = lambda seed: gain * randn(*sizes, seed=seed).to(dtype)  # noqa: E731
    number = lambda seed: randn(*rows, seed=seed).to(dtype)  # noqa: E731
    if flow == "planar":
        return vector(10), vector(20) / dim**0.5, number(30)
    return vector(10), number(20), number(30)


def op(flow, *arguments, **options):
    return getattr(ops, flow)(*arguments, **options)


# --- the scalar equation ------------------------------------------------------------------------------


def test_root_is_the_root():
    """Over 60 orders of magnitude of the slope and 33 of v, against bisection."""
    v = torch.logspace(-30, 3, 67, dtype=torch.float64)[:, None]
    slope = torch.cat([torch.logspace(-30, -0.01, 61), torch.zeros(1), 1 + torch.logspace(-3, 6, 40)]).double()

    def f(a):  # for s < 0 all terms are positive; tanh a = a / (1 + w) by its continued fraction
        z = a * a
        w = z / (3 + z / (5 + z / (7 + z / (9 + z / (11 + z / (13 + z / (15 + z / 17)))))))
        rest = torch.where(a < 0.7, a * w / (1 + w), a - a.tanh())
        return torch.where(slope < 1, slope * a + (1 - slope) * rest, a + (slope - 1) * a.tanh())

    low, high = torch.zeros_like(v + slope), v + (1 - slope).clamp(min=0)
    for _ in range(200):  # in the logarithm first
        middle = torch.where(low > 0, (low * high).sqrt(), high * 1e-6)
        middle = torch.where(high / 2 < low, (low + high) / 2, middle)
        above = f(middle) > v
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    # a few roundings of v, times what the slope there makes of them
    allowed = 2e-15 * torch.maximum(v / derivative(slope, high), high)
    for sign in (1, -1):
        assert ((tanh_root(sign * v, slope) - sign * high).abs() <= allowed).all()


def test_root_at_the_edges():
    v = torch.tensor([0.0, math.nan, 1.0, 1e-9], dtype=torch.float64)
    a = tanh_root(v, torch.tensor([0.0, 1.0, math.nan, 0.0], dtype=torch.float64))
    assert a[0] == 0 and a[1].isnan() and a[2].isnan()
    assert abs(a[3] - 3e-9 ** (1 / 3)) < 1e-8  # a - tanh a = a^3 / 3 - ...


def test_root_differentiates_implicitly():
    v, slope = (2 * randn(40)).requires_grad_(), (3 * randn(40, seed=1).abs() + 0.05).requires_grad_()
    assert torch.autograd.gradcheck(tanh_root, (v, slope)) and torch.autograd.gradgradcheck(tanh_root, (v, slope))
    assert torch.autograd.gradcheck(log_derivative, (slope, v)) and torch.autograd.gradgradcheck(
        log_derivative, (slope, v)
    )


# --- both flows: meaning ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dim", [1, 8])
@pytest.mark.parametrize("flow", FLOWS)
def test_logdet_is_that_of_the_jacobian(flow, dim, inverse, backend):
    z, given = randn(5, dim), parameters(flow, 16, dim)
    run = lambda x: op(flow, x, *given, inverse=inverse, backend=backend)  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(lambda x: run(x)[0].sum(0), z).transpose(0, 1)
    sign, truth = torch.linalg.slogdet(jacobian)
    # the Jacobian's own determinant loses what its condition says
    allowed = 1e-12 * max(1, torch.linalg.cond(jacobian).max().item() / 100)
    assert (run(z)[1] - truth).abs().max() < allowed and (sign > 0).all()


@pytest.mark.parametrize("flow, name", [("planar", "Planar"), ("radial", "Radial")])
def test_parity_with_normflows(flow, name):
    """The same parameters: values, log-determinants, gradients."""
    theirs = pytest.importorskip("normflows").flows
    z, given = randn(6, 5), parameters(flow, 4, 5)
    given = [p.clone().requires_grad_() for p in given]
    value, logdet = op(flow, z, *given)
    expected, total, leaves = z, 0, []
    for k in range(4):
        layer = getattr(theirs, name)((5,)).double()
        names = ("u", "w", "b") if flow == "planar" else ("z_0", "alpha", "beta")
        with torch.no_grad():
            for attribute, p in zip(names, given, strict=True):
                getattr(layer, attribute).copy_(p[k])
        leaves.append([getattr(layer, attribute) for attribute in names])
        expected, change = layer(expected)
        total = total + change
    assert (value - expected).abs().max() < 1e-12 and (logdet - total).abs().max() < 1e-12
    grads = torch.autograd.grad((value.sin() * logdet[:, None]).sum(), given)
    others = torch.autograd.grad((expected.sin() * total[:, None]).sum(), [p for ps in leaves for p in ps])
    for i, grad in enumerate(grads):
        stacked = torch.stack([g.reshape(grad.shape[1:]) for g in others[i::3]])
        assert (grad - stacked).abs().max() < 1e-11 * max(1, stacked.abs().max().item())


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("flow", FLOWS)
def test_parameters_of_each_sample(flow, inverse):
    """As one sample at a time; equal ones as shared ones, whose gradient is the sum."""
    z, each = randn(70, 4), [p.requires_grad_() for p in parameters(flow, 70, 3, 4)]
    value, logdet = op(flow, z, *each, inverse=inverse)
    for b in (0, 1, 69):
        one, change = op(flow, z[b : b + 1], *(p[b] for p in each), inverse=inverse)
        assert (value[b] - one[0]).abs().max() < 1e-13 and (logdet[b] - change[0]).abs() < 1e-13
    shared = [p.requires_grad_() for p in parameters(flow, 3, 4)]
    copies = [p.detach().expand(70, *p.shape).requires_grad_() for p in shared]
    found = []
    for given in (shared, copies):
        value, logdet = op(flow, z, *given, inverse=inverse)
        found.append(torch.autograd.grad(value.sin().sum() + logdet.square().sum(), given))
    for a, b in zip(*found, strict=True):
        assert (a - b.sum(0)).abs().max() < 1e-12 * max(1, a.abs().max().item())


@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("flow", FLOWS)
def test_roundtrip(flow, dtype, allowed):
    z, given = randn(300, 6).to(dtype), parameters(flow, 16, 6, dtype=dtype, gain=0.5)
    for inverse in (False, True):
        x, logdet = op(flow, z, *given, inverse=inverse)
        back, minus = op(flow, x, *given, inverse=not inverse)
        assert (back - z).abs().max() < 10 * allowed and (back - z).abs().median() < allowed
        assert (logdet + minus).abs().median() < allowed


@pytest.mark.parametrize("direction", ["density", "sampling"])
@pytest.mark.parametrize("name", ["Planar", "Radial"])
def test_density_integrates_to_one(name, direction):
    torch.manual_seed(0)
    model = getattr(models, name)(features=2, steps=6, direction=direction).double()
    line = torch.linspace(-12, 12, 601, dtype=torch.float64)
    with torch.no_grad():
        density = model.log_prob(torch.cartesian_prod(line, line)).exp().view(601, 601)
        assert abs(torch.trapezoid(torch.trapezoid(density, line), line).item() - 1) < 1e-2
        x, logp = model.sample_and_log_prob(50, generator=torch.Generator().manual_seed(0))
        assert (model(x) - logp).abs().max() < 1e-8


# --- both flows: how they are computed ----------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("flow", FLOWS)
def test_gradients_are_the_same_bits_on_any_number_of_threads(flow, inverse):
    z, given = randn(700, 5).float(), [p.requires_grad_() for p in parameters(flow, 9, 5, dtype=torch.float32)]
    threads, found = torch.get_num_threads(), []
    try:
        for n in (threads, 1, 3):
            torch.set_num_threads(n)
            value, logdet = op(flow, z, *given, inverse=inverse)
            found.append((value, logdet, *torch.autograd.grad(value.sum() + logdet.square().sum(), given)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("flow", FLOWS)
def test_memory_does_not_grow_with_depth(flow):
    """But for the gradients of the parameters, which are counted out."""
    z, peaks = torch.randn(512, 8, requires_grad=True), []
    for steps in (2, 64):
        given = [p.requires_grad_() for p in parameters(flow, steps, 8, dtype=torch.float32)]

        def step(given=given):
            value, logdet = op(flow, z, *given)
            return torch.autograd.grad(value.sum() + logdet.sum(), (z, *given))

        step()
        peaks.append(peak_memory(step) - sum(4 * p.numel() for p in given))
    assert peaks[1] <= peaks[0] + 4096, peaks  # a state more would be 16 KB


@pytest.mark.parametrize("flow", FLOWS)
def test_layouts_running_logdet_and_half_precision(flow):
    z, given = randn(9, 4).float(), parameters(flow, 3, 4, dtype=torch.float32)
    value, logdet = op(flow, z, *given)
    strided = [torch.stack([p, p], -1)[..., 0] for p in given]
    other, total = op(flow, torch.cat([z, z], 1)[:, 4:], *strided, logdet=torch.ones(9))
    assert torch.equal(value, other) and torch.allclose(total, logdet + 1)
    half, change = op(flow, z.bfloat16(), *given)
    assert half.dtype == torch.bfloat16 and change.dtype == torch.float32


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("flow", FLOWS)
def test_nothing_to_do(flow, backend):
    """No samples; no steps, which are the identity."""
    given = [p.requires_grad_() for p in parameters(flow, 3, 4)]
    value, logdet = op(flow, randn(3, 4)[:0], *given, backend=backend)
    assert value.shape == (0, 4) and logdet.shape == (0,)
    grads = torch.autograd.grad(value.sum() + logdet.sum(), given, allow_unused=True, materialize_grads=True)
    assert all(not g.any() for g in grads)
    z = randn(5, 4).requires_grad_()
    value, logdet = op(flow, z, *(p[:0] for p in given), backend=backend)
    assert torch.equal(value, z) and not logdet.any()
    assert torch.equal(torch.autograd.grad(value.sum(), z)[0], torch.ones_like(z))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("flow", FLOWS)
def test_nan_stays_nan(flow, inverse):
    """Of a sample in that sample alone, of a parameter in all."""
    z, given = randn(5, 3), parameters(flow, 4, 3)
    z[2, 1] = math.nan
    value, logdet = op(flow, z, *given, inverse=inverse)
    assert value[2].isnan().any() and logdet[2].isnan()
    assert not value[[0, 1, 3, 4]].isnan().any() and not logdet[[0, 1, 3, 4]].isnan().any()
    for i in range(3):
        broken = [p.clone() for p in given]
        broken[i].view(-1)[1] = math.nan
        value, logdet = op(flow, randn(5, 3), *broken, inverse=inverse)
        assert logdet.isnan().all() and value.isnan().any(1).all()


@pytest.mark.parametrize("flow", FLOWS)
def test_compile(flow):
    z, given = randn(5, 3).requires_grad_(), [p.requires_grad_() for p in parameters(flow, 4, 3)]

    def run(z, given):
        value, logdet = op(flow, z, *given)
        back, minus = op(flow, value.sin(), *given, inverse=True)
        return back.square().sum() + (logdet * minus).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(z, given), compiled(z, given))
    for a, b in zip(*(torch.autograd.grad(f(z, given), (z, *given)) for f in (run, compiled)), strict=True):
        assert torch.equal(a, b)


def test_torch_func():
    z, given = randn(4, 3), parameters("planar", 3, 3)
    for inverse in (False, True):
        f = lambda x: fastflow.planar(x, *given, inverse=inverse)[1].sum()  # noqa: B023, E731
        whole, each = torch.func.grad(f)(z), torch.func.vmap(torch.func.grad(lambda x, f=f: f(x[None])))(z)
        assert (whole - each).abs().max() < 1e-12


# --- the edge of invertibility ------------------------------------------------------------------------


def test_the_constraint_holds():
    """w . û > -1 for any u and w: the slope is positive, and û has that product up to the rounding of the product."""
    u, w = 5 * torch.randn(10000, 8), 5 * torch.randn(10000, 8)
    made, slope = constrained(u, w)
    assert (slope > 0).all() and ((w * u).sum(1) < -80).any()
    product = (w.double() * made.double()).sum(1)
    scale = (w.double() * u.double()).abs().sum(1)
    assert ((product - (slope.double() - 1)).abs() <= 8 * torch.finfo(torch.float32).eps * scale).all()
    _, logdet = fastflow.planar(torch.randn(64, 8), u[:, None][:64], w[:, None][:64], torch.zeros(64, 1))
    assert logdet.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("product", [-5.0, -20.0, -60.0, -300.0])
def test_edge_of_invertibility(product, dtype):
    """Slopes down to the smallest number there is, at the inflection and where tanh is saturated."""
    w = torch.tensor([[1.0, 0.0]], dtype=dtype)
    u, b = product * w, torch.zeros(1, dtype=dtype)
    z = torch.tensor([[0.0, 1.0], [1e-4, 0.0], [-0.3, 0.0], [2.0, 1.0], [30.0, -1.0], [-2e4, 0.0]], dtype=dtype)
    for backend in ("cpu", "reference"):
        x, logdet = fastflow.planar(z, u, w, b, backend=backend)
        assert x.isfinite().all() and logdet.isfinite().all() and (x[:, 1] == z[:, 1]).all()
        back, minus = fastflow.planar(x, u, w, b, inverse=True, backend=backend)
        assert back.isfinite().all() and minus.isfinite().all()
        # what the rounding of z' itself is worth there, to the third root where the slope is gone
        eps = torch.finfo(dtype).eps
        near = torch.maximum(4 * eps * z.abs(), torch.full_like(z, eps) ** (1 / 3) * (z.abs() < 1))
        slope = torch.nn.functional.softplus(torch.tensor(product, dtype=torch.float64))
        here = derivative(slope, z[:, :1].double())
        assert ((back - z).abs() <= torch.minimum(near.double(), 8 * eps * (1 + z.abs()) / here)).all()


def test_far_away():
    """Where tanh is saturated a unit is a shift."""
    z, given = 1e4 * randn(20, 3).float(), parameters("planar", 8, 3, dtype=torch.float32)
    leaves = [p.requires_grad_() for p in given]
    for inverse in (False, True):
        x, logdet = fastflow.planar(z, *leaves, inverse=inverse)
        grads = torch.autograd.grad(x.sum() + logdet.sum(), leaves)
        assert all(t.isfinite().all() for t in (x, logdet, *grads))
        assert (x - z).abs().max() < 100


def test_no_direction():
    """A w of zeros has no û: NaN, and not a number."""
    x, logdet = fastflow.planar(torch.ones(2, 3), torch.ones(1, 3), torch.zeros(1, 3), torch.zeros(1))
    assert x.isnan().all() and x.shape == (2, 3)


# --- bad input ----------------------------------------------------------------------------------------

Z, V, N = torch.zeros(4, 3), torch.ones(2, 3), torch.zeros(2)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (TypeError, "z: expected float32", lambda: fastflow.planar(Z.long(), V, V, N)),
        (ValueError, r"z: expected \[B, D\]", lambda: fastflow.planar(Z[None], V, V, N)),
        (ValueError, r"z: expected \[B, D\] with D at least 1", lambda: fastflow.planar(Z[:, :0], V[:, :0], V, N)),
        (ValueError, r"w: expected \[K, D\] or \[B, K, D\]", lambda: fastflow.planar(Z, V, V[0], N)),
        (ValueError, r"w: expected shape \[2, 3\] for z of shape \[4, 3\]", lambda: fastflow.planar(Z, V, V[:, :2], N)),
        (ValueError, r"u: expected shape \[2, 3\]", lambda: fastflow.planar(Z, V[:1], V, N)),
        (ValueError, r"b: expected shape \[2\]", lambda: fastflow.planar(Z, V, V, N[:1])),
        (ValueError, r"w: expected shape \[4, 2, 3\]", lambda: fastflow.planar(Z, V, V.expand(5, 2, 3), N)),
        (TypeError, "u: float64 goes with float64", lambda: fastflow.planar(Z, V.double(), V, N)),
        (ValueError, r"logdet: expected \[4\]", lambda: fastflow.planar(Z, V, V, N, logdet=N)),
        (ValueError, r"centre: expected shape \[2, 3\]", lambda: fastflow.radial(Z, V[:, :2], N, N)),
        (ValueError, r"beta: expected shape \[2\]", lambda: fastflow.radial(Z, V, N, N[:1])),
        (ValueError, "alpha_map: expected one of abs, softplus", lambda: fastflow.radial(Z, V, N, N, alpha_map="exp")),
        (ValueError, "steps: expected a whole number", lambda: nn.Planar(3, 0)),
        (ValueError, "features: expected a whole number", lambda: nn.Radial(0, 1)),
        (ValueError, r"context: expected .* \[4, 14\], got none", lambda: nn.Planar(3, 2, amortised=True)(Z)),
        (ValueError, r"context: expected .* \[4, 10\], got \[4, 9\]", lambda: nn.Radial(3, 2, True)(Z, Z.repeat(1, 3))),
        (ValueError, "direction: expected density or sampling", lambda: models.Planar(direction="both")),
    ],
)
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()


# --- layers and models --------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.Planar, nn.Radial])
def test_amortised_layer(layer):
    """Its context is what its parameters would be."""
    own, given = layer(3, 4).double(), layer(3, 4, amortised=True)
    assert own.context_features == 0 and not list(given.parameters())
    flat = torch.cat([p.detach().flatten() for p in own.parameters()])
    assert flat.shape == (given.context_features,)
    x, context = randn(6, 3), flat.expand(6, -1).clone().requires_grad_()
    z, logdet = given(x, context)
    for a, b in zip((z, logdet), own(x), strict=True):
        assert (a - b).abs().max() < 1e-13
    back, minus = given.inverse(z, context)
    assert (back - x).abs().max() < 1e-9 and (logdet + minus).abs().max() < 1e-8
    assert torch.autograd.grad(z.sum(), context)[0].shape == context.shape


def u1(z):
    """The first energy of the paper's figure 3."""
    ring = ((z.norm(dim=1) - 2) / 0.4).square() / 2
    left, right = (torch.exp(-(((z[:, 0] + s) / 0.6).square()) / 2) for s in (-2.0, 2.0))
    return ring - torch.log(left + right + 1e-9)


@pytest.mark.parametrize("name", ["Planar", "Radial"])
def test_fits_an_energy_and_data(name):
    """KL(q | exp(-U1)) falls, up to its constant; and so does -log p of samples that the flow has to bend to."""
    torch.manual_seed(0)
    for direction in ("sampling", "density"):
        model = getattr(models, name)(features=2, steps=8, direction=direction)
        data = torch.randn(400, 2) * torch.tensor([1.0, 0.3])
        data[:, 1] += data[:, 0].square()
        optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.02), []
        for _ in range(150):
            if direction == "sampling":
                x, logq = model.sample_and_log_prob(256)
                loss = (logq + u1(x)).mean()
            else:
                loss = -model(data).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
        assert last < first - 0.5, (direction, first, last)
    again = getattr(models, name)(**model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(data), model(data)) and model.sample(3).shape == (3, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name, direction", [("Planar", "sampling"), ("Planar", "density"), ("Radial", "sampling")])
def test_two_moons(name, direction):
    """A Gaussian reaches 1.91 nats, this much shorter training than the recipe's already 1.35."""
    make_moons = pytest.importorskip("sklearn.datasets").make_moons
    data, test = (
        torch.tensor(make_moons(n, noise=0.1, random_state=s)[0]).float() for s, n in enumerate((20000, 5000))
    )
    torch.manual_seed(0)
    model = getattr(models, name)(features=2, steps=32, direction=direction)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2000)
    for _ in range(2000):
        optimizer.zero_grad()
        (-model(data[torch.randint(len(data), (512,))]).mean()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        assert -model(test).mean() < 1.35
