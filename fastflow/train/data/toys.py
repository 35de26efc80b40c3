"""Two-dimensional toy densities, from formulas: the same numbers everywhere."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .rows import Rows

_TRAIN, _HELD_OUT = 50_000, 10_000


def moons(n: int, g: torch.Generator) -> Tensor:
    """Two interleaved half circles with Gaussian noise of 0.1, as scikit-learn's `make_moons(noise=0.1)`."""
    t, upper = math.pi * torch.rand(n, generator=g), torch.rand(n, generator=g) < 0.5
    x = torch.where(upper, t.cos(), 1 - t.cos())
    y = torch.where(upper, t.sin(), 0.5 - t.sin())
    return torch.stack((x, y), 1) + 0.1 * torch.randn(n, 2, generator=g)


def circles(n: int, g: torch.Generator) -> Tensor:
    """Two circles of radii 1 and 0.5 with Gaussian noise of 0.08."""
    return _polar(2 * math.pi * torch.rand(n, generator=g), _choose(n, g, (1.0, 0.5))) + 0.08 * torch.randn(
        n, 2, generator=g
    )


def rings(n: int, g: torch.Generator) -> Tensor:
    """Four circles of radii 1 to 4 with Gaussian noise of 0.1."""
    return _polar(2 * math.pi * torch.rand(n, generator=g), _choose(n, g, (1.0, 2.0, 3.0, 4.0))) + 0.1 * torch.randn(
        n, 2, generator=g
    )


def gaussians(n: int, g: torch.Generator) -> Tensor:
    """Eight Gaussians of standard deviation 0.2 on a circle of radius 2."""
    angle = _choose(n, g, [k * math.pi / 4 for k in range(8)])
    return _polar(angle, torch.full((n,), 2.0)) + 0.2 * torch.randn(n, 2, generator=g)


def pinwheel(n: int, g: torch.Generator) -> Tensor:
    """Five bent arms."""
    points = torch.randn(n, 2, generator=g) * torch.tensor([0.3, 0.1]) + torch.tensor([1.0, 0.0])
    angle = _choose(n, g, [2 * math.pi * k / 5 for k in range(5)]) + 0.25 * points[:, 0].exp()
    c, s = angle.cos(), angle.sin()
    return 2 * torch.stack((c * points[:, 0] - s * points[:, 1], s * points[:, 0] + c * points[:, 1]), 1)


def spirals(n: int, g: torch.Generator) -> Tensor:
    """Two spirals of one and a half turns with Gaussian noise of 0.1."""
    t = 3 * math.pi * torch.rand(n, generator=g).sqrt()
    sign = _choose(n, g, (1.0, -1.0))
    return _polar(t, sign * t / 3) + 0.1 * torch.randn(n, 2, generator=g)


def checkerboard(n: int, g: torch.Generator) -> Tensor:
    """Every other square of a board of 4 x 4 on [-2, 2]^2, uniformly."""
    column, row = torch.randint(4, (n,), generator=g), torch.randint(2, (n,), generator=g)
    corner = torch.stack((column, 2 * row + column % 2), 1)
    return corner + torch.rand(n, 2, generator=g) - 2


TOYS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    f.__name__: f for f in (moons, circles, rings, gaussians, pinwheel, spirals, checkerboard)
}


def load_toy(name: str) -> Rows:
    """50000 points to train on, 10000 held out; always the same."""
    train, held_out = (TOYS[name](n, torch.Generator().manual_seed(seed)) for seed, n in enumerate((_TRAIN, _HELD_OUT)))
    return Rows(name, train, held_out)


def _polar(angle: Tensor, radius: Tensor) -> Tensor:
    return torch.stack((radius * angle.cos(), radius * angle.sin()), 1)


def _choose(n: int, g: torch.Generator, values) -> Tensor:
    return torch.tensor(values)[torch.randint(len(values), (n,), generator=g)]
