"""Series as data: files, generators, what is held out; then learning them, and forecasts as pictures and tables."""

import gzip
import json
import math
import signal
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from standins import command, environment, run, sample_command, worker, write_series, write_stays

from fastflow.errors import SolverError
from fastflow.models import GRUODEBayes
from fastflow.nn.observations import Observations
from fastflow.train import NonFiniteLoss, Series, UserError, evaluate, load_data, load_model, loop, record
from fastflow.train.checkpoint import load_checkpoint
from fastflow.train.data import series as module
from fastflow.train.metrics import read_metrics
from fastflow.train.recipes import gru_ode_bayes

pytestmark = pytest.mark.usefixtures("one_thread")

HEAD = "ID,Time,Value_a,Value_b,Mask_a,Mask_b,Cov"
GOOD = ["p,3.5,1,2,1,1,5", "q,0,0,-1,0,1,6", "p,0.5,3,nan,1,0,5", "q,4,1,1,1,1,6", "q,2,1,,1,0,6".replace(",,", ",0,")]


def write(path, *lines, head=HEAD):
    path.write_text("\n".join((head, *lines)) + "\n")
    return path


def refuses(message, name, path, **options):
    with pytest.raises((UserError, FileNotFoundError), match=message) as error:
        load_data(name, path, **options)
    assert "\n" not in str(error.value)


def fields(x, d=2):
    return module.split(x, d)


# --- CSV --------------------------------------------------------------------------------------


def test_rows_of_a_file_become_series(tmp_path):
    """Sorted by time, series in the order of the file, zeros where nothing was observed, padding at the end."""
    path = write(tmp_path / "s.csv", *GOOD)
    data = load_data("series", path, test=0.5, seed=0)
    whole = torch.cat((data.train, data.held_out))
    x = whole[whole[:, 0, 5].argsort()]  # by covariate: p, q
    inf = math.inf
    assert x.shape == (2, 3, 6)
    assert x[0].tolist() == [[0.5, 3, 0, 1, 0, 5], [3.5, 1, 2, 1, 1, 5], [inf, 0, 0, 0, 0, 0]]
    assert x[1].tolist() == [[0, 0, -1, 0, 1, 6], [2, 1, 0, 1, 0, 6], [4, 1, 1, 1, 1, 6]]
    assert data.channels == ("a", "b") and data.features == 2 and data.covariates == 1 and data.horizon == 4
    assert data.unit == "nats/observation" and data.shape == (3, 6)
    Observations.from_tensor(x, 2)  # what the model makes of it

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "s.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    again = load_data("series", tmp_path / "folder", test=0.5, seed=0)
    assert torch.equal(again.train, data.train)
    write(tmp_path / "folder" / "t.csv", *GOOD)
    refuses("expected one file .*csv.gz, got s.csv.gz, t.csv", "series", tmp_path / "folder")


def test_held_out_series_have_targets(tmp_path):
    write_series(tmp_path / "s.csv", 50)
    whole, data = load_data("series", tmp_path / "s.csv"), load_data("series", tmp_path / "s.csv", cut=3, targets=2)
    assert (
        torch.equal(whole.train, data.train) and len(whole.held_out) == 10 and not (whole.held_out[..., 3:5] == 2).any()
    )
    times, values, masks, _ = fields(data.held_out)
    after = (times > 3) & times.isfinite()
    assert (after.sum(1) <= 2).all() and (after.sum(1) >= 1).all() and (times <= 3).any(1).all()
    assert ((masks == 2).any(2) == after).all() and ((masks == 1).any(2) == (times <= 3)).all()
    assert torch.equal(values == 0, masks == 0)
    # the first rows after the cut of the series as they were
    t, _, m, _ = fields(whole.held_out)
    keep = ((t > 3) & t.isfinite()).any(1) & (t <= 3).any(1)
    for have, want, seen in zip(times, t[keep], m[keep], strict=True):
        n = int((want <= 3).sum()) + min(2, int(((want > 3) & want.isfinite()).sum()))
        assert torch.equal(have[:n], want[:n]) and have[n:].isinf().all() and seen[:n].any(1).all()
    count = module.observations(data.held_out, 2)
    assert torch.equal(count, (masks == 2).sum((1, 2)).double()) and data.counts(data.train).mean() == data.usual
    every = load_data("series", tmp_path / "s.csv", cut=3)
    assert (
        (fields(every.held_out)[0] > 3) == (fields(every.held_out)[2] == 2).any(2) | fields(every.held_out)[0].isinf()
    ).all()
    refuses(
        "cut: expected held-out series of series with values before and after 99", "series", tmp_path / "s.csv", cut=99
    )
    refuses("targets: expected a cut", "series", tmp_path / "s.csv", targets=3)
    refuses("cut: expected a time", "series", tmp_path / "s.csv", cut=-1)
    refuses("test: expected a fraction", "series", tmp_path / "s.csv", test=2)
    # with a validation set its targets are those of training series, and what was held out is the test set
    valid = load_data("series", tmp_path / "s.csv", cut=3, targets=2, valid=10)
    assert len(valid.train) == 30 and (valid.held_out[..., 3:5] == 2).any() and torch.equal(valid.test, data.held_out)


