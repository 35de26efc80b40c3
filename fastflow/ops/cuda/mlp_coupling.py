"""Launches of csrc/cuda/mlp_coupling.cu."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastflow.ops.cuda.plan import NULL, Address, Field, Launch, Plan, accumulates, matrix, planned
from fastflow.ops.cuda.shares import add_shares
from fastflow.ops.cuda.source import Instance

__all__ = ["KERNELS"]

SHARED_MEMORY = 64 * 1024  # bytes that every GPU since 2018 gives a block
TILE = 32  # samples of a tile, at most
BLOCKS = 256  # of a backward, at most: each has a share of the parameters' gradients
SHARES = 64 * 1024 * 1024  # bytes for these


@functools.lru_cache(maxsize=256)
def _described(code: tuple[int, ...], constants: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The code of a stack on the device."""
    with torch.inference_mode(False):
        return torch.tensor(code, device=device), torch.tensor(constants, dtype=torch.float64, device=device)


def _networks(code: Sequence[int]) -> tuple[int, int, int]:
    """Of the couplings of a stack at most: widths, rows of hidden layers, outputs."""
    features, context, count = code[:3]
    widest, hidden, outputs = 1, 0, 0
    for step in range(count):
        at = code[3 + features + 4 * step]
        if code[at] == 0:
            continue
        inputs = code[at + 1]
        changes = code[at + 2 + inputs]
        at += 3 + inputs + 2 * changes
        at += 1 + code[at] * changes
        networks, at = code[at], at + 1
        rows = ends = 0
        for _ in range(networks):
            widths, at = code[at + 1 : at + 1 + code[at]], at + 1 + code[at]
            widest = max(widest, inputs + context, *widths)
            rows, ends = rows + sum(widths[:-1]), ends + widths[-1]
        hidden, outputs = max(hidden, rows), max(outputs, ends)
    return widest, hidden, outputs


def _rows(code: Sequence[int], backward: bool) -> tuple[list[Field], int]:
    """(struct RowsOfTile, how many there are)"""
    features, context = code[:2]
    widest, hidden, outputs = _networks(code)
    sizes = [features, context, 1, features + context, outputs, hidden if backward else 2 * widest]
    sizes += [hidden, outputs, features, context, 2 * widest] if backward else [0] * 5
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [*starts[:6], widest, *starts[6:]], sum(sizes)


def _tile(rows: int, x: Tensor) -> tuple[int, int]:
    """(samples of a tile, bytes of shared memory)"""
    tile = TILE
    while tile > 1 and rows * (tile + 1) * x.element_size() > SHARED_MEMORY:
        tile //= 2
    return tile, rows * (tile + 1) * x.element_size()


# arguments 0, 1, 2 are the parameters, the code and the constants on the device; 3 the context; 4 the kept inputs
def _stack(x: Tensor, context: Tensor | None, kept: Tensor | None, tile: int, inverse: bool) -> list[Field]:
    """struct StackArguments"""
    fields = [Address(0), Address(1), Address(2), x.shape[0], tile, int(inverse), *matrix(3, context)]
    return [*fields, NULL if kept is None else Address(4)]


@planned
def _forward(params, code_, constants_, context, kept, x, y, logdet, code: Sequence[int], inverse: bool) -> Plan:
    rows, count = _rows(code, False)
    tile, shared = _tile(count, x)
    fields = [*_stack(x, context, kept, tile, inverse), *rows, *matrix(5, x), *matrix(6, y), Address(7)]
    instance = Instance("mlp_coupling", "mlp_coupling_fwd", "StackForward", (accumulates(x),))
    return Plan([Launch(instance, -(-x.shape[0] // tile), fields, shared)])


@planned
def _backward(
    params, code_, constants_, context, kept, y, gy, glogdet, gx, gcontext, flat, code: Sequence[int], inverse: bool
) -> Plan:  # fmt: skip
    rows, count = _rows(code, True)
    tile, shared = _tile(count, y)
    tiles, parameters = -(-y.shape[0] // tile), params.numel()
    blocks = min(tiles, BLOCKS, max(16, SHARES // max(1, parameters * params.element_size())))
    share = Address(0, 0, scratch=True)
    fields = [*_stack(y, context, kept, tile, inverse), *rows]
    fields += [*matrix(5, y), *matrix(6, gy), *matrix(8, gx), *matrix(9, gcontext)]
    fields += [Address(7), glogdet.stride(0), share, parameters, blocks, tiles]
    kind = accumulates(y)
    launches = [
        Launch(Instance("mlp_coupling", "mlp_coupling_bwd", "StackBackward", (kind,)), blocks, fields, shared),
        add_shares(kind, share, Address(10), parameters, blocks),
    ]
    return Plan(launches, [(blocks * parameters, y.dtype)])


def _flat(params: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([p.reshape(-1) for p in params]) if params else like.new_empty(0)


def mlp_coupling_fwd(x, context, params, code, constants, inverse: bool, kept, y, logdet) -> None:
    code = tuple(code)
    described = _described(code, tuple(constants), x.device)
    _forward(_flat(params, x), *described, context, kept, x, y, logdet, code, inverse)


def mlp_coupling_bwd(
    y, context, params, kept, gy, glogdet, code, constants, inverse: bool, gx, gcontext, gparams
) -> None:  # fmt: skip
    code = tuple(code)
    described, params = _described(code, tuple(constants), y.device), _flat(params, y)
    flat = torch.empty_like(params)
    _backward(params, *described, context, kept, y, gy, glogdet, gx, gcontext, flat, code, inverse)
    if gparams:
        parts = flat.split([g.numel() for g in gparams])
        torch._foreach_copy_(list(gparams), [p.view(g.shape) for p, g in zip(parts, gparams, strict=True)])


KERNELS = {"mlp_coupling_fwd": mlp_coupling_fwd, "mlp_coupling_bwd": mlp_coupling_bwd}
