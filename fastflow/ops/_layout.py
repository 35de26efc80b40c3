"""Where the elements of a tensor lie, as kernels see it: [B, C, S], all positions of a channel as one dimension.

What the GPU backends know of a tensor beside its memory. Offsets and strides are in elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastflow.ops.packing import PACKINGS

__all__ = ["Layout", "layout", "unpack"]


class Layout(NamedTuple):
    """Element [b, c, s] lies at ``offset + b * strides[0] + c * strides[1] + s * strides[2]``."""

    sizes: tuple[int, int, int]
    strides: tuple[int, int, int]
    offset: int = 0

    def channels(self, start: int, count: int, step: int = 1) -> Layout:
        """The channels start, start + step, ...: ``count`` of them."""
        (b, _, s), (bb, cc, ss) = self.sizes, self.strides
        return Layout((b, count, s), (bb, cc * step, ss), self.offset + start * cc)

    def expand(self, sizes: Sequence[int]) -> Layout:
        """The same value all along a dimension of size 1."""
        strides = (
            0 if have == 1 and want != 1 else stride
            for have, want, stride in zip(self.sizes, sizes, self.strides, strict=True)
        )
        return Layout(tuple(sizes), tuple(strides), self.offset)

    @property
    def channels_inner(self) -> bool:
        """Is it nearer to the next channel than to the next position?"""
        return self.sizes[2] == 1 or (self.strides[1] < self.strides[2] and self.sizes[1] > 1)


def layout(tensor: Tensor) -> Layout:
    """The layout of a tensor whose positions are one strided dimension (:func:`fastflow.ops._check.strided`)."""
    shape, stride = tensor.shape, tensor.stride()
    if tensor.dim() == 4 and shape[3] != 1 and shape[2] != 1:  # the usual image first: this is on the way of every call
        return Layout((shape[0], shape[1], shape[2] * shape[3]), (stride[0], stride[1], stride[3]))
    sizes, strides = [*shape[:2], 1, 1][:2], [*stride[:2], 0, 0][:2]
    positions, step = 1, 0
    for n, inner in zip(reversed(shape[2:]), reversed(stride[2:]), strict=True):
        if n != 1 and positions == 1:
            step = inner
        positions *= n
    return Layout((*sizes, positions), (*strides, step))


def unpack(params: Layout, raw: Layout | None, packing: int) -> tuple[Layout, Layout | None]:
    """(shift or mean, raw scale), as :func:`fastflow.ops.packing.unpack`."""
    name = PACKINGS[packing]
    if name == "separate":
        return params, raw
    n = params.sizes[1] // 2
    if name.startswith("interleaved"):
        first, second = params.channels(0, n, 2), params.channels(1, n, 2)
    else:
        first, second = params.channels(0, n), params.channels(n, n)
    return (second, first) if name.endswith("_st") else (first, second)
