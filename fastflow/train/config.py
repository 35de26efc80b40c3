"""The settings of a training run, as plain data that a checkpoint stores."""

import math
from dataclasses import dataclass, fields

from .errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train`.

    Args:
        epochs: passes over the training images; the last partial batch of each is left out.
        steps: optimiser steps; overrides `epochs` where given.
        batch_size: images in a step, over all ranks together.
        lr: Adam's learning rate after warm-up.
        warmup: steps over which the learning rate rises linearly to `lr`.
        cooldown: last part of the run, in [0, 1], over which it falls linearly towards 0.
        clip: largest norm of the gradient of the bits per dimension.
        ema: decay of the averaged weights that evaluation and sampling use.
        init_batch: images of the data-dependent initialisation.
        eval_every, checkpoint_every: in steps; once an epoch by default.
        seed: of shuffling, dequantisation noise and the model's own random numbers.
        bf16: runs the model under bfloat16 autocast (evaluation stays in full precision).

    Raises `UserError` naming the setting that is out of range.
    """

    epochs: int = 10
    steps: int | None = None
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 0
    cooldown: float = 0.0
    clip: float = 1.0
    ema: float = 0.99
    init_batch: int = 256
    eval_every: int | None = None
    checkpoint_every: int | None = None
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "batch_size", "init_batch", "eval_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: expected at least 1, got {value}")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UserError(f"{name}: expected a positive number, got {value}")
        if self.warmup < 0:
            raise UserError(f"warmup: expected at least 0, got {self.warmup}")
        if not 0 <= self.cooldown <= 1:
            raise UserError(f"cooldown: expected a fraction in [0, 1], got {self.cooldown}")
        if not 0 <= self.ema < 1:
            raise UserError(f"ema: expected a decay in [0, 1), got {self.ema}")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"seed: expected 0 <= seed < 2**63, got {self.seed}")

    def steps_per_epoch(self, images: int) -> int:
        """Full batches in `images` training images; raises `UserError` if there is none."""
        if self.batch_size > images:
            raise UserError(f"batch_size: expected at most the {images} training images, got {self.batch_size}")
        return images // self.batch_size

    def total_steps(self, images: int) -> int:
        """Steps of the whole run on `images` training images."""
        return self.steps or self.epochs * self.steps_per_epoch(images)

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of the step that follows `step` finished ones of `steps`."""
        rise = (step + 1) / (self.warmup + 1)
        fall = (steps - step) / (self.cooldown * steps) if self.cooldown else 1.0
        return self.lr * min(1.0, rise, fall)


RESUMABLE = ("epochs", "steps", "eval_every", "checkpoint_every")
"""Settings that a resumed run may change: they decide how long it goes on, not what a step does."""


def conflict(stored: TrainConfig, wanted: TrainConfig) -> str | None:
    """The first setting in which a resumed run would differ from the stored one, or None."""
    for field in fields(TrainConfig):
        before, now = getattr(stored, field.name), getattr(wanted, field.name)
        if field.name not in RESUMABLE and before != now:
            return f"{field.name} is {now}, but the run to resume has {before}"
    return None
