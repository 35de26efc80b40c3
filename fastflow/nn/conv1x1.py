"""Invertible 1x1 convolutions, and the matrices of all layers of a model in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastflow.nn._cache import Cache
from fastflow.nn.actnorm import ActNorm
from fastflow.nn.base import Bijection
from fastflow.ops import conv1x1, dense_weights, lu_weights
from fastflow.ops._op import any_grad
from fastflow.ops.conv1x1_weights import Triple

__all__ = ["InvertibleConv1x1", "Weights", "weights"]


class Weights(NamedTuple):
    """One layer in one direction: x -> matrix x + bias, log|det matrix| per position."""

    matrix: Tensor  # [C, C]
    bias: Tensor  # [C]
    logdet: Tensor  # []


def weights(
    layers: Sequence[InvertibleConv1x1], actnorms: Sequence[ActNorm] = (), *, inverse: bool = False
) -> list[Weights]:
    """The matrices of several layers of equal C in one call, differentiable; computed again only when they changed.

    Args:
        layers: all with LU factors or all dense.
        actnorms: none, or for every layer the initialised ActNorm before it, which is folded in.
        inverse: those of the inverse direction, computed in float64.

    Returns:
        one :class:`Weights` per layer, to be passed to its ``forward`` or ``inverse``.

    >>> layers = [InvertibleConv1x1(4) for _ in range(3)]
    >>> x = torch.randn(2, 4, 8, 8)
    >>> for layer, piece in zip(layers, weights(layers)):
    ...     x, logdet = layer(x, weights=piece)
    """
    if not layers:
        return []
    _check_alike(layers, actnorms)
    first, gain = layers[0], actnorms[0].gain if actnorms else 1.0
    names = ("lower", "upper", "log_s", "permutation", "sign_s") if first.lu else ("weight",)
    kinds = [[_tensor(layer, name) for layer in layers] for name in names]
    folded = {f"actnorm_{name}": [_tensor(a, name) for a in actnorms] for name in ("log_scale", "bias")}
    assemble = lu_weights if first.lu else dense_weights

    def build(value: Triple | None = None) -> Triple:
        return assemble(*kinds, **folded, actnorm_gain=gain, inverse=inverse, value=value)

    tensors = [tensor for kind in (*kinds, *folded.values()) for tensor in kind]
    kept = first._cache.get((inverse, len(layers), bool(actnorms), gain), tensors, lambda: _split(build()))
    if kept is None:
        return _split(build())[1]
    value, pieces = kept
    return _split(build(value))[1] if any_grad(*tensors) else list(pieces)


def _tensor(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer, where it is one without the slow way of ``nn.Module.__getattr__``: there are hundreds."""
    for place in (module._parameters, module._buffers):
        if (found := place.get(name)) is not None:
            return found
    return getattr(module, name)  # parametrised


def _split(value: Triple) -> tuple[Triple, list[Weights]]:
    """All layers in one, and the pieces of the layers."""
    return value, [Weights(*piece) for piece in zip(*(t.unbind() for t in value), strict=True)]


def _check_alike(layers: Sequence[InvertibleConv1x1], actnorms: Sequence[ActNorm]) -> None:
    for k, layer in enumerate(layers):
        if layer.lu != layers[0].lu:
            raise ValueError(f"layers[{k}]: expected lu={layers[0].lu} like the first, got lu={layer.lu}")
    if actnorms and len(actnorms) != len(layers):
        raise ValueError(f"actnorms: expected none or {len(layers)}, one for every layer, got {len(actnorms)}")
    for k, layer in enumerate(actnorms):
        layer.require_ready()
        if layer.gain != actnorms[0].gain:
            raise ValueError(f"actnorms[{k}]: expected gain {actnorms[0].gain} like the first, got {layer.gain}")


class InvertibleConv1x1(Bijection):
    r"""Invertible 1x1 convolution :math:`y_{b,:,s} = W x_{b,:,s}`; log-determinant :math:`S \log|\det W|`.

    W starts as a random rotation. With ``lu`` it is :math:`P L (U + \mathrm{diag}(\sigma e^{\log s}))`: P and σ are
    fixed, the log-determinant is :math:`S \sum \log s`. Otherwise W itself is the parameter. W, W⁻¹ and log|det W|
    are computed again only after a change of the parameters, however it was made.

    Args:
        channels: C; x is [B, C, ...] or [B, C].
        lu: parametrise by LU factors: parameters ``lower, upper, log_s``, buffers ``permutation, sign_s``; else by
            ``weight``.
        generator: draws the rotation.

    Paper: Glow, https://arxiv.org/abs/1807.03039.

    >>> layer = InvertibleConv1x1(6)
    >>> x = torch.randn(4, 6, 8, 8)
    >>> z, logdet = layer(x)
    >>> back, minus = layer.inverse(z)
    >>> bool(torch.allclose(back, x, atol=1e-5)), bool(torch.allclose(minus, -logdet))
    (True, True)
    """

    def __init__(self, channels: int, lu: bool = True, generator: torch.Generator | None = None):
        super().__init__()
        self.channels, self.lu = channels, lu
        self._cache = Cache()
        if lu:
            self.lower = nn.Parameter(torch.empty(channels, channels))
            self.upper = nn.Parameter(torch.empty(channels, channels))
            self.log_s = nn.Parameter(torch.empty(channels))
            self.register_buffer("permutation", torch.empty(channels, dtype=torch.int64))
            self.register_buffer("sign_s", torch.empty(channels))
        else:
            self.weight = nn.Parameter(torch.empty(channels, channels))
        self.set_weight(torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64, generator=generator)).Q)

    def extra_repr(self) -> str:
        return f"{self.channels}, lu={self.lu}"

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Makes ``weight`` [C, C] the matrix; with LU factors it is decomposed anew."""
        if weight.shape != (self.channels, self.channels):
            raise ValueError(f"weight: expected shape {[self.channels] * 2}, got {list(weight.shape)}")
        if not self.lu:
            self.weight.copy_(weight)
            return
        permutation, lower, upper = torch.linalg.lu(weight.double())
        diagonal = upper.diagonal()
        if not (diagonal != 0).all():
            raise ValueError("weight: the matrix is singular, its condition inf")
        self.permutation.copy_(permutation.argmax(1))
        self.lower.copy_(lower.tril(-1))
        self.upper.copy_(upper.triu(1))
        self.log_s.copy_(diagonal.abs().log())
        self.sign_s.copy_(diagonal.sign())

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        actnorm: ActNorm | None = None,
        weights: Weights | None = None,
    ) -> tuple[Tensor, Tensor]:
        """W x; or, in the same pass, W actnorm(x), which initialises ``actnorm`` where it is not yet.

        ``weights`` is this layer's piece of :func:`weights`; with one ``actnorm`` is not looked at.
        """
        if weights is None:
            if actnorm is not None and not actnorm.ready:
                actnorm.initialize(x)
            weights = self._piece(actnorm, inverse=False)
        return conv1x1(x, *weights)

    def inverse(
        self,
        z: Tensor,
        context: Tensor | None = None,
        *,
        actnorm: ActNorm | None = None,
        weights: Weights | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The inverse of ``forward``; ``weights`` is this layer's piece of ``weights(..., inverse=True)``."""
        return conv1x1(z, *(weights or self._piece(actnorm, inverse=True)))

    def _piece(self, actnorm: ActNorm | None, inverse: bool) -> Weights:
        return weights([self], [] if actnorm is None else [actnorm], inverse=inverse)[0]
