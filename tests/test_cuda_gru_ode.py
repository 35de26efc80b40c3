"""The CUDA kernels of GRU-ODE-Bayes, run by emulation: what the table of cases at its tiny size does not reach."""

import math

import emulation
import pytest
import torch
from test_gru_ode_op import P, intervals, problem, regular

from fastflow import BackendError, ops
from fastflow.errors import SolverError
from fastflow.ops.cuda import gru_ode as launches
from fastflow.testing.case import randn

pytestmark = [
    pytest.mark.skipif(emulation.CXX is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("emulated"),
]


@pytest.fixture(autouse=True)
def constants(monkeypatch):
    """Sets constants of the launches; what was planned with others is forgotten."""

    def forget():
        for kernel in (launches._forward, launches._backward):
            for cell in kernel.__closure__:
                if isinstance(cell.cell_contents, dict):
                    cell.cell_contents.clear()

    def change(**values):
        forget()
        for name, value in values.items():
            monkeypatch.setattr(launches, name, value)

    yield change
    forget()


def both(h0, schedule, values, masks, *nets, **options):
    """Outputs and gradients on the backend cuda are those of the reference."""
    found = []
    for backend in ("cuda", "reference"):
        leaves = [t.clone().requires_grad_() for t in (h0, values, *nets[0][:3], *nets[1], *nets[2], *nets[3])]
        given = iter(leaves[2:])
        made = [type(n)(*(next(given) if isinstance(t, torch.Tensor) else t for t in n)) for n in nets]
        out = ops.gru_ode_filter(leaves[0], schedule, leaves[1], masks, *made, backend=backend, **options)
        loss = sum((o * randn(*o.shape)).sum() for o in out[:4])
        found.append((*out, *torch.autograd.grad(loss, leaves, materialize_grads=True)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    return out


@pytest.mark.parametrize("blocks", [1, 128])
@pytest.mark.parametrize(("kind", "impute", "method"), [("full", False, "euler"), ("minimal", True, "midpoint")])
def test_windows(constants, kind, impute, method, blocks):
    """The states of more ticks than are kept at once; several rows at the same tick and at a window's end; series in
    one tile and in tiles of their own."""
    constants(BLOCKS=blocks)
    h0, schedule, values, masks, *nets = problem(rows=(3, 0, 5), kind=kind)
    counts = torch.tensor([16, 0, 3, 0, 0, 17, 0, 0, 20, 5, 0])
    schedule = schedule._replace(counts=counts, jumps=torch.arange(8) != 4)
    dropout = None if impute else (randn(8, 2, P) > 0).double() * 2
    both(h0, schedule, values, masks, *nets, dropout=dropout, impute=impute, method=method)
    with pytest.raises(SolverError, match="series 2 at row 3, 0 after"):
        broken = h0.index_fill(0, torch.tensor(2), math.inf)
        ops.gru_ode_filter(broken, schedule, values, masks, *nets, backend="cuda")


@pytest.mark.parametrize("room", [1, 3])
@pytest.mark.parametrize(("kind", "impute", "method"), [("full", False, "dopri5"), ("minimal", True, "bosh3")])
def test_adaptive_steps(constants, kind, impute, method, room):
    """Series side by side in a tile, each with steps of its own, and more of them than are kept; intervals of no
    length, and several rows at a time."""
    constants(BLOCKS=1, ROOM=room)
    h0, schedule, values, masks, *nets = problem(rows=(3, 0, 5), kind=kind, gain=4.0)
    schedule = schedule._replace(
        counts=torch.tensor([1, 0, 1, 0, 0, 1, 1, 0, 1, 1, 0]),
        sizes=torch.tensor([3.0, 9.0, 0.5, 9.0, 9.0, 0.1, 0.0, 9.0, 2.0, 4.0, 9.0], dtype=torch.float64),
        jumps=torch.arange(8) != 4,
    )
    dropout = None if impute else (randn(8, 2, P) > 0).double() * 2
    options = {"dropout": dropout, "impute": impute, "method": method, "rtol": 1e-3, "atol": 1e-4}
    out = both(h0, schedule, values, masks, *nets, **options)
    assert out.steps[1, 1] > 3 and out.steps[:, 2].max() > 0


def test_adaptive_faults():
    """Named by series and interval, as the reference names them."""

    def failing(match, h0, schedule, *rest, **options):
        messages = []
        for backend in ("cuda", "reference"):
            with pytest.raises(SolverError, match=match) as raised:
                ops.gru_ode_filter(h0, schedule, *rest, method="dopri5", backend=backend, **options)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]

    h0, schedule, *rest = problem(last=1)
    broken = h0.clone()
    broken[2, 3] = math.inf
    failing("series 2, interval 0: not finite at 0 of 0.2", broken, intervals(schedule), *rest)
    long = intervals(regular((3, 0, 5), 400))
    failing("series 0, interval 0: still at .* after 1 steps", h0, long, *rest, max_steps=1)


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_what_does_not_fit_is_refused(constants, method):
    constants(SHARED_MEMORY=1000)
    h0, schedule, *rest = problem()
    schedule = intervals(schedule) if method == "dopri5" else schedule
    with pytest.raises(BackendError, match="cuda: a series .*shared memory"):
        ops.gru_ode_filter(h0, schedule, *rest, method=method, backend="cuda")


def test_two_runs_give_the_same_bits(constants):
    """The emulation lets the threads run in another order every time; and in tiles of any size."""
    h0, schedule, values, masks, *nets = problem(dtype=torch.float32)
    found = []
    for blocks in (1, 1, 128):
        constants(BLOCKS=blocks)
        leaf = h0.clone().requires_grad_()
        out = ops.gru_ode_filter(
            leaf, intervals(schedule), values, masks, *nets, method="dopri5", rtol=1e-3, backend="cuda"
        )
        found.append((*out, *torch.autograd.grad(out.pre.sum() + out.state.sum(), leaf)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
