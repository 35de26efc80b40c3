"""Snapshots of tensors: do they still hold the same bits? The key of a cache that cannot be stale.

A version counter does not see a write through ``.data``, and an address does not see any; the content does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastflow.ops import _backend

__all__ = ["Snapshot", "snapshot", "visible"]


class Snapshot(Protocol):
    def matches(self, tensors: list[Tensor]) -> bool:
        """Do these tensors have the types, the sizes and, bit for bit, the values of those saved?"""


class _Copies:
    """The reference: without the compiled library."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._copies = [t.detach().clone() for t in tensors]

    def matches(self, tensors: list[Tensor]) -> bool:
        return len(tensors) == len(self._copies) and all(
            a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
            for a, b in zip(tensors, self._copies, strict=True)
        )


def visible(tensors: Sequence[Tensor]) -> bool:
    """May the host look at the values? Not on another device, and not inside a trace or a transform."""
    if torch.compiler.is_compiling() or _backend.transformed():
        return False
    return all(t.device.type == "cpu" and type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def snapshot(tensors: Sequence[Tensor]) -> Snapshot:
    """A snapshot of :func:`visible` tensors.

    >>> x = torch.zeros(3)
    >>> saved = snapshot([x])
    >>> x.data[1] = 1.0
    >>> saved.matches([x])
    False
    """
    library = _backend.NATIVE["cpu"]
    if library.unavailable() is None and all(t.dim() <= 3 for t in tensors):
        return library.kernel("Snapshot")(list(tensors))
    return _Copies(tensors)
