"""RealNVP: its layers, the peers with its weights, an implementation by masks, its volume, its samples."""

import copy
import json
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastflow
from fastflow.models import RealNVP, VectorRealNVP
from fastflow.models.realnvp import PRESETS, ResNet, WeightNormConv2d
from fastflow.nn import ActNorm, AffineCoupling, Flow, Logistic, Logit, SplitPrior, Squeeze, StandardNormal
from fastflow.testing.case import randn

DIAGONAL = ((0, 0), (1, 1), (0, 1), (1, 0))


def images(n, shape, dtype=torch.float64):
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype) - 0.5


def random_realnvp(shape=(1, 4, 4), dtype=torch.float64, scale=0.1, **options):
    """An initialised model whose networks are not zero; in evaluation mode."""
    torch.manual_seed(0)
    model = RealNVP(shape, **{"hidden": 6, "blocks": 1, **options}).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    model.initialize(images(32, shape, dtype))
    model.log_prob(images(32, shape, dtype))  # running averages, where there are any
    return model.eval()


# --- layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "split"])
def test_the_diagonal_order_of_a_squeeze(layout):
    """The paper's figure: sub-pixels 1 and 4 of every block stay, as the first half of the channels, 2 and 3 leave."""
    x = randn(2, 3, 6, 4)
    if layout != "contiguous":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "split":
        x = torch.cat([x, x], 1)[:, 3:]
    squeeze = Squeeze(order="diagonal")
    z, logdet = squeeze(x)
    for k, (row, column) in enumerate(DIAGONAL):
        assert torch.equal(z[:, 3 * k : 3 * k + 3], x[:, :, row::2, column::2])
    assert torch.equal(squeeze.inverse(z)[0], x) and torch.equal(logdet, torch.zeros_like(logdet))
    wanted = torch.contiguous_format if layout == "contiguous" else torch.channels_last
    assert z.is_contiguous(memory_format=wanted) and squeeze.inverse(z)[0].is_contiguous(memory_format=wanted)
    even = (torch.arange(6)[:, None] + torch.arange(4)) % 2 == 0
    assert not squeeze(x * even)[0][:, 6:].any() and not squeeze(x * ~even)[0][:, :6].any()
    assert squeeze.inverse(squeeze(x[:0])[0])[0].shape == (0, 3, 6, 4)
    with pytest.raises(ValueError, match="factor: expected 2 for order 'diagonal', got 3"):
        Squeeze(3, "diagonal")
    with pytest.raises(ValueError, match="H and W divisible by 2, got"):
        squeeze(torch.zeros(1, 1, 3, 4))


@pytest.mark.parametrize("alpha, low, high", [(0.05, 0, 1), (1e-6, -0.5, 0.5), (0.0, -1, 3)])
def test_logit(alpha, low, high):
    layer, unit = Logit(alpha, low, high), torch.rand(3, 2, 4, dtype=torch.float64)
    x = low + (high - low) * unit
    z, logdet = layer(x)
    p = alpha + (1 - 2 * alpha) * unit
    torch.testing.assert_close(z, torch.logit(p))
    # the paper's form: softplus(z) + softplus(-z) + log(1 - 2 alpha) for every pixel
    softplus = nn.functional.softplus
    volume = softplus(z) + softplus(-z) + math.log(1 - 2 * alpha) - math.log(high - low)
    torch.testing.assert_close(logdet, volume.flatten(1).sum(1))
    back, minus = layer.inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -logdet)
    jacobian = torch.autograd.functional.jacobian(lambda v: layer(v[None])[0].flatten(), x[0]).view(8, 8)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, logdet[0])
    assert torch.autograd.gradcheck(layer, x.requires_grad_())
    assert torch.autograd.gradcheck(layer.inverse, z.detach().requires_grad_())


