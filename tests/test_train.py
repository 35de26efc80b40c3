"""The training loop: learning, resuming bit for bit, divergence, settings."""

import json
import math
import os
import signal

import pytest
import torch
from standins import Tiny, TinyVAE, run, settings

from fastflow.models import MADE
from fastflow.train import (
    Images,
    NonFiniteLoss,
    TrainConfig,
    UserError,
    evaluate,
    final_figure,
    load_data,
    load_model,
    metrics,
    train,
)
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
        ("optimizer", "sgd"),
        ("weight_decay", -1.0),
        ("momentum", 1.0),
        ("lr_decay", 0.0),
        ("patience", 0),
        ("final", 0),
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


# --- other kinds of model and data ------------------------------------------------------------


@pytest.fixture(scope="module")
def bits():
    return load_data("digits", form="dynamic", flat=True)


def vae():
    return TinyVAE(64)


def identical(one, two):
    (meta, want), (other, have) = (load_checkpoint(d / "checkpoint") for d in (one, two))
    assert want.keys() == have.keys()
    for name in want:
        assert torch.equal(want[name], have[name]), name
    assert {k: v for k, v in meta.items() if k not in ("seconds", "config")} == {
        k: v for k, v in other.items() if k not in ("seconds", "config")
    }


@pytest.mark.parametrize("optimizer", [{"optimizer": "adamax"}, {"optimizer": "rmsprop", "momentum": 0.9}])
def test_a_model_with_a_loss_resumes_bit_for_bit(bits, tmp_path, optimizer):
    """Its warm-up follows the whole run, so both runs must be as long: one is interrupted."""
    changes = {"model": vae, "clip": None, "lr_decay": 0.9, "weight_decay": 1e-3, "patience": 5, **optimizer}
    run(bits, tmp_path / "straight", 60, **changes)

    class Stopping(TinyVAE):
        def loss(self, x, progress):
            if self.training and progress == 27 / 60:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().loss(x, progress)

    Stopping.__name__ = "TinyVAE"
    _, result = run(bits, tmp_path / "broken", 60, **(changes | {"model": lambda: Stopping(64)}))
    assert result.interrupted and result.step < 60
    run(bits, tmp_path / "broken", 60, resume=True, **changes)
    identical(tmp_path / "straight", tmp_path / "broken")


def test_rows_resume_bit_for_bit(tmp_path):
    rows = load_data("moons")
    run(rows, tmp_path / "straight", 9)
    run(rows, tmp_path / "broken", 4)
    run(rows, tmp_path / "broken", 9, resume=True)
    identical(tmp_path / "straight", tmp_path / "broken")
    assert load_checkpoint(tmp_path / "straight" / "checkpoint")[0]["data"] == {
        "name": "moons",
        "kind": "rows",
        "shape": [2],
        "train": 50000,
        "held_out": 10000,
    }
    with pytest.raises(UserError, match="the data are"):
        run(load_data("circles"), tmp_path / "broken", 9, resume=True)


def test_the_loss_of_the_model_is_what_falls(bits, tmp_path):
    model, result = run(bits, tmp_path, 100, model=lambda: TinyVAE(64, warmup=1e9), clip=None, lr=1e-2)
    last = [r["train"] for r in metrics.read_metrics(tmp_path / "metrics.jsonl") if "train" in r][-1]
    assert last < result.held_out - 2  # the KL that is not in the loss
    better = final_figure(model, bits, settings(final=100))
    assert better == final_figure(model, bits, settings(final=100)) < evaluate(model, bits, part=bits.held_out[:100])


def test_a_scalar_loss_will_do(bits, tmp_path):
    class Scalar(TinyVAE):
        def loss(self, x, progress):
            return super().loss(x, progress).mean()

    one, _ = run(bits, tmp_path / "one", 3, model=vae)
    two, _ = run(bits, tmp_path / "two", 3, model=lambda: Scalar(64))
    assert torch.allclose(one.decoder.weight, two.decoder.weight, rtol=1e-5, atol=1e-7)


