"""The Gaussian family beside the table: other libraries' formulas, sampling, compilation, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, Normal, kl_divergence

import fastflow
from fastflow.testing import tolerance
from fastflow.testing.case import randn

EPS = torch.finfo(torch.float64).eps


def close(value, truth, roundings):
    """Float64 results that differ by so many roundings of the largest magnitude in ``truth``."""
    assert (value - truth).abs().max() <= roundings * EPS * truth.abs().max()


def moments(packing, params):
    mean, log_s = params[:, 0::2], params[:, 1::2]
    return (mean, log_s) if packing == "interleaved" else params.chunk(2, 1)


@pytest.mark.parametrize("packing", ["interleaved", "chunk_ts"])
def test_log_prob_is_torchs(packing):
    z, params = randn(5, 3, 4, 4), randn(5, 6, 4, 4, seed=1)
    mean, log_s = moments(packing, params)
    truth = Independent(Normal(mean, log_s.exp()), 3).log_prob(z)
    # 48 terms, each with a handful of roundings, summed in another order
    close(fastflow.gaussian_log_prob(z, params, packing=packing), truth, 48)


def test_log_prob_is_normflows_base():
    base = pytest.importorskip("normflows").distributions.base
    diagonal, glow = base.DiagGaussian((3, 4, 4)).double(), base.GlowBase((3, 4, 4)).double()
    with torch.no_grad():
        for parameter in (*diagonal.parameters(), *glow.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(3)).mul_(0.3)
    z = randn(5, 3, 4, 4)
    close(fastflow.gaussian_log_prob(z, diagonal.loc, diagonal.log_scale), diagonal.log_prob(z), 48)
    mean, log_s = (v * (3 * k).exp() for v, k in ((glow.loc, glow.loc_logs), (glow.log_scale, glow.log_scale_logs)))
    close(fastflow.gaussian_log_prob(z, mean, log_s), glow.log_prob(z), 48)


def test_glow_factor_is_a_gain():
    z, mean, h = randn(5, 3, 4, 4), randn(3), 0.3 * randn(3, seed=1)
    glow = fastflow.scale_map("exp", gain=3.0)
    per_channel = [1, 3, 1, 1]
    truth = Normal(mean.view(per_channel), (3 * h).exp().view(per_channel)).log_prob(z).sum((1, 2, 3))
    close(fastflow.gaussian_log_prob(z, mean, h, scale=glow), truth, 48)


def test_broadcast_gradient_is_summed():
    z = randn(5, 3, 4, 4)
    mean, log_s = randn(3).requires_grad_(), randn(3, seed=1).requires_grad_()
    value = torch.autograd.grad(fastflow.gaussian_log_prob(z, mean, log_s).sum(), (mean, log_s))
    e = (z - mean.view(-1, 1, 1)) / log_s.exp().view(-1, 1, 1)
    close(value[0], (e / log_s.exp().view(-1, 1, 1)).sum((0, 2, 3)), 5 * 16)
    close(value[1], (e.square() - 1).sum((0, 2, 3)), 5 * 16)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_running_sum(backend):
    z = randn(5, 3).requires_grad_()
    running = randn(5, seed=2).requires_grad_()
    logp = fastflow.gaussian_log_prob(z, running=running, backend=backend)
    close(logp, running + fastflow.gaussian_log_prob(z), 2)
    grads = torch.autograd.grad(logp.sum(), (z, running))
    assert torch.equal(grads[0], -z) and torch.equal(grads[1], torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sample_has_its_likelihood(temperature, dtype):
    params = randn(5, 6, 4, 4).to(dtype)
    z, logp = fastflow.gaussian_sample(params, temperature=temperature, generator=torch.Generator().manual_seed(0))
    truth = fastflow.gaussian_log_prob(z.double(), params.double())
    # z is rounded once: that moves (z - m)^2 / 2 s^2 by |z| eps |z - m| / s^2, and logp has the sum's own error
    mean, s = params.double()[:, 0::2], params.double()[:, 1::2].exp()
    rounding = (z.double().abs() * (z.double() - mean).abs() / s**2).flatten(1).sum(1)
    allowed = torch.finfo(dtype).eps * (rounding + 48 * truth.abs().max())
    assert ((logp.double() - truth).abs() <= allowed).all()


def test_sample_moments_and_temperature():
    mean, log_s = torch.tensor([1.0, -2.0]), torch.tensor([0.3, -0.5])
    n = 100_000
    z, _ = fastflow.gaussian_sample(
        mean, log_s, shape=(n, 2), temperature=0.5, generator=torch.Generator().manual_seed(0)
    )
    std = 0.5 * log_s.exp()
    assert ((z.mean(0) - mean).abs() < 5 * std / n**0.5).all()
    assert ((z.std(0) / std - 1).abs() < 5 / (2 * n) ** 0.5).all()


def test_sample_is_cold_at_zero():
    params = randn(5, 6, 4, 4).float()
    z, logp = fastflow.gaussian_sample(params, temperature=0)
    assert torch.equal(z, params[:, 0::2]) and logp.isfinite().all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_sample_is_reproducible_in_every_layout(layout):
    params = randn(3, 6, 4, 4).float()
    draw = [
        fastflow.gaussian_sample(p, generator=torch.Generator().manual_seed(7))[0]
        for p in (params, params, params.contiguous(memory_format=layout))
    ]
    assert torch.equal(draw[0], draw[1]) and torch.equal(draw[0], draw[2])
    assert draw[2].is_contiguous(memory_format=layout)


def test_sample_overwrites_only_what_it_drew():
    noise = randn(3, 2)
    kept = noise.clone()
    z, _ = fastflow.gaussian_sample(torch.ones(2), torch.zeros(2), noise=noise.float(), temperature=0.5)
    fastflow.gaussian_sample(noise=noise)
    assert torch.equal(noise, kept) and torch.equal(z, (1 + 0.5 * noise.float()))


def test_standard_sample():
    z, logp = fastflow.gaussian_sample(shape=(4, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert z.dtype == logp.dtype == torch.float64
    close(logp, Normal(0.0, 1.0).log_prob(z).sum(1), 6)


def test_kl_is_torchs():
    q, p = randn(5, 6, 4, 4), randn(5, 6, 4, 4, seed=1)
    q_normal, p_normal = (Independent(Normal(t[:, 0::2], t[:, 1::2].exp()), 3) for t in (q, p))
    close(fastflow.gaussian_kl(q, prior=p), kl_divergence(q_normal, p_normal), 48)
    standard = Independent(Normal(torch.zeros_like(q[:, 0::2]), 1.0), 3)
    close(fastflow.gaussian_kl(q), kl_divergence(q_normal, standard), 48)


def test_kl_is_the_mean_log_ratio():
    q, p = 0.5 * randn(1, 6), 0.5 * randn(1, 6, seed=1)
    n = 200_000
    wide = q.expand(n, 6)
    z, log_q = fastflow.gaussian_sample(wide, generator=torch.Generator().manual_seed(0))
    ratio = log_q - fastflow.gaussian_log_prob(z, p)
    assert (ratio.mean() - fastflow.gaussian_kl(q, prior=p)).abs() < 5 * ratio.std() / n**0.5


def test_kl_of_equals_is_zero():
    q = randn(5, 6).float()
    assert torch.equal(fastflow.gaussian_kl(q, prior=q.clone()), torch.zeros(5))


def test_kl_of_neighbours_keeps_its_digits():
    h, step = randn(4, 3, seed=1), 2.0**-10
    value = fastflow.gaussian_kl(torch.zeros(4, 3), (h + step).float(), torch.zeros(4, 3), h.float())
    r = (h + step).float().double() - h.float().double()
    truth = (0.5 * torch.expm1(2 * r) - r).sum(1)
    # r is exact or rounded once; expm1(2 r) / 2 and r of size r cancel to r^2
    assert ((value.double() - truth).abs() <= 3 * 4 * torch.finfo(torch.float32).eps * step).all()


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=2, max_size=5),
    order=st.randoms(use_true_random=False),
    offset=st.integers(0, 2),
    packing=st.sampled_from(["interleaved", "interleaved_st", "chunk_ts", "chunk_st"]),
)
def test_any_shape_and_stride(shape, order, offset, packing):
    def arranged(t):
        """The same values with the dimensions permuted in memory, a gap in every row and an offset."""
        dims = list(range(t.dim()))
        order.shuffle(dims)
        wide = torch.zeros([t.shape[d] + 2 for d in dims], dtype=t.dtype)
        inner = wide[tuple(slice(offset, offset + t.shape[d]) for d in dims)].copy_(t.permute(dims))
        return inner.permute([dims.index(d) for d in range(t.dim())])

    z, params = randn(*shape), 0.5 * randn(shape[0], 2 * shape[1], *shape[2:], seed=1)
    values = []
    for change in (arranged, torch.Tensor.contiguous):
        leaves = [change(t).requires_grad_() for t in (z, params)]
        backend = "cpu" if change is arranged else "reference"
        logp = fastflow.gaussian_log_prob(*leaves, packing=packing, backend=backend)
        values.append((logp.detach(), *torch.autograd.grad(logp.sum(), leaves)))
    for value, truth in zip(*values, strict=True):
        assert value.shape == truth.shape
        if truth.numel():
            assert (value - truth).abs().max() <= (4 + z[0].numel()) * EPS * truth.abs().max()


OPS = {
    "log_prob": lambda z, h: fastflow.gaussian_log_prob(z, h, scale="softplus"),
    "standard": lambda z, h: fastflow.gaussian_log_prob(z) + h.mean(),
    "sample": lambda z, h: fastflow.gaussian_sample(h, noise=z, temperature=0.7)[1] + z.flatten(1).sum(1),
    "kl": lambda z, h: fastflow.gaussian_kl(h, prior=torch.cat([z, z], 1)),
}


@pytest.mark.parametrize("name", OPS)
def test_compiles_whole(name):
    run, compiled = OPS[name], torch.compile(OPS[name], fullgraph=True, backend="aot_eager")
    inputs = [t.float().requires_grad_() for t in (randn(4, 3, 2, 2), randn(4, 6, 2, 2, seed=1))]
    expected, value = run(*inputs), compiled(*inputs)
    assert torch.equal(expected, value)
    grads = [torch.autograd.grad(v.sum(), inputs) for v in (expected, value)]
    for a, b in zip(*grads, strict=True):
        assert tolerance(a, [a], a.dtype) >= (a - b).abs().max()


def test_drawing_compiles_whole():
    compiled = torch.compile(lambda h: fastflow.gaussian_sample(h), fullgraph=True, backend="aot_eager")
    params = randn(4, 6).float()
    torch.manual_seed(0)
    expected = fastflow.gaussian_sample(params)
    torch.manual_seed(0)
    for a, b in zip(expected, compiled(params), strict=True):
        assert torch.equal(a, b)


def test_torch_func():
    z, params = randn(4, 3), randn(4, 6, seed=1)
    grads = torch.func.vmap(torch.func.grad(lambda z, h: fastflow.gaussian_log_prob(z[None], h[None])[0]))(z, params)
    leaf = z.clone().requires_grad_()
    close(grads, torch.autograd.grad(fastflow.gaussian_log_prob(leaf, params).sum(), leaf)[0], 8)


X = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastflow.gaussian_log_prob([1.0]), TypeError, "z: expected a tensor, got list"),
        (lambda: fastflow.gaussian_log_prob(X.long()), TypeError, "z: expected float32"),
        (lambda: fastflow.gaussian_log_prob(X, X), ValueError, r"params: expected shape \[2, 6, 4, 4\] for z"),
        (lambda: fastflow.gaussian_log_prob(X, X, X[:, :2]), ValueError, r"raw: expected shape \[2, 3, 4, 4\]"),
        (lambda: fastflow.gaussian_log_prob(X, X, X.double()), TypeError, "raw: float64 goes with float64 only"),
        (lambda: fastflow.gaussian_log_prob(X, raw=X), ValueError, "params: expected the mean beside raw"),
        (lambda: fastflow.gaussian_log_prob(X, running=torch.zeros(3)), ValueError, r"running: expected \[2\]"),
        (lambda: fastflow.gaussian_log_prob(X, packing="halves"), ValueError, "packing: expected one of"),
        (lambda: fastflow.gaussian_log_prob(X, scale="big"), ValueError, "scale_map: expected one of"),
        (
            lambda: fastflow.gaussian_log_prob(X, scale=fastflow.scale_map("tanh_rescale", amplitude=X)),
            TypeError,
            "scale.amplitude: expected a number",
        ),
        (lambda: fastflow.gaussian_sample(), ValueError, "shape: expected"),
        (lambda: fastflow.gaussian_sample(shape=(2, 3), temperature=-1), ValueError, "temperature: expected"),
        (lambda: fastflow.gaussian_sample(shape=(2, 3), temperature=math.nan), ValueError, "temperature: expected"),
        (lambda: fastflow.gaussian_sample(X, noise=X), ValueError, r"params: expected shape \[2, 6, 4, 4\] for noise"),
        (lambda: fastflow.gaussian_kl(X), ValueError, "params: expected an even number of channels"),
        (lambda: fastflow.gaussian_kl(X, X, X), ValueError, "prior_raw: expected a tensor exactly where raw is one"),
        (lambda: fastflow.gaussian_kl(X, X, prior_raw=X), ValueError, "prior: expected the mean beside prior_raw"),
        (lambda: fastflow.gaussian_kl(X, X[:1]), ValueError, "raw: expected shape"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