def test_logit_keeps_its_digits_at_both_ends():
    layer, eps = Logit(1e-6), 2.0**-24
    x = torch.tensor([[0.0], [eps], [1 - eps], [1.0]])
    z, logdet = layer(x)
    exact, volume = layer(x.double())
    torch.testing.assert_close(z.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(logdet.double(), volume, rtol=1e-6, atol=0)
    far, minus = layer.inverse(torch.tensor([[-200.0], [200.0]]))
    assert minus.tolist() == pytest.approx([-200, -200], abs=1e-4)  # log p (1 - p), though p rounds to 0 and 1
    assert far.flatten().tolist() == pytest.approx([0, 1], abs=1e-5)


def test_logit_refuses_what_has_no_logit():
    with pytest.raises(ValueError, match=r"x: expected values inside \(-0.0555556, 1.05556\), got 0.5 to 1.06"):
        Logit(0.05)(torch.tensor([[0.5, 1.06]]))
    with pytest.raises(ValueError, match=r"x: expected values inside \(0, 1\), got nan"):
        Logit(0.0)(torch.tensor([[math.nan]]))
    with pytest.raises(ValueError, match=r"alpha: expected a number in \[0, 0.5\), got 0.5"):
        Logit(0.5)
    with pytest.raises(ValueError, match="low, high: expected low < high"):
        Logit(0.1, 1, 0)
    assert Logit()(torch.zeros(0, 3))[1].shape == (0,)
    z, logdet = Logit()(torch.rand(2, 3).bfloat16())
    assert z.dtype == torch.bfloat16 and logdet.dtype == torch.float32


@pytest.mark.parametrize("base, alpha", [(StandardNormal(1), 1e-6), (Logistic(1), 1e-6), (StandardNormal(1), 1e-3)])
def test_256_levels_of_a_pixel_sum_to_one(base, alpha):
    """The probability of level i is the integral of the density over its bin."""
    model = Flow(base, Logit(alpha)).double()
    middles = (torch.arange(256 * 512, dtype=torch.float64) + 0.5) / (256 * 512)
    levels = model.log_prob(middles[:, None]).exp().view(256, 512).mean(1) / 256
    assert abs(levels.sum().item() - 1) < 1e-3


def test_weight_norm():
    ours, x = WeightNormConv2d(3, 5, 3).double(), randn(2, 3, 6, 6)
    theirs = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 5, 3, padding=1).double())
    parameters = theirs.parametrizations.weight
    parameters.original0.data, parameters.original1.data = ours.weight_g.data * 1.5, ours.weight_v.data * 0.7
    ours.weight_g.data *= 1.5
    theirs.bias.data = ours.bias.data
    torch.testing.assert_close(ours(x), theirs(x))


# --- couplings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parity", [0, 1])
def test_a_checkerboard_coupling_by_masks(parity):
    """y = b x + (1 - b) (x + t(b x)) e^s(b x), s = r tanh; what b and its complement change adds up to everything."""
    torch.manual_seed(0)
    network = ResNet(3, 8, 6, 1, norm=False, double=True).double()
    nn.init.normal_(network.out_conv.weight_g)
    options = {"packing": "chunk_st", "scale": "tanh_rescale", "order": "shift_first", "rescale": 3}
    layer = AffineCoupling(network, ("checkerboard_even", "checkerboard_odd")[parity], **options).double()
    layer.rescale.data.copy_(torch.tensor([0.5, 1.5, -0.7]))
    x = randn(2, 3, 6, 5).requires_grad_()
    kept = ((torch.arange(6)[:, None] + torch.arange(5)) % 2 != parity).double()
    changed = 1 - kept
    s, t = network(kept * x).chunk(2, 1)
    s = changed * layer.rescale.view(3, 1, 1) * torch.tanh(s)
    y = kept * x + changed * (x + t) * torch.exp(s)
    z, logdet = layer(x)
    torch.testing.assert_close(z, y)
    torch.testing.assert_close(logdet, s.flatten(1).sum(1))
    torch.testing.assert_close(layer.inverse(z)[0], x)
    inputs = [x, layer.rescale, *network.parameters()]
    weight = randn(*x.shape)
    ours = torch.autograd.grad((z * weight).sum() + logdet.sum(), inputs, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad((y * weight).sum() + s.sum(), inputs), rtol=1e-9, atol=1e-9)
    other = AffineCoupling(network, ("checkerboard_odd", "checkerboard_even")[parity], **options).double()
    moved = [(part(x)[0] != x) for part in (layer, other)]
    assert (moved[0] ^ moved[1]).all() and (moved[0] == changed.bool()).all()


