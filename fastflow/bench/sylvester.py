"""Sylvester flows with the shapes of their paper, against batched products of matrices written out, as published."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from fastflow import ops
from fastflow.bench.row import CPU, GPU, Contenders, Row, contenders, gradients
from fastflow.ops.sylvester import VARIANTS

BATCH, STEPS, DIM, ORTHO, REFLECTIONS = 100, 4, 64, 8, 8
ENOUGH = 12  # of Björck's iterations for random columns of this shape


def _orthonormal(q: Tensor, iterations: int | None) -> Tensor:
    """A number of iterations, or until all have converged."""
    q = q / q.flatten(1).norm(dim=1)[:, None, None]
    identity = torch.eye(q.shape[2], dtype=q.dtype, device=q.device)
    for _ in range(iterations or 100):
        rest = identity - q.transpose(1, 2) @ q
        if iterations is None and torch.linalg.matrix_norm(rest).max() <= 1e-6:
            break
        q = q @ (identity + 0.5 * rest)
    return q


def _reflections(vectors: Tensor) -> Tensor:
    """Their product as a matrix."""
    v = vectors / vectors.norm(dim=2, keepdim=True)
    identity = torch.eye(v.shape[2], dtype=v.dtype, device=v.device)
    q = identity - 2 * v[:, 0, :, None] * v[:, 0, None, :]
    for h in range(1, v.shape[1]):
        q = q @ (identity - 2 * v[:, h, :, None] * v[:, h, None, :])
    return q


def eager(
    z: Tensor, full: Tensor, diag1: Tensor, diag2: Tensor, bias: Tensor, basis: Tensor | None = None, *,
    variant: str, iterations: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    r1 = full.triu(1) + torch.diag_embed(torch.tanh(diag1))
    r2 = full.transpose(2, 3).triu(1) + torch.diag_embed(torch.tanh(diag2))
    product = torch.tanh(diag1) * torch.tanh(diag2)
    logdet = z.new_zeros(len(z))
    if variant == "orthogonal":
        q = _orthonormal(basis.flatten(0, 1).transpose(1, 2), iterations).unflatten(0, basis.shape[:2])
    elif variant == "householder":
        q = _reflections(basis.flatten(0, 1)).unflatten(0, basis.shape[:2])
    for k in range(full.shape[1]):
        if variant == "triangular":
            y = z.flip(1) if k % 2 else z
            h = torch.tanh((y[:, None] @ r2[:, k].transpose(1, 2))[:, 0] + bias[:, k])
            u = (h[:, None] @ r1[:, k].transpose(1, 2))[:, 0]
            z = z + (u.flip(1) if k % 2 else u)
        else:
            into, out = q[:, k] @ r2[:, k].transpose(1, 2), q[:, k] @ r1[:, k]
            h = torch.tanh((z[:, None] @ into)[:, 0] + bias[:, k])
            z = z + (h[:, None] @ out.transpose(1, 2))[:, 0]
        logdet = logdet + (1 + (1 - h * h) * product[:, k]).abs().log().sum(1)
    return z, logdet


def ours(z: Tensor, *params: Tensor, variant: str, inverse: bool = False) -> tuple[Tensor, Tensor]:
    *params, basis = params if variant != "triangular" else (*params, None)
    q = basis.transpose(2, 3) if variant == "orthogonal" else None
    return ops.sylvester(z, *params, q=q, vectors=basis if variant == "householder" else None, inverse=inverse)


def _inputs(variant: str, batch: int, steps: int) -> list[Tensor]:
    outer, m = (batch, steps), ORTHO if variant == "orthogonal" else DIM
    # near the identity in many steps: contenders that are compared in float32 must not drift apart
    made = [torch.randn(batch, DIM), 0.5 * (m * steps) ** -0.5 * torch.randn(*outer, m, m)]
    made += [torch.randn(*outer, m) * steps**-0.5 for _ in range(2)] + [torch.randn(*outer, m)]
    rows = {"orthogonal": ORTHO, "householder": REFLECTIONS, "triangular": 0}[variant]
    return made + ([torch.randn(*outer, rows, DIM)] if rows else [])


def _make(variant: str, batch: int, steps: int, more: Sequence[str]) -> Contenders:
    inputs, weights = _inputs(variant, batch, steps), (torch.randn(batch, DIM), torch.randn(batch))
    run, plain = partial(ours, variant=variant), partial(eager, variant=variant)
    if steps > STEPS:  # whose unrolled graph takes torch.compile minutes
        return {"fastflow": gradients(run, inputs, weights), "eager": gradients(plain, inputs, weights)}
    # torch.compile cannot trace a loop that ends where its numbers say so
    return contenders(run, plain, inputs, weights, more, partial(eager, variant=variant, iterations=ENOUGH))


def _inverse(variant: str) -> Contenders:
    """Nobody else has it."""
    inputs = _inputs(variant, BATCH, STEPS)
    return {"fastflow": partial(ours, *inputs, variant=variant, inverse=True)}


def _row(variant: str, batch: int, steps: int, more: Sequence[str], **options) -> Row:
    name = f"{variant} K={steps} D={DIM} B={batch} forward+backward"
    # the parameters are read twice, their gradients written once
    count = 12 * _numbers(variant, batch, steps)
    return Row("sylvester", name, partial(_make, variant, batch, steps, more), bytes=count, **options)


def _numbers(variant: str, batch: int, steps: int) -> int:
    """in the parameters"""
    m = ORTHO if variant == "orthogonal" else DIM
    rows = {"orthogonal": ORTHO, "householder": REFLECTIONS, "triangular": 0}[variant]
    return batch * steps * (m * m + 3 * m + rows * DIM)


def rows() -> Iterator[Row]:
    for variant in VARIANTS:
        yield _row(variant, BATCH, STEPS, CPU, targets={"eager": 4.0}, demo=variant == "orthogonal")
    # what a stack of many steps keeps
    yield _row("orthogonal", BATCH, 64, CPU, targets={"eager": 4.0})
    for variant in VARIANTS:
        name = f"{variant} inverse K={STEPS} D={DIM} B={BATCH}"
        yield Row("sylvester", name, partial(_inverse, variant), bytes=4 * _numbers(variant, BATCH, STEPS))


def gpu_rows(size: int) -> Iterator[Row]:
    for variant in VARIANTS:
        yield _row(variant, BATCH if size >= 2**20 else 3, STEPS, (*CPU, *GPU))
