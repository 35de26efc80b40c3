"""A density, or an approximate posterior, on vectors by a planar flow.

Rezende & Mohamed, variational inference with normalizing flows, 2015, https://arxiv.org/abs/1505.05770.
"""

from __future__ import annotations

from typing import Any, Literal

from fastflow.nn.base import Bijection, Inverse
from fastflow.nn.base_distribution import StandardNormal
from fastflow.nn.flow import Flow
from fastflow.nn.planar import Planar as PlanarLayer

__all__ = ["Planar", "StepFlow"]


class StepFlow(Flow):
    """A standard normal seen through K steps of ``layer``.

    The formula of a step runs one way; the other way is solving it. ``direction`` says which way the formula is:
    ``"density"`` from data to latents, so that ``log_prob`` evaluates it, or ``"sampling"`` from latents to data, as in
    the paper: then ``sample_and_log_prob`` evaluates it, to fit an energy, and ``log_prob`` of data goes through the
    inverse. Both can be trained either way; they are different families of densities.

    Args:
        features: D; x is [B, D].
        steps: K.
        direction: which way the formula of a step runs.
    """

    layer: type[Bijection]

    def __init__(
        self, features: int = 2, steps: int = 32, direction: Literal["density", "sampling"] = "density"
    ) -> None:
        if direction not in ("density", "sampling"):
            raise ValueError(f"direction: expected density or sampling, got {direction!r}")
        layer = self.layer(features, steps)
        super().__init__(StandardNormal(features), layer if direction == "density" else Inverse(layer))
        self.config: dict[str, Any] = {"features": features, "steps": steps, "direction": direction}


class Planar(StepFlow):
    """K planar units, solved the other way by one scalar equation per unit and sample; arguments: :class:`StepFlow`.

    >>> import torch
    >>> model = Planar(features=2, steps=4)
    >>> model.log_prob(torch.zeros(3, 2)).shape, model.sample(5).shape
    (torch.Size([3]), torch.Size([5, 2]))
    """

    layer = PlanarLayer
