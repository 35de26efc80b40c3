"""Modules: bijections (x, context) -> (z, logdet) and back, base distributions, and the flow they make."""

from fastflow.nn.base import Bijection, Inverse, Sequential
from fastflow.nn.base_distribution import Base, DiagonalGaussian, StandardNormal
from fastflow.nn.debugging import NonFiniteError, debug
from fastflow.nn.diagnostics import InverseError, inverse_error
from fastflow.nn.flow import Flow
from fastflow.nn.permutation import Permutation
from fastflow.nn.reshape import Squeeze
from fastflow.nn.split_prior import SplitPrior

__all__ = [
    "Base",
    "Bijection",
    "DiagonalGaussian",
    "Flow",
    "Inverse",
    "InverseError",
    "NonFiniteError",
    "Permutation",
    "Sequential",
    "SplitPrior",
    "Squeeze",
    "StandardNormal",
    "debug",
    "inverse_error",
]
