"""The CUDA kernels without a GPU: run by emulation."""

import emulation
import pytest
import torch

from fastflow import ops, testing, use_backend
from fastflow.models import Glow
from fastflow.ops import _backend

DTYPES = [torch.float32, torch.float64]

pytestmark = [
    pytest.mark.skipif(emulation.CXX is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("emulated"),
]


def names(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


# --- the table --------------------------------------------------------------------------------------


def sizes_of(case):
    """What has layers or steps runs through the emulation for seconds: the ragged sizes of the others find as much."""
    return ("tiny",) if case.family in ("trace", "autoregressive", "sylvester", "gru_ode", "ode") else ("tiny", "odd")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@names([case for case in testing.CASES if "cuda" in case.backends])
def test_conformance(case, dtype):
    testing.CHECKS["forward"](case, "cuda", dtype, sizes=sizes_of(case))
    testing.CHECKS["gradient"](case, "cuda", dtype, sizes=sizes_of(case))
    testing.CHECKS["inverse"](case, "cuda", dtype)


@names(
    [case for case in testing.CASES if case.selftest and case.family not in ("sylvester", "trace", "gru_ode", "ode")]
)
def test_half_precision(case):
    for dtype in (torch.bfloat16, torch.float16):
        testing.CHECKS["forward"](case, "cuda", dtype)
        testing.CHECKS["gradient"](case, "cuda", dtype)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_beside_float32(half):
    """What autocast makes: x in float32, the network's output in half precision; or mean and raw scale that differ."""
    x, wide, narrow = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4).to(half)
    packed = torch.randn(3, 8, 4, 4).to(half)
    calls = [
        lambda b: ops.affine_coupling(x, packed, backend=b),
        lambda b: ops.affine_coupling(x, wide, narrow, backend=b),
        lambda b: ops.affine_coupling(narrow, wide, wide, backend=b),
        lambda b: (ops.gaussian_log_prob(x, packed, backend=b),),
        lambda b: (ops.gaussian_log_prob(narrow, wide, narrow, backend=b),),
        lambda b: (ops.gaussian_kl(packed, prior=packed.float(), backend=b),),
        lambda b: ops.conv1x1(narrow, torch.eye(4) + 0.1, torch.ones(4), torch.zeros(()), backend=b),
    ]
    for call in calls:
        for value, expected in zip(call("cuda"), call("reference"), strict=True):
            torch.testing.assert_close(value, expected)


# --- shapes that take other ways through the kernels ---------------------------------------------------


def both(run, *inputs):
    """Outputs and gradients on the backend cuda and on the reference."""
    found = []
    for backend in ("cuda", "reference"):
        leaves = [t.clone().requires_grad_() for t in inputs]
        outputs = run(*leaves, backend=backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = sum((o.double() ** 2).mean() for o in outputs)
        found.append((*outputs, *torch.autograd.grad(total, leaves)))
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [None, slice(3, None), slice(0, 3), torch.tensor([4, 0, 2])], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_samples_in_several_parts(mask, channels_last):
    """A sample that several blocks share: their sums meet in a second launch."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 6, 64, 64).contiguous(memory_format=form)
    h = torch.randn(2, 12 if mask is None else 6, 64, 64).contiguous(memory_format=form)
    both(lambda x, h, backend: ops.affine_coupling(x, h, mask=mask, backend=backend), x, h)
    both(lambda x, backend: ops.gaussian_log_prob(x, running=torch.ones(2), backend=backend), x)


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 13, 48, 64])
def test_conv1x1_of_every_width(channels):
    for x in (torch.randn(2, channels, 8, 8), torch.randn(70, channels)):
        weight = torch.eye(channels) + 0.1 * torch.randn(channels, channels)
        run = lambda x, w, b, backend: ops.conv1x1(x, w, b, torch.tensor(0.5, dtype=x.dtype), backend=backend)  # noqa: E731
        both(run, x, weight, torch.randn(channels))
        both(run, *(t.double() for t in (x, weight)), torch.randn(channels, dtype=torch.float64))


def test_more_layers_than_one_launch_takes():
    layers, n = 67, 3
    lower, upper, log_s = torch.randn(layers, n, n), torch.randn(layers, n, n), torch.randn(layers, n)
    permutation, sign = torch.stack([torch.randperm(n) for _ in range(layers)]), torch.ones(layers, n)
    found, expected = (ops.lu_weights(lower, upper, log_s, permutation, sign, backend=b) for b in ("cuda", "reference"))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_new_seed_needs_no_new_plan():
    """A training step draws one each time."""
    layers = [(torch.randn(6, 3), torch.zeros(6)), (torch.randn(3, 6), torch.zeros(3))]
    x, kernel = torch.randn(4, 3), _backend.NATIVE["cuda"].kernel("trace_rows")
    (plans,) = (cell.cell_contents for cell in kernel.__closure__ if isinstance(cell.cell_contents, dict))
    plans.clear()
    for seed in (0, 1, 2**40):
        run = lambda b, seed=seed: ops.mlp_trace(  # noqa: E731
            x, 0.0, layers, layer="ignore", probes=ops.Rademacher(2, seed), backend=b
        )
        torch.testing.assert_close(run("cuda"), run("reference"))
    assert len(plans) == 1


def test_teams_with_several_samples(monkeypatch):
    """Each has the states of one sample at a time, and sums over its own."""
    from fastflow.ops.cuda import steps

    monkeypatch.setattr(steps, "TEAMS", 5)
    z, u, w, b = torch.randn(23, 3), torch.randn(4, 3), torch.randn(4, 3), torch.randn(4)
    for inverse in (False, True):
        both(lambda z, u, w, b, backend: ops.planar(z, u, w, b, inverse=inverse, backend=backend), z, u, w, b)  # noqa: B023
        both(lambda z, c, a, b, backend: ops.radial(z, c, a, b, inverse=inverse, backend=backend), z, u, b + 4, b)  # noqa: B023
    own = [torch.randn(23, *p.shape) for p in (u, w, b)]
    both(lambda z, u, w, b, backend: ops.planar(z, u, w, b, backend=backend), z, *own)


def test_wrong_index_reaches_nothing():
    """The device cannot raise: a channel that does not exist is left alone and shows as NaN."""
    x, h = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    z, logdet = ops.affine_coupling(x, h, mask=torch.tensor([1, 9]), backend="cuda")
    assert torch.isnan(logdet).all()
    assert torch.equal(z[:, [0, 2, 3]], x[:, [0, 2, 3]]) and not torch.equal(z[:, 1], x[:, 1])


def test_whole_numbers_are_numbers():
    """What is a double in a struct of arguments may come as an int."""
    x, a, b, h = torch.randn(2, 3, 2), torch.randn(3), torch.randn(3), torch.randn(2, 6, 2)
    both(lambda x, a, b, backend: ops.actnorm(x, a, b, gain=2, backend=backend), x, a, b)
    both(lambda x, h, backend: ops.affine_coupling(x, h, shift_gain=2, backend=backend), x, h)
    both(lambda n, h, backend: ops.gaussian_sample(h, noise=n, temperature=2, backend=backend), x, h)


def test_in_place():
    x, h = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    own = x.clone()
    z, _ = ops.affine_coupling(own, h, mask=slice(2, None), out=own, backend="cuda")
    assert z is own
    torch.testing.assert_close(own, ops.affine_coupling(x, h, mask=slice(2, None), backend="reference")[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_give_the_same_bits(dtype):
    """The emulation lets the threads run in another order every time."""
    x, h = torch.randn(3, 6, 40, 40, dtype=dtype), torch.randn(3, 12, 40, 40, dtype=dtype)
    run = lambda: (*ops.affine_coupling(x, h, backend="cuda"), ops.gaussian_log_prob(x, h, backend="cuda"))  # noqa: E731
    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


# --- models, compile ----------------------------------------------------------------------------------


def test_glow_trains_alike():
    torch.manual_seed(0)
    model = Glow((3, 8, 8), levels=2, steps=2, hidden=8)
    x = torch.rand(4, 3, 8, 8) - 0.5
    model.initialize(x)
    found = {}
    for backend in ("cuda", "reference"):
        model.zero_grad()
        with use_backend(backend):
            loss = -model.log_prob(x).mean()
            loss.backward()
        found[backend] = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    for a, b in zip(found["cuda"], found["reference"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_compiles_without_graph_breaks():
    x, h, weight = torch.randn(2, 4, 3, 3), torch.randn(2, 8, 3, 3).requires_grad_(), torch.eye(4)

    def program(x, h):
        z, logdet = ops.affine_coupling(x, h, backend="cuda")
        z, logdet = ops.conv1x1(z, weight, None, torch.zeros(()), logdet=logdet, backend="cuda")
        return ops.gaussian_log_prob(z, running=logdet, backend="cuda")

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, h), program(x, h))
    (grad,) = torch.autograd.grad(compiled(x, h).sum(), h)
    torch.testing.assert_close(grad, torch.autograd.grad(program(x, h).sum(), h)[0])
