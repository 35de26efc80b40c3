"""Invertible 1x1 convolution in Triton: y[b, :, s] = M x[b, :, s] + c for every position, up to 64 channels.

A program multiplies tiles [positions, channels] by the transpose of M, which stays in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastflow.ops._layout import layout
from fastflow.ops.triton.rows import launch
from fastflow.ops.triton.tiles import PARTIALS, load, size, store, strides, sum_partials, sum_positions, tile


@triton.jit
def _matrix(weight, w_at, channels, C: tl.constexpr, T: tl.constexpr):
    """[C, C], rows and columns beyond the channels 0"""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return tl.load(weight + i * w_at[0] + j * w_at[1], mask=(i < channels) & (j < channels), other=0.0).to(T)


@triton.jit
def _forward(
    x, x_at, weight, w_at, bias, b_step, weight_logdet, running, r_step, y, y_at, logdet, count, positions, channels,
    P: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = logdet.dtype.element_ty
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    b, s, c, valid = tile(program * P, count, positions, channels, 0, P, C, WIDE)
    transposed = _matrix(weight, (w_at[1], w_at[0]), channels, C, T)
    out = tl.dot(load(x, x_at, b, s, c, valid, T), transposed, input_precision="ieee", out_dtype=T)
    if bias is not None:
        out += tl.load(bias + c * b_step, mask=c < channels, other=0.0).to(T)
    store(y, y_at, b, s, c, valid, out)
    # the program with a sample's first position knows its log-determinant
    first = (s == 0) & (b * positions < count)
    result = tl.zeros_like(b).to(T) + tl.load(weight_logdet).to(T) * positions
    if running is not None:
        result += tl.load(running + b.to(tl.int64) * r_step, mask=first, other=0.0)
    tl.store(logdet + b, result, mask=first)


@triton.jit
def _backward(
    x, x_at, weight, w_at, gy, gy_at, gx, gx_at, gweights, gbiases, count, positions, channels, tiles,
    P: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """gx = gy M, and the sums over a program's positions: gM = gy^T x, gc."""
    T: tl.constexpr = gbiases.dtype.element_ty
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    matrix = _matrix(weight, w_at, channels, C, T)
    gweight = tl.zeros([C, C], T)
    gbias = tl.zeros([C], T)
    for k in range(program * tiles, (program + 1) * tiles):
        b, s, c, valid = tile(k * P, count, positions, channels, 0, P, C, WIDE)
        g = load(gy, gy_at, b, s, c, valid, T)
        value = load(x, x_at, b, s, c, valid, T)
        store(gx, gx_at, b, s, c, valid, tl.dot(g, matrix, input_precision="ieee", out_dtype=T))
        gweight += tl.dot(tl.trans(g), value, input_precision="ieee", out_dtype=T)
        gbias += sum_positions(g, P, C)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    at = gweights + program.to(tl.int64) * channels * channels + i * channels + j
    tl.store(at, gweight, mask=(i < channels) & (j < channels))
    c = tl.arange(0, C)
    tl.store(gbiases + program.to(tl.int64) * channels + c, gbias, mask=c < channels)


@triton.jit
def _sum_logdet(glogdet, step, batch, positions, out, B: tl.constexpr):
    total = tl.zeros([B], tl.float64)
    for first in range(0, batch, B):
        b = first + tl.arange(0, B)
        total += tl.load(glogdet + b.to(tl.int64) * step, mask=b < batch, other=0.0).to(tl.float64)
    tl.store(out, (tl.sum(total, axis=0) * positions).to(out.dtype.element_ty))


# --- what the ops call --------------------------------------------------------------------------------


def _tiling(count: int, channels: int) -> tuple[int, int]:
    """(positions, channels) of a tile; a product takes at least 16 of either"""
    c = max(16, triton.next_power_of_2(channels))
    return min(2048 // c, max(16, triton.next_power_of_2(max(count, 1)))), c


def conv1x1_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_logdet: Tensor,
    running: Tensor | None,
    y: Tensor,
    logdet: Tensor,
) -> None:
    of_x = layout(x)
    if x.numel() == 0:
        logdet.zero_() if running is None else logdet.copy_(running)
        return
    (count, positions, channels), large = size(of_x)
    p, c = _tiling(count, channels)
    launch(
        _forward, -(-count // p), x,
        x, strides(of_x), weight, weight.stride(), bias, 0 if bias is None else bias.stride(0), weight_logdet,
        running, 0 if running is None else running.stride(0), y, strides(layout(y)), logdet, count, positions, channels,
        P=p, C=c, WIDE=large, warps=4,
    )  # fmt: skip


def conv1x1_bwd(
    x: Tensor,
    weight: Tensor,
    gy: Tensor,
    glogdet: Tensor,
    gx: Tensor,
    gweight: Tensor,
    gbias: Tensor,
    gweight_logdet: Tensor,
) -> None:
    of_x = layout(x)
    (count, positions, channels), large = size(of_x)
    p, c = _tiling(count, channels)
    p = min(p, 64)  # longer sums gy^T x do not fit into registers
    tiles = -(-count // p)
    each = -(-tiles // PARTIALS) or 1
    parts = -(-tiles // each)
    gweights = gweight.new_empty((parts, channels, channels))
    gbiases = gbias.new_empty((parts, channels))
    launch(
        _backward, parts, x,
        x, strides(of_x), weight, weight.stride(), gy, strides(layout(gy)), gx, strides(layout(gx)), gweights, gbiases,
        count, positions, channels, each, P=p, C=c, WIDE=large, warps=p * c // 256 or 1,
    )  # fmt: skip
    sum_partials(gweights, gweight)
    sum_partials(gbiases, gbias)
    launch(
        _sum_logdet, 1, x, glogdet, glogdet.stride(0), x.shape[0], of_x.sizes[2], gweight_logdet, B=1024, warps=4
    )  # fmt: skip
