"""The layers of a trace on a GPU: matrix products of the library, and launches of csrc/cuda/trace.cu around them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastflow.ops.cuda.plan import NULL, Address, Field, Launch, Plan, Value, accumulates, matrix, planned
from fastflow.ops.cuda.source import Instance
from fastflow.ops.cuda.walk import THREADS

__all__ = ["KERNELS"]


def _probes(number: int, probes: Tensor | None, samples: int, width: int) -> list[Field]:
    """struct Probes, from the arguments ``number`` and, the seed, ``number + 1``"""
    if probes is None:
        return [NULL, 0, 0, 0, Value(number + 1), samples, width]
    return [Address(number), *probes.stride(), 0, samples, width]


def _rows(value: Tensor, rows: Tensor, fields: list[Field]) -> Plan:
    instance = Instance("trace", "trace_rows", "Rows", (accumulates(value),))
    return Plan([Launch(instance, -(-rows.numel() // THREADS), fields)])


@partial(planned, values=(2,))
def trace_rows(x, probes, seed: int, rows) -> Plan:
    samples, count, width = rows.shape
    fields = [*matrix(0, x), NULL, 0, 0, *_probes(1, probes, samples, width), Address(3), count]
    return _rows(x, rows, fields)


@partial(planned, values=(3,))
def trace_rows_bwd(gvalue, gtrace, probes, seed: int, g) -> Plan:
    samples, count, width = g.shape
    fields = [*matrix(0, gvalue), *matrix(1, gtrace), *_probes(2, probes, samples, width), Address(4), count]
    return _rows(gvalue, g, fields)


@partial(planned, values=(3,))
def trace_contract(last, bias, probes, seed: int, value, trace) -> Plan:
    samples, count, width = last.shape
    fields = [*matrix(4, value), *matrix(5, trace), *_probes(2, probes, samples, width)]
    fields += [Address(0), Address(1), count, bias.stride(0)]
    instance = Instance("trace", "trace_contract", "Contract", (accumulates(last),))
    return Plan([Launch(instance, -(-samples * count // (THREADS // 32)), fields)])


def _step(*tensors: Tensor | None) -> int:
    """Units of a thread: 16 bytes of them where every row is so aligned."""
    given = [t for t in tensors if t is not None]
    step = 16 // given[0].element_size()
    return step if given[0].shape[-1] % step == 0 and all(t.data_ptr() % 16 == 0 for t in given) else 1


def _activation(kernel: str, arguments: str, rows: Tensor, step: int, fields: list[Field]) -> Plan:
    blocks = -(-rows.shape[0] * rows.shape[2] // (step * THREADS))
    return Plan([Launch(Instance("trace", kernel, arguments, (accumulates(rows), str(step))), blocks, fields)])


@planned
def _activation_fwd(a, bias, z, activation: int) -> Plan:
    fields = [Address(0), Address(2), Address(1), *a.shape, activation, bias.stride(0)]
    return _activation("trace_activation_fwd", "Dual", a, _step(a, z), fields)


@planned
def _activation_bwd(kept, y, g, activation: int) -> Plan:
    fields = [Address(0), Address(1), NULL, *kept.shape, activation, 0, Address(2)]
    return _activation("trace_activation_bwd", "DualBackward", kept, _step(kept, y, g), fields)


def trace_layer_fwd(y, weight, bias, a, z, activation: int) -> None:
    """a = y Wᵀ, z = phi(a + bias) with its tangents; no activation where z is not given."""
    torch.mm(y.flatten(0, 1), weight.t(), out=a.view(-1, a.shape[2]))
    if z is not None:
        _activation_fwd(a, bias, z, activation)


def trace_layer_bwd(g, weight, kept, y, gweight, previous, activation: int) -> None:
    """gW = gᵀ y, and the gradient of the rows before the activation, or of x where nothing was kept."""
    if kept is None:
        torch.mm(g[:, 0], weight, out=previous)
    else:
        torch.mm(g.flatten(0, 1), weight, out=previous.view(-1, previous.shape[2]))
        _activation_bwd(kept, y, previous, activation)
    torch.mm(g.flatten(0, 1).t(), y.flatten(0, 1), out=gweight)


KERNELS = {run.__name__: run for run in (trace_rows, trace_rows_bwd, trace_contract, trace_layer_fwd, trace_layer_bwd)}
