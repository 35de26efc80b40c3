"""The VAE with flows for its posterior, the likelihoods of its decoder, and what all VAEs here share."""

import copy
import itertools
import json
import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastflow import nn as ffnn
from fastflow.models import FlowVAE
from fastflow.models.flow_vae import POSTERIORS
from fastflow.train import PUBLISHED, RECIPES, load_data, load_model, train
from fastflow.train.data import Images
from fastflow.train.metrics import read_metrics
from fastflow.train.recipe import build_model

SMALL = {"latent": 4, "encoder": "mlp", "width": 16, "hidden": 12, "steps": 2, "rank": 2, "iaf_width": 8}


def build(posterior="diagonal", shape=(1, 4, 4), **options):
    torch.manual_seed(0)
    return FlowVAE(shape, posterior=posterior, **{**SMALL, **options})


def images(model, count=16):
    torch.manual_seed(1)
    x = torch.randint(0, model.likelihood.levels, (count, *model.image_shape))
    return x.float() if isinstance(model.likelihood, ffnn.Bernoulli) else x  # as data sets give them


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- likelihoods ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_scale", [-9.0, -4.0, 0.0, 3.0])
@pytest.mark.parametrize("mean", [-3.0, -0.5, 0.013, 0.499, 40.0])
def test_logistic_sums_to_one_and_is_stable_in_the_tails(log_scale, mean):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        p = ffnn.DiscretizedLogistic(256, log_scale=log_scale).to(dtype)
        x = torch.arange(256).view(-1, 1, 1, 1)
        params = torch.full((256, 1, 1, 1), mean, dtype=dtype, requires_grad=True)
        log_prob = p.log_prob(x, params)
        assert abs(log_prob.exp().sum().item() - 1) < tolerance
        assert log_prob.isfinite().all() and (log_prob <= 1e-6).all()
        grads = torch.autograd.grad(log_prob.sum(), (params, p.log_scale))
        assert all(g.isfinite().all() for g in grads)


