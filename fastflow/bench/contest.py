"""One row measured: contenders that agree, their memory and times, and the record of it; on the CPU or on a GPU."""

from __future__ import annotations

import statistics
import warnings
from typing import Any

import torch
from torch import Tensor

from fastflow.bench.measure import calls_for, peak_memory, spread, timed
from fastflow.bench.row import Contenders, Row

__all__ = ["Contest", "agree", "reached", "top_kernels"]


class Contest:
    """The contenders of a row on a device: warm, compared, and how many calls make one turn of each."""

    def __init__(self, row: Row, device: str = "cpu") -> None:
        torch.compiler.reset()
        torch.manual_seed(0)
        self.row, self.device = row, device
        with torch.device(device):
            self.contenders = row.make()
        self.absent = agree(self.contenders, row.comparable)
        self.memory = {name: peak_memory(call, device) for name, call in self.contenders.items()}
        self.calls = {name: calls_for(call, device=device) for name, call in self.contenders.items()}

    def rounds(self, seconds: float) -> int:
        """How many rounds fit into ``seconds``; 5 to 50."""
        each = (timed(c, self.calls[n], self.device) * self.calls[n] for n, c in self.contenders.items())
        return max(5, min(50, int(seconds / sum(each))))

    def record(self, times: dict[str, list[float]], limits: dict[str, float]) -> dict[str, Any]:
        """The row as the result file has it."""
        bandwidth = limits.get("triad", limits["copy"])
        return {
            "family": self.row.family,
            "name": self.row.name,
            "bytes": self.row.bytes,
            "floor": max(self.row.bytes / bandwidth, self.row.flops / limits["gemm"]),
            "targets": dict(self.row.targets),
            "rounds": len(times["fastflow"]),
            "contenders": {
                name: {"seconds": statistics.median(t), "spread": spread(t), "memory": self.memory[name]}
                for name, t in times.items()
            },
            "absent": self.absent,
        }


def reached(row: dict[str, Any], name: str) -> float | None:
    """What a recorded row reaches of one of its targets; None where that contender did not run."""
    ours = row["contenders"]["fastflow"]["seconds"]
    if name == "floor":
        return row["floor"] / ours
    return row["contenders"][name]["seconds"] / ours if name in row["contenders"] else None


def agree(contenders: Contenders, comparable: bool) -> dict[str, str]:
    """Warms all up and raises unless they say what ``fastflow`` says; whom this machine cannot run is taken out."""
    absent: dict[str, str] = {}
    ours = _tensors(contenders["fastflow"]())
    for name in list(contenders):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch.compile, about its own workings
                theirs = _tensors(contenders[name]()) if name != "fastflow" else ours
                contenders[name]()
        except Exception as error:  # no compiler for torch.compile, a library that is not installed
            if name == "fastflow":
                raise
            absent[name] = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:300]}"
            del contenders[name]
            continue
        if comparable:
            _compare(name, ours, theirs)
    return absent


def _compare(name: str, ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    """Raises AssertionError unless they are near, for the coarsest dtype among the results."""
    # a few roundings of a half; of float32 those of TensorFloat-32, in which convolutions may compute
    relative = max(1e-3, *(4 * torch.finfo(t.dtype).eps for t in (*ours, *theirs)))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a.shape != b.shape:
            raise AssertionError(f"fastflow and {name} disagree: result {i} is {list(a.shape)} and {list(b.shape)}")
        if a.numel() == 0:
            continue
        wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        error = (a.to(wide) - b.to(wide)).abs().max().item()
        allowed = relative * max(1.0, b.abs().max().item())
        if not error <= allowed:  # NaN fails
            raise AssertionError(f"fastflow and {name} disagree: result {i} by {error:.3g}, {allowed:.3g} is allowed")


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone() for t in ((result,) if isinstance(result, Tensor) else result))


def top_kernels(call: Any, device: str, count: int = 6) -> dict[str, Any]:
    """Where the time of one call goes: the kernels that take the most of it, and their share."""
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU] if device == "cpu" else [activity.CPU, activity.CUDA]
    attribute = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    try:
        with torch.profiler.profile(activities=kinds) as profile:
            call()
            if device != "cpu":
                torch.cuda.synchronize()
        # on a GPU the kernels alone, not the calls on the host that launched them
        events = [e for e in profile.key_averages() if device == "cpu" or "CUDA" in str(e.device_type)]
    except Exception as error:  # no CUPTI on this machine
        return {"unavailable": f"{type(error).__name__}: {error}"[:300]}
    total = sum(getattr(e, attribute) for e in events)
    events.sort(key=lambda e: -getattr(e, attribute))
    return {
        "microseconds": total,  # with the row's time: how much of it no kernel runs
        "launches": sum(e.count for e in events),
        "top": [
            {"kernel": e.key[:160], "calls": e.count, "share": getattr(e, attribute) / total if total else 0.0}
            for e in events[:count]
        ],
    }
