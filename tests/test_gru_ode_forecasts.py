"""Forecasts, streams and samples of GRU-ODE-Bayes."""

import copy
import subprocess
import sys

import pytest
import torch
from test_gru_ode_bayes import made
from test_observations import series

from fastflow.nn import Observations


def test_forecast():
    """It is the prediction before a row at that time, from what came before; what comes later does not matter."""
    model, data = made(), series(5, seed=1)
    mean, std = model.forecast(data, data.times[:2])
    pre = model.filter(data).pre
    torch.testing.assert_close(mean[0, 1], pre[1, :2])
    torch.testing.assert_close(std[0, 1], (pre[1, 2:] / 2).exp())
    past = [data.times[data.series == b] < 1 for b in range(5)]
    early = Observations.from_lists(
        *([t[data.series == b][past[b]] for b in range(5)] for t in (data.times, data.values, data.masks)),
        data.covariates,
    )
    for got, wanted in zip(model.forecast(early, [0.3, 1.0]), model.forecast(data, [0.3, 1.0]), strict=True):
        torch.testing.assert_close(got, wanted)
    own = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = model.forecast(data, own)[0]
    torch.testing.assert_close(model.forecast(data, own.flip(1))[0], together.flip(1))
    for wrong, message in (([-1.0], "got -1"), ([1.0, float("nan")], "got nan"), (own[:2], r"\[5, T\], got \[2, 4\]")):
        with pytest.raises(ValueError, match=f"times: expected .*{message}"):
            model.forecast(data, wrong)


