"""One row of the table: an op with one choice of options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastflow.ops._backend import BACKENDS

__all__ = ["Case", "DTYPES", "Inputs", "randn"]

Inputs = dict[str, Tensor]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    family: str
    name: str
    run: Callable[..., tuple[Tensor, ...]]
    """``run(backend=..., **inputs)``: the outputs of the op, a tuple of tensors."""
    inputs: Callable[[str], Inputs]
    """Float64 inputs at a size: ``tiny`` (gradcheck), ``odd`` (ragged in every dimension), ``bench``."""
    back: Callable[..., Tensor] | None = None
    """``back(outputs, backend=..., **inputs)``: the first input again, for a bijection."""
    logdet: int | None = None
    """Which output is the log-determinant of the first output with respect to the first input."""
    derivatives: int = 2
    """How many times the op may be differentiated; 0: not against finite differences, as the gradient holds fixed what
    the op chooses by its inputs."""
    dtypes: tuple[torch.dtype, ...] = DTYPES
    keep: tuple[str, ...] = field(default=())
    """Inputs that must stay as they are made: no other layout, no cast below float32."""
    orders: Callable[[Inputs], Iterator[Inputs]] | None = None
    """Inputs for the same results, summed in other orders: samples of the reference's error."""
    plain: Case | None = None
    """Where ``run`` computes in float64 whatever its inputs are: the case in the dtype of its inputs throughout. How
    large the rounding of float64 is shows there."""

    backends: tuple[str, ...] = BACKENDS
    """Those that have kernels for it, and the reference."""
    selftest: bool = False
    """Part of what a GPU backend must pass before its first use?"""

    @property
    def id(self) -> str:
        return f"{self.family}-{self.name}"


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Float64 normal numbers that are the same on every machine."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)
