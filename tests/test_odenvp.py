"""ODENVP: volume, inverses, traces, gradients, shapes, training."""

import itertools
import json

import pytest
import torch

from fastflow.models import ODENVP
from fastflow.nn import Continuous, ConvDynamics, MultiScale
from fastflow.testing.case import randn

pytest.importorskip("torchdiffeq")

LOG_2_PI = 1.8378770664093453


def images(n, shape, seed=0):
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5


def tiny(shape=(1, 4, 4), **options):
    """A model in float64 whose dynamics are not small."""
    torch.manual_seed(0)
    settings = {"scales": 2, "blocks": 1, "hidden": (4,), "activation": "tanh", "rtol": 1e-8, "atol": 1e-8}
    model = ODENVP(shape, **{**settings, "alpha": 0.05, **options}).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    return model


def latent(model, x):
    return torch.cat([part.flatten(1) for part in model.encode(x)[0]], 1)


def saved_bytes(run):
    """What autograd keeps for the backward pass, all tensors once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no other has its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


# --- densities --------------------------------------------------------------------------------------


def test_density_by_the_jacobian_of_the_latent():
    model, x = tiny(trace="exact", rtol=1e-7, atol=1e-7, adjoint=False), images(2, (1, 4, 4))
    for sample in x:
        jacobian = torch.autograd.functional.jacobian(lambda v: latent(model, v[None]).flatten(), sample).view(16, 16)
        z = latent(model, sample[None])
        wanted = torch.linalg.slogdet(jacobian).logabsdet - 0.5 * (z.square().sum() + 16 * LOG_2_PI)
        torch.testing.assert_close(model.log_prob(sample[None])[0], wanted, rtol=1e-6, atol=1e-6)


def test_latents_and_back():
    model, x = tiny((2, 8, 4), scales=None), images(3, (2, 8, 4))
    latents, _ = model.encode(x)
    assert len(latents) == 1 and model.decode(latents).shape == x.shape
    model = tiny((2, 8, 4))
    latents, log_prob = model.encode(x)
    assert [tuple(part.shape) for part in latents] == [(3, 4, 4, 2), (3, 4, 4, 2)] and log_prob.shape == (3,)
    torch.testing.assert_close(model.decode(latents), x, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="latents: expected 2, got 1"):
        model.decode(latents[:1])


def test_samples():
    model = tiny(norm="actnorm")
    model.initialize(images(8, (1, 4, 4)))
    with pytest.raises(RuntimeError, match="initialised already"):
        model.initialize(images(8, (1, 4, 4)))
    model.eval()
    drawn = [model.sample(3, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*drawn) and drawn[0].shape == (3, 1, 4, 4)
    assert not torch.equal(drawn[0], model.sample(3, temperature=0.5, generator=torch.Generator().manual_seed(4)))
    noise = {"generator": torch.Generator().manual_seed(4)}
    for block in model.blocks:
        block.trace = "exact"
    x, log_prob = model.sample_and_log_prob(3, **noise)
    torch.testing.assert_close(x, drawn[0], rtol=1e-5, atol=1e-5)  # other steps, as the trace is integrated beside
    torch.testing.assert_close(model.log_prob(x), log_prob, rtol=1e-5, atol=1e-5)
    assert model.sample(0).shape == (0, 1, 4, 4) and model.log_prob(x[:0]).shape == (0,)


# --- traces -----------------------------------------------------------------------------------------


def test_forward_products_are_those_of_reverse_mode():
    """The same probes give the same numbers and the same steps."""
    x, e = randn(3, 2, 4, 4), randn(2, 3, 2, 4, 4, seed=1).sign()
    torch.manual_seed(0)
    dynamics = ConvDynamics(2, (6, 6)).double()
    forward, reverse = (Continuous(dynamics, product=product, rtol=1e-6, atol=1e-6) for product in (None, "vjp"))
    ours, theirs = (flow.solve(x, [0.0, 1.0], probes=e, regularize=True) for flow in (forward, reverse))
    torch.testing.assert_close(ours.trace, theirs.trace)
    torch.testing.assert_close(ours.value, theirs.value)
    assert forward.product == "jvp" and ours.steps == theirs.steps


def test_trace_is_unbiased():
    """The mean over all 2^D signs is the exact trace."""
    x = randn(2, 1, 2, 2)
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=4)), dtype=x.dtype)
    signs = signs.view(16, 1, 1, 2, 2).expand(16, 2, 1, 2, 2)
    torch.manual_seed(0)
    flow = Continuous(ConvDynamics(1, (5,)).double(), method="rk4", step_size=0.25)
    mean = flow.solve(x, [0.0, 1.0], probes=signs).trace.mean(1)
    torch.testing.assert_close(mean, flow.solve(x, [0.0, 1.0], trace="exact").trace, rtol=1e-9, atol=1e-9)


def test_estimates_of_the_density():
    model, x = tiny(method="rk4", step_size=0.25).eval(), images(4, (1, 4, 4))
    torch.manual_seed(0)
    exact = model.log_prob(x, trace="exact")
    estimate = model.log_prob_estimate(x, probes=200)
    assert ((estimate.log_prob - exact).abs() < 5 * estimate.standard_error).all()
    assert not torch.equal(model.log_prob(x), exact)  # its own trace again, by one probe
    assert torch.equal(
        model.log_prob(x, trace="exact"), tiny(method="rk4", step_size=0.25, eval_trace="exact").eval()(x)
    )


# --- gradients --------------------------------------------------------------------------------------


def test_adjoint_against_the_steps():
    x, grads = images(3, (1, 4, 4)), []
    for adjoint in (True, False):
        model, v = tiny(rtol=1e-7, atol=1e-7, trace="exact", adjoint=adjoint), x.clone().requires_grad_()
        model.log_prob(v).sum().backward()
        grads.append([v.grad, *(p.grad for p in model.parameters())])
    assert any(p.numel() == 1 for p in model.parameters())  # the learned times
    for ours, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_memory_does_not_grow_with_the_evaluations_of_an_adjoint():
    x = images(4, (1, 4, 4))
    few, many = (tiny(method="rk4", step_size=step).log_prob for step in (0.5, 0.02))
    assert saved_bytes(lambda: many(x)) == saved_bytes(lambda: few(x))
    direct = [tiny(method="rk4", step_size=step, adjoint=False).log_prob for step in (0.5, 0.25)]
    assert saved_bytes(lambda: direct[1](x)) > 1.5 * saved_bytes(lambda: direct[0](x))


def test_second_derivatives():
    model = tiny((1, 2, 2), scales=1, method="rk4", step_size=0.5, trace="exact", adjoint=False)
    x = images(1, (1, 2, 2)).requires_grad_()
    assert torch.autograd.gradgradcheck(model.log_prob, x)


def test_training_with_energies_lowers_the_loss():
    x = 0.2 * images(16, (1, 4, 4)) - 0.2
    model = tiny(norm="actnorm", method="rk4", step_size=0.5, kinetic=0.01, jacobian=0.01, adjoint=False)
    model.initialize(x)
    model = model.float()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(25):
        loss = model.loss(x.float()).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < losses[0] - 1
    torch.manual_seed(0)
    with_energies = model.loss(x.float())
    torch.manual_seed(0)
    assert (with_energies > -model.log_prob(x.float())).all()


# --- shapes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, scales", [(28, 3), (32, 4), (8, 2), (7, 1), (4, 1), (2, 1)])
def test_scales(size, scales):
    model = ODENVP((1, size, size), hidden=(4,), blocks=1, method="euler", rtol=1e-3)
    assert len(model.scales) == scales and len(model.splits) == scales - 1
    assert len(model.blocks) == 2 * scales - 1
    x = torch.rand(2, 1, size, size) - 0.5
    latents, log_prob = model.encode(x)
    sides = [size // 2 ** (k + 1) for k in range(scales - 1)] + [size // 2 ** (scales - 1)]
    channels = [2 * 2**k for k in range(scales - 1)] + [2 ** (scales - 1)]
    assert [tuple(part.shape[1:]) for part in latents] == [(c, s, s) for c, s in zip(channels, sides, strict=True)]
    assert log_prob.isfinite().all() and model.sample(2).shape == x.shape
    assert isinstance(model, MultiScale) and model.evaluations == len(model.blocks)


def test_sizes_that_cannot_be_halved_are_refused():
    wanted = "image_shape, scales: expected sides divisible by 4 for 3 scales, got 18 x 18, which can have 1 to 2"
    with pytest.raises(ValueError, match=wanted):
        ODENVP((1, 18, 18))
    assert len(ODENVP((1, 18, 18), scales=2, hidden=(4,)).scales) == 2
    with pytest.raises(ValueError, match="divisible by 2 for 2 scales, got 7 x 8, which can have 1 to 1"):
        ODENVP((1, 7, 8), scales=2)
    with pytest.raises(ValueError, match=r"x: expected \[B, 1, 8, 8\], got \[2, 3, 8, 8\]"):
        ODENVP((1, 8, 8), hidden=(4,)).log_prob(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="trace: expected 'exact' or 'hutchinson', got 'bottleneck'"):
        ODENVP((1, 8, 8), trace="bottleneck")
    with pytest.raises(ValueError, match="norm: expected none or actnorm, got 'batch'"):
        ODENVP((1, 8, 8), norm="batch")


def test_state_and_config():
    model = tiny(norm="actnorm", layer="concat_squash", activation="swish")
    model.initialize(images(8, (1, 4, 4)))
    again = ODENVP(**json.loads(json.dumps(model.config))).double()
    again.load_state_dict(model.state_dict())
    x, values = images(3, (1, 4, 4)), []
    for each in (model, again):
        torch.manual_seed(0)
        values.append(each.log_prob(x))
    assert torch.equal(*values) and again.config == model.config | {"image_shape": (1, 4, 4)}
