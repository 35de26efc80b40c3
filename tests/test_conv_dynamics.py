"""Convolutional dynamics and their tangents."""

import pytest
import torch
from torch.nn import functional as F

from fastflow.nn import ConvDynamics
from fastflow.ops.trace import exact_trace, hutchinson
from fastflow.testing.case import randn

LAYERS = ("concat", "concat_squash", "squash", "ignore")
ACTIVATIONS = ("softplus", "tanh", "elu", "silu", "swish")


def made(layer="concat", activation="softplus", channels=2, hidden=(3, 4)):
    dynamics = ConvDynamics(channels, hidden, layer, activation).double()
    for i, p in enumerate(dynamics.parameters()):
        p.data.copy_(randn(*p.shape, seed=i) * 0.5)
    if dynamics.beta is not None:
        dynamics.beta.data.copy_(torch.linspace(0.7, 1.4, len(hidden)))
    return dynamics


def ffjord(dynamics, t, x):
    """The network as ffjord's ``ODEnet`` has it, as one reads it there, of the same torch modules."""
    y = x
    time = t * x.new_ones(1, 1)
    for i, layer in enumerate(dynamics.net):
        y = layer.conv(torch.cat([t * torch.ones_like(y[:, :1]), y], 1) if dynamics.layer == "concat" else y)
        if dynamics.layer in ("concat_squash", "squash"):
            y = y * torch.sigmoid(layer.gate(time)).view(1, -1, 1, 1)
        if dynamics.layer == "concat_squash":
            y = y + layer.hyper(time).view(1, -1, 1, 1)
        if i + 1 < len(dynamics.net):
            y = {
                "softplus": F.softplus,
                "tanh": torch.tanh,
                "elu": F.elu,
                "silu": F.silu,
                "swish": lambda a, i=i: a * torch.sigmoid(dynamics.beta[i] * a),
            }[dynamics.activation](y)
    return y


@pytest.mark.parametrize("layer", LAYERS)
def test_value_is_the_papers_network(layer):
    dynamics, x = made(layer), randn(2, 2, 4, 3)
    torch.testing.assert_close(dynamics(0.3, x), ffjord(dynamics, 0.3, x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_products_are_those_of_autograd(layer, activation):
    """JVP == VJP for the same probe; value, trace and their gradients, with respect to time, input and parameters."""
    dynamics, x, e = made(layer, activation), randn(2, 2, 3, 5), randn(3, 2, 2, 3, 5, seed=1)
    x = x.requires_grad_()
    t = torch.tensor(0.3, dtype=x.dtype, requires_grad=True)
    inputs = [t, x, *dynamics.parameters()]
    weight, more = randn(2, 2, 3, 5, seed=2), randn(2, seed=3)

    value, products = dynamics.jvp(t, x, e)
    trace = (products * e).flatten(2).sum(2).mean(0)
    wanted = hutchinson(lambda x: ffjord(dynamics, t, x), x, probes=e)
    torch.testing.assert_close(value, wanted.value)
    torch.testing.assert_close(trace, wanted.trace)
    torch.testing.assert_close(hutchinson(lambda x: dynamics(t, x), x, probes=e).trace, trace)

    ours, theirs = (
        torch.autograd.grad((v * weight).sum() + (c * more).sum(), inputs, allow_unused=layer == "ignore")
        for v, c in ((value, trace), (wanted.value, wanted.trace))
    )
    torch.testing.assert_close(ours[1:], theirs[1:])
    if layer != "ignore":
        torch.testing.assert_close(ours[0], theirs[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives(activation):
    dynamics, e = made(activation=activation), randn(1, 1, 2, 2, 2, seed=1)
    assert torch.autograd.gradgradcheck(lambda x: dynamics.jvp(0.3, x, e), randn(1, 2, 2, 2).requires_grad_())


def test_exact_trace_by_unit_tangents():
    dynamics, x = made(), randn(2, 2, 2, 2)
    unit = torch.eye(8, dtype=x.dtype).view(8, 1, 2, 2, 2).expand(8, 2, 2, 2, 2)
    value, products = dynamics.jvp(0.3, x, unit)
    torch.testing.assert_close(
        ((products * unit).flatten(2).sum((0, 2))), exact_trace(lambda x: dynamics(0.3, x), x)[1]
    )


def test_layout_half_precision_and_empty_batches():
    dynamics, x, e = ConvDynamics(2, (8, 8)), torch.randn(3, 2, 4, 4), torch.randn(1, 3, 2, 4, 4)
    value, products = dynamics.jvp(0.1, x, e)
    assert value.is_contiguous(memory_format=torch.channels_last) and products.shape == e.shape
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = dynamics.jvp(0.1, x, e)
    torch.testing.assert_close(half.float(), value, rtol=3e-2, atol=3e-2)
    empty, none = dynamics.jvp(0.1, x[:0], e[:, :0])
    assert empty.shape == (0, 2, 4, 4) and none.shape == (1, 0, 2, 4, 4)
    assert dynamics(0.1, x[:0]).shape == (0, 2, 4, 4)


def test_refusals():
    dynamics = ConvDynamics(2, (4,))
    with pytest.raises(ValueError, match=r"x: expected \[B, 2, H, W\], got \[3, 1, 4, 4\]"):
        dynamics(0.0, torch.zeros(3, 1, 4, 4))
    with pytest.raises(ValueError, match=r"tangents: expected \[S, \*\[3, 2, 4, 4\]\] like x, got \[3, 2, 4, 4\]"):
        dynamics.jvp(0.0, torch.zeros(3, 2, 4, 4), torch.zeros(3, 2, 4, 4))
    with pytest.raises(ValueError, match="layer: expected one of concat, .*got 'blend'"):
        ConvDynamics(2, layer="blend")
    with pytest.raises(ValueError, match="activation: expected one of tanh, .*got 'relu'"):
        ConvDynamics(2, activation="relu")
    with pytest.raises(ValueError, match="channels, hidden: expected"):
        ConvDynamics(2, hidden=())
