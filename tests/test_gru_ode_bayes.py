"""GRU-ODE-Bayes: the filter against the published algorithm, losses and gradients, settings."""

import json
import math

import pytest
import torch
from test_observations import series
from torch.distributions import Bernoulli, Normal, kl_divergence

from fastflow.bench.plain_gru_ode import PlainGRUODEBayes
from fastflow.models import GRUODEBayes
from fastflow.nn import Observations
from fastflow.nn.gru_ode import Channels, bernoulli_kl, gaussian_kl

# --- the filter ---------------------------------------------------------------------------------------

SMALL = {"features": 2, "covariates": 1, "hidden": 7, "p_hidden": 5, "prep_hidden": 3, "covariates_hidden": 4}


def made(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    model = GRUODEBayes(**{**SMALL, **options})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype).eval()


def asked(start, end, spacing, n=1, features=2, dtype=torch.float64):
    """Series of which nothing is known and everything is asked, at every multiple of the spacing."""
    times = torch.arange(round(start / spacing), round(end / spacing) + 1, dtype=torch.float64) * spacing
    values = torch.zeros(len(times), features)
    return Observations.from_lists(
        [times] * n, [values] * n, [values + 2] * n, torch.linspace(-2, 2, n)[:, None], dtype=dtype
    )


@pytest.mark.parametrize("impute", [False, True])
@pytest.mark.parametrize("cell", ["full", "minimal"])
@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_parity_with_the_published_algorithm(solver, cell, impute):
    options = {**SMALL, "hidden": 20, "cell": cell, "impute": impute, "solver": solver, "mixing": 0.01}
    torch.manual_seed(3)
    plain = PlainGRUODEBayes(**options)
    model = GRUODEBayes(**options, clock="legacy", horizon=3.0)
    model.load_published(plain.state_dict() | {"gru_obs.gru_debug.bias_hh": torch.zeros(60)})
    data = series(20, seed=3)
    out, expected = model.filter(data), plain(data, 3.0)
    for got, path in ((out.states, expected.states), (out.state, expected.state), (out.pre, expected.pre)):
        torch.testing.assert_close(got, path, rtol=0, atol=1e-5)
    loss = model.loss(data).sum()
    torch.testing.assert_close(loss, expected.loss, rtol=1e-4, atol=0)
    loss.backward()
    expected.loss.backward()
    ours = GRUODEBayes(**options)
    ours.load_published({name: p.grad for name, p in plain.named_parameters()})  # gradients by the same names
    for (name, p), (_, wanted) in zip(model.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, wanted.data, rtol=1e-3, atol=1e-4 * wanted.abs().max().item(), msg=name)
    with pytest.raises(ValueError, match="state: expected gru_c.lin_hr.weight for a full cell"):
        GRUODEBayes(**SMALL).load_published({})


@pytest.mark.parametrize("cell", ["full", "minimal"])
@pytest.mark.parametrize("impute", [False, True])
def test_convergence(cell, impute):
    """Euler is of first order, the midpoint rule of second, to what dopri5 gives; series do not end together."""
    options = {"cell": cell, "impute": impute, "dtype": torch.float64, "horizon": 2.0}
    data = series(4, dtype=torch.float64)
    exact = made(solver="dopri5", rtol=1e-11, atol=1e-11, **options).filter(data)
    for solver, slope, margin in (("euler", 1, 0.1), ("midpoint", 2, 0.2)):
        errors = []
        for step in (0.02, 0.01):
            out = made(solver=solver, step=step, **options).filter(data)
            errors.append(float((out.state - exact.state).detach().abs().max()))
        assert abs(math.log2(errors[0] / errors[1]) - slope) < margin, (solver, errors)


