"""Hutchinson's estimate with the value of the dynamics, against autograd's VJP with create_graph as FFJORD has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow import ops
from fastflow.bench.row import CPU, GPU, Contenders, Row, contenders


def dynamics(x: Tensor, t: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Layers with time as the first input, tanh between them."""
    time = t.expand(len(x), 1)
    for i in range(0, len(params), 2):
        x = F.linear(torch.cat([time, x], 1), params[i], params[i + 1])
        x = torch.tanh(x) if i + 2 < len(params) else x
    return x


def eager(x: Tensor, t: Tensor, probes: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
    value = dynamics(x, t, params)
    vjps = [torch.autograd.grad(value, x, probe, create_graph=True)[0] for probe in probes]
    return value, torch.stack([(vjp * probe).sum(1) for vjp, probe in zip(vjps, probes, strict=True)])


def ours(x: Tensor, t: Tensor, probes: Tensor, *params: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
    layers = list(zip(params[::2], params[1::2], strict=True))
    return ops.mlp_trace(x, t, layers, activation="tanh", probes=probes, backend=backend)


def _make(widths: tuple[int, ...], batch: int, count: int = 1, more: Sequence[str] = CPU) -> Contenders:
    x, t = torch.randn(batch, widths[0]), torch.tensor(0.3)
    probes = torch.randn(count, batch, widths[0]).sign()
    params = []
    for n, m in zip(widths, widths[1:], strict=False):
        params += [torch.randn(m, n + 1) / n**0.5, torch.zeros(m)]
    weights = torch.randn_like(x), torch.randn(count, batch)

    def given(function: Callable) -> Callable:
        return lambda x, *params: function(x, t, probes, *params)

    # torch.compile cannot trace the gradient within eager
    traceable = given(partial(ours, backend="reference"))
    return contenders(given(ours), given(eager), (x, *params), weights, more, traceable)


def rows() -> Iterator[Row]:
    for widths, batch, target in (((2, 64, 64, 64, 2), 512, 5.0), ((43, 860, 860, 43), 200, 1.7)):
        yield _row(widths, batch, 1, CPU, targets={"eager": target}, demo=batch == 512)


def gpu_rows(size: int) -> Iterator[Row]:
    """The network of FFJORD's tabular data, unless ``size`` says that this is only a test."""
    widths, batches = ((43, 860, 860, 43), (200, 2000)) if size >= 2**20 else ((3, 16, 3), (5, 7))
    for batch in batches:
        for count in (1, 16):
            yield _row(widths, batch, count, (*CPU, *GPU))


def _row(widths: tuple[int, ...], batch: int, count: int, more: Sequence[str], **options) -> Row:
    probes = "" if count == 1 else f" S={count}"
    name = f"f + trace D={widths[0]} {'-'.join(map(str, widths[1:-1]))} B={batch}{probes} forward+backward"
    # the value and the tangents, each a product forward and two backward
    flops = (1 + count) * 3 * 2 * batch * sum(n * m for n, m in zip(widths, widths[1:], strict=False))
    return Row("trace", name, partial(_make, widths, batch, count, more), flops=flops, **options)
