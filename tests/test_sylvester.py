"""Sylvester flows: what the paper says of them, and what can go wrong."""

import math

import pytest
import torch

from fastflow import nn, ops
from fastflow.ops.sylvester import VARIANTS
from fastflow.testing.case import randn

BACKENDS = ("cpu", "reference")


def inputs(variant, samples=5, steps=3, d=6, m=3, reflections=2, dtype=torch.float64, diag=1.0):
    """(z, what ops.sylvester takes beside it)"""
    outer, m = (samples, steps), m if variant == "orthogonal" else d
    made = {
        "full": 0.5 * randn(*outer, m, m, seed=1),
        "diag1": diag * randn(*outer, m, seed=2),
        "diag2": diag * randn(*outer, m, seed=3),
        "bias": randn(*outer, m, seed=4),
    }
    if variant == "orthogonal":
        made["q"] = randn(*outer, d, m, seed=5)
    if variant == "householder":
        made["vectors"] = randn(*outer, reflections, d, seed=5)
    return randn(samples, d).to(dtype), {name: t.to(dtype) for name, t in made.items()}


def published(z, full, diag1, diag2, bias, q=None, vectors=None):
    """The paper's formulas with matrices written out: products with R1, R2 and Q, one step after the other."""
    upper = torch.ones_like(full[0, 0]).triu(1)
    r1 = full * upper + torch.diag_embed(torch.tanh(diag1))
    r2 = full.transpose(2, 3) * upper + torch.diag_embed(torch.tanh(diag2))
    samples, d = z.shape
    identity = torch.eye(d, dtype=z.dtype)
    logdet = torch.zeros(samples, dtype=z.dtype)
    for k in range(full.shape[1]):
        if q is not None:
            q_k = q[:, k] / q[:, k].flatten(1).norm(dim=1)[:, None, None]
            for _ in range(60):
                gram = q_k.transpose(1, 2) @ q_k
                q_k = q_k @ (torch.eye(gram.shape[1], dtype=z.dtype) + 0.5 * (torch.eye(gram.shape[1]) - gram))
        elif vectors is not None:
            q_k = identity.expand(samples, d, d)
            for v in vectors[:, k].unbind(1):
                v = v / v.norm(dim=1, keepdim=True)
                q_k = q_k @ (identity - 2 * v[:, :, None] * v[:, None, :])
        else:
            q_k = (identity.flip(0) if k % 2 else identity).expand(samples, d, d)
        a = (r2[:, k] @ q_k.transpose(1, 2) @ z[:, :, None])[..., 0] + bias[:, k]
        z = z + (q_k @ r1[:, k] @ torch.tanh(a)[:, :, None])[..., 0]
        product = torch.diagonal(r1[:, k], dim1=1, dim2=2) * torch.diagonal(r2[:, k], dim1=1, dim2=2)
        logdet = logdet + torch.log((1 + (1 - torch.tanh(a) ** 2) * product).abs()).sum(1)
    return z, logdet


def both(variant, **options):
    return pytest.mark.parametrize(("variant", "backend"), [(v, b) for v in variant for b in BACKENDS], **options)


# --- acceptance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
@both(VARIANTS)
def test_logdet_is_that_of_the_jacobian(variant, backend, inverse):
    z, params = inputs(variant)
    _, logdet = ops.sylvester(z, **params, inverse=inverse, backend=backend)
    for b in range(len(z)):
        one = {name: t[b : b + 1] for name, t in params.items()}
        jacobian = torch.autograd.functional.jacobian(
            lambda x, one=one: ops.sylvester(x[None], **one, inverse=inverse, backend=backend)[0][0], z[b]
        )
        sign, truth = torch.linalg.slogdet(jacobian)
        assert sign == 1 and abs(truth - logdet[b]) < 1e-10


@both(VARIANTS)
def test_published_formulas(variant, backend):
    """Values, log-determinants and gradients."""
    for dtype, allowed in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        z, params = inputs(variant, d=16, m=5, dtype=dtype)
        leaves = {"z": z, **params}
        leaves = {name: t.requires_grad_() for name, t in leaves.items()}
        found, expected = ops.sylvester(**leaves, backend=backend), published(**leaves)
        weights = randn(*z.shape, seed=7).to(dtype), randn(len(z), seed=8).to(dtype)
        grads = [torch.autograd.grad(outputs, list(leaves.values()), weights) for outputs in (found, expected)]
        for a, b in zip((*found, *grads[0]), (*expected, *grads[1]), strict=True):
            assert (a - b).abs().max() <= allowed * max(1, b.abs().max().item())


