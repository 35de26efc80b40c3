"""What the flows of K small steps on vectors share: their parameters are one set [K, ...], or one per sample [B, K, ...]."""

from __future__ import annotations

from torch import Tensor

from fastflow.ops import _check
from fastflow.ops._op import accumulator

__all__ = ["check_steps", "parameters_like"]


def check_steps(z: Tensor, vectors: dict[str, Tensor], numbers: dict[str, Tensor]) -> bool:
    """Raises unless the parameters of K steps, all [K, D] and [K] or all [B, K, D] and [B, K], go with z [B, D].

    Has each sample its own?
    """
    _check.floating("z", z)
    if z.dim() != 2 or z.shape[1] == 0:
        raise ValueError(f"z: expected [B, D] with D at least 1, got {list(z.shape)}")
    first, tensor = next(iter(vectors.items()))
    _check.floating(first, tensor)
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
