"""A density, or an approximate posterior, on vectors by a radial flow.

Rezende & Mohamed, variational inference with normalizing flows, 2015, https://arxiv.org/abs/1505.05770.
"""

from __future__ import annotations

from fastflow.models.planar import StepFlow
from fastflow.nn.radial import Radial as RadialLayer

__all__ = ["Radial"]


class Radial(StepFlow):
    """K radial steps, solved the other way in closed form; arguments: :class:`fastflow.models.planar.StepFlow`.

    >>> import torch
    >>> model = Radial(features=2, steps=4)
    >>> model.log_prob(torch.zeros(3, 2)).shape, model.sample(5).shape
    (torch.Size([3]), torch.Size([5, 2]))
    """

    layer = RadialLayer