def test_orthonormal():
    for dtype, allowed in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        q = ops.orthonormal(torch.randn(200, 64, 8, dtype=dtype))
        assert ops.orthogonality(q).max() <= allowed
    square = ops.orthonormal(torch.randn(20, 64, 64, dtype=torch.float64))
    assert ops.orthogonality(square).max() <= 1e-12
    # the nearest such matrix: the polar factor
    a = torch.randn(5, 3, dtype=torch.float64)
    u, _, v = torch.linalg.svd(a, full_matrices=False)
    assert torch.allclose(ops.orthonormal(a), u @ v, atol=1e-12)
    with pytest.raises(ValueError, match="M <= D"):
        ops.orthonormal(torch.randn(3, 5))


@pytest.mark.parametrize("shape", [(64, 8), (12, 12), (20, 19)])
def test_float32_is_near_float64(shape):
    """Square and nearly square matrices are ill-conditioned: the columns are made in float64 throughout."""
    d, m = shape
    z, params = inputs("orthogonal", samples=50, steps=1, d=d, m=m, dtype=torch.float32)
    out, _ = ops.sylvester(z, **params)
    wide, _ = ops.sylvester(z.double(), **{name: t.double() for name, t in params.items()})
    assert (out - wide).abs().max() < 2e-5


@both(VARIANTS)
def test_no_diagonal_no_volume(variant, backend):
    z, params = inputs(variant)
    params["diag1"] = torch.zeros_like(params["diag1"])
    for inverse in (False, True):
        assert not ops.sylvester(z, **params, inverse=inverse, backend=backend)[1].any()


def test_determinant_identity():
    a, b = randn(12, 4), randn(4, 12)
    left, right = torch.det(torch.eye(12) + a @ b), torch.det(torch.eye(4) + b @ a)
    assert abs(left / right - 1) < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reflection_turns_no_volume_round(backend):
    """det Q = -1 of a single reflection does not show: Q comes with its transpose."""
    z, params = inputs("householder", reflections=1)
    out, logdet = ops.sylvester(z, **params, backend=backend)
    expected = published(z, **params)
    assert torch.allclose(out, expected[0], atol=1e-12) and torch.allclose(logdet, expected[1], atol=1e-12)
    # two equal reflections are none: the triangular step without a reversal
    params = {name: t[:, :1] for name, t in params.items()}
    params["vectors"] = params["vectors"].expand(-1, -1, 2, -1)
    plain = {name: t for name, t in params.items() if name != "vectors"}
    for a, b in zip(
        ops.sylvester(z, **params, backend=backend), ops.sylvester(z, **plain, backend=backend), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-12)


@both(VARIANTS)
def test_inverse(variant, backend):
    for dtype, allowed in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        z, params = inputs(variant, samples=20, d=16, m=8, dtype=dtype, diag=0.5)
        out, logdet = ops.sylvester(z, **params, backend=backend)
        back, minus = ops.sylvester(out, **params, inverse=True, backend=backend)
        assert (back - z).abs().max() < allowed and (logdet + minus).abs().max() < 3 * allowed


# --- the edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@both(VARIANTS)
def test_saturated_diagonals(variant, backend, dtype):
    """At ±20 tanh is ±1 in float32, and the derivative of a step could vanish; at ±1000 in float64 as well."""
    for size in (20.0, 1000.0):
        z, params = inputs(variant, samples=40, dtype=dtype)
        for name in ("diag1", "diag2"):
            params[name] = size * params[name].sign()
        params["bias"][:20] = 0  # a = 0 is where it is worst
        z[:10] = 0
        leaves = {name: t.clone().requires_grad_() for name, t in {"z": z, **params}.items()}
        outputs = ops.sylvester(**leaves, backend=backend)
        grads = torch.autograd.grad([o.sum() for o in outputs], list(leaves.values()))
        assert all(t.isfinite().all() for t in (*outputs, *grads))
        # with a slope of 2e-6 in every step many z have nearly the same z': one of them is found
        back, minus = ops.sylvester(outputs[0].detach(), **params, inverse=True, backend=backend)
        again, _ = ops.sylvester(back, **params, backend=backend)
        assert (again - outputs[0]).abs().max() < 1e-5 and minus.isfinite().all()


