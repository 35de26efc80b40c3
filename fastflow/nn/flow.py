"""A flow: a base distribution seen through a bijection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastflow.nn.base import Bijection
from fastflow.nn.base_distribution import Base

__all__ = ["Flow"]


class Flow(nn.Module):
    r"""log p(x) = log p_base(f(x)) + log|det df/dx|.

    The context goes to the bijection and the base as it is: [B, ...] beside x, [n, ...] beside n samples.

    >>> from fastflow.nn import Permutation, StandardNormal
    >>> flow = Flow(StandardNormal(2), Permutation(2))
    >>> x, logp = flow.sample_and_log_prob(5, generator=torch.Generator().manual_seed(0))
    >>> bool(torch.allclose(flow.log_prob(x), logp)), logp.shape
    (True, torch.Size([5]))
    """

    def __init__(self, base: Base, bijection: Bijection) -> None:
        super().__init__()
        self.base, self.bijection = base, bijection

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``log_prob``: what DistributedDataParallel wraps is the forward."""
        return self.log_prob(x, context)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """[B] in nats."""
        z, logdet = self.bijection(x, context)
        return self.base.log_prob(z, context) + logdet

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """n samples, without a graph; ``temperature`` multiplies the standard deviation of the base."""
        return self.sample_and_log_prob(n, context, temperature, generator)[0]

    def sample_and_log_prob(
        self,
        n: int,
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(x, log_prob(x) [n]) in one pass through the inverse; differentiable in the parameters."""
        z, logp = self.base.sample_and_log_prob(n, context, temperature, generator)
        x, logdet = self.bijection.inverse(z, context)
        return x, logp - logdet

    @torch.no_grad()
    def initialize(self, batch: Tensor, context: Tensor | None = None) -> None:
        """Lets layers that initialise from data, as ActNorm does, see their first batch, in order."""
        self.bijection(batch, context)
