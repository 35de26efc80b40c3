"""Training: data formats, bits/dim, checkpoints, resuming, interruption, ranks, the command line.

Run as a script, this file is `fastflow train` with the stand-in flow `Tiny` as one more model: the
tests that need processes of their own start it.
"""

import argparse
import doctest
import gzip
import json
import math
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastflow
from fastflow.train import (
    RECIPES,
    Images,
    NonFiniteLoss,
    Recipe,
    TrainConfig,
    UserError,
    bits_per_dim,
    checkpoint,
    cli,
    data,
    evaluate,
    load_data,
    load_model,
    metrics,
    noise,
    pixels,
    recipes,
    train,
)
from fastflow.train.checkpoint import load_checkpoint, save_checkpoint

REPOSITORY = Path(checkpoint.__file__).parents[2]


class Tiny(nn.Module):
    """A diagonal affine map and a dense coupling with dropout: the contract of Glow, in little."""

    def __init__(self, image_shape, hidden=16, dropout=0.1):
        super().__init__()
        self.config = {"image_shape": image_shape, "hidden": hidden, "dropout": dropout}
        self.shape, dims = tuple(image_shape), math.prod(image_shape)
        self.half = dims // 2
        self.log_scale = nn.Parameter(torch.zeros(dims))
        self.shift = nn.Parameter(torch.zeros(dims))
        self.net = nn.Sequential(
            nn.Linear(self.half, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, 2 * (dims - self.half)),
        )
        self.register_buffer("initialized", torch.tensor(False))
        self.register_buffer("seen", torch.tensor(0))

    def initialize(self, batch):
        flat = batch.flatten(1)
        self.shift.data.copy_(-flat.mean(0))
        self.log_scale.data.copy_(-(flat.std(0) + 0.05).log())
        self.initialized.fill_(True)

    def forward(self, x, context=None):
        assert self.initialized
        self.seen += len(x) * self.training
        y = (x.flatten(1) + self.shift) * self.log_scale.exp()
        log_s, t = self.net(y[:, : self.half]).float().chunk(2, 1)
        log_s = log_s.tanh()
        z = torch.cat((y[:, : self.half], y[:, self.half :] * log_s.exp() + t), 1)
        log_base = -0.5 * (z**2 + math.log(2 * math.pi)).sum(1)
        return log_base + self.log_scale.sum() + log_s.sum(1)

    log_prob = forward

    def sample(self, n, context=None, temperature=1.0, generator=None):
        z = temperature * torch.randn(n, self.log_scale.numel(), generator=generator)
        log_s, t = self.net(z[:, : self.half]).chunk(2, 1)
        y = torch.cat((z[:, : self.half], (z[:, self.half :] - t) * (-log_s.tanh()).exp()), 1)
        return (y * (-self.log_scale).exp() - self.shift).view(n, *self.shape)