def test_logistic_equals_the_difference_of_distribution_functions():
    torch.manual_seed(0)
    p = ffnn.DiscretizedLogistic(16, channels=2, log_scale=-2.0).double()
    mean = 0.3 * torch.randn(5, 2, 3, 3, dtype=torch.float64)
    x = torch.randint(1, 15, (5, 2, 3, 3))
    edges = ((x + i) / 16 - 0.5 for i in (0, 1))
    low, high = (torch.sigmoid((edge - mean) / math.exp(-2)) for edge in edges)
    torch.testing.assert_close(p.log_prob(x, mean), (high - low).log().sum((1, 2, 3)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_categorical_is_a_softmax_over_the_levels_of_every_sub_pixel(memory_format):
    torch.manual_seed(0)
    p = ffnn.Categorical(5)
    params = torch.randn(4, 2 * 5, 3, 2).to(memory_format=memory_format)
    x = torch.randint(0, 5, (4, 2, 3, 2))
    peer = torch.distributions.Categorical(logits=params.view(4, 2, 5, 3, 2).movedim(2, -1))
    torch.testing.assert_close(p.log_prob(x, params), peer.log_prob(x).sum((1, 2, 3)))
    torch.testing.assert_close(p.mean(params), (peer.probs * torch.arange(5.0)).sum(-1))
    assert p.log_prob(x[:0], params[:0]).shape == (0,) and p.sample(params[:0]).shape == (0, 2, 3, 2)


@pytest.mark.parametrize("p, params", [
    (ffnn.Bernoulli(), torch.tensor([0.4])),
    (ffnn.Categorical(4), torch.tensor([0.1, -1.0, 0.7, 0.3])),
    (ffnn.DiscretizedLogistic(4, log_scale=-1.5), torch.tensor([0.2])),
])  # fmt: skip
def test_samples_have_the_probabilities(p, params):
    params = params.view(1, -1, 1, 1).expand(20000, -1, 1, 1)
    drawn = p.sample(params, seeded())
    p.check(drawn)
    counts = torch.bincount(drawn.flatten().long(), minlength=p.levels) / 20000
    x = torch.arange(p.levels).view(-1, 1, 1, 1)
    expected = p.log_prob(x, params[: p.levels]).exp().detach()
    assert (counts - expected).abs().max() < 5 * 0.5 / math.sqrt(20000)
    if not isinstance(p, ffnn.DiscretizedLogistic):  # whose mean is the mode
        torch.testing.assert_close(p.mean(params[:1]).item(), (counts * torch.arange(float(p.levels))).sum().item(),
                                   rtol=0.02, atol=0.02)  # fmt: skip


# --- the bound ------------------------------------------------------------------------------------------


class Gaussian(ffnn.Likelihood):
    """x ~ N(params, 1): with a linear decoder p(x) is known."""

    def log_prob(self, x, params):
        return torch.distributions.Normal(params, 1.0).log_prob(x).flatten(1).sum(1)

    def center(self, x, dtype):
        return x

    def check(self, x):
        pass


def perturbed(model, scale):
    """The model with an encoder and a flow that do something, and a posterior wide enough for importance sampling."""
    torch.manual_seed(3)
    with torch.no_grad():
        for module in (model.moments, model.amortized):
            if module is not None:
                module.weight.add_(scale * torch.randn_like(module.weight))
        for p in model.flow.parameters():
            p.add_(scale * torch.randn_like(p))
        model.moments.bias[model.latent :].add_(2)
    return model


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_importance_sampling_finds_the_likelihood_of_a_linear_gaussian(posterior):
    model = build(posterior, (1, 2, 2), latent=3)
    model.likelihood = Gaussian(2)
    model.decoder = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (1, 2, 2)))
    model = perturbed(model.double(), 0.1)
    linear = model.decoder[0]
    x = 0.5 * torch.randn(2, 1, 2, 2, dtype=torch.float64)
    covariance = linear.weight @ linear.weight.mT + torch.eye(4, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(linear.bias, covariance).log_prob(x.flatten(1))
    with torch.no_grad():
        found = model.log_prob(x.repeat_interleave(16, 0), samples=1500, rows=48000).view(2, 16)
        bound = torch.stack([model(x) for _ in range(100)]).mean(0)
    error = found.std(1) / 4
    assert (error < 0.15).all() and ((found.mean(1) - exact).abs() < 5 * error + 1e-3).all()
    assert (bound < exact).all()


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_probabilities_of_all_images_sum_to_one(posterior):
    model = perturbed(build(posterior, (1, 2, 2), latent=2).double(), 0.1)
    x = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64).view(16, 1, 2, 2)
    with torch.no_grad():
        sums = torch.stack([model.log_prob(x, samples=500, rows=8000).exp().sum() for _ in range(8)])
    error = sums.std() / math.sqrt(8)
    assert error < 0.02 and abs(sums.mean() - 1) < 5 * error


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_log_q_in_both_directions(posterior):
    model = perturbed(build(posterior).double(), 0.2)
    encoded = model.encode(images(model, 5).double())
    mean, log_std, *context = encoded
    z, log_q = model.posterior(encoded, generator=seeded())
    z0, back = model.flow.inverse(z, *context)
    base = torch.distributions.Normal(mean, log_std.exp()).log_prob(z0).sum(1)
    torch.testing.assert_close(base + back, log_q, rtol=1e-8, atol=1e-8)


def test_terms_are_true_nats():
    model = build()
    x = images(model)
    mean, log_std = model.encode(x)
    z, log_q = model.posterior((mean, log_std), generator=seeded())
    torch.testing.assert_close(log_q, torch.distributions.Normal(mean, log_std.exp()).log_prob(z).sum(1))
    kl = log_q - torch.distributions.Normal(0, 1).log_prob(z).sum(1)
    log_likelihood = torch.distributions.Bernoulli(logits=model.decode(z)).log_prob(x).sum((1, 2, 3))
    for beta in (1.0, 0.3):
        torch.testing.assert_close(model.elbo(x, beta, seeded()), log_likelihood - beta * kl)


def test_variance_is_a_softplus_within_its_bounds():
    model = build(variance=(0.01, 7.0))
    with torch.no_grad():
        model.moments.weight.zero_()
        model.moments.bias.copy_(torch.tensor([0.0] * 4 + [-200.0, 0.0, 3.0, 50.0]))
        _, log_std = model.encode(images(model, 1))
    expected = torch.tensor([0.01, math.log(2), math.log1p(math.exp(3)), 7.0])
    torch.testing.assert_close((2 * log_std[0]).exp(), expected)
    free = build()
    free.load_state_dict(model.state_dict())
    assert free.encode(images(model, 1))[1][0, 0].item() == pytest.approx(-100)  # exp would be zero: no log of it


