"""The CUDA sources, and the text that makes one instance of a kernel template out of them.

The same text is compiled by NVRTC, by nvcc and, in the tests, by a C++ compiler.
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

import torch

from fastflow.ops.cuda.instances import Instance

__all__ = ["C_TYPES", "Instance", "binary", "fingerprint", "folder", "text"]

C_TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "BFloat16", torch.float16: "Half"}


def folder() -> Path:
    """Where the sources are: in the package, or beside it in a checkout."""
    package = Path(__file__).parents[2]
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def binary(file: str) -> Path | None:
    """The binary that was made of csrc/cuda/``file``.cu at install time, if one was."""
    path = folder() / "cuda" / f"{file}.fatbin"
    return path if path.is_file() else None


@functools.cache
def flattened(file: str) -> str:
    """A source with everything that it includes: a cache by content then sees a change of a header."""
    seen: set[Path] = set()

    def read(path: Path) -> str:
        path = path.resolve()
        if path in seen:
            return ""
        seen.add(path)
        parts = re.split(r'^#include "([^"]+)"\n', path.read_text().replace("#pragma once\n", ""), flags=re.MULTILINE)
        return "".join(read(path.parent / part) if i % 2 else part for i, part in enumerate(parts))

    return read(folder() / "cuda" / f"{file}.cu")


def text(*instances: Instance) -> str:
    """One translation unit with these instances, all of one file."""
    (file,) = {instance.file for instance in instances}
    entries = "\n".join(instance.entry for instance in instances)
    return f"{flattened(file)}\nnamespace fastflow {{\n{entries}\n}}\n"


@functools.cache
def fingerprint() -> str:
    """A hash of all sources and of what launches them, and whether binaries serve."""
    here, files = Path(__file__).parent, sorted((folder() / "cuda").glob("*.cu"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(flattened(path.stem).encode())
    shared = ("_layout.py", "_steps.py", "planar.py", "radial.py", "scale_map.py")
    shared += ("ode_stages.py", "ode_stages_backward.py")
    for path in [*sorted(here.glob("*.py")), *(here.parent / name for name in shared)]:
        digest.update(path.read_bytes())
    ahead = " compiled ahead" if any(binary(path.stem) for path in files) else ""
    return digest.hexdigest()[:16] + ahead
