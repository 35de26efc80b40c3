"""Models that keep the contract of `fastflow.train` in a few lines, and what the tests of training share.

Run as a script, this file is `fastflow train` with them as more models: the tests that need processes of their own
start it.
"""

import argparse
import gzip
import math
import os
import struct
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fastflow.models
from fastflow.train import RECIPES, Recipe, TrainConfig, cli, train

REPOSITORY = Path(fastflow.__file__).parents[1]


class Tiny(nn.Module):
    """A diagonal affine map and a dense coupling with dropout: the contract of Glow, in little; rows, too."""

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


class TinyVAE(nn.Module):
    """A linear VAE of bits: a loss of its own with a warm-up, a bound, and a final figure by importance sampling."""

    def __init__(self, features, latent=3, warmup=0.5):
        super().__init__()
        self.config = {"features": features, "latent": latent, "warmup": warmup}
        self.latent, self.warmup = latent, warmup
        self.encoder, self.decoder = nn.Linear(features, 2 * latent), nn.Linear(latent, features)
        self.norm = nn.BatchNorm1d(features)

    def initialize(self, batch):
        self.started = torch.rand(()).item()  # its own random numbers

    def terms(self, x):
        """(log p(x | z), log q(z | x) - log p(z)), each [B]."""
        mean, log_std = self.encoder(self.norm(x)).chunk(2, 1)
        noise = torch.randn_like(mean)
        z = mean + log_std.exp() * noise
        logits = self.decoder(z)
        kl = 0.5 * (z**2 - noise**2).sum(1) - log_std.sum(1)
        return (x * logits - nn.functional.softplus(logits)).sum(1), kl

    def forward(self, x, context=None):
        likelihood, kl = self.terms(x)
        return likelihood - kl

    def loss(self, x, progress):
        likelihood, kl = self.terms(x)
        return min(1.0, progress / self.warmup) * kl - likelihood

    def evaluate(self, x, samples=64):
        return torch.stack([self(x) for _ in range(samples)]).logsumexp(0) - math.log(samples)

    def sample(self, n, context=None, temperature=1.0, generator=None):
        z = temperature * torch.randn(n, self.latent, generator=generator)
        return torch.bernoulli(self.decoder(z).sigmoid(), generator=generator)


class TinyAudio(nn.Module):
    """A table of bigrams."""

    def __init__(self, levels=256):
        super().__init__()
        self.config = {"levels": levels}
        self.first = nn.Parameter(torch.zeros(levels))
        self.table = nn.Parameter(torch.zeros(levels, levels))

    def initialize(self, batch):
        pass

    def forward(self, x, context=None):
        log_p = self.table.log_softmax(1)
        return self.first.log_softmax(0)[x[:, 0]] + log_p[x[:, :-1], x[:, 1:]].sum(1)

    def sample(self, n, length, context=None, temperature=1.0, generator=None):
        x = torch.full((n, length), 128)
        for t in range(1, length):
            logits = self.table[x[:, t - 1]] / max(temperature, 1e-3)
            x[:, t] = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
        return x


def config_for(data):
    return {"image_shape": data.shape, "hidden": 16}


def without_dropout():
    # each rank draws its own dropout masks, so only a model without them is comparable
    return Recipe("Tiny", lambda data: {**config_for(data), "dropout": 0.0}, TrainConfig(lr=1e-3, warmup=5))


STANDINS = {
    "tiny": {
        "digits": Recipe("Tiny", config_for, TrainConfig(epochs=2, lr=3e-3)),
        "moons": Recipe("Tiny", config_for, TrainConfig(steps=60, lr=1e-2, batch_size=512)),
        "rows": Recipe("Tiny", config_for, TrainConfig(steps=4, batch_size=16), published=(1.0, "a paper")),
        "patches": Recipe(
            "Tiny", config_for, TrainConfig(steps=4, batch_size=16), data={"train": 64, "held_out": 8, "test": 8}
        ),
    },
    "tiny_vae": {
        "digits": Recipe(
            "TinyVAE",
            lambda data: {"features": data.shape[0]},
            TrainConfig(epochs=2, lr=3e-3, clip=None, optimizer="adamax", final=32),
            data={"form": "dynamic", "flat": True, "valid": 200},
            published=lambda config: (15.0, "a paper") if config["latent"] == 3 else None,
        ),
    },
    "tiny_audio": {
        "audio": Recipe("TinyAudio", lambda data: {}, TrainConfig(steps=4, batch_size=4, lr=0.1), data={"length": 50}),
    },
}


def mount():
    """Makes the stand-ins models of the command line."""
    for model in (Tiny, TinyVAE, TinyAudio):
        setattr(fastflow.models, model.__name__, model)
    RECIPES.update({name: dict(rows) for name, rows in STANDINS.items()})


def unmount():
    for name in STANDINS:
        del RECIPES[name]
    for model in (Tiny, TinyVAE, TinyAudio):
        delattr(fastflow.models, model.__name__)


# --- runs -------------------------------------------------------------------------------------


def settings(**changes):
    # 22 steps an epoch: runs of a few dozen steps see its end, and stop in its middle
    return TrainConfig(**{"batch_size": 64, "lr": 3e-3, "warmup": 5, "seed": 3, **changes})


