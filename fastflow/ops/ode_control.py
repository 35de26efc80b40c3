"""How long the steps of an adaptive method are: torchdiffeq's control, of norms in float64, as csrc/ode.h has it.

Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, II.4. A norm is that of something divided by
atol + rtol |y|, of a batch or of every sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["first_step", "growth", "trial_step"]


def trial_step(state: Tensor, slope: Tensor) -> Tensor:
    """From |y| and |f|: how far to try."""
    h = torch.where((state < 1e-5) | (slope < 1e-5), 1e-6, 0.01 * state / slope)
    return torch.where(h.isfinite() & (h > 0), h, 1e-6)


def first_step(trial: Tensor, slope: Tensor, bend: Tensor, order: int) -> Tensor:
    """And from |f(t + h, y + h f) - f| / h with the trial h: a step that Euler's method makes without harm."""
    slow = (slope <= 1e-15) & (bend <= 1e-15)
    h = torch.where(slow, (1e-3 * trial).clamp(min=1e-6), (0.01 / torch.maximum(slope, bend)) ** (1 / order))
    return torch.minimum(100 * trial, torch.where(h.isfinite() & (h > 0), h, trial))


def growth(norm: Tensor, order: int) -> Tensor:
    """By how much the step may grow after one whose error had this norm; not finite: as bad as can be."""
    wanted = torch.maximum(0.9 / norm ** (1 / order), torch.where(norm < 1, 1.0, 0.2))
    return torch.where(norm.isfinite(), wanted.clamp(max=10.0), 0.2)
