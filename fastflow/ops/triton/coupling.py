"""Affine coupling in Triton: value and per-sample log-determinant in one pass. As csrc/coupling.h.

The walk goes over all channels of a sample, and those that are not changed are copied on the way; in place, or where an
index says which are changed, it goes over the changed ones only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastflow.ops._layout import Layout, layout, unpack
from fastflow.ops.coupling import Options
from fastflow.ops.scale_map import kernel_map
from fastflow.ops.triton.rows import Walk, add_up, launch, load, place, run, store
from fastflow.ops.triton.scale_map import NONE, multiplier, scale_slope


@triton.jit
def _changed(
    sample, k, o, i, valid, index, where,
    CHANNELS_INNER: tl.constexpr, PART: tl.constexpr, PARITY: tl.constexpr,
):  # fmt: skip
    """(outer and inner index in tensors of all channels, which elements are changed, whose channel exists)"""
    first, last, width, channels = where
    exists = valid
    active = valid
    if index is not None:  # 0 * sample: Triton 3.4 does not widen a pointer to its mask
        if CHANNELS_INNER:
            i = tl.load(index + i + 0 * sample, mask=valid, other=0)
            exists = valid & (i >= 0) & (i < channels)
        else:
            o = tl.load(index + o + 0 * sample, mask=valid, other=0)
            exists = valid & (o >= 0) & (o < channels)
        active = exists
    elif PART:
        if CHANNELS_INNER:
            active = valid & (i >= first) & (i < last)
        else:
            active = valid & (k >= first) & (k < last)
    elif PARITY >= 0:
        if CHANNELS_INNER:
            s = o
        else:
            s = i
        active = valid & ((s // width + s % width) % 2 == PARITY)
    return o, i, active, exists


@triton.jit
def _forward(
    x, x_at, t, t_at, h, h_at, amplitude, amplitude_at, index, y, y_at, where, sums, running, step, shape,
    KIND: tl.constexpr, CONSTANTS: tl.constexpr, GAIN: tl.constexpr, DIVIDE: tl.constexpr, ADD_FIRST: tl.constexpr,
    CHANNELS_INNER: tl.constexpr, PART: tl.constexpr, PARITY: tl.constexpr, FULL: tl.constexpr,
    FULL_AMPLITUDE: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    SIGN: tl.constexpr, EACH: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = sums.dtype.element_ty
    b, k, o, i, valid = place(shape, SAMPLES, BLOCK, FLAT, WIDE)
    co, ci, active, exists = _changed(b, k, o, i, valid, index, where, CHANNELS_INNER, PART, PARITY)
    po, pi = (co, ci) if FULL else (o, i)
    ao, ai = (co, ci) if FULL_AMPLITUDE else (o, i)
    value = load(x, x_at, b, co, ci, exists, T)
    shift = GAIN * load(t, t_at, b, po, pi, active, T)
    raw = shift if h is None else load(h, h_at, b, po, pi, active, T)
    learned = None if amplitude is None else load(amplitude, amplitude_at, b, ao, ai, active, T)
    log_s, s, slope, damplitude = scale_slope(raw, learned, KIND, CONSTANTS)
    m = multiplier(log_s, s, DIVIDE, KIND)
    changed = (value + shift) * m if ADD_FIRST else value * m + shift
    store(y, y_at, b, co, ci, exists, tl.where(active, changed, value))
    log_m = tl.where(active, -log_s if DIVIDE else log_s, 0.0)
    if index is not None:  # a channel that is not there is neither read nor written, but it shows
        log_m = tl.where(exists, log_m, float("nan"))
    add_up(log_m, valid, sums, running, step, shape, SAMPLES, SIGN, EACH, SINGLE)


@triton.jit
def _backward(
    x, x_at, t, t_at, h, h_at, amplitude, amplitude_at, index, gy, gy_at, glogdet, step, gx, gx_at, gt, gt_at, gh,
    gh_at, gamplitude, gamplitude_at, where, shape,
    KIND: tl.constexpr, CONSTANTS: tl.constexpr, GAIN: tl.constexpr, DIVIDE: tl.constexpr, ADD_FIRST: tl.constexpr,
    FROM_OUTPUT: tl.constexpr, CHANNELS_INNER: tl.constexpr, PART: tl.constexpr, PARITY: tl.constexpr,
    FULL: tl.constexpr, FULL_AMPLITUDE: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr, FLAT: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = glogdet.dtype.element_ty
    b, k, o, i, valid = place(shape, SAMPLES, BLOCK, FLAT, WIDE)
    co, ci, active, exists = _changed(b, k, o, i, valid, index, where, CHANNELS_INNER, PART, PARITY)
    po, pi = (co, ci) if FULL else (o, i)
    ao, ai = (co, ci) if FULL_AMPLITUDE else (o, i)
    value = load(x, x_at, b, co, ci, active, T)
    shift = GAIN * load(t, t_at, b, po, pi, active, T)
    raw = shift if h is None else load(h, h_at, b, po, pi, active, T)
    learned = None if amplitude is None else load(amplitude, amplitude_at, b, ao, ai, active, T)
    g = load(gy, gy_at, b, co, ci, exists, T)
    g_logdet = tl.load(glogdet + b * step, mask=b < shape[0], other=0.0)
    log_s, s, slope, damplitude = scale_slope(raw, learned, KIND, CONSTANTS)
    m = multiplier(log_s, s, DIVIDE, KIND)
    g_x = g * m
    # the term of y that m multiplies, times m: nothing is ever divided
    if ADD_FIRST:
        scaled = value if FROM_OUTPUT else (value + shift) * m
    else:
        scaled = value - shift if FROM_OUTPUT else value * m
    g_log_s = g * scaled + g_logdet
    if DIVIDE:
        g_log_s = -g_log_s
    # parameters have a gradient at every changed channel, 0 at the positions a checkerboard leaves alone
    owned = valid & (active | (PARITY >= 0))
    if FULL:
        owned = owned & exists
    store(gx, gx_at, b, co, ci, exists, tl.where(active, g_x, g))
    store(gt, gt_at, b, po, pi, owned, tl.where(active, GAIN * (g_x if ADD_FIRST else g), 0.0))
    if gh is not None:
        store(gh, gh_at, b, po, pi, owned, tl.where(active, g_log_s * slope, 0.0))
    if gamplitude is not None:
        own = valid & (active | (PARITY >= 0))
        store(gamplitude, gamplitude_at, b, o, i, own, tl.where(active, g_log_s * damplitude, 0.0))


# --- what the ops call --------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """Which channels are walked, and where a tensor's elements lie from the first of them on."""

    options: Options
    channels: int
    changed: int
    all: bool  # every channel is walked, those that only pass through too
    indexed: bool

    def values(self, tensor: Tensor) -> Layout:
        """x, y and their gradients: all channels; where an index is looked up in the kernel, as many as it has."""
        one = layout(tensor)
        if self.all:
            return one
        if self.indexed:
            return one._replace(sizes=(one.sizes[0], self.changed, one.sizes[2]))
        return one.channels(self.options.where[0], self.changed)

    def parameters(self, one: Layout | None, like: Layout) -> Layout | None:
        """[B, changed or all channels, S], or a size 1 for what is the same all along a dimension."""
        if one is None:
            return None
        batch, _, positions = like.sizes
        count = one.sizes[1] if one.sizes[1] != 1 else self.changed
        one = one.expand((batch, count, positions))
        start = self.options.where[0]
        if not self.indexed and self.all and count == self.changed:  # counted from the first changed channel
            one = one._replace(offset=one.offset - start * one.strides[1])
        elif not self.indexed and not self.all and count == self.channels:
            one = one._replace(offset=one.offset + start * one.strides[1])
        return one._replace(sizes=like.sizes)


