"""The CUDA kernels of mlp_ode, run by emulation: what the table of cases at its tiny size does not reach."""

import contextlib
import types

import emulation
import pytest
import torch

import fastflow
from fastflow import ops
from fastflow.ops import ode_stages, ode_stages_backward
from fastflow.ops.cuda import ode as launches
from fastflow.ops.cuda import ode_adjoint

pytestmark = [
    pytest.mark.skipif(emulation.CXX is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("emulated"),
]


def net(*widths, layer="concat_squash", seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator)  # noqa: E731
    layers = []
    for n, m in zip(widths[:-1], widths[1:], strict=True):
        shapes = {"concat": ((m, n + 1), (m,)), "concat_squash": ((m, n), (m,), (m, 1), (m,), (m, 1))}[layer]
        layers.append([draw(*shape) * (n**-0.5 if i == 0 else 0.5) for i, shape in enumerate(shapes)])
    return layers


def both(x, layers, *, times=(0.0, 1.0), layer="concat_squash", **options):
    """Outputs, steps and gradients on the backend cuda and on the reference."""
    found = []
    for backend in ("cuda", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, *(p for group in layers for p in group))]
        each = len(layers[0])
        groups = [leaves[1 + i : 1 + i + each] for i in range(0, len(leaves) - 1, each)]
        solution = ops.mlp_ode(leaves[0], times, groups, layer=layer, backend=backend, **options)
        outputs = [part for part in solution[:4] if part is not None]
        total = sum((o.double() ** 2).mean() for o in outputs)
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        found.append((*outputs, *solution.steps, *(g for g in grads if g is not None)))
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)
    return solution


X = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def constants(monkeypatch):
    """Sets constants of the launches; what was planned with others is forgotten."""

    def forget():
        for kernel in (launches._forward, launches._backward, ode_adjoint._adjoint):
            for cell in kernel.__closure__:
                if isinstance(cell.cell_contents, dict):
                    cell.cell_contents.clear()

    def change(**values):
        forget()
        for name, value in values.items():
            monkeypatch.setattr(launches, name, value)

    yield change
    forget()


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("checkpoints", [1, 3])
def test_several_samples_in_a_tile_and_tiles_of_a_block(constants, per_sample, checkpoints):
    """And more steps than states that are kept."""
    constants(TILES=1, TILE=2, BLOCKS=3)
    options = {"per_sample": per_sample, "checkpoints": checkpoints, "exact": True, "rtol": 1e-5, "atol": 1e-7}
    solution = both(X, net(3, 6, 3), times=(0.0, 0.4, 0.4, 2.0), **options)
    assert solution.steps.accepted.max() > 4


def test_parameters_that_do_not_fit(constants):
    """They are then read where they are."""
    constants(SHARED_MEMORY=2500)
    both(X, net(3, 9, 5, 3), method="rk4", step_size=0.5, probes=torch.ones(1, 7, 3, dtype=torch.float64))


# --- stage by stage -----------------------------------------------------------------------------------

