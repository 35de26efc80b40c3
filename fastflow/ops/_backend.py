"""Which backend serves a call, and why the others do not: the only place that decides.

``reference`` is plain PyTorch and serves everything; a native backend is a module of this folder with
``unavailable()``, ``refuses(tensors)`` and ``kernel(name)``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from fastflow.ops import cpu

__all__ = ["NATIVE", "BACKENDS", "BackendError", "use_backend", "choose", "reasons", "transformed"]

NATIVE: dict[str, ModuleType] = {"cpu": cpu}  # the fastest first
BACKENDS = (*NATIVE, "reference")


class _Forced(threading.local):
    """What use_backend() asked for, on this thread."""

    name: str | None = None


_forced = _Forced()


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve the call."""


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Every op inside runs on the backend ``name`` or raises :class:`BackendError`; None is automatic choice.

    >>> import torch, fastflow
    >>> with fastflow.use_backend("reference"):
    ...     z, logdet = fastflow.affine_coupling(torch.ones(2, 3), torch.zeros(2, 6))
    """
    before, _forced.name = _forced.name, _checked(name)
    try:
        yield
    finally:
        _forced.name = before


def _checked(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise BackendError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def choose(tensors: Iterable[Tensor | None], backend: str | None = None) -> str:
    """The backend that serves a call on these tensors: the one asked for, or the fastest that can."""
    tensors = tuple(tensors)
    forced = _checked(backend) or _forced.name
    if forced == "reference":
        return forced
    for name in NATIVE if forced is None else (forced,):
        if _refusal(name, tensors) is None:
            return name
    if forced is None:
        return "reference"
    raise BackendError(
        f"backend {forced!r} cannot serve this call. "
        + "; ".join(f"{name}: {reason or 'can serve it'}" for name, reason in reasons(tensors).items())
    )


def reasons(tensors: Iterable[Tensor | None] = ()) -> dict[str, str | None]:
    """For every backend why it cannot serve these tensors, None where it can."""
    tensors = tuple(tensors)
    return {name: _refusal(name, tensors) for name in NATIVE} | {"reference": None}


def _refusal(name: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    backend = NATIVE[name]
    if (reason := backend.unavailable()) is not None:
        return reason
    if not torch.compiler.is_compiling() and transformed():
        return "inside a torch.func transform or forward-mode differentiation"
    return backend.refuses(tensors)


def transformed() -> bool:
    """Inside a torch.func transform or forward-mode differentiation, where tensors have no memory of their own?"""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0
