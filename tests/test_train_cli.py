"""`fastflow train` and `fastflow sample`: signals, ranks, mistakes, results."""

import json
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from standins import command, environment, sample_command, without_dropout, worker

from fastflow.train import RECIPES, Images, UserError, evaluate, load_data, load_model, metrics, recipes, record
from fastflow.train.checkpoint import load_checkpoint
from fastflow.train.data.audio import read_wav

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


def test_epochs_instead_of_the_steps_of_a_recipe(tmp_path):
    usual = RECIPES["tiny"]["digits"]
    RECIPES["tiny"]["digits"] = replace(usual, train=replace(usual.train, steps=3))
    for n, epochs in enumerate(((), ("--epochs", 1))):
        assert command("tiny", "--data", "digits", "--out", tmp_path / str(n), *epochs) == 0
        assert load_checkpoint(tmp_path / str(n) / "checkpoint")[0]["step"] == (3, 22)[n]
        written = json.loads((tmp_path / str(n) / "result.json").read_text())["command"]
        assert ("--epochs 1" in written, "--steps" in written) == (bool(epochs), False)


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


def test_a_kind_of_data_each(tmp_path, capsys):
    """Rows come back as a table in their own units, points as a picture, bits as pictures, audio as sound."""
    rows = np.random.default_rng(0).normal(size=(200, 3)) * [1, 10, 100] + [0, 50, 5000]
    np.savetxt(tmp_path / "t.csv", rows, delimiter=",", header="a,b,c", comments="")
    out = tmp_path / "rows"
    assert command("tiny", "--data", "rows", "--root", tmp_path / "t.csv", "--out", out) == 0
    table = np.loadtxt(out / "samples.csv", delimiter=",", skiprows=1)
    assert table.shape == (4000, 4) and set(table[:, 0]) == {0.5, 0.7, 0.9, 1.0}
    hot = table[table[:, 0] == 1]
    assert abs(hot[:, 3].mean() - 5000) < 50 and 50 < hot[:, 3].std() < 200
    assert sample_command(out, "--out", tmp_path / "x.npz", "--n", 5, "--temperature", 0, 1) == 0
    with np.load(tmp_path / "x.npz") as found:
        assert found["x"].shape == (10, 3) and found["temperature"].tolist() == [0] * 5 + [1] * 5
    with pytest.raises(UserError, match=r"x.png: expected a name that ends in .csv or .npz"):
        sample_command(out, "--out", tmp_path / "x.png")

    assert command("tiny", "--data", "moons", "--out", tmp_path / "moons", "--steps", 3) == 0
    assert (tmp_path / "moons" / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert sample_command(tmp_path / "moons", "--out", tmp_path / "m.csv", "--n", 7, "--temperature", 1) == 0
    assert np.loadtxt(tmp_path / "m.csv", delimiter=",", skiprows=1).shape == (7, 3)

    capsys.readouterr()
    assert command("tiny_vae", "--data", "digits", "--out", tmp_path / "vae", "--epochs", 1) == 0
    said = capsys.readouterr().out
    assert "nats on 32 test samples (factorised Bernoulli" in said
    assert (tmp_path / "vae" / "samples.png").read_bytes().startswith(b"\x89PNG")

    sound = (10000 * np.sin(np.arange(4000) / 3)).astype(np.int16)
    np.savez(tmp_path / "a.npz", audio=sound, offsets=np.arange(0, 4001, 500))
    out = tmp_path / "audio"
    assert command("tiny_audio", "--data", "audio", "--root", tmp_path / "a.npz", "--out", out) == 0
    clip, rate = read_wav(out / "samples.wav")
    assert rate == 8000 and len(clip) == 16 * (50 + 1600)


def test_results_and_their_table(tmp_path):
    np.savetxt(tmp_path / "t.csv", np.random.default_rng(0).normal(size=(200, 3)), delimiter=",")
    arguments = ("tiny", "--data", "rows", "--root", tmp_path / "t.csv", "--load", "drop=[1]")
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert command(*arguments, "--out", one) == 0
    assert command(*arguments, "--out", two, "--set", "hidden=8", "--lr", 0.01, "--seed", 3, "--steps", 2) == 0
    assert command(*arguments, "--out", two, "--resume", "--steps", 3) == 0
    result = json.loads((two / "result.json").read_text())
    changes = "--load 'drop=[1]' --set hidden=8 --steps 3 --lr 0.01 --seed 3"
    assert result["command"] == f"fastflow train tiny --data rows --root t.csv {changes}"
    assert result["data"] == "rows: t.csv"
    assert result["steps"] == 3 and result["config"]["hidden"] == 8 and result["train"]["lr"] == 0.01
    assert result["held_out"]["what"] == "20 test" and result["unit"] == "nats" and result["published"]["value"] == 1.0
    assert str(tmp_path) not in (two / "result.json").read_text()
    model, _ = load_model(two)
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    data = load_data("rows", tmp_path / "t.csv", drop=(1,))
    assert result["held_out"]["value"] == pytest.approx(evaluate(model, data, part=data.test), rel=1e-5)
    assert result["naive"]["value"] == pytest.approx(data.baseline()[0])

    collected, document = tmp_path / "models.json", tmp_path / "README.md"
    document.write_text(f"before\n{record.BEGIN}\nold\n{record.END}\nafter\n")
    record.main(str(one), str(two), str(collected), str(document))
    text = document.read_text()
    assert (
        text.startswith("before\n") and text.endswith("after\n") and "old" not in text and text.count("| Tiny |") == 2
    )
    assert command(*arguments, "--out", three, "--seed", 0) == 0  # the first command again
    record.main(str(three), str(collected), str(document))
    results = json.loads(collected.read_text())
    assert len(results) == 2 and document.read_text().count("| Tiny |") == 2
    with pytest.raises(SystemExit, match="expected the lines"):
        document.write_text("nothing")
        record.main(str(one), str(collected), str(document))
    collected.write_text('[{"model": 1}]')
    with pytest.raises(UserError, match="expected the key 'data'"):
        record.main(str(one), str(collected), str(document))


def test_arguments_of_the_model(tmp_path):
    out = tmp_path / "run"
    digits = ("tiny", "--data", "digits", "--out", out, "--steps", 1)
    for arguments, message in (
        (("--set", "hiden=3"), "hiden: no argument of Tiny, which has image_shape, hidden, dropout"),
        (("--set", "hidden"), "--set hidden: expected NAME=VALUE"),
        (("--set", "hidden=many"), "--set: Tiny cannot be made of {'hidden': 'many'}"),
        (("--load", "form=grey"), "form: expected one of"),
        (("--load", "valid=many"), "valid: expected a number of samples, got 'many'"),
        (("--load", "colour=1"), "colour: no option of 'digits'"),
        (("--published",), "no published recipe of tiny for the data set 'digits'"),
    ):
        with pytest.raises(UserError, match=message):
            command(*digits, *arguments)
    assert command(*digits, "--set", "hidden=3") == 0
    with pytest.raises(UserError, match="--set hidden: 4, but the run to resume has 3"):
        command(*digits, "--set", "hidden=4", "--resume")
