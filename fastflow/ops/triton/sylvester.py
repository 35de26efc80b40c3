"""Sylvester flows in Triton: K steps z' = z + Q R1 tanh(R2 Q^T z + b), a program for every sample.

R1 and R2 are read where they lie, two triangles of one matrix, as a whole: what is wider than ``WIDEST`` is left to the
products of PyTorch. The columns Q of the orthogonal variant come orthonormal already. As csrc/cuda/sylvester.cu.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.ops._op import accumulator
from fastflow.ops._sylvester_columns import columns, columns_bwd, wide
from fastflow.ops.sylvester import GAP, VARIANTS, reference
from fastflow.ops.triton.numeric import divide
from fastflow.ops.triton.root import derivative, log_derivative, tanh_root, tanh_slope
from fastflow.ops.triton.rows import launch

WIDEST = 128
ORTHOGONAL, HOUSEHOLDER, TRIANGULAR = map(tl.constexpr, range(len(VARIANTS)))
LIMIT = tl.constexpr(GAP)


# --- Q ------------------------------------------------------------------------------------------------


@triton.jit
def _reflect(v, x):
    """x - 2 v (v.x) / (v.v); a vector of zeros reflects nothing."""
    square = tl.sum(v * v, axis=0)
    return x - v * divide(2.0 * tl.sum(v * x, axis=0), tl.where(square > 0.0, square, 1.0))


@triton.jit
def _turn(x, k, d, KIND: tl.constexpr, PD: tl.constexpr):
    """x, in odd steps of the triangular variant its reversal"""
    if KIND == TRIANGULAR:
        i = tl.arange(0, PD)
        other = tl.sum(tl.where(i[:, None] + i[None, :] == d - 1, x[None, :], 0.0), axis=1)
        x = tl.where(k % 2 == 1, other, x)
    return x


@triton.jit
def _vector(basis, i, d, PD: tl.constexpr):
    j = tl.arange(0, PD)
    return tl.load(basis + i * d + j, mask=j < d, other=0.0)


@triton.jit
def _tile(matrix, rows, columns, R: tl.constexpr, C: tl.constexpr):
    i, j = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    return tl.load(matrix + i * columns + j, mask=(i < rows) & (j < columns), other=0.0)


@triton.jit
def _project(x, basis, k, d, m, vectors, KIND: tl.constexpr, PD: tl.constexpr, PM: tl.constexpr):
    """Q^T x"""
    if KIND == ORTHOGONAL:
        y = tl.sum(_tile(basis, m, d, PM, PD) * x[None, :], axis=1)
    else:
        y = _turn(x, k, d, KIND, PD)
        if KIND == HOUSEHOLDER:
            for i in range(0, vectors):
                y = _reflect(_vector(basis, i, d, PD), y)
    return y


@triton.jit
def _embed(u, basis, k, d, m, vectors, KIND: tl.constexpr, PD: tl.constexpr, PM: tl.constexpr):
    """Q u"""
    if KIND == ORTHOGONAL:
        x = tl.sum(_tile(basis, m, d, PM, PD) * u[:, None], axis=0)
    else:
        x = _turn(u, k, d, KIND, PD)
        if KIND == HOUSEHOLDER:
            for i in range(0, vectors):
                x = _reflect(_vector(basis, vectors - 1 - i, d, PD), x)
    return x


@triton.jit
def _through_reflection(v, x, g):
    """(the gradient of v, that of the input x) from the gradient g of the reflection of x"""
    square = tl.sum(v * v, axis=0)
    f = tl.where(square > 0.0, divide(2.0, tl.where(square > 0.0, square, 1.0)), 0.0)
    vx, vg = tl.sum(v * x, axis=0), tl.sum(v * g, axis=0)
    return f * f * vx * vg * v - f * vx * g - f * vg * x, g - f * vg * v


@triton.jit
def _of_vectors(x, gy, u, gqu, basis, grad, k, d, vectors, KIND: tl.constexpr, PD: tl.constexpr):
    """The gradient of the vectors from those of y = Q^T x and Q u. A reflection is its own inverse: what went into one
    comes of what came out."""
    j = tl.arange(0, PD)
    for i in range(0, vectors):
        x = _reflect(_vector(basis, i, d, PD), x)
    for i in range(0, vectors):
        v = _vector(basis, vectors - 1 - i, d, PD)
        x = _reflect(v, x)
        of_v, gy = _through_reflection(v, x, gy)
        tl.store(grad + (vectors - 1 - i) * d + j, of_v, mask=j < d)
    tl.debug_barrier()
    for i in range(0, vectors):
        u = _reflect(_vector(basis, vectors - 1 - i, d, PD), u)
    for i in range(0, vectors):
        v = _vector(basis, i, d, PD)
        u = _reflect(v, u)
        of_v, gqu = _through_reflection(v, u, gqu)
        of_v += tl.load(grad + i * d + j, mask=j < d, other=0.0)
        tl.store(grad + i * d + j, of_v, mask=j < d)


# --- a step -------------------------------------------------------------------------------------------


@triton.jit
def _diagonal(raw):
    """(r, 1 - |r|, dr/draw): r = tanh(raw), no nearer to 1 or -1 than LIMIT"""
    h, d = tanh_slope(raw)
    gap = divide(d, 1.0 + tl.abs(h))
    near = gap < LIMIT
    r = tl.where(near, tl.where(h < 0.0, LIMIT - 1.0, 1.0 - LIMIT), h)
    return r, tl.where(near, LIMIT, gap), tl.where(near, 0.0, d)


@triton.jit
def _diagonals(diag1, diag2, m, PM: tl.constexpr):
    """(r1, r2, 1 + r1 r2, dr1/draw, dr2/draw)"""
    i = tl.arange(0, PM)
    r1, gap1, turn1 = _diagonal(tl.load(diag1 + i, mask=i < m, other=0.0))
    r2, gap2, turn2 = _diagonal(tl.load(diag2 + i, mask=i < m, other=0.0))
    product = r1 * r2
    return r1, r2, tl.where(product < 0.0, gap1 + gap2 - gap1 * gap2, 1.0 + product), turn1, turn2


@triton.jit
def _hidden(F, y, r1, r2, bias, PM: tl.constexpr):
    """(tanh(a), its slope, R1 tanh(a)) with a = R2 y + b"""
    i, j = tl.arange(0, PM)[:, None], tl.arange(0, PM)[None, :]
    a = r2 * y + bias + tl.sum(tl.where(i > j, F * y[:, None], 0.0), axis=0)
    h, s = tanh_slope(a)
    return h, s, r1 * h + tl.sum(tl.where(j > i, F * h[None, :], 0.0), axis=1)


@triton.jit
def _one(x, i, PM: tl.constexpr):
    """x[i]"""
    return tl.sum(tl.where(tl.arange(0, PM) == i, x, 0.0), axis=0)


@triton.jit
def _row(full, i, m, PM: tl.constexpr):
    j = tl.arange(0, PM)
    return tl.load(full + i * m + j, mask=j < m, other=0.0)


@triton.jit
def _solve(full, y, r1, r2, slope, bias, m, PM: tl.constexpr):
    """(tanh(a), its slope, R1 tanh(a)) of the a = R2 x + b with x + R1 tanh(a) = y, the last row first"""
    j = tl.arange(0, PM)
    a, h, u, s = bias, tl.zeros_like(y), tl.zeros_like(y), tl.zeros_like(y)
    for n in range(0, m):
        i = m - 1 - n
        F = _row(full, i, m, PM)
        after = tl.sum(tl.where(j > i, F * h, 0.0), axis=0)
        rest = _one(y, i, PM) - after
        found, its_slope = tanh_slope(tanh_root(_one(r2, i, PM) * rest + _one(a, i, PM), _one(slope, i, PM)))
        own = _one(r1, i, PM) * found
        h, s, u = tl.where(j == i, found, h), tl.where(j == i, its_slope, s), tl.where(j == i, own + after, u)
        a += tl.where(j < i, F * (rest - own), 0.0)
    return h, s, u


@triton.jit
def _of_log(r1, r2, slope, h, s):
    return divide(-2.0 * h * s * (r1 * r2), derivative(slope, h, s))


@triton.jit
def _through(F, gu, r1, r2, of_log, s, PM: tl.constexpr):
    """(ga, gy) from the gradient gu of R1 tanh(a), and ``of_log``, what comes of the log-determinant"""
    i, j = tl.arange(0, PM)[:, None], tl.arange(0, PM)[None, :]
    ga = s * (r1 * gu + tl.sum(tl.where(i < j, F * gu[:, None], 0.0), axis=0)) + of_log
    return ga, r2 * ga + tl.sum(tl.where(j < i, F * ga[None, :], 0.0), axis=1)


@triton.jit
def _through_inverse(full, q, r1, r2, slope, of_log, h, s, m, PM: tl.constexpr):
    """(gu, ga, gy) of the inverse: a lower triangular system, the first row first"""
    j = tl.arange(0, PM)
    w, gu, ga, gy = tl.zeros_like(q), tl.zeros_like(q), tl.zeros_like(q), tl.zeros_like(q)
    by = derivative(slope, h, s)
    for i in range(0, m):
        F = _row(full, i, m, PM)
        own = _one(s, i, PM) * _one(w, i, PM) - _one(of_log, i, PM)
        rest = -tl.sum(tl.where(j < i, F * ga, 0.0), axis=0)
        value = divide(_one(q, i, PM) - rest - _one(r2, i, PM) * own, _one(by, i, PM))
        p = _one(s, i, PM) * _one(r1, i, PM) * value + own
        gu, ga = tl.where(j == i, -value, gu), tl.where(j == i, -p, ga)
        gy = tl.where(j == i, -(rest + _one(r2, i, PM) * p), gy)
        w += tl.where(j > i, F * value, 0.0)
    return gu, ga, gy


# --- the kernels --------------------------------------------------------------------------------------


@triton.jit
def _forward(
    z, full, full_at, diag1, diag1_at, diag2, diag2_at, bias, bias_at, basis, basis_at, out, logdet,
    steps, d, m, vectors,
    KIND: tl.constexpr, INVERSE: tl.constexpr, PD: tl.constexpr, PM: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, PM), tl.arange(0, PD)
    x = tl.load(z + b * d + j, mask=j < d, other=0.0)
    total = tl.sum(tl.zeros_like(x), axis=0)
    full, bias = full + b * full_at[0], bias + b * bias_at[0]
    diag1, diag2 = diag1 + b * diag1_at[0], diag2 + b * diag2_at[0]
    if KIND != TRIANGULAR:
        basis += b * basis_at[0]
    for n in range(0, steps):
        k = steps - 1 - n if INVERSE else n
        own = basis
        if KIND != TRIANGULAR:
            own = basis + k * basis_at[1]
        r1, r2, slope, turn1, turn2 = _diagonals(diag1 + k * diag1_at[1], diag2 + k * diag2_at[1], m, PM)
        shift = tl.load(bias + k * bias_at[1] + i, mask=i < m, other=0.0)
        matrix = full + k * full_at[1]
        y = _project(x, own, k, d, m, vectors, KIND, PD, PM)
        if INVERSE:
            h, s, u = _solve(matrix, y, r1, r2, slope, shift, m, PM)
            x -= _embed(u, own, k, d, m, vectors, KIND, PD, PM)
            total -= tl.sum(log_derivative(slope, h, s), axis=0)
        else:
            h, s, u = _hidden(_tile(matrix, m, m, PM, PM), y, r1, r2, shift, PM)
            x += _embed(u, own, k, d, m, vectors, KIND, PD, PM)
            total += tl.sum(log_derivative(slope, h, s), axis=0)
    tl.store(out + b * d + j, x, mask=j < d)
    tl.store(logdet + b, total)


@triton.jit
def _backward(
    z, full, full_at, diag1, diag1_at, diag2, diag2_at, bias, bias_at, basis, basis_at, gout, glogdet, glogdet_at,
    gz, gfull, gdiag1, gdiag2, gbias, gbasis, states, steps, d, m, vectors,
    KIND: tl.constexpr, INVERSE: tl.constexpr, PD: tl.constexpr, PM: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, PM), tl.arange(0, PD)
    x = tl.load(z + b * d + j, mask=j < d, other=0.0)
    g = tl.load(gout + b * d + j, mask=j < d, other=0.0)
    gl = tl.load(glogdet + b * glogdet_at)
    full, bias = full + b * full_at[0], bias + b * bias_at[0]
    diag1, diag2 = diag1 + b * diag1_at[0], diag2 + b * diag2_at[0]
    if KIND != TRIANGULAR:
        basis += b * basis_at[0]
    if not INVERSE:  # the state before every step
        for k in range(0, steps):
            tl.store(states + (b * steps + k) * d + j, x, mask=j < d)
            own = basis
            if KIND != TRIANGULAR:
                own = basis + k * basis_at[1]
            r1, r2, slope, turn1, turn2 = _diagonals(diag1 + k * diag1_at[1], diag2 + k * diag2_at[1], m, PM)
            shift = tl.load(bias + k * bias_at[1] + i, mask=i < m, other=0.0)
            y = _project(x, own, k, d, m, vectors, KIND, PD, PM)
            h, s, u = _hidden(_tile(full + k * full_at[1], m, m, PM, PM), y, r1, r2, shift, PM)
            x += _embed(u, own, k, d, m, vectors, KIND, PD, PM)
        tl.debug_barrier()
    for n in range(0, steps):
        k = n if INVERSE else steps - 1 - n
        at = b * steps + k
        own = basis
        if KIND != TRIANGULAR:
            own = basis + k * basis_at[1]
        if not INVERSE:
            x = tl.load(states + at * d + j, mask=j < d, other=0.0)
        r1, r2, slope, turn1, turn2 = _diagonals(diag1 + k * diag1_at[1], diag2 + k * diag2_at[1], m, PM)
        shift = tl.load(bias + k * bias_at[1] + i, mask=i < m, other=0.0)
        F = _tile(full + k * full_at[1], m, m, PM, PM)
        y = _project(x, own, k, d, m, vectors, KIND, PD, PM)
        h, s, u = _hidden(F, y, r1, r2, shift, PM)
        q = _project(g, own, k, d, m, vectors, KIND, PD, PM)
        if INVERSE:
            of_log = -gl * _of_log(r1, r2, slope, h, s)
            gu, ga, gy = _through_inverse(full + k * full_at[1], q, r1, r2, slope, of_log, h, s, m, PM)
            g += _embed(gy, own, k, d, m, vectors, KIND, PD, PM)
            gqu = -g
            of_product = divide(-gl * s, derivative(slope, h, s))
        else:
            gu = q
            ga, gy = _through(F, gu, r1, r2, gl * _of_log(r1, r2, slope, h, s), s, PM)
            gqu = g
            g += _embed(gy, own, k, d, m, vectors, KIND, PD, PM)
            of_product = divide(gl * s, derivative(slope, h, s))
        tl.store(gdiag1 + at * m + i, turn1 * (gu * h + of_product * r2), mask=i < m)
        tl.store(gdiag2 + at * m + i, turn2 * (ga * y + of_product * r1), mask=i < m)
        tl.store(gbias + at * m + i, ga, mask=i < m)
        row, column = i[:, None], i[None, :]
        below = tl.where(column < row, y[:, None] * ga[None, :], 0.0)
        gF = below + tl.where(column > row, gu[:, None] * h[None, :], 0.0)
        tl.store(gfull + at * m * m + row * m + column, gF, mask=(row < m) & (column < m))
        if KIND == ORTHOGONAL:
            gQ = gy[:, None] * x[None, :] + u[:, None] * gqu[None, :]
            mask = (row < m) & (j[None, :] < d)
            tl.store(gbasis + at * m * d + row * d + j[None, :], gQ, mask=mask)
        elif KIND == HOUSEHOLDER:
            _of_vectors(x, gy, u, gqu, own, gbasis + at * vectors * d, k, d, vectors, KIND, PD)
        if INVERSE:
            x += _embed(u, own, k, d, m, vectors, KIND, PD, PM)
    tl.store(gz + b * d + j, g, mask=j < d)


# --- what the ops call --------------------------------------------------------------------------------


def _arguments(z: Tensor, params: tuple[Tensor | None, ...]) -> list:
    """The tensors in the type computed in, each with its strides"""
    arguments: list = [z.to(accumulator(z.dtype)).contiguous()]
    for p in params:
        one = None if p is None else wide(p)
        arguments += [one, (0, 0) if one is None else one.stride()[:2]]
    return arguments


def _sizes(z: Tensor, bias: Tensor, basis: Tensor | None) -> tuple[int, int, int, int]:
    return bias.shape[1], z.shape[1], bias.shape[2], 0 if basis is None else basis.shape[2]


def _padded(z: Tensor, bias: Tensor) -> dict[str, int]:
    return {"PD": triton.next_power_of_2(z.shape[1]), "PM": triton.next_power_of_2(bias.shape[2])}


def sylvester_fwd(
    z: Tensor, full: Tensor, diag1: Tensor, diag2: Tensor, bias: Tensor, basis: Tensor | None, out: Tensor,
    logdet: Tensor, variant: int, iterations: int, inverse: bool,
) -> None:  # fmt: skip
    params = full, diag1, diag2, bias, basis
    if z.shape[1] > WIDEST:
        for made, value in zip((out, logdet), reference(z, *params, variant, iterations, inverse), strict=True):
            made.copy_(value)
        return
    poison = None
    if VARIANTS[variant] == "orthogonal":
        basis, poison = columns(basis, iterations)
    arguments = _arguments(z, (full, diag1, diag2, bias, basis))
    made = out if out.dtype == arguments[0].dtype and out.is_contiguous() else torch.empty_like(arguments[0])
    launch(
        _forward, z.shape[0], z, *arguments, made, logdet, *_sizes(z, bias, basis),
        KIND=variant, INVERSE=inverse, **_padded(z, bias),
    )  # fmt: skip
    if made is not out:
        out.copy_(made)
    if poison is not None:
        logdet.add_(poison)


def sylvester_bwd(
    x: Tensor, full: Tensor, diag1: Tensor, diag2: Tensor, bias: Tensor, basis: Tensor | None, gout: Tensor,
    glogdet: Tensor, gx: Tensor, gfull: Tensor, gdiag1: Tensor, gdiag2: Tensor, gbias: Tensor, gbasis: Tensor | None,
    variant: int, iterations: int, inverse: bool,
) -> None:  # fmt: skip
    params, outputs = (full, diag1, diag2, bias, basis), (gx, gfull, gdiag1, gdiag2, gbias, gbasis)
    if x.shape[1] > WIDEST:
        made = _reference_bwd(x, params, gout, glogdet, variant, iterations, inverse)
    else:
        orthogonal = VARIANTS[variant] == "orthogonal"
        rows = columns(basis, iterations)[0] if orthogonal else basis
        arguments = _arguments(x, (full, diag1, diag2, bias, rows))
        dtype = arguments[0].dtype
        made = [None if g is None else g if g.dtype == dtype else g.new_empty(g.shape, dtype=dtype) for g in outputs]
        states = arguments[0].new_empty(0 if inverse else (*bias.shape[:2], x.shape[1]))
        launch(
            _backward, x.shape[0], x, *arguments, gout.to(dtype).contiguous(), glogdet, glogdet.stride(0), *made,
            states, *_sizes(x, bias, basis), KIND=variant, INVERSE=inverse, **_padded(x, bias),
        )  # fmt: skip
        if orthogonal:
            made[-1] = columns_bwd(basis, iterations, made[-1])
    for grad, one in zip(outputs, made, strict=True):
        if grad is not None and one is not grad:
            grad.copy_(one)


def _reference_bwd(
    x: Tensor, params: tuple[Tensor | None, ...], gout: Tensor, glogdet: Tensor, variant: int, iterations: int,
    inverse: bool,
) -> list[Tensor | None]:  # fmt: skip
    if inverse:  # x is its output
        x = reference(x, *params, variant, iterations, False)[0]
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in (x, *params)]
        outputs = reference(*leaves, variant, iterations, inverse)
        wanted = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(outputs, wanted, (gout, glogdet)))
    return [None if t is None else next(found) for t in leaves]