def test_no_more_latents_at_a_time_than_rows(monkeypatch):
    model = build()
    seen = []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda z: seen.append(len(z)) or decode(z))
    with torch.no_grad():
        assert model.log_prob(images(model, 7), samples=9, rows=10).shape == (7,)
        assert max(seen) <= 10 and sum(seen) == 7 * 9
        seen.clear()
        assert model.log_prob(images(model, 25), samples=2, rows=10).shape == (25,)
        assert max(seen) <= 10 and sum(seen) == 25 * 2
        assert model.log_prob(images(model, 0)).shape == (0,) and model(images(model, 0)).shape == (0,)


def test_warmup_and_free_bits():
    model = build(warmup=0.5)
    assert [model.beta(p) for p in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.5, 1.0, 1.0] and build().beta(0.0) == 1.0
    x = images(model)

    def loss(progress):
        torch.manual_seed(0)
        return model.loss(x, progress)

    torch.manual_seed(0)
    terms = model.terms(x, model.encode(x))
    torch.testing.assert_close(loss(0.25), 0.5 * terms.kl - terms.log_likelihood)
    model.free_bits = 50.0
    torch.testing.assert_close(loss(1.0), 50 - terms.log_likelihood)
    loss(1.0).sum().backward()
    torch.manual_seed(0)
    torch.testing.assert_close(model(x), terms.log_likelihood - terms.kl)  # the bound itself has none


# --- every model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["bernoulli", "categorical", "logistic"])
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_trains_and_samples(posterior, likelihood):
    model = build(posterior, (2, 3, 4), likelihood=likelihood, levels=5, head=6)
    x = images(model, 32)
    optimizer = torch.optim.Adamax(model.parameters(), 2e-3)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        loss = model.loss(x, 0.5).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    sample = model.sample(3, temperature=0.5, generator=seeded())
    assert sample.shape == (3, 2, 3, 4) and torch.equal(sample, model.sample(3, temperature=0.5, generator=seeded()))
    model.likelihood.check(sample)
    again = model.reconstruct(x)
    assert again.shape == x.shape and again.min() >= 0 and again.max() <= model.likelihood.levels - 1
    assert model.sample_mean(2).shape == (2, 2, 3, 4)


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 28, 20), (3, 7, 10), (1, 1, 5)])
def test_convolutions_fit_every_size(shape):
    torch.manual_seed(0)
    model = FlowVAE(shape, latent=3, hidden=8)
    x = images(model, 2)
    assert model.decode(model.posterior(model.encode(x))[0]).shape == x.shape
    model.loss(x).mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_published_networks():
    # van den Berg et al.: three halvings of nothing but 28 -> 14 -> 7, 256 features, 64 latents
    model = FlowVAE()
    convs = [m for m in model.encoder.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.out_channels // 2, m.stride[0], m.kernel_size[0]) for m in convs] == [
        (32, 1, 5), (32, 2, 5), (64, 1, 5), (64, 2, 5), (64, 1, 5)
    ]  # fmt: skip
    assert model.encoder[-1][0].in_features == 64 * 7 * 7 and model.moments.in_features == 256
    frey = FlowVAE((1, 28, 20), likelihood="categorical", variance=(0.01, 7))
    assert frey.decoder[-2].out_channels == 256 and frey.decoder[-1].out_channels == 256


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_state_survives_saving_copying_pickling(posterior):
    model = build(posterior)
    x = images(model)
    again = FlowVAE(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    for other in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.elbo(x, generator=seeded()), model.elbo(x, generator=seeded()))


# --- bad input ------------------------------------------------------------------------------------------


