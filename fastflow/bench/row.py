"""One row of the benchmark: a task, and who does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Contenders", "Row", "compiled", "gradients", "on_reference"]

Contenders = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Row:
    """One task and its contenders."""

    family: str
    name: str
    make: Callable[[], Contenders]
    """Inputs are made once; every contender is a call without arguments. ``fastflow`` is one of them, ``eager`` and
    ``torch.compile`` are the usual others. What they return is compared before anything is timed."""
    bytes: int = 0
    """The fewest bytes the task moves to and from memory."""
    flops: int = 0
    """The fewest floating point operations of its matrix products."""
    targets: Mapping[str, float] = field(default_factory=dict)
    """``{contender: how many times faster}``; ``{"floor": fraction of the machine's limit}``."""
    comparable: bool = True
    """Do the contenders return the same numbers? Samples from different random streams do not."""
    demo: bool = False
    """Part of the short table of ``make demo``?"""

    @property
    def id(self) -> str:
        return f"{self.family}: {self.name}"


def compiled(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """``function`` under torch.compile, as a contender."""
    program = torch.compile(function)
    return lambda: program(*arguments)


def gradients(function: Callable[..., Any], inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Callable:
    """A contender that runs ``function(*inputs)`` forward and backward and returns the gradients of the inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves), leaves, weights)

    return run


def on_reference(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with every op of fastflow on the reference backend: plain PyTorch."""
    from fastflow import use_backend

    def run(*arguments: Any) -> Any:
        with use_backend("reference"):
            return function(*arguments)

    return run
