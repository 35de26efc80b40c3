"""MADE: masked autoencoders as densities of binary and of real data.

Germain et al., 2015, https://arxiv.org/abs/1502.03509.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow import nn as flows
from fastflow.ops._op import accumulator
from fastflow.ops.masked import Activation
from fastflow.ops.scale_map import scale_map

__all__ = ["MADE", "GaussianMADE"]


class MADE(nn.Module):
    r"""Binary data: :math:`\log p(x) = \sum_d x_d \ell_d - \log(1 + e^{\ell_d})`, with the logits
    :math:`\ell_d(x_{<d})` of a masked network.

    With ``num_masks`` above 1 every training step sees the next of so many orders and masks, and :meth:`evaluate`
    averages over all of them; ``log_prob`` and ``sample`` use those at hand. Samples take one incremental sweep, not D
    passes.

    Args:
        features: D.
        hidden: widths of the hidden layers.
        order, degrees, seed, num_masks, resample_order, context_features, activation, direct: as
            :class:`fastflow.nn.MADE`.
        ensemble: what :meth:`evaluate` averages: "probabilities", log of the mean of p(x), which is a density, or
            "logits", the mean of the logits at every pixel, which is not: orders condition a pixel on different
            others. The latter is in the figures of some published code.

    >>> model = MADE(6, hidden=(32,))
    >>> x = model.sample(5)
    >>> model.log_prob(x).shape
    torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (500,),
        order: Literal["reversed"] | Sequence[int] | None = None,
        degrees: Literal["sequential", "random"] = "random",
        seed: int = 0,
        num_masks: int = 1,
        resample_order: bool = True,
        context_features: int = 0,
        activation: Activation = "relu",
        direct: bool = False,
        ensemble: Literal["probabilities", "logits"] = "probabilities",
    ) -> None:
        super().__init__()
        if ensemble not in ("probabilities", "logits"):
            raise ValueError(f"ensemble: expected 'probabilities' or 'logits', got {ensemble!r}")
        network = {
            "features": features, "hidden": tuple(hidden), "order": order, "degrees": degrees, "seed": seed,
            "num_masks": num_masks, "resample_order": resample_order, "context_features": context_features,
            "activation": activation, "direct": direct,
        }  # fmt: skip
        self.config: dict[str, Any] = {**network, "ensemble": ensemble}
        self.ensemble = ensemble
        self.network = flows.MADE(params=1, **network)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``log_prob``: what DistributedDataParallel wraps is the forward."""
        return self.log_prob(x, context)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) [B] in nats, under the masks at hand."""
        return _bernoulli(x, self.network(x, context))

    def loss(self, x: Tensor, progress: float = 0.0) -> Tensor:
        """-log p(x) [B] under the next masks."""
        if self.training:
            self.network.resample()
        return -self.log_prob(x)

    def evaluate(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) [B] of the ensemble of all masks, as ``ensemble`` says; with one mask this is ``log_prob``."""
        if self.network.num_masks == 1:
            return self.log_prob(x, context)
        now, found = int(self.network.draw), []
        for index in range(self.network.num_masks):
            self.network.resample(index)
            logits = self.network(x, context)
            found.append(logits if self.ensemble == "logits" else _bernoulli(x, logits))
        self.network.resample(now)
        if self.ensemble == "logits":
            return _bernoulli(x, torch.stack(found).mean(0))
        return torch.logsumexp(torch.stack(found), 0) - math.log(len(found))

    @torch.no_grad()
    def sample_and_log_prob(
        self,
        n: int,
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(x [n, D] of 0 and 1, log p(x) [n]); the temperature divides the logits, 0 takes the likelier value."""
        if not temperature >= 0:
            raise ValueError(f"temperature: expected a number of at least 0, got {temperature}")
        like = self.network.linears[-1].weight
        shape, device = (n, self.network.features), like.device
        # uniform numbers u, and x = 1 where u < sigmoid(l / T), that is sigmoid(T logit(u)) < sigmoid(l)
        u = torch.rand(shape, generator=generator, dtype=like.dtype, device=device)
        if temperature != 1:
            u = torch.sigmoid(temperature * torch.logit(u, eps=1e-7))
        return self.network.inverse(u, context, form="bernoulli", scale="none")

    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """x [n, D] of 0 and 1."""
        return self.sample_and_log_prob(n, context, temperature, generator)[0]

    def initialize(self, batch: Tensor, context: Tensor | None = None) -> None:
        """Nothing here is initialised from data."""


_BITS = flows.Bernoulli()


def _bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """log p(x) [B], the sum in float32 at least."""
    _BITS.check(x)
    logits = logits.to(accumulator(logits.dtype))
    return -F.binary_cross_entropy_with_logits(logits, x.to(logits.dtype), reduction="none").sum(1)


class GaussianMADE(flows.Flow):
    r"""Real data: :math:`x_d \sim N(m_d(x_{<d}), e^{\alpha_d(x_{<d})})`, the conditionals of a masked network. A MAF of
    one layer.

    Args:
        features: D.
        hidden: widths of the hidden layers.
        options: more of :class:`fastflow.nn.MADE`.

    >>> model = GaussianMADE(3, hidden=(16,))
    >>> model.log_prob(model.sample(5)).shape
    torch.Size([5])
    """

    def __init__(self, features: int, hidden: Sequence[int] = (100,), **options: Any) -> None:
        # u = (x - m) e^(-alpha / 2)
        made = flows.MADE(features, hidden, **options)
        super().__init__(
            flows.StandardNormal(features),
            flows.MaskedAffine(made, form="shift_first", scale=scale_map("exp", gain=0.5)),
        )
        self.config: dict[str, Any] = {"features": features, "hidden": tuple(hidden), **options}
