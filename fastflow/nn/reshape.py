"""Squeeze: space into channels."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fastflow.nn.base import Bijection, channels_last, no_logdet

__all__ = ["Squeeze"]

# where [C, fh, fw] stand among the new channels
_ORDERS = {"channel_major": (0, 1, 2), "space_major": (1, 2, 0)}


class Squeeze(Bijection):
    """[B, C, H, W] to [B, C f^2, H / f, W / f]: every f x f block of positions becomes channels.

    Position (fh, fw) of channel c in a block becomes channel

    - ``channel_major``: c f^2 + fh f + fw (Glow, RealNVP, ``torch.pixel_unshuffle``)
    - ``space_major``: (fh f + fw) C + c (Wolf)

    channels_last stays channels_last. Height and width that f does not divide are a ValueError.

    >>> import torch
    >>> z, logdet = Squeeze()(torch.arange(4.0).view(1, 1, 2, 2))
    >>> z.flatten(), logdet
    (tensor([0., 1., 2., 3.]), tensor([0.]))
    """

    def __init__(self, factor: int = 2, order: Literal["channel_major", "space_major"] = "channel_major") -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor: expected a positive integer, got {factor}")
        if order not in _ORDERS:
            raise ValueError(f"order: expected 'channel_major' or 'space_major', got {order!r}")
        self.factor, self.order = factor, order

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        f = self.factor
        if x.dim() != 4 or x.shape[2] % f or x.shape[3] % f:
            raise ValueError(f"x: expected [B, C, H, W] with H and W divisible by {f}, got {list(x.shape)}")
        blocks = x.unflatten(2, (x.shape[2] // f, f)).unflatten(4, (x.shape[3] // f, f))  # [B, C, h, fh, w, fw]
        channels = tuple((1, 3, 5)[i] for i in _ORDERS[self.order])
        if channels_last(x):
            z = blocks.permute(0, 2, 4, *channels).flatten(3).permute(0, 3, 1, 2)
        else:
            z = blocks.permute(0, *channels, 2, 4).flatten(1, 3)
        return z, no_logdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        f = self.factor
        if z.dim() != 4 or z.shape[1] % f**2:
            raise ValueError(f"z: expected [B, C, H, W] with C divisible by {f**2}, got {list(z.shape)}")
        order = _ORDERS[self.order]
        sizes = (z.shape[1] // f**2, f, f)
        blocks = z.unflatten(1, [sizes[i] for i in order])  # [B, the three in their order, h, w]
        c, fh, fw = (1 + order.index(i) for i in range(3))
        if channels_last(z):
            x = blocks.permute(0, 4, fh, 5, fw, c).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
        else:
            x = blocks.permute(0, c, 4, fh, 5, fw).flatten(4, 5).flatten(2, 3)
        return x, no_logdet(z)

    def extra_repr(self) -> str:
        return f"factor={self.factor}, order={self.order!r}"
