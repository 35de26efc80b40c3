"""What the training loop asks of a data set, whatever its kind."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastflow.errors import UserError

from .. import noise


@dataclass(frozen=True)
class Dataset:
    """Samples as they are stored: `train` to learn from, `held_out` to watch, `test` for the final figure.

    Where there is no `test`, the final figure is that of `held_out`. A subclass is one kind of data: it says what a
    model sees of a stored sample (`inputs`), what its log-likelihood costs (`cost`, in `unit`), and what a naive
    model would pay (`baseline`).
    """

    name: str
    train: Tensor
    held_out: Tensor
    test: Tensor | None = field(default=None, kw_only=True)

    kind = "rows"
    forecasts = False
    """Whether held-out samples have targets, which a model's `evaluate` scores."""
    usual = 1.0
    """What `counts` gives for a training sample, on average."""

    @property
    def unit(self) -> str:
        """What losses and held-out figures are in."""
        return "nats"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample, as the model sees it."""
        return tuple(self.train.shape[1:])

    def inputs(self, stored: Tensor, index: Tensor, key: int) -> Tensor:
        """What the model sees of the samples `stored` [B, ...], which have the numbers `index` [B]; their noise is
        that of `key`."""
        return stored

    def cost(self, log_prob: Tensor) -> Tensor:
        """log p [B] in nats -> the cost [B] in `unit`."""
        return -log_prob

    def counts(self, x: Tensor) -> Tensor | None:
        """How many of what a figure is a mean over are in each of the samples `x` [B, ...], float64 [B]; None: one."""
        return None

    def hold_out(self, samples: Tensor) -> Tensor:
        """Training samples as they are where they are held out."""
        return samples

    def keepsakes(self) -> dict[str, Tensor]:
        """Tensors by name that go with a checkpoint, for what is drawn from it."""
        return {}

    def describe(self) -> dict[str, Any]:
        """What a checkpoint remembers, as JSON: a resumed run must have the same, and samples are drawn from it."""
        return {
            "name": self.name,
            "kind": self.kind,
            "shape": list(self.shape),
            "train": len(self.train),
            "held_out": len(self.held_out),
        }

    def baseline(self) -> tuple[float, str]:
        """(cost of a naive model fitted to `train`, on `test` or `held_out`; its name)."""
        raise NotImplementedError

    @property
    def final(self) -> Tensor:
        """The samples of the final figure."""
        return self.held_out if self.test is None else self.test


def parts(name: str, samples: Tensor, *every: int) -> list[Tensor]:
    """`samples` in a fixed random order, cut: a share of 1 / every for each, in front of them the rest to train."""
    if len(samples) < 1 + len(every):
        raise UserError(f"{name}: expected at least {1 + len(every)} samples to split, got {len(samples)}")
    order, first, cut = noise.permutation(noise.key(0, noise.SPLIT), len(samples)), 0, []
    for share in every:
        held = max(1, len(samples) // share)
        cut.append(samples[order[first : first + held]])
        first += held
    return [samples[order[first:]], *cut]


def same_shape(path: object, arrays: dict[str, Tensor]) -> None:
    """Raises `UserError` unless the samples of all parts have one shape."""
    shapes = {name: list(a.shape[1:]) for name, a in arrays.items()}
    if len({tuple(s) for s in shapes.values()}) > 1:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise UserError(f"{path}: expected samples of one size in every part, got {found}")


def whole(least: int, **numbers: Any) -> None:
    """Raises `UserError` naming the first option that is no whole number of at least `least`."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{name}: expected a whole number of at least {least}, got {value!r}")


def finite(path: object, name: str, rows: Tensor) -> None:
    """Raises `UserError` naming the first row of `rows` [N, ...] that holds NaN or infinity."""
    bad = (~torch.isfinite(rows)).flatten(1).any(1).nonzero()
    if len(bad):
        raise UserError(f"{path}: expected finite numbers, got nan or inf in row {bad[0].item()} of {name}")
