"""What the decoder of an image model ends in: log p(x | params) of integer images, and draws from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow.ops._op import accumulator

__all__ = ["Bernoulli", "Categorical", "DiscretizedLogistic", "Likelihood", "likelihood"]


class Likelihood(nn.Module):
    """p(x | params), independent over the sub-pixels of x [B, C, H, W], whose values are 0, 1, ..., levels - 1.

    ``features``: how many channels of ``params`` [B, C * features, H, W] go with a channel of x, side by side.
    Samples and means have the values and the shape of x, in the dtype of the parameters.
    """

    features = 1

    def __init__(self, levels: int) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"levels: expected at least 2, got {levels}")
        self.levels = levels

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        """[B] in nats."""
        raise NotImplementedError(f"{type(self).__name__} has no log_prob")

    def mean(self, params: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no mean")

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no sample")

    def center(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x as an encoder wants it: the middles of ``levels`` bins that share [-0.5, 0.5]."""
        return (x.to(dtype) + 0.5) / self.levels - 0.5

    def check(self, x: Tensor) -> None:
        """Integers in range; on a GPU this would wait for the device and is left out."""
        if x.is_cuda or not x.numel() or torch.compiler.is_compiling():
            return
        good = (x >= 0) & (x <= self.levels - 1)
        if x.is_floating_point():
            good &= x == x.floor()
        if not good.all():
            wrong = x[~good][0].item()
            raise ValueError(f"x: expected the whole numbers 0 to {self.levels - 1}, got {wrong:g}")

    def extra_repr(self) -> str:
        return f"levels={self.levels}"


class Bernoulli(Likelihood):
    r"""Binary images: :math:`\log p = \sum_i x_i \ell_i - \log(1 + e^{\ell_i})` with logits :math:`\ell`.

    >>> Bernoulli().log_prob(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    tensor([-2.7726])
    """

    def __init__(self) -> None:
        super().__init__(2)

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        logits = params.to(accumulator(params.dtype))
        return -F.binary_cross_entropy_with_logits(logits, x.to(logits.dtype), reduction="none").flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        return torch.sigmoid(params)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(torch.sigmoid(params), generator=generator)

    def center(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype)  # as it comes, as in the literature


class Categorical(Likelihood):
    """A logit for every level: params [B, C * levels, H, W]; fastest in channels_last, where a pixel's logits adjoin.

    >>> Categorical(4).log_prob(torch.zeros(1, 1, 1, 1), torch.zeros(1, 4, 1, 1))
    tensor([-1.3863])
    """

    def __init__(self, levels: int = 256) -> None:
        super().__init__(levels)
        self.features = levels

    def _rows(self, params: Tensor) -> Tensor:
        """[B H W C, levels]"""
        return params.permute(0, 2, 3, 1).reshape(-1, self.levels)

    def _image(self, values: Tensor, params: Tensor) -> Tensor:
        """[B H W C] -> [B, C, H, W]"""
        batch, channels, height, width = params.shape
        return values.view(batch, height, width, channels // self.levels).permute(0, 3, 1, 2)

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        logits = self._rows(params)
        target = x.permute(0, 2, 3, 1).reshape(-1).long()
        nats = F.cross_entropy(logits.to(accumulator(logits.dtype)), target, reduction="none")
        return -nats.view(len(x), x[0].numel() if len(x) else 1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        levels = torch.arange(self.levels, dtype=params.dtype, device=params.device)
        return self._image(self._rows(params).softmax(1) @ levels, params)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        rows = self._rows(params).softmax(1)
        drawn = torch.multinomial(rows, 1, generator=generator) if len(rows) else rows[:, :1]
        return self._image(drawn[:, 0].to(params.dtype), params)


class DiscretizedLogistic(Likelihood):
    r"""A logistic distribution cut into ``levels`` bins of width 1 / levels on [-0.5, 0.5).

    With :math:`F(v) = \sigma((v - m) / s)` the bin i has :math:`F(v_{i+1}) - F(v_i)`, :math:`v_i = i / levels - 0.5`;
    the first and the last bin take the tails, so that the bins sum to one (openai/iaf leaves the tails out). m is
    ``params``; log s is a parameter of its own for every channel, learnt.

    In the tails the difference is a product, :math:`\sigma(b) - \sigma(a) = \sigma(b) \sigma(-a) (1 - e^{a-b})`,
    whose logarithm is finite wherever a and b are.

    Papers: https://arxiv.org/abs/1606.04934 (IAF), https://arxiv.org/abs/1701.05517 (PixelCNN++).

    >>> p = DiscretizedLogistic(4)
    >>> x = torch.arange(4.0).view(4, 1, 1, 1)
    >>> p.log_prob(x, torch.zeros(4, 1, 1, 1)).exp().sum().item()
    1.0
    """

    def __init__(self, levels: int = 256, channels: int = 1, log_scale: float = 0.0) -> None:
        super().__init__(levels)
        self.log_scale = nn.Parameter(torch.full((channels, 1, 1), float(log_scale)))

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        mean = params.to(accumulator(params.dtype))
        log_s = self.log_scale.to(mean.dtype)
        x = x.to(mean.dtype)
        low = (x / self.levels - 0.5 - mean) * torch.exp(-log_s)  # a
        width = torch.exp(-math.log(self.levels) - log_s)  # b - a
        first, last = x == 0, x == self.levels - 1
        below, above = F.logsigmoid(low + width), F.logsigmoid(-low)
        inner = below + above + torch.log(-torch.expm1(-width))
        return torch.where(first, below, torch.where(last, above, inner)).flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        """The mode's place on the scale of x, not rounded."""
        return ((params + 0.5) * self.levels - 0.5).clamp(0, self.levels - 1)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        u = torch.rand(params.shape, generator=generator, dtype=params.dtype, device=params.device)
        u = u.clamp(torch.finfo(u.dtype).tiny, 1 - torch.finfo(u.dtype).eps)
        v = params + self.log_scale.exp() * torch.logit(u)
        return ((v + 0.5) * self.levels).floor().clamp(0, self.levels - 1)


def likelihood(name: str, levels: int = 256, channels: int = 1) -> Likelihood:
    """``bernoulli`` (two levels, whatever ``levels`` says), ``categorical`` or ``logistic``."""
    if name == "bernoulli":
        return Bernoulli()
    if name == "categorical":
        return Categorical(levels)
    if name == "logistic":
        return DiscretizedLogistic(levels, channels)
    raise ValueError(f"likelihood: expected one of bernoulli, categorical, logistic, got {name!r}")
