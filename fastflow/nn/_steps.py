"""Parameters of K small steps that come with every sample, as its context."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

__all__ = ["positive", "split_context"]


def positive(**sizes: int) -> None:
    """Raises unless all are whole numbers of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {size!r}")


def split_context(context: Tensor | None, x: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Tensors [B, *shape], one after the other in a context [B, P]: views of it."""
    sizes = [math.prod(shape) for shape in shapes]
    if context is None or context.shape != (x.shape[0], sum(sizes)):
        got = "none" if context is None else list(context.shape)
        raise ValueError(f"context: expected the parameters of every sample [{x.shape[0]}, {sum(sizes)}], got {got}")
    return [part.unflatten(1, shape) for part, shape in zip(context.split(sizes, 1), shapes, strict=True)]
