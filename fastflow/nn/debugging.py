"""Which layer went non-finite first."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fastflow.nn.base import Bijection
from fastflow.nn.base_distribution import Base
from fastflow.nn.flow import Flow

__all__ = ["NonFiniteError", "debug"]


class NonFiniteError(FloatingPointError):
    """A layer's output has NaN or infinite elements."""


class debug:  # noqa: N801  (used like torch.no_grad)
    """Names the first layer whose output is NaN or infinite, by raising :class:`NonFiniteError`.

    ``debug()`` switches this on and ``debug(False)`` off, for all modules of the process; as a context manager it goes
    back to what was before. On, every output is read once more; off, nothing is left behind. It sees modules that run
    eagerly, not the inside of a compiled graph.

    >>> import torch
    >>> from fastflow.nn import Permutation
    >>> with debug():
    ...     Permutation(2)(torch.tensor([[1.0, float("nan")]]))
    Traceback (most recent call last):
    fastflow.nn.debugging.NonFiniteError: Permutation, forward: value has 1 NaN among 2 elements; its input already had
    """

    def __init__(self, on: bool = True) -> None:
        self._before = bool(_undo)
        _switch(on)

    def __enter__(self) -> debug:
        return self

    def __exit__(self, *_: Any) -> None:
        _switch(self._before)


_undo: list[Callable[[], None]] = []  # not empty while on


class _Running(threading.local):
    """The modules that are running, the outermost first."""

    def __init__(self) -> None:
        self.stack: list[nn.Module] = []


_running = _Running()


def _switch(on: bool) -> None:
    if on and not _undo:
        before = register_module_forward_pre_hook(lambda module, inputs: _running.stack.append(module))
        after = register_module_forward_hook(_after_forward, always_call=True)
        _undo.extend((before.remove, after.remove))
        # forward has hooks; the other ways into a flow have none and are wrapped
        for kind, names in _ENTRIES.items():
            for cls in _subclasses(kind):
                for name in names:
                    if name in vars(cls):
                        _wrap(cls, name)
    elif not on:
        while _undo:
            _undo.pop()()
        _running.stack.clear()


_ENTRIES = {
    Bijection: ("inverse",),
    Base: ("log_prob", "sample_and_log_prob"),
    Flow: ("log_prob", "sample_and_log_prob"),
}


def _subclasses(cls: type) -> Iterator[type]:
    yield cls
    for child in cls.__subclasses__():
        yield from _subclasses(child)


def _wrap(cls: type, name: str) -> None:
    original = vars(cls)[name]

    @functools.wraps(original)
    def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _running.stack.append(self)
        try:
            output = original(self, *args, **kwargs)
            _check(self, name, args, output)
        finally:
            if _running.stack:
                _running.stack.pop()
        return output

    setattr(cls, name, watched)
    _undo.append(lambda: setattr(cls, name, original))


def _after_forward(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    try:
        _check(module, "forward", inputs, output)
    finally:
        if _running.stack:  # empty for a module that began before debug was on
            _running.stack.pop()


def _check(module: nn.Module, direction: str, inputs: tuple[Any, ...], output: Any) -> None:
    outputs = output if isinstance(output, tuple) else (output,)
    labels = ("value", "logdet") if isinstance(module, Bijection) else ()
    for i, tensor in enumerate(outputs):
        if _finite(tensor):
            continue
        what = labels[i] if i < len(labels) else "output" if len(outputs) == 1 else f"output {i}"
        nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
        counts = " and ".join(f"{n} {kind}" for n, kind in ((nan, "NaN"), (infinite, "infinite")) if n)
        came = "" if all(_finite(t) for t in inputs) else "; its input already had"
        raise NonFiniteError(f"{_name(module)}, {direction}: {what} has {counts} among {tensor.numel()} elements{came}")


def _finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(value.isfinite().all())


def _name(module: nn.Module) -> str:
    """The module's name in the outermost one that is running, and its class."""
    names = {id(m): name for name, m in _running.stack[0].named_modules()} if _running.stack else {}
    return f"{names.get(id(module), '')} ({type(module).__name__})" if names.get(id(module)) else type(module).__name__
