"""Continuous flows: an MLP's dynamics, the trace of its Jacobian and energies of the path, integrated in one call.

    dx/dt = f(x, t),   d trace/dt = tr df/dx,   d kinetic/|dt| = |f|^2,   d jacobian/|dt| = |df/dx|_F^2

Runge-Kutta stages, error norm and step control are all inside the call; the meaning is in ``ode_reference`` and
``ode_gradient``, the methods in ``ode_method``, the network's sweep in ``trace_mlp``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastflow.errors import SolverError
from fastflow.ops import _check
from fastflow.ops._backend import Family, choose
from fastflow.ops._op import any_grad, op, reference_vjp, second_order, without_autocast
from fastflow.ops.ode_gradient import adjoint, replay, times_gradient
from fastflow.ops.ode_method import METHODS
from fastflow.ops.ode_reference import Control, Path, Problem, reference
from fastflow.ops.trace import Rademacher
from fastflow.ops.trace_mlp import _materialised, _probes, _readable, network

__all__ = ["Solution", "Steps", "mlp_ode"]

FAMILY = Family("ode")


class Steps(NamedTuple):
    """What a solve took, int64: [] for the whole batch, [B] with ``per_sample``."""

    evaluations: Tensor
    """Of f (NFE)."""
    accepted: Tensor
    rejected: Tensor


class Solution(NamedTuple):
    """The path at ``times[1:]``, T of them."""

    value: Tensor
    """x, [T, B, D] in its dtype."""
    trace: Tensor | None
    """Integral of tr(df/dx) dt from times[0] on: [T, B] for the exact trace and a single probe [B, D], or of every
    probe's estimate, [T, S, B]. Negative steps of time count negative. None without ``probes`` and ``exact``."""
    kinetic: Tensor | None
    """Integral of |f|^2 |dt|, [T, B], with ``regularize``."""
    jacobian: Tensor | None
    """Integral of |df/dx|_F^2 |dt|, [T, B], with ``regularize`` and a trace: exact, or the probes' mean |J e|^2."""
    steps: Steps


# --- contract ---------------------------------------------------------------------------------------
# T outputs, B samples, S probes (0: no trace), R = 1 or, per sample, B controllers; all but what is marked float64 or
# int64 in the dtype of x, float32 or float64. Meaning: ode_reference.py, whose arithmetic of steps a kernel repeats
# (solve, _initial, _norms, _factor, grid, _Outputs).
#
#   times       [T + 1] float64, on the CPU, monotone; equal neighbours repeat a state. Nothing is evaluated where
#               all are equal
#   probes      [S, B, D], any strides
#   method      Method.pack(): s, order, fsal, adaptive?, c [s], a [s, s], b [s], error [s], dense [s, 4]
#   control     rtol, atol, step_size (0: none), per_sample, exact (1: estimates are summed, 0: averaged), regularize.
#               Steps are fixed where step_size > 0 or the method is not adaptive; per_sample is then 0
#   values      [T, B, D]; traces [T, S, B], single estimates; energies [T, 2 or 0, B], kinetic and jacobian
#   steps       [max_steps, R, 2] float64: (t, h) of the accepted steps of controller r, h < 0 back in time; only the
#               first counts[r, 1] are written
#   counts      [R, 4] int64: evaluations, accepted, rejected, spacing
#   states      [K, B, D]: x before the steps 0, spacing, 2 spacing, ... of its controller; spacing is 1 and doubles,
#               every other state being dropped, whenever all K are in use
#
# An attempt whose error or state is not finite counts as rejected and the step shrinks to a fifth, until that is below
# eps (of x's dtype) |times[-1] - times[0]|: "not finite"; so is f at the start, or a state after a fixed step.
# B > 0. A solve that fails throws (C++: std::runtime_error) one of
#   "the state or its derivative is not finite", "the step underflows", "more than {max_steps} steps", followed by
#   " at t = %.6g, step %d, h = %.3g, first in sample %d"  (step: the attempt, from 1; sample: per sample its own, else
#   the first that is not finite, or the one of the largest error)

