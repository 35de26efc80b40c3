"""Continuous normalizing flows: the latent is the solution of a differential equation that starts at the data.

Chen, Rubanova, Bettencourt & Duvenaud, neural ordinary differential equations, 2018,
https://arxiv.org/abs/1806.07366.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastflow.nn.base import Bijection, Sequential
from fastflow.nn.base_distribution import Base, DiagonalGaussian, StandardNormal
from fastflow.nn.continuous import Continuous, Trace
from fastflow.nn.dynamics import MLPDynamics
from fastflow.nn.flow import Flow

__all__ = ["CNF", "ContinuousFlow", "ContinuousModel", "Estimate", "PlanarDynamics"]


class Estimate(NamedTuple):
    """A log-likelihood [B] in nats, the mean over several probes, and its standard error [B]."""

    log_prob: Tensor
    standard_error: Tensor


def _continuous(module: nn.Module) -> Iterator[Continuous]:
    for child in module.children():
        yield from [child] if isinstance(child, Continuous) else _continuous(child)


class ContinuousModel(nn.Module):
    r"""What models share of whose layers some are :class:`fastflow.nn.Continuous`; it stands before the class that
    says how the layers make a density, :class:`fastflow.nn.Flow` or :class:`fastflow.nn.MultiScale`.

    :attr:`kinetic` and :attr:`jacobian` are :math:`\lambda_K, \lambda_J` of the loss
    :math:`-\log p(x) + \lambda_K \int |f|^2 dt + \lambda_J \int |\partial_x f\, e|^2 dt`, summed over the layers.
    """

    kinetic = jacobian = 0.0

    def _regularise(self, kinetic: float, jacobian: float) -> None:
        for name, value in (("kinetic", kinetic), ("jacobian", jacobian)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a number of at least 0, got {value}")
        self.kinetic, self.jacobian = kinetic, jacobian

    @property
    def blocks(self) -> list[Continuous]:
        """The continuous layers, from data to latents."""
        return list(dict.fromkeys(_continuous(self)))

    @property
    def evaluations(self) -> int:
        """Of the dynamics, in the last pass through all blocks; the largest of the samples' with ``per_sample``."""
        return sum(int(block.steps.evaluations.max()) for block in self.blocks)

    @contextmanager
    def _blocks_with(self, **settings: Any) -> Iterator[None]:
        """All blocks with other settings for a while; a trace is that of both modes."""
        if not settings:
            yield
            return
        if "trace" in settings:
            settings["eval_trace"] = settings["trace"]
        blocks = self.blocks
        before = [{name: getattr(block, name) for name in settings} for block in blocks]
        try:
            for block in blocks:
                vars(block).update(settings)
            yield
        finally:
            for block, old in zip(blocks, before, strict=True):
                vars(block).update(old)

    def log_prob(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        trace: Trace | None = None,
        probes: int | Tensor | None = None,
    ) -> Tensor:
        """log p(x) [B] in nats. ``trace`` and ``probes`` instead of the model's own: ``trace="exact"`` is the density
        of a model that was trained with random probes. One more probe costs about as much as the value does, the exact
        trace of D dimensions D of them."""
        changes = {"trace": trace, "probes": probes}
        with self._blocks_with(**{name: value for name, value in changes.items() if value is not None}):
            return super().log_prob(x, context)

    def log_prob_estimate(self, x: Tensor, probes: int = 16) -> Estimate:
        """log p(x) by several probes for every sample, in one pass, and the standard error that they leave."""
        if probes < 2:
            raise ValueError(f"probes: a standard error takes at least 2, got {probes}")
        trace = "bottleneck" if self.blocks[0].trace == "bottleneck" else "hutchinson"
        log_prob = self.log_prob(x, trace=trace, probes=probes)
        each = torch.stack([block.estimates for block in self.blocks]).sum(0)  # [S, B]
        return Estimate(log_prob, each.std(0) / math.sqrt(probes))

    def loss(self, x: Tensor, progress: float = 0.0) -> Tensor:
        """What training minimises, [B] in nats: the energies come out of the pass that makes the density."""
        if not (self.kinetic or self.jacobian):
            return -self(x)
        with self._blocks_with(regularize=True):
            loss = -self(x)
        for block in self.blocks:
            loss = loss + self.kinetic * block.energies.kinetic + self.jacobian * block.energies.jacobian
        return loss

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """n samples; the trace is left out, so that the steps may differ from those of ``sample_and_log_prob``."""
        with self._blocks_with(trace=None):
            return super().sample(n, context, temperature, generator)


