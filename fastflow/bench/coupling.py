"""Affine coupling against the formula as people write it, and that under torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastflow import ops
from fastflow.bench.row import Contenders, Row, compiled, gradients

BIG = (256, 16, 64, 64)  # 64 MB
SMALL = (64, 6, 16, 16)  # the half that changes in the first level of a Glow for CIFAR-10


def eager(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """As in Glow: scale sigmoid(h + 2), shift and scale interleaved."""
    scale = torch.sigmoid(params[:, 1::2] + 2)
    return x * scale + params[:, 0::2], scale.log().flatten(1).sum(1)


def _in_place() -> Contenders:
    x, params = torch.randn(BIG), torch.randn(BIG[0], 2 * BIG[1], *BIG[2:])
    own, eager_own, compiled_own = x.clone(), x.clone(), x

    def eager_in_place(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.sigmoid(params[:, 1::2] + 2)
        x.mul_(scale).add_(params[:, 0::2])
        return x, scale.log_().flatten(1).sum(1)

    return {
        "fastflow": lambda: ops.affine_coupling(own, params, out=own),
        "eager": lambda: eager_in_place(eager_own, params),
        "torch.compile": compiled(eager_in_place, compiled_own, params),
    }


def _forward(shape: tuple[int, ...]) -> Contenders:
    x, params = torch.randn(shape), torch.randn(shape[0], 2 * shape[1], *shape[2:])
    return {
        "fastflow": lambda: ops.affine_coupling(x, params),
        "eager": lambda: eager(x, params),
        "torch.compile": compiled(eager, x, params),
        "reference": lambda: ops.affine_coupling(x, params, backend="reference"),
    }


def _forward_backward() -> Contenders:
    x, params = torch.randn(BIG), torch.randn(BIG[0], 2 * BIG[1], *BIG[2:])
    inputs, weights = (x, params), (torch.randn(BIG), torch.ones(BIG[0]))
    return {
        "fastflow": gradients(ops.affine_coupling, inputs, weights),
        "eager": gradients(eager, inputs, weights),
        "torch.compile": gradients(torch.compile(eager), inputs, weights),
    }


def rows() -> Iterator[Row]:
    big = 4 * torch.Size(BIG).numel()
    small = 4 * torch.Size(SMALL).numel()
    yield Row("coupling", "64 MB in place", _in_place, bytes=4 * big, targets={"floor": 0.8})
    fast = {"eager": 3.5, "torch.compile": 1.5}
    yield Row("coupling", "64 MB forward", partial(_forward, BIG), bytes=4 * big, targets=fast, demo=True)
    both = {"eager": 3.5, "torch.compile": 1.3}
    yield Row("coupling", "64 MB forward+backward", _forward_backward, bytes=11 * big, targets=both)
    fast = {"eager": 3.0, "torch.compile": 1.5}
    yield Row(
        "coupling", "[64, 6, 16, 16] interleaved", partial(_forward, SMALL), bytes=4 * small, targets=fast, demo=True
    )