def by_masks(model, x):
    """(z in the shape of the image, log-determinant) of a model without norms, its scales as nested functions."""

    def couplings(layers, x, channelwise):
        total = 0
        for k, layer in enumerate(layers):
            if channelwise:
                kept = torch.zeros(x.shape[1], 1, 1, dtype=x.dtype)
                half = x.shape[1] // 2
                kept[half:] = 1
                kept = kept if k % 2 == 0 else 1 - kept
                seen = x[:, half:] if k % 2 == 0 else x[:, :half]
                s, t = (torch.cat([v, v], 1) for v in layer.network(seen).chunk(2, 1))
                rescale = torch.cat([layer.rescale, layer.rescale]).view(-1, 1, 1)
            else:
                kept = ((torch.arange(x.shape[2])[:, None] + torch.arange(x.shape[3])) % 2 != k % 2).to(x.dtype)
                s, t = layer.network(kept * x).chunk(2, 1)
                rescale = layer.rescale.view(-1, 1, 1)
            s = (1 - kept) * rescale * torch.tanh(s)
            x = kept * x + (1 - kept) * (x + t) * torch.exp(s)
            total = total + s.flatten(1).sum(1)
        return x, total

    def scale(level, x):
        parts = list(model.scales[level])
        x, total = couplings(parts[0], x, False)
        if level + 1 == len(model.scales):
            return x, total
        x, more = couplings(parts[2], nn.functional.pixel_unshuffle(x, 2), True)
        x = nn.functional.pixel_shuffle(x, 2)
        quarters = [x[:, :, i::2, j::2] for i, j in DIAGONAL]
        z, last = scale(level + 1, torch.cat(quarters[:2], 1))
        z = torch.cat([z, *quarters[2:]], 1).chunk(4, 1)
        out = torch.empty_like(x)
        for (i, j), part in zip(DIAGONAL, z, strict=True):
            out[:, :, i::2, j::2] = part
        return out, total + more + last

    return scale(0, x)


@pytest.mark.parametrize("net_norm", [False, True])
def test_the_whole_model_by_masks(net_norm):
    model = random_realnvp((3, 8, 8), scales=3, norm="none", alpha=None, net_norm=net_norm)
    x = images(4, (3, 8, 8))
    latents, log_prob = model.encode(x)
    z, logdet = by_masks(model, x)
    torch.testing.assert_close(model.assemble(latents), z, rtol=0, atol=1e-10)
    normal = -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)
    torch.testing.assert_close(log_prob, normal + logdet, rtol=1e-12, atol=1e-9)
    for a, b in zip(model.disassemble(z), latents, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", ["exp", "sigmoid2_eps"])
def test_nflows_affine_coupling(scale):
    transforms = pytest.importorskip("nflows.transforms")
    x, networks = randn(6, 2), [nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2)).double() for _ in range(3)]
    h = z = x
    total = logdet = 0
    for k, network in enumerate(networks):
        theirs = transforms.AffineCouplingTransform([k % 2, 1 - k % 2][::-1], lambda i, o: nn.Linear(i, o))
        theirs.transform_net.forward = lambda kept, context=None, network=network: network(kept)
        if scale == "exp":  # the scale activation of its later versions
            theirs._scale_and_shift = lambda params: (params[:, 1:].exp(), params[:, :1])
        ours = AffineCoupling(network, "second_half" if k % 2 else "first_half", packing="chunk_ts", scale=scale)
        h, more = theirs(h)
        total = total + more
        z, more = ours(z)
        logdet = logdet + more
    torch.testing.assert_close(z, h, rtol=0, atol=1e-12)
    torch.testing.assert_close(logdet, total, rtol=0, atol=1e-12)


# --- the model ----------------------------------------------------------------------------------------

