"""The MLP of csrc/cuda/dynamics.cuh: its parameters packed into one tensor, and where they and its rows lie."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastflow.ops.cuda.plan import Address, Field
from fastflow.ops.trace_mlp import ACTIVATIONS, LAYERS, _layers

__all__ = ["MOST_LAYERS", "Network", "Places", "network", "pack", "unpack"]

MOST_LAYERS = 16  # kLayers
UNITS, VECTORS = 4, 4  # kUnits; bias, shift, gate, gate bias


class Network(NamedTuple):
    """A network's sizes, all that a plan needs of it."""

    widths: tuple[int, ...]
    """D, those of the hidden layers, D."""
    layer: int
    activation: int

    @property
    def gated(self) -> bool:
        return LAYERS[self.layer] == "concat_squash"

    @property
    def padded(self) -> list[int]:
        return [-(-m // UNITS) * UNITS for m in self.widths[1:]]

    @property
    def starts(self) -> list[int]:
        """Where each layer begins among the packed parameters, and their number."""
        starts = [0]
        for n, m in zip(self.widths[:-1], self.padded, strict=True):
            starts.append(starts[-1] + (n + VECTORS) * m)
        return starts

    @property
    def kept(self) -> int:
        """Rows of units that the reverse needs: outputs, and what is before the gates where these are needed."""
        linear = self.gated or ACTIVATIONS[self.activation] == "silu"
        return (2 if linear else 1) * sum(self.widths[1:])

    def fields(self, packed: int, copied: bool, tangents: int) -> list[Field]:
        """struct Net"""
        out, depth = self.widths[1:], len(self.widths) - 1
        fields: list[Field] = [Address(packed), self.starts[-1], int(copied), depth, self.activation, int(self.gated)]
        fields += [self.widths[0], tangents, max(self.padded), sum(out)]
        for i, (n, m) in enumerate(zip(self.widths[:-1], out, strict=True)):
            fields += [n, m, self.starts[i], sum(out[:i])]
        return fields + [0] * (4 * (MOST_LAYERS - depth))


@functools.lru_cache(maxsize=256)
def _network(shapes: tuple[int, ...], layer: int, activation: int) -> Network:
    return Network(shapes, layer, activation)


def network(x: Tensor, params: Sequence[Tensor], layer: int, activation: int) -> Network:
    """The network of these parameters."""
    return _network((x.shape[1], *(p[0].shape[0] for p in _layers(params, layer))), layer, activation)


def _parts(params: Sequence[Tensor], layer: int) -> list[Tensor]:
    """Views of the parameters, or of their gradients, in the order in which they are packed."""
    parts: list[Tensor] = []
    for weight, bias, *gating in _layers(params, layer):
        if LAYERS[layer] == "concat":
            parts += [weight[:, 1:].t(), bias, weight[:, 0]]
        elif gating:
            gate, gate_bias, hyper = gating
            parts += [weight.t(), bias, hyper[:, 0], gate[:, 0], gate_bias]
        else:
            parts += [weight.t(), bias]
    return parts


def _places(packed: Tensor, net: Network) -> list[Tensor]:
    """The same views of the packed parameters."""
    vectors = {"ignore": 1, "concat": 2, "concat_squash": 4}[LAYERS[net.layer]]
    places: list[Tensor] = []
    sizes = zip(net.widths[:-1], net.widths[1:], net.padded, net.starts[:-1], strict=True)
    for n, m, padded, start in sizes:
        rows = packed[start : start + (n + VECTORS) * padded].view(n + VECTORS, padded)[:, :m]
        places += [rows[:n], *rows[n : n + vectors].unbind(0)]
    return places


def pack(params: Sequence[Tensor], net: Network) -> Tensor:
    """[starts[-1]]: of every layer the weight transposed, then its vectors, padded with zeros."""
    packed = params[0].new_zeros(net.starts[-1])
    torch._foreach_copy_(_places(packed, net), _parts(params, net.layer))
    return packed


def unpack(packed: Tensor, net: Network, params: Sequence[Tensor]) -> None:
    """The other way, into ``params``."""
    torch._foreach_copy_(_parts(params, net.layer), _places(packed, net))


class Places:
    """Arrays in shared memory, one after the other on 16 bytes."""

    def __init__(self, element: int):
        self.element, self.starts, self.bytes = element, [], 0

    def take(self, *counts: int, element: int | None = None) -> Places:
        for count in counts:
            self.starts.append(self.bytes)
            self.bytes += -(-count * (element or self.element) // 16) * 16
        return self
