"""The scalar equation behind every inverse of a flow with tanh units, in plain PyTorch: csrc/root.h says the same.

Solved by Newton's method from a bound of the root from which it cannot overshoot; differentiated implicitly.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["derivative", "log_derivative", "tanh_root"]

STEPS = 9


def tanh_root(v: Tensor, slope: Tensor) -> Tensor:
    r"""The a with :math:`a + s \tanh a = v`, slope = 1 + s >= 0; tensors that broadcast, NaN where one of them is.

    ``slope`` and not s: near the edge of invertibility, s -> -1, the caller knows it better than a difference would.
    Differentiable twice, whatever the slope.

    >>> a = tanh_root(torch.tensor([-2.0, 0.0, 1e-3]), torch.tensor([3.0, 0.5, 0.0]))
    >>> a + torch.tanh(a) * torch.tensor([2.0, -0.5, -1.0])
    tensor([-2.0000e+00,  0.0000e+00,  1.0000e-03])
    """
    v, slope = torch.broadcast_tensors(v, slope)
    with torch.no_grad():
        target, s = v.abs(), slope - 1
        line, flat = target / slope, target - s
        above = torch.where(line < flat, line, flat)
        cube = -5 * target / s  # a - tanh a >= a^3 / 5 up to 1
        small = cube.clamp(min=0).pow(1 / 3)
        above = torch.where((s < 0) & (cube < 1) & ~(above < small), small, above)
        a = torch.where(s < 0, above, torch.maximum(line, flat))
        for _ in range(STEPS):
            step = _residual(a, target, slope) / derivative(slope, a)
            a = torch.where(torch.where(s < 0, step > 0, step < 0), a - step, a)
        a = torch.where(v < 0, -a, a)
        a = torch.where(v.isnan() | slope.isnan(), torch.nan, a)
    if not torch.is_grad_enabled():
        return a
    # Two steps of Newton's method from a constant: each squares the distance to the root as a function of v and slope,
    # so that first and second derivatives are those of the root itself.
    for _ in range(2):
        a = a - _residual(a, v, slope) / derivative(slope, a).clamp(min=torch.finfo(v.dtype).tiny)
    return a


def _residual(a: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    """a + s tanh(a) - v, for s < 0 from terms of one sign."""
    s, rest = slope - 1, _rest(a)
    return torch.where(s < 0, (slope * a - v) - s * rest, (a - v) + s * torch.tanh(a))


def _rest(a: Tensor) -> Tensor:
    """a - tanh(a), accurate near 0."""
    z = torch.where(a.abs() < 0.625, a * a, 0.0)
    p = (9.64399179425052238628e-1 * z + 9.92877231001918586564e1) * z + 1.61468768441708447952e3
    q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
    return torch.where(a.abs() < 0.625, a * z * (p / q), a - torch.tanh(a))


def _square(a: Tensor) -> Tensor:
    """1 - tanh(a)^2 without cancellation."""
    return 4 * torch.sigmoid(2 * a) * torch.sigmoid(-2 * a)


def derivative(slope: Tensor, a: Tensor) -> Tensor:
    """1 + s (1 - tanh(a)^2), without cancellation for either sign of s."""
    s = slope - 1
    return torch.where(s < 0, slope - s * torch.tanh(a).square(), 1 + s * _square(a))


def log_derivative(slope: Tensor, a: Tensor) -> Tensor:
    """Its logarithm, accurate near 0 and near the edge."""
    x = (slope - 1) * _square(a)
    steep = x < -0.5
    rest = torch.where(steep, slope + (1 - slope) * torch.tanh(a).square(), 1.0)
    return torch.where(steep, torch.log(rest), torch.log1p(torch.where(steep, 0.0, x)))
