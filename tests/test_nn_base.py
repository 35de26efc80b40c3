"""The base modules: chains, reshapes, priors, base distributions, flows and their diagnostics."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributions import Normal

import fastflow
import fastflow.models
from fastflow.nn import (
    Bijection,
    DiagonalGaussian,
    Flow,
    Inverse,
    NonFiniteError,
    Permutation,
    Sequential,
    SplitPrior,
    Squeeze,
    StandardNormal,
)
from fastflow.testing.case import randn


class Scale(Bijection):
    """z = x e^a + context."""

    def __init__(self, a=0.5):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, x, context=None):
        context = 0 if context is None else context
        return x * self.a.exp() + context, self.a * x[0].numel() * x.new_ones(len(x))

    def inverse(self, z, context=None):
        context = 0 if context is None else context
        return (z - context) * (-self.a).exp(), -self.a * z[0].numel() * z.new_ones(len(z))


def flow():
    torch.manual_seed(0)
    return Flow(DiagonalGaussian(4).double(), Sequential(Scale(0.3), Permutation(4, "shuffle"), Inverse(Scale(-0.2))))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- chains -------------------------------------------------------------------------------------------


def test_sequential_adds_and_inverts():
    x, context = randn(3, 4), randn(3, 1)
    chain = Sequential(Scale(0.3), Sequential(Scale(-1.0), Permutation(4)), Inverse(Scale(0.1)))
    z, logdet = chain(x, context)
    back, minus = chain.inverse(z, context)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(logdet, torch.full((3,), 4 * (0.3 - 1.0 - 0.1), dtype=torch.float64))
    torch.testing.assert_close(minus, -logdet)
    jacobian = torch.autograd.functional.jacobian(lambda v: chain(v[None], context[:1])[0][0], x[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, logdet[0])


def test_interface_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="Bijection has no inverse"):
        Bijection().inverse(torch.zeros(1))


# --- squeeze, permutation -----------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("order", ["channel_major", "space_major"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "split"])
def test_squeeze_indices(factor, order, layout):
    x = randn(2, 3, 6, 12)
    if layout != "contiguous":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "split":
        x = torch.cat([x, x], 1)[:, 3:]
    z, logdet = Squeeze(factor, order)(x)
    for c in range(3):
        for fh in range(factor):
            for fw in range(factor):
                channel = c * factor**2 + fh * factor + fw if order == "channel_major" else (fh * factor + fw) * 3 + c
                assert torch.equal(z[:, channel], x[:, c, fh::factor, fw::factor])
    back, _ = Squeeze(factor, order).inverse(z)
    assert torch.equal(back, x) and torch.equal(logdet, torch.zeros(2, dtype=torch.float64))
    if layout == "split" and factor == 1:
        return  # nothing moves: a view of x as it lies
    wanted = torch.contiguous_format if layout == "contiguous" else torch.channels_last
    assert back.is_contiguous(memory_format=wanted)
    assert z.is_contiguous(memory_format=wanted)


def test_squeeze_is_pixel_unshuffle():
    x = randn(2, 3, 4, 4)
    assert torch.equal(Squeeze()(x)[0], torch.pixel_unshuffle(x, 2))


def test_squeeze_refuses_odd_sizes():
    with pytest.raises(ValueError, match=r"x: expected \[B, C, H, W\] with H and W divisible by 2, got \[1, 1, 3, 4\]"):
        Squeeze()(torch.zeros(1, 1, 3, 4))
    with pytest.raises(ValueError, match="C divisible by 4"):
        Squeeze().inverse(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="order: expected"):
        Squeeze(order="rows")
    assert Squeeze()(torch.zeros(0, 1, 4, 4))[0].shape == (0, 4, 2, 2)


def test_permutation():
    x = randn(2, 5, 3)
    for layer in (Permutation(5), Permutation(5, "shuffle", seeded()), Permutation([2, 0, 1, 4, 3])):
        z, logdet = layer(x)
        assert torch.equal(z, x[:, layer.indices]) and torch.equal(layer.inverse(z)[0], x)
        assert torch.equal(logdet, torch.zeros(2, dtype=torch.float64))
    assert torch.equal(Permutation(5)(x)[0], x.flip(1))
    assert torch.equal(Permutation(9, "shuffle", seeded(1)).indices, Permutation(9, "shuffle", seeded(1)).indices)
    other = Permutation(5)
    other.load_state_dict(Permutation([2, 0, 1, 4, 3]).state_dict())
    assert torch.equal(other.inverse(other(x)[0])[0], x) and other.indices.tolist() == [2, 0, 1, 4, 3]


def test_permutation_refuses():
    with pytest.raises(ValueError, match="each of 0 ... n - 1 once, got"):
        Permutation([0, 2])
    with pytest.raises(ValueError, match=r"x: expected 3 channels .*, got \[2, 4\]"):
        Permutation(3)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="mode: expected"):
        Permutation(3, "swap")


def test_permutation_keeps_channels_last():
    x = randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    assert Permutation(4)(x)[0].is_contiguous(memory_format=torch.channels_last)


# --- priors and bases ---------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [4, 5])
def test_split_prior(channels):
    prior = SplitPrior(channels).double()
    with torch.no_grad():
        prior.network.weight.normal_(generator=seeded())
    z = randn(3, channels, 4, 4)
    kept, factored, logp = prior(z)
    assert kept.shape[1] == (channels + 1) // 2 and torch.equal(prior.inverse(kept, factored)[0], z)
    params = prior.network(kept)
    truth = Normal(params[:, 0::2], params[:, 1::2].exp()).log_prob(factored).sum((1, 2, 3))
    torch.testing.assert_close(logp, truth)
    drawn, logp = prior.inverse(kept, temperature=0.7, generator=seeded())
    assert torch.equal(drawn, prior.inverse(kept, temperature=0.7, generator=seeded())[0])
    torch.testing.assert_close(prior(drawn)[2], logp)
    cold, _ = prior.inverse(kept, temperature=0.0)
    assert torch.equal(cold[:, kept.shape[1] :], params[:, 0::2])


def test_split_prior_starts_as_the_standard_normal():
    z = randn(3, 4, 4, 4).float()
    standard = SplitPrior(4, None)
    torch.testing.assert_close(SplitPrior(4)(z)[2], standard(z)[2])
    assert standard.inverse(z[:, :2])[0].shape == z.shape
    with pytest.raises(ValueError, match="z: expected 4 channels"):
        standard(z[:, :3])
    with pytest.raises(ValueError, match="channels: expected at least 2"):
        SplitPrior(1)


def test_split_prior_gives_its_network_the_context():
    class Shift(nn.Module):
        def forward(self, kept, context):
            return torch.cat([context.expand_as(kept), torch.zeros_like(kept)], 1)

    prior = SplitPrior(4, Shift(), packing="chunk_ts")
    z, _ = prior.inverse(torch.zeros(2, 2), context=torch.full((2, 1), 3.0), temperature=0.0)
    assert torch.equal(z[:, 2:], torch.full((2, 2), 3.0))


@pytest.mark.parametrize("shape", [3, (3,), (3, 2, 2)])
@pytest.mark.parametrize("make", [StandardNormal, DiagonalGaussian])
def test_base(make, shape):
    base = make(shape).double()
    z, logp = base.sample_and_log_prob(5, generator=seeded())
    assert z.shape == (5, *base.shape) and z.dtype == torch.float64
    torch.testing.assert_close(base.log_prob(z), logp)
    torch.testing.assert_close(logp, Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1))
    torch.testing.assert_close(base.sample(5, temperature=0.5, generator=seeded()), 0.5 * z)
    with pytest.raises(ValueError, match="z: expected"):
        base.log_prob(torch.zeros(2, 9))


@pytest.mark.parametrize("per_channel", [True, False])
def test_diagonal_gaussian_learns(per_channel):
    base = DiagonalGaussian((2, 3, 3), per_channel=per_channel).double()
    target = 1.5 + 0.5 * randn(400, 2, 3, 3)
    optimizer = torch.optim.Adam(base.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (-base.log_prob(target).mean()).backward()
        optimizer.step()
    dims = (0, 2, 3) if per_channel else 0
    torch.testing.assert_close(base.mean.squeeze(), target.mean(dims), atol=1e-2, rtol=0)
    torch.testing.assert_close(base.log_scale.exp().squeeze(), target.std(dims), atol=1e-2, rtol=0)
    assert not list(DiagonalGaussian(2, learned=False).parameters())


# --- flow ---------------------------------------------------------------------------------------------


def test_flow_samples_have_their_density():
    model = flow()
    x, logp = model.sample_and_log_prob(6, generator=seeded())
    torch.testing.assert_close(model.log_prob(x), logp)
    assert torch.equal(model.sample(6, generator=seeded()), x)
    torch.testing.assert_close(model.sample_and_log_prob(6, temperature=0.7, generator=seeded())[0], 0.7 * x)


def test_flow_integrates_to_one():
    model = Flow(StandardNormal(1), Scale(0.7)).double()
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    torch.testing.assert_close(torch.trapezoid(model.log_prob(x[:, None]).exp(), x), torch.ones_like(x[0]))


def test_flow_forward_is_log_prob_and_ddp_wraps_it(tmp_path):
    model, x = flow(), randn(5, 4)
    assert torch.equal(model(x), model.log_prob(x))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(x).mean().backward()
        assert all(p.grad is not None for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_flow_copies_pickles_and_loads():
    model, x = flow(), randn(5, 4)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    torch.manual_seed(1)
    other = Flow(DiagonalGaussian(4).double(), Sequential(Scale(), Permutation(4, "shuffle"), Inverse(Scale())))
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(x), expected)


def test_initialize_runs_every_layer_once_without_a_graph():
    class Counts(Permutation):
        calls = 0

        def forward(self, x, context=None):
            self.calls += 1
            assert not torch.is_grad_enabled()
            return super().forward(x, context)

    layer = Counts(4)
    Flow(StandardNormal(4), Sequential(layer)).initialize(torch.randn(3, 4))
    assert layer.calls == 1


# --- diagnostics --------------------------------------------------------------------------------------


def test_inverse_error_finds_the_layer():
    class Broken(Scale):
        def inverse(self, z, context=None):
            x, logdet = super().inverse(z, context)
            return x + 0.25, logdet + 1

    chain = Sequential(Scale(), Sequential(Permutation(4), Broken()))
    result = fastflow.inverse_error(Flow(StandardNormal(4), chain), randn(3, 4))
    assert [name for name, _, _ in result.layers] == [
        "bijection.0 (Scale)",
        "bijection.1.0 (Permutation)",
        "bijection.1.1 (Broken)",
    ]
    errors = torch.tensor([error for _, error, _ in result.layers])
    torch.testing.assert_close(errors, torch.tensor([0.0, 0.0, 0.25]), atol=1e-14, rtol=0)
    assert abs(result.layers[2][2] - 1) < 1e-14 and result.chain[0] > 0.1
    assert len(str(result).splitlines()) == 5 and "bijection.1.1 (Broken)" in str(result)
    with pytest.raises(TypeError, match="model: expected a Bijection"):
        fastflow.inverse_error(nn.Linear(2, 2), randn(3, 4))


def test_inverse_error_of_glow():
    torch.manual_seed(0)
    model = fastflow.models.Glow((1, 8, 8), levels=2, steps=2, hidden=8).double()
    x = randn(4, 1, 8, 8)
    model.initialize(x)
    result = fastflow.inverse_error(model, x)
    names = [name for name, _, _ in result.layers]
    assert names[:3] == ["squeeze (Squeeze)", "levels.0.0 (GlowStep)", "levels.0.1 (GlowStep)"] and len(names) == 6
    assert max(error for _, error, _ in result.layers) < 1e-12 and result.chain[0] < 1e-12
    assert result.chain[1] is None and str(result).endswith("-")


def broken():
    """A flow whose second layer divides by zero."""
    return Flow(StandardNormal(4), Sequential(Permutation(4), Inverse(Scale(800.0)), Scale()))


def test_debug_names_layer_direction_and_statistic():
    model, x = broken(), 1 + randn(2, 4).abs()
    with fastflow.debug():
        with pytest.raises(NonFiniteError, match=r"bijection\.1\.bijection \(Scale\), forward: value has 8 infinite"):
            model.sample(2)
        model.bijection[1].bijection.a.data.fill_(float("nan"))
        with pytest.raises(
            NonFiniteError, match=r"bijection\.1\.bijection \(Scale\), inverse: value has 8 NaN among 8 "
        ):
            model(x)
        with pytest.raises(NonFiniteError, match="Permutation, forward: value has 8 NaN .* its input already had"):
            Permutation(4)(x * float("nan"))
        assert torch.isfinite(Permutation(4)(x)[0]).all()  # the stack is clean again


def test_debug_sees_the_logdet():
    class Bad(Permutation):
        def forward(self, x, context=None):
            return super().forward(x, context)[0], torch.tensor([0.0, float("inf")])

    with fastflow.debug(), pytest.raises(NonFiniteError, match=r"0 \(Bad\), forward: logdet has 1 infinite among 2"):
        Sequential(Bad(2))(torch.zeros(2, 2))


def test_debug_off_leaves_nothing_behind():
    from torch.nn.modules import module

    before = Scale.inverse, Flow.log_prob, len(module._global_forward_hooks), len(module._global_forward_pre_hooks)
    with fastflow.debug():
        assert Scale.inverse is not before[0]
        with fastflow.debug(False):
            assert Scale.inverse is before[0]
        assert Scale.inverse is not before[0]
    after = Scale.inverse, Flow.log_prob, len(module._global_forward_hooks), len(module._global_forward_pre_hooks)
    assert before == after
    assert not broken()(randn(2, 4)).isnan().any()
    fastflow.debug()
    fastflow.debug(False)
    assert Scale.inverse is before[0]
