"""Launches of csrc/cuda/conv1x1_weights.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastflow.ops.cuda.plan import NULL, Address, Launch
from fastflow.ops.cuda.source import C_TYPES, Instance

__all__ = ["KERNELS"]

LAYERS = 64  # of a launch, as in csrc/cuda/conv1x1_weights.cu

Lists = Sequence[Sequence[Tensor]]


def _check(lists: Lists) -> None:
    """The kernel is given addresses alone: all factors must be what it takes them for."""
    first = lists[2][0]
    n, dtype, device = first.shape[0], first.dtype, first.device
    for kind, tensors in enumerate(lists):
        if len(tensors) not in (len(lists[2]), 0) or (not tensors and kind < 5):
            raise ValueError("the lists of factors differ in length")
        shape = (n, n) if kind < 2 else (n,)
        wanted = torch.int64 if kind == 3 else dtype
        for t in tensors:
            if t.shape != shape or t.dtype != wanted or t.device != device:
                raise ValueError("the factors do not go together")
    if len(lists[5]) != len(lists[6]):
        raise ValueError("the lists of ActNorm's parameters differ in length")


def _run(kernel: str, lists: Lists, outputs: Sequence[Tensor], gain: float, inverse: bool, matrices: int) -> None:
    """One launch for every 64 layers; ``outputs``: matrix, shift, logdet, and in a backward the gradients to make."""
    _check(lists)
    lists = [[t if t.is_contiguous() else t.contiguous() for t in tensors] for tensors in lists]
    first = lists[2][0]
    layers, n = len(lists[2]), first.shape[0]
    outputs = [t.contiguous() for t in outputs]  # a gradient may be an expanded number
    scratch = torch.empty(layers * matrices * n * n, dtype=torch.float64, device=first.device)
    instance = Instance("conv1x1_weights", kernel, "Factors", (C_TYPES[first.dtype],))
    for start in range(0, layers, LAYERS):
        count = min(LAYERS, layers - start)
        addresses = [
            tensors[k].data_ptr() if tensors else NULL for k in range(start, start + count) for tensors in lists
        ]
        fields = [n, float(gain), int(inverse), Address(0, 0, scratch=True), start]
        fields += [Address(k) for k in range(len(outputs))] + [NULL] * (8 - len(outputs))
        fields += [*addresses, *[NULL] * (7 * (LAYERS - count))]
        Launch(instance, count, fields, 5 * n * 8).run(first.device, outputs, [scratch])


def lu_weights_fwd(
    lower, upper, log_s, permutation, sign, log_scale, bias, matrix, shift, logdet, gain: float, inverse: bool
) -> None:
    lists = (lower, upper, log_s, permutation, sign, log_scale, bias)
    _run("lu_weights_fwd", lists, (matrix, shift, logdet), gain, inverse, 1)


def lu_weights_bwd(lower, upper, log_s, permutation, sign, log_scale, bias, *rest) -> None:
    *outputs, gain, inverse = rest
    lists = (lower, upper, log_s, permutation, sign, log_scale, bias)
    _run("lu_weights_bwd", lists, outputs, gain, inverse, 4)


KERNELS = {"lu_weights_fwd": lu_weights_fwd, "lu_weights_bwd": lu_weights_bwd}
