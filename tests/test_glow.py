"""Glow: against normflows with its weights, its variants, its initialisation, its samples."""

import copy
import json
import math
import pickle

import pytest
import torch

import fastflow
from fastflow import nn as ffnn
from fastflow.bench.glow import theirs as normflows_glow
from fastflow.models import Glow
from fastflow.models.glow import PRESETS


def randomise(model, seed=0, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def images(n, shape, seed=1, dtype=torch.float32):
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(seed), dtype=dtype) - 0.5


# --- normflows, weight by weight ----------------------------------------------------------------------


def copy_weights(theirs, ours):
    """Both list their levels from the two ends: our level l, step k is their level L-1-l, step K-1-k."""
    levels, steps = len(ours.levels), len(ours.levels[0])
    with torch.no_grad():
        for level in range(levels):
            for k in range(steps):
                coupling, conv, actnorm = theirs.flows[levels - 1 - level][steps - 1 - k].flows
                step = ours.levels[level][k]
                step.actnorm.bias.copy_(-actnorm.t.flatten())
                step.actnorm.log_scale.copy_(-actnorm.s.flatten())
                for name, value in (("lower", conv.L), ("upper", conv.U), ("log_s", conv.log_S)):
                    getattr(step.mix, name).copy_(value)
                step.mix.permutation.copy_(conv.P.argmax(1))
                step.mix.sign_s.copy_(conv.sign_S)
                convs = [m for m in coupling.flows[1].param_map.net if isinstance(m, torch.nn.Conv2d)]
                for mine, other in zip((step.coupling.network[i] for i in (0, 2, 4)), convs, strict=True):
                    mine.weight.copy_(other.weight)
                    mine.bias.copy_(other.bias)
        priors = [*(split.network for split in ours.splits), ours.top]
        for prior, base in zip(priors, reversed(theirs.q0), strict=True):
            prior.value.copy_(torch.cat([base.loc.flatten(), base.log_scale.flatten()]))
            prior.log_gain.copy_(torch.cat([base.loc_logs.flatten(), base.log_scale_logs.flatten()]))
    state = {k: torch.tensor(True) if k.endswith("initialized") else v for k, v in ours.state_dict().items()}
    ours.load_state_dict(state)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    theirs = normflows_glow((3, 16, 16), 3, 2, 16, batch=5).double()
    x = images(5, (3, 16, 16), dtype=torch.float64)
    randomise(theirs)
    ours = Glow.preset("normflows-cifar10", image_shape=(3, 16, 16), levels=3, steps=2, hidden=16).double()
    copy_weights(theirs, ours)
    return theirs, ours, x


def test_log_prob_latents_and_gradients_equal_normflows(pair):
    theirs, ours, x = pair
    x = x.requires_grad_()
    expected, value = theirs.log_prob(x, None), ours.log_prob(x)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-8)
    latents, _ = theirs.inverse_and_log_det(x)
    torch.testing.assert_close(ours.encode(x)[0][::-1], latents, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        torch.autograd.grad(value.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0], rtol=1e-9, atol=1e-9
    )
    ours.log_prob(x).sum().backward()
    theirs.log_prob(x, None).sum().backward()
    step, (coupling, conv, actnorm) = ours.levels[0][0], theirs.flows[2][1].flows
    for mine, other in (
        (step.actnorm.bias.grad, -actnorm.t.grad.flatten()),
        (step.actnorm.log_scale.grad, -actnorm.s.grad.flatten()),
        (step.mix.log_s.grad, conv.log_S.grad),
        (step.mix.lower.grad, conv.L.grad),
        (step.mix.upper.grad, conv.U.grad),
        (step.coupling.network[0].weight.grad, coupling.flows[1].param_map.net[0].weight.grad),
        (step.coupling.network[4].bias.grad, coupling.flows[1].param_map.net[4].bias.grad),
        (ours.top.value.grad, torch.cat([theirs.q0[0].loc.grad, theirs.q0[0].log_scale.grad], 1).flatten()),
    ):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8)


def test_samples_from_the_same_noise_equal_normflows(pair):
    theirs, ours, x = pair
    latents = [q.sample(4) if not isinstance(q.sample(4), tuple) else q.sample(4)[0] for q in theirs.q0]
    expected, _ = theirs.forward_and_log_det(latents)
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(latents[::-1]), expected, rtol=1e-9, atol=1e-9)


def test_float32_stays_within_the_budget(pair):
    theirs, ours, x = pair
    value = copy.deepcopy(ours).float().log_prob(x.float())
    torch.testing.assert_close(value.double(), ours.log_prob(x), rtol=0, atol=1e-3)


# --- variants -----------------------------------------------------------------------------------------

