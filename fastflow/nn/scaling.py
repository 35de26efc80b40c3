"""A learned scale of every dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastflow.nn.base import Bijection
from fastflow.ops import actnorm

__all__ = ["Scaling"]


class Scaling(Bijection):
    r"""A learned diagonal :math:`z_i = e^{D_i} x_i`; log-determinant :math:`\sum_i D_i`. It starts as the identity.

    Args:
        shape: of a sample, D or [C, ...]; x is [B, *shape].

    Paper: NICE, https://arxiv.org/abs/1410.8516.

    >>> layer = Scaling(3)
    >>> with torch.no_grad():
    ...     layer.log_scale.copy_(torch.tensor([1.0, 0.5, 0.0])).shape
    torch.Size([3])
    >>> layer(torch.ones(1, 3))[1].item()
    1.5
    """

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if not self.shape:
            raise ValueError("shape: expected the sizes of a sample [C, ...], got none")
        self.log_scale = nn.Parameter(torch.zeros(math.prod(self.shape)))
        self.register_buffer("_zero", torch.zeros(math.prod(self.shape)), persistent=False)

    def extra_repr(self) -> str:
        return f"shape={self.shape}"

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run("x", x, False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run("z", z, True)

    def _run(self, name: str, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"{name}: expected [B, {', '.join(map(str, self.shape))}], got {list(x.shape)}")
        y, logdet = actnorm(x.flatten(1), self.log_scale, self._zero, inverse=inverse)  # every dimension a channel
        return y.view(x.shape), logdet
