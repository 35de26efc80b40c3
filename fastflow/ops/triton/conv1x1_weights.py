"""The matrices of invertible 1x1 convolutions from their LU factors in Triton, for all layers of a model at once.

    W = P L (U + diag(sign e^log_s)),  M = W diag(e^(gain a)),  c = M b,  logdet = sum log_s + gain sum a

or M^-1, -b, -logdet. The factors are stacked, and everything is computed in float64 and rounded once. What PyTorch has
no batched routine for that a CUDA graph may hold is :func:`_triangular`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.ops.triton.rows import launch


@triton.jit
def _substitute(
    factor, f_at, diagonal, y, y_at, n, blocks,
    LOWER: tl.constexpr, SOLVE: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """W columns of y become F y or F^-1 y, in place: a row is used before it changes, or once it is final."""
    layer = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * W + tl.arange(0, W)[None, :]
    row = tl.arange(0, C)[:, None]
    mask = (row < n) & (column < n)
    at = y + layer * y_at[0] + row * y_at[1] + column * y_at[2]
    value = tl.load(at, mask=mask, other=0.0)
    for k in range(0, n):
        i = k if LOWER == SOLVE else n - 1 - k
        others = (row > i) if LOWER else (row < i)
        f = tl.load(factor + layer * f_at[0] + row * f_at[1] + i * f_at[2], mask=others & (row < n), other=0.0)
        one = tl.sum(tl.where(row == i, value, 0.0), axis=0)[None, :]
        if UNIT:
            final = one
        else:
            d = tl.load(diagonal + layer * n + i)
            final = one / d if SOLVE else one * d
        value = tl.where(row == i, final, value - f * final if SOLVE else value + f * one)
    tl.store(at, value, mask=mask)


def _triangular(
    factor: Tensor, y: Tensor, diagonal: Tensor | None = None, *, lower: bool, solve: bool, transposed: bool = False
) -> Tensor:
    """y [N, C, C] becomes F y or F^-1 y, in place; F (or its transpose) is a strict triangle of ``factor`` and a
    diagonal [N, C], by default of ones."""
    layers, n, _ = y.shape
    c = triton.next_power_of_2(n)
    w = max(1, min(c, 1024 // c))
    blocks = -(-n // w)
    view = factor.mT if transposed else factor
    launch(
        _substitute, layers * blocks, y, view, view.stride(), diagonal, y, y.stride(), n, blocks,
        LOWER=lower != transposed, SOLVE=solve, UNIT=diagonal is None, C=c, W=w, warps=4,
    )  # fmt: skip
    return y


class _Layers:
    """The factors of all layers in float64; without ActNorm a = b = 0."""

    def __init__(
        self,
        lower: Sequence[Tensor],
        upper: Sequence[Tensor],
        log_s: Sequence[Tensor],
        permutation: Sequence[Tensor],
        sign_s: Sequence[Tensor],
        log_scale: Sequence[Tensor],
        bias: Sequence[Tensor],
        gain: float,
    ):
        self.lower, self.upper, self.log_s = (torch.stack(list(t)).double() for t in (lower, upper, log_s))
        self.diagonal = torch.stack(list(sign_s)).double() * torch.exp(self.log_s)
        self.order = torch.stack(list(permutation))
        self.a, self.b = (
            torch.stack(list(t)).double() if len(t) else torch.zeros_like(self.log_s) for t in (log_scale, bias)
        )
        self.gain = gain
        self.scale = torch.exp(gain * self.a)

    def logdet(self) -> Tensor:
        return (self.log_s + self.gain * self.a).sum(1)

    def rows(self, matrix: Tensor, order: Tensor) -> Tensor:
        """The rows of [N, C, C] in an order [N, C]."""
        return torch.gather(matrix, 1, order[:, :, None].expand_as(matrix))

    def matrix(self) -> Tensor:
        """M: the rows of L (U + diag) in P's order, its columns times e^(gain a)."""
        product = torch.triu(self.upper, 1) + torch.diag_embed(self.diagonal)
        _triangular(self.lower, product, lower=True, solve=False)
        return self.rows(product, self.order) * self.scale[:, None]

    def inverse(self) -> Tensor:
        """M^-1 = diag(e^(-gain a)) (U + diag)^-1 L^-1 P^T"""
        channel = torch.arange(self.order.shape[1], device=self.order.device)
        y = (self.order[:, None] == channel[:, None]).double()  # P^T
        _triangular(self.lower, y, lower=True, solve=True)
        _triangular(self.upper, y, self.diagonal, lower=False, solve=True)
        return y / self.scale[:, :, None]


