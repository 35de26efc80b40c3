"""ODENVP, FFJORD on images (https://arxiv.org/abs/1810.01367)."""

from ..config import TrainConfig
from ..recipe import Recipe

# short recipes: normalised data, straight solutions by the regularisers of RNODE, and few steps of a fixed size
_SHORT = {
    "blocks": 1, "alpha": 1e-3, "norm": "actnorm", "kinetic": 0.01, "jacobian": 0.01, "method": "rk4",
    "step_size": 0.5, "train_time": False, "adjoint": False,
}  # fmt: skip

RECIPES = {
    "digits": Recipe(
        "ODENVP",
        lambda data: {"image_shape": data.shape, "hidden": (48, 48), **_SHORT},
        TrainConfig(epochs=40, batch_size=64, lr=4e-3, warmup=50, cooldown=0.5, ema=0.99),
    ),
    "mnist": Recipe(
        "ODENVP",
        lambda data: {"image_shape": data.shape, "hidden": (32, 32), **_SHORT, "alpha": 1e-5},
        TrainConfig(epochs=1, batch_size=64, lr=2e-3, warmup=100, cooldown=0.5, ema=0.998, final=1000),
        published=(0.99, "FFJORD, table 2"),
    ),
}

# rtqichen/ffjord, train_cnf.py: --layer_type concat --dims 64,64,64 --strides 1,1,1,1 --num_blocks 2 --multiscale True
# --rademacher True; its rate rises over 1000 steps, and nothing decays
_PAPER = TrainConfig(epochs=1000, batch_size=200, lr=1e-3, warmup=1000, clip=None, ema=0.0)

PUBLISHED = {
    "mnist": Recipe(
        "ODENVP",
        lambda data: {"image_shape": data.shape},
        _PAPER,
        published=(0.99, "FFJORD, table 2: MNIST"),
    ),
    "npz": Recipe(  # CIFAR-10
        "ODENVP",
        lambda data: {"image_shape": data.shape},
        _PAPER,
        published=(3.40, "FFJORD, table 2: CIFAR-10"),
    ),
}
