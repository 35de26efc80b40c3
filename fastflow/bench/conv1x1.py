"""Invertible 1x1 convolution, and the matrices of many at once, against the loop over layers of the codebases."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow import ops
from fastflow.bench.row import CPU, GPU, Contenders, Row, contenders, words
from fastflow.nn.conv1x1 import InvertibleConv1x1, weights

LAYERS, CHANNELS = 32, 48
IMAGE = (32, 32)


Factors = tuple[list[Tensor], ...]  # lower, upper, log_s, permutation, sign_s: a tensor for every layer, as in a model


def eager_weights(
    lower: list[Tensor], upper: list[Tensor], log_s: list[Tensor], permutation: list[Tensor], sign_s: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Layer by layer: W = P L (U + diag(s)), log|det W| = sum log s."""
    one, found = torch.eye(len(log_s[0]), device=log_s[0].device), []
    for lo, up, log_scale, p, sign in zip(lower, upper, log_s, permutation, sign_s, strict=True):
        product = (lo.tril(-1) + one) @ (up.triu(1) + torch.diag(sign * log_scale.exp()))
        found.append((one[p] @ product, log_scale.sum()))
    return torch.stack([w for w, _ in found]), torch.stack([d for _, d in found])


def eager(x: Tensor, weight: Tensor, logdet: Tensor) -> tuple[Tensor, Tensor]:
    """With W and log|det W| per position given."""
    positions = x.shape[2] * x.shape[3]
    return F.conv2d(x, weight.to(x.dtype)[:, :, None, None]), (positions * logdet).expand(x.shape[0])


def _factors() -> Factors:
    def some(*shape: int) -> list[Tensor]:
        return [0.1 * torch.randn(shape) for _ in range(LAYERS)]

    permutation = [torch.randperm(CHANNELS) for _ in range(LAYERS)]
    square = CHANNELS, CHANNELS
    return some(*square), some(*square), some(CHANNELS), permutation, [sign.sign() for sign in some(CHANNELS)]


def _weights(more: Sequence[str] = CPU) -> Contenders:
    def ours(*factors: list[Tensor]) -> tuple[Tensor, Tensor]:
        matrix, _, logdet = ops.lu_weights(*factors)
        return matrix, logdet

    return contenders(ours, eager_weights, _factors(), more=more)


def _cached() -> Contenders:
    """The second call with the same parameters."""
    layers = [InvertibleConv1x1(CHANNELS) for _ in range(LAYERS)]
    names = ("lower", "upper", "log_s", "permutation", "sign_s")
    factors = [[getattr(layer, name).detach() for layer in layers] for name in names]
    return {
        "fastflow": torch.no_grad()(lambda: [piece.matrix for piece in weights(layers)]),
        "eager": lambda: eager_weights(*factors)[0].unbind(),
    }


def _apply(shape: tuple[int, ...], dtype: torch.dtype, backward: bool) -> Contenders:
    x, channels = torch.randn(shape, dtype=dtype), shape[1]
    weight = torch.linalg.qr(torch.randn(channels, channels)).Q.contiguous()
    inputs = (x, weight, torch.linalg.slogdet(weight).logabsdet)

    def ours(x: Tensor, weight: Tensor, logdet: Tensor) -> tuple[Tensor, Tensor]:
        return ops.conv1x1(x, weight, None, logdet)

    return contenders(ours, eager, inputs, (torch.randn_like(x), torch.ones(shape[0])) if backward else None, GPU)


def rows() -> Iterator[Row]:
    yield _all_weights(_weights, targets={"eager": 10.0}, demo=True)
    yield Row("conv1x1", f"{_NAME}, cached", _cached)


def gpu_rows(size: int) -> Iterator[Row]:
    """x of ``size`` bytes."""
    for dtype in (torch.float32, torch.bfloat16):
        for channels in (12, 24, 48):
            shape = (max(1, size // (dtype.itemsize * channels * math.prod(IMAGE))), channels, *IMAGE)
            count = dtype.itemsize * math.prod(shape)
            for backward, times in ((False, 2), (True, 5)):
                name = f"C={channels} {words(size, dtype)} {'forward+backward' if backward else 'forward'}"
                make = partial(_apply, shape, dtype, backward)
                yield Row("conv1x1", name, make, bytes=times * count, targets={"floor": 0.85})
    yield _all_weights(partial(_weights, more=GPU))


_NAME = f"W and logdet of {LAYERS} LU layers C={CHANNELS}"


def _all_weights(make, **options) -> Row:
    flops = LAYERS * 2 * CHANNELS**3 // 3  # of a product of triangles
    return Row("conv1x1", _NAME, make, flops=flops, **options)
