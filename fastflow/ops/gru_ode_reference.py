"""GRU-ODE-Bayes in plain PyTorch, differentiable as often as one likes: the meaning of :mod:`fastflow.ops.gru_ode`.

All series go side by side, each on its own clock: at tick t every series has made t of its steps. One that makes no
step there has one of size zero, which leaves its state as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.errors import SolverError
from fastflow.ops.ode_control import first_step, growth, trial_step
from fastflow.ops.ode_method import METHODS, Method

__all__ = ["CELLS", "owners", "reference", "sequence", "where"]

CELLS = ("full", "minimal")  # as in csrc/gru_ode.h

Dynamics = Callable[[Tensor], Tensor]


def reference(
    h0: Tensor, values: Tensor, masks: Tensor, dropout: Tensor | None, *params: Tensor, offsets: Tensor, counts: Tensor,
    sizes: Tensor, jumps: Tensor, kind: int, method: str, impute: bool, rtol: float, atol: float, max_steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(pre, post, state, states, steps); the arguments are those of the native op."""
    hidden, *inputs = params[: 3 if impute else 1]
    observe, prep, gru = params[-10:-6], params[-6:-4], params[-4:]

    def f(h: Tensor) -> Tensor:
        return _cell(h, _observe(h, observe) if impute else None, hidden, inputs, CELLS[kind])

    rows_at, table = _plan(offsets, counts, sizes)
    device, jumps, masks, solver = h0.device, jumps.to(h0.device, torch.bool), masks != 0, METHODS[method]
    h, steps, order = h0, torch.zeros(len(h0), 3, dtype=torch.int64, device=device), []
    pre, post, states = ([h0.new_empty(0, n)] for n in (2 * values.shape[1], 2 * values.shape[1], h0.shape[1]))
    left = _totals(offsets, counts).to(device)
    for tick in range(len(table) + 1):
        for rows, series in rows_at.get(tick, ()):
            rows, series = rows.to(device), series.to(device)
            drop = None if dropout is None else dropout[rows]
            before, some = h[series], jumps[rows]
            p = _observe(before, observe, None if drop is None else drop[:, 0])
            after = _jump(before[some], p[some], values[rows[some]], masks[rows[some]], prep, gru)
            h = h.index_copy(0, series[some], after)
            again = _observe(after, observe, None if drop is None else drop[some, 1])
            order.append(rows)
            pre.append(p)
            post.append(p.masked_scatter(some[:, None], again))
            states.append(h[series])
        if tick == len(table):
            break
        size = table[tick].to(device)
        if solver.error:
            h = _adaptive(f, h, size, solver, rtol, atol, max_steps, steps, tick)
        else:
            h = _fixed(f, h, size.to(h.dtype)[:, None], solver)
            steps += (left > tick)[:, None] * steps.new_tensor([solver.stages, 1, 0])
    back = torch.cat([torch.empty(0, dtype=torch.int64, device=device), *order]).argsort()
    return *(torch.cat(t)[back] for t in (pre, post)), h, torch.cat(states)[back], steps


# --- the model --------------------------------------------------------------------------------------


def _cell(h: Tensor, x: Tensor | None, hidden: Tensor, inputs: Sequence[Tensor], kind: str) -> Tensor:
    """dh/dt. The matrices lie one below the other: of r, z, u, or of z, n."""
    matrices = hidden.split(h.shape[1])
    given = [0.0] * len(matrices) if x is None else F.linear(x, *inputs).split(h.shape[1], 1)
    *gates, last = [
        torch.sigmoid(F.linear(h, matrix) + add) for matrix, add in zip(matrices[:-1], given[:-1], strict=True)
    ] + [None]
    gate = gates[0]  # what the state goes through on its way to the candidate: r, or z
    candidate = torch.tanh(F.linear(gate * h, matrices[-1]) + given[-1])
    return (1 - gates[-1]) * (candidate - h)


def _observe(h: Tensor, params: Sequence[Tensor], drop: Tensor | None = None) -> Tensor:
    """Means and log-variances of the channels [n, 2D] in the state h."""
    first, first_bias, second, second_bias = params
    a = torch.relu(F.linear(h, first, first_bias))
    return F.linear(a if drop is None else a * drop, second, second_bias)


