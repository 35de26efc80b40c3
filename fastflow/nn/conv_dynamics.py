"""The dynamics of a continuous flow on images: convolutions that see the time, with tangents beside the value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow.nn.dynamics import ACTIVATIONS, LAYERS, Activation, LayerKind
from fastflow.ops.trace_mlp import _activate

__all__ = ["ConvDynamics"]


class ConvDynamics(nn.Module):
    r"""dx/dt = f(t, x) on images [B, C, H, W]: 3x3 convolutions of stride 1, an activation after each but the last.

    A layer sees the time t as

    - ``concat``: W * [t, y] + b, t as a channel of its own in front, which ends with the image as all channels do
    - ``concat_squash``: (W * y + b) σ(g t + g₀) + h t, with g, g₀, h for every channel
    - ``squash``: (W * y + b) σ(g t + g₀)
    - ``ignore``: W * y + b

    Args:
        channels: C, of the image and of its derivative.
        hidden: channels of the layers between; at least one.
        layer: how a layer sees the time.
        activation: ``softplus``, ``tanh``, ``elu``, ``silu`` or ``swish``, a σ(β a) with a learned β for every layer
            (which must not become 0).

    :meth:`jvp` has the products of the Jacobian with tangents, from the same convolutions as the value: a
    stack of (1 + S) B images, of which training needs first derivatives only.

    The parameters of the paper's code are these under other names: of its layer i, ``_layer`` is ``net[i].conv``,
    ``_hyper_gate`` (``_hyper`` of a squash layer) is ``net[i].gate``, ``_hyper_bias`` is ``net[i].hyper``.

    Paper: FFJORD, https://arxiv.org/abs/1810.01367.

    >>> dynamics = ConvDynamics(3, hidden=(8, 8))
    >>> x, e = torch.randn(2, 5, 3, 4, 4)
    >>> value, products = dynamics.jvp(0.5, x, e[None])
    >>> value.shape, products.shape, bool(torch.allclose(value, dynamics(0.5, x), atol=1e-6))
    (torch.Size([5, 3, 4, 4]), torch.Size([1, 5, 3, 4, 4]), True)
    """

    def __init__(
        self,
        channels: int,
        hidden: Sequence[int] = (64, 64, 64),
        layer: LayerKind = "concat",
        activation: Activation = "softplus",
    ) -> None:
        super().__init__()
        for name, value, allowed in (("layer", layer, LAYERS), ("activation", activation, ACTIVATIONS)):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
        if not hidden or min(channels, *hidden) < 1:
            raise ValueError(
                f"channels, hidden: expected numbers of channels and at least one layer between, "
                f"got {channels} and {tuple(hidden)}"
            )
        self.channels, self.hidden, self.layer, self.activation = channels, tuple(hidden), layer, activation
        widths = (channels, *self.hidden, channels)
        self.net = nn.ModuleList(TimeConv2d(*pair, layer) for pair in zip(widths[:-1], widths[1:], strict=True))
        self.beta = nn.Parameter(torch.ones(len(self.hidden))) if activation == "swish" else None
        self.to(memory_format=torch.channels_last)

    def extra_repr(self) -> str:
        return f"{self.channels}, hidden={self.hidden}, layer={self.layer!r}, activation={self.activation!r}"

    def forward(self, t: Tensor | float, x: Tensor) -> Tensor:
        """f(t, x), like x."""
        self._check(x)
        phi = _PHI["silu" if self.activation == "swish" else self.activation]
        y, shift = self._run(t, x, lambda a, shift: phi(a + shift))
        return y + shift

    def jvp(self, t: Tensor | float, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """f(t, x) and the products :math:`J e_s` [S, B, C, H, W] of its Jacobian with tangents of that shape."""
        self._check(x)
        if tangents.dim() != 5 or tangents.shape[1:] != x.shape:
            raise ValueError(f"tangents: expected [S, *{list(x.shape)}] like x, got {list(tangents.shape)}")
        parts = tangents.shape[:2]  # S, B
        activation = "silu" if self.activation == "swish" else self.activation
        # the images, then those of every tangent: one convolution for all
        stack = torch.cat([x, tangents.to(x.dtype).flatten(0, 1)])
        y, shift = self._run(t, stack, lambda a, shift: _Activate.apply(a, shift, activation, parts))
        return y[: parts[1]] + shift, y[parts[1] :].unflatten(0, parts)

    def _run(self, t: Tensor | float, y: Tensor, activate: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The last layer's W * y and what is to be added to it; ``activate`` has both from the layers before."""
        t = torch.as_tensor(t, dtype=y.dtype, device=y.device)
        y = y.contiguous(memory_format=torch.channels_last)
        last = len(self.net) - 1
        for i, layer in enumerate(self.net):
            weight, shift = layer(t, y.shape[2:])
            if self.beta is not None:  # swish is silu between layers that multiply by beta and divide by it
                if i < last:
                    weight, shift = weight * self.beta[i], shift * self.beta[i]
                if i > 0:
                    weight = weight / self.beta[i - 1]
            y = F.conv2d(y, weight, padding=1)
            if i < last:
                y = activate(y, shift)
        return y, shift

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x: expected [B, {self.channels}, H, W], got {list(x.shape)}")


