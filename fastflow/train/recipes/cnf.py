"""A continuous flow by planar units, with their exact trace (https://arxiv.org/abs/1806.07366)."""

from ..config import TrainConfig
from ..recipe import Recipe


def recipe(time: float, base_std: float, **train) -> Recipe:
    return Recipe(
        "CNF",
        lambda data: {
            "dynamics": {"kind": "planar", "features": data.shape[0], "width": 64, "hidden": 32},
            "time": time,
            "base_std": base_std,
        },
        TrainConfig(clip=None, ema=0.0, **train),
    )


SHORT = recipe(time=2.0, base_std=0.5, steps=600, batch_size=256, lr=1e-2, cooldown=0.7, eval_every=300)
# torchdiffeq's example: 1000 steps of 512 points of the circles; it takes the mean of their log-likelihoods
PAPER = recipe(time=10.0, base_std=0.1**0.5, steps=1000, batch_size=512, lr=1e-3, eval_every=500)

RECIPES = {"circles": SHORT, "moons": SHORT}
PUBLISHED = {"circles": PAPER}