def _jump(h: Tensor, p: Tensor, values: Tensor, seen: Tensor, prep: Sequence[Tensor], gru: Sequence[Tensor]) -> Tensor:
    """The state after the observation: what is not seen is read nowhere, whatever it holds."""
    mean, logvar = (torch.where(seen, t, 0) for t in p.chunk(2, 1))
    values = torch.where(seen, values, 0)
    error = (values - mean) * torch.exp(-0.5 * logvar)
    features = torch.stack([values, mean, logvar, error], 2)
    weight, bias = prep
    a = torch.relu(torch.einsum("ndk,dkq->ndq", features, weight) + bias)
    x = torch.where(seen[:, :, None], a, 0).flatten(1)
    weight_ih, weight_hh, bias_ih, bias_hh = gru
    r, z, n = F.linear(x, weight_ih, bias_ih).chunk(3, 1)
    hr, hz, hn = F.linear(h, weight_hh, bias_hh).chunk(3, 1)
    n = torch.tanh(n + torch.sigmoid(r + hr) * hn)
    return n + torch.sigmoid(z + hz) * (h - n)


# --- the schedule -----------------------------------------------------------------------------------


def owners(offsets: Tensor) -> Tensor:
    """The series of every row, [N]."""
    return torch.repeat_interleave(torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff())


