"""What a training run carries from step to step, and its way to a checkpoint and back."""

import copy
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import noise
from .checkpoint import (
    load_checkpoint,
    load_module,
    load_optimizer,
    module_tensors,
    optimizer_state,
    save_checkpoint,
)
from .config import TrainConfig, conflict
from .data import Dataset
from .errors import NonFiniteLoss, UserError


@dataclass
class State:
    """A run after `step` optimiser steps."""

    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    saved: int | None = None  # step of the last checkpoint
    held_out: float | None = None  # cost of the last evaluation, in the data's unit
    best: float | None = None  # the lowest one,
    best_weights: dict[str, Tensor] = field(default_factory=dict)  # the averaged weights it belongs to,
    stale: int = 0  # and evaluations since; these three only in runs with patience
    seconds: float = 0.0  # that training has taken

    def lapsed(self, config: TrainConfig) -> bool:
        """Whether patience is at its end."""
        return config.patience is not None and self.stale >= config.patience


@lru_cache(maxsize=1)
def shuffled(seed: int, epoch: int, samples: int) -> Tensor:
    """The order in which `epoch` visits the training samples."""
    return noise.permutation(noise.key(seed, noise.SHUFFLE, epoch), samples)


def training_batch(data: Dataset, index: Tensor, seed: int, epoch: int, device: torch.device) -> Tensor:
    """The training samples `index` with the noise they have in `epoch`, as the model sees them."""
    key = noise.key(seed, noise.DEQUANTIZE, epoch)
    return data.inputs(data.train[index].to(device), index.to(device), key)


def start(model: nn.Module, data: Dataset, config: TrainConfig) -> State:
    """A fresh run: data-dependent initialisation, on the same samples whatever the rank."""
    index = shuffled(config.seed, 0, len(data.train))[: config.init_batch]
    device = next(model.parameters()).device
    with torch.no_grad(), noise.own_generator(device, config.seed, noise.SPLIT):
        model.initialize(training_batch(data, index, config.seed, 0, device))
    model.train()
    return State(model, copy.deepcopy(model), _optimizer(model, config))


def restore(model: nn.Module, data: Dataset, config: TrainConfig, directory: Path) -> State:
    """The run saved in `directory`; raises `UserError` where it is not the one asked for."""
    meta, tensors = load_checkpoint(directory)
    problem = conflict(TrainConfig(**meta["config"]), config)
    if problem is None and meta["data"] != data.describe():
        problem = f"the data are {data.describe()}, those of the run to resume are {meta['data']}"
    if problem is None and meta["model"] != _architecture(model):
        problem = f"the model is {_architecture(model)}, the one to resume is {meta['model']}"
    if problem is not None:
        raise UserError(f"{directory}: {problem}")
    load_module(model, tensors, "model")
    ema = copy.deepcopy(model)
    load_module(ema, tensors, "ema")
    optimizer = _optimizer(model, config)
    load_optimizer(optimizer, model, meta["optimizer"], tensors)
    model.train()
    weights = {name: tensors[f"best/{name}"] for name in ema.state_dict() if f"best/{name}" in tensors}
    best = meta.get("best") or {"held_out": None, "stale": 0}
    return State(
        model,
        ema,
        optimizer,
        step=meta["step"],
        saved=meta["step"],
        held_out=meta["held_out"],
        best=best["held_out"],
        best_weights=weights,
        stale=best["stale"],
        seconds=meta.get("seconds", 0.0),
    )


def save(state: State, data: Dataset, config: TrainConfig, directory: Path) -> None:
    """Writes the run to `directory`, atomically; raises `NonFiniteLoss` naming a tensor that is not finite."""
    copy_buffers(state)
    scalars, tensors = optimizer_state(state.optimizer, state.model)
    tensors |= module_tensors(state.model, "model") | module_tensors(state.ema, "ema")
    tensors |= {f"best/{name}": value for name, value in state.best_weights.items()}
    kept = {f"data/{name}": value for name, value in data.keepsakes().items()}
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise diverged(f"inf or nan in {name}", state)
    meta = {
        "step": state.step,
        "held_out": state.held_out,
        "model": _architecture(state.model),
        "data": data.describe(),
        "config": asdict(config),
        "optimizer": scalars,
        "seconds": state.seconds,
    }
    if config.patience is not None:
        meta["best"] = {"held_out": state.best, "stale": state.stale}
    save_checkpoint(directory, meta, tensors | kept)
    state.saved = state.step


def diverged(what: str, state: State, step: int | None = None, lr: float | None = None) -> NonFiniteLoss:
    """The error that says what is not finite, where, and which checkpoint is left."""
    lr = state.optimizer.param_groups[0]["lr"] if lr is None else lr
    kept = "no checkpoint had been written" if state.saved is None else f"the checkpoint of step {state.saved} is kept"
    return NonFiniteLoss(f"{what} at step {step or state.step}, learning rate {lr:g}; {kept}")


def judge(state: State, patience: int | None) -> None:
    """Keeps the averaged weights if the evaluation that gave `held_out` was the best so far."""
    if patience is None:
        return
    if state.best is None or state.held_out < state.best:
        weights = {name: value.detach().clone() for name, value in state.ema.state_dict().items()}
        state.best, state.best_weights, state.stale = state.held_out, weights, 0
    else:
        state.stale += 1


@torch.no_grad()
def average(state: State, decay: float) -> None:
    """Moves the averaged weights towards the current ones."""
    # the average of n steps remembers about n of them: a longer memory would be of the start
    decay = min(decay, (1 + state.step) / (10 + state.step))
    torch._foreach_lerp_(list(state.ema.parameters()), list(state.model.parameters()), 1 - decay)


@torch.no_grad()
def copy_buffers(state: State) -> None:
    """Buffers are not averaged: the averaged model takes them as they are, and derives what follows from them."""
    averaged = {name for name, _ in state.model.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in state.model.state_dict().items() if name not in averaged}
    state.ema.load_state_dict(buffers, strict=False)


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    # none of them fused: that updates weights without raising their version, which caches rely on
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, **settings, momentum=config.momentum)
    return {"adam": torch.optim.Adam, "adamax": torch.optim.Adamax}[config.optimizer](parameters, **settings)


def _architecture(model: nn.Module) -> dict[str, Any]:
    """The class and its arguments as JSON has them: tuples become lists."""
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in model.config.items()}
    return {"name": type(model).__name__, "config": config}
