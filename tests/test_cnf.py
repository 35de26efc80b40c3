"""CNF and FFJORD: densities that integrate to one, both directions, their regularisers, training."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from fastflow.models import CNF, FFJORD, PlanarDynamics
from fastflow.models.ffjord import PRESETS
from fastflow.nn import BottleneckDynamics, MLPDynamics
from fastflow.ops import exact_trace
from fastflow.testing.case import randn

pytestmark = pytest.mark.usefixtures("one_thread")


def strong(model, gain=2.0):
    """With weights that make a flow of some strength."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(gain)
    return model


def planar(**options):
    torch.manual_seed(0)
    return strong(CNF({"kind": "planar", "features": 2, "width": 16, "hidden": 8}, **options))


def ffjord(**options):
    torch.manual_seed(0)
    return strong(FFJORD(2, **{"hidden": (16, 16), "trace": "exact", **options}))


MODELS = {
    "planar": lambda: planar(time=2.0, base_std=0.1**0.5),
    "bottleneck": lambda: strong(
        CNF(BottleneckDynamics(MLPDynamics(2, (8,)), MLPDynamics(2, (8,))), 2, trace="bottleneck", eval_trace="exact")
    ),
    "ffjord": lambda: ffjord(time=1.0),
    "blocks": lambda: ffjord(blocks=2, batch_norm=True, layer="concat", activation="softplus"),
}
every = pytest.mark.parametrize("name", MODELS)


def made(name):
    """With the statistics of some batches."""
    torch.manual_seed(1)
    model = MODELS[name]()
    with torch.no_grad():
        for _ in range(3):
            model(0.5 + 0.8 * randn(40, 2).float())
    return model.eval()


# --- densities ----------------------------------------------------------------------------------------


@every
def test_it_is_a_density(name):
    """On a grid it adds up to one."""
    model = made(name)
    line = torch.arange(-7, 7, 0.1)
    with torch.no_grad():
        density = model(torch.cartesian_prod(line, line)).double().exp()
    assert float(density.sum()) * 0.01 == pytest.approx(1, abs=1e-2)


@every
def test_density_by_the_jacobian(name):
    model, x = made(name).double(), randn(5, 2)
    for block in model.blocks:
        block.rtol = block.atol = 1e-8
    jacobian = torch.autograd.functional.jacobian(lambda x: model.bijection(x)[0].sum(0), x).transpose(0, 1)
    expected = model.base.log_prob(model.bijection(x)[0]) + torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(model.log_prob(x), expected, rtol=0, atol=1e-6)


@every
def test_samples_and_their_density(name):
    model = made(name)
    for block in model.blocks:
        block.rtol = block.atol = 1e-6
    with torch.no_grad():
        x, log_prob = model.sample_and_log_prob(50, generator=torch.Generator().manual_seed(0))
        again = model.sample(50, generator=torch.Generator().manual_seed(0))
        # two solves of some steps at 1e-6, of which flow and base make more
        torch.testing.assert_close(model(x), log_prob, rtol=0, atol=1e-3)
        torch.testing.assert_close(again, x, rtol=0, atol=1e-3)
        assert model.sample(7, temperature=0.0).std(0).max() < 1e-5
    assert model.sample(0).shape == (0, 2) and model(x[:0]).shape == (0,)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "module"])
def test_score_and_its_divergence(fused):
    """Second derivatives of log p with respect to x, against differences of first ones."""
    model, x = ffjord(method="rk4", step_size=0.1).double(), randn(4, 2).requires_grad_()
    for block in model.blocks:
        block.fused = fused

    def score(x, create_graph=False):
        return torch.autograd.grad(model(x).sum(), x, create_graph=create_graph)[0]

    by_graph = torch.autograd.grad(score(x, True)[:, 1].sum(), x)[0]
    step = torch.tensor([0.0, 1e-5], dtype=torch.float64)
    ahead, behind = (score((x + s * step).detach().requires_grad_()) for s in (1, -1))
    torch.testing.assert_close(by_graph[:, 1], (ahead - behind)[:, 1] / 2e-5, rtol=1e-6, atol=1e-7)


# --- traces and regularisers --------------------------------------------------------------------------


def test_planar_trace_in_closed_form():
    torch.manual_seed(0)
    dynamics, x = PlanarDynamics(3, width=7, hidden=5).double(), randn(6, 3)
    value, trace = dynamics.value_and_trace(0.3, x)
    torch.testing.assert_close((dynamics(0.3, x), value), (value, exact_trace(lambda x: dynamics(0.3, x), x)[0]))
    torch.testing.assert_close(trace, exact_trace(lambda x: dynamics(0.3, x), x)[1])


def test_several_probes_and_their_error():
    model, x = made("blocks"), randn(200, 2).float()
    exact = model.log_prob(x, trace="exact")
    estimate = model.log_prob_estimate(x, probes=16)
    assert torch.equal(model(x), exact)  # the model's own trace
    within = (estimate.log_prob - exact).abs() <= 4 * estimate.standard_error + 1e-4
    assert within.float().mean() > 0.97 and estimate.standard_error.mean() > 1e-3
    with pytest.raises(ValueError, match="at least 2, got 1"):
        model.log_prob_estimate(x, probes=1)


def test_exact_evaluation_of_a_model_trained_with_probes():
    model, x = ffjord(trace="hutchinson", eval_trace="exact"), randn(20, 2).float()
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model.log_prob(x, trace="exact"))


