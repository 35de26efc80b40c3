"""GRU-ODE-Bayes with steps of given sizes: a program takes a few series through all their steps and jumps.

Their states are a tile [S, padded H] in registers. A product with a matrix reads the tile from memory, a few columns at
a time: tl.dot in float32 would hold so much of both in registers that they spill. Matrices are padded with zeros, and
what pads a state stays zero. When rows and steps come stands in tables by ticks, made once for a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastflow.errors import SolverError
from fastflow.ops.gru_ode_reference import sequence, where
from fastflow.ops.triton.numeric import exp, logistic, tanh
from fastflow.ops.triton.rows import launch

__all__ = ["gru_ode_fwd"]

SERIES = 4  # of a program
COLUMNS = 32  # of what the jump sees, at a time, at most
MATRIX = 64 * 1024  # bytes of a matrix, at most
# the places of AT: where each parameter begins
CELL, INPUT, INPUT_BIAS, HIDDEN, HIDDEN_BIAS, PREDICT, PREDICT_BIAS, PREP, PREP_BIAS, IH, HH, IH_BIAS, HH_BIAS = map(
    tl.constexpr, range(13)
)

# --- tiles ------------------------------------------------------------------------------------------------


@triton.jit
def rows(data, row, due, width, N: tl.constexpr):
    """[S, N]: some rows of [.., width]; zeros where it has none, and for those that are not due"""
    n = tl.arange(0, N)
    return tl.load(data + row[:, None] * width + n[None, :], mask=due[:, None] & (n < width)[None, :], other=0.0)


@triton.jit
def put_rows(data, row, due, width, tile):
    n = tl.arange(0, tile.shape[1])
    tl.store(data + row[:, None] * width + n[None, :], tile, mask=due[:, None] & (n < width)[None, :])


@triton.jit
def share(room, tile):
    """A tile where all threads of a program can read it."""
    S: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    tl.debug_barrier()  # all have read what was there
    tl.store(room + tl.arange(0, S)[:, None] * N + tl.arange(0, N)[None, :], tile)
    tl.debug_barrier()


@triton.jit
def times(x, room, w, of_input, of_output, OUT: tl.constexpr):
    """x times a matrix [IN, OUT] with these strides"""
    S: tl.constexpr = x.shape[0]
    IN: tl.constexpr = x.shape[1]
    K: tl.constexpr = 4
    share(room, x)
    o, total = tl.arange(0, OUT), tl.zeros([S, K, OUT], x.dtype)
    for first in range(0, IN, K):
        i = first + tl.arange(0, K)
        part = tl.load(room + tl.arange(0, S)[:, None] * IN + i[None, :])
        total += part[:, :, None] * tl.load(w + i[:, None] * of_input + o[None, :] * of_output)[None, :, :]
    return tl.sum(total, axis=1)


@triton.jit
def bias(w, N: tl.constexpr):
    return tl.load(w + tl.arange(0, N))[None, :]


@triton.jit
def combined(k, weights, step, first, count, S: tl.constexpr, H: tl.constexpr):
    """[S, H]: the sum over [first, count) of weights[i * step] k[i]"""
    T: tl.constexpr = k.dtype.element_ty
    at = tl.arange(0, S)[:, None] * H + tl.arange(0, H)[None, :]
    total = tl.zeros([S, H], T)
    for i in range(first, count):
        total += tl.load(weights + i * step).to(T) * tl.load(k + i * S * H + at)
    return total


# --- the networks -------------------------------------------------------------------------------------------


@triton.jit
def factors(dropout, row, due, which: tl.constexpr, units, P: tl.constexpr):
    """Of the hidden units of a prediction: 0 before the jump, 1 after it."""
    if dropout is None:
        found = tl.full([1, 1], 1.0, tl.float32)
    else:
        found = rows(dropout, 2 * row + which, due, units, P)
    return found


@triton.jit
def observe(h, w, room, factor, AT: tl.constexpr, P: tl.constexpr, M: tl.constexpr):
    """(hidden units [S, P], prediction [S, M])"""
    q = times(h, room, w + AT[HIDDEN], 1, h.shape[1], P) + bias(w + AT[HIDDEN_BIAS], P)
    q = tl.where(q < 0.0, 0.0, q) * factor.to(q.dtype)
    return q, times(q, room, w + AT[PREDICT], 1, P, M) + bias(w + AT[PREDICT_BIAS], M)


@triton.jit
def affine(i: tl.constexpr, y, p, w, room, AT: tl.constexpr, IMPUTE: tl.constexpr):
    H: tl.constexpr = y.shape[1]
    a = times(y, room, w + AT[CELL] + i * H * H, 1, H, H)
    if IMPUTE:
        M: tl.constexpr = p.shape[1]
        a += times(p, room, w + AT[INPUT] + i * H * M, 1, M, H) + bias(w + AT[INPUT_BIAS] + i * H, H)
    return a


@triton.jit
def evaluate(y, w, room, AT: tl.constexpr, GATES: tl.constexpr, IMPUTE: tl.constexpr, P: tl.constexpr, M: tl.constexpr):
    """(dh/dt, and of it r or z, 1 - z, u, r h; the prediction with its hidden units where it is imputed)"""
    q = y
    p = y
    if IMPUTE:
        q, p = observe(y, w, room, tl.full([1, 1], 1.0, tl.float32), AT, P, M)
    gate, c, softplus, odds = logistic(affine(0, y, p, w, room, AT, IMPUTE))
    gated = gate * y
    u = tanh(affine(GATES - 1, gated, p, w, room, AT, IMPUTE))
    if GATES == 3:
        z, c, softplus, odds = logistic(affine(1, y, p, w, room, AT, IMPUTE))
    return c * (u - y), gate, c, u, gated, q, p


@triton.jit
def take_step(
    h, size, w, room, k, method, AT: tl.constexpr, GATES: tl.constexpr, IMPUTE: tl.constexpr, STAGES: tl.constexpr,
    P: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """The state behind a step; its slopes are in k. method: b [STAGES], a [STAGES, STAGES]"""
    S: tl.constexpr = h.shape[0]
    H: tl.constexpr = h.shape[1]
    for i in range(STAGES):
        y = h + size * combined(k, method + STAGES * (1 + i), 1, 0, i, S, H)
        slope, gate, c, u, gated, q, p = evaluate(y, w, room, AT, GATES, IMPUTE, P, M)
        share(k + i * S * H, slope)
    return h + size * combined(k, method, 1, 0, STAGES, S, H)


@triton.jit
def features(values, masks, predicted, row, due, c, DIMS: tl.constexpr, M: tl.constexpr):
    """Of the channels of columns c what comes before the networks, [S, C] each: (seen, value, mean, logvar, error,
    1 / std)"""
    d = (c // DIMS[3])[None, :]
    seen = due[:, None] & (c < DIMS[2] * DIMS[3])[None, :]
    seen = seen & (tl.load(masks + row[:, None] * DIMS[2] + d, mask=seen, other=0.0) != 0.0)
    p = predicted + tl.arange(0, due.shape[0])[:, None] * M + d
    value = tl.load(values + row[:, None] * DIMS[2] + d, mask=seen, other=0.0)
    mean, logvar = tl.load(p, mask=seen, other=0.0), tl.load(p + DIMS[2], mask=seen, other=0.0)
    inverse = exp(-0.5 * logvar)
    return seen, value, mean, logvar, (value - mean) * inverse, inverse


@triton.jit
def prep_weight(w, i: tl.constexpr, c, AT: tl.constexpr, DIMS: tl.constexpr):
    """Of feature i in the columns c, [1, C]"""
    d = c // DIMS[3]
    at = (d * 4 + i) * DIMS[3] + c - d * DIMS[3]
    return tl.load(w + AT[PREP] + at, mask=c < DIMS[2] * DIMS[3], other=0.0)[None, :]


@triton.jit
def prepared(values, masks, predicted, w, row, due, c, AT: tl.constexpr, DIMS: tl.constexpr, M: tl.constexpr):
    """Columns c of what the cell of the jump sees, [S, C]"""
    seen, value, mean, logvar, error, inverse = features(values, masks, predicted, row, due, c, DIMS, M)
    x = value * prep_weight(w, 0, c, AT, DIMS) + mean * prep_weight(w, 1, c, AT, DIMS)
    x += logvar * prep_weight(w, 2, c, AT, DIMS) + error * prep_weight(w, 3, c, AT, DIMS)
    x += tl.load(w + AT[PREP_BIAS] + c, mask=c < DIMS[2] * DIMS[3], other=0.0)[None, :]
    return tl.where(seen & ~(x < 0.0), x, 0.0)


@triton.jit
def leap(
    h, p, values, masks, predicted, w, room, row, due, AT: tl.constexpr, DIMS: tl.constexpr, M: tl.constexpr,
    X: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """(r, z, n, what r multiplies in n) of the jump from h with the prediction p, which goes to `predicted`"""
    H: tl.constexpr = h.shape[1]
    share(predicted, p)
    w_ih, w_hh, b_ih, b_hh = w + AT[IH], w + AT[HH], w + AT[IH_BIAS], w + AT[HH_BIAS]
    r = times(h, room, w_hh, 1, H, H) + bias(b_hh, H) + bias(b_ih, H)
    z = times(h, room, w_hh + H * H, 1, H, H) + bias(b_hh + H, H) + bias(b_ih + H, H)
    hn = times(h, room, w_hh + 2 * H * H, 1, H, H) + bias(b_hh + 2 * H, H)
    n = tl.zeros_like(hn) + bias(b_ih + 2 * H, H)
    for first in range(0, X, C):
        x = prepared(values, masks, predicted, w, row, due, first + tl.arange(0, C), AT, DIMS, M)
        r += times(x, room, w_ih + first, 1, X, H)
        z += times(x, room, w_ih + H * X + first, 1, X, H)
        n += times(x, room, w_ih + 2 * H * X + first, 1, X, H)
    r, not_r, softplus, odds = logistic(r)
    z, not_z, softplus, odds = logistic(z)
    return r, z, tanh(n + r * hn), hn


# --- forward ------------------------------------------------------------------------------------------------


@triton.jit
def _forward(
    h0, values, masks, dropout, w, sizes, begins, jumps, method, pre, post, state, states, k, predicted, room, series,
    ticks,
    AT: tl.constexpr, DIMS: tl.constexpr, GATES: tl.constexpr, IMPUTE: tl.constexpr, STAGES: tl.constexpr,
    S: tl.constexpr, H: tl.constexpr, P: tl.constexpr, M: tl.constexpr, X: tl.constexpr, C: tl.constexpr,
    ROOM: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = h0.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    b = program * S + tl.arange(0, S)
    live = b < series
    k, predicted, room = k + program * STAGES * S * H, predicted + program * S * M, room + program * ROOM
    h = rows(h0, b, live, DIMS[0], H)
    for tick in range(0, ticks + 1):
        first = tl.load(begins + tick * series + b, mask=live, other=0)
        end = tl.load(begins + (tick + 1) * series + b, mask=live, other=0)
        for i in range(0, tl.max(end - first).to(tl.int32)):
            due = first + i < end
            row = tl.where(due, first + i, 0)
            leaps = due & (tl.load(jumps + row, mask=due, other=0) != 0)
            q, p = observe(h, w, room, factors(dropout, row, due, 0, DIMS[1], P), AT, P, M)
            put_rows(pre, row, due, 2 * DIMS[2], p)
            r, z, n, hn = leap(h, p, values, masks, predicted, w, room, row, leaps, AT, DIMS, M, X, C)
            h = tl.where(leaps[:, None], n + z * (h - n), h)
            put_rows(states, row, due, DIMS[0], h)
            q, again = observe(h, w, room, factors(dropout, row, due, 1, DIMS[1], P), AT, P, M)
            put_rows(post, row, due, 2 * DIMS[2], tl.where(leaps[:, None], again, p))
        if tick < ticks:
            size = tl.load(sizes + tick * series + b, mask=live, other=0.0).to(T)
            h = take_step(h, size[:, None], w, room, k, method, AT, GATES, IMPUTE, STAGES, P, M)
    put_rows(state, b, live, DIMS[0], h)


# --- what the ops call --------------------------------------------------------------------------------------


class Padded(NamedTuple):
    """The parameters one after the other, matrices padded with zeros."""

    flat: Tensor
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]]
    """Of every parameter [gates, rows, columns] as it is, and padded."""
    constants: dict[str, Any]


def _power(n: int) -> int:
    return max(4, triton.next_power_of_2(n))


def matrix_bytes(params: Sequence[Tensor], dtype: torch.dtype) -> int:
    """Of the largest matrix that a program holds."""
    (p, h), outputs = params[-10].shape, params[-8].shape[0]
    return _power(h) * max(map(_power, (h, p, outputs))) * dtype.itemsize


def padded(params: Sequence[Tensor], h: int, impute: bool, stages: int) -> Padded:
    (p, _), (d, _, q), gates = params[-10].shape, params[-6].shape, params[0].shape[0] // h
    H, P, M, C = _power(h), _power(p), _power(2 * d), min(COLUMNS, _power(d * q))
    X = triton.cdiv(d * q, C) * C
    matrix, vector = (gates, h, h), (gates, H, H)
    shapes = [(matrix, vector)]
    if impute:
        shapes += [((gates, h, 2 * d), (gates, H, M)), ((gates, 1, h), (gates, 1, H))]
    shapes += [((1, p, h), (1, P, H)), ((1, 1, p), (1, 1, P)), ((1, 2 * d, p), (1, M, P)), ((1, 1, 2 * d), (1, 1, M))]
    shapes += [((1, 1, n), (1, 1, n)) for n in (4 * d * q, d * q)]
    shapes += [((3, h, d * q), (3, H, X)), ((3, h, h), (3, H, H)), *(2 * [((3, 1, h), (3, 1, H))])]
    parts, starts = [], [0]
    for tensor, (own, more) in zip(params, shapes, strict=True):
        parts.append(F.pad(tensor.reshape(own), (0, more[2] - own[2], 0, more[1] - own[1])).reshape(-1))
        starts.append(starts[-1] + parts[-1].numel())
    at = starts[:-1] if impute else [starts[0], 0, 0, *starts[1:-1]]
    constants = {
        "AT": tuple(at), "DIMS": (h, p, d, q), "GATES": gates, "IMPUTE": impute, "STAGES": stages, "S": SERIES, "H": H,
        "P": P, "M": M, "X": X, "C": C, "ROOM": 2 * SERIES * max(H, P, M, C),
        "warps": 4 if matrix_bytes(params, params[0].dtype) <= 4096 else 8,
    }  # fmt: skip
    return Padded(torch.cat(parts), shapes, constants)


def clocks(offsets: Tensor, counts: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(steps of every series [B], the sizes of all [ticks, B], the first row of each series that is at tick t or later
    [ticks + 2, B])"""
    segments, series, ends = sequence(offsets, counts)
    per, n = counts[segments], len(offsets) - 1
    taken = ends[offsets[1:] + torch.arange(n, device=ends.device)]
    ticks = int(taken.max()) if n else 0
    start = torch.repeat_interleave(ends - per, per)
    within = torch.arange(len(start), device=start.device) - torch.repeat_interleave(per.cumsum(0) - per, per)
    table = sizes.new_zeros(ticks, n)
    table[start + within, torch.repeat_interleave(series, per)] = torch.repeat_interleave(sizes[segments], per)
    is_row = segments < len(counts) - n
    begins = counts.new_zeros((ticks + 2) * n)
    begins.index_add_(0, (ends[is_row] + 1) * n + series[is_row], torch.ones_like(ends[is_row]))
    return taken, table, begins.view(ticks + 2, n).cumsum(0) + offsets[:-1]


