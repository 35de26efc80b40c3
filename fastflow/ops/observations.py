"""Rows of observations in one pass of the compiled library, where they are on the CPU.

What is checked and which steps are made is said in :mod:`fastflow.nn.observations` and :mod:`fastflow.nn.clock`, in
PyTorch: some sixty small operations, for 50 series a fifth of the time of the whole filter. Here they are two calls
with the same results, bit by bit. Nothing is remembered from call to call, so nothing can be out of date. Where they
return None, the others have the word.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow.ops import _backend, cpu

__all__ = ["checked_values", "equal_steps"]


def checked_values(offsets: Tensor, times: Tensor, values: Tensor, masks: Tensor, covariates: Tensor) -> Tensor | None:
    """The values with zeros for what is missing; None where something is wrong, or not for this library. Shapes, and
    the dtypes of offsets and times, are as they should be."""
    if not _fits((values, masks, covariates), (offsets, times)):
        return None
    clean = torch.empty_like(values)
    good = cpu.kernel("observations_check")(offsets, times, values, masks, covariates, clean)
    return clean if good else None


def equal_steps(
    offsets: Tensor, times: Tensor, masks: Tensor, step: float, horizon: float, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """(counts, sizes [N + B], jumps [N], seen [N, D] in the dtype of the masks) of checked rows with the exact clock.
    Step 0: every gap is one interval."""
    if not _fits((masks,), (offsets, times)):
        return None
    rows = len(masks)
    counts, jumps = offsets.new_empty(rows + len(offsets) - 1), offsets.new_empty(rows)
    sizes, seen = times.new_empty(len(counts)), torch.empty_like(masks)
    run = cpu.kernel("observations_steps")
    good = run(offsets, times, masks, step, horizon, tolerance, counts, sizes, jumps, seen)
    return (counts, sizes, jumps.bool(), seen) if good else None


def _fits(floating: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    """Plain contiguous tensors on the CPU, of float32 or of float64, without a graph."""
    dtype = floating[0].dtype
    return (
        dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and _backend.serves("cpu", floating)
        and all(t.dtype == dtype and t.is_contiguous() and not t.requires_grad for t in floating)
        and all(t.is_cpu and t.is_contiguous() for t in others)
    )
