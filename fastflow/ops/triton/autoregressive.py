"""The inverse of an autoregressive layer in one sweep, and the reverse of that sweep: a program takes a few samples
through all degrees.

Values lie in scratch, [units, S] for every program; what one step wrote the next reads behind a barrier. In the reverse
sweep all is counted from its end, which makes it the same sweep. As csrc/cuda/autoregressive.cu.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.ops import masked
from fastflow.ops.autoregressive import FORMS
from fastflow.ops.masked import ACTIVATIONS, weight_grad_by_library
from fastflow.ops.scale_map import kernel_map
from fastflow.ops.triton.numeric import exp, logistic
from fastflow.ops.triton.rows import launch
from fastflow.ops.triton.scale_map import multiplier, scale_slope
from fastflow.ops.triton.trace import activate

__all__ = ["autoregressive_bwd", "autoregressive_fwd", "masked_weight_bwd"]

SAMPLES, ROWS, DEPTH = 16, 4, 32  # of a program; units and inputs of a product
SCALE_FIRST, SHIFT_FIRST, GATE, BERNOULLI = map(tl.constexpr, range(len(FORMS)))
RELU = tl.constexpr(ACTIVATIONS.index("relu"))
# a row of the table of layers: where its weights start, their strides, its rows, where its values and inputs are in
# scratch, its first row in `saved`, its first start
FIELDS = tl.constexpr(8)


@triton.jit
def _activate(a, KIND: tl.constexpr):
    """(phi(a), phi'(a)); NaN stays NaN"""
    if KIND == RELU:
        y = tl.where(a < 0.0, 0.0, a)
        d = tl.where(a <= 0.0, 0.0, 1.0).to(a.dtype)
    else:
        y, d = activate(a, KIND - 1)  # those of a trace, which come in the same order
    return y, d


@triton.jit
def _products(weight, row, column, i, valid, values, count, S: tl.constexpr, K: tl.constexpr, T: tl.constexpr):
    """[R, S]: the rows i of a matrix times the first `count` values."""
    R: tl.constexpr = i.shape[0]
    total = tl.zeros([R, K, S], T)
    s = tl.arange(0, S)
    for first in range(0, count, K):
        k = first + tl.arange(0, K)
        inside = valid[:, None] & (k < count)[None, :]
        w = tl.load(weight + i[:, None] * row + k[None, :] * column, mask=inside, other=0.0)
        v = tl.load(values + k[:, None] * S + s[None, :], mask=(k < count)[:, None], other=0.0)
        total += w[:, :, None] * v[None, :, :]
    return tl.sum(total, axis=1)


@triton.jit
def _known(counts, layer, d, steps, units, each, HIDDEN: tl.constexpr, MIRRORED: tl.constexpr):
    """How many units of hidden layer `layer` - 1, or of the inputs (0), are known after step d."""
    found = each * d
    if layer > 0:
        if MIRRORED:
            at = counts + (HIDDEN - layer) * (steps + 1) + (steps - d - 1)
            found = units - tl.load(at, mask=d < steps, other=0).to(tl.int32)
        else:
            found = tl.load(counts + (layer - 1) * (steps + 1) + d).to(tl.int32)
    return found


@triton.jit
def _row(sums, which: tl.constexpr):
    """One row [S] of [R, S]."""
    r = tl.arange(0, sums.shape[0])
    return tl.sum(tl.where((r == which)[:, None], sums, 0.0), axis=0)


@triton.jit
def _forward(
    z, z_at, x, x_at, logdet, saved, outputs, weights, starts, starts_width, direct, direct_at, counts, table, scratch,
    samples, steps, scratch_rows,
    HIDDEN: tl.constexpr, EACH: tl.constexpr, KIND: tl.constexpr, RESIDUAL: tl.constexpr, FORM: tl.constexpr,
    SHIFT: tl.constexpr, MAP: tl.constexpr, CONSTANTS: tl.constexpr, RECIPROCAL: tl.constexpr, S: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = scratch.dtype.element_ty
    s = tl.arange(0, S)
    b = tl.program_id(0).to(tl.int64) * S + s
    live = b < samples
    sums = scratch + tl.program_id(0).to(tl.int64) * 2 * scratch_rows * S
    values = sums + scratch_rows * S
    total = tl.zeros([S], tl.float64)
    for d in range(0, steps + 1):
        if d > 0:
            at = table + HIDDEN * FIELDS
            i = (d - 1) * EACH + tl.arange(0, EACH)
            valid = i < d * EACH
            units = tl.load(table + (HIDDEN - 1) * FIELDS + 3).to(tl.int32) if HIDDEN > 0 else steps
            count = _known(counts, HIDDEN, d - 1, steps, units, 1, HIDDEN, False)
            inputs = values + tl.load(at + 5) * S
            found = _products(
                weights + tl.load(at), tl.load(at + 1), tl.load(at + 2), i, valid, inputs, count, S, K, T
            )  # fmt: skip
            if direct is not None:
                found += _products(direct, direct_at[0], direct_at[1], i, valid, values, d - 1, S, K, T)
            where = starts + b[None, :] * starts_width + tl.load(at + 7) + i[:, None]
            found += tl.load(where, mask=valid[:, None] & live[None, :], other=0.0)
            if outputs is not None:
                tl.store(outputs + i[:, None].to(tl.int64) * samples + b[None, :], found, mask=live[None, :])
            given = tl.load(z + b * z_at[0] + (d - 1) * z_at[1], mask=live, other=0.0)
            t = _row(found, SHIFT)
            if FORM == BERNOULLI:
                sigmoid, complement, softplus, q = logistic(t)
                solved = tl.where(given < sigmoid, 1.0, 0.0).to(T)
                part = solved * t - softplus
            else:
                h = _row(found, 1 - SHIFT)
                log_s, scale, slope, damplitude = scale_slope(h, tl.zeros_like(h) + CONSTANTS[2], MAP, CONSTANTS)
                part = log_s if RECIPROCAL else -log_s
                if FORM == GATE:
                    solved = given + (given - t) * exp(-(CONSTANTS[0] * h + CONSTANTS[1]))
                else:
                    m = multiplier(log_s, scale, not RECIPROCAL, MAP)
                    solved = given * m - t if FORM == SHIFT_FIRST else (given - t) * m
            total += part.to(tl.float64)
            tl.store(values + (d - 1) * S + s, solved)
            tl.store(x + b * x_at[0] + (d - 1) * x_at[1], solved, mask=live)
            tl.debug_barrier()
        for layer in range(HIDDEN):
            at = table + layer * FIELDS
            offset, inputs = tl.load(at + 4), values + tl.load(at + 5) * S
            units = tl.load(at + 3).to(tl.int32)
            begin = _known(counts, layer + 1, d - 1, steps, units, 1, HIDDEN, False) if d > 0 else 0
            end = _known(counts, layer + 1, d, steps, units, 1, HIDDEN, False)
            count = _known(counts, layer, d, steps, units, 1, HIDDEN, False)
            for first in range(begin, end, R):
                i = first + tl.arange(0, R)
                valid = i < end
                a = _products(
                    weights + tl.load(at), tl.load(at + 1), tl.load(at + 2), i, valid, inputs, count, S, K, T
                )  # fmt: skip
                where = starts + b[None, :] * starts_width + tl.load(at + 7) + i[:, None]
                a += tl.load(where, mask=valid[:, None] & live[None, :], other=0.0)
                mine = (offset + i)[:, None] * S + s[None, :]
                if RESIDUAL:
                    if (layer >= 2) & (layer % 2 == 0):
                        before = tl.load(table + (layer - 2) * FIELDS + 4)
                        a += tl.load(sums + (before + i)[:, None] * S + s[None, :], mask=valid[:, None], other=0.0)
                    tl.store(sums + mine, a, mask=valid[:, None])
                if saved is not None:
                    kept = saved + (tl.load(at + 6) + i)[:, None] * samples + b[None, :]
                    tl.store(kept, a, mask=valid[:, None] & live[None, :])
                y, slope = _activate(a, KIND)
                if RESIDUAL:
                    y = tl.where(layer == HIDDEN - 1, a, y)
                tl.store(values + mine, y, mask=valid[:, None])
            tl.debug_barrier()
    tl.store(logdet + b, total.to(T), mask=live)


@triton.jit
def _backward(
    x, x_at, z, z_at, gx, gx_at, gz, gz_at, glogdet, glogdet_step, saved, outputs, ga, goutputs, weights, direct,
    direct_at, counts, table, scratch, samples, steps, scratch_rows,
    HIDDEN: tl.constexpr, EACH: tl.constexpr, KIND: tl.constexpr, RESIDUAL: tl.constexpr, FORM: tl.constexpr,
    SHIFT: tl.constexpr, MAP: tl.constexpr, CONSTANTS: tl.constexpr, RECIPROCAL: tl.constexpr, S: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = scratch.dtype.element_ty
    s = tl.arange(0, S)
    b = tl.program_id(0).to(tl.int64) * S + s
    live = b < samples
    values = scratch + tl.program_id(0).to(tl.int64) * scratch_rows * S
    one = tl.arange(0, 1)
    for step in range(0, steps + 1):
        if step > 0:
            d = steps - step
            at = table + HIDDEN * FIELDS
            i = step - 1 + one
            units = tl.load(table + (HIDDEN - 1) * FIELDS + 3).to(tl.int32) if HIDDEN > 0 else steps
            count = _known(counts, HIDDEN, step - 1, steps, units, EACH, HIDDEN, True)
            inputs = values + tl.load(at + 5) * S
            found = _products(
                weights + tl.load(at), tl.load(at + 1), tl.load(at + 2), i, one == 0, inputs, count, S, K, T
            )  # fmt: skip
            if direct is not None:
                found += _products(
                    direct, direct_at[0], direct_at[1], i, one == 0, values, EACH * (step - 1), S, K, T
                )  # fmt: skip
            g = tl.sum(found, axis=0) + tl.load(gx + b * gx_at[0] + d * gx_at[1], mask=live, other=0.0)
            g_logdet = tl.load(glogdet + b * glogdet_step, mask=live, other=0.0)
            of_t, of_h = (d * EACH + SHIFT).to(tl.int64), (d * EACH + 1 - SHIFT).to(tl.int64)
            t = tl.load(outputs + of_t * samples + b, mask=live, other=0.0)
            h = tl.load(outputs + of_h * samples + b, mask=live, other=0.0)
            log_s, scale, slope, damplitude = scale_slope(h, tl.zeros_like(h) + CONSTANTS[2], MAP, CONSTANTS)
            slope = slope if RECIPROCAL else -slope
            if FORM == GATE:
                given = tl.load(z + b * z_at[0] + d * z_at[1], mask=live, other=0.0)
                odds = exp(-(CONSTANTS[0] * h + CONSTANTS[1]))
                g_z = g + g * odds
                g_t = -g * odds
                g_h = g_logdet * slope - g * CONSTANTS[0] * (given - t) * odds
            else:
                solved = tl.load(x + b * x_at[0] + d * x_at[1], mask=live, other=0.0)
                g_z = g * multiplier(log_s, scale, not RECIPROCAL, MAP)
                g_t = -g if FORM == SHIFT_FIRST else -g_z
                g_h = slope * (g * (solved + t if FORM == SHIFT_FIRST else solved) + g_logdet)
            tl.store(gz + b * gz_at[0] + d * gz_at[1], g_z, mask=live)
            tl.store(goutputs + of_t * samples + b, g_t, mask=live)
            tl.store(goutputs + of_h * samples + b, g_h, mask=live)
            last = steps * EACH - 1  # counted from the end
            tl.store(values + (last - d * EACH - SHIFT) * S + s, g_t)
            tl.store(values + (last - d * EACH - 1 + SHIFT) * S + s, g_h)
            tl.debug_barrier()
        for layer in range(HIDDEN):
            at = table + layer * FIELDS
            offset, inputs = tl.load(at + 4), values + tl.load(at + 5) * S
            units = tl.load(at + 3).to(tl.int32)
            below = tl.load(at + 3 - FIELDS, mask=layer > 0, other=0).to(tl.int32)
            begin = _known(counts, layer + 1, step - 1, steps, units, EACH, HIDDEN, True) if step > 0 else 0
            end = _known(counts, layer + 1, step, steps, units, EACH, HIDDEN, True)
            count = _known(counts, layer, step, steps, below, EACH, HIDDEN, True)
            of = HIDDEN - 1 - layer
            for first in range(begin, end, R):
                i = first + tl.arange(0, R)
                valid = i < end
                g = _products(
                    weights + tl.load(at), tl.load(at + 1), tl.load(at + 2), i, valid, inputs, count, S, K, T
                )  # fmt: skip
                place = (tl.load(at + 6) + units - 1 - i)[:, None] * samples + b[None, :]
                mask = valid[:, None] & live[None, :]
                y, slope = _activate(tl.load(saved + place, mask=mask, other=0.0), KIND)
                if RESIDUAL:
                    slope = tl.where(of == HIDDEN - 1, 1.0, slope)
                g *= slope
                if RESIDUAL:
                    if (of % 2 == 0) & (of + 2 < HIDDEN):
                        before = tl.load(table + (layer - 2) * FIELDS + 4)
                        g += tl.load(values + (before + i)[:, None] * S + s[None, :], mask=valid[:, None], other=0.0)
                tl.store(values + (offset + i)[:, None] * S + s[None, :], g, mask=valid[:, None])
                tl.store(ga + place, g, mask=mask)
            tl.debug_barrier()


# --- what the ops call --------------------------------------------------------------------------------


@functools.lru_cache(1024)
def _table(widths: tuple[int, ...], mirrored: bool, device: torch.device) -> tuple[Tensor, int]:
    """The table of layers with inputs and outputs of these widths, int64, and how many values the scratch has."""
    layers, start, flat = [], 0, 0
    for n, m in zip(widths, widths[1:], strict=False):
        layers.append([flat, n, 1, m, 0, 0, start, start])
        flat, start = flat + n * m, start + m
    if mirrored:
        layers = [
            [first + n * m - 1, -1, -n, n, 0, 0, before - n, 0] for first, n, _, m, *_, before in reversed(layers)
        ]
    inputs, offset = 0, widths[-1] if mirrored else widths[0]
    for layer in layers:
        layer[4], layer[5] = offset, inputs
        inputs, offset = offset, offset + layer[3]
    return torch.tensor(layers, dtype=torch.int64, device=device), offset


def _widths(weights: list[Tensor]) -> tuple[int, ...]:
    return (weights[0].shape[1], *(w.shape[0] for w in weights))


def _options(weights: list[Tensor], activation: int, residual: bool, step: tuple[Any, ...]) -> dict[str, Any]:
    form, swapped, kind, reciprocal, constants = step
    each = 1 if form == BERNOULLI.value else 2
    kind, constants = kernel_map(kind, constants)
    return {
        "HIDDEN": len(weights) - 1, "EACH": each, "KIND": activation, "RESIDUAL": residual, "FORM": form,
        "SHIFT": int(swapped and each == 2), "MAP": kind, "CONSTANTS": constants, "RECIPROCAL": reciprocal,
        "S": SAMPLES, "R": ROWS, "K": DEPTH,
    }  # fmt: skip


def autoregressive_fwd(z, weights, starts, counts, direct, activation, residual, *rest: Any) -> None:
    *step, x, logdet, saved, outputs = rest
    samples, variables = z.shape
    table, rows = _table(_widths(weights), False, z.device)
    flat = torch.cat([w.reshape(-1) for w in weights])
    begin = torch.cat([s.expand(samples, -1) for s in masked.rows(starts)], 1)
    programs = -(-samples // SAMPLES)
    launch(
        _forward, programs, z,
        z, z.stride(), x, x.stride(), logdet, saved, outputs, flat, begin, begin.shape[1], direct,
        (0, 0) if direct is None else direct.stride(), counts.contiguous(), table,
        z.new_empty(programs * 2 * rows * SAMPLES), samples, variables, rows,
        **_options(weights, activation, residual, step), warps=4,
    )  # fmt: skip


def autoregressive_bwd(x, z, weights, counts, direct, activation, residual, *rest: Any) -> None:
    *step, saved, outputs, gx, glogdet, gz, ga, goutputs = rest
    samples, variables = x.shape
    table, rows = _table(_widths(weights), True, x.device)
    flat = torch.cat([w.reshape(-1) for w in weights])
    programs = -(-samples // SAMPLES)
    mirrored, strides = direct, (0, 0)
    if direct is not None:  # counted from its end, and transposed
        mirrored = direct.flip(0, 1).t().contiguous()
        strides = mirrored.stride()
    launch(
        _backward, programs, x,
        x, x.stride(), z, z.stride(), gx, gx.stride(), gz, gz.stride(), glogdet, glogdet.stride(0), saved, outputs, ga,
        goutputs, flat, mirrored, strides, counts.contiguous(), table, x.new_empty(programs * rows * SAMPLES), samples,
        variables, rows, **_options(weights, activation, residual, step), warps=4,
    )  # fmt: skip


masked_weight_bwd = weight_grad_by_library
