"""Planar flows: K units z + û tanh(w . z + b) in one call, both directions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.ops import _check
from fastflow.ops._backend import Family, choose
from fastflow.ops._op import accumulator, any_grad, op, reference_vjp, second_order
from fastflow.ops._root import log_derivative, tanh_root
from fastflow.ops._steps import check_steps, parameters_like

__all__ = ["planar"]

FAMILY = Family("planar", gpu=())

# --- meaning ----------------------------------------------------------------------------------------


def constrained(u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """(û [..., D], 1 + w . û = softplus(w . u) > 0 [...]): a unit that can be inverted, whatever u and w are."""
    p, square = (w * u).sum(-1), w.square().sum(-1)
    slope = F.softplus(p, threshold=50).clamp(min=torch.finfo(p.dtype).tiny)
    # m(p) - p = softplus(p) - 1 - p
    return u + ((F.softplus(-p, threshold=50) - 1) / square)[..., None] * w, slope


def reference(
    z: Tensor, u: Tensor, w: Tensor, b: Tensor, running: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """(z', logdet) in plain PyTorch."""
    dtype = accumulator(z.dtype)
    out, u, w, b = z.to(dtype), u.to(dtype), w.to(dtype), b.to(dtype)
    made, slope = constrained(u, w)
    logdet = z.new_zeros(z.shape[:1], dtype=dtype)
    for k in reversed(range(w.shape[-2])) if inverse else range(w.shape[-2]):
        a = (out * w[..., k, :]).sum(1) + b[..., k]
        a = tanh_root(a, slope[..., k]) if inverse else a
        step, change = torch.tanh(a)[:, None] * made[..., k, :], log_derivative(slope[..., k], a)
        out, logdet = (out - step, logdet - change) if inverse else (out + step, logdet + change)
    return out.to(z.dtype), logdet if running is None else running + logdet


# --- contract ---------------------------------------------------------------------------------------


@op(
    "planar_fwd(Tensor z, Tensor u, Tensor w, Tensor b, Tensor? running, bool inverse) -> (Tensor, Tensor)",
    backends=("cpu",),
)
def _forward(kernel, z, u, w, b, running, inverse):
    y = torch.empty_like(z)
    logdet = z.new_empty(z.shape[:1], dtype=accumulator(z.dtype))
    kernel(z, u, w, b, running, y, logdet, u.dim() == 3, inverse)
    return y, logdet


@op(
    "planar_bwd(Tensor z, Tensor u, Tensor w, Tensor b, Tensor gy, Tensor glogdet, bool inverse)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    backends=("cpu",),
)
def _backward(kernel, z, u, w, b, gy, glogdet, inverse):
    gz, (gu, gw, gb) = torch.empty_like(z), parameters_like(z, u.dim() == 3, u, w, b)
    kernel(z, u, w, b, gy, glogdet, gz, gu, gw, gb, u.dim() == 3, inverse)
    return gz, gu, gw, gb


# --- gradient ---------------------------------------------------------------------------------------


class _Planar(torch.autograd.Function):
    """Saves its inputs: the states between the units are computed again."""

    @staticmethod
    def forward(ctx, backend, z, u, w, b, running, inverse):
        ctx.backend, ctx.inverse = backend, inverse
        ctx.save_for_backward(z, u, w, b, running)
        return _forward[backend](z, u, w, b, running, inverse)

    @staticmethod
    def backward(ctx, gy, glogdet):
        z, u, w, b, running = saved = ctx.saved_tensors
        if second_order():

            def meaning(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
                return reference(*tensors, ctx.inverse)

            return None, *reference_vjp(meaning, saved, (gy, glogdet)), None
        gz, *grads = _backward[ctx.backend](z, u, w, b, gy, glogdet, ctx.inverse)
        grads = (g.to(p.dtype) for g, p in zip(grads, (u, w, b), strict=True))
        return None, gz, *grads, None if running is None else glogdet, None


# --- public -----------------------------------------------------------------------------------------


def planar(
    z: Tensor,
    u: Tensor,
    w: Tensor,
    b: Tensor,
    *,
    inverse: bool = False,
    logdet: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""K planar units :math:`z \leftarrow z + \hat u_k \tanh(w_k \cdot z + b_k)` and their log-determinant.

    .. math::
        \hat u = u + \frac{m(w \cdot u) - w \cdot u}{|w|^2} w, \quad m(p) = \mathrm{softplus}(p) - 1, \qquad
        \log\det = \sum_k \log\left(1 + (1 - \tanh^2)\, w_k \cdot \hat u_k\right)

    w . û = m(w . u) > -1 makes every unit invertible. The inverse has no closed form: w . z is the root of one
    monotone scalar equation per unit, found to the last digits. Backward computes the states between the units again:
    memory does not grow with K but for the parameters' gradients.

    Args:
        z: [B, D], D at least 1.
        u, w: [K, D] for all samples, or [B, K, D]: parameters of each sample, as an encoder makes them. A w of zeros
            has no û and gives NaN.
        b: [K] or [B, K].
        inverse: undo the units, the last one first, and the log-determinant of that direction.
        logdet: a running log-determinant [B] to add to.
        backend: a backend by name; None chooses.

    Returns:
        z' [B, D] in the dtype of z, and logdet [B] (float64 for float64, float32 for all else).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        BackendError: the backend asked for cannot serve the call.

    Paper: variational inference with normalizing flows, https://arxiv.org/abs/1505.05770.

    >>> z, u, w, b = torch.randn(5, 3), torch.randn(8, 3), torch.randn(8, 3), torch.randn(8)
    >>> x, logdet = planar(z, u, w, b)
    >>> back, minus = planar(x, u, w, b, inverse=True)
    >>> bool(torch.allclose(back, z, atol=1e-3)), bool(torch.allclose(minus, -logdet, atol=1e-3))
    (True, True)
    """
    check_steps(z, {"w": w, "u": u}, {"b": b})
    _check.logdet_like("logdet", logdet, z, accumulator(z.dtype))
    tensors = (z, u, w, b, logdet)
    backend = choose(FAMILY, tensors, backend)
    if backend == "reference":
        return reference(*tensors, inverse)
    if any_grad(*tensors):
        return _Planar.apply(backend, *tensors, inverse)
    return _forward[backend](*tensors, inverse)