def test_bad_images():
    model = build()
    for match, call in (
        (r"x: expected \[B, 1, 4, 4\], got \[2, 1, 4, 5\]", lambda: model(torch.zeros(2, 1, 4, 5))),
        (r"x: expected \[B, 1, 4, 4\], got \[2, 16\]", lambda: model.log_prob(torch.zeros(2, 16))),
        ("x: expected the whole numbers 0 to 1, got 0.5", lambda: model.loss(torch.full((2, 1, 4, 4), 0.5))),
        ("x: expected the whole numbers 0 to 1, got -1", lambda: model(torch.full((2, 1, 4, 4), -1))),
        ("x: expected the whole numbers 0 to 1, got nan", lambda: model(torch.full((2, 1, 4, 4), math.nan))),
        ("context: this model takes none", lambda: model(torch.zeros(2, 1, 4, 4), torch.zeros(2, 3))),
        ("samples, rows: expected at least 1", lambda: model.log_prob(torch.zeros(2, 1, 4, 4), samples=0)),
    ):
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.parametrize("match, options", [
    ("image_shape: expected positive sizes", {"image_shape": (1, 0, 4)}),
    ("image_shape: expected positive sizes", {"image_shape": (28, 28)}),
    ("posterior: expected one of diagonal, planar", {"posterior": "spline"}),
    ("encoder: expected one of conv, mlp, got 'resnet'", {"encoder": "resnet"}),
    ("likelihood: expected one of bernoulli, categorical, logistic", {"likelihood": "normal"}),
    ("levels: expected at least 2, got 1", {"likelihood": "categorical", "levels": 1}),
    ("latent: expected at least 1, got 0", {"latent": 0}),
    ("rank: expected at most latent = 4", {"posterior": "sylvester-orthogonal", "rank": 5}),
    ("variance: expected bounds 0 <= low < high", {"variance": (2, 1)}),
])  # fmt: skip
def test_bad_settings(match, options):
    with pytest.raises(ValueError, match=match):
        FlowVAE(**{**SMALL, **options})


def test_a_layer_that_goes_nan_is_named():
    model = build()
    with torch.no_grad():
        model.decoder[1][0].weight[0, 0] = math.nan
    with pytest.raises(ffnn.NonFiniteError, match=r"decoder\.1\.0 \(Linear\)"), ffnn.debug():
        model(images(model))
    assert model.loss(images(model)).isnan().all()


def test_autocast():
    model = build(likelihood="categorical", levels=7)
    x = images(model)
    expected = model.elbo(x, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        value = model.elbo(x, generator=seeded())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0.05, atol=0.5)


# --- training -------------------------------------------------------------------------------------------


def fake(shape, levels, form):
    pixels = torch.randint(0, levels, (8, *shape), dtype=torch.uint8)
    return Images("fake", pixels, pixels, levels, form)


@pytest.mark.parametrize("book, model, data", [
    (name, model, data)
    for name, book in (("RECIPES", RECIPES), ("PUBLISHED", PUBLISHED))
    for model in ("flow_vae", "iaf_vae")
    for data in book[model]
])  # fmt: skip
def test_recipes_fit_their_data(book, model, data):
    recipe = {"RECIPES": RECIPES, "PUBLISHED": PUBLISHED}[book][model][data]
    shapes = {"digits": ((1, 8, 8), 17), "freyfaces": ((1, 28, 20), 256), "images": ((3, 32, 32), 256)}
    shapes |= dict.fromkeys(("caltech", "mnist-static"), ((1, 28, 28), 2))
    shape, levels = shapes.get(data, ((1, 28, 28), 256))
    data = fake(shape, levels, recipe.data["form"])
    config = recipe.config(data)
    with torch.device("meta"):
        built = build_model(recipe.model, json.loads(json.dumps(config)))
    assert built.image_shape == shape and built.likelihood.levels == (2 if data.binary else levels)


@pytest.mark.parametrize("model", ["flow_vae", "iaf_vae"])
@pytest.mark.parametrize("form", ["integers", "dynamic"])
def test_the_training_frame(model, form, tmp_path):
    pytest.importorskip("sklearn")
    recipe, data = RECIPES[model]["digits"], load_data("digits", form=form)
    changes = {"width": 16} if model == "flow_vae" else {"hidden": 8, "latent": 2, "depth": 1}
    built = build_model(recipe.model, {**recipe.config(data), **changes, "samples": 2})
    config = replace(recipe.train, epochs=1, steps=12, eval_every=12, batch_size=32, lr=5e-3)
    result = train(built, data, config, tmp_path, progress=False)
    losses = [r["train"] for r in read_metrics(tmp_path / "metrics.jsonl") if "train" in r]
    naive, _ = data.baseline()
    assert losses[-1] < losses[0] and naive / 2 < result.held_out < 3 * naive
    assert load_model(tmp_path)[0].sample(2).shape == (2, 1, 8, 8)
