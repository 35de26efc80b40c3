"""Squeeze: space into channels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastflow.nn.base import Bijection, channels_last, no_logdet

__all__ = ["Squeeze"]

# where [C, fh, fw] stand among the new channels
_ORDERS = {"channel_major": (0, 1, 2), "space_major": (1, 2, 0)}
_DIAGONAL = ((0, 0), (1, 1), (0, 1), (1, 0))


class Squeeze(Bijection):
    """[B, C, H, W] to [B, C f^2, H / f, W / f]: every f x f block of positions becomes channels.

    Position (fh, fw) of channel c in a block becomes channel

    - ``channel_major``: c f^2 + fh f + fw (Glow, RealNVP, ``torch.pixel_unshuffle``)
    - ``space_major``: (fh f + fw) C + c (Wolf)
    - ``diagonal``, for f = 2: k C + c with (fh, fw) the k-th of (0, 0), (1, 1), (0, 1), (1, 0), so that the first half
      of the channels is a checkerboard, the positions of even row + column (RealNVP before it factors out)

    channels_last stays channels_last. Height and width that f does not divide are a ValueError.

    >>> import torch
    >>> z, logdet = Squeeze()(torch.arange(4.0).view(1, 1, 2, 2))
    >>> z.flatten(), logdet
    (tensor([0., 1., 2., 3.]), tensor([0.]))
    """

    def __init__(
        self, factor: int = 2, order: Literal["channel_major", "space_major", "diagonal"] = "channel_major"
    ) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor: expected a positive integer, got {factor}")
        if order not in (*_ORDERS, "diagonal"):
            raise ValueError(f"order: expected 'channel_major', 'space_major' or 'diagonal', got {order!r}")
        if order == "diagonal" and factor != 2:
            raise ValueError(f"factor: expected 2 for order 'diagonal', got {factor}")
        self.factor, self.order = factor, order

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        f = self.factor
        if x.dim() != 4 or x.shape[2] % f or x.shape[3] % f:
            raise ValueError(f"x: expected [B, C, H, W] with H and W divisible by {f}, got {list(x.shape)}")
        if self.order == "diagonal":
            return torch.cat([x[:, :, i::2, j::2] for i, j in _DIAGONAL], 1), no_logdet(x)
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
        if self.order == "diagonal":
            return _from_diagonal(z), no_logdet(z)
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


def _from_diagonal(z: Tensor) -> Tensor:
    last = channels_last(z)
    parts = dict(zip(_DIAGONAL, z.chunk(4, 1), strict=True))
    if last:
        parts = {k: part.movedim(1, -1) for k, part in parts.items()}  # [B, h, w, C]
    row, column = (2, 3) if last else (3, 4)
    rows = [torch.stack([parts[i, 0], parts[i, 1]], column) for i in (0, 1)]
    x = torch.stack(rows, row)  # [B, h, 2, w, 2, C] or [B, C, h, 2, w, 2]
    return x.flatten(row + 1, row + 2).flatten(row - 1, row).movedim(-1, 1) if last else x.flatten(4, 5).flatten(2, 3)