class ContinuousFlow(ContinuousModel, Flow):
    """A base seen through layers of which some are :class:`fastflow.nn.Continuous`.

    Args:
        base, layers: of the flow.
        kinetic, jacobian: of the loss, :class:`ContinuousModel`.
    """

    def __init__(self, base: Base, layers: Iterable[Bijection], kinetic: float = 0.0, jacobian: float = 0.0) -> None:
        super().__init__(base, Sequential(*layers))
        self._regularise(kinetic, jacobian)

    def log_prob(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        trace: Trace | None = None,
        probes: int | Tensor | None = None,
    ) -> Tensor:
        if tuple(x.shape[1:]) != self.base.shape:
            raise ValueError(f"x: expected [B, {', '.join(map(str, self.base.shape))}], got {list(x.shape)}")
        return super().log_prob(x, context, trace=trace, probes=probes)


def check_traces(trace: Trace, eval_trace: Trace | None) -> None:
    """Raises for traces that a model whose dynamics have no bottleneck cannot take."""
    for name, value in (("trace", trace), ("eval_trace", eval_trace or "exact")):
        if value not in ("exact", "hutchinson"):
            raise ValueError(f"{name}: expected 'exact' or 'hutchinson', got {value!r}")


class CNF(ContinuousFlow):
    r"""One continuous flow by any dynamics, with the data at the time 0 and the latent at ``time``.

    Args:
        dynamics: a module (t, x) -> dx/dt; or one of fastflow's as data, ``{"kind": "planar", "features": 2, ...}``
            with the arguments of :class:`PlanarDynamics`, ``{"kind": "mlp", ...}`` of
            :class:`fastflow.nn.MLPDynamics`.
        features: D or the shape of a sample; ``dynamics.features`` where it is not given.
        trace: ``exact``, ``hutchinson`` or ``bottleneck``.
        solver: the method.
        base_std: the standard deviation of the normal base.
        kinetic, jacobian: coefficients of the regularisers, :class:`ContinuousModel`.
        time, train_time, eval_trace, probes, kind, rtol, atol, step_size, per_sample, adjoint, checkpoints, max_steps:
            as for :class:`fastflow.nn.Continuous`.

    The model is of the dtype and on the device of the dynamics it is given, and moves as a whole with ``to``.

    ``config`` rebuilds the model where the dynamics are data or one of fastflow's; a module of your own is passed
    again.

    >>> model = CNF({"kind": "planar", "features": 2, "width": 8}, time=1.0, solver="rk4", step_size=0.1)
    >>> model.log_prob(torch.randn(5, 2)).shape, model.sample(3).shape
    (torch.Size([5]), torch.Size([3, 2]))
    """

    def __init__(
        self,
        dynamics: nn.Module | Mapping[str, Any],
        features: int | Sequence[int] | None = None,
        *,
        trace: Trace = "exact",
        solver: str = "dopri5",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        adjoint: bool = False,
        time: float = 1.0,
        train_time: bool = False,
        eval_trace: Trace | None = None,
        probes: int = 1,
        kind: Literal["rademacher", "gaussian"] = "rademacher",
        step_size: float | None = None,
        per_sample: bool = False,
        checkpoints: int = 32,
        max_steps: int = 1000,
        base_std: float = 1.0,
        kinetic: float = 0.0,
        jacobian: float = 0.0,
    ) -> None:
        if trace is None:
            raise ValueError("trace: a density needs one, got None")
        if not 0 < base_std < math.inf:
            raise ValueError(f"base_std: expected a positive number, got {base_std}")
        options = {
            "time": time, "train_time": train_time, "trace": trace, "eval_trace": eval_trace, "probes": probes,
            "kind": kind, "rtol": rtol, "atol": atol, "step_size": step_size, "per_sample": per_sample,
            "adjoint": adjoint, "checkpoints": checkpoints, "max_steps": max_steps,
        }  # fmt: skip
        module = dynamics if isinstance(dynamics, nn.Module) else _dynamics(dynamics)
        own = getattr(module, "features", None)
        features = own if features is None else features
        if features is None:
            raise ValueError("features: expected the shape of a sample, as these dynamics have no attribute 'features'")
        if isinstance(own, int) and features not in (own, (own,), [own]):
            raise ValueError(f"features: expected {own}, those of the dynamics, got {features}")
        base: Base = StandardNormal(features)
        if base_std != 1:
            base = DiagonalGaussian(features, learned=False)
            base.log_scale.fill_(math.log(base_std))
        super().__init__(base, [Continuous(module, method=solver, **options)], kinetic, jacobian)
        if (like := next(module.parameters(), None)) is not None:
            self.base.to(like)  # samples have the dtype and device of the dynamics
        self.config: dict[str, Any] = {
            "dynamics": _described(module), "features": features, "solver": solver, "base_std": base_std,
            "kinetic": kinetic, "jacobian": jacobian, **options,
        }  # fmt: skip


