"""Split with a learned prior: half of the latent leaves the flow, its likelihood given by the other half."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fastflow.ops.gaussian import gaussian_log_prob, gaussian_sample
from fastflow.ops.scale_map import ScaleMap

__all__ = ["SplitPrior"]


class SplitPrior(nn.Module):
    """z = [kept, factored] along the channels, with factored ~ N(m(kept), s(kept)).

    Of an odd number of channels the kept part is the larger one: ceil(C / 2) first channels are kept.

    Args:
        channels: C of z.
        network: kept, or (kept, context) where a context is given, to [B, 2 * factored channels, ...]. ``"conv"`` is a
            3x3 convolution that starts at zero, so that the prior starts as the standard normal; None stays there.
        packing, scale: how the network's output holds mean and raw scale, :func:`fastflow.gaussian_log_prob`.

    Paper: Glow, https://arxiv.org/abs/1807.03039.

    >>> prior = SplitPrior(6)
    >>> z = torch.randn(2, 6, 4, 4)
    >>> kept, factored, logp = prior(z)
    >>> again, same = prior.inverse(kept, factored)
    >>> torch.equal(again, z), torch.equal(same, logp), kept.shape
    (True, True, torch.Size([2, 3, 4, 4]))
    >>> z, logp = prior.inverse(kept, temperature=0.7)
    """

    def __init__(
        self,
        channels: int,
        network: nn.Module | Literal["conv"] | None = "conv",
        packing: str = "interleaved",
        scale: str | ScaleMap = "exp",
    ) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(f"channels: expected at least 2 to split, got {channels}")
        self.channels, self.kept = channels, channels - channels // 2
        self.network = _zero_conv(self.kept, 2 * (channels // 2)) if network == "conv" else network
        self.packing, self.scale = packing, scale

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(kept, factored, log-likelihood [B] of factored given kept); the parts are views of z [B, C, ...]."""
        if z.dim() < 2 or z.shape[1] != self.channels:
            raise ValueError(f"z: expected {self.channels} channels [B, C, ...], got {list(z.shape)}")
        kept, factored = z[:, : self.kept], z[:, self.kept :]
        params = self._params(kept, context)
        return kept, factored, gaussian_log_prob(factored, params, packing=self.packing, scale=self.scale)

    def inverse(
        self,
        kept: Tensor,
        factored: Tensor | None = None,
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(z [B, C, ...], log-likelihood [B] of its factored part), which is sampled where it is not given.

        ``temperature`` multiplies the standard deviation of the sample; the likelihood is the untempered one.
        """
        params, options = self._params(kept, context), {"packing": self.packing, "scale": self.scale}
        if factored is None:
            shape = (kept.shape[0], self.channels - self.kept, *kept.shape[2:])
            noise = {"temperature": temperature, "generator": generator, "dtype": kept.dtype, "device": kept.device}
            factored, logp = gaussian_sample(params, shape=shape, **noise, **options)
        else:
            logp = gaussian_log_prob(factored, params, **options)
        return torch.cat([kept, factored], 1), logp

    def _params(self, kept: Tensor, context: Tensor | None) -> Tensor | None:
        if self.network is None:
            return None
        return self.network(kept) if context is None else self.network(kept, context)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, kept={self.kept}, packing={self.packing!r}, scale={self.scale!r}"


def _zero_conv(channels: int, out: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, out, 3, padding=1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv
