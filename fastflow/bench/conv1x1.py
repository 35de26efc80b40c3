"""The matrices of many invertible 1x1 convolutions at once, against the loop over layers of the codebases."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastflow import ops
from fastflow.bench.row import Contenders, Row, compiled
from fastflow.nn.conv1x1 import InvertibleConv1x1, weights

LAYERS, CHANNELS = 32, 48


def eager(lower: Tensor, upper: Tensor, log_s: Tensor, permutation: Tensor, sign_s: Tensor) -> tuple[Tensor, Tensor]:
    """Layer by layer: W = P L (U + diag(s)), log|det W| = sum log s."""
    one, found = torch.eye(CHANNELS), []
    for lo, up, log_scale, p, sign in zip(lower, upper, log_s, permutation, sign_s, strict=True):
        product = (lo.tril(-1) + one) @ (up.triu(1) + torch.diag(sign * log_scale.exp()))
        found.append((one[p] @ product, log_scale.sum()))
    return torch.stack([w for w, _ in found]), torch.stack([d for _, d in found])


def _factors() -> tuple[Tensor, ...]:
    square = LAYERS, CHANNELS, CHANNELS
    permutation = torch.stack([torch.randperm(CHANNELS) for _ in range(LAYERS)])
    sign = torch.randn(LAYERS, CHANNELS).sign()
    return 0.1 * torch.randn(square), 0.1 * torch.randn(square), 0.1 * torch.randn(square[:2]), permutation, sign


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
    factors = [torch.stack([getattr(layer, name).detach() for layer in layers]) for name in names]
    return {
        "fastflow": torch.no_grad()(lambda: [piece.matrix for piece in weights(layers)]),
        "eager": lambda: eager(*factors)[0].unbind(),
    }


def rows() -> Iterator[Row]:
    name = f"W and logdet of {LAYERS} LU layers C={CHANNELS}"
    flops = LAYERS * 2 * CHANNELS**3 // 3  # of a product of triangles
    yield Row("conv1x1", name, _weights, flops=flops, targets={"eager": 10.0}, demo=True)
    yield Row("conv1x1", f"{name}, cached", _cached)
