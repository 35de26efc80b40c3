"""ActNorm in Triton: y = (x + b) e^(g a) or x e^(-g a) - b in one pass, one scale and one shift for every channel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastflow.ops._layout import Layout, layout
from fastflow.ops.triton.numeric import exp
from fastflow.ops.triton.rows import WARPS, launch
from fastflow.ops.triton.tiles import PARTIALS, load, size, store, strides, sum_positions, tile

TILE = 2048


@triton.jit
def _per_channel(tensor, step, channel, mask, T: tl.constexpr):
    return tl.load(tensor + channel * step, mask=mask, other=0.0).to(T)


@triton.jit
def _forward(
    x, x_at, log_scale, a_step, bias, b_step, running, r_step, y, y_at, logdet, count, positions, channels,
    GAIN: tl.constexpr, INVERSE: tl.constexpr, P: tl.constexpr, C: tl.constexpr, ALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = logdet.dtype.element_ty
    across = tl.cdiv(channels, C)
    block = tl.program_id(0) % across
    start = tl.program_id(0) // across
    if WIDE:
        start = start.to(tl.int64)
    b, s, c, valid = tile(start * P, count, positions, channels, block * C, P, C, WIDE)
    scale = exp(GAIN * _per_channel(log_scale, a_step, c, c < channels, T))
    shift = _per_channel(bias, b_step, c, c < channels, T)
    value = load(x, x_at, b, s, c, valid, T)
    store(y, y_at, b, s, c, valid, value * scale - shift if INVERSE else (value + shift) * scale)
    if block == 0:  # the program with a sample's first position knows its log-determinant
        every = tl.arange(0, ALL)
        total = tl.sum(GAIN * _per_channel(log_scale, a_step, every, every < channels, tl.float64), axis=0)
        first = (s == 0) & (b * positions < count)
        result = tl.zeros_like(b).to(tl.float64) + total * positions
        if running is not None:
            result += tl.load(running + b.to(tl.int64) * r_step, mask=first, other=0.0).to(tl.float64)
        tl.store(logdet + b, result.to(T), mask=first)


@triton.jit
def _backward(
    x, x_at, log_scale, a_step, bias, b_step, gy, gy_at, gx, gx_at, partials, count, positions, channels, tiles,
    GAIN: tl.constexpr, INVERSE: tl.constexpr, P: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Partial sums [programs, 2, C]: of gy, and of gy (x + b) or gy x."""
    T: tl.constexpr = partials.dtype.element_ty
    across = tl.cdiv(channels, C)
    block = tl.program_id(0) % across
    program = tl.program_id(0) // across
    if WIDE:
        program = program.to(tl.int64)
    c = block * C + tl.arange(0, C)
    scale = exp(GAIN * _per_channel(log_scale, a_step, c, c < channels, T))
    shift = tl.zeros_like(scale) if INVERSE else _per_channel(bias, b_step, c, c < channels, T)
    sums = tl.zeros([C], T)
    products = tl.zeros([C], T)
    for k in range(program * tiles, (program + 1) * tiles):
        b, s, channel, valid = tile(k * P, count, positions, channels, block * C, P, C, WIDE)
        g = load(gy, gy_at, b, s, channel, valid, T)
        value = load(x, x_at, b, s, channel, valid, T) + shift[None, :]
        store(gx, gx_at, b, s, channel, valid, g * scale[None, :])
        sums += sum_positions(g, P, C)
        products += sum_positions(g * value, P, C)
    row = program.to(tl.int64) * 2 * channels
    tl.store(partials + row + c, sums, mask=c < channels)
    tl.store(partials + row + channels + c, products, mask=c < channels)