VARIANTS = [
    {},
    {"prior": "conditional", "norm": "none", "alpha": None},
    {"norm": "batch", "net_norm": True},
    {"compact": True, "prior": "conditional"},
    {"scales": 1, "blocks": 2},
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o)) or "default")
def test_every_variant_inverts_and_counts_its_volume(options):
    model = random_realnvp((3, 4, 4), **options)
    x = images(3, (3, 4, 4))
    latents, log_prob = model.encode(x)
    torch.testing.assert_close(model.decode(latents), x, rtol=0, atol=1e-10)

    def flat(v):
        return model.assemble(model.encode(v.view(1, 3, 4, 4))[0]).flatten()

    volume = torch.linalg.slogdet(torch.autograd.functional.jacobian(flat, x[0].flatten())).logabsdet
    *parts, top = (latent[:1] for latent in latents)
    density = -0.5 * (top.square() + math.log(2 * math.pi)).sum()
    for split, part in zip(model.splits, parts, strict=True):
        kept = split_input(model, x[:1])
        mean, log_scale = (0, torch.zeros(())) if split.network is None else _moments(split.network(kept))
        density = density + torch.distributions.Normal(mean, log_scale.exp()).log_prob(part).sum()
    torch.testing.assert_close(log_prob[0], density + volume, rtol=1e-9, atol=1e-9)
    sample, sampled = model.sample_and_log_prob(4, temperature=0.8, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(model.log_prob(sample), sampled, rtol=1e-8, atol=1e-7)


def split_input(model, x):
    return model.scales[0](model.preprocess(x)[0])[0][:, : 2 * model.image_shape[0]]


def _moments(params):
    return params[:, 0::2], params[:, 1::2]


def test_a_conditional_prior_is_a_standard_normal_of_the_standardised_part():
    """log p(z1 | z2) = log N((z1 - mu(z2)) / sigma(z2); 0, 1) - sum log sigma(z2)."""
    torch.manual_seed(0)
    prior, z = SplitPrior(6).double(), randn(3, 6, 2, 2)
    for p in prior.parameters():
        nn.init.normal_(p, std=0.3)
    kept, part, log_prob = prior(z)
    mean, log_sigma = _moments(prior.network(kept))
    standardised = (part - mean) / log_sigma.exp()
    normal = -0.5 * (standardised.square() + math.log(2 * math.pi)).flatten(1).sum(1)
    torch.testing.assert_close(log_prob, normal - log_sigma.flatten(1).sum(1))


def test_the_round_trip_in_float32():
    model = random_realnvp((3, 32, 32), torch.float32, hidden=16, blocks=2)
    for network in (m for m in model.modules() if isinstance(m, ResNet)):
        nn.init.normal_(network.out_conv.weight_g, std=1.0)
    x = images(4, (3, 32, 32), torch.float32)
    latents, log_prob = model.encode(x)
    assert (model.decode(latents) - x).abs().max() < 1e-4
    exact = copy.deepcopy(model).double().log_prob(x.double())
    torch.testing.assert_close(log_prob.double(), exact, rtol=1e-5, atol=0)


def test_starts_as_the_normalised_identity():
    torch.manual_seed(0)
    model = RealNVP((1, 8, 8), hidden=4, blocks=1, norm="none")
    x = images(4, (1, 8, 8), torch.float32)
    torch.testing.assert_close(model.assemble(model.encode(x)[0]), Logit(0.05)(x + 0.5)[0])
    model = RealNVP((1, 8, 8), hidden=4, blocks=1)
    assert not any(m.ready for m in model.modules() if isinstance(m, ActNorm))
    model.initialize(x)
    z = model.assemble(model.encode(x)[0])
    assert abs(z.mean()) < 1e-4 and abs(z.std() - 1) < 0.02
    with pytest.raises(RuntimeError, match="initialised already"):
        model.initialize(x)


def test_pixels_that_do_not_vary():
    for norm in ("actnorm", "batch"):
        torch.manual_seed(0)
        model = RealNVP((1, 4, 4), hidden=4, blocks=1, norm=norm)
        x = torch.full((6, 1, 4, 4), 0.25)
        model.initialize(x)
        loss = -model.log_prob(x).mean()
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_gradients_agree_with_the_reference():
    model, x = random_realnvp(prior="conditional"), images(4, (1, 4, 4))
    grads = []
    for backend in (None, "reference"):
        with fastflow.use_backend(backend):
            grads.append(torch.autograd.grad(model.log_prob(x).sum(), list(model.parameters())))
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-8)


