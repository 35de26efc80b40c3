"""The fused solver: torchdiffeq's steps, solutions of linear equations, and what goes wrong."""

import pytest
import torch
from test_trace import mlp
from torch.nn import functional as F

import fastflow
from fastflow import ops
from fastflow.ops.ode_method import METHODS
from fastflow.ops.trace_mlp import ACTIVATIONS, LAYERS, sweep
from fastflow.testing.case import randn

ADAPTIVE = [name for name, method in METHODS.items() if method.error]
BACKENDS = ("reference", "cpu")

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def params(layers):
    return [p for given in layers for p in given]


def problem(dim=3, samples=6, layer="concat_squash", hidden=(7, 5), gain=1.0, dtype=torch.float64):
    """(x, layers without gradients)"""
    layers = [[gain * p.detach() for p in given] for given in mlp(layer, dim, hidden, dtype)]
    return randn(samples, dim).to(dtype), layers


def linear(matrix):
    """f(x) = A x"""
    return [(matrix, torch.zeros_like(matrix[0]))]


# --- methods ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda m: m.name)
def test_tableaus(method):
    """Sums of rows, the end of the interpolant, and the conditions of order up to four."""
    s = method.stages
    a = torch.tensor([[*row, *(s - len(row)) * [0.0]] for row in method.a], dtype=torch.float64)
    b, c = (torch.tensor(v, dtype=torch.float64) for v in (method.b, method.c))
    dense = torch.tensor(method.weights(), dtype=torch.float64)

    def conditions(b, theta, order):
        trees = {
            1: [(b.sum(), 1.0)],
            2: [(b @ c, 1 / 2)],
            3: [(b @ c**2, 1 / 3), (b @ a @ c, 1 / 6)],
            4: [(b @ c**3, 1 / 4), (b * c @ a @ c, 1 / 8), (b @ a @ c**2, 1 / 12), (b @ a @ a @ c, 1 / 24)],
        }
        for n in range(1, min(order, 4) + 1):
            for value, expected in trees[n]:
                assert abs(value.item() - expected * theta**n) < 1e-13

    assert (a.sum(1) - c).abs().max() < 1e-14 and (dense.sum(1) - b).abs().max() < 2e-14
    conditions(b, 1.0, method.order)
    for theta in (0.2, 0.7):
        between = 1 if not method.dense else method.order - (method.order == 5)
        conditions(dense @ torch.tensor([theta**p for p in (1, 2, 3, 4)], dtype=torch.float64), theta, between)
    assert abs(sum(method.error)) < 1e-15
    if method.fsal:
        assert method.a[-1] == method.b[:-1] and method.b[-1] == 0.0
    assert len(method.pack()) == 4 + 3 * s + s * s + 4 * s


# --- torchdiffeq ------------------------------------------------------------------------------------


def theirs(x, times, layers, layer, probes, regularize, options):
    """(states of the tuple at times[1:], evaluations, accepted, rejected) of torchdiffeq; probes None: exact."""
    torchdiffeq = pytest.importorskip("torchdiffeq")
    samples, dim = x.shape
    exact = probes is None
    probes = torch.eye(dim, dtype=x.dtype)[:, None].expand(-1, samples, -1) if exact else probes
    reduce = torch.Tensor.sum if exact else torch.Tensor.mean
    sign = 1.0 if times[-1] > times[0] else -1.0

    class Function(torch.nn.Module):
        counts = [0, 0, 0]

        def forward(self, t, state):
            self.counts[0] += 1
            f, tangent = sweep(state[0], t, probes, params(layers), LAYERS.index(layer), ACTIVATIONS.index("tanh"))
            trace, square = reduce((tangent * probes).sum(2), 0), reduce(tangent.square().sum(2), 0)
            return (f, trace, sign * f.square().sum(1), sign * square) if regularize else (f, trace)

        def callback_accept_step(self, *_):
            self.counts[1] += 1

        def callback_reject_step(self, *_):
            self.counts[2] += 1

    function = Function()
    function.counts = [0, 0, 0]
    if options.get("step_size") is not None:
        options = {**options, "options": {"step_size": options["step_size"]}}
    start = (x, *((3 if regularize else 1) * (x.new_zeros(samples),)))
    found = torchdiffeq.odeint(
        function,
        start,
        torch.tensor(times, dtype=torch.float64),
        **{k: v for k, v in options.items() if k != "step_size"},
    )
    return [part[1:] for part in found], function.counts


