"""Series as observations and as tensors, and the clocks that say how many steps lie between them."""

import pytest
import torch

from fastflow import use_backend
from fastflow.models import GRUODEBayes
from fastflow.nn import Observations
from fastflow.nn.clock import between, until
from fastflow.ops import cpu
from fastflow.ops.observations import checked_values

# --- observations -------------------------------------------------------------------------------------


def series(n=5, features=2, covariates=1, longest=6, horizon=2.0, dtype=torch.float32, seed=0, digits=2):
    """Random series of 0 to ``longest`` observations, the first of which has them all and the second none."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(longest + 1, (n,), generator=generator)
    lengths[:2] = torch.tensor([longest, 0])[: min(2, n)]
    grid = round(horizon * 10**digits)
    times = [torch.randperm(grid, generator=generator)[:k].sort().values.double() / 10**digits for k in lengths]
    values = [torch.randn(k, features, generator=generator) for k in lengths]
    masks = [torch.bernoulli(torch.full((k, features), 0.7), generator=generator) for k in lengths]
    given = torch.randn(n, covariates, generator=generator) if covariates else None
    return Observations.from_lists(times, values, masks, given, dtype=dtype)


@pytest.mark.parametrize("covariates", [0, 2])
def test_observations_and_their_tensor(covariates):
    made = series(covariates=covariates, dtype=torch.float64)
    x = made.to_tensor()
    assert x.shape == (5, 6, 1 + 2 * 2 + covariates)
    again = Observations.from_tensor(x, 2)
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))
    assert (made.offsets.diff() == torch.bincount(made.series, minlength=5)).all()
    by_hand = torch.stack([made.values[made.series == b].sum() for b in range(5)])
    torch.testing.assert_close(made.total(made.values), by_hand)


def test_empty_observations():
    nothing = Observations.from_tensor(torch.zeros(0, 4, 6), 2)
    assert nothing.batch == nothing.rows == 0 and nothing.to_tensor().shape == (0, 1, 6)
    unseen = Observations.from_lists([[], []], [[], []], covariates=[[1.0], [2.0]])
    assert unseen.offsets.tolist() == [0, 0, 0]
    assert Observations.from_tensor(unseen.to_tensor(), unseen.features).covariates.tolist() == [[1.0], [2.0]]
    rows = torch.full((1, 3, 3), torch.inf)
    assert Observations.from_tensor(rows, 1).rows == 0


def test_missing_values_mean_nothing():
    given = [[0.1, 0.2]], [[[1.0, float("nan")], [float("inf"), 2.0]]], [[[1, 0], [0, 2]]]
    assert Observations.from_lists(*given).values.tolist() == [[1.0, 0.0], [0.0, 2.0]]
    assert Observations.from_lists(given[0], [[[1.0, float("nan")], [0.0, 2.0]]]).masks.tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize(
    "times, value, mask, message",
    [
        ([1.0, 3.0, 2.0], 0.0, 1, "times: expected sorted ones, got 2 after 3 in series 1"),
        ([1.0, 2.0, 2.0], 0.0, 1, "times: expected one row for a time, got 2 twice in series 1"),
        ([-0.5, 2.0, 3.0], 0.0, 1, "times: expected finite ones from 0 on, got -0.5 in series 1"),
        ([1.0, float("nan"), 3.0], 0.0, 1, "times: expected finite ones from 0 on, got nan in series 1"),
        ([1.0, 2.0, float("inf")], 0.0, 1, "times: expected finite ones from 0 on, got inf in series 1"),
        ([1.0, 2.0, 3.0], float("nan"), 1, "values: expected finite .*series 1 at time 2"),
        ([1.0, 2.0, 3.0], float("inf"), 2, "values: expected finite .*series 1 at time 2"),
        ([1.0, 2.0, 3.0], 0.0, 3, "masks: expected 0 .*series 1 at time 2"),
        ([1.0, 2.0, 3.0], 0.0, float("nan"), "masks: expected 0 .*series 1 at time 2"),
    ],
)
def test_bad_observations(times, value, mask, message):
    with pytest.raises(ValueError, match=message):
        Observations.from_lists([[5.0], times], [[[0.0]], [[0.0], [value], [0.0]]], [[[1]], [[1], [mask], [1]]])


def test_bad_tensors():
    x = series(covariates=1).to_tensor()
    with pytest.raises(ValueError, match=r"x: expected floating point rows \[B, L, 7 \+ C\]"):
        Observations.from_tensor(x, 3)
    late = x.clone()
    late[1, 3] = 0
    with pytest.raises(ValueError, match="padding, rows of time infinity, at the end only.* series 1"):
        Observations.from_tensor(late, 2)
    other = x.clone()
    other[0, 1, -1] += 1
    with pytest.raises(ValueError, match="covariates: expected the same finite ones in every row of series 0"):
        Observations.from_tensor(other, 2)
    x[2, :, -1] = torch.nan
    with pytest.raises(ValueError, match="covariates"):
        Observations.from_tensor(x, 2)
    with pytest.raises(ValueError, match="values: expected those of 2 series"):
        Observations.from_lists([[], []], [[]])
    with pytest.raises(ValueError, match=r"values: expected \[2, 1\] for series 0"):
        Observations.from_lists([[0.0, 1.0]], [[[0.0]]])
    with pytest.raises(ValueError, match=r"masks: expected \[1, 1\] for series 0"):
        Observations.from_lists([[0.0]], [[[0.0]]], [[[1], [1]]])


# --- clocks -------------------------------------------------------------------------------------------


def test_exact_clock():
    times = torch.tensor([0.0, 1.1, 4.2, 4.2001, 22.1, 22.1], dtype=torch.float64)
    counts, sizes = between(times[:-1], times[1:], 0.05)
    assert counts.tolist() == [22, 62, 1, 358, 0]  # 62.0000001 steps are 62
    torch.testing.assert_close(counts * sizes, times.diff(), rtol=1e-15, atol=1e-15)
    assert (sizes <= 0.05 * 1.001).all()
    counts, sizes = until(times, 10.0, 0.05)
    assert counts.tolist() == [200, 178, 116, 116, 0, 0]


@pytest.mark.parametrize("horizon, step, steps", [(50, 0.05, 1001), (200, 0.1, 2001), (10, 0.05, 200)])
def test_legacy_clock(horizon, step, steps):
    """Against its loop, in Python's floats."""
    assert until(torch.zeros(1, dtype=torch.float64), horizon, step, "legacy")[0].tolist() == [steps]
    generator = torch.Generator().manual_seed(0)
    times = (torch.rand(300, generator=generator, dtype=torch.float64) * horizon).sort().values
    times[::2] = (times[::2] / step).round() * step  # on the grid, but for rounding
    times = times.unique()
    now, counts = 0.0, []
    for event in times.tolist():
        counts.append(0)
        while now < event - 0.001 * step:
            now += step
            counts[-1] += 1
    got, sizes = between(
        times.new_zeros(len(times)).index_copy(0, torch.arange(1, len(times)), times[:-1]), times, step, "legacy"
    )
    assert got.tolist() == counts and (sizes == step).all()
    left = 0
    while now < horizon:
        now += step
        left += 1
    assert until(times[-1:], horizon, step, "legacy")[0].tolist() == [left]
    assert until(times[-1:] + horizon, horizon, step, "legacy")[0].tolist() == [0]