@pytest.mark.parametrize(
    "options",
    [{}, {"clock": "legacy"}, {"solver": "midpoint", "cell": "minimal", "impute": True}, {"solver": "dopri5"}],
)
def test_stream(options):
    """One observation at a time gives what the batch gives, whatever is asked in between, also from a saved state."""
    model, data = made(dropout=0.3 if not options else 0.0, **options), series(5, seed=6)
    pre = model.filter(data).pre
    stream, got = model.stream(5, data.covariates), torch.zeros(data.rows, 2, 2)
    for r in torch.argsort(data.times, stable=True).tolist():
        stream.predict(float(data.times[r]) + 0.1)
        if r % 3 == 0:
            saved = copy.deepcopy(stream.state_dict())
            stream = model.stream(5, data.covariates)
            stream.load_state_dict(saved)
        got[r] = torch.cat(stream.observe(int(data.series[r]), data.times[r], data.values[r], data.masks[r]))
    torch.testing.assert_close(got[:, 0], pre[:, :2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[:, 1], (pre[:, 2:] / 2).exp(), rtol=1e-6, atol=1e-6)
    both = stream.predict(5.0)
    for got, wanted in zip(both, model.forecast(data, [5.0]), strict=True):
        torch.testing.assert_close(got, wanted[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stream.predict([5.0, 5.0], [3, 1])[0], both[0][[3, 1]])


def test_stream_errors():
    stream = made(binary=(1,)).stream(3, torch.zeros(3, 1))
    stream.observe([0, 2], [1.0, 2.0], [[1.0, 0.0], [float("nan"), 1.0]])
    before = stream.state_dict()
    for arguments, message in (
        ((3, 5.0, [1.0, 0.0]), "series: expected 0 to 2, got"),
        (([0, 0], 5.0, [[1.0, 0.0]] * 2), "series: expected every series once"),
        ((0.5, 5.0, [1.0, 0.0]), "series: expected numbers"),
        ((0, 0.5, [1.0, 0.0]), "time: expected a finite one from 1 on, where series 0 stands, got 0.5"),
        ((0, 1.0, [1.0, 0.0]), "time: expected one after the last observation, got 1 twice in series 0"),
        ((0, float("nan"), [1.0, 0.0]), "time: expected a finite one"),
        ((1, -1.0, [1.0, 0.0]), "time: expected a finite one from 0 on"),
        ((0, [5.0, 6.0], [1.0, 0.0]), "time: expected one number"),
        ((0, 5.0, [1.0]), r"value: expected \[1, 2\]"),
        ((0, 5.0, [float("nan"), 0.0], [1, 1]), "value: expected finite numbers, got nan in channel 0 of series 0"),
        ((0, 5.0, [1.0, 0.0], [1, 2]), "mask: expected"),
        ((0, 5.0, [1.0, 0.5]), "values: expected 0 or 1 in binary channel 1"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.observe(*arguments)
    with pytest.raises(ValueError, match="series 2 stands"):
        stream.predict(1.5)
    assert all(torch.equal(t, before[name]) for name, t in stream.state_dict().items())  # nothing has moved
    with pytest.raises(ValueError, match=r"state: expected \[3, 7\] like this stream's"):
        stream.load_state_dict(made().stream(2, torch.zeros(2, 1)).state_dict())
    with pytest.raises(ValueError, match=r"covariates: expected \[2, 1\]"):
        made().stream(2)
    with pytest.raises(ValueError, match="state: expected state, time, count, covariates, got no state"):
        stream.load_state_dict({})
    with pytest.raises(ValueError, match="n: expected at least 0"):
        made().stream(-1)


@pytest.mark.slow  # it imports torch anew
def test_a_stream_goes_on_in_another_process(tmp_path):
    model, data = made(clock="legacy"), series(2)
    stream = model.stream(2, data.covariates)
    stream.observe([0, 1], [0.5, 0.7], torch.ones(2, 2))
    torch.save({"config": model.config, "model": model.state_dict(), "stream": stream.state_dict()}, tmp_path / "f.pt")
    code = """
import sys, torch
saved = torch.load(sys.argv[1])
model = GRUODEBayes(**saved["config"])
model.load_state_dict(saved["model"])
stream = model.stream(2, torch.zeros(2, 1))
stream.load_state_dict(saved["stream"])
stream.observe(1, 1.1, [2.0, float("nan")])
torch.save([*stream.predict(1.5), *stream.state_dict().values()], sys.argv[1])
"""
    # elsewhere: python -c would import the checkout, which has no kernels
    subprocess.run([sys.executable, "-c", code, tmp_path / "f.pt"], check=True, cwd=tmp_path)
    stream.observe(1, 1.1, [2.0, float("nan")])
    expected = [*stream.predict(1.5), *stream.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(torch.load(tmp_path / "f.pt"), expected, strict=True))


def test_sample():
    """Drawn from the prediction and then observed: scored again, it is predicted by what it was drawn from."""
    model = made(horizon=2.0)
    generator = torch.Generator().manual_seed(0)
    x = model.sample(300, torch.ones(300, 1), generator=generator, times=[0.5, 0.5625, 1.25])
    assert x.shape == (300, 3, 6) and torch.isfinite(model(x)).all()
    pre = model.filter(x).pre
    z = (x[..., 1:3].reshape(-1, 2) - pre[:, :2]) / (pre[:, 2:] / 2).exp()
    assert z.mean().abs() < 0.1 and (z.std() - 1).abs() < 0.1
    assert torch.equal(
        x, model.sample(300, torch.ones(300, 1), generator=generator.manual_seed(0), times=[0.5, 0.5625, 1.25])
    )
    still = model.sample(1, torch.ones(1, 1), temperature=0, times=[0.5])
    torch.testing.assert_close(still[0, 0, 1:3], model.stream(1, [[1.0]]).predict(0.5)[0][0])
    assert model.sample(2, torch.ones(2, 1)).shape == (2, 50, 6)
    stream = model.stream(2, torch.ones(2, 1))
    assert stream.sample([0.0, 0.5]).shape == (2, 2, 2) and stream.count.tolist() == [2, 2]
    with pytest.raises(ValueError, match="time: expected one after the last observation, got 0.5 twice in series 0"):
        stream.sample([0.5])
    with pytest.raises(ValueError, match="times: expected"):
        made().sample(2, torch.ones(2, 1))
