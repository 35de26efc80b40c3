"""Masked layers and networks: the staircase, its gradients, what is refused."""

import copy

import pytest
import torch

from fastflow import nn, ops
from fastflow.nn.made import hidden_degrees
from fastflow.testing.cli import able

BACKENDS = [*able("cpu"), "reference"]


def dense(made, x):
    """The formula of a MADE with masks written out, karpathy's way: x @ (W * M)^T, hidden units as they are stored."""
    degrees = [torch.empty(made.features, dtype=torch.long)]
    order = made.order[made.shuffle]
    degrees[0][made.shuffle] = torch.arange(1, made.features + 1)
    degrees += [getattr(made, f"degrees_{i}") for i in range(len(made.hidden))]
    y = x[:, made.order]
    for i, linear in enumerate(made.linears[:-1]):
        y = torch.relu(y @ (linear.weight * (degrees[i + 1][:, None] >= degrees[i])).T + linear.bias)
    out = degrees[0].repeat_interleave(made.params)
    last = made.linears[-1]
    y = y @ (last.weight * (out[:, None] > degrees[-1])).T + last.bias
    y = y.view(len(x), made.features, made.params)[:, made.order.argsort()]
    assert order.sort().values.equal(torch.arange(made.features))
    return y.transpose(1, 2).flatten(1) if made.packing == "chunked" else y.flatten(1)


@pytest.mark.parametrize("backend", dict.fromkeys(BACKENDS))
@pytest.mark.parametrize("strict", [False, True])
def test_masked_linear(backend, strict):
    torch.manual_seed(0)
    inside, outside = torch.randint(0, 6, (9,)), torch.randint(0, 6, (13,))
    layer = nn.MaskedLinear(inside, outside, strict=strict).double()
    mask = outside[:, None] > inside if strict else outside[:, None] >= inside
    assert layer.mask.equal(mask)
    x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    with ops.use_backend(backend):
        y = layer(x)
        gx, gw, gb = torch.autograd.grad(y.square().sum(), [x, layer.weight, layer.bias])
    truth = x @ (layer.weight * mask).T + layer.bias
    tx, tw, tb = torch.autograd.grad(truth.square().sum(), [x, layer.weight, layer.bias])
    for a, b in ((y, truth), (gx, tx), (gw, tw), (gb, tb)):
        torch.testing.assert_close(a, b)
    assert not gw[~mask].any()  # not a rounding beyond the staircase


MADES = {
    "plain": {},
    "reversed": {"order": "reversed"},
    "permuted": {"order": [3, 0, 4, 1, 2], "packing": "interleaved", "params": 3},
    "random": {"degrees": "random", "seed": 3},
    "resampled": {"num_masks": 4},
    "linear": {"hidden": ()},
    "narrow": {"hidden": (2, 3)},
}


@pytest.mark.parametrize("backend", dict.fromkeys(BACKENDS))
@pytest.mark.parametrize("options", MADES.values(), ids=MADES)
def test_made_is_its_formula(options, backend):
    torch.manual_seed(0)
    made = nn.MADE(5, **{"hidden": (16, 11), **options}).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    with ops.use_backend(backend):
        torch.testing.assert_close(made(x), dense(made, x))
        made.resample()
        torch.testing.assert_close(made(x), dense(made, x))


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("context", [0, 3])
def test_structural_zeros(direct, residual, context):
    """An output of a variable has a derivative of exactly 0 in that variable and all after it; and sees all before."""
    torch.manual_seed(0)
    order = torch.randperm(7)
    made = nn.MADE(
        7, (40, 40, 40), order=order, direct=direct, residual=residual, context_features=context, activation="tanh"
    ).double()  # fmt: skip
    for parameter in made.parameters():
        parameter.data.mul_(3)
    x, h = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64) if context else None
    jacobian = torch.autograd.functional.jacobian(lambda x: made(x, h).sum(0), x).view(2, 7, 4, 7).abs().amax((2,))
    for chunk in jacobian[:, order][:, :, order]:
        assert torch.equal(chunk != 0, torch.ones(7, 7, dtype=torch.bool).tril(-1))
    if context:  # which the first variable sees, too
        jacobian = torch.autograd.functional.jacobian(lambda h: made(x, h).sum(0), h)
        assert (jacobian.abs().amax((1, 2)) > 0).all()


def test_one_variable_sees_nothing_but_the_context():
    torch.manual_seed(0)
    made = nn.MADE(1, hidden=(8,), params=2)
    assert torch.equal(made(torch.zeros(3, 1)), made(torch.randn(3, 1)))
    made = nn.MADE(1, hidden=(8,), params=2, context_features=2, activation="tanh")
    h = torch.randn(3, 2)
    assert torch.equal(made(torch.zeros(3, 1), h), made(torch.randn(3, 1), h))
    assert not torch.equal(made(torch.zeros(3, 1), h), made(torch.zeros(3, 1), h + 1))


def test_degrees():
    assert hidden_degrees(6, 4).tolist() == [1, 1, 2, 2, 3, 3]
    assert hidden_degrees(4, 4, context=True).tolist() == [0, 1, 2, 3]
    assert hidden_degrees(2, 5).tolist() == [2, 4]  # narrower than D - 1: spread
    assert hidden_degrees(3, 1).tolist() == [0, 0, 0]
    made = nn.MADE(9, hidden=(50, 20), degrees="random", seed=5)
    assert made.degrees_1.min() >= made.degrees_0.min() >= 1 and made.degrees_1.max() <= 8
    assert made.degrees_0.equal(nn.MADE(9, hidden=(50, 20), degrees="random", seed=5).degrees_0)
    assert not made.degrees_0.equal(nn.MADE(9, hidden=(50, 20), degrees="random", seed=6).degrees_0)


