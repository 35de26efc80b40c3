"""Glow: multi-scale flow of ActNorm, invertible 1x1 convolution and affine coupling, with learned split priors.

Kingma & Dhariwal, 2018, https://arxiv.org/abs/1807.03039.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow.nn.actnorm import ActNorm
from fastflow.nn.base import Bijection, no_logdet
from fastflow.nn.conv1x1 import InvertibleConv1x1, Weights, weights
from fastflow.nn.coupling import AdditiveCoupling, AffineCoupling
from fastflow.nn.permutation import Permutation
from fastflow.nn.reshape import Squeeze
from fastflow.nn.split_prior import SplitPrior
from fastflow.ops import gaussian_log_prob, gaussian_sample

__all__ = ["Glow", "GlowStep", "NormConv2d", "ZeroConv2d", "ChannelPrior", "conditioner", "PRESETS"]

Padding = Literal["zeros", "ones", "edge"]

PRESETS: dict[str, dict[str, Any]] = {
    # openai/glow: the runs behind the published bits per dimension
    "openai-cifar10": {"image_shape": (3, 32, 32), "levels": 3, "steps": 32, "hidden": 512, "gain": 3.0,
                       "permutation": "dense", "padding": "edge"},
    "openai-imagenet32": {"image_shape": (3, 32, 32), "levels": 3, "steps": 48, "hidden": 512, "gain": 3.0,
                          "permutation": "dense", "padding": "edge"},
    "openai-imagenet64": {"image_shape": (3, 64, 64), "levels": 4, "steps": 48, "hidden": 512, "gain": 3.0,
                          "permutation": "dense", "padding": "edge"},
    # rosinality/glow-pytorch
    "rosinality-celeba64": {"image_shape": (3, 64, 64), "levels": 4, "steps": 32, "hidden": 512, "padding": "ones",
                            "packing": "chunk_st", "net_norm": False},
    # normflows' example: plain convolutions, an unconditional prior on every part
    "normflows-cifar10": {"image_shape": (3, 32, 32), "levels": 3, "steps": 16, "hidden": 256, "net_norm": False,
                          "net_gain": 0.0, "shift_gain": -1.0, "split_prior": "learned"},
}  # fmt: skip


# --- the network of a coupling ------------------------------------------------------------------------


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Padding) -> Tensor:
    """A convolution that keeps the size; ``padding`` says what lies beyond the border of a 3x3 kernel."""
    if weight.shape[-1] == 1 or padding == "zeros":
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
    border = (1, 1, 1, 1)
    if padding == "ones":
        return F.conv2d(F.pad(x, border, value=1.0), weight, bias)
    inside = x.new_zeros(1, 1, *x.shape[2:])
    edge = F.pad(inside, border, value=1.0).expand(len(x), -1, -1, -1)
    return F.conv2d(torch.cat([F.pad(x, border), edge], 1), weight, bias)


class NormConv2d(nn.Module):
    """Convolution and ActNorm as one convolution with scaled weights: exp(a) * (conv(x) + b)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, padding: Padding = "zeros") -> None:
        super().__init__()
        self.padding = padding
        extra = int(padding == "edge" and kernel > 1)
        self.weight = nn.Parameter(0.05 * torch.randn(out_channels, in_channels + extra, kernel, kernel))
        self.norm = ActNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if not self.norm.ready:
            with torch.no_grad():
                self.norm.initialize(_conv2d(x, self.weight, None, self.padding))
        scale = torch.exp(self.norm.gain * self.norm.log_scale)
        return _conv2d(x, self.weight * scale.view(-1, 1, 1, 1), self.norm.bias * scale, self.padding)


