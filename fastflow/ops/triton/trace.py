"""MLP dynamics with traces in Triton: what surrounds the products of a layer, which are those of PyTorch's library.

rows [B, 1 + S, n]: every sample's value, then its S tangents, contiguous. Probes e [S, B, D] are given, or signs made
of a seed where they are used. As csrc/trace.h and csrc/philox.h.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.ops.trace_mlp import ACTIVATIONS
from fastflow.ops.triton.numeric import expm1, logistic, tanh
from fastflow.ops.triton.rows import launch

BLOCK = 1024
TANH, SOFTPLUS, ELU, SILU = map(tl.constexpr, range(len(ACTIVATIONS)))


# --- around the layers ----------------------------------------------------------------------------------


@triton.jit
def _probe(probes, probes_at, seed, s, b, d, samples, width, mask, T: tl.constexpr):
    """e[s, b, d]"""
    if probes is None:
        i = (s.to(tl.int64) * samples + b) * width + d
        counter = i >> 7
        low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
        none = tl.zeros_like(low)
        w0, w1, w2, w3 = tl.philox(seed, low, high, none, none, n_rounds=10)
        which = (i >> 5) & 3
        word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
        e = (1 - 2 * ((word >> (i & 31).to(tl.uint32)) & 1).to(tl.int32)).to(T)
    else:
        at = s.to(tl.int64) * probes_at[0] + b.to(tl.int64) * probes_at[1] + d.to(tl.int64) * probes_at[2]
        e = tl.load(probes + at, mask=mask, other=0.0)
    return e


@triton.jit(do_not_specialize=["seed"])
def _rows(
    first, first_at, factor, factor_at, probes, probes_at, seed, out, samples, rows, width,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out[b, 0] = first[b], out[b, 1 + s] = e[s, b], times factor[s, b] where there is one."""
    T: tl.constexpr = out.dtype.element_ty
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    k = program * BLOCK + tl.arange(0, BLOCK)
    q, d = k // width, k % width
    b, r = q // rows, q % rows
    valid = b < samples
    head = valid & (r == 0)
    tail = valid & (r > 0)
    value = tl.load(first + b.to(tl.int64) * first_at[0] + d * first_at[1], mask=head, other=0.0)
    e = _probe(probes, probes_at, seed, r - 1, b, d, samples, width, tail, T)
    if factor is not None:
        at = (r - 1).to(tl.int64) * factor_at[0] + b.to(tl.int64) * factor_at[1]
        e *= tl.load(factor + at, mask=tail, other=0.0)
    tl.store(out + k, tl.where(head, value, e), mask=valid)


