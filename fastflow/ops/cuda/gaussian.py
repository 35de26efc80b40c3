"""Launches of csrc/cuda/gaussian.cu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastflow.ops._layout import layout, unpack
from fastflow.ops.cuda.plan import Address, Field, Launch, Plan, planned
from fastflow.ops.cuda.source import C_TYPES, Instance
from fastflow.ops.cuda.walk import SHARED, Operand, Walk, sums, walk
from fastflow.ops.gaussian import HALF_LOG_2PI, Options
from fastflow.ops.scale_map import KINDS, kernel_map

__all__ = ["KERNELS"]

Pair = tuple[Operand | None, Operand | None]


def _operand(number: int, tensor: Tensor) -> Operand:
    return Operand(number, tensor, layout(tensor))


def _moments(number: int, params: Tensor | None, raw: Tensor | None, like: Sequence[int], packing: int) -> Pair:
    """Mean and raw scale of the arguments ``number`` and ``number + 1``."""
    if params is None:
        return None, None
    mean, scale = unpack(layout(params), None if raw is None else layout(raw), packing)
    source = (number, params) if raw is None else (number + 1, raw)
    return Operand(number, params, mean.expand(like)), Operand(*source, scale.expand(like))


def _types(*operands: Operand | None) -> tuple[str, ...]:
    """Absent operands have the first one's type."""
    return tuple(C_TYPES[(operands[0] if o is None else o).tensor.dtype] for o in operands)


def _gaussian(steps: Walk, has_moments: bool, o: Options) -> list[Field]:
    """struct Gaussian"""
    kind, constants = kernel_map(o.kind if has_moments else KINDS.index("none"), o.constants)
    return [*steps.fields, kind, -1.0 if o.reciprocal else 1.0, *constants]


def _all(steps: Walk, operands: Sequence[Operand | None]) -> list[Field]:
    return [field for operand in operands for field in steps.operand(operand)]


def _plan(kernel: str, arguments: str, types: tuple[str, ...], steps: Walk, fields: list[Field], more=()) -> Plan:
    launches, scratch = more or ([], [])
    instance = Instance("gaussian", kernel, arguments, (*types, str(steps.step)))
    return Plan([Launch(instance, steps.blocks, fields, SHARED), *launches], scratch)


@planned
def gaussian_log_prob_fwd(z, params, raw, running, logp, options: tuple[Any, ...]) -> Plan:
    o, value = Options(*options), _operand(0, z)
    moments = _moments(1, params, raw, value.layout.sizes, o.packing)
    steps = walk(value, moments)
    constant = -HALF_LOG_2PI * value.layout.sizes[1] * value.layout.sizes[2]
    out, *more = sums(steps, (4, logp), None if running is None else (3, running), -1.0, constant)
    fields = [*_gaussian(steps, params is not None, o), *_all(steps, (value, *moments)), *out]
    return _plan("gaussian_log_prob_fwd", "LogProbForward", _types(value, *moments), steps, fields, more)


@planned
def gaussian_log_prob_bwd(z, params, raw, glogp, gz, gparams, graw, options: tuple[Any, ...]) -> Plan:
    o, value = Options(*options), _operand(0, z)
    sizes = value.layout.sizes
    inputs = value, *_moments(1, params, raw, sizes, o.packing)
    grads = _operand(4, gz), *_moments(5, gparams, graw, sizes, o.packing)
    steps = walk(value, (*inputs, *grads))
    fields = [*_gaussian(steps, params is not None, o), *_all(steps, (*inputs, *grads)), Address(3), glogp.stride(0)]
    return _plan("gaussian_log_prob_bwd", "LogProbBackward", _types(*inputs), steps, fields)


@planned
def gaussian_sample_fwd(noise, params, raw, z, logp, temperature: float, options: tuple[Any, ...]) -> Plan:
    o, value, out = Options(*options), _operand(0, noise), _operand(3, z)
    moments = _moments(1, params, raw, value.layout.sizes, o.packing)
    steps = walk(value, (*moments, out))
    constant = -HALF_LOG_2PI * value.layout.sizes[1] * value.layout.sizes[2]
    total, *more = sums(steps, (4, logp), None, -1.0, constant)
    fields = [*_gaussian(steps, params is not None, o), *_all(steps, (value, *moments, out)), temperature, *total]
    return _plan("gaussian_sample_fwd", "SampleForward", _types(value, *moments), steps, fields, more)


