"""Radial flow: a chain of steps, each a push from a centre or a pull towards it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fastflow.nn._steps import positive, split_context
from fastflow.nn.base import Bijection
from fastflow.ops import radial

__all__ = ["Radial"]


class Radial(Bijection):
    r"""K radial steps :math:`z \leftarrow z + \hat\beta (z - c) / (\hat\alpha + |z - c|)` in one call.

    Invertible whatever the parameters are, in closed form. :func:`fastflow.radial` has the constraint, and the
    log-determinant.

    Args:
        features: D; z is [B, D].
        steps: K.
        amortised: no parameters of its own; those of every sample are its context [B, K (D + 2)]: c of all steps, then
            alpha, then beta.
        alpha_map: α̂ is |alpha|, or softplus(alpha).

    Raises:
        ValueError: sizes below 1; a context that is missing or of another shape.

    Paper: variational inference with normalizing flows, https://arxiv.org/abs/1505.05770.

    >>> layer = Radial(3, steps=8)
    >>> x, logdet = layer(torch.randn(5, 3))
    >>> z, minus = layer.inverse(x)
    """

    def __init__(
        self, features: int, steps: int, amortised: bool = False, alpha_map: Literal["abs", "softplus"] = "abs"
    ):
        super().__init__()
        positive(features=features, steps=steps)
        self.features, self.steps, self.amortised, self.alpha_map = features, steps, amortised, alpha_map
        if not amortised:
            limit = 1 / features
            self.centre = nn.Parameter(torch.randn(steps, features))
            self.alpha = nn.Parameter(torch.empty(steps).uniform_(-limit, limit))
            self.beta = nn.Parameter(torch.empty(steps).uniform_(-limit - 1, limit - 1))

    @property
    def context_features(self) -> int:
        """The width of the context; 0 where it takes none."""
        return self.steps * (self.features + 2) if self.amortised else 0

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return radial(x, *self._parameters_of(x, context), alpha_map=self.alpha_map)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return radial(z, *self._parameters_of(z, context), alpha_map=self.alpha_map, inverse=True)

    def _parameters_of(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, ...] | list[Tensor]:
        if not self.amortised:
            return self.centre, self.alpha, self.beta
        return split_context(context, x, ((self.steps, self.features), (self.steps,), (self.steps,)))

    def extra_repr(self) -> str:
        return f"{self.features}, steps={self.steps}, amortised={self.amortised}, alpha_map={self.alpha_map!r}"
