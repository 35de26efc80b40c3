"""Gradients of :mod:`fastflow.ops.ode` in plain PyTorch: along given steps, of the times, and by the adjoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastflow.ops import ode_reference as plain
from fastflow.ops.ode_method import Method
from fastflow.ops.ode_reference import Control, Function, Path, Problem, initial_state, solve, unpack

__all__ = ["adjoint", "replay", "times_gradient"]


# --- along the steps --------------------------------------------------------------------------------


def replay(problem: Problem, path: Path, x: Tensor, times: Tensor, probes: Tensor | None, *params: Tensor):
    """(values, traces, energies) along given steps, to be differentiated as often as one likes; of the times as the
    exact solution depends on them."""
    f, numbers, method = problem(times, probes, params)
    y = initial_state(problem, x, probes)
    if times.requires_grad:
        y = _Moment.apply(f, -1.0, times[0], y)
    states = plain.replay(f, y, numbers, method, path)
    if times.requires_grad:
        states = [_Moment.apply(f, 1.0, t, y) for t, y in zip(times, states, strict=True)]
    return unpack(states, x.shape[1], 0 if probes is None else probes.shape[0])


class _Moment(torch.autograd.Function):
    """The state itself, y [B, M] at the time t: moving the time moves it by f."""

    @staticmethod
    def forward(ctx, f, sign, t, y):
        ctx.f, ctx.sign = f, sign
        ctx.save_for_backward(t, y)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, g):
        t, y = ctx.saved_tensors
        return None, None, _along(ctx.f, t[None], [y], [ctx.sign * g])[0], g


def _along(f: Function, times: Tensor, states: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """d/dtimes of a solution: <g, f> at every output; the first of ``grads`` is minus that of the initial state."""
    found = [
        (g * f(t.to(y.dtype).to(y.device).reshape(1, 1), y)).sum() for t, y, g in zip(times, states, grads, strict=True)
    ]
    return torch.stack(found).to(times)


def _state(x: Tensor, traces: Tensor, energies: Tensor) -> Tensor:
    """[..., B, D + S + 2 or 0]: the rows of ode_reference."""
    return torch.cat([x, traces.transpose(-1, -2), energies.transpose(-1, -2)], -1)


def times_gradient(
    problem: Problem, x: Tensor, times: Tensor, probes: Tensor | None, params: Sequence[Tensor], values: Tensor,
    gx: Tensor, grads: tuple[Tensor, Tensor, Tensor],
) -> Tensor:  # fmt: skip
    """Of a solution with these ``values``, the ``grads`` of all its outputs and the gradient of x that they led to."""
    f, _, _ = problem(times, probes, params)
    _, gtraces, genergies = grads
    after = [_state(*rows) for rows in zip(*grads, strict=True)]
    # the integrals start at 0 and every one of their outputs moves with the first time
    before = -_state(gx, gtraces.sum(0), genergies.sum(0))
    states = [initial_state(problem, y, probes) for y in (x, *values)]
    return _along(f, times, states, [before, *after])


# --- the adjoint ------------------------------------------------------------------------------------


def adjoint(
    problem: Problem, times: Tensor, probes: Tensor | None, params: Sequence[Tensor], values: Tensor, gvalues: Tensor,
    gtraces: Tensor, genergies: Tensor,
) -> list[Tensor]:  # fmt: skip
    """[counts [R, 3], gx, *gparams] by the continuous adjoint in plain PyTorch."""
    params = [p.detach().requires_grad_() for p in params]
    f, numbers, method = problem(times, probes, params)
    states = [_state(v, t, e) for v, t, e in zip(values, gtraces, genergies, strict=True)]
    grads = [_state(*g) for g in zip(gvalues, gtraces, genergies, strict=True)]
    counts, gx, gparams = _adjoint(
        f, numbers, method, problem.control, problem.max_steps, [states[-1], *states],
        [torch.zeros_like(grads[0]), *grads], values.shape[2], params,
    )  # fmt: skip
    return [counts, gx, *gparams]


def _adjoint(
    f: Function,
    times: Sequence[float],
    method: Method,
    control: Control,
    max_steps: int,
    states: Sequence[Tensor],
    grads: Sequence[Tensor],
    dim: int,
    params: Sequence[Tensor],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(evaluations, accepted and rejected steps [R, 3], gradient of x [B, D], of the params) by the continuous adjoint
    a = dL/dx, from the last time to the first:

    da/dt = -(a, g) . df/dx,  dL/dparams = integral of (a, g) . df/dparams dt; g are the gradients of the integrals in
    the state, which do not change. Between two outputs [x | a] is one state; x starts anew from each of ``states``.
    """
    a, constant = torch.zeros_like(states[-1][:, :dim]), torch.zeros_like(states[-1][:, dim:])
    gparams = [torch.zeros_like(p) for p in params]
    counts = torch.zeros((a.shape[0] if control.per_sample else 1, 3), dtype=torch.int64, device=a.device)

    def pull(t: Tensor, state: Tensor, wanted: Callable[[Tensor], Sequence[Tensor]], weight: Tensor | float):
        """(df, weight (a, g) . df/dwanted)"""
        with torch.enable_grad():
            x = state[:, :dim].detach().requires_grad_()
            value = f(t, torch.cat([x, torch.zeros_like(constant)], 1))
        cotangent = weight * torch.cat([state[:, dim:], constant], 1)
        found = torch.autograd.grad(value, wanted(x), cotangent, allow_unused=True, materialize_grads=True)
        return value.detach(), found

    def backwards(t: Tensor, state: Tensor) -> Tensor:
        value, (gx,) = pull(t, state, lambda x: [x], 1.0)
        return torch.cat([value[:, :dim], -gx], 1)

    def visit(at: list, weights: Tensor) -> None:
        for (t, state), weight in zip(at, weights.unbind(1), strict=True):
            if weight.any():
                found = pull(plain._rows(t, state), state, lambda _: params, plain._rows(-weight, state))[1]
                for total, g in zip(gparams, found, strict=True):
                    total += g

    def split(y: Tensor) -> list[Tensor]:
        return [y[:, :dim], y[:, dim:]]

    for i in range(len(times) - 1, 0, -1):
        a, constant = a + grads[i][:, :dim], constant + grads[i][:, dim:]
        if times[i] == times[i - 1]:
            continue
        start = torch.cat([states[i][:, :dim], a], 1)
        back, path = solve(backwards, start, [times[i], times[i - 1]], method, control, split, max_steps, visit)
        a = back[-1][:, dim:]
        counts += path.counts[:, :3]
    return counts, a, gparams
