"""GRU-ODE-Bayes: a training step and filtering, against the published algorithm in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastflow.bench import plain_gru_ode
from fastflow.bench.row import Contenders, Row
from fastflow.models import GRUODEBayes
from fastflow.nn import Observations

HIDDEN, FEATURES, STEP = 50, 2, 0.05


def _series(batch: int, steps: int, seen: int) -> Observations:
    """Series that are observed ``seen`` times, at multiples of a step, the last of which is the end of all of them."""
    times, values, masks = [], torch.randn(batch, seen, FEATURES), torch.rand(batch, seen, FEATURES) < 0.8
    for _ in range(batch):
        at = torch.randperm(steps - 1)[: seen - 1].sort().values + 1
        times.append(STEP * torch.cat((at, at.new_tensor([steps]))).double())
    return Observations.from_lists(times, list(values), list(masks), torch.randn(batch, 1))


def _make(batch: int, steps: int, seen: int, train: bool) -> Contenders:
    torch.manual_seed(0)
    model = GRUODEBayes(FEATURES, covariates=1, hidden=HIDDEN, step=STEP)
    data = _series(batch, steps, seen)
    parameters = list(model.parameters())

    def gradient(function: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            loss = function()
            return loss, *torch.autograd.grad(loss, parameters)

        return run

    def plain(train: bool) -> plain_gru_ode.Path:
        return plain_gru_ode.run(model, data, 0.0, train)

    if train:
        return {"fastflow": gradient(lambda: model.loss(data).sum()), "eager": gradient(lambda: plain(True).loss)}

    @torch.no_grad()
    def filtered(function: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        made = function()
        return made.pre, made.states

    return {"fastflow": lambda: filtered(lambda: model.filter(data)), "eager": lambda: filtered(lambda: plain(False))}


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