PROBES = torch.randn(2, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
STAGED = [
    {"exact": True, "rtol": 1e-5, "atol": 1e-7, "checkpoints": 3, "times": (0.0, 0.4, 0.4, 2.0)},
    {"probes": PROBES, "regularize": True, "times": (1.0, 0.4, 0.1, 0.1, -0.5)},
    {"method": "bosh3", "regularize": True, "activation": "softplus"},
    {"method": "tsit5", "probes": PROBES, "step_size": 0.15, "checkpoints": 2},
    {"method": "rk4", "exact": True, "regularize": True, "step_size": 0.3, "activation": "silu"},
    {"method": "euler", "times": (0.0, 0.0, 0.2, 0.3, 0.3, 1.0), "checkpoints": 1, "activation": "elu"},
]


@pytest.mark.parametrize("case", range(len(STAGED)))
def test_what_does_not_fit_goes_by_stages(constants, case):
    layer = ("concat_squash", "concat")[case % 2]
    constants(SHARED_MEMORY=100)
    both(X, net(3, 9, 5, 3, layer=layer), layer=layer, **STAGED[case])


def test_steps_per_sample_that_do_not_fit_are_refused(constants):
    constants(SHARED_MEMORY=500)
    options = {"layer": "concat_squash", "exact": True, "per_sample": True}
    with pytest.raises(fastflow.BackendError, match="cuda: .*steps per sample.*shared memory"):
        ops.mlp_ode(X, (0.0, 1.0), net(3, 9, 3), backend="cuda", **options)


class Graph:
    """What is used of torch.cuda.CUDAGraph."""

    def __init__(self):
        self.began = self.ended = 0

    def capture_begin(self, pool, capture_error_mode):
        self.began += 1

    def capture_end(self):
        self.ended += 1

    def replay(self):
        pass


@pytest.fixture
def graphs(monkeypatch):
    """The ways that only a GPU takes, with the graphs that were asked for; a graph runs what it recorded at once."""
    stream = types.SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    event = lambda: types.SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)  # noqa: E731
    monkeypatch.setattr(ode_stages, "on_gpu", lambda device: True)
    kept = types.SimpleNamespace(pool=lambda: (0, 1))
    monkeypatch.setattr(ode_stages, "_beside", lambda current: (stream, kept))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


def test_what_is_recorded(graphs):
    runs = []
    replay = ode_stages.recorded(lambda: runs.append(1), X.device)
    assert runs == [1] and replay.__func__ is Graph.replay
    assert (replay.__self__.began, replay.__self__.ended) == (1, 1)

    def fails():
        raise RuntimeError("operation not permitted when stream is capturing")

    assert ode_stages.recorded(fails, X.device) is fails


def test_turns_are_recorded_and_stop_at_the_end(graphs, constants, monkeypatch):
    recorded = []

    def record(work, device):
        recorded.append(work)
        return work

    constants(SHARED_MEMORY=100)
    monkeypatch.setattr(ode_stages, "recorded", record)
    monkeypatch.setattr(ode_stages_backward, "recorded", record)
    both(X, net(3, 5, 3), exact=True, rtol=1e-6, atol=1e-7, times=(0.0, 0.7, 2.0))
    assert len(recorded) >= 2


ADJOINTS = {
    "batch": {"times": (0.0, 0.4, 0.4, 1.5), "exact": True, "regularize": True, "rtol": 1e-5, "atol": 1e-6},
    "per sample": {"times": (1.0, 0.2, -0.3), "per_sample": True, "exact": True, "rtol": 1e-5, "atol": 1e-6},
    "fixed": {"times": (0.0, 0.5, 1.2), "method": "rk4", "step_size": 0.4, "regularize": True},
    "value": {"method": "bosh3", "rtol": 1e-4, "atol": 1e-4},
}


