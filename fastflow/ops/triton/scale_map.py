"""Scale maps: from the raw output h of a network to log s(h), s(h) and their slopes. As csrc/scale_map.h."""

from __future__ import annotations

import triton
import triton.language as tl

from fastflow.ops.scale_map import KINDS
from fastflow.ops.triton.numeric import atan, divide, exp, log, logistic, tanh

# KINDS in their order; a sigmoid with eps = 0 has an exact logarithm, so the other one is a kind of its own
NONE, EXP, SIGMOID, SOFTPLUS, TANH, LINEAR_TANH, ATAN, SOFT_CLIP, SIGMOID_EPS = map(tl.constexpr, range(len(KINDS) + 1))


@triton.jit
def scale_slope(h, learned, KIND: tl.constexpr, CONSTANTS: tl.constexpr):
    """(log s, s, d log s / d h, d log s / d amplitude); s only where it is not e^(log s).

    ``learned``: the amplitude where it is a tensor, else None.
    """
    gain: tl.constexpr = CONSTANTS[0]
    offset: tl.constexpr = CONSTANTS[1]
    amplitude: tl.constexpr = CONSTANTS[2]
    eps: tl.constexpr = CONSTANTS[3]
    maximum: tl.constexpr = CONSTANTS[4]
    log_amplitude: tl.constexpr = CONSTANTS[5]
    v = gain * h + offset
    zero = tl.zeros_like(v)
    s = zero
    damplitude = zero
    if KIND == NONE:
        log_s = zero
        slope = zero
    elif KIND == EXP:
        log_s = v
        slope = zero + 1.0
    elif KIND == SIGMOID:  # log sigmoid(v) = -softplus(-v)
        sigmoid, complement, softplus, q = logistic(-v)
        log_s = log_amplitude - softplus
        s = amplitude * complement
        slope = sigmoid
    elif KIND == SIGMOID_EPS:
        sigmoid, complement, softplus, q = logistic(v)
        s = amplitude * sigmoid + eps
        log_s = log(s)
        slope = divide(amplitude * sigmoid * complement, s)
    elif KIND == SOFTPLUS:
        sigmoid, complement, softplus, q = logistic(v)
        unclamped = softplus + eps
        clamped = unclamped > maximum
        s = tl.where(clamped, tl.full((), maximum, h.dtype), unclamped)
        if eps == 0.0:  # softplus(v) = e^v (1 - e^v / 2 + ...) where it would underflow
            tail = v < -15.0
            log_s = tl.where(tail, v - 0.5 * q, log(tl.where(tail, 1.0, s)))
            slope = tl.where(tail, 1.0 - 0.5 * q, divide(sigmoid, tl.where(tail, 1.0, s)))
        else:
            log_s = log(s)
            slope = divide(sigmoid, s)
        slope = tl.where(clamped, 0.0, slope)
    elif KIND == TANH:
        t = tanh(v)
        if learned is None:
            factor = zero + amplitude
        else:
            factor = learned
        log_s = factor * t
        slope = factor * (1.0 - t * t)
        damplitude = t
    elif KIND == LINEAR_TANH:
        t = tanh(v)
        s = 1.0 + amplitude * t
        log_s = log(s)
        slope = divide(amplitude * (1.0 - t * t), s)
    elif KIND == ATAN:
        log_s = amplitude * atan(v)
        slope = divide(amplitude, 1.0 + v * v)
    else:  # SOFT_CLIP
        d = 1.0 + divide(tl.abs(v), zero + amplitude)
        log_s = divide(v, d)
        slope = divide(1.0, d * d)
    return log_s, s, gain * slope, damplitude


@triton.jit
def multiplier(log_s, s, RECIPROCAL: tl.constexpr, KIND: tl.constexpr):
    """s, or 1 / s, without the log of a rounded scale."""
    if KIND == NONE:
        m = tl.zeros_like(log_s) + 1.0
    elif (KIND == SIGMOID) | (KIND == SIGMOID_EPS) | (KIND == SOFTPLUS) | (KIND == LINEAR_TANH):
        if RECIPROCAL:
            m = divide(1.0, s)
        else:
            m = s
    elif RECIPROCAL:
        m = exp(-log_s)
    else:
        m = exp(log_s)
    return m
