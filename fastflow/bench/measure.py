"""Time and memory of a call, on the CPU or on a GPU."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch

__all__ = ["Rounds", "calls_for", "peak_memory", "spread", "timed"]


def timed(call: Callable[[], Any], calls: int = 1, device: str = "cpu") -> float:
    """Seconds per call, of ``calls`` in a row; on a GPU between two events on its stream."""
    if device != "cpu":
        return _timed_by_events(call, calls)
    start = perf_counter()
    for _ in range(calls):
        call()
    return (perf_counter() - start) / calls


def _timed_by_events(call: Callable[[], Any], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def calls_for(call: Callable[[], Any], seconds: float = 2e-3, device: str = "cpu") -> int:
    """How many calls in a row take about ``seconds``: what one round times."""
    return max(1, round(seconds / timed(call, device=device)))


def spread(times: Sequence[float]) -> float:
    """The distance between the quartiles as a fraction of the median."""
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle


class Rounds:
    """One turn for every contender at a time, so that all meet the same state of a shared machine.

    On the CPU pytest-benchmark times fastflow itself, and a turn of the others is the set-up of each of its rounds.
    """

    def __init__(self, contenders: dict[str, Callable[[], Any]], calls: dict[str, int], device: str = "cpu") -> None:
        self.contenders, self.calls, self.device = contenders, calls, device
        self.times: dict[str, list[float]] = {name: [] for name in contenders}

    def turn(self) -> None:
        for name, call in self.contenders.items():
            self.times[name].append(timed(call, self.calls[name], self.device))


def peak_memory(call: Callable[[], Any], device: str = "cpu") -> int:
    """The most bytes of tensors that live at once during a call, above those that lived before it.

    Counted from the allocations that torch's profiler records, on a GPU by its allocator: unlike the resident set of
    the process it is exact and the same every time. What a math library takes behind torch's back (oneDNN's packed
    weights) is not in it, nor is what a CUDA graph took when it was recorded.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()  # what is freed during the call was not there before it
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
