"""The scalar equation a + s tanh(a) = v in Triton: csrc/root.h says how and why."""

from __future__ import annotations

import triton
import triton.language as tl

from fastflow.ops.triton.numeric import divide, exp, log, tanh


@triton.jit
def tanh_slope(a):
    """(tanh(a), 1 - tanh(a)^2), the second without cancellation."""
    q = exp(-2.0 * tl.abs(a))
    r = divide(1.0, 1.0 + q)
    h = tanh(a)
    return h, tl.where(tl.abs(a) < 0.625, 1.0 - h * h, 4.0 * q * (r * r))


@triton.jit
def derivative(slope, h, d):
    """1 + s d with d = 1 - h^2, without cancellation for either sign of s."""
    s = slope - 1.0
    return tl.where(s < 0.0, slope - s * (h * h), 1.0 + s * d)


@triton.jit
def log_one_plus(x, one_plus):
    """log(1 + x), and below -0.5 by 1 + x as it is without cancellation."""
    near = x < -0.5
    u = tl.where(near, one_plus, 1.0 + x)
    rest = tl.where(near, 0.0, x - (u - 1.0))  # what rounding lost, to first order
    return log(u) + divide(rest, u)


@triton.jit
def log_derivative(slope, h, d):
    """Its logarithm, accurate near 0 and near the edge."""
    return log_one_plus((slope - 1.0) * d, slope + (1.0 - slope) * (h * h))


@triton.jit
def _rest(a, h):
    """a - h with h = tanh(a), accurate near 0; a >= 0."""
    z = a * a
    if a.dtype == tl.float64:
        p = (9.64399179425052238628e-1 * z + 9.92877231001918586564e1) * z + 1.61468768441708447952e3
        q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
        series = p / q
    else:
        p = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
        series = 3.33332819422e-1 - p * z
    return tl.where(a < 0.625, a * z * series, a - h)


@triton.jit
def tanh_root(v, slope):
    """a with a + s tanh(a) = v, slope = 1 + s >= 0; NaN where one of them is."""
    s, target = slope - 1.0, tl.abs(v)
    line, flat = divide(target, slope), target - s
    above = tl.where(line < flat, line, flat)
    cube = divide(-5.0 * target, s)
    small = exp(log(tl.where(cube > 0.0, cube, 0.0)) * (1.0 / 3.0))
    above = tl.where((cube < 1.0) & ((above >= small) | (above != above)), small, above)
    a = tl.where(s < 0.0, above, tl.where(line > flat, line, flat))
    for _ in range(9):
        h, d = tanh_slope(a)
        f = tl.where(s < 0.0, (slope * a - target) - s * _rest(a, h), (a - target) + s * h)
        step = divide(f, derivative(slope, h, d))
        onward = tl.where(s < 0.0, step > 0.0, step < 0.0)
        a = tl.where(onward, a - step, a)
    a = tl.where(v < 0.0, -a, a)
    return tl.where((v == v) & (slope == slope), a, float("nan"))
