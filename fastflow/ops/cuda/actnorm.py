"""Launches of csrc/cuda/actnorm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow.ops._layout import layout
from fastflow.ops._op import accumulator
from fastflow.ops.cuda.plan import NULL, Address, Field, Launch, Plan, accumulates, planned
from fastflow.ops.cuda.source import C_TYPES, Instance
from fastflow.ops.cuda.walk import SHARED, THREADS, Operand, walk

__all__ = ["KERNELS"]

ROWS = 4096  # of (sample, position) pairs that a block of a backward sums up, at least
SHARES = 256  # partial sums of a channel, at most


@planned
def _forward(x, log_scale, bias, running, y, logdet, gain: float, inverse: bool) -> Plan:
    source, to = Operand(0, x, layout(x)), Operand(4, y, layout(y))
    steps = walk(source, [to])
    fields: list[Field] = [*steps.fields, Address(1), Address(2), float(-gain if inverse else gain), int(not inverse)]
    fields += [*steps.operand(source), *steps.operand(to)]
    fields += [NULL if running is None else Address(3), Address(5)]
    fields += [0 if running is None else running.stride(0), logdet.stride(0)]
    instance = Instance("actnorm", "actnorm_fwd", "ActNormForward", (C_TYPES[x.dtype], str(steps.step)))
    return Plan([Launch(instance, steps.blocks, fields, SHARED)])


@planned
def _backward(x, log_scale, bias, gy, glogdet, gx, glog_scale, gbias, gain: float, inverse: bool) -> Plan:
    lay = layout(x)
    samples, channels, positions = lay.sizes
    columns = min(32, 1 << max(0, channels - 1).bit_length()) if lay.channels_inner else 1
    rows = samples * positions
    shares = max(1, min(SHARES, -(-rows // ROWS)))
    share = -(-rows // shares)
    gain = float(-gain if inverse else gain)
    fields: list[Field] = []
    for number, tensor in ((0, x), (3, gy), (5, gx)):
        fields += [Address(number), *layout(tensor).strides, 0, 0]
    fields += [samples, channels, positions, columns, shares, share, Address(1), Address(2)]
    fields += [gain, int(not inverse), Address(0, 0, scratch=True)]
    finish = [Address(0, 0, scratch=True), Address(1), Address(4), Address(6), Address(7), shares]
    finish += [channels, samples, positions, glogdet.stride(0), int(not inverse), gain]
    partial = Instance("actnorm", "actnorm_bwd", "ActNormBackward", (C_TYPES[x.dtype],))
    total = Instance("actnorm", "actnorm_finish", "ActNormFinish", (accumulates(x),))
    launches = [
        Launch(partial, -(-channels // columns) * shares, fields, 2 * THREADS * 8),
        Launch(total, -(-channels // THREADS), finish, SHARED),
    ]
    return Plan(launches, [(shares * 2 * channels, torch.float64)])


def _wide(x: Tensor, *parameters: Tensor) -> list[Tensor]:
    """The kernels read parameters in the type they compute in."""
    return [p.to(accumulator(x.dtype)).contiguous() for p in parameters]


def actnorm_fwd(x, log_scale, bias, *rest) -> None:
    _forward(x, *_wide(x, log_scale, bias), *rest)


def actnorm_bwd(x, log_scale, bias, *rest) -> None:
    _backward(x, *_wide(x, log_scale, bias), *rest)


KERNELS = {"actnorm_fwd": actnorm_fwd, "actnorm_bwd": actnorm_bwd}
