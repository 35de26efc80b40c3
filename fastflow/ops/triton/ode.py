"""Continuous flows in Triton: what surrounds the products of a solve that goes by stages, fastflow/ops/ode_stages.py.

The control of steps is that of csrc/cuda/ode_control.cuh in float64, by one program; the flat state is x [B, D], then
traces [S, B], then energies [2, B].
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.ops import ode_stages, ode_stages_backward
from fastflow.ops.ode_stages import BLOCK, Kernels, State
from fastflow.ops.triton import ode_control as control
from fastflow.ops.triton import trace
from fastflow.ops.triton.ode_control import DONE, GUESS, SLOPE, STEP, double, larger, number
from fastflow.ops.triton.rows import launch

__all__ = ["mlp_ode_bwd", "mlp_ode_fwd"]

ELEMENTS = 256  # of a program


@triton.jit
def _combine(base, slopes, weights, out, out_at, total, width, count, stride, BLOCK: tl.constexpr):
    """out[b, d] = base[b, d] + sum_j weights[j] slopes[j, b, d]"""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = i < total
    b, d = i // width, i % width
    start = tl.load(base + i, mask=valid, other=0.0)
    slope = tl.zeros_like(start)
    at = i
    for j in range(count):
        w = tl.load(weights + j)
        slope += tl.where(w != 0.0, w * tl.load(slopes + at, mask=valid, other=0.0), 0.0)
        at += stride
    tl.store(out + b * out_at[0] + d * out_at[1], start + slope, mask=valid)


# --- what decides -----------------------------------------------------------------------------------------


@triton.jit
def _quantities(
    y, ends, slopes, weights, method, size, at, mask, phase, h, ADAPTIVE: tl.constexpr, STAGES: tl.constexpr
):
    """(what the norm is of, the first slope, the state before and after a step, which is written) in float64"""
    start = tl.load(y + at, mask=mask, other=0.0)
    first = tl.load(slopes + at, mask=mask & (phase != STEP), other=0.0)
    end = start
    error = start.to(tl.float64)
    if phase == STEP:
        error = tl.zeros_like(error)
        change = tl.zeros_like(start)
        at_slope = at
        for j in range(STAGES):
            k = tl.load(slopes + at_slope, mask=mask, other=0.0)
            w = tl.load(weights + STAGES * STAGES + j)
            change += tl.where(w != 0.0, w * k, 0.0)
            if ADAPTIVE:  # these nearly cancel
                e = tl.load(method + (4 + STAGES * (STAGES + 2)) + j)
                error += tl.where(e != 0.0, h * e * k.to(tl.float64), 0.0)
            at_slope += size
        end = start + change
        tl.store(ends + at, end, mask=mask)
        error += (end - end).to(tl.float64)  # 0, or not a number
    if phase == GUESS:
        error = (tl.load(slopes + at + size, mask=mask, other=0.0) - first).to(tl.float64)
    slope = tl.where(phase == SLOPE, first, 0.0).to(tl.float64)
    return error, slope, start.to(tl.float64), end.to(tl.float64)


@triton.jit
def _square(error, before, after, tolerances):
    """Of the error over its tolerance; 0 / 0 is 0."""
    scale = tl.load(tolerances + 1) + tl.load(tolerances) * tl.maximum(tl.abs(before), tl.abs(after))
    none = error == 0.0
    ratio = tl.where(none, 0.0, error / tl.where(none, 1.0, scale))
    return ratio * ratio


@triton.jit(do_not_specialize=["samples", "features", "tangents"])
def _norms(
    y, ends, slopes, weights, method, control, tolerances, partial_sums, errors, samples, features, tangents, size,
    ENERGIES: tl.constexpr, ADAPTIVE: tl.constexpr, STAGES: tl.constexpr, SAMPLES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sums of squares of a few samples."""
    T: tl.constexpr = y.dtype.element_ty
    phase = tl.load(control + 3)
    if phase < DONE:
        h = double(tl.load(control + 1))
        b = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
        column, there = b[:, None], b[:, None] < samples
        sums, of_slopes = tl.zeros([SAMPLES, WIDTH], tl.float64), tl.zeros([SAMPLES, WIDTH], tl.float64)
        strange = tl.zeros([SAMPLES, WIDTH], tl.float64)
        for first in range(0, features, WIDTH):
            d = first + tl.arange(0, WIDTH)[None, :]
            error, slope, before, after = _quantities(
                y, ends, slopes, weights, method, size, column * features + d, there & (d < features), phase, h,
                ADAPTIVE, STAGES,
            )  # fmt: skip
            sums += _square(error, before, after, tolerances)
            of_slopes += _square(slope, before, after, tolerances)
            strange += slope - slope
        of_x, slope_of_x = tl.sum(sums, axis=1), tl.sum(of_slopes, axis=1)
        sums, of_slopes = tl.zeros([SAMPLES, WIDTH], tl.float64), tl.zeros([SAMPLES, WIDTH], tl.float64)
        from_, to = tl.zeros([SAMPLES, WIDTH], tl.float64), tl.zeros([SAMPLES, WIDTH], tl.float64)
        for first in range(0, tangents, WIDTH):
            s = first + tl.arange(0, WIDTH)[None, :]
            error, slope, before, after = _quantities(
                y, ends, slopes, weights, method, size, (features + s) * samples.to(tl.int64) + column,
                there & (s < tangents), phase, h, ADAPTIVE, STAGES,
            )  # fmt: skip
            sums += error
            of_slopes += slope
            strange += slope - slope
            from_ += before
            to += after
        weight = tl.load(tolerances + 2)
        before = (weight * tl.sum(from_, axis=1)).to(T).to(tl.float64)
        after = (weight * tl.sum(to, axis=1)).to(T).to(tl.float64)
        of_trace = _square(weight * tl.sum(sums, axis=1), before, after, tolerances)
        slope_of_trace = _square(weight * tl.sum(of_slopes, axis=1), before, after, tolerances)
        bad = tl.sum(strange, axis=1)
        valid = b < samples
        total = larger(of_x / features, of_trace)
        out = partial_sums + tl.program_id(0) * 8
        for e in tl.static_range(ENERGIES):
            at = (features + tangents + e) * samples.to(tl.int64) + b
            error, slope, before, after = _quantities(
                y, ends, slopes, weights, method, size, at, valid, phase, h, ADAPTIVE, STAGES
            )  # fmt: skip
            of_energy = _square(error, before, after, tolerances)
            bad += slope - slope
            total = larger(total, of_energy)
            tl.store(out + 2 + e, tl.sum(tl.where(valid, of_energy, 0.0)))
            tl.store(out + 6 + e, tl.sum(tl.where(valid, _square(slope, before, after, tolerances), 0.0)))
        of_x = tl.where(bad != 0.0, bad, of_x)  # not a number: a slope is not finite
        total = tl.where(bad != 0.0, bad, total)
        tl.store(out, tl.sum(tl.where(valid, of_x, 0.0)))
        tl.store(out + 1, tl.sum(tl.where(valid, of_trace, 0.0)))
        tl.store(out + 4, tl.sum(tl.where(valid, slope_of_x, 0.0)))
        tl.store(out + 5, tl.sum(tl.where(valid, slope_of_trace, 0.0)))
        tl.store(errors + b, tl.sqrt(total), mask=valid)


