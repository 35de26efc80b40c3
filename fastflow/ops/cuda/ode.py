"""Launches of csrc/cuda/ode.cu: of fixed steps and of control per sample one, of control by the batch one a step.

Networks of which a sample does not fit into a block's shared memory go stage by stage (fastflow/ops/ode_stages.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastflow.ops import ode_reference as plain
from fastflow.ops import ode_stages, ode_stages_backward
from fastflow.ops.cuda.dynamics import MOST_LAYERS, Network, Places, network, pack, unpack
from fastflow.ops.cuda.ode_stages import STAGES
from fastflow.ops.cuda.plan import NULL, Address, Launch, Plan, Value, accumulates, planned
from fastflow.ops.cuda.shares import add_shares
from fastflow.ops.cuda.source import Instance
from fastflow.ops.ode_stages import CONTROL, DONE, NORMS, PHASE, VERDICT, failure
from fastflow.ops.trace_mlp import _PARAMETERS, LAYERS

__all__ = ["KERNELS", "fits"]

SHARED_MEMORY = 64 * 1024  # bytes that every GPU since 2018 gives a block
TILES = 128  # of a solve, before one has more than a sample
TILE = 32  # samples of a tile, at most
LAUNCHES = 8  # of steps before the host asks whether they were enough
BLOCKS = 256  # of a backward, at most: each has a share of the parameters' gradients
SHARES = 256 * 1024 * 1024  # bytes for these
TRACK = 8  # 8-byte fields of struct Track


@functools.lru_cache(maxsize=256)
def _numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Float64 numbers on the device."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float64, device=device)


def _stride(tangents: int, tile: int) -> int:
    """From a unit's rows to the next one's."""
    return (1 + tangents) * tile | 1


def _march_places(rows: int, stages: int, element: int, tile: int) -> Places:
    """struct MarchPlaces, of a state of so many rows"""
    places = Places(element).take(rows * tile, rows * tile, stages * rows * tile, stages * (stages + 1) + 1)
    return places.take(max(rows * tile, 8), NORMS * tile, CONTROL * tile, VERDICT * tile, 1, element=8)


def _forward_places(net: Network, tangents: int, energies: int, stages: int, element: int, tile: int, copied: bool):  # noqa: ANN202
    """struct MarchPlaces, struct ForwardPlaces"""
    rows, stride, dim = net.widths[0] + tangents + energies, _stride(tangents, tile), net.widths[0]
    places = _march_places(rows, stages, element, tile).take(net.starts[-1] if copied else 0, tile, dim * stride)
    return places.take(max(net.padded) * stride, max(net.padded) * stride, (1 + tangents) * tile)


def _backward_places(net: Network, tangents: int, energies: int, stages: int, element: int, tile: int, copied: bool):  # noqa: ANN202
    """struct BackwardPlaces"""
    rows, stride, dim = net.widths[0] + tangents + energies, _stride(tangents, tile), net.widths[0]
    widest = max(net.padded)
    places = Places(element).take(net.starts[-1] if copied else 0, tile, dim * stride, net.kept * stride)
    places.take(widest * stride, widest * stride, 2 * widest * tile, dim * tile, stages * dim * tile)
    places.take(stages * dim * tile, rows * tile, rows * tile, stages * (stages + 1))
    return places.take(TRACK * tile, 1, element=8)


def _tile(places, samples: int):  # noqa: ANN001, ANN202
    """(samples of a tile, are the parameters copied?, the places of what a tile has), by ``places(tile, copied)``; or
    None where not even one sample fits."""
    most = 1
    while most < TILE and 2 * most * TILES <= samples:
        most *= 2
    for copied in (True, False):
        tile = most
        while tile:
            found = places(tile, copied)
            if found.bytes <= SHARED_MEMORY:
                return tile, copied, found
            tile //= 2
    return None


def fits(x: Tensor, probes: Tensor | None, params: Sequence[Tensor], layer: int, regularize: bool, stages: int) -> bool:
    """Is there room for a sample and all that its steps need, in the shared memory of a block?"""
    if len(params) // _PARAMETERS[LAYERS[layer]] > MOST_LAYERS:
        return False
    net, sizes = network(x, params, layer, 0), (_tangents(probes), 2 * int(regularize), stages, x.element_size())
    return all(_tile(functools.partial(p, net, *sizes), 1) for p in (_forward_places, _backward_places))


def _tangents(probes: Tensor | None) -> int:
    return 0 if probes is None else probes.shape[0]


# arguments 0 to 3 are the packed parameters, the method, the times and the probes
def _ode(net: Network, probes, checkpoints: int, controls: int, times, x, tile: int, copied, energies, exact):  # noqa: ANN001, ANN202
    """struct Ode but for its last three"""
    fields = net.fields(0, copied, _tangents(probes))
    fields += [x.shape[0], tile, times.shape[0] - 1, energies, int(exact), checkpoints, controls]
    return [*fields, Address(1), Address(2), *([NULL] * 4 if probes is None else [Address(3), *probes.stride()])]


def _control(first: int, grid, batched: bool, tiles: int, rtol: float, atol: float, max_steps: int):  # noqa: ANN001, ANN202
    """struct StepControl: arguments from ``first`` on are the grid, status, state, control, partial sums, the turn."""
    fields = [rtol, atol, max_steps, NULL if grid is None else Address(first), Address(first + 1)]
    whole = [Address(first + i) for i in (2, 3, 4)] if batched else [NULL] * 3
    return [*fields, *whole, tiles, Value(first + 5) if batched else 0]


def _march(launch: Callable[..., None], x: Tensor, rows: int, stages: int, batched: bool, max_steps: int) -> None:
    """Calls ``launch(status, state, control, partial, turn)`` until all samples are through; raises what went wrong."""
    doubles = functools.partial(torch.empty, dtype=torch.float64, device=x.device)
    status = doubles((x.shape[0], 5))
    if not batched:
        launch(status, None, None, None, 0)
        code, t, attempt, h, _ = status.cpu().unbind(1)
        if (code > DONE).any():
            # the first to fail, as if all went side by side
            sample = int(torch.where(code > DONE, attempt, torch.inf).argmin())
            raise failure(code[sample], t[sample], attempt[sample], h[sample], sample, max_steps)
        return
    state, partial = x.new_empty((2 + stages) * rows * x.shape[0]), doubles(2 * x.shape[0] * NORMS)
    turns = torch.zeros((2, CONTROL), dtype=torch.int64, device=x.device)
    while True:
        for number in range(LAUNCHES):  # an even number: the last leaves its turn to 0
            launch(status, state, turns, partial, number % 2)
        if (phase := turns[0, PHASE].item()) >= DONE:
            break
    if phase > DONE:
        sample = int(status[:, 4].nan_to_num(torch.inf).argmax())
        raise failure(*status[sample, :4].tolist(), sample, max_steps)


@functools.partial(planned, values=(16,))
def _forward(
    packed, method, times, probes, steps, counts, states, x, values, traces, energies, grid, status, state, kept,
    partial, turn: int, net: Network, stages: int, rtol: float, atol: float, exact: bool, max_steps: int,
) -> Plan:  # fmt: skip
    sizes = net, _tangents(probes), energies.shape[1], stages, x.element_size()
    tile, copied, places = _tile(functools.partial(_forward_places, *sizes), x.shape[0])
    tiles, batched = -(-x.shape[0] // tile), kept is not None
    fields = _ode(net, probes, states.shape[0], steps.shape[1], times, x, tile, copied, energies.shape[1], exact)
    fields += [Address(4), Address(5), Address(6)]
    fields += _control(11, grid, batched, tiles, rtol, atol, max_steps)
    fields += [*places.starts, Address(7), *x.stride(), Address(8), Address(9), Address(10)]
    kernel = "ode_step" if batched else "ode_solve"
    return Plan([Launch(Instance("ode", kernel, "OdeForward", (accumulates(x),)), tiles, fields, places.bytes)])


def _fixed_steps(times: Sequence[float], method, step_size: float, max_steps: int, device) -> Tensor | None:  # noqa: ANN001
    """Where they begin and end; None where control chooses them."""
    if not step_size and method[3]:
        return None
    return torch.tensor(plain.grid(times, step_size, max_steps), dtype=torch.float64, device=device)


def mlp_ode_fwd(
    x, times, probes, params, method, layer: int, activation: int, control, max_steps: int, values, traces, energies,
    steps, counts, states,
) -> None:  # fmt: skip
    if not fits(x, probes, params, layer, bool(control[5]), int(method[0])):
        return ode_stages.forward(
            STAGES, x, times, probes, params, method, layer, activation, control, max_steps, values, traces, energies,
            steps, counts, states,
        )  # fmt: skip
    rtol, atol, step_size, per_sample, exact, _ = control
    net, stages = network(x, params, layer, activation), int(method[0])
    grid = _fixed_steps(times.tolist(), method, step_size, max_steps, x.device)
    given = pack(params, net), _numbers(tuple(method), x.device), times.to(x.device), probes, steps, counts, states, x
    given += values, traces, energies, grid
    meaning = net, stages, float(rtol), float(atol), bool(exact), max_steps
    rows = x.shape[1] + traces.shape[1] + energies.shape[1]
    launch = lambda *left: _forward(*given, *left, *meaning)  # noqa: E731
    _march(launch, x, rows, stages, grid is None and not per_sample, max_steps)


def _blocks(tiles: int, parameters: int) -> int:
    """Of a backward: each has a share of the parameters' gradients."""
    return min(tiles, BLOCKS, max(16, SHARES // (parameters * 8)))


@planned
def _backward(
    packed, method, times, probes, steps, counts, states, x, gvalues, gtraces, genergies, gx, flat, net: Network,
    stages: int, exact: bool, length: int,
) -> Plan:  # fmt: skip
    sizes = net, _tangents(probes), genergies.shape[1], stages, x.element_size()
    tile, copied, places = _tile(functools.partial(_backward_places, *sizes), x.shape[0])
    tiles, parameters = -(-x.shape[0] // tile), packed.numel()
    blocks = _blocks(tiles, parameters)
    share = Address(0, 0, scratch=True)
    fields = _ode(net, probes, states.shape[0], steps.shape[1], times, x, tile, copied, genergies.shape[1], exact)
    fields += [
        Address(4),
        Address(5),
        Address(6),
        *places.starts,
        Address(8),
        Address(9),
        Address(10),
        Address(11),
        *gx.stride(),
        share,
    ]
    fields += [Address(1, 0, scratch=True), length, blocks, tiles]
    launches = [
        Launch(Instance("ode_backward", "ode_bwd", "OdeBackward", (accumulates(x),)), blocks, fields, places.bytes),
        add_shares("double", share, Address(12), parameters, blocks),
    ]
    return Plan(launches, [(blocks * parameters, torch.float64), (blocks * length * x.shape[1] * tile, x.dtype)])


def mlp_ode_bwd(
    x, times, probes, params, method, layer: int, activation: int, control, steps, counts, states, gvalues, gtraces,
    genergies, gx, gparams,
) -> None:  # fmt: skip
    if not fits(x, probes, params, layer, bool(control[5]), int(method[0])):
        return ode_stages_backward.backward(
            STAGES, x, times, probes, params, method, layer, activation, control, steps, counts, states, gvalues,
            gtraces, genergies, gx, gparams,
        )  # fmt: skip
    net, stages = network(x, params, layer, activation), int(method[0])
    packed = pack(params, net)
    flat = torch.empty_like(packed, dtype=torch.float64)
    # the longest segment between two states that were kept
    length = min(int(counts[:, 3].max()), int(counts[:, 1].max()))
    grads = (g.contiguous() for g in (gvalues, gtraces, genergies))
    _backward(
        packed, _numbers(tuple(method), x.device), times.to(x.device), probes, steps, counts, states, x, *grads, gx,
        flat, net, stages, bool(control[4]), length,
    )  # fmt: skip
    unpack(flat, net, gparams)


KERNELS = {"mlp_ode_fwd": mlp_ode_fwd, "mlp_ode_bwd": mlp_ode_bwd}
