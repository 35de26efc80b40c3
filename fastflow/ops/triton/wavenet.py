"""The gate of a WaveNet's layers in Triton; the products around it are the library's. It has no kernel to generate."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastflow.ops.triton.numeric import logistic, tanh
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


# --- what the ops call --------------------------------------------------------------------------------


def _sizes(acts: Tensor, z: Tensor) -> tuple[int, int, int]:
    return z.shape[0] * z.shape[1], acts.shape[2] // 2, z.shape[2]


def wavenet_gate_fwd(acts: Tensor, z: Tensor) -> None:
    launch(_forward, -(-z.numel() // BLOCK), z, acts, z, *_sizes(acts, z), BLOCK=BLOCK, warps=4)


def wavenet_gate_bwd(acts: Tensor, gz: Tensor, z: Tensor) -> None:
    launch(_backward, -(-z.numel() // BLOCK), z, acts, gz, z, *_sizes(acts, z), BLOCK=BLOCK, warps=4)