# --- the step ---------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["in_x", "in_traces", "in_energies", "checkpoints"])
def _apply(
    y, ends, slopes, verdict, method, times, values, traces, energies, states, in_x, in_traces, in_energies, size,
    checkpoints, STAGES: tl.constexpr, FSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The times that were reached, the state that is kept, and the new state."""
    T: tl.constexpr = y.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = i < size
    t, h = double(tl.load(verdict)), double(tl.load(verdict + 1))
    accepted = tl.load(verdict + 2) != 0
    start = tl.load(y + i, mask=valid, other=0.0)
    end = tl.where(accepted, tl.load(ends + i, mask=valid & accepted, other=0.0), start)
    of_x = i < in_x
    of_trace = ~of_x & (i < in_x + in_traces)
    of_energy = valid & ~of_x & ~of_trace
    first, behind = tl.load(verdict + 3), tl.load(verdict + 4)
    before = first - 1
    for time in range(first, behind):
        value = end
        theta = number(1.0)
        if accepted:
            theta = (tl.load(times + time) - t) / h
        if theta < 1.0:
            change = tl.zeros_like(start)
            at = i
            for j in range(STAGES):
                row = method + (4 + STAGES * (STAGES + 3)) + 4 * j
                dense = tl.load(row + 2) + theta * tl.load(row + 3)
                dense = theta * (tl.load(row) + theta * (tl.load(row + 1) + theta * dense))
                change += (h * dense).to(T) * tl.load(slopes + at, mask=valid, other=0.0)
                at += size
            value = start + change
        tl.store(values + before * in_x + i, value, mask=of_x)
        tl.store(traces + before * in_traces + i - in_x, value, mask=of_trace)
        tl.store(energies + before * in_energies + i - in_x - in_traces, value, mask=of_energy)
        before += 1
    moves = valid & accepted
    tl.store(y + i, end, mask=moves)
    if FSAL:
        last = i + (STAGES - 1) * (size + 0 * i)  # in 64 bits
        tl.store(slopes + i, tl.load(slopes + last, mask=moves, other=0.0), mask=moves)
    if tl.load(verdict + 6) != 0:
        to = states + i
        other = states + i
        for k in range(1, (checkpoints + 1) // 2):
            to += in_x
            other += 2 * in_x
            tl.store(to, tl.load(other, mask=of_x, other=0.0), mask=of_x)
    slot = tl.load(verdict + 5)
    tl.store(states + slot * in_x + i, end, mask=of_x & (slot >= 0))


# --- launches ---------------------------------------------------------------------------------------------


def combine(base: Tensor, slopes: Tensor, weights: Tensor, out: Tensor) -> None:
    launch(
        _combine, -(-out.numel() // ELEMENTS), out, base, slopes, weights, out, out.stride(), out.numel(), out.shape[1],
        weights.shape[0], slopes.stride(0), BLOCK=ELEMENTS, warps=4,
    )  # fmt: skip


def norms(state: State) -> None:
    (_, samples, features), tangents = state.values.shape, state.traces.shape[1]
    launch(
        _norms, state.partial.shape[0], state.y, state.y, state.ends, state.slopes, state.weights, state.method,
        state.control, state.tolerances, state.partial, state.errors, samples, features, tangents, state.y.shape[0],
        ENERGIES=state.energies.shape[1], ADAPTIVE=state.grid is None, STAGES=state.slopes.shape[0], SAMPLES=BLOCK,
        WIDTH=min(64, triton.next_power_of_2(max(features, tangents))), warps=4,
    )  # fmt: skip


def decide(state: State) -> None:
    (outputs, samples, features), stages = state.values.shape, state.slopes.shape[0]
    launch(
        control.decide, 1, state.y, state.control, state.verdict, state.partial, state.partial.shape[0], state.times,
        outputs, state.grid, state.method, state.steps, state.counts, state.nodes, state.weights, samples, features,
        state.states.shape[0], state.max_steps, ADAPTIVE=state.grid is None, STAGES=stages, ORDER=state.order,
        FSAL=int(state.fsal), EPSILON=torch.finfo(state.y.dtype).eps, BLOCK=128, warps=4,
    )  # fmt: skip


def apply(state: State) -> None:
    launch(
        _apply, -(-state.y.shape[0] // ELEMENTS), state.y, state.y, state.ends, state.slopes, state.verdict,
        state.method, state.times, state.values, state.traces, state.energies, state.states, state.values[0].numel(),
        state.traces[0].numel(), state.energies[0].numel(), state.y.shape[0], state.states.shape[0],
        STAGES=state.slopes.shape[0], FSAL=int(state.fsal), BLOCK=ELEMENTS, warps=4,
    )  # fmt: skip


STAGES = Kernels(
    combine=combine,
    norms=norms,
    decide=decide,
    apply=apply,
    rows=trace.trace_rows,
    rows_bwd=trace.trace_rows_bwd,
    contract=trace.trace_contract,
    layer_fwd=trace.trace_layer_fwd,
    layer_bwd=trace.trace_layer_bwd,
)
mlp_ode_fwd = partial(ode_stages.forward, STAGES)
mlp_ode_bwd = partial(ode_stages_backward.backward, STAGES)
