"""Native ops: one schema and one body, an overload of it for every backend.

The body allocates its outputs and calls the kernel with them; run with a kernel that does nothing it is the fake
implementation that torch.compile traces with. ``torch.ops.fastflow.<name>.<backend>`` is the op itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastflow.ops import _backend

__all__ = ["op", "accumulator", "any_grad", "second_order", "reference_vjp", "without_autocast"]

_LIBRARY = torch.library.Library("fastflow", "DEF")


def op(
    schema: str, *kernels: str, backends: tuple[str, ...] = tuple(_backend.NATIVE)
) -> Callable[[Callable[..., Any]], dict[str, Callable[..., Any]]]:
    """Defines the op of ``schema`` from its body ``body(*kernels, *arguments)``; returns ``{backend: call}``.

    The kernels are the backend's functions of these names; none stands for the one of the op's name. A call goes
    through the dispatcher only where someone listens there (torch.compile, a dispatch mode): that hop costs as much
    as the rest.
    """
    name, signature = schema.split("(", 1)
    kernels = kernels or (name,)

    def define(body: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        calls = {}
        nothing = (lambda *_: None,) * len(kernels)
        for backend in backends:

            def run(*arguments: Any, backend: str = backend) -> Any:
                return body(*map(_backend.NATIVE[backend].kernel, kernels), *arguments)

            def implementation(*arguments: Any, backend: str = backend, run: Callable[..., Any] = run) -> Any:
                _trust(backend, body.__globals__["FAMILY"], arguments[0])
                return run(*arguments)

            qualified = f"fastflow::{name}.{backend}"
            _LIBRARY.define(f"{name}.{backend}({signature}")
            _LIBRARY.impl(f"{name}.{backend}", implementation, "CompositeExplicitAutograd")
            torch.library.register_fake(qualified, lambda *a: body(*nothing, *a), lib=_LIBRARY)
            calls[backend] = _call(run, getattr(getattr(torch.ops.fastflow, name), backend))
        return calls

    return define


def _trust(backend: str, family: _backend.Family, first: Tensor | list[Tensor]) -> None:
    """A traced program was promised the backend before its self-test could run: it runs now."""
    if (reason := _backend.doubt(backend, family, first if isinstance(first, Tensor) else first[0])) is not None:
        raise _backend.BackendError(f"backend {backend!r} cannot serve this call: {reason}")


def _call(run: Callable[..., Any], overload: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return overload(*arguments)
        return run(*arguments)

    return call


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and log-determinants: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def any_grad(*tensors: Tensor | None) -> bool:
    """Does autograd want to hear of this call?"""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def second_order() -> bool:
    """Is the backward pass itself being differentiated (``create_graph=True``)?"""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def reference_vjp(
    reference: Callable[..., Any], inputs: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradient of ``reference(*inputs)`` as a differentiable function: what a backward kernel is not."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    outputs = reference(*inputs)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    found = iter(
        torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True)
    )
    return tuple(next(found) if t is not None and t.requires_grad else None for t in inputs)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Ops compute in float32 as a whole; autocast would narrow the products of a reference."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
