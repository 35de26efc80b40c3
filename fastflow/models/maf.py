"""Masked autoregressive flow: layers of Gaussian MADEs, each in another order, with normalisation between them.

Papamakarios et al., 2017, https://arxiv.org/abs/1705.07057.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from fastflow import nn as flows
from fastflow.nn.base import Bijection
from fastflow.ops.masked import Activation
from fastflow.ops.scale_map import scale_map

__all__ = ["MAF", "PRESETS"]

PRESETS: dict[str, dict[str, Any]] = {
    # gpapamak/maf, run_experiments.py: the models of table 1, and the hidden widths of table 2's data sets
    "power": {"features": 6, "steps": 5, "hidden": (100, 100)},
    "gas": {"features": 8, "steps": 5, "hidden": (100, 100)},
    "hepmass": {"features": 21, "steps": 5, "hidden": (512, 512)},
    "miniboone": {"features": 43, "steps": 5, "hidden": (512, 512)},
    "bsds300": {"features": 63, "steps": 5, "hidden": (512, 512)},
}


class MAF(flows.Flow):
    r"""``steps`` layers :math:`u_d = (x_d - m_d(x_{<d}))\, s_d(x_{<d})` over a standard normal.

    A density takes one pass of every network; a sample one incremental sweep of each, not D passes.

    Args:
        features: D.
        steps: K.
        hidden: the widths of the hidden layers of every network.
        order: of the variables: "reversed" turns it round from layer to layer, "random" draws one for every layer.
        norm: what lies between the layers, "batch" normalisation as published, "act"norm, or None.
        context_features: P of a context [B, P] for every network; 0: none.
        activation: of the networks.
        scale: s(h); the default is e^(h / 2), where h is minus the logarithm of the variance.
        seed: of the random orders.
        residual: residual blocks, :class:`fastflow.nn.MADE`.

    >>> model = MAF(3, steps=2, hidden=(16,)).eval()
    >>> model.log_prob(model.sample(5)).shape
    torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        steps: int = 5,
        hidden: Sequence[int] = (100, 100),
        order: Literal["reversed", "random"] = "reversed",
        norm: Literal["batch", "act"] | None = "batch",
        context_features: int = 0,
        activation: Activation = "relu",
        scale: str | None = None,
        seed: int = 0,
        residual: bool = False,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        if order not in ("reversed", "random"):
            raise ValueError(f"order: expected 'reversed' or 'random', got {order!r}")
        if norm not in ("batch", "act", None):
            raise ValueError(f"norm: expected 'batch', 'act' or None, got {norm!r}")
        config = {
            "features": features, "steps": steps, "hidden": tuple(hidden), "order": order, "norm": norm,
            "context_features": context_features, "activation": activation, "scale": scale, "seed": seed,
            "residual": residual,
        }  # fmt: skip
        chosen = scale_map("exp", gain=0.5) if scale is None else scale_map(scale)
        generator = torch.Generator().manual_seed(seed)
        layers: list[Bijection] = []
        for k in range(steps):
            turned = "reversed" if k % 2 else None
            made = flows.MADE(
                features,
                hidden,
                order=torch.randperm(features, generator=generator) if order == "random" else turned,
                context_features=context_features,
                activation=activation,
                residual=residual,
            )
            layers.append(flows.MaskedAffine(made, form="shift_first", scale=chosen))
            if norm is not None:
                layers.append(flows.BatchNorm(features, affine=True) if norm == "batch" else flows.ActNorm(features))
        super().__init__(flows.StandardNormal(features), flows.Sequential(*layers))
        self.config: dict[str, Any] = config

    @classmethod
    def preset(cls, name: str, **changes: Any) -> MAF:
        """A published model, :data:`PRESETS`, with changes."""
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **changes})
