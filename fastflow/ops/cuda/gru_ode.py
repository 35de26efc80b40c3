"""Launches of csrc/cuda/gru_ode.cu and gru_ode_backward.cu."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastflow.errors import SolverError
from fastflow.ops.cuda.plan import NULL, Address, Launch, Plan, accumulates, planned
from fastflow.ops.cuda.shares import add_shares
from fastflow.ops.cuda.source import Instance
from fastflow.ops.gru_ode_reference import sequence, where

__all__ = ["KERNELS"]

TILE = 16  # series of a block, at most
BLOCKS = 128  # there are so many at least, where there are as many series
TICKS = 16  # of a window, as in csrc/cuda/gru_ode_backward.cu
SHARED_MEMORY = 64 * 1024  # bytes that every GPU since 2018 gives a block


def _sizes(h0: Tensor, values: Tensor, params: Sequence[Tensor], impute: bool) -> tuple[int, ...]:
    """(H, P, D, Q, gates)"""
    h, d = h0.shape[1], values.shape[1]
    return h, params[-10].shape[0], d, params[-6].shape[2], params[0].shape[0] // h


def _tile(h0: Tensor, rows: int, matrices: int) -> tuple[int, int, int]:
    """(series of a tile, are the cell's matrices staged?, bytes of shared memory)"""
    size, series = h0.element_size(), h0.shape[0]
    limit = SHARED_MEMORY
    if h0.is_cuda:
        limit = torch.cuda.get_device_properties(h0.device).shared_memory_per_block_optin
    tile = TILE
    while tile > 1 and (-(-series // tile) < BLOCKS or 3 * 8 * tile + rows * (tile + 1) * size > SHARED_MEMORY):
        tile //= 2
    shared = 3 * 8 * tile + rows * (tile + 1) * size
    staged = shared + matrices * size <= limit
    return tile, int(staged), shared + staged * matrices * size


def _filter(h0, values, dropout, params, method: int, impute: bool, backward: bool) -> tuple[list, int, int, Instance]:
    """(struct Filter, blocks, bytes of shared memory, tile); ``method`` stages"""
    h, p, d, q, gates = _sizes(h0, values, params, impute)
    evaluation, jump = 5 * h + impute * (p + 2 * d), p + 2 * d + d * q + 4 * h
    rows = 1 + (2 + method) * h + evaluation + jump
    if backward:
        rows = 1 + (5 + method) * h + 2 * d + p + d * q + jump + method * evaluation
    tile, staged, shared = _tile(h0, rows, gates * h * h)
    fields = [Address(0), Address(1), Address(2), NULL if dropout is None else Address(3), Address(4)]
    fields += [*map(Address, range(5, 9)), *map(Address, range(9, 16))]
    fields += [h0.shape[0], values.shape[0], tile, h, p, d, q, gates, int(impute), method, staged]
    return fields, -(-h0.shape[0] // tile), shared, tile


# arguments of both: h0, values, masks, dropout, weights, pre, post, state, states, offsets, counts, ends, sizes, jumps,
# steps, method
@planned
def _forward(
    h0, values, masks, dropout, weights, pre, post, state, states, offsets, counts, ends, sizes, jumps, steps, method,
    params, stages: int, impute: bool,
) -> Plan:  # fmt: skip
    fields, blocks, shared, _ = _filter(h0, values, dropout, params, stages, impute, False)
    return Plan([Launch(Instance("gru_ode", "gru_ode_fwd", "Filter", (accumulates(h0),)), blocks, fields, shared)])


@planned
def _backward(
    h0, values, masks, dropout, weights, pre, post, state, states, offsets, counts, ends, sizes, jumps, steps, method,
    matrices, gpre, gpost, gstate, gstates, gh0, gvalues, flat, params, stages: int, impute: bool, windows: int,
) -> Plan:  # fmt: skip
    """pre, post, state and steps are nothing here. ``windows``: at least those of the longest series."""
    fields, blocks, shared, tile = _filter(h0, values, dropout, params, stages, impute, True)
    fields[5:8] = [NULL] * 3
    fields[14] = NULL
    states_of_block, parameters = h0.shape[1] * tile, matrices.numel()
    fields += map(Address, range(16, 23))
    fields += [Address(0, scratch=True), Address(1, scratch=True), Address(2, scratch=True), windows, parameters]
    kind = accumulates(h0)
    launches = [
        Launch(Instance("gru_ode_backward", "gru_ode_bwd", "FilterBackward", (kind,)), blocks, fields, shared),
        add_shares(kind, Address(2, scratch=True), Address(23), parameters, blocks),
    ]
    sizes_of = (blocks * windows * states_of_block, blocks * TICKS * states_of_block, blocks * parameters)
    return Plan(launches, [(max(1, size), h0.dtype) for size in sizes_of])


def _flat(params: Sequence[Tensor], h: int, transposed: bool) -> Tensor:
    """All parameters one after the other; transposed: each matrix, those of stacked gates one by one."""
    if not transposed:
        return torch.cat([p.reshape(-1) for p in params])
    stacked = {0, len(params) - 4, len(params) - 3} | ({1} if len(params) == 13 else set())
    parts = []
    for i, p in enumerate(params):
        if p.dim() == 2 and i != len(params) - 5:  # the last but four is the bias of prep
            p = p.view(-1, h, p.shape[1]).transpose(1, 2) if i in stacked else p.t()
        parts.append(p.reshape(-1))
    return torch.cat(parts)


@functools.lru_cache(maxsize=64)
def _weights_of(method: tuple[float, ...], device: torch.device) -> Tensor:
    """b and a of a packed Method, see fastflow/ops/ode_method.py."""
    s = int(method[0])
    square = method[4 + s : 4 + s + s * s]
    with torch.inference_mode(False):
        return torch.tensor([*method[4 + s + s * s : 4 + 2 * s + s * s], *square], dtype=torch.float64, device=device)


def _ends(offsets: Tensor, counts: Tensor) -> Tensor:
    segments, _, ends = sequence(offsets, counts)
    return torch.empty_like(counts).scatter_(0, segments, ends)


def gru_ode_fwd(
    h0, values, masks, dropout, params, offsets, counts, sizes, jumps, kind, impute, method, rtol, atol, max_steps, pre,
    post, state, states, steps,
) -> None:  # fmt: skip
    if h0.shape[0] == 0:
        return
    _forward(
        h0, values, masks, dropout, _flat(params, h0.shape[1], True), pre, post, state, states, offsets, counts,
        _ends(offsets, counts), sizes, jumps, steps, _weights_of(tuple(method), h0.device), list(params),
        int(method[0]), impute,
    )  # fmt: skip
    if not (h0.is_cuda and torch.cuda.is_current_stream_capturing()):
        if (fault := where(offsets, counts, sizes, pre, states, state)) is not None:
            raise SolverError(fault)


def gru_ode_bwd(
    h0, values, masks, dropout, params, offsets, counts, sizes, jumps, kind, impute, method, rtol, atol, max_steps,
    states, gpre, gpost, gstate, gstates, gh0, gvalues, gparams,
) -> None:  # fmt: skip
    if h0.shape[0] == 0:
        for g in gparams:
            g.zero_()
        return
    ends, matrices = _ends(offsets, counts), _flat(params, h0.shape[1], False)
    windows = -(-int(ends.max()) // TICKS)
    windows = 1 << max(0, windows - 1).bit_length()  # few sizes: plans come back
    flat = torch.empty_like(matrices)
    _backward(
        h0, values, masks, dropout, _flat(params, h0.shape[1], True), None, None, None, states, offsets, counts, ends,
        sizes, jumps, None, _weights_of(tuple(method), h0.device), matrices, gpre, gpost, gstate, gstates, gh0, gvalues,
        flat, list(params), int(method[0]), impute, windows,
    )  # fmt: skip
    parts = flat.split([g.numel() for g in gparams])
    torch._foreach_copy_(list(gparams), [p.view(g.shape) for p, g in zip(parts, gparams, strict=True)])


KERNELS = {"gru_ode_fwd": gru_ode_fwd, "gru_ode_bwd": gru_ode_bwd}