class TimeConv2d(nn.Module):
    """A 3x3 convolution that knows the time, the kinds of :class:`ConvDynamics`; called, it is W * y + shift at t."""

    def __init__(self, channels: int, out: int, kind: LayerKind) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(channels + (kind == "concat"), out, 3, padding=1)
        self.gate = nn.Linear(1, out) if kind in ("concat_squash", "squash") else None
        self.hyper = nn.Linear(1, out, bias=False) if kind == "concat_squash" else None

    def forward(self, t: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """W [out, C, 3, 3] and the shift [1, out, 1 or H, 1 or W] for images of a size (H, W)."""
        weight, shift = self.conv.weight, self.conv.bias
        if self.kind == "concat":
            # the channel of time is zero beyond the border, so that the shift depends on the position
            return weight[:, 1:], F.conv2d(t.expand(1, 1, *size), weight[:, :1], shift, padding=1)
        if self.gate is not None:
            gate = torch.sigmoid(t * self.gate.weight[:, 0] + self.gate.bias)
            weight, shift = gate.view(-1, 1, 1, 1) * weight, gate * shift
        if self.hyper is not None:
            shift = shift + t * self.hyper.weight[:, 0]
        return weight, shift.view(1, -1, 1, 1)


class _Activate(torch.autograd.Function):
    """phi(a + shift) of the value's images, phi'(a + shift) a' of the tangents' behind them.

    a [(1 + S) B, C, H, W]; shift [1, C, 1 or H, 1 or W]. Written out for its memory: it keeps a alone. Its backward
    is of torch's own functions, and so has a derivative itself.
    """

    @staticmethod
    def forward(ctx, a, shift, activation, parts):
        ctx.save_for_backward(a, shift)
        ctx.activation, ctx.parts = activation, parts
        batch = parts[1]
        y, slope = _activate(a[:batch] + shift, activation)
        out = torch.empty_like(a)
        out[:batch] = y
        torch.mul(a[batch:].unflatten(0, parts), slope, out=out[batch:].unflatten(0, parts))
        return out

    @staticmethod
    def backward(ctx, grad):
        a, shift = ctx.saved_tensors
        batch = ctx.parts[1]
        slope, curvature = _slopes(a[:batch] + shift, ctx.activation)
        tangents, gtangents = (v[batch:].unflatten(0, ctx.parts) for v in (a, grad))
        ginner = torch.addcmul(grad[:batch] * slope, curvature, (tangents * gtangents).sum(0))
        return torch.cat([ginner, (gtangents * slope).flatten(0, 1)]), ginner.sum_to_size(shift.shape), None, None


_PHI = {"tanh": torch.tanh, "softplus": partial(F.softplus, threshold=50), "elu": F.elu, "silu": F.silu}


def _slopes(a: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """phi'(a) and phi''(a)."""
    if activation == "tanh":
        y = torch.tanh(a)
        slope = 1 - y * y
        return slope, -2 * y * slope
    if activation == "elu":
        slope = torch.exp(a.clamp(max=0))
        return slope, torch.where(a > 0, 0, slope)
    s = torch.sigmoid(a)
    if activation == "softplus":
        return s, s * (1 - s)
    return s * (1 + a * (1 - s)), s * (1 - s) * (2 + a * (1 - 2 * s))
