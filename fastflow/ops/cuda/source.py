"""The CUDA sources, and the text that makes one instance of a kernel template out of them.

The same text is compiled by NVRTC, by nvcc and, in the tests, by a C++ compiler.
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["C_TYPES", "Instance", "binary", "elementwise", "fingerprint", "folder", "text"]

C_TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "BFloat16", torch.float16: "Half"}


class Instance(NamedTuple):
    """``kernel<parameters>`` of csrc/cuda/``file``.cu, which takes one struct ``arguments``."""

    file: str
    kernel: str
    arguments: str
    parameters: tuple[str, ...] = ()
    threads: int = 256

    @property
    def name(self) -> str:
        """The function's name in the compiled module."""
        return "_".join(("fastflow", self.kernel, *self.parameters))

    @property
    def entry(self) -> str:
        template = f"<{', '.join(self.parameters)}>" if self.parameters else ""
        # in parentheses: the commas of the parameters are not those of the macro
        return f"FF_ENTRY({self.name}, ({self.kernel}{template}), {self.arguments}, {self.threads})"


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
    """A hash of all sources."""
    digest = hashlib.sha256()
    for path in sorted((folder() / "cuda").glob("*.cu")):
        digest.update(flattened(path.stem).encode())
    return digest.hexdigest()[:16]


# x, its parameters, and a second set of them that is a tensor of its own: all alike, or half precision beside float32
_TYPES = [(s, s, s) for s in C_TYPES.values()] + [("float", s, s) for s in ("BFloat16", "Half")]
_BYTES = {"float": 4, "double": 8, "BFloat16": 2, "Half": 2}


def elementwise(file: str, kernels: dict[str, str], types: int, general: bool = False) -> list[Instance]:
    """The usual instances of ``{kernel: arguments}``: every combination of ``types`` types, in single and wide steps.

    With ``general`` the kernels take that parameter too, and have an instance where it is set.

    What an install compiles ahead and the resource table lists; any other is compiled when it is met.
    """
    combinations = dict.fromkeys(t[:types] for t in _TYPES)
    return [
        Instance(file, kernel, arguments, (*t, *rest))
        for kernel, arguments in kernels.items()
        for t in combinations
        for rest in _steps(16 // max(_BYTES[s] for s in t), general)
    ]


def _steps(wide: int, general: bool) -> list[tuple[str, ...]]:
    return [("1", "0"), (str(wide), "0"), ("1", "1")] if general else [("1",), (str(wide),)]
