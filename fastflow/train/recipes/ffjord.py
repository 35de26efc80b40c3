"""FFJORD (https://arxiv.org/abs/1810.01367)."""

from dataclasses import replace

from fastflow.models.ffjord import PRESETS

from ..config import TrainConfig
from ..data.toys import TOYS
from ..recipe import Recipe

# negative log-likelihoods, as all figures in nats here
_MINIBOONE = (10.43, "FFJORD, table 2: MINIBOONE, trained on 29 556 rows")
_BSDS = (-157.40, "FFJORD, table 2: BSDS300, trained on more patches")


def _network(data, **options):
    return {"features": data.shape[0], **options}


def _preset(data):
    """That of the data set with as many columns; two layers of ten units for each column, where there is none."""
    (features,) = data.shape
    for preset in PRESETS.values():
        if preset["features"] == features:
            return preset
    return {**PRESETS["miniboone"], "features": features, "hidden": (10 * features, 10 * features)}


# --- short --------------------------------------------------------------------------------------------

_TOY = Recipe(
    "FFJORD",
    lambda data: _network(data, hidden=(64, 64, 64), activation="tanh", time=0.5, trace="exact"),
    TrainConfig(
        steps=2000, batch_size=256, lr=3e-3, clip=None, cooldown=0.5, ema=0.99, weight_decay=1e-5, eval_every=500
    ),
)
_ROWS = TrainConfig(
    epochs=60, batch_size=100, lr=5e-3, clip=None, cooldown=0.7, ema=0.99, weight_decay=1e-4, patience=8
)

RECIPES = {
    **dict.fromkeys(TOYS, _TOY),
    # densities of the evaluation are estimates by one probe, too: unbiased
    "rows": Recipe(
        "FFJORD",
        lambda data: _network(data, hidden=(128, 128), activation="softplus", time=1.0, rtol=1e-4, atol=1e-4),
        _ROWS,
    ),
    "patches": Recipe(
        "FFJORD",
        lambda data: _network(
            data, hidden=(128, 128), activation="softplus", time=1.0, rtol=1e-4, atol=1e-4, batch_norm=True
        ),
        TrainConfig(steps=2000, batch_size=256, lr=3e-3, clip=None, cooldown=0.7, ema=0.99, eval_every=1000),
        published=_BSDS,
    ),
    "digits": Recipe(
        "FFJORD",
        lambda data: _network(
            data, hidden=(128, 128), activation="softplus", time=1.0, rtol=1e-4, atol=1e-4, batch_norm=True
        ),
        TrainConfig(
            epochs=60, batch_size=64, lr=3e-3, clip=None, cooldown=0.7, ema=0.99, weight_decay=1e-4, patience=10
        ),
        data={"flat": True},
    ),
}

# --- the paper's --------------------------------------------------------------------------------------

_TABULAR = TrainConfig(
    epochs=1000, batch_size=1000, lr=1e-3, clip=None, ema=0.0, weight_decay=1e-6, patience=30
)  # fmt: skip

PUBLISHED = {
    **dict.fromkeys(
        TOYS,
        Recipe(
            "FFJORD",
            lambda data: PRESETS["toy"],
            TrainConfig(steps=10_000, batch_size=100, lr=1e-3, clip=None, ema=0.0, weight_decay=1e-5, eval_every=1000),
        ),
    ),
    "rows": Recipe("FFJORD", _preset, _TABULAR),
    "patches": Recipe("FFJORD", _preset, replace(_TABULAR, batch_size=10_000), published=_BSDS),
}

for _book in (RECIPES, PUBLISHED):
    _book["miniboone"] = replace(_book["rows"], published=_MINIBOONE)
