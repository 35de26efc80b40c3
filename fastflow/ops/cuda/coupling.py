"""Launches of csrc/cuda/coupling.cu."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fastflow.ops._layout import Layout, layout, unpack
from fastflow.ops._op import accumulator
from fastflow.ops.coupling import Options
from fastflow.ops.cuda.plan import Address, Field, Launch, Plan, planned
from fastflow.ops.cuda.source import C_TYPES, Instance
from fastflow.ops.cuda.walk import SHARED, THREADS, Operand, Walk, sums, walk
from fastflow.ops.scale_map import kernel_map

__all__ = ["KERNELS"]

COPIES = 4  # steps of a thread that copies, as in csrc/cuda/coupling.cu


class Changed(NamedTuple):
    """The part of the tensors that changes, as operands."""

    x: Operand
    t: Operand
    h: Operand | None
    amplitude: Operand | None

    def fields(self, steps: Walk, rest: list[Field], o: Options) -> list[Field]:
        """struct Coupling"""
        operands = [f for operand in self for f in steps.operand(operand)]
        kind, constants = kernel_map(o.kind, o.constants)
        what = [kind, int(o.add_first), o.where[2], o.where[3]]
        numbers = [float(o.shift_gain), -1.0 if o.divide else 1.0, *constants]
        return [*steps.fields, steps.blocks, *rest, *operands, *what, *numbers]

    def instance(self, kernel: str, arguments: str, steps: Walk) -> Instance:
        return Instance("coupling", kernel, arguments, (*self.types, str(steps.step), str(int(steps.general))))

    @property
    def types(self) -> tuple[str, str, str]:
        h = self.t if self.h is None else self.h
        return C_TYPES[self.x.tensor.dtype], C_TYPES[self.t.tensor.dtype], C_TYPES[h.tensor.dtype]


def _select(number: int, tensor: Tensor, part: Layout, index: Tensor | None, o: Options, channels: int) -> Operand:
    """The changed channels of a tensor that has them all."""
    if part.sizes[1] != channels:
        return Operand(number, tensor, part)  # has only those
    if index is not None:
        sizes = part.sizes[0], index.shape[0], part.sizes[2]
        return Operand(number, tensor, Layout(sizes, part.strides, part.offset), gathered=True)
    return Operand(number, tensor, part.channels(o.where[0], o.where[1] - o.where[0]))


def _halves(
    params: tuple[int, Tensor], raw: tuple[int, Tensor | None], index: Tensor | None, o: Options, channels: int
) -> tuple[Operand, Operand | None]:
    """Shift and raw scale of the changed channels."""
    first, second = unpack(layout(params[1]), None if raw[1] is None else layout(raw[1]), o.packing)
    source = params if raw[1] is None else raw
    t = _select(*params, first, index, o, channels)
    return t, None if second is None else _select(*source, second, index, o, channels)


def _changed(x, params, raw, amplitude, index, o: Options) -> Changed:
    channels = x.shape[1]
    t, h = _halves((1, params), (2, raw), index, o, channels)
    changed = _select(0, x, layout(x), index, o, channels)
    if amplitude is not None:
        where = _select(3, amplitude, layout(amplitude), index, o, channels)
        where = where._replace(layout=where.layout.expand(changed.layout.sizes))
        return Changed(changed, t, h, where)
    return Changed(changed, t, h, None)


def _walk(changed: Changed, outs: list[Operand | None], index: Tensor | None, channels: int, o: Options) -> Walk:
    general = index is not None or changed.amplitude is not None or o.where[2] >= 0
    steps = walk(changed.x, [*changed[1:], *outs], general)
    return steps if index is None else steps._replace(index=4, channels=channels)


def _rest(source: Operand, to: Operand, steps: Walk, o: Options, copied: bool) -> tuple[list[Field], int]:
    """struct Rest and its blocks: the channels of ``source`` that pass through to ``to``."""
    sizes, start, stop = source.layout.sizes, o.where[0], o.where[1]
    channels = 0 if copied else sizes[1] - (stop - start)
    inner_channels = steps.channels_inner
    outer, inner = (sizes[2], channels) if inner_channels else (channels, sizes[2])
    # a step must not reach over the channels that are left out
    vector = inner % steps.step == 0 and (not inner_channels or start % steps.step == 0 == (stop - start) % steps.step)
    step = steps.step if vector else 1
    fields: list[Field] = []
    for operand in (source, to):
        fields += steps._replace(step=step).operand(operand)
    blocks = -(-sizes[0] * outer * inner // step // (COPIES * THREADS))
    return [*fields, sizes[0], outer, inner, start, stop - start, int(inner_channels), int(vector)], blocks


@planned
def _forward(x, params, raw, amplitude, index, running, y, logdet, in_place: bool, options: tuple) -> Plan:
    o = Options(*options)
    changed = _changed(x, params, raw, amplitude, index, o)
    out = _select(6, y, layout(y), index, o, x.shape[1])
    steps = _walk(changed, [out], index, x.shape[1], o)
    whole = Operand(0, x, layout(x)), Operand(6, y, layout(y))
    rest, copies = _rest(*whole, steps, o, in_place or index is not None)
    start = None if running is None else (5, running)
    fields, finish, scratch = sums(steps, (7, logdet), start, 1.0, 0.0)
    arguments = [*changed.fields(steps, rest, o), *steps.operand(out), *fields]
    instance = changed.instance("coupling_fwd", "CouplingForward", steps)
    return Plan([Launch(instance, steps.blocks + copies, arguments, SHARED), *finish], scratch)


@planned
def _backward(value, params, raw, amplitude, index, gy, glogdet, gx, gparams, graw, gamplitude, from_output, options):
    o = Options(*options)
    channels = value.shape[1]
    changed = _changed(value, params, raw, amplitude, index, o)
    gt, gh = _halves((8, gparams), (9, graw), index, o, channels)
    outs = [_select(5, gy, layout(gy), index, o, channels), _select(7, gx, layout(gx), index, o, channels), gt, gh]
    outs.append(None if gamplitude is None else Operand(10, gamplitude, layout(gamplitude)))
    steps = _walk(changed, outs, index, channels, o)
    whole = Operand(5, gy, layout(gy)), Operand(7, gx, layout(gx))
    rest, copies = _rest(*whole, steps, o, index is not None)
    arguments = [*changed.fields(steps, rest, o), *(f for operand in outs for f in steps.operand(operand))]
    arguments += [Address(6), glogdet.stride(0), int(from_output)]
    instance = changed.instance("coupling_bwd", "CouplingBackward", steps)
    return Plan([Launch(instance, steps.blocks + copies, arguments, SHARED)])


def coupling_fwd(x, params, raw, amplitude, index, running, y, logdet, options: tuple[Any, ...]) -> None:
    in_place = x.data_ptr() == y.data_ptr()
    if index is not None and not in_place:
        y.copy_(x)
    _forward(x, params, raw, _wide_amplitude(amplitude, x), index, running, y, logdet, in_place, options)


def coupling_bwd(value, params, raw, amplitude, index, gy, glogdet, gx, *rest: Any) -> None:
    if index is not None:
        gx.copy_(gy)
    _backward(value, params, raw, _wide_amplitude(amplitude, value), index, gy, glogdet, gx, *rest)


def _wide_amplitude(amplitude: Tensor | None, x: Tensor) -> Tensor | None:
    """The kernels read it in the type they compute in."""
    return amplitude if amplitude is None else amplitude.to(accumulator(x.dtype))


KERNELS = {"coupling_fwd": coupling_fwd, "coupling_bwd": coupling_bwd}