def test_the_split_is_that_of_the_published_scripts(tmp_path):
    train_test_split = pytest.importorskip("sklearn.model_selection").train_test_split
    write(tmp_path / "s.csv", *(f"{i}.0,1,1,1,1,1,{i}" for i in range(1000)))
    data = load_data("series", tmp_path / "s.csv")
    train, held_out = train_test_split(np.arange(1000), test_size=0.2, random_state=432)
    assert data.train[:, 0, 5].tolist() == train.tolist() and data.held_out[:, 0, 5].tolist() == held_out.tolist()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["p,1,1,2,1,1,5", "p,1,1,2,1,1,5"], r"one row for each time of a series in row 3 \(ID p\), got Time=1"),
        (["p,1,nan,2,1,1,5"], "a finite observed value in row 2 .*Value_a=nan"),
        (["p,1,1,inf,1,1,5"], "a finite observed value in row 2 .*Value_b=inf"),
        (["p,1,1,2,1,2,5"], r"a mask of 0 or 1 in row 2 \(ID p\), got Mask_b=2"),
        (["p,1,1,2,1,nan,5"], "a mask of 0 or 1"),
        (["p,-1,1,2,1,1,5"], "a time from 0 on in row 2 .*Time=-1"),
        (["p,inf,1,2,1,1,5"], "a time from 0 on"),
        (["p,1,1,2,1,1,5", "p,2,1,2,1,1,6"], "covariates of the series to be constant in row 3"),
        (["p,1,1,2,1,1,nan"], "a finite covariate in row 2"),
        (["p,1,1,2,1,1"], "7 fields in every row"),
        (["p,1,one,2,1,1,5"], "numbers but for names: .*'one'"),
        ([], "rows below the header"),
        (["p,1,1,2,1,1,5", "p,2,1,2,1,1,5"], "at least 2 series"),
        (["p,1,1,2,1,0,5", "q,2,1,2,1,0,5"], "channels that are observed in training, not so b"),
    ],
)
def test_bad_rows(tmp_path, lines, message):
    refuses(message, "series", write(tmp_path / "s.csv", *lines))


def test_bad_files(tmp_path):
    for head, message in (
        ("ID,Time,Value_a,Value_b,Mask_a,Cov", "got no Mask_b"),
        ("ID,When,Value_a,Mask_a", "got no Time"),
        ("ID,Time", "got no Value_1"),
        (HEAD + ",Colour", r"Cov\*, got 'Colour'"),
        (HEAD + ",Cov", "every column once"),
    ):
        refuses(message, "series", write(tmp_path / "s.csv", *GOOD, head=head))
    refuses("found nothing", "series", tmp_path / "none.csv")
    refuses("a time of at most horizon=3 .*Time=3.5", "series", write(tmp_path / "s.csv", *GOOD), horizon=3)
    (tmp_path / "s.csv.gz").write_bytes(gzip.compress((tmp_path / "s.csv").read_bytes())[:-9])
    refuses("whole gzip", "series", tmp_path / "s.csv.gz")
    write(tmp_path / "s.csv", *(f"{i},{i},1,{i},1,1,0" for i in range(9)))
    refuses("channels that vary, not so a", "series", tmp_path / "s.csv", standardize=True)


def test_standardised_channels(tmp_path):
    write_series(tmp_path / "s.csv", 40)
    raw, data = (load_data("series", tmp_path / "s.csv", standardize=s) for s in (False, True))
    _, values, masks, _ = fields(data.train)
    for k in range(2):
        seen = values[..., k][masks[..., k] == 1]
        assert abs(seen.mean()) < 1e-6 and seen.std(correction=0) == pytest.approx(1, abs=1e-5)
    back = torch.where(masks == 1, values * data.std + data.mean, 0.0)
    assert torch.allclose(back, fields(raw.train)[1], atol=1e-5)
    assert data.describe()["mean"] == data.mean.tolist() and "mean" not in raw.describe()


