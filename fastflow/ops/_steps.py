"""What flows of K small steps on vectors share: parameters are one set, [K, ...], or one per sample, [B, K, ...]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastflow.ops import _check
from fastflow.ops._op import accumulator

__all__ = ["Prepare", "check_steps", "pack", "parameters_like", "unpack_gradient"]

Prepare = Callable[..., Tensor]
"""From a family's parameters to [..., K, P]: all that a step uses, in one row. Plain PyTorch, so differentiable."""


def check_steps(z: Tensor, vectors: dict[str, Tensor], numbers: dict[str, Tensor]) -> bool:
    """Raises unless the parameters of K steps, all [K, D] and [K] or all [B, K, D] and [B, K], go with z [B, D].

    Has each sample its own?
    """
    _check.floating("z", z)
    if z.dim() != 2 or z.shape[1] == 0:
        raise ValueError(f"z: expected [B, D] with D at least 1, got {list(z.shape)}")
    first, tensor = next(iter(vectors.items()))
    _check.floating(first, tensor, 0)
    if tensor.dim() not in (2, 3):
        raise ValueError(f"{first}: expected [K, D] or [B, K, D], got {list(tensor.shape)}")
    each = tensor.dim() == 3
    rows = (z.shape[0], tensor.shape[1]) if each else (tensor.shape[0],)
    for name, given in vectors.items():
        _check.beside(name, given, z, (*rows, z.shape[1]), of="z")
    for name, given in numbers.items():
        _check.beside(name, given, z, rows, of="z")
    return each


def parameters_like(z: Tensor, each: bool, *parameters: Tensor) -> list[Tensor]:
    """Where a backward kernel puts the gradients of parameters: those that all samples share are sums."""
    return [p.new_empty(p.shape, dtype=p.dtype if each else accumulator(z.dtype)) for p in parameters]


# --- for the GPU backends: constraints and packing are PyTorch's, the kernels see rows ready for use ----------------


def pack(prepare: Prepare, z: Tensor, given: Sequence[Any]) -> Tensor:
    """The rows of all steps, [K, P] or [B, K, P], contiguous, in the dtype that z is computed in."""
    with torch.no_grad():
        return prepare(*_cast(given, accumulator(z.dtype))).contiguous()


def unpack_gradient(prepare: Prepare, given: Sequence[Any], gradient: Tensor, out: Sequence[Tensor]) -> None:
    """From the gradient of the rows to those of the parameters."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in _cast(given, gradient.dtype)]
        wanted = [t for t in leaves if isinstance(t, Tensor)]
        found = torch.autograd.grad(prepare(*leaves), wanted, gradient)
    for to, value in zip(out, found, strict=True):
        to.copy_(value)


def _cast(given: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    return [t.to(dtype) if isinstance(t, Tensor) else t for t in given]
