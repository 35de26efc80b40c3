"""The solver of :mod:`fastflow.ops.ode` in plain PyTorch: what its kernels mean.

The state of all samples is one matrix y [B, M] and f(t, y) its derivative. The steps are chosen for the whole batch or
for every sample: times t and step sizes h are [R] in float64, R = 1 or B, and go with the rows of y. Steps are signed:
h < 0 where time decreases.

Control is that of torchdiffeq (Hairer, Norsett, Wanner, Solving ODEs I, II.4): with the norm |e| = max over the parts
of the state of the root mean square of e / (atol + rtol max(|y0|, |y1|)), a step is accepted where |error| <= 1, and
the next one is h min(10, max(0.9 |error|^(-1/order), 0.2 or, after an accepted step, 1)).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastflow.errors import SolverError
from fastflow.ops.ode_control import first_step, growth, trial_step
from fastflow.ops.ode_method import METHODS, Method
from fastflow.ops.trace_mlp import sweep

__all__ = ["Control", "Path", "Problem", "grid", "initial_state", "reference", "replay", "solve", "unpack"]

Function = Callable[[Tensor, Tensor], Tensor]
Parts = Callable[[Tensor], list[Tensor]]


class Control(NamedTuple):
    """How to step; as numbers, in this order, what a kernel gets as ``control``."""

    rtol: float
    atol: float
    step_size: float
    """Of fixed steps; 0: adaptive, or from one time to the next for a method without an error."""
    per_sample: float
    exact: float
    """1: the probes are unit tangents, whose estimates are summed; 0: averaged."""
    regularize: float


class Path(NamedTuple):
    """The accepted steps (t, h) [n, R, 2], of which sample r made the first counts[r, 1]."""

    steps: Tensor
    counts: Tensor
    """[R, 4] int64: evaluations, accepted and rejected steps, and the spacing of the states a kernel kept."""


# --- the state --------------------------------------------------------------------------------------


def dynamics(
    params: Sequence[Tensor], probes: Tensor | None, layer: int, activation: int, control: Control, sign: float
) -> Function:
    """f of the state [x (D) | e . J e of every probe (S) | |f|^2 and the mean or sum of |J e|^2 (2, or 0)].

    ``sign`` is the direction of time: energies grow either way.
    """

    def f(t: Tensor, y: Tensor) -> Tensor:
        dim = y.shape[1] - (0 if probes is None else probes.shape[0]) - 2 * int(control.regularize)
        value, tangent = sweep(y[:, :dim], t, probes, params, layer, activation)
        columns = [value]
        if tangent is not None:
            columns.append((tangent * probes).sum(2).t())
        if control.regularize:
            squares = y.new_zeros((1, y.shape[0])) if tangent is None else tangent.square().sum(2)
            squares = squares.sum(0) if control.exact else squares.mean(0)
            columns.append(sign * torch.stack([value.square().sum(1), squares], 1))
        return torch.cat(columns, 1)

    return f


def parts(dim: int, count: int, control: Control) -> Parts:
    """What the norm sees of a state: x, the trace (not its single estimates), and either energy."""

    def split(y: Tensor) -> list[Tensor]:
        found = [y[:, :dim]]
        if count:
            traces = y[:, dim : dim + count]
            found.append(traces.sum(1, keepdim=True) if control.exact else traces.mean(1, keepdim=True))
        return found + [y[:, i : i + 1] for i in range(dim + count, y.shape[1])]

    return split


# --- steps ------------------------------------------------------------------------------------------


def grid(times: Sequence[float], step_size: float, max_steps: int) -> list[float]:
    """The times of fixed steps: as torchdiffeq's, of which the last step is the shorter; without a size the times.
    SolverError where the steps are more than ``max_steps``."""
    start, end = times[0], times[-1]
    size = step_size if end > start else -step_size
    points = [t for i, t in enumerate(times) if i == 0 or t != times[i - 1]]
    many = len(points) - 1 > max_steps
    if step_size and start != end:
        # told before there is a grid of them; the division may overflow
        many = not abs(end - start) / step_size < max_steps + 1
        # torchdiffeq's ceil((end - start) / size + 1) points
        count = 1 if many else -int(-((end - start) / size + 1) // 1)
        points = [start + i * size for i in range(count - 1)] + [end]
        many |= len(points) - 1 > max_steps
    if many:
        h = size or points[1] - start
        raise SolverError(f"{too_many(max_steps)} at t = {start:.6g}, step 1, h = {h:.3g}, first in sample 0")
    return points


def _rows(values: Tensor, y: Tensor) -> Tensor:
    """Numbers [R] of steps beside the rows of y: [R, 1] in its dtype."""
    return values.to(y.dtype)[:, None]


def _weighted(h: Tensor, weights: Sequence[float | Tensor], ks: Sequence[Tensor]) -> Tensor | float:
    """h sum_i weights_i k_i; h [R] in float64."""
    total: Tensor | float = 0.0
    size = h.item() if h.numel() == 1 else h
    for weight, k in zip(weights, ks, strict=False):
        if isinstance(weight, Tensor) or weight != 0.0:
            scale = size * weight
            total = total + (_rows(scale, k) if isinstance(scale, Tensor) else scale) * k
    return total


def _stages(f: Function, method: Method, t: Tensor, h: Tensor, y: Tensor, first: Tensor):
    """The derivatives of all stages, and the (time, state) each of them is taken at."""
    ks, at = [first], [(t, y)]
    for row, c in zip(method.a[1:], method.c[1:], strict=True):
        at.append((t + c * h, y + _weighted(h, row, ks)))
        ks.append(f(_rows(at[-1][0], y), at[-1][1]))
    return ks, at


def _dense(method: Method, theta: Tensor) -> list[Tensor]:
    """b_i(theta) [R] for every stage; b_i itself at the end, where the polynomials' rounding is not to be seen."""
    weights = []
    for b, row in zip(method.b, method.weights(), strict=True):
        value = torch.zeros_like(theta)
        for coefficient in reversed(row):
            value = theta * (value + coefficient)
        weights.append(torch.where(theta >= 1, b, value))
    return weights