# --- generators -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fewest", "most", "joint", "cut", "targets"),
    [("double-ou", 16, 23, 0.2, 4, 1), ("brusselator", 20, 29, 0.8, 35, 3)],
)
def test_generated_series(name, fewest, most, joint, cut, targets):
    data, again = (load_data(name, series=200) for _ in range(2))
    assert isinstance(data, Series) and torch.equal(data.train, again.train) and len(data.train) == 160
    times, values, masks, _ = fields(data.train)
    count = times.isfinite().sum(1)
    assert (
        count.min() >= fewest and count.max() <= most and (times[:, 1:] > times[:, :-1])[times[:, 1:].isfinite()].all()
    )
    share = (masks.sum(2) == 2).sum() / (masks.sum(2) > 0).sum()
    assert share == pytest.approx(joint, abs=0.04) and ((values == 0) | (masks == 1)).all()
    late = fields(data.held_out)[0]
    assert (((late > cut) & late.isfinite()).sum(1) <= targets).all() and data.horizon > times[times.isfinite()].max()
    Observations.from_tensor(data.train, 2)
    with pytest.raises(UserError, match="series: expected a whole number of at least 2, got 1"):
        load_data(name, series=1)


def test_double_ou_is_what_it_says():
    """Levels around (1, -1) of width 1, reached within a few units of time; the noise of both is nearly the same."""
    times, values, masks, _ = fields(load_data("double-ou", series=4000).train)
    for k, level in enumerate((1.0, -1.0)):
        late = values[..., k][(masks[..., k] == 1) & (times > 6)]
        assert late.mean() == pytest.approx(level, abs=0.02)
        assert late.std() == pytest.approx(math.sqrt(1 / 12 + 0.01 / 2), abs=0.02)
        early = values[..., k][(masks[..., k] == 1) & (times == 0)]
        assert len(early) and (early == 0).all()


def test_the_baseline_is_a_gaussian_of_each_channel():
    g = torch.Generator().manual_seed(0)
    values = torch.randn(300, 4, 2, generator=g) * torch.tensor([2.0, 0.5]) + torch.tensor([1.0, -1.0])
    x = torch.cat((torch.arange(4.0).expand(300, 4)[..., None], values, torch.ones(300, 4, 2)), 2)
    data = Series("x", x[:200], module.with_targets(x[200:], 2, 1.5), channels=("a", "b"), horizon=4.0)
    value, name = data.baseline()
    assert value == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=0.05) and "MSE 2." in name
    error = (values[200:, 2:] - values[200:, 1:2]).square().mean().item()  # row 1 is the last that is observed
    assert module.last_value(data.train, data.held_out, 2) == pytest.approx(error)
    constant = torch.cat((x[..., :1], x[:, :1, 1:3].expand(-1, 4, -1), x[..., 3:]), 2)
    assert module.last_value(x, module.with_targets(constant, 2, 1.5), 2) == 0
    assert data.usual == 8 and data.counts(data.held_out).tolist() == [4.0] * 100


# --- PhysioNet 2012 ---------------------------------------------------------------------------


def test_stays(tmp_path):
    write_stays(tmp_path / "set.csv", 40)
    data = load_data("physionet2012", tmp_path / "set.csv", outliers=0.0)
    assert data.channels == ("HR", "Temp") and data.covariates == 12 and data.time == "hours" and data.horizon == 48
    assert len(data.train) == 32 and data.mean.tolist() == pytest.approx([80, 37], abs=0.3)
    times, _, masks, covariates = fields(data.train)
    real = times.isfinite()
    assert times[real].max() <= 48 and masks[real].any(1).all()
    first = covariates[:, 0]
    assert set(first[:, 2].abs().gt(0).int().tolist()) == {0, 1}  # heights that are missing are 0,
    assert ((first[:, 6] == 0) == (first[:, 2] == 0)).all()  # and said to be so
    assert (first[:, 8:].sum(1) == 1).all() and first[:, 3].isfinite().all()
    late = fields(data.held_out)[0]
    assert (((late > 24) & late.isfinite()).sum(1) <= 3).all()