class Uniform(nn.Module):
    """Density 1 on the unit cube."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        assert x.min() >= -0.5 and x.max() < 0.5
        return x.new_zeros(len(x))


def tiny_config(data):
    return {"image_shape": data.shape, "hidden": 16}


def mount_tiny():
    """Makes the stand-in a model of the command line."""
    import fastflow.models

    fastflow.models.Tiny = Tiny
    RECIPES["tiny"] = {"digits": Recipe("Tiny", tiny_config, TrainConfig(epochs=2, lr=3e-3))}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models here are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny():
    mount_tiny()
    yield
    del RECIPES["tiny"], fastflow.models.Tiny


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def settings(**changes):
    # 22 steps an epoch: runs of a few dozen steps see its end, and stop in its middle
    return TrainConfig(**{"batch_size": 64, "lr": 3e-3, "warmup": 5, "seed": 3, **changes})


def run(digits, out, steps, resume=False, **changes):
    torch.manual_seed(7)
    model = Tiny(digits.shape)
    torch.manual_seed(steps)  # once there is a model, the caller's generator must not matter
    result = train(model, digits, settings(steps=steps, **changes), out, resume=resume, progress=False)
    return model, result


def command(*arguments):
    parser = argparse.ArgumentParser()
    cli.add_train_arguments(parser)
    return cli.run_train(parser.parse_args([str(a) for a in arguments]))


def sample_command(*arguments):
    parser = argparse.ArgumentParser()
    cli.add_sample_arguments(parser)
    return cli.run_sample(parser.parse_args([str(a) for a in arguments]))


def worker(*arguments, ranks=1):
    """The command line of a process of its own, as a list."""
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [sys.executable, *launcher, __file__, *(str(a) for a in arguments)]


def environment():
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


# --- data -------------------------------------------------------------------------------------


def write_idx(path, array, kind=8):
    raw = bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    raw += array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def random_images(*shape, high=256):
    return np.random.default_rng(0).integers(0, high, shape, dtype=np.uint8)


def test_doctests():
    for module in (data, pixels):
        assert doctest.testmod(module).failed == 0


def test_digits(digits):
    assert digits.shape == (1, 8, 8) and digits.dims == 64 and digits.levels == 17
    assert digits.train.dtype == torch.uint8 and digits.train.max() == 16
    both = torch.cat((digits.train, digits.held_out)).flatten(1)
    assert len(both) == 1797 and len(both.unique(dim=0)) == 1797  # nothing twice, nothing lost
    again = load_data("digits")
    assert torch.equal(again.held_out, digits.held_out)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist(tmp_path, suffix):
    train_set, test_set = random_images(5, 6, 4), random_images(3, 6, 4)
    write_idx(tmp_path / f"train-images-idx3-ubyte{suffix}", train_set)
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", test_set)
    found = load_data("mnist", tmp_path)
    assert found.shape == (1, 6, 4) and found.levels == 256
    assert np.array_equal(found.train[:, 0].numpy(), train_set)
    assert np.array_equal(found.held_out[:, 0].numpy(), test_set)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "magic 00 00 08"),
        (b"\x89PNG1234", "got 89 50 4e 47"),
        (b"\0\0\x0d\x03" + bytes(12), "got 00 00 0d 03"),  # floats
        (b"\0\0\x08\x03" + bytes(5), "header of 16 bytes, got 9"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 2, 3, 3) + bytes(17), "expected 18 bytes.*got 17"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 2, 3, 3) + bytes(19), "expected 18 bytes.*got 19"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 0, 3, 3), "at least one value"),
    ],
)
def test_bad_idx(tmp_path, raw, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(raw)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", random_images(3, 3, 3))
    with pytest.raises(ValueError, match=message) as error:
        load_data("mnist", tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_bad_mnist_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        load_data("mnist", tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", random_images(3, 3, 3))
    with pytest.raises(FileNotFoundError, match="t10k-images-idx3-ubyte"):
        load_data("mnist", tmp_path)
    whole = (tmp_path / "train-images-idx3-ubyte.gz").read_bytes()
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="t10k.*whole gzip"):
        load_data("mnist", tmp_path)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", random_images(3, 4, 3))
    with pytest.raises(ValueError, match="one size"):
        load_data("mnist", tmp_path)


def save_png(path, array):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_image_folder(tmp_path):
    images = random_images(20, 6, 4, 3)
    for i, image in enumerate(images):
        save_png(tmp_path / f"class{i % 2}" / f"{i:02d}.png", image)
    (tmp_path / "notes.txt").write_text("ignored")
    found = load_data("images", tmp_path)
    assert found.shape == (3, 6, 4) and len(found.train) == 18 and len(found.held_out) == 2
    both = torch.cat((found.train, found.held_out)).permute(0, 2, 3, 1).numpy()
    assert {i.tobytes() for i in both} == {i.tobytes() for i in images}
    assert torch.equal(load_data("images", tmp_path).held_out, found.held_out)


def test_grey_folder_is_one_channel_and_a_size_crops_the_centre(tmp_path):
    wide = np.zeros((4, 8), np.uint8)
    wide[:, 2:6] = 200
    save_png(tmp_path / "a.png", wide)
    save_png(tmp_path / "b.jpg", wide.T.copy())
    found = load_data("images", tmp_path, size=2)
    assert found.shape == (1, 2, 2)
    assert (torch.cat((found.train, found.held_out)).int() - 200).abs().max() < 12  # JPEG


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such"):
        load_data("images", tmp_path / "no-such")
    with pytest.raises(FileNotFoundError, match="found none"):
        load_data("images", tmp_path)
    save_png(tmp_path / "a.png", random_images(4, 4))
    with pytest.raises(ValueError, match="at least 2 samples"):
        load_data("images", tmp_path)
    save_png(tmp_path / "b.png", random_images(4, 6))
    with pytest.raises(ValueError, match=r"b.png: expected 4x4 like a.png, got 6x4; give a size"):
        load_data("images", tmp_path)
    save_png(tmp_path / "b.png", random_images(4, 4).astype(np.uint16))
    with pytest.raises(ValueError, match=r"b.png: expected 8 bits a channel"):
        load_data("images", tmp_path)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[:50])
    with pytest.raises(ValueError, match=r"b.png: expected a whole image"):
        load_data("images", tmp_path)
    (tmp_path / "b.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"b.png: expected an image"):
        load_data("images", tmp_path)


def test_npz(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, x=random_images(20, 6, 4, high=5), levels=5)
    found = load_data("npz", path)
    assert found.shape == (1, 6, 4) and found.levels == 5 and len(found.held_out) == 2
    np.savez(path, train=random_images(7, 3, 6, 4), test=random_images(2, 3, 6, 4))
    found = load_data("npz", path)
    assert found.shape == (3, 6, 4) and found.levels == 256 and len(found.train) == 7


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": random_images(3, 2, 2)}, r"expected arrays 'x'.*got \['y'\]"),
        ({"train": random_images(3, 2, 2)}, r"'train' and 'test', got \['train'\]"),
        ({"x": random_images(3, 2, 2).astype(np.float32)}, r"uint8 .* got float32 \[3, 2, 2\]"),
        ({"x": random_images(3, 2)}, r"\[N, H, W\].*got uint8 \[3, 2\]"),
        ({"x": np.array([{}, None], object)}, "plain array 'x'"),
        ({"x": random_images(3, 2, 2), "levels": 999}, "one integer of 2..256"),
        ({"x": random_images(30, 2, 2), "levels": 16}, "below levels=16"),
        ({"train": random_images(3, 2, 2), "test": random_images(3, 2, 4)}, "one size"),
    ],
)
def test_bad_npz(tmp_path, arrays, message):
    path = tmp_path / "set.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message) as error:
        load_data("npz", path)
    assert str(path) in str(error.value)


def test_not_an_npz(tmp_path):
    path = tmp_path / "set.npz"
    for raw in (b"", b"hello", b"PK\x03\x04 broken"):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=r"set.npz: expected a NumPy .npz"):
            load_data("npz", path)
    np.save(tmp_path / "one.npy", random_images(3, 2, 2))
    with pytest.raises(ValueError, match="single array"):
        load_data("npz", tmp_path / "one.npy")


def test_bad_names():
    with pytest.raises(ValueError, match="unknown data set 'cifar'.*digits"):
        load_data("cifar")
    with pytest.raises(ValueError, match="'mnist' needs a root"):
        load_data("mnist")
    with pytest.raises(ValueError, match="size"):
        load_data("digits", size=8)


# --- noise and bits/dim -----------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 17, 32, 256])
def test_uniform_density_costs_log2_levels(levels):
    images = torch.randint(levels, (40, 3, 4, 2), dtype=torch.uint8)
    bits = evaluate(Uniform(), Images("x", images, images, levels), batch_size=16)
    assert bits == pytest.approx(math.log2(levels), abs=1e-7)
    assert bits_per_dim(torch.zeros(1), 24, levels).item() == pytest.approx(math.log2(levels))


def test_bits_per_dim_of_a_density():
    # dividing the log-density of 24 sub-pixels by each one's cell of 1/256
    log_prob, dims = torch.tensor([30.0]), 24
    expected = -(30.0 - dims * math.log(256)) / (dims * math.log(2))
    assert bits_per_dim(log_prob, dims, 256).item() == pytest.approx(expected)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_dequantisation_round_trips(levels):
    images = torch.arange(levels, dtype=torch.uint8).view(-1, 1, 1, 1)
    for u in (0.0, 1 - 2**-16):  # the ends of what `uniform` gives
        x = pixels.dequantize(images, levels, torch.full((levels, 1), u))
        assert x.min() >= -0.5 and x.max() < 0.5
        assert u == 0 or torch.equal(pixels.quantize(x, levels), images)
    with pytest.raises(ValueError, match="1 of 2"):
        pixels.quantize(torch.tensor([[0.0], [math.nan]]), levels)


def test_noise_belongs_to_the_sample():
    key = noise.key(1, 2, 3)
    index = torch.arange(1000)
    u = noise.uniform(key, index, 50)
    assert torch.equal(noise.uniform(key, index[300:310], 50), u[300:310])
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean().item() - 0.5) < 0.01 and abs(u.var().item() - 1 / 12) < 0.002
    other = noise.uniform(noise.key(1, 2, 4), index, 50)
    assert abs(torch.corrcoef(torch.stack((u.flatten(), other.flatten())))[0, 1]) < 0.02
    order = noise.permutation(key, 1000)
    assert torch.equal(order.sort().values, index) and not torch.equal(order, index)


def test_histogram_is_the_entropy_of_independent_pixels(digits):
    bits = pixels.histogram_bits(digits.train, digits.held_out, 17)
    assert 2.3 < bits < 2.5
    constant = torch.full((5000, 1, 2, 2), 3, dtype=torch.uint8)
    assert pixels.histogram_bits(constant, constant, 256) < 0.1


# --- checkpoints ------------------------------------------------------------------------------


def contents(step):
    meta = {"step": step, "model": {}, "data": {}, "config": {}, "optimizer": {}}
    return meta, {"a": torch.full((3,), float(step)), "b": torch.arange(4)}


def test_checkpoint_round_trip(tmp_path):
    shared = torch.randn(4, 4)
    meta, tensors = contents(1)
    save_checkpoint(tmp_path, meta, {**tensors, "s": shared, "t": shared.T, "e": shared[:0]})
    found, loaded = load_checkpoint(tmp_path)
    assert found["step"] == 1 and loaded["e"].shape == (0, 4)
    assert torch.equal(loaded["t"], shared.T) and loaded["b"].dtype == torch.int64


@pytest.mark.parametrize("call", range(6))
def test_a_crash_leaves_the_previous_checkpoint(tmp_path, monkeypatch, call):
    """Saving fsyncs a file, renames it, fsyncs the folder; twice. Die at each of the six."""
    save_checkpoint(tmp_path, *contents(1))
    calls = []

    def die(real):
        def step(*args):
            if len(calls) == call:
                raise SystemExit("crash")
            calls.append(real)
            return real(*args)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", die(os.fsync))
        patch.setattr(os, "replace", die(os.replace))
        with pytest.raises(SystemExit):
            save_checkpoint(tmp_path, *contents(2))
    meta, tensors = load_checkpoint(tmp_path)
    assert meta["step"] == (2 if call == 5 else 1)  # renaming the index is the commit
    assert torch.equal(tensors["a"], torch.full((3,), float(meta["step"])))
    save_checkpoint(tmp_path, *contents(3))
    assert load_checkpoint(tmp_path)[0]["step"] == 3
    assert len(list(tmp_path.iterdir())) == 2  # nothing of the crash is left


def test_damaged_checkpoints_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint.json"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, *contents(1))
    index = tmp_path / "checkpoint.json"
    meta = json.loads(index.read_text())
    tensors = tmp_path / meta["tensors"]
    blob = tensors.read_bytes()
    tensors.write_bytes(blob[:-1])
    with pytest.raises(ValueError, match=f"{tensors.name}: damaged"):
        load_checkpoint(tmp_path)
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match=tensors.name):
        load_checkpoint(tmp_path)
    for text, message in (
        ("{", "expected JSON"),
        ("[]", "got 'list'"),
        (json.dumps({**meta, "format": 99}), "format 1, got 99"),
        (json.dumps({k: v for k, v in meta.items() if k != "config"}), "the key 'config'"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path)


def test_wrong_tensors_are_named(digits):
    model = Tiny(digits.shape)
    tensors = checkpoint.module_tensors(model, "model")
    for change, message in (
        (lambda t: t.pop("model/shift"), "lacks the tensor model/shift"),
        (lambda t: t.update({"model/extra": torch.zeros(1)}), "unknown tensor model/extra"),
        (lambda t: t.update({"model/shift": torch.zeros(1)}), r"model/shift: expected .*\[64\]"),
    ):
        broken = dict(tensors)
        change(broken)
        with pytest.raises(ValueError, match=message):
            checkpoint.load_module(model, broken, "model")


# --- the loop ---------------------------------------------------------------------------------


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


# --- processes --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_usable_checkpoint(tmp_path, tiny, number):
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


def test_two_ranks_repeat_one_process(tmp_path, tiny):
    """The same losses and weights up to the rounding of sums, over the end of an epoch."""
    arguments = ("tiny", "--data", "digits", "--steps", 26, "--device", "cpu", "--seed", 5)
    RECIPES["tiny"]["digits"] = no_dropout()
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


def no_dropout():
    # each rank draws its own dropout masks, so only a model without them is comparable
    return Recipe("Tiny", lambda data: {**tiny_config(data), "dropout": 0.0}, TrainConfig(lr=1e-3, warmup=5))


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


def test_train_and_sample_commands(tmp_path, tiny, capsys):
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


def test_mistakes_on_the_command_line(tmp_path, tiny):
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


if __name__ == "__main__":
    mount_tiny()
    if "LOCAL_RANK" in os.environ:
        RECIPES["tiny"]["digits"] = no_dropout()
    code = command(*sys.argv[1:])
    for name in Path("/proc/self/task").glob("*/comm"):  # Linux: threads left would abort the exit
        assert "gloo" not in name.read_text()
    sys.exit(code)
