"""How well a model inverts itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastflow.nn.base import Bijection, Sequential

__all__ = ["InverseError", "inverse_error"]


@dataclass(frozen=True)
class InverseError:
    """Round-trip errors: of every layer on the input it gets in the chain, and of the whole chain."""

    layers: tuple[tuple[str, float, float], ...]
    """(name and class, max |x - f^-1(f(x))|, max |logdet forward + logdet inverse|), in the order of the calls."""
    chain: tuple[float, float | None]
    """The same two numbers for the whole model; its second is None where the inverse has no log-determinant."""

    def __str__(self) -> str:
        rows = [*self.layers, ("whole chain", *self.chain)]
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{'layer':<{width}}  max |x - f^-1(f(x))|  max |logdet sum|"]
        for name, error, logdet in rows:
            lines.append(f"{name:<{width}}  {error:>20.3g}  {'-' if logdet is None else format(logdet, '.3g'):>16}")
        return "\n".join(lines)


@torch.no_grad()
def inverse_error(model: nn.Module, x: Tensor, context: Tensor | None = None) -> InverseError:
    """Sends x through the model and back, and every layer's input through that layer and back.

    ``model`` is a :class:`Bijection`, a module with one as its ``bijection`` (Flow), or one with ``encode`` and
    ``decode`` (Glow); TypeError for anything else. Layers are the bijections that it calls, of a :class:`Sequential`
    its parts. ``print`` the result for a table.

    >>> from fastflow.nn import Permutation, Squeeze
    >>> print(inverse_error(Sequential(Squeeze(), Permutation(4)), torch.randn(2, 1, 4, 4)))
    layer            max |x - f^-1(f(x))|  max |logdet sum|
    0 (Squeeze)                         0                 0
    1 (Permutation)                     0                 0
    whole chain                         0                 0
    """
    calls: list[tuple[str, Bijection, Tensor, Tensor | None, tuple[Tensor, Tensor]]] = []
    hooks = [layer.register_forward_hook(_recorder(name, calls), with_kwargs=True) for name, layer in _layers(model)]
    try:
        forward = _forward(model, x, context)
    finally:
        for hook in hooks:
            hook.remove()
    rows = []
    for name, layer, given, layer_context, output in calls:
        rows.append((f"{name} ({type(layer).__name__})".lstrip(), *_back(layer, given, layer_context, output)))
    if isinstance(forward[0], list):
        return InverseError(tuple(rows), (_largest(model.decode(forward[0], context) - x), None))
    return InverseError(tuple(rows), _back(_bijection(model), x, context, forward))


def _layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, Bijection]]:
    """The outermost bijections that are no chain."""
    if isinstance(module, Bijection) and not isinstance(module, Sequential):
        yield name, module
        return
    for child, inner in module.named_children():
        yield from _layers(inner, f"{name}.{child}" if name else child)


def _recorder(name: str, calls: list) -> Any:
    def record(layer: Bijection, inputs: tuple, keywords: dict, output: tuple[Tensor, Tensor]) -> None:
        context = inputs[1] if len(inputs) > 1 else keywords.get("context")
        calls.append((name, layer, inputs[0], context, output))

    return record


def _bijection(model: nn.Module) -> Bijection:
    bijection = model if isinstance(model, Bijection) else getattr(model, "bijection", None)
    if not isinstance(bijection, Bijection):
        raise TypeError(
            "model: expected a Bijection, a module with one as .bijection, or one with encode and decode, "
            f"got {type(model).__name__}"
        )
    return bijection


def _forward(model: nn.Module, x: Tensor, context: Tensor | None) -> tuple[Tensor | list[Tensor], Tensor]:
    if hasattr(model, "encode") and hasattr(model, "decode"):
        return model.encode(x, context)
    return _bijection(model)(x, context)


def _back(layer: Bijection, x: Tensor, context: Tensor | None, output: tuple[Tensor, Tensor]) -> tuple[float, float]:
    back, minus = layer.inverse(output[0], context)
    return _largest(back - x), _largest(output[1] + minus)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0