def weights_of(method: Sequence[float], on: Tensor) -> tuple[int, Tensor]:
    """(stages, b [stages] and a [stages, stages]) of a packed Method"""
    s = int(method[0])
    square, b = method[4 + s : 4 + s + s * s], method[4 + s + s * s : 4 + 2 * s + s * s]
    return s, torch.tensor([*b, *square], dtype=torch.float64).to(on.device)


def gru_ode_fwd(
    h0, values, masks, dropout, params, offsets, counts, sizes, jumps, kind, impute, method, rtol, atol, max_steps, pre,
    post, state, states, steps,
) -> None:  # fmt: skip
    taken, table, begins = clocks(offsets, counts, sizes)
    stages, weights = weights_of(method, h0)
    programs, networks = triton.cdiv(h0.shape[0], SERIES), padded(params, h0.shape[1], impute, stages)
    constants = networks.constants
    launch(
        _forward, programs, h0,
        h0, values, masks, dropout, networks.flat, table, begins, jumps, weights, pre, post, state, states,
        h0.new_empty(programs * stages * SERIES * constants["H"]), h0.new_empty(programs * SERIES * constants["M"]),
        h0.new_empty(programs * constants["ROOM"]),
        h0.shape[0], len(table), **constants,
    )  # fmt: skip
    torch.stack([taken * stages, taken, torch.zeros_like(taken)], 1, out=steps)
    if (fault := where(offsets, counts, sizes, pre, states, state)) is not None:
        raise SolverError(fault)