VARIANTS = [
    {},
    {"coupling": "additive"},
    {"permutation": "dense", "gain": 3.0, "padding": "edge"},
    {"permutation": "shuffle", "split_prior": "standard", "top_prior": "standard"},
    {"permutation": "reverse", "scale": "sigmoid2_eps", "packing": "chunk_st", "padding": "ones", "net_norm": False},
    {"order": "scale_first", "scale": "softplus", "split_prior": "learned", "net_gain": 0.0},
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())) or "default")
def test_every_variant_inverts_and_counts_its_volume(options):
    torch.manual_seed(0)
    model = Glow((3, 4, 4), levels=2, steps=2, hidden=8, **options).double()
    x = images(6, (3, 4, 4), dtype=torch.float64)
    model.initialize(x)
    randomise(model)
    latents, log_prob = model.encode(x)
    torch.testing.assert_close(model.decode(latents), x, rtol=0, atol=1e-10)

    def flat(v):
        return torch.cat([z.flatten() for z in model.encode(v.view(1, 3, 4, 4))[0]])

    jacobian = torch.autograd.functional.jacobian(flat, x[0].flatten())
    sampled, density = model.sample_and_log_prob(4, temperature=0.8, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(model.log_prob(sampled), density, rtol=1e-9, atol=1e-8)
    if options.get("top_prior") == "standard":
        normal = sum(-0.5 * (z[0].square() + math.log(2 * math.pi)).sum() for z in latents)
        torch.testing.assert_close(log_prob[0], normal + torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-9, atol=1e-9)


def test_gradients_agree_with_the_reference():
    torch.manual_seed(0)
    model = Glow((1, 8, 8), levels=2, steps=3, hidden=8).double()
    x = images(4, (1, 8, 8), dtype=torch.float64)
    model.initialize(x)
    randomise(model)
    grads = []
    for backend in (None, "reference"):
        with fastflow.use_backend(backend):
            grads.append(torch.autograd.grad(model.log_prob(x).sum(), list(model.parameters())))
    for (name, _), a, b in zip(model.named_parameters(), *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


# --- state, samples, input ----------------------------------------------------------------------------


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Glow((1, 8, 8), levels=2, steps=2, hidden=8)
    model.initialize(images(16, (1, 8, 8)))
    return randomise(model)


def test_starts_normalised():
    torch.manual_seed(0)
    model = Glow((1, 8, 8), levels=2, steps=2, hidden=8)
    x = images(64, (1, 8, 8))
    seen = []
    for module in model.modules():
        if isinstance(module, ffnn.ActNorm):
            module.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    model.initialize(x)
    assert len(seen) == 4
    for z in seen:
        assert z.mean((0, 2, 3)).abs().max() < 1e-5 and (z.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4
    with pytest.raises(RuntimeError, match="initialised already"):
        model.initialize(x)


def test_state_survives_saving_copying_pickling(model):
    x = images(3, (1, 8, 8))
    expected = model.log_prob(x)
    again = Glow(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    for other in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.log_prob(x), expected)


def test_a_step_of_the_optimiser_reaches_the_samples(model):
    generator = torch.Generator()
    before = model.sample(2, generator=generator.manual_seed(0))
    assert torch.equal(model.sample(2, generator=generator.manual_seed(0)), before)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    (-model.log_prob(images(4, (1, 8, 8))).mean()).backward()
    optimizer.step()
    after = model.sample(2, generator=generator.manual_seed(0))
    assert not torch.equal(after, before)
    x, _ = model.sample_and_log_prob(2, generator=generator.manual_seed(0))
    with fastflow.use_backend("reference"):  # its error: these samples are large
        error = (model.decode(model.encode(x)[0]) - x).abs().max().item()
    torch.testing.assert_close(model.decode(model.encode(x)[0]), x, rtol=0, atol=2 * error)
    torch.testing.assert_close(x, after)


def test_temperature(model):
    generator = torch.Generator()
    spread = [
        model.sample(64, temperature=t, generator=generator.manual_seed(0)).std().item() for t in (0, 0.5, 0.7, 1)
    ]
    assert spread == sorted(spread)
    mode = model.sample(2, temperature=0)
    assert torch.equal(mode[0], mode[1]) and mode.isfinite().all()


def test_classes():
    torch.manual_seed(0)
    model = Glow((1, 4, 4), levels=1, steps=1, hidden=4, classes=3)
    x = images(4, (1, 4, 4))
    model.initialize(x, torch.tensor([0, 1, 2, 0]))
    randomise(model, scale=0.5)
    a, b = (model.log_prob(x, torch.full((4,), k)) for k in (0, 1))
    assert (a - b).abs().min() > 0
    assert model.sample(3, context=torch.tensor([0, 1, 2])).shape == (3, 1, 4, 4)
    with pytest.raises(ValueError, match="conditioned on 3 classes"):
        model.log_prob(x)


def test_bad_input(model):
    with pytest.raises(ValueError, match=r"x: expected \[B, 1, 8, 8\], got \[2, 3, 8, 8\]"):
        model.log_prob(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="divisible by 2"):
        Glow((1, 6, 6), levels=2)
    with pytest.raises(ValueError, match="permutation: expected one of lu"):
        Glow((1, 8, 8), levels=1, permutation="conv")
    with pytest.raises(ValueError, match="preset: expected one of"):
        Glow.preset("cifar")
    with pytest.raises(RuntimeError, match="initial"):
        Glow((1, 8, 8), levels=1, steps=1, hidden=4).sample(1)


def test_presets_are_constructible():
    for name in PRESETS:
        assert Glow.preset(name, steps=1, hidden=4, levels=1).config["steps"] == 1


def test_autocast_and_compile(model):
    x = images(3, (1, 8, 8))
    expected = model.log_prob(x)
    with torch.autocast("cpu", torch.bfloat16):
        value = model.log_prob(x)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0.02, atol=0.5)
    torch.testing.assert_close(torch.compile(model.log_prob)(x), expected, rtol=1e-4, atol=1e-3)
