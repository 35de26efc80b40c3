"""Gradients of the fused solver: exact ones, adjoints, of the times, of second order."""

import pytest
import torch
from test_ode import every_backend, linear, params, problem

from fastflow import ops
from fastflow.ops.ode_method import METHODS
from fastflow.testing.case import randn


def gradients(x, times, layers, order=1, **options):
    """Of everything that a solution has, with respect to x, the times and the parameters."""
    leaves = [x.clone().requires_grad_(), torch.tensor(times, dtype=x.dtype).requires_grad_()]
    given = [[p.clone().requires_grad_() for p in one] for one in layers]
    solution = ops.mlp_ode(leaves[0], leaves[1], given, layer="concat_squash", **options)
    total = sum((i + 1) * part.sin().sum() for i, part in enumerate(p for p in solution[:4] if p is not None))
    return torch.autograd.grad(total, [*leaves, *params(given)], create_graph=order > 1)


def apart(found, expected):
    """The largest difference, relative to the largest entry of a tensor."""
    return max(
        (a - b).abs().max().item() / max(1e-3, b.abs().max().item()) for a, b in zip(found, expected, strict=True)
    )


TIMES = [(0.0, 1.0), (1.0, 0.2, -0.5), (0.0, 0.0, 0.6, 0.6, 1.0)]


@every_backend
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("times", TIMES, ids=str)
def test_adjoint(times, exact, per_sample, backend):
    x, layers = problem()
    probes = None if exact else randn(2, 6, 3, seed=3)
    options = {"probes": probes, "exact": exact, "regularize": True, "rtol": 1e-6, "atol": 1e-6}
    direct = gradients(x, times, layers, backend=backend, per_sample=per_sample, **options)
    found = gradients(x, times, layers, backend=backend, per_sample=per_sample, gradient="adjoint", **options)
    assert apart(found, direct) <= 1e-3


@every_backend
@pytest.mark.parametrize("per_sample", [False, True])
def test_adjoints_report_what_they_took(per_sample, backend):
    """Over all outputs; dopri5 evaluates twice to begin and six times in every attempt."""
    x, layers = problem()
    given, taken = [[p.clone().requires_grad_() for p in one] for one in layers], []
    options = {"layer": "concat_squash", "exact": True, "per_sample": per_sample, "backend": backend}
    for gradient in ("steps", "adjoint"):
        solution = ops.mlp_ode(x, (0, 0.4, 0.4, 1), given, gradient=gradient, report=taken.append, **options)
        solution.trace.sum().backward(retain_graph=True)
        assert len(taken) == (gradient == "adjoint")
    (steps,) = taken
    assert steps.evaluations.shape == ((6,) if per_sample else ())
    assert (steps.accepted >= 2).all() and (steps.evaluations == 2 * 2 + 6 * (steps.accepted + steps.rejected)).all()
    solution.trace.sum().backward()
    assert all(torch.equal(one, other) for one, other in zip(*taken, strict=True))
    fixed = {**options, "method": "rk4", "step_size": 0.125}
    ops.mlp_ode(x, (1, 0), given, gradient="adjoint", report=taken.append, **fixed).value.sum().backward()
    assert [int(n.max()) for n in taken[-1]] == [32, 8, 0]


@every_backend
@pytest.mark.parametrize("method", METHODS)
def test_gradient_of_the_times(method, backend):
    """The solution's own dependence on its first, last and inner times, by finite differences."""
    x, layers = problem(samples=3)
    options = {"method": method, "exact": True, "regularize": True, "backend": backend, "max_steps": 100_000}
    adaptive = METHODS[method].error
    if adaptive:
        options |= {"rtol": 1e-9, "atol": 1e-9}
    else:
        options |= {"step_size": {"euler": 1e-3}.get(method, 5e-3)}
    bar = 1e-4 if adaptive else 2e-2  # within a fixed step outputs lie on a line

    def total(times):
        solution = ops.mlp_ode(x, times, layers, layer="concat_squash", **options)
        return sum((i + 1) * part.sin().sum() for i, part in enumerate(solution[:4]))

    times = (0.3, 0.2, 0.1)
    found = gradients(x, times, layers, **options)[1]
    for i in range(3):
        moved = [[t + (d if i == j else 0) for j, t in enumerate(times)] for d in (1e-3, -1e-3)]
        expected = (total(moved[0]) - total(moved[1])) / 2e-3
        assert abs(found[i] - expected) <= bar * max(1.0, found.abs().max().item())


@every_backend
@pytest.mark.parametrize(
    "method, step_size, per_sample",
    [("rk4", 0.4, False), ("dopri5", None, False), ("tsit5", None, True), ("bosh3", 0.5, False)],
)
def test_gradcheck(method, step_size, per_sample, backend):
    """First and second derivatives of value, trace and energies; adaptive steps so short that they hardly move."""
    x, layers = problem(dim=2, samples=2, hidden=(3,))
    options = {"method": method, "step_size": step_size, "rtol": 1e-7, "atol": 1e-7, "per_sample": per_sample}
    inputs = [t.clone().requires_grad_() for t in (x, *params(layers))]

    def run(x, *flat):
        given = [flat[:5], flat[5:]]
        return ops.mlp_ode(
            x, (0.0, 0.5), given, layer="concat_squash", exact=True, regularize=True, backend=backend, **options
        )[:4]

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@every_backend
@pytest.mark.parametrize("gradient", ["steps", "adjoint"])
def test_second_derivatives_of_the_density(gradient, backend):
    """The Hessian of log p(x) with respect to x, of a linear flow: -(A^T A) of the whole map."""
    matrix, x = randn(3, 3) / 2, randn(4, 3)
    whole = torch.linalg.matrix_exp(matrix)
    options = {"layer": "ignore", "exact": True, "rtol": 1e-7, "atol": 1e-7, "gradient": gradient, "backend": backend}

    def log_prob(x):
        solution = ops.mlp_ode(x[None], (0, 1), linear(matrix), **options)
        return -0.5 * solution.value[0].square().sum() + solution.trace.sum()

    hessian = torch.autograd.functional.hessian(log_prob, x[0])
    assert (hessian + whole.T @ whole).abs().max() < 1e-5


@every_backend
@pytest.mark.parametrize("per_sample", [False, True])
def test_checkpoints(per_sample, backend):
    """However few states are kept, the gradient is the same."""
    x, layers = problem(gain=1.5)
    options = {"exact": True, "regularize": True, "per_sample": per_sample, "backend": backend, "method": "bosh3"}
    options |= {"rtol": 1e-4, "atol": 1e-4}
    # room for all of them takes no more memory than the steps there may be
    expected = gradients(x, (0.0, 0.3, 1.0), layers, checkpoints=10**12, **options)
    for count in (1, 2, 3, 5, 8, 16, 32):
        found = gradients(x, (0.0, 0.3, 1.0), layers, checkpoints=count, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_backend
def test_what_needs_no_gradient_gets_none(backend):
    x, layers = problem()
    layers[0][0].requires_grad_()
    for gradient in ("steps", "adjoint"):
        solution = ops.mlp_ode(x, (0, 1), layers, layer="concat_squash", exact=True, gradient=gradient, backend=backend)
        assert torch.autograd.grad(solution.trace.sum(), layers[0][0])[0].abs().max() > 0
    with torch.no_grad():
        assert not ops.mlp_ode(x, (0, 1), layers, layer="concat_squash", backend=backend).value.requires_grad