@planned
def gaussian_sample_bwd(
    noise, params, raw, gz, glogp, gnoise, gparams, graw, temperature: float, options: tuple[Any, ...]
) -> Plan:
    o, value, g = Options(*options), _operand(0, noise), _operand(3, gz)
    sizes = value.layout.sizes
    mean, scale = _moments(1, params, raw, sizes, o.packing)
    grads = _operand(5, gnoise), *_moments(6, gparams, graw, sizes, o.packing)
    steps = walk(value, (mean, scale, g, *grads))
    operands = _all(steps, (value, scale, g, *grads))
    fields = [*_gaussian(steps, params is not None, o), *operands, float(temperature), Address(4), glogp.stride(0)]
    return _plan("gaussian_sample_bwd", "SampleBackward", _types(value, mean, scale), steps, fields)


@planned
def _kl_fwd(params, raw, prior, prior_raw, kl, options: tuple[Any, ...]) -> Plan:
    o = Options(*options)
    q, p = _both(params, raw, prior, prior_raw, 0, o)
    steps = walk(q[0], (*q, *p))
    out, *more = sums(steps, (4, kl), None, 1.0, 0.0)
    fields = [*_gaussian(steps, True, o), *_all(steps, (*q, *p)), *out]
    return _plan("gaussian_kl_fwd", "KlForward", _types(*q), steps, fields, more)


@planned
def _kl_bwd(params, raw, prior, prior_raw, gkl, gparams, graw, gprior, gprior_raw, options: tuple[Any, ...]) -> Plan:
    o = Options(*options)
    inputs = *_both(params, raw, prior, prior_raw, 0, o), *_both(gparams, graw, gprior, gprior_raw, 5, o)
    operands = [operand for pair in inputs for operand in pair]
    steps = walk(operands[0], operands)
    fields = [*_gaussian(steps, True, o), *_all(steps, operands), Address(4), gkl.stride(0)]
    return _plan("gaussian_kl_bwd", "KlBackward", _types(*operands[:2]), steps, fields)


# The kernels take q and p of one type. Where they differ, which is rare, all are widened first.


def _widened(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    dtypes = {t.dtype for t in tensors if t is not None}
    return tensors if len(dtypes) == 1 else tuple(t if t is None else t.float() for t in tensors)


def gaussian_kl_fwd(params, raw, prior, prior_raw, kl, options: tuple[Any, ...]) -> None:
    _kl_fwd(*_widened(params, raw, prior, prior_raw), kl, options)


def gaussian_kl_bwd(
    params, raw, prior, prior_raw, gkl, gparams, graw, gprior, gprior_raw, options: tuple[Any, ...]
) -> None:
    inputs, grads = (params, raw, prior, prior_raw), (gparams, graw, gprior, gprior_raw)
    wide = _widened(*inputs)
    made = tuple(g if w is t else torch.empty_like(w) for g, w, t in zip(grads, wide, inputs, strict=True))
    _kl_bwd(*wide, gkl, *made, options)
    for grad, one in zip(grads, made, strict=True):
        if one is not grad:
            grad.copy_(one)


def _both(params, raw, prior, prior_raw, number: int, o: Options) -> tuple[Pair, Pair]:
    """Mean and raw scale of q and of p, which start at the argument ``number``."""
    q, _ = unpack(layout(params), None if raw is None else layout(raw), o.packing)
    sizes = q.sizes
    return _moments(number, params, raw, sizes, o.packing), _moments(number + 2, prior, prior_raw, sizes, o.packing)


KERNELS = {
    run.__name__: run
    for run in (
        gaussian_log_prob_fwd,
        gaussian_log_prob_bwd,
        gaussian_sample_fwd,
        gaussian_sample_bwd,
        gaussian_kl_fwd,
        gaussian_kl_bwd,
    )
}
