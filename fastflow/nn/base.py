"""What every layer is: a bijection with the log-determinant of its Jacobian."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Bijection"]


class Bijection(nn.Module):
    """Forward maps data to latents, inverse maps back; both return (value, log|det| [B])."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError
