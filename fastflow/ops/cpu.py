"""The compiled CPU library that fits this machine.

The C++ sources are built once for every instruction set; the one that ``torch.backends.cpu.get_cpu_capability()``
names is loaded, so ``ATEN_CPU_CAPABILITY=avx2`` or ``default`` selects another.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastflow.ops._check import FLOATING, unsuited

_LIBRARIES = {"AVX512": ("avx512", "avx2", "baseline"), "AVX2": ("avx2", "baseline")}


def _load() -> tuple[ModuleType | None, str]:
    """The library, and why it is this one (or why there is none)."""
    capability = torch.backends.cpu.get_cpu_capability()
    failures = []
    for name in _LIBRARIES.get(capability, ("baseline",)):
        try:
            library = importlib.import_module(f"fastflow._cpu_{name}")
        except ImportError as error:
            failures.append(f"{name}: {error}")
            continue
        library.set_dtypes(*FLOATING, torch.int64)
        return library, f"{name} (torch reports {capability})"
    return None, "no compiled library was installed with this package (" + "; ".join(failures) + ")"


_library, _reason = _load()


def unavailable() -> str | None:
    """Why the CPU kernels cannot run on this machine; None if they can."""
    return None if _library else _reason


def description() -> str:
    """Which library serves, why, and on how many threads."""
    if _library is None:
        return _reason
    threads = f"{_library.threads()} threads" if _library.has_openmp() else "one thread: torch has no OpenMP"
    return f"{_reason}, {threads}"


def refuses(tensors: Iterable[Tensor | None]) -> str | None:
    """Why the CPU kernels cannot serve these tensors; None if they can."""
    return unsuited(tensors, "cpu")


def kernel(name: str) -> Callable[..., Any]:
    """The compiled function ``name``."""
    if _library is None:
        raise RuntimeError(f"the cpu backend is not available: {_reason}")
    return getattr(_library, name)
