"""What continuous flows and GRU-ODE-Bayes must reach: short training with fixed seeds, against Gaussians and means.

The recipes reach more in minutes: benchmarks/results/models.json.
"""

import math

import pytest
import torch

from fastflow.models import CNF, FFJORD, ODENVP, GRUODEBayes
from fastflow.train import load_data
from fastflow.train.data.series import mean_predictor

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def trained(model, draw, steps, lr, clip=None):
    """The model after ``steps`` of Adam on what ``draw(step)`` gives, the rate falling to 0."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        model.loss(draw(step)).mean().backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
    return model.eval()


def batches(data, size):
    """draw(step) of batches that follow one another through the training part."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))

    def draw(step):
        index = order.roll(-step * size)[:size]
        return data.inputs(data.train[index], index, step)

    return draw


def gaussian(points):
    """-log p of the points [N, 2] under the Gaussian that fits them best, which no Gaussian goes below."""
    return 0.5 * torch.linalg.slogdet(torch.cov(points.T)).logabsdet.item() + math.log(2 * math.pi) + 1


def mass(model, low, high, step=0.05):
    """The density summed up over a square of the plane."""
    line = torch.arange(low, high, step)
    with torch.no_grad():
        return model(torch.cartesian_prod(line, line)).double().exp().sum().item() * step**2


@pytest.mark.parametrize("options", [{"trace": "exact"}, {"trace": "hutchinson", "adjoint": True}], ids=str)
def test_ffjord_on_moons(options):
    """Below 1.2 nats, where a Gaussian has 1.9 and the entropy is about 1, within 400 evaluations."""
    torch.manual_seed(0)
    data = load_data("moons")
    model = FFJORD(2, hidden=(64, 64, 64), time=0.5, eval_trace="exact", rtol=1e-4, atol=1e-4, **options)
    trained(model, batches(data, 256), 500, 1e-2)
    held_out = data.held_out[:4000]
    with torch.no_grad():
        reached = -model(held_out).mean().item()
    assert reached < 1.2 < gaussian(held_out) - 0.6
    assert model.evaluations < 400
    assert mass(model, -3, 4) == pytest.approx(1, abs=1e-2)


def test_cnf_on_circles():
    """At least 0.4 nats below a Gaussian."""
    torch.manual_seed(0)
    data = load_data("circles")
    planar = {"kind": "planar", "features": 2, "width": 64, "hidden": 32}
    model = CNF(planar, time=2.0, base_std=0.5, rtol=1e-4, atol=1e-4)
    trained(model, batches(data, 256), 400, 1e-2)
    held_out = data.held_out[:4000]
    with torch.no_grad():
        assert -model(held_out).mean().item() < gaussian(held_out) - 0.4
    assert mass(model, -4, 4) == pytest.approx(1, abs=1e-2)


def test_odenvp_on_digits(digits):
    """Below 2.42 bits a dimension; the histogram of every pixel has 2.43."""
    torch.manual_seed(0)
    solve = {"method": "rk4", "step_size": 0.5, "train_time": False, "adjoint": False}
    model = ODENVP(
        (1, 8, 8), blocks=1, hidden=(24, 24), alpha=1e-3, norm="actnorm", kinetic=0.01, jacobian=0.01, **solve
    )
    draw = batches(digits, 64)
    model.initialize(torch.cat([draw(step) for step in range(4)]))
    trained(model, draw, 120, 1e-2, clip=1.0)
    index = torch.arange(len(digits.held_out))
    with torch.no_grad():
        assert digits.cost(model(digits.inputs(digits.held_out, index, 0))).mean() < 2.42


@pytest.mark.parametrize("name", ["brusselator", "double-ou"])
def test_gru_ode_bayes(name):
    """Forecasts of held-out series: far below the squared error, and the costs in nats, of the mean and the variance of
    every channel."""
    torch.manual_seed(0)
    data = load_data(name, series=600)
    model = GRUODEBayes(data.features, data.covariates, hidden=32, step=0.1, horizon=data.horizon)
    trained(model, batches(data, 50), 150, 1e-2, clip=1.0)
    with torch.no_grad():
        scores = model.scores(data.held_out)
    count = scores.count.sum()
    nats, error = (float(part.sum() / count) for part in (-scores.log_likelihood, scores.squared_error))
    naive_nats, naive_error = mean_predictor(data.train, data.final, data.features)
    assert nats < naive_nats - 0.5 and error < naive_error / 4


@pytest.mark.parametrize("name", ["moons", "double-ou"])
def test_training_repeats_itself_to_the_bit(name):
    """On one thread and on two."""
    data = load_data(name, **({"series": 200} if name == "double-ou" else {}))
    found = []
    for threads in (1, 2, 1):
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        model = FFJORD(2, hidden=(32, 32), time=0.5) if name == "moons" else GRUODEBayes(2, 1, hidden=16, step=0.1)
        found.append(trained(model, batches(data, 100), 10, 1e-2).state_dict())
    for other in found[1:]:
        assert all(torch.equal(other[key], value) for key, value in found[0].items())
