"""Diagonal Gaussians in Triton: log-likelihood, tempered sample and KL divergence, each in one pass over its tensors.

Mean and raw scale are read where the network wrote them (a kernel's argument must not be named params, which Triton's
launcher uses itself). As csrc/gaussian.h: the energy of e = (z - m) / s is
log s + e^2 / 2, so that log N(z; m, s) = -energy - log(2 pi) / 2.
"""

from __future__ import annotations

import struct
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastflow.ops._layout import Layout, layout, unpack
from fastflow.ops.gaussian import HALF_LOG_2PI, Options
from fastflow.ops.scale_map import kernel_map
from fastflow.ops.triton.numeric import expm1
from fastflow.ops.triton.rows import Walk, add_up, launch, load, place, run, store
from fastflow.ops.triton.scale_map import NONE, multiplier, scale_slope


@triton.jit
def _deviation(h, KIND: tl.constexpr, CONSTANTS: tl.constexpr, RECIPROCAL: tl.constexpr):
    """(log s, s, 1 / s, d log s / d h); what of it is not used costs nothing on a GPU"""
    log_s, s, slope, _ = scale_slope(h, None, KIND, CONSTANTS)
    scale = multiplier(log_s, s, RECIPROCAL, KIND)
    inverse = multiplier(log_s, s, not RECIPROCAL, KIND)
    if RECIPROCAL:
        log_s, slope = -log_s, -slope
    return log_s, scale, inverse, slope


@triton.jit
def _moments(means, mean_at, raw, raw_at, b, o, i, valid, T: tl.constexpr):
    """(mean, raw scale), both 0 where there are none: the map is then `none`"""
    if means is None:
        mean = tl.where(valid, 0.0, 0.0).to(T)
        h = mean
    else:
        mean = load(means, mean_at, b, o, i, valid, T)
        h = load(raw, raw_at, b, o, i, valid, T)
    return mean, h


