"""GRU-ODE-Bayes: a training step and filtering, against the published algorithm in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastflow.bench.plain_gru_ode import PlainGRUODEBayes
from fastflow.bench.row import Contenders, Row
from fastflow.models import GRUODEBayes
from fastflow.nn import Observations

HIDDEN, FEATURES, STEP = 50, 2, 0.05  # as in the published experiments, defaults of both


def _series(batch: int, steps: int, seen: int) -> Observations:
    """Series that are observed ``seen`` times, at multiples of a step, the last of which is the end of all of them."""
    times, values, masks = [], torch.randn(batch, seen, FEATURES), torch.rand(batch, seen, FEATURES) < 0.8
    for _ in range(batch):
        at = torch.randperm(steps - 1)[: seen - 1].sort().values + 1
        times.append(STEP * torch.cat((at, at.new_tensor([steps]))).double())
    return Observations.from_lists(times, list(values), list(masks), torch.randn(batch, 1))


def _make(batch: int, steps: int, seen: int, train: bool) -> Contenders:
    torch.manual_seed(0)
    plain, model = PlainGRUODEBayes(FEATURES, 1, HIDDEN), GRUODEBayes(FEATURES, 1, HIDDEN)
    model.load_published(plain.state_dict())
    data = _series(batch, steps, seen)

    def gradient(module: nn.Module, loss: Callable[[], Tensor], shown: tuple[str, ...]) -> Callable[[], Any]:
        """The loss and all gradients, of which those are returned whose parameters both have."""
        parameters = dict(module.named_parameters())

        def run() -> tuple[Tensor, ...]:
            value = loss()
            grads = torch.autograd.grad(value, list(parameters.values()))
            named = dict(zip(parameters, grads, strict=True))
            return value, *(named[name] for name in shown)

        return run

    @torch.no_grad()
    def filtered(function: Callable[[], Any]) -> tuple[Tensor, ...]:
        made = function()
        return made.pre, made.states

    if not train:
        return {
            "fastflow": lambda: filtered(lambda: model.filter(data)),
            "eager": lambda: filtered(lambda: plain(data, 0.0, False)),
        }
    same = ("jump.gru.weight_ih", "jump.prep_weight", "observe.0.weight", "covariates_map.0.weight")
    theirs = ("gru_obs.gru_d.weight_ih", "gru_obs.w_prep", "p_model.0.weight", "covariates_map.0.weight")
    return {
        "fastflow": gradient(model, lambda: model.loss(data).sum(), same),
        "eager": gradient(plain, lambda: plain(data, 0.0).loss, theirs),
    }


def _row(batch: int, steps: int, seen: int, train: bool, **options) -> Row:
    task = "training step" if train else "filtering"
    name = f"H={HIDDEN} {steps} Euler steps, {batch} series of {seen} observations, {task}"
    flops = (1 + 2 * train) * 2 * 3 * HIDDEN * HIDDEN * steps * batch
    return Row("gru_ode", name, partial(_make, batch, steps, seen, train), flops=flops, **options)


def rows() -> Iterator[Row]:
    for train, target in ((True, 10.0), (False, 15.0)):
        yield _row(50, 100, 10, train, targets={"eager": target}, demo=train)
    yield _row(500, 100, 10, True)
    yield _row(500, 100, 10, False)
    yield _row(50, 1000, 10, True)  # its memory is that of 100 steps


def gpu_rows(size: int) -> Iterator[Row]:
    """The published sizes and more series, unless ``size`` says that this is only a test."""
    batches, steps, seen = ((50, 500), 100, 10) if size >= 2**20 else ((2, 3), 5, 2)
    for batch in batches:
        for train, target in ((True, 10.0), (False, 15.0)):
            yield _row(batch, steps, seen, train, targets={"eager": target})