def test_stays_average_duplicates_and_drop_outliers(tmp_path):
    head = "RecordID,Minutes,Parameter,Value"
    lines = [f"{i},{60 * (k + 1)},HR,{80 + i + k}" for i in range(1, 11) for k in range(2)]
    lines += ["1,90,HR,85", "1,90,HR,87", "2,90,HR,1000", "11,0,Age,50"]  # the last one has no value
    data = load_data(
        "physionet2012", write(tmp_path / "set.csv", *lines, head=head), cut=None, targets=None, outliers=0.04
    )
    whole = torch.cat((data.train, data.held_out[:, : data.train.shape[1]]))
    assert len(whole) == 10
    values = whole[..., 1] * data.std + data.mean
    times = whole[..., 0]
    assert values[times == 1.5].tolist() == [pytest.approx(86)]  # and 1000 is left out, its row with it


def test_bad_stays(tmp_path):
    head = "RecordID,Minutes,Parameter,Value"
    for lines, message in (
        (["1,0,HR,nan"], "a finite number in row 2, got Value=nan"),
        (["1,-5,HR,3"], "a time from 0 on in row 2, got Minutes=-5"),
        (["1,0,HR"], "4 fields in every row"),
        (["one,0,HR,3"], "numbers but for names"),
        (["1,0,Age,3"], "values of parameters that vary"),
    ):
        refuses(message, "physionet2012", write(tmp_path / "set.csv", *lines, head=head))
    refuses("the columns RecordID, Minutes", "physionet2012", write(tmp_path / "set.csv", "1,2", head="a,b"))
    write_stays(tmp_path / "set.csv")
    refuses("outliers: expected a fraction", "physionet2012", tmp_path / "set.csv", outliers=0.7)
    (tmp_path / "empty").mkdir()
    refuses(r"expected one file set\*.csv or set\*.csv.gz, got none", "physionet2012", tmp_path / "empty")


# --- learning them ----------------------------------------------------------------------------


class Constant(torch.nn.Module):
    """The same normal distribution for every value of a channel, whatever came before."""

    def __init__(self, features):
        super().__init__()
        self.config = {"features": features}
        self.mean, self.log_std = (torch.nn.Parameter(torch.zeros(features)) for _ in range(2))

    def initialize(self, batch):
        pass

    def terms(self, x, targets):
        _, values, masks, _ = module.split(x, len(self.mean))
        squared = (values - self.mean) ** 2
        nats = 0.5 * squared * torch.exp(-2 * self.log_std) + self.log_std + 0.5 * math.log(2 * math.pi)
        chosen = module.scored(masks) if targets else masks > 0
        return (-(nats * chosen).sum((1, 2)), (squared * chosen).sum((1, 2)))

    def forward(self, x, context=None):
        return self.terms(x, False)[0]

    def evaluate(self, x):
        return self.terms(x, True)[0]

    def metrics(self, x):
        return {"MSE": self.terms(x, True)[1]}


def test_figures_are_means_over_observed_values(tmp_path):
    """A model that is the baseline has the baseline's figures; its loss is the likelihood's mean over values."""
    data = load_data("double-ou", series=300)
    _, values, masks, _ = fields(data.train)
    seen = [values[..., k][masks[..., k] == 1] for k in range(2)]
    model = Constant(2)
    model.mean.data, model.log_std.data = (
        torch.stack([f(s) for s in seen]) for f in (torch.mean, lambda s: s.std(correction=0).log())
    )
    nats, name = data.baseline()
    assert evaluate(model, data, score=model.evaluate) == pytest.approx(nats, rel=1e-5)
    assert f"MSE {loop.own_metrics(model, data)['MSE']:.4g}" in name
    assert evaluate(model, data, part=data.train) == pytest.approx(
        -model(data.train).sum().item() / sum(map(len, seen)), rel=1e-5
    )
    model, result = run(data, tmp_path / "run", 12, model=lambda: Constant(2), batch_size=60)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    held_out = [r for r in records if "held_out" in r]
    assert len(held_out) == 3 and all(r["MSE"] > 0 for r in held_out)
    four = [r["train"] for r in records if "train" in r][:4]  # an epoch: the parameters hardly move
    assert np.mean(four) == pytest.approx(evaluate(Constant(2), data, part=data.train), rel=0.02)
    averaged = Constant(2)
    tensors = load_checkpoint(tmp_path / "run" / "checkpoint")[1]
    averaged.load_state_dict({name: tensors[f"ema/{name}"] for name in ("mean", "log_std")})
    assert result.held_out == pytest.approx(evaluate(averaged, data, score=averaged.evaluate), rel=1e-5)


