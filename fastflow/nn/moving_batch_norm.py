"""Batch normalisation by running statistics, as FFJORD's models have it between their blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow.nn.batch_norm import BatchNorm, moments

__all__ = ["MovingBatchNorm"]


class MovingBatchNorm(BatchNorm):
    r"""Normalisation by running averages, in training too:
    :math:`y = (x - \mu_c)\, e^{\gamma_c} / \sqrt{\sigma_c^2 + \epsilon} + \beta_c`, with
    :math:`\log|\det| = S \sum_c (\gamma_c - \frac12 \log(\sigma_c^2 + \epsilon))` for S positions.

    The averages μ and σ² are constants: no gradient goes through them, and a density is one of every sample by
    itself. A batch seen in training mode moves them, by ``momentum``, after it was normalised; so ``inverse`` works in
    both modes, but undoes a ``forward`` exactly in evaluation mode only. Mean and unbiased variance of a batch are
    taken over all positions and over all ranks of torch.distributed. The averages start at 0 and 1.

    Args:
        channels: C; x is [B, C, ...].
        eps: ε.
        momentum: weight of a batch in the running averages (the paper's code calls it ``decay``).
        affine: γ and β are learned, from 0.
        lag: share of the batch's own statistics in those that training normalises by, with their gradient; they are
            then divided by :math:`1 - \mathrm{lag}^{n}` in the n-th batch, as in the paper's code. A density in
            training mode is then one of the whole batch, and ``inverse`` still goes by the running averages.

    Raises:
        ValueError: an empty batch in training mode, which has no statistics.

    Paper: FFJORD, https://arxiv.org/abs/1810.01367.

    >>> layer = MovingBatchNorm(6)
    >>> x = 3 + 2 * torch.randn(64, 6, 8, 8)
    >>> for _ in range(100):
    ...     z, logdet = layer(x)
    >>> bool(z.mean().abs() < 1e-3), bool((z.std() - 1).abs() < 1e-2)
    (True, True)
    >>> z, logdet = layer.eval()(x)
    >>> bool(torch.allclose(layer.inverse(z)[0], x, atol=1e-4))
    True
    """

    def __init__(
        self, channels: int, eps: float = 1e-4, momentum: float = 0.1, affine: bool = True, lag: float = 0.0
    ) -> None:
        super().__init__(channels, eps, momentum, affine)
        if not 0 <= lag < 1:
            raise ValueError(f"lag: expected a number in [0, 1), got {lag}")
        self.lag = lag

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lag={self.lag}"

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check("x", x)
        # copies: the averages move before a backward pass reads them
        mean, variance = self.running_mean.clone(), self.running_var.clone()
        if self.training:
            with torch.set_grad_enabled(self.lag > 0 and torch.is_grad_enabled()):
                batch_mean, batch_variance = moments(x, correction=1)
            if self.lag:
                debias = 1 - self.lag ** (self.batches + 1)
                mean = torch.lerp(mean.to(batch_mean.dtype), batch_mean, self.lag) / debias
                variance = torch.lerp(variance.to(batch_mean.dtype), batch_variance, self.lag) / debias
            self._remember(batch_mean, batch_variance, self.momentum)
        return self._normalise(x, mean, variance)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._restore(z)