class _Outputs:
    """The state at the times that were asked for, each taken from the step it lies in."""

    def __init__(self, method: Method, times: Sequence[float], y: Tensor) -> None:
        self.method, self.times, self.sign = method, times, 1.0 if times[-1] >= times[0] else -1.0
        self.states = [y] * len(times)

    def take(self, t: Tensor, end: Tensor, h: Tensor, y: Tensor, ks: list[Tensor], moved: Tensor) -> None:
        """Of the step from t to the ``end`` [R]; samples that have not ``moved`` [R] made none."""
        # a few numbers on the CPU: which outputs lie inside
        first, last = self.sign * t, self.sign * end
        low, high = first[moved].min().item(), last[moved].max().item()
        for j, time in enumerate(self.times):
            if not low < self.sign * time <= high:
                continue
            inside = moved & (first < self.sign * time) & (self.sign * time <= last)
            theta = ((time - t) / torch.where(inside, h, 1.0)).clamp(0.0, 1.0)
            reached = y + _weighted(h, _dense(self.method, theta), ks)
            self.states[j] = torch.where(inside[:, None], reached, self.states[j])


def _failure(what: str, t: Tensor, step: Tensor, h: Tensor, sample: int) -> SolverError:
    r = sample if t.numel() > 1 else 0
    return SolverError(
        f"{what} at t = {t[r].item():.6g}, step {int(step[r])}, h = {h[r].item():.3g}, first in sample {sample}"
    )


NOT_FINITE = "the state or its derivative is not finite"


def too_many(max_steps: int) -> str:
    return f"more than {max_steps} steps"


def _finite(t: Tensor, step: Tensor, h: Tensor, *tensors: Tensor) -> None:
    bad = ~torch.stack([tensor.isfinite().all(1) for tensor in tensors]).all(0)
    if bad.any():
        raise _failure(NOT_FINITE, t, step, h, int(bad.nonzero()[0]))


