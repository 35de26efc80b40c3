"""Which backend serves a call, and why the others do not: the only place that decides.

``reference`` is plain PyTorch and serves everything; a native backend is a module of this folder with
``unavailable()``, ``refuses(tensors)`` and ``kernel(name)``. One that is built on the user's machine (``TESTED``) must
first pass the self-test of a family on the device and in the dtype at hand.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflow.ops import cpu, cuda, triton

__all__ = ["NATIVE", "BACKENDS", "BackendError", "Family", "use_backend", "choose", "reasons", "serves", "transformed"]

NATIVE: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "triton": triton}
TESTED = ("cuda", "triton")
BACKENDS = (*NATIVE, "reference")


class Family(NamedTuple):
    """A family of ops to choose for."""

    name: str
    gpu: tuple[str, ...] = ("cuda", "triton")
    """The backends for a GPU that have kernels, the fastest first. That CUDA C++ is the faster is a guess until a GPU
    was at hand."""


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


def choose(
    family: Family,
    tensors: tuple[Tensor | None, ...],
    backend: str | None = None,
    limit: Callable[[str], str | None] | None = None,
) -> str:
    """The backend that serves a call on these tensors, the first of which is not None: the one asked for, or the
    fastest that can. ``limit(name)`` is what else a backend cannot do, None if nothing."""
    forced = _checked(backend) or _forced.name
    if forced == "reference":
        return forced
    first = tensors[0]
    for name in (forced,) if forced is not None else ("cpu",) if first.device.type == "cpu" else family.gpu:
        if _refusal(name, tensors, family, limit) is None:
            return name
    if forced is None:
        return "reference"
    raise BackendError(
        f"backend {forced!r} cannot serve this call. "
        + "; ".join(f"{name}: {reason or 'can serve it'}" for name, reason in reasons(tensors, family, limit).items())
    )


def reasons(
    tensors: tuple[Tensor | None, ...] = (),
    family: Family | None = None,
    limit: Callable[[str], str | None] | None = None,
) -> dict[str, str | None]:
    """For every backend why it cannot serve these tensors, None where it can."""
    return {name: _refusal(name, tensors, family, limit) for name in NATIVE} | {"reference": None}


def serves(name: str, tensors: tuple[Tensor | None, ...]) -> bool:
    """Can this backend serve a call on these tensors, and was no other asked for?"""
    return _forced.name in (None, name) and _refusal(name, tensors, None) is None


def _refusal(
    name: str,
    tensors: tuple[Tensor | None, ...],
    family: Family | None,
    limit: Callable[[str], str | None] | None = None,
) -> str | None:
    backend = NATIVE[name]
    if family is not None and name in TESTED and name not in family.gpu:
        return f"has no kernels for {family.name}"
    if (reason := backend.unavailable()) is not None:
        return reason
    if not torch.compiler.is_compiling() and transformed():
        return "inside a torch.func transform or forward-mode differentiation"
    if (reason := backend.refuses(tensors) or (limit and limit(name))) is not None:
        return reason
    if family is None or torch.compiler.is_compiling():
        return None
    return doubt(name, family, tensors[0])


class _Testing(threading.local):
    """Does this thread run a self-test? Its own calls are not doubted."""

    active = False


_testing = _Testing()
_one_test = threading.Lock()
_verdicts: dict[tuple[str, str, torch.device, torch.dtype], str | None] = {}


def doubt(name: str, family: Family, tensor: Tensor) -> str | None:
    """What is wrong with the kernels of a family, found out once for every device and dtype."""
    if name not in TESTED or _testing.active:
        return None
    key = name, family.name, tensor.device, tensor.dtype
    if key in _verdicts:
        return _verdicts[key]
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return f"its self-test ({family.name}, {tensor.dtype}) cannot run in a CUDA graph: make the call once before"
    with _one_test:
        if key in _verdicts:  # found out by another thread meanwhile
            return _verdicts[key]
        try:
            verdict = _verdicts[key] = _selftest(*key)
        except torch.OutOfMemoryError:
            return f"its self-test ({family.name}, {tensor.dtype}) ran out of memory"
    if verdict is not None:
        words = f"fastflow does not use its backend {name} for {family.name} in {tensor.dtype}: {verdict}"
        warnings.warn(words, stacklevel=2)
    return verdict


def _selftest(*key: Any) -> str | None:
    """In a thread of its own, where the caller's modes, hooks and default device are not."""
    # the table of cases is above the ops; nothing else of it is known here
    from fastflow.testing.selftest import selftest

    found: list[str | None | BaseException] = []

    def run() -> None:
        _testing.active = True
        try:
            found.append(selftest(*key, NATIVE[key[0]].fingerprint()))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def transformed() -> bool:
    """Inside a torch.func transform or forward-mode differentiation, where tensors have no memory of their own?"""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0
