"""How well a model inverts itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastflow.nn.base import Bijection, Sequential

__all__ = ["InverseError", "inverse_error"]


@dataclass(frozen=True)
class InverseError:
    """Round-trip errors: of every layer on the input it gets in the chain, and of the whole chain."""

    layers: tuple[tuple[str, float, float], ...]
    """(name and class, max |x - f^-1(f(x))|, max |logdet forward + logdet inverse|)"""
    chain: tuple[float, float]
    """The same two numbers for the whole model."""

    def __str__(self) -> str:
        rows = [*self.layers, ("whole chain", *self.chain)]
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{'layer':<{width}}  max |x - f^-1(f(x))|  max |logdet sum|"]
        lines += [f"{name:<{width}}  {error:>20.3g}  {logdet:>16.3g}" for name, error, logdet in rows]
        return "\n".join(lines)


@torch.no_grad()
def inverse_error(model: nn.Module, x: Tensor, context: Tensor | None = None) -> InverseError:
    """Sends x through every layer and back; ``print`` the result for a table.

    ``model`` is a :class:`Bijection`, or a module with one as its ``bijection``, such as a Flow; nested
    :class:`Sequential` are walked into. Raises TypeError for anything else.

    >>> from fastflow.nn import Permutation, Squeeze
    >>> print(inverse_error(Sequential(Squeeze(), Permutation(4)), torch.randn(2, 1, 4, 4)))
    layer            max |x - f^-1(f(x))|  max |logdet sum|
    0 (Squeeze)                         0                 0
    1 (Permutation)                     0                 0
    whole chain                         0                 0
    """
    bijection = model if isinstance(model, Bijection) else getattr(model, "bijection", None)
    if not isinstance(bijection, Bijection):
        raise TypeError(f"model: expected a Bijection or a module with one as .bijection, got {type(model).__name__}")
    prefix = "" if bijection is model else "bijection"
    rows, layer_input = [], x
    for name, layer in _walk(bijection, prefix):
        layer_input, error = _round_trip(layer, layer_input, context)
        rows.append((f"{name} ({type(layer).__name__})".lstrip(), *error))
    return InverseError(tuple(rows), _round_trip(bijection, x, context)[1])


def _walk(bijection: Bijection, name: str) -> Iterator[tuple[str, Bijection]]:
    if not isinstance(bijection, Sequential):
        yield name, bijection
        return
    for child, layer in bijection.named_children():
        yield from _walk(layer, f"{name}.{child}" if name else child)


def _round_trip(layer: Bijection, x: Tensor, context: Tensor | None) -> tuple[Tensor, tuple[float, float]]:
    z, logdet = layer(x, context)
    back, minus = layer.inverse(z, context)
    return z, (_largest(back - x), _largest(logdet + minus))


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0