@pytest.mark.parametrize("cell", ["full", "minimal"])
def test_bounds(cell):
    """|h| <= 1 and |dh / dt| <= 2, from the covariates and through jumps; exact for Euler's steps up to 1."""
    model = made(cell=cell, step=1.0, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
    path = model.filter(asked(0, 60, 1.0, n=9)).states.view(9, 61, -1)
    assert 0.9 < path.abs().max() <= 1
    assert path.diff(dim=1).abs().max() <= 2
    assert model.filter(series(30, dtype=torch.float64)).states.abs().max() <= 1
    model.step = model.config["step"] = 0.01
    assert (model.filter(asked(0, 1, 0.01)).states.diff(dim=0) / 0.01).abs().max() <= 2


@pytest.mark.parametrize("solver", ["euler", "midpoint", "dopri5"])
def test_rest(solver):
    """Without input and biases h = 0 stays, and predicts the same all the time."""
    model = made(solver=solver, horizon=5.0)
    with torch.no_grad():
        model.covariates_map[-2].weight.zero_()
        model.covariates_map[-2].bias.zero_()
    out = model.filter(asked(0, 2, 0.5, dtype=torch.float32))
    assert not out.states.any() and not out.state.any()
    assert (out.pre == out.pre[0]).all()


def test_series_do_not_know_of_each_other():
    model, data = made(horizon=2.5), series(6)
    x, scores, state = data.to_tensor(), model(data), model.filter(data).state
    order = torch.tensor([3, 0, 5, 2, 4, 1])
    torch.testing.assert_close(model(x[order]), scores[order], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.filter(x[order]).state, state[order], rtol=1e-6, atol=1e-6)
    for b in range(len(x)):
        torch.testing.assert_close(model(x[b : b + 1]), scores[b : b + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"post_loss": "paper", "mixing": 1.0}, {"binary": (1,), "impute": True}])
def test_missing_values_change_no_bit(options):
    model, x = made(**options), series().to_tensor()
    x[..., 2] = torch.where(x[..., 2] > 0, 1.0, 0.0)
    values, missing = x[..., 1:3], (x[..., 3:5] == 0) & (x[..., :1] < torch.inf)
    assert missing.any()
    loss = model.loss(x)
    for other in (float("nan"), float("inf"), -1e30):
        values[missing] = other
        assert torch.equal(model.loss(x), loss)


