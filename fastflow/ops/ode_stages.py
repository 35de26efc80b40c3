"""The solve of :mod:`fastflow.ops.ode` for networks of any width on a GPU: stage by stage, in a CUDA graph.

The layers are products of a library with the kernels of :mod:`fastflow.ops.trace_mlp` between them, the rest are four
small kernels (``Kernels``). All that a step depends on lies on the device (``State``), so one *turn*, an attempt of a
step, is the same launches each time: they are recorded once per solve and replayed until the device says that it is
done. Steps are fixed or chosen for the whole batch; not served are solves in which every sample has its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastflow.ops import ode_reference as plain
from fastflow.ops.trace_mlp import LAYERS, _gate, _keeps_input, _layers, _unfold

__all__ = ["Kernels", "Net", "State", "failure", "forward", "parts", "recorded", "wait"]

NORMS = 8  # kNorms of csrc/cuda/ode_control.cuh
BLOCK = 8  # samples that are added up together
EAGER = 2  # turns before one is recorded
CONTROL, VERDICT = 9, 7  # 8-byte fields of struct Control and Verdict
BEGIN, DONE, NOT_FINITE, UNDERFLOW, TOO_MANY = 0, 4, 5, 6, 7  # of enum Phase
T, H, PHASE, ACCEPTED, REJECTED = 0, 1, 3, 5, 6  # their places in struct Control


class Kernels(NamedTuple):
    """Of a backend. n is the size of the flat state: x [B, D], then traces [S, B], then energies [2 or 0, B]."""

    combine: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    """(base [n], slopes [j, >= n], weights [j], out [B, D] in any strides): out = base + weights . slopes"""
    norms: Callable[[State], None]
    """The end of the step in hand, and the sums of squares that decide on it."""
    decide: Callable[[State], None]
    """What becomes of the step, and the next one: ``decide`` of csrc/cuda/ode_control.cuh."""
    apply: Callable[[State], None]
    """The new state, the outputs that were reached, the state that is kept."""
    rows: Callable[..., None]
    rows_bwd: Callable[..., None]
    contract: Callable[..., None]
    layer_fwd: Callable[..., None]
    layer_bwd: Callable[..., None]


class State(NamedTuple):
    """A solve on the device; float64 and int64 where marked so, else in the dtype of x."""

    y: Tensor
    """[n]"""
    ends: Tensor
    """[n]"""
    slopes: Tensor
    """[stages, n]"""
    nodes: Tensor
    """[stages], their times"""
    weights: Tensor
    """[stages + 1, stages], h a and h b"""
    control: Tensor
    """int64 [9]: struct Control"""
    verdict: Tensor
    """int64 [7]: struct Verdict"""
    partial: Tensor
    """float64 [blocks, NORMS]"""
    errors: Tensor
    """float64 [B], the norm of every sample's error"""
    method: Tensor
    """float64, Method.pack()"""
    times: Tensor
    """float64 [1 + T]"""
    grid: Tensor | None
    """float64, of fixed steps where they begin and end"""
    values: Tensor
    traces: Tensor
    energies: Tensor
    steps: Tensor
    counts: Tensor
    states: Tensor
    tolerances: Tensor
    """float64 [3]: rtol, atol, and the weight of a probe in the norm, 1 or 1 / S"""
    order: int
    fsal: bool
    max_steps: int


# --- the network at a stage ---------------------------------------------------------------------------


