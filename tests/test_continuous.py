"""Continuous bijections: fused MLPs and any module by torchdiffeq, against closed forms, Jacobians and each other."""

import copy
import itertools
import sys

import pytest
import torch
from torch import nn

import fastflow
from fastflow.bench.measure import peak_memory
from fastflow.nn import BottleneckDynamics, Continuous, MLPDynamics
from fastflow.nn.dynamics import ACTIVATIONS, LAYERS
from fastflow.testing.case import randn

pytestmark = pytest.mark.usefixtures("one_thread")
both = pytest.mark.parametrize("fused", [True, False], ids=["fused", "module"])

F64 = torch.float64


def network(features=3, hidden=(8, 8), seed=0, gain=2.0, **options):
    """In float64, with weights that make a flow of some strength."""
    torch.manual_seed(seed)
    dynamics = MLPDynamics(features, hidden, **options).double()
    with torch.no_grad():
        for parameter in dynamics.parameters():
            parameter.mul_(gain)
    return dynamics


def flow(dynamics, fused=True, **options):
    options = {"trace": "exact", "rtol": 1e-8, "atol": 1e-8, "time": 0.7, **options}
    return Continuous(dynamics, fused=fused, **options)


def jacobians(function, x):
    """[B, D, D] of a function that does not mix samples."""
    return torch.autograd.functional.jacobian(lambda x: function(x)[0].sum(0), x).transpose(0, 1)


# --- against what is known ----------------------------------------------------------------------------


@both
def test_linear_dynamics_are_a_matrix_exponential(fused):
    dynamics = network(hidden=(), layer="ignore")
    weight, x = dynamics.net[0].linear.weight.detach(), randn(5, 3)
    nn.init.zeros_(dynamics.net[0].linear.bias)
    z, logdet = flow(dynamics, fused, method="rk4", step_size=0.01)(x)
    torch.testing.assert_close(z, x @ torch.linalg.matrix_exp(0.7 * weight).T, rtol=0, atol=1e-8)
    torch.testing.assert_close(logdet, (0.7 * weight.trace()).expand(5), rtol=0, atol=1e-8)


def test_sign():
    """dx/dt = a x from the data to the latent: z = e^(aT) x and log|det| = + a T."""
    z, logdet = Continuous(Growth(), time=2.0, trace="exact")(torch.ones(1, 1))
    assert z.item() == pytest.approx(2.718281828, abs=1e-4) and logdet.item() == pytest.approx(1.0, abs=1e-5)


@both
@pytest.mark.parametrize("layer", LAYERS)
def test_logdet_is_that_of_the_jacobian(fused, layer):
    module, x = flow(network(layer=layer), fused), randn(4, 3)
    for run in (module, module.inverse):
        expected = torch.linalg.slogdet(jacobians(run, x))
        assert (expected.sign > 0).all()
        torch.testing.assert_close(run(x)[1], expected.logabsdet, rtol=0, atol=1e-7)


@both
def test_there_and_back(fused):
    for tolerance, dtype in ((1e-8, torch.float64), (1e-5, torch.float32)):
        module, x = flow(network().to(dtype), fused, rtol=tolerance, atol=tolerance), randn(50, 3).to(dtype)
        z, logdet = module(x)
        back, minus = module.inverse(z)
        torch.testing.assert_close(back, x, rtol=0, atol=100 * tolerance)
        torch.testing.assert_close(minus, -logdet, rtol=0, atol=100 * tolerance)


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "dopri5", "bosh3"])
@pytest.mark.parametrize("trace", ["exact", "hutchinson", None])
def test_fused_is_what_torchdiffeq_makes(method, trace):
    """Values, traces, energies and the number of evaluations and steps, both ways."""
    # the energies of modules by probes are made of J^T e, of the fused sweep of J e
    options = {"method": method, "trace": trace, "regularize": trace == "exact" and method != "bosh3"}
    if method in ("euler", "midpoint", "rk4"):
        options["step_size"] = 0.09
    x, e = 2 * randn(7, 3), randn(2, 7, 3).sign()
    for times in ((0.0, 0.3, 0.7), (0.7, 0.0)):
        ours, theirs = (
            flow(network(), fused, rtol=1e-4, atol=1e-4, **options).solve(x, times, probes=e) for fused in (True, False)
        )
        assert [int(n) for n in ours.steps] == [int(n) for n in theirs.steps]
        for one, other in zip(ours[:4], theirs[:4], strict=True):
            assert (one is None) == (other is None)
            if one is not None and method != "bosh3":  # torchdiffeq's interpolant of it is worse than its steps
                torch.testing.assert_close(one, other)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_tensors_of_a_network_are_the_network(layer, activation):
    dynamics, x = network(layer=layer, activation=activation, hidden=(5, 4)), randn(6, 3)
    if dynamics.beta is not None:
        nn.init.uniform_(dynamics.beta, 0.5, 2.0)
    value, trace = fastflow.mlp_trace(x, 0.3, dynamics.layers, layer=layer, activation=activation, exact=True)
    torch.testing.assert_close(value, dynamics(0.3, x))
    exact = fastflow.exact_trace(lambda x: dynamics(0.3, x), x)[1]
    torch.testing.assert_close(trace, exact)


