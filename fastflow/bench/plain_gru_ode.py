"""GRU-ODE-Bayes in plain PyTorch, the way one writes it: one loop over the times at which anything is observed, the
whole batch integrated from one to the next, and the series observed now gathered, updated and scattered.

De Brouwer et al., 2019, https://arxiv.org/abs/1905.12374. Clock and names of parameters are those of their code.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastflow.nn import Observations

__all__ = ["Path", "PlainGRUODEBayes"]


class Path(NamedTuple):
    loss: Tensor
    """The sum over all series of what is minimised."""
    pre: Tensor
    """[N, 2D] mean and logarithm of the variance before every row, rows sorted by series and time"""
    states: Tensor
    """[N, H] after every row"""
    state: Tensor
    """[B, H] at the end"""


class Cell(nn.Module):
    """dh / dt of the state h; of a prediction p too, where there are inputs."""

    def __init__(self, hidden: int, inputs: int, full: bool) -> None:
        super().__init__()
        self.full, self.inputs = full, inputs
        for name in ("lin_hr", "lin_hz", "lin_hh") if full else ("lin_hz", "lin_hn"):
            setattr(self, name, nn.Linear(hidden, hidden, bias=False))
        if inputs and full:
            self.lin_x = nn.Linear(inputs, 3 * hidden)
        elif inputs:
            self.lin_xz, self.lin_xn = nn.Linear(inputs, hidden), nn.Linear(inputs, hidden)

    def forward(self, p: Tensor, h: Tensor) -> Tensor:
        if self.full:
            r, z, u = self.lin_x(p).chunk(3, 1) if self.inputs else (0.0, 0.0, 0.0)
            r, z = torch.sigmoid(r + self.lin_hr(h)), torch.sigmoid(z + self.lin_hz(h))
            u = torch.tanh(u + self.lin_hh(r * h))
        else:
            z, u = (self.lin_xz(p), self.lin_xn(p)) if self.inputs else (0.0, 0.0)
            z = torch.sigmoid(z + self.lin_hz(h))
            u = torch.tanh(u + self.lin_hn(z * h))
        return (1 - z) * (u - h)


class Update(nn.Module):
    """The state after an observation x with mask m, of which p was predicted."""

    def __init__(self, features: int, hidden: int, prepared: int) -> None:
        super().__init__()
        self.gru_d = nn.GRUCell(features * prepared, hidden)
        self.w_prep = nn.Parameter(torch.randn(features, 4, prepared) * math.sqrt(2 / (4 + prepared)))
        self.bias_prep = nn.Parameter(torch.full((features, prepared), 0.1))

    def forward(self, h: Tensor, p: Tensor, x: Tensor, m: Tensor) -> Tensor:
        mean, logvar = p.chunk(2, 1)
        stacked = torch.stack([x, mean, logvar, (x - mean) / torch.exp(0.5 * logvar)], 2)  # [n, D, 4]
        prepared = torch.relu(torch.einsum("ndi,dij->ndj", stacked, self.w_prep) + self.bias_prep)
        return self.gru_d((prepared * m[:, :, None]).flatten(1), h)


class PlainGRUODEBayes(nn.Module):
    """All series, Gaussian channels, the loss of the published code."""

    def __init__(
        self,
        features: int,
        covariates: int = 1,
        hidden: int = 50,
        p_hidden: int = 25,
        prep_hidden: int = 25,
        *,
        covariates_hidden: int = 50,
        cell: str = "full",
        impute: bool = False,
        solver: str = "euler",
        step: float = 0.05,
        mixing: float = 1e-4,
        noise: float = 1e-2,
    ) -> None:
        super().__init__()
        self.solver, self.step, self.mixing, self.noise = solver, step, mixing, noise
        self.p_model = nn.Sequential(
            nn.Linear(hidden, p_hidden), nn.ReLU(), nn.Dropout(0), nn.Linear(p_hidden, 2 * features)
        )
        self.covariates_map = nn.Sequential(
            nn.Linear(covariates, covariates_hidden),
            nn.ReLU(),
            nn.Dropout(0),
            nn.Linear(covariates_hidden, hidden),
            nn.Tanh(),
        )
        self.gru_c = Cell(hidden, 2 * features if impute else 0, cell == "full")
        self.gru_obs = Update(features, hidden, prep_hidden)

    def advance(self, h: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """One step of Euler or of the midpoint rule, and the prediction after it."""
        if self.solver == "euler":
            h = h + self.step * self.gru_c(p, h)
        else:
            k = h + self.step / 2 * self.gru_c(p, h)
            h = h + self.step * self.gru_c(self.p_model(k), k)
        return h, self.p_model(h)

    def losses(self, pre: Tensor, post: Tensor, x: Tensor, m: Tensor) -> Tensor:
        mean, logvar = pre.chunk(2, 1)
        first = 0.5 * (((x - mean) / torch.exp(0.5 * logvar)) ** 2 + logvar + math.log(2 * math.pi))
        mean, logvar = post.chunk(2, 1)
        std, noise = torch.exp(0.5 * logvar), self.noise
        second = torch.log(noise / std) + (std**2 + (mean - x) ** 2) / (2 * noise**2) - 0.5
        return (m * (first + self.mixing * second)).sum()

    def forward(self, observations: Observations, horizon: float, train: bool = True) -> Path:
        """The path through all observations and on to the horizon; ``train``: with the loss."""
        order = torch.argsort(observations.times, stable=True)
        times, together = torch.unique_consecutive(observations.times[order], return_counts=True)
        rows, series = order.split(together.tolist()), observations.series
        h = self.covariates_map(observations.covariates)
        p, now, loss = self.p_model(h), 0.0, h.new_zeros(())
        pre, states = [], []
        for event, i in zip(times.tolist(), rows, strict=True):
            while now < event - 0.001 * self.step:
                h, p = self.advance(h, p)
                now += self.step
            b, x, m = series[i], observations.values[i], observations.masks[i]
            pre.append(p[b])
            states.append(self.gru_obs(h[b], pre[-1], x, m))
            h = h.index_put((b,), states[-1])
            p = self.p_model(h)
            if train:
                loss = loss + self.losses(pre[-1], p[b], x, m)
        while now < horizon:
            h, p = self.advance(h, p)
            now += self.step
        back = torch.argsort(order)
        return Path(loss, torch.cat(pre)[back], torch.cat(states)[back], h)
