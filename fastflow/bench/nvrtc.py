"""NVRTC, the compiler of CUDA as a library, through ctypes: it needs neither a GPU nor CuPy."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastflow.ops.cuda.load import OPTIONS
from fastflow.errors import MissingPackage

BY_CUPY = ("--device-as-default-execution-space", "-ftz=true")  # what CuPy adds of its own

__all__ = ["CompileError", "Compiled", "compiled", "version"]


class CompileError(RuntimeError):
    """The compiler's log."""


class Compiled(NamedTuple):
    """What the compiler made of a translation unit, and what it said."""

    binary: bytes
    ptx: str
    log: str


def compiled(text: str, arch: int) -> Compiled:
    """``text`` for GPUs of compute capability ``arch`` / 10, with the options that serve at run time."""
    library, program = _library(), ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"fastflow.cu", 0, None, None))
    try:
        words = [*OPTIONS, *BY_CUPY, f"--gpu-architecture=sm_{arch}", "--ptxas-options=-v"]
        array = (ctypes.c_char_p * len(words))(*map(str.encode, words))
        code = library.nvrtcCompileProgram(program, len(words), array)
        log = _result(program, "ProgramLog").rstrip(b"\0 \n").decode()
        if code:
            raise CompileError(f"{_words(code)}\n{log}")
        return Compiled(_result(program, "CUBIN"), _result(program, "PTX").rstrip(b"\0").decode(), log)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def version() -> str:
    """The version of the compiler."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"NVRTC {major.value}.{minor.value}"


def _result(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(_library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(_library(), f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"NVRTC: {_words(code)}")


def _words(code: int) -> str:
    return _library().nvrtcGetErrorString(code).decode()


@functools.cache
def _library() -> ctypes.CDLL:
    for path in _places():
        try:
            # the compiler opens this one by its name alone: it must be there already
            for builtins in sorted(path.parent.glob("libnvrtc-builtins.so.*")):
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            library = ctypes.CDLL(str(path))
        except OSError:  # of another machine, or a part of it is missing
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise MissingPackage("this needs nvidia-cuda-nvrtc, which is not installed: pip install 'fastflow[nvrtc]'")


def _places() -> Iterator[Path]:
    """Libraries that may do: those of pip's packages, which a torch for CUDA brings along, then the system's."""
    package = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (package and package.submodule_search_locations) or ()]
    patterns = [(folder, "*/lib") for folder in folders]  # nvidia/cu13/lib, before CUDA 13 nvidia/cuda_nvrtc/lib
    for toolkit in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", "/opt/cuda", "/usr"):
        patterns += [(Path(toolkit), lib) for lib in ("lib64", "lib", "lib/x86_64-linux-gnu")] if toolkit else []
    for folder, lib in patterns:
        yield from sorted(folder.glob(f"{lib}/libnvrtc.so.*"), reverse=True)