@triton.jit
def _number(bits, T: tl.constexpr):
    """A float64 that came as the integer of its bits: as a float argument it would be rounded to float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(T)


# --- log-likelihood -----------------------------------------------------------------------------------


@triton.jit
def _log_prob(
    z, z_at, means, mean_at, raw, raw_at, sums, start, step, shape,
    KIND: tl.constexpr, CONSTANTS: tl.constexpr, RECIPROCAL: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr, SIGN: tl.constexpr, EACH: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = sums.dtype.element_ty
    b, k, o, i, valid = place(shape, SAMPLES, BLOCK, FLAT, WIDE)
    mean, h = _moments(means, mean_at, raw, raw_at, b, o, i, valid, T)
    log_s, s, inverse, slope = _deviation(h, KIND, CONSTANTS, RECIPROCAL)
    e = (load(z, z_at, b, o, i, valid, T) - mean) * inverse
    add_up(log_s + 0.5 * e * e, valid, sums, start, step, shape, SAMPLES, SIGN, EACH, SINGLE)


@triton.jit
def _log_prob_grad(
    z, z_at, means, mean_at, raw, raw_at, glogp, step, gz, gz_at, gmeans, gmean_at, graw, graw_at, shape,
    KIND: tl.constexpr, CONSTANTS: tl.constexpr, RECIPROCAL: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = glogp.dtype.element_ty
    b, k, o, i, valid = place(shape, SAMPLES, BLOCK, FLAT, WIDE)
    mean, h = _moments(means, mean_at, raw, raw_at, b, o, i, valid, T)
    log_s, s, inverse, slope = _deviation(h, KIND, CONSTANTS, RECIPROCAL)
    g = tl.load(glogp + b * step, mask=b < shape[0], other=0.0)
    e = (load(z, z_at, b, o, i, valid, T) - mean) * inverse
    gm = g * e * inverse
    store(gz, gz_at, b, o, i, valid, -gm)
    if gmeans is not None:
        store(gmeans, gmean_at, b, o, i, valid, gm)
        store(graw, graw_at, b, o, i, valid, g * (e * e - 1.0) * slope)


# --- sample -------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["temperature"])
def _sample(
    noise, noise_at, means, mean_at, raw, raw_at, z, z_at, temperature, sums, start, step, shape,
    KIND: tl.constexpr, CONSTANTS: tl.constexpr, RECIPROCAL: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr, SIGN: tl.constexpr, EACH: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = sums.dtype.element_ty
    b, k, o, i, valid = place(shape, SAMPLES, BLOCK, FLAT, WIDE)
    mean, h = _moments(means, mean_at, raw, raw_at, b, o, i, valid, T)
    log_s, s, inverse, slope = _deviation(h, KIND, CONSTANTS, RECIPROCAL)
    e = _number(temperature, T) * load(noise, noise_at, b, o, i, valid, T)
    store(z, z_at, b, o, i, valid, mean + s * e)
    # the energy is that of the untempered Gaussian
    add_up(log_s + 0.5 * e * e, valid, sums, start, step, shape, SAMPLES, SIGN, EACH, SINGLE)


@triton.jit(do_not_specialize=["temperature"])
def _sample_grad(
    noise, noise_at, means, mean_at, raw, raw_at, gz, gz_at, glogp, step, gnoise, gnoise_at, gmeans, gmean_at, graw,
    graw_at, temperature, shape,
    KIND: tl.constexpr, CONSTANTS: tl.constexpr, RECIPROCAL: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = glogp.dtype.element_ty
    b, k, o, i, valid = place(shape, SAMPLES, BLOCK, FLAT, WIDE)
    mean, h = _moments(means, mean_at, raw, raw_at, b, o, i, valid, T)
    log_s, s, inverse, slope = _deviation(h, KIND, CONSTANTS, RECIPROCAL)
    t = _number(temperature, T)
    e = t * load(noise, noise_at, b, o, i, valid, T)
    g_z = load(gz, gz_at, b, o, i, valid, T)
    g = tl.load(glogp + b * step, mask=b < shape[0], other=0.0)
    store(gnoise, gnoise_at, b, o, i, valid, t * (g_z * s - g * e))
    if gmeans is not None:
        store(gmeans, gmean_at, b, o, i, valid, g_z)
        store(graw, graw_at, b, o, i, valid, (g_z * s * e - g) * slope)


# --- Kullback-Leibler divergence ------------------------------------------------------------------------
# (e^{2 r} - 1) / 2 - r + u^2 / 2,   r = log s_q - log s_p,   u = (m_q - m_p) / s_p


@triton.jit
def _kl(
    means, mean_at, raw, raw_at, prior, prior_mean_at, prior_raw, prior_raw_at, sums, start, step, shape,
    KIND: tl.constexpr, PRIOR_KIND: tl.constexpr, CONSTANTS: tl.constexpr, RECIPROCAL: tl.constexpr,
    SAMPLES: tl.constexpr, BLOCK: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, SIGN: tl.constexpr,
    EACH: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = sums.dtype.element_ty
    b, k, o, i, valid = place(shape, SAMPLES, BLOCK, FLAT, WIDE)
    mean, h = _moments(means, mean_at, raw, raw_at, b, o, i, valid, T)
    prior_mean, prior_h = _moments(prior, prior_mean_at, prior_raw, prior_raw_at, b, o, i, valid, T)
    log_s, s, inverse, slope = _deviation(h, KIND, CONSTANTS, RECIPROCAL)
    prior_log_s, prior_s, prior_inverse, prior_slope = _deviation(prior_h, PRIOR_KIND, CONSTANTS, RECIPROCAL)
    r, u = log_s - prior_log_s, (mean - prior_mean) * prior_inverse
    kl = 0.5 * (expm1(r + r) + u * u) - r
    add_up(kl, valid, sums, start, step, shape, SAMPLES, SIGN, EACH, SINGLE)


@triton.jit
def _kl_grad(
    means, mean_at, raw, raw_at, prior, prior_mean_at, prior_raw, prior_raw_at, gkl, step,
    gmeans, gmean_at, graw, graw_at, gprior, gprior_mean_at, gprior_raw, gprior_raw_at, shape,
    KIND: tl.constexpr, PRIOR_KIND: tl.constexpr, CONSTANTS: tl.constexpr, RECIPROCAL: tl.constexpr,
    SAMPLES: tl.constexpr, BLOCK: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = gkl.dtype.element_ty
    b, k, o, i, valid = place(shape, SAMPLES, BLOCK, FLAT, WIDE)
    mean, h = _moments(means, mean_at, raw, raw_at, b, o, i, valid, T)
    prior_mean, prior_h = _moments(prior, prior_mean_at, prior_raw, prior_raw_at, b, o, i, valid, T)
    log_s, s, inverse, slope = _deviation(h, KIND, CONSTANTS, RECIPROCAL)
    prior_log_s, prior_s, prior_inverse, prior_slope = _deviation(prior_h, PRIOR_KIND, CONSTANTS, RECIPROCAL)
    g = tl.load(gkl + b * step, mask=b < shape[0], other=0.0)
    r, u = log_s - prior_log_s, (mean - prior_mean) * prior_inverse
    excess, gm = g * expm1(r + r), g * u * prior_inverse
    store(gmeans, gmean_at, b, o, i, valid, gm)
    store(graw, graw_at, b, o, i, valid, excess * slope)
    if gprior is not None:
        store(gprior, gprior_mean_at, b, o, i, valid, -gm)
        store(gprior_raw, gprior_raw_at, b, o, i, valid, -(excess + g * u * u) * prior_slope)


# --- what the ops call --------------------------------------------------------------------------------


class _Moments:
    """Mean and raw scale: the tensors that hold them, and where in these; nothing for a standard normal."""

    def __init__(self, params: Tensor | None, raw: Tensor | None, packing: int):
        self.tensors = params, params if raw is None else raw
        self.layouts: tuple[Layout | None, Layout | None] = (None, None)
        if params is not None:
            self.layouts = unpack(layout(params), None if raw is None else layout(raw), packing)

    def arguments(self, walk: Walk) -> tuple[Any, ...]:
        (mean, raw), (mean_at, raw_at) = self.tensors, map(walk.at, self.layouts)
        return mean, mean_at, raw, raw_at


def _map(o: Options, params: Tensor | None) -> dict[str, Any]:
    kind, constants = kernel_map(o.kind, o.constants)
    return {"KIND": kind if params is not None else NONE.value, "CONSTANTS": constants, "RECIPROCAL": o.reciprocal}


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def gaussian_log_prob_fwd(
    z: Tensor,
    params: Tensor | None,
    raw: Tensor | None,
    running: Tensor | None,
    logp: Tensor,
    options: tuple[Any, ...],
) -> None:
    o = Options(*options)
    p = _Moments(params, raw, o.packing)
    of_z = layout(z)
    walk = Walk(of_z, *p.layouts)
    run(
        _log_prob, walk, z, walk.at(of_z), *p.arguments(walk),
        out=logp, start=running, SIGN=-1, EACH=-HALF_LOG_2PI, **_map(o, params),
    )  # fmt: skip


def gaussian_log_prob_bwd(
    z: Tensor,
    params: Tensor | None,
    raw: Tensor | None,
    glogp: Tensor,
    gz: Tensor,
    gparams: Tensor | None,
    graw: Tensor | None,
    options: tuple[Any, ...],
) -> None:
    o = Options(*options)
    p, gp = _Moments(params, raw, o.packing), _Moments(gparams, graw, o.packing)
    of_z, of_gz = layout(z), layout(gz)
    walk = Walk(of_z, of_gz, *p.layouts, *gp.layouts)
    launch(
        _log_prob_grad, walk.programs, z, z, walk.at(of_z), *p.arguments(walk), glogp, glogp.stride(0),
        gz, walk.at(of_gz), *gp.arguments(walk), walk.shape, **_map(o, params), **walk.constants,
    )  # fmt: skip


def gaussian_sample_fwd(
    noise: Tensor,
    params: Tensor | None,
    raw: Tensor | None,
    z: Tensor,
    logp: Tensor,
    temperature: float,
    options: tuple[Any, ...],
) -> None:
    o = Options(*options)
    p = _Moments(params, raw, o.packing)
    of_noise, of_z = layout(noise), layout(z)
    walk = Walk(of_noise, of_z, *p.layouts)
    run(
        _sample, walk, noise, walk.at(of_noise), *p.arguments(walk), z, walk.at(of_z), _bits(temperature),
        out=logp, SIGN=-1, EACH=-HALF_LOG_2PI, **_map(o, params),
    )  # fmt: skip


def gaussian_sample_bwd(
    noise: Tensor,
    params: Tensor | None,
    raw: Tensor | None,
    gz: Tensor,
    glogp: Tensor,
    gnoise: Tensor,
    gparams: Tensor | None,
    graw: Tensor | None,
    temperature: float,
    options: tuple[Any, ...],
) -> None:
    o = Options(*options)
    p, gp = _Moments(params, raw, o.packing), _Moments(gparams, graw, o.packing)
    of_noise, of_gz, of_gnoise = layout(noise), layout(gz), layout(gnoise)
    walk = Walk(of_noise, of_gz, of_gnoise, *p.layouts, *gp.layouts)
    launch(
        _sample_grad, walk.programs, noise, noise, walk.at(of_noise), *p.arguments(walk), gz, walk.at(of_gz),
        glogp, glogp.stride(0), gnoise, walk.at(of_gnoise), *gp.arguments(walk), _bits(temperature), walk.shape,
        **_map(o, params), **walk.constants,
    )  # fmt: skip


def _kinds(o: Options, params: Tensor, prior: Tensor | None) -> dict[str, Any]:
    """A prior has the map of q, or is a standard normal."""
    of_q = _map(o, params)
    return of_q | {"PRIOR_KIND": of_q["KIND"] if prior is not None else NONE.value}


def gaussian_kl_fwd(
    params: Tensor,
    raw: Tensor | None,
    prior: Tensor | None,
    prior_raw: Tensor | None,
    kl: Tensor,
    options: tuple[Any, ...],
) -> None:
    o = Options(*options)
    q, p = _Moments(params, raw, o.packing), _Moments(prior, prior_raw, o.packing)
    walk = Walk(*q.layouts, *p.layouts)
    run(_kl, walk, *q.arguments(walk), *p.arguments(walk), out=kl, **_kinds(o, params, prior))


def gaussian_kl_bwd(
    params: Tensor,
    raw: Tensor | None,
    prior: Tensor | None,
    prior_raw: Tensor | None,
    gkl: Tensor,
    gparams: Tensor,
    graw: Tensor | None,
    gprior: Tensor | None,
    gprior_raw: Tensor | None,
    options: tuple[Any, ...],
) -> None:
    o = Options(*options)
    q, p = _Moments(params, raw, o.packing), _Moments(prior, prior_raw, o.packing)
    gq, gp = _Moments(gparams, graw, o.packing), _Moments(gprior, gprior_raw, o.packing)
    walk = Walk(*q.layouts, *p.layouts, *gq.layouts, *gp.layouts)
    launch(
        _kl_grad, walk.programs, params, *q.arguments(walk), *p.arguments(walk), gkl, gkl.stride(0),
        *gq.arguments(walk), *gp.arguments(walk), walk.shape, **_kinds(o, params, prior), **walk.constants,
    )  # fmt: skip