@pytest.mark.parametrize("name", ADJOINTS)
def test_the_adjoint(constants, monkeypatch, name):
    """Several samples in a tile, several tiles of a block, several outputs."""
    constants(TILES=1, TILE=2, BLOCKS=3)
    plain, called = ops.ode.adjoint, []
    monkeypatch.setattr(ops.ode, "adjoint", lambda *given: called.append(1) or plain(*given))
    options = dict(ADJOINTS[name])
    if "regularize" in options and "exact" not in options:
        options["probes"] = torch.randn(2, *X.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    both(X, net(3, 6, 3), gradient="adjoint", **options)
    assert len(called) == 1  # the reference


def test_an_adjoint_that_does_not_fit(constants, monkeypatch):
    """Plain PyTorch does it, after a solve by the kernels."""
    monkeypatch.setattr(ode_adjoint, "fits", lambda *_: False)
    both(X, net(3, 4, 3), gradient="adjoint", exact=True, rtol=1e-6, atol=1e-6)


def test_an_adjoint_that_fails():
    """Its own solve needs more steps than the one before it, and says so as the reference does."""
    messages = []
    for backend in ("cuda", "reference"):
        x = X.clone().requires_grad_()
        options = {"layer": "concat_squash", "rtol": 0.0, "atol": 1e-3, "max_steps": 12, "gradient": "adjoint"}
        solution = ops.mlp_ode(x, (0.0, 1.0), net(3, 6, 3), backend=backend, **options)
        with pytest.raises(fastflow.SolverError, match="more than 12 steps at t = 0") as raised:
            (1e9 * solution.value.sum()).backward()
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def failing(match, x, layers, **options):
    messages = []
    for backend in ("cuda", "reference"):
        with pytest.raises(fastflow.SolverError, match=match) as raised:
            ops.mlp_ode(x, (0.0, 2.0), layers, layer="concat", backend=backend, **options)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def linear(slope):
    """dx/dt = slope x"""
    return [[torch.tensor([[0.0, slope]], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]]


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("staged", [False, True])
def test_faults(constants, per_sample, staged):
    """Named by time, step and sample as the reference names them."""
    if staged and per_sample:
        return
    constants(SHARED_MEMORY=100 if staged else 64 * 1024)
    x = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    failing("more than 6 steps at t = .*, step 7", x, linear(40.0), per_sample=per_sample, max_steps=6)
    huge = 1e10 * (x - 1).clamp(min=0)
    failing("not finite .* step 1,.* first in sample 2", huge, linear(1e300), per_sample=per_sample)


@pytest.mark.parametrize("staged", [False, True])
def test_fixed_steps_that_leave_the_numbers(constants, staged):
    constants(SHARED_MEMORY=100 if staged else 64 * 1024)
    x, options = torch.tensor([[0.0], [0.0], [1.0], [1.0]], dtype=torch.float64), {"method": "euler", "step_size": 0.5}
    failing("not finite at t = 1, step 2, h = 0.5, first in sample 2", x, linear(1e200), **options)
    failing("more than 3 steps", x, linear(1.0), max_steps=3, **options)


@pytest.mark.parametrize("gradient", ["steps", "adjoint"])
def test_two_runs_give_the_same_bits(gradient):
    """The emulation lets the threads run in another order every time."""
    layers = [[p.float() for p in group] for group in net(3, 6, 3)]
    options = {"layer": "concat_squash", "exact": True, "per_sample": True, "backend": "cuda", "gradient": gradient}

    def run(x):
        groups = [[p.clone().requires_grad_() for p in group] for group in layers]
        solution = ops.mlp_ode(x, (0.0, 1.0), groups, **options)
        loss = solution.value.square().sum() + solution.trace.sum()
        return solution.value, solution.trace, *torch.autograd.grad(loss, [p for group in groups for p in group])

    first = run(X.float())
    for a, b in zip(first, run(X.float()), strict=True):
        assert torch.equal(a, b)
    alone = ops.mlp_ode(X[2:3].float(), (0.0, 1.0), layers, **options)
    assert torch.equal(alone.value[:, 0], first[0][:, 2]) and torch.equal(alone.trace[:, 0], first[1][:, 2])


@pytest.mark.parametrize("options", [{}, {"per_sample": True}, {"method": "rk4", "step_size": 0.3}], ids=str)
def test_the_adjoint_reports_its_steps(emulated, options):
    x, taken = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), {}
    layers = [[p.requires_grad_() for p in group] for group in net(3, 5, 3)]
    for backend in ("cuda", "reference"):
        solution = ops.mlp_ode(
            x, (0, 0.4, 1), layers, layer="concat_squash", exact=True, gradient="adjoint", rtol=1e-3, atol=1e-3,
            backend=backend, report=lambda steps, backend=backend: taken.update({backend: steps}), **options,
        )  # fmt: skip
        solution.trace.sum().backward()
    assert all(torch.equal(*pair) for pair in zip(taken["cuda"], taken["reference"], strict=True))
    assert (taken["cuda"].accepted > 0).all()
