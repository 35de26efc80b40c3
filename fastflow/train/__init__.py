"""Training flows on images: data, the loop, checkpoints, and the recipes behind `fastflow train`.

Needs the extra `pip install fastflow[train]`; importing this does not.
"""

from .config import TrainConfig
from .data import Images, load_data
from .errors import MissingPackage, NonFiniteLoss, UserError
from .loop import Result, evaluate, train
from .pixels import bits_per_dim
from .recipes import RECIPES, Recipe, load_model

__all__ = [
    "RECIPES",
    "Images",
    "MissingPackage",
    "NonFiniteLoss",
    "Recipe",
    "Result",
    "TrainConfig",
    "UserError",
    "bits_per_dim",
    "evaluate",
    "load_data",
    "load_model",
    "train",
]
