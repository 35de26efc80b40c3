"""The cases of ActNorm."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastflow import ops
from fastflow.testing.case import Case, Inputs, randn

IMAGES = {"tiny": (2, 4, 2, 3), "odd": (11, 7, 5, 9), "bench": (64, 12, 16, 16)}
VECTORS = {"tiny": (3, 4), "odd": (37, 7), "bench": (4096, 64)}


def _inputs(size: str, shapes: dict) -> Inputs:
    x = randn(*shapes[size])
    return {"x": x, "log_scale": randn(x.shape[1], seed=1), "bias": randn(x.shape[1], seed=2)}


def _run(x: Tensor, log_scale: Tensor, bias: Tensor, order: Tensor | None = None, **options) -> tuple[Tensor, Tensor]:
    """With ``order`` samples and channels are permuted on the way in, and back on the way out."""
    if order is None:
        return ops.actnorm(x, log_scale, bias, **options)
    generator = torch.Generator().manual_seed(int(order))
    b, c = (torch.randperm(n, generator=generator).to(x.device) for n in x.shape[:2])
    y, logdet = ops.actnorm(x[b][:, c], log_scale[c], bias[c], **options)
    return y[b.argsort()][:, c.argsort()], logdet[b.argsort()]


def _orders(inputs: Inputs) -> Iterator[Inputs]:
    return ({**inputs, "order": torch.tensor(seed)} for seed in range(12))


def _back(outputs: tuple[Tensor, ...], x: Tensor, inverse: bool = False, **inputs) -> Tensor:
    return ops.actnorm(outputs[0], inverse=not inverse, **inputs)[0]


def cases() -> Iterator[Case]:
    for name, shapes in (("image", IMAGES), ("vector", VECTORS)):
        for inverse in (False, True):
            options = {"inverse": inverse, "gain": 3.0 if inverse else 0.5}
            yield Case(
                "actnorm",
                f"{name}-{'inverse' if inverse else 'forward'}",
                partial(_run, **options),
                partial(_inputs, shapes=shapes),
                back=partial(_back, **options),
                logdet=1,
                orders=_orders,
                selftest=True,
            )
