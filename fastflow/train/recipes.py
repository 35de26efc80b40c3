"""The recipes behind `fastflow train MODEL --data NAME`: one row per model and data set."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import load_checkpoint, load_module
from .config import TrainConfig
from .errors import UserError


@dataclass(frozen=True)
class Recipe:
    """A class of `fastflow.models`, its arguments besides `image_shape`, and how to train it."""

    model: str
    config: Mapping[str, Any]
    train: TrainConfig = field(default_factory=TrainConfig)


RECIPES: dict[str, dict[str, Recipe]] = {
    "glow": {
        "digits": Recipe(
            "Glow",
            {"levels": 2, "steps": 8, "hidden": 64},
            TrainConfig(epochs=20, batch_size=64, lr=3e-3, warmup=50, cooldown=0.5, ema=0.99),
        ),
        "mnist": Recipe(
            "Glow",
            {"levels": 2, "steps": 8, "hidden": 64},
            TrainConfig(epochs=3, batch_size=32, lr=4e-3, warmup=100, cooldown=0.7, ema=0.998, checkpoint_every=500),
        ),
        "images": Recipe(
            "Glow",
            {"levels": 3, "steps": 16, "hidden": 128},
            TrainConfig(epochs=50, batch_size=32, lr=5e-4, warmup=500, ema=0.999),
        ),
        "npz": Recipe(
            "Glow",
            {"levels": 3, "steps": 16, "hidden": 128},
            TrainConfig(epochs=50, batch_size=32, lr=5e-4, warmup=500, ema=0.999),
        ),
    },
}


def find_recipe(model: str, data: str) -> Recipe:
    """The row of `model` and `data`; raises `UserError` naming those there are."""
    if model not in RECIPES:
        raise UserError(f"unknown model {model!r}: expected one of {', '.join(RECIPES)}")
    if data not in RECIPES[model]:
        raise UserError(f"no recipe of {model} for the data set {data!r}: expected one of {', '.join(RECIPES[model])}")
    return RECIPES[model][data]


def model_config(recipe: Recipe, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Constructor arguments for images of `shape` [C, H, W].

    Every level halves height and width, so images that cannot be halved as often get fewer
    levels. Raises `UserError` when they cannot be halved at all.
    """
    config = {"image_shape": tuple(shape), **recipe.config}
    if "levels" in config:
        _, height, width = shape
        halvings = ((height | width) & -(height | width)).bit_length() - 1
        if not halvings:
            raise UserError(f"expected images of even height and width, got {height}x{width}")
        config["levels"] = min(config["levels"], halvings)
    return config


def build_model(name: str, config: Mapping[str, Any]) -> nn.Module:
    """The class `name` of `fastflow.models`, if a recipe trains it, constructed from `config`."""
    known = {recipe.model for rows in RECIPES.values() for recipe in rows.values()}
    if name not in known:
        raise UserError(f"unknown model {name!r}: expected one of {', '.join(sorted(known))}")
    from .. import models

    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    return getattr(models, name)(**arguments)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The trained flow (its averaged weights) of a run or checkpoint folder, and the metadata.

    Raises `FileNotFoundError` or `UserError` naming what is missing or damaged.
    """
    path = Path(path)
    meta, tensors = load_checkpoint(path / "checkpoint" if (path / "checkpoint").is_dir() else path)
    model = build_model(meta["model"]["name"], meta["model"]["config"])
    load_module(model, tensors, "ema")
    return model.to(device).eval(), meta