@torch.no_grad()
def solve(
    f: Function,
    y: Tensor,
    times: Sequence[float],
    method: Method,
    control: Control,
    split: Parts,
    max_steps: int,
    visit: Callable[[list, Tensor], None] | None = None,
) -> tuple[list[Tensor], Path]:
    """The states at ``times``, the first of which is y itself, and the steps that led there.

    After every accepted step ``visit(at, weights)`` gets the (time, state) of its stages and the weights h b_i [R, s],
    of the part before the last time: what an integral along the path needs.
    """
    rows = y.shape[0] if control.per_sample else 1
    t = torch.full((rows,), times[0], dtype=torch.float64, device=y.device)
    outputs = _Outputs(method, times, y)
    counts = torch.zeros((rows, 4), dtype=torch.int64, device=y.device)
    if y.shape[0] == 0 or times[0] == times[-1]:
        return outputs.states, Path(t.new_zeros((0, rows, 2)), counts)
    if control.step_size or not method.error:
        return _fixed(f, y, times, method, control, max_steps, outputs, counts, visit)
    sign = outputs.sign
    k = f(_rows(t, y), y)
    attempts = torch.ones_like(counts[:, 0])
    _finite(t, attempts, torch.zeros_like(t), y, k)
    h = _initial(f, t, y, k, sign, method.order, control, split)
    counts[:, 0] = 2
    finest = torch.finfo(y.dtype).eps * abs(times[-1] - times[0])
    # room for the steps: doubled as needed
    steps = t.new_zeros((64, rows, 2))
    each, ratio, errors = torch.arange(rows, device=y.device), torch.zeros_like(t), y.new_zeros(y.shape[0]).double()
    while (active := sign * (times[-1] - t) > 0).any():
        step = torch.where(active, h, 0.0)
        attempts = counts[:, 1] + counts[:, 2] + 1
        # near an overflow the steps could shrink without end: below the rounding of the state it is given up
        stuck = active & ((t + step == t) | (ratio.isinf() & (step.abs() < finest)))
        if (stuck | (active & (attempts > max_steps))).any():
            bad = stuck if stuck.any() else active
            sample = int(bad.nonzero()[0]) if rows > 1 else int(torch.where(errors.isnan(), torch.inf, errors).argmax())
            what = too_many(max_steps) if not stuck.any() else "the step underflows"
            r = sample if rows > 1 else 0
            raise _failure(what if ratio[r].isfinite() else NOT_FINITE, t, attempts, h, sample)
        ks, at = _stages(f, method, t, step, y, k)
        after = y + _weighted(step, method.b, ks)
        ratio, errors = _norms(split(_weighted(step, method.error, ks)), split(y), split(after), control)
        finite = after.isfinite().all(1)
        ratio = torch.where((finite if rows > 1 else finite.all()) & ~ratio.isnan(), ratio, torch.inf)
        moved = active & (ratio <= 1)
        counts += torch.stack([(method.stages - 1) * active, moved, active & ~moved, 0 * active], 1)
        if moved.any():
            outputs.take(t, t + step, step, y, ks, moved)
            if visit is not None:
                theta = ((times[-1] - t) / torch.where(moved, step, 1.0)).clamp(0.0, 1.0)
                weights = torch.stack(_dense(method, theta), 1) * (step * moved)[:, None]
                visit(at, weights)
            if counts[:, 1].max() > len(steps):
                steps = torch.cat([steps, torch.zeros_like(steps)])
            index = (counts[:, 1] - 1)[moved], each[moved]
            steps[index] = torch.stack([t, step], 1)[moved]
            y, k = torch.where(moved[:, None], after, y), torch.where(moved[:, None], ks[-1], k)
            t = torch.where(moved, t + step, t)
        h = torch.where(active, h * growth(ratio, method.order), h)
    return outputs.states, Path(steps[: int(counts[:, 1].max())], counts)


def _fixed(f, y, times, method, control, max_steps, outputs, counts, visit):
    """Steps over a grid; the same for all samples."""
    points = grid(times, control.step_size, max_steps)
    t = torch.tensor(points, dtype=torch.float64, device=y.device)
    steps = torch.stack([t[:-1], t[1:] - t[:-1]], 1)[:, None].expand(-1, counts.shape[0], -1)
    fsal = int(method.fsal)
    counts[:, 0], counts[:, 1] = fsal + len(steps) * (method.stages - fsal), len(steps)
    path = Path(steps.contiguous(), counts)
    return _march(f, y, times, method, path, outputs, visit), path


def replay(f: Function, y: Tensor, times: Sequence[float], method: Method, path: Path) -> list[Tensor]:
    """The states at ``times`` along given steps: differentiable, the steps held fixed."""
    return _march(f, y, times, method, path, _Outputs(method, times, y))


