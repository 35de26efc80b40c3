"""Glow (https://arxiv.org/abs/1807.03039)."""

from typing import Any

from ..config import TrainConfig
from ..data import Images
from ..errors import UserError
from ..recipe import Recipe


def config(data: Images, levels: int, steps: int, hidden: int) -> dict[str, Any]:
    """Arguments for the images of `data`.

    Every level halves height and width, so images that cannot be halved as often get fewer levels. Raises `UserError`
    when they cannot be halved at all.
    """
    _, height, width = data.shape
    halvings = ((height | width) & -(height | width)).bit_length() - 1
    if not halvings:
        raise UserError(f"expected images of even height and width, got {height}x{width}")
    return {"image_shape": data.shape, "levels": min(levels, halvings), "steps": steps, "hidden": hidden}


_PICTURES = Recipe(
    "Glow",
    lambda data: config(data, levels=3, steps=16, hidden=128),
    TrainConfig(epochs=50, batch_size=32, lr=5e-4, warmup=500, ema=0.999),
)

RECIPES = {
    "digits": Recipe(
        "Glow",
        lambda data: config(data, levels=2, steps=8, hidden=64),
        TrainConfig(epochs=20, batch_size=64, lr=3e-3, warmup=50, cooldown=0.5, ema=0.99),
    ),
    "mnist": Recipe(
        "Glow",
        lambda data: config(data, levels=2, steps=8, hidden=64),
        TrainConfig(epochs=3, batch_size=32, lr=4e-3, warmup=100, cooldown=0.7, ema=0.998, checkpoint_every=500),
    ),
    "images": _PICTURES,
    "npz": _PICTURES,
}
