"""What the variational autoencoders share: the bound, its training loss, and the importance-sampled likelihood.

Kingma & Welling, 2014, https://arxiv.org/abs/1312.6114; Burda, Grosse & Salakhutdinov, 2016 (importance sampling),
https://arxiv.org/abs/1509.00519; Kingma et al., 2016 (free bits), https://arxiv.org/abs/1606.04934.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastflow.nn.base import no_context
from fastflow.nn.likelihood import Likelihood

__all__ = ["VAE", "Terms"]


class Terms(NamedTuple):
    """One draw of the latents of every image: log p(x | z) [B]; log q(z | x) - log p(z) [B]; what is trained of the
    latter: itself, or, with free bits, the batch's mean of every group of latents where it is above them: a scalar."""

    log_likelihood: Tensor
    kl: Tensor
    trained_kl: Tensor


class VAE(nn.Module):
    r"""log p(x) >= E_q[log p(x|z) + log p(z) - log q(z|x)], all in nats, no constant left out.

    A subclass sets ``config``, ``image_shape``, ``likelihood``, ``warmup`` and ``samples``, and gives
    :meth:`encode`, :meth:`terms` and :meth:`decode_prior`. Images are [B, C, H, W] of whole numbers from 0 to
    levels - 1, of any dtype.
    """

    config: dict[str, Any]
    image_shape: tuple[int, int, int]
    likelihood: Likelihood
    warmup: float = 0.0
    samples: int = 100

    # --- of a subclass ----------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Everything the posterior takes from the images: tensors [B, ...]."""
        raise NotImplementedError(f"{type(self).__name__} has no encode")

    def terms(self, x: Tensor, encoded: tuple[Tensor, ...], generator: torch.Generator | None = None) -> Terms:
        """The bound's terms for one new draw of the latents."""
        raise NotImplementedError(f"{type(self).__name__} has no terms")

    def decode_prior(self, n: int, temperature: float, generator: torch.Generator | None) -> Tensor:
        """The likelihood's parameters for n latents from the prior."""
        raise NotImplementedError(f"{type(self).__name__} has no decode_prior")

    # --- the bound --------------------------------------------------------------------------------------

    def elbo(self, x: Tensor, beta: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """log p(x|z) - beta (log q(z|x) - log p(z)) [B] for one draw of z; with beta = 1 a bound of log p(x)."""
        terms = self.terms(self.check(x), self.encode(x), generator)
        return terms.log_likelihood - beta * terms.kl

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The bound [B] in nats, so that DistributedDataParallel can wrap the model."""
        no_context(context)
        return self.elbo(x)

    def beta(self, progress: float) -> float:
        """The weight of the KL after this fraction of the training: it rises linearly to 1 over ``warmup``."""
        return min(1.0, progress / self.warmup) if self.warmup else 1.0

    def loss(self, x: Tensor, progress: float = 1.0) -> Tensor:
        """What training minimises the mean of, [B]: minus the bound, with free bits and the warm-up of beta."""
        terms = self.terms(self.check(x), self.encode(x))
        return self.beta(progress) * terms.trained_kl - terms.log_likelihood

    def log_prob(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        samples: int | None = None,
        rows: int = 1024,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        r"""log p(x) [B] by importance sampling: :math:`\log \tfrac1S \sum_s p(x, z_s) / q(z_s | x)`, S = ``samples``,
        by default the model's.

        A lower bound in expectation that tightens with S. The images are encoded once; at most ``rows`` latents are
        decoded at a time, so without gradients the memory does not depend on S.
        """
        no_context(context)
        samples = self.samples if samples is None else samples
        if samples < 1 or rows < 1:
            raise ValueError(f"samples, rows: expected at least 1, got {samples} and {rows}")
        self.check(x)
        found = []
        for part in x.split(rows):
            encoded, weights = self.encode(part), []
            for done in range(0, samples, draws := max(1, rows // max(1, len(part)))):
                s = min(draws, samples - done)
                repeated = tuple(tensor.repeat_interleave(s, 0) for tensor in encoded)
                terms = self.terms(part.repeat_interleave(s, 0), repeated, generator)
                weights.append((terms.log_likelihood - terms.kl).view(len(part), s).double())
            found.append(torch.cat(weights, 1).logsumexp(1) - math.log(samples))
        return torch.cat(found).to(terms.kl.dtype)

    def evaluate(self, x: Tensor) -> Tensor:
        """The figure to report at the end of a training: :meth:`log_prob`."""
        return self.log_prob(x)

    # --- samples ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """n images [n, C, H, W] of whole numbers; the temperature multiplies the standard deviation of the prior."""
        no_context(context)
        return self.likelihood.sample(self.decode_prior(n, temperature, generator), generator)

    @torch.no_grad()
    def sample_mean(self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """The mean of p(x | z) for n latents from the prior: smoother to look at than samples."""
        return self.likelihood.mean(self.decode_prior(n, temperature, generator))

    def initialize(self, batch: Tensor, context: Tensor | None = None) -> None:
        """Nothing here is set by data."""
        no_context(context)

    def check(self, x: Tensor) -> Tensor:
        """x, if it has the shape and the values of the model's images."""
        if x.dim() != 4 or tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"x: expected [B, {', '.join(map(str, self.image_shape))}], got {list(x.shape)}")
        self.likelihood.check(x)
        return x
