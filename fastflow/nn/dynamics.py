"""The right hand side f(t, x) of a continuous flow: modules called with the time first, as torchdiffeq does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow.ops import _check

__all__ = ["BottleneckDynamics", "MLPDynamics"]

ACTIVATIONS = ("tanh", "softplus", "elu", "silu", "swish")
LAYERS = ("concat", "concat_squash", "ignore", "squash")

Activation = Literal["tanh", "softplus", "elu", "silu", "swish"]
LayerKind = Literal["concat", "concat_squash", "ignore", "squash"]


class TimeLinear(nn.Module):
    """A linear layer that knows the time: y [B, n] -> [B, m], the kinds of :class:`MLPDynamics`."""

    def __init__(self, inputs: int, outputs: int, kind: LayerKind) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(inputs + (kind == "concat"), outputs)
        self.gate = nn.Linear(1, outputs) if kind in ("concat_squash", "squash") else None
        self.hyper = nn.Linear(1, outputs, bias=False) if kind == "concat_squash" else None

    def parts(self) -> tuple[Tensor, ...]:
        """The tensors of the layer as :func:`fastflow.mlp_trace` takes them."""
        found = [self.linear.weight, self.linear.bias]
        if self.gate is not None:
            found += [self.gate.weight, self.gate.bias]
        if self.hyper is not None:
            found += [self.hyper.weight]
        return tuple(found)

    def forward(self, t: Tensor | float, y: Tensor) -> Tensor:
        weight, bias = self.linear.weight, self.linear.bias
        if self.kind == "concat":
            return F.linear(y, weight[:, 1:], bias + t * weight[:, 0])
        y = F.linear(y, weight, bias)
        if self.gate is not None:
            y = y * torch.sigmoid(t * self.gate.weight[:, 0] + self.gate.bias)
        return y if self.hyper is None else y + t * self.hyper.weight[:, 0]


class MLPDynamics(nn.Module):
    r"""An MLP :math:`f(t, x)`, the dynamics of FFJORD: called with (t, x [B, D]), returns dx/dt [B, D].

    A :class:`fastflow.nn.Continuous` integrates it, with its trace, in one native call.

    Args:
        features: D.
        hidden: the widths of the hidden layers.
        layer: how a layer knows the time:
            ``concat_squash``: :math:`(W y + b)\, \sigma(g t + c) + h t`; ``concat``: :math:`W [t, y] + b`;
            ``squash``: :math:`(W y + b)\, \sigma(g t + c)`; ``ignore``: :math:`W y + b`.
        activation: after every layer but the last: ``tanh``, ``softplus``, ``elu``, ``silu``, or ``swish``, which is
            :math:`a\, \sigma(\beta a)` with a :math:`\beta` learned for every hidden layer. Smooth ones only: the
            trace is made of derivatives.

    The parameters of the paper's code are these under other names: of its layer i, ``_layer`` is ``net[i].linear``,
    ``_hyper_gate`` (``_hyper`` of a squash layer) is ``net[i].gate``, ``_hyper_bias`` is ``net[i].hyper``.

    Paper: FFJORD, https://arxiv.org/abs/1810.01367.

    >>> dynamics = MLPDynamics(2, hidden=(16, 16), activation="softplus")
    >>> dynamics(0.5, torch.randn(5, 2)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (64, 64, 64),
        layer: LayerKind = "concat_squash",
        activation: Activation = "tanh",
    ) -> None:
        super().__init__()
        if not isinstance(hidden, Iterable):
            raise TypeError(f"hidden: expected the width of every hidden layer, got {hidden!r}")
        hidden = tuple(hidden)
        for name, width in (("features", features), *(("hidden", width) for width in hidden)):
            _check.whole(name, width)
        if layer not in LAYERS:
            raise ValueError(f"layer: expected one of {', '.join(LAYERS)}, got {layer!r}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.features, self.layer, self.activation = features, layer, activation
        self.config: dict[str, Any] = {
            "features": features, "hidden": hidden, "layer": layer, "activation": activation
        }  # fmt: skip
        widths = [features, *hidden, features]
        self.net = nn.ModuleList(TimeLinear(n, m, layer) for n, m in zip(widths, widths[1:], strict=False))
        self.beta = nn.Parameter(torch.ones(len(hidden))) if activation == "swish" else None

    def forward(self, t: Tensor | float, x: Tensor) -> Tensor:
        last = len(self.net) - 1
        for i, layer in enumerate(self.net):
            x = layer(t, x)
            x = self._activate(i, x) if i < last else x
        return x

    def _activate(self, i: int, a: Tensor) -> Tensor:
        if self.beta is not None:
            return a * torch.sigmoid(self.beta[i] * a)
        if self.activation == "softplus":
            return F.softplus(a, threshold=50)  # as in ops/trace_mlp.py
        return {"tanh": torch.tanh, "elu": F.elu, "silu": F.silu}[self.activation](a)

    @property
    def layers(self) -> list[tuple[Tensor, ...]]:
        """The tensors of every layer as :func:`fastflow.mlp_ode` and :func:`fastflow.mlp_trace` take them."""
        layers = [layer.parts() for layer in self.net]
        if self.beta is not None:
            layers[:-1] = [(*parts, beta) for parts, beta in zip(layers[:-1], self.beta, strict=True)]
        return layers

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config.items())


class BottleneckDynamics(nn.Module):
    """f(t, x) = decoder(t, encoder(t, x)) through a narrow layer, for ``Continuous(trace="bottleneck")``.

    Args:
        encoder: a module (t, x [B, D]) -> [B, H].
        decoder: a module (t, h [B, H]) -> [B, D].
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, t: Tensor | float, x: Tensor) -> Tensor:
        return self.decoder(t, self.encoder(t, x))
