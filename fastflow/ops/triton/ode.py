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
from fastflow.ops.triton import trace
from fastflow.ops.triton.numeric import exp, log
from fastflow.ops.triton.rows import launch

__all__ = ["mlp_ode_bwd", "mlp_ode_fwd"]

ELEMENTS = 256  # of a program
BEGIN, SLOPE, GUESS, STEP, DONE, NOT_FINITE, UNDERFLOW, TOO_MANY = map(tl.constexpr, range(8))  # enum Phase


@triton.jit
def _number(value: tl.constexpr):
    """A float64: a constant beside one could be rounded to float32."""
    return tl.full([], value, tl.float64)


@triton.jit
def _double(bits):
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def _bits(value):
    return value.to(tl.int64, bitcast=True)


@triton.jit
def _combine(base, slopes, weights, out, out_at, total, width, count, stride, BLOCK: tl.constexpr):
    """out[b, d] = base[b, d] + sum_j weights[j] slopes[j, b, d]"""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = i < total
    b, d = i // width, i % width
    end = tl.load(base + i, mask=valid, other=0.0)
    at = i
    for j in range(count):
        w = tl.load(weights + j)
        end += tl.where(w != 0.0, w * tl.load(slopes + at, mask=valid, other=0.0), 0.0)
        at += stride
    tl.store(out + b * out_at[0] + d * out_at[1], end, mask=valid)


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
        at_slope = at
        for j in range(STAGES):
            k = tl.load(slopes + at_slope, mask=mask, other=0.0)
            w = tl.load(weights + STAGES * STAGES + j)
            end += tl.where(w != 0.0, w * k, 0.0)
            if ADAPTIVE:  # these nearly cancel
                e = tl.load(method + (4 + STAGES * (STAGES + 2)) + j)
                error += tl.where(e != 0.0, h * e * k.to(tl.float64), 0.0)
            at_slope += size
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


@triton.jit
def _larger(a, b):
    """And what is not a number"""
    return tl.where((a != a) | (a >= b), a, b)