def lu_weights_fwd(
    lower: Sequence[Tensor],
    upper: Sequence[Tensor],
    log_s: Sequence[Tensor],
    permutation: Sequence[Tensor],
    sign_s: Sequence[Tensor],
    log_scale: Sequence[Tensor],
    bias: Sequence[Tensor],
    matrix: Tensor,
    shift: Tensor,
    logdet: Tensor,
    gain: float,
    inverse: bool,
) -> None:
    layers = _Layers(lower, upper, log_s, permutation, sign_s, log_scale, bias, gain)
    m = layers.inverse() if inverse else layers.matrix()
    matrix.copy_(m)
    shift.copy_(-layers.b if inverse else (m * layers.b[:, None]).sum(2))
    logdet.copy_(-layers.logdet() if inverse else layers.logdet())


def lu_weights_bwd(
    lower: Sequence[Tensor],
    upper: Sequence[Tensor],
    log_s: Sequence[Tensor],
    permutation: Sequence[Tensor],
    sign_s: Sequence[Tensor],
    log_scale: Sequence[Tensor],
    bias: Sequence[Tensor],
    gmatrix: Tensor,
    gshift: Tensor,
    glogdet: Tensor,
    glower: Tensor,
    gupper: Tensor,
    glog_s: Tensor,
    glog_scale: Tensor,
    gbias: Tensor,
    gain: float,
    inverse: bool,
) -> None:
    layers = _Layers(lower, upper, log_s, permutation, sign_s, log_scale, bias, gain)
    g, gc, gl = gmatrix.double(), gshift.double(), glogdet.double()[:, None]
    if inverse:
        gl, of_bias = -gl, -gc
        of_lower, of_upper, of_scale = _through_inverse(layers, g)
    else:
        m = layers.matrix()
        g = g + gc[:, :, None] * layers.b[:, None]
        of_bias, of_scale = (m * gc[:, :, None]).sum(1), (g * m).sum(1)
        of_lower, of_upper = _through_product(layers, g)
    glower.copy_(torch.tril(of_lower, -1))
    gupper.copy_(torch.triu(of_upper, 1))
    glog_s.copy_(of_upper.diagonal(dim1=1, dim2=2) * layers.diagonal + gl)
    glog_scale.copy_(gain * (of_scale + gl))
    gbias.copy_(of_bias)


def _through_product(layers: _Layers, g: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of M to those of L and U: G U^T and L^T G, G = P^T g diag(e^(gain a)) that of A = L U."""
    g = layers.rows(g * layers.scale[:, None], layers.order.argsort(1))
    of_upper = _triangular(layers.lower, g.clone(), lower=True, solve=False, transposed=True)
    of_lower = _triangular(layers.upper, g.mT, layers.diagonal, lower=False, solve=False).mT
    return of_lower, of_upper


def _through_inverse(layers: _Layers, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient of M^-1 to those of L, of U and of gain a, -A^-T K L^-T, -U^-T K A^-T and -diag(K A^-T), with
    K = diag(e^(-gain a)) g P the gradient of A^-1 = U^-1 L^-1."""
    transposed = layers.rows((g / layers.scale[:, :, None]).mT, layers.order.argsort(1))  # K^T
    z = _triangular(layers.lower, transposed, lower=True, solve=True)
    of_lower = z.mT.clone()
    right = _triangular(layers.upper, z, layers.diagonal, lower=False, solve=True).mT  # K A^-T
    of_scale = -right.diagonal(dim1=1, dim2=2).clone()
    of_upper = _triangular(layers.upper, right, layers.diagonal, lower=False, solve=True, transposed=True)
    _triangular(layers.upper, of_lower, layers.diagonal, lower=False, solve=True, transposed=True)
    _triangular(layers.lower, of_lower, lower=True, solve=True, transposed=True)
    return -of_lower, -of_upper, of_scale
