"""The gradient of GRU-ODE-Bayes with steps of given sizes. A program makes the states of a window of ticks again from
those at its start, then goes through it backwards; it has sums of its own for the weights' gradients, which are added
up in the order of the programs. See gru_ode.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastflow.ops.triton.gru_ode import (
    CELL,
    HH,
    HH_BIAS,
    HIDDEN,
    HIDDEN_BIAS,
    IH,
    IH_BIAS,
    INPUT,
    INPUT_BIAS,
    PREDICT,
    PREDICT_BIAS,
    PREP,
    PREP_BIAS,
    SERIES,
    clocks,
    combined,
    evaluate,
    factors,
    features,
    leap,
    observe,
    padded,
    prep_weight,
    prepared,
    put_rows,
    rows,
    share,
    take_step,
    times,
    weights_of,
)
from fastflow.ops.triton.rows import launch
from fastflow.ops.triton.tiles import sum_partials

__all__ = ["gru_ode_bwd"]

TICKS = 16  # of a window


@triton.jit
def _gather(to, room, g, x, row):
    """Adds g^T x to a matrix with this stride of rows"""
    S: tl.constexpr = x.shape[0]
    IN: tl.constexpr = x.shape[1]
    OUT: tl.constexpr = g.shape[1]
    share(room, g)
    share(room + S * OUT, x)  # and what another place of the kernel added is there
    i, o = tl.arange(0, IN), tl.arange(0, OUT)
    at = to + o[:, None] * row + i[None, :]
    sums = tl.load(at)
    for s in range(S):
        sums += tl.load(room + s * OUT + o)[:, None] * tl.load(room + S * OUT + s * IN + i)[None, :]
    tl.store(at, sums)


@triton.jit
def _gather_bias(to, g):
    at = to + tl.arange(0, g.shape[1])
    tl.debug_barrier()
    tl.store(at, tl.load(at) + tl.sum(g, axis=0))


@triton.jit
def _observe_backward(gp, q, h, w, room, sums, factor, AT: tl.constexpr):
    """That of h from the gradient of a prediction"""
    H: tl.constexpr = h.shape[1]
    P: tl.constexpr = q.shape[1]
    gq = tl.where(q == 0.0, 0.0, times(gp, room, w + AT[PREDICT], P, 1, P)) * factor.to(q.dtype)
    _gather(sums + AT[PREDICT], room, gp, q, P)
    _gather_bias(sums + AT[PREDICT_BIAS], gp)
    _gather(sums + AT[HIDDEN], room, gq, h, H)
    _gather_bias(sums + AT[HIDDEN_BIAS], gq)
    return times(gq, room, w + AT[HIDDEN], H, 1, H)


@triton.jit
def _leap_backward(
    g, h, p, values, masks, predicted, w, room, sums, row, leaps, AT: tl.constexpr, DIMS: tl.constexpr, M: tl.constexpr,
    X: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradients of h, of p and of the values [S, M] from that of the state after the jump"""
    S: tl.constexpr = h.shape[0]
    H: tl.constexpr = h.shape[1]
    r, z, n, hn = leap(h, p, values, masks, predicted, w, room, row, leaps, AT, DIMS, M, X, C)
    of_leap = tl.where(leaps[:, None], g, 0.0)
    gn = of_leap * (1.0 - z) * (1.0 - n * n)
    gz = of_leap * (h - n) * z * (1.0 - z)
    gr = gn * hn * r * (1.0 - r)
    ghn = gn * r
    w_hh, to_hh, b_hh, b_ih = w + AT[HH], sums + AT[HH], sums + AT[HH_BIAS], sums + AT[IH_BIAS]
    gh = tl.where(leaps[:, None], g * z, g) + times(gr, room, w_hh, H, 1, H) + times(gz, room, w_hh + H * H, H, 1, H)
    gh += times(ghn, room, w_hh + 2 * H * H, H, 1, H)
    _gather(to_hh, room, gr, h, H)
    _gather(to_hh + H * H, room, gz, h, H)
    _gather(to_hh + 2 * H * H, room, ghn, h, H)
    _gather_bias(b_hh, gr)
    _gather_bias(b_hh + H, gz)
    _gather_bias(b_hh + 2 * H, ghn)
    _gather_bias(b_ih, gr)
    _gather_bias(b_ih + H, gz)
    _gather_bias(b_ih + 2 * H, gn)
    gp, gvalues = tl.zeros([S, M], g.dtype), tl.zeros([S, M], g.dtype)
    w_ih, to_ih, m = w + AT[IH], sums + AT[IH], tl.arange(0, M)
    for first in range(0, X, C):
        c = first + tl.arange(0, C)
        x = prepared(values, masks, predicted, w, row, leaps, c, AT, DIMS, M)
        _gather(to_ih + first, room, gr, x, X)
        _gather(to_ih + H * X + first, room, gz, x, X)
        _gather(to_ih + 2 * H * X + first, room, gn, x, X)
        gx = times(gr, room, w_ih + first, X, 1, C) + times(gz, room, w_ih + H * X + first, X, 1, C)
        gx = tl.where(x == 0.0, 0.0, gx + times(gn, room, w_ih + 2 * H * X + first, X, 1, C))
        seen, value, mean, logvar, error, inverse = features(values, masks, predicted, row, leaps, c, DIMS, M)
        # the weights of a channel
        d = c // DIMS[3]
        at = sums + AT[PREP] + d * 4 * DIMS[3] + c - d * DIMS[3]
        inside = c < DIMS[2] * DIMS[3]
        for_bias = sums + AT[PREP_BIAS] + c
        tl.store(for_bias, tl.load(for_bias, mask=inside) + tl.sum(gx, axis=0), mask=inside)
        tl.store(at, tl.load(at, mask=inside) + tl.sum(gx * value, axis=0), mask=inside)
        at += DIMS[3]
        tl.store(at, tl.load(at, mask=inside) + tl.sum(gx * mean, axis=0), mask=inside)
        at += DIMS[3]
        tl.store(at, tl.load(at, mask=inside) + tl.sum(gx * logvar, axis=0), mask=inside)
        at += DIMS[3]
        tl.store(at, tl.load(at, mask=inside) + tl.sum(gx * error, axis=0), mask=inside)
        # and sums over the columns of a channel: products with matrices of ones
        through = prep_weight(w, 3, c, AT, DIMS) * inverse
        of_mean = tl.where((m[None, :] == d[:, None]) & inside[:, None], 1.0, 0.0).to(g.dtype)
        of_logvar = tl.where((m[None, :] == d[:, None] + DIMS[2]) & inside[:, None], 1.0, 0.0).to(g.dtype)
        gmean = gx * (prep_weight(w, 1, c, AT, DIMS) - through)
        glogvar = gx * (prep_weight(w, 2, c, AT, DIMS) - 0.5 * prep_weight(w, 3, c, AT, DIMS) * error)
        gvalue = gx * (prep_weight(w, 0, c, AT, DIMS) + through)
        gp += tl.sum(gmean[:, :, None] * of_mean[None, :, :], axis=1)
        gp += tl.sum(glogvar[:, :, None] * of_logvar[None, :, :], axis=1)
        gvalues += tl.sum(gvalue[:, :, None] * of_mean[None, :, :], axis=1)
    return gh, gp, gvalues


