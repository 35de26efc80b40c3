"""GRU-ODE-Bayes in plain PyTorch, the way one writes it: one loop over the times at which anything is observed, the
whole batch integrated from one to the next, and the series observed now gathered, updated and scattered.

De Brouwer et al., 2019, https://arxiv.org/abs/1905.12374, with the clock of their code.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.models import GRUODEBayes
from fastflow.nn import Observations

__all__ = ["Path", "run"]


class Path(NamedTuple):
    loss: Tensor
    """The sum over all series of what is minimised."""
    pre: Tensor
    """[N, 2D] mean and logarithm of the variance before every row, rows sorted by series and time"""
    states: Tensor
    """[N, H] after every row"""
    state: Tensor
    """[B, H] at the end"""


def dynamics(model: GRUODEBayes, h: Tensor, p: Tensor) -> Tensor:
    """dh / dt"""
    cell = model.cell
    w = cell.hidden_weight.chunk(3 if cell.kind == "full" else 2)
    x = F.linear(p, cell.input_weight, cell.input_bias).chunk(len(w), 1) if model.impute else [0.0] * len(w)
    if cell.kind == "full":
        r, z = torch.sigmoid(x[0] + h @ w[0].t()), torch.sigmoid(x[1] + h @ w[1].t())
        u = torch.tanh(x[2] + (r * h) @ w[2].t())
    else:
        z = torch.sigmoid(x[0] + h @ w[0].t())
        u = torch.tanh(x[1] + (z * h) @ w[1].t())
    return (1 - z) * (u - h)


def step(model: GRUODEBayes, h: Tensor, p: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """One step of Euler or of the midpoint rule, and the prediction after it."""
    if model.solver == "euler":
        h = h + size * dynamics(model, h, p)
    else:
        k = h + size / 2 * dynamics(model, h, p)
        h = h + size * dynamics(model, k, model.observe(k))
    return h, model.observe(h)


def jump(model: GRUODEBayes, h: Tensor, p: Tensor, x: Tensor, m: Tensor) -> Tensor:
    """The states of the series observed now, after the observation."""
    mean, logvar = p.chunk(2, 1)
    error = (x - mean) / torch.exp(0.5 * logvar)
    stacked = torch.stack([x, mean, logvar, error], 2)  # [n, D, 4]
    prepared = torch.relu(torch.einsum("ndi,dij->ndj", stacked, model.jump.prep_weight) + model.jump.prep_bias)
    return model.jump.gru((prepared * m[:, :, None]).flatten(1), h)


def losses(model: GRUODEBayes, pre: Tensor, post: Tensor, x: Tensor, m: Tensor) -> Tensor:
    mean, logvar = pre.chunk(2, 1)
    first = 0.5 * (((x - mean) / torch.exp(0.5 * logvar)) ** 2 + logvar + math.log(2 * math.pi))
    mean, logvar = post.chunk(2, 1)
    std, noise = torch.exp(0.5 * logvar), model.observation_std
    second = torch.log(noise / std) + (std**2 + (mean - x) ** 2) / (2 * noise**2) - 0.5
    return (m * (first + model.mixing * second)).sum()


def run(model: GRUODEBayes, observations: Observations, horizon: float, train: bool = True) -> Path:
    """The model's filter over all series, for Gaussian channels; ``train``: with the loss of the published code."""
    order = torch.argsort(observations.times, stable=True)
    times, ends = torch.unique_consecutive(observations.times[order], return_counts=True)
    rows, series = order.split(ends.tolist()), observations.series
    h = model.covariates_map(observations.covariates)
    p, now, loss = model.observe(h), 0.0, h.new_zeros(())
    pre, states = [], []
    for event, i in zip(times.tolist(), rows, strict=True):
        while now < event - 0.001 * model.step:
            h, p = step(model, h, p, model.step)
            now += model.step
        b, x, m = series[i], observations.values[i], observations.masks[i]
        after = jump(model, h[b], p[b], x, m)
        pre.append(p[b])
        states.append(after)
        h = h.index_put((b,), after)
        p = model.observe(h)
        if train:
            loss = loss + losses(model, pre[-1], p[b], x, m)
    while now < horizon:
        h, p = step(model, h, p, model.step)
        now += model.step
    back = torch.argsort(order)
    empty = [h.new_zeros(0, h.shape[1])], [h.new_zeros(0, p.shape[1])]
    return Path(loss, torch.cat(pre or empty[1])[back], torch.cat(states or empty[0])[back], h)