def _plan(x: Tensor, index: Tensor | None, in_place: bool, o: Options) -> _Plan:
    start, stop = o.where[:2]
    changed = stop - start if index is None else index.shape[0]
    return _Plan(o, x.shape[1], changed, index is None and not in_place, index is not None)


def _constants(plan: _Plan, walk: Walk, t: Layout, amplitude: Tensor | None) -> tuple[tuple[int, ...], dict[str, Any]]:
    """(where, the constants of both kernels)"""
    o = plan.options
    kind, constants = kernel_map(o.kind, o.constants)
    start, stop, parity, width = o.where
    part = plan.all and (start, stop) != (0, plan.channels)
    each = 1 if walk.channels_inner else walk.inner  # channels are counted along the inner index, or all elements
    where = (start * each, stop * each, width, plan.channels)
    return where, {
        "KIND": kind,
        "CONSTANTS": constants,
        "GAIN": o.shift_gain,
        "DIVIDE": o.divide,
        "ADD_FIRST": o.add_first,
        "CHANNELS_INNER": walk.channels_inner,
        "PART": part,
        "PARITY": parity,
        "FULL": plan.indexed and t.sizes[1] == plan.channels,
        "FULL_AMPLITUDE": plan.indexed and amplitude is not None and amplitude.shape[1] == plan.channels,
    }


