"""Masked convolutions, the flow made of them, and the top-down VAE with that flow for its posterior."""

import copy
import itertools
import json
import math
import pickle

import pytest
import torch

from fastflow import nn as ffnn
from fastflow.models import IAFVAE
from fastflow.models.iaf_vae import PRESETS
from fastflow.nn.masked_conv import conv_mask, conv_order

ORDERS = ("raster", "antiraster")


def randomise(module, scale=0.3):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn_like(p))
    return module


def step(channels=4, groups=4, order="antiraster", normalize=False, hidden=(6, 9), height=3, width=4, kernel=3):
    """(a step in float64 with random weights, z, context)"""
    torch.manual_seed(0)
    layer = ffnn.ConvAutoregressive(
        channels, hidden, kernel, groups=groups, order=order, gain=0.5, normalize=normalize
    ).double()
    z = torch.randn(3, channels, height, width, dtype=torch.float64)
    context = torch.randn(3, hidden[0], height, width, dtype=torch.float64)
    layer(z, context)
    return randomise(layer), z, context


# --- masks ----------------------------------------------------------------------------------------------


def test_masks_are_those_of_the_literature():
    ones, zeros = [1, 1, 1], [0, 0, 0]
    a = conv_mask(2, 2, 3, groups=1, strict=True, order="raster").int()
    b = conv_mask(2, 2, 3, groups=1, strict=False, order="raster").int()
    assert (a == torch.tensor([ones, [1, 0, 0], zeros])).all() and (b == torch.tensor([ones, [1, 1, 0], zeros])).all()
    # openai/iaf: below and to the right; at the pixel a triangle of blocks
    last = conv_mask(4, 2, 3, groups=2, strict=True)
    assert last[0, 0].int().tolist() == [zeros, [0, 0, 1], ones]
    assert last[:, :, 1, 1].int().tolist() == [[0, 0, 0, 0], [1, 1, 0, 0]]
    assert conv_mask(2, 4, 3, groups=2, strict=False)[:, :, 1, 1].int().tolist() == [[1, 0], [1, 0], [1, 1], [1, 1]]
    assert conv_mask(2, 4, 1, 2, False, copies=2)[:, :, 0, 0].int().tolist() == [[1, 0], [1, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("channels, groups", [(4, 4), (4, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("kernel, normalize", [(3, False), (3, True), (5, False)])
def test_triangular_in_the_declared_order_and_its_volume(order, channels, groups, kernel, normalize):
    layer, z, context = step(channels, groups, order, normalize, kernel=kernel)
    rank = conv_order(channels, *z.shape[2:], groups, order).flatten()
    shape = (1, *z.shape[1:])

    def jacobian(f):
        return torch.autograd.functional.jacobian(lambda v: f(v.view(shape)).flatten(), z[0].flatten())

    before = rank[None, :] < rank[:, None]
    for i in range(2):  # mean, log scale: exact zeros but for what comes before
        sees = jacobian(lambda v, i=i: layer.network(v, context[:1])[i]) != 0
        assert not (sees & ~before).any()
    if kernel == 5 or groups == 1:  # every channel of the pixels next to it
        assert sees[before & ((rank[:, None] - rank[None, :]) // groups < 2)].float().mean() > 0.8
    full = jacobian(lambda v: layer(v, context[:1])[0])
    _, logdet = layer(z, context)
    torch.testing.assert_close(logdet[0], torch.linalg.slogdet(full).logabsdet, rtol=1e-10, atol=1e-10)


def test_bad_masks_and_steps():
    for match, make in (
        ("order: expected raster or antiraster", lambda: ffnn.MaskedConv2d(2, 2, order="snake")),
        ("kernel: expected an odd size, got 4", lambda: ffnn.MaskedConv2d(2, 2, 4)),
        ("outputs: expected a multiple of copies = 2", lambda: ffnn.MaskedConv2d(2, 3, copies=2)),
        ("groups: expected a divisor of channels = 4, got 3", lambda: ffnn.ConvAutoregressive(4, groups=3)),
        ("hidden: expected the width of at least one", lambda: ffnn.ConvAutoregressive(4, ())),
        (r"z: expected \[B, 4, H, W\], got \[2, 3, 5, 5\]", lambda: ffnn.ConvAutoregressive(4)(torch.ones(2, 3, 5, 5))),
        (r"context: expected \[2, 8, 5, 5\]", lambda: ffnn.ConvAutoregressive(4, (8,))(
            torch.ones(2, 4, 5, 5), torch.ones(2, 8))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            make()


# --- the inverse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("groups", [4, 1])
def test_inverse(order, groups):
    layer, z, context = step(groups=groups, order=order, height=4, width=5)
    y, logdet = layer(z, context)
    again, back = layer.inverse(y, context)
    torch.testing.assert_close(again, z, rtol=0, atol=1e-10)
    torch.testing.assert_close(back, -logdet, rtol=0, atol=1e-10)
    empty, none = layer.inverse(y[:0], context[:0])
    assert empty.shape == (0, 4, 4, 5) and none.shape == (0,)


def test_inverse_takes_no_more_passes_than_it_says():
    # large weights: nothing converges before its turn, and the turns are enough
    layer, z, context = step(groups=2, height=4, width=4)
    with torch.no_grad():
        layer.last.weight.mul_(2)
    y, _ = layer(z, context)
    with torch.no_grad():
        torch.testing.assert_close(layer.inverse(y, context)[0], z, rtol=1e-8, atol=1e-8)
    assert layer.passes(4, 4) == (4 + 2 * 3) * 2


def test_inverse_is_differentiable():
    layer, z, context = step(2, 2, hidden=(3,), height=2, width=3)
    y = layer(z, context)[0].detach().requires_grad_()
    context.requires_grad_()
    parameters = list(layer.parameters())
    assert torch.autograd.gradcheck(lambda y, c, *_: layer.inverse(y, c), (y, context, *parameters))
    # and without a context
    y.grad = None
    value, logdet = layer.inverse(y)
    (value.sum() + logdet.sum()).backward()
    assert y.grad.isfinite().all()


def test_nan_stays_visible():
    layer, z, context = step()
    z[0, 0, 0, 0] = math.nan
    for value, _ in (layer(z, context), layer.inverse(z, context)):
        assert value[0].isnan().any() and value[1:].isfinite().all()


# --- weight normalisation -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"stride": 2, "upsample": True, "kernel": 5}])
def test_first_batch_normalises(options):
    torch.manual_seed(0)
    layer = ffnn.WeightNormConv2d(3, 5, **options)
    x = 2 + 3 * torch.randn(32, 3, 8, 8)
    layer.eval()
    y = layer(x)
    side = 4 if options == {"stride": 2} else 16 if options else 8
    assert y.shape == (32, 5, side, side) and layer.ready
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.full((5,), 0.1), rtol=1e-3, atol=0)
    fresh = ffnn.WeightNormConv2d(3, 5, **options)
    fresh.load_state_dict(layer.state_dict())
    assert fresh.ready and torch.equal(fresh(x[:2]), layer(x[:2]))


def test_a_constant_channel_stays_finite():
    layer = ffnn.WeightNormConv2d(2, 3)
    assert torch.equal(layer(torch.zeros(4, 2, 5, 5)), torch.zeros(4, 3, 5, 5))
    assert (layer.gain - 0.1).abs().max() < 1e-6
    with pytest.raises(ValueError, match="empty batch"):
        ffnn.WeightNormConv2d(2, 3)(torch.zeros(0, 2, 5, 5))


# --- the model ------------------------------------------------------------------------------------------


def build(shape=(1, 8, 8), count=16, **options):
    torch.manual_seed(0)
    options = {"depth": 2, "blocks": 2, "hidden": 8, "latent": 3, "likelihood": "bernoulli", **options}
    model = IAFVAE(shape, **options)
    x = torch.randint(0, model.likelihood.levels, (count, *shape))
    model.initialize(x)
    return model, x


@pytest.mark.parametrize("posterior", ["iaf", "diagonal"])
def test_probabilities_of_all_images_sum_to_one(posterior):
    model, _ = build((1, 4, 2), depth=1, blocks=1, latent=2, posterior=posterior)
    randomise(model.double(), 0.1)
    x = torch.tensor(list(itertools.product((0, 1), repeat=8))).view(256, 1, 4, 2)
    with torch.no_grad():
        kl = model.terms(x, model.encode(x)).kl.mean()
        sums = torch.stack([model.log_prob(x, samples=100, rows=6400).exp().sum() for _ in range(8)])
    error = sums.std() / math.sqrt(8)
    assert kl > 0.1 and error < 0.01 and abs(sums.mean() - 1) < 5 * error


def test_bound_is_below_the_likelihood():
    model, x = build()
    randomise(model, 0.05)
    with torch.no_grad():
        bound = torch.stack([model(x) for _ in range(50)]).mean(0)
        assert (bound < model.log_prob(x, samples=200, rows=512) + 0.2).all()


def test_log_q_in_both_directions():
    # log q(z_K) where z_K came from z_0, and of the same z_K as a point: the base at what the inverse finds
    layer, z0, context = step()
    normal = torch.distributions.Normal(torch.tensor(0.3), torch.tensor(0.8))
    z, logdet = layer(z0, context)
    log_q = normal.log_prob(z0).sum((1, 2, 3)) - logdet
    found, back = layer.inverse(z, context)
    torch.testing.assert_close(normal.log_prob(found).sum((1, 2, 3)) + back, log_q, rtol=0, atol=1e-9)


@pytest.mark.parametrize("likelihood", ["bernoulli", "categorical", "logistic"])
@pytest.mark.parametrize("posterior", ["iaf", "diagonal"])
def test_trains_and_samples(likelihood, posterior):
    model, x = build((2, 4, 4), depth=1, blocks=1, likelihood=likelihood, levels=5, posterior=posterior)
    optimizer = torch.optim.Adamax(model.parameters(), 1e-2)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        loss = model.loss(x).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    sample = model.sample(3, temperature=0.5, generator=torch.Generator().manual_seed(1))
    assert sample.shape == (3, 2, 4, 4)
    model.likelihood.check(sample)
    assert torch.equal(sample, model.sample(3, temperature=0.5, generator=torch.Generator().manual_seed(1)))
    assert model.sample_mean(2).shape == (2, 2, 4, 4) and model.sample(0).shape == (0, 2, 4, 4)
    assert model(x[:0]).shape == (0,)


def test_free_bits():
    model, x = build()
    terms = model.terms(x, model.encode(x), torch.Generator().manual_seed(0))
    model.free_bits = 1e3
    floored = model.terms(x, model.encode(x), torch.Generator().manual_seed(0))
    assert torch.equal(terms.kl, floored.kl)
    assert floored.trained_kl.item() == pytest.approx(1e3 * 3 * 4)  # channels, layers
    assert terms.trained_kl.item() >= terms.kl.mean().item() - 1e-4


def test_state_survives_saving_copying_pickling():
    model, x = build()
    again = IAFVAE(**json.loads(json.dumps(model.config)))
    assert not again.ready
    again.load_state_dict(model.state_dict())
    for other in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        a, b = (m.elbo(x, generator=torch.Generator().manual_seed(0)) for m in (model, other))
        assert torch.equal(a, b) and other.ready


def test_bad_input():
    model, x = build()
    with pytest.raises(ValueError, match=r"x: expected \[B, 1, 8, 8\], got \[2, 1, 9, 8\]"):
        model(torch.zeros(2, 1, 9, 8))
    with pytest.raises(ValueError, match="x: expected the whole numbers 0 to 1, got 2"):
        model(2 * torch.ones(2, 1, 8, 8))
    with pytest.raises(ValueError, match="divisible by 2.depth = 8, got 28 x 20"):
        IAFVAE((1, 28, 20), depth=3)
    with pytest.raises(ValueError, match="posterior: expected one of iaf, diagonal"):
        IAFVAE(posterior="maf")
    with pytest.raises(ValueError, match="ar_hidden: expected widths that begin with hidden = 8"):
        IAFVAE((1, 8, 8), hidden=8, ar_hidden=(4,))
    with pytest.raises(ValueError, match="preset: expected one of"):
        IAFVAE.preset("mnist")
    with pytest.raises(RuntimeError, match="initialised already"):
        model.initialize(x)
    with pytest.raises(RuntimeError, match="not initialised"):
        IAFVAE((1, 8, 8), blocks=1, hidden=8, latent=2).sample(1)


def test_a_layer_that_goes_nan_is_named():
    model, x = build()
    with torch.no_grad():
        model.layers[2].flow.last.weight[0, 0, 2, 2] = math.nan
    with pytest.raises(ffnn.NonFiniteError, match=r"layers\.2\.flow\.last \(MaskedConv2d\)"), ffnn.debug():
        model(x)
    assert model.loss(x).mean().isnan()


def test_presets_are_constructible():
    for name in PRESETS:
        assert IAFVAE.preset(name, hidden=4, latent=2, blocks=1).config["hidden"] == 4
