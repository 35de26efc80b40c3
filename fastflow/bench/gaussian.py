"""Split-prior log-likelihood against the formula as people write it, and that under torch.compile."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastflow import ops
from fastflow.bench.row import Contenders, Row, compiled

BIG = (256, 16, 64, 64)  # 64 MB
SMALL = (64, 12, 8, 8)


def eager(z: Tensor, params: Tensor) -> Tensor:
    """As in Glow: mean and log scale interleaved."""
    mean, log_scale = params[:, 0::2], params[:, 1::2]
    terms = -log_scale - 0.5 * ((z - mean) * torch.exp(-log_scale)) ** 2 - 0.5 * math.log(2 * math.pi)
    return terms.flatten(1).sum(1)


def _make(shape: tuple[int, ...]) -> Contenders:
    z, params = torch.randn(shape), torch.randn(shape[0], 2 * shape[1], *shape[2:])
    return {
        "fastflow": lambda: ops.gaussian_log_prob(z, params),
        "eager": lambda: eager(z, params),
        "torch.compile": compiled(eager, z, params),
        "reference": lambda: ops.gaussian_log_prob(z, params, backend="reference"),
    }


def rows() -> Iterator[Row]:
    targets = {"eager": 4.0, "torch.compile": 1.3}
    for name, shape in (("64 MB", BIG), ("[64, 12, 8, 8]", SMALL)):
        count = 3 * 4 * math.prod(shape)
        yield Row("gaussian", f"log-likelihood {name}", partial(_make, shape), bytes=count, targets=targets, demo=True)
