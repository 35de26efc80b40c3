"""Glow as people write it in plain PyTorch: what fastflow's own is measured against where normflows is not installed.

Module for module the model of :class:`fastflow.models.Glow` with its default options and the same networks, so that it
loads the same parameters and must give the same densities. Every layer is a few torch operations; W is built from its
factors in every call, and inverted in every call of the other direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow.models.glow import ChannelPrior, ZeroConv2d, conditioner

__all__ = ["PlainGlow"]


class ActNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias, self.log_scale = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        bias, scale = self.bias.view(1, -1, 1, 1), torch.exp(self.log_scale).view(1, -1, 1, 1)
        return (x + bias) * scale, x.shape[2] * x.shape[3] * self.log_scale.sum()

    def inverse(self, z: Tensor) -> Tensor:
        return z * torch.exp(-self.log_scale).view(1, -1, 1, 1) - self.bias.view(1, -1, 1, 1)


class Conv1x1(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.lower, self.upper = (nn.Parameter(torch.zeros(channels, channels)) for _ in range(2))
        self.log_s = nn.Parameter(torch.zeros(channels))
        self.register_buffer("permutation", torch.arange(channels))
        self.register_buffer("sign_s", torch.ones(channels))

    def weight(self) -> Tensor:
        with torch.autocast(self.log_s.device.type, enabled=False):
            one = torch.eye(len(self.log_s), device=self.log_s.device)
            upper = self.upper.triu(1) + torch.diag(self.sign_s * torch.exp(self.log_s))
            return ((self.lower.tril(-1) + one) @ upper)[self.permutation]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.conv2d(x, self.weight()[:, :, None, None]), x.shape[2] * x.shape[3] * self.log_s.sum()

    def inverse(self, z: Tensor) -> Tensor:
        return F.conv2d(z, torch.inverse(self.weight())[:, :, None, None])


class Coupling(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.network = conditioner(channels // 2, channels, hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, changed = x.chunk(2, 1)
        h = self.network(kept)
        shift, scale = h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2)
        return torch.cat([kept, (changed + shift) * scale], 1), torch.log(scale).flatten(1).sum(1)

    def inverse(self, z: Tensor) -> Tensor:
        kept, changed = z.chunk(2, 1)
        h = self.network(kept)
        shift, scale = h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2)
        return torch.cat([kept, changed / scale - shift], 1)


class Step(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.actnorm, self.mix, self.coupling = ActNorm(channels), Conv1x1(channels), Coupling(channels, hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, first = self.actnorm(x)
        x, second = self.mix(x)
        x, third = self.coupling(x)
        return x, first + second + third

    def inverse(self, z: Tensor) -> Tensor:
        return self.actnorm.inverse(self.mix.inverse(self.coupling.inverse(z)))


class Split(nn.Module):
    """Its network and the likelihood of the half that leaves: one call, that torch.compile gets as a whole."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.network = ZeroConv2d(channels // 2, channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, factored = x.chunk(2, 1)
        h = self.network(kept)
        return kept, log_prob(factored, h[:, 0::2], h[:, 1::2])

    def inverse(self, kept: Tensor) -> Tensor:
        h = self.network(kept)
        return torch.cat([kept, sample(h[:, 0::2], h[:, 1::2])], 1)


def log_prob(z: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    terms = -log_scale - 0.5 * ((z - mean) * torch.exp(-log_scale)) ** 2 - 0.5 * math.log(2 * math.pi)
    return terms.flatten(1).sum(1)


def sample(mean: Tensor, log_scale: Tensor) -> Tensor:
    return mean + torch.exp(log_scale) * torch.randn_like(mean)


def _forward(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return layer(x)


def _inverse(layer: nn.Module, z: Tensor) -> Tensor:
    return layer.inverse(z)


class PlainGlow(nn.Module):
    def __init__(self, image_shape: tuple[int, int, int], levels: int, steps: int, hidden: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.levels, self.splits = nn.ModuleList(), nn.ModuleList()
        for level in range(levels):
            channels, height, width = 4 * channels, height // 2, width // 2
            self.levels.append(nn.ModuleList(Step(channels, hidden) for _ in range(steps)))
            if level < levels - 1:
                self.splits.append(Split(channels))
                channels //= 2
        self.top, self.top_shape = ChannelPrior(channels), (channels, height, width)
        self._forward, self._inverse = _forward, _inverse

    def compiled(self, compile: Callable[..., Any] = torch.compile) -> PlainGlow:
        """Its steps under torch.compile, each program shared by the steps of a level; returns itself.

        All of it as one graph takes longer to compile than all other rows together.
        """
        torch._dynamo.config.recompile_limit = 64  # shapes, memory formats; above the limit it would be eager code
        self._forward, self._inverse = (compile(f, dynamic=False) for f in (_forward, _inverse))
        return self

    def log_prob(self, x: Tensor, context: None = None) -> Tensor:
        total = 0
        for level, steps in enumerate(self.levels):
            x = F.pixel_unshuffle(x, 2)
            for step in steps:
                x, logdet = self._forward(step, x)
                total = total + logdet
            if level < len(self.splits):
                x, logp = self._forward(self.splits[level], x)
                total = total + logp
        mean, log_scale = self.top(x).chunk(2, 1)
        return total + log_prob(x, mean, log_scale)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        like = self.top.value.new_empty(()).expand(n, *self.top_shape)
        x = sample(*self.top(like).chunk(2, 1))
        for level in reversed(range(len(self.levels))):
            if level < len(self.splits):
                x = self._inverse(self.splits[level], x)
            for step in reversed(self.levels[level]):
                x = self._inverse(step, x)
            x = F.pixel_shuffle(x, 2)
        return x
