"""What the GPU backends share around the kernels of Sylvester flows: columns that are orthonormal when a kernel reads
them, by a fixed number of matrix products of the library; nothing waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow.ops._op import accumulator
from fastflow.ops.orthonormal import orthonormal_rows, orthonormal_tolerance, residual

__all__ = ["columns", "columns_bwd", "wide"]


def wide(tensor: Tensor) -> Tensor:
    """In the type that kernels compute in, [B, K, ...] with what follows K contiguous."""
    tensor = tensor.to(accumulator(tensor.dtype))
    inner = tensor.flatten(2) if tensor.dim() > 2 else tensor
    return inner if inner.stride(-1) == 1 or inner.shape[-1] <= 1 else inner.contiguous()


def columns(basis: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """(orthonormal rows [B, K, M, D], [B]: 0, or NaN where they have not become so)"""
    rows = orthonormal_rows(basis.to(accumulator(basis.dtype)), iterations)
    wrong = ~(residual(rows) <= orthonormal_tolerance(rows.dtype))
    return rows, torch.where(wrong, torch.nan, 0.0).sum(1).to(rows.dtype)


def columns_bwd(basis: Tensor, iterations: int, grad: Tensor) -> Tensor:
    """From the gradient of these rows to that of ``basis``."""
    with torch.enable_grad():
        leaf = basis.detach().to(accumulator(basis.dtype)).requires_grad_()
        rows = orthonormal_rows(leaf, iterations)
    return torch.autograd.grad(rows, leaf, grad)[0] if iterations else grad
