"""Compiles an instance for the GPU at hand and launches it, through CuPy: the only place that knows a driver.

Binaries that were made at install time (FASTFLOW_CUDA_ARCHS) are preferred; else NVRTC compiles at first use, a few
seconds that CuPy's cache on disk saves the next time.
"""

from __future__ import annotations

import functools
import sys
import time
import types
from typing import Any, Protocol

import torch

from fastflow.ops.cuda import source
from fastflow.ops.cuda.source import Instance

__all__ = ["Driver", "driver", "use_driver"]

OPTIONS = ("-std=c++17", "--device-as-default-execution-space")  # the latter for generic lambdas


class Driver(Protocol):
    """Who compiles and launches: the GPU's, or the tests' emulation."""

    device_type: str

    def unavailable(self) -> str | None: ...

    def description(self) -> str: ...

    def launch(self, instance: Instance, device: torch.device, blocks: int, shared: int, arguments: bytes) -> None: ...


class CuPy:
    """The GPU's driver through CuPy."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._functions: dict[tuple[Instance, int], Any] = {}
        self._streams: dict[int, Any] = {}

    @functools.cached_property
    def _state(self) -> tuple[types.ModuleType | None, str]:
        """(cupy, its version) or (None, why there is none)"""
        if not torch.cuda.is_available():
            return None, "torch sees no CUDA device"
        try:
            import cupy

            toolkit = cupy.cuda.runtime.runtimeGetVersion()
        except ImportError as error:
            return None, f"it needs CuPy ({error}): pip install 'fastflow[cuda13]' or 'fastflow[cuda12]'"
        except Exception as error:  # an old driver, or a build of CuPy for another version of CUDA
            return None, f"CuPy does not work here ({' '.join(str(error).split())[:200]})"
        if not source.folder().is_dir():
            return None, "the CUDA sources were not installed with this package"
        return cupy, f"CuPy {cupy.__version__}, CUDA {toolkit // 1000}.{toolkit % 1000 // 10}"

    def unavailable(self) -> str | None:
        cupy, words = self._state
        return words if cupy is None else None

    def description(self) -> str:
        return self._state[1]

    def launch(self, instance: Instance, device: torch.device, blocks: int, shared: int, arguments: bytes) -> None:
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.launch(instance, device, blocks, shared, arguments)
        function = self._functions.get((instance, device.index)) or self._load(instance, device.index, shared)
        cupy, numpy = self._state[0], sys.modules["numpy"]
        pointer = torch.cuda.current_stream(device).cuda_stream
        stream = self._streams.get(pointer)
        if stream is None:
            stream = self._streams[pointer] = cupy.cuda.ExternalStream(pointer, device.index)
        packed = numpy.frombuffer(arguments, dtype=f"V{len(arguments)}")  # one element: it is passed by value
        function((blocks,), (instance.threads,), (packed,), shared_mem=shared, stream=stream)

    def _load(self, instance: Instance, device: int, shared: int) -> Any:
        """The function, compiled where no binary of it was installed."""
        function = self._installed(instance) or self._compile(instance)
        if shared > 48 * 1024:  # more than any kernel gets without asking
            function.max_dynamic_shared_size_bytes = shared
        self._functions[instance, device] = function
        return function

    def _installed(self, instance: Instance) -> Any | None:
        path = source.binary(instance.file)
        if path is None:
            return None
        try:
            function = self._state[0].RawModule(path=str(path)).get_function(instance.name)
            function.kernel  # noqa: B018  loads it: an instance or an architecture may not be in the file
        except self._state[0].cuda.driver.CUDADriverError:
            return None
        return function

    def _compile(self, instance: Instance) -> Any:
        start = time.perf_counter()
        function = self._state[0].RawModule(code=source.text(instance), options=OPTIONS).get_function(instance.name)
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
