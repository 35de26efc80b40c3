"""A deep convolutional VAE with a top-down posterior of inverse autoregressive flows (ResNet VAE with IAF).

Kingma et al., 2016, https://arxiv.org/abs/1606.04934.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow.models.vae import VAE, Terms
from fastflow.nn.likelihood import likelihood as make_likelihood
from fastflow.nn.masked_conv import ConvAutoregressive, Order, WeightNormConv2d

__all__ = ["PRESETS", "IAFLayer", "IAFVAE"]

PRESETS: dict[str, dict[str, Any]] = {
    # openai/iaf, the best run of its README: 3.15 bits/dim on CIFAR-10 (published there; not run here)
    "openai-cifar10": {"image_shape": (3, 32, 32), "depth": 1, "blocks": 20, "hidden": 160, "latent": 32,
                       "free_bits": 0.1},
    "small": {"image_shape": (1, 28, 28), "depth": 2, "blocks": 1, "hidden": 32, "latent": 8, "free_bits": 0.1,
              "likelihood": "bernoulli"},
}  # fmt: skip

RESIDUAL = 0.1  # factor on what a block adds


class IAFLayer(nn.Module):
    """One layer of latents [B, z, H, W]: a residual block on the way up, one on the way down.

    With ``halve`` the input below is twice as high and wide as the latents. With ``top`` nothing goes further up.
    """

    def __init__(
        self,
        hidden: int,
        latent: int,
        *,
        halve: bool,
        top: bool,
        posterior: str,
        ar_hidden: Sequence[int],
        order: Order,
    ) -> None:
        super().__init__()
        self.sizes, self.halve = (latent, hidden), halve
        z, h = latent, hidden
        self.up_first = WeightNormConv2d(h, 2 * z + 2 * h, stride=2 if halve else 1)
        self.up_last = None if top else WeightNormConv2d(h, h)
        self.down_first = WeightNormConv2d(h, 4 * z + 2 * h)
        self.down_last = WeightNormConv2d(h + z, h, stride=2 if halve else 1, upsample=halve)
        self.flow = ConvAutoregressive(z, ar_hidden, order=order, normalize=True) if posterior == "iaf" else None

    def up(self, x: Tensor) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor]]:
        """(the layer's output, what its posterior takes from below: mean, log scale and context)"""
        z, h = self.sizes
        *below, inner = self.up_first(F.elu(x)).split((z, z, h, h), 1)
        if self.up_last is None:
            return None, tuple(below)
        inner = self.up_last(F.elu(inner))
        return (x[..., ::2, ::2] if self.halve else x) + RESIDUAL * inner, tuple(below)

    def down(
        self,
        x: Tensor,
        below: Sequence[Tensor] | None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(the layer's output, log q - log p of every channel of its latents [B, z]); without ``below`` the latents
        come from the prior, and no KL."""
        z, h = self.sizes
        params = self.down_first(F.elu(x)).split((z, z, z, z, h, h), 1)
        prior_mean, prior_log_scale, mean, log_scale, context, inner = params
        noise = torch.randn(prior_mean.shape, generator=generator, dtype=x.dtype, device=x.device)
        kl = None
        if below is None:
            latents = prior_mean + temperature * prior_log_scale.exp() * noise
        else:
            log_scale = log_scale + below[1]
            latents = mean + below[0] + log_scale.exp() * noise
            log_q = -0.5 * noise.square() - log_scale  # both without 0.5 log(2 pi), which the difference loses
            if self.flow is not None:
                latents, shrunk = self.flow.step(latents, context + below[2])
                log_q = log_q + shrunk
            log_p = -0.5 * ((latents - prior_mean) * (-prior_log_scale).exp()).square() - prior_log_scale
            kl = (log_q - log_p).float().sum((2, 3)) if x.dtype != torch.float64 else (log_q - log_p).sum((2, 3))
        inner = self.down_last(F.elu(torch.cat([latents, inner], 1)))
        if self.halve:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return x + RESIDUAL * inner, kl


class IAFVAE(VAE):
    r"""Top-down VAE: layers of latents, each with a posterior from both its sides and a flow on it.

    On the way up every layer leaves a mean, a log scale and a context; on the way down, from a learnt constant, it
    adds its own, draws :math:`z \sim N(\mu_\uparrow + \mu_\downarrow, e^{2(s_\uparrow + s_\downarrow)})` and sends z
    through an inverse autoregressive step (:class:`fastflow.nn.ConvAutoregressive`). The prior of a layer is a
    Gaussian of the layers above. All convolutions but those in and out are 3x3, all are weight-normalised and set
    from the first batch (``initialize``).

    Args:
        image_shape: (C, H, W); H and W divisible by 2^depth.
        depth: scales; the first has half the size of the image, each further one half of that before.
        blocks: layers of latents at every scale.
        hidden, latent: channels h and z.
        posterior: ``iaf`` or ``diagonal`` (no flow).
        ar_hidden: widths of the masked convolutions, by default (h, h); the first must be h.
        order: of the flow's pixels, ``antiraster`` (openai/iaf) or ``raster``.
        free_bits: nats per channel of a layer (summed over positions, the mean over the batch) below which its KL is
            not trained further.
        likelihood: ``logistic`` (discretised, one learnt scale for every channel), ``categorical`` or ``bernoulli``.
        levels: of a sub-pixel. warmup, samples: as in :class:`fastflow.models.FlowVAE`.

    Images are [B, C, H, W] of whole numbers.

    Raises:
        ValueError: a setting or an image that does not fit. RuntimeError: ``initialize`` a second time, samples
        before the first batch.

    >>> model = IAFVAE((1, 8, 8), depth=2, blocks=1, hidden=8, latent=2, likelihood="bernoulli")
    >>> x = torch.bernoulli(torch.rand(16, 1, 8, 8))
    >>> model.initialize(x)
    >>> model(x).shape, model.log_prob(x, samples=4).shape, model.sample(3).shape
    (torch.Size([16]), torch.Size([16]), torch.Size([3, 1, 8, 8]))
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (3, 32, 32),
        depth: int = 1,
        blocks: int = 20,
        hidden: int = 160,
        latent: int = 32,
        *,
        posterior: Literal["iaf", "diagonal"] = "iaf",
        ar_hidden: Sequence[int] | None = None,
        order: Order = "antiraster",
        free_bits: float = 0.1,
        likelihood: Literal["logistic", "categorical", "bernoulli"] = "logistic",
        levels: int = 256,
        warmup: float = 0.0,
        samples: int = 100,
    ) -> None:
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.config["image_shape"] = self.image_shape = tuple(image_shape)
        channels, height, width = self.image_shape
        for name, value, least in (
            ("depth", depth, 1),
            ("blocks", blocks, 1),
            ("hidden", hidden, 1),
            ("latent", latent, 1),
            ("free_bits", free_bits, 0),
            ("warmup", warmup, 0),
            ("samples", samples, 1),
        ):
            if not value >= least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if height % 2**depth or width % 2**depth:
            raise ValueError(f"image_shape: expected sizes divisible by 2^depth = {2**depth}, got {height} x {width}")
        if posterior not in ("iaf", "diagonal"):
            raise ValueError(f"posterior: expected one of iaf, diagonal, got {posterior!r}")
        ar_hidden = (hidden, hidden) if ar_hidden is None else tuple(ar_hidden)
        if not ar_hidden or ar_hidden[0] != hidden:
            raise ValueError(f"ar_hidden: expected widths that begin with hidden = {hidden}, got {ar_hidden}")
        self.free_bits, self.warmup, self.samples = free_bits, warmup, samples
        self.likelihood = make_likelihood(likelihood, levels, channels)
        self.first = WeightNormConv2d(channels, hidden, 5, stride=2)
        self.layers = nn.ModuleList(  # from the image upwards
            IAFLayer(
                hidden,
                latent,
                halve=scale > 0 and block == 0,
                top=(scale, block) == (depth - 1, blocks - 1),
                posterior=posterior,
                ar_hidden=ar_hidden,
                order=order,
            )
            for scale in range(depth)
            for block in range(blocks)
        )
        self.top_shape = (hidden, height >> depth, width >> depth)
        self.top = nn.Parameter(torch.zeros(hidden, 1, 1))
        self.last = WeightNormConv2d(hidden, channels * self.likelihood.features, 5, stride=2, upsample=True)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> IAFVAE:
        """A configuration by name (``PRESETS``), with changes."""
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **changes})

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the posteriors take from below: three tensors of every layer, the lowest first."""
        h = self.first(self.likelihood.center(x, self.top.dtype))
        found: list[Tensor] = []
        for layer in self.layers:
            h, below = layer.up(h)
            found.extend(below)
        return tuple(found)

    def terms(self, x: Tensor, encoded: tuple[Tensor, ...], generator: torch.Generator | None = None) -> Terms:
        h = self.top.expand(len(x), *self.top_shape)
        kls = []
        for i, layer in reversed(list(enumerate(self.layers))):
            h, kl = layer.down(h, encoded[3 * i : 3 * i + 3], generator=generator)
            kls.append(kl)
        kl = torch.cat(kls, 1)  # [B, layers * z]
        trained = kl.mean(0).clamp(min=self.free_bits).sum() if self.free_bits else kl.sum(1)
        return Terms(self.likelihood.log_prob(x, self.last(F.elu(h))), kl.sum(1), trained)

    def decode_prior(self, n: int, temperature: float, generator: torch.Generator | None) -> Tensor:
        if not self.ready:
            raise RuntimeError("sample: the weights are not initialised; run a batch, initialize(batch) or load them")
        h = self.top.expand(n, *self.top_shape)
        for layer in reversed(self.layers):
            h, _ = layer.down(h, None, temperature, generator)
        return self.last(F.elu(h))

    @property
    def ready(self) -> bool:
        """Has a batch set every convolution (or a checkpoint of such a model)?"""
        return all(m.ready for m in self.modules() if isinstance(m, WeightNormConv2d))

    @torch.no_grad()
    def initialize(self, batch: Tensor, context: Tensor | None = None) -> None:
        """Sets gain and bias of every convolution, in order, from one batch; refuses a second one."""
        super().initialize(batch, context)
        if any(m.ready for m in self.modules() if isinstance(m, WeightNormConv2d)):
            raise RuntimeError("initialize: this model has been initialised already")
        self.terms(self.check(batch), self.encode(batch))
