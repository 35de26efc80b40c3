"""Affine coupling beyond the table: in place, compiled, transformed, mixed precision, other libraries, bad input."""

import threading

import FrEIA.modules as freia
import nflows.transforms as nflows_transforms
import normflows
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastflow
from fastflow import ops
from fastflow.ops import affine_coupling, scale_map


def images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- in place and into a given tensor -----------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("order", ["scale_first", "shift_first"])
def test_in_place_gives_the_same_numbers_and_gradients(backend, order):
    leaf, h = images(3, 6, 4, 5).requires_grad_(), images(3, 6, 4, 5, seed=1).requires_grad_()
    options = {"mask": slice(3, None), "order": order, "backend": backend}
    y, logdet = affine_coupling(leaf * 2, h, **options)
    expected = torch.autograd.grad((y.square().sum() + logdet.sin().sum()), (leaf, h))
    x = leaf * 2
    out, logdet_out = affine_coupling(x, h, out=x, **options)
    assert out is x and out.data_ptr() == x.data_ptr()
    torch.testing.assert_close((out, logdet_out), (y, logdet))
    torch.testing.assert_close(torch.autograd.grad(out.square().sum() + logdet_out.sin().sum(), (leaf, h)), expected)


def test_writes_into_the_half_of_an_existing_tensor():
    x, h = images(2, 3, 4, 4), images(2, 6, 4, 4, seed=1)
    whole = torch.zeros(2, 6, 4, 4)
    version = whole._version
    y, _ = affine_coupling(x, h, out=whole[:, 3:])
    assert torch.equal(whole[:, 3:], affine_coupling(x, h)[0]) and not whole[:, :3].any()
    assert whole._version > version


def test_out_is_checked():
    x, h = images(2, 3), images(2, 6, seed=1)
    with pytest.raises(ValueError, match=r"out: expected \[2, 3\]"):
        affine_coupling(x, h, out=torch.empty(2, 4))
    with pytest.raises(ValueError, match="only out=x is differentiable"):
        affine_coupling(x, h.requires_grad_(), out=torch.empty(2, 3))
    with pytest.raises(ValueError, match="overlaps"):
        affine_coupling(x[:, :2], h[:, :4].detach(), out=x[:, 1:])


def test_in_place_change_of_a_saved_input_is_an_error():
    x, h = images(2, 3), images(2, 6, seed=1).requires_grad_()
    y, _ = affine_coupling(x, h)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- PyTorch's machinery ------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, slice(2, None), "checkerboard_odd"])
def test_opcheck(mask):
    x = images(2, 4, 3, 4)
    index, where, changed = ops.coupling._where(x, mask)
    options = (0, 2, False, False, 1.0, list(scale_map("sigmoid2").constants), where)
    h, running = images(2, 2 * changed, 3, 4, seed=1), images(2, seed=2)
    fwd = torch.ops.fastflow.coupling_fwd.cpu
    torch.library.opcheck(fwd, (x, h, None, None, index, running, *options))
    bwd = torch.ops.fastflow.coupling_bwd.cpu
    torch.library.opcheck(bwd, (x, h, None, None, index, x, running, False, *options))
    out = torch.ops.fastflow.coupling_fwd_out.cpu
    torch.library.opcheck(out, (x, h, None, None, index, running, torch.empty_like(x), *options))


@pytest.mark.parametrize("options", [{}, {"inverse": True, "save": "output"}, {"mask": slice(2, None)}])
def test_compiles_without_a_graph_break(options):
    def f(x, h, running):
        y, logdet = affine_coupling(x * 2, h, logdet=running, **options)
        return y.square().sum() + logdet.sum()

    x = images(3, 4, 5, 5).requires_grad_()
    h = images(3, 4 if "mask" in options else 8, 5, 5, seed=1).requires_grad_()
    running = images(3, seed=2)
    compiled = torch.compile(f, fullgraph=True)
    expected, value = f(x, h, running), compiled(x, h, running)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, (x, h)), torch.autograd.grad(expected, (x, h)))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, h, running), expected)


