"""Series from stochastic differential equations, the same numbers everywhere: no files needed."""

import math

import torch
from torch import Tensor

from .dataset import whole
from .series import Series, divide

_FINE = 10  # steps of the Brusselator within one of its grid of times


def double_ou(
    name: str,
    *,
    series: int = 10_000,
    cut: float | None = 4.0,
    targets: int | None = 1,
    test: float = 0.2,
    seed: int = 432,
) -> Series:
    r"""Two correlated Ornstein-Uhlenbeck processes around levels of their own, as in GRU-ODE-Bayes, section 5.1
    (https://arxiv.org/abs/1905.12374):

    dX_k = theta (mu_k - X_k) dt + sigma dW_k on [0, 10], X(0) = 0, theta = 1, sigma = 0.1, corr(dW_1, dW_2) = 0.99,
    mu_1 = 1 + U_1, mu_2 = -1 + U_2 with U uniform in (-1/2, 1/2), drawn for every series.

    The path on the grid of step 0.05 is drawn from the exact transition. A series has 16 to 23 of the 200 times, all
    different; at a time both processes are observed with probability 0.2, else one of them. A fifth of the series is
    held out; of these what comes first after time 4 is forecast.
    """
    horizon, step, theta, sigma, rho = 10.0, 0.05, 1.0, 0.1, 0.99
    whole(2, series=series)
    g = torch.Generator().manual_seed(0)
    mean = torch.tensor([1.0, -1.0]) + torch.rand(series, 2, generator=g) - 0.5
    keep = math.exp(-theta * step)
    noise = sigma * math.sqrt((1 - keep**2) / (2 * theta)) * _correlated(round(horizon / step) - 1, series, rho, g)
    state, path = torch.zeros(series, 2), []
    for shock in (None, *noise):
        state = state if shock is None else mean + keep * (state - mean) + shock
        path.append(state)
    x = observe(torch.stack(path, 1), step, fewest=16, most=23, joint=0.2, generator=g)
    return divide(name, x, ("1", "2"), horizon, test=test, seed=seed, cut=cut, targets=targets, standardize=False)


def brusselator(
    name: str,
    *,
    series: int = 1000,
    cut: float | None = 35.0,
    targets: int | None = 3,
    test: float = 0.2,
    seed: int = 432,
) -> Series:
    r"""The Brusselator with noise, as in GRU-ODE-Bayes, section 5.2 (https://arxiv.org/abs/1905.12374):

    dX = (1 - (b + 1) X + a X^2 Y) dt + s dW_1,  dY = (b X - a X^2 Y) dt + s dW_2 on [0, 50],

    a = 0.3, b = 1.4, s = 0.01, corr(dW_1, dW_2) = -0.99, (X, Y)(0) = (1, b / a) + 0.3 N(0, I).

    Euler-Maruyama with the step 0.01. A series has 20 to 29 of the times 0, 0.1, ..., 49.9, all different; at a time
    both are observed with probability 0.8, else one of them. A fifth of the series is held out; of these the first
    three times after 35 are forecast. The published file (`series`, `BXLator.csv`) has other draws of nearly the same
    process, with the step 0.1.
    """
    horizon, step, a, b, s, rho = 50.0, 0.1, 0.3, 1.4, 0.01, -0.99
    whole(2, series=series)
    g = torch.Generator().manual_seed(0)
    x, y = (torch.tensor([1.0, b / a]) + 0.3 * torch.randn(series, 2, generator=g)).unbind(1)
    path, fine = [], step / _FINE
    for _ in range(round(horizon / step)):
        path.append(torch.stack((x, y), 1))
        for shock in s * math.sqrt(fine) * _correlated(_FINE, series, rho, g):
            reaction = a * x * x * y
            x, y = (
                x + (1 - (b + 1) * x + reaction) * fine + shock[:, 0],
                y + (b * x - reaction) * fine + shock[:, 1],
            )
    x = observe(torch.stack(path, 1), step, fewest=20, most=29, joint=0.8, generator=g)
    return divide(name, x, ("1", "2"), horizon, test=test, seed=seed, cut=cut, targets=targets, standardize=False)


PROCESSES = {"double-ou": double_ou, "brusselator": brusselator}


def observe(path: Tensor, step: float, *, fewest: int, most: int, joint: float, generator: torch.Generator) -> Tensor:
    """Observations of two processes, `path` [N, T, 2] on a grid of `step`, at `fewest` to `most` of its times: both
    with probability `joint`, else one of them. One covariate, 0, stands for none. Rows as `Series` has them."""
    n, steps, _ = path.shape
    count = torch.randint(fewest, most + 1, (n,), generator=generator)
    index = torch.rand(n, steps, generator=generator).argsort(1)[:, :most]
    real = torch.arange(most) < count[:, None]
    index = torch.where(real, index, steps).sort(1).values
    u = torch.rand(n, most, generator=generator)
    both, first = u < joint, u < joint + (1 - joint) / 2
    masks = (torch.stack((both | first, both | ~first), 2) & real[:, :, None]).float()
    values = path.gather(1, index.clamp(max=steps - 1)[:, :, None].expand(-1, -1, 2)) * masks
    times = torch.where(real, (index.double() * step).float(), torch.inf)
    return torch.cat((times[:, :, None], values, masks, torch.zeros(n, most, 1)), 2)


def _correlated(steps: int, series: int, rho: float, generator: torch.Generator) -> Tensor:
    """Standard normal pairs with the correlation `rho`, [steps, series, 2]."""
    first, second = torch.randn(2, steps, series, generator=generator)
    return torch.stack((first, rho * first + math.sqrt(1 - rho**2) * second), 2)
