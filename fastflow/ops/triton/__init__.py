"""Kernels in Triton, for GPUs; with ``TRITON_INTERPRET=1`` Triton's interpreter runs them on tensors in memory.

Triton is optional and takes a while to import: nothing here does so before the first call that needs it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastflow.ops._check import unsuited

OLDEST = (3, 4)
# the file of this folder that holds a kernel
_FAMILIES = {
    "coupling": ("coupling_fwd", "coupling_bwd"),
    "actnorm": ("actnorm_fwd", "actnorm_bwd"),
    "conv1x1": ("conv1x1_fwd", "conv1x1_bwd"),
    "conv1x1_weights": ("lu_weights_fwd", "lu_weights_bwd"),
    "gaussian": (
        *("gaussian_log_prob_fwd", "gaussian_log_prob_bwd"),
        *("gaussian_sample_fwd", "gaussian_sample_bwd", "gaussian_kl_fwd", "gaussian_kl_bwd"),
    ),
    "planar": ("planar_fwd", "planar_bwd"),
    "radial": ("radial_fwd", "radial_bwd"),
    "autoregressive": ("autoregressive_fwd", "autoregressive_bwd", "masked_weight_bwd"),
    "mlp_coupling": ("mlp_coupling_fwd", "mlp_coupling_bwd"),
    "sylvester": ("sylvester_fwd", "sylvester_bwd"),
    "trace": ("trace_rows", "trace_rows_bwd", "trace_contract", "trace_layer_fwd", "trace_layer_bwd"),
    "ode": ("mlp_ode_fwd", "mlp_ode_bwd"),
    "wavenet": ("wavenet_gate_fwd", "wavenet_gate_bwd", "wavenet_generate"),
}
_HOME = {kernel: family for family, kernels in _FAMILIES.items() for kernel in kernels}
_kernels: dict[str, Callable[..., Any]] = {}


def _installed() -> tuple[str, str | None]:
    """(the version of Triton, why it cannot be used), without importing it."""
    for package in ("triton", "pytorch-triton"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        found = re.match(r"(\d+)\.(\d+)", version)
        old = found is None or tuple(map(int, found.groups())) < OLDEST
        return version, f"triton {version} is older than {'.'.join(map(str, OLDEST))}" if old else None
    return "", "triton is not installed"


_version, _reason = _installed()
_interpreting = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
_cuda: bool | None = None


def unavailable() -> str | None:
    """Why the Triton kernels cannot run on this machine; None if they can."""
    global _cuda
    if _reason is not None or _interpreting:
        return _reason
    if _cuda is None:  # asked late: it starts the driver
        _cuda = torch.cuda.is_available()
    return None if _cuda else "torch sees no CUDA device, and TRITON_INTERPRET=1 is not set"


def description() -> str:
    """What compiles the kernels."""
    return f"Triton {_version}{', interpreted' if _interpreting else ''}"


def refuses(tensors: Iterable[Tensor | None]) -> str | None:
    """Why the Triton kernels cannot serve these tensors; None if they can. The interpreter takes those in memory."""
    return unsuited(tensors, "cpu" if _interpreting else "cuda")


def kernel(name: str) -> Callable[..., Any]:
    """The function ``name``, as the bodies of the ops call it."""
    found = _kernels.get(name)
    if found is None:
        if (reason := unavailable()) is not None:
            raise RuntimeError(f"the triton backend is not available: {reason}")
        found = _kernels[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return found


@functools.cache
def fingerprint() -> str:
    """Names the compiler and the sources: what a verdict on the kernels depends on beside device and driver."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    shared = ("_layout.py", "_steps.py", "planar.py", "radial.py", "scale_map.py")
    for source in [*sorted(here.glob("*.py")), *(here.parent / name for name in shared)]:
        digest.update(source.read_bytes())
    return f"triton {_version} {'interpreted ' if _interpreting else ''}{digest.hexdigest()}"
