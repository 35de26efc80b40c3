"""Orthonormal columns by Björck's iteration, and how far from orthonormal columns are."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow.ops import _check
from fastflow.ops._op import accumulator

__all__ = ["ITERATIONS", "orthogonality", "orthonormal", "orthonormal_tolerance"]

ITERATIONS = 40  # an iteration makes the least singular value 1.5 times as large: 40 bring it from 1e-6 to 1


def orthonormal_tolerance(dtype: torch.dtype) -> float:
    """Above this ‖QᵀQ - I‖ the columns have not converged: one iteration squares it, and the square is a rounding."""
    return torch.finfo(accumulator(dtype)).eps ** 0.5


def orthonormal(q: Tensor, iterations: int = ITERATIONS) -> Tensor:
    r"""The nearest matrix with orthonormal columns: :math:`Q \leftarrow Q (I + \tfrac12 (I - Q^\top Q))`, a fixed
    number of times from :math:`Q / \|Q\|_F`.

    Args:
        q: [..., D, M] with M <= D; the columns must be linearly independent. An ill-conditioned matrix needs about
            ln(‖Q‖_F / σ_min) / ln 1.5 iterations and a few more; :func:`orthogonality` says whether they were enough.
        iterations: how many; 0 leaves q as it is.

    Paper: an iterative algorithm for computing the best estimate of an orthogonal matrix,
    https://doi.org/10.1137/0708036.

    >>> q = orthonormal(torch.randn(5, 64, 8, generator=torch.Generator().manual_seed(0)))
    >>> bool((orthogonality(q) < 1e-6).all())
    True
    """
    _check.floating("q", q)
    if q.shape[-1] > q.shape[-2]:
        raise ValueError(f"q: expected [..., D, M] with M <= D, got {list(q.shape)}")
    if iterations < 0:
        raise ValueError(f"iterations: expected 0 or more, got {iterations}")
    # the rows of the transpose are the columns: products with contiguous rows
    return orthonormal_rows(q.transpose(-1, -2), iterations).transpose(-1, -2)


def orthonormal_rows(rows: Tensor, iterations: int) -> Tensor:
    """The same for the rows of [..., M, D]."""
    if iterations == 0:
        return rows
    square = rows.square().sum((-1, -2), keepdim=True)
    rows = rows * torch.rsqrt(torch.where(square > 0, square, 1))
    for _ in range(iterations):
        rows = 1.5 * rows - 0.5 * (rows @ rows.transpose(-1, -2)) @ rows
    return rows


def orthogonality(q: Tensor) -> Tensor:
    """‖QᵀQ - I‖_F of matrices [..., D, M]: 0 where the columns are orthonormal.

    >>> orthogonality(torch.eye(3, 2)), orthogonality(torch.ones(2, 1))
    (tensor(0.), tensor(1.))
    """
    _check.floating("q", q)
    return residual(q.transpose(-1, -2))


def residual(rows: Tensor) -> Tensor:
    """The same for the rows of [..., M, D]."""
    rows = rows.to(accumulator(rows.dtype))
    identity = torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
    return (rows @ rows.transpose(-1, -2) - identity).square().sum((-1, -2)).sqrt()
