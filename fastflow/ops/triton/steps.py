"""Flows of K small steps on vectors in Triton: planar and radial. As csrc/cuda/steps.cuh, planar.h and radial.h.

A program has a tile of samples [B, D] in registers and takes it through all steps. The parameters of a step are a row
[P], ready for use (:mod:`fastflow.ops._steps`); their gradients leave in the same form.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.ops._op import accumulator
from fastflow.ops._steps import Prepare, pack, unpack_gradient
from fastflow.ops.triton.numeric import divide
from fastflow.ops.triton.root import derivative, log_derivative, log_one_plus, tanh_root, tanh_slope
from fastflow.ops.triton.rows import launch
from fastflow.ops.triton.tiles import sum_partials

__all__ = ["PLANAR", "RADIAL", "kernels"]

TILE = 1024  # elements of a tile of samples
PROGRAMS = 1024  # of a backward launch: each has memory for the states of a tile
SCRATCH = 2**22  # elements of all that memory
PLANAR, RADIAL = tl.constexpr(0), tl.constexpr(1)


# --- the steps: state z [B, D], a row of parameters per step [P] or [B, P] ------------------------------


@triton.jit
def _row(b, k, count, size, EACH: tl.constexpr):
    """Where the parameters of step k begin: one number, or one for every sample."""
    if EACH:
        at = (b * count + k) * size
    else:
        at = (k * size).to(tl.int64)
    return at


@triton.jit
def _vector(p, at, d, exists, inside, EACH: tl.constexpr):
    """[B, D], or [1, D] for all samples"""
    if EACH:
        x = tl.load(p + at[:, None] + d[None, :], mask=exists[:, None] & inside[None, :], other=0.0)
    else:
        x = tl.load(p + at + d[None, :], mask=inside[None, :], other=0.0)
    return x


@triton.jit
def _number(p, at, exists, EACH: tl.constexpr):
    """[B]"""
    if EACH:
        x = tl.load(p + at, mask=exists, other=0.0)
    else:
        x = tl.load(p + at) + tl.where(exists, 0.0, 0.0).to(p.dtype.element_ty)
    return x


@triton.jit
def _sum(x):
    return tl.sum(x.to(tl.float64), axis=1).to(x.dtype)


@triton.jit
def _sqrt(x):
    if x.dtype == tl.float64:
        y = tl.sqrt(x)
    else:
        y = tl.sqrt_rn(x)
    return y


@triton.jit
def _ring(alpha, reach, r):
    """(1 / (α + r), y, α / (α + r), t, 1 + y, 1 + t) without cancellation"""
    h = divide(1.0, alpha + r)
    y, e = (reach - alpha) * h, alpha * h
    t = y * e
    near_y, near_t = (r + reach) * h, (r * h) * (r * h) + (2.0 * r + reach) * h * e
    return h, y, e, t, near_y, near_t


@triton.jit
def _push(alpha, reach, r, INVERSE: tl.constexpr):
    """The factor of z - c that a step adds."""
    if INVERSE:
        y = divide(alpha - reach, reach + r)
    else:
        y = (reach - alpha) * divide(1.0, alpha + r)
    return y


@triton.jit
def _apply(
    z, p, at, d, exists, inside, width, FLOW: tl.constexpr, INVERSE: tl.constexpr, EACH: tl.constexpr
):  # fmt: skip
    """(z after the step, the log-determinant, what is kept of the step)"""
    if FLOW == 0:
        u = _vector(p, at, d, exists, inside, EACH)
        w = _vector(p, at + width, d, exists, inside, EACH)
        slope = _number(p, at + 2 * width + 1, exists, EACH)
        kept = _sum(z * w) + _number(p, at + 2 * width, exists, EACH)
        if INVERSE:
            kept = tanh_root(kept, slope)
        h, s = tanh_slope(kept)
        change = log_derivative(slope, h, s)
        step = u * h[:, None]
        z = z - step if INVERSE else z + step
    else:
        x = z - _vector(p, at, d, exists, inside, EACH)
        alpha = _number(p, at + width, exists, EACH)
        reach = _number(p, at + width + 1, exists, EACH)
        nearest: tl.constexpr = 1e-150 if z.dtype == tl.float64 else 1e-24
        kept = _sqrt(_sum(x * x) + nearest)
        if INVERSE:
            q = reach - kept
            root = _sqrt(q * q + 4.0 * alpha * kept)
            positive = q > 0.0
            far = divide(2.0 * alpha * kept, tl.where(positive, q + root, 1.0))
            kept = tl.where(positive, far, (root - q) * 0.5)
        h, y, e, t, near_y, near_t = _ring(alpha, reach, kept)
        change = (width - 1) * log_one_plus(y, near_y) + log_one_plus(t, near_t)
        z = z + _push(alpha, reach, kept, INVERSE)[:, None] * x
    return z, -change if INVERSE else change, kept


@triton.jit
def _gradient(
    z, kept, g, gl, p, at, d, exists, inside, width, FLOW: tl.constexpr, INVERSE: tl.constexpr, EACH: tl.constexpr
):  # fmt: skip
    """(g of the input, gradients of the parameters: two vectors [B, D] and two numbers [B]).

    z is before the step, which is after its inverse; g the gradient of its output. Of a radial step the second vector
    is none of the parameters.
    """
    if FLOW == 0:
        u = _vector(p, at, d, exists, inside, EACH)
        w = _vector(p, at + width, d, exists, inside, EACH)
        slope = _number(p, at + 2 * width + 1, exists, EACH)
        h, s = tanh_slope(kept)
        dot = _sum(u * g)
        share = divide(s, derivative(slope, h, s))
        less = slope - 1.0
        m = 2.0 * gl * less * h * share
        if INVERSE:
            first, second = m - share * (dot + less * m), -gl * share
            back = g + first[:, None] * w
            vector = -h[:, None] * back
        else:
            first, second = s * dot - m, gl * share
            back = g + first[:, None] * w
            vector = h[:, None] * g
        other = first[:, None] * z
    else:
        x = z - _vector(p, at, d, exists, inside, EACH)
        alpha = _number(p, at + width, exists, EACH)
        reach = _number(p, at + width + 1, exists, EACH)
        h, y, e, t, near_y, near_t = _ring(alpha, reach, kept)
        one_y, one_t = tl.where(y < -0.5, near_y, 1.0 + y), tl.where(t < -0.5, near_t, 1.0 + t)
        ly, le = divide((width - 1) + 0.0 * y, one_y) + divide(e, one_t), divide(y, one_t)
        dot, gain = _sum(x * g), gl
        if INVERSE:
            lr = -(ly * y + le * e) * h
            along = divide(divide(dot, kept) - gl * lr, one_t)
            pull = divide(along - divide(dot, kept * one_y), kept)
            dot, gain = -along * kept, -gl
        gy, ge = dot + gain * ly, gain * le
        gh = gy * (reach - alpha) + ge * alpha
        gr = -gh * h * h
        if not INVERSE:
            pull = divide(gr, kept)
        first, second = ge * h + gr - gy * h, gy * h
        more = _push(alpha, reach, kept, INVERSE)[:, None] * g + pull[:, None] * x
        back, vector, other = g + more, -more, -more
    return back, vector, other, first, second


# --- the kernels ----------------------------------------------------------------------------------------


@triton.jit
def _forward(
    z, z_at, p, running, r_step, y, y_at, logdet, samples, width, count, size,
    FLOW: tl.constexpr, INVERSE: tl.constexpr, EACH: tl.constexpr, B: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = p.dtype.element_ty
    b, d = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B), tl.arange(0, D)
    exists, inside = b < samples, d < width
    mask = exists[:, None] & inside[None, :]
    state = tl.load(z + b[:, None] * z_at[0] + d[None, :] * z_at[1], mask=mask, other=0.0).to(T)
    total = tl.zeros([B], tl.float64)
    for i in range(count):
        at = _row(b, count - 1 - i if INVERSE else i, count, size, EACH)
        state, change, kept = _apply(state, p, at, d, exists, inside, width, FLOW, INVERSE, EACH)
        total += change.to(tl.float64)
    tl.store(y + b[:, None] * y_at[0] + d[None, :] * y_at[1], state.to(y.dtype.element_ty), mask=mask)
    if running is not None:
        total += tl.load(running + b * r_step, mask=exists, other=0.0).to(tl.float64)
    tl.store(logdet + b, total.to(T), mask=exists)


@triton.jit
def _backward(
    z, z_at, p, gy, gy_at, glogdet, gl_step, gz, gz_at, out, states, keeps, samples, width, count, size, rounds,
    FLOW: tl.constexpr, INVERSE: tl.constexpr, EACH: tl.constexpr, B: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """out: of every sample [B, K, P], or sums of every program [programs, K, P]."""
    T: tl.constexpr = p.dtype.element_ty
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    row, d = tl.arange(0, B), tl.arange(0, D)
    inside = d < width
    own_states, own_keeps = states + program * count * B * width, keeps + program * count * B
    for round in range(rounds):
        b = (round * programs + program) * B + row
        exists = b < samples
        mask = exists[:, None] & inside[None, :]
        state = tl.load(z + b[:, None] * z_at[0] + d[None, :] * z_at[1], mask=mask, other=0.0).to(T)
        tl.debug_barrier()  # of the round before all have read
        for i in range(count):
            at = _row(b, count - 1 - i if INVERSE else i, count, size, EACH)
            tl.store(own_states + (i * B + row)[:, None] * width + d[None, :], state, mask=inside[None, :])
            state, change, kept = _apply(state, p, at, d, exists, inside, width, FLOW, INVERSE, EACH)
            tl.store(own_keeps + i * B + row, kept)
        tl.debug_barrier()  # what one thread wrote another reads
        g = tl.load(gy + b[:, None] * gy_at[0] + d[None, :] * gy_at[1], mask=mask, other=0.0).to(T)
        gl = tl.load(glogdet + b * gl_step, mask=exists, other=0.0)
        for j in range(count):
            i = count - 1 - j
            k = j if INVERSE else i
            at = _row(b, k, count, size, EACH)
            before = tl.load(own_states + (i * B + row)[:, None] * width + d[None, :], mask=inside[None, :], other=0.0)
            kept = tl.load(own_keeps + i * B + row)
            where = state if INVERSE else before
            g, vector, other, first, second = _gradient(
                where, kept, g, gl, p, at, d, exists, inside, width, FLOW, INVERSE, EACH
            )
            state = before
            vectors: tl.constexpr = 2 if FLOW == 0 else 1
            if EACH:
                to = out + at
                tl.store(to[:, None] + d[None, :], vector, mask=mask)
                if FLOW == 0:
                    tl.store(to[:, None] + width + d[None, :], other, mask=mask)
                tl.store(to + vectors * width, first, mask=exists)
                tl.store(to + vectors * width + 1, second, mask=exists)
            else:
                to, again = out + (program * count + k) * size, round > 0
                _add(to + d, _over(vector, mask), inside, again)
                if FLOW == 0:
                    _add(to + width + d, _over(other, mask), inside, again)
                numbers = tl.arange(0, 2)
                sums = tl.where(
                    numbers == 0,
                    tl.sum(tl.where(exists, first, 0.0).to(tl.float64), axis=0),
                    tl.sum(tl.where(exists, second, 0.0).to(tl.float64), axis=0),
                )
                _add(to + vectors * width + numbers, sums, numbers < 2, again)
        tl.store(gz + b[:, None] * gz_at[0] + d[None, :] * gz_at[1], g.to(gz.dtype.element_ty), mask=mask)


@triton.jit
def _over(x, mask):
    """The sum over the samples of a tile."""
    return tl.sum(tl.where(mask, x, 0.0).to(tl.float64), axis=0)


@triton.jit
def _add(to, value, mask, again):
    """To what is there from an earlier round; a barrier has been passed since."""
    before = tl.load(to, mask=mask & again, other=0.0)
    tl.store(to, value.to(before.dtype) + before, mask=mask)


# --- what the ops call ----------------------------------------------------------------------------------


def _tile(z: Tensor) -> tuple[int, int]:
    """(samples, variables) of a program."""
    d = triton.next_power_of_2(z.shape[1])
    return max(1, min(TILE // d, 64, triton.next_power_of_2(z.shape[0]))), d


def kernels(flow: tl.constexpr, prepare: Prepare) -> tuple[Callable[..., None], Callable[..., None]]:
    """The functions forward and backward of a family; ``prepare`` makes of its parameters what its steps use."""

    def forward(z: Tensor, *rest) -> None:
        *given, running, y, logdet, each, inverse = rest
        if z.numel() == 0:
            return
        p = pack(prepare, z, given)
        b, d = _tile(z)
        launch(
            _forward, -(-z.shape[0] // b), z,
            z, z.stride(), p, running, 0 if running is None else running.stride(0), y, y.stride(), logdet, *z.shape,
            *p.shape[-2:], FLOW=flow, INVERSE=inverse, EACH=each, B=b, D=d, warps=4,
        )  # fmt: skip

    def backward(z: Tensor, *rest) -> None:
        *given, gy, glogdet, gz, g0, g1, g2, each, inverse = rest
        p = pack(prepare, z, given)
        gradient, dtype = torch.zeros_like(p) if z.numel() == 0 else torch.empty_like(p), accumulator(z.dtype)
        if z.numel() > 0:
            b, d = _tile(z)
            steps, size = p.shape[-2:]
            tiles = -(-z.shape[0] // b)
            of_program = steps * (b * (z.shape[1] + 1) + (0 if each else size))
            programs = max(1, min(tiles, PROGRAMS, SCRATCH // max(1, of_program)))
            states = z.new_empty(programs * steps * b * z.shape[1], dtype=dtype)
            keeps = z.new_empty(programs * steps * b, dtype=dtype)
            out = gradient if each else z.new_empty((programs, steps * size), dtype=dtype)
            launch(
                _backward, programs, z,
                z, z.stride(), p, gy, gy.stride(), glogdet, glogdet.stride(0), gz, gz.stride(), out, states, keeps,
                *z.shape, steps, size, -(-tiles // programs), FLOW=flow, INVERSE=inverse, EACH=each, B=b, D=d, warps=4,
            )  # fmt: skip
            if not each:
                sum_partials(out, gradient)
        unpack_gradient(prepare, given, gradient, (g0, g1, g2))

    return forward, backward
