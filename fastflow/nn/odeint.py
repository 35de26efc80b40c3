"""Any module's dynamics integrated by torchdiffeq, with the trace of its Jacobian and the regularisers beside it.

What :func:`fastflow.mlp_ode` is for MLPs in one native call; the same names, signs and step control.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastflow.errors import SolverError, need
from fastflow.ops.ode import Solution, Steps
from fastflow.ops.trace import bottleneck_products, dot, jacobian_products, unit_probes

__all__ = ["ADAPTIVE", "FIXED", "Watch", "integrate"]

ADAPTIVE = ("dopri5", "bosh3", "dopri8", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams")

State = tuple[Tensor, ...]


def integrate(
    dynamics: nn.Module,
    x: Tensor,
    times: Tensor,
    *,
    trace: str | None,
    probes: Tensor | None,
    product: str,
    regularize: bool,
    method: str,
    rtol: float,
    atol: float,
    step_size: float | None,
    adjoint: bool,
    watch: Watch,
) -> Solution:
    """x [B, ...] from times[0] to times[1:]. The trace is [T, B] where it is exact or None, else [T, S, B]."""
    torchdiffeq = need("torchdiffeq", "torchdiffeq", "ode")
    moving = torch.cat([times.new_ones(1, dtype=torch.bool), times.detach().diff() != 0])
    count = probes.shape[0] if probes is not None else 1
    if len(x) == 0 or not moving[1:].any():
        return _nothing(x, len(times) - 1, trace, count, regularize, watch)
    sweep = _Sweep(dynamics, trace, probes, product, regularize, watch)
    backwards = bool(times[-1] < times[0])
    start, parts = sweep.start(x, -1.0 if backwards else 1.0)
    options: dict[str, Any] = {"norm": _norm(parts)} if method in ADAPTIVE else {}
    if method in FIXED and step_size is not None:
        options["step_size"] = step_size
    settings = {"rtol": rtol, "atol": atol, "method": method, "options": options}
    if adjoint:
        settings["adjoint_params"] = tuple(dynamics.parameters())
        settings["adjoint_options"] = {**options, "norm": "seminorm"} if method in ADAPTIVE else options
    run = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
    # the state is a tuple whose parts all have the batch as their first or second dimension
    path = run(watch.around(sweep), start, times[moving], **settings)
    where = moving[1:].long().cumsum(0).to(x.device)
    path = tuple(part[where] for part in path)
    watch.finite(path[0][-1], float(times[-1].detach()))
    steps = watch.steps()
    watch.restart()  # what comes is the backward solve
    return sweep.solution(path, steps)


def _nothing(x: Tensor, points: int, trace: str | None, count: int, regularize: bool, watch: Watch) -> Solution:
    """No time passes, or there is no sample: everything stays what it is."""
    zeros = x.new_zeros(points, len(x))
    integral = None if trace is None else zeros if trace == "exact" else x.new_zeros(points, count, len(x))
    energies = (zeros, zeros) if regularize else (None, None)
    return Solution(x.expand(points, *x.shape), integral, *energies, watch.steps())


# --- one evaluation ---------------------------------------------------------------------------------


class _Sweep:
    """(t, state) -> its derivative, for the state (x, trace, kinetic, Jacobian, each probe's trace) or a part of it.

    The solver controls the error of the mean over the probes, so that more of them do not ask for smaller steps;
    their own integrals, which differ by the same polynomial, come along.
    """

    def __init__(
        self,
        dynamics: nn.Module,
        trace: str | None,
        probes: Tensor | None,
        product: str,
        regularize: bool,
        watch: Watch,
    ) -> None:
        self.dynamics, self.trace, self.probes, self.product = dynamics, trace, probes, product
        self.regularize, self.watch = regularize, watch
        self.sign = 1.0  # of dt: energies are integrals over |dt|

    def start(self, x: Tensor, sign: float) -> tuple[State, int]:
        """The state to start from, and how many of its parts the step control looks at."""
        self.sign = sign
        zeros = x.new_zeros(len(x))
        state = [x]
        if self.trace is not None:
            state.append(zeros)
        if self.regularize:
            state += [zeros, zeros]
        parts = len(state)
        if self._each():
            state.append(x.new_zeros(self.probes.shape[0], len(x)))
        return tuple(state), parts

    def _each(self) -> bool:
        return self.probes is not None and self.probes.shape[0] > 1

    def solution(self, path: State, steps: Steps) -> Solution:
        value, *rest = path
        trace = rest.pop(0) if self.trace is not None else None
        kinetic, jacobian = (rest.pop(0), rest.pop(0)) if self.regularize else (None, None)
        if trace is not None and self.trace != "exact":
            trace = rest[0] if self._each() else trace[:, None]
        return Solution(value, trace, kinetic, jacobian, steps)

    def __call__(self, t: Tensor, state: State) -> State:
        x = state[0]
        value, each, squares = self._evaluate(t, x)
        if value.shape != x.shape:
            raise ValueError(f"dynamics: expected a derivative {list(x.shape)} like x, got {list(value.shape)}")
        self.watch.evaluated(value)
        derivative = [value]
        if each is not None:
            derivative.append(each.sum(0) if self.trace == "exact" else each.mean(0))
        if self.regularize:
            squares = value.new_zeros(len(x)) if squares is None else squares
            derivative += [self.sign * value.square().flatten(1).sum(1), self.sign * squares]
        if self._each():
            derivative.append(each)
        return tuple(derivative)

    def _evaluate(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(f, the estimates [S, B] or parts of the trace, the mean over the probes of |J e|^2 [B])"""

        def f(x: Tensor) -> Tensor:
            return self.dynamics(t, x)

        if self.trace is None:
            return f(x), None, None
        if self.trace == "bottleneck":
            h, g = self.dynamics.encoder, self.dynamics.decoder
            value, products, e = bottleneck_products(
                lambda x: h(t, x), lambda hidden: g(t, hidden), x, self._given, self.product
            )  # fmt: skip
            return value, dot(products, e).to(x.dtype), None
        exact = self.trace == "exact"
        if exact and not self.regularize and hasattr(self.dynamics, "value_and_trace"):
            value, trace = self.dynamics.value_and_trace(t, x)
            return value, trace[None], None
        e = unit_probes(x) if exact else self.probes
        if self.product == "jvp" and hasattr(self.dynamics, "jvp"):
            value, products = self.dynamics.jvp(t, x, e)
        else:
            value, products = jacobian_products(f, x, e, self.product)
        squares = None
        if self.regularize:
            squares = products.square().flatten(2).sum(2)
            squares = squares.sum(0) if exact else squares.mean(0)
        return value, dot(products, e).to(x.dtype), squares

    def _given(self, hidden: Tensor) -> Tensor:
        if hidden.shape != self.probes.shape[1:]:
            shape = list(self.probes.shape)
            raise ValueError(f"probes: expected [S, {', '.join(map(str, hidden.shape))}], got {shape}")
        return self.probes


def _norm(parts: int) -> Callable[[Sequence[Tensor]], Tensor]:
    """torchdiffeq's norm of a tuple, the largest RMS of its parts, of the first few of them.

    Step sizes are no functions of the parameters: the gradient is that of the steps as they were taken.
    """

    def norm(state: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            return torch.stack([part.abs().pow(2).mean().sqrt() for part in state[:parts]]).max()

    return norm


# --- what happens on the way ------------------------------------------------------------------------


class Watch:
    """Counts what the solver does, and stops it with time, step and sample where it cannot go on.

    torchdiffeq calls the callbacks of the function it integrates.
    """

    def __init__(self, method: str, max_steps: int) -> None:
        self.adaptive, self.max_steps = method in ADAPTIVE, max_steps
        self.last: Tensor | None = None
        self.restart()

    def restart(self) -> None:
        self.evaluations = self.begun = self.accepted = self.rejected = 0

    def steps(self) -> Steps:
        accepted = self.accepted if self.adaptive else self.begun
        return Steps(*(torch.tensor(n) for n in (self.evaluations, accepted, self.rejected)))

    def evaluated(self, value: Tensor) -> None:
        self.evaluations += 1
        self.last = value.detach()

    def around(self, sweep: _Sweep) -> Callable[[Tensor, State], State]:
        def function(t: Tensor, state: State) -> State:
            return sweep(t, state)

        function.callback_step = self._step
        function.callback_step_adjoint = self._step_adjoint
        if self.adaptive:
            function.callback_accept_step = function.callback_accept_step_adjoint = self._accept
            function.callback_reject_step = function.callback_reject_step_adjoint = self._reject
        return function

    def _step(self, t: Tensor, state: State, dt: Tensor) -> None:
        self.finite(state[0], float(t.detach()))
        self._possible(t, dt, self.begun)
        self.begun += 1

    def _step_adjoint(self, t: Tensor, state: State, dt: Tensor) -> None:
        self._possible(t, dt, None)
        self.begun += 1

    def _accept(self, t: Tensor, state: State, dt: Tensor) -> None:
        self.accepted += 1

    def _reject(self, t: Tensor, state: State, dt: Tensor) -> None:
        self.rejected += 1

    def _possible(self, t: Tensor, dt: Tensor, step: int | None) -> None:
        where = f"at t = {float(t.detach()):.6g}, " + ("in the backward solve" if step is None else f"step {step}")
        where += f", h = {float(dt.detach()):.3g}"
        if self.adaptive and not bool(t.abs() + dt > t.abs()):
            bad = None if self.last is None else _first_bad(self.last)
            why = "" if bad is None else f": the dynamics of sample {bad} are not finite"
            raise SolverError(f"the step underflows {where}{why}")
        if step is not None and step >= self.max_steps:
            raise SolverError(
                f"more than max_steps = {self.max_steps} steps {where}: the dynamics are stiff or the tolerances too"
                f" small; sample {_largest(self.last)} has the largest derivative"
            )

    def finite(self, x: Tensor, t: float) -> None:
        if (bad := _first_bad(x.detach())) is not None:
            raise SolverError(f"the state of sample {bad} is not finite at t = {t:.6g}, step {self.begun}")


def _first_bad(x: Tensor) -> int | None:
    """The first sample with a number that is not finite."""
    if x.isfinite().all():
        return None
    return int((~x.isfinite()).flatten(1).any(1).nonzero()[0])


def _largest(x: Tensor | None) -> int:
    return 0 if x is None else int(x.flatten(1).abs().amax(1).argmax())
