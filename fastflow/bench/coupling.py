"""Affine coupling against the formula as people write it, and that under torch.compile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from fastflow import ops
from fastflow.bench.row import CPU, GPU, GPU_TUNED, Contenders, Row, compiled, contenders, words

BIG = (256, 16, 64, 64)  # 64 MB
SMALL = (64, 6, 16, 16)  # the half that changes in the first level of a Glow for CIFAR-10


def eager(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """As in Glow: scale sigmoid(h + 2), shift and scale interleaved."""
    scale = torch.sigmoid(params[:, 1::2] + 2)
    return x * scale + params[:, 0::2], scale.log().flatten(1).sum(1)


def eager_inverse(z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    scale = torch.sigmoid(params[:, 1::2] + 2)
    return (z - params[:, 0::2]) / scale, -scale.log().flatten(1).sum(1)


def _in_place() -> Contenders:
    x, params = torch.randn(BIG), torch.randn(BIG[0], 2 * BIG[1], *BIG[2:])
    own, eager_own, compiled_own = x.clone(), x.clone(), x

    def eager_in_place(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.sigmoid(params[:, 1::2] + 2)
        x.mul_(scale).add_(params[:, 0::2])
        return x, scale.log_().flatten(1).sum(1)

    return {
        "fastflow": lambda: ops.affine_coupling(own, params, out=own),
        "eager": lambda: eager_in_place(eager_own, params),
        "torch.compile": compiled(eager_in_place, compiled_own, params),
    }


def _make(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    inverse: bool = False,
    backward: bool = False,
    more: Sequence[str] = CPU,
) -> Contenders:
    x, params = torch.randn(shape, dtype=dtype), torch.randn(shape[0], 2 * shape[1], *shape[2:], dtype=dtype)
    weights = (torch.randn(shape, dtype=dtype), torch.ones(shape[0])) if backward else None
    ours, formula = partial(ops.affine_coupling, inverse=inverse), eager_inverse if inverse else eager
    return contenders(ours, formula, (x, params), weights, more)


def rows() -> Iterator[Row]:
    big = 4 * torch.Size(BIG).numel()
    yield Row("coupling", "64 MB in place", _in_place, bytes=4 * big, targets={"floor": 0.8})
    fast = {"eager": 3.5, "torch.compile": 1.5}
    yield Row("coupling", "64 MB forward", partial(_make, BIG), bytes=4 * big, targets=fast, demo=True)
    both = {"eager": 3.5, "torch.compile": 1.3}
    backward = partial(_make, BIG, backward=True, more=())
    yield Row("coupling", "64 MB forward+backward", backward, bytes=11 * big, targets=both)
    yield _small(targets={"eager": 3.0, "torch.compile": 1.5}, demo=True)


def gpu_rows(size: int) -> Iterator[Row]:
    """x of ``size`` bytes."""
    for dtype in (torch.float32, torch.bfloat16):
        shape = (max(1, size // (dtype.itemsize * torch.Size(BIG[1:]).numel())), *BIG[1:])
        count = dtype.itemsize * torch.Size(shape).numel()
        for name, options, times in (
            ("forward", {"more": GPU_TUNED}, 4),
            ("inverse", {"inverse": True, "more": GPU}, 4),
            ("forward+backward", {"backward": True, "more": GPU}, 11),
        ):
            make, name = partial(_make, shape, dtype, **options), f"{words(size, dtype)} {name}"
            yield Row("coupling", name, make, bytes=times * count, targets={"floor": 0.85})
    yield _small(more=GPU_TUNED)


def _small(more: Sequence[str] = CPU, **options) -> Row:
    count = 4 * torch.Size(SMALL).numel()
    name = f"{list(SMALL)} interleaved"
    return Row("coupling", name, partial(_make, SMALL, more=more), bytes=4 * count, **options)
