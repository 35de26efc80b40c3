"""fastflow: normalizing flows on fused kernels for PyTorch."""

from fastflow import nn as nn
from fastflow.errors import SolverError as SolverError
from fastflow.nn import NonFiniteError as NonFiniteError
from fastflow.nn import debug as debug
from fastflow.nn import inverse_error as inverse_error
from fastflow.ops import *  # noqa: F403

__version__ = "0.1.0"
