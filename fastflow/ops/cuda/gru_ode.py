"""Launches of csrc/cuda/gru_ode.cu, gru_ode_backward.cu and gru_ode_adaptive.cu."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastflow.errors import SolverError
from fastflow.ops._op import accumulator
from fastflow.ops.cuda.plan import NULL, Address, Launch, Plan, accumulates, planned
from fastflow.ops.cuda.shares import add_shares
from fastflow.ops.cuda.source import Instance
from fastflow.ops.gru_ode_reference import sequence, where

__all__ = ["KERNELS", "fits"]

TILE = 16  # series of a block, at most
BLOCKS = 128  # there are so many at least, where there are as many series
TICKS = 16  # of a window, as in csrc/cuda/gru_ode_backward.cu
SHARED_MEMORY = 64 * 1024  # bytes that every GPU since 2018 gives a block
ROOM = 32  # steps of an interval that are kept for a backward
CLOCK, CONTROL = 3, 10  # 8-byte fields of every series: of SeriesTile, of struct Control
FAULTS = {1: "not finite", 2: "the step underflows", 3: "still"}  # enum Fault


Control = tuple[float, float, int]  # struct Tolerances


def _sizes(h0: Tensor, values: Tensor, params: Sequence[Tensor]) -> tuple[int, ...]:
    """(H, P, D, Q, gates)"""
    h, d = h0.shape[1], values.shape[1]
    return h, params[-10].shape[0], d, params[-6].shape[2], params[0].shape[0] // h


def _limit(h0: Tensor) -> int:
    """Bytes of shared memory that a block may have where it needs them."""
    return torch.cuda.get_device_properties(h0.device).shared_memory_per_block_optin if h0.is_cuda else SHARED_MEMORY


def _needs(sizes: tuple[int, ...], stages: int, adaptive: bool, impute: bool, backward: bool) -> tuple[int, int]:
    """(rows of shared memory, bytes beside them for every series)"""
    h, p, d, q, _ = sizes
    evaluation, jump = 5 * h + impute * (p + 2 * d), p + 2 * d + d * q + 4 * h
    if adaptive:
        rows = 1 + 2 * h + max(jump, stages * h + evaluation)
        return rows + backward * (stages + 3 * h + 2 * d + p + d * q), 8 * (CLOCK + CONTROL)
    if backward:
        return 1 + (5 + stages) * h + 2 * d + p + d * q + jump + stages * evaluation, 8 * CLOCK
    return 1 + (2 + stages) * h + evaluation + jump, 8 * CLOCK


def _bytes(h0: Tensor, rows: int, beside: int, tile: int) -> int:
    return beside * tile + rows * (tile | 1) * accumulator(h0.dtype).itemsize


def fits(h0: Tensor, values: Tensor, params: Sequence[Tensor], stages: int, adaptive: bool, impute: bool) -> bool:
    """Is there room for a series and all that its steps need, in the shared memory of a block?"""
    sizes = _sizes(h0, values, params)
    most = max(_bytes(h0, *_needs(sizes, stages, adaptive, impute, backward), 1) for backward in (False, True))
    return most <= SHARED_MEMORY or most <= _limit(h0)


def _filter(
    h0, values, dropout, params, stages: int, adaptive: bool, impute: bool, backward: bool
) -> tuple[list, int, int, int]:  # fmt: skip
    """(struct Filter, blocks, bytes of shared memory, tile)"""
    h, p, d, q, gates = sizes = _sizes(h0, values, params)
    needs, series, tile = _needs(sizes, stages, adaptive, impute, backward), h0.shape[0], TILE
    while tile > 1 and (-(-series // tile) < BLOCKS or _bytes(h0, *needs, tile) > SHARED_MEMORY):
        tile //= 2
    shared, matrices = _bytes(h0, *needs, tile), gates * h * h * h0.element_size()
    staged = shared + matrices <= _limit(h0)
    fields = [Address(0), Address(1), Address(2), NULL if dropout is None else Address(3), Address(4)]
    fields += [*map(Address, range(5, 9)), *map(Address, range(9, 16))]
    fields += [series, values.shape[0], tile, h, p, d, q, gates, int(impute), stages, int(staged)]
    return fields, -(-series // tile), shared + staged * matrices, tile


# arguments of both: h0, values, masks, dropout, weights, pre, post, state, states, offsets, counts, ends, sizes, jumps,
# steps, method
@planned
def _forward(
    h0, values, masks, dropout, weights, pre, post, state, states, offsets, counts, ends, sizes, jumps, steps, method,
    faults, params, stages: int, impute: bool, control: Control | None,
) -> Plan:  # fmt: skip
    fields, blocks, shared, _ = _filter(h0, values, dropout, params, stages, control is not None, impute, False)
    instance = Instance("gru_ode", "gru_ode_fwd", "Filter", (accumulates(h0),))
    if control is not None:
        fields += [*control, Address(16)]
        instance = Instance("gru_ode_adaptive", "gru_ode_adaptive_fwd", "AdaptiveFilter", (accumulates(h0),))
    return Plan([Launch(instance, blocks, fields, shared)])


@planned
def _backward(
    h0, values, masks, dropout, weights, pre, post, state, states, offsets, counts, ends, sizes, jumps, steps, method,
    matrices, gpre, gpost, gstate, gstates, gh0, gvalues, flat, params, stages: int, impute: bool, windows: int,
    control: Control | None,
) -> Plan:  # fmt: skip
    """pre, post, state and steps are nothing here. ``windows``: at least those of the longest series."""
    fields, blocks, shared, tile = _filter(h0, values, dropout, params, stages, control is not None, impute, True)
    fields[5:8] = [NULL] * 3
    fields[14] = NULL
    states_of_block, parameters = h0.shape[1] * tile, matrices.numel()
    share, kept, more = (Address(i, scratch=True) for i in range(3))  # more: states, or sizes of adaptive steps
    fields += [*map(Address, range(16, 23)), NULL if control is not None else more, kept, share, windows, parameters]
    kind = accumulates(h0)
    scratch = [(blocks * parameters, h0.dtype), (blocks * TICKS * states_of_block, h0.dtype)]
    if control is None:
        scratch.append((max(1, blocks * windows * states_of_block), h0.dtype))
        instance = Instance("gru_ode_backward", "gru_ode_bwd", "FilterBackward", (kind,))
    else:
        fields += [*control, more, ROOM]
        scratch[1:] = [(blocks * ROOM * states_of_block, h0.dtype), (blocks * ROOM * tile * 2, torch.float64)]
        instance = Instance("gru_ode_adaptive", "gru_ode_adaptive_bwd", "AdaptiveBackward", (kind,))
    launches = [Launch(instance, blocks, fields, shared), add_shares(kind, share, Address(23), parameters, blocks)]
    return Plan(launches, scratch)


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
def _tableau(method: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(method, dtype=torch.float64, device=device)


def _control(method: Sequence[float], rtol: float, atol: float, max_steps: int) -> Control | None:
    return (float(rtol), float(atol), max_steps) if method[3] else None  # is it adaptive?


def _ends(offsets: Tensor, counts: Tensor) -> Tensor:
    segments, _, ends = sequence(offsets, counts)
    return torch.empty_like(counts).scatter_(0, segments, ends)


def gru_ode_fwd(
    h0, values, masks, dropout, params, offsets, counts, sizes, jumps, kind, impute, method, rtol, atol, max_steps, pre,
    post, state, states, steps,
) -> None:  # fmt: skip
    if h0.shape[0] == 0:
        return
    control = _control(method, rtol, atol, max_steps)
    faults = None if control is None else h0.new_empty(h0.shape[0], 4, dtype=torch.float64)
    _forward(
        h0, values, masks, dropout, _flat(params, h0.shape[1], True), pre, post, state, states, offsets, counts,
        _ends(offsets, counts), sizes, jumps, steps, _tableau(tuple(method), h0.device), faults, list(params),
        int(method[0]), impute, control,
    )  # fmt: skip
    if not (h0.is_cuda and torch.cuda.is_current_stream_capturing()):
        if faults is not None:
            _raise_first(faults.cpu(), max_steps)
        if (fault := where(offsets, counts, sizes, pre, states, state)) is not None:
            raise SolverError(fault)


def _raise_first(faults: Tensor, max_steps: int) -> None:
    for b in faults[:, 0].nonzero()[:1, 0].tolist():
        kind, interval, t, gap = faults[b].tolist()
        after = f" after {max_steps} steps" if FAULTS[int(kind)] == "still" else ""
        where = f"{FAULTS[int(kind)]} at {t:.6g} of {gap:.6g}{after}"
        raise SolverError(f"state: series {b}, interval {int(interval)}: {where}")


def gru_ode_bwd(
    h0, values, masks, dropout, params, offsets, counts, sizes, jumps, kind, impute, method, rtol, atol, max_steps,
    states, gpre, gpost, gstate, gstates, gh0, gvalues, gparams,
) -> None:  # fmt: skip
    if h0.shape[0] == 0:
        for g in gparams:
            g.zero_()
        return
    ends, matrices, windows = _ends(offsets, counts), _flat(params, h0.shape[1], False), 0
    control = _control(method, rtol, atol, max_steps)
    if control is None:
        windows = -(-int(ends.max()) // TICKS)
        windows = 1 << max(0, windows - 1).bit_length()  # few sizes: plans come back
    flat = torch.empty_like(matrices)
    _backward(
        h0, values, masks, dropout, _flat(params, h0.shape[1], True), None, None, None, states, offsets, counts, ends,
        sizes, jumps, None, _tableau(tuple(method), h0.device), matrices, gpre, gpost, gstate, gstates, gh0, gvalues,
        flat, list(params), int(method[0]), impute, windows, control,
    )  # fmt: skip
    parts = flat.split([g.numel() for g in gparams])
    torch._foreach_copy_(list(gparams), [p.view(g.shape) for p, g in zip(parts, gparams, strict=True)])


KERNELS = {"gru_ode_fwd": gru_ode_fwd, "gru_ode_bwd": gru_ode_bwd}
