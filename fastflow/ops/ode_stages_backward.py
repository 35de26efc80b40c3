"""The exact gradient of a solve by :mod:`fastflow.ops.ode_stages`, its steps held fixed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from fastflow.ops.ode_stages import EAGER, Kernels, Net, parts, recorded, wait

__all__ = ["backward"]


class _Step(NamedTuple):
    """A step that was accepted."""

    number: int
    t: float
    h: float
    outputs: list[int]
    """Of the times, those that lie in it."""


def _steps_back(times: list[float], path: list[list[float]]) -> Iterator[_Step]:
    """The steps from the last to the first."""
    sign, left = -1.0 if times[-1] < times[0] else 1.0, len(times) - 1
    for number, (t, h) in reversed(list(enumerate(path))):
        last = left
        while left > 0 and sign * times[left] > sign * t:
            left -= 1
        yield _Step(number, t, h, list(range(left + 1, last + 1)))


def _dense(method: Sequence[float], theta: float) -> list[float]:
    """b_i(theta) of a packed method."""
    stages = int(method[0])
    if theta >= 1:
        return list(method[4 + stages * (stages + 1) :][:stages])
    rows = torch.tensor(method[-4 * stages :], dtype=torch.float64).view(stages, 4)
    return (rows @ torch.tensor([theta, theta**2, theta**3, theta**4], dtype=torch.float64)).tolist()


@torch.no_grad()
def backward(
    kernels: Kernels, x, times, probes, params, method, layer: int, activation: int, control, steps, counts, states,
    gvalues, gtraces, genergies, gx, gparams,
) -> None:  # fmt: skip
    """``mlp_ode_bwd`` by the kernels of a backend: from every state that was kept the values alone go ahead to the next
    one, and back step by step: all stages with their tangents, and the reverse of each."""
    stages, fsal = int(method[0]), int(method[2])
    numbers, device, (samples, features) = times.tolist(), x.device, x.shape
    tangents, regularized = gtraces.shape[1], genergies.shape[1] > 0
    accepted, spacing = counts[0, 1::2].tolist()
    path = steps[:accepted, 0]
    tableau = torch.tensor(method[4:], dtype=torch.float64, device=device)
    c, ab = tableau[:stages], tableau[stages : stages * (stages + 2)].view(stages + 1, stages)
    all_nodes = (path[:, :1] + path[:, 1:] * c).to(x.dtype)
    all_weights = (path[:, 1, None, None] * ab).to(x.dtype)

    # of the step in hand: h a and h b; a's columns too; the gradients of stages, of what their slopes get from outside
    weights, columns, nodes = x.new_empty((stages + 1, stages)), x.new_empty((stages, stages)), x.new_empty(stages)
    y, slopes = x.new_empty(samples * features), x.new_empty((stages, samples * features))
    gstages = x.new_empty((stages, samples * features))
    gstate = x.new_zeros(samples * (features + tangents + genergies.shape[1]))
    seeds = x.new_empty((stages, gstate.shape[0]))
    goutputs = torch.cat([g.flatten(1) for g in (gvalues, gtraces, genergies)], 1)
    totals = [torch.zeros_like(p, dtype=torch.float64) for p in params]
    traces = x.new_empty((tangents, samples))
    replayed = x.new_empty((min(spacing, max(accepted, 1)), *y.shape))
    net = Net(kernels, x, probes, params, layer, activation, kept=stages)
    alone = Net(kernels, x, None, params, layer, activation) if spacing > 1 else None
    weight = 1.0 if control[4] or not tangents else 1 / tangents  # of a probe
    sign, needed = -1.0 if numbers[-1] < numbers[0] else 1.0, stages - fsal  # the last one has a weight of 0 in a step
    seed, after = (parts(flat, samples, features, tangents) for flat in (seeds, gstate))
    values, of_stages = (flat.view(stages, samples, features) for flat in (slopes, gstages))
    g = x.new_empty((samples, 1 + tangents, features))

    def ahead() -> None:  # a step of the values alone
        layers = alone.at(nodes)
        for i in range(needed):
            kernels.combine(y, slopes[:i], weights[i, :i], alone.rows[0, :, 0])
            alone.forward(layers, i, values[i], traces[:0])
        kernels.combine(y, slopes[:needed], weights[stages, :needed], y.view(samples, features))

    def back(count: int) -> None:  # through the first `count` stages
        layers = net.at(nodes)
        for i in range(count):
            kernels.combine(y, slopes[:i], weights[i, :i], net.rows[i, :, 0])
            net.forward(layers, i, values[i], traces)
        for i in reversed(range(count)):
            gvalue = seed.x[i]
            kernels.combine(gvalue, gstages[i + 1 : count], columns[i, i + 1 : count], gvalue)
            kernels.rows_bwd(gvalue, seed.traces[i], probes, 0, g)
            if regularized:
                kinetic, jacobian = 2 * sign * seed.energies[i]
                g[:, 0].addcmul_(kinetic[:, None], values[i])
                g[:, 1:].addcmul_(jacobian[:, None, None], net.last[i, :, 1:], value=weight)
            net.backward(layers, i, nodes[i], g, of_stages[i], totals)
        after.x.add_(of_stages[:count].sum(0))

    @functools.cache
    def often(work: Callable[[], None], *arguments: int) -> Callable[[], None]:
        """``work``, recorded after some runs of it."""
        runs = 0
        do = functools.partial(work, *arguments)

        def run() -> None:
            nonlocal runs, do
            if runs == EAGER:
                do = recorded(do, device)
            runs += 1
            do()

        return run

    def enter(number: int) -> None:
        nodes.copy_(all_nodes[number])
        weights.copy_(all_weights[number])
        columns.copy_(weights[:stages].t())

    for step in _steps_back(numbers, path.tolist()):
        first = step.number // spacing * spacing
        if step.number == first + spacing - 1 or step.number == accepted - 1:  # of its segment the last
            y.copy_(states[first // spacing].flatten())
            for number in range(first, step.number):
                replayed[number - first].copy_(y)
                enter(number)
                often(ahead)()
            replayed[step.number - first].copy_(y)
        y.copy_(replayed[step.number - first])
        enter(step.number)
        torch.mul(weights[stages][:, None], gstate, out=seeds)
        count = needed
        for i in step.outputs:
            within = _dense(method, (numbers[i] - step.t) / step.h)
            count = stages if within[-1] != 0 else count
            seeds.addcmul_(seeds.new_tensor([step.h * b for b in within])[:, None], goutputs[i - 1])
        for i in step.outputs:
            gstate += goutputs[i - 1]
        often(back, count)()
    gx.copy_(after.x)
    for g, time in zip(gvalues, numbers[1:], strict=True):
        if time == numbers[0]:
            gx += g
    for total, gparam in zip(totals, gparams, strict=True):
        gparam.copy_(total)
    wait(device)  # before the graphs go
