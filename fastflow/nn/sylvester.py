"""Sylvester flows with parameters from the context, as posteriors have them, or of their own."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastflow.nn._steps import positive
from fastflow.nn.base import Bijection
from fastflow.ops import sylvester
from fastflow.ops.orthonormal import ITERATIONS
from fastflow.ops.sylvester import VARIANTS

__all__ = ["Sylvester", "SylvesterParameters"]


class SylvesterParameters(NamedTuple):
    """What :func:`fastflow.sylvester` takes beside z, by its names."""

    full: Tensor
    diag1: Tensor
    diag2: Tensor
    bias: Tensor
    q: Tensor | None = None
    vectors: Tensor | None = None


class Sylvester(Bijection):
    r"""K steps :math:`z \leftarrow z + Q R_1 \tanh(R_2 Q^\top z + b)` as in :func:`fastflow.sylvester`, in one call.

    A step has M hidden units: ``ortho`` of them in the variant "orthogonal", ``features`` in the other two. In each
    sample's context, which one linear layer can make, lie

    ===========  ===============  =====================================================================
    ``full``     [K, M, M]        R_1 above its diagonal, the transpose of R_2 below; the rest is unused
    ``diag1``    [K, M]           the diagonal of R_1 before the tanh
    ``diag2``    [K, M]           that of R_2
    ``bias``     [K, M]           b
    ``q``        [K, M, D]        orthogonal only: the columns of Q_0, one after the other
    ``vectors``  [K, H, D]        Householder only: the vectors of H reflections
    ===========  ===============  =====================================================================

    one after the other, ``context_features`` numbers in all; :meth:`split` gives them back as tensors. A context near
    zero is no good start for "orthogonal" and "householder" (no direction is left in q), a linear layer as PyTorch
    initialises it is.

    Args:
        features: D.
        steps: K.
        variant: "orthogonal", "householder" or "triangular".
        ortho: M of "orthogonal", at most D.
        householder: H of "householder".
        amortised: every sample has parameters of its own, from the context. Otherwise they are the module's own, as a
            density flow wants them, and the context is ignored.
        iterations: of Björck's method, for "orthogonal".

    Shapes: x [B, D], context [B, context_features] -> z [B, D], logdet [B].

    Raises:
        ValueError: columns of q that ``iterations`` could not make orthonormal; on a GPU the sample's logdet is NaN
            instead.

    Paper: Sylvester normalizing flows for variational inference, https://arxiv.org/abs/1803.05649.

    >>> flow = Sylvester(6, 4, ortho=2)
    >>> make = torch.nn.Linear(10, flow.context_features)
    >>> z, context = torch.randn(5, 6), make(torch.randn(5, 10))
    >>> out, logdet = flow(z, context)
    >>> back, _ = flow.inverse(out, context)
    >>> bool(torch.allclose(back, z, atol=1e-4)), flow.split(context).q.shape
    (True, torch.Size([5, 4, 6, 2]))
    """

    def __init__(
        self,
        features: int,
        steps: int,
        variant: Literal["orthogonal", "householder", "triangular"] = "orthogonal",
        ortho: int = 8,
        householder: int = 8,
        amortised: bool = True,
        iterations: int = ITERATIONS,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
        positive(features=features, steps=steps)
        if variant == "orthogonal" and not 1 <= ortho <= features:
            raise ValueError(f"ortho: expected 1 to features = {features}, got {ortho}")
        if variant == "householder":
            positive(householder=householder)
        self.features, self.steps, self.variant, self.iterations = features, steps, variant, iterations
        m = ortho if variant == "orthogonal" else features
        rows = {"orthogonal": ortho, "householder": householder, "triangular": 0}[variant]
        self._shapes = [(steps, m, m), *[(steps, m)] * 3, *([(steps, rows, features)] if rows else [])]
        self.own = None
        if not amortised:
            # near the identity, but not at it: there R_1 and R_2 would keep each other at zero
            self.own = nn.Parameter(torch.cat([0.1 * torch.randn(shape).flatten() for shape in self._shapes]))
            if rows:
                with torch.no_grad():
                    self.own[-steps * rows * features :].normal_()

    def extra_repr(self) -> str:
        rows = {"orthogonal": ", ortho={}", "householder": ", householder={}", "triangular": ""}[self.variant]
        return f"{self.features}, {self.steps}, {self.variant!r}{rows.format(self._shapes[-1][1])}"

    @property
    def context_features(self) -> int:
        """How many numbers the context of a sample has; 0 if the parameters are the module's own."""
        return 0 if self.own is not None else self._size

    @property
    def _size(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self._shapes)

    def split(self, context: Tensor) -> SylvesterParameters:
        """The tensors [B, K, ...] of a context [B, P], or [K, ...] of one of [P]: views of it."""
        if context.dim() not in (1, 2) or context.shape[-1] != self._size:
            raise ValueError(f"context: expected [B, {self._size}], got {list(context.shape)}")
        outer = context.shape[:-1]
        parts = context.split([torch.Size(shape).numel() for shape in self._shapes], -1)
        full, diag1, diag2, bias, *basis = (p.view(*outer, *s) for p, s in zip(parts, self._shapes, strict=True))
        if self.variant == "orthogonal":
            return SylvesterParameters(full, diag1, diag2, bias, q=basis[0].transpose(-1, -2))
        return SylvesterParameters(full, diag1, diag2, bias, vectors=basis[0] if basis else None)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, context, False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(z, context, True)

    def _run(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if self.own is None and context is None:
            raise ValueError(f"context: expected [B, {self._size}], which has the parameters of the flow, got None")
        full, diag1, diag2, bias, q, vectors = self.split(context if self.own is None else self.own)
        return sylvester(x, full, diag1, diag2, bias, q=q, vectors=vectors, iterations=self.iterations, inverse=inverse)