# --- both in one pass -----------------------------------------------------------------------------------


@pytest.mark.skipif(cpu.unavailable() is not None, reason="no compiled library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"horizon": 1.0, "step": 0.03}, {"solver": "dopri5"}])
def test_the_compiled_passes_say_what_pytorch_says(dtype, options, monkeypatch):
    """The values, steps and jumps of random series, bit by bit."""
    data = series(12, dtype=dtype, seed=2)
    target = torch.arange(data.rows)[:, None] % 3 == 1
    data = data._replace(
        masks=torch.where(target, 2 * data.masks, data.masks),
        values=torch.where(data.masks == 0, torch.nan, data.values),
    )
    model = GRUODEBayes(2, 1, hidden=4, **options).to(dtype)
    assert checked_values(*data) is not None
    calls = []
    monkeypatch.setattr(model, "integrate", lambda *arguments: calls.append(arguments))
    model.filter(data)
    with use_backend("reference"):
        assert checked_values(*data) is None
        model.filter(data)
    (_, schedule, *rest), (_, other, *others) = calls
    for ours, wanted in zip((*schedule, *rest), (*other, *others), strict=True):
        assert ours.dtype == wanted.dtype and torch.equal(ours, wanted)
    assert 0 < schedule.jumps.sum() < data.rows


def test_the_compiled_pass_refuses_what_is_wrong():
    data = series(4, longest=5)
    last, nan = data.rows - 1, torch.nan

    def changed(tensor, place, value):
        return tensor.clone().index_put_(tuple(torch.tensor([i]) for i in place), tensor.new_tensor(value))

    for name, place, value in (
        ("offsets", (1,), data.rows + 1), ("offsets", (0,), 1), ("offsets", (4,), 0),
        ("times", (0,), -1.0), ("times", (0,), nan), ("times", (last,), torch.inf), ("times", (1,), 0.0),
        ("masks", (0, 1), 3.0), ("masks", (0, 0), nan), ("masks", (last, 1), 0.5),
        ("covariates", (3, 0), nan), ("covariates", (0, 0), torch.inf),
    ):  # fmt: skip
        wrong = data._replace(**{name: changed(getattr(data, name), place, value)})
        assert checked_values(*wrong) is None, (name, place, value)
    seen = (data.masks == 1).nonzero()[-1].tolist()
    for value in (nan, torch.inf, -torch.inf):
        assert checked_values(*data._replace(values=changed(data.values, seen, value))) is None
    assert (
        checked_values(*data._replace(values=data.values.clone().requires_grad_())) is None
    )  # their gradient is wanted
