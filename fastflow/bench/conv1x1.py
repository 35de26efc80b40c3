"""The matrices of many invertible 1x1 convolutions at once, against the loop over layers of the codebases."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastflow import ops
from fastflow.bench.row import Contenders, Row, compiled
from fastflow.nn.conv1x1 import InvertibleConv1x1, weights

LAYERS, CHANNELS = 32, 48


Factors = tuple[list[Tensor], ...]  # lower, upper, log_s, permutation, sign_s: a tensor for every layer, as in a model


def eager(
    lower: list[Tensor], upper: list[Tensor], log_s: list[Tensor], permutation: list[Tensor], sign_s: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Layer by layer: W = P L (U + diag(s)), log|det W| = sum log s."""
    one, found = torch.eye(CHANNELS), []
    for lo, up, log_scale, p, sign in zip(lower, upper, log_s, permutation, sign_s, strict=True):
        product = (lo.tril(-1) + one) @ (up.triu(1) + torch.diag(sign * log_scale.exp()))
        found.append((one[p] @ product, log_scale.sum()))
    return torch.stack([w for w, _ in found]), torch.stack([d for _, d in found])


def _factors() -> Factors:
    def some(*shape: int) -> list[Tensor]:
        return [0.1 * torch.randn(shape) for _ in range(LAYERS)]

    permutation = [torch.randperm(CHANNELS) for _ in range(LAYERS)]
    square = CHANNELS, CHANNELS
    return some(*square), some(*square), some(CHANNELS), permutation, [sign.sign() for sign in some(CHANNELS)]


def _weights() -> Contenders:
    factors = _factors()

    def ours(backend: str | None = None) -> tuple[Tensor, Tensor]:
        matrix, _, logdet = ops.lu_weights(*factors, backend=backend)
        return matrix, logdet

    return {
        "fastflow": ours,
        "eager": lambda: eager(*factors),
        "torch.compile": compiled(eager, *factors),
        "reference": lambda: ours("reference"),
    }


def _cached() -> Contenders:
    """The second call with the same parameters."""
    layers = [InvertibleConv1x1(CHANNELS) for _ in range(LAYERS)]
    names = ("lower", "upper", "log_s", "permutation", "sign_s")
    factors = [[getattr(layer, name).detach() for layer in layers] for name in names]
    return {
        "fastflow": torch.no_grad()(lambda: [piece.matrix for piece in weights(layers)]),
        "eager": lambda: eager(*factors)[0].unbind(),
    }


def rows() -> Iterator[Row]:
    name = f"W and logdet of {LAYERS} LU layers C={CHANNELS}"
    flops = LAYERS * 2 * CHANNELS**3 // 3  # of a product of triangles
    yield Row("conv1x1", name, _weights, flops=flops, targets={"eager": 10.0}, demo=True)
    yield Row("conv1x1", f"{name}, cached", _cached)
