"""The training loop: learning, resuming bit for bit, divergence, settings."""

import json
import math

import pytest
import torch
from standins import Tiny, run, settings

from fastflow.train import Images, NonFiniteLoss, TrainConfig, UserError, metrics, train
from fastflow.train.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def test_training_learns_and_reports(digits, tmp_path):
    model, result = run(digits, tmp_path / "run", 60)
    records = metrics.read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps = [r for r in records if "train" in r]
    assert [r["step"] for r in steps] == list(range(1, 61))
    assert [r["epoch"] for r in steps] == [i // 22 for i in range(60)]
    assert [r["lr"] for r in steps[:6]] == pytest.approx([3e-3 * i / 6 for i in range(1, 7)])
    held_out = [(r["step"], r["held_out"]) for r in records if "held_out" in r]
    assert [step for step, _ in held_out] == [22, 44, 60]
    assert held_out[-1][1] == result.held_out < held_out[0][1]
    assert result.step == 60 and not result.interrupted
    assert model.seen == 60 * 64 and model.initialized


def test_the_callers_generator_is_left_alone(digits, tmp_path):
    model = Tiny(digits.shape)
    before = torch.random.get_rng_state()
    train(model, digits, settings(steps=2), tmp_path / "run", progress=False)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(("first", "last"), [(2, 4), (27, 35)])
def test_resume_is_bit_identical(digits, tmp_path, first, last):
    """Weights, buffers, averages, optimiser and metrics; stopped in the middle of an epoch."""
    straight, _ = run(digits, tmp_path / "straight", last)
    run(digits, tmp_path / "broken", first)
    resumed, result = run(digits, tmp_path / "broken", last, resume=True)
    assert result.step == last
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    (meta, want), (_, have) = (load_checkpoint(tmp_path / d / "checkpoint") for d in ("straight", "broken"))
    assert want.keys() == have.keys()
    assert {name.split("/")[0] for name in want} == {"model", "ema", "optimizer"}
    for name in want:
        assert torch.equal(want[name], have[name]), name
    assert meta["step"] == last
    assert not torch.equal(want["model/shift"], want["ema/shift"])
    lines = [
        [r for r in metrics.read_metrics(tmp_path / d / "metrics.jsonl") if "train" in r]
        for d in ("straight", "broken")
    ]
    assert lines[0] == lines[1]


def test_resume_drops_metrics_after_the_checkpoint(digits, tmp_path):
    out = tmp_path / "run"
    run(digits, out, 4)
    path = out / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 5, "epoch": 0, "train": 1.0}\n{"step": 6, "tra')  # torn
    run(digits, out, 6, resume=True)
    steps = [r["step"] for r in map(json.loads, path.read_text().splitlines()) if "train" in r]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_resume_refuses_another_run(digits, tmp_path):
    out = tmp_path / "run"
    run(digits, out, 2)
    with pytest.raises(UserError, match=r"lr is 0.1, but the run to resume has 0.003"):
        run(digits, out, 4, resume=True, lr=0.1)
    fewer = Images("digits", digits.train[:100], digits.held_out, 17)
    with pytest.raises(UserError, match="the data are"):
        run(fewer, out, 4, resume=True)
    with pytest.raises(UserError, match="the model is"):
        train(Tiny(digits.shape, hidden=8), digits, settings(steps=4), out, resume=True)
    with pytest.raises(UserError, match="empty folder"):
        run(digits, out, 4)
    _, result = run(digits, out, 2, resume=True)  # nothing left to do
    assert result.step == 2 and result.held_out is not None


def test_a_diverged_loss_keeps_the_last_checkpoint(digits, tmp_path):
    class Diverging(Tiny):
        def forward(self, x, context=None):
            log_prob = super().forward(x)
            return log_prob * math.nan if self.training and self.seen == 13 * 64 else log_prob

    model = Diverging(digits.shape)
    message = r"loss nan.* at step 13, learning rate 0.003; the checkpoint of step 12 is kept"
    with pytest.raises(NonFiniteLoss, match=message):
        train(model, digits, settings(steps=30, checkpoint_every=4), tmp_path, progress=False)
    meta, tensors = load_checkpoint(tmp_path / "checkpoint")
    assert meta["step"] == 12 and all(t.isfinite().all() for t in tensors.values())


def test_bf16_and_averages(digits, tmp_path):
    _, result = run(digits, tmp_path / "bf16", 12, bf16=True, eval_every=6)
    assert math.isfinite(result.held_out)
    _, full = run(digits, tmp_path / "full", 12, eval_every=6)
    assert result.held_out != full.held_out
    assert result.held_out == pytest.approx(full.held_out, rel=0.05)
    model, _ = run(digits, tmp_path / "none", 3, ema=0.0)
    _, tensors = load_checkpoint(tmp_path / "none" / "checkpoint")
    assert torch.equal(tensors["ema/shift"], model.shift)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("steps", 0),
        ("batch_size", -1),
        ("lr", 0.0),
        ("lr", math.nan),
        ("clip", -1.0),
        ("cooldown", 1.5),
        ("ema", 1.0),
        ("warmup", -1),
        ("seed", -1),
        ("eval_every", 0),
    ],
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        TrainConfig(**{name: value})


def test_the_learning_rate_rises_stays_and_falls():
    config = TrainConfig(lr=1.0, warmup=3, cooldown=0.5)
    rates = [config.lr_at(step, 10) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_too_large_a_batch(digits, tmp_path):
    with pytest.raises(ValueError, match="batch_size: expected at most the 1438"):
        run(digits, tmp_path, 2, batch_size=2000)