@triton.jit
def _pull(
    gk, y, w, room, sums, AT: tl.constexpr, GATES: tl.constexpr, IMPUTE: tl.constexpr, P: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """The gradient of y from that of dh/dt there"""
    H: tl.constexpr = y.shape[1]
    last: tl.constexpr = GATES - 1
    slope, gate, c, u, gated, q, p = evaluate(y, w, room, AT, GATES, IMPUTE, P, M)
    w_cell, to_cell = w + AT[CELL], sums + AT[CELL]
    gu = gk * c * (1.0 - u * u)
    gc = (u - y) * gk
    gg = times(gu, room, w_cell + last * H * H, H, 1, H)
    gh = gg * gate - gk * c
    gate_in = gg * y
    if GATES == 3:
        gz = -gc * c * (1.0 - c)
        gh += times(gz, room, w_cell + H * H, H, 1, H)
        _gather(to_cell + H * H, room, gz, y, H)
    else:
        gate_in -= gc
    gate_in *= gate * (1.0 - gate)
    gh += times(gate_in, room, w_cell, H, 1, H)
    _gather(to_cell, room, gate_in, y, H)
    _gather(to_cell + last * H * H, room, gu, gated, H)
    if IMPUTE:
        w_in, to_in, b_in = w + AT[INPUT], sums + AT[INPUT], sums + AT[INPUT_BIAS]
        gp = times(gate_in, room, w_in, M, 1, M) + times(gu, room, w_in + last * H * M, M, 1, M)
        _gather(to_in, room, gate_in, p, M)
        _gather_bias(b_in, gate_in)
        _gather(to_in + last * H * M, room, gu, p, M)
        _gather_bias(b_in + last * H, gu)
        if GATES == 3:
            gp += times(gz, room, w_in + H * M, M, 1, M)
            _gather(to_in + H * M, room, gz, p, M)
            _gather_bias(b_in + H, gz)
        gh += _observe_backward(gp, q, y, w, room, sums, tl.full([1, 1], 1.0, tl.float32), AT)
    return gh


@triton.jit
def _after_rows(h, states, begins, tick, series, b, live, DIMS: tl.constexpr):
    """The states behind the rows of a tick"""
    end = tl.load(begins + (tick + 1) * series + b, mask=live, other=0)
    due = tl.load(begins + tick * series + b, mask=live, other=0) < end
    return tl.where(due[:, None], rows(states, tl.where(due, end - 1, 0), due, DIMS[0], h.shape[1]), h)


@triton.jit
def _backward(
    h0, values, masks, dropout, w, sizes, begins, jumps, method, states, gpre, gpost, gstate, gstates, gh0, gvalues,
    partial, starts, kept, k, predicted, room, series, ticks, windows, parameters,
    AT: tl.constexpr, DIMS: tl.constexpr, GATES: tl.constexpr, IMPUTE: tl.constexpr, STAGES: tl.constexpr,
    S: tl.constexpr, H: tl.constexpr, P: tl.constexpr, M: tl.constexpr, X: tl.constexpr, C: tl.constexpr,
    ROOM: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = h0.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    b = program * S + tl.arange(0, S)
    live = b < series
    sums, k, predicted = partial + program * parameters, k + program * STAGES * S * H, predicted + program * S * M
    room = room + program * ROOM
    starts, kept = starts + program * windows * S * H, kept + program * W * S * H
    begun = rows(h0, b, live, DIMS[0], H)
    h = begun
    for tick in range(0, ticks):  # the states at the start of every window, behind the rows there
        h = _after_rows(h, states, begins, tick, series, b, live, DIMS)
        if tick % W == 0:
            share(starts + tick // W * S * H, h)
        size = tl.load(sizes + tick * series + b, mask=live, other=0.0).to(T)[:, None]
        h = take_step(h, size, w, room, k, method, AT, GATES, IMPUTE, STAGES, P, M)
    g = rows(gstate, b, live, DIMS[0], H)
    at = tl.arange(0, S)[:, None] * H + tl.arange(0, H)[None, :]
    for i in range(0, ticks + 1):
        tick = ticks - i
        start = (tick + W - 1) // W * W - W  # of the window of the step to here
        if (tick > 0) & ((i == 0) | (tick % W == 0)):
            h = tl.load(starts + start // W * S * H + at)
            for again in range(start, tick):
                share(kept + (again - start) * S * H, h)
                if again + 1 < tick:
                    size = tl.load(sizes + again * series + b, mask=live, other=0.0).to(T)[:, None]
                    h = take_step(h, size, w, room, k, method, AT, GATES, IMPUTE, STAGES, P, M)
                    h = _after_rows(h, states, begins, again + 1, series, b, live, DIMS)
        # the first rows come behind a step of no size
        h = begun
        size = tl.zeros([S, 1], T)
        if tick > 0:
            h = tl.load(kept + (tick - 1 - start) * S * H + at)
            size = tl.load(sizes + (tick - 1) * series + b, mask=live, other=0.0).to(T)[:, None]
        end_of_step = take_step(h, size, w, room, k, method, AT, GATES, IMPUTE, STAGES, P, M)
        first = tl.load(begins + tick * series + b, mask=live, other=0)
        end = tl.load(begins + (tick + 1) * series + b, mask=live, other=0)
        for j in range(0, tl.max(end - first).to(tl.int32)):
            due = end - 1 - j >= first
            row = tl.where(due, end - 1 - j, 0)
            follows = due & (row > first)
            before = rows(states, tl.where(follows, row - 1, 0), follows, DIMS[0], H)
            before = tl.where(follows[:, None], before, end_of_step)
            leaps = due & (tl.load(jumps + row, mask=due, other=0) != 0)
            # the prediction after the jump, the jump, the prediction before it
            after = rows(states, row, due, DIMS[0], H)
            factor = factors(dropout, row, due, 1, DIMS[1], P)
            q, p = observe(after, w, room, factor, AT, P, M)
            gp = rows(gpost, row, leaps, 2 * DIMS[2], M)
            later = tl.where(due[:, None], g, 0.0) + rows(gstates, row, due, DIMS[0], H)
            later += _observe_backward(gp, q, after, w, room, sums, factor, AT)
            factor = factors(dropout, row, due, 0, DIMS[1], P)
            q, p = observe(before, w, room, factor, AT, P, M)
            gh, gp, gvalue = _leap_backward(
                later, before, p, values, masks, predicted, w, room, sums, row, leaps, AT, DIMS, M, X, C
            )  # fmt: skip
            put_rows(gvalues, row, due, DIMS[2], gvalue)
            gp += rows(gpre, row, due, 2 * DIMS[2], M) + rows(gpost, row, due & ~leaps, 2 * DIMS[2], M)
            gh += _observe_backward(gp, q, before, w, room, sums, factor, AT)
            g = tl.where(due[:, None], gh, g)
        # the step: k becomes the gradients from each stage
        for j in range(0, STAGES):
            stage = STAGES - 1 - j
            y = h + size * combined(k, method + STAGES * (1 + stage), 1, 0, stage, S, H)
            gk = tl.load(method + stage).to(T) * g
            gk += combined(k, method + STAGES + stage, STAGES, stage + 1, STAGES, S, H)
            share(k + stage * S * H, _pull(size * gk, y, w, room, sums, AT, GATES, IMPUTE, P, M))
        for stage in range(0, STAGES):
            g += tl.load(k + stage * S * H + at)
    put_rows(gh0, b, live, DIMS[0], g)


def gru_ode_bwd(
    h0, values, masks, dropout, params, offsets, counts, sizes, jumps, kind, impute, method, rtol, atol, max_steps,
    states, gpre, gpost, gstate, gstates, gh0, gvalues, gparams,
) -> None:  # fmt: skip
    _, table, begins = clocks(offsets, counts, sizes)
    stages, weights = weights_of(method, h0)
    programs, networks = triton.cdiv(h0.shape[0], SERIES), padded(params, h0.shape[1], impute, stages)
    constants, parameters = networks.constants, networks.flat.numel()
    windows, of_program = triton.cdiv(len(table), TICKS), SERIES * constants["H"]
    partial, total = h0.new_zeros(programs, parameters), h0.new_zeros(parameters)
    launch(
        _backward, programs, h0,
        h0, values, masks, dropout, networks.flat, table, begins, jumps, weights, states, gpre, gpost, gstate, gstates,
        gh0, gvalues, partial, h0.new_empty(programs * windows * of_program),
        h0.new_empty(programs * TICKS * of_program), h0.new_empty(programs * stages * of_program),
        h0.new_empty(programs * SERIES * constants["M"]), h0.new_empty(programs * constants["ROOM"]), h0.shape[0],
        len(table), windows, parameters,
        **constants, W=TICKS,
    )  # fmt: skip
    if programs:
        sum_partials(partial, total)
    parts = total.split([torch.Size(more).numel() for _, more in networks.shapes])
    for to, part, (own, more) in zip(gparams, parts, networks.shapes, strict=True):
        to.copy_(part.view(more)[:, : own[1], : own[2]].reshape(to.shape))