def test_observations_made_by_hand_are_checked():
    model, data = made(), series()
    nan = torch.where(data.masks == 0, torch.nan, data.values)
    grads = []
    for values in (data.values, nan):
        model.zero_grad()
        model.loss(data._replace(values=values)).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    for wrong, message in (
        ({"values": nan, "masks": torch.where(data.masks == 0, 2.0, data.masks)}, "values: expected finite numbers"),
        ({"masks": data.masks * 5}, "masks: expected 0"),
        ({"times": data.times * 0}, "times: expected one row for a time"),
        ({"times": -data.times}, "times: expected finite ones from 0 on"),
        ({"times": data.times.float()}, "x: expected int64 offsets, float64 times"),
        ({"offsets": data.offsets[:-1]}, "x: expected int64 offsets"),
        ({"offsets": data.offsets - 1}, "offsets: expected to rise from 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model(data._replace(**wrong))
    with pytest.raises(TypeError, match="masks: expected a tensor, got list"):
        model(data._replace(masks=[1.0]))
    with pytest.raises(ValueError, match="times: expected at most .* steps of 0.05 in a row, got 1e[+]300"):
        model(data._replace(times=torch.where(data.times == data.times[data.offsets[1] - 1], 1e300, data.times)))
    model(data)
    data.times[1] = data.times[0]  # what was looked at once is looked at again
    with pytest.raises(ValueError, match="times: expected one row for a time"):
        model(data)
    with pytest.raises(TypeError, match="x: expected Observations or a tensor, got list"):
        model([1.0])


def test_no_observations():
    model = made(horizon=1.0)
    data = Observations.from_lists([[], [0.5]], [[], [[1.0, 2.0]]], covariates=[[1.0], [2.0]])
    assert model(data)[0] == 0 and model.loss(data)[0] == 0 and model(data)[1] != 0
    alone = Observations.from_lists([[]], [torch.zeros(0, 2)], covariates=[[1.0]])
    torch.testing.assert_close(model.filter(alone).state, model.filter(data).state[:1])
    loss = model.loss(alone).sum()
    loss.backward()  # a batch of them trains nothing, and breaks nothing
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    unknown = Observations.from_lists([[]], [[]], covariates=[[1.0]])  # of how many channels
    assert torch.equal(model.filter(unknown).state, model.filter(alone).state) and model(unknown).shape == (1,)
    nothing = torch.zeros(0, 3, 6)
    assert model(nothing).shape == model.loss(nothing).shape == (0,)
    assert model.forecast(nothing, [1.0, 2.0])[0].shape == (0, 2, 2)
    assert model.forecast(alone, [0.5, 1.0])[0].shape == (1, 2, 2)


def test_rows_that_are_all_missing():
    """They jump, like those of the published code; targets alone do not."""
    model = made()
    empty = Observations.from_lists([[0.5]], [[[1.0, 2.0]]], [[[0, 0]]], [[0.3]])
    target = empty._replace(masks=empty.masks + 2)
    at_rest, jumped = model.filter(target), model.filter(empty)
    assert torch.equal(at_rest.pre, jumped.pre) and torch.equal(at_rest.pre, at_rest.post)
    assert not torch.equal(at_rest.states, jumped.states)
    assert model(empty) == 0 and model.loss(empty) == 0


def test_targets():
    """Scored, and not shown to the filter."""
    model, data = made(), series(8, seed=4)
    late = data.times[:, None] > torch.tensor([1.0, 0.5])  # in between only one of the channels is a target
    masks = torch.where((data.masks == 1) & late, 2.0, data.masks)
    assert ((masks == 1).any(1) & (masks == 2).any(1)).any()
    held = data._replace(masks=masks)
    moved = held._replace(values=data.values + 3 * (masks == 2))
    assert torch.equal(model.filter(held).pre, model.filter(moved).pre)
    assert not torch.equal(model.filter(held).pre, model.filter(data).pre)
    pre, target = model.filter(held).pre, masks == 2
    expected = Normal(pre[:, :2], (pre[:, 2:] / 2).exp()).log_prob(data.values)
    scores = model.scores(held)
    assert scores.count.sum() == target.sum() > 0
    torch.testing.assert_close(scores.log_likelihood.sum(), expected[target].sum())
    torch.testing.assert_close(scores.squared_error.sum(), (pre[:, :2] - data.values)[target].square().sum())
    torch.testing.assert_close(model.evaluate(held), scores.log_likelihood)
    assert torch.equal(model.metrics(held)["MSE"], scores.squared_error)
    torch.testing.assert_close(model(held).sum(), expected[masks != 0].sum())
    after = model.channels.post_loss(pre, model.filter(held).post, data.values, "code")[masks == 1].sum()
    torch.testing.assert_close(model.loss(held).sum(), model.mixing * after - expected[masks != 0].sum())
    torch.testing.assert_close(model.evaluate(data), model(data))  # no targets: one step ahead


@pytest.mark.parametrize("options", [{}, {"impute": True, "cell": "minimal"}, {"post_loss": "paper", "binary": (0,)}])
def test_gradient(options):
    """Of the loss, by finite differences."""
    model = made(dtype=torch.float64, hidden=3, p_hidden=2, prep_hidden=2, step=0.2, mixing=0.1, **options)
    data = series(3, longest=2, horizon=0.5, dtype=torch.float64)
    data.values[:, 0] = (data.values[:, 0] > 0).double()
    names, parameters = zip(*model.named_parameters(), strict=True)

    def loss(*given):
        return torch.func.functional_call(
            _Loss(model), {f"model.{n}": p for n, p in zip(names, given, strict=True)}, (data,)
        )

    assert torch.autograd.gradcheck(loss, [p.detach().requires_grad_() for p in parameters])


def test_second_derivative():
    """Of the loss in a direction, by differences of its gradient."""
    model, data = made(dtype=torch.float64, hidden=3, step=0.2), series(3, horizon=0.5, dtype=torch.float64)
    weight = model.cell.hidden_weight
    direction = torch.randn_like(weight)

    def slope(**options):
        return (torch.autograd.grad(model.loss(data).sum(), weight, **options)[0] * direction).sum()

    (second,) = torch.autograd.grad(slope(create_graph=True), weight)
    around = []
    for shift in (1e-5, -2e-5):
        with torch.no_grad():
            weight.add_(shift * direction)
        around.append(slope())
    torch.testing.assert_close((second * direction).sum(), (around[0] - around[1]) / 2e-5, rtol=1e-6, atol=1e-8)


class _Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, data):
        return self.model.loss(data)


# --- losses -------------------------------------------------------------------------------------------


def test_divergences():
    mean, logvar, other, spread, logit, odds = torch.randn(6, 50, dtype=torch.float64)
    p, q = Normal(mean, (logvar / 2).exp()), Normal(other, (spread / 2).exp())
    torch.testing.assert_close(gaussian_kl(mean, logvar, other, spread), kl_divergence(p, q))
    p, q = Bernoulli(logits=logit), Bernoulli(logits=odds)
    torch.testing.assert_close(bernoulli_kl(logit, odds), kl_divergence(p, q))
    assert bernoulli_kl(torch.tensor(200.0), torch.tensor(-200.0)) == 200  # no infinity times zero


def test_post_losses():
    """The two differ in direction, and by much: N(0.2, 0.3) after the jump, 0.5 observed with deviation 0.01."""
    channels = Channels(1, (), 0.01)
    post = torch.tensor([[0.2, 2 * math.log(0.3)]], dtype=torch.float64)
    y, vague = post.new_tensor([[0.5]]), post.new_tensor([[0.0, 40.0]])
    assert channels.post_loss(vague, post, y, "code").item() == pytest.approx(896.1, abs=0.05)
    assert channels.post_loss(vague, post, y, "paper").item() == pytest.approx(3.40, abs=0.005)
    grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    prior, noise = Normal(-0.3, 0.8), Normal(0.5, 0.4)
    density = (prior.log_prob(grid) + noise.log_prob(grid)).softmax(0)  # p_Bayes, on the grid
    bayes = Normal((density * grid).sum(), ((density * grid**2).sum() - (density * grid).sum() ** 2).sqrt())
    pre = torch.tensor([[-0.3, 2 * math.log(0.8)]], dtype=torch.float64)
    got = Channels(1, (), 0.4).post_loss(pre, post, y, "paper")
    torch.testing.assert_close(got[0, 0], kl_divergence(bayes, Normal(post[0, 0], 0.3)), rtol=1e-6, atol=0)


def test_binary_channels():
    model = made(features=3, binary=(1,), observation_std=0.05, mixing=0.5, dtype=torch.float64)
    data = series(6, features=3, dtype=torch.float64)
    with pytest.raises(ValueError, match="values: expected 0 or 1 in binary channel 1"):
        model(data)
    data.values[:, 1] = (data.values[:, 1] > 0).double()
    pre, post, *_ = model.filter(data)
    bit, logit = data.values[:, 1], pre[:, 1]
    got = model.channels.log_prob(pre, data.values)
    torch.testing.assert_close(got[:, 1], Bernoulli(logits=logit).log_prob(bit))
    torch.testing.assert_close(got[:, 2], Normal(pre[:, 2], (pre[:, 5] / 2).exp()).log_prob(data.values[:, 2]))
    right = torch.where(bit > 0, 0.95, 0.05)
    wanted = {
        "code": (Bernoulli(logits=post[:, 1]), Bernoulli(right)),
        "paper": (Bernoulli(right * logit.sigmoid() / (right * logit.sigmoid() + (1 - right) * (-logit).sigmoid())),
                  Bernoulli(logits=post[:, 1])),
    }  # fmt: skip
    for kind, pair in wanted.items():
        got = model.channels.post_loss(pre, post, data.values, kind)
        torch.testing.assert_close(got[:, 1], kl_divergence(*pair))
        assert (got >= 0).all()
    mean, std = model.forecast(data, [1.0])
    assert ((mean[..., 1] > 0) & (mean[..., 1] < 1)).all()
    torch.testing.assert_close(std[..., 1], (mean[..., 1] * (1 - mean[..., 1])).sqrt())
    drawn = model.sample(400, torch.zeros(400, 1), times=[0.5], generator=torch.Generator().manual_seed(0))
    assert set(drawn[:, 0, 2].tolist()) == {0.0, 1.0}
    expected = model.stream(1, [[0.0]]).predict(0.5)
    assert abs(drawn[:, 0, 2].mean() - expected[0][0, 1]) < 4 * expected[1][0, 1] / 20
    assert abs(drawn[:, 0, 1].mean() - expected[0][0, 0]) < 4 * expected[1][0, 0] / 20


# --- the module ---------------------------------------------------------------------------------------


def test_config_and_initialisation():
    model = GRUODEBayes(2, covariates=1, cell="minimal", impute=True, binary=[1], classes=3, horizon=1.0)
    again = GRUODEBayes(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    assert again.config == model.config
    data = series()._replace(values=torch.ones(series().rows, 2))
    assert torch.equal(again(data), model(data))
    assert again.classify(data).shape == (5, 3)
    assert (model.observe[0].bias == 0.05).all() and (model.jump.prep_bias == 0.1).all()
    big = GRUODEBayes.preset("brusselator")
    assert abs(big.jump.prep_weight.std() - math.sqrt(2 / 29)) < 0.06
    assert big.cell.hidden_weight.shape == (150, 50) and big.cell.hidden_weight.abs().max() <= math.sqrt(6 / 100)


def test_dropout():
    """Of the prediction, while training, different before and after a jump."""
    model, data = made(dropout=0.5), series()
    quiet = model(data)
    model.train()
    torch.manual_seed(0)
    loud = model(data)
    assert not torch.equal(loud, quiet) and not torch.equal(model(data), loud)
    torch.manual_seed(0)
    assert torch.equal(model(data), loud)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"features": 0}, "features: expected at least 1"),
        ({"cell": "gru"}, "cell: expected"),
        ({"solver": "rk4"}, "solver: expected"),
        ({"clock": "wall"}, "clock: expected"),
        ({"post_loss": "kl"}, "post_loss: expected"),
        ({"step": 0.0}, "step: expected"),
        ({"horizon": float("inf")}, "horizon: expected"),
        ({"binary": (2,)}, "binary: expected"),
        ({"binary": (1,), "observation_std": 0.5}, "observation_std: expected"),
        ({"observation_std": 0.0}, "observation_std: expected"),
        ({"dropout": 0.1, "impute": True}, "dropout: expected"),
        ({"mixing": -1.0}, "mixing: expected"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        GRUODEBayes(**{**SMALL, **options})


def test_bad_calls():
    model = made()
    with pytest.raises(ValueError, match="expected 2 channels and 1 covariates, got 2 and 2"):
        model(series(covariates=2))
    with pytest.raises(ValueError, match="preset: expected"):
        GRUODEBayes.preset("mimic-iv")
    with pytest.raises(ValueError, match="classes: expected"):
        model.classify(series())


def test_it_learns():
    """Series that go on as they were: half a minute of the published training would do better."""
    torch.manual_seed(0)
    level = torch.randn(64, 1, 1)
    x = torch.zeros(64, 4, 3)
    x[..., 0] = torch.arange(1, 5) / 4
    x[..., 1:2], x[..., 2] = level + 0.1 * torch.randn(64, 4, 1), 1
    model = GRUODEBayes(1, hidden=10, p_hidden=8, prep_hidden=6, step=0.25)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    first = model(x).mean().item()
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(x).mean().backward()
        optimizer.step()
    assert model(x).mean().item() > first + 2
