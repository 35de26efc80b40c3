"""Batch normalisation as a layer of a flow."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastflow.nn.base import Bijection
from fastflow.ops import actnorm
from fastflow.ops._op import accumulator

__all__ = ["BatchNorm"]


class BatchNorm(Bijection):
    r"""Batch normalisation :math:`y = (x - \mu_c) / \sqrt{\sigma_c^2 + \epsilon}`, with
    :math:`\log|\det| = -\frac{S}{2} \sum_c \log(\sigma_c^2 + \epsilon)` for S positions.

    In training mode the mean and the (biased) variance are those of the batch and all positions, over all ranks of
    torch.distributed, and the gradient goes through them; a density is then one of the whole batch. In evaluation
    mode they are running averages, and the layer is a bijection of every sample by itself. A channel that does not
    vary stays finite through ε.

    Args:
        channels: C; x is [B, C, ...].
        eps: ε.
        momentum: weight of a batch in the running averages; the first batch sets them.
        affine: ends with :math:`y\, e^{\gamma_c} + \beta_c`, learned, as in MAF; the log-determinant has +S Σ γ.

    Raises:
        RuntimeError: ``inverse`` in training mode, where the statistics of the data are not known.
        ValueError: an empty batch in training mode, which has no statistics.

    Papers: RealNVP, https://arxiv.org/abs/1605.08803; MAF, https://arxiv.org/abs/1705.07057.

    >>> layer = BatchNorm(6)
    >>> x = 3 + 2 * torch.randn(64, 6, 8, 8)
    >>> z, logdet = layer(x)
    >>> bool(z.mean().abs() < 1e-5), bool((z.std() - 1).abs() < 1e-2)
    (True, True)
    >>> back, minus = layer.eval().inverse(z)
    >>> bool(torch.allclose(back, x, atol=1e-4))
    True
    """

    running_mean: Tensor
    running_var: Tensor
    batches: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = False) -> None:
        super().__init__()
        if not eps > 0:
            raise ValueError(f"eps: expected a positive number, got {eps}")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum: expected a number in (0, 1], got {momentum}")
        self.eps, self.momentum = eps, momentum
        self.gamma = nn.Parameter(torch.zeros(channels)) if affine else None
        self.beta = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("batches", torch.tensor(0))

    def extra_repr(self) -> str:
        return f"{self.running_mean.numel()}, eps={self.eps}, momentum={self.momentum}, affine={self.gamma is not None}"

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check("x", x)
        if self.training:
            mean, variance = moments(x)
            # a tensor decides, so that no device is waited for
            self._remember(mean, variance, torch.where(self.batches == 0, 1.0, self.momentum))
        else:
            mean, variance = self.running_mean, self.running_var
        return self._normalise(x, mean, variance)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training:
            raise RuntimeError("BatchNorm has an inverse in evaluation mode only, by its running averages: call eval()")
        return self._restore(z)

    def _normalise(self, x: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        z, logdet = actnorm(x, self._log_scale(variance), -mean)
        return (z if self.beta is None else z + _per_channel(self.beta, z)), logdet

    def _restore(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse by the running averages."""
        self._check("z", z)
        if self.beta is not None:
            z = z - _per_channel(self.beta, z)
        return actnorm(z, self._log_scale(self.running_var), -self.running_mean, inverse=True)

    def _log_scale(self, variance: Tensor) -> Tensor:
        log_scale = -0.5 * torch.log(variance + self.eps)
        return log_scale if self.gamma is None else log_scale + self.gamma

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, weight: Tensor | float) -> None:
        for average, value in ((self.running_mean, mean), (self.running_var, variance)):
            average.lerp_(value.to(average.dtype), weight.to(average.dtype) if isinstance(weight, Tensor) else weight)
        self.batches += 1

    def _check(self, name: str, x: Tensor) -> None:
        channels = self.running_mean.numel()
        if x.dim() < 2 or x.shape[1] != channels:
            raise ValueError(f"{name}: expected {channels} channels [B, C, ...], got {list(x.shape)}")


def moments(x: Tensor, correction: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel [C], over all ranks, with their gradients.

    The variance is the sum of squares over n - ``correction``, or over 1 where a channel has a single value.
    """
    if x.numel() == 0:
        raise ValueError(f"x: an empty batch {list(x.shape)} has no statistics; call eval() to use the running ones")
    variance, mean = torch.var_mean(x.to(accumulator(x.dtype)), [d for d in range(x.dim()) if d != 1], correction=0)
    size = x.numel() // x.shape[1]
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return mean, variance * (size / max(size - correction, 1))
    # every rank counts by its samples
    count = mean.new_full((1,), size)
    total = _SumOverRanks.apply(torch.cat([count * mean, count]))
    overall = total[:-1] / total[-1]
    spread = _SumOverRanks.apply(count * (variance + (mean - overall).square()))
    return overall, spread / (total[-1] - correction).clamp(min=1)


class _SumOverRanks(torch.autograd.Function):
    """The sum over all ranks, in whose gradient every rank's share counts."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return _SumOverRanks.apply(grad)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(1, -1, *[1] * (like.dim() - 2))
