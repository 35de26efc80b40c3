"""Batch normalisation as a layer of a flow."""

import copy

import pytest
import torch

import fastflow
from fastflow.nn import BatchNorm
from fastflow.testing.case import randn


def filled(channels=3, **options):
    """A layer in evaluation mode with running averages of its own."""
    layer = BatchNorm(channels, **options).double()
    layer.running_mean.copy_(torch.linspace(-1, 2, channels))
    layer.running_var.copy_(torch.linspace(0.2, 3, channels))
    for p in layer.parameters():
        p.data.copy_(torch.linspace(-0.5, 0.7, channels))
    return layer.eval()


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 2, 2)])
def test_evaluation_is_a_bijection(affine, shape):
    layer, x = filled(affine=affine), randn(*shape)
    z, logdet = layer(x)
    back, minus = layer.inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -logdet)
    jacobian = torch.autograd.functional.jacobian(lambda v: layer(v[None])[0].flatten(), x[0]).view(x[0].numel(), -1)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet.expand(6), logdet, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 4, 2)])
def test_training_is_torchs_batch_norm(shape):
    """Values, gradients and running averages; the log-determinant is the sum of the logs of its factors."""
    x = (randn(*shape) * 2 + 1).requires_grad_()
    ours = BatchNorm(3, affine=True, momentum=0.2).double()
    theirs = (torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d)(3, momentum=0.2).double()
    ours.gamma.data.copy_(torch.tensor([0.3, -0.2, 0.1]))
    theirs.weight.data.copy_(ours.gamma.exp())
    z, logdet = ours(x)
    weight = randn(*shape)
    torch.testing.assert_close(z, theirs(x))
    wanted = torch.autograd.grad((theirs(x) * weight).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad((z * weight).sum(), x, retain_graph=True)[0], wanted)
    variance = x.transpose(0, 1).flatten(1).var(1, correction=0)
    volume = x[0, 0].numel() * (ours.gamma - 0.5 * (variance + ours.eps).log()).sum()
    torch.testing.assert_close(logdet, volume.expand(8))
    torch.testing.assert_close(
        torch.autograd.grad(logdet.sum(), x, retain_graph=True)[0], torch.autograd.grad(8 * volume, x)[0]
    )


def test_running_averages():
    layer, x, y = BatchNorm(2, momentum=0.25), torch.randn(50, 2) + 1, 3 * torch.randn(50, 2)
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    torch.testing.assert_close(layer.running_var, x.var(0, correction=0))
    layer(y)
    torch.testing.assert_close(layer.running_mean, 0.75 * x.mean(0) + 0.25 * y.mean(0))
    other = BatchNorm(2)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(x)[0], copy.deepcopy(layer).eval()(x)[0])


def test_backends_agree():
    x = randn(5, 3, 4, 4)
    grads = []
    for backend in (None, "reference"):
        layer, v = BatchNorm(3, affine=True).double(), x.clone().requires_grad_()
        with fastflow.use_backend(backend):
            z, logdet = layer(v)
            (z.square() * x).sum().add(logdet.sum()).backward()
        grads.append((z, logdet, v.grad, layer.gamma.grad))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-9)


def test_second_derivatives():
    layer = BatchNorm(2, affine=True).double()
    assert torch.autograd.gradgradcheck(lambda x: layer(x), randn(4, 2).requires_grad_())


def test_a_channel_that_does_not_vary():
    layer, x = BatchNorm(2), torch.stack([torch.full((8,), 7.0), torch.randn(8)], 1).requires_grad_()
    z, logdet = layer(x)
    (z.sum() + logdet.sum()).backward()
    assert torch.equal(z[:, 0], torch.zeros(8)) and all(t.isfinite().all() for t in (z, logdet, x.grad))
    back, _ = layer.eval().inverse(layer(x)[0])
    torch.testing.assert_close(back, x)


def test_refusals_and_empty_batches():
    layer = BatchNorm(3)
    with pytest.raises(RuntimeError, match=r"evaluation mode only.*call eval\(\)"):
        layer.inverse(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"x: an empty batch \[0, 3\] has no statistics"):
        layer(torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"x: expected 3 channels \[B, C, ...\], got \[2, 4\]"):
        layer(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="eps: expected a positive number, got 0"):
        BatchNorm(3, eps=0)
    with pytest.raises(ValueError, match="momentum: expected"):
        BatchNorm(3, momentum=0)
    for run in (layer.eval(), layer.inverse):
        z, logdet = run(torch.zeros(0, 3, 2, 2))
        assert z.shape == (0, 3, 2, 2) and logdet.shape == (0,)


def test_compiles_and_takes_half_precision():
    layer, x = BatchNorm(3), torch.randn(16, 3, 2, 2)
    z, logdet = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(z, BatchNorm(3)(x)[0])
    half, more = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16 and more.dtype == torch.float32
    torch.testing.assert_close(half.float(), z, rtol=2e-2, atol=2e-2)
