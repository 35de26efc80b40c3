"""Inverse autoregressive flow: the posterior of a VAE made flexible by layers that are cheap in the direction z0 -> zK.

Kingma et al., 2016, https://arxiv.org/abs/1606.04934.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastflow.nn.base import Inverse, Sequential
from fastflow.nn.base_distribution import StandardNormal
from fastflow.nn.flow import Flow
from fastflow.nn.made import MADE
from fastflow.nn.masked_affine import MaskedAffine
from fastflow.ops.masked import Activation
from fastflow.ops.scale_map import scale_map

__all__ = ["IAF", "IAFlow"]


class IAF(Sequential):
    r"""``steps`` gated autoregressive layers, :math:`z_k = \sigma_k z_{k-1} + (1 - \sigma_k) m_k`, each in the reverse
    order of the one before.

    ``forward`` is z0 -> zK in parallel, ``inverse`` zK -> z0 by incremental sweeps: a posterior flow as it is, and a
    density of data that samples in parallel as ``fastflow.nn.Inverse(IAF(...))``.

    Args:
        features: D.
        steps: K.
        hidden: the widths of the hidden layers of every network.
        context_features: P of the context [B, P] that an encoder gives; 0: none.
        forget_bias: beta of sigma = sigmoid(s + beta); 2 starts near the identity.
        activation: of the networks.

    >>> import torch
    >>> iaf = IAF(4, steps=2, hidden=(32,), context_features=3)
    >>> z0, h = torch.randn(5, 4), torch.randn(5, 3)
    >>> zk, logdet = iaf(z0, h)
    >>> bool(torch.allclose(iaf.inverse(zk, h)[0], z0, atol=1e-4))
    True
    """

    def __init__(
        self,
        features: int,
        steps: int = 4,
        hidden: Sequence[int] = (320,),
        context_features: int = 0,
        forget_bias: float = 2.0,
        activation: Activation = "elu",
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        scale = scale_map("sigmoid2", offset=forget_bias)

        def layer(k: int) -> MaskedAffine:
            order = "reversed" if k % 2 else None
            made = MADE(features, hidden, order=order, context_features=context_features, activation=activation)
            return MaskedAffine(made, form="gate", scale=scale)

        super().__init__(*map(layer, range(steps)))
        self.context_features = context_features


class IAFlow(Flow):
    """:class:`IAF` as a density of data: samples come in parallel, densities by incremental sweeps.

    Arguments as in :class:`IAF`.
    """

    def __init__(self, features: int, **options: Any) -> None:
        super().__init__(StandardNormal(features), Inverse(IAF(features, **options)))
        self.config = {"features": features, **options}
