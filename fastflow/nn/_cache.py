"""A cache of what is computed from parameters."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from fastflow.ops.snapshot import Snapshot, snapshot, visible

__all__ = ["Cache"]


class Cache:
    """Values by key, each valid as long as the tensors it was made from hold the same bits.

    Values hold no graph. A copied or unpickled cache is empty. Several threads may read: an entry is replaced whole.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[Snapshot, Any]] = {}
        self.builds = 0

    def get(self, key: Hashable, tensors: list[Tensor], build: Callable[[], Any]) -> Any | None:
        """``build()``, kept from an earlier call where it still holds; None where nothing can be kept."""
        if not visible(tensors):
            return None
        entry = self._entries.get(key)
        if entry is not None and entry[0].matches(tensors):
            return entry[1]
        saved = snapshot(tensors)
        # a value made under inference mode could not take part in training later
        with torch.inference_mode(False), torch.no_grad():
            value = build()
        self.builds += 1
        self._entries[key] = (saved, value)
        return value

    def __deepcopy__(self, memo: dict) -> Cache:
        return Cache()

    def __reduce__(self) -> tuple:
        return Cache, ()
