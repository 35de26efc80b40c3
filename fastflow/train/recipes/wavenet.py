"""WaveNet (https://arxiv.org/abs/1609.03499)."""

from ..config import TrainConfig
from ..recipe import Recipe

RECIPES = {
    "audio": Recipe(
        "WaveNet",
        lambda data: {"levels": data.levels, "skip": 128, "blocks": 3, "depth": 8},
        TrainConfig(epochs=3, batch_size=4, lr=3e-3, warmup=100, cooldown=0.7, ema=0.99),
        data={"length": 4000},
    ),
}

# github.com/ibab/tensorflow-wavenet, which gives no likelihood: pieces of 100 000 samples, one a step
PUBLISHED = {
    "audio": Recipe(
        "WaveNet",
        lambda data: {"levels": data.levels, "skip": 512, "blocks": 5, "depth": 10},
        TrainConfig(steps=100_000, batch_size=1, lr=1e-3, clip=None, ema=0.0, eval_every=1000, checkpoint_every=1000),
        data={"length": 100_000},
    ),
}