class PlanarDynamics(nn.Module):
    r"""The mean of planar units whose parameters a network makes of the time, and its trace in closed form:

    .. math:: f(t, x) = \frac1N \sum_n u_n(t) \tanh(w_n(t)^\top x + b_n(t)), \qquad
        \mathrm{tr} = \frac1N \sum_n (1 - \tanh^2)\, w_n^\top u_n

    Args:
        features: D.
        width: N.
        hidden: of the network 1 -> hidden -> hidden -> 3 N D + N with tanh, whose outputs are w, u, the gates of u, b.

    Paper: https://arxiv.org/abs/1806.07366, section 4.
    """

    def __init__(self, features: int = 2, width: int = 64, hidden: int = 32) -> None:
        super().__init__()
        for name, value in (("features", features), ("width", width), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.features, self.width = features, width
        self.config: dict[str, Any] = {"features": features, "width": width, "hidden": hidden}
        self.network = nn.Sequential(
            nn.Linear(1, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, 3 * width * features + width),
        )

    def units(self, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """(w [N, D], u [N, D], b [N]) at the time t."""
        like = self.network[0].weight
        t = t.to(like) if isinstance(t, Tensor) else like.new_tensor(t)
        *square, b = self.network(t.reshape(1)).split([self.width * self.features] * 3 + [self.width])
        w, u, gate = (part.view(self.width, self.features) for part in square)
        return w, u * torch.sigmoid(gate), b

    def value_and_trace(self, t: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor]:
        """(f [B, D], its trace [B])"""
        w, u, b = self.units(t)
        h = torch.tanh(nn.functional.linear(x, w, b))
        return h @ u / self.width, (1 - h * h) @ (w * u).sum(1) / self.width

    def forward(self, t: Tensor | float, x: Tensor) -> Tensor:
        w, u, b = self.units(t)
        return torch.tanh(nn.functional.linear(x, w, b)) @ u / self.width


_KINDS: dict[str, type[nn.Module]] = {"mlp": MLPDynamics, "planar": PlanarDynamics}


def _dynamics(description: Mapping[str, Any]) -> nn.Module:
    if not isinstance(description, Mapping):
        raise TypeError(f"dynamics: expected a module (t, x) -> dx/dt or a mapping, got {description!r}")
    arguments = dict(description)
    kind = arguments.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"dynamics: expected a module or the kind {' or '.join(_KINDS)}, got {description!r}")
    return _KINDS[kind](**arguments)


def _described(module: nn.Module) -> dict[str, Any] | None:
    for kind, known in _KINDS.items():
        if type(module) is known:
            return {"kind": kind, **module.config}
    return None