@triton.jit
def _finish(
    partials, parts, log_scale, a_step, glogdet, g_step, batch, positions, channels, glog_scale, gbias,
    GAIN: tl.constexpr, INVERSE: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The parts of every channel in their order, and all of glogdet."""
    c = tl.program_id(0) * C + tl.arange(0, C)
    sums = tl.zeros([PARTS, C], tl.float64)
    products = tl.zeros([PARTS, C], tl.float64)
    for first in range(0, parts, PARTS):
        k = first + tl.arange(0, PARTS)[:, None]
        mask = (k < parts) & (c < channels)[None, :]
        at = partials + k.to(tl.int64) * 2 * channels + c[None, :]
        sums += tl.load(at, mask=mask, other=0.0).to(tl.float64)
        products += tl.load(at + channels, mask=mask, other=0.0).to(tl.float64)
    total = tl.zeros([B], tl.float64)
    for first in range(0, batch, B):
        b = first + tl.arange(0, B)
        total += tl.load(glogdet + b.to(tl.int64) * g_step, mask=b < batch, other=0.0).to(tl.float64)
    of_logdet = tl.sum(total, axis=0) * positions
    g = tl.sum(sums, axis=0)
    scale = exp(GAIN * _per_channel(log_scale, a_step, c, c < channels, tl.float64))
    g_scale = GAIN * (scale * tl.sum(products, axis=0) + of_logdet)
    T: tl.constexpr = gbias.dtype.element_ty
    tl.store(glog_scale + c, g_scale.to(T), mask=c < channels)
    tl.store(gbias + c, (-g if INVERSE else scale * g).to(T), mask=c < channels)


# --- what the ops call --------------------------------------------------------------------------------


def _tiling(x: Layout) -> tuple[int, int]:
    """(positions, channels) of a tile, its elements neighbours in memory."""
    batch, channels, positions = x.sizes
    if not x.channels_inner:
        p = min(TILE, triton.next_power_of_2(max(batch * positions, 1)))
        return p, 1
    c = min(64, triton.next_power_of_2(max(channels, 1)))
    return min(TILE // c, triton.next_power_of_2(max(batch * positions, 1))), c


def actnorm_fwd(
    x: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    running: Tensor | None,
    y: Tensor,
    logdet: Tensor,
    gain: float,
    inverse: bool,
) -> None:
    of_x = layout(x)
    if x.numel() == 0:
        logdet.zero_() if running is None else logdet.copy_(running)
        return
    (count, positions, channels), large = size(of_x)
    p, c = _tiling(of_x)
    launch(
        _forward, -(-count // p) * -(-channels // c), x,
        x, strides(of_x), log_scale, log_scale.stride(0), bias, bias.stride(0),
        running, 0 if running is None else running.stride(0), y, strides(layout(y)), logdet, count, positions, channels,
        GAIN=-gain if inverse else gain, INVERSE=inverse, P=p, C=c, ALL=triton.next_power_of_2(channels), WIDE=large,
        warps=WARPS,
    )  # fmt: skip


def actnorm_bwd(
    x: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    gy: Tensor,
    glogdet: Tensor,
    gx: Tensor,
    glog_scale: Tensor,
    gbias: Tensor,
    gain: float,
    inverse: bool,
) -> None:
    of_x = layout(x)
    (count, positions, channels), large = size(of_x)
    p, c = _tiling(of_x)
    tiles = -(-count // p)
    each = -(-tiles // PARTIALS) or 1
    parts = -(-tiles // each)
    options = {"GAIN": -gain if inverse else gain, "INVERSE": inverse}
    partials = gbias.new_empty((parts, 2, channels))
    launch(
        _backward, parts * -(-channels // c), x,
        x, strides(of_x), log_scale, log_scale.stride(0), bias, bias.stride(0), gy, strides(layout(gy)),
        gx, strides(layout(gx)), partials, count, positions, channels, each, **options, P=p, C=c, WIDE=large,
    )  # fmt: skip
    launch(
        _finish, -(-channels // 16), x,
        partials, parts, log_scale, log_scale.stride(0), glogdet, glogdet.stride(0), x.shape[0], of_x.sizes[2],
        channels, glog_scale, gbias, **options, C=16, PARTS=64, B=1024,
    )  # fmt: skip
