"""A VAE of images whose posterior is a normalizing flow with parameters from the encoder.

Planar and radial: Rezende & Mohamed, 2015, https://arxiv.org/abs/1505.05770. IAF: Kingma et al., 2016,
https://arxiv.org/abs/1606.04934. Networks, training and the three Sylvester flows: van den Berg et al., 2018,
https://arxiv.org/abs/1803.05649.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fastflow.models.iaf import IAF
from fastflow.models.vae import VAE, Terms
from fastflow.nn.base import Bijection, Sequential
from fastflow.nn.likelihood import likelihood as make_likelihood
from fastflow.nn.planar import Planar
from fastflow.nn.radial import Radial
from fastflow.nn.sylvester import Sylvester
from fastflow.ops import gaussian_log_prob, gaussian_sample
from fastflow.ops.scale_map import scale_map

__all__ = ["POSTERIORS", "FlowVAE", "posterior_flow"]

POSTERIORS = (
    "diagonal",
    "planar",
    "radial",
    "iaf",
    "sylvester-orthogonal",
    "sylvester-householder",
    "sylvester-triangular",
)

_log_softplus = scale_map("softplus").log_scale


# --- the networks -------------------------------------------------------------------------------------


def gated(layer: type[nn.Module], inputs: int, outputs: int, *args: int) -> nn.Sequential:
    """a * sigmoid(b), where a and b are the halves of what the layer gives: (inputs) -> (outputs) channels."""
    return nn.Sequential(layer(inputs, 2 * outputs, *args), nn.GLU(1))


def _halved(size: int) -> int:
    return (size + 1) // 2  # of a 5x5 convolution with stride 2 and padding 2


def conv_encoder(image_shape: tuple[int, int, int], hidden: int) -> nn.Sequential:
    """The five gated 5x5 convolutions of Sylvester's encoder and a gated layer over what is left: -> [B, hidden]."""
    channels, height, width = image_shape
    left = 64 * _halved(_halved(height)) * _halved(_halved(width))
    return nn.Sequential(
        gated(nn.Conv2d, channels, 32, 5, 1, 2),
        gated(nn.Conv2d, 32, 32, 5, 2, 2),
        gated(nn.Conv2d, 32, 64, 5, 1, 2),
        gated(nn.Conv2d, 64, 64, 5, 2, 2),
        gated(nn.Conv2d, 64, 64, 5, 1, 2),
        nn.Flatten(),
        gated(nn.Linear, left, hidden),
    )


def conv_decoder(image_shape: tuple[int, int, int], latent: int) -> nn.Sequential:
    """The encoder's mirror image: [B, latent] -> [B, 32, H, W]."""
    _, *full = image_shape
    half = [_halved(size) for size in full]
    quarter = [_halved(size) for size in half]

    def doubled(inputs: int, outputs: int, small: list[int], large: list[int]) -> nn.Sequential:
        # a transposed convolution leaves the parity of the size open
        odd = tuple(b - (2 * a - 1) for a, b in zip(small, large, strict=True))
        return gated(nn.ConvTranspose2d, inputs, outputs, 5, 2, 2, odd)

    return nn.Sequential(
        gated(nn.Linear, latent, 64 * quarter[0] * quarter[1]),
        nn.Unflatten(1, (64, *quarter)),
        gated(nn.Conv2d, 64, 64, 5, 1, 2),
        doubled(64, 32, quarter, half),
        gated(nn.Conv2d, 32, 32, 5, 1, 2),
        doubled(32, 32, half, full),
        gated(nn.Conv2d, 32, 32, 5, 1, 2),
    )


def mlp_encoder(image_shape: tuple[int, int, int], width: int, hidden: int) -> nn.Sequential:
    """Two gated layers: -> [B, hidden]."""
    dims = image_shape[0] * image_shape[1] * image_shape[2]
    return nn.Sequential(nn.Flatten(), gated(nn.Linear, dims, width), gated(nn.Linear, width, hidden))


def mlp_decoder(image_shape: tuple[int, int, int], width: int, latent: int, features: int) -> nn.Sequential:
    """Two gated layers and a linear one: [B, latent] -> [B, features, H, W]."""
    _, height, wide = image_shape
    return nn.Sequential(
        gated(nn.Linear, latent, width),
        gated(nn.Linear, width, width),
        nn.Linear(width, features * height * wide),
        nn.Unflatten(1, (features, height, wide)),
    )


