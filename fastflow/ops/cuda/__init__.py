"""CUDA kernels: the sources in ``csrc/cuda``, compiled for the GPU at hand and launched on torch's current stream.

A call goes from the kernel's function in one file per family here, which decides on the instance and the grid
(:mod:`fastflow.ops.cuda.plan`), to :mod:`fastflow.ops.cuda.load`, which compiles and launches.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable

from torch import Tensor

from fastflow.ops._check import unsuited
from fastflow.ops.cuda import load, source

FAMILIES = (
    "coupling",
    "actnorm",
    "conv1x1",
    "conv1x1_weights",
    "gaussian",
    "trace",
    "planar",
    "radial",
    "sylvester",
    "autoregressive",
    "mlp_coupling",
    "wavenet",
    "gru_ode",
    "ode",
    "ode_adjoint",
)

_kernels: dict[str, Callable[..., None]] = {}


def unavailable() -> str | None:
    """Why CUDA kernels cannot run on this machine; None if they can."""
    return load.driver().unavailable()


def description() -> str:
    """What compiles and launches."""
    return load.driver().description()


def refuses(tensors: Iterable[Tensor | None]) -> str | None:
    """Why the kernels cannot serve these tensors; None if they can."""
    return unsuited(tensors, load.driver().device_type)


def kernel(name: str) -> Callable[..., None]:
    """The function that launches ``name``."""
    if not _kernels:
        for family in FAMILIES:
            _kernels.update(importlib.import_module(f"fastflow.ops.cuda.{family}").KERNELS)
    return _kernels[name]


def fingerprint() -> str:
    """Names the sources and what compiles them."""
    return f"{source.fingerprint()} {load.driver().description()}"
