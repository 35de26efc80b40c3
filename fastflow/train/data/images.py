"""Integer images, as densities, as integers, or as bits."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastflow.errors import UserError

from .. import noise
from ..pixels import bernoulli_nats, bits_per_dim, dequantize, histogram_bits
from .dataset import Dataset

FORMS = ("dequantized", "integers", "dynamic", "static", "threshold")


@dataclass(frozen=True)
class Images(Dataset):
    """Integer images: the parts are uint8 [N, C, H, W] with values below `levels`.

    What a model sees, by `form`; with `flat`, as rows [B, C*H*W]:

    - `dequantized`: `(pixels + u) / levels - 0.5` in [-0.5, 0.5), u uniform and fresh in every epoch; float32,
      bits/dim.
    - `integers`: the pixels, int64; the model's log-likelihood is that of the integers; bits/dim.
    - `dynamic`: bits, 1.0 with probability `pixels / (levels - 1)`, drawn afresh in every epoch; float32, nats.
    - `static`: the same, drawn once. `threshold`: 1.0 where `pixels >= levels / 2`.
    """

    levels: int
    form: str = "dequantized"
    flat: bool = False

    kind = "images"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UserError(f"form: expected one of {', '.join(FORMS)}, got {self.form!r}")
        if self.form in ("static", "threshold") and self.levels > 2:
            for number, part in enumerate(("train", "held_out", "test")):
                if (pixels := getattr(self, part)) is not None:
                    object.__setattr__(self, part, self._bits(pixels, number))
            object.__setattr__(self, "levels", 2)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.train.shape[1:])

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W), or (C*H*W,) if flat."""
        return (self.dims,) if self.flat else self.image_shape

    @property
    def dims(self) -> int:
        """Sub-pixels in an image, C*H*W."""
        return math.prod(self.image_shape)

    @property
    def binary(self) -> bool:
        """Whether the model sees bits."""
        return self.form not in ("dequantized", "integers")

    @property
    def unit(self) -> str:
        """bits/dim; nats (of a whole image) for bits, as the literature has them."""
        return "nats" if self.binary else "bits/dim"

    def inputs(self, stored: Tensor, index: Tensor, key: int) -> Tensor:
        if self.form == "integers":
            x = stored.long()
        elif self.binary:
            u = noise.uniform(key, index, self.dims).view_as(stored)
            x = (u * (self.levels - 1) < stored).float()
        else:
            x = dequantize(stored, self.levels, noise.uniform(key, index, self.dims))
        return x.flatten(1) if self.flat else x

    def cost(self, log_prob: Tensor) -> Tensor:
        if self.binary:
            return -log_prob
        # an integer's own probability needs no volume of its cell
        return bits_per_dim(log_prob, self.dims, self.levels if self.form == "dequantized" else 1)

    def describe(self) -> dict[str, Any]:
        description = super().describe() | {"shape": list(self.image_shape), "levels": self.levels}
        if self.form == "dequantized" and not self.flat:
            del description["kind"]  # as the first checkpoints had it
            return description
        return description | {"form": self.form, "flat": self.flat}

    def baseline(self) -> tuple[float, str]:
        if self.binary:
            return bernoulli_nats(self.train, self.final, self.levels), "factorised Bernoulli"
        return histogram_bits(self.train, self.final, self.levels), "per-pixel histogram"

    def _bits(self, pixels: Tensor, part: int) -> Tensor:
        """Grey levels to bits, once and for all."""
        if self.form == "threshold":
            return (2 * pixels.int() >= self.levels).to(torch.uint8)
        bits = []
        for index in torch.arange(len(pixels)).split(4096):
            u = noise.uniform(noise.key(0, noise.BINARIZE, part), index, self.dims)
            bits.append(u.view(-1, *self.image_shape) * (self.levels - 1) < pixels[index])
        return torch.cat(bits).to(torch.uint8)
