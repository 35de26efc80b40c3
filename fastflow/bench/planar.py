"""Planar and radial flows of K steps, against the formula in PyTorch and the same number of normflows' layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow import ops
from fastflow.bench.row import CPU, GPU, Contenders, Row, contenders, gradients

BATCH, DIM, STEPS = 1024, 16, 32
NAMES = {"planar": ("u", "w", "b"), "radial": ("z_0", "alpha", "beta")}


def eager_planar(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """As one writes it: unit after unit."""
    total = z.new_zeros(len(z))
    for k in range(len(w)):
        p = torch.dot(w[k], u[k])
        made = u[k] + (F.softplus(p) - 1 - p) * w[k] / w[k].square().sum()
        h = torch.tanh(z @ w[k] + b[k])
        z = z + h[:, None] * made
        total = total + torch.log1p((1 - h * h) * torch.dot(w[k], made))
    return z, total


def eager_radial(z: Tensor, centre: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    total = z.new_zeros(len(z))
    for k in range(len(centre)):
        a, x = alpha[k].abs(), z - centre[k]
        r = x.norm(dim=1)
        h = 1 / (a + r)
        y = (F.softplus(beta[k]) - a) * h
        z = z + y[:, None] * x
        total = total + (z.shape[1] - 1) * torch.log1p(y) + torch.log1p(y - y * h * r)
    return z, total


FLOWS = {"planar": (ops.planar, eager_planar), "radial": (ops.radial, eager_radial)}


def _inputs(flow: str, steps: int, dim: int) -> list[Tensor]:
    if flow == "planar":
        w = (2 / dim) ** 0.5 * (2 * torch.rand(steps, dim) - 1)
        return [2**0.5 * (2 * torch.rand(steps, dim) - 1), w, 0.1 * torch.randn(steps)]
    return [torch.randn(steps, dim), (2 * torch.rand(steps) - 1) / dim, (2 * torch.rand(steps) - 1) / dim - 1]


def _normflows(flow: str, given: Sequence[Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """normflows' layers on the parameters of a call: run with (z, *parameters)."""
    import normflows  # only this contender needs it

    made = getattr(normflows.flows, flow.capitalize())
    layers = [made((given[0].shape[1],)) for _ in range(len(given[0]))]
    for layer in layers:
        for name in NAMES[flow]:
            del layer._parameters[name]

    def run(z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(len(z))
        for k, layer in enumerate(layers):
            for name, p in zip(NAMES[flow], parameters, strict=True):
                setattr(layer, name, p[k : k + 1])
            z, logdet = layer(z)
            total = total + logdet
        return z, total

    return run


def _make(flow: str, batch: int, dim: int, steps: int, train: bool, more: Sequence[str]) -> Contenders:
    ours, eager = FLOWS[flow]
    z, given = torch.randn(batch, dim), _inputs(flow, steps, dim)
    inputs, weights = (z, *given), (torch.randn(batch, dim), torch.randn(batch))
    bind = partial(gradients, inputs=inputs, weights=weights) if train else lambda f: partial(f, *inputs)
    if steps > STEPS:  # whose unrolled graph takes torch.compile minutes
        run = {"fastflow": bind(ours), "eager": bind(eager)}
    else:
        run = contenders(ours, eager, inputs, weights if train else None, more)
    if more == CPU:

        def normflows() -> tuple[Tensor, ...]:
            if not theirs:
                theirs.append(bind(_normflows(flow, given)))
            return theirs[0]()

        theirs: list[Callable[[], tuple[Tensor, ...]]] = []
        run["normflows"] = normflows
    return run


def _inverse(flow: str, batch: int, dim: int, steps: int) -> Contenders:
    """log p of data under the sampling direction: nobody else has it for tanh, or for radial flows."""
    ours, _ = FLOWS[flow]
    z, given = torch.randn(batch, dim), _inputs(flow, steps, dim)
    inputs, weights = (z, *given), (torch.randn(batch, dim), torch.randn(batch))
    return {"fastflow": gradients(partial(ours, inverse=True), inputs, weights)}


def _row(flow: str, train: bool, batch: int, dim: int, steps: int, more: Sequence[str], **options) -> Row:
    task = "forward+backward" if train else "one pass"
    return Row(
        "planar",
        f"{flow} K={steps} D={dim} B={batch} {task}",
        partial(_make, flow, batch, dim, steps, train, more),
        # z, z' and the log-determinant; backward reads z and two gradients and writes one
        bytes=4 * batch * ((2 * dim + 1) + train * (3 * dim + 1)),
        **options,
    )


def rows() -> Iterator[Row]:
    for flow in FLOWS:
        for train, target in ((True, 5.0), (False, 8.0)):
            targets = {"normflows": target}
            yield _row(flow, train, BATCH, DIM, STEPS, CPU, targets=targets, demo=train and flow == "planar")
        yield _row(flow, True, BATCH, DIM, 64, CPU)  # its memory is that of K=32
    for flow in FLOWS:
        name = f"{flow} K={STEPS} D={DIM} B={BATCH} inverse, forward+backward"
        yield Row("planar", name, partial(_inverse, flow, BATCH, DIM, STEPS), bytes=4 * BATCH * (5 * DIM + 2))


def gpu_rows(size: int) -> Iterator[Row]:
    """``size`` bytes of samples, unless that is only a test."""
    batch, steps = (max(1, size // (4 * DIM)), STEPS) if size >= 2**20 else (5, 2)
    for flow in FLOWS:
        for train in (True, False):
            yield _row(flow, train, batch, DIM, steps, (*CPU, *GPU))