def test_an_evaluation_leaves_the_generator_alone_and_repeats_itself(bits):
    model = TinyVAE(64)
    before = torch.random.get_rng_state()
    assert evaluate(model, bits) == evaluate(model, bits) != evaluate(model, bits, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_averaged_model_takes_masks_as_they_are(tmp_path):
    """Few variables: some draws are the order itself, of which a MADE keeps no permutation."""
    bits = torch.randint(0, 2, (64, 1, 1, 2), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    data = Images("bits", bits, bits[:16], 2, "static", flat=True)
    model = MADE(2, hidden=(3,), num_masks=6)
    train(model, data, TrainConfig(steps=6, batch_size=16, eval_every=1), tmp_path, progress=False)
    averaged = load_model(tmp_path)[0].network
    for name, buffer in model.network.named_buffers():
        assert torch.equal(averaged.get_buffer(name), buffer), name


def test_patience(digits, tmp_path):
    """The run ends when nothing has been better for so long, and keeps the best weights."""

    class Worsening(Tiny):
        def forward(self, x, context=None):
            return super().forward(x) - (0 if self.training else (self.seen - 20 * 64).clamp(min=0))

    def model():
        return Worsening(digits.shape)

    _, result = run(digits, tmp_path, 100, model=model, patience=3, eval_every=10)
    held_out = [r["held_out"] for r in metrics.read_metrics(tmp_path / "metrics.jsonl") if "held_out" in r]
    assert result.step == 50 and not result.interrupted and min(held_out) == held_out[1]
    meta, tensors = load_checkpoint(tmp_path / "checkpoint")
    assert meta["step"] == 50 and meta["best"] == {"held_out": held_out[1], "stale": 3}
    assert tensors["best/seen"] == 20 * 64 and tensors["ema/seen"] == 50 * 64
    _, again = run(digits, tmp_path, 100, model=model, resume=True, patience=3, eval_every=10)
    assert again.step == 50  # it stays at its end


def test_no_nan_passes_into_a_checkpoint(digits, tmp_path):
    class Spoiled(Tiny):
        """A buffer becomes NaN, and nobody looks at it."""

        def __init__(self, shape):
            super().__init__(shape)
            self.register_buffer("running", torch.zeros(2))

        def forward(self, x, context=None):
            if self.training and self.seen == 9 * 64:
                self.running[1] = math.nan
            return super().forward(x)

    with pytest.raises(NonFiniteLoss, match=r"inf or nan in model/running at step 12.*step 8 is kept"):
        run(digits, tmp_path / "buffer", 30, model=lambda: Spoiled(digits.shape), checkpoint_every=4)
    meta, tensors = load_checkpoint(tmp_path / "buffer" / "checkpoint")
    assert meta["step"] == 8 and all(t.isfinite().all() for t in tensors.values())
    # the last step of a run: its loss was finite, the weights that it made are not
    with pytest.raises(NonFiniteLoss, match="no checkpoint had been written"):
        run(digits, tmp_path / "weights", 2, lr=1e37, warmup=0, eval_every=10)


@pytest.mark.parametrize(("data", "model"), [("moons", Tiny), ("bits", TinyVAE)])
def test_nan_in_the_loss_of_any_kind(tmp_path, bits, data, model):
    data = bits if data == "bits" else load_data(data)

    class Diverging(model):
        calls = 0

        def forward(self, x, context=None):
            return super().forward(x) * self.poison()

        def poison(self):
            self.calls += self.training
            return math.nan if self.calls == 7 and self.training else 1.0

    if model is TinyVAE:
        Diverging.loss = lambda self, x, progress: TinyVAE.loss(self, x, progress) * self.poison()
    argument = data.shape if model is Tiny else 64
    with pytest.raises(NonFiniteLoss, match=r"loss nan.* at step 7, .*step 5 is kept"):
        run(data, tmp_path, 20, model=lambda: Diverging(argument), checkpoint_every=5, clip=None)


def test_learning_rate_of_epochs():
    config = TrainConfig(lr=1.0, lr_decay=0.5)
    assert [config.lr_at(step, 100, per_epoch=2) for step in (0, 2, 4)] == pytest.approx([1, 0.5, 0.25])


def test_weight_decay_reaches_the_optimiser(digits, tmp_path):
    plain, _ = run(digits, tmp_path / "plain", 20, clip=None)
    decayed, _ = run(digits, tmp_path / "decayed", 20, clip=None, weight_decay=100.0)
    assert decayed.net[0].weight.abs().sum() < 0.9 * plain.net[0].weight.abs().sum()
