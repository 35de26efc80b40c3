"""The parts of GRU-ODE-Bayes: the cell of its differential equation, the jump at an observation, the losses.

De Brouwer et al., 2019, https://arxiv.org/abs/1905.12374.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Channels", "GRUODECell", "Jump", "PostLoss", "gaussian_kl"]

PostLoss = Literal["code", "paper"]


class GRUODECell(nn.Module):
    r"""The right-hand side of :math:`dh/dt = (1 - z) \odot (u - h)`.

    ``full``: :math:`r, z = \sigma(W x + U h)` and :math:`u = \tanh(W_u x + U_u (r \odot h))`, the equation of a GRU.
    ``minimal``: without r, with :math:`u = \tanh(W_u x + U_u (z \odot h))`. The matrices of the gates and of u are
    stacked, r, z, u; those on h have no bias. Without ``inputs`` there is no x, and h = 0 stays where it is.
    """

    def __init__(self, hidden: int, inputs: int = 0, kind: Literal["full", "minimal"] = "full") -> None:
        super().__init__()
        if kind not in ("full", "minimal"):
            raise ValueError(f"cell: expected 'full' or 'minimal', got {kind!r}")
        self.kind = kind
        gates = 3 if kind == "full" else 2

        def stacked(width: int) -> nn.Parameter:
            return nn.Parameter(torch.cat([nn.init.xavier_uniform_(torch.empty(hidden, width)) for _ in range(gates)]))

        self.hidden_weight = stacked(hidden)
        self.input_weight = stacked(inputs) if inputs else None
        self.input_bias = nn.Parameter(torch.full((gates * hidden,), 0.05)) if inputs else None


class Jump(nn.Module):
    r"""What an observation does to the state: a GRU cell on
    :math:`relu(W_d [y, \mu, \log\sigma^2, (y-\mu)/\sigma]_d + b_d) m_d` of all channels d, with Q outputs each."""

    def __init__(self, features: int, hidden: int, prepared: int) -> None:
        super().__init__()
        self.prep_weight = nn.Parameter(torch.randn(features, 4, prepared) * math.sqrt(2 / (4 + prepared)))
        self.prep_bias = nn.Parameter(torch.full((features, prepared), 0.1))
        self.gru = nn.GRUCell(features * prepared, hidden)


def gaussian_kl(mean: Tensor, logvar: Tensor, other_mean: Tensor, other_logvar: Tensor) -> Tensor:
    """KL(N(mean, e^logvar) || N(other_mean, e^other_logvar))"""
    ratio = logvar - other_logvar
    return 0.5 * (ratio.exp() - 1 - ratio + (mean - other_mean).square() * torch.exp(-other_logvar))


def bernoulli_kl(logit: Tensor, other: Tensor) -> Tensor:
    """KL(Bernoulli(sigmoid(logit)) || Bernoulli(sigmoid(other)))"""
    return torch.sigmoid(logit) * (F.logsigmoid(logit) - F.logsigmoid(other)) + torch.sigmoid(-logit) * (
        F.logsigmoid(-logit) - F.logsigmoid(-other)
    )


class Channels:
    """What the D channels are distributed as: normal but for those named binary, whose first parameter is the logit.

    ``noise`` is the standard deviation of an observation, for a binary channel the chance that it is wrong.
    """

    def __init__(self, features: int, binary: Sequence[int], noise: float) -> None:
        strange = [d for d in binary if not 0 <= d < features]
        if strange or len(set(binary)) != len(binary):
            raise ValueError(f"binary: expected different channels from 0 to {features - 1}, got {tuple(binary)}")
        if not 0 < noise < (0.5 if binary else math.inf):
            bound = "between 0 and 0.5, the chance that a binary observation is wrong" if binary else "above 0"
            raise ValueError(f"observation_std: expected a number {bound}, got {noise}")
        self.features, self.noise = features, noise
        self.binary = sorted(binary)
        self.normal = [d for d in range(features) if d not in self.binary]

    def _split(self, prediction: Tensor, values: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(mean, logvar, value) of the normal channels, (logit, value) of the binary ones"""
        mean, logvar = prediction.chunk(2, -1)
        if not self.binary:
            return (mean, logvar, values), (mean[..., :0], values[..., :0])
        normal, binary = self.normal, self.binary
        return (mean[..., normal], logvar[..., normal], values[..., normal]), (mean[..., binary], values[..., binary])

    def _joined(self, normal: Tensor, binary: Tensor) -> Tensor:
        """[..., D] again"""
        if not self.binary:
            return normal
        back = torch.tensor([*self.normal, *self.binary]).argsort().tolist()
        return torch.cat((normal, binary), -1)[..., back]

    def check(self, values: Tensor, masks: Tensor) -> None:
        """Binary channels have zeros and ones."""
        if self.binary and bool((wrong := (values[:, self.binary] * (values[:, self.binary] - 1)) != 0).any()):
            r, d = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"values: expected 0 or 1 in binary channel {self.binary[d]}, got {values[r, self.binary[d]]}"
            )

    def log_prob(self, prediction: Tensor, values: Tensor) -> Tensor:
        """[..., D] of values [..., D] under predictions [..., 2D], in nats."""
        (mean, logvar, y), (logit, bit) = self._split(prediction, values)
        normal = -0.5 * ((y - mean).square() * torch.exp(-logvar) + logvar + math.log(2 * math.pi))
        return self._joined(normal, bit * F.logsigmoid(logit) + (1 - bit) * F.logsigmoid(-logit))

    def post_loss(self, pre: Tensor, post: Tensor, values: Tensor, kind: PostLoss) -> Tensor:
        r"""[..., D], how far the prediction after a jump is from what it should be.

        ``code``: :math:`KL(p_{post} || p_{obs})`, where p_obs is a normal around the observation. ``paper``:
        :math:`KL(p_{Bayes} || p_{post})` with :math:`p_{Bayes} \propto p_{pre} p_{obs}`.
        """
        (mean, logvar, y), (logit, bit) = self._split(post, values)
        noise = torch.full_like(logvar, 2 * math.log(self.noise))
        observed = (2 * bit - 1) * (math.log1p(-self.noise) - math.log(self.noise))
        if kind == "code":
            return self._joined(gaussian_kl(mean, logvar, y, noise), bernoulli_kl(logit, observed))
        (prior, spread, _), (prior_logit, _) = self._split(pre, values)
        gain = torch.sigmoid(spread - noise)  # var_pre / (var_pre + var_obs)
        bayes = prior + gain * (y - prior), noise + F.logsigmoid(spread - noise)
        return self._joined(gaussian_kl(*bayes, mean, logvar), bernoulli_kl(prior_logit + observed, logit))

    def moments(self, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [..., D]; of a binary channel p and sqrt(p (1 - p))."""
        (mean, logvar, _), (logit, _) = self._split(prediction, prediction[..., : self.features])
        p = torch.sigmoid(logit)
        return self._joined(mean, p), self._joined(torch.exp(0.5 * logvar), (p * torch.sigmoid(-logit)).sqrt())

    def draw(self, prediction: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Values [..., D]; the temperature multiplies standard deviations and divides logits; 0: the likeliest."""
        (mean, logvar, _), (logit, _) = self._split(prediction, prediction[..., : self.features])
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        uniform = torch.rand(logit.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        level = torch.logit(uniform) * temperature if temperature else torch.zeros_like(logit)
        return self._joined(mean + temperature * torch.exp(0.5 * logvar) * noise, (level < logit).to(mean.dtype))
