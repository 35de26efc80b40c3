"""A bijection that is the solution of an ordinary differential equation."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastflow.errors import SolverError
from fastflow.nn import odeint
from fastflow.nn.base import Bijection, no_context
from fastflow.nn.dynamics import MLPDynamics
from fastflow.ops import _check
from fastflow.ops import trace as traces
from fastflow.ops._op import accumulator, without_autocast
from fastflow.ops.ode import Solution, Steps, checked_times, mlp_ode
from fastflow.ops.ode_method import METHODS

__all__ = ["Continuous", "Energies"]

TRACES = ("exact", "hutchinson", "bottleneck", None)

Trace = Literal["exact", "hutchinson", "bottleneck"]

_uncompiled = torch._disable_dynamo(odeint.integrate)  # torchdiffeq's loops; it is torch.compiler.disable, at first use


class Energies(NamedTuple):
    """Of every sample [B]: the integrals over the time of |f|^2, and of the mean of |J e|^2 over the probes (an
    unbiased estimate of the squared Frobenius norm of J; that itself with an exact trace)."""

    kinetic: Tensor
    jacobian: Tensor


class Continuous(Bijection):
    r"""z = x(T) for :math:`\frac{dx}{dt} = f(t, x)` from x(0) = x, with
    :math:`\log|\det \frac{\partial z}{\partial x}| = \int_0^T \mathrm{tr}\,\frac{\partial f}{\partial x}\, dt`.

    Data are at the time 0, latents at T. The inverse integrates from T to 0.

    :class:`fastflow.nn.MLPDynamics` run fused: the whole solve is one native call, :func:`fastflow.mlp_ode`. Any other
    module is integrated by torchdiffeq (``pip install 'fastflow[ode]'``), with the same signs, step control and names.

    Args:
        dynamics: a module (t, x [B, ...]) -> dx/dt that does not mix samples. Exact traces ask it for
            ``value_and_trace(t, x)`` where it has that method. It is called with x in float32 or float64, whatever the
            dtype of its parameters: move it together with what it is given. There is no context: dynamics that
            depend on something else hold it.
        time: T.
        train_time: makes :math:`T = \tau^2` with a learned parameter ``sqrt_time``, :math:`\tau`.
        trace: ``exact``, by D unit tangents, for small D; ``hutchinson``, the mean of e . J e over random probes e,
            unbiased; ``bottleneck``, Hutchinson's estimate in the narrow layer of a
            :class:`fastflow.nn.BottleneckDynamics`; None: values only, the log-determinant is then not computed and
            comes back as zeros.
        eval_trace: the trace in evaluation mode; None: the same one. Densities of a model that was trained with probes
            are exact with ``exact``.
        probes: how many. They are drawn once for each solve, so that the equation stays one of no randomness.
        kind: ``rademacher``, signs, or ``gaussian``.
        method: ``dopri5``, ``bosh3``, ``tsit5`` (fused only) adapt their steps to ``rtol`` and ``atol``; ``euler``,
            ``midpoint``, ``rk4`` take steps of ``step_size`` (one step, where that is None). Modules have
            torchdiffeq's other methods as well.
        rtol, atol: the error allowed in a step, relative and absolute, as torchdiffeq measures it: over the batch, so
            that a sample's result depends on the others by about the tolerance.
        per_sample: step control of every sample by itself; its result then does not depend on the batch. Fused only.
        adjoint: False: the gradient is exact for the steps as they were taken. Fused, a training step takes two to
            three times as long as a density, and memory of ``checkpoints`` times B D whatever the number of steps; of
            modules every intermediate result of every evaluation is kept. True: the adjoint equation is solved
            backwards, in about the same time or a little more; the memory is that of one state, and the gradient is
            off by an error of the size of the tolerances, more where the dynamics contract. It has no second
            derivatives for modules.
        checkpoints: states that the exact gradient of a fused solve keeps; those between are recomputed.
        regularize: integrates :class:`Energies` beside the state: see :attr:`energies`. Of modules in reverse mode
            (``product``) the second is made of the products at hand, :math:`|J^\top e|^2`: other numbers for the same
            probes, with the same mean, :math:`\|J\|_F^2`; of exact traces they are equal.
        max_steps: more of them raise ``SolverError``.
        product: how the trace of a module is taken, in reverse mode (``vjp``) or in forward mode (``jvp``), by the
            module's own method ``jvp(t, x, tangents [S, B, ...]) -> (value, products)`` where it has one; None: the
            latter where it has one.
        fused: False: MLPs too go through torchdiffeq.

    After every call :attr:`steps` says what the solve took, after a backward pass by the adjoint :attr:`adjoint_steps`
    what that took.

    Raises:
        ValueError: arguments that do not fit together, an x that is not finite, naming the sample.
        SolverError: a state that is not finite, a step that underflows, too many steps; names time, step and sample.
        MissingPackage: torchdiffeq is needed and not installed.

    Papers: Neural ODE, https://arxiv.org/abs/1806.07366; FFJORD, https://arxiv.org/abs/1810.01367; the regularisers,
    https://arxiv.org/abs/2002.02798.

    >>> flow = Continuous(MLPDynamics(2, hidden=(16,)), trace="exact")
    >>> x = torch.randn(5, 2)
    >>> z, logdet = flow(x)
    >>> back, minus = flow.inverse(z)
    >>> bool(torch.allclose(back, x, atol=1e-3)), bool(torch.allclose(minus, -logdet, atol=1e-3))
    (True, True)
    """

    def __init__(
        self,
        dynamics: nn.Module,
        time: float = 1.0,
        *,
        train_time: bool = False,
        trace: Trace | None = "hutchinson",
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
        regularize: bool = False,
        max_steps: int = 1000,
        product: Literal["vjp", "jvp"] | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(dynamics, nn.Module):
            raise TypeError(f"dynamics: expected a module (t, x) -> dx/dt, got {dynamics!r}")
        for name, value in (("time", time), ("rtol", rtol), ("atol", atol)):
            _check.number(name, value)
        for name, value in (("probes", probes), ("max_steps", max_steps), ("checkpoints", checkpoints)):
            _check.whole(name, value)
        if not 0 <= time < math.inf:
            raise ValueError(f"time: expected a number of at least 0, got {time}")
        if kind not in traces.KINDS:
            raise ValueError(f"kind: expected one of {', '.join(traces.KINDS)}, got {kind!r}")
        if not (rtol >= 0 and atol >= 0 and rtol + atol > 0 and rtol + atol < math.inf):
            raise ValueError(f"rtol, atol: expected numbers of at least 0, not both 0, got {rtol} and {atol}")
        if step_size is not None:
            _check.number("step_size", step_size)
            if not 0 < step_size < math.inf:
                raise ValueError(f"step_size: expected a positive number, got {step_size}")
        product = product or ("jvp" if hasattr(dynamics, "jvp") else "vjp")
        if product not in traces.METHODS:
            raise ValueError(f"product: expected one of {', '.join(traces.METHODS)}, got {product!r}")
        self.dynamics, self.time = dynamics, time
        self.sqrt_time = nn.Parameter(torch.tensor(math.sqrt(time))) if train_time else None
        self.trace, self.eval_trace, self.probes, self.kind = trace, eval_trace, probes, kind
        self.method, self.rtol, self.atol, self.step_size = method, rtol, atol, step_size
        self.adjoint, self.checkpoints, self.per_sample = adjoint, checkpoints, per_sample
        self.regularize, self.max_steps, self.product = regularize, max_steps, product
        self.fused = fused and isinstance(dynamics, MLPDynamics) and method in METHODS
        self._last: Solution | None = None
        self._backward: list[Steps] | odeint.Watch | None = None  # what counts the steps of an adjoint
        for each in (trace, eval_trace):
            self._check_trace("trace", each)
        if not self.fused:
            self._check_module()

    # --- both directions --------------------------------------------------------------------------------

    def forward(self, x: Tensor, context: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """(x(T), the log-determinant [B]); options as in :meth:`solve`."""
        return self._through(x, context, self._times(), options)

    def inverse(self, z: Tensor, context: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        return self._through(z, context, self._times().flip(0), options)

    def _through(
        self, x: Tensor, context: Tensor | None, times: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        no_context(context)
        solution = self.solve(x, times, **options)
        return solution.value[-1], _mean(solution.trace, solution.value)[-1]

    def trajectory(self, x: Tensor, times: Sequence[float] | Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """The flow on its way: from x at times[0] to (the states [T, B, ...], their log-determinants [T, B]) at
        times[1:]. Rising from 0 to T it goes from data to latents, falling the other way."""
        solution = self.solve(x, times, **options)
        return solution.value, _mean(solution.trace, solution.value)

    def solve(
        self,
        x: Tensor,
        times: Sequence[float] | Tensor,
        *,
        trace: Trace | Literal["own"] | None = "own",
        probes: int | Tensor | None = None,
        regularize: bool | None = None,
    ) -> Solution:
        """x [B, ...] from times[0] to all of times[1:], with everything that was integrated beside it.

        Args:
            times: monotone, rising or falling; equal neighbours repeat the state.
            trace: instead of the module's own.
            probes: how many to draw, or the probes themselves [S, B, ...].
            regularize: instead of the module's own.
        """
        _check.floating("x", x, dims=2)
        trace = self._own_trace() if trace == "own" else trace
        regularize = self.regularize if regularize is None else regularize
        self._check_trace("trace", trace)
        if regularize and trace not in ("exact", "hutchinson"):
            raise ValueError(f"regularize: expected an exact trace or hutchinson's, got trace={trace!r}")
        if not (self.fused and isinstance(times, Tensor)):  # mlp_ode looks for itself
            times = checked_times(times)
        if not self.fused:
            _check_finite(x)
        dtype = accumulator(x.dtype)
        with without_autocast(x):
            solution = self._solve(x.to(dtype), times, trace, probes, regularize)
        if x.dtype != dtype:
            solution = solution._replace(value=solution.value.to(x.dtype))
        self._last = solution
        return solution

    def _solve(
        self, x: Tensor, times: Tensor, trace: Trace | None, probes: int | Tensor | None, regularize: bool
    ) -> Solution:
        e = None if trace in ("exact", None) else self._probes(x, times, trace, probes)
        given: dict[str, Any] = {
            "probes": e, "regularize": regularize, "method": self.method, "rtol": self.rtol, "atol": self.atol,
            "step_size": self.step_size,
        }  # fmt: skip
        if not self.fused:
            self._backward = odeint.Watch(self.method, self.max_steps)
            given |= {"trace": trace, "product": self.product, "adjoint": self.adjoint and torch.is_grad_enabled()}
            # frames that torch.compile has given up are not "compiling"; the import that it takes costs seconds
            integrate = _uncompiled if "torch._dynamo" in sys.modules else odeint.integrate
            try:
                return integrate(self.dynamics, x, times.to(x.device), watch=self._backward, **given)
            except RuntimeError as error:
                self._explain(error, x.dtype)
                raise
        self._backward = []
        return mlp_ode(
            x,
            times,
            self.dynamics.layers,
            layer=self.dynamics.layer,
            activation=self.dynamics.activation,
            exact=trace == "exact",
            per_sample=self.per_sample,
            gradient="adjoint" if self.adjoint else "steps",
            checkpoints=self.checkpoints,
            max_steps=self.max_steps,
            report=self._backward.append,
            **given,
        )

    def _explain(self, error: RuntimeError, dtype: torch.dtype) -> None:
        """Raises for parameters of another dtype than x, which may be why the dynamics failed."""
        others = {p.dtype for p in self.dynamics.parameters() if p.is_floating_point()} - {dtype}
        if others and not isinstance(error, SolverError):
            names = " and ".join(sorted(map(str, others)))
            raise TypeError(
                f"x: the dynamics have parameters of {names} and fail with x of {dtype}, which the solver hands them; "
                f"half precision is solved in float32 ({error})"
            ) from error

    def _probes(self, x: Tensor, times: Tensor, trace: Trace, probes: int | Tensor | None) -> Tensor:
        """[S, B, ...], those of a bottleneck as wide as it is."""
        probes = self.probes if probes is None else probes
        if isinstance(probes, Tensor):
            if trace == "hutchinson" and probes.shape[1:] != x.shape:
                raise ValueError(f"probes: expected [S, {', '.join(map(str, x.shape))}], got {list(probes.shape)}")
            return probes.detach().to(x.dtype)
        shape = x.shape
        if trace == "bottleneck" and len(x):
            with torch.no_grad():
                shape = self.dynamics.encoder(times[0].to(x), x).shape
        _check.whole("probes", probes)
        return traces.probes((probes, *shape), self.kind, dtype=x.dtype, device=x.device)

    # --- what the last call took ------------------------------------------------------------------------

    @property
    def steps(self) -> Steps:
        """(evaluations, accepted steps, rejected steps) of the last call; [B] of each with ``per_sample``."""
        return self._of_last().steps

    @property
    def adjoint_steps(self) -> Steps:
        """As :attr:`steps`, of the backward solve: of all backward passes since the last call, by the adjoint."""
        if isinstance(self._backward, odeint.Watch):
            taken = [self._backward.steps()] if self._backward.evaluations else []
        else:
            taken = self._backward or []
        if not (self.adjoint and taken):
            raise RuntimeError("adjoint_steps: no backward pass has solved an adjoint since the last call")
        return Steps(*(torch.stack(counts).sum(0) for counts in zip(*taken, strict=True)))

    @property
    def energies(self) -> Energies:
        """Of the last call, with ``regularize``; they have the graph of that call."""
        last = self._of_last()
        if last.kinetic is None:
            raise RuntimeError("energies: the last call had regularize=False")
        return Energies(last.kinetic[-1], last.jacobian[-1])

    @property
    def estimates(self) -> Tensor:
        """The log-determinants [S, B] by each probe of the last call; [1, B] of an exact trace."""
        trace = self._of_last().trace
        if trace is None:
            raise RuntimeError("estimates: the last call had trace=None")
        return trace[-1] if trace.dim() == 3 else trace[-1:]

    def _of_last(self) -> Solution:
        if self._last is None:
            raise RuntimeError("this module has not been called yet")
        return self._last

    def __getstate__(self) -> dict[str, Any]:
        # the last call is not part of a copy: its tensors belong to a graph
        return {**self.__dict__, "_last": None, "_backward": None}

    # --- small things -----------------------------------------------------------------------------------

    @property
    def end_time(self) -> float | Tensor:
        """T; a tensor where it is learned."""
        return self.time if self.sqrt_time is None else self.sqrt_time.double() ** 2

    def _times(self) -> Tensor:
        end = self.end_time
        if isinstance(end, Tensor):
            return torch.stack([torch.zeros_like(end), end])
        return torch.tensor([0.0, end], dtype=torch.float64)

    def _own_trace(self) -> Trace | None:
        return self.trace if self.training or self.eval_trace is None else self.eval_trace

    def _check_trace(self, name: str, trace: str | None) -> None:
        if trace not in TRACES:
            raise ValueError(f"{name}: expected one of {', '.join(map(str, TRACES))}, got {trace!r}")
        if trace == "bottleneck" and not (hasattr(self.dynamics, "encoder") and hasattr(self.dynamics, "decoder")):
            raise ValueError(f"{name}: 'bottleneck' needs dynamics with an encoder and a decoder, BottleneckDynamics")

    def _check_module(self) -> None:
        known = (*odeint.ADAPTIVE, *odeint.FIXED)
        if self.method not in known:
            only = " for modules (tsit5 is there for MLPDynamics only)" if self.method == "tsit5" else ""
            raise ValueError(f"method: expected one of {', '.join(known)}{only}, got {self.method!r}")
        if self.step_size is not None and self.method in odeint.ADAPTIVE:
            raise ValueError(f"step_size: {self.method!r} adapts its steps when torchdiffeq integrates a module")
        if self.per_sample:
            raise ValueError("per_sample: there for MLPDynamics only, torchdiffeq's steps are those of a batch")

    def extra_repr(self) -> str:
        time = "learned" if self.sqrt_time is not None else self.time
        return f"time={time}, trace={self.trace}, method={self.method}, rtol={self.rtol}, atol={self.atol}"


def _mean(trace: Tensor | None, value: Tensor) -> Tensor:
    """Over the probes, [T, B]."""
    if trace is None:
        return value.new_zeros(value.shape[:2], dtype=accumulator(value.dtype))
    return trace.mean(1) if trace.dim() == 3 else trace


def _check_finite(x: Tensor) -> None:
    if not x.detach().isfinite().all():
        bad = (~x.detach().isfinite()).flatten(1).any(1).nonzero()
        raise ValueError(f"x: expected finite values, got others in sample {int(bad[0])}")