def test_loss_has_the_regularisers():
    x = randn(10, 2).float()
    plain = ffjord(method="rk4", step_size=0.1)
    assert torch.equal(plain.loss(x, 0.0), -plain(x))
    model = ffjord(method="rk4", step_size=0.1, kinetic=0.5, jacobian=0.25)
    loss = model.loss(x, 0.0)
    energies = model.blocks[0].energies
    expected = -plain(x) + 0.5 * energies.kinetic + 0.25 * energies.jacobian
    torch.testing.assert_close(loss, expected)
    # |f|^2 and |df/dx|^2 at the start, times a short time
    short = ffjord(time=1e-3, kinetic=1.0, jacobian=1.0)
    short.loss(x, 0.0)
    dynamics = short.blocks[0].dynamics
    jacobian = torch.autograd.functional.jacobian(lambda x: dynamics(0.0, x).sum(0), x).transpose(0, 1)
    energies = short.blocks[0].energies
    torch.testing.assert_close(energies.kinetic, 1e-3 * dynamics(0.0, x).square().sum(1), rtol=1e-2, atol=0)
    torch.testing.assert_close(energies.jacobian, 1e-3 * jacobian.square().sum((1, 2)), rtol=1e-2, atol=0)
    loss.mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# --- the rest -----------------------------------------------------------------------------------------


def test_there_and_back():
    model, x = FFJORD(2, time=0.5), randn(100, 2).float()
    with torch.no_grad():
        back, _ = model.bijection.inverse(model.bijection(x)[0])
    torch.testing.assert_close(back, x, rtol=0, atol=1e-4)
    assert 8 <= model.evaluations < 400


@every
def test_rebuilt_from_its_config(name):
    model, x = made(name), randn(5, 2).float()
    if model.config.get("dynamics", "") is None:  # a module of one's own
        assert isinstance(model, CNF)
        return
    again = type(model)(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize("adjoint", [False, True], ids=["steps", "adjoint"])
@pytest.mark.parametrize("name", ["planar", "ffjord"])
def test_it_learns(name, adjoint):
    """An off-centre Gaussian in some steps."""
    torch.manual_seed(0)
    x = 1.0 + 0.4 * torch.randn(200, 2)
    model = planar(adjoint=adjoint) if name == "planar" else ffjord(adjoint=adjoint, train_time=True)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.02), []
    for step in range(25):
        loss = model.loss(x, step / 25).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    gaussian = math.log(2 * math.pi * 0.16) + 1  # its entropy
    assert losses[-1] < losses[0] - 0.3 * (losses[0] - gaussian)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    model = FFJORD.preset(name, blocks=1, hidden=(8,))
    assert model(torch.randn(2, model.config["features"])).isfinite().all()


@pytest.mark.parametrize("dynamics", [MLPDynamics(2, (4,)), PlanarDynamics(2, 4, 4)], ids=["mlp", "planar"])
def test_samples_have_the_dtype_of_the_dynamics(dynamics):
    model = CNF(copy.deepcopy(dynamics).double(), base_std=0.5)
    assert model.sample(3).dtype == model(model.sample(3)).dtype == torch.float64
    assert model.float().sample(3).dtype == torch.float32


def test_bad_arguments():
    with pytest.raises(TypeError, match="dynamics: expected a module .* or a mapping, got <function"):
        CNF(lambda t, x: -x, 2)
    for arguments, message in (
        ({"dynamics": MLPDynamics(3), "features": 2}, "features: expected 3, those of the dynamics, got 2"),
        ({"dynamics": {"kind": "other"}}, "dynamics: expected a module or the kind mlp or planar, got"),
        ({"dynamics": nn.Linear(2, 2)}, "features: expected the shape of a sample"),
        ({"dynamics": MLPDynamics(2), "trace": None}, "trace: a density needs one"),
        ({"dynamics": MLPDynamics(2), "base_std": 0.0}, "base_std: expected a positive number, got 0.0"),
        ({"dynamics": MLPDynamics(2), "solver": "other"}, "method: expected one of"),
        ({"dynamics": MLPDynamics(2), "kinetic": -1.0}, "kinetic: expected a number of at least 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            CNF(**arguments)
    for arguments, message in (
        ({"blocks": 0}, "blocks: expected at least 1, got 0"),
        ({"trace": "bottleneck"}, "trace: expected 'exact' or 'hutchinson', got 'bottleneck'"),
        ({"hidden": (0,)}, "hidden: expected at least 1, got 0"),
        ({"layer": "blend"}, "layer: expected one of concat, concat_squash, ignore, squash, got 'blend'"),
        ({"activation": "relu"}, "activation: expected one of tanh, softplus, elu, silu, swish, got 'relu'"),
    ):
        with pytest.raises(ValueError, match=message):
            FFJORD(2, **arguments)
    for name, value in (("features", 2.0), ("blocks", 1.5), ("hidden", 64), ("hidden", "64-64")):
        with pytest.raises(TypeError, match=f"{name}: expected"):
            FFJORD(**{"features": 2, name: value})
    model = ffjord()
    for call in (lambda c: model(randn(3, 2).float(), c), lambda c: model.sample(3, c)):
        with pytest.raises(ValueError, match="context: this model takes none"):
            call(torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"x: expected \[B, 2\], got \[4, 3\]"):
        model(torch.zeros(4, 3))