class Net:
    """f of rows [B, 1 + S, D] at the times of all stages, and the reverse of it.

    ``kept``: one set of hidden rows for every stage, or one for all.
    """

    def __init__(self, kernels: Kernels, x: Tensor, probes: Tensor | None, params, layer: int, activation: int, kept=1):  # noqa: ANN001
        self.kernels, self.probes, self.params, self.layer, self.activation = kernels, probes, params, layer, activation
        count = 0 if probes is None else probes.shape[0]
        empty = functools.partial(torch.empty, dtype=x.dtype, device=x.device)
        shape = x.shape[0], 1 + count
        widths = [given[0].shape[0] for given in _layers(params, layer)]
        self.rows, self.last = empty((kept, *shape, x.shape[1])), empty((kept, *shape, x.shape[1]))
        self.hidden = [empty((kept, *shape, width)) for width in widths[:-1]]
        # where the reverse needs what goes into the activation, what comes out is a buffer of its own
        self.outs = [empty((*shape, width)) for width in widths[:-1]] if _keeps_input(activation) else None
        for rows in self.rows:
            kernels.rows(x, probes, 0, rows)

    def at(self, nodes: Tensor) -> list[tuple[Callable[[int], Tensor], Tensor]]:
        """Of every layer the weight at stage i, and the bias at all stages."""
        return [self._layer(nodes, *params) for params in _layers(self.params, self.layer)]

    def _layer(self, nodes: Tensor, weight: Tensor, bias: Tensor, *gating: Tensor):  # noqa: ANN202
        if LAYERS[self.layer] == "concat":
            return (lambda _: weight[:, 1:]), torch.addcmul(bias, nodes[:, None], weight[:, 0])
        if not gating:
            return (lambda _: weight), bias.expand(nodes.shape[0], -1)
        gate, shift = _gate(nodes[:, None], *gating)
        return (lambda i: gate[i, :, None] * weight), torch.addcmul(shift, gate, bias)

    def forward(self, layers: list, stage: int, value: Tensor, trace: Tensor) -> Tensor:
        """f [B, D] and e . J e [S, B] of the rows of a stage; returns (f less the last bias, J e) [B, 1 + S, D]."""
        slot = stage % len(self.rows)
        y, last = self.rows[slot], self.last[slot]
        for n, (weight, bias) in enumerate(layers[:-1]):
            a = self.hidden[n][slot]
            z = a if self.outs is None else self.outs[n]
            self.kernels.layer_fwd(y, weight(stage), bias[stage], a, z, self.activation)
            y = z
        weight, bias = layers[-1]
        self.kernels.layer_fwd(y, weight(stage), None, last, None, self.activation)
        self.kernels.contract(last, bias[stage], self.probes, 0, value, trace)
        return last

    def backward(self, layers: list, stage: int, t: Tensor, g: Tensor, gx: Tensor, gparams: Sequence[Tensor]) -> None:
        """The reverse at the time t [], from g of all that ``forward`` returned; adds to ``gparams``."""
        each = _layers(gparams, self.layer)
        for n in reversed(range(len(layers))):
            weight = layers[n][0](stage)
            before = self.hidden[n - 1][stage] if n > 0 else None
            y = self.rows[stage] if before is None else before if self.outs is None else self.outs[n - 1]
            previous = gx if before is None else torch.empty_like(before)
            gweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            self.kernels.layer_bwd(g, weight, before, y, gweight, previous, self.activation)
            _, *found = _unfold(t, _layers(self.params, self.layer)[n], self.layer, gweight, g[:, 0].sum(0))
            for total, part in zip(each[n], found, strict=True):
                total += part
            g = previous


class Parts(NamedTuple):
    """Views of the last dimension of flat states, [..., n]."""

    x: Tensor
    traces: Tensor
    energies: Tensor


