"""`fastflow train` and `fastflow sample`: signals, ranks, mistakes, results."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from standins import command, environment, sample_command, without_dropout, worker

from fastflow.train import RECIPES, Images, UserError, evaluate, load_data, load_model, metrics, recipes
from fastflow.train.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread", "standins")


# --- processes --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_usable_checkpoint(tmp_path, number):
    out = tmp_path / "run"
    arguments = ("tiny", "--data", "digits", "--out", out)
    with subprocess.Popen(
        worker(*arguments, "--steps", 10**6, "--eval-every", 5),
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert "held-out" in process.stdout.readline()  # it trains
        process.send_signal(number)
        said = process.stdout.read()
        assert process.wait(30) == 130
    assert "stopped after step" in said
    meta, _ = load_checkpoint(out / "checkpoint")
    assert meta["step"] >= 5
    assert command(*arguments, "--resume", "--steps", meta["step"] + 2) == 0
    assert load_checkpoint(out / "checkpoint")[0]["step"] == meta["step"] + 2


def test_two_ranks_repeat_one_process(tmp_path):
    """The same losses and weights up to the rounding of sums, over the end of an epoch."""
    arguments = ("tiny", "--data", "digits", "--steps", 26, "--device", "cpu", "--seed", 5)
    RECIPES["tiny"]["digits"] = without_dropout()
    assert command(*arguments, "--out", tmp_path / "one") == 0
    subprocess.run(worker(*arguments, "--out", tmp_path / "two", ranks=2), env=environment(), check=True, timeout=120)
    one, two = (metrics.read_metrics(tmp_path / d / "metrics.jsonl") for d in ("one", "two"))
    assert len(one) == len(two) == 28
    for want, have in zip(one, two, strict=True):
        assert have == pytest.approx(want, rel=2e-5)
    want, have = (load_checkpoint(tmp_path / d / "checkpoint")[1] for d in ("one", "two"))
    assert 2 * have.pop("model/seen") == want["model/seen"]  # rank 0 had half of every batch
    for name in have.keys() - {"ema/seen"}:
        assert torch.allclose(have[name], want[name], rtol=1e-3, atol=1e-5), name


def test_importing_needs_no_optional_package():
    optional = ["sklearn", "PIL", "matplotlib", "tqdm", "safetensors", "rich"]
    code = (
        "import sys, torch; before = set(sys.modules); import fastflow.train, fastflow.train.cli; "
        f"print([m for m in {optional} if m in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"scikit-learn.*pip install 'fastflow\[train\]'"):
        load_data("digits")


# --- the command line -------------------------------------------------------------------------


def test_train_and_sample_commands(tmp_path, capsys):
    out = tmp_path / "run"
    assert command("tiny", "--data", "digits", "--out", out, "--epochs", 1) == 0
    assert "per-pixel histogram" in capsys.readouterr().out
    for name in ("samples.png", "curve.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    model, meta = load_model(out)
    _, tensors = load_checkpoint(out / "checkpoint")
    assert torch.equal(model.shift, tensors["ema/shift"]) and not model.training
    assert meta["config"]["epochs"] == 1 and meta["step"] == 22
    picture = tmp_path / "picture.png"
    for source in (out, out / "checkpoint"):
        assert sample_command(source, "--out", picture, "--temperature", 0, 1, "--n", 3) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert command("tiny", "--data", "digits", "--out", out, "--resume", "--epochs", 2) == 0
    assert load_checkpoint(out / "checkpoint")[0]["step"] == 44


def test_mistakes_on_the_command_line(tmp_path):
    out = tmp_path / "run"
    digits = ("tiny", "--data", "digits", "--out", out)
    assert command(*digits, "--steps", 1) == 0
    empty = tmp_path / "empty"
    for arguments, message in (
        (("nothing", "--data", "digits", "--out", empty), "unknown model 'nothing'.*glow"),
        (("tiny", "--data", "cifar", "--out", empty), "unknown data set 'cifar'"),
        (("glow", "--data", "mnist", "--out", empty), "needs a root"),
        (("glow", "--data", "mnist", "--root", tmp_path / "no", "--out", empty), "found nothing"),
        (("tiny", "--data", "digits", "--out", empty, "--resume"), "holds no checkpoint"),
        (("tiny", "--data", "digits", "--out", empty, "--lr", "-1"), "lr: expected"),
        (("tiny", "--data", "digits", "--out", empty, "--device", "abacus"), "abacus"),
        (("tiny", "--data", "digits", "--out", __file__), "expected a folder"),
        (digits, "expected an empty folder"),
        ((*digits, "--resume", "--lr", 0.5), "lr is 0.5, but the run to resume has 0.003"),
        (("glow", *digits[1:], "--resume"), "holds a Tiny, not a Glow"),
    ):
        with pytest.raises(UserError, match=message) as error:
            command(*arguments)
        assert "\n" not in str(error.value)
    assert not empty.exists()
    for arguments, message in (
        ((empty,), "expected a checkpoint"),
        ((out, "--n", 0), "--n of at least 1"),
        ((out, "--temperature", -1), "temperatures of at least 0"),
        ((out, "--out", tmp_path / "no" / "x.png"), "no/x.png"),
    ):
        with pytest.raises(UserError, match=message):
            sample_command(*arguments)
    index = out / "checkpoint" / "checkpoint.json"
    meta = json.loads(index.read_text())
    index.write_text(json.dumps({**meta, "model": {"name": "Path", "config": {}}}))
    with pytest.raises(UserError, match="unknown model 'Path'"):  # nothing but a recipe's class
        sample_command(out)


def test_glow_on_64_digits(tmp_path, digits):
    """The real model through both commands; then stopping and going on, bit for bit."""
    pytest.importorskip("fastflow.models.glow")
    path = tmp_path / "digits.npz"
    np.savez(path, x=digits.train[:64].numpy(), levels=17)
    arguments = ("glow", "--data", "npz", "--root", path, "--batch-size", 16, "--device", "cpu")
    assert command(*arguments, "--out", tmp_path / "straight", "--steps", 5) == 0
    assert command(*arguments, "--out", tmp_path / "broken", "--steps", 2) == 0
    assert command(*arguments, "--out", tmp_path / "broken", "--steps", 5, "--resume") == 0
    (meta, want), (_, have) = (load_checkpoint(tmp_path / d / "checkpoint") for d in ("straight", "broken"))
    assert meta["model"]["name"] == "Glow" and meta["data"]["levels"] == 17
    assert want.keys() == have.keys()
    for name in want:
        assert torch.equal(want[name], have[name]), name
    model, _ = load_model(tmp_path / "broken")
    data = load_data("npz", path)
    held_out = [r["held_out"] for r in metrics.read_metrics(tmp_path / "broken" / "metrics.jsonl") if "held_out" in r]
    assert evaluate(model, data) == pytest.approx(held_out[-1], rel=1e-5)
    assert sample_command(tmp_path / "broken", "--out", tmp_path / "x.png", "--n", 2) == 0


def test_levels_fit_the_image():
    def levels(*shape):
        images = torch.zeros(1, *shape, dtype=torch.uint8)
        return recipes.glow.config(Images("x", images, images, 256), levels=3, steps=1, hidden=1)["levels"]

    assert levels(1, 28, 28) == 2 and levels(3, 64, 32) == 3
    with pytest.raises(ValueError, match="even height and width, got 9x8"):
        levels(3, 9, 8)