def sequence(offsets: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(segments [N + B] series by series in time, their series, ticks [N + B] of a series at the end of each)"""
    each = torch.arange(len(offsets) - 1, device=offsets.device)
    owner, n = owners(offsets), len(counts) - len(offsets) + 1
    numbers, segments = torch.arange(len(counts), device=offsets.device), torch.empty_like(counts)
    segments[numbers[:n] + owner] = numbers[:n]
    segments[offsets[1:] + each] = numbers[n:]
    series = torch.cat([owner, each])[segments]
    total = counts[segments].cumsum(0)
    return segments, series, total - (total - counts[segments])[offsets[:-1] + each][series]


def _totals(offsets: Tensor, counts: Tensor) -> Tensor:
    """Steps of every series, [B]."""
    offsets, counts = offsets.cpu(), counts.cpu()
    return counts[len(counts) - len(offsets) + 1 :].index_add(0, owners(offsets), counts[: int(offsets[-1])])


def _plan(offsets: Tensor, counts: Tensor, sizes: Tensor) -> tuple[dict[int, list[tuple[Tensor, Tensor]]], Tensor]:
    """({tick: [(rows, their series), ...]} where no series comes twice in a list, step sizes [ticks, B])"""
    offsets, counts, sizes = offsets.cpu(), counts.cpu(), sizes.cpu()
    segments, series, ends = sequence(offsets, counts)
    per = counts[segments]
    table = sizes.new_zeros(int(ends.max()) if len(ends) else 0, len(offsets) - 1)
    start = torch.repeat_interleave(ends - per, per)
    within = torch.arange(len(start)) - torch.repeat_interleave(per.cumsum(0) - per, per)
    table[start + within, torch.repeat_interleave(series, per)] = torch.repeat_interleave(sizes[segments], per)

    owner = owners(offsets)
    tick = ends[torch.arange(len(owner)) + owner]
    rows_at: dict[int, list[tuple[Tensor, Tensor]]] = {}
    groups: dict[tuple[int, int], list[int]] = {}
    last, level = None, 0
    for row, (b, t) in enumerate(zip(owner.tolist(), tick.tolist(), strict=True)):
        level = level + 1 if (b, t) == last else 0
        last = b, t
        groups.setdefault((t, level), []).append(row)
    for t, level in sorted(groups):
        rows = torch.tensor(groups[t, level])
        rows_at.setdefault(t, []).append((rows, owner[rows]))
    return rows_at, table


# --- integration ------------------------------------------------------------------------------------


def _stages(f: Dynamics, h: Tensor, step: Tensor, solver: Method, first: Tensor | None = None) -> list[Tensor]:
    """k_1 ... k_s; the first may be known."""
    k = [f(h) if first is None else first]
    for row in solver.a[1:]:
        k.append(f(h + step * _combine(row, k)))
    return k


def _combine(weights: Sequence[float] | Sequence[Tensor], k: Sequence[Tensor]) -> Tensor:
    return sum(w * each for w, each in zip(weights, k, strict=True) if isinstance(w, Tensor) or w != 0)


def _fixed(f: Dynamics, h: Tensor, step: Tensor, solver: Method) -> Tensor:
    return h + step * _combine(solver.b, _stages(f, h, step, solver))


def _adaptive(
    f: Dynamics, h: Tensor, gap: Tensor, solver: Method, rtol: float, atol: float, max_steps: int, steps: Tensor,
    tick: int,
) -> Tensor:  # fmt: skip
    """The states after gap [B], every series with steps of its own; ``steps`` [B, 3] counts them.

    A step may go beyond the end; the state there is then interpolated. Step sizes are constants to autograd.
    """
    pending = gap > 0
    if not pending.any():
        return h
    first = f(h)
    if bool((bad := pending & ~(h.isfinite() & first.isfinite()).all(1)).any()):
        raise SolverError(_fault(bad, tick, "not finite", torch.zeros_like(gap), gap))
    step, t = _first_step(f, h.detach(), first.detach(), solver, rtol, atol), torch.zeros_like(gap)
    y, out = h, h
    steps += pending[:, None] * steps.new_tensor([2, 0, 0])
    for _ in range(max_steps):
        step = torch.where(pending, step, 0)  # those that are done stay where they are
        if bool((stuck := pending & ~(t + step > t)).any()):
            raise SolverError(_fault(stuck, tick, "the step underflows", t, gap))
        size = step.to(h.dtype)[:, None]
        k = _stages(f, y, size, solver, first)
        new = y + size * _combine(solver.b, k)
        with torch.no_grad():
            error = (size * _combine(solver.error, k)).double()
            ratio = _rms(error / (atol + rtol * torch.maximum(y.abs(), new.abs()).double()))
        accept = pending & (ratio <= 1)
        done = accept & (t + step >= gap)
        theta = torch.where(done, (gap - t) / torch.where(done, step, 1), 0)
        dense = [sum(w * theta ** (p + 1) for p, w in enumerate(row)).to(h.dtype)[:, None] for row in solver.weights()]
        out = torch.where(done[:, None], y + size * _combine(dense, k), out)
        steps += torch.stack([pending * (solver.stages - 1), accept, pending & ~accept], 1)
        y, first = torch.where(accept[:, None], new, y), torch.where(accept[:, None], k[-1], first)
        t, pending = torch.where(accept, t + step, t), pending & ~done
        if not pending.any():
            return out
        step = step * growth(ratio, solver.order)
    raise SolverError(_fault(pending, tick, "still", t, gap) + f" after {max_steps} steps")


def _fault(bad: Tensor, tick: int, what: str, t: Tensor, gap: Tensor) -> str:
    b = int(bad.nonzero()[0])
    return f"state: series {b}, interval {tick}: {what} at {float(t[b]):.6g} of {float(gap[b]):.6g}"


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(1).sqrt()


@torch.no_grad()
def _first_step(f: Dynamics, h: Tensor, k: Tensor, solver: Method, rtol: float, atol: float) -> Tensor:
    """Of every series, [B]."""
    scale = atol + rtol * h.abs().double()
    slope = _rms(k / scale)
    trial = trial_step(_rms(h / scale), slope)
    bend = _rms((f(h + trial.to(h.dtype)[:, None] * k) - k) / scale) / trial
    return first_step(trial, slope, bend, solver.order)


# --- faults -----------------------------------------------------------------------------------------


def where(offsets: Tensor, counts: Tensor, sizes: Tensor, pre: Tensor, states: Tensor, state: Tensor) -> str | None:
    """The first series, row and time at which a state or a prediction is not finite; None where all are."""
    rows = ~(pre.isfinite().all(1) & states.isfinite().all(1)).cpu()
    ends = ~state.isfinite().all(1).cpu()
    if not (rows.any() or ends.any()):
        return None
    offsets, counts, sizes = offsets.cpu(), counts.cpu(), sizes.cpu()
    segments, series, _ = sequence(offsets, counts)
    at = int(torch.cat([rows, ends])[segments].nonzero()[0])
    b, segment, first = int(series[at]), int(segments[at]), int(offsets[series[at]] + series[at])
    time = float((counts * sizes)[segments[first : at + 1]].sum())
    place = f"row {segment}" if segment < len(rows) else "the end"
    return f"state: not finite in series {b} at {place}, {time:.6g} after its start"
