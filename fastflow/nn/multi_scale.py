"""A flow on images in scales, after each of which part of the channels leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastflow.nn.base import Bijection, Sequential, no_context
from fastflow.ops import gaussian_log_prob, gaussian_sample

__all__ = ["MultiScale"]


class MultiScale(nn.Module):
    """What RealNVP and its kin share: every scale but the last halves height and width, and then half of its four
    times as many channels leaves by a :class:`fastflow.nn.SplitPrior`; the last ends in a standard normal.

    A model fills ``preprocess`` (a bijection), ``scales`` (so many bijections) and ``splits`` (one less).

    The latent is a list, the part that left first in front. Densities are in nats, of x as it came.

    Paper: RealNVP, section 3.6, https://arxiv.org/abs/1605.08803.
    """

    def __init__(self, image_shape: Sequence[int]) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.preprocess: Bijection = Sequential()
        self.scales, self.splits = nn.ModuleList(), nn.ModuleList()

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
        x, total = self.scales[-1].inverse(x.contiguous(memory_format=torch.channels_last))
        total = -total
        for scale, split, part in reversed(list(zip(self.scales[:-1], self.splits, parts, strict=True))):
            x, log_prob = split.inverse(x, part, **noise)
            x, logdet = scale.inverse(x)
            total = total + log_prob - logdet
        x, logdet = self.preprocess.inverse(x)
        return x, total - logdet

    # --- densities and samples --------------------------------------------------------------------------

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) [B] in nats."""
        return self.encode(x, context)[1]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``log_prob``: what DistributedDataParallel wraps is the forward."""
        return self.log_prob(x, context)

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
