"""Launches of csrc/cuda/autoregressive.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastflow.ops.autoregressive import MOST_LAYERS
from fastflow.ops.cuda.plan import NULL, Address, Field, Launch, Plan, accumulates, matrix, planned
from fastflow.ops.cuda.source import Instance
from fastflow.ops.masked import rows, weight_grad_by_library
from fastflow.ops.scale_map import kernel_map

__all__ = ["KERNELS"]

# as in csrc/cuda/autoregressive.cu
SAMPLES, THREADS = 8, 128


def _layer(weight: Tensor, number: int, start: list[Field], offset: int, saved: int, mirrored: bool) -> list[Field]:
    """struct SweepLayer"""
    rows, columns = weight.shape
    row, column = weight.stride()
    if mirrored:
        last = ((rows - 1) * row + (columns - 1) * column) * weight.element_size()
        return [Address(number, last), -column, -row, columns, *start, offset, saved]
    return [Address(number), row, column, rows, *start, offset, saved]


def _net(
    x: Tensor, counts: Tensor, direct: Tensor | None, saved: Tensor | None, weights: list[Tensor], starts: list[Tensor],
    activation: int, residual: bool, numbers: tuple[int, int, int, int],
) -> tuple[list[Field], list[tuple[int, torch.dtype]]]:  # fmt: skip
    """struct SweepNet and its scratch. ``numbers``: of the arguments counts, direct, saved and the first weight. The
    reverse sweep has no starts."""
    samples, steps = x.shape
    mirrored, hidden, each = not starts, len(weights) - 1, weights[-1].shape[0] // steps
    of_counts, of_direct, of_saved, of_weights = numbers
    widths = [w.shape[0] for w in weights[:-1]]
    places = list(range(len(weights)))
    offset = steps * (each if mirrored else 1)
    layers: list[Field] = []
    for i in reversed(places) if mirrored else places:
        start: list[Field] = [NULL, 0, 0]
        if not mirrored:
            s = starts[i]
            start = [Address(of_weights + len(weights) + i), 0 if s.shape[0] == 1 else s.stride(0), s.stride(1)]
        below = i - 1 if mirrored else i  # the hidden layer whose units the rows are
        first = sum(widths[:below]) if 0 <= below < hidden else 0
        layers += _layer(weights[i], of_weights + i, start, offset, first, mirrored)
        offset += weights[i].shape[1] if mirrored else weights[i].shape[0]
    layers += [0] * (9 * (MOST_LAYERS - len(weights)))
    in_each, out_each = (each, 1) if mirrored else (1, each)
    kept = saved is not None and saved.numel() > 0
    sums = residual and not mirrored
    size = -(-samples // SAMPLES) * SAMPLES * offset
    head = [samples, steps, in_each, out_each, hidden, activation, int(residual), offset]
    of_direct_fields: list[Field] = [NULL, 0, 0]
    if direct is not None:
        (_, row, column, _, *_) = fields = _layer(direct, of_direct, [NULL, 0, 0], 0, 0, mirrored)
        of_direct_fields = [fields[0], row, column]
    fields = [
        *head, Address(of_counts), *counts.stride(), *of_direct_fields, Address(of_saved) if kept else NULL,
        Address(0, scratch=True), Address(1, scratch=True) if sums else NULL, *layers,
    ]  # fmt: skip
    return fields, [(size, x.dtype), *([(size, x.dtype)] if sums else [])]


def _step(form: int, swapped: bool, kind: int, reciprocal: bool, constants: tuple[float, ...]) -> list[Field]:
    """struct SweepStep"""
    kind, numbers = kernel_map(kind, constants)
    # a Bernoulli variable has one output
    return [form, int(swapped and form != 3), kind, 1.0 if reciprocal else -1.0, *numbers]


@planned
def _forward(z, x, logdet, counts, direct, saved, params, activation, residual, step, layers, *rest) -> Plan:
    weights, starts = list(rest[:layers]), list(rest[layers:])
    net, scratch = _net(x, counts, direct, saved, weights, starts, activation, residual, (3, 4, 5, 11))
    fields = [*net, *_step(*step), *matrix(0, z), *matrix(1, x), *matrix(6, params), Address(2)]
    return _plan("autoregressive_fwd", "SweepForward", x, fields, scratch)


@planned
def _backward(
    x, z, params, gx, gz, gparams, ga, glogdet, counts, direct, saved, activation, residual, step, *weights
) -> Plan:  # fmt: skip
    net, scratch = _net(x, counts, direct, saved, list(weights), [], activation, residual, (8, 9, 10, 14))
    matrices = [f for i, t in enumerate((x, z, params, gx, gz, gparams, ga)) for f in matrix(i, t)]
    fields = [*net, *_step(*step), *matrices, Address(7), glogdet.stride(0)]
    return _plan("autoregressive_bwd", "SweepBackward", x, fields, scratch)


def _plan(kernel: str, arguments: str, x: Tensor, fields: list[Field], scratch: list) -> Plan:
    instance = Instance("autoregressive", kernel, arguments, (accumulates(x),), THREADS)
    return Plan([Launch(instance, -(-x.shape[0] // SAMPLES), fields)], scratch)


def autoregressive_fwd(z, weights, starts, counts, direct, activation, residual, *rest: Any) -> None:
    *step, constants, x, logdet, saved, params = rest
    step = (*step, tuple(constants))
    _forward(
        z, x, logdet, counts, direct, saved, params, activation, residual, step, len(weights), *weights, *rows(starts)
    )  # fmt: skip


def autoregressive_bwd(x, z, weights, counts, direct, activation, residual, *rest: Any) -> None:
    *step, constants, saved, params, gx, glogdet, gz, ga, gparams = rest
    step = (*step, tuple(constants))
    _backward(
        x, z, params, gx, gz, gparams, ga, glogdet, counts, direct, saved, activation, residual, step, *weights
    )  # fmt: skip


KERNELS = {
    "autoregressive_fwd": autoregressive_fwd,
    "autoregressive_bwd": autoregressive_bwd,
    "masked_weight_bwd": weight_grad_by_library,
}
