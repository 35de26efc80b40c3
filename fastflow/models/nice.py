"""NICE: additive couplings, which preserve volume, and a learned diagonal, which is all that does not.

Dinh, Krueger & Bengio, 2014, https://arxiv.org/abs/1410.8516.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastflow.nn.base import Bijection, Inverse, Sequential, no_logdet
from fastflow.nn.base_distribution import Logistic, StandardNormal
from fastflow.nn.coupling import AdditiveCoupling
from fastflow.nn.flow import Flow
from fastflow.nn.scaling import Scaling

__all__ = ["NICE", "PRESETS"]

PRESETS: dict[str, dict[str, Any]] = {
    # laurent-dinh/nice: the runs behind the published log-likelihoods
    "mnist": {"image_shape": (1, 28, 28), "couplings": 4, "hidden": 1000, "layers": 5, "interval": (0.0, 1.0)},
    "cifar10": {"image_shape": (3, 32, 32), "couplings": 8, "hidden": 2400, "layers": (1, 1, 3, 3, 2, 2, 1, 1),
                "partition": "halves", "prior": "normal", "interval": (-1.0, 1.0)},
}  # fmt: skip


class Halves(Bijection):
    """A view of a sample [B, *shape] as two halves [B, 2, D / 2]: even and odd indices, or first and second half."""

    def __init__(self, shape: tuple[int, ...], interleaved: bool) -> None:
        super().__init__()
        self.shape, self.interleaved = shape, interleaved

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pair = (math.prod(self.shape) // 2, 2) if self.interleaved else (2, math.prod(self.shape) // 2)
        halves = x.reshape(len(x), *pair)
        return (halves.transpose(1, 2) if self.interleaved else halves), no_logdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = z.transpose(1, 2) if self.interleaved else z
        return x.reshape(len(z), *self.shape), no_logdet(z)


class Stretch(Bijection):
    """[-1/2, 1/2) to [low, high), whatever the shape."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        if not low < high:
            raise ValueError(f"interval: expected low < high, got ({low}, {high})")
        self.centre, self.width = (low + high) / 2, high - low

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * self.width + self.centre, no_logdet(x) + x[:1].numel() * math.log(self.width)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (z - self.centre) / self.width, no_logdet(z) - z[:1].numel() * math.log(self.width)


class Network(nn.Module):
    """The shift of one half from the other: an MLP of ReLUs, [B, 1, n] (and the context [B, P]) -> [B, 1, n]."""

    def __init__(self, n: int, hidden: int, layers: int, context_features: int, init: float) -> None:
        super().__init__()
        sizes = [n + context_features, *[hidden] * layers, n]
        linear = [nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
        for layer in linear:
            nn.init.uniform_(layer.weight, -init, init)
            nn.init.zeros_(layer.bias)
        hiddens = [module for layer in linear[:-1] for module in (layer, nn.ReLU(inplace=True))]
        self.mlp = nn.Sequential(*hiddens, linear[-1])

    def forward(self, kept: Tensor, context: Tensor | None = None) -> Tensor:
        flat = kept.flatten(1) if context is None else torch.cat([kept.flatten(1), context], 1)
        return self.mlp(flat).unsqueeze(1)


class NICE(Flow):
    r"""NICE: :math:`h_2 = x_2 + m(x_1)`, the halves taking turns, then :math:`z = e^D \odot h`;
    :math:`\log p(x) = \sum_i \log p(z_i) + \sum_i D_i`.

    Args:
        image_shape: of a sample, (C, H, W) or any other, with an even number D of dimensions.
        couplings: additive couplings; from three on, every dimension can depend on every other.
        hidden, layers: width and number of hidden layers of the ReLU networks; a number for each coupling, or one.
        prior: ``logistic`` or ``normal``.
        partition: the halves are the ``interleaved`` even and odd indices, or ``halves``, the first and the second.
        interval: where samples in [-1/2, 1/2) are stretched to at first; None leaves them as they come.
        init: weights start uniform in [-init, init], biases at 0: the flow is nearly the identity.
        context_features: P; the networks then get a context [B, P], too.

    The code of the paper reverses all features behind every coupling. Here nothing is moved: the halves are strided
    views that take turns, and a reversal is an order of rows and columns of the networks' weights.

    The latent has the shape of the sample. Densities are in nats, of x as it came.

    >>> model = NICE((1, 4, 4), hidden=16, layers=2)
    >>> x = torch.rand(8, 1, 4, 4) - 0.5
    >>> model.log_prob(x).shape, model.sample(3, temperature=0.7).shape, model.spectrum().shape
    (torch.Size([8]), torch.Size([3, 1, 4, 4]), torch.Size([16]))
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 28, 28),
        couplings: int = 4,
        hidden: int = 1000,
        layers: int | Sequence[int] = 5,
        *,
        prior: Literal["logistic", "normal"] = "logistic",
        partition: Literal["interleaved", "halves"] = "interleaved",
        interval: tuple[float, float] | None = None,
        init: float = 0.01,
        context_features: int = 0,
    ) -> None:
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        shape = tuple(image_shape)
        dims = math.prod(shape)
        if dims < 2 or dims % 2:
            raise ValueError(f"image_shape: expected an even number of dimensions, got {dims} in {shape}")
        depths = [layers] * couplings if isinstance(layers, int) else list(layers)
        if len(depths) != couplings:
            raise ValueError(f"layers: expected one number or {couplings}, one for every coupling, got {depths}")
        for name, value, allowed in (
            ("prior", prior, ("logistic", "normal")),
            ("partition", partition, ("interleaved", "halves")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
        halves = Halves(shape, partition == "interleaved")
        super().__init__(
            Logistic(shape) if prior == "logistic" else StandardNormal(shape),
            Sequential(
                *([] if interval is None else [Stretch(*interval)]),
                halves,
                *(
                    AdditiveCoupling(
                        Network(dims // 2, hidden, depth, context_features, init),
                        "first_half" if k % 2 else "second_half",
                    )
                    for k, depth in enumerate(depths)
                ),
                Inverse(halves),
                Scaling(shape),
            ),
        )
        self.config, self.image_shape, self.context_features = config | {"image_shape": shape}, shape, context_features

    @classmethod
    def preset(cls, name: str, **changes: Any) -> NICE:
        """A published configuration by name (``PRESETS``), with changes."""
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **changes})

    @property
    def couplings(self) -> list[AdditiveCoupling]:
        """The couplings in order; the even ones change the second half, the odd ones the first."""
        return [layer for layer in self.bijection if isinstance(layer, AdditiveCoupling)]

    @property
    def scaling(self) -> Scaling:
        """The diagonal."""
        return self.bijection[-1]

    @torch.no_grad()
    def spectrum(self) -> Tensor:
        """exp(-D) [D], falling: the spread that the flow found in each direction of its latent (the paper's figure)."""
        return torch.exp(-self.scaling.log_scale).sort(descending=True).values

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) [B] in nats."""
        if tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"x: expected [B, {', '.join(map(str, self.image_shape))}], got {list(x.shape)}")
        self._check_context(context, len(x))
        return super().log_prob(x, context)

    def sample_and_log_prob(
        self,
        n: int,
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(x [n, *image_shape], log p(x) [n]); the temperature multiplies the scale of the base."""
        self._check_context(context, n)
        return super().sample_and_log_prob(n, context, temperature, generator)

    def _check_context(self, context: Tensor | None, n: int) -> None:
        wanted = None if not self.context_features else (n, self.context_features)
        got = None if context is None else tuple(context.shape)
        if wanted != got:
            raise ValueError(f"context: expected {list(wanted) if wanted else None}, got {list(got) if got else None}")
