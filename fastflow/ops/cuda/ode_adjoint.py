"""Launches of csrc/cuda/ode_adjoint.cu: those of a solve, from every output back to the one before it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastflow.ops.cuda.dynamics import MOST_LAYERS, Network, Places, network, pack, unpack
from fastflow.ops.cuda.ode import (
    _blocks,
    _control,
    _fixed_steps,
    _march,
    _march_places,
    _numbers,
    _ode,
    _stride,
    _tangents,
    _tile,
)
from fastflow.ops.cuda.plan import NULL, Address, Launch, Plan, accumulates, planned
from fastflow.ops.cuda.shares import add_shares
from fastflow.ops.cuda.source import Instance
from fastflow.ops.trace_mlp import _PARAMETERS, LAYERS

__all__ = ["KERNELS", "fits"]


def _places(net: Network, tangents: int, energies: int, stages: int, element: int, tile: int, copied: bool) -> Places:
    """struct MarchPlaces, struct AdjointPlaces"""
    dim, stride, widest = net.widths[0], _stride(tangents, tile), max(net.padded)
    places = _march_places(2 * dim, stages, element, tile).take(net.starts[-1] if copied else 0, tile)
    places.take(dim * stride, net.kept * stride, widest * stride, widest * stride, 2 * widest * tile)
    return places.take((tangents + energies) * tile, stages * tile)


def fits(x: Tensor, probes: Tensor | None, params: Sequence[Tensor], layer: int, regularize: bool, stages: int) -> bool:
    """Is there room for a sample and all that its steps need, in the shared memory of a block?"""
    if len(params) // _PARAMETERS[LAYERS[layer]] > MOST_LAYERS:
        return False
    sizes = network(x, params, layer, 0), _tangents(probes), 2 * int(regularize), stages, x.element_size()
    return _tile(functools.partial(_places, *sizes), 1) is not None


@functools.partial(planned, values=(14,))
def _adjoint(
    packed, method, times, probes, counts, value, a, integrals, shares, grid, status, state, kept, partial, turn: int,
    net: Network, stages: int, blocks: int, controls: int, energies: int, rtol: float, atol: float, exact: bool,
    max_steps: int,
) -> Plan:  # fmt: skip
    sizes = net, _tangents(probes), energies, stages, value.element_size()
    tile, copied, places = _tile(functools.partial(_places, *sizes), value.shape[0])
    tiles, batched = -(-value.shape[0] // tile), kept is not None
    fields = _ode(net, probes, 0, controls, times, value, tile, copied, energies, exact)
    fields += [NULL, Address(4), NULL, *_control(9, grid, batched, tiles, rtol, atol, max_steps)]
    fields += [*places.starts, Address(5), *value.stride(), Address(6), *a.stride(), Address(7), Address(8), blocks]
    kernel = "ode_adjoint_step" if batched else "ode_adjoint_solve"
    instance = Instance("ode_adjoint", kernel, "OdeAdjoint", (accumulates(value),))
    return Plan([Launch(instance, blocks, fields, places.bytes)])


@planned
def _add(shares, flat) -> Plan:
    return Plan([add_shares("double", Address(0), Address(1), shares.shape[1], shares.shape[0])])


def mlp_ode_adjoint(
    x, times, probes, params, method, layer: int, activation: int, control, max_steps: int, values, gvalues, gtraces,
    genergies, counts, gx, gparams,
) -> None:  # fmt: skip
    rtol, atol, step_size, per_sample, exact, _ = control
    net, stages, energies, points = (
        network(x, params, layer, activation),
        int(method[0]),
        genergies.shape[1],
        times.tolist(),
    )
    packed, (samples, dim) = pack(params, net), x.shape
    sizes = net, _tangents(probes), energies, stages, x.element_size()
    tile, _, _ = _tile(functools.partial(_places, *sizes), samples)
    blocks = _blocks(-(-samples // tile), packed.numel())
    shares = packed.new_zeros((blocks, packed.numel()), dtype=torch.float64)
    back = torch.stack([times[1:], times[:-1]], 1).to(x.device)  # of every output: its time and the one before
    constants = packed, _numbers(tuple(method), x.device)
    meaning = (
        net,
        stages,
        blocks,
        samples if per_sample else 1,
        energies,
        float(rtol),
        float(atol),
        bool(exact),
        max_steps,
    )
    taken = counts.new_empty((len(counts), 4))  # of one output
    integrals = x.new_zeros((gtraces.shape[1] + energies, samples))
    gx.zero_()
    for i in range(len(points) - 2, -1, -1):
        gx += gvalues[i]
        integrals += torch.cat([gtraces[i], genergies[i]])
        if points[i] == points[i + 1]:
            continue
        grid = _fixed_steps([points[i + 1], points[i]], method, step_size, max_steps, x.device)
        given = *constants, back[i], probes, taken, values[i], gx, integrals, shares, grid
        launch = lambda *left, given=given: _adjoint(*given, *left, *meaning)  # noqa: E731
        _march(launch, x, 2 * dim, stages, grid is None and not per_sample, max_steps)
        counts += taken[:, :3]
    flat = shares.new_empty(packed.numel())
    _add(shares, flat)
    unpack(flat, net, gparams)


KERNELS = {"mlp_ode_adjoint": mlp_ode_adjoint}
