"""RealNVP (https://arxiv.org/abs/1605.08803)."""

from fastflow.models.realnvp import PRESETS

from ..config import TrainConfig
from ..recipe import Recipe

RECIPES = {
    "moons": Recipe(
        "VectorRealNVP",
        lambda data: {"features": data.shape[0], "layers": 8, "hidden": (64, 64)},
        TrainConfig(steps=3000, batch_size=256, lr=2e-3, warmup=50, cooldown=0.5, clip=5.0, ema=0.99, eval_every=500),
    ),
    "rows": Recipe(
        "VectorRealNVP",
        lambda data: {"features": data.shape[0], "layers": 10, "hidden": (100, 100)},
        TrainConfig(epochs=50, batch_size=128, lr=1e-3, warmup=50, cooldown=0.5, clip=5.0, ema=0.99),
    ),
    "digits": Recipe(
        "RealNVP",
        lambda data: {"image_shape": data.shape, "hidden": 32, "blocks": 2, "alpha": 1e-3},
        TrainConfig(epochs=20, batch_size=64, lr=3e-3, warmup=50, cooldown=0.5, ema=0.99),
    ),
    "mnist": Recipe(
        "RealNVP",
        lambda data: {"image_shape": data.shape, "hidden": 16, "blocks": 2, "compact": True, "alpha": 1e-3},
        TrainConfig(epochs=2, batch_size=32, lr=5e-3, warmup=50, cooldown=0.5, ema=0.998, checkpoint_every=1875),
        published=(1.06, "RealNVP, as FFJORD quotes it"),
    ),
}

# the code this follows, chrischute/real-nvp, clips the gradient of the loss in nats at 100
_CLIP = 100 / 2130  # in bits/dim of 3 x 32 x 32

PUBLISHED = {
    "npz": Recipe(  # CIFAR-10
        "RealNVP",
        lambda data: {**PRESETS["chrischute-cifar10"], "image_shape": data.shape},
        TrainConfig(epochs=100, batch_size=64, lr=1e-3, clip=_CLIP, ema=0.0),
        published=(3.49, "RealNVP, table 1, CIFAR-10"),
    ),
    "mnist": Recipe(
        "RealNVP",
        lambda data: {"image_shape": data.shape, "hidden": 64, "blocks": 8},
        TrainConfig(epochs=100, batch_size=64, lr=1e-3, warmup=500, ema=0.999),
        published=(1.06, "RealNVP, as FFJORD quotes it"),
    ),
}