def test_parameters_of_the_papers_code():
    """Its concat-squash network, written here as it is there, with the names mapped as the docstring says."""

    class Layer(nn.Module):
        def __init__(self, n, m):
            super().__init__()
            self._layer, self._hyper_gate = nn.Linear(n, m), nn.Linear(1, m)
            self._hyper_bias = nn.Linear(1, m, bias=False)

        def forward(self, t, x):
            t = t.view(1, 1)
            return self._layer(x) * torch.sigmoid(self._hyper_gate(t)) + self._hyper_bias(t)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer(3, 8), Layer(8, 8), Layer(8, 3)])

        def forward(self, t, x):
            for layer in self.layers[:-1]:
                x = nn.functional.softplus(layer(t, x))
            return self.layers[-1](t, x)

    torch.manual_seed(0)
    theirs = Net()
    names = {"layers": "net", "_layer": "linear", "_hyper_gate": "gate", "_hyper_bias": "hyper"}
    renamed = {".".join(names.get(p, p) for p in key.split(".")): v for key, v in theirs.state_dict().items()}
    ours = MLPDynamics(3, (8, 8), activation="softplus")
    ours.load_state_dict(renamed)
    x = torch.randn(5, 3)
    options = {"method": "rk4", "step_size": 0.1, "trace": "exact"}
    for one, other in zip(Continuous(ours, **options)(x), Continuous(theirs, **options)(x), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


# --- gradients ----------------------------------------------------------------------------------------


def gradients(module, x, seed=5):
    """Of some function of everything that comes back, by the parameters and x."""
    x = x.clone().requires_grad_()
    z, logdet = module(x, probes=randn(2, *x.shape, seed=seed).sign())
    loss = (z * randn(*z.shape, seed=1)).sum() + (logdet * randn(len(x), seed=2)).sum()
    if module.regularize:
        loss = loss + 0.3 * module.energies.kinetic.sum() + 0.2 * module.energies.jacobian.sum()
    return torch.autograd.grad(loss, [x, *module.parameters()])


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("options", [{}, {"train_time": True}, {"layer": "concat"}], ids=str)
def test_gradients_agree(options, trace):
    """Through the steps, fused and by autograd, and by both adjoints."""
    layer = {"layer": options["layer"]} if "layer" in options else {}
    settings = {k: v for k, v in options.items() if k != "layer"} | {"trace": trace, "rtol": 1e-7, "atol": 1e-7}
    x, found = randn(6, 3), {}
    for fused, adjoint in itertools.product((True, False), (False, True)):
        module = flow(network(**layer), fused, adjoint=adjoint, **settings).double()
        found[fused, adjoint] = gradients(module, x)
    for (fused, adjoint), grads in found.items():
        for one, other in zip(grads, found[False, False], strict=True):
            # that by the end is f there for the one, the slope of the dense output for the other
            limit = 1e-3 if adjoint or (fused and one.dim() == 0) else 1e-7
            assert (one - other).norm() <= limit * other.norm().clamp(min=1e-3)


@both
def test_gradients_of_the_energies(fused):
    """By differences: a step of fixed size makes it a smooth function."""
    module = flow(network(2, (4,)), fused, method="rk4", step_size=0.2, regularize=True)
    weight, x = module.dynamics.net[0].linear.weight, randn(3, 2)

    def energy(weight_given):
        return torch.func.functional_call(module, {"dynamics.net.0.linear.weight": weight_given}, (x,))

    def total():
        module(x)
        return 0.7 * module.energies.kinetic.sum() + module.energies.jacobian.sum()

    (grad,) = torch.autograd.grad(total(), weight)
    with torch.no_grad():
        for index in ((0, 0), (2, 1)):
            values = []
            for step in (1e-5, -1e-5):
                weight[index] += step
                values.append(total().item())
                weight[index] -= step
            assert grad[index].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


@both
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_second_derivatives(fused, method):
    """The score of log p and its divergence: through the Jacobian and without, equal."""
    options = {"step_size": 0.1} if method == "rk4" else {}
    module, x = flow(network(2, (6,)), fused, method=method, **options), randn(3, 2).requires_grad_()

    def density(x):
        z, logdet = module(x)
        return logdet - z.square().sum(1) / 2

    (score,) = torch.autograd.grad(density(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(score[:, 0].sum(), x)
    step = 1e-5 * torch.eye(2, dtype=F64)[0]
    scores = []
    for sign in (1, -1):
        moved = (x + sign * step).detach().requires_grad_()
        scores.append(torch.autograd.grad(density(moved).sum(), moved)[0][:, 0])
    by_differences = (scores[0] - scores[1]) / 2e-5
    torch.testing.assert_close(second[:, 0], by_differences, rtol=1e-4, atol=1e-6)


@both
@pytest.mark.parametrize("adjoint", [False, True])
def test_gradient_of_a_learned_end(fused, adjoint):
    module, x = flow(network(), fused, train_time=True, adjoint=adjoint).double(), randn(4, 3)
    for run in (module, module.inverse):

        def loss(run=run):
            z, logdet = run(x)
            return (z * randn(4, 3, seed=1)).sum() + logdet.sum()

        (grad,) = torch.autograd.grad(loss(), module.sqrt_time)
        values = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                module.sqrt_time += step
            values.append(loss().item())
            with torch.no_grad():
                module.sqrt_time -= step
        assert grad.item() == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-4)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_steps_of_the_adjoint(method):
    """Fused and of modules: as many, but that the norm of the former leaves nothing else out."""
    found, options = [], {"step_size": 0.1} if method == "rk4" else {"rtol": 1e-6, "atol": 1e-6}
    for fused in (True, False):
        module = flow(network(), fused, method=method, adjoint=True, **options)
        for _ in range(2):  # of the last call
            z, logdet = module(randn(6, 3))
            with pytest.raises(RuntimeError, match="adjoint_steps: no backward pass has solved an adjoint"):
                _ = module.adjoint_steps
            (z.square().sum() + logdet.sum()).backward()
        found.append([int(n) for n in module.adjoint_steps])
        assert [int(n) for n in module.steps] != [0, 0, 0]
        with pytest.raises(RuntimeError, match="adjoint_steps"):
            _ = copy.deepcopy(module).adjoint_steps
    if method == "rk4":
        assert found == [[28, 7, 0]] * 2
    else:
        assert all(evaluations == 2 + 6 * (accepted + rejected) for evaluations, accepted, rejected in found)
    direct = flow(network())
    direct(randn(6, 3))[1].sum().backward()
    with pytest.raises(RuntimeError, match="adjoint_steps"):
        _ = direct.adjoint_steps


@pytest.mark.parametrize("adjoint", [False, True], ids=["steps", "adjoint"])
def test_memory_does_not_grow_with_the_time(adjoint):
    """Of a training step of 20 and of 200 evaluations."""
    x, peaks = torch.randn(500, 3), []
    for evaluations in (20, 200):
        options = {"method": "rk4", "step_size": 4 / evaluations, "adjoint": adjoint, "checkpoints": 4}
        module = Continuous(MLPDynamics(3, (16, 16)), time=1.0, max_steps=50, **options)

        def step(module=module):
            z, logdet = module(x)
            (z.square().sum() - logdet.sum()).backward()

        step()
        assert module.steps.evaluations == evaluations
        peaks.append(peak_memory(step))
    assert peaks[1] <= 1.02 * peaks[0] and peaks[0] < 30 * x.numel() * 4


# --- traces -------------------------------------------------------------------------------------------


@both
def test_unbiased_over_all_signs(fused):
    """The mean over all 2^D probes of signs is the exact trace."""
    module, x = flow(network(), fused, method="rk4", step_size=0.1), randn(4, 3)
    exact = module(x)[1]
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=F64)
    module(x, trace="hutchinson", probes=signs[:, None].expand(-1, 4, -1))
    assert module.estimates.shape == (8, 4) and module.estimates.std(0).min() > 1e-3
    torch.testing.assert_close(module.estimates.mean(0), exact, rtol=0, atol=1e-10)


def test_bottleneck():
    """H = 2 of D = 16: the same mean, with less variance than probes of width D."""
    torch.manual_seed(0)
    encoder, decoder = MLP(16, 2), MLP(2, 16)
    module = flow(BottleneckDynamics(encoder, decoder).double(), method="rk4", step_size=0.35, kind="gaussian")
    x = randn(3, 16)
    exact = module(x)[1]
    spread = {}
    for trace in ("bottleneck", "hutchinson"):
        torch.manual_seed(1)
        _, logdet = module(x, trace=trace, probes=1000)
        spread[trace] = module.estimates.std(0)
        assert ((logdet - exact).abs() <= 5 * spread[trace] / 1000**0.5).all()
    assert (spread["bottleneck"] < spread["hutchinson"]).all()
    module.product = "jvp"
    e = randn(1, 3, 2)
    forward = module(x, trace="bottleneck", probes=e)[1]
    module.product = "vjp"
    torch.testing.assert_close(forward, module(x, trace="bottleneck", probes=e)[1])


def test_forward_and_reverse_mode_are_one_number():
    x, e = randn(4, 3), randn(2, 4, 3)
    forward, reverse = (
        flow(network(), False, trace="hutchinson", product=product)(x, probes=e)[1] for product in ("jvp", "vjp")
    )
    torch.testing.assert_close(forward, reverse)


@both
def test_same_noise_same_solve(fused):
    """The probes are drawn once, before the solve."""
    module, x = flow(network(), fused, trace="hutchinson"), randn(6, 3)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append((*module(x), int(module.steps.evaluations)))
    assert results[0][2] == results[1][2] and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(module(x)[1], results[0][1])


@both
def test_exact_in_evaluation(fused):
    module, x = flow(network(), fused, trace="hutchinson", eval_trace="exact"), randn(6, 3)
    assert not torch.allclose(module(x)[1], module(x)[1])
    exact = module(x, trace="exact")[1]
    assert torch.equal(module.eval()(x)[1], exact)


def test_per_sample_steps_do_not_know_the_batch():
    module, x = flow(network(gain=4.0), per_sample=True, rtol=1e-4, atol=1e-4), randn(6, 3)
    whole, steps = module(x), module.steps
    assert steps.evaluations.shape == (6,)
    for i in range(6):
        for one, all_of_them in zip(module(x[i : i + 1]), whole, strict=True):
            torch.testing.assert_close(one[0], all_of_them[i], rtol=0, atol=1e-11)
        assert module.steps.evaluations[0] == steps.evaluations[i]


def test_trajectory():
    module, x = flow(network()), randn(4, 3)
    values, logdets = module.trajectory(x, torch.linspace(0, 0.7, 5))
    assert values.shape == (4, 4, 3) and logdets.shape == (4, 4)
    z, logdet = module(x)
    torch.testing.assert_close(values[-1], z, rtol=0, atol=1e-6)
    torch.testing.assert_close(logdets[-1], logdet, rtol=0, atol=1e-6)


# --- edges and errors ---------------------------------------------------------------------------------


class Growth(nn.Module):
    """dx/dt = x / 2, with a parameter that an optimiser could take."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.5))

    def forward(self, t, x):
        return self.rate * x


class MLP(nn.Module):
    def __init__(self, n, m):
        super().__init__()
        self.linear = nn.Linear(n, m)

    def forward(self, t, x):
        return 2 * torch.tanh(self.linear(x) + t)


class Explosion(nn.Module):
    """x^2 reaches infinity at t = 1 / x."""

    def forward(self, t, x):
        return x * x


class Hole(nn.Module):
    """Not a number beyond 1."""

    def forward(self, t, x):
        return torch.where(x.abs().sum(1, keepdim=True) < 1, torch.ones_like(x), torch.full_like(x, float("nan")))


@both
def test_no_time_and_no_samples(fused):
    module, x = flow(network(), fused), randn(4, 3)
    still = flow(network(), fused, time=0.0)
    for run in (still, still.inverse):
        z, logdet = run(x)
        assert torch.equal(z, x) and torch.equal(logdet, torch.zeros(4, dtype=F64))
    z, logdet = module(x[:0])
    assert z.shape == (0, 3) and logdet.shape == (0,)
    values, _ = module.trajectory(x, [0.0, 0.0, 0.7, 0.7])
    assert torch.equal(values[0], x) and torch.equal(values[1], values[2])


@both
def test_half_precision_is_solved_in_single(fused):
    module, x = flow(network().float(), fused, rtol=1e-5, atol=1e-5), torch.randn(4, 3)
    z, logdet = module(x.bfloat16())
    assert z.dtype == torch.bfloat16 and logdet.dtype == torch.float32
    torch.testing.assert_close(logdet, module(x.bfloat16().float())[1], rtol=0, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(x)[1], module(x)[1])


def test_a_module_that_explodes():
    x = torch.tensor([[0.1], [2.0], [3.0]])
    with pytest.raises(fastflow.SolverError, match=r"sample \d .* not finite|underflows at t = 0\.\d+|max_steps"):
        Continuous(Explosion(), trace="exact")(x)
    with pytest.raises(fastflow.SolverError, match=r"sample 2 is not finite at t = .*, step \d+"):
        Continuous(Explosion(), trace="exact", method="euler", step_size=0.02, time=3.0)(x[[0, 0, 2]])
    with pytest.raises(fastflow.SolverError, match=r"underflows at t = 0.*, h = .*: the dynamics of sample"):
        Continuous(Hole(), trace="exact")(torch.tensor([[-0.5], [0.5]]))
    with pytest.raises(fastflow.SolverError, match="more than max_steps = 3 steps at t = .*derivative"):
        Continuous(Growth(), time=9.0, trace="exact", max_steps=3)(x)


def test_a_network_that_explodes():
    dynamics = network(1, (), layer="ignore")
    nn.init.constant_(dynamics.net[0].linear.weight, 1e6)
    with pytest.raises(fastflow.SolverError, match="sample"):
        flow(dynamics, time=1.0, method="euler", step_size=0.01)(torch.ones(3, 1, dtype=F64))
    with pytest.raises(fastflow.SolverError, match="max_steps|3 steps"):
        flow(network(gain=9.0), max_steps=3)(randn(4, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": 0.0, "atol": 0.0}, "rtol, atol: expected numbers of at least 0, not both 0"),
        ({"rtol": -1.0}, "rtol, atol"),
        ({"time": -1.0}, "time: expected a number of at least 0, got -1.0"),
        ({"trace": "other"}, "trace: expected one of exact, hutchinson, bottleneck, None, got 'other'"),
        ({"trace": "bottleneck"}, "trace: 'bottleneck' needs dynamics with an encoder and a decoder"),
        ({"probes": 0}, "probes: expected at least 1, got 0"),
        ({"kind": "uniform"}, "kind: expected one of rademacher, gaussian, got 'uniform'"),
        ({"step_size": 0.0}, "step_size: expected a positive number"),
        ({"method": "tsit5"}, r"method: .* for modules \(tsit5 is there for MLPDynamics only\), got 'tsit5'"),
        ({"method": "other"}, "method: expected one of dopri5, .*, got 'other'"),
        ({"per_sample": True}, "per_sample: there for MLPDynamics only"),
        ({"step_size": 0.1}, "step_size: 'dopri5' adapts its steps"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Continuous(Growth(), **options)


@pytest.mark.parametrize("name", ["time", "rtol", "atol", "step_size", "probes", "max_steps", "checkpoints"])
def test_arguments_of_another_type(name):
    """Whole numbers are not rounded."""
    whole = name in ("probes", "max_steps", "checkpoints")
    for value in ("1", True, torch.ones(2), *([2.5] if whole else [])):
        with pytest.raises(TypeError, match=f"{name}: expected a {'whole ' * whole}number, got"):
            Continuous(Growth(), **{name: value})


def test_dynamics_are_a_module():
    for dynamics in (None, lambda t, x: -x):
        with pytest.raises(TypeError, match=r"dynamics: expected a module \(t, x\) -> dx/dt, got"):
            Continuous(dynamics)


def test_dtypes_that_do_not_go_together():
    """What the solver hands to a module is not what its parameters are, and the module minds."""
    with pytest.raises(
        TypeError, match="parameters of torch.bfloat16 and fail with x of torch.float32, .* half precis"
    ):
        Continuous(MLP(3, 3).bfloat16(), trace="exact")(torch.randn(2, 3).bfloat16())


@both
def test_bad_input(fused):
    module, x = flow(network(), fused), randn(4, 3)
    x[2, 1] = float("nan")
    with pytest.raises(ValueError, match="x: expected finite values, got .* in sample 2"):
        module(x)
    with pytest.raises(ValueError, match="context: this model takes none"):
        module(randn(4, 3), randn(4, 1))
    with pytest.raises(ValueError, match="times: expected .*times that increase or decrease"):
        module.trajectory(randn(4, 3), [0.0, 1.0, 0.5])
    for times in (1.0, None, "ab"):
        with pytest.raises(TypeError, match="times: expected at least two numbers, got"):
            module.trajectory(randn(4, 3), times)
    with pytest.raises(ValueError, match=r"probes: expected \[S, 4, 3\], got \[1, 4, 2\]"):
        module(randn(4, 3), trace="hutchinson", probes=randn(1, 4, 2))
    with pytest.raises(
        TypeError, match="x: .*float64 and fail with x of torch.float32|dtype that goes with x of torch.float32"
    ):
        module(randn(4, 3).float())
    with pytest.raises(ValueError, match="regularize: expected an exact trace"):
        module.solve(randn(4, 3), [0.0, 1.0], trace=None, regularize=True)
    with pytest.raises(RuntimeError, match="energies: the last call had regularize=False"):
        _ = (module(randn(4, 3)), module.energies)
    with pytest.raises(RuntimeError, match="has not been called yet"):
        _ = flow(network(), fused).steps


def test_a_module_that_changes_the_shape():
    pytest.importorskip("torchdiffeq")
    with pytest.raises(ValueError, match=r"expected an output of shape \[4, 3\] like x, got \[4, 2\]"):
        Continuous(MLP(3, 2), trace="exact")(torch.randn(4, 3))


def test_a_compiled_module():
    """torchdiffeq's loops stay as they are."""
    module, x, e = Continuous(MLP(3, 3), adjoint=True), torch.randn(4, 3), torch.randn(2, 4, 3)

    def run(x):
        z, logdet = module(x, probes=e)
        return z.sum() + logdet.sum()

    found = [torch.autograd.grad(f(x), list(module.parameters())) for f in (run, torch.compile(run, backend="eager"))]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert module.adjoint_steps.evaluations > 0


def test_without_torchdiffeq(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"needs torchdiffeq, which is not installed: pip install 'fastflow\[ode\]'"):
        Continuous(Growth())(torch.ones(1, 1))


@both
def test_copies_leave_the_last_call_behind(fused):
    module = flow(network(), fused, regularize=True)
    module(randn(4, 3))
    assert module.energies.kinetic.requires_grad
    with pytest.raises(RuntimeError, match="not been called"):
        _ = copy.deepcopy(module).energies