_PROBLEM = (
    "Tensor x, Tensor times, Tensor? probes, Tensor[] params, float[] method, int layer, int activation,"
    " float[] control"
)


@op(
    f"mlp_ode_fwd({_PROBLEM}, int checkpoints, int max_steps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(kernel, x, times, probes, params, method, layer, activation, control, checkpoints, max_steps):
    (samples, dim), outputs = x.shape, times.shape[0] - 1
    rows = samples if control[3] else 1
    values = x.new_empty((outputs, samples, dim))
    traces = x.new_empty((outputs, 0 if probes is None else probes.shape[0], samples))
    energies = x.new_empty((outputs, 2 if control[5] else 0, samples))
    steps = x.new_empty((max_steps, rows, 2), dtype=torch.float64)
    counts = x.new_empty((rows, 4), dtype=torch.int64)
    states = x.new_empty((checkpoints, samples, dim))
    _solving(
        kernel, x, times, probes, params, method, layer, activation, control, max_steps,
        values, traces, energies, steps, counts, states,
    )  # fmt: skip
    return values, traces, energies, steps, counts, states


@op(
    f"mlp_ode_bwd({_PROBLEM}, Tensor steps, Tensor counts, Tensor states, Tensor gvalues, Tensor gtraces,"
    " Tensor genergies) -> Tensor[]",
)
def _backward(
    kernel, x, times, probes, params, method, layer, activation, control, steps, counts, states, gvalues, gtraces,
    genergies,
):  # fmt: skip
    """The exact gradient of the discrete map, its steps held fixed."""
    gx, gparams = torch.empty_like(x), [torch.empty_like(p) for p in params]
    kernel(
        x, times, probes, params, method, layer, activation, control, steps, counts, states, gvalues, gtraces,
        genergies, gx, gparams,
    )  # fmt: skip
    return [gx, *gparams]


@op(
    f"mlp_ode_adjoint({_PROBLEM}, int max_steps, Tensor values, Tensor gvalues, Tensor gtraces, Tensor genergies)"
    " -> Tensor[]",
    backends=("cpu", "cuda"),
)
def _adjoint(
    kernel, x, times, probes, params, method, layer, activation, control, max_steps, values, gvalues, gtraces,
    genergies,
):  # fmt: skip
    """The continuous adjoint: ode_gradient.adjoint(); x itself is not read. [counts, gx, *gparams]; a kernel adds the
    evaluations, accepted and rejected steps of its controllers to counts [R, 3], zeros."""
    counts = torch.zeros((x.shape[0] if control[3] else 1, 3), dtype=torch.int64, device=x.device)
    gx, gparams = torch.empty_like(x), [torch.empty_like(p) for p in params]
    _solving(
        kernel, x, times, probes, params, method, layer, activation, control, max_steps, values, gvalues, gtraces,
        genergies, counts, gx, gparams,
    )  # fmt: skip
    return [counts, gx, *gparams]


def _solving(kernel, *arguments):
    try:
        kernel(*arguments)
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        raise SolverError(str(error)) from None


# --- gradient ---------------------------------------------------------------------------------------


class _MlpOde(torch.autograd.Function):
    """Saves x, the parameters, the steps and, for the gradient through them, ``checkpoints`` states."""

    @staticmethod
    def forward(ctx, backend, problem, gradient, checkpoints, report, x, times, probes, *params):
        if backend == "reference":  # the adjoint: the gradient through the steps is autograd's own
            values, traces, energies, path = reference(problem, x, times, probes, *params)
            steps, counts, states = *path, None
        else:
            kept = min(checkpoints, problem.max_steps) if gradient == "steps" else 0
            values, traces, energies, steps, counts, states = _run(backend, problem, kept, x, times, probes, params)
        ctx.backend, ctx.problem, ctx.gradient, ctx.report = backend, problem, gradient, report
        ctx.save_for_backward(x, times, probes, steps, counts, states, values, *params)
        ctx.mark_non_differentiable(counts)
        return values, traces, energies, counts

    @staticmethod
    def backward(ctx, gvalues, gtraces, genergies, _):
        x, times, probes, steps, counts_of_forward, states, values, *params = ctx.saved_tensors
        problem, grads = ctx.problem, (gvalues, gtraces, genergies)
        if second_order():
            path = Path(steps, counts_of_forward)
            found = reference_vjp(
                lambda x, times, *params: replay(problem, path, x, times, probes, *params), (x, times, *params), grads
            )
            return *[None] * 5, *found[:2], None, *found[2:]
        counts = None
        if not _differentiates(ctx.backend, ctx.gradient, problem, probes, params, x):
            counts, *found = adjoint(problem, times, probes, params, values, *grads)
        else:
            method = METHODS[problem.method].pack()
            given = x, times, probes, params, method, problem.layer, problem.activation, list(problem.control)
            if ctx.gradient == "steps":
                found = _backward[ctx.backend](*given, steps, counts_of_forward, states, *grads)
            else:
                counts, *found = _adjoint[ctx.backend](*given, problem.max_steps, values, *grads)
        if counts is not None and ctx.report is not None:
            ctx.report(_steps(bool(problem.control.per_sample), x, counts))
        gtimes = None
        if ctx.needs_input_grad[6]:
            gtimes = times_gradient(problem, x, times, probes, params, values, found[0], grads)
        return *[None] * 5, found[0], gtimes, None, *found[1:]


def _run(backend, problem, checkpoints, x, times, probes, params):
    method = METHODS[problem.method].pack()
    return _forward[backend](
        x, times, probes, params, method, problem.layer, problem.activation, list(problem.control), checkpoints,
        problem.max_steps,
    )  # fmt: skip


# --- public -----------------------------------------------------------------------------------------


def mlp_ode(
    x: Tensor,
    times: Sequence[float] | Tensor,
    layers: Sequence[Sequence[Tensor]],
    *,
    activation: Literal["tanh", "softplus", "elu", "silu", "swish"] = "tanh",
    layer: Literal["concat", "concat_squash", "ignore", "squash"] = "concat",
    probes: Tensor | Rademacher | None = None,
    exact: bool = False,
    regularize: bool = False,
    method: Literal["euler", "midpoint", "rk4", "bosh3", "dopri5", "tsit5"] = "dopri5",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    step_size: float | None = None,
    per_sample: bool = False,
    gradient: Literal["steps", "adjoint"] = "steps",
    checkpoints: int = 32,
    max_steps: int = 1000,
    report: Callable[[Steps], None] | None = None,
    backend: str | None = None,
) -> Solution:
    r"""Solves :math:`\dot x = f(x, t)` for an MLP f, with the integral of :math:`\mathrm{tr}\, \partial_x f` along it.

    With data at ``times[0]`` and a density p at the end, log p(x(0)) = log p(x(T)) + trace.

    Args:
        x: [B, D] at ``times[0]``.
        times: [T + 1], increasing or decreasing (that integrates backwards); equal neighbours repeat the state.
        layers, activation, layer, probes, exact: the network and its trace, as in :func:`fastflow.mlp_trace`;
            neither probes nor exact: the value alone.
        regularize: also the kinetic energy and the Jacobian's norm (RNODE, https://arxiv.org/abs/2002.02798).
        method: ``euler``, ``midpoint`` and ``rk4`` (the 3/8 rule) have fixed steps: of ``step_size``, the last one
            shortened, or from one time to the next. ``bosh3``, ``dopri5`` and ``tsit5`` choose theirs by ``rtol`` and
            ``atol``, as torchdiffeq does; unless a ``step_size`` is given.
        per_sample: every sample has steps of its own and its result does not depend on the batch.
        gradient: ``steps``: exact for the steps that were made, which are held fixed; forward and backward cost about
            four times the forward alone. ``adjoint``: by another solve, backwards and with the same tolerances, whose
            norm sees x and its adjoint: right to about those, at about six times the forward. Both for x, the
            parameters and the times; of these as the exact solution depends on them. Second derivatives are those of
            the steps, in plain PyTorch, with all of them in memory.
        checkpoints: how many states are kept for ``steps``; those between are computed again, values alone, a block of
            samples at a time. So memory does not grow with the number of steps in either way.
        max_steps: of attempts, accepted or not. A solve is one call: Ctrl-C is heard when it has returned, after at
            most so many attempts of as many evaluations as the method has stages.
        report: is called in the backward pass with what the solve of the adjoint took, over all its outputs; never for
            ``gradient="steps"``, which makes none, nor in what torch.compile makes.
        backend: a backend by name; None chooses.

    Raises:
        SolverError: a state that is not finite, a step that underflows, more than ``max_steps`` steps: with the time,
            the step and the sample.
        ValueError, TypeError: naming the argument, what was expected and what came.
        BackendError: the backend asked for cannot serve the call.

    Papers: Neural ODE, https://arxiv.org/abs/1806.07366; FFJORD, https://arxiv.org/abs/1810.01367.

    >>> layers = [(torch.randn(8, 1 + 2), torch.zeros(8)), (torch.randn(2, 1 + 8), torch.zeros(2))]
    >>> x = torch.randn(5, 2)
    >>> there = mlp_ode(x, (0, 1), layers, exact=True)
    >>> there.value.shape, there.trace.shape
    (torch.Size([1, 5, 2]), torch.Size([1, 5]))
    >>> back = mlp_ode(there.value[-1], (1, 0), layers, exact=True)
    >>> bool((back.value[-1] - x).abs().max() < 1e-2), bool((there.trace + back.trace).abs().max() < 1e-2)
    (True, True)
    """
    _check.floating("x", x)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x: expected [B, D] with variables, got {list(x.shape)}")
    if _readable(x) and not (good := x.isfinite().all(1)).all():
        raise ValueError(f"x: expected finite values, got {x[~good][0].tolist()} in sample {int((~good).nonzero()[0])}")
    times = checked_times(times)
    fixed = _fixed(method, rtol, atol, step_size)
    if gradient not in ("steps", "adjoint"):
        raise ValueError(f"gradient: expected steps or adjoint, got {gradient!r}")
    _check.whole("checkpoints", checkpoints)
    _check.whole("max_steps", max_steps)
    reduce = "none"
    if exact or probes is not None:
        probes, count, seed, reduce = _probes(x, probes, exact)
        probes = _materialised(x, probes, count, seed)
    control = Control(
        float(rtol),
        float(atol),
        float(step_size or 0),
        float(per_sample and not fixed),
        float(exact),
        float(regularize),
    )
    with without_autocast(x):
        params, *kind = network(x, layers, layer, activation)
        problem = Problem(method, *kind, control, max_steps)
        start, probes = (p if p is None or p.dtype == params[0].dtype else p.to(params[0].dtype) for p in (x, probes))
        limit = partial(_unserved, problem=problem, probes=probes, params=params, x=start)
        backend = choose(FAMILY, (x, probes, *params), backend, limit)
        values, traces, energies, counts = _solve(
            backend, problem, gradient, checkpoints, report, start, times, probes, params
        )
    trace = {"none": lambda: None, "sum": lambda: traces.sum(1), "only": lambda: traces[:, 0], "all": lambda: traces}
    kinetic, jacobian = energies.unbind(1) if regularize else (None, None)
    return Solution(
        values.to(x.dtype),
        trace[reduce](),
        kinetic,
        jacobian if reduce != "none" else None,
        _steps(per_sample, x, counts),
    )


def _steps(per_sample: bool, x: Tensor, counts: Tensor) -> Steps:
    """Of the rows of controllers."""
    counts = counts[:, :3]
    return Steps(*(counts.expand(x.shape[0], 3).unbind(1) if per_sample else counts[0].unbind(0)))


def _solve(backend, problem, gradient, checkpoints, report, x, times, probes, params):
    if x.shape[0] == 0:
        backend = "reference"
    wanted = any_grad(x, times, *params)
    # where nothing is to be integrated the graph has no parameters; they still get a gradient, of zeros
    nothing = x.shape[0] == 0 or (_readable(times) and bool(times[0] == times[-1]))
    if wanted and (backend != "reference" or gradient == "adjoint" or nothing):
        report = None if torch.compiler.is_compiling() else report
        return _MlpOde.apply(backend, problem, gradient, checkpoints, report, x, times, probes, *params)
    if backend != "reference":
        values, traces, energies, _, counts, _ = _run(backend, problem, 0, x, times, probes, params)
        return values, traces, energies, counts
    values, traces, energies, path = reference(problem, x, times, probes, *params)
    if wanted:
        values, traces, energies = replay(problem, path, x, times, probes, *params)
    return values, traces, energies, path.counts


def _unserved(backend: str, problem: Problem, probes: Tensor | None, params: Sequence[Tensor], x: Tensor) -> str | None:
    """Why a backend cannot serve a solve, None if it can: what goes by stages has the steps of the whole batch."""
    if backend == "cpu" or not problem.control.per_sample:
        return None
    if backend == "triton":
        return "has no steps per sample"
    from fastflow.ops.cuda.ode import fits

    stages = METHODS[problem.method].stages
    if fits(x, probes, params, problem.layer, bool(problem.control.regularize), stages):
        return None
    return "has steps per sample only where a sample and what they need fit into a block's shared memory"


def _differentiates(
    backend: str, gradient: str, problem: Problem, probes: Tensor | None, params: Sequence[Tensor], x: Tensor
) -> bool:
    """Has a backend a kernel of this gradient, for networks of this size?"""
    if (backend, gradient) != ("cuda", "adjoint"):
        return backend in (_backward if gradient == "steps" else _adjoint)
    from fastflow.ops.cuda.ode_adjoint import fits

    return fits(x, probes, params, problem.layer, bool(problem.control.regularize), METHODS[problem.method].stages)


def checked_times(times: Sequence[float] | Tensor) -> Tensor:
    """[T + 1] in float64 on the CPU, monotone."""
    if not isinstance(times, Tensor):
        try:
            times = torch.tensor([float(t) for t in times], dtype=torch.float64)
        except (TypeError, ValueError):
            raise TypeError(f"times: expected at least two numbers, got {times!r}") from None
    times = times.to("cpu", torch.float64)
    if times.dim() != 1 or times.shape[0] < 2:
        raise ValueError(f"times: expected at least two, [T + 1], got {list(times.shape)}")
    if _readable(times):
        gaps = times.detach().diff()
        if not times.isfinite().all() or ((gaps > 0).any() and (gaps < 0).any()):
            raise ValueError(f"times: expected finite times that increase or decrease, got {times.tolist()}")
    return times


def _fixed(method: str, rtol: float, atol: float, step_size: float | None) -> bool:
    """Are the steps fixed? After checks."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    for name, value in (("rtol", rtol), ("atol", atol), *([("step_size", step_size)] if step_size is not None else [])):
        _check.number(name, value)
    if step_size is not None and not 0 < step_size < math.inf:
        raise ValueError(f"step_size: expected a positive number, got {step_size}")
    fixed = step_size is not None or not METHODS[method].error
    if not fixed and not (rtol >= 0 and atol >= 0 and 0 < rtol + atol < math.inf):
        raise ValueError(f"rtol, atol: expected tolerances of at least 0 and not both 0, got {rtol} and {atol}")
    return fixed
