"""Compiles an instance for the GPU at hand and launches it, through CuPy: the only place that knows a driver.

Binaries that were made at install time (FASTFLOW_CUDA_ARCHS) are preferred; else NVRTC compiles at first use, a few
seconds that CuPy's cache on disk saves the next time.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
import time
import types
from typing import Any, Protocol

import torch

from fastflow.ops.cuda import source
from fastflow.ops.cuda.source import Instance

__all__ = ["Driver", "driver", "use_driver"]

OPTIONS = ("-std=c++17",)  # CuPy adds --device-as-default-execution-space, which generic lambdas need


class Driver(Protocol):
    """Who compiles and launches: the GPU's, or the tests' emulation."""

    device_type: str

    def unavailable(self) -> str | None: ...

    def description(self) -> str: ...

    def launch(self, instance: Instance, device: torch.device, blocks: int, shared: int, arguments: bytes) -> None: ...


@dataclasses.dataclass
class Loaded:
    """A function of CuPy, and how much dynamic shared memory it may have: this much without asking."""

    function: Any
    shared: int = 48 * 1024


class CuPy:
    """The GPU's driver through CuPy."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._loaded: dict[tuple[Instance, int], Loaded] = {}
        # torch.compile traces through the question whether this backend serves: what it asks is found out before
        self._gpu: bool | None = None
        self._missing = None
        if not importlib.util.find_spec("cupy"):
            self._missing = "CuPy is not installed: pip install 'fastflow[cuda13]' or 'fastflow[cuda12]'"
        elif not source.folder().is_dir():
            self._missing = "the CUDA sources were not installed with this package"

    def unavailable(self) -> str | None:
        """What is known without starting CuPy; a CuPy that does not work fails the self-test."""
        if self._gpu is None:  # asked late: it starts the driver
            self._gpu = torch.cuda.is_available()
        return self._missing if self._gpu else "torch sees no CUDA device"

    def description(self) -> str:
        if (reason := self.unavailable()) is not None:
            return reason
        try:
            version = self._cupy.cuda.runtime.runtimeGetVersion()
        except Exception as error:  # an old driver, or a build of CuPy for another version of CUDA
            self._missing = f"CuPy does not work here ({' '.join(str(error).split())[:200]})"
            return self._missing
        return f"CuPy {self._cupy.__version__}, CUDA {version // 1000}.{version % 1000 // 10}"

    @functools.cached_property
    def _cupy(self) -> types.ModuleType:
        return importlib.import_module("cupy")

    @functools.cached_property
    def _several(self) -> bool:
        return torch.cuda.device_count() > 1

    def launch(self, instance: Instance, device: torch.device, blocks: int, shared: int, arguments: bytes) -> None:
        if not self._several:
            return self._launch(instance, device, blocks, shared, arguments)
        # CuPy may have a runtime of its own, with a current device of its own
        with torch.cuda.device(device), self._cupy.cuda.Device(device.index):
            self._launch(instance, device, blocks, shared, arguments)

    def _launch(self, instance: Instance, device: torch.device, blocks: int, shared: int, arguments: bytes) -> None:
        loaded = self._loaded.get((instance, device.index))
        if loaded is None:
            loaded = self._loaded[instance, device.index] = Loaded(self._load(instance))
        if shared > loaded.shared:
            loaded.function.max_dynamic_shared_size_bytes = loaded.shared = shared
        numpy = sys.modules["numpy"]  # CuPy has imported it
        stream = types.SimpleNamespace(ptr=torch.cuda.current_stream(device).cuda_stream)  # all that CuPy asks of one
        packed = numpy.frombuffer(arguments, dtype=f"V{len(arguments)}")  # one element: it is passed by value
        loaded.function((blocks,), (instance.threads,), (packed,), shared_mem=shared, stream=stream)

    def _load(self, instance: Instance) -> Any:
        """The function, compiled where no binary of it was installed."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{instance.name} is used for the first time within a CUDA graph: make the call once before"
            )
        return self._installed(instance) or self._compile(instance)

    def _installed(self, instance: Instance) -> Any | None:
        path = source.binary(instance.file)
        if path is None:
            return None
        try:
            function = self._cupy.RawModule(path=str(path)).get_function(instance.name)
            function.kernel  # noqa: B018  loads it: an instance or an architecture may not be in the file
        except self._cupy.cuda.driver.CUDADriverError:
            return None
        return function

    def _compile(self, instance: Instance) -> Any:
        start = time.perf_counter()
        function = self._cupy.RawModule(code=source.text(instance), options=OPTIONS).get_function(instance.name)
        function.kernel  # noqa: B018  compiles
        if (seconds := time.perf_counter() - start) > 0.5:  # not from the cache
            print(f"fastflow: compiled {instance.name} in {seconds:.1f} s", file=sys.stderr, flush=True)
        return function


_driver: Driver = CuPy()


def driver() -> Driver:
    """Who compiles and launches."""
    return _driver


def use_driver(new: Driver) -> Driver:
    """Puts another in its place, for tests; returns the one before."""
    global _driver
    before, _driver = _driver, new
    return before