@triton.jit(do_not_specialize=["seed"])
def _contract(
    last, bias, bias_step, probes, probes_at, seed, value, value_at, trace, samples, rows, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """value[b] = last[b, 0] + bias, trace[s, b] = last[b, 1 + s] . e[s, b]"""
    T: tl.constexpr = last.dtype.element_ty
    q = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    b, r = q // rows, q % rows
    valid = b < samples
    lanes = tl.zeros([ROWS, BLOCK], T)
    for first in range(0, width, BLOCK):
        d = first + tl.arange(0, BLOCK)[None, :]
        inside = valid & (d < width)
        head, tail = inside & (r == 0), inside & (r > 0)
        y = tl.load(last + q * width + d, mask=inside, other=0.0)
        shift = tl.load(bias + d * bias_step, mask=d < width, other=0.0)
        tl.store(value + b * value_at[0] + d * value_at[1], y + shift, mask=head)
        e = _probe(probes, probes_at, seed, r - 1, b, d, samples, width, tail, T)
        lanes += tl.where(tail, y * e, 0.0)
    q = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b, r = q // rows, q % rows
    tl.store(trace + (r - 1) * samples + b, tl.sum(lanes, axis=1), mask=(b < samples) & (r > 0))


# --- activations: of a unit, the value and then its tangents ----------------------------------------------


@triton.jit
def activate(a, KIND: tl.constexpr):
    """(phi(a), phi'(a))"""
    if KIND == TANH:
        y = tanh(a)
        d = 1.0 - y * y
    elif KIND == SOFTPLUS:
        d, complement, y, q = logistic(a)
    elif KIND == ELU:
        positive = a > 0.0
        low = expm1(tl.where(positive, 0.0, a))
        y = tl.where(positive, a, low)
        d = tl.where(positive, 1.0, low + 1.0)
    else:  # a sigmoid(a)
        sigmoid, complement, softplus, q = logistic(a)
        y = a * sigmoid
        d = sigmoid * (1.0 + a * complement)
    return y, d


@triton.jit
def _curve(kept, KIND: tl.constexpr):
    """phi'(a), and c with phi''(a) a' = c times the kept tangent: y' of the output y, of silu a' of the input a"""
    if KIND == TANH:
        d = 1.0 - kept * kept
        c = -2.0 * kept
    elif KIND == SOFTPLUS:  # e^-y = 1 - sigmoid(a)
        d = -expm1(-kept)
        c = 1.0 - d
    elif KIND == ELU:
        d = tl.where(kept > 0.0, 1.0, kept + 1.0)
        c = tl.where(kept > 0.0, 0.0, tl.zeros_like(kept) + 1.0)
    else:
        sigmoid, complement, softplus, q = logistic(kept)
        d = sigmoid * (1.0 + kept * complement)
        c = sigmoid * complement * (2.0 + kept * (complement - sigmoid))
    return d, c


@triton.jit
def _units(samples, rows, width, BLOCK: tl.constexpr):
    """(unit, where its value is in the rows, which exist)"""
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b = k // width
    j = k - b * width
    return j, b * rows * width + j, b < samples


@triton.jit
def _forward(a, bias, bias_step, z, samples, rows, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """z = phi(a + bias), z' = phi'(a + bias) a'; of silu, a becomes a + bias."""
    j, at, valid = _units(samples, rows, width, BLOCK)
    value = tl.load(a + at, mask=valid, other=0.0) + tl.load(bias + j * bias_step, mask=valid, other=0.0)
    y, d = activate(value, KIND)
    if KIND == SILU:
        tl.store(a + at, value, mask=valid)
    tl.store(z + at, y, mask=valid)
    for _ in range(1, rows):
        at += width
        tl.store(z + at, d * tl.load(a + at, mask=valid, other=0.0), mask=valid)


@triton.jit
def _backward(kept, g, y, samples, rows, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients g of (y, y') become those of (a, a'); of silu, y is made again."""
    j, start, valid = _units(samples, rows, width, BLOCK)
    value = tl.load(kept + start, mask=valid, other=0.0)
    d, c = _curve(value, KIND)
    if KIND == SILU:
        again, slope = activate(value, KIND)
        tl.store(y + start, again, mask=valid)
    total = tl.zeros_like(value)
    at = start
    for _ in range(1, rows):
        at += width
        tangent = tl.load(kept + at, mask=valid, other=0.0)
        of_tangent = tl.load(g + at, mask=valid, other=0.0)
        total += tangent * of_tangent
        tl.store(g + at, d * of_tangent, mask=valid)
        if KIND == SILU:
            tl.store(y + at, d * tangent, mask=valid)
    tl.store(g + start, d * tl.load(g + start, mask=valid, other=0.0) + c * total, mask=valid)


# --- what the ops call --------------------------------------------------------------------------------


def _of_probes(probes: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if probes is None else probes.stride()


def _stack(first: Tensor, factor: Tensor | None, probes: Tensor | None, seed: int, out: Tensor) -> None:
    launch(
        _rows, -(-out.numel() // BLOCK), out,
        first, first.stride(), factor, (0, 0) if factor is None else factor.stride(), probes, _of_probes(probes), seed,
        out, *out.shape, BLOCK=BLOCK, WIDE=out.numel() + BLOCK >= 2**31, warps=4,
    )  # fmt: skip


def trace_rows(x: Tensor, probes: Tensor | None, seed: int, rows: Tensor) -> None:
    _stack(x, None, probes, seed, rows)


def trace_rows_bwd(gvalue: Tensor, gtrace: Tensor, probes: Tensor | None, seed: int, g: Tensor) -> None:
    _stack(gvalue, gtrace, probes, seed, g)


def trace_contract(last: Tensor, bias: Tensor, probes: Tensor | None, seed: int, value: Tensor, trace: Tensor) -> None:
    samples, rows, width = last.shape
    block = min(BLOCK, triton.next_power_of_2(max(width, 1)))
    each = BLOCK // block
    launch(
        _contract, -(-samples * rows // each), last,
        last, bias, bias.stride(0), probes, _of_probes(probes), seed, value, value.stride(), trace, *last.shape,
        ROWS=each, BLOCK=block, warps=4,
    )  # fmt: skip


def trace_layer_fwd(
    y: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, z: Tensor | None, activation: int
) -> None:
    """a = y W^T, then value and tangents of the activation: z = phi(a + bias); no activation where z is not given."""
    torch.mm(y.flatten(0, 1), weight.t(), out=a.view(-1, a.shape[2]))
    if z is not None:
        units = a.shape[0] * a.shape[2]
        launch(
            _forward, -(-units // BLOCK), a, a, bias, bias.stride(0), z, *a.shape, KIND=activation, BLOCK=BLOCK, warps=4
        )  # fmt: skip


def trace_layer_bwd(
    g: Tensor, weight: Tensor, kept: Tensor | None, y: Tensor, gweight: Tensor, previous: Tensor, activation: int
) -> None:
    """From g of a layer's a [B, 1 + S, m] to gW = g^T y [m, n] and g of the a before, or of x where nothing is kept."""
    if kept is None:  # x has a gradient, the probes have none
        torch.mm(g[:, 0], weight, out=previous)
    else:
        torch.mm(g.flatten(0, 1), weight, out=previous.view(-1, previous.shape[2]))
        units = kept.shape[0] * kept.shape[2]
        launch(
            _backward, -(-units // BLOCK), kept, kept, previous, y, *kept.shape, KIND=activation, BLOCK=BLOCK, warps=4
        )  # fmt: skip
    torch.mm(g.flatten(0, 1).t(), y.flatten(0, 1), out=gweight)
