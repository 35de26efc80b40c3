"""Glow of normflows' shape: a training step and sampling against normflows, plain PyTorch and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastflow.bench.row import Contenders, Row, on_reference
from fastflow.models import Glow

SHAPE, LEVELS, STEPS, HIDDEN, BATCH = (3, 32, 32), 3, 8, 128, 32


def ours() -> Glow:
    """The options that make it the same model as :func:`theirs`."""
    torch.manual_seed(0)
    model = Glow(SHAPE, LEVELS, STEPS, HIDDEN, net_norm=False, net_gain=0, shift_gain=-1.0, split_prior="learned")
    model.initialize(torch.rand(BATCH, *SHAPE) - 0.5)
    return model


def theirs() -> nn.Module:
    """normflows' example for CIFAR-10."""
    import normflows as nf

    torch.manual_seed(0)
    channels = SHAPE[0]
    bases, merges, flows = [], [], []
    for level in range(LEVELS):
        inner = channels * 2 ** (LEVELS + 1 - level)
        flows.append([nf.flows.GlowBlock(inner, HIDDEN, split_mode="channel", scale=True) for _ in range(STEPS)])
        flows[-1].append(nf.flows.Squeeze())
        side = SHAPE[1] // 2 ** (LEVELS - level)
        if level > 0:
            merges.append(nf.flows.Merge())
            latent = (channels * 2 ** (LEVELS - level), side, side)
        else:
            latent = (channels * 2 ** (LEVELS + 1), side, side)
        bases.append(nf.distributions.DiagGaussian(latent))
    model = nf.MultiscaleFlow(bases, flows, merges)
    with torch.no_grad():
        model.log_prob(torch.rand(BATCH, *SHAPE) - 0.5)  # ActNorm takes its statistics
    return model


def _step(model: nn.Module, log_prob: Any) -> Any:
    """A training step on a fixed batch; returns the loss."""
    x = torch.rand(BATCH, *SHAPE) - 0.5
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = -log_prob(x).mean()
        loss.backward()
        optimizer.step()
        return loss

    return step


def _training() -> Contenders:
    plain, graph = ours(), ours()
    mine, other = ours(), theirs()
    return {
        "fastflow": _step(mine, mine.log_prob),
        "eager": _step(plain, on_reference(plain.log_prob)),
        "torch.compile": _step(graph, torch.compile(on_reference(graph.log_prob))),
        "normflows": _step(other, other.log_prob),
    }


def _sampling() -> Contenders:
    mine, other = ours().eval(), theirs().eval()

    def without_graph(sample: Any) -> Any:
        return torch.no_grad()(sample)

    return {
        "fastflow": without_graph(lambda: mine.sample(BATCH)),
        "eager": without_graph(lambda: on_reference(mine.sample)(BATCH)),
        "torch.compile": without_graph(lambda program=torch.compile(on_reference(mine.sample)): program(BATCH)),
        "normflows": without_graph(lambda: other.sample(BATCH)[0]),
    }


def rows() -> Iterator[Row]:
    yield Row("glow", "training step 3x32x32", _training, targets={"normflows": 1.4}, comparable=False)
    yield Row("glow", "sampling 3x32x32", _sampling, targets={"normflows": 1.8}, comparable=False)
