"""Split-prior log-likelihood against the formula as people write it, and that under torch.compile."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from fastflow import ops
from fastflow.bench.row import CPU, GPU_TUNED, Contenders, Row, contenders, words

BIG = (256, 16, 64, 64)  # 64 MB
SMALL = (64, 12, 8, 8)


def eager(z: Tensor, params: Tensor) -> Tensor:
    """As in Glow: mean and log scale interleaved."""
    mean, log_scale = params[:, 0::2], params[:, 1::2]
    terms = -log_scale - 0.5 * ((z - mean) * torch.exp(-log_scale)) ** 2 - 0.5 * math.log(2 * math.pi)
    return terms.flatten(1).sum(1)


def _make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, more: Sequence[str] = CPU) -> Contenders:
    z, params = torch.randn(shape, dtype=dtype), torch.randn(shape[0], 2 * shape[1], *shape[2:], dtype=dtype)
    return contenders(ops.gaussian_log_prob, eager, (z, params), more=more)


def rows() -> Iterator[Row]:
    targets = {"eager": 4.0, "torch.compile": 1.3}
    for name, shape in (("64 MB", BIG), ("[64, 12, 8, 8]", SMALL)):
        count = 3 * 4 * math.prod(shape)
        yield Row("gaussian", f"log-likelihood {name}", partial(_make, shape), bytes=count, targets=targets, demo=True)


def gpu_rows(size: int) -> Iterator[Row]:
    """z of ``size`` bytes."""
    for dtype in (torch.float32, torch.bfloat16):
        shape = (max(1, size // (dtype.itemsize * math.prod(BIG[1:]))), *BIG[1:])
        make, count = partial(_make, shape, dtype, GPU_TUNED), 3 * dtype.itemsize * math.prod(shape)
        name = f"log-likelihood {words(size, dtype)}"
        yield Row("gaussian", name, make, bytes=count, targets={"floor": 0.85})
