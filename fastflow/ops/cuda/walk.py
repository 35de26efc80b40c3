"""How an elementwise kernel walks over its tensors: the structs of csrc/cuda/walk.cuh, decided by shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastflow.ops._layout import Layout
from fastflow.ops.cuda.plan import NULL, Address, Field, Launch
from fastflow.ops.cuda.source import C_TYPES, Instance

__all__ = ["THREADS", "Operand", "Walk", "sums", "walk", "wide"]

THREADS = 256  # of a block, as in csrc/cuda/launch.cuh
STEPS = 8  # of a thread before a sample is cut in parts
SHARED = THREADS // 32 * 8  # bytes: a double for every warp


class Operand(NamedTuple):
    """An argument with its layout."""

    argument: int
    tensor: Tensor
    layout: Layout
    gathered: bool = False

    @property
    def bytes(self) -> int:
        return self.tensor.element_size()

    def aligned(self, step: int) -> bool:
        """May ``step`` elements from the start of every row on be accessed at once?"""
        size = min(step * self.bytes, 16)
        start = self.tensor.data_ptr() % 16 + self.layout.offset * self.bytes
        return start % size == 0


class Walk(NamedTuple):
    """struct Walk, and the steps of ``step`` elements it takes."""

    samples: int
    outer: int
    inner: int
    parts: int
    share: int
    lanes: int
    channels_inner: bool
    step: int
    general: bool
    index: int | None = None  # the argument that holds the channels of gathered operands
    channels: int = 0  # what such an index must stay below

    @property
    def blocks(self) -> int:
        return -(-self.samples * self.parts // (THREADS // self.lanes))

    @property
    def fields(self) -> list[Field]:
        index = NULL if self.index is None else Address(self.index)
        numbers = (self.samples, self.outer, self.inner, self.parts, self.share, self.lanes, int(self.channels_inner))
        return [*numbers, index, self.channels]

    def operand(self, operand: Operand | None) -> list[Field]:
        """struct Operand"""
        if operand is None:
            return [NULL] * 6
        sample, outer, inner = _turned(operand.layout.strides, self.channels_inner)
        at = Address(operand.argument, operand.layout.offset * operand.bytes)
        return [at, sample, outer, inner, int(self.wide(operand)), int(operand.gathered)]

    def wide(self, operand: Operand) -> bool:
        return wide(operand, self.step, self.channels_inner)


def wide(operand: Operand, step: int, channels_inner: bool) -> bool:
    """Do ``step`` elements along the inner dimension lie side by side, on a boundary of theirs?"""
    if step == 1 or not operand.aligned(step):
        return False
    sizes = _turned(operand.layout.sizes, channels_inner)
    strides = _turned(operand.layout.strides, channels_inner)
    return strides[2] == 1 and all(n == 1 or s % step == 0 for n, s in zip(sizes[:2], strides[:2], strict=True))


def _turned(numbers: tuple[int, int, int], channels_inner: bool) -> tuple[int, int, int]:
    b, c, s = numbers
    return (b, s, c) if channels_inner else (b, c, s)


def walk(leader: Operand, others: Sequence[Operand | None], general: bool = False) -> Walk:
    """A walk in the order in which ``leader`` lies, in steps as wide as the widest type allows.

    ``general`` ones go element by element: with an index, or where elements are treated differently.
    """
    channels_inner = leader.layout.channels_inner
    samples, outer, inner = _turned(leader.layout.sizes, channels_inner)
    step = 16 // max(o.bytes for o in (leader, *others) if o is not None)
    if general or inner % step or not wide(leader, step, channels_inner):
        step = 1
    steps = outer * inner // step
    lanes = min(THREADS, 1 << max(0, math.ceil(steps / 2) - 1).bit_length())
    share = max(1, steps) if lanes < THREADS else max(1, min(steps, STEPS * lanes))
    parts = max(1, -(-steps // share))
    return Walk(samples, outer, inner, parts, share, lanes, channels_inner, step, general)


def sums(
    walk: Walk, out: tuple[int, Tensor], start: tuple[int, Tensor] | None, factor: float, constant: float
) -> tuple[list[Field], list[Launch], list[tuple[int, torch.dtype]]]:
    """struct Sums, the launch that adds up the parts of a sample where it has several, and their scratch."""
    fields: list[Field] = [Address(0, 0, scratch=True) if walk.parts > 1 else NULL]
    fields += [Address(out[0]), NULL if start is None else Address(start[0])]
    fields += [out[1].stride(0), 0 if start is None else start[1].stride(0), float(factor), float(constant)]
    if walk.parts == 1:
        return fields, [], []
    instance = Instance("sums", "finish_sums", "Finish", (C_TYPES[out[1].dtype],))
    blocks = -(-walk.samples // (THREADS // 32))
    finish = Launch(instance, blocks, [*fields, walk.samples, walk.parts])
    return fields, [finish], [(walk.samples * walk.parts, torch.float64)]
