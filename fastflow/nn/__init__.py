"""Modules: (x, context) -> (z, logdet) and back."""

from fastflow.nn.actnorm import ActNorm
from fastflow.nn.base import Bijection
from fastflow.nn.conv1x1 import InvertibleConv1x1, Weights, weights

__all__ = ["ActNorm", "Bijection", "InvertibleConv1x1", "Weights", "weights"]