def test_two_runs_are_bit_identical():
    def train():
        torch.manual_seed(0)
        model = RealNVP((1, 8, 8), hidden=8, blocks=1)
        model.initialize(images(32, (1, 8, 8), torch.float32))
        optimiser = torch.optim.Adam(model.parameters(), 1e-3)
        losses = []
        for _ in range(5):
            optimiser.zero_grad()
            loss = -model(images(32, (1, 8, 8), torch.float32)).mean()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return losses, model.sample(2, generator=torch.Generator().manual_seed(0))

    (first, x), (second, y) = train(), train()
    assert first == second and first[-1] < first[0] and torch.equal(x, y)


# --- rows ---------------------------------------------------------------------------------------------


def random_vectors(features=3, dtype=torch.float64, scale=0.3, **options):
    torch.manual_seed(0)
    model = VectorRealNVP(features, **{"layers": 4, "hidden": (8,), **options}).to(dtype)
    x, context = randn(64, features).to(dtype), None
    if options.get("context_features"):
        context = randn(64, options["context_features"]).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    model.initialize(x, context)
    return model.eval()


@pytest.mark.parametrize("options", [{}, {"norm": "none", "context_features": 2}, {"norm": "batch"}], ids=str)
@pytest.mark.parametrize("features", [2, 5])
def test_rows(features, options):
    model, x = random_vectors(features, **options), randn(6, features)
    context = randn(6, 2) if "context_features" in options else None
    z, logdet = model.bijection(x, context)
    torch.testing.assert_close(model.bijection.inverse(z, context)[0], x)
    given = None if context is None else context[:1]
    jacobian = torch.autograd.functional.jacobian(lambda v: model.bijection(v[None], given)[0][0], x[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, logdet[0], rtol=1e-9, atol=1e-9)
    sample, density = model.sample_and_log_prob(6, context, 0.8, torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.log_prob(sample, context), density)
    again = VectorRealNVP(**json.loads(json.dumps(model.config))).double().eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.log_prob(x, context), model.log_prob(x, context))
    assert model.log_prob(x[:0], None if context is None else context[:0]).shape == (0,)


def test_rows_by_formula():
    """z2 = x2 exp(r tanh(s(x1))) + t(x1), odd features first, then even ones."""
    model, x = random_vectors(4, norm="none", layers=2), randn(6, 4)
    h, total = x, 0
    for k, layer in enumerate(model.bijection):
        changed, kept = h[:, 1 - k :: 2], h[:, k::2]
        params = layer.network(kept)
        s = layer.rescale * torch.tanh(params[:, 1::2])
        changed = changed * s.exp() + params[:, 0::2]
        h = torch.stack([kept, changed] if k == 0 else [changed, kept], 2).flatten(1)
        total = total + s.sum(1)
    z, logdet = model.bijection(x)
    torch.testing.assert_close(z, h)
    torch.testing.assert_close(logdet, total)


def test_the_density_of_a_plane_integrates_to_one():
    model = random_vectors(2)
    line = torch.linspace(-12, 12, 801, dtype=torch.float64)
    density = model.log_prob(torch.cartesian_prod(line, line)).detach().exp().view(801, 801)
    assert abs(torch.trapezoid(torch.trapezoid(density, line), line).item() - 1) < 1e-2


def test_rows_refuse():
    with pytest.raises(ValueError, match="features: expected at least 2, of which .*, got 1"):
        VectorRealNVP(1)
    with pytest.raises(ValueError, match="norm: expected one of actnorm, batch, none, got 'layer'"):
        VectorRealNVP(2, norm="layer")
    with pytest.raises(ValueError, match=r"x: expected \[B, 3\], got \[2, 4\]"):
        random_vectors().log_prob(torch.zeros(2, 4))
    with pytest.raises(RuntimeError, match=r"evaluation mode only"):
        random_vectors(norm="batch").train().sample(2)
    with pytest.raises(ValueError, match="context"):
        random_vectors(context_features=2).sample(2)


def test_gain_decay():
    model, x = random_realnvp(gain_decay=0.1), images(3, (1, 4, 4))
    gains = [m.weight_g for m in model.modules() if isinstance(m, WeightNormConv2d)]
    penalty = 0.05 * sum(g.square().sum() for g in gains)
    torch.testing.assert_close(model.loss(x, 0.5), penalty - model(x))
    torch.testing.assert_close(random_realnvp().loss(x), -random_realnvp()(x))


