"""GRU-ODE-Bayes (https://arxiv.org/abs/1905.12374)."""

from dataclasses import replace
from typing import Any

from ..config import TrainConfig
from ..data import Series
from ..recipe import Recipe

# edebrouwer/gru_ode_bayes: held-out Brusselator series are observed until time 35, then three observations are forecast
_BRUSSELATOR = {"cut": 35.0, "targets": 3}


def config(data: Series, **options: Any) -> dict[str, Any]:
    """Arguments for the series of `data`."""
    return {"features": data.features, "covariates": data.covariates, "horizon": data.horizon, **options}


def _short(options: dict[str, Any], **train: Any) -> Recipe:
    settings = {"lr": 4e-3, "cooldown": 0.6, "ema": 0.99, **train}
    return Recipe("GRUODEBayes", lambda data: config(data, **options), TrainConfig(**settings))


def _published(values: float, options: dict[str, Any], **train: Any) -> Recipe:
    """Their scripts add up the loss of a batch, and their weight decay is 5e-4 of that. Here the loss is the mean over
    the `values` of a batch, and the decay is as much smaller: the same update but for what Adam adds to its divisor."""
    settings = {"lr": 1e-3, "clip": None, "ema": 0.0, "weight_decay": 5e-4 / values, **train}
    return Recipe("GRUODEBayes", lambda data: config(data, clock="legacy", **options), TrainConfig(**settings))


RECIPES = {
    # the times of these are multiples of the step
    "brusselator": _short({"step": 0.1}, epochs=60, batch_size=50),
    "double-ou": _short({"step": 0.05}, epochs=10, batch_size=100),
    "physionet2012": _short({"hidden": 100, "prep_hidden": 10, "step": 0.25}, epochs=12, batch_size=50),
}
RECIPES["series"] = replace(RECIPES["brusselator"], data=_BRUSSELATOR)

PUBLISHED = {
    # their script makes an update with the first batch of an epoch only, 200 in all: that is --steps 200
    "brusselator": _published(100 * 44, {"step": 0.05}, epochs=200, batch_size=100),
    "double-ou": _published(500 * 23.4, {"step": 0.05}, epochs=50, batch_size=500),
    # the settings of MIMIC-III, which is not free; their batches are not known
    "physionet2012": _published(100 * 390, {"hidden": 100, "prep_hidden": 10, "step": 0.1}, epochs=50, batch_size=100),
}
PUBLISHED["series"] = replace(PUBLISHED["brusselator"], data=_BRUSSELATOR)
