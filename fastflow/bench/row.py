"""One row of the benchmark: a task, and who does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["FAMILIES", "Contenders", "Row", "captured", "compiled", "contenders", "gradients", "on", "words"]

Contenders = dict[str, Callable[[], Any]]

FAMILIES = (  # one file of rows each
    "coupling",
    "conv1x1",
    "gaussian",
    "trace",
    "glow",
    "planar",
    "sylvester",
    "masked",
    "mlp_coupling",
    "wavenet",
    "gru_ode",
)
CPU = ("reference",)
GPU = ("triton", "eager graph")  # beside fastflow, eager and torch.compile
GPU_TUNED = (*GPU, "max-autotune")  # where tuning takes seconds, not minutes


@dataclass(frozen=True)
class Row:
    """One task and its contenders."""

    family: str
    name: str
    make: Callable[[], Contenders]
    """Inputs are made once, on torch's default device; every contender is a call without arguments. ``fastflow`` is one
    of them, ``eager`` and ``torch.compile`` are the usual others. What they return is compared before anything is
    timed."""
    bytes: int = 0
    """The fewest bytes the task moves to and from memory."""
    flops: int = 0
    """The fewest floating point operations of its matrix products."""
    targets: Mapping[str, float] = field(default_factory=dict)
    """``{contender: how many times faster}``; ``{"floor": fraction of the machine's limit}``."""
    comparable: bool = True
    """Do the contenders return the same numbers? Samples from different random streams do not."""
    seconds: float = 15.0
    """About how long it takes, most of it in compilers: where less is left on a GPU it is left out."""
    demo: bool = False
    """Part of the short table of ``make demo``?"""

    @property
    def id(self) -> str:
        return f"{self.family}: {self.name}"


def contenders(
    ours: Callable[..., Any],
    eager: Callable[..., Any],
    inputs: Sequence[Any],
    weights: Sequence[Tensor] | None = None,
    more: Sequence[str] = CPU,
    traceable: Callable[..., Any] | None = None,
) -> Contenders:
    """The usual contenders for ``f(*inputs)``; with ``weights`` for the gradient of the outputs so weighted.

    ``more`` beside the three that are always there; ``traceable`` is what torch.compile gets where it cannot trace
    ``eager``.
    """
    formula = traceable or eager

    def bind(function: Callable[..., Any]) -> Callable[[], Any]:
        return partial(function, *inputs) if weights is None else gradients(function, inputs, weights)

    makers = {
        "fastflow": lambda: bind(ours),
        "eager": lambda: bind(eager),
        "torch.compile": lambda: bind(torch.compile(formula)),
        "reference": lambda: bind(on("reference", ours)),
        "triton": lambda: bind(on("triton", ours)),
        "max-autotune": lambda: bind(torch.compile(formula, mode="max-autotune-no-cudagraphs")),
        "eager graph": lambda: captured(bind(eager)),
    }
    return {name: makers[name]() for name in ("fastflow", "eager", "torch.compile", *more)}


def compiled(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """``function`` under torch.compile, as a contender."""
    return partial(torch.compile(function), *arguments)


def gradients(function: Callable[..., Any], inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Callable:
    """A contender that runs ``function(*inputs)`` forward and backward and returns the gradients of the inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]

    def run() -> tuple[Tensor, ...]:
        outputs = function(*leaves)
        return torch.autograd.grad(outputs, leaves, [w.to(o.dtype) for o, w in zip(outputs, weights, strict=True)])

    return run


def on(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with every op of fastflow on one backend; ``reference`` is plain PyTorch."""
    from fastflow import use_backend

    def run(*arguments: Any) -> Any:
        with use_backend(backend):
            return function(*arguments)

    return run


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` as a CUDA graph, recorded at the first call; every call replays it and returns the same tensors."""
    recorded: list[tuple[torch.cuda.CUDAGraph, Any]] = []

    def record() -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("CUDA graphs need a CUDA device")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # lazy initialisation does not belong into the graph
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        recorded.append((graph, result))

    def run() -> Any:
        if not recorded:
            record()
        graph, result = recorded[0]
        graph.replay()
        return result

    return run


def words(size: int, dtype: torch.dtype) -> str:
    """A size in bytes and a dtype, as a row is called."""
    for unit, count in (("GB", 2**30), ("MB", 2**20), ("KB", 2**10)):
        if size >= count:
            return f"{size / count:.3g} {unit} {str(dtype).removeprefix('torch.')}"
    return f"{size} B {str(dtype).removeprefix('torch.')}"
