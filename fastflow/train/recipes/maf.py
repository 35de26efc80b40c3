"""MAF (https://arxiv.org/abs/1705.07057)."""

from dataclasses import replace

from ..config import TrainConfig
from ..recipe import Recipe


def _network(data, **options):
    return {"features": data.shape[0], **options}


# negative log-likelihoods, as all figures in nats here
_MINIBOONE = (11.75, "MAF, table 1: MINIBOONE, trained on 29 556 rows")

# gpapamak/maf: Adam, weight decay 1e-6, stops after 30 epochs without a better held-out likelihood
_PUBLISHED = TrainConfig(
    epochs=1000, batch_size=100, lr=1e-4, clip=None, ema=0.0, weight_decay=1e-6, patience=30
)  # fmt: skip

RECIPES = {
    "moons": Recipe(
        "MAF",
        lambda data: _network(data, steps=5, hidden=(64, 64), norm="act"),
        TrainConfig(epochs=40, batch_size=200, lr=3e-3, clip=None, cooldown=0.7, ema=0.0),
    ),
    "rows": Recipe(
        "MAF",
        lambda data: _network(data, steps=5, hidden=(100,), norm="batch", activation="tanh"),
        TrainConfig(
            epochs=40, batch_size=100, lr=1e-3, clip=None, cooldown=0.7, ema=0.0, weight_decay=1e-4, patience=8
        ),
    ),
    "patches": Recipe(
        "MAF",
        lambda data: _network(data, steps=5, hidden=(256, 256), norm="batch", activation="tanh"),
        TrainConfig(steps=3000, batch_size=256, lr=1e-3, clip=None, cooldown=0.7, ema=0.0, weight_decay=1e-6),
        published=(-155.69, "MAF, table 1: BSDS300, trained on more patches, 512 units"),
    ),
    "digits": Recipe(
        "MAF",
        lambda data: _network(data, steps=5, hidden=(256,), norm="act", activation="tanh"),
        TrainConfig(epochs=40, batch_size=64, lr=4e-3, cooldown=0.7, ema=0.99, weight_decay=1e-4),
        data={"flat": True},
    ),
}

PUBLISHED = {
    "rows": Recipe(
        "MAF",
        lambda data: _network(data, steps=5, hidden=(512, 512)),
        _PUBLISHED,
    ),
    "patches": Recipe(
        "MAF",
        lambda data: _network(data, steps=5, hidden=(512, 512)),
        _PUBLISHED,
        published=(-155.69, "MAF, table 1: BSDS300"),
    ),
}

for _book in (RECIPES, PUBLISHED):
    _book["miniboone"] = replace(_book["rows"], published=_MINIBOONE)