def test_transforms_of_torch_func_run_on_the_reference():
    x, h = images(3, 4), images(3, 8, seed=1)

    def one(x, h):
        return affine_coupling(x[None], h[None])[0][0]

    y, logdet = affine_coupling(x, h)
    torch.testing.assert_close(torch.func.vmap(one)(x, h), y)
    jacobian = torch.func.vmap(torch.func.jacrev(one))(x, h)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, logdet)
    tangent = torch.func.jvp(lambda v: affine_coupling(v, h)[0], (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, torch.func.vmap(torch.diagonal)(jacobian))
    with pytest.raises(fastflow.BackendError, match="torch.func"):
        torch.func.vmap(lambda v: affine_coupling(v[None], h[:1], backend="cpu")[0])(x)


def test_checkpoint_and_threads():
    x, h = images(64, 4, 8, 8).requires_grad_(), images(64, 8, 8, 8, seed=1).requires_grad_()

    def f(x, h):
        y, logdet = affine_coupling(x, h)
        return y.sum() + logdet.sum()

    expected = torch.autograd.grad(f(x, h), (x, h))
    again = torch.utils.checkpoint.checkpoint(f, x, h, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, (x, h)), expected)
    results = [None] * 4

    def work(i):
        results[i] = [torch.autograd.grad(f(x, h), (x, h)) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(torch.equal(a, b) for result in results for pair in result for a, b in zip(pair, expected, strict=True))


def test_autocast_keeps_the_latent_in_float32():
    conv = torch.nn.Conv2d(3, 6, 3, padding=1)
    x = images(2, 6, 4, 4).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        h = conv(x[:, :3])
        assert h.dtype == torch.bfloat16
        y, logdet = affine_coupling(x, h, mask=slice(3, None))
    assert y.dtype == torch.float32 and logdet.dtype == torch.float32
    (y.sum() + logdet.sum()).backward()
    assert x.grad.dtype == torch.float32 and conv.weight.grad.isfinite().all()


def test_offsets_beyond_31_bits():
    far = 2**31 + 8
    torch.utils.deterministic.fill_uninitialized_memory = False  # 4 GB of address space, of which two pages are touched
    x = torch.empty(far + 64, dtype=torch.float16).as_strided((2, 4, 3), (far, 3, 1))
    small = images(2, 4, 3).half()
    x.copy_(small)
    h = images(2, 8, 3, seed=1).half()
    torch.testing.assert_close(affine_coupling(x, h), affine_coupling(small, h))


# --- shapes and strides -------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_and_stride(data):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=0, max_size=3), label="positions")
    b, c = data.draw(st.integers(0, 40), label="batch"), data.draw(st.integers(1, 9), label="channels")
    packing = data.draw(st.sampled_from(ops.packing.PACKINGS[:4]), label="packing")
    inverse = data.draw(st.booleans(), label="inverse")

    def tensor(name, channels):
        order = data.draw(st.permutations(range(2 + len(sizes))), label=f"{name} order of dimensions")
        step = data.draw(st.integers(1, 3), label=f"{name} step")
        shape = [b, channels, *sizes]
        base = images(*(shape[d] * step for d in order), seed=len(name))[tuple([slice(None, None, step)] * len(shape))]
        return base.permute([order.index(d) for d in range(len(shape))])

    x, h = tensor("x", c), tensor("params", 2 * c)
    y, logdet = affine_coupling(x, h, packing=packing, inverse=inverse, backend="cpu")
    expected = affine_coupling(x.double(), h.double(), packing=packing, inverse=inverse, backend="reference")
    torch.testing.assert_close((y.double(), logdet.double()), expected, rtol=1e-5, atol=1e-5)


# --- the conventions of other libraries ---------------------------------------------------------------


class Fixed(torch.nn.Module):
    """A network that returns what it was given."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, *_):
        return self.value


@pytest.mark.parametrize(
    ("scale_map", "ours"), [("exp", "exp"), ("sigmoid", "reciprocal"), ("sigmoid_inv", "sigmoid2")]
)
def test_normflows(scale_map, ours):
    if ours == "reciprocal":
        ours = ops.ScaleMap("sigmoid", offset=2.0, reciprocal=True)
    z, h = images(5, 3), images(5, 6, seed=1)
    layer = normflows.flows.AffineCoupling(Fixed(h), scale_map=scale_map)
    (_, z2), logdet = layer([z, z])
    torch.testing.assert_close(affine_coupling(z, h, scale=ours), (z2, logdet))
    (_, back), logdet = layer.inverse([z, z])
    torch.testing.assert_close(affine_coupling(z, h, scale=ours, inverse=True), (back, logdet))


def test_nflows():
    x, h = images(5, 4), images(5, 4, seed=1)
    layer = nflows_transforms.AffineCouplingTransform(torch.tensor([-1, 1, -1, 1]), lambda *_: Fixed(h))
    ours = {"packing": "chunk_ts", "scale": "sigmoid2_eps", "mask": torch.tensor([1, 3])}
    torch.testing.assert_close(affine_coupling(x, h, **ours), layer(x))
    torch.testing.assert_close(affine_coupling(x, h, inverse=True, **ours), layer.inverse(x))


def test_freia_glow():
    h = images(5, 4, seed=1)
    block = freia.GLOWCouplingBlock([(4,)], subnet_constructor=lambda *_: Fixed(h), clamp=1.7)
    x = images(5, 4)
    (y,), jac = block([x])
    scale = ops.ScaleMap("atan", amplitude=1.7 * 0.636)
    y1, logdet = affine_coupling(x, h, packing="chunk_st", scale=scale, mask=slice(0, 2))
    both, logdet = affine_coupling(y1, h, packing="chunk_st", scale=scale, mask=slice(2, 4), logdet=logdet)
    torch.testing.assert_close((both, logdet), (y, jac))


def test_freia_all_in_one():
    h = images(5, 4, seed=1)
    block = freia.AllInOneBlock([(4,)], subnet_constructor=lambda *_: Fixed(h.clone()), affine_clamping=2.0)
    with torch.no_grad():
        block.global_offset.zero_()
        block.global_scale.copy_(2 * torch.log(torch.expm1(0.5 * torch.tensor(10.0))))  # 0.1 softplus(a, beta=1/2) = 1
    x = images(5, 4)
    (y,), jac = block([x])
    scale = ops.ScaleMap("tanh", gain=0.1, amplitude=2.0)
    ours, logdet = affine_coupling(x, h, packing="chunk_st", scale=scale, shift_gain=0.1, mask=slice(2, 4))
    permuted = ours @ block.w_perm.squeeze().T
    torch.testing.assert_close((permuted, logdet), (y, jac), rtol=1e-5, atol=1e-5)


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, "x: expected float32"),
        ({"x": [1.0]}, "x: expected a tensor, got list"),
        ({"x": torch.ones(3)}, "x: expected at least 2 dimensions"),
        ({"params": torch.ones(2, 5)}, r"params: expected shape \[2, 6\]"),
        ({"params": torch.ones(3, 6)}, r"params: expected shape \[2, 6\] for x of shape \[2, 3\], got \[3, 6\]"),
        ({"params": torch.ones(2, 6, device="meta")}, "params: expected device cpu like x, got meta"),
        ({"params": torch.ones(2, 6, dtype=torch.float64)}, "params: float64 goes with float64 only"),
        ({"raw": torch.ones(2, 6), "params": torch.ones(2, 3)}, r"raw: expected shape \[2, 3\]"),
        ({"packing": "halves"}, "packing: expected one of interleaved"),
        ({"scale": "sigmoid"}, "scale_map: expected one of none, exp"),
        ({"order": "first"}, "order: expected 'scale_first' or"),
        ({"save": "x"}, "save: expected 'input' or 'output'"),
        ({"mask": "checkerboard"}, "mask: expected None, a slice"),
        ({"mask": "checkerboard_odd"}, "mask: a checkerboard needs x"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, r"mask: expected a bool tensor \[3\], got \[4\]"),
        ({"mask": torch.tensor([[0]])}, "mask: expected int64 channel indices"),
        ({"mask": torch.tensor([0, 7]), "params": torch.ones(2, 4)}, "channel index 7 reaches outside"),
        ({"mask": slice(0, 3, 2)}, "mask: expected a slice of step 1"),
        ({"logdet": torch.ones(3)}, r"logdet: expected \[2\] of torch.float32"),
        ({"backend": "gpu"}, "backend: expected one of cpu, cuda, triton, reference, got 'gpu'"),
        (
            {"x": torch.ones(2, 3, device="meta"), "params": torch.ones(2, 6, device="meta"), "backend": "cpu"},
            "is on meta",
        ),
    ],
)
def test_bad_input_names_the_argument(change, message):
    arguments = {"x": torch.ones(2, 3), "params": torch.ones(2, 6), **change}
    with pytest.raises((ValueError, TypeError, fastflow.BackendError), match=message):
        affine_coupling(**arguments)
