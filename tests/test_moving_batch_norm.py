"""Batch normalisation by running statistics."""

import pytest
import torch

from fastflow.nn import MovingBatchNorm
from fastflow.testing.case import randn


def filled(channels=3, **options):
    """A layer with running averages and parameters of its own."""
    layer = MovingBatchNorm(channels, **options).double()
    layer.running_mean.copy_(torch.linspace(-1, 2, channels))
    layer.running_var.copy_(torch.linspace(0.2, 3, channels))
    for p in layer.parameters():
        p.data.copy_(torch.linspace(-0.5, 0.7, channels))
    return layer


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 2, 2)])
def test_a_bijection_of_every_sample(shape, training):
    """Also in training: the averages move only after the batch."""
    layer, x = filled().train(training), randn(*shape)
    # momentum so small that the averages stand still: the inverse goes by those after the batch
    layer.momentum = 1e-300
    z, logdet = layer(x)
    back, minus = layer.inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -logdet)
    jacobian = torch.autograd.functional.jacobian(lambda v: layer(v)[0], x).reshape(x.numel(), x.numel())
    each = jacobian.view(6, x[0].numel(), 6, -1).diagonal(dim1=0, dim2=2).movedim(2, 0)
    torch.testing.assert_close(torch.linalg.slogdet(each).logabsdet, logdet, rtol=1e-9, atol=1e-9)
    assert jacobian.count_nonzero() == x.numel()  # no sample, and no statistic of the batch, sees another


def paper(x, layer, batch):
    """What FFJORD's code computes in training in its ``batch``-th step, from the formulas: value, log-determinant."""
    mean, variance = x.transpose(0, 1).flatten(1).mean(1), x.transpose(0, 1).flatten(1).var(1)
    used, spread = layer.running_mean.clone(), layer.running_var.clone()
    if layer.lag:
        used = (mean - (1 - layer.lag) * (mean - used)) / (1 - layer.lag**batch)
        spread = (variance - (1 - layer.lag) * (variance - spread)) / (1 - layer.lag**batch)
    shape = (1, -1, *[1] * (x.dim() - 2))
    log_scale = layer.gamma - 0.5 * torch.log(spread + layer.eps)
    z = (x - used.view(shape)) * log_scale.exp().view(shape) + layer.beta.view(shape)
    return z, (log_scale.sum() * x[0, 0].numel()).expand(len(x)), mean, variance


@pytest.mark.parametrize("lag", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 4, 2)])
def test_training_is_the_papers(shape, lag):
    layer, weight = filled(lag=lag), randn(*shape)
    for batch in (1, 2):
        x = (randn(*shape, seed=batch) * 2 + 1).requires_grad_()
        z, logdet, mean, variance = paper(x, layer, batch)
        mean = layer.running_mean + 0.1 * (mean - layer.running_mean)
        variance = layer.running_var + 0.1 * (variance - layer.running_var)
        inputs = (x, layer.gamma, layer.beta)
        wanted = torch.autograd.grad((z * weight).sum() + logdet.square().sum(), inputs)
        ours = layer(x)
        torch.testing.assert_close(ours, (z, logdet))
        torch.testing.assert_close(
            torch.autograd.grad((ours[0] * weight).sum() + ours[1].square().sum(), inputs), wanted
        )
        torch.testing.assert_close(layer.running_mean, mean)
        torch.testing.assert_close(layer.running_var, variance)


def test_state_and_evaluation():
    layer, x = filled(), randn(5, 3)
    layer(x)
    other = MovingBatchNorm(3).double()
    other.load_state_dict(layer.state_dict())
    before = layer.running_mean.clone()
    assert torch.equal(other.eval()(x)[0], layer.eval()(x)[0]) and torch.equal(layer.running_mean, before)
    assert sorted(layer.state_dict()) == ["batches", "beta", "gamma", "running_mean", "running_var"]


def test_one_value_empty_batches_and_refusals():
    layer = MovingBatchNorm(3)
    layer(torch.full((1, 3), 5.0))  # a single value has no unbiased variance: 0, not NaN
    torch.testing.assert_close(layer.running_var, torch.full((3,), 0.9))
    with pytest.raises(ValueError, match=r"x: an empty batch \[0, 3\] has no statistics"):
        layer(torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"x: expected 3 channels \[B, C, ...\], got \[2, 4\]"):
        layer(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"lag: expected a number in \[0, 1\), got 1"):
        MovingBatchNorm(3, lag=1)
    for run in (layer.eval(), layer.inverse):
        z, logdet = run(torch.zeros(0, 3, 2, 2))
        assert z.shape == (0, 3, 2, 2) and logdet.shape == (0,)


def test_compiles_and_takes_half_precision():
    x = torch.randn(16, 3, 2, 2)
    z, logdet = torch.compile(MovingBatchNorm(3), fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(z, MovingBatchNorm(3)(x)[0])
    half, more = MovingBatchNorm(3)(x.bfloat16())
    assert half.dtype == torch.bfloat16 and more.dtype == torch.float32
    torch.testing.assert_close(half.float(), z, rtol=2e-2, atol=2e-2)