def parts(flat: Tensor, samples: int, features: int, tangents: int) -> Parts:
    sizes = samples * features, samples * tangents
    rest = flat.shape[-1] - sum(sizes)
    x, traces, energies = flat.split([*sizes, rest], -1)
    return Parts(
        x.unflatten(-1, (samples, features)),
        traces.unflatten(-1, (tangents, samples)),
        energies.unflatten(-1, (rest // samples, samples)),
    )


# --- turns --------------------------------------------------------------------------------------------


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@functools.lru_cache(maxsize=16)
def _beside(current: torch.cuda.Stream) -> torch.cuda.Stream:
    """Where graphs are recorded: one stream for each, because the library of products keeps memory for every stream."""
    return torch.cuda.Stream(current.device)


def recorded(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The same launches as one CUDA graph; the work itself where there is no GPU, or where it cannot be recorded.

    It must have run before: what is compiled or set up at the first use cannot be recorded. The graph lives as long as
    what is returned, and that must be as long as it runs: see :func:`wait`.
    """
    if not on_gpu(device):
        return work
    # torch.cuda.graph() would also collect garbage and empty the cache, which takes longer than many a solve
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    stream = _beside(current)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
    except RuntimeError:
        return work
    current.wait_stream(stream)
    return graph.replay


def wait(device: torch.device) -> None:
    """Until all that was launched has run."""
    if on_gpu(device):
        torch.cuda.current_stream(device).synchronize()


def until_done(turn: Callable[[], None], phase: Tensor, most: int) -> None:
    """Turns, ``most`` of them, until the phase [1] on the device is one of an end."""
    if not on_gpu(phase.device):
        while most > 0 and phase.item() < DONE:
            turn()
            most -= 1
        return
    # the host looks at the turn before the one that it has just launched, so the device need not wait for it
    stream, events = torch.cuda.current_stream(phase.device), (torch.cuda.Event(), torch.cuda.Event())
    seen = torch.zeros(2, dtype=torch.int64).pin_memory()
    for i in range(most):
        if i == EAGER:
            turn = recorded(turn, phase.device)
        turn()
        now, before = i % 2, (i + 1) % 2
        seen[now : now + 1].copy_(phase, non_blocking=True)
        events[now].record(stream)
        if i > 0:
            events[before].synchronize()
            if seen[before] >= DONE:
                break
    wait(phase.device)  # before the graph goes


@torch.no_grad()
def forward(
    kernels: Kernels, x, times, probes, params, method, layer: int, activation: int, control, max_steps: int, values,
    traces, energies, steps, counts, states,
) -> None:  # fmt: skip
    """``mlp_ode_fwd`` by the kernels of a backend."""
    rtol, atol, step_size, _, exact, _ = control
    stages, fsal, adaptive = int(method[0]), bool(method[2]), bool(method[3]) and not step_size
    numbers, device, (samples, features) = times.tolist(), x.device, x.shape
    tangents, size = traces.shape[1], samples * (features + traces.shape[1] + energies.shape[1])
    weight = 1.0 if exact or not tangents else 1 / tangents  # of a probe
    points = [] if adaptive else plain.grid(numbers, step_size, max_steps)
    doubles = functools.partial(torch.tensor, dtype=torch.float64, device=device)
    state = State(
        y=x.new_zeros(size),
        ends=x.new_empty(size),
        slopes=x.new_empty((stages, size)),
        nodes=x.new_empty(stages),
        weights=x.new_empty((stages + 1, stages)),
        control=torch.zeros(CONTROL, dtype=torch.int64, device=device),
        verdict=torch.empty(VERDICT, dtype=torch.int64, device=device),
        partial=torch.zeros((-(-samples // BLOCK), NORMS), dtype=torch.float64, device=device),
        errors=torch.zeros(samples, dtype=torch.float64, device=device),
        method=doubles(method),
        times=doubles(numbers),
        grid=None if adaptive else doubles(points),
        values=values, traces=traces, energies=energies, steps=steps, counts=counts, states=states,
        tolerances=doubles((rtol, atol, weight)), order=int(method[1]), fsal=fsal, max_steps=max_steps,
    )  # fmt: skip
    y, slopes = (parts(flat, samples, features, tangents) for flat in (state.y, state.slopes))
    y.x.copy_(x)
    net = Net(kernels, x, probes, params, layer, activation)
    sign = -1.0 if numbers[-1] < numbers[0] else 1.0

    def turn(first: int, last: int) -> None:
        layers = net.at(state.nodes)
        for i in range(first, last):
            kernels.combine(state.y, state.slopes[:i], state.weights[i, :i], net.rows[0, :, 0])
            rows = net.forward(layers, i, slopes.x[i], slopes.traces[i])
            if energies.shape[1]:
                kinetic, jacobian = slopes.energies[i]
                torch.sum(slopes.x[i].square(), 1, out=kinetic)
                torch.sum(rows[:, 1:].square(), (1, 2), out=jacobian)
                kinetic *= sign
                jacobian *= sign * weight
        kernels.norms(state)
        kernels.decide(state)
        kernels.apply(state)

    kernels.decide(state)
    kernels.apply(state)
    if numbers[0] != numbers[-1]:
        if adaptive or fsal:
            turn(0, 1)
        if adaptive:
            turn(1, 2)
        most = max_steps if adaptive else len(points) - 1
        until_done(functools.partial(turn, int(fsal), stages), state.control[PHASE : PHASE + 1], most)
    found = state.control.cpu()
    if found[PHASE] > DONE:
        t, h = found[: H + 1].view(torch.float64).tolist()
        attempt = found[ACCEPTED] + found[REJECTED] + 1
        sample = int(state.errors.nan_to_num(torch.inf).argmax())
        raise failure(int(found[PHASE]), t, attempt, h, sample, max_steps)


def failure(code: float, t: float, attempt: float, h: float, sample: int, max_steps: int) -> RuntimeError:
    """How a solve that ended in this phase is reported."""
    what = {NOT_FINITE: plain.NOT_FINITE, UNDERFLOW: "the step underflows", TOO_MANY: plain.too_many(max_steps)}
    return RuntimeError(f"{what[int(code)]} at t = {t:.6g}, step {int(attempt)}, h = {h:.3g}, first in sample {sample}")
