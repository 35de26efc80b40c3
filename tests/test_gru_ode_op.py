"""The filter of GRU-ODE-Bayes: what the paper and its code say of it, and what can go wrong."""

import math

import pytest
import torch

from fastflow import ops
from fastflow.errors import SolverError
from fastflow.ops.gru_ode import Cell, Gru, Observe, Prep, Schedule
from fastflow.testing.case import randn

BACKENDS = ("cpu", "reference")
H, D, P, Q = 7, 2, 4, 3


def networks(kind="full", dtype=torch.float64, gain=0.5):
    gates = 3 if kind == "full" else 2
    made = [gain * randn(*s, seed=i) for i, s in enumerate([(gates * H, H), (gates * H, 2 * D), (gates * H,)])]
    observe = [gain * randn(*s, seed=9) for s in ((P, H), (P,), (2 * D, P), (2 * D,))]
    prep = [gain * randn(*s, seed=8) for s in ((D, 4, Q), (D, Q))]
    gru = [gain * randn(*s, seed=7) for s in ((3 * H, D * Q), (3 * H, H), (3 * H,), (3 * H,))]
    made, observe, prep, gru = ([t.to(dtype) for t in part] for part in (made, observe, prep, gru))
    return Cell(*made, kind), Observe(*observe), Prep(*prep), Gru(*gru)


def regular(rows, steps, size=0.05, last=0):
    """One series for each entry of ``rows``, as many rows each, ``steps`` steps before every row."""
    n = sum(rows)
    offsets = torch.tensor([0, *rows]).cumsum(0)
    counts = torch.tensor([steps] * n + [last] * len(rows), dtype=torch.int64)
    return Schedule(offsets, counts, torch.full((n + len(rows),), size, dtype=torch.float64), torch.ones(n).bool())


def problem(rows=(3, 0, 5), steps=4, last=2, dtype=torch.float64, **options):
    """(h0, schedule, values, masks, *networks)"""
    n = sum(rows)
    masks = randn(n, D, seed=3) > -0.5
    h0 = torch.tanh(randn(len(rows), H)).to(dtype)
    return h0, regular(rows, steps, last=last), randn(n, D).to(dtype), masks, *networks(dtype=dtype, **options)


def linear(x, weight, bias=0):
    return x @ weight.T + bias