# --- the posterior ------------------------------------------------------------------------------------


def posterior_flow(
    kind: str, latent: int, steps: int, *, rank: int = 8, width: int = 320, forget_bias: float = 2.0
) -> Bijection:
    """The flow z_0 -> z_K of that name on [B, latent], with its parameters in the context; empty for ``diagonal``."""
    if kind == "diagonal":
        return Sequential()
    if kind in ("planar", "radial"):
        return (Planar if kind == "planar" else Radial)(latent, steps, amortised=True)
    if kind == "iaf":
        return IAF(latent, steps, hidden=(width,), context_features=width, forget_bias=forget_bias)
    if kind.startswith("sylvester-") and kind in POSTERIORS:
        return Sylvester(latent, steps, kind.removeprefix("sylvester-"), ortho=rank, householder=rank)
    raise ValueError(f"posterior: expected one of {', '.join(POSTERIORS)}, got {kind!r}")


class FlowVAE(VAE):
    r"""A VAE with :math:`z_0 \sim N(\mu, \sigma^2)` and :math:`z_K = f_K \circ \dots \circ f_1(z_0)`, prior N(0, 1).

    .. math:: \log p(x) \ge E[\log p(x|z_K) + \log p(z_K) - \log q_0(z_0|x) + \sum_k \log|\det \partial f_k|]

    One linear layer on the encoder's output h gives the parameters of all steps. The variance is softplus(linear(h)).

    Args:
        image_shape: (C, H, W), any sizes.
        latent: D, dimensions of z.
        posterior: ``diagonal`` (no flow), ``planar``, ``radial``, ``iaf``, ``sylvester-orthogonal``,
            ``sylvester-householder`` or ``sylvester-triangular``.
        steps: K.
        rank: M, columns of Q of the orthogonal and reflections of the Householder Sylvester flow.
        iaf_width, forget_bias: of the masked networks of IAF, and of its gates: the larger, the nearer to the identity
            is the start.
        encoder: ``conv``, the gated convolutions of the Sylvester paper, or ``mlp``; the decoder is its mirror image.
        hidden: of h. width: of the layers of ``mlp``.
        likelihood: ``bernoulli``, ``categorical`` (a logit for every level) or ``logistic`` (discretised).
        levels: of a sub-pixel, for the latter two.
        head: channels before the last, 1x1 convolution of a categorical decoder: of a 5x5 convolution that follows
            ``conv`` (0 leaves it out), of the image that ``mlp`` gives.
        variance: bounds of the posterior's variance; the paper has (0.01, 7) with the categorical likelihood.
        warmup: fraction of the training over which the weight of the KL rises from 0 to 1.
        free_bits: nats below which the batch's mean KL is not trained further.
        samples: of the importance-sampled likelihood (5000 in the papers).

    Images are [B, C, H, W] of whole numbers, 0 or 1 for ``bernoulli``.

    Raises:
        ValueError: a setting or an image that does not fit; the message says which and what was expected.

    >>> model = FlowVAE((1, 8, 8), latent=4, encoder="mlp", width=32, hidden=16)
    >>> x = torch.bernoulli(torch.rand(5, 1, 8, 8))
    >>> model(x).shape, model.log_prob(x, samples=8).shape, model.sample(3).shape
    (torch.Size([5]), torch.Size([5]), torch.Size([3, 1, 8, 8]))
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 28, 28),
        latent: int = 64,
        posterior: str = "diagonal",
        steps: int = 4,
        *,
        rank: int = 8,
        iaf_width: int = 320,
        forget_bias: float = 2.0,
        encoder: Literal["conv", "mlp"] = "conv",
        hidden: int = 256,
        width: int = 300,
        likelihood: Literal["bernoulli", "categorical", "logistic"] = "bernoulli",
        levels: int = 256,
        head: int = 256,
        variance: Sequence[float] | None = None,
        warmup: float = 0.0,
        free_bits: float = 0.0,
        samples: int = 100,
    ) -> None:
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if len(image_shape) != 3 or any(not isinstance(size, int) or size < 1 for size in image_shape):
            raise ValueError(f"image_shape: expected positive sizes (C, H, W), got {tuple(image_shape)}")
        self.config["image_shape"] = self.image_shape = tuple(image_shape)
        for name, value, least in (
            ("latent", latent, 1),
            ("steps", steps, 1),
            ("hidden", hidden, 1),
            ("width", width, 1),
            ("head", head, 0 if encoder == "conv" else 1),
            ("warmup", warmup, 0),
            ("free_bits", free_bits, 0),
            ("samples", samples, 1),
        ):
            if not value >= least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        low, high = variance = (0.0, math.inf) if variance is None else tuple(variance)
        if not 0 <= low < high:
            raise ValueError(f"variance: expected bounds 0 <= low < high, got {variance}")
        self._bounds = (math.log(low) if low else -math.inf, math.log(high))  # of the logarithm
        self.warmup, self.free_bits, self.samples, self.latent = warmup, free_bits, samples, latent
        self.likelihood = make_likelihood(likelihood, levels, image_shape[0])
        outputs = image_shape[0] * self.likelihood.features
        if encoder == "conv":
            self.encoder = conv_encoder(self.image_shape, hidden)
            self.decoder = conv_decoder(self.image_shape, latent)
            if likelihood == "categorical" and head:
                self.decoder.append(nn.Conv2d(32, head, 5, 1, 2))
            self.decoder.append(nn.Conv2d(head if likelihood == "categorical" and head else 32, outputs, 1))
        elif encoder == "mlp":
            self.encoder = mlp_encoder(self.image_shape, width, hidden)
            features = head if likelihood == "categorical" else outputs
            self.decoder = mlp_decoder(self.image_shape, width, latent, features)
            if likelihood == "categorical":
                self.decoder.append(nn.Conv2d(head, outputs, 1))
        else:
            raise ValueError(f"encoder: expected one of conv, mlp, got {encoder!r}")
        if posterior == "sylvester-orthogonal" and rank > latent:
            raise ValueError(f"rank: expected at most latent = {latent} orthogonal columns, got {rank}")
        self.moments = nn.Linear(hidden, 2 * latent)
        self.flow = posterior_flow(posterior, latent, steps, rank=rank, width=iaf_width, forget_bias=forget_bias)
        features = getattr(self.flow, "context_features", 0)
        self.amortized = nn.Linear(hidden, features) if features else None

    # --- both networks ----------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """(mean, log standard deviation) of q_0 [B, D] and, where the flow has parameters, their [B, P]."""
        h = self.encoder(self.likelihood.center(x, self.moments.weight.dtype))
        mean, raw = self.moments(h).chunk(2, 1)
        log_std = 0.5 * _log_softplus(raw).clamp(*self._bounds)
        return (mean, log_std) if self.amortized is None else (mean, log_std, self.amortized(h))

    def posterior(
        self, encoded: tuple[Tensor, ...], temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """z_K [B, D] and log q(z_K | x) [B]; temperature 0 sends the mean of q_0 through the flow."""
        mean, log_std, *context = encoded
        z, log_q = gaussian_sample(mean, log_std, temperature=temperature, generator=generator)
        z, logdet = self.flow(z, *context)
        return z, log_q - logdet

    def decode(self, z: Tensor) -> Tensor:
        """The parameters of p(x | z), [B, C * likelihood.features, H, W]."""
        features = self.decoder[:-1](z)
        if self.likelihood.features > 1:  # a softmax is fastest over numbers that adjoin
            features = features.contiguous(memory_format=torch.channels_last)
        return self.decoder[-1](features)

    # --- the bound, samples -----------------------------------------------------------------------------

    def terms(self, x: Tensor, encoded: tuple[Tensor, ...], generator: torch.Generator | None = None) -> Terms:
        z, log_q = self.posterior(encoded, generator=generator)
        kl = log_q - gaussian_log_prob(z)
        trained = kl.mean().clamp(min=self.free_bits) if self.free_bits else kl
        return Terms(self.likelihood.log_prob(x, self.decode(z)), kl, trained)

    def decode_prior(self, n: int, temperature: float, generator: torch.Generator | None) -> Tensor:
        like = self.moments.weight
        z, _ = gaussian_sample(
            shape=(n, self.latent), temperature=temperature, generator=generator, dtype=like.dtype, device=like.device
        )
        return self.decode(z)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of p(x | z) where z comes from the mean of q_0, [B, C, H, W]."""
        z, _ = self.posterior(self.encode(self.check(x)), temperature=0)
        return self.likelihood.mean(self.decode(z))