@every_backend
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("exact, regularize", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("times", [(0.0, 1.0), (0.0, 0.3, 0.35, 2.0), (1.0, 0.5, -1.0)], ids=str)
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_the_steps_of_torchdiffeq(method, times, exact, regularize, backend):
    """The same steps accepted, rejected and evaluated; and the same numbers but for its interpolant of bosh3."""
    x, layers = problem(gain=2.0, samples=7)
    probes = None if exact else randn(2, 7, 3, seed=3)
    options = {"method": method, "rtol": 1e-5, "atol": 1e-5}
    states, counts = theirs(x, times, layers, "concat_squash", probes, regularize, options)
    solution = ops.mlp_ode(
        x, times, layers, layer="concat_squash", probes=probes, exact=exact, regularize=regularize, backend=backend,
        **options,
    )  # fmt: skip
    assert [int(count) for count in solution.steps] == counts and counts[2] > 0
    found = [solution.value, solution.trace if exact else solution.trace.mean(1), *solution[2:4]]
    for value, expected in zip(found, states, strict=False):
        # the roundings of a hundred steps, as the errors of each grow with the path
        allowed = 1e-10 if method == "dopri5" else 1e-2
        assert (value - expected).abs().max() <= allowed * max(1.0, expected.abs().max().item())


@every_backend
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step_size", [None, 0.3, 0.25])
@pytest.mark.parametrize("times", [(0.0, 1.0), (0.0, 0.4, 0.5, 2.0), (1.0, 0.5, -1.0)], ids=str)
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_the_grid_of_torchdiffeq(method, times, step_size, backend):
    x, layers = problem(samples=7)
    options = {"method": method, "step_size": step_size}
    states, counts = theirs(x, times, layers, "concat_squash", None, True, options)
    solution = ops.mlp_ode(
        x, times, layers, layer="concat_squash", exact=True, regularize=True, backend=backend, **options
    )
    assert int(solution.steps.evaluations) == counts[0] and not solution.steps.rejected
    for value, expected in zip(solution[:4], states, strict=True):
        assert (value - expected).abs().max() <= 1e-13 * max(1.0, expected.abs().max().item())


@every_backend
def test_float32_takes_the_same_steps(backend):
    x, layers = problem(samples=7, dtype=torch.float32)
    options = {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4}
    states, counts = theirs(x, (0.0, 1.0), layers, "concat_squash", None, False, options)
    solution = ops.mlp_ode(x, (0, 1), layers, layer="concat_squash", exact=True, backend=backend, **options)
    assert [int(count) for count in solution.steps] == counts
    for value, expected in zip(solution[:2], states, strict=True):
        assert (value - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


# --- solutions --------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("end", [2.0, -1.0])
def test_linear_equation(end, backend):
    matrix, x = randn(4, 4) / 2, randn(5, 4)
    exact = x @ torch.linalg.matrix_exp(end * matrix).T
    for method in ("rk4", "dopri5", "tsit5", "bosh3"):
        options = {"step_size": 0.01} if method == "rk4" else {"rtol": 1e-9, "atol": 1e-9}
        solution = ops.mlp_ode(
            x, (0, end), linear(matrix), layer="ignore", exact=True, regularize=True, method=method, max_steps=5000,
            backend=backend, **options,
        )  # fmt: skip
        bar = 1e-8 if method == "rk4" else 1e-7
        assert (solution.value[0] - exact).abs().max() <= bar
        assert (solution.trace - end * matrix.trace()).abs().max() <= 1e-10
        assert (solution.jacobian - abs(end) * matrix.square().sum()).abs().max() <= 1e-10
        assert (solution.kinetic > 0).all()


@every_backend
@pytest.mark.parametrize("method", ADAPTIVE)
def test_dense_output(method, backend):
    """Between the steps the solution is as right as at their ends, and does not depend on what is asked for."""
    x, layers = problem(layer="concat")
    times = [0.1 * i for i in range(11)]
    truth = ops.mlp_ode(x, times, layers, method="dopri5", rtol=1e-11, atol=1e-11, backend="reference")
    options = {"method": method, "rtol": 1e-6, "atol": 1e-6, "backend": backend}
    found = ops.mlp_ode(x, times, layers, **options)
    assert (found.value - truth.value).abs().max() < 5e-5
    for i in (4, 10):
        alone = ops.mlp_ode(x, (0, times[i]), layers, **options)
        assert (alone.value[0] - found.value[i - 1]).abs().max() < 1e-14


@every_backend
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("layer, activation", [("concat", "softplus"), ("squash", "swish"), ("ignore", "tanh")])
def test_logdet_and_reverse(layer, activation, per_sample, backend):
    """The trace's integral is the log-determinant of the map; the way back ends at the start."""
    x, layers = problem(layer="concat_squash" if layer == "squash" else layer, samples=3)
    if layer == "squash":
        layers = [[*given[:4], *([torch.tensor(1.3)] if i < 2 else [])] for i, given in enumerate(layers)]
        layers = [[p.double() for p in given] for given in layers]
    options = {"layer": layer, "activation": activation, "exact": True, "rtol": 1e-8, "atol": 1e-8}
    options |= {"backend": backend, "per_sample": per_sample}
    there = ops.mlp_ode(x, (0, 1), layers, **options)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: ops.mlp_ode(x, (0, 1), layers, **options).value[0].sum(0), x
    )
    logdet = torch.linalg.slogdet(jacobian.transpose(0, 1)).logabsdet
    assert (there.trace[0] - logdet).abs().max() <= 10 * 1e-8
    back = ops.mlp_ode(there.value[0], (1, 0), layers, **options)
    assert (back.value[0] - x).abs().max() <= 100 * 1e-8
    assert (back.trace + there.trace).abs().max() <= 100 * 1e-8


@every_backend
def test_network_kinds(backend):
    """``squash`` and ``swish``, written out."""
    x, layers = problem()
    t, betas = torch.tensor(0.7, dtype=torch.float64), [torch.tensor(b, dtype=torch.float64) for b in (0.6, 1.7)]

    def written(layer):
        y = x
        for i, (weight, bias, gate_weight, gate_bias, hyper_weight) in enumerate(layers):
            if layer == "concat":
                y = F.linear(torch.cat([t.expand(len(y), 1), y], 1), torch.cat([gate_weight, weight], 1), bias)
            else:
                y = F.linear(y, weight, bias) * torch.sigmoid(gate_weight[:, 0] * t + gate_bias)
                y = y + hyper_weight[:, 0] * t if layer == "concat_squash" else y
            y = y * torch.sigmoid(betas[i] * y) if i < 2 else y
        return y

    for layer, pick in (
        ("squash", lambda p: p[:4]),
        ("concat_squash", lambda p: p),
        ("concat", lambda p: [torch.cat([p[2], p[0]], 1), p[1]]),
    ):
        given = [[*pick(p), *betas[i : i + 1]] for i, p in enumerate(layers)]
        value = ops.mlp_trace(x, t, given, layer=layer, activation="swish", exact=True, backend=backend)[0]
        assert (value - written(layer)).abs().max() < 1e-13


@every_backend
def test_regularisers(backend):
    """The energies are those of a path sampled finely; probes' mean squares average to the Frobenius norm."""
    x, layers = problem()
    times = torch.linspace(1, 0, 201, dtype=torch.float64)
    options = {"layer": "concat_squash", "rtol": 1e-8, "atol": 1e-8, "backend": backend}
    path = ops.mlp_ode(x, times, layers, **options)
    speed, square = [], []
    for t, y in zip(times.tolist(), (x, *path.value), strict=True):
        f, tangent = sweep(y, torch.tensor(t), torch.eye(3).double()[:, None].expand(3, 6, 3), params(layers), 1, 0)
        speed.append(f.square().sum(1))
        square.append(tangent.square().sum((0, 2)))
    solution = ops.mlp_ode(x, (1, 0), layers, exact=True, regularize=True, **options)
    for value, rate in ((solution.kinetic, speed), (solution.jacobian, square)):
        assert (value[0] - torch.trapezoid(torch.stack(rate), dx=1 / 200, dim=0)).abs().max() < 1e-4
    signs = torch.cartesian_prod(*(3 * [torch.tensor([-1.0, 1.0]).double()]))[:, None].expand(8, 6, 3)
    drawn = ops.mlp_ode(x, (1, 0), layers, probes=signs, regularize=True, **options)
    assert (drawn.jacobian - solution.jacobian).abs().max() < 1e-6
    assert (drawn.trace.mean(1) - solution.trace).abs().max() < 1e-6
    alone = ops.mlp_ode(x, (1, 0), layers, regularize=True, **options)
    assert alone.trace is None and alone.jacobian is None and (alone.kinetic - solution.kinetic).abs().max() < 1e-6


# --- per sample -------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("hidden", [(7, 5), (140,)])
def test_a_sample_does_not_depend_on_its_batch(hidden, backend):
    """Bit for bit: whatever the other samples are and, of the kernels, however many."""
    x, layers = problem(samples=9, gain=1.5, hidden=hidden)
    e = randn(2, 9, 3, seed=1)
    options = {"layer": "concat_squash", "regularize": True, "per_sample": True, "backend": backend}
    whole = ops.mlp_ode(x, (0, 0.5, 1), layers, probes=e, **options)
    assert len(set(whole.steps.evaluations.tolist())) > 1
    others = x.clone()
    others[1:] = 3 * randn(8, 3, seed=5)
    batches = [(others, e, slice(0, 1))]
    if backend != "reference":
        batches += [(x[:1], e[:, :1], slice(0, 1)), (x[2:7], e[:, 2:7], slice(2, 7))]
    for batch, probes, which in batches:
        part = ops.mlp_ode(batch, (0, 0.5, 1), layers, probes=probes, **options)
        size = which.stop - which.start
        for all_of_them, some in zip((*whole[:4], *whole.steps), (*part[:4], *part.steps), strict=True):
            dim = 1 if all_of_them is whole.value else all_of_them.dim() - 1
            at = 0 if batch is others else which.start
            expected = all_of_them.narrow(dim, which.start, size)
            assert torch.equal(some.narrow(dim, which.start - at, size), expected)


@every_backend
def test_per_sample_is_a_batch_of_one(backend):
    x, layers = problem(samples=5, gain=1.5)
    options = {"layer": "concat_squash", "exact": True, "backend": backend}
    together = ops.mlp_ode(x, (0, 1), layers, per_sample=True, **options)
    for b in range(5):
        alone = ops.mlp_ode(x[b : b + 1], (0, 1), layers, **options)
        assert [int(n[b]) for n in together.steps] == [int(n) for n in alone.steps]
        assert (alone.value[0, 0] - together.value[0, b]).abs().max() < 1e-11


# --- what may go wrong ------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("per_sample", [False, True])
def test_explosion(per_sample, backend):
    """x grows by e^(100 t): beyond the largest float, at a sample that is named."""
    x = torch.zeros(4, 2)
    x[2] = 1.0
    layers = linear(100 * torch.eye(2))
    for method, options in (("rk4", {"step_size": 0.05}), ("dopri5", {}), ("tsit5", {}), ("bosh3", {})):
        with pytest.raises(
            fastflow.SolverError, match=r"not finite at t = [.\d]+, step \d+, h = .*, first in sample 2"
        ):
            ops.mlp_ode(
                x, (0, 10), layers, layer="ignore", exact=True, method=method, per_sample=per_sample,
                rtol=1e-3, atol=1e-3, backend=backend, **options,
            )  # fmt: skip


@every_backend
def test_stiffness_takes_too_many_steps(backend):
    x, layers = torch.ones(3, 1), [(torch.tensor([[-1e6]]), torch.zeros(1))]
    for per_sample in (False, True):
        with pytest.raises(fastflow.SolverError, match="more than 200 steps at t = .*, step 201"):
            ops.mlp_ode(
                x, (0, 1), layers, layer="ignore", max_steps=200, per_sample=per_sample, rtol=1e-6, atol=1e-9,
                backend=backend,
            )  # fmt: skip
    with pytest.raises(fastflow.SolverError, match="more than 9 steps"):
        ops.mlp_ode(x, (0, 1), layers, layer="ignore", method="rk4", step_size=0.1, max_steps=9, backend=backend)
    # more of them than there is memory, or than there are numbers; in one block of samples and in several
    for samples, step_size in ((3, 1e-300), (3, 1e-320), (300, 1e-300)):
        with pytest.raises(fastflow.SolverError, match="more than 9 steps at t = 1, step 1, h = -1e-3"):
            ops.mlp_ode(
                torch.ones(samples, 1), (1, 0), layers, layer="ignore", step_size=step_size, max_steps=9,
                backend=backend,
            )  # fmt: skip


@every_backend
def test_underflow(backend):
    """At a time so late that the steps which the tolerance asks for are not there."""
    x, layers = torch.ones(2, 1).double(), [(torch.tensor([[1e3]]).double(), torch.zeros(1).double())]
    with pytest.raises(fastflow.SolverError, match="the step underflows at t = 1e.17, step"):
        ops.mlp_ode(x, (1e17, 1e17 + 1e4), layers, layer="ignore", backend=backend)


@every_backend
def test_dynamics_that_are_not_finite(backend):
    layers = [(torch.tensor([[float("inf")]]), torch.zeros(1))]
    for method in ("dopri5", "euler"):
        with pytest.raises(fastflow.SolverError, match="not finite .* first in sample 0"):
            ops.mlp_ode(torch.ones(3, 1), (0, 1), layers, layer="ignore", method=method, backend=backend)


@every_backend
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("gradient", ["steps", "adjoint"])
def test_no_time_and_no_samples(gradient, per_sample, backend):
    x, layers = problem()
    options = {"regularize": True, "gradient": gradient, "per_sample": per_sample, "backend": backend}
    for method in ("dopri5", "rk4"):
        for times in ((1.0, 1.0), (1.0, 1.0, 1.0)):
            given = [[p.clone().requires_grad_() for p in one] for one in layers]
            leaf = x.clone().requires_grad_()
            solution = ops.mlp_ode(leaf, times, given, layer="concat_squash", exact=True, method=method, **options)
            assert torch.equal(solution.value, x.expand(len(times) - 1, -1, -1)) and not solution.trace.any()
            assert not any(count.any() for count in solution.steps)
            total = solution.value.sum() + solution.trace.sum() + solution.kinetic.sum()
            gx, *rest = torch.autograd.grad(total, [leaf, *params(given)], allow_unused=True, materialize_grads=True)
            assert torch.equal(gx, torch.full_like(x, len(times) - 1.0)) and not any(g.any() for g in rest)
        given = [[p.clone().requires_grad_() for p in one] for one in layers]
        none = ops.mlp_ode(
            x[:0], (0, 0.5, 1), given, layer="concat_squash", probes=torch.ones(2, 0, 3).double(), method=method,
            **options,
        )  # fmt: skip
        assert [tuple(part.shape) for part in none[:4]] == [(2, 0, 3), (2, 2, 0), (2, 0), (2, 0)]
        assert none.steps.evaluations.shape == ((0,) if per_sample else ())
        grads = torch.autograd.grad(none.value.sum(), params(given), allow_unused=True, materialize_grads=True)
        assert not any(g.any() for g in grads)


@every_backend
def test_zero_absolute_or_relative_tolerance(backend):
    """One of them may be zero; the trace starts from zero."""
    x, layers = problem()
    truth = ops.mlp_ode(x, (0, 1), layers, layer="concat_squash", exact=True, rtol=1e-9, atol=1e-9)
    for rtol, atol in ((1e-6, 0), (0, 1e-6)):
        found = ops.mlp_ode(x, (0, 1), layers, layer="concat_squash", exact=True, rtol=rtol, atol=atol, backend=backend)
        assert (found.value - truth.value).abs().max() < 1e-4 and (found.trace - truth.trace).abs().max() < 1e-4


X = torch.zeros(4, 3)
PLAIN = [(torch.zeros(5, 3), torch.zeros(5)), (torch.zeros(3, 5), torch.zeros(3))]
LINEAR = torch.nn.Linear(3, 3)


def run(x=X, times=(0, 1), layers=PLAIN, layer="ignore", **options):
    return ops.mlp_ode(x, times, layers, layer=layer, **options)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (TypeError, "x: expected float32", lambda: run(X.long())),
        (ValueError, r"x: expected \[B, D\]", lambda: run(X[None])),
        (
            ValueError,
            "x: expected finite values, .* in sample 1",
            lambda: run(X + torch.tensor([[0, torch.nan, 0, 0]]).T),
        ),
        (ValueError, "times: expected finite times that increase or decrease", lambda: run(times=(0, 1, 0.5))),
        (ValueError, "times: expected finite", lambda: run(times=(0, float("nan")))),
        (ValueError, r"times: expected at least two", lambda: run(times=(0,))),
        (ValueError, r"times: expected at least two", lambda: run(times=torch.zeros(2, 2))),
        (ValueError, "rtol, atol: expected .* not both 0, got 0 and 0", lambda: run(rtol=0, atol=0)),
        (ValueError, "rtol, atol: expected", lambda: run(rtol=-1e-3)),
        (ValueError, "rtol, atol: expected", lambda: run(atol=float("nan"))),
        (ValueError, "method: expected one of euler", lambda: run(method="heun")),
        (ValueError, "step_size: expected a positive", lambda: run(step_size=0.0)),
        (ValueError, "gradient: expected steps or adjoint", lambda: run(gradient="both")),
        (TypeError, "times: expected at least two numbers, got 1", lambda: run(times=1)),
        (TypeError, "times: expected at least two numbers, got None", lambda: run(times=None)),
        (TypeError, "max_steps: expected a whole number, got 2.5", lambda: run(max_steps=2.5)),
        (TypeError, "checkpoints: expected a whole number, got None", lambda: run(checkpoints=None)),
        (TypeError, "rtol: expected a number, got 'small'", lambda: run(rtol="small")),
        (TypeError, "step_size: expected a number", lambda: run(step_size=torch.ones(2))),
        (TypeError, "layers: expected a list of the tensors of every layer, got Linear", lambda: run(layers=LINEAR)),
        (TypeError, r"layers\[0\]: expected \(weight, bias\), got Linear", lambda: run(layers=[LINEAR])),
        (ValueError, "checkpoints: expected at least 1", lambda: run(checkpoints=0)),
        (ValueError, "max_steps: expected at least 1", lambda: run(max_steps=0)),
        (ValueError, "probes: expected either .* both", lambda: run(exact=True, probes=X)),
        (ValueError, r"probes: expected \[S, 4, 3\]", lambda: run(probes=X[:2])),
        (ValueError, "layer: expected one of concat", lambda: run(layer="blend")),
        (ValueError, "activation: expected one of tanh", lambda: run(activation="relu")),
        (ValueError, r"layers\[0\]: expected \(weight, bias, beta\)", lambda: run(activation="swish")),
        (
            ValueError,
            r"layers\[0\] beta: expected a number other than 0",
            lambda: run(layers=[(*PLAIN[0], torch.zeros(())), PLAIN[1]], activation="swish"),
        ),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()


# --- forms ------------------------------------------------------------------------------------------


@every_backend
def test_half_precision_and_probes(backend):
    x, layers = problem(dtype=torch.float32)
    options = {"layer": "concat_squash", "backend": backend, "step_size": 0.5}
    one = ops.mlp_ode(x, (0, 1), layers, probes=torch.ones(6, 3), **options)
    assert one.trace.shape == (1, 6)
    half = ops.mlp_ode(x.bfloat16(), (0, 1), layers, probes=torch.ones(6, 3), **options)
    assert half.value.dtype == torch.bfloat16 and half.trace.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        inside = ops.mlp_ode(x, (0, 1), layers, probes=torch.ones(6, 3), **options)
    assert torch.equal(inside.value, one.value) and torch.equal(inside.trace, one.trace)
    drawn = ops.mlp_ode(x, (0, 1), layers, probes=ops.Rademacher(4, 7), **options)
    given = ops.mlp_ode(x, (0, 1), layers, probes=ops.probes((4, 6, 3), seed=7), **options)
    assert drawn.trace.shape == (1, 4, 6) and torch.equal(drawn.trace, given.trace)


@pytest.mark.parametrize("gradient", ["steps", "adjoint"])
def test_compile(gradient):
    layers = mlp("concat", hidden=(8,), dtype=torch.float32)
    x, e = randn(5, 3).float().requires_grad_(), ops.probes((2, 5, 3), seed=0)
    leaves = [x, *params(layers)]

    def run(x, layers):
        solution = ops.mlp_ode(x, (0.0, 0.5, 1.0), layers, probes=e, regularize=True, gradient=gradient)
        total = solution.value.sum() + solution.trace.square().sum() + solution.jacobian.sum()
        return total + 0 * solution.steps.evaluations

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(run(x, layers), leaves)
    assert torch.equal(run(x, layers), compiled(x, layers))
    for a, b in zip(torch.autograd.grad(compiled(x, layers), leaves), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("hidden", [(64, 33), (200, 40)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_the_same_bits_on_any_number_of_threads(hidden, per_sample):
    layers = mlp(hidden=hidden, dtype=torch.float32)
    x, e = randn(150, 3).float(), ops.probes((2, 150, 3), seed=0)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (threads, 1, 3):
            torch.set_num_threads(n)
            solution = ops.mlp_ode(x, (0, 1), layers, layer="concat_squash", probes=e, per_sample=per_sample, rtol=1e-3)
            total = solution.value.sum() + solution.trace.square().sum()
            found.append((solution.value, solution.trace, *torch.autograd.grad(total, params(layers))))
    finally:
        torch.set_num_threads(threads)
    for grads in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], grads, strict=True))


def test_torch_func():
    x, layers = problem()

    def total(x, backend=None):
        solution = ops.mlp_ode(
            x, (0, 1), layers, layer="concat_squash", exact=True, rtol=1e-4, atol=1e-4, backend=backend
        )
        return solution.value.square().sum() + solution.trace.sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(leaf, "reference"), leaf)
    assert (torch.func.grad(total)(x) - expected).abs().max() < 1e-10
