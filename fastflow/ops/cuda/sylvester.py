"""Launches of csrc/cuda/sylvester.cu."""

from __future__ import annotations

from torch import Tensor

from fastflow.ops._op import accumulator
from fastflow.ops._sylvester_columns import columns, columns_bwd, wide
from fastflow.ops.cuda.plan import NULL, Address, Field, Launch, Plan, accumulates, planned
from fastflow.ops.cuda.source import Instance
from fastflow.ops.sylvester import VARIANTS

__all__ = ["KERNELS"]

THREADS = 64  # of a block, as in csrc/cuda/sylvester.cu
SHARED = 48 * 1024  # what every GPU gives a block


def _part(number: int, tensor: Tensor | None) -> list[Field]:
    """struct Part"""
    if tensor is None:
        return [NULL, 0, 0]
    return [Address(number), tensor.stride(0), tensor.stride(1) if tensor.dim() > 1 else 0]


def _sylvester(tensors: tuple[Tensor | None, ...], variant: int, inverse: bool) -> tuple[list[Field], int, int]:
    """struct Sylvester of the first six arguments, bytes of shared memory, elements of scratch memory of a sample"""
    z, bias, basis = tensors[0], tensors[4], tensors[5]
    d, (_, steps, m) = z.shape[1], bias.shape
    vectors = 0 if basis is None else basis.shape[2] // d
    size = 3 * d + 9 * m
    sums = 8 * (THREADS // 32)
    fits = sums + size * z.element_size() <= SHARED
    fields = [f for number, tensor in enumerate(tensors) for f in _part(number, tensor)]
    fields += [variant, int(inverse), steps, d, m, vectors]
    fields += [NULL if fits else Address(0, 0, scratch=True), size]
    return fields, sums + size * z.element_size() if fits else sums, 0 if fits else size


def _vector(number: int, tensor: Tensor) -> list[Field]:
    return [Address(number), tensor.stride(0), 0]


def _instance(kernel: str, arguments: str, z: Tensor) -> Instance:
    return Instance("sylvester", kernel, arguments, (accumulates(z),), THREADS)


@planned
def _forward(z, full, diag1, diag2, bias, basis, out, logdet, variant: int, inverse: bool) -> Plan:
    fields, shared, scratch = _sylvester((z, full, diag1, diag2, bias, basis), variant, inverse)
    fields += [*_vector(6, out), *_vector(7, logdet)]
    launch = Launch(_instance("sylvester_fwd", "SylvesterForward", z), z.shape[0], fields, shared)
    return Plan([launch], [(scratch * z.shape[0], z.dtype)])


@planned
def _backward(
    z, full, diag1, diag2, bias, basis, gout, glogdet, gz, gfull, gdiag1, gdiag2, gbias, gbasis, variant: int,
    inverse: bool,
) -> Plan:  # fmt: skip
    fields, shared, scratch = _sylvester((z, full, diag1, diag2, bias, basis), variant, inverse)
    for number, tensor in ((6, gout), (7, glogdet), (8, gz)):
        fields += _vector(number, tensor)
    for number, tensor in ((9, gfull), (10, gdiag1), (11, gdiag2), (12, gbias), (13, gbasis)):
        fields += _part(number, tensor)
    fields += [Address(1, 0, scratch=True), Address(2, 0, scratch=True)]
    samples, d = z.shape
    records = samples * (1 if inverse else bias.shape[1]) * (d + 4 * bias.shape[2])
    launch = Launch(_instance("sylvester_bwd", "SylvesterBackward", z), samples, fields, shared)
    chain = 0 if basis is None else samples * basis.shape[2]
    return Plan([launch], [(scratch * samples, z.dtype), (records, z.dtype), (chain, z.dtype)])


def _inputs(z: Tensor, *params: Tensor | None) -> list[Tensor | None]:
    return [z.to(accumulator(z.dtype)).contiguous(), *(None if p is None else wide(p) for p in params)]


def sylvester_fwd(
    z, full, diag1, diag2, bias, basis, out, logdet, variant: int, iterations: int, inverse: bool
) -> None:
    poison = None
    if VARIANTS[variant] == "orthogonal":
        basis, poison = columns(basis, iterations)
    inputs = _inputs(z, full, diag1, diag2, bias, basis)
    made = out if out.dtype == inputs[0].dtype and out.is_contiguous() else inputs[0].new_empty(out.shape)
    _forward(*inputs, made, logdet, variant, inverse)
    if made is not out:
        out.copy_(made)
    if poison is not None:
        logdet.add_(poison)


def sylvester_bwd(
    x, full, diag1, diag2, bias, basis, gout, glogdet, gx, gfull, gdiag1, gdiag2, gbias, gbasis, variant: int,
    iterations: int, inverse: bool,
) -> None:  # fmt: skip
    orthogonal = VARIANTS[variant] == "orthogonal"
    rows = columns(basis, iterations)[0] if orthogonal else basis
    inputs = _inputs(x, full, diag1, diag2, bias, rows)
    dtype = inputs[0].dtype
    outputs = (gx, gfull, gdiag1, gdiag2, gbias, gbasis)
    made = [None if g is None else g if g.dtype == dtype else g.new_empty(g.shape, dtype=dtype) for g in outputs]
    flat = [None if g is None else g.flatten(2) if g.dim() > 2 else g for g in made]
    _backward(*inputs, gout.to(dtype).contiguous(), glogdet, *flat, variant, inverse)
    if orthogonal:
        made[-1] = columns_bwd(basis, iterations, made[-1])
    for grad, one in zip(outputs, made, strict=True):
        if grad is not None and one is not grad:
            grad.copy_(one)


KERNELS = {"sylvester_fwd": sylvester_fwd, "sylvester_bwd": sylvester_bwd}
