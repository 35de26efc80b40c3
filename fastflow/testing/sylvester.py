"""The cases of Sylvester flows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastflow import ops
from fastflow.ops._op import accumulator
from fastflow.ops.sylvester import VARIANTS
from fastflow.testing.case import Case, Inputs, randn

# B, K, D, M of "orthogonal", reflections
SIZES = {"tiny": (8, 2, 3, 2, 2), "odd": (19, 3, 7, 3, 3), "bench": (100, 4, 64, 8, 8)}


def _inputs(size: str, variant: str) -> Inputs:
    """Steps that are well conditioned: the error of no sample stands out."""
    samples, steps, d, ortho, reflections = SIZES[size]
    samples *= 2 if variant == "triangular" else 1  # it has no orders
    outer, m = (samples, steps), ortho if variant == "orthogonal" else d
    made = {
        "z": randn(samples, d),
        "full": 0.5 * m**-0.5 * randn(*outer, m, m, seed=1),
        "diag1": 0.5 * randn(*outer, m, seed=2),
        "diag2": 0.5 * randn(*outer, m, seed=3),
        "bias": randn(*outer, m, seed=4),
    }
    if variant == "orthogonal":
        made["columns"] = torch.eye(m, d, dtype=torch.float64) + 0.3 * randn(*outer, m, d, seed=5)
    if variant == "householder":
        made["vectors"] = randn(*outer, reflections, d, seed=5)
    return made


def _run(columns: Tensor | None = None, order: Tensor | None = None, **inputs) -> tuple[Tensor, Tensor]:
    """``columns``: those of q, one after the other in memory. With ``order`` they, or the vectors, are longer by a
    factor on which nothing depends but the rounding."""
    if order is not None:
        generator = torch.Generator().manual_seed(int(order))
        factor = 1 + torch.rand((), generator=generator, dtype=torch.float64).item()
        if columns is not None:
            columns = columns.to(accumulator(columns.dtype)) * factor
        else:
            inputs["vectors"] = inputs["vectors"].to(accumulator(inputs["vectors"].dtype)) * factor
    return ops.sylvester(**inputs, q=None if columns is None else columns.transpose(-1, -2))


def _orders(inputs: Inputs) -> Iterator[Inputs]:
    return ({**inputs, "order": torch.tensor(seed)} for seed in range(3))


def _back(outputs: tuple[Tensor, ...], z: Tensor, inverse: bool = False, **inputs) -> Tensor:
    return _run(z=outputs[0], inverse=not inverse, **inputs)[0]


def cases() -> Iterator[Case]:
    for variant in VARIANTS:
        for inverse in (False, True):
            yield Case(
                "sylvester",
                f"{variant}-{'inverse' if inverse else 'forward'}",
                partial(_run, inverse=inverse),
                partial(_inputs, variant=variant),
                back=partial(_back, inverse=inverse),
                logdet=1,
                orders=None if variant == "triangular" else _orders,
                selftest=(variant == "triangular") == inverse and variant != "householder",
            )
