"""Training models on images, rows, audio and series: data, the loop, checkpoints, and the recipes of
`fastflow train`.

Needs the extra `pip install fastflow[train]`; importing this does not.
"""

from .config import TrainConfig
from .data import Audio, Dataset, Images, Patches, Rows, Series, load_data
from .errors import MissingPackage, NonFiniteLoss, UserError
from .loop import Result, evaluate, final_figure, train
from .pixels import bits_per_dim
from .recipe import Recipe, load_model
from .recipes import PUBLISHED, RECIPES

__all__ = [
    "PUBLISHED",
    "RECIPES",
    "Audio",
    "Dataset",
    "Images",
    "MissingPackage",
    "NonFiniteLoss",
    "Patches",
    "Recipe",
    "Result",
    "Rows",
    "Series",
    "TrainConfig",
    "UserError",
    "bits_per_dim",
    "evaluate",
    "final_figure",
    "load_data",
    "load_model",
    "train",
]