def run(data, out, steps, resume=False, model=None, **changes):
    """(model, result) of a run of the stand-in on `data`."""
    torch.manual_seed(7)
    model = (model or (lambda: Tiny(data.shape)))()
    torch.manual_seed(steps)  # once there is a model, the caller's generator must not matter
    result = train(model, data, settings(steps=steps, **changes), out, resume=resume, progress=False)
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


# --- files ------------------------------------------------------------------------------------


def random_images(*shape, high=256):
    return np.random.default_rng(0).integers(0, high, shape, dtype=np.uint8)


def write_idx(path, array, kind=8):
    raw = bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    raw += array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def save_png(path, array):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def write_mat(path, name, array):
    """A MATLAB file of version 5 with one matrix of bytes."""

    def element(kind, content):
        return struct.pack("<2I", kind, len(content)) + content + bytes(-len(content) % 8)

    head = element(6, struct.pack("<2I", 9, 0)) + element(5, struct.pack("<2i", *array.shape))
    matrix = element(14, head + element(1, name.encode()) + element(2, array.T.tobytes()))
    path.write_bytes(b"MATLAB 5.0".ljust(124) + struct.pack("<H", 0x100) + b"IM" + matrix)


def write_series(path, series=20, step=0.25, seed=0):
    """Two channels at 3 to 9 of 25 times, in random order, with a covariate."""
    g, lines = np.random.default_rng(seed), ["ID,Time,Value_a,Value_b,Mask_a,Mask_b,Cov"]
    for i in range(series):
        masks = [(1, 0), (0, 1), (1, 1)]
        for k, time in enumerate(g.permutation(25)[: g.integers(3, 10)] * step):
            (a, b), (x, y) = masks[(i + k) % 3], g.normal(size=2)
            lines.append(f"{i}.0,{time},{a * x},{b * y},{a},{b},{i % 2}")
    path.write_text("\n".join(lines) + "\n")


def write_stays(path, stays=20, seed=0):
    """The long form of PhysioNet 2012: descriptors at minute 0, a few values in 48 hours, a flag that is always 1."""
    g, lines = np.random.default_rng(seed), ["RecordID,Minutes,Parameter,Value"]
    for i in range(stays):
        first = {"RecordID": 1000 + i, "Age": 40 + i, "Gender": i % 2, "Height": -1 if i % 3 else 170 + i}
        first |= {"ICUType": 1 + i % 4, "Weight": 70 + i}
        lines += [f"{1000 + i},0,{name},{value}" for name, value in first.items()]
        for minute in sorted(g.integers(5, 2880, 12)):
            for name, mean in (("HR", 80), ("Temp", 37), ("MechVent", 1)):
                if g.random() < 0.6:
                    lines.append(f"{1000 + i},{minute},{name},{mean if mean == 1 else mean + g.normal():.3f}")
    path.write_text("\n".join(lines) + "\n")


def files(name, folder):
    """The path of a data set like `name`, as small as may be."""
    path = folder / {"rows": "table.csv", "caltech": "x.mat", "series": "x.csv", "physionet2012": "set.csv"}.get(
        name, "x.npz"
    )
    bits = {part: random_images(40, 784, high=2) for part in ("train", "valid", "test")}
    if name == "mnist":
        for part in ("train", "t10k"):
            write_idx(folder / f"{part}-images-idx3-ubyte", random_images(40, 28, 28))
        return folder
    if name == "mnist-static":
        np.savez(path, **{part: np.packbits(rows, axis=1) for part, rows in bits.items()})
    elif name == "binary":
        np.savez(path, **{part: rows[:, :100] for part, rows in bits.items()})
    elif name == "freyfaces":
        np.savez(path, x=random_images(60, 28, 20))
    elif name == "omniglot":
        for word in ("background", "evaluation"):
            np.savez(folder / f"{word}.npz", ink=random_images(4, 10, 105, 105) > 250)
        return folder
    elif name == "caltech":
        write_mat(path, "X", bits["train"])
    elif name == "images":
        for i, image in enumerate(random_images(40, 16, 16, 3)):
            save_png(folder / f"{i}.png", image)
        return folder
    elif name == "npz":
        np.savez(path, x=random_images(40, 16, 16))
    elif name == "rows":
        np.savetxt(path, np.random.default_rng(0).normal(size=(60, 6)), delimiter=",")
    elif name == "miniboone":
        for part in ("val", "test"):
            np.savez(folder / f"{part}.npz", x=np.random.default_rng(0).normal(size=(40, 6)))
        return folder
    elif name == "series":
        write_series(path, 40, step=2.0)
    elif name == "physionet2012":
        write_stays(path)
    elif name == "patches":
        for part in ("train", "test"):
            for i in range(3):
                save_png(folder / part / f"{i}.png", random_images(20, 20))
        return folder
    elif name == "audio":
        sound = np.random.default_rng(0).normal(size=20000).clip(-1, 1)
        np.savez(path, audio=sound, offsets=np.arange(0, 20001, 500), test=np.arange(40) < 20)
    else:
        raise AssertionError(f"no little {name!r} here: add it")
    return path


if __name__ == "__main__":
    mount()
    if "LOCAL_RANK" in os.environ:
        RECIPES["tiny"]["digits"] = without_dropout()
    code = command(*sys.argv[1:])
    for name in Path("/proc/self/task").glob("*/comm"):  # Linux: threads left would abort the exit
        assert "gloo" not in name.read_text()
    sys.exit(code)
