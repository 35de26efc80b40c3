"""Launches of csrc/cuda/conv1x1.cu."""

from __future__ import annotations

from torch import Tensor

from fastflow.ops._layout import layout
from fastflow.ops._op import accumulator
from fastflow.ops.cuda.plan import NULL, Address, Field, Launch, Plan, accumulates, planned
from fastflow.ops.cuda.source import C_TYPES, Instance
from fastflow.ops.cuda.walk import SHARED, THREADS, Operand, wide

__all__ = ["KERNELS"]

ROWS = 4  # output channels of a thread, as in csrc/cuda/conv1x1.cu
BLOCKS = 2048  # of a forward, at most: enough for any GPU, each with M in shared memory for many tiles
SHARED_MEMORY = 64 * 1024  # bytes that every GPU since 2018 gives a block
PARTIALS = 512  # blocks of a backward, at most: so many shares of the gradient of M are added up


class _Shape:
    """What decides on the kernel: the layout of x, and of the tensors that go with it; how many tiles a block holds."""

    def __init__(self, x: Tensor, *others: Tensor, held: int = 1):
        lay = layout(x)
        self.samples, self.channels, self.positions = lay.sizes
        self.inner = lay.channels_inner
        self.dtype = accumulator(x.dtype)
        self.size = self.dtype.itemsize
        groups = -(-self.channels // ROWS)
        self.tile = THREADS // (1 << (groups - 1).bit_length()) * (16 // self.size)
        while self.bytes(held) > SHARED_MEMORY:  # many channels in float64
            self.tile //= 2
        self.tiles = -(-self.samples * self.positions // self.tile)
        step = 16 // x.element_size()
        along = self.channels if self.inner else self.positions
        operands = (Operand(0, t, layout(t)) for t in (x, *others))
        self.step = step if along % step == 0 and all(wide(o, step, self.inner) for o in operands) else 1

    @property
    def padded(self) -> int:
        return -(-self.channels // ROWS) * ROWS

    @property
    def row(self) -> int:
        """Elements of a row of a tile in shared memory."""
        return self.tile + 16 // self.size

    def bytes(self, held: int) -> int:
        """Shared memory for M, c and so many tiles, their rows padded like M's."""
        return self.padded * (self.channels + 1 + held * self.row) * self.size

    def fields(self, weight: int, row: int, column: int) -> list[Field]:
        """struct Conv"""
        sizes = [self.samples, self.channels, self.positions, int(self.inner)]
        return [*sizes, self.tile, self.tiles, Address(weight), row, column]

    def instance(self, kernel: str, arguments: str, x: Tensor) -> Instance:
        return Instance("conv1x1", kernel, arguments, (C_TYPES[x.dtype], str(self.step)))


def _image(number: int, tensor: Tensor) -> list[Field]:
    """struct Image"""
    return [Address(number), *layout(tensor).strides]


@planned
def _forward(x, weight, bias, weight_logdet, running, y, logdet) -> Plan:
    shape = _Shape(x, y)
    fields = [*shape.fields(1, *weight.stride()), *_image(0, x), *_image(5, y)]
    fields += [NULL if bias is None else Address(2), Address(3), NULL if running is None else Address(4), Address(6)]
    fields += [0 if running is None else running.stride(0), logdet.stride(0)]
    blocks = max(1, min(shape.tiles, BLOCKS)) if shape.samples else 0
    return Plan([Launch(shape.instance("conv1x1_fwd", "ConvForward", x), blocks, fields, shape.bytes(1))])


@planned
def _backward(x, weight, gy, glogdet, gx, gweight, gbias, gweight_logdet) -> Plan:
    shape = _Shape(x, gy, gx, held=2)
    n4, count = -(-shape.channels // 4), shape.channels**2 + shape.channels
    teams = THREADS // (1 << (n4 * n4 - 1).bit_length())
    blocks = min(shape.tiles, PARTIALS)
    fields = [*shape.fields(1, *weight.stride()), *_image(0, x), *_image(2, gy), *_image(4, gx)]
    fields += [Address(0, 0, scratch=True), n4, teams]
    shared = max(shape.bytes(2), count * shape.size)
    finish = [Address(0, 0, scratch=True), Address(5), Address(6), Address(3), Address(7)]
    finish += [blocks, shape.channels, shape.samples, shape.positions, glogdet.stride(0)]
    launches = [
        Launch(shape.instance("conv1x1_bwd", "ConvBackward", x), blocks, fields, shared),
        Launch(
            Instance("conv1x1", "conv1x1_finish", "ConvFinish", (accumulates(x),)),
            -(-count // THREADS) + 1,
            finish,
            SHARED,
        ),
    ]
    return Plan(launches, [(blocks * count, shape.dtype)])


def conv1x1_fwd(x, weight, bias, weight_logdet, running, y, logdet) -> None:
    dtype = accumulator(x.dtype)
    bias = None if bias is None else bias.to(dtype).contiguous()
    _forward(x, weight.to(dtype), bias, weight_logdet.to(dtype), running, y, logdet)


def conv1x1_bwd(x, weight, gy, *rest) -> None:
    _backward(x, weight.to(accumulator(x.dtype)), gy, *rest)


KERNELS = {"conv1x1_fwd": conv1x1_fwd, "conv1x1_bwd": conv1x1_bwd}
