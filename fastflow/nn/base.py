"""What a layer of a flow is, a chain of them, and a layer turned round."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from fastflow.ops._op import accumulator

__all__ = ["Bijection", "Inverse", "Sequential"]


def no_logdet(x: Tensor) -> Tensor:
    """Zeros [B]: the log-determinant of a layer that only moves elements."""
    return x.new_zeros(x.shape[:1], dtype=accumulator(x.dtype))


def no_context(context: Tensor | None) -> None:
    """Raises where a model that takes no context is given one."""
    if context is not None:
        raise ValueError(f"context: this model takes none, got a tensor {list(context.shape)}")


def channels_last(x: Tensor) -> bool:
    """Do the channels of a position [B, C, H, W] lie side by side? True for a channel split of channels_last, too."""
    return x.dim() == 4 and x.stride(1) == 1 and x.stride(3) >= x.shape[1]


class Bijection(nn.Module):
    """An invertible layer: ``forward`` is data -> latent, ``inverse`` latent -> data.

    Both take (x [B, ...], context) and return the value and the log-determinant [B] of their own direction, a sum
    over the sample. A layer without use for the context ignores it.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} has no inverse")


class Sequential(Bijection):
    """Bijections one after the other; their log-determinants add up, and all get the same context.

    >>> import torch
    >>> flow = Sequential(Inverse(Sequential()), Sequential())
    >>> z, logdet = flow(torch.ones(3, 2))
    >>> len(flow), logdet
    (2, tensor([0., 0., 0.]))
    """

    def __init__(self, *bijections: Bijection) -> None:
        super().__init__()
        for i, bijection in enumerate(bijections):
            self.add_module(str(i), bijection)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = no_logdet(x)
        for bijection in self:
            x, logdet = bijection(x, context)
            total = total + logdet
        return x, total

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = no_logdet(z)
        for bijection in reversed(list(self)):
            z, logdet = bijection.inverse(z, context)
            total = total + logdet
        return z, total

    def __iter__(self) -> Iterator[Bijection]:
        return iter(self._modules.values())

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, i: int) -> Bijection:
        return list(self)[i]


class Inverse(Bijection):
    """A bijection with its directions exchanged."""

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        self.bijection = bijection

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection(z, context)
