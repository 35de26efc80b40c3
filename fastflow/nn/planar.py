"""Planar flow: a chain of units, each a push along one direction by a tanh of another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastflow.nn._steps import positive, split_context
from fastflow.nn.base import Bijection
from fastflow.ops import planar

__all__ = ["Planar"]


class Planar(Bijection):
    r"""K planar units :math:`z \leftarrow z + \hat u \tanh(w \cdot z + b)` in one call, always invertible.

    ``forward`` is the formula, as a posterior flow runs from z0 to zK; ``inverse`` solves one scalar equation for every
    unit and sample. :func:`fastflow.planar` has the constraint, and the log-determinant.

    Args:
        features: D; z is [B, D].
        steps: K.
        amortised: no parameters of its own; those of every sample are its context [B, K (2 D + 1)]: u of all units,
            then w, then b.

    Raises:
        ValueError: sizes below 1; a context that is missing or of another shape.

    Paper: variational inference with normalizing flows, https://arxiv.org/abs/1505.05770.

    >>> layer = Planar(3, steps=8)
    >>> x, logdet = layer(torch.randn(5, 3))
    >>> amortised = Planar(3, steps=8, amortised=True)
    >>> z, logdet = amortised(x, torch.randn(5, amortised.context_features))
    """

    def __init__(self, features: int, steps: int, amortised: bool = False):
        super().__init__()
        positive(features=features, steps=steps)
        self.features, self.steps, self.amortised = features, steps, amortised
        if not amortised:
            # the length of u and of w does not grow with D
            self.u = nn.Parameter(torch.empty(steps, features).uniform_(-(2**0.5), 2**0.5))
            limit = (2 / features) ** 0.5
            self.w = nn.Parameter(torch.empty(steps, features).uniform_(-limit, limit))
            self.b = nn.Parameter(torch.zeros(steps))

    @property
    def context_features(self) -> int:
        """The width of the context; 0 where it takes none."""
        return self.steps * (2 * self.features + 1) if self.amortised else 0

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return planar(x, *self._parameters_of(x, context))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return planar(z, *self._parameters_of(z, context), inverse=True)

    def _parameters_of(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, ...] | list[Tensor]:
        if not self.amortised:
            return self.u, self.w, self.b
        vectors = (self.steps, self.features)
        return split_context(context, x, (vectors, vectors, (self.steps,)))

    def extra_repr(self) -> str:
        return f"{self.features}, steps={self.steps}, amortised={self.amortised}"