def published(h, schedule, values, masks, cell, observe, prep, gru, impute, method):
    """The loop over the rows of one series, with torch's own GRU cell."""
    jump = torch.nn.GRUCell(D * Q, H, dtype=h.dtype)
    jump.load_state_dict(gru._asdict())

    def p(h):
        return linear(torch.relu(linear(h, observe[0], observe[1])), observe[2], observe[3])

    def f(h):
        x = linear(p(h), cell.input_weight, cell.input_bias) if impute else torch.zeros(1, cell.hidden.shape[0])
        *gates, last = zip(x.double().chunk(cell.hidden.shape[0] // H, 1), cell.hidden.split(H), strict=True)
        gates = [torch.sigmoid(a + h @ u.T) for a, u in gates]
        candidate = torch.tanh(last[0] + (gates[0] * h) @ last[1].T)
        return (1 - gates[-1]) * (candidate - h)

    pre = []
    for row in range(len(values)):
        for _ in range(int(schedule.counts[row])):
            size = float(schedule.sizes[row])
            h = h + size * f(h if method == "euler" else h + size / 2 * f(h))
        pre.append(p(h))
        mean, logvar = pre[-1].chunk(2, 1)
        y, m = values[row : row + 1], masks[row : row + 1]
        stacked = torch.stack([y, mean, logvar, (y - mean) / torch.exp(0.5 * logvar)], 2)
        x = torch.relu((stacked[:, :, None] @ prep.weight)[:, :, 0] + prep.bias) * m[:, :, None]
        h = jump(x.flatten(1), h)
    return torch.cat(pre), h


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["full", "minimal"])
@pytest.mark.parametrize("impute", [False, True])
@pytest.mark.parametrize("method", ["euler", "midpoint"])
def test_as_published(backend, kind, impute, method):
    """A loop over the rows of each series gives the same."""
    h0, schedule, values, masks, *nets = problem(last=0, kind=kind)
    out = ops.gru_ode_filter(h0, schedule, values, masks, *nets, impute=impute, method=method, backend=backend)
    for b in (0, 2):
        rows = slice(*schedule.offsets[b : b + 2].tolist())
        part = Schedule(*(t[rows] for t in (schedule.offsets[1:], *schedule[1:])))
        pre, h = published(h0[b : b + 1], part, values[rows], masks[rows], *nets, impute, method)
        torch.testing.assert_close(out.pre[rows], pre, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out.state[b : b + 1], h, rtol=1e-12, atol=1e-12)
    assert torch.equal(out.state[1], h0[1])  # a series without rows and steps


def intervals(schedule):
    return schedule._replace(counts=(schedule.counts > 0).long(), sizes=schedule.sizes * schedule.counts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_adaptive_steps_are_those_of_torchdiffeq(backend):
    torchdiffeq = pytest.importorskip("torchdiffeq")
    h0, schedule, values, masks, *nets = problem(rows=(0,), last=40)
    schedule, calls = intervals(schedule), 0

    def f(_, h):
        nonlocal calls
        calls += 1
        r, z, u = nets[0].hidden.split(H)
        r, z = torch.sigmoid(h @ r.T), torch.sigmoid(h @ z.T)
        return (1 - z) * (torch.tanh((r * h) @ u.T) - h)

    out = ops.gru_ode_filter(h0, schedule, values, masks, *nets, method="dopri5", rtol=1e-6, atol=1e-7, backend=backend)
    times = torch.tensor([0, schedule.sizes[-1]], dtype=torch.float64)
    truth = torchdiffeq.odeint(f, h0, times, rtol=1e-6, atol=1e-7, method="dopri5")[-1]
    assert out.steps[0, 0] == calls
    torch.testing.assert_close(out.state, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_adaptive_gradient(backend):
    """At small tolerances the gradient is that of many small steps."""
    h0, schedule, *rest = problem(rows=(2, 1), steps=300, last=300)
    h0.requires_grad_()
    (fine,) = torch.autograd.grad(ops.gru_ode_filter(h0, schedule, *rest, method="rk4").pre.sum(), h0)
    out = ops.gru_ode_filter(h0, intervals(schedule), *rest, method="dopri5", rtol=1e-9, atol=1e-10, backend=backend)
    (grad,) = torch.autograd.grad(out.pre.sum(), h0)
    torch.testing.assert_close(grad, fine, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rest", [0, 3])
def test_purely_relative_tolerances(backend, rest):
    """What is 0 and stays so, units of a state or all of it, is no fault."""
    h0, _, *given = problem(rows=(0,), dtype=torch.float64)
    h0[:, rest:] = 0
    hidden = given[2].hidden.clone()
    hidden.view(3, H, H)[2, rest:] = 0
    given[2] = given[2]._replace(hidden=hidden)
    options = {"method": "dopri5", "backend": backend, "rtol": 1e-8}
    out, wanted = (ops.gru_ode_filter(h0, regular((0,), 1, last=1), *given, **options, atol=a) for a in (0.0, 1e-9))
    assert (out.state[:, rest:] == 0).all() and out.steps[0, 1] > 0
    torch.testing.assert_close(out.state, wanted.state, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2)])
def test_order(method, order):
    h0, _, *rest = problem(rows=(1,))
    exact = ops.gru_ode_filter(h0, regular((1,), 1, 2.0), *rest, method="dopri5", rtol=1e-9, atol=1e-10).state
    errors = [
        (ops.gru_ode_filter(h0, regular((1,), n, 2.0 / n), *rest, method=method).state - exact).norm().item()
        for n in (40, 80)
    ]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.1 * order


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_stays_within_one_and_moves_by_at_most_two(backend):
    """For Euler steps of at most 1 whatever the weights are: a convex combination."""
    for size in (0.05, 1.0):
        h0, _, *rest = problem(rows=(6, 6))
        rest[2] = rest[2]._replace(hidden=40 * rest[2].hidden)
        h0 = torch.sign(h0)
        out = ops.gru_ode_filter(h0, regular((6, 6), 1, size), *rest, backend=backend)
        assert out.states.abs().max() <= 1 and out.state.abs().max() <= 1
        step = ops.gru_ode_filter(
            h0, regular((0, 0), 1, size, last=1), rest[0][:0], rest[1][:0], *rest[2:], backend=backend
        )
        assert ((step.state - h0) / size).abs().max() <= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_observed_is_not_read(backend):
    h0, schedule, values, masks, *nets = problem()
    results = []
    for filling in (0.0, math.nan, math.inf):
        y = values.masked_fill(~masks, filling).requires_grad_()
        nets[1][0].requires_grad_()
        out = ops.gru_ode_filter(h0, schedule, y, masks, *nets, backend=backend)
        loss = out.pre.square().sum() + out.post.sum() + out.state.sum()
        results.append((*out[:4], *torch.autograd.grad(loss, [y, nets[1][0]])))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert (results[0][4][~masks] == 0).all() and (results[0][4][masks] != 0).any()


def test_a_series_does_not_depend_on_those_beside_it():
    """To the bit: in any order, alone, and among so many that there are several blocks."""
    rows = (3, 0, 5, 1, 2) * 12
    h0, schedule, values, masks, *nets = problem(rows=rows, dtype=torch.float32)
    together = ops.gru_ode_filter(h0, schedule, values, masks, *nets)
    for b in (0, 1, 2, 59):
        at = slice(*schedule.offsets[b : b + 2].tolist())
        alone = ops.gru_ode_filter(h0[b : b + 1], regular(rows[b : b + 1], 4, last=2), values[at], masks[at], *nets)
        assert torch.equal(alone.pre, together.pre[at]) and torch.equal(alone.state[0], together.state[b])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_in_pieces(backend, method):
    """A filter that goes on from a state: what streaming is made of. Queries change nothing."""
    h0, schedule, values, masks, *nets = problem(rows=(4,))
    if method == "dopri5":
        schedule = intervals(schedule)
    options = {"method": method, "backend": backend}
    whole = ops.gru_ode_filter(h0, schedule, values, masks, *nets, **options)
    h = h0
    for row in range(4):
        one = Schedule(torch.tensor([0, 1]), *(t[row : row + 1] for t in schedule[1:]))
        one = one._replace(counts=torch.cat([one.counts, torch.zeros(1).long()]), sizes=one.sizes.repeat(2))
        asked = one._replace(jumps=torch.zeros(1).bool())
        at = slice(row, row + 1)
        query = ops.gru_ode_filter(h, asked, values[at] * math.nan, torch.zeros_like(masks[at]), *nets, **options)
        out = ops.gru_ode_filter(h, one, values[at], masks[at], *nets, **options)
        assert torch.equal(query.pre, out.pre) and torch.equal(query.post, query.pre)
        assert torch.equal(query.state, query.states)
        torch.testing.assert_close(out.pre[0], whole.pre[row], rtol=1e-13, atol=1e-13)
        h = out.state
    torch.testing.assert_close(h, whole.states[3:], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("series", "rows"), [(0, 0), (3, 0)])
def test_nothing_to_do(backend, series, rows):
    h0, _, values, masks, *nets = problem()
    h0 = h0[:series].requires_grad_()
    out = ops.gru_ode_filter(h0, regular((0,) * series, 1), values[:0], masks[:0], *nets, backend=backend)
    assert out.pre.shape == (0, 2 * D) and out.states.shape == (0, H) and torch.equal(out.state, h0)
    (grad,) = torch.autograd.grad(out.state.sum(), h0)
    assert torch.equal(grad, torch.ones_like(h0))


def test_a_long_segment():
    """1000 steps at once: the gradient is the reference's."""
    h0, _, values, masks, *nets = problem(rows=(1, 0))
    grads = []
    for backend in BACKENDS:
        hidden = nets[0].hidden.clone().requires_grad_()
        cell = nets[0]._replace(hidden=hidden)
        schedule = regular((1, 0), 3, 0.01, last=1000)
        out = ops.gru_ode_filter(h0, schedule, values[:1], masks[:1], cell, *nets[1:], backend=backend)
        grads += torch.autograd.grad(out.state.square().sum(), hidden)
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_faults(backend):
    h0, schedule, values, masks, *nets = problem(last=1)
    broken = h0.clone()
    broken[2, 3] = math.inf
    with pytest.raises(SolverError, match="series 2 at row 3, 0.2 after"):
        ops.gru_ode_filter(broken, schedule, values, masks, *nets, backend=backend)
    with pytest.raises(SolverError, match="series 2, interval 0: not finite at 0 of 0.2"):
        ops.gru_ode_filter(broken, intervals(schedule), values, masks, *nets, method="dopri5", backend=backend)
    with pytest.raises(SolverError, match="series 0, interval 0: still at .* after 1 steps"):
        ops.gru_ode_filter(
            h0, intervals(regular((3, 0, 5), 400)), values, masks, *nets, method="dopri5", max_steps=1, backend=backend
        )
    with pytest.raises(SolverError, match="series 0 at the end"):
        ops.gru_ode_filter(
            h0 * 1e300, regular((0, 0, 0), 1, 1e300, last=3), values[:0], masks[:0], *nets, backend=backend
        )


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_the_same_on_any_number_of_threads(method):
    """Bits, and which series is the first that cannot go on."""
    h0, schedule, *rest = problem((2,) * 70)
    schedule = intervals(schedule) if method == "dopri5" else schedule
    wrong = h0.index_fill(0, torch.tensor([13, 61]), math.inf)
    late = schedule._replace(counts=schedule.counts.index_fill(0, torch.tensor(2 * 13), 0))  # 13 fails after 61
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(ops.gru_ode_filter(h0, schedule, *rest, method=method, backend="cpu"))
            with pytest.raises(SolverError, match="series 13"):
                ops.gru_ode_filter(wrong, late, *rest, method=method, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s._replace(offsets=torch.tensor([0, 5, 3, 8])), "schedule.offsets: expected to rise from 0 to 8"),
        (lambda s: s._replace(offsets=s.offsets[:-1]), "schedule.offsets: expected \\[4\\] of torch.int64"),
        (lambda s: s._replace(counts=-s.counts), "schedule.counts: .* at least 0, got -4 before row 0"),
        (lambda s: s._replace(sizes=s.sizes.index_fill(0, torch.tensor(9), math.nan)), "at the end of series 1"),
        (lambda s: s._replace(sizes=s.sizes.float()), "schedule.sizes: expected \\[11\\] of torch.float64"),
        (lambda s: s._replace(jumps=s.jumps.long()), "schedule.jumps: expected \\[8\\] of torch.bool"),
    ],
)
def test_bad_schedules(change, message, backend):
    h0, schedule, *rest = problem()
    with pytest.raises(ValueError, match=message):
        ops.gru_ode_filter(h0, change(schedule), *rest, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_are_not_finite(backend):
    h0, schedule, values, masks, *nets = problem()
    row, channel = masks.nonzero()[-1].tolist()
    for value in (math.nan, math.inf, -math.inf):
        wrong = values.clone()
        wrong[row, channel] = value
        with pytest.raises(ValueError, match=f"where observed, got {value} in row {row} of series 2"):
            ops.gru_ode_filter(h0, schedule, wrong, masks, *nets, backend=backend)
    counts = schedule._replace(counts=schedule.counts.index_fill(0, torch.tensor(1), 2))
    with pytest.raises(ValueError, match="schedule.counts: expected 0 or 1, intervals"):
        ops.gru_ode_filter(h0, counts, values, masks, *nets, method="dopri5", backend=backend)


def test_bad_arguments():
    h0, schedule, values, masks, *nets = problem()

    def fails(message, kind=ValueError, **changes):
        given = {"h0": h0, "schedule": schedule, "values": values, "masks": masks, "cell": nets[0]} | changes
        with pytest.raises(kind, match=message):
            ops.gru_ode_filter(observe=nets[1], prep=nets[2], gru=nets[3], **given)

    fails("method: expected one of euler", method="heun")
    fails("rtol: expected a tolerance above 0", method="dopri5", rtol=0.0, atol=0.0, schedule=intervals(schedule))
    fails("atol: expected a finite number", method="dopri5", atol=-1.0)
    fails("schedule.counts: expected 0 or 1", method="dopri5")
    fails("max_steps: expected at least 1", max_steps=0)
    fails("cell: expected the kind full or minimal", cell=nets[0]._replace(kind="lstm"))
    fails("cell: expected input_weight", cell=Cell(nets[0].hidden), impute=True)
    fails("cell.hidden: expected shape", cell=nets[0]._replace(hidden=nets[0].hidden[:-1]))
    fails("dropout: expected None with impute", dropout=torch.ones(8, 2, P).double(), impute=True)
    fails("dropout: expected shape", dropout=torch.ones(8, P).double())
    fails("masks: expected", masks=masks[:, :1])
    fails("values: expected finite numbers where observed, got nan", values=values * math.nan)
    fails("values: float64 goes with float64", TypeError, values=values.float())
