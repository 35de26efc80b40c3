"""From pixels in an interval to the real line."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.nn.base import Bijection
from fastflow.ops._op import accumulator

__all__ = ["Logit"]


class Logit(Bijection):
    r"""Bounded logit :math:`z = \mathrm{logit}(p)` with :math:`p = \alpha + (1 - 2 \alpha)(x - l) / (h - l)`:
    pixels in [l, h] to the real line, kept off its ends by α.

    The log-determinant sums :math:`-\log p - \log(1 - p) + \log\frac{1 - 2 \alpha}{h - l}` over the sample.

    Args:
        alpha: α in [0, 1/2); 0.05 in RealNVP, 1e-6 in MAF's MNIST.
        low, high: l and h, where the data lie.

    Every p strictly between 0 and 1 has a z. On the CPU anything else is a ValueError; other devices do not wait to
    find out, and compiled code does not branch: there NaN or infinity comes out, which the log-likelihood then is.
    The inverse clamps nothing: every z has its x, and |z| > logit(1 - α) lies outside [l, h], by less than
    α (h - l) / (1 - 2 α).

    Paper: RealNVP, section 4.1, https://arxiv.org/abs/1605.08803.

    >>> layer = Logit(0.05)
    >>> z, logdet = layer(torch.tensor([[0.0, 0.5, 1.0]]))
    >>> z
    tensor([[-2.9444,  0.0000,  2.9444]])
    >>> layer.inverse(z)[0].round(decimals=4)
    tensor([[0.0000, 0.5000, 1.0000]])
    """

    def __init__(self, alpha: float = 0.05, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__()
        if not 0 <= alpha < 0.5:
            raise ValueError(f"alpha: expected a number in [0, 0.5), got {alpha}")
        if not low < high:
            raise ValueError(f"low, high: expected low < high, got {low} and {high}")
        self.alpha, self.low, self.high = alpha, low, high
        self.slope = (1 - 2 * alpha) / (high - low)  # dp / dx

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, low={self.low}, high={self.high}"

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wide = x.to(accumulator(x.dtype))
        # p and 1 - p, each from its own end: 1 - p of a rounded p would have lost its digits
        p, q = self.alpha + self.slope * (wide - self.low), self.alpha + self.slope * (self.high - wide)
        self._check(x, p, q)
        log_p, log_q = torch.log(p), torch.log(q)
        logdet = x[:1].numel() * math.log(self.slope) - (log_p + log_q).flatten(1).sum(1)
        return (log_p - log_q).to(x.dtype), logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wide = z.to(accumulator(z.dtype))
        x = self.low + (torch.sigmoid(wide) - self.alpha) / self.slope
        # log dp/dz = log p + log(1 - p), of z: p itself may round to 0 or 1
        logdet = (F.logsigmoid(wide) + F.logsigmoid(-wide)).flatten(1).sum(1) - z[:1].numel() * math.log(self.slope)
        return x.to(z.dtype), logdet

    def _check(self, x: Tensor, p: Tensor, q: Tensor) -> None:
        if x.device.type != "cpu" or x.numel() == 0 or torch.compiler.is_compiling():
            return
        if not (p.detach().amin() > 0 and q.detach().amin() > 0):
            edge = self.alpha / self.slope
            raise ValueError(
                f"x: expected values inside ({self.low - edge:g}, {self.high + edge:g}), "
                f"got {x.min().item():g} to {x.max().item():g}"
            )
