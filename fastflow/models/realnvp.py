"""RealNVP: affine couplings; on images under checkerboard and channel masks, half of the channels leaving at a scale.

Dinh, Sohl-Dickstein & Bengio, 2016, https://arxiv.org/abs/1605.08803.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow.nn.actnorm import ActNorm
from fastflow.nn.base import Bijection, Inverse, Sequential, no_context
from fastflow.nn.base_distribution import StandardNormal
from fastflow.nn.batch_norm import BatchNorm
from fastflow.nn.coupling import AffineCoupling
from fastflow.nn.flow import Flow
from fastflow.nn.logit import Logit
from fastflow.nn.mlp_coupling import CouplingStack, MLPCoupling
from fastflow.nn.permutation import Permutation
from fastflow.nn.reshape import Squeeze
from fastflow.nn.split_prior import SplitPrior
from fastflow.ops import gaussian_log_prob, gaussian_sample

__all__ = ["RealNVP", "VectorRealNVP", "ResNet", "WeightNormConv2d", "PRESETS"]

Norm = Literal["actnorm", "batch", "none"]

PRESETS: dict[str, dict[str, Any]] = {
    # chrischute/real-nvp: batch norm inside the networks, none between the couplings
    "chrischute-cifar10": {"image_shape": (3, 32, 32), "scales": 2, "hidden": 64, "blocks": 8, "norm": "none",
                           "net_norm": True, "gain_decay": 5e-5},
    # the paper's: batch norm between the couplings, too; scales down to 4 x 4, CIFAR-10's only once
    "paper-cifar10": {"image_shape": (3, 32, 32), "scales": 2, "hidden": 64, "blocks": 8, "norm": "batch",
                      "net_norm": True, "gain_decay": 5e-5},
    "paper-imagenet32": {"image_shape": (3, 32, 32), "scales": 4, "hidden": 32, "blocks": 4, "norm": "batch",
                         "net_norm": True, "gain_decay": 5e-5},
    "paper-imagenet64": {"image_shape": (3, 64, 64), "scales": 5, "hidden": 32, "blocks": 2, "norm": "batch",
                         "net_norm": True, "gain_decay": 5e-5},
}  # fmt: skip


# --- the network of a coupling ------------------------------------------------------------------------


class WeightNormConv2d(nn.Module):
    """A convolution with weights g v / |v|, a gain g and a direction v for every output channel."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, bias: bool = True, zero: bool = False) -> None:
        super().__init__()
        start = nn.Conv2d(in_channels, out_channels, kernel, bias=bias)
        self.weight_v = nn.Parameter(start.weight.detach())
        gain = torch.linalg.vector_norm(self.weight_v.detach(), dim=(1, 2, 3), keepdim=True)
        self.weight_g = nn.Parameter(torch.zeros_like(gain) if zero else gain)
        self.bias = nn.Parameter(torch.zeros(out_channels) if zero else start.bias.detach()) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(self.weight_v, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, self.weight_v * (self.weight_g / norm), self.bias, padding=self.weight_v.shape[-1] // 2)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, norm: bool) -> None:
        super().__init__()
        self.in_norm = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.in_conv = WeightNormConv2d(channels, channels, 3, bias=not norm)  # a norm takes a bias away again
        self.out_norm = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.out_conv = WeightNormConv2d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.in_conv(F.relu(self.in_norm(x)))
        return x + self.out_conv(F.relu(self.out_norm(h)))


class ResNet(nn.Module):
    """Weight-normalised residual network, its output a sum of skips from every block; [B, in, H, W] -> [B, out, H, W].

    It starts at 0, so that a coupling starts as the identity.

    Args:
        norm: batch normalisation inside.
        double: the input is twice the image with its zeros, half of which a checkerboard took.
    """

    def __init__(self, in_channels: int, hidden: int, out_channels: int, blocks: int, norm: bool, double: bool) -> None:
        super().__init__()
        self.gain = 2.0 if double else 1.0
        self.in_norm = nn.BatchNorm2d(in_channels) if norm else nn.Identity()
        self.in_conv = WeightNormConv2d(2 * in_channels, hidden, 3)
        self.in_skip = WeightNormConv2d(hidden, hidden, 1)
        self.blocks = nn.ModuleList(ResidualBlock(hidden, norm) for _ in range(blocks))
        self.skips = nn.ModuleList(WeightNormConv2d(hidden, hidden, 1) for _ in range(blocks))
        self.out_norm = nn.BatchNorm2d(hidden) if norm else nn.Identity()
        self.out_conv = WeightNormConv2d(hidden, out_channels, 1, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gain * self.in_norm(x)
        x = self.in_conv(F.relu(torch.cat([x, -x], 1)))
        total = self.in_skip(x)
        for block, skip in zip(self.blocks, self.skips, strict=True):
            x = block(x)
            total = total + skip(x)
        return self.out_conv(F.relu(self.out_norm(total)))


# --- the flow -----------------------------------------------------------------------------------------


def normalisation(kind: Norm, channels: int) -> list[Bijection]:
    """What stands in front of a coupling: a layer or none."""
    if kind == "none":
        return []
    return [ActNorm(channels) if kind == "actnorm" else BatchNorm(channels)]


class RealNVP(nn.Module):
    r"""RealNVP on images.

    A scale is three couplings :math:`z = (x + t) \odot e^s`, :math:`s = r \tanh(\hat s)`, on checkerboards of
    alternating parity, a squeeze to [4C, H/2, W/2], and three couplings on alternating halves of the channels. Then
    half of the channels leave, the positions of one checkerboard stay, and the next scale has them as [2C, H/2, W/2]
    and twice the width. The last scale is four checkerboard couplings.

    Args:
        image_shape: (C, H, W); H and W divisible by 2^(scales - 1), by 2^scales if ``compact``.
        scales: 1 or more.
        hidden, blocks: channels (at the first scale) and residual blocks of the networks.
        prior: of the channels that leave: ``standard`` normal, as in the paper, or ``conditional`` on those that stay.
        norm: in front of every coupling ``actnorm``, ``batch`` or ``none``.
        net_norm: batch normalisation inside the networks.
        compact: a checkerboard coupling's network sees the half that stays as an image [2C, H/2, W/2], instead of all
            of [C, H, W] with zeros; a fourth of the positions, another architecture with weights of its own.
        alpha: α of the :class:`fastflow.nn.Logit` that images in [-1/2, 1/2) first go through; None for none.
        gain_decay: weight of the penalty Σ g² / 2 on the gains of the networks' convolutions, in :meth:`loss` alone.

    With batch normalisation, of either kind, a model in training mode cannot be sampled from or inverted: its
    statistics are those of the batch. Call ``eval()`` first.

    The latent is a list, the part that left first in front; :meth:`assemble` has it in the shape of the image.
    Densities are in nats, of x as it came.

    >>> model = RealNVP((1, 8, 8), hidden=8, blocks=1)
    >>> x = torch.rand(16, 1, 8, 8) - 0.5
    >>> model.initialize(x)
    >>> model.log_prob(x).shape, model.sample(4, temperature=0.7).shape
    (torch.Size([16]), torch.Size([4, 1, 8, 8]))
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (3, 32, 32),
        scales: int = 2,
        hidden: int = 64,
        blocks: int = 8,
        *,
        prior: Literal["standard", "conditional"] = "standard",
        norm: Norm = "actnorm",
        net_norm: bool = False,
        compact: bool = False,
        alpha: float | None = 0.05,
        gain_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.config["image_shape"] = self.image_shape = tuple(image_shape)
        _one_of("prior", prior, ("standard", "conditional"))
        _one_of("norm", norm, ("actnorm", "batch", "none"))
        channels, height, width = self.image_shape
        divisor = 2 ** (scales if compact else scales - 1)
        if scales < 1 or height % divisor or width % divisor:
            raise ValueError(
                f"image_shape: expected sizes divisible by {divisor} for {scales} scales"
                f"{' in compact form' if compact else ''}, got {height} x {width}"
            )
        self.preprocess = Sequential() if alpha is None else Sequential(Logit(alpha, -0.5, 0.5))
        self.scales, self.splits = nn.ModuleList(), nn.ModuleList()
        self.diagonal = Squeeze(order="diagonal")
        for scale in range(scales):
            width_here = hidden * 2**scale
            last = scale == scales - 1
            layers = [self._checkerboards(channels, 4 if last else 3, width_here)]
            if not last:
                # from here on [4C, H/2, W/2]; in the end, in the diagonal order, what stays comes first
                layers += [Squeeze(), self._halves(4 * channels, 3, 2 * width_here), Permutation(diagonal(channels))]
                self.splits.append(SplitPrior(4 * channels, "conv" if prior == "conditional" else None))
            self.scales.append(Sequential(*layers))
            channels = channels if last else 2 * channels
        self.to(memory_format=torch.channels_last)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> RealNVP:
        """A published configuration by name (``PRESETS``), with changes."""
        _one_of("preset", name, tuple(PRESETS))
        return cls(**{**PRESETS[name], **changes})

    def _checkerboards(self, channels: int, count: int, hidden: int) -> Bijection:
        if self.config["compact"]:  # in the diagonal order a checkerboard is a half of the channels
            return Sequential(self.diagonal, self._halves(4 * channels, count, hidden), Inverse(self.diagonal))
        masks = ("checkerboard_even", "checkerboard_odd")
        return Sequential(
            *(
                layer
                for k in range(count)
                for layer in self._coupling(channels, masks[k % 2], channels, channels, hidden, double=True)
            )
        )

    def _halves(self, channels: int, count: int, hidden: int) -> Bijection:
        masks = ("first_half", "second_half")
        return Sequential(
            *(
                layer
                for k in range(count)
                for layer in self._coupling(channels, masks[k % 2], channels // 2, channels // 2, hidden, double=False)
            )
        )

    def _coupling(
        self, channels: int, mask: str, kept: int, changed: int, hidden: int, double: bool
    ) -> list[Bijection]:
        c = self.config
        network = ResNet(kept, hidden, 2 * changed, c["blocks"], c["net_norm"], double)
        coupling = AffineCoupling(
            network, mask, packing="chunk_st", scale="tanh_rescale", order="shift_first", rescale=changed
        )
        return [*normalisation(c["norm"], channels), coupling]

    # --- both directions --------------------------------------------------------------------------------

    def encode(self, x: Tensor, context: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """x [B, C, H, W] -> (the latents, log p(x) [B] in nats)."""
        if x.dim() != 4 or tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"x: expected [B, {', '.join(map(str, self.image_shape))}], got {list(x.shape)}")
        no_context(context)
        x, total = self.preprocess(x.contiguous(memory_format=torch.channels_last))
        latents: list[Tensor] = []
        for scale, split in zip(self.scales, [*self.splits, None], strict=True):
            x, logdet = scale(x)
            total = total + logdet
            if split is not None:
                x, latent, log_prob = split(x)
                latents.append(latent)
                total = total + log_prob
        return [*latents, x], total + gaussian_log_prob(x)

    def decode(self, latents: Sequence[Tensor], context: Tensor | None = None) -> Tensor:
        """The image of given latents: the inverse of :meth:`encode`."""
        no_context(context)
        *parts, x = latents
        if len(parts) != len(self.splits):
            raise ValueError(f"latents: expected {len(self.splits) + 1}, got {len(latents)}")
        return self._decode(x, parts, {})[0]

    def _decode(self, x: Tensor, parts: Sequence[Tensor | None], noise: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(the image, log p(image | x) [B]): what is not given of the parts is drawn."""
        if self.training and (self.config["net_norm"] or self.config["norm"] == "batch"):
            raise RuntimeError("RealNVP with batch normalisation has an inverse in evaluation mode only: call eval()")
        x, total = self.scales[-1].inverse(x.contiguous(memory_format=torch.channels_last))
        total = -total
        for scale, split, part in reversed(list(zip(self.scales[:-1], self.splits, parts, strict=True))):
            x, log_prob = split.inverse(x, part, **noise)
            x, logdet = scale.inverse(x)
            total = total + log_prob - logdet
        x, logdet = self.preprocess.inverse(x)
        return x, total - logdet

    def assemble(self, latents: Sequence[Tensor]) -> Tensor:
        """The latents as one tensor in the shape of the image [B, C, H, W], each where its pixels were."""
        *parts, z = latents
        for part in reversed(parts):
            z = self.diagonal.inverse(torch.cat([z, part], 1))[0]
        return z

    def disassemble(self, z: Tensor) -> list[Tensor]:
        """The list of latents of an assembled one: points on a line or a grid between two, say, for :meth:`decode`."""
        parts = []
        for _ in self.splits:
            z, part = self.diagonal(z)[0].chunk(2, 1)
            parts.append(part)
        return [*parts, z]

    # --- densities and samples --------------------------------------------------------------------------

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) [B] in nats."""
        return self.encode(x, context)[1]

    def loss(self, x: Tensor, progress: float = 0.0) -> Tensor:
        """What training minimises: -log p(x) [B] in nats, and the penalty on the gains."""
        loss = -self.log_prob(x)
        if not self.config["gain_decay"]:
            return loss
        gains = [m.weight_g for m in self.modules() if isinstance(m, WeightNormConv2d)]
        return loss + 0.5 * self.config["gain_decay"] * sum(g.square().sum() for g in gains)

    forward = log_prob  # so that DistributedDataParallel can wrap the model

    def sample_and_log_prob(
        self,
        n: int,
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(x [n, C, H, W], log p(x) [n]) in one pass; the temperature multiplies the std of every noise."""
        no_context(context)
        noise = {"temperature": temperature, "generator": generator}
        channels, height, width = self.image_shape
        factor = 2 ** len(self.splits)
        shape = (n, channels * factor, height // factor, width // factor)
        like = next(self.parameters())
        x, log_prob = gaussian_sample(shape=shape, dtype=like.dtype, device=like.device, **noise)
        x, total = self._decode(x, [None] * len(self.splits), noise)
        return x, log_prob + total

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """x [n, C, H, W]; temperature 0 is the mode of every Gaussian."""
        return self.sample_and_log_prob(n, context, temperature, generator)[0]

    @torch.no_grad()
    def initialize(self, batch: Tensor, context: Tensor | None = None) -> None:
        """Data-dependent initialisation of every ActNorm, in order, from one batch; refuses a second one."""
        norms = [m for m in self.modules() if isinstance(m, ActNorm)]
        if any(m.ready for m in norms):
            raise RuntimeError("initialize: this model has been initialised already")
        if norms:
            self.encode(batch, context)


class VectorRealNVP(Flow):
    r"""RealNVP on rows [B, D]: couplings :math:`x_2 \odot e^s + t`, :math:`s = r \tanh(\hat s)`, with MLPs; odd
    and even features take turns. With ActNorms or none all couplings are one call, :class:`fastflow.nn.CouplingStack`.

    Args:
        features: D, at least 2.
        layers: couplings.
        hidden: widths of the hidden layers of each network.
        norm: in front of every coupling ``actnorm``, ``batch`` or ``none``.
        context_features: P; the networks then get a context [B, P], too.

    Batch normalisation has no inverse in training mode, :class:`fastflow.nn.BatchNorm`. Densities are in nats.

    >>> model = VectorRealNVP(2, layers=4, hidden=(16,))
    >>> x = 3 + torch.randn(64, 2)
    >>> model.initialize(x)
    >>> model.log_prob(x).shape, model.sample(5, temperature=0.7).shape
    (torch.Size([64]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        features: int,
        layers: int = 8,
        hidden: Sequence[int] = (64, 64),
        *,
        norm: Norm = "actnorm",
        context_features: int = 0,
    ) -> None:
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if features < 2:
            raise ValueError(f"features: expected at least 2, of which a coupling changes a part, got {features}")
        _one_of("norm", norm, ("actnorm", "batch", "none"))
        steps: list[Bijection] = []
        for k in range(layers):
            mask = ("odd", "even")[k % 2]
            shape = {"hidden": tuple(hidden), "mask": mask, "context_features": context_features}
            changed = features // 2 if mask == "odd" else (features + 1) // 2
            coupling = MLPCoupling(features, **shape, scale="tanh_rescale", rescale=changed)
            steps += [*normalisation(norm, features), coupling]
        # batch normalisation stands between the couplings as a layer; all else is one stack
        chain = Sequential if norm == "batch" else CouplingStack
        super().__init__(StandardNormal(features), chain(*steps))
        self.config, self.context_features = config | {"hidden": tuple(hidden)}, context_features

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) [B] in nats."""
        if x.dim() != 2 or x.shape[1] != self.config["features"]:
            raise ValueError(f"x: expected [B, {self.config['features']}], got {list(x.shape)}")
        return super().log_prob(x, context)


def diagonal(channels: int) -> list[int]:
    """Where each of the 4C channels of the diagonal order was in the channel-major order of a squeeze."""
    return [4 * c + 2 * row + column for row, column in ((0, 0), (1, 1), (0, 1), (1, 0)) for c in range(channels)]


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
