"""Radial flows; what they have in common with planar flows is tested there."""

import math

import pytest
import torch
from torch.nn import functional as F

import fastflow
from fastflow import nn
from fastflow.testing.case import randn

BACKENDS = ("cpu", "reference")


def one(dim, alpha, beta):
    """A step with these α̂ and β̂ around the origin."""
    raw = math.log(math.expm1(alpha + beta))
    return torch.zeros(1, dim).double(), *torch.tensor([[alpha], [raw]], dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_determinant_has_the_factor_one_plus_beta_h(backend):
    """(1 + βh + βh'r) (1 + βh)^(D-1); with (1 + β)^(D-1), as it is sometimes written, it is another number."""
    alpha, beta, x = 0.7, -0.5, torch.tensor([[0.6, -0.3, 0.8]], dtype=torch.float64)
    _, logdet = fastflow.radial(x, *one(3, alpha, beta), backend=backend)
    r = x.norm()
    h = 1 / (alpha + r)
    along = 1 + beta * h - beta * h * h * r
    jacobian = torch.autograd.functional.jacobian(lambda v: v * (1 + beta / (alpha + v.norm())), x[0])
    truth = torch.linalg.slogdet(jacobian)
    assert (logdet - truth.logabsdet).abs() < 1e-12
    assert (logdet - (2 * (1 + beta * h).log() + along.log())).abs() < 1e-12
    assert (logdet - (2 * math.log(1 + beta) + along.log())).abs() > 0.5


@pytest.mark.parametrize("alpha_map", ["abs", "softplus"])
@pytest.mark.parametrize("beta", [-30.0, -3.0, 0.0, 3.0, 30.0])
def test_inverse_is_exact(beta, alpha_map):
    """For steps that pull and push, near and far."""
    z = randn(50, 4) * torch.logspace(-6, 3, 50, dtype=torch.float64)[:, None]
    centre, alpha, b = torch.zeros(1, 4).double(), torch.full((1,), 0.8).double(), torch.full((1,), beta).double()
    x, logdet = fastflow.radial(z, centre, alpha, b, alpha_map=alpha_map)
    back, minus = fastflow.radial(x, centre, alpha, b, alpha_map=alpha_map, inverse=True)
    assert ((back - z).norm(dim=1) <= 1e-10 * z.norm(dim=1) + 1e-16).all()
    assert (logdet + minus).abs().max() < 1e-9


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_at_the_centre(backend, inverse):
    """The direction is nothing there; value, log-determinant and gradients are finite, and those of points nearby."""
    centre, alpha, beta = (
        torch.tensor([[0.5, -0.25]]).double(),
        torch.tensor([0.6]).double(),
        torch.tensor([0.3]).double(),
    )
    found = []
    for distance in (0.0, 1e-9):
        leaves = [t.clone().requires_grad_() for t in (centre + distance, centre, alpha, beta)]
        value, logdet = fastflow.radial(*leaves, inverse=inverse, backend=backend)
        found.append((value, logdet, *torch.autograd.grad(value.sum(), leaves, retain_graph=True)))
        assert all(g.isfinite().all() for g in torch.autograd.grad(logdet.sum(), leaves))
    for a, b in zip(*found, strict=True):
        assert a.isfinite().all() and (a - b).abs().max() < 1e-7


def test_no_radius():
    """alpha = 0 leaves a hole: a point within it has no original, and shows as NaN."""
    centre, alpha, beta = torch.zeros(1, 2), torch.zeros(1), torch.ones(1)
    x, logdet = fastflow.radial(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), centre, alpha, beta)
    assert torch.allclose(x[0].norm(), 5 + F.softplus(beta)) and x.isfinite().all()
    back, logdet = fastflow.radial(torch.tensor([[0.1, 0.0], [6.0, 8.0]]), centre, alpha, beta, inverse=True)
    assert logdet[0].isnan() and logdet[1].isfinite() and torch.allclose(back[1].norm(), 10 - F.softplus(beta))


def test_extremes():
    """Nothing overflows: a huge beta, one that closes the hole, a point far away."""
    for dtype in (torch.float32, torch.float64):
        for beta in (-200.0, 200.0):
            leaves = [
                t.to(dtype).requires_grad_()
                for t in (randn(5, 3) * 1e3, randn(1, 3), torch.tensor([1.0]), torch.tensor([beta]))
            ]
            for inverse in (False, True):
                x, logdet = fastflow.radial(*leaves, inverse=inverse)
                grads = torch.autograd.grad(x.sum() + logdet.sum(), leaves)
                assert all(t.isfinite().all() for t in (x, logdet, *grads))


def test_maps_of_alpha():
    z, centre, beta = randn(5, 3), randn(2, 3, seed=5), randn(2, seed=6)
    alpha = torch.tensor([-0.4, 0.9], dtype=torch.float64)
    a = fastflow.radial(z, centre, alpha, beta)
    for same, alpha_map in ((alpha.abs(), "abs"), (alpha.abs().expm1().log(), "softplus")):
        for x, y in zip(a, fastflow.radial(z, centre, same, beta, alpha_map=alpha_map), strict=True):
            assert (x - y).abs().max() < 1e-14
    layer = nn.Radial(3, 2, alpha_map="softplus").double()
    expected = fastflow.radial(z, layer.centre, layer.alpha, layer.beta, alpha_map="softplus")
    assert all(torch.equal(x, y) for x, y in zip(layer(z), expected, strict=True)) and "softplus" in repr(layer)
