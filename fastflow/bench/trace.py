"""Hutchinson's estimate with the value of the dynamics, against autograd's VJP with create_graph as FFJORD has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow import ops
from fastflow.bench.row import Contenders, Row, gradients


def dynamics(x: Tensor, t: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Layers with time as the first input, tanh between them."""
    time = t.expand(len(x), 1)
    for i in range(0, len(params), 2):
        x = F.linear(torch.cat([time, x], 1), params[i], params[i + 1])
        x = torch.tanh(x) if i + 2 < len(params) else x
    return x


def eager(x: Tensor, t: Tensor, probes: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
    value = dynamics(x, t, params)
    (vjp,) = torch.autograd.grad(value, x, probes[0], create_graph=True)
    return value, (vjp * probes[0]).sum(1)[None]


def ours(x: Tensor, t: Tensor, probes: Tensor, *params: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
    layers = list(zip(params[::2], params[1::2], strict=True))
    return ops.mlp_trace(x, t, layers, activation="tanh", probes=probes, backend=backend)


def _make(widths: tuple[int, ...], batch: int) -> Contenders:
    x, t = torch.randn(batch, widths[0]), torch.tensor(0.3)
    probes = torch.randn(1, batch, widths[0]).sign()
    params = []
    for n, m in zip(widths, widths[1:], strict=False):
        params += [torch.randn(m, n + 1) / n**0.5, torch.zeros(m)]
    weights = torch.randn_like(x), torch.randn(1, batch)

    def both(function: Callable) -> Callable:
        return gradients(lambda x, *rest: function(x, t, probes, *rest), (x, *params), weights)

    reference = partial(ours, backend="reference")
    return {
        "fastflow": both(ours),
        "eager": both(eager),
        "torch.compile": both(torch.compile(reference)),
        "reference": both(reference),
    }


def rows() -> Iterator[Row]:
    for widths, batch, target in (((2, 64, 64, 64, 2), 512, 5.0), ((43, 860, 860, 43), 200, 1.7)):
        name = f"f + trace D={widths[0]} {'-'.join(map(str, widths[1:-1]))} B={batch} forward+backward"
        # value and one tangent, each a product forward and two backward
        flops = 2 * 3 * 2 * batch * sum(n * m for n, m in zip(widths, widths[1:], strict=False))
        make = partial(_make, widths, batch)
        yield Row("trace", name, make, flops=flops, targets={"eager": target}, demo=batch == 512)
