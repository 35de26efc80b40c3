"""Sylvester flows: K steps z' = z + Q R1 tanh(R2 Qᵀ z + b) in one call, every sample with parameters of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastflow.ops import _check
from fastflow.ops._backend import Family, choose, transformed
from fastflow.ops._op import accumulator, any_grad, op, reference_vjp, second_order, without_autocast
from fastflow.ops._root import log_derivative, tanh_root
from fastflow.ops.orthonormal import ITERATIONS, orthonormal_rows, orthonormal_tolerance, residual

__all__ = ["sylvester"]

FAMILY = Family("sylvester")
VARIANTS = ("orthogonal", "householder", "triangular")  # as enum Basis in csrc/sylvester.h
GAP = 1e-6  # between 1 and a diagonal element: as in csrc/sylvester.h

# --- meaning ----------------------------------------------------------------------------------------
# basis [B, K, R, D]: of "orthogonal" the columns of Q0 as rows, R = M; of "householder" the vectors, R of them.


def reference(
    z: Tensor,
    full: Tensor,
    diag1: Tensor,
    diag2: Tensor,
    bias: Tensor,
    basis: Tensor | None,
    variant: int,
    iterations: int,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """(z', logdet) in plain PyTorch."""
    dtype = accumulator(z.dtype)
    x, full, bias = z.to(dtype), full.to(dtype), bias.to(dtype)
    r1, r2, slope = diagonals(diag1.to(dtype), diag2.to(dtype))
    upper1 = full.triu(1) + torch.diag_embed(r1)
    upper2 = full.transpose(-1, -2).triu(1) + torch.diag_embed(r2)
    poison = torch.zeros_like(x[:, :1])
    if basis is not None:
        basis = basis.to(dtype)
    if VARIANTS[variant] == "orthogonal":
        basis = orthonormal_rows(basis, iterations)
        wrong = ~(residual(basis) <= orthonormal_tolerance(dtype))
        poison = torch.where(wrong, torch.nan, 0.0).sum(1, keepdim=True)
    logdet = poison.to(dtype)[:, 0]
    steps = range(full.shape[1])
    for k in reversed(steps) if inverse else steps:
        y = _project(x, basis, variant, k)
        if inverse:
            a = _solve(y, upper1[:, k], upper2[:, k], slope[:, k], bias[:, k])
        else:
            a = torch.einsum("bij,bj->bi", upper2[:, k], y) + bias[:, k]
        u = torch.einsum("bij,bj->bi", upper1[:, k], torch.tanh(a))
        sign = -1 if inverse else 1
        x = x + sign * _embed(u, basis, variant, k)
        logdet = logdet + sign * log_derivative(slope[:, k], a).sum(1)
    return x.to(z.dtype), logdet


def diagonals(diag1: Tensor, diag2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(r1, r2, 1 + r1 r2): r = tanh(d), no nearer to ±1 than GAP, and the sum without cancellation."""
    r1, r2 = (torch.tanh(d).clamp(GAP - 1, 1 - GAP) for d in (diag1, diag2))
    gap1, gap2 = ((2 * torch.sigmoid(-2 * d.abs())).clamp(min=GAP) for d in (diag1, diag2))  # 1 - |r|
    product = r1 * r2
    return r1, r2, torch.where(product < 0, gap1 + gap2 - gap1 * gap2, 1 + product)


def _project(x: Tensor, basis: Tensor | None, variant: int, k: int) -> Tensor:
    """Qᵀ x of step k, [B, M]"""
    if VARIANTS[variant] == "triangular":
        return x.flip(1) if k % 2 else x
    if VARIANTS[variant] == "orthogonal":
        return torch.einsum("bmd,bd->bm", basis[:, k], x)
    for h in range(basis.shape[2]):
        x = _reflect(x, basis[:, k, h])
    return x


def _embed(u: Tensor, basis: Tensor | None, variant: int, k: int) -> Tensor:
    """Q u of step k, [B, D]"""
    if VARIANTS[variant] == "triangular":
        return u.flip(1) if k % 2 else u
    if VARIANTS[variant] == "orthogonal":
        return torch.einsum("bmd,bm->bd", basis[:, k], u)
    for h in reversed(range(basis.shape[2])):
        u = _reflect(u, basis[:, k, h])
    return u


def _reflect(x: Tensor, v: Tensor) -> Tensor:
    """x - 2 v (v.x) / (v.v); a vector of zeros reflects nothing."""
    square = v.square().sum(1, keepdim=True)
    return x - v * (2 * (v * x).sum(1, keepdim=True) / torch.where(square > 0, square, 1))


def _solve(t: Tensor, upper1: Tensor, upper2: Tensor, slope: Tensor, bias: Tensor) -> Tensor:
    """The a = R2 y + b with y + R1 tanh(a) = t, [B, M]: one scalar equation after the other, the last row first."""
    a, y = {}, {}
    for i in reversed(range(t.shape[1])):
        rest, c = t[:, i], bias[:, i]
        for j in range(i + 1, t.shape[1]):
            rest = rest - upper1[:, i, j] * torch.tanh(a[j])
            c = c + upper2[:, i, j] * y[j]
        a[i] = tanh_root(upper2[:, i, i] * rest + c, slope[:, i])
        y[i] = rest - upper1[:, i, i] * torch.tanh(a[i])
    return torch.stack([a[i] for i in range(t.shape[1])], 1)


# --- contract ---------------------------------------------------------------------------------------

_TENSORS = "Tensor {}, Tensor full, Tensor diag1, Tensor diag2, Tensor bias, Tensor? basis"
_OPTIONS = "int variant, int iterations, bool inverse"


@op(f"sylvester_fwd({_TENSORS.format('z')}, {_OPTIONS}) -> (Tensor, Tensor)")
def _forward(kernel, z, full, diag1, diag2, bias, basis, variant, iterations, inverse):
    out = torch.empty_like(z)
    logdet = z.new_empty(z.shape[:1], dtype=accumulator(z.dtype))
    kernel(z, full, diag1, diag2, bias, basis, out, logdet, variant, iterations, inverse)
    return out, logdet


# x is what the steps start from: of the inverse its output
@op(
    f"sylvester_bwd({_TENSORS.format('x')}, Tensor gout, Tensor glogdet, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _backward(kernel, x, full, diag1, diag2, bias, basis, gout, glogdet, variant, iterations, inverse):
    gx, gfull, gdiag1, gdiag2, gbias = (
        t.new_empty(t.shape) for t in (x, full, diag1, diag2, bias)
    )  # of expanded parameters, too, a gradient for every sample
    gbasis = x.new_empty(0) if basis is None else basis.new_empty(basis.shape)
    kernel(
        x, full, diag1, diag2, bias, basis, gout, glogdet,
        gx, gfull, gdiag1, gdiag2, gbias, None if basis is None else gbasis, variant, iterations, inverse,
    )  # fmt: skip
    return gx, gfull, gdiag1, gdiag2, gbias, gbasis


# --- gradient ---------------------------------------------------------------------------------------


class _Sylvester(torch.autograd.Function):
    """Saves its inputs, the inverse its output instead of z: no state between the steps."""

    @staticmethod
    def forward(ctx, backend, z, full, diag1, diag2, bias, basis, *options):
        out, logdet = _forward[backend](z, full, diag1, diag2, bias, basis, *options)
        ctx.backend, ctx.options = backend, options
        ctx.save_for_backward(z, out if options[-1] else z, full, diag1, diag2, bias, basis)
        return out, logdet

    @staticmethod
    def backward(ctx, gout, glogdet):
        z, x, *params = ctx.saved_tensors
        if second_order():
            grads = reference_vjp(lambda *t: reference(*t, *ctx.options), (z, *params), (gout, glogdet))
        else:
            grads = _backward[ctx.backend](x, *params, gout, glogdet, *ctx.options)
            grads = grads if params[-1] is not None else (*grads[:-1], None)
        return None, *grads, *[None] * len(ctx.options)


# --- public -----------------------------------------------------------------------------------------


def sylvester(
    z: Tensor,
    full: Tensor,
    diag1: Tensor,
    diag2: Tensor,
    bias: Tensor,
    *,
    q: Tensor | None = None,
    vectors: Tensor | None = None,
    iterations: int = ITERATIONS,
    inverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""K Sylvester steps :math:`z \leftarrow z + Q R_1 \tanh(R_2 Q^\top z + b)` and their log-determinant.

    .. math:: \sum_{k,i} \log\bigl(1 + (1 - \tanh^2 a_i)\, r_{1i} r_{2i}\bigr), \quad a = R_2 Q^\top z + b

    :math:`R_1` is the strictly upper triangle of ``full`` with the diagonal :math:`r_1 = \tanh d_1`, :math:`R_2` the
    transpose of the strictly lower one with :math:`r_2 = \tanh d_2`; the diagonal of ``full`` is not used. A diagonal
    element stays 1e-6 away from ±1: every step is invertible, in float32 too. Q [D, M] has orthonormal columns:

    - ``q`` given (orthogonal): those nearest to its columns, by :func:`fastflow.orthonormal`;
    - ``vectors`` given (Householder): M = D and :math:`Q = \prod_h (I - 2 v_h v_h^\top / \|v_h\|^2)`, never formed; a
      vector of zeros reflects nothing;
    - neither (triangular): M = D, Q is the identity in steps 0, 2, ... and the reversal in steps 1, 3, ...

    Args:
        z: [B, D].
        full: [B, K, M, M], or [K, M, M] for all samples; likewise what follows.
        diag1, diag2: d_1, d_2 [B, K, M].
        bias: b [B, K, M].
        q: [B, K, D, M] of linearly independent columns.
        vectors: v [B, K, H, D].
        iterations: of Björck's method for ``q``; 0 takes q's columns as orthonormal already.
        inverse: z of z' instead, by one monotone scalar equation after the other, and the log-determinant of that.
        backend: a backend by name; None chooses.

    Returns:
        z' of the shape and dtype of z, and logdet [B] (float64 for float64, float32 for all else). The gradients need
        the arguments alone, whatever K is. Where columns of ``q`` have not become orthonormal, ‖QᵀQ - I‖_F above the
        root of a rounding, the sample's logdet is NaN; on a CPU that is an exception, which on a GPU would cost a wait.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        BackendError: the backend asked for cannot serve the call.

    Paper: Sylvester normalizing flows for variational inference, https://arxiv.org/abs/1803.05649.

    >>> B, K, D, M = 5, 4, 6, 2
    >>> z, q = torch.randn(B, D), torch.randn(B, K, D, M)
    >>> params = torch.randn(B, K, M, M), torch.randn(B, K, M), torch.randn(B, K, M), torch.randn(B, K, M)
    >>> out, logdet = sylvester(z, *params, q=q)
    >>> back, minus = sylvester(out, *params, q=q, inverse=True)
    >>> bool(torch.allclose(back, z, atol=1e-4)), bool(torch.allclose(minus, -logdet, atol=1e-4))
    (True, True)
    """
    variant, shared, basis = _check_arguments(z, full, diag1, diag2, bias, q, vectors, iterations)
    with without_autocast(z):
        return _run(z, full, diag1, diag2, bias, basis, (variant, shared, iterations, inverse), backend)


def _run(
    z: Tensor,
    full: Tensor,
    diag1: Tensor,
    diag2: Tensor,
    bias: Tensor,
    basis: Tensor | None,
    how: tuple[int, bool, int, bool],
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    variant, shared, iterations, inverse = how
    tensors = (z, full, diag1, diag2, bias, basis)
    if shared:
        if VARIANTS[variant] == "orthogonal" and iterations > 0:  # once for all samples
            basis, iterations = orthonormal_rows(basis.to(accumulator(basis.dtype)), iterations), 0
        tensors = (z, *(t if t is None else t.expand(z.shape[0], *t.shape) for t in (*tensors[1:5], basis)))
    options = (variant, iterations, inverse)
    chosen = choose(FAMILY, tensors, backend)
    if chosen == "reference":
        out, logdet = reference(*tensors, *options)
    else:
        # the gradient of the inverse starts from its output, which must not have been rounded to half precision
        start = z.to(accumulator(z.dtype)) if inverse else z
        tensors = (start, *map(_check.strided, tensors[1:]))
        if any_grad(*tensors):
            out, logdet = _Sylvester.apply(chosen, *tensors, *options)
        else:
            out, logdet = _forward[chosen](*tensors, *options)
        out = out.to(z.dtype)
    if VARIANTS[variant] == "orthogonal" and z.device.type == "cpu":
        _require_orthonormal(logdet, tensors[-1], iterations)
    return out, logdet


def _check_arguments(
    z: Tensor,
    full: Tensor,
    diag1: Tensor,
    diag2: Tensor,
    bias: Tensor,
    q: Tensor | None,
    vectors: Tensor | None,
    iterations: int,
) -> tuple[int, bool, Tensor | None]:
    """(the variant, are the parameters those of all samples?, basis)"""
    _check.floating("z", z)
    if z.dim() != 2:
        raise ValueError(f"z: expected [B, D], got {list(z.shape)}")
    _check.floating("full", full, 3)
    if full.dim() > 4 or full.shape[-1] != full.shape[-2]:
        raise ValueError(f"full: expected [B, K, M, M] or [K, M, M], got {list(full.shape)}")
    if q is not None and vectors is not None:
        raise ValueError("vectors: expected either q or vectors, got both")
    if iterations < 0:
        raise ValueError(f"iterations: expected 0 or more, got {iterations}")
    samples, d = z.shape
    steps, m = full.shape[-3], full.shape[-1]
    shared = full.dim() == 3
    outer = (steps,) if shared else (samples, steps)
    if m > d or (q is None and m != d):
        words = f"at most D = {d} rows" if q is not None else f"D = {d} rows, because no q is given,"
        raise ValueError(f"full: expected {words} for z of shape {list(z.shape)}, got {list(full.shape)}")
    for name, tensor, shape in (
        ("full", full, (m, m)),
        ("diag1", diag1, (m,)),
        ("diag2", diag2, (m,)),
        ("bias", bias, (m,)),
        ("q", q, (d, m)),
    ):
        if tensor is not None:
            _check.beside(name, tensor, z, (*outer, *shape))
    if q is not None:
        return VARIANTS.index("orthogonal"), shared, q.transpose(-1, -2)
    if vectors is not None:
        _check.floating("vectors", vectors, 2)
        reflections = vectors.shape[-2]
        _check.beside("vectors", vectors, z, (*outer, reflections, d))
        return VARIANTS.index("householder"), shared, vectors
    return VARIANTS.index("triangular"), shared, None


def _require_orthonormal(logdet: Tensor, basis: Tensor, iterations: int) -> None:
    """Where a NaN came of ``q``, says so: nothing is waited for on a CPU. A NaN of something else is let through."""
    if torch.compiler.is_compiling() or transformed() or torch._C._len_torch_dispatch_stack():
        return
    if not math.isnan(logdet.detach().sum().item()):
        return
    with torch.no_grad():
        dtype = accumulator(basis.dtype)
        found = residual(orthonormal_rows(basis.detach().to(dtype), iterations))
        wrong = ~(found <= orthonormal_tolerance(dtype)) & basis.isfinite().all(-1).all(-1)
        if wrong.any():
            b, k = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"q: expected linearly independent columns, which {iterations} iterations make orthonormal, got "
                f"‖QᵀQ - I‖ = {found[b, k]:.2g} after them for sample {b}, step {k}, and as bad for "
                f"{int(wrong.sum())} of {wrong.numel()} matrices in all"
            )
