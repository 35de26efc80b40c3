"""A WaveNet in Triton: the gate of its layers, between products of the library; generation, a program for a stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.ops.triton.numeric import exp, logistic, tanh
from fastflow.ops.triton.rows import launch

BLOCK = 512


@triton.jit
def _forward(acts, z, rows, gated, z_row, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, i = n // z_row, n % z_row
    inside = (row < rows) & (i < gated)
    at = acts + row * 2 * gated + i
    t = tanh(tl.load(at, mask=inside, other=0.0))
    s = logistic(tl.load(at + gated, mask=inside, other=0.0))[0]
    tl.store(z + n, tl.where(i < gated, t * s, tl.where(i == gated, 1.0, 0.0)), mask=row < rows)


@triton.jit
def _backward(acts, gz, z, rows, gated, z_row, BLOCK: tl.constexpr):
    """acts becomes its gradient, z is made again"""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, i = n // z_row, n % z_row
    inside = (row < rows) & (i < gated)
    at = acts + row * 2 * gated + i
    t = tanh(tl.load(at, mask=inside, other=0.0))
    s = logistic(tl.load(at + gated, mask=inside, other=0.0))[0]
    g = tl.load(gz + row * gated + i, mask=inside, other=0.0)
    tl.store(at, g * s * (1.0 - t * t), mask=inside)
    tl.store(at + gated, g * t * s * (1.0 - s), mask=inside)
    tl.store(z + n, tl.where(i < gated, t * s, tl.where(i == gated, 1.0, 0.0)), mask=row < rows)


# --- generation: vectors go through memory, a barrier after every product --------------------------------


@triton.jit
def _product(x, depth, w, w_row, columns, T: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    """sum over k of x[k] w[k, :]"""
    c = tl.arange(0, C)
    total = tl.zeros([C], T)
    for first in range(0, depth, K):
        k = first + tl.arange(0, K)
        row = tl.load(x + k, mask=k < depth, other=0.0)
        inside = (k < depth)[:, None] & (c < columns)[None, :]
        total += tl.sum(row[:, None] * tl.load(w + k[:, None] * w_row + c[None, :], mask=inside, other=0.0), axis=0)
    return total


@triton.jit
def _draw(logits, levels, sharpness, u, T: tl.constexpr, V: tl.constexpr):
    """The first code at which the sum of e^(sharpness (logit - max)) exceeds u times the total, the likeliest for
    sharpness 0; -1 where a logit is not finite."""
    k = tl.arange(0, V)
    inside = k < levels
    largest = tl.max(tl.where(inside, logits, -float("inf")), axis=0)
    bad = tl.sum((inside & (logits != logits)).to(tl.int32), axis=0) + (largest - largest != 0.0).to(tl.int32)
    if sharpness > 0:
        weights = tl.where(inside, exp((logits - largest) * sharpness.to(T)), 0.0)
        sums = tl.cumsum(weights.to(tl.float64), axis=0)
        target = u * tl.sum(tl.where(k == V - 1, sums, 0.0), axis=0)
        code = tl.sum((inside & (sums <= target)).to(tl.int32), axis=0)
    else:
        code = tl.min(tl.where(inside & (logits == largest), k, V), axis=0)
    return tl.where(bad > 0, -1, tl.minimum(code, levels - 1)).to(tl.int64)


@triton.jit
def _generate(
    embedding, gate, bias, bias_layer, bias_sample, residual, skip, hidden, output, context, past, recent, uniforms,
    codes, logits, dilations, scratch, sharpness, layers, width, channels, gated, skipped, heads, levels, padded,
    features, taps, steps, position, rows,
    KEEP: tl.constexpr, K: tl.constexpr, R: tl.constexpr, D: tl.constexpr, S: tl.constexpr, H: tl.constexpr,
    V: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = past.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    depth = width * channels + features
    r, d, s, h, v = tl.arange(0, R), tl.arange(0, D), tl.arange(0, S), tl.arange(0, H), tl.arange(0, V)
    # a layer's inputs, its gated row, the skips, the head's hidden units, each but the first with a one at its end
    inputs = scratch + b * (depth + gated + skipped + heads + 3)
    z = inputs + depth
    to_head = z + gated + 1
    inner = to_head + skipped + 1
    for n in tl.static_range(3):
        tl.store((z + gated) if n == 0 else ((to_head + skipped) if n == 1 else (inner + heads)), 1.0)
    own, last = past + b * rows * channels, recent + b * taps
    for step in range(steps):
        now, at = position + step, b * steps + step
        x = tl.zeros([R], T)
        for k in range(taps):
            code = tl.load(last + k)
            row = embedding + (k * levels + tl.maximum(code, 0)) * channels
            x += tl.load(row + r, mask=(r < channels) & (code >= 0), other=0.0)
        total = tl.zeros([S], T)
        ring = own
        for layer in range(layers):
            dilation = tl.load(dilations + layer)
            history = (width - 1) * dilation
            for k in range(width - 1):
                tap = tl.load(ring + (now + k * dilation) % history * channels + r, mask=r < channels, other=0.0)
                tl.store(inputs + k * channels + r, tap, mask=r < channels)
            tl.store(inputs + (width - 1) * channels + r, x, mask=r < channels)
            if F > 0:
                f = tl.arange(0, F)
                c = tl.load(context + at * features + f, mask=f < features, other=0.0)
                tl.store(inputs + width * channels + f, c, mask=f < features)
            tl.debug_barrier()  # the taps are read, the inputs written
            if history > 0:
                tl.store(ring + now % history * channels + r, x, mask=r < channels)
            ring += history * channels
            w, start = gate + layer * depth * 2 * gated, bias + layer * bias_layer + b * bias_sample
            a = tl.load(start + d, mask=d < gated, other=0.0) + _product(inputs, depth, w, 2 * gated, gated, T, K, D)
            g = tl.load(start + gated + d, mask=d < gated, other=0.0)
            g += _product(inputs, depth, w + gated, 2 * gated, gated, T, K, D)
            tl.store(z + d, tanh(a) * logistic(g)[0], mask=d < gated)
            tl.debug_barrier()
            x += _product(z, gated + 1, residual + layer * (gated + 1) * channels, channels, channels, T, K, R)
            total += _product(z, gated + 1, skip + layer * (gated + 1) * skipped, skipped, skipped, T, K, S)
            tl.debug_barrier()  # z and the inputs are read
        tl.store(to_head + s, tl.where(total < 0.0, 0.0, total), mask=s < skipped)
        tl.debug_barrier()
        a = _product(to_head, skipped + 1, hidden, heads, heads, T, K, H)
        tl.store(inner + h, tl.where(a < 0.0, 0.0, a), mask=h < heads)
        tl.debug_barrier()
        found = _product(inner, heads + 1, output, padded, padded, T, K, V)
        if KEEP:
            tl.store(logits + at * levels + v, found, mask=v < levels)
        code = _draw(found, levels, tl.load(sharpness), tl.load(uniforms + at), T, V)
        tl.store(codes + at, code)
        for k in range(taps - 1):
            moved = tl.load(last + k + 1)
            tl.debug_barrier()
            tl.store(last + k, moved)
        tl.debug_barrier()
        tl.store(last + taps - 1, code)
        tl.debug_barrier()


# --- what the ops call --------------------------------------------------------------------------------


def _sizes(acts: Tensor, z: Tensor) -> tuple[int, int, int]:
    return z.shape[0] * z.shape[1], acts.shape[2] // 2, z.shape[2]


def wavenet_gate_fwd(acts: Tensor, z: Tensor) -> None:
    launch(_forward, -(-z.numel() // BLOCK), z, acts, z, *_sizes(acts, z), BLOCK=BLOCK, warps=4)


def wavenet_gate_bwd(acts: Tensor, gz: Tensor, z: Tensor) -> None:
    launch(_backward, -(-z.numel() // BLOCK), z, acts, gz, z, *_sizes(acts, z), BLOCK=BLOCK, warps=4)


def wavenet_generate(
    embedding: Tensor, gate: Tensor, bias: Tensor, residual: Tensor, skip: Tensor, hidden: Tensor, output: Tensor,
    context: Tensor | None, past: Tensor, recent: Tensor, uniforms: Tensor, dilations: Sequence[int], position: int,
    temperature: float, codes: Tensor, logits: Tensor | None,
) -> None:  # fmt: skip
    """Where a logit is not finite the codes are -1 from there on."""
    (taps, levels, channels), (layers, depth, both), heads = embedding.shape, gate.shape, hidden.shape[1]
    features, skipped, gated = 0 if context is None else context.shape[2], skip.shape[2], both // 2
    scratch = past.new_empty((len(past), depth + gated + skipped + heads + 3))
    sharpness = torch.tensor(1 / temperature if temperature else 0.0, dtype=torch.float64, device=past.device)
    every = torch.tensor(list(dilations), dtype=torch.int32, device=past.device)
    blocks = {
        name: triton.next_power_of_2(n) if n else 0
        for name, n in zip("RDSHVF", (channels, gated, skipped, heads, output.shape[1], features), strict=True)
    }
    launch(
        _generate, len(codes) if codes.numel() else 0, past,
        embedding, gate, bias, bias.stride(0), bias.stride(1), residual, skip, hidden, output, context, past, recent,
        uniforms, codes, logits, every, scratch, sharpness, layers, (depth - features) // channels, channels, gated,
        skipped, heads, levels, output.shape[1], features, taps, codes.shape[1], position, past.shape[1],
        KEEP=logits is not None, K=16, **blocks, warps=4,
    )  # fmt: skip
