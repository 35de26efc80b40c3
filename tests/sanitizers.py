"""Programs of the tests under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CXX = os.environ.get("CXX") or shutil.which("c++")
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"


def run(code: str, *arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a process of its own, which also finds the modules of this folder."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=variables)


def run_sanitized(
    code: str, *arguments: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """With the sanitizer in front of malloc, and libstdc++ beside it, whose exceptions it must know from the start."""
    return run(
        code,
        *arguments,
        cwd=cwd,
        LD_PRELOAD=f"{file_of('libasan.so')} {file_of('libstdc++.so')}",
        ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0",
        UBSAN_OPTIONS="print_stacktrace=1",
        **environment,
    )


def file_of(name: str) -> str:
    command = [*CXX.split(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def compile_library(source: Path, library: Path) -> None:
    """A C++ file with the sanitizers in it; skips where the compiler lacks them."""
    if CXX is None:
        pytest.skip("no C++ compiler")
    command = [*CXX.split(), "-O1", *FLAGS.split(), "-shared", "-fPIC", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not Path(file_of("libasan.so")).is_file():
        pytest.skip(f"the compiler lacks the sanitizers: {done.stderr.strip()[:200]}")
