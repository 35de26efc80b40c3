"""What a recipe is, and the way from its name, or from a checkpoint, to a model."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import load_checkpoint, load_module
from .config import TrainConfig
from .data import NAMES, Dataset
from .errors import UserError

Published = tuple[float, str]


@dataclass(frozen=True)
class Recipe:
    """One model on one data set.

    Args:
        model: a class of `fastflow.models`.
        config: the arguments of its constructor, made for the data (`data.shape`, `data.levels`).
        train: how to train it.
        data: options of `load_data`.
        published: (a published figure in the data's unit, a cost like all figures: -log p; where it is from), shown
            beside what a run reaches; or a function from the model's arguments to that, or to None.
    """

    model: str
    config: Callable[[Any], Mapping[str, Any]]
    train: TrainConfig = field(default_factory=TrainConfig)
    data: Mapping[str, Any] = field(default_factory=dict)
    published: Published | Callable[[Mapping[str, Any]], Published | None] | None = None


def find_recipe(model: str, data: str, published: bool = False) -> Recipe:
    """The recipe of `model` and `data`; raises `UserError` naming those there are."""
    from .recipes import PUBLISHED, RECIPES

    if model not in RECIPES:
        raise UserError(f"unknown model {model!r}: expected one of {', '.join(RECIPES)}")
    if data not in NAMES:
        raise UserError(f"unknown data set {data!r}: expected one of {', '.join(NAMES)}")
    rows = (PUBLISHED if published else RECIPES).get(model, {})
    if data not in rows:
        what = "published recipe" if published else "recipe"
        raise UserError(f"no {what} of {model} for the data set {data!r}: expected one of {', '.join(rows) or 'none'}")
    return rows[data]


def model_config(recipe: Recipe, data: Dataset, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The arguments of the model's constructor for `data`, some of them replaced by `changes`."""
    changes = changes or {}
    known = inspect.signature(_model_class(recipe.model)).parameters
    if unknown := changes.keys() - known:
        raise UserError(f"{min(unknown)}: no argument of {recipe.model}, which has {', '.join(known)}")
    return {**recipe.config(data), **changes}


def build_model(name: str, config: Mapping[str, Any]) -> nn.Module:
    """The class `name` of `fastflow.models`, if a recipe trains it, constructed from `config`."""
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    return _model_class(name)(**arguments)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The trained model of a run or checkpoint folder, and the metadata; `data` in it with the tensors that are kept of
    the data.

    Its weights are the averaged ones; those of the best evaluation, where the run could stop early.

    Raises `FileNotFoundError` or `UserError` naming what is missing or damaged.
    """
    path = Path(path)
    meta, tensors = load_checkpoint(path / "checkpoint" if (path / "checkpoint").is_dir() else path)
    model = build_model(meta["model"]["name"], meta["model"]["config"])
    load_module(model, tensors, "best" if any(name.startswith("best/") for name in tensors) else "ema")
    meta["data"] |= {name.removeprefix("data/"): x for name, x in tensors.items() if name.startswith("data/")}
    return model.to(device).eval(), meta


def _model_class(name: str) -> type[nn.Module]:
    from fastflow import models

    from .recipes import PUBLISHED, RECIPES

    known = {recipe.model for book in (RECIPES, PUBLISHED) for rows in book.values() for recipe in rows.values()}
    if name not in known:
        raise UserError(f"unknown model {name!r}: expected one of {', '.join(sorted(known))}")
    return getattr(models, name)
