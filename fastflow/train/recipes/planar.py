"""Planar flows (https://arxiv.org/abs/1505.05770)."""

from ..config import TrainConfig
from ..recipe import Recipe


def recipe(model: str, **train) -> Recipe:
    # the paper's direction: its formula makes the samples, and log p of data goes through the inverse
    return Recipe(
        model,
        lambda data: {"features": data.shape[0], "steps": 32, "direction": "sampling"},
        TrainConfig(**train),
    )


SHORT = {"steps": 3000, "batch_size": 512, "lr": 5e-3, "warmup": 50, "cooldown": 0.5, "clip": 5.0, "ema": 0.99,
         "eval_every": 500}  # fmt: skip
# The paper's optimiser and number of updates. It fits energies and posteriors, and has no figure for a data set.
PAPER = {"steps": 500_000, "batch_size": 100, "lr": 1e-5, "optimizer": "rmsprop", "momentum": 0.9, "clip": None,
         "ema": 0.0, "eval_every": 10_000}  # fmt: skip

RECIPES = {"moons": recipe("Planar", **SHORT)}
PUBLISHED = {"moons": recipe("Planar", **PAPER)}
