"""Convolutions that see only what precedes a position, weight normalisation, and the flow made of them (IAF)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastflow.nn.actnorm import statistics
from fastflow.nn.base import Bijection
from fastflow.ops._op import accumulator

__all__ = ["ConvAutoregressive", "MaskedConv2d", "WeightNormConv2d", "conv_mask", "conv_order"]

Order = Literal["raster", "antiraster"]


# --- orders and masks -----------------------------------------------------------------------------------


def conv_order(channels: int, height: int, width: int, groups: int, order: Order = "antiraster") -> Tensor:
    """The rank [C, H, W] of every element: what has rank r may depend on the ranks below r only.

    ``raster`` goes through the rows downwards, each from left to right; ``antiraster`` the other way round. At a pixel
    the channels follow each other in ``groups`` equal runs, the first channels first, in both orders.
    """
    pixel = torch.arange(height * width).view(1, height, width)
    if order == "antiraster":
        pixel = pixel.flip(1, 2)
    return pixel * groups + _degrees(channels, groups, 1).view(-1, 1, 1)


def _degrees(channels: int, groups: int, copies: int) -> Tensor:
    """The group of every channel: ``copies`` runs of the groups side by side."""
    each = channels // copies
    return (torch.arange(each) * groups // each).repeat(copies)


def conv_mask(
    inputs: int, outputs: int, kernel: int, groups: int, strict: bool, order: Order = "antiraster", copies: int = 1
) -> Tensor:
    """The taps [outputs, inputs, k, k] that :func:`conv_order` allows: bool.

    Pixels that come before count whole. At the pixel itself an output of group j sees the inputs of the groups below
    j, and those of group j unless ``strict``. ``copies``: the outputs are that many runs of the groups side by side.
    """
    if order not in ("raster", "antiraster"):
        raise ValueError(f"order: expected raster or antiraster, got {order!r}")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel: expected an odd size, got {kernel}")
    if outputs % copies:
        raise ValueError(f"outputs: expected a multiple of copies = {copies}, got {outputs}")
    if groups < 1:
        raise ValueError(f"groups: expected at least 1, got {groups}")
    tap = torch.arange(kernel * kernel).view(kernel, kernel)
    before = tap < kernel * kernel // 2 if order == "raster" else tap > kernel * kernel // 2
    mask = before.expand(outputs, inputs, -1, -1).clone()
    seen, seeing = _degrees(inputs, groups, 1)[None, :], _degrees(outputs, groups, copies)[:, None]
    mask[:, :, kernel // 2, kernel // 2] = seen < seeing if strict else seen <= seeing
    return mask


# --- convolutions ---------------------------------------------------------------------------------------


class WeightNormConv2d(nn.Module):
    r"""A convolution with weights :math:`g_o\, v_o / \|v_o\|`; [B, in, H, W] -> [B, out, H / stride, W / stride].

    The first batch sets g and the bias, in training and evaluation alike, so that every channel of the output has
    mean 0 and standard deviation ``init_scale`` (over all ranks of torch.distributed); a constant one stays finite.

    Args:
        inputs, outputs, kernel, stride: of the convolution; it pads with zeros.
        upsample: a transposed convolution, [B, out, H stride, W stride].
        normalize: False is a convolution with plain weights, and nothing that a batch sets.

    Paper: https://arxiv.org/abs/1602.07868.

    >>> layer = WeightNormConv2d(3, 8)
    >>> y = layer(torch.randn(16, 3, 8, 8))
    >>> y.shape, round(y.std().item(), 2)
    (torch.Size([16, 8, 8, 8]), 0.1)
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        upsample: bool = False,
        init_scale: float = 0.1,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.stride, self.upsample, self.init_scale, self.normalize = stride, upsample, init_scale, normalize
        shape = (inputs, outputs) if upsample else (outputs, inputs)
        self.weight = nn.Parameter(0.05 * torch.randn(*shape, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        if normalize:
            self.gain = nn.Parameter(torch.ones(outputs))
            self.register_buffer("initialized", torch.tensor(False))
        self._ready = not normalize  # the buffer on the host

    @property
    def ready(self) -> bool:
        """Has a batch set the parameters (or a checkpoint that one had set)?"""
        return self._ready

    def direction(self) -> Tensor:
        """v"""
        return self.weight

    def _direction(self) -> Tensor:
        """v / |v|, or v where nothing is normalised."""
        v = self.direction()
        if not self.normalize:
            return v
        others = (0, 2, 3) if self.upsample else (1, 2, 3)
        return v * torch.rsqrt(v.square().sum(others, keepdim=True).clamp(min=1e-12))

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = weight.shape[-1] // 2
        if self.upsample:
            return F.conv_transpose2d(x, weight, bias, self.stride, padding, self.stride - 1)
        return F.conv2d(x, weight, bias, self.stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        if not self._ready:
            self.initialize(x)
        weight = self._direction()
        if self.normalize:
            weight = weight * (self.gain.view(1, -1, 1, 1) if self.upsample else self.gain.view(-1, 1, 1, 1))
        return self._conv(x, weight, self.bias)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Sets gain and bias from a batch [B, in, H, W]."""
        mean, std = statistics(self._conv(x, self._direction(), None))
        gain = self.init_scale / torch.where(std > 1e-6, std, torch.ones_like(std))
        self.gain.copy_(gain)
        self.bias.copy_(-mean * gain)
        self.initialized.fill_(True)
        self._ready = True

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.normalize and not self.initialized.is_meta:
            self._ready = bool(self.initialized)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, stride={self.stride}, upsample={self.upsample}, normalize={self.normalize}"


class MaskedConv2d(WeightNormConv2d):
    """A convolution of stride 1 whose output at an element depends on what comes before it in a fixed order.

    Args:
        inputs, outputs, kernel: of the convolution.
        groups: runs of channels that follow each other at a pixel: the channels of the variable for a network that is
            autoregressive in the channels too, 1 for one in space only, as PixelCNN's: its mask A is then
            ``strict=True``, its mask B ``strict=False``. Hidden channels are shared out over the groups evenly.
        strict: an output does not see its own group at its own pixel.
        order: ``raster`` or ``antiraster``, :func:`conv_order`.
        copies: the outputs are this many sets of channels side by side, each in that order.
        normalize: weight normalisation with initialisation from data, :class:`WeightNormConv2d`.

    Papers: https://arxiv.org/abs/1606.04934 (IAF), https://arxiv.org/abs/1601.06759 (PixelCNN).

    >>> layer = MaskedConv2d(2, 4, groups=2, strict=True, copies=2)
    >>> layer.mask[:, :, 1, 1].int().tolist(), layer.mask[0, 0].int().tolist()
    ([[0, 0], [1, 0], [0, 0], [1, 0]], [[0, 0, 0], [0, 0, 1], [1, 1, 1]])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        *,
        groups: int = 1,
        strict: bool = False,
        order: Order = "antiraster",
        copies: int = 1,
        init_scale: float = 0.1,
        normalize: bool = False,
    ) -> None:
        mask = conv_mask(inputs, outputs, kernel, groups, strict, order, copies)
        super().__init__(inputs, outputs, kernel, init_scale=init_scale, normalize=normalize)
        self.register_buffer("mask", mask, persistent=False)
        self.order = order

    def direction(self) -> Tensor:
        return self.weight * self.mask

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # without the rows of the kernel that are masked whole, and the rows of output that then lie outside
        half = weight.shape[-1] // 2
        if self.order == "raster":
            return F.conv2d(x, weight[:, :, : half + 1], bias, padding=half)[:, :, : x.shape[2]]
        return F.conv2d(x, weight[:, :, half:], bias, padding=half)[:, :, half:]


# --- the flow ---------------------------------------------------------------------------------------------


class ConvAutoregressive(Bijection):
    r"""Inverse autoregressive step on feature maps: :math:`z' = (z - m) e^{-s}`, log-determinant :math:`-\sum s`.

    m and s come from masked convolutions, each times ``gain``: of an element they see only what comes before it in
    :func:`conv_order`, and the context. ``forward`` is one pass of the network: z_0 -> z_K of a posterior.

    ``inverse`` is slow. It repeats :math:`z \leftarrow z' e^{s(z)} + m(z)`; every pass sets right all elements
    whose predecessors already are, so that pixels far enough apart advance together: at most
    (W + (kernel // 2 + 1) (H - 1)) * groups passes, and it stops when nothing changes any more, usually after few. It
    is exact, not approximate, and differentiable once; it waits for a device after every pass.

    Args:
        channels: C of z [B, C, H, W].
        hidden: widths of the hidden layers; the context [B, hidden[0], H, W] is added after the first.
        kernel: of all convolutions.
        groups: C (the default) for an order in the channels too, 1 for one in space only; must divide C.
        order: ``raster`` or ``antiraster``, what openai/iaf has.
        gain: factor on m and s; small, so that the step starts near the identity.
        normalize: weight normalisation with initialisation from data.

    Shapes: z [B, C, H, W], context [B, hidden[0], H, W] or None -> z' [B, C, H, W], logdet [B].

    Paper: https://arxiv.org/abs/1606.04934.

    >>> step = ConvAutoregressive(4, hidden=(8,))
    >>> z = torch.randn(2, 4, 5, 5)
    >>> y, logdet = step(z)
    >>> bool(torch.allclose(step.inverse(y)[0], z, atol=1e-5))
    True
    """

    def __init__(
        self,
        channels: int,
        hidden: Sequence[int] = (160, 160),
        kernel: int = 3,
        *,
        groups: int | None = None,
        order: Order = "antiraster",
        gain: float = 0.1,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        groups = channels if groups is None else groups
        if groups < 1 or channels % groups:
            raise ValueError(f"groups: expected a divisor of channels = {channels}, got {groups}")
        if not hidden:
            raise ValueError("hidden: expected the width of at least one hidden layer, got none")
        self.channels, self.kernel, self.groups, self.order, self.gain = channels, kernel, groups, order, gain
        common = {"groups": groups, "order": order, "normalize": normalize}
        sizes = [channels, *hidden]
        self.hidden = nn.ModuleList(
            MaskedConv2d(a, b, kernel, **common) for a, b in zip(sizes, sizes[1:], strict=False)
        )
        self.last = MaskedConv2d(sizes[-1], 2 * channels, kernel, strict=True, copies=2, **common)

    @property
    def context_features(self) -> int:
        """Channels of the context."""
        return self.hidden[0].bias.numel()

    def network(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(m, s), both like z."""
        h = z
        for i, layer in enumerate(self.hidden):
            h = layer(h)
            if i == 0 and context is not None:
                h = h + context
            h = F.elu(h)
        mean, log_scale = (self.gain * self.last(h)).chunk(2, 1)
        return mean, log_scale

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_scale = self.step(z, context)
        return z, -_sum(log_scale)

    def step(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(z', s): the forward with the log-determinant of every element, for a KL by channel."""
        self._check(z, context)
        mean, log_scale = self.network(z, context)
        return (z - mean) * torch.exp(-log_scale), log_scale

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(z, context)
        return _Solve.apply(self, z, context, *self.parameters())

    def passes(self, height: int, width: int) -> int:
        """Passes after which the inverse is exact whatever the weights."""
        # a pixel k rows further on sees at most k * (kernel // 2) pixels ahead in its row
        return (width + (self.kernel // 2 + 1) * (height - 1)) * self.groups

    def _check(self, z: Tensor, context: Tensor | None) -> None:
        if z.dim() != 4 or z.shape[1] != self.channels:
            raise ValueError(f"z: expected [B, {self.channels}, H, W], got {list(z.shape)}")
        expected = (len(z), self.context_features, *z.shape[2:])
        if context is not None and tuple(context.shape) != expected:
            raise ValueError(f"context: expected {list(expected)} beside z, got {list(context.shape)}")

    def extra_repr(self) -> str:
        return f"{self.channels}, groups={self.groups}, order={self.order}, gain={self.gain}"


def _sum(elements: Tensor) -> Tensor:
    return elements.flatten(1).sum(1, dtype=accumulator(elements.dtype))


class _Solve(torch.autograd.Function):
    """(z, logdet) with forward(z) = y, and the gradient of a function given by its inverse."""

    @staticmethod
    def forward(ctx, layer: ConvAutoregressive, y: Tensor, context: Tensor | None, *parameters: Tensor):
        z, log_scale = torch.zeros_like(y), torch.zeros_like(y)
        for _ in range(layer.passes(*y.shape[2:]) if y.numel() else 0):
            # what is not yet right may overflow, and times a masked weight would spoil what is
            mean, log_scale = layer.network(z.nan_to_num(0.0, 0.0, 0.0), context)
            previous, z = z, y * torch.exp(log_scale) + mean
            if torch.equal(z, previous):
                break
        ctx.layer, ctx.with_context = layer, context is not None
        ctx.save_for_backward(z, context)
        return z, _sum(log_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_z: Tensor, grad_logdet: Tensor):
        saved, context = ctx.saved_tensors
        layer, parameters = ctx.layer, list(ctx.layer.parameters())
        with torch.enable_grad():
            z = saved.detach().requires_grad_()
            extra = [context.detach().requires_grad_()] if ctx.with_context else []
            y, log_scale = layer.step(z, *extra)
            # the loss is grad_z z + grad_logdet logdet, with logdet = sum of s at z
            direct = (log_scale * grad_logdet.to(z.dtype).view(-1, 1, 1, 1)).sum()
            known = grad_z + torch.autograd.grad(direct, z, retain_graph=True)[0]
            # u with (dy/dz)^T u = known; dy/dz is triangular with the diagonal e^-s
            scale = torch.exp(log_scale.detach())
            u = known * scale
            for _ in range(layer.passes(*z.shape[2:])):
                step = scale * (known - torch.autograd.grad(y, z, u, retain_graph=True)[0])
                u = u + step
                if not step.any():
                    break
            wanted = [*extra, *parameters]
            grads = torch.autograd.grad(direct - (y * u).sum(), wanted, allow_unused=True)
        return None, u, *([] if ctx.with_context else [None]), *grads
