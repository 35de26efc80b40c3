"""What a training run carries from step to step, and its way to a checkpoint and back."""

import copy
from dataclasses import asdict, dataclass
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
from .data import Images
from .errors import UserError
from .pixels import dequantize


@dataclass
class State:
    """A run after `step` optimiser steps."""

    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    saved: int | None = None  # step of the last checkpoint
    held_out: float | None = None  # bits/dim of the last evaluation


@lru_cache(maxsize=1)
def shuffled(seed: int, epoch: int, images: int) -> Tensor:
    """The order in which `epoch` visits the training images."""
    return noise.permutation(noise.key(seed, noise.SHUFFLE, epoch), images)


def training_batch(data: Images, index: Tensor, seed: int, epoch: int, device: torch.device) -> Tensor:
    """The training images `index` with the noise they have in `epoch`: float32 [B, C, H, W]."""
    u = noise.uniform(noise.key(seed, noise.DEQUANTIZE, epoch), index.to(device), data.dims)
    return dequantize(data.train[index].to(device), data.levels, u)


def start(model: nn.Module, data: Images, config: TrainConfig) -> State:
    """A fresh run: data-dependent initialisation, on the same images whatever the rank."""
    index = shuffled(config.seed, 0, len(data.train))[: config.init_batch]
    device = next(model.parameters()).device
    with torch.no_grad():
        model.initialize(training_batch(data, index, config.seed, 0, device))
    model.train()
    return State(model, copy.deepcopy(model), _adam(model, config))


def restore(model: nn.Module, data: Images, config: TrainConfig, directory: Path) -> State:
    """The run saved in `directory`; raises `UserError` where it is not the one asked for."""
    meta, tensors = load_checkpoint(directory)
    problem = conflict(TrainConfig(**meta["config"]), config)
    if problem is None and meta["data"] != _describe(data):
        problem = f"the data are {_describe(data)}, those of the run to resume are {meta['data']}"
    if problem is None and meta["model"] != _architecture(model):
        problem = f"the model is {_architecture(model)}, the one to resume is {meta['model']}"
    if problem is not None:
        raise UserError(f"{directory}: {problem}")
    load_module(model, tensors, "model")
    ema = copy.deepcopy(model)
    load_module(ema, tensors, "ema")
    optimizer = _adam(model, config)
    load_optimizer(optimizer, model, meta["optimizer"], tensors)
    model.train()
    return State(model, ema, optimizer, meta["step"], meta["step"], meta["held_out"])


def save(state: State, data: Images, config: TrainConfig, directory: Path) -> None:
    """Writes the run to `directory`, atomically."""
    copy_buffers(state)
    scalars, tensors = optimizer_state(state.optimizer, state.model)
    tensors |= module_tensors(state.model, "model") | module_tensors(state.ema, "ema")
    meta = {
        "step": state.step,
        "held_out": state.held_out,
        "model": _architecture(state.model),
        "data": _describe(data),
        "config": asdict(config),
        "optimizer": scalars,
    }
    save_checkpoint(directory, meta, tensors)


@torch.no_grad()
def average(state: State, decay: float) -> None:
    """Moves the averaged weights towards the current ones."""
    # the average of n steps remembers about n of them: a longer memory would be of the start
    decay = min(decay, (1 + state.step) / (10 + state.step))
    torch._foreach_lerp_(list(state.ema.parameters()), list(state.model.parameters()), 1 - decay)


@torch.no_grad()
def copy_buffers(state: State) -> None:
    """Buffers are not averaged: the averaged model takes them as they are."""
    for mine, current in zip(state.ema.buffers(), state.model.buffers(), strict=True):
        if not torch.equal(mine, current):
            mine.copy_(current)


def _adam(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    # not fused: that one updates weights without raising their version, which caches rely on
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=config.lr)


def _describe(data: Images) -> dict[str, Any]:
    return {
        "name": data.name,
        "shape": list(data.shape),
        "levels": data.levels,
        "train": len(data.train),
        "held_out": len(data.held_out),
    }


def _architecture(model: nn.Module) -> dict[str, Any]:
    """The class and its arguments as JSON has them: tuples become lists."""
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in model.config.items()}
    return {"name": type(model).__name__, "config": config}
