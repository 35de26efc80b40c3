"""ActNorm: a scale and a shift per channel that the first batch sets."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastflow.nn.base import Bijection
from fastflow.ops import actnorm

__all__ = ["ActNorm"]


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased standard deviation of every channel [C] in float64, over all ranks of torch.distributed."""
    # [C, B S]; the mean first: E[x^2] - E[x]^2 would cancel
    values = x.detach().transpose(0, 1).flatten(1).double()
    count = torch.full((1,), values.shape[1], dtype=torch.float64, device=x.device)
    total = _sum_over_ranks(torch.cat([values.sum(1), count]))
    if total[-1] == 0:
        raise ValueError(f"x: an empty batch {list(x.shape)} has no statistics to initialise ActNorm from")
    mean = total[:-1] / total[-1]
    squares = _sum_over_ranks((values - mean[:, None]).square().sum(1))
    return mean, torch.sqrt(squares / total[-1])


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


class ActNorm(Bijection):
    r"""Activation normalisation :math:`y = (x + b_c)\, e^{\kappa a_c}`; log-determinant :math:`S \kappa \sum_c a_c`.

    The first forward, in training and evaluation alike, sets b and a so that every channel of its output has mean 0
    and standard deviation 1 (biased, over the batch and all positions, over all ranks of torch.distributed).

    Args:
        channels: C; x is [B, C, ...].
        eps: added to the standard deviation: a constant channel stays finite.
        gain: κ; 3 in the code of the paper.

    Raises:
        RuntimeError: ``inverse`` before the first batch; ``initialize`` a second time.

    Paper: Glow, https://arxiv.org/abs/1807.03039.

    >>> layer = ActNorm(6)
    >>> x = 3 + 2 * torch.randn(64, 6, 8, 8)
    >>> z, logdet = layer(x)
    >>> bool(z.mean().abs() < 1e-5), bool((z.std() - 1).abs() < 1e-2)
    (True, True)
    """

    def __init__(self, channels: int, eps: float = 1e-6, gain: float = 1.0):
        super().__init__()
        self.eps, self.gain = eps, gain
        self.bias = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))
        self._ready = False  # the buffer on the host: a forward never waits for a device

    def extra_repr(self) -> str:
        return f"{self.bias.numel()}, eps={self.eps}, gain={self.gain}"

    @property
    def ready(self) -> bool:
        """Has a batch set the parameters (or a checkpoint that one had set)?"""
        return self._ready

    @torch.no_grad()
    def initialize(self, x: Tensor, *, force: bool = False) -> None:
        """Sets the parameters from a batch [B, C, ...]; ``force`` does so again."""
        if self._ready and not force:
            raise RuntimeError("ActNorm is initialised already; initialize(batch, force=True) does it again")
        mean, std = statistics(x)
        self.bias.copy_(-mean)
        self.log_scale.copy_(-torch.log(std + self.eps) / self.gain)
        self._mark(True)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self._ready:
            self.initialize(x)
        return actnorm(x, self.log_scale, self.bias, gain=self.gain)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.require_ready()
        return actnorm(z, self.log_scale, self.bias, gain=self.gain, inverse=True)

    def require_ready(self) -> None:
        if not self._ready:
            raise RuntimeError(
                "ActNorm is not initialised: run a batch of data forward, call initialize(batch) or load a checkpoint"
            )

    def _mark(self, ready: bool) -> None:
        self.initialized.fill_(ready)
        self._ready = ready

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.initialized.is_meta:
            self._ready = bool(self.initialized)
