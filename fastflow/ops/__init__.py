"""The functional API: one file per family, each with its meaning (reference), contract and gradient."""

from fastflow.ops._backend import BackendError, use_backend
from fastflow.ops.actnorm import actnorm
from fastflow.ops.conv1x1 import conv1x1
from fastflow.ops.conv1x1_weights import dense_weights, lu_weights
from fastflow.ops.coupling import additive_coupling, affine_coupling
from fastflow.ops.scale_map import ScaleMap, scale_map

__all__ = [
    "BackendError",
    "ScaleMap",
    "actnorm",
    "additive_coupling",
    "affine_coupling",
    "conv1x1",
    "dense_weights",
    "lu_weights",
    "scale_map",
    "use_backend",
]
