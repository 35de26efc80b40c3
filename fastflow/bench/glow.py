"""Glow: a training step and sampling, against the same model in plain PyTorch, under torch.compile, in normflows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastflow.bench.row import Contenders, Row, on_reference
from fastflow.models import Glow

NORMFLOWS = {"image_shape": (3, 32, 32), "levels": 3, "steps": 8, "hidden": 128}
SMALL = {"image_shape": (1, 8, 8), "levels": 2, "steps": 2, "hidden": 96}  # torch.compile takes a while over more


def ours(shape: dict[str, Any], batch: int) -> Glow:
    """The options that make it the same model as normflows' Glow."""
    torch.manual_seed(0)
    model = Glow.preset("normflows-cifar10", **shape)
    model.initialize(torch.rand(batch, *shape["image_shape"]) - 0.5)
    return model


def theirs(image_shape: tuple[int, int, int], levels: int, steps: int, hidden: int, batch: int) -> nn.Module:
    """The model of normflows' Glow example."""
    import normflows as nf

    torch.manual_seed(0)
    channels, height, width = image_shape
    bases, flows, merges = [], [], []
    for i in range(levels):
        inner, factor = channels * 2 ** (levels + 1 - i), 2 ** (levels - i)
        blocks = [nf.flows.GlowBlock(inner, hidden, split_mode="channel") for _ in range(steps)]
        flows.append([*blocks, nf.flows.Squeeze()])
        if i > 0:
            merges.append(nf.flows.Merge())
        latent = inner // 2 if i > 0 else inner
        bases.append(nf.distributions.GlowBase((latent, height // factor, width // factor)))
    model = nf.MultiscaleFlow(bases, flows, merges, class_cond=False)
    model.log_prob(torch.rand(batch, *image_shape) - 0.5, None)  # ActNorm takes its statistics
    return model


def _contenders(shape: dict[str, Any], batch: int, peer: bool, task: Callable[..., Any], compiled: bool) -> Contenders:
    made = {
        "fastflow": task(ours(shape, batch), batch),
        "eager": on_reference(task(ours(shape, batch), batch)),
    }
    if compiled:
        made["torch.compile"] = on_reference(task(ours(shape, batch), batch, torch.compile))
    if peer:
        made["normflows"] = task(theirs(**shape, batch=batch), batch)
    return made


def _step(model: nn.Module, batch: int, wrap: Callable = lambda f: f) -> Callable[[], Tensor]:
    """A training step on a fixed batch; returns the loss."""
    x = torch.rand(batch, *getattr(model, "image_shape", NORMFLOWS["image_shape"])) - 0.5
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    log_prob = wrap(lambda x: model.log_prob(x, None))  # no class, no context

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = -log_prob(x).mean()
        loss.backward()
        optimizer.step()
        return loss

    return step


def _sample(model: nn.Module, batch: int, wrap: Callable = lambda f: f) -> Callable[[], Any]:
    sample = wrap(model.eval().sample)
    return torch.no_grad()(lambda: sample(batch))


def rows() -> Iterator[Row]:
    for task, what, target in ((_step, "training step", 1.4), (_sample, "sampling", 1.8)):
        big = partial(_contenders, NORMFLOWS, 32, True, task, False)
        yield Row("glow", f"{what} 3x32x32 B=32", big, targets={"normflows": target}, comparable=False)
        small = partial(_contenders, SMALL, 64, False, task, True)
        yield Row("glow", f"{what} 1x8x8 K=2 B=64", small, comparable=False, demo=True)