# --- state, samples, input ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"norm": "batch", "net_norm": True, "prior": "conditional"}], ids=str)
def test_state_survives_saving_copying_pickling(options):
    model, x = random_realnvp(dtype=torch.float32, **options), images(3, (1, 4, 4), torch.float32)
    again = RealNVP(**json.loads(json.dumps(model.config))).eval()
    again.load_state_dict(model.state_dict())
    for other in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.log_prob(x), model.log_prob(x))


def test_temperature():
    model = random_realnvp(prior="conditional")
    spread = [
        model.sample(64, temperature=t, generator=torch.Generator().manual_seed(0)).std() for t in (0, 0.5, 0.7, 1)
    ]
    assert spread == sorted(spread)
    mode = model.sample(2, temperature=0)
    assert torch.equal(mode[0], mode[1])


def test_batch_statistics_have_no_inverse():
    for options in ({"norm": "batch"}, {"net_norm": True}):
        model = random_realnvp(**options).train()
        with pytest.raises(RuntimeError, match=r"evaluation mode only: call eval\(\)"):
            model.sample(1)
        assert model.eval().sample(1).isfinite().all()


def test_bad_input_and_empty_batches():
    with pytest.raises(ValueError, match="sizes divisible by 2 for 2 scales, got 7 x 8"):
        RealNVP((1, 7, 8))
    with pytest.raises(ValueError, match="sizes divisible by 4 for 2 scales in compact form, got 14 x 14"):
        RealNVP((1, 14, 14), compact=True)
    with pytest.raises(ValueError, match="norm: expected one of actnorm, batch, none, got 'layer'"):
        RealNVP((1, 4, 4), norm="layer")
    with pytest.raises(ValueError, match="preset: expected one of chrischute-cifar10"):
        RealNVP.preset("mnist")
    model = random_realnvp()
    with pytest.raises(ValueError, match=r"x: expected \[B, 1, 4, 4\], got \[2, 3, 4, 4\]"):
        model.log_prob(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"context: this model takes none, got a tensor \[2\]"):
        model.sample(2, torch.zeros(2))
    with pytest.raises(ValueError, match="latents: expected 2, got 1"):
        model.decode(model.encode(images(2, (1, 4, 4)))[0][:1])
    with pytest.raises(RuntimeError, match="not initialised"):
        RealNVP((1, 4, 4), hidden=4, blocks=1).sample(1)
    assert model.log_prob(images(0, (1, 4, 4))).shape == (0,) and model.sample(0).shape == (0, 1, 4, 4)
    odd = random_realnvp((1, 5, 7), scales=1)  # a checkerboard has no need of even sizes
    torch.testing.assert_close(odd.decode(odd.encode(images(2, (1, 5, 7)))[0]), images(2, (1, 5, 7)))


def test_presets():
    for name in PRESETS:
        model = RealNVP.preset(name, hidden=2, blocks=1)
        assert len(model.scales) == PRESETS[name]["scales"]


def test_compiles():
    model, x = random_realnvp(dtype=torch.float32, scales=1), images(3, (1, 4, 4), torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


# --- recipes ------------------------------------------------------------------------------------------

SHAPES = {"moons": (2,), "rows": (6,), "digits": (1, 8, 8), "mnist": (1, 28, 28), "npz": (3, 32, 32)}


def test_recipes(tmp_path):
    train = pytest.importorskip("fastflow.train")
    from fastflow.train.recipe import build_model
    from fastflow.train.recipes import PUBLISHED, RECIPES

    for book in (RECIPES, PUBLISHED):
        for data, recipe in book["realnvp"].items():
            build_model(recipe.model, recipe.config(SimpleNamespace(shape=SHAPES[data])))
    pytest.importorskip("sklearn")
    data, recipe = train.load_data("digits"), RECIPES["realnvp"]["digits"]
    model = build_model(recipe.model, {**recipe.config(data), "hidden": 4})
    result = train.train(model, data, train.TrainConfig(steps=3, batch_size=16), tmp_path / "run", progress=False)
    assert result.step == 3 and 0 < result.held_out < 20