def test_the_recipe_beats_a_constant(tmp_path):
    """On double-OU, within two passes over few series."""
    data = load_data("double-ou", series=1000)
    recipe = gru_ode_bayes.RECIPES["double-ou"]
    settings = replace(recipe.train, epochs=2, batch_size=50)
    torch.manual_seed(0)
    result = loop.train(GRUODEBayes(**recipe.config(data)), data, settings, tmp_path / "run", progress=False)
    assert result.held_out < data.baseline()[0] - 0.2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of GRU-ODE-Bayes from the command line, and its folder."""
    out = tmp_path_factory.mktemp("series") / "run"
    write_series(out.parent / "s.csv", 60)
    arguments = ("--root", out.parent / "s.csv", "--load", "cut=3", "--load", "targets=2", "--load", "standardize=true")
    changes = ("--set", "hidden=6", "--set", "p_hidden=4", "--set", "prep_hidden=3", "--set", "step=0.25")
    run = ("gru_ode_bayes", "--data", "series", "--published", *arguments, *changes, "--batch-size", 16)
    assert command(*run, "--steps", 5, "--out", out) == 0
    return run, out


def test_a_run_from_the_command_line(trained, tmp_path, capsys):
    run, out = trained
    assert (out / "forecast.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((out / "result.json").read_text())
    assert result["unit"] == "nats/observation" and result["metrics"]["MSE"] > 0 and "MSE" in result["naive"]["what"]
    assert "nats/observation, MSE " in record.table([result])
    model, meta = load_model(out)
    data = load_data("series", out.parent / "s.csv", cut=3, targets=2, standardize=True)
    assert evaluate(model, data, score=model.evaluate) == pytest.approx(result["held_out"]["value"], rel=1e-5)
    assert torch.equal(meta["data"]["examples"], data.examples) and len(data.examples) == 8
    # stopped and gone on, bit for bit
    assert command(*run, "--steps", 2, "--out", tmp_path / "again") == 0
    assert command(*run, "--steps", 5, "--out", tmp_path / "again", "--resume") == 0
    want, have = (load_checkpoint(folder / "checkpoint")[1] for folder in (out, tmp_path / "again"))
    assert want.keys() == have.keys() and all(torch.equal(want[name], have[name]) for name in want)
    with pytest.raises(UserError, match="the data are .*'targets': 1"):
        command(*run, "--load", "targets=1", "--steps", 6, "--out", out, "--resume")


def test_forecasts_and_samples(trained, tmp_path, capsys):
    _, out = trained
    assert sample_command(out, "--out", tmp_path / "f.png", "--n", 2) == 0
    assert "forecasts of 2 held-out series" in capsys.readouterr().out
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    assert sample_command(out, "--out", tmp_path / "s.csv", "--n", 3, "--temperature", 0, 1) == 0
    data = load_data("series", tmp_path / "s.csv")  # what is written can be read
    assert len(data.train) + len(data.held_out) == 6 and data.channels == ("a", "b") and data.covariates == 1
    assert fields(data.train)[2].all()
    with pytest.raises(UserError, match="expected a name that ends in .png or .csv"):
        sample_command(out, "--out", tmp_path / "s.npz")


@pytest.mark.slow
def test_a_signal_leaves_a_filter_that_goes_on(trained):
    run, out = trained
    folder = out.parent / "stopped"
    arguments = [*run, "--out", folder]
    with subprocess.Popen(
        worker(*arguments, "--steps", 10**6, "--eval-every", 2), env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert "held-out" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()
        assert process.wait(60) == 130 and "stopped after step" in said
    step = load_checkpoint(folder / "checkpoint")[0]["step"]
    assert command(*arguments, "--resume", "--steps", step + 1) == 0


class Continuous(Constant):
    """With a solver that tells what it did, and fails in its fifth step."""

    evaluations = 0

    def forward(self, x, context=None):
        self.evaluations += 1
        if self.training and self.evaluations > 4:
            raise SolverError("the state is not finite at time 0.5, sample 3")
        return super().forward(x)


def test_a_solver_that_fails_ends_the_run_in_one_line(tmp_path):
    data = load_data("double-ou", series=300)
    with pytest.raises(NonFiniteLoss, match="not finite at time 0.5, sample 3 at step 5, .* of step 4 is kept"):
        run(data, tmp_path / "run", 12, model=lambda: Continuous(2), batch_size=60)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["evaluations"] for r in records if "evaluations" in r] == [4]
    assert load_checkpoint(tmp_path / "run" / "checkpoint")[0]["step"] == 4
