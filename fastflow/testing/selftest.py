"""The self-test of a GPU backend: a few tiny cases of a family against the reference before the first use.

So a build for a new GPU, driver or compiler that computes wrong numbers is found out and not used. What passed is
remembered on disk for this GPU, driver, version of torch and version of the kernels.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from fastflow.testing.checks import check_forward, check_gradient

__all__ = ["cache_folder", "selftest"]


def cache_folder() -> Path:
    """Where fastflow keeps what it found out: FASTFLOW_CACHE, or the user's cache folder."""
    if given := os.environ.get("FASTFLOW_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastflow"


def selftest(backend: str, family: str, device: torch.device, dtype: torch.dtype, build: str) -> str | None:
    """What is wrong with the kernels of ``family``, made of what ``build`` names; None where they are right."""
    from fastflow.testing import cases

    passed = cache_folder() / "selftest" / _fingerprint(backend, family, device, dtype, build)
    if passed.is_file():
        return None
    with _undemanding(device):
        for case in cases(family):
            if not case.selftest or dtype not in case.dtypes or backend not in case.backends:
                continue
            try:
                for check in (check_forward, check_gradient):
                    check(case, backend, dtype, str(device), sizes=("tiny",))
            except torch.OutOfMemoryError:
                raise  # says nothing about the kernels
            except Exception as error:  # a kernel that does not compile or launch is as wrong as one that miscalculates
                return f"its self-test failed: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}"
    _remember(passed)
    return None


@contextlib.contextmanager
def _undemanding(device: torch.device) -> Iterator[None]:
    """Without what the process demands of all its threads and the reference may not be able to give."""
    demanded = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    sync = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    torch.use_deterministic_algorithms(False)
    try:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(0)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            yield
    finally:
        torch.use_deterministic_algorithms(demanded[0], warn_only=demanded[1])
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(sync)


def _fingerprint(backend: str, family: str, device: torch.device, dtype: torch.dtype, build: str) -> str:
    """Names everything that the verdict depends on."""
    facts = [backend, family, str(dtype), torch.__version__, build]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = torch._C._cuda_getDriverVersion() if hasattr(torch._C, "_cuda_getDriverVersion") else ""
        facts += [properties.name, str(properties.major), str(properties.minor), str(driver)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _remember(passed: Path) -> None:
    """An empty file, made at once; where nothing can be written the test is simply run again next time."""
    try:
        passed.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=passed.parent, delete=False) as file:
            os.replace(file.name, passed)
    except OSError:
        pass