def test_resampled_masks_come_back_with_a_checkpoint():
    torch.manual_seed(0)
    made, x = nn.MADE(6, hidden=(20,), num_masks=5, seed=7), torch.randn(3, 6)
    made.resample()
    made.resample()
    other = nn.MADE(6, hidden=(20,), num_masks=5, seed=1)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x), made(x)) and torch.equal(copy.deepcopy(made)(x), made(x))
    first = made(x)
    for one in (made, other):
        one.resample()
    assert torch.equal(other(x), made(x)) and not torch.equal(made(x), first)
    made.resample(2)
    assert torch.equal(made(x), first)


def test_weights_beyond_the_staircase_are_never_read():
    """Not even where they are NaN: of the reference this is too much to ask."""
    torch.manual_seed(0)
    x, weight, reach = torch.randn(3, 20), torch.randn(17, 20), torch.arange(17)
    truth = ops.masked_linear(x, weight, None, reach, backend="reference")
    weight[~ops.masked.staircase(reach, 20)] = torch.nan
    torch.testing.assert_close(ops.masked_linear(x, weight, None, reach), truth) if "cpu" in BACKENDS else None


def test_nan_is_not_silent():
    made = nn.MADE(3, hidden=(8, 8))
    assert torch.isnan(made(torch.tensor([[torch.nan, 0.0, 0.0]]))[:, [1, 2]]).all()


def test_empty_batch():
    made = nn.MADE(3, hidden=(8,), context_features=2)
    assert made(torch.empty(0, 3), torch.empty(0, 2)).shape == (0, 6)
    made(torch.empty(0, 3), torch.empty(0, 2)).sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": [0, 1, 1]}, "order: expected each of 0 ... 2 once, got [0, 1, 1]"),
        ({"order": [0.5, 1.0, 2.0]}, "order: expected each of 0 ... 2 once, got [0.5, 1.0, 2.0]"),
        ({"order": "backwards"}, "order: expected None, 'reversed' or a permutation"),
        ({"hidden": (4, 0)}, "hidden: expected at least 1, got 0"),
        ({"features": 0}, "features: expected at least 1, got 0"),
        ({"activation": "sine"}, "activation: expected one of relu"),
        ({"packing": "mixed"}, "packing: expected"),
        ({"degrees": "sorted"}, "degrees: expected 'sequential'"),
        ({"degrees": [torch.tensor([1, 2])]}, "degrees: expected a tensor for each width in (8, 8)"),
        ({"degrees": [torch.full((8,), 3), torch.ones(8)]}, "degrees[0]: expected 0 ... 2"),
        ({"residual": True}, "hidden: residual blocks"),
        ({"residual": True, "hidden": (8, 8, 8), "degrees": "random"}, "degrees: the units of a residual block"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError) as error:
        nn.MADE(**{"features": 3, "hidden": (8, 8), **options})
    assert message in str(error.value)


def test_refused_calls():
    made = nn.MADE(3, hidden=(8,), context_features=2)
    for x, h, message in (
        (torch.randn(4, 5), torch.randn(4, 2), r"x: expected \[B, 3\], got \[4, 5\]"),
        (torch.randn(4, 3), None, r"context: expected \[4, 2\], got None"),
        (torch.randn(4, 3), torch.randn(4, 3), r"context: expected \[4, 2\], got \[4, 3\]"),
        (torch.randn(4, 3), torch.randn(5, 2), r"context: expected \[4, 2\], got \[5, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            made(x, h)
        with pytest.raises(ValueError, match=message):
            made.inverse(x, h)
    x, w, b, r = torch.randn(4, 3), torch.randn(5, 3), torch.zeros(5), torch.zeros(5, dtype=torch.int64)
    for arguments, message in (
        ((torch.randn(4), [w], [b], [r]), "x: expected"),
        ((x, [torch.randn(5, 4)], [b], [r]), r"weights\[0\]: expected \[m, 3\]"),
        ((x, [w], [torch.zeros(4)], [r]), r"starts\[0\]: expected shape \[5\]"),
        ((x, [w], [b], []), "reaches: expected one for each"),
        ((x, [w], [b], [r.int()]), r"reaches\[0\]: expected \[5\] of torch.int64"),
        ((x, [w.double()], [b], [r]), r"weights\[0\]: float64 goes with float64 only"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            ops.masked_mlp(*arguments)
    if "cpu" in BACKENDS:
        for reach in ([0, 2, 1, 3, 3], [0, 1, 2, 3, 4]):
            with pytest.raises(ValueError, match="reach: expected numbers from 0 to 3 that do not decrease"):
                ops.masked_mlp(x, [w], [b], [torch.tensor(reach)], backend="cpu")


def test_half_precision_and_autocast():
    made, x = nn.MADE(4, hidden=(16,)), torch.randn(3, 4)
    assert made(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(made(x), made(x.float()))
    assert made(x).dtype == torch.float32


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    torch.manual_seed(0)
    made, x = nn.MADE(4, hidden=(16,), order="reversed"), torch.randn(3, 4)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), made(x))
    grads = [torch.autograd.grad(m(x).square().sum(), list(made.parameters())) for m in (compiled, made)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
