"""``fastflow info``: what is installed, which backends can run here, and why the others cannot."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import warnings
from collections.abc import Iterator

import torch

import fastflow
from fastflow.ops import _backend
from fastflow.testing import CASES
from fastflow.testing.selftest import cache_folder

__all__ = ["add_arguments", "run"]

# package -> the extra that has it
OPTIONAL = (
    {"cupy-cuda13x": "cuda13", "cupy-cuda12x": "cuda12", "triton": "triton", "nvidia-cuda-nvrtc": "nvrtc"},
    dict.fromkeys(("numpy", "safetensors", "tqdm", "matplotlib", "pillow", "scikit-learn"), "train"),
    dict.fromkeys(("pytest", "pytest-benchmark"), "bench"),
    dict.fromkeys(("normflows", "nflows", "zuko", "FrEIA", "torchdiffeq"), "peers"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(arguments: argparse.Namespace) -> int:
    for name, value in lines():
        print(f"{name:<18} {value}" if name else "")
    return 0


def lines() -> Iterator[tuple[str, str]]:
    """(what, its state) line by line."""
    yield "fastflow", f"{fastflow.__version__} in {next(iter(fastflow.__path__))}"
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", torch.__version__
    yield "cuda device", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    yield "", ""
    yield "cpu capability", torch.backends.cpu.get_cpu_capability()
    yield "threads of torch", str(torch.get_num_threads())
    yield "", ""
    for name, backend in _backend.NATIVE.items():
        description = backend.description()  # looks closer than what is asked before every call
        reason = backend.unavailable()
        yield f"backend {name}", f"not available: {reason}" if reason else f"available: {description}"
        if reason is None and name in _backend.TESTED and torch.cuda.is_available():
            yield from verdicts(name, "cuda")
    yield "backend reference", "available"
    passed = cache_folder() / "selftest"
    yield "self-tests passed", f"{len(list(passed.glob('*')))} in {passed}"
    for packages in OPTIONAL:
        yield "", ""
        for package, extra in packages.items():
            yield package, _version(package) or f"not installed (pip install 'fastflow[{extra}]')"


def verdicts(backend: str, device: str) -> Iterator[tuple[str, str]]:
    """(a family of kernels, what its self-test in float32 says); one that never ran does so, which takes a while."""
    probe = torch.zeros(1, device=device)
    for family in dict.fromkeys(case.family for case in CASES):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the same words
            reason = _backend.doubt(backend, _backend.Family(family), probe)
        yield f"  {family}", reason or "passed its self-test"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
