"""The walk that elementwise kernels share: samples as rows of elements, and sums over the elements of a sample.

A program takes a tile [samples, elements]: whole small samples, or one of the parts of a large one. The elements of a
sample are numbered along whichever of channels and positions lies closer together, so that neighbours are read
together. Everything depends on shapes and strides only, never on the device: results are the same on all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.ops._layout import Layout

TILE = 2048  # elements of a program: eight for each of 256 threads, 16 bytes of a half precision
WARPS = 8

At = tuple[int, int, int, int]  # offset, stride of samples, of the outer and of the inner index


def launch(kernel: Any, programs: int, on: Tensor, *arguments: Any, warps: int = WARPS, **constants: Any) -> None:
    """Runs a kernel on the device of a tensor."""
    if programs == 0:
        return
    if on.is_cuda and on.device.index != torch.cuda.current_device():
        with torch.cuda.device(on.device):
            kernel[(programs,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=True)
    else:
        kernel[(programs,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=True)


def wide(*layouts: Layout | None) -> bool:
    """Are 32 bits too few for an offset within a sample?"""
    return any(
        max(size, 1) * abs(stride) >= 2**31
        for one in layouts
        if one is not None
        for size, stride in zip(one.sizes[1:], one.strides[1:], strict=True)
    )


class Walk:
    """Over the elements of some layouts of one size, the first of which says what is near.

    ``apart``: a kernel wants to know the channel (or position) of an element, so they stay two indices even where all
    elements of a sample lie one after the other.
    """

    def __init__(self, *layouts: Layout | None, apart: bool = False):
        given = [one for one in layouts if one is not None]
        first = given[0]
        batch, channels, positions = first.sizes
        self.channels_inner = first.channels_inner
        self.outer, self.inner = (positions, channels) if self.channels_inner else (channels, positions)
        outer, inner = (2, 1) if self.channels_inner else (1, 2)
        self._axes = outer, inner
        flat = self.outer <= 1 or (
            not apart and all(one.strides[outer] == self.inner * one.strides[inner] for one in given)
        )
        elements = channels * positions
        block = min(TILE, triton.next_power_of_2(max(elements, 1)))
        samples = min(TILE // block, triton.next_power_of_2(max(batch, 1)))
        self.parts = max(1, -(-elements // block))
        self.programs = self.parts * -(-batch // samples)
        self.shape = (batch, elements, max(1, elements if flat else self.inner), self.parts)
        self.constants = {
            "SAMPLES": samples,
            "BLOCK": block,
            "FLAT": flat,
            "WIDE": wide(*given) or elements >= 2**31,
        }

    def at(self, layout: Layout | None) -> At:
        if layout is None:
            return 0, 0, 0, 0
        outer, inner = self._axes
        return layout.offset, layout.strides[0], layout.strides[outer], layout.strides[inner]

    def sums(self, out: Tensor) -> Tensor:
        """Where the parts of samples put their sums: in ``out`` [B] itself where a sample is one part."""
        return out if self.parts == 1 else out.new_empty((self.shape[0], self.parts))

    def finish(self, sums: Tensor, out: Tensor, start: Tensor | None = None, SIGN: int = 1, EACH: float = 0.0) -> None:
        """out = start + SIGN times the sum of a sample + EACH for every element; done already where it is one part."""
        if self.parts > 1:
            step = 0 if start is None else start.stride(0)
            launch(
                _finish, self.shape[0], out, sums, start, step, out, *self.shape[1::2], SIGN=SIGN, EACH=EACH, BLOCK=1024
            )


def run(
    kernel: Any,
    walk: Walk,
    *arguments: Any,
    out: Tensor,
    start: Tensor | None = None,
    SIGN: int = 1,
    EACH: float = 0.0,
    **constants: Any,
) -> None:
    """A kernel that sums to ``out`` [B], and the sum of its parts."""
    sums = walk.sums(out)
    step = 0 if start is None else start.stride(0)
    launch(
        kernel, walk.programs, out, *arguments, sums, start, step, walk.shape,
        **walk.constants, **constants, SIGN=SIGN, EACH=EACH, SINGLE=walk.parts == 1,
    )  # fmt: skip
    walk.finish(sums, out, start, SIGN, EACH)


# --- in a kernel --------------------------------------------------------------------------------------


@triton.jit
def place(shape, SAMPLES: tl.constexpr, BLOCK: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr):
    """(sample [SAMPLES, 1], element k, outer index, inner index [1, BLOCK], which of them exist)"""
    batch, elements, inner, parts = shape
    program = tl.program_id(0)
    sample = (program // parts).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)[:, None]
    part = program % parts
    if WIDE:
        part = part.to(tl.int64)
    k = part * BLOCK + tl.arange(0, BLOCK)[None, :]
    if FLAT:
        o, i = tl.zeros_like(k), k
    else:
        o, i = k // inner, k % inner
    return sample, k, o, i, (sample < batch) & (k < elements)


@triton.jit
def pointers(tensor, at, sample, o, i):
    offset, of_sample, of_outer, of_inner = at
    return (tensor + (offset + sample * of_sample)) + (o * of_outer + i * of_inner)


@triton.jit
def load(tensor, at, sample, o, i, mask, T: tl.constexpr):
    """The elements in the dtype they are computed in, 0 outside of the mask."""
    return tl.load(pointers(tensor, at, sample, o, i), mask=mask, other=0.0).to(T)


@triton.jit
def store(tensor, at, sample, o, i, mask, value):
    tl.store(pointers(tensor, at, sample, o, i), value.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def add_up(
    value, mask, sums, start, step, shape,
    SAMPLES: tl.constexpr, SIGN: tl.constexpr, EACH: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Sums a tile to its samples: to what is asked for, or to a part's sum where there are several."""
    batch, elements, inner, parts = shape
    # in float64: kernels that wait for memory have the time, and no order of summation is then better than another
    total = tl.sum(tl.where(mask, value, 0.0).to(tl.float64), axis=1)
    program = tl.program_id(0)
    sample = (program // parts).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    exists = sample < batch
    if SINGLE:
        total = SIGN * total + EACH * (tl.zeros_like(total) + elements)
        if start is not None:
            total += tl.load(start + sample * step, mask=exists, other=0.0).to(tl.float64)
    tl.store(sums + sample * parts + program % parts, total.to(sums.dtype.element_ty), mask=exists)


@triton.jit
def _finish(
    sums, start, step, out, elements, parts, SIGN: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program for every sample: its parts in their order."""
    sample = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    lanes = tl.zeros([BLOCK], tl.float64)
    for first in range(0, parts, BLOCK):
        lanes += tl.load(sums + sample * parts + first + k, mask=first + k < parts, other=0.0).to(tl.float64)
    total = tl.sum(lanes, axis=0)
    full = SIGN * total + EACH * (tl.zeros_like(total) + elements)
    if start is not None:
        full += tl.load(start + sample * step).to(tl.float64)
    tl.store(out + sample, full.to(out.dtype.element_ty))