class ZeroConv2d(nn.Module):
    """exp(gain * log_scale) * (conv(x) + bias), all zero at first: the flow starts as the identity it can be."""

    def __init__(self, in_channels: int, out_channels: int, padding: Padding = "zeros", gain: float = 3.0) -> None:
        super().__init__()
        self.padding, self.gain = padding, gain
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels + (padding == "edge"), 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.log_scale = nn.Parameter(torch.zeros(out_channels)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        if self.log_scale is None:
            return _conv2d(x, self.weight, self.bias, self.padding)
        scale = torch.exp(self.gain * self.log_scale)
        return _conv2d(x, self.weight * scale.view(-1, 1, 1, 1), self.bias * scale, self.padding)


def conditioner(
    in_channels: int,
    out_channels: int,
    hidden: int,
    *,
    norm: bool = True,
    padding: Padding = "zeros",
    gain: float = 3.0,
) -> nn.Sequential:
    """Conv 3x3, conv 1x1, zero-initialised conv 3x3, with ReLU between; [B, in, H, W] -> [B, out, H, W]."""
    edge = "edge" if padding == "edge" else "zeros"  # ones are for the last convolution only
    first, second = (
        (NormConv2d(in_channels, hidden, 3, edge), NormConv2d(hidden, hidden, 1))
        if norm
        else (nn.Conv2d(in_channels, hidden, 3, padding=1), nn.Conv2d(hidden, hidden, 1))
    )
    relu = nn.ReLU(inplace=True)
    return nn.Sequential(first, relu, second, relu, ZeroConv2d(hidden, out_channels, padding, gain))


class ChannelPrior(nn.Module):
    """Mean and log scale of every channel (chunk_ts), whatever the input: [B, *, H, W] -> [B, 2C, H, W].

    Each is a value times exp(gain * its log gain), plus a learned offset for the class.
    """

    def __init__(self, channels: int, classes: int = 0, gain: float = 3.0) -> None:
        super().__init__()
        self.gain = gain
        self.value = nn.Parameter(torch.zeros(2 * channels))
        self.log_gain = nn.Parameter(torch.zeros(2 * channels))
        self.classes = nn.Parameter(torch.zeros(classes, 2 * channels)) if classes else None

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        h = (self.value * torch.exp(self.gain * self.log_gain)).expand(len(x), -1)
        if self.classes is not None:
            if labels is None:
                raise ValueError(
                    f"context: this model is conditioned on {len(self.classes)} classes, got no labels [B]"
                )
            h = h + self.classes[labels]
        return h[:, :, None, None].expand(-1, -1, *x.shape[2:])


# --- the flow -----------------------------------------------------------------------------------------


class GlowStep(Bijection):
    """ActNorm, a mixing of the channels, a coupling."""

    def __init__(self, actnorm: ActNorm, mix: Bijection, coupling: Bijection) -> None:
        super().__init__()
        self.actnorm, self.mix, self.coupling = actnorm, mix, coupling

    def forward(self, x: Tensor, context: Tensor | None = None, mixing: Weights | None = None) -> tuple[Tensor, Tensor]:
        """``mixing``: ActNorm and 1x1 convolution as one matrix, made for all steps at once."""
        if mixing is None:
            x, logdet = self.actnorm(x)
            x, more = self.mix(x)
            logdet = logdet + more
        else:
            x, logdet = self.mix(x, weights=mixing)
        z, more = self.coupling(x)
        return z, logdet + more

    def inverse(self, z: Tensor, context: Tensor | None = None, mixing: Weights | None = None) -> tuple[Tensor, Tensor]:
        x, logdet = self.coupling.inverse(z)
        if mixing is not None:
            x, more = self.mix.inverse(x, weights=mixing)
            return x, logdet + more
        x, more = self.mix.inverse(x)
        x, last = self.actnorm.inverse(x)
        return x, logdet + more + last


class Glow(nn.Module):
    r"""Glow on images.

    Args:
        image_shape: (C, H, W); H and W divisible by 2^levels.
        levels, steps, hidden: L, K and the width of the coupling networks.
        coupling: ``affine`` or ``additive``.
        scale, order, shift_gain, packing: of the affine coupling, :func:`fastflow.ops.affine_coupling`.
        permutation: ``lu`` or ``dense`` invertible 1x1 convolutions, a fixed ``shuffle``, or ``reverse``.
        padding: border of the 3x3 convolutions: ``zeros``, ``ones`` (the last one only), ``edge`` (openai).
        gain: kappa, the factor on ActNorm's log scale. net_gain: that on the last convolution's; 0 leaves it out.
        net_norm: ActNorm inside the coupling networks (otherwise plain convolutions with bias).
        split_prior: of the half that leaves at a level: ``conditional`` on the half that stays, ``learned`` mean and
            scale of every channel, or ``standard`` normal.
        top_prior: ``learned`` or ``standard``.
        classes: number of classes the top prior is conditioned on; the context is then a tensor of labels [B].

    The latent is a list, the part that left first in front. Densities are in nats, of x as it came.

    >>> model = Glow((1, 8, 8), levels=2, steps=2, hidden=8)
    >>> x = torch.rand(16, 1, 8, 8) - 0.5
    >>> model.initialize(x)
    >>> model.log_prob(x).shape, model.sample(4, temperature=0.7).shape
    (torch.Size([16]), torch.Size([4, 1, 8, 8]))
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (3, 32, 32),
        levels: int = 3,
        steps: int = 32,
        hidden: int = 512,
        *,
        coupling: Literal["affine", "additive"] = "affine",
        scale: str = "sigmoid2",
        order: Literal["scale_first", "shift_first"] = "shift_first",
        shift_gain: float = 1.0,
        packing: str = "interleaved",
        permutation: Literal["lu", "dense", "shuffle", "reverse"] = "lu",
        padding: Padding = "zeros",
        gain: float = 1.0,
        net_gain: float = 3.0,
        net_norm: bool = True,
        split_prior: Literal["conditional", "learned", "standard"] = "conditional",
        top_prior: Literal["learned", "standard"] = "learned",
        classes: int = 0,
    ) -> None:
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.config["image_shape"] = self.image_shape = tuple(image_shape)
        channels, height, width = self.image_shape
        if height % 2**levels or width % 2**levels:
            raise ValueError(f"image_shape: expected sizes divisible by 2^levels = {2**levels}, got {height} x {width}")
        for name, value, allowed in (
            ("coupling", coupling, ("affine", "additive")),
            ("permutation", permutation, ("lu", "dense", "shuffle", "reverse")),
            ("padding", padding, ("zeros", "ones", "edge")),
            ("split_prior", split_prior, ("conditional", "learned", "standard")),
            ("top_prior", top_prior, ("learned", "standard")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
        self.squeeze = Squeeze()
        self.levels, self.splits = nn.ModuleList(), nn.ModuleList()
        for level in range(levels):
            channels, height, width = 4 * channels, height // 2, width // 2
            self.levels.append(nn.ModuleList(self._step(channels) for _ in range(steps)))
            if level < levels - 1:
                self.splits.append(self._split(channels))
                channels -= channels // 2
        self.top_shape = (channels, height, width)
        self.top = ChannelPrior(channels, classes)
        if top_prior == "standard":
            self.top.requires_grad_(False)  # zeros: mean 0 and log scale 0
        self.to(memory_format=torch.channels_last)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Glow:
        """A published configuration by name (``PRESETS``), with changes."""
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **changes})

    def _step(self, channels: int) -> GlowStep:
        c = self.config
        mix: Bijection = (
            InvertibleConv1x1(channels, lu=c["permutation"] == "lu")
            if c["permutation"] in ("lu", "dense")
            else Permutation(channels, c["permutation"])
        )
        kept, changed = channels - channels // 2, channels // 2
        settings = {"norm": c["net_norm"], "padding": c["padding"], "gain": c["net_gain"]}
        if c["coupling"] == "additive":
            coupling: Bijection = AdditiveCoupling(conditioner(kept, changed, c["hidden"], **settings))
        else:
            coupling = AffineCoupling(
                conditioner(kept, 2 * changed, c["hidden"], **settings),
                **{name: c[name] for name in ("scale", "order", "shift_gain", "packing")},
            )
        return GlowStep(ActNorm(channels, gain=c["gain"]), mix, coupling)

    def _split(self, channels: int) -> SplitPrior:
        kept, out = channels - channels // 2, channels // 2
        if self.config["split_prior"] == "conditional":
            network = ZeroConv2d(kept, 2 * out, self.config["padding"], self.config["net_gain"])
            return SplitPrior(channels, network, packing="interleaved")
        return SplitPrior(
            channels, ChannelPrior(out) if self.config["split_prior"] == "learned" else None, packing="chunk_ts"
        )

    # --- both directions --------------------------------------------------------------------------------

    def encode(self, x: Tensor, context: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """x [B, C, H, W] -> (the latents, log p(x) [B] in nats)."""
        if x.dim() != 4 or tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"x: expected [B, {', '.join(map(str, self.image_shape))}], got {list(x.shape)}")
        x = x.contiguous(memory_format=torch.channels_last)
        latents: list[Tensor] = []
        total = no_logdet(x)
        for level, steps in enumerate(self.levels):
            x, _ = self.squeeze(x)
            for step, mixing in zip(steps, self._mixing(steps), strict=True):
                x, logdet = step(x, mixing=mixing)
                total = total + logdet
            if level < len(self.splits):
                x, latent, log_prob = self.splits[level](x)
                latents.append(latent)
                total = total + log_prob
        total = gaussian_log_prob(x, self.top(x, context), packing="chunk_ts", running=total)
        return [*latents, x], total

    def decode(self, latents: Sequence[Tensor], context: Tensor | None = None) -> Tensor:
        """The image of given latents: the inverse of :meth:`encode`."""
        *parts, x = latents
        for level in reversed(range(len(self.levels))):
            if level < len(self.splits):
                x, _ = self.splits[level].inverse(x, parts[level])
            x, _ = self._unmix(level, x)
        return x

    def _unmix(self, level: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The steps of a level and its squeeze, backwards."""
        steps = self.levels[level]
        total = no_logdet(x)
        for step, mixing in zip(reversed(steps), reversed(self._mixing(steps, inverse=True)), strict=True):
            x, logdet = step.inverse(x, mixing=mixing)
            total = total + logdet
        return self.squeeze.inverse(x)[0], total

    def _mixing(self, steps: nn.ModuleList, inverse: bool = False) -> list[Weights | None]:
        """ActNorm and 1x1 convolution of all steps of a level in one call; None where one has to set itself first."""
        ready = all(step.actnorm.ready and isinstance(step.mix, InvertibleConv1x1) for step in steps)
        if not ready:
            return [None] * len(steps)
        return weights([step.mix for step in steps], [step.actnorm for step in steps], inverse=inverse)

    # --- densities and samples --------------------------------------------------------------------------

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) [B] in nats."""
        return self.encode(x, context)[1]

    forward = log_prob  # so that DistributedDataParallel can wrap the model

    def sample_and_log_prob(
        self,
        n: int,
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(x [n, C, H, W], log p(x) [n]) in one pass; the temperature multiplies the std of every noise."""
        noise = {"temperature": temperature, "generator": generator}
        params = self.top(self.top.value.new_empty(()).expand(n, *self.top_shape), context)
        x, total = gaussian_sample(params, packing="chunk_ts", **noise)
        x = x.contiguous(memory_format=torch.channels_last)
        for level in reversed(range(len(self.levels))):
            if level < len(self.splits):
                x, log_prob = self.splits[level].inverse(x, **noise)
                total = total + log_prob
            x, logdet = self._unmix(level, x)
            total = total - logdet
        return x, total

    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """x [n, C, H, W]; temperature 0 is the mode of every Gaussian."""
        with torch.no_grad():
            return self.sample_and_log_prob(n, context, temperature, generator)[0]

    @torch.no_grad()
    def initialize(self, batch: Tensor, context: Tensor | None = None) -> None:
        """Data-dependent initialisation of every ActNorm, in order, from one batch; refuses a second one."""
        if any(m.ready for m in self.modules() if isinstance(m, ActNorm)):
            raise RuntimeError("initialize: this model has been initialised already")
        self.encode(batch, context)
