"""Runs the CUDA kernels without a GPU: compiled as C++ with ``emulate.h``, launched on CPU tensors."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

from fastflow.ops.cuda import source
from fastflow.ops.cuda.source import Instance

HEADER = Path(__file__).parent / "emulate.h"
CXX = os.environ.get("CXX") or shutil.which("c++")
FLAGS = "-std=c++17 -O1 -shared -fPIC -ffp-contract=off -Wno-unknown-pragmas"


class Emulation:
    """A driver for fastflow.ops.cuda.load: compiles an instance at its first launch."""

    device_type = "cpu"

    def __init__(self, folder: Path, flags: str = ""):
        self.folder, self.flags = folder, f"{FLAGS} {flags}"
        self.functions: dict[Instance, ctypes._CFuncPtr] = {}

    def unavailable(self) -> str | None:
        return None if CXX else "no C++ compiler"

    def description(self) -> str:
        return "emulation"

    def launch(self, instance: Instance, device: torch.device, blocks: int, shared: int, arguments: bytes) -> None:
        function = self.functions.get(instance)
        if function is None:
            library = ctypes.CDLL(str(self.compile(instance)))
            function = self.functions[instance] = getattr(library, instance.name)
            function.argtypes = (ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_char_p)
            function.restype = None
        function(blocks, instance.threads, shared, arguments)

    def compile(self, instance: Instance, text: str | None = None) -> Path:
        """The library with this instance; one that was made of the same text before is taken again."""
        text = f'#include "{HEADER}"\n{text or source.text(instance)}'
        name = hashlib.sha256(f"{self.flags}{text}{HEADER.read_text()}".encode()).hexdigest()[:24]
        library, path = self.folder / f"{name}.so", self.folder / f"{name}.cpp"
        if not library.is_file():
            path.write_text(text)
            command = [*CXX.split(), *self.flags.split(), str(path), "-o", f"{library}.part"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{instance.name} does not compile:\n{done.stderr[:4000]}")
            os.replace(f"{library}.part", library)
        return library
