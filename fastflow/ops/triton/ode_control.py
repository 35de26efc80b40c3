"""Who decides on the steps of a solve: csrc/cuda/ode_control.cuh in Triton, by one program, in float64."""

from __future__ import annotations

import triton
import triton.language as tl

from fastflow.ops.triton.numeric import exp, log

__all__ = ["DONE", "GUESS", "SLOPE", "STEP", "decide", "double", "larger", "number"]

BEGIN, SLOPE, GUESS, STEP, DONE, NOT_FINITE, UNDERFLOW, TOO_MANY = map(tl.constexpr, range(8))  # enum Phase


@triton.jit
def number(value: tl.constexpr):
    """A float64: a constant beside one could be rounded to float32."""
    return tl.full([], value, tl.float64)


@triton.jit
def double(bits):
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def _bits(value):
    return value.to(tl.int64, bitcast=True)


@triton.jit
def larger(a, b):
    """And what is not a number"""
    return tl.where((a != a) | (a >= b), a, b)


@triton.jit
def _root(x, ORDER: tl.constexpr):
    """x^(1 / order), x >= 0"""
    positive = x > 0.0
    return tl.where(positive, exp(log(tl.where(positive, x, 1.0)) / ORDER), x)


@triton.jit
def _trial_step(state, slope):
    small = number(1e-6)
    flat = (state < number(1e-5)) | (slope < number(1e-5))
    h = number(0.01) * state / tl.where(flat, 1.0, slope)
    h = tl.where(flat, small, h)
    return tl.where((h - h == 0.0) & (h > 0.0), h, small)


@triton.jit
def _first_step(trial, slope, bend, ORDER: tl.constexpr):
    most = tl.where(slope > bend, slope, bend)
    slow = (slope <= number(1e-15)) & (bend <= number(1e-15))
    low = number(1e-3) * trial
    low = tl.where(low > number(1e-6), low, number(1e-6))
    h = tl.where(slow, low, _root(number(0.01) / tl.where(slow, 1.0, most), ORDER))
    h = tl.where((h - h == 0.0) & (h > 0.0), h, trial)
    return tl.where(100.0 * trial < h, 100.0 * trial, h)


@triton.jit
def _growth(norm, ORDER: tl.constexpr):
    finite = norm - norm == 0.0
    some = finite & (norm > 0.0)
    wanted = tl.where(some, number(0.9) / _root(tl.where(some, norm, 1.0), ORDER), 10.0)
    least = tl.where(norm < 1.0, 1.0, number(0.2))
    wanted = tl.where(wanted > least, wanted, least)
    return tl.where(finite, tl.where(wanted < 10.0, wanted, 10.0), number(0.2))


@triton.jit
def _norm(totals, first: tl.constexpr, samples, features):
    """The largest of the roots of the means"""
    k = tl.arange(0, 8)
    n = samples.to(tl.float64)
    found = tl.sum(tl.where(k == first, totals, 0.0)) / (n * features.to(tl.float64))
    for i in tl.static_range(1, 4):
        found = larger(found, tl.sum(tl.where(k == first + i, totals, 0.0)) / n)
    return tl.sqrt(found)


@triton.jit(do_not_specialize=["samples", "features", "count", "checkpoints", "max_steps"])
def decide(
    control, verdict, partial_sums, blocks, times, count, grid, method, steps, counts, nodes, weights, samples,
    features, checkpoints, max_steps, ADAPTIVE: tl.constexpr, STAGES: tl.constexpr, ORDER: tl.constexpr,
    FSAL: tl.constexpr, EPSILON: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``decide`` of csrc/cuda/ode_control.cuh"""
    T: tl.constexpr = nodes.dtype.element_ty
    t, h, slope = double(tl.load(control)), double(tl.load(control + 1)), double(tl.load(control + 2))
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
    sign = tl.where(end < begin, number(-1.0), number(1.0))
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
