"""The cases of ActNorm."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from fastflow import ops
from fastflow.testing.case import Case, Inputs, randn

IMAGES = {"tiny": (2, 4, 2, 3), "odd": (11, 7, 5, 9), "bench": (64, 12, 16, 16)}
VECTORS = {"tiny": (3, 4), "odd": (37, 7), "bench": (4096, 64)}


def _inputs(size: str, shapes: dict) -> Inputs:
    x = randn(*shapes[size])
    return {"x": x, "log_scale": randn(x.shape[1], seed=1), "bias": randn(x.shape[1], seed=2)}


def _back(outputs: tuple[Tensor, ...], x: Tensor, inverse: bool = False, **inputs) -> Tensor:
    return ops.actnorm(outputs[0], inverse=not inverse, **inputs)[0]


def cases() -> Iterator[Case]:
    for name, shapes in (("image", IMAGES), ("vector", VECTORS)):
        for inverse in (False, True):
            options = {"inverse": inverse, "gain": 3.0 if inverse else 0.5}
            yield Case(
                "actnorm",
                f"{name}-{'inverse' if inverse else 'forward'}",
                partial(ops.actnorm, **options),
                partial(_inputs, shapes=shapes),
                back=partial(_back, **options),
                logdet=1,
                selftest=True,
            )
