"""NICE (https://arxiv.org/abs/1410.8516)."""

from fastflow.models.nice import PRESETS

from ..config import TrainConfig
from ..recipe import Recipe

RECIPES = {  # short: standardised pixels, and networks that start larger
    "digits": Recipe(
        "NICE",
        lambda data: {"image_shape": data.shape, "hidden": 256, "layers": 3, "init": 0.05, "standardize": True},
        TrainConfig(epochs=35, batch_size=64, lr=1e-3, cooldown=0.5, ema=0.99, init_batch=1400),
    ),
    "mnist": Recipe(
        "NICE",
        lambda data: {"image_shape": data.shape, "hidden": 500, "layers": 3, "init": 0.04, "standardize": True},
        TrainConfig(epochs=5, batch_size=100, lr=1e-3, cooldown=0.5, ema=0.998, init_batch=10000),
        published=(4.36, "NICE: 1980.50 nats"),
    ),
}

# the code of the paper, laurent-dinh/nice; its RMSProp forgets by 0.95, and its momentum rises to 0.5 in a few epochs
_RMSPROP = {"batch_size": 200, "epochs": 1500, "optimizer": "rmsprop", "momentum": 0.5, "clip": None, "ema": 0.0}

PUBLISHED = {
    "mnist": Recipe(
        "NICE",
        lambda data: {**PRESETS["mnist"], "image_shape": data.shape},
        TrainConfig(lr=1e-3, lr_decay=1 / 1.0005, **_RMSPROP),
        published=(4.36, "NICE: 1980.50 nats"),
    ),
    "npz": Recipe(  # CIFAR-10; its whitening is left out
        "NICE",
        lambda data: {**PRESETS["cifar10"], "image_shape": data.shape},
        TrainConfig(lr=2e-4, lr_decay=1 / 1.0005, **_RMSPROP),
        published=(4.48, "NICE: 5371.78 nats on CIFAR-10"),
    ),
}