def _walk(plan: _Plan, x: Layout, *others: Layout | None) -> Walk:
    start, stop, parity, _ = plan.options.where
    part = plan.all and (start, stop) != (0, plan.channels)
    return Walk(x, *others, apart=plan.indexed or parity >= 0 or (part and x.channels_inner))


def coupling_fwd(
    x: Tensor,
    params: Tensor,
    raw: Tensor | None,
    amplitude: Tensor | None,
    index: Tensor | None,
    running: Tensor | None,
    y: Tensor,
    logdet: Tensor,
    options: tuple[Any, ...],
) -> None:
    o = Options(*options)
    plan = _plan(x, index, y is x, o)
    if index is not None and y is not x:
        y.copy_(x)
    t, h = unpack(layout(params), None if raw is None else layout(raw), o.packing)
    of_x, of_y = plan.values(x), plan.values(y)
    of_t, of_h = plan.parameters(t, of_x), plan.parameters(h, of_x)
    of_a = None if amplitude is None else plan.parameters(layout(amplitude), of_x)
    walk = _walk(plan, of_x, of_y, of_t, of_h, of_a)
    where, constants = _constants(plan, walk, t, amplitude)
    second = _second(params, raw, o.kind == NONE.value)
    run(
        _forward, walk, x, walk.at(of_x), params, walk.at(of_t), second, walk.at(of_h), amplitude, walk.at(of_a), index,
        y, walk.at(of_y), where, out=logdet, start=running, **constants,
    )  # fmt: skip


def coupling_bwd(
    value: Tensor,
    params: Tensor,
    raw: Tensor | None,
    amplitude: Tensor | None,
    index: Tensor | None,
    gy: Tensor,
    glogdet: Tensor,
    gx: Tensor,
    gparams: Tensor,
    graw: Tensor | None,
    gamplitude: Tensor | None,
    from_output: bool,
    options: tuple[Any, ...],
) -> None:
    o = Options(*options)
    plan = _plan(value, index, False, o)
    if index is not None:
        gx.copy_(gy)
    t, h = unpack(layout(params), None if raw is None else layout(raw), o.packing)
    gt, gh = unpack(layout(gparams), None if graw is None else layout(graw), o.packing)
    of_x, of_gy, of_gx = plan.values(value), plan.values(gy), plan.values(gx)
    of_t, of_h, of_gt, of_gh = (plan.parameters(one, of_x) for one in (t, h, gt, gh))
    of_a = None if amplitude is None else plan.parameters(layout(amplitude), of_x)
    of_ga = None if gamplitude is None else plan.parameters(layout(gamplitude), of_x)
    walk = _walk(plan, of_x, of_gy, of_gx, of_t, of_h, of_gt, of_gh, of_a, of_ga)
    where, constants = _constants(plan, walk, t, amplitude)
    additive = o.kind == NONE.value
    launch(
        _backward, walk.programs, value,
        value, walk.at(of_x), params, walk.at(of_t), _second(params, raw, additive), walk.at(of_h),
        amplitude, walk.at(of_a), index, gy, walk.at(of_gy), glogdet, glogdet.stride(0), gx, walk.at(of_gx),
        gparams, walk.at(of_gt), _second(gparams, graw, additive), walk.at(of_gh), gamplitude, walk.at(of_ga),
        where, walk.shape, FROM_OUTPUT=from_output, **constants, **walk.constants,
    )  # fmt: skip


def _second(first: Tensor, second: Tensor | None, additive: bool) -> Tensor | None:
    """Where the raw scale is: a tensor of its own, beside the shift, or nowhere."""
    return second if second is not None else None if additive else first
