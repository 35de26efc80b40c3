"""The settings of a training run, as plain data that a checkpoint stores."""

import math
from dataclasses import dataclass, fields

from .errors import UserError

OPTIMIZERS = ("adam", "adamax", "rmsprop")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train`.

    Args:
        epochs: passes over the training samples; the last partial batch of each is left out.
        steps: optimiser steps; overrides `epochs` where given.
        batch_size: samples in a step, over all ranks together.
        lr: learning rate after warm-up.
        warmup: steps over which the learning rate rises linearly to `lr`.
        cooldown: last part of the run, in [0, 1], over which it falls linearly towards 0.
        clip: largest norm of the gradient of the loss, which is in the data's unit; None: any.
        ema: decay of the averaged weights that evaluation and sampling use.
        init_batch: samples of the data-dependent initialisation.
        eval_every, checkpoint_every: in steps; once an epoch by default.
        seed: of shuffling, noise on the data and the model's own random numbers.
        bf16: runs the model under bfloat16 autocast (evaluation stays in full precision).
        optimizer: `adam`, `adamax` or `rmsprop`.
        weight_decay: of the optimiser, as an L2 penalty.
        momentum: of `rmsprop`.
        lr_decay: factor on the learning rate in every epoch, applied step by step.
        patience: evaluations without a better held-out figure after which the run ends; the best weights are kept.
        final: samples that the final figure is taken on, where all would take too long.

    Raises `UserError` naming the setting that is out of range.
    """

    epochs: int = 10
    steps: int | None = None
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 0
    cooldown: float = 0.0
    clip: float | None = 1.0
    ema: float = 0.99
    init_batch: int = 256
    eval_every: int | None = None
    checkpoint_every: int | None = None
    seed: int = 0
    bf16: bool = False
    optimizer: str = "adam"
    weight_decay: float = 0.0
    momentum: float = 0.0
    lr_decay: float = 1.0
    patience: int | None = None
    final: int | None = None

    def __post_init__(self) -> None:
        whole = ("epochs", "steps", "batch_size", "init_batch", "eval_every", "checkpoint_every", "patience", "final")
        for name in whole:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: expected at least 1, got {value}")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if not (value is None and name == "clip") and not 0 < value < math.inf:
                raise UserError(f"{name}: expected a positive number, got {value}")
        if self.warmup < 0:
            raise UserError(f"warmup: expected at least 0, got {self.warmup}")
        if not 0 <= self.cooldown <= 1:
            raise UserError(f"cooldown: expected a fraction in [0, 1], got {self.cooldown}")
        for name in ("ema", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}: expected a decay in [0, 1), got {getattr(self, name)}")
        if not 0 < self.lr_decay <= 1:
            raise UserError(f"lr_decay: expected a factor in (0, 1], got {self.lr_decay}")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"weight_decay: expected a number of at least 0, got {self.weight_decay}")
        if self.optimizer not in OPTIMIZERS:
            raise UserError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"seed: expected 0 <= seed < 2**63, got {self.seed}")

    def steps_per_epoch(self, samples: int) -> int:
        """Full batches in `samples` training samples; raises `UserError` if there is none."""
        if self.batch_size > samples:
            raise UserError(f"batch_size: expected at most the {samples} training samples, got {self.batch_size}")
        return samples // self.batch_size

    def total_steps(self, samples: int) -> int:
        """Steps of the whole run on `samples` training samples."""
        return self.steps or self.epochs * self.steps_per_epoch(samples)

    def lr_at(self, step: int, steps: int, per_epoch: int = 1) -> float:
        """Learning rate of the step that follows `step` finished ones of `steps`, `per_epoch` in an epoch."""
        rise = (step + 1) / (self.warmup + 1)
        fall = (steps - step) / (self.cooldown * steps) if self.cooldown else 1.0
        decay = self.lr_decay ** (step / per_epoch) if self.lr_decay < 1 else 1.0
        return self.lr * min(1.0, rise, fall) * decay


RESUMABLE = ("epochs", "steps", "eval_every", "checkpoint_every", "final")
"""Settings that a resumed run may change: they decide how long it goes on, not what a step does."""


def conflict(stored: TrainConfig, wanted: TrainConfig) -> str | None:
    """The first setting in which a resumed run would differ from the stored one, or None."""
    for field in fields(TrainConfig):
        before, now = getattr(stored, field.name), getattr(wanted, field.name)
        if field.name not in RESUMABLE and before != now:
            return f"{field.name} is {now}, but the run to resume has {before}"
    return None
