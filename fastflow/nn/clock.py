"""How many solver steps lie between two times of a series, and how long each is.

``exact``: every gap is cut into ceil(gap / step) equal steps, so that a filter stands at an event when it sees it, and
a series' steps depend on its own times alone.

``legacy``: the clock of the published GRU-ODE-Bayes code. One grid of steps that are never shortened,
``while t < event - 0.001 * step: t += step``, where t is not set to the event after it: an event acts at the first
point of the grid at or after it. After the last event ``while t < horizon: t += step``.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, repeat
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["CLOCKS", "TOLERANCE", "Clock", "between", "until"]

Clock = Literal["exact", "legacy"]
CLOCKS: tuple[str, ...] = get_args(Clock)

TOLERANCE = 1e-3  # of a step: what is no more than this beyond a point of the grid is on it, such as 62.0000001 steps


def between(start: Tensor, end: Tensor, step: float, clock: Clock = "exact") -> tuple[Tensor, Tensor]:
    """(counts, sizes) of the steps from the event at ``start`` to the one at ``end``; int64 and float64.

    The start of a series is an event at time 0. Times are float64, ``end`` at or after ``start``.

    >>> times = torch.tensor([0.0, 0.12, 0.2], dtype=torch.float64)
    >>> between(times[:-1], times[1:], 0.05)
    (tensor([3, 2]), tensor([0.0400, 0.0400], dtype=torch.float64))
    >>> between(times[:-1], times[1:], 0.05, "legacy")
    (tensor([3, 1]), tensor([0.0500, 0.0500], dtype=torch.float64))
    """
    if clock == "legacy":
        return _grid_steps(end, step, TOLERANCE * step) - _grid_steps(start, step, TOLERANCE * step), _all(end, step)
    return _divided(end - start, step)


def until(last: Tensor, horizon: float, step: float, clock: Clock = "exact") -> tuple[Tensor, Tensor]:
    """(counts, sizes) of the steps from the last event of a series to the horizon; none where that is not after it."""
    end = torch.full_like(last, horizon)
    if clock == "legacy":
        counts = _grid_steps(end, step, 0.0) - _grid_steps(last, step, TOLERANCE * step)
        return counts.clamp_(min=0), _all(last, step)
    return _divided((end - last).clamp(min=0), step)


def _divided(gap: Tensor, step: float) -> tuple[Tensor, Tensor]:
    _refuse_more(gap, step, 1 << 31)
    counts = torch.ceil(gap / step - TOLERANCE).clamp_(min=1) * (gap > 0)
    return counts.long(), gap / counts.clamp(min=1)


def _all(like: Tensor, step: float) -> Tensor:
    return torch.full_like(like, step)


def _grid_steps(times: Tensor, step: float, tolerance: float) -> Tensor:
    """The smallest k with t_k >= time - tolerance, where t_k is what k additions of the step give."""
    _refuse_more(times, step, 1 << 24)  # all of them are in memory
    last = float(times.max()) / step if times.numel() else 0.0
    size = 1 << max(10, (int(last) + 2).bit_length())  # few sizes, each made once
    return torch.searchsorted(_grid(step, size).to(times.device), times - tolerance)


def _refuse_more(times: Tensor, step: float, most: int) -> None:
    if times.numel() and (longest := float(times.max())) > most * step:
        raise ValueError(f"times: expected at most {most} steps of {step:g} in a row, got {longest:g} of time")


@lru_cache(maxsize=16)
def _grid(step: float, size: int) -> Tensor:
    """t_0 = 0, t_{k+1} = t_k + step in float64 with its rounding: 1000 steps of 0.05 fall short of 50."""
    return torch.tensor([0.0, *accumulate(repeat(step, size))], dtype=torch.float64)