def test_saturation_is_exact_in_float32():
    """1 + r1 r2 near 0 has the digits that a difference of float32 numbers would not have."""
    z, params = inputs("triangular", samples=30, dtype=torch.float32)
    params["diag1"], params["diag2"] = 6.5 + 0 * params["diag1"], -6.0 + 0 * params["diag2"]
    params["bias"] *= 1e-3
    params["full"] *= 0
    z *= 1e-3
    _, logdet = ops.sylvester(z, **params)
    _, truth = ops.sylvester(z.double(), **{name: t.double() for name, t in params.items()})
    assert (logdet - truth).abs().max() < 1e-6 * truth.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_that_are_not_independent(backend):
    z, params = inputs("orthogonal", d=6, m=3)
    good = params["q"].clone()
    for wrong in (good[3, 1, :, [0, 1, 0]], good[3, 1] * 0, good[3, 1] * torch.tensor([1.0, 1.0, 1e-14])):
        params["q"] = good.clone()
        params["q"][3, 1] = wrong
        with pytest.raises(ValueError, match=r"q: expected linearly independent columns.*sample 3, step 1.*1 of 15"):
            ops.sylvester(z, **params, backend=backend)
        with pytest.raises(ValueError, match="q: expected linearly independent"):
            ops.sylvester(z, **params, inverse=True, backend=backend)
    params["q"] = good
    with pytest.raises(ValueError, match="which 3 iterations make orthonormal"):
        ops.sylvester(z, **params, iterations=3, backend=backend)
    # a NaN that came of something else goes on, into its own sample alone
    z[2, 0] = math.nan
    _, logdet = ops.sylvester(z, **params, backend=backend)
    assert logdet.isnan().nonzero().flatten().tolist() == [2]


