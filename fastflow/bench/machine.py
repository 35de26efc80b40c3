"""What this machine can do, measured, and what it is."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastflow
from fastflow.bench.measure import timed

__all__ = ["commit", "describe", "limits"]

MEGABYTES_64 = 1 << 24  # float32 values


def limits(device: str = "cpu") -> dict[str, float]:
    """What no program on this device can pass."""
    return _cpu_limits() if device == "cpu" else _gpu_limits(device)


def _gpu_limits(device: str) -> dict[str, float]:
    """Bytes per second of a.copy_(b) of 4 GB, read and written; flops of a GEMM in float32, without TensorFloat-32."""
    size = min(4 << 30, torch.cuda.get_device_properties(device).total_memory // 8)
    a, b = (torch.ones(size // 4, device=device) for _ in range(2))
    n = 8192
    x, y, z = (torch.randn(n, n, device=device) for _ in range(3))
    return {
        "copy": 2 * a.nbytes / _best(lambda: a.copy_(b), device=device),
        "gemm": 2 * n**3 / _best(lambda: torch.mm(x, y, out=z), device=device),
    }


def _cpu_limits() -> dict[str, float]:
    """Bytes per second of a = b + s c and of a = b over 64 MB arrays that exist already, and flops of a large GEMM.

    Counted as is usual: two reads and one write, one read and one write. A store also reads the line it overwrites,
    which is not counted; so a task that writes in place can pass 100 % of a floor that is derived from this.
    """
    a, b, c = (torch.ones(MEGABYTES_64) for _ in range(3))
    n = 2048
    x, y, z = (torch.randn(n, n) for _ in range(3))
    return {
        "triad": 3 * a.nbytes / _best(lambda: torch.add(b, c, alpha=0.5, out=a)),
        "copy": 2 * a.nbytes / _best(lambda: a.copy_(b)),
        "gemm": 2 * n**3 / _best(lambda: torch.mm(x, y, out=z)),
    }


def _best(call: Callable[[], Any], runs: int = 15, device: str = "cpu") -> float:
    call()
    return min(timed(call, device=device) for _ in range(runs))


def describe(device: str = "cpu") -> dict[str, Any]:
    """Everything a figure depends on; with a ``device`` that is none of the CPU its name and its software, too."""
    from fastflow.ops import _backend, cpu

    about = {}
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        about = {
            "gpu": properties.name,
            "gpu_memory": properties.total_memory,
            "gpu_processors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "backends": {name: why or "available" for name, why in _backend.reasons().items()},
            "cuda_backend": _backend.NATIVE["cuda"].description(),
        }
    return about | {
        "cpu": _cpu_name(),
        "cores": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "library": cpu.description(),
        "fastflow": fastflow.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout that the package lies in, if it lies in one."""
    here = Path(fastflow.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        top = Path(git("rev-parse", "--show-toplevel"))
        if not (top / "csrc" / "coupling.h").is_file():  # somebody else's repository, with a .venv in it
            return None
        return git("describe", "--always", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
