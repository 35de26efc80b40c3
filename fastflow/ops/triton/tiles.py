"""Tiles [positions, channels]: what kernels share that know one number (or one matrix) for the channels.

The positions of all samples are one dimension, p = b S + s. Sums over positions are taken tile by tile, then over the
tiles of a program, and at last over the programs, always in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastflow.ops._layout import Layout
from fastflow.ops.triton.rows import launch, wide

PARTIALS = 512  # partial sums, at most
MOST = 4096  # positions of a tile, at most: the last program counts so many tiles beyond the end


def size(one: Layout) -> tuple[tuple[int, int, int], bool]:
    """((positions of all samples, positions of one, channels), are 32 bits too few for them?)"""
    batch, channels, positions = one.sizes
    return (batch * positions, max(positions, 1), channels), wide(one) or batch * positions >= 2**31 - PARTIALS * MOST


def strides(one: Layout) -> tuple[int, int, int, int]:
    """Offset, stride of samples, channels and positions."""
    return one.offset, *one.strides


@triton.jit
def tile(start, count, positions, channels, first, P: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr):
    """(sample, position [P, 1], channel [1, C], which of them exist) of the tile from (start, first) on"""
    p = start + tl.arange(0, P)[:, None]
    c = first + tl.arange(0, C)[None, :]
    if WIDE:
        p = p.to(tl.int64)
    sample = p // positions
    return sample, p - sample * positions, c, (p < count) & (c < channels)


@triton.jit
def pointers(tensor, at, sample, position, channel):
    offset, of_sample, of_channel, of_position = at
    return (
        tensor
        + (offset + sample.to(tl.int64) * of_sample + position.to(tl.int64) * of_position)
        + (channel.to(tl.int64) * of_channel)
    )


@triton.jit
def load(tensor, at, sample, position, channel, mask, T: tl.constexpr):
    return tl.load(pointers(tensor, at, sample, position, channel), mask=mask, other=0.0).to(T)


@triton.jit
def store(tensor, at, sample, position, channel, mask, value):
    tl.store(pointers(tensor, at, sample, position, channel), value.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def sum_positions(value, P: tl.constexpr, C: tl.constexpr):
    """[P, C] to [C]: a sum of groups rounds less than one long sum."""
    group: tl.constexpr = 16 if P > 16 else P
    return tl.sum(tl.sum(tl.reshape(value, (P // group, group, C)), axis=1), axis=0)


def sum_partials(partials: Tensor, out: Tensor) -> None:
    """[parts, n] summed to out [n]."""
    n = out.numel()
    launch(_sum_partials, -(-n // 64), out, partials, out, partials.shape[0], n, N=64, PARTS=32, warps=4)


@triton.jit
def _sum_partials(partials, out, parts, n, N: tl.constexpr, PARTS: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)[None, :]
    total = tl.zeros([PARTS, N], tl.float64)
    for first in range(0, parts, PARTS):
        k = first + tl.arange(0, PARTS)[:, None]
        total += tl.load(partials + k * n + i, mask=(k < parts) & (i < n), other=0.0).to(tl.float64)
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + i, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=i < n)