def _march(f, y, times, method, path, outputs, visit=None):
    accepted = path.counts[:, 1]
    # a step ends where the next one starts; the last one as far on as there are outputs
    ends = torch.cat([path.steps[1:, :, 0], path.steps[:1, :, 0]]) if len(path.steps) else path.steps
    k = None
    for i in range(int(accepted.max()) if accepted.numel() else 0):
        moved, last = i < accepted, i + 1 == accepted
        t, h = torch.where(moved[:, None], path.steps[i], 0.0).unbind(1)
        end = torch.where(last, outputs.sign * torch.inf, ends[i])
        k = f(_rows(t, y), y) if k is None or not method.fsal else k
        ks, at = _stages(f, method, t, h, y, k)
        outputs.take(t, end, h, y, ks, moved)
        if visit is not None:
            visit(at, torch.stack([h * b for b in method.b], 1))
        y = y + _weighted(h, method.b, ks)  # h = 0 where nothing moved
        k = torch.where(moved[:, None], ks[-1], k)
        if not torch.is_grad_enabled():
            _finite(t + h, torch.full_like(accepted, i + 1), h, y)
    return outputs.states


# --- control ----------------------------------------------------------------------------------------


def _norms(error: list[Tensor], before: list[Tensor], after: list[Tensor], control: Control) -> tuple[Tensor, Tensor]:
    """(|e| of the steps [R], of every sample [B]) in float64; 0 / 0 is 0."""
    squares = []
    for e, a, b in zip(error, before, after, strict=True):
        scale = control.atol + control.rtol * torch.maximum(a.abs(), b.abs()).double()
        squares.append(torch.where(e == 0, 0.0, e.double() / scale).square().mean(1))
    each = torch.stack(squares)  # [parts, B]
    of_samples = each.amax(0).sqrt()
    return of_samples if control.per_sample else each.mean(1).amax(0, keepdim=True).sqrt(), of_samples


def _initial(f: Function, t: Tensor, y: Tensor, k: Tensor, sign: float, order: int, control: Control, split: Parts):
    """The size of the first step, [R]: one that Euler's method makes without harm."""

    def norm(e: Tensor) -> Tensor:
        return _norms(split(e), split(y), split(y), control)[0]

    slope = norm(k)
    trial = trial_step(norm(y), slope)
    step = sign * trial
    bend = norm(f(_rows(t + step, y), y + _rows(step, y) * k) - k) / trial
    return sign * first_step(trial, slope, bend, order)


# --- the whole --------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """What to solve but for the tensors that may require gradients."""

    method: str
    layer: int
    activation: int
    control: Control
    max_steps: int

    def __call__(self, times: Tensor, probes: Tensor | None, params: Sequence[Tensor]):
        """(f, times as numbers, the method): what the functions above take."""
        numbers = times.tolist()
        sign = 1.0 if numbers[-1] >= numbers[0] else -1.0
        f = dynamics(params, probes, self.layer, self.activation, self.control, sign)
        return f, numbers, METHODS[self.method]


def initial_state(problem: Problem, x: Tensor, probes: Tensor | None) -> Tensor:
    """[x | 0], [B, D + S + 2 or 0]."""
    columns = (0 if probes is None else probes.shape[0]) + 2 * int(problem.control.regularize)
    return torch.cat([x, x.new_zeros((x.shape[0], columns))], 1)


def unpack(states: Sequence[Tensor], dim: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values, traces, energies) of the states after the first."""
    rows = torch.stack(list(states[1:]))
    return rows[..., :dim], rows[..., dim : dim + count].transpose(1, 2), rows[..., dim + count :].transpose(1, 2)


def reference(problem: Problem, x: Tensor, times: Tensor, probes: Tensor | None, *params: Tensor):
    """(values, traces, energies, path) in plain PyTorch, without a graph."""
    f, numbers, method = problem(times, probes, params)
    count = 0 if probes is None else probes.shape[0]
    split = parts(x.shape[1], count, problem.control)
    y = initial_state(problem, x.detach(), probes)
    states, path = solve(f, y, numbers, method, problem.control, split, problem.max_steps)
    return *unpack(states, x.shape[1], count), path
