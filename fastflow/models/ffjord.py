"""FFJORD: continuous flows by unrestricted networks, with a random estimate of the trace.

Grathwohl, Chen, Bettencourt, Sutskever & Duvenaud, 2019, https://arxiv.org/abs/1810.01367.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from fastflow.models.cnf import ContinuousFlow, check_traces
from fastflow.nn.base import Bijection
from fastflow.nn.base_distribution import StandardNormal
from fastflow.nn.continuous import Continuous, Trace
from fastflow.nn.dynamics import Activation, LayerKind, MLPDynamics
from fastflow.nn.moving_batch_norm import MovingBatchNorm
from fastflow.ops import _check

__all__ = ["FFJORD", "PRESETS"]

_TABULAR: dict[str, Any] = {"time": 1.0, "train_time": True, "kind": "gaussian", "rtol": 1e-6, "atol": 1e-8}

PRESETS: dict[str, dict[str, Any]] = {
    # rtqichen/ffjord, the commands of its README
    "toy": {"features": 2, "hidden": (64, 64, 64), "activation": "tanh", "time": 0.5, "trace": "exact"},
    "power": {"features": 6, "hidden": (60, 60, 60), "activation": "tanh", "blocks": 5, **_TABULAR},
    "gas": {"features": 8, "hidden": (160, 160, 160), "activation": "tanh", "blocks": 5, **_TABULAR},
    "hepmass": {"features": 21, "hidden": (210, 210), "activation": "softplus", "blocks": 10, **_TABULAR},
    "miniboone": {"features": 43, "hidden": (860, 860), "activation": "softplus", "blocks": 1, **_TABULAR},
    "bsds300": {"features": 63, "hidden": (1260, 1260, 1260), "activation": "softplus", "blocks": 2, **_TABULAR},
}


class FFJORD(ContinuousFlow):
    r"""``blocks`` continuous flows by :class:`fastflow.nn.MLPDynamics`, one after the other, over a standard normal.

    Args:
        features: D.
        hidden, layer, activation: of the dynamics.
        blocks: how many flows, each with dynamics of its own.
        batch_norm: moving batch normalisation before the first block and after every one.
        time, train_time, trace, eval_trace, probes, kind, method, rtol, atol, step_size, per_sample, adjoint,
            checkpoints, max_steps: of every block, :class:`fastflow.nn.Continuous`.
        kinetic, jacobian: coefficients of the regularisers of RNODE, :class:`ContinuousModel`.

    The density of a model that was trained with probes: ``log_prob(x, trace="exact")``, or ``eval_trace="exact"``;
    an estimate with its standard error: ``log_prob_estimate(x)``.

    >>> import torch
    >>> model = FFJORD(2, hidden=(16, 16), time=0.5, trace="exact")
    >>> x, log_prob = model.sample_and_log_prob(5)
    >>> bool(torch.allclose(model.log_prob(x), log_prob, atol=1e-3))
    True
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (64, 64, 64),
        blocks: int = 1,
        layer: LayerKind = "concat_squash",
        activation: Activation = "tanh",
        time: float = 0.5,
        train_time: bool = False,
        batch_norm: bool = False,
        trace: Trace = "hutchinson",
        eval_trace: Trace | None = None,
        probes: int = 1,
        kind: Literal["rademacher", "gaussian"] = "rademacher",
        method: str = "dopri5",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        step_size: float | None = None,
        per_sample: bool = False,
        adjoint: bool = False,
        checkpoints: int = 32,
        max_steps: int = 1000,
        kinetic: float = 0.0,
        jacobian: float = 0.0,
    ) -> None:
        _check.whole("blocks", blocks)
        check_traces(trace, eval_trace)
        network = {"features": features, "hidden": hidden, "layer": layer, "activation": activation}
        dynamics = [MLPDynamics(**network) for _ in range(blocks)]
        solve = {
            "time": time, "train_time": train_time, "trace": trace, "eval_trace": eval_trace, "probes": probes,
            "kind": kind, "method": method, "rtol": rtol, "atol": atol, "step_size": step_size,
            "per_sample": per_sample, "adjoint": adjoint, "checkpoints": checkpoints, "max_steps": max_steps,
        }  # fmt: skip
        layers: list[Bijection] = [MovingBatchNorm(features)] if batch_norm else []
        for each in dynamics:
            layers.append(Continuous(each, **solve))
            if batch_norm:
                layers.append(MovingBatchNorm(features))
        super().__init__(StandardNormal(features), layers, kinetic, jacobian)
        self.config: dict[str, Any] = {
            **dynamics[0].config, "blocks": blocks, "batch_norm": batch_norm, **solve,
            "kinetic": kinetic, "jacobian": jacobian,
        }  # fmt: skip

    @classmethod
    def preset(cls, name: str, **changes: Any) -> FFJORD:
        """A published model, :data:`PRESETS`, with changes."""
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **changes})
