"""From integer pixels to densities and back: dequantisation, bits per dimension, a baseline."""

import math

import torch
from torch import Tensor

from .errors import UserError


def dequantize(pixels: Tensor, levels: int, u: Tensor) -> Tensor:
    """`(pixels + u) / levels - 0.5` in [-0.5, 0.5), float32, for noise `u` in [0, 1).

    `pixels` is uint8 [B, C, H, W] with values below `levels`; `u` has as many elements.
    """
    return (pixels.float() + u.view_as(pixels)) / levels - 0.5


def quantize(x: Tensor, levels: int) -> Tensor:
    """The uint8 pixels of `x`: the inverse of `dequantize`, clamped to 0..levels-1.

    Raises `UserError` when `x` holds infinities or NaN, which have no pixel value.
    """
    bad = (~torch.isfinite(x)).flatten(1).any(1).sum().item()
    if bad:
        raise UserError(f"expected finite samples, got {bad} of {len(x)} with inf or nan")
    return ((x.float() + 0.5) * levels).floor().clamp(0, levels - 1).to(torch.uint8)


def bits_per_dim(log_prob: Tensor, dims: int, levels: int) -> Tensor:
    """Bits per sub-pixel of a density on dequantised pixels.

    `-(log_prob - dims * log(levels)) / (dims * log 2)`: `log_prob` in nats, `dims = C*H*W`, and the
    constant is the log-volume of the cell that a pixel value fills.

    >>> bits_per_dim(torch.zeros(1), dims=64, levels=256)  # a uniform density on [-0.5, 0.5)
    tensor([8.])
    """
    return math.log2(levels) - log_prob / (dims * math.log(2))


def histogram_bits(train: Tensor, held_out: Tensor, levels: int) -> float:
    """Bits per dimension of one histogram per sub-pixel: what a model has to beat.

    Fitted on `train`, measured on `held_out`, both uint8 [N, C, H, W]; one count is added to every
    bin so that a value unseen in training costs a finite number of bits.
    """
    columns = train.flatten(1).T.long()  # [D, N]
    counts = torch.ones(len(columns), levels, dtype=torch.float64)
    counts.scatter_add_(1, columns, torch.ones(columns.shape, dtype=torch.float64))
    log_p = (counts / counts.sum(1, keepdim=True)).log2()
    return -log_p.gather(1, held_out.flatten(1).T.long()).mean().item()


def bernoulli_nats(train: Tensor, held_out: Tensor, levels: int) -> float:
    """Nats of an image of bits under one probability per sub-pixel, fitted on `train`, both uint8 [N, C, H, W].

    A grey pixel is a bit that is 1 with probability pixel / (levels - 1): the figure is the mean over its draws. One
    count is added to zeros and ones.
    """
    ones = train.flatten(1).sum(0, dtype=torch.float64) / (levels - 1)
    p = (ones + 1) / (len(train) + 2)
    share = held_out.flatten(1).sum(0, dtype=torch.float64) / (levels - 1) / len(held_out)
    return -(share * p.log() + (1 - share) * torch.log1p(-p)).sum().item()
