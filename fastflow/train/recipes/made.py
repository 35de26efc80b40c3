"""MADE (https://arxiv.org/abs/1502.03509)."""

from ..config import TrainConfig
from ..recipe import Recipe

_BITS = {"form": "dynamic", "flat": True}


def _network(data, **options):
    return {"features": data.shape[0], **options}


RECIPES = {
    "mnist": Recipe(
        "MADE",
        lambda data: _network(data, hidden=(500,)),
        TrainConfig(epochs=5, batch_size=100, lr=2e-3, clip=None, cooldown=0.6, ema=0.0, weight_decay=1e-5),
        data=_BITS,
    ),
    "mnist-static": Recipe(
        "MADE",
        lambda data: _network(data, hidden=(500,)),
        TrainConfig(epochs=5, batch_size=100, lr=2e-3, clip=None, cooldown=0.6, ema=0.0, weight_decay=1e-5),
        data={"form": "static", "flat": True},
        published=(88.04, "MADE: one hidden layer, 32 masks"),
    ),
    "binary": Recipe(
        "MADE",
        lambda data: _network(data, hidden=(500,)),
        TrainConfig(epochs=40, batch_size=100, lr=1e-3, clip=None, ema=0.0, weight_decay=1e-4, patience=10),
        data={"flat": True},
    ),
}

PUBLISHED = {
    # karpathy/pytorch-made as its README runs it
    "mnist": Recipe(
        "MADE",
        lambda data: _network(data, hidden=(500,), num_masks=10, resample_order=True),
        TrainConfig(epochs=100, batch_size=100, lr=1e-3, clip=None, ema=0.0, weight_decay=1e-4, lr_decay=0.95),
        data={"form": "threshold", "flat": True},
    ),
}
