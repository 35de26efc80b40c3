"""Time and memory of a call."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch

__all__ = ["Rounds", "calls_for", "peak_memory", "spread", "timed"]


def timed(call: Callable[[], Any], calls: int = 1) -> float:
    """Seconds per call, of ``calls`` in a row."""
    start = perf_counter()
    for _ in range(calls):
        call()
    return (perf_counter() - start) / calls


def calls_for(call: Callable[[], Any], seconds: float = 2e-3) -> int:
    """How many calls in a row take about ``seconds``: what one round times."""
    return max(1, round(seconds / timed(call)))


def spread(times: Sequence[float]) -> float:
    """The distance between the quartiles as a fraction of the median."""
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle


class Rounds:
    """The contenders that pytest-benchmark does not time itself: one turn for each before every round of its own.

    So all contenders meet the same state of a shared machine.
    """

    def __init__(self, contenders: dict[str, Callable[[], Any]], calls: dict[str, int]) -> None:
        self.contenders, self.calls = contenders, calls
        self.times: dict[str, list[float]] = {name: [] for name in contenders}

    def turn(self) -> None:
        for name, call in self.contenders.items():
            self.times[name].append(timed(call, self.calls[name]))


def peak_memory(call: Callable[[], Any]) -> int:
    """The most bytes of tensors that live at once during a call, above those that lived before it.

    Counted from the allocations that torch's profiler records: unlike the resident set of the process it is exact and
    the same every time. What a math library takes behind torch's back (oneDNN's packed weights) is not in it.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    del result
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    total = peak = 0
    for event in events:
        total += event.nbytes()
        peak = max(peak, total)
    return peak
