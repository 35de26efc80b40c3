"""Scalar functions for every element, accurate to a few units in the last place in float32 and float64.

Triton's own exp is an approximation in float32, and what it lacks (expm1, log1p, tanh, atan) CUDA's library would have
but the interpreter not. As csrc/math.h, where the same is written for C++.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divide(a, b):
    """a / b, rounded correctly: a plain float32 division on a GPU is not."""
    if b.dtype == tl.float64:
        q = a / b
    else:
        q = tl.div_rn(a, b)
    return q


@triton.jit
def _reduce(x):
    """(r, e^r - 1 - r, 2^(n - 1)) in float32: x = n ln 2 + r, |r| <= ln 2 / 2; n may be 128, beyond any 2^n."""
    v = tl.where(x < -86.64, -86.64, x)
    v = tl.where(v > 88.72283, 88.72283, v)
    n = (v * 1.44269504088896340736 + 12582912.0) - 12582912.0  # adding 1.5 * 2^23 rounds to an integer
    r = (v - n * 0.693359375) - n * -2.12194440e-4
    p = 1.9875691500e-4 * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    return r, (p * r) * r, ((n.to(tl.int32) + 126) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp(x):
    """e^x; in float32 0 below 2^-125."""
    if x.dtype == tl.float64:
        y = tl.exp(x)
    else:
        r, tail, half = _reduce(x)
        near = 1.0 + r
        y = (2.0 * (near + ((r - (near - 1.0)) + tail))) * half
        y = tl.where(x < -86.64, 0.0, y)
        y = tl.where(x > 88.72283, float("inf"), y)
    return y


@triton.jit
def expm1(x):
    """e^x - 1, accurate near 0."""
    if x.dtype == tl.float64:
        # the rounding of u = e^x cancels in (u - 1) / log u (Higham, Accuracy and Stability, section 1.14)
        small = tl.abs(x) < 1.0
        u = tl.exp(x)
        near = small & (u != 1.0)
        fixed = (u - 1.0) * (x / log(tl.where(near, u, 2.0)))
        y = tl.where(near, fixed, tl.where(small, x, u - 1.0))
    else:
        r, tail, half = _reduce(x)
        y = 2.0 * ((half - 0.5) + half * (r + tail))
        y = tl.where(x > 88.72283, float("inf"), y)
    return y


@triton.jit
def log(x):
    """ln x; in float32 for normal x, 0, inf and NaN, and NaN below 0."""
    if x.dtype == tl.float64:
        y = tl.log(x)
    else:
        # x = 2^k m with m in [sqrt(1/2), sqrt(2)), ln m = 2 artanh s with s = f / (2 + f), f = m - 1
        bits = x.to(tl.int32, bitcast=True) - 0x3F3504F3
        m = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
        n = (bits >> 23).to(tl.float32)
        f = m - 1.0
        s = tl.div_rn(f, 2.0 + f)
        z = s * s
        tail = z * (0.66666662693 + z * (0.40000972152 + z * (0.28498786688 + z * 0.24279078841)))
        half = 0.5 * f * f
        y = n * 0.693359375 - ((half - (s * (half + tail) + n * -2.12194440e-4)) - f)
        y = tl.where((x > 0.0) & (x < float("inf")), y, tl.where(x == 0.0, float("-inf"), x))
        y = tl.where(x < 0.0, float("nan"), y)
    return y


@triton.jit
def log1p_unit(q):
    """ln(1 + q) on 0 <= q <= 1."""
    if q.dtype == tl.float64:
        u = 1.0 + q  # its rounding cancels in log u / (u - 1)
        apart = u != 1.0
        y = tl.where(apart, log(u) * (q / tl.where(apart, u - 1.0, 1.0)), q)
    else:
        p = -4.420736338943243e-3 * q + 2.524702996015549e-2
        p = p * q - 6.722103059291840e-2
        p = p * q + 1.164807081222534e-1
        p = p * q - 1.591715216636658e-1
        p = p * q + 1.988158524036407e-1
        p = p * q - 2.499143630266190e-1
        p = p * q + 3.333312571048737e-1
        y = q - q * q * (0.5 - q * p)
    return y


@triton.jit
def tanh(x):
    if x.dtype == tl.float64:
        e = expm1(-2.0 * tl.abs(x))
        y = -e / (e + 2.0)
        y = tl.where(x < 0.0, -y, y)
    else:
        a = tl.abs(x)
        z = x * x
        p = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
        small = x + x * z * (p - 3.33332819422e-1)
        large = 1.0 - tl.div_rn(2.0, exp(a + a) + 1.0)
        y = tl.where(a < 0.625, small, tl.where(x < 0.0, -large, large))
    return y


@triton.jit
def atan(x):
    a = tl.abs(x)
    steep = a > 2.41421356237309504880  # tan(3 pi / 8)
    middle = a > 0.41421356237309504880  # tan(pi / 8)
    over = tl.where(steep, -1.0, tl.where(middle, a - 1.0, a))
    under = tl.where(steep, a, tl.where(middle, a + 1.0, 1.0))
    y = divide(over, under)
    z = y * y
    if x.dtype == tl.float64:
        p = ((-8.750608600031904122785e-1 * z - 1.615753718733365076637e1) * z - 7.500855792314704667340e1) * z
        p = (p - 1.228866684490136173410e2) * z - 6.485021904942025371773e1
        q = ((z + 2.485846490142306297962e1) * z + 1.650270098316988542046e2) * z + 4.328810604912902668951e2
        q = (q * z + 4.853903996359136964868e2) * z + 1.945506571482613964425e2
        r = p / q
    else:
        r = ((8.05374449538e-2 * z - 1.38776856032e-1) * z + 1.99777106478e-1) * z - 3.33329491539e-1
    half_pi, quarter_pi = tl.full((), 1.57079632679489661923, x.dtype), tl.full((), 0.78539816339744830962, x.dtype)
    y = tl.where(steep, half_pi, tl.where(middle, quarter_pi, 0.0 * half_pi)) + (y + y * z * r)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def logistic(v):
    """(sigmoid(v), sigmoid(-v), softplus(v), q = e^-|v|)"""
    q = exp(-tl.abs(v))
    big = divide(1.0, 1.0 + q)
    small = q * big
    negative = v < 0.0
    softplus = tl.where(negative, 0.0, v) + log1p_unit(q)
    return tl.where(negative, small, big), tl.where(negative, big, small), softplus, q
