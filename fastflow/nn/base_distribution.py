"""Where a flow ends: distributions over the latent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow.ops._op import accumulator
from fastflow.ops.gaussian import gaussian_log_prob, gaussian_sample
from fastflow.ops.scale_map import ScaleMap

__all__ = ["Base", "DiagonalGaussian", "Logistic", "StandardNormal"]


class Base(nn.Module):
    """A distribution over latents [B, *shape]. Log-likelihoods are in nats, [B], and those of a tempered sample are
    the untempered distribution's. A base without use for the context ignores it."""

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if not self.shape:
            raise ValueError("shape: expected the sizes of a sample [C, ...], got none")

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no log_prob")

    def sample_and_log_prob(
        self,
        n: int,
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(z [n, *shape], log_prob(z) [n]); ``temperature`` multiplies the scale: the standard deviation."""
        raise NotImplementedError(f"{type(self).__name__} has no sample_and_log_prob")

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """z [n, *shape], without a graph."""
        return self.sample_and_log_prob(n, context, temperature, generator)[0]

    def _check(self, z: Tensor) -> None:
        if tuple(z.shape[1:]) != self.shape:
            raise ValueError(f"z: expected [B, {', '.join(map(str, self.shape))}], got {list(z.shape)}")

    def extra_repr(self) -> str:
        return f"shape={self.shape}"


class StandardNormal(Base):
    """N(0, 1) in every dimension. Samples have the dtype and device that the module was moved to.

    >>> base = StandardNormal(2)
    >>> base.log_prob(torch.zeros(1, 2))
    tensor([-1.8379])
    """

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__(shape)
        self.register_buffer("_like", torch.empty(0), persistent=False)

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self._check(z)
        return gaussian_log_prob(z)

    def sample_and_log_prob(
        self,
        n: int,
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        return gaussian_sample(
            shape=(n, *self.shape),
            temperature=temperature,
            generator=generator,
            dtype=self._like.dtype,
            device=self._like.device,
        )


class Logistic(Base):
    """The standard logistic in every dimension: log p(z) = -softplus(z) - softplus(-z), standard deviation π / √3.

    Samples have the dtype and device that the module was moved to.

    Paper: NICE, https://arxiv.org/abs/1410.8516.

    >>> base = Logistic(2)
    >>> base.log_prob(torch.zeros(1, 2))
    tensor([-2.7726])
    """

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__(shape)
        self.register_buffer("_like", torch.empty(0), persistent=False)

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self._check(z)
        z = z.to(accumulator(z.dtype))
        return (F.logsigmoid(z) + F.logsigmoid(-z)).flatten(1).sum(1)

    def sample_and_log_prob(
        self,
        n: int,
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not temperature >= 0:
            raise ValueError(f"temperature: expected a number >= 0, got {temperature}")
        # in float64: the grid of float32's uniform numbers would show in the tails, and end them at 17
        u = torch.rand((n, *self.shape), generator=generator, dtype=torch.float64, device=self._like.device)
        u = u.clamp_(min=2.0**-54)
        z = (temperature * (torch.log(u) - torch.log1p(-u))).to(self._like.dtype)
        return z, self.log_prob(z)


class DiagonalGaussian(Base):
    """N(mean, s(h)) with parameters of its own; it starts at mean 0 and h 0.

    Args:
        shape: of a sample, [C, ...].
        learned: parameters, or buffers that stay as they are.
        per_channel: one mean and one h for every channel, [1, C, 1, ...]; otherwise for every dimension, [1, *shape].
        scale: how h becomes the standard deviation, :func:`fastflow.gaussian_log_prob`; ``"exp"`` is s = e^h.

    >>> base = DiagonalGaussian((3, 4, 4), per_channel=True)
    >>> base.log_scale.shape, base.sample(2).shape
    (torch.Size([1, 3, 1, 1]), torch.Size([2, 3, 4, 4]))
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        learned: bool = True,
        per_channel: bool = False,
        scale: str | ScaleMap = "exp",
    ) -> None:
        super().__init__(shape)
        self.scale = scale
        size = (1, self.shape[0], *[1] * (len(self.shape) - 1)) if per_channel else (1, *self.shape)
        for name in ("mean", "log_scale"):
            if learned:
                self.register_parameter(name, nn.Parameter(torch.zeros(size)))
            else:
                self.register_buffer(name, torch.zeros(size))

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self._check(z)
        return gaussian_log_prob(z, self.mean, self.log_scale, scale=self.scale)

    def sample_and_log_prob(
        self,
        n: int,
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        return gaussian_sample(
            self.mean,
            self.log_scale,
            shape=(n, *self.shape),
            scale=self.scale,
            temperature=temperature,
            generator=generator,
        )