@triton.jit(do_not_specialize=["samples", "features", "tangents"])
def _norms(
    y, ends, slopes, weights, method, control, tolerances, partial_sums, errors, samples, features, tangents, size,
    ENERGIES: tl.constexpr, ADAPTIVE: tl.constexpr, STAGES: tl.constexpr, SAMPLES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sums of squares of a few samples."""
    T: tl.constexpr = y.dtype.element_ty
    phase = tl.load(control + 3)
    if phase < DONE:
        h = _double(tl.load(control + 1))
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
        total = _larger(of_x / features, of_trace)
        out = partial_sums + tl.program_id(0) * 8
        for e in tl.static_range(ENERGIES):
            at = (features + tangents + e) * samples.to(tl.int64) + b
            error, slope, before, after = _quantities(
                y, ends, slopes, weights, method, size, at, valid, phase, h, ADAPTIVE, STAGES
            )  # fmt: skip
            of_energy = _square(error, before, after, tolerances)
            bad += slope - slope
            total = _larger(total, of_energy)
            tl.store(out + 2 + e, tl.sum(tl.where(valid, of_energy, 0.0)))
            tl.store(out + 6 + e, tl.sum(tl.where(valid, _square(slope, before, after, tolerances), 0.0)))
        of_x = tl.where(bad != 0.0, bad, of_x)  # not a number: a slope is not finite
        total = tl.where(bad != 0.0, bad, total)
        tl.store(out, tl.sum(tl.where(valid, of_x, 0.0)))
        tl.store(out + 1, tl.sum(tl.where(valid, of_trace, 0.0)))
        tl.store(out + 4, tl.sum(tl.where(valid, slope_of_x, 0.0)))
        tl.store(out + 5, tl.sum(tl.where(valid, slope_of_trace, 0.0)))
        tl.store(errors + b, tl.sqrt(total), mask=valid)


# --- the decision, by one program -------------------------------------------------------------------------


@triton.jit
def _root(x, ORDER: tl.constexpr):
    """x^(1 / order), x >= 0"""
    positive = x > 0.0
    return tl.where(positive, exp(log(tl.where(positive, x, 1.0)) / ORDER), x)


@triton.jit
def _trial_step(state, slope):
    small = _number(1e-6)
    flat = (state < _number(1e-5)) | (slope < _number(1e-5))
    h = _number(0.01) * state / tl.where(flat, 1.0, slope)
    h = tl.where(flat, small, h)
    return tl.where((h - h == 0.0) & (h > 0.0), h, small)


@triton.jit
def _first_step(trial, slope, bend, ORDER: tl.constexpr):
    most = tl.where(slope > bend, slope, bend)
    slow = (slope <= _number(1e-15)) & (bend <= _number(1e-15))
    low = _number(1e-3) * trial
    low = tl.where(low > _number(1e-6), low, _number(1e-6))
    h = tl.where(slow, low, _root(_number(0.01) / tl.where(slow, 1.0, most), ORDER))
    h = tl.where((h - h == 0.0) & (h > 0.0), h, trial)
    return tl.where(100.0 * trial < h, 100.0 * trial, h)


@triton.jit
def _growth(norm, ORDER: tl.constexpr):
    finite = norm - norm == 0.0
    some = finite & (norm > 0.0)
    wanted = tl.where(some, _number(0.9) / _root(tl.where(some, norm, 1.0), ORDER), 10.0)
    least = tl.where(norm < 1.0, 1.0, _number(0.2))
    wanted = tl.where(wanted > least, wanted, least)
    return tl.where(finite, tl.where(wanted < 10.0, wanted, 10.0), _number(0.2))


@triton.jit
def _norm(totals, first: tl.constexpr, samples, features):
    """The largest of the roots of the means"""
    k = tl.arange(0, 8)
    n = samples.to(tl.float64)
    found = tl.sum(tl.where(k == first, totals, 0.0)) / (n * features.to(tl.float64))
    for i in tl.static_range(1, 4):
        found = _larger(found, tl.sum(tl.where(k == first + i, totals, 0.0)) / n)
    return tl.sqrt(found)


@triton.jit(do_not_specialize=["samples", "features", "count", "checkpoints", "max_steps"])
def _decide(
    control, verdict, partial_sums, blocks, times, count, grid, method, steps, counts, nodes, weights, samples,
    features, checkpoints, max_steps, ADAPTIVE: tl.constexpr, STAGES: tl.constexpr, ORDER: tl.constexpr,
    FSAL: tl.constexpr, EPSILON: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``decide`` of csrc/cuda/ode_control.cuh"""
    T: tl.constexpr = nodes.dtype.element_ty
    t, h, slope = _double(tl.load(control)), _double(tl.load(control + 1)), _double(tl.load(control + 2))
    phase, evaluations = tl.load(control + 3), tl.load(control + 4)
    accepted, rejected = tl.load(control + 5), tl.load(control + 6)
    reached_before, spacing = tl.load(control + 7), tl.load(control + 8)
    begins, ended = phase == BEGIN, phase >= DONE

    totals = tl.zeros([8], tl.float64)
    k = tl.arange(0, 8)[None, :]
    for first in range(0, blocks, BLOCK):
        i = first + tl.arange(0, BLOCK)[:, None]
        totals += tl.sum(tl.load(partial_sums + i * 8 + k, mask=i < blocks, other=0.0), axis=0)
    norm, of_slope = _norm(totals, 0, samples, features), _norm(totals, 4, samples, features)

    begin, end = tl.load(times), tl.load(times + count)
    sign = tl.where(end < begin, _number(-1.0), _number(1.0))
    stepped = phase == STEP
    moved = stepped & (norm <= 1.0)  # of fixed steps it is 0, or not a number
    tl.store(steps + 2 * accepted, t, mask=moved)
    tl.store(steps + 2 * accepted + 1, h, mask=moved)
    tl.store(verdict, _bits(t))
    tl.store(verdict + 1, _bits(h))
    evaluations += tl.where(stepped, STAGES - FSAL, tl.where((phase == SLOPE) | (phase == GUESS), 1, 0))
    accepted += tl.where(moved, 1, 0)

    # where the state is, and the times up to there
    if ADAPTIVE:
        rejected += tl.where(stepped & ~moved, 1, 0)
        t = tl.where(moved, t + h, t)
    else:
        t = tl.where(moved, tl.load(grid + accepted, mask=moved, other=0.0), tl.where(stepped, t + h, t))
    t = tl.where(begins, begin, t)
    arrives = begins | moved
    inside = tl.zeros([BLOCK], tl.int64)
    for first in range(1, count + 1, BLOCK):
        i = first + tl.arange(0, BLOCK)
        time = tl.load(times + i, mask=i <= count, other=0.0)
        inside += ((i <= count) & (sign * time <= sign * t)).to(tl.int64)
    last = tl.where(arrives, 1 + tl.sum(inside), reached_before)
    through = arrives & (last > count)
    tl.store(verdict + 2, tl.where(moved, 1, 0).to(tl.int64))
    tl.store(verdict + 3, tl.where(moved, reached_before, 1))
    tl.store(verdict + 4, tl.where(arrives, last, 1))

    # the states that are kept
    spacing = tl.where(begins, 1, spacing)
    keeps = arrives & ~through & (checkpoints > 0)
    thins = keeps & (accepted // spacing >= checkpoints)
    spacing = tl.where(thins, 2 * spacing, spacing)
    kept = keeps & (accepted % spacing == 0)
    tl.store(verdict + 5, tl.where(kept, accepted // spacing, -1))
    tl.store(verdict + 6, tl.where(thins, 1, 0).to(tl.int64))

    # the next step
    then = phase
    if ADAPTIVE:
        fine = norm == norm
        trial = sign * h
        guessed = sign * _first_step(trial, slope, norm / tl.where(phase == GUESS, trial, 1.0), ORDER)
        grown = h * _growth(norm, ORDER)
        slope = tl.where(phase == SLOPE, of_slope, slope)
        h = tl.where(phase == SLOPE, tl.where(fine, sign * _trial_step(norm, of_slope), 0.0), h)
        h = tl.where(phase == GUESS, guessed, tl.where(stepped & ~through, grown, h))
        finite = norm - norm == 0.0
        still = t + h == t
        stuck = still | (~finite & (sign * h < EPSILON * sign * (end - begin)))
        failed = tl.where(~finite, NOT_FINITE, tl.where(stuck, UNDERFLOW, TOO_MANY))
        then = tl.where(stepped & (stuck | (accepted + rejected >= max_steps)), failed, then)
        then = tl.where(phase == SLOPE, tl.where(fine, GUESS, NOT_FINITE), then)
        then = tl.where(phase == GUESS, tl.where(still, UNDERFLOW, STEP), then)
        then = tl.where(begins, SLOPE, then)
    else:
        ahead = arrives & ~through
        step = tl.load(grid + accepted + 1, mask=ahead, other=0.0) - tl.load(grid + accepted, mask=ahead, other=0.0)
        h = tl.where(ahead, step, h)
        then = tl.where(begins & (FSAL == 1), SLOPE, STEP)
        then = tl.where(stepped & ~moved, NOT_FINITE, then)
    then = tl.where(through, DONE, tl.where(ended, phase, then)).to(tl.int64)

    tl.store(control, _bits(t))
    tl.store(control + 1, _bits(h))
    tl.store(control + 2, _bits(slope))
    tl.store(control + 3, then)
    tl.store(control + 4, evaluations)
    tl.store(control + 5, accepted)
    tl.store(control + 6, rejected)
    tl.store(control + 7, last)
    tl.store(control + 8, spacing)
    tl.store(counts, evaluations)
    tl.store(counts + 1, accepted)
    tl.store(counts + 2, rejected)
    tl.store(counts + 3, spacing)

    # the stages of the next turn; the guess is a step of Euler's method, to the second stage
    guess = then == GUESS
    i = tl.arange(0, 8)
    c = tl.load(method + 4 + i, mask=i < STAGES, other=0.0)
    c = tl.where(guess, tl.where(i > 0, 1.0, 0.0), c)
    tl.store(nodes + i, (t + c * h).to(T), mask=i < STAGES)
    i = tl.arange(0, 128)
    inside = i < STAGES * (STAGES + 1)
    a = tl.load(method + 4 + STAGES + i, mask=inside, other=0.0)
    a = tl.where(guess, tl.where(i == STAGES, 1.0, 0.0), a)
    tl.store(weights + i, (h * a).to(T), mask=inside)


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
    t, h = _double(tl.load(verdict)), _double(tl.load(verdict + 1))
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
        theta = _number(1.0)
        if accepted:
            theta = (tl.load(times + time) - t) / h
        if theta < 1.0:
            value = start
            at = i
            for j in range(STAGES):
                row = method + (4 + STAGES * (STAGES + 3)) + 4 * j
                dense = tl.load(row + 2) + theta * tl.load(row + 3)
                dense = theta * (tl.load(row) + theta * (tl.load(row + 1) + theta * dense))
                value += (h * dense).to(T) * tl.load(slopes + at, mask=valid, other=0.0)
                at += size
        tl.store(values + before * in_x + i, value, mask=of_x)
        tl.store(traces + before * in_traces + i - in_x, value, mask=of_trace)
        tl.store(energies + before * in_energies + i - in_x - in_traces, value, mask=of_energy)
        before += 1
    moves = valid & accepted
    tl.store(y + i, end, mask=moves)
    if FSAL:
        last = slopes + i
        for _ in tl.static_range(STAGES - 1):
            last += size
        tl.store(slopes + i, tl.load(last, mask=moves, other=0.0), mask=moves)
    if tl.load(verdict + 6) != 0:
        to = states + i
        other = states + i
        for _ in range(1, (checkpoints + 1) // 2):
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
        _decide, 1, state.y, state.control, state.verdict, state.partial, state.partial.shape[0], state.times, outputs,
        state.grid, state.method, state.steps, state.counts, state.nodes, state.weights, samples, features,
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
