"""A fixed permutation of the channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastflow.nn.base import Bijection, channels_last, no_logdet

__all__ = ["Permutation"]


class Permutation(Bijection):
    """z[:, i] = x[:, indices[i]].

    Args:
        channels: how many, and ``mode`` makes the permutation; or the indices themselves.
        mode: ``"reverse"``, or ``"shuffle"``: drawn once, with ``generator``, and saved in the ``state_dict``.

    >>> Permutation(3)(torch.tensor([[1.0, 2.0, 3.0]]))[0]
    tensor([[3., 2., 1.]])
    """

    def __init__(
        self,
        channels: int | Sequence[int] | Tensor,
        mode: Literal["reverse", "shuffle"] = "reverse",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if mode not in ("reverse", "shuffle"):
            raise ValueError(f"mode: expected 'reverse' or 'shuffle', got {mode!r}")
        if not isinstance(channels, int):
            indices = torch.as_tensor(channels)
        elif mode == "reverse":
            indices = torch.arange(channels - 1, -1, -1)
        else:
            indices = torch.randperm(channels, generator=generator)
        if indices.dim() != 1 or not torch.equal(indices.sort().values, torch.arange(len(indices))):
            raise ValueError(f"channels: expected each of 0 ... n - 1 once, got {indices.tolist()}")
        self.register_buffer("indices", indices)
        self.register_buffer("inverse_indices", indices.argsort())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _permute(x, self.indices), no_logdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _permute(z, self.inverse_indices), no_logdet(z)

    def extra_repr(self) -> str:
        return f"{len(self.indices)} channels"


def _permute(x: Tensor, indices: Tensor) -> Tensor:
    if x.dim() < 2 or x.shape[1] != len(indices):
        raise ValueError(f"x: expected {len(indices)} channels [B, C, ...], got {list(x.shape)}")
    if channels_last(x):
        return x.movedim(1, -1).index_select(-1, indices).movedim(-1, 1)
    return x.index_select(1, indices)