def test_columns_that_are_not_independent_in_a_compiled_program():
    """It cannot raise; it says NaN for the sample, as a GPU does."""
    z, params = inputs("orthogonal", d=6, m=3)
    params["q"][3, 1] = 0
    compiled = torch.compile(lambda z: ops.sylvester(z, **params), fullgraph=True, backend="aot_eager")
    assert compiled(z)[1].isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_orthonormal_columns_as_they_are(backend):
    z, params = inputs("orthogonal")
    expected = ops.sylvester(z, **params, backend=backend)
    params["q"] = ops.orthonormal(params["q"])
    found = ops.sylvester(z, **params, iterations=0, backend=backend)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_hidden_unit_is_a_planar_flow(backend):
    z, params = inputs("orthogonal", steps=1, d=4, m=1)
    r1, r2 = torch.tanh(params["diag1"][:, 0]), torch.tanh(params["diag2"][:, 0])
    w = params["q"][:, 0, :, 0] / params["q"][:, 0, :, 0].norm(dim=1, keepdim=True)
    h = torch.tanh((r2 * w * z).sum(1, keepdim=True) + params["bias"][:, 0])
    expected = z + r1 * w * h, torch.log(1 + (1 - h**2) * r1 * r2)[:, 0]
    for a, b in zip(ops.sylvester(z, **params, backend=backend), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@both(VARIANTS)
def test_one_dimension(variant, backend):
    z, params = inputs(variant, d=1, m=1)
    out, logdet = ops.sylvester(z, **params, backend=backend)
    expected = published(z, **params)
    assert torch.allclose(out, expected[0]) and torch.allclose(logdet, expected[1])
    assert torch.allclose(ops.sylvester(out, **params, inverse=True, backend=backend)[0], z)


@both(VARIANTS)
def test_empty_batch(variant, backend):
    z, params = inputs(variant)
    leaves = {name: t[:0].requires_grad_() for name, t in {"z": z, **params}.items()}
    for inverse in (False, True):
        out, logdet = ops.sylvester(**leaves, inverse=inverse, backend=backend)
        assert out.shape == (0, 6) and logdet.shape == (0,)
        grads = torch.autograd.grad(out.sum() + logdet.sum(), list(leaves.values()), allow_unused=True)
        assert all(g is None or g.shape == t.shape for g, t in zip(grads, leaves.values(), strict=True))


def test_zero_vectors_reflect_nothing():
    z, params = inputs("householder")
    vectors = params["vectors"].clone()
    params["vectors"] = torch.cat([vectors, torch.zeros_like(vectors)], 2).requires_grad_()
    out, logdet = ops.sylvester(z, **params)
    (grad,) = torch.autograd.grad(out.sum() + logdet.sum(), params["vectors"])
    expected = ops.sylvester(z, **{**params, "vectors": vectors})
    assert torch.allclose(out, expected[0]) and torch.allclose(logdet, expected[1])
    assert grad.isfinite().all() and not grad[:, :, 2:].any()


# --- parameters of all samples, memory, threads -------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
@both(VARIANTS)
def test_shared_parameters(variant, backend, inverse):
    z, params = inputs(variant)
    shared = {name: t[0].requires_grad_() for name, t in params.items()}
    each = {name: t.detach().expand(len(z), *t.shape).clone().requires_grad_() for name, t in shared.items()}
    found = ops.sylvester(z, **shared, inverse=inverse, backend=backend)
    expected = ops.sylvester(z, **each, inverse=inverse, backend=backend)
    grads = torch.autograd.grad([o.square().sum() for o in found], list(shared.values()))
    of_each = torch.autograd.grad([o.square().sum() for o in expected], list(each.values()))
    for a, b in zip((*found, *grads), (*expected, *(g.sum(0) for g in of_each)), strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saves_no_states(variant):
    """What is kept for the backward pass are the arguments and, of the inverse, its output."""
    z, params = inputs(variant, steps=64)
    leaves = {name: t.requires_grad_() for name, t in {"z": z, **params}.items()}
    for inverse in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            out, _ = ops.sylvester(**leaves, inverse=inverse)
        own = {t.untyped_storage().data_ptr() for t in (*leaves.values(), out)}
        others = [t for t in kept if t.untyped_storage().data_ptr() not in own]
        # but for a transposed copy of q
        assert sum(t.numel() for t in others) <= (leaves["q"].numel() if variant == "orthogonal" else 0)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_the_same_bits_on_any_number_of_threads(variant, inverse):
    z, params = inputs(variant, samples=70, d=33, m=9, steps=5, dtype=torch.float32, diag=0.3)
    leaves = {name: t.requires_grad_() for name, t in {"z": z, **params}.items()}
    threads, found = torch.get_num_threads(), []
    try:
        for n in (threads, 1, 3):
            torch.set_num_threads(n)
            outputs = ops.sylvester(**leaves, inverse=inverse)
            found.append((*outputs, *torch.autograd.grad([o.sum() for o in outputs], list(leaves.values()))))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_many_steps_stay_accurate():
    """More steps than have their parameters ready on the way back."""
    z, params = inputs("orthogonal", samples=2, steps=40, d=24, m=24, diag=0.2)
    leaves = {name: t.requires_grad_() for name, t in {"z": z, **params}.items()}
    grads = [
        torch.autograd.grad([o.sum() for o in ops.sylvester(**leaves, backend=b)], list(leaves.values()))
        for b in BACKENDS
    ]
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() <= 1e-9 * max(1, b.abs().max().item())


# --- compile, func, module --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_compile_and_func(variant):
    z, params = inputs(variant)
    z.requires_grad_()

    def run(z):
        out, logdet = ops.sylvester(z, **params)
        return out.sum() + logdet.sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(z), run(z))
    (expected,) = torch.autograd.grad(run(z), z)
    assert torch.equal(torch.autograd.grad(compiled(z), z)[0], expected)
    assert torch.allclose(torch.func.grad(run)(z.detach()), expected)


@pytest.mark.parametrize("amortised", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_module(variant, amortised):
    torch.manual_seed(0)
    flow = nn.Sylvester(6, 3, variant, ortho=2, householder=2, amortised=amortised)
    m = 2 if variant == "orthogonal" else 6
    size = 3 * (m * m + 3 * m + (0 if variant == "triangular" else 2 * 6))
    assert flow.context_features == (size if amortised else 0)
    z, context = torch.randn(50, 6), torch.randn(50, flow.context_features) if amortised else None
    out, logdet = flow(z, context)
    assert out.shape == z.shape and logdet.shape == (50,) and not torch.equal(out, z)
    back, minus = flow.inverse(out, context)
    # unlucky samples are ill-conditioned
    assert (back - z).abs().quantile(0.9) < 1e-4 and (logdet + minus).abs().quantile(0.9) < 1e-3
    if amortised:
        parts = flow.split(context)
        for a, b in zip(ops.sylvester(z, **parts._asdict()), (out, logdet), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(parts.full[:, 0, 0, 1], context[:, 1])
        if variant == "orthogonal":  # its columns lie one after the other, at the end
            assert torch.equal(parts.q[:, -1, :, -1], context[:, -6:])
    else:
        nn.Flow(nn.StandardNormal(6), flow).log_prob(z).sum().backward()
        assert flow.own.grad.isfinite().all() and flow.own.grad.any()
        again = nn.Sylvester(6, 3, variant, ortho=2, householder=2, amortised=False)
        again.load_state_dict(flow.state_dict())
        assert torch.equal(again(z)[0], out)


def test_density_integrates_to_one():
    torch.manual_seed(1)
    flow = nn.Flow(nn.StandardNormal(2), nn.Sylvester(2, 4, "orthogonal", ortho=2, amortised=False).double())
    with torch.no_grad():
        flow.bijection.own.mul_(3)
    line = torch.linspace(-8, 8, 400, dtype=torch.float64)
    x = torch.cartesian_prod(line, line)
    assert abs(flow.log_prob(x).exp().sum() * (line[1] - line[0]) ** 2 - 1) < 1e-3


Z = torch.zeros(4, 3)
TRIANGLE = (torch.zeros(4, 2, 3, 3), torch.zeros(4, 2, 3), torch.zeros(4, 2, 3), torch.zeros(4, 2, 3))
SMALL = (torch.zeros(4, 2, 2, 2), torch.zeros(4, 2, 2), torch.zeros(4, 2, 2), torch.zeros(4, 2, 2))


def run(z=Z, params=TRIANGLE, **options):
    return ops.sylvester(z, *params, **options)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (TypeError, "z: expected float32", lambda: run(Z.long())),
        (ValueError, r"z: expected \[B, D\]", lambda: run(Z[None])),
        (ValueError, r"full: expected \[B, K, M, M\]", lambda: run(params=(torch.zeros(4, 2, 3, 2), *TRIANGLE[1:]))),
        (ValueError, "full: expected D = 3 rows, because no q", lambda: run(params=SMALL)),
        (ValueError, "full: expected at most D = 2 rows", lambda: run(Z[:, :2], q=torch.zeros(4, 2, 2, 3))),
        (ValueError, r"full: expected shape \[3, 2, 3, 3\]", lambda: run(Z[:3])),
        (ValueError, r"diag1: expected shape \[4, 2, 3\]", lambda: run(params=(TRIANGLE[0], Z, *TRIANGLE[2:]))),
        (ValueError, r"bias: expected shape \[4, 2, 3\]", lambda: run(params=(*TRIANGLE[:3], Z))),
        (TypeError, "diag2: float64 goes with", lambda: run(params=(*TRIANGLE[:2], TRIANGLE[2].double(), TRIANGLE[3]))),
        (ValueError, r"q: expected shape \[4, 2, 3, 2\]", lambda: run(params=SMALL, q=torch.zeros(4, 2, 2, 3))),
        (ValueError, r"vectors: expected shape \[4, 2, 5, 3\]", lambda: run(vectors=torch.zeros(4, 2, 5, 4))),
        (ValueError, "vectors: expected either", lambda: run(q=TRIANGLE[0], vectors=TRIANGLE[0])),
        (ValueError, "iterations: expected 0 or more", lambda: run(iterations=-1)),
        (ValueError, "variant: expected one of", lambda: nn.Sylvester(3, 2, "planar")),
        (ValueError, "ortho: expected 1 to features = 3", lambda: nn.Sylvester(3, 2, ortho=4)),
        (ValueError, "householder: expected a whole number", lambda: nn.Sylvester(3, 2, "householder", householder=0)),
        (ValueError, "steps: expected a whole number of at least 1", lambda: nn.Sylvester(3, 0, "triangular")),
        (ValueError, r"context: expected \[B, 36\].* None", lambda: nn.Sylvester(3, 2, "triangular")(Z)),
        (ValueError, r"context: expected \[B, 36\], got \[4, 3\]", lambda: nn.Sylvester(3, 2, "triangular")(Z, Z)),
    ],
)
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()
