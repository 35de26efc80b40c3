"""Glow: a training step and sampling, against the same model in plain PyTorch, under torch.compile, in normflows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastflow.bench.plain_glow import PlainGlow
from fastflow.bench.row import Contenders, Row, captured, on
from fastflow.models import Glow

NORMFLOWS = {"image_shape": (3, 32, 32), "levels": 3, "steps": 8, "hidden": 128}
SMALL = {"image_shape": (1, 8, 8), "levels": 2, "steps": 2, "hidden": 96}  # torch.compile takes a while over more
CIFAR = {"image_shape": (3, 32, 32), "levels": 3, "steps": 32, "hidden": 512}
TINY = {"image_shape": (3, 8, 8), "levels": 2, "steps": 2, "hidden": 8}


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
        "eager": on("reference", task(ours(shape, batch), batch)),
    }
    if compiled:
        made["torch.compile"] = on("reference", task(ours(shape, batch), batch, torch.compile))
    if peer:
        made["normflows"] = task(theirs(**shape, batch=batch), batch)
    return made


def _on_gpu(shape: dict[str, Any], batch: int, task: Callable[..., Any], graph: bool) -> Contenders:
    """Against the same model in plain PyTorch, with the same parameters."""
    torch.manual_seed(0)
    model, x = Glow(**shape), torch.rand(batch, *shape["image_shape"]) - 0.5
    model.initialize(x)

    def plain() -> PlainGlow:
        made = PlainGlow(**shape)
        made.load_state_dict(model.state_dict())
        return made

    with torch.no_grad():
        # convolutions in TensorFloat-32; another model would be off by hundreds of nats
        torch.testing.assert_close(model.log_prob(x), plain().log_prob(x), rtol=5e-3, atol=1.0)
    step, eager = task(model, batch, bf16=True), task(plain(), batch, bf16=True)
    if not graph:
        return {"fastflow": step, "eager": eager, "torch.compile": task(plain().compiled(), batch, bf16=True)}
    made = {"fastflow": captured(step), "eager": eager}
    if task is _step:  # torch.inverse, in sampling, waits for its result: it cannot be captured
        made["eager graph"] = captured(task(plain(), batch, bf16=True))
    return made


def _step(model: nn.Module, batch: int, wrap: Callable = lambda f: f, bf16: bool = False) -> Callable[[], Tensor]:
    """A training step on a fixed batch; returns the loss."""
    x = torch.rand(batch, *getattr(model, "image_shape", NORMFLOWS["image_shape"])) - 0.5
    gpu = x.device.type == "cuda"
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, fused=gpu or None, capturable=gpu)
    log_prob = wrap(lambda x: model.log_prob(x, None))  # no class, no context

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            loss = -log_prob(x).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _sample(model: nn.Module, batch: int, wrap: Callable = lambda f: f, bf16: bool = False) -> Callable[[], Any]:
    sample, device = wrap(model.eval().sample), next(model.parameters()).device.type

    @torch.no_grad()
    def draw() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            return sample(batch)

    return draw


def rows() -> Iterator[Row]:
    for task, what, target in ((_step, "training step", 1.4), (_sample, "sampling", 1.8)):
        big = partial(_contenders, NORMFLOWS, 32, True, task, False)
        yield Row("glow", f"{what} 3x32x32 B=32", big, targets={"normflows": target}, comparable=False)
        small = partial(_contenders, SMALL, 64, False, task, True)
        yield Row("glow", f"{what} 1x8x8 K=2 B=64", small, comparable=False, demo=True)


def gpu_rows(size: int) -> Iterator[Row]:
    """The published model, unless ``size`` says that this is only a test."""
    shape, batch, name = (CIFAR, 64, "3x32x32 L=3 K=32 width 512 B=64 bf16") if size >= 2**20 else (TINY, 4, "tiny")
    for graph, how, targets, seconds in (
        (True, " as a CUDA graph", {"eager": 5.0}, 20.0),
        (False, "", {"eager": 3.0, "torch.compile": 1.5}, 80.0),
    ):
        if graph and not torch.cuda.is_available():
            continue
        for task, what in ((_step, "training step"), (_sample, "sampling")):
            make, id = partial(_on_gpu, shape, batch, task, graph), f"{what} {name}{how}"
            yield Row("glow", id, make, targets=targets, comparable=False, seconds=seconds)
