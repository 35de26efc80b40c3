"""``fastflow info``: what is installed, which backends can run here, and why the others cannot."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Iterator

import torch

import fastflow
from fastflow.ops import _backend, cpu

__all__ = ["add_arguments", "run"]

OPTIONAL = {
    "train": ("numpy", "safetensors", "tqdm", "matplotlib", "pillow", "scikit-learn"),
    "bench": ("pytest", "pytest-benchmark"),
    "peers": ("normflows", "nflows", "zuko", "FrEIA", "torchdiffeq"),
}
GPU = "this release has no kernels for it; CUDA tensors run on the reference"


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
    yield "cpu library", cpu.description()
    yield "threads of torch", str(torch.get_num_threads())
    yield "", ""
    for name, reason in _backend.reasons().items():
        yield f"backend {name}", "available" if reason is None else f"not available: {reason}"
    for name in ("cuda", "triton"):
        if name not in _backend.BACKENDS:
            yield f"backend {name}", f"not available: {GPU}"
    for extra, packages in OPTIONAL.items():
        yield "", ""
        for package in packages:
            yield package, _version(package) or f"not installed (pip install 'fastflow[{extra}]')"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
