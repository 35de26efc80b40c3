"""Radial flows: K steps z + β̂ (z - c) / (α + |z - c|) in one call, both directions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.ops import _check
from fastflow.ops._backend import Family, choose
from fastflow.ops._op import accumulator, any_grad, op, reference_vjp, second_order
from fastflow.ops._steps import check_steps, parameters_like

__all__ = ["radial"]

FAMILY = Family("radial", gpu=())
ALPHA_MAPS = ("abs", "softplus")

# --- meaning ----------------------------------------------------------------------------------------


def reference(
    z: Tensor, centre: Tensor, alpha: Tensor, beta: Tensor, running: Tensor | None, absolute: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """(z', logdet) in plain PyTorch."""
    dtype = accumulator(z.dtype)
    out, centre, alpha, beta = (t.to(dtype) for t in (z, centre, alpha, beta))
    alpha = alpha.abs() if absolute else F.softplus(alpha, threshold=50)
    reach = F.softplus(beta, threshold=50)  # α + β̂
    steps, others = centre.shape[-2], z.shape[1] - 1
    logdet = z.new_zeros(z.shape[:1], dtype=dtype)
    for k in reversed(range(steps)) if inverse else range(steps):
        a, rho, x = alpha[..., k], reach[..., k], out - centre[..., k, :]
        r = (x.square().sum(1) + 1e-24).sqrt()  # at the centre the direction is nothing, and not 0 / 0
        r = _root(a, rho, r) if inverse else r
        h = 1 / (a + r)
        y = (rho - a) * h
        across = _log_one_plus(y, (r + rho) * h)
        along = _log_one_plus(y * a * h, (r * h).square() + (2 * r + rho) * h * a * h)
        change = others * across + along
        if inverse:
            out, logdet = out + ((a - rho) / (rho + r))[:, None] * x, logdet - change
        else:
            out, logdet = out + y[:, None] * x, logdet + change
    return out.to(z.dtype), logdet if running is None else running + logdet


def _root(alpha: Tensor, reach: Tensor, r: Tensor) -> Tensor:
    """The positive root of s^2 + (ρ - r) s - α r = 0, without cancellation."""
    q = reach - r
    root = (q.square() + 4 * alpha * r).sqrt()
    positive = q > 0
    return torch.where(positive, 2 * alpha * r / torch.where(positive, q + root, 1.0), (root - q) / 2)


def _log_one_plus(x: Tensor, one_plus: Tensor) -> Tensor:
    """log(1 + x), and near -1 by 1 + x as it is without cancellation."""
    near = x < -0.5
    return torch.where(near, torch.log(torch.where(near, one_plus, 1.0)), torch.log1p(torch.where(near, 0.0, x)))


# --- contract ---------------------------------------------------------------------------------------


@op(
    "radial_fwd(Tensor z, Tensor centre, Tensor alpha, Tensor beta, Tensor? running, bool absolute, bool inverse)"
    " -> (Tensor, Tensor)",
    backends=("cpu",),
)
def _forward(kernel, z, centre, alpha, beta, running, absolute, inverse):
    y = torch.empty_like(z)
    logdet = z.new_empty(z.shape[:1], dtype=accumulator(z.dtype))
    kernel(z, centre, alpha, beta, running, y, logdet, absolute, centre.dim() == 3, inverse)
    return y, logdet


@op(
    "radial_bwd(Tensor z, Tensor centre, Tensor alpha, Tensor beta, Tensor gy, Tensor glogdet, bool absolute,"
    " bool inverse) -> (Tensor, Tensor, Tensor, Tensor)",
    backends=("cpu",),
)
def _backward(kernel, z, centre, alpha, beta, gy, glogdet, absolute, inverse):
    gz, grads = torch.empty_like(z), parameters_like(z, centre.dim() == 3, centre, alpha, beta)
    kernel(z, centre, alpha, beta, gy, glogdet, gz, *grads, absolute, centre.dim() == 3, inverse)
    return gz, *grads


# --- gradient ---------------------------------------------------------------------------------------


class _Radial(torch.autograd.Function):
    """Saves its inputs: the states between the steps are computed again."""

    @staticmethod
    def forward(ctx, backend, z, centre, alpha, beta, running, absolute, inverse):
        ctx.backend, ctx.options = backend, (absolute, inverse)
        ctx.save_for_backward(z, centre, alpha, beta, running)
        return _forward[backend](z, centre, alpha, beta, running, absolute, inverse)

    @staticmethod
    def backward(ctx, gy, glogdet):
        z, centre, alpha, beta, running = saved = ctx.saved_tensors
        if second_order():

            def meaning(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
                return reference(*tensors, *ctx.options)

            return None, *reference_vjp(meaning, saved, (gy, glogdet)), None, None
        gz, *grads = _backward[ctx.backend](z, centre, alpha, beta, gy, glogdet, *ctx.options)
        grads = (g.to(p.dtype) for g, p in zip(grads, (centre, alpha, beta), strict=True))
        return None, gz, *grads, None if running is None else glogdet, None, None


# --- public -----------------------------------------------------------------------------------------


def radial(
    z: Tensor,
    centre: Tensor,
    alpha: Tensor,
    beta: Tensor,
    *,
    alpha_map: Literal["abs", "softplus"] = "abs",
    inverse: bool = False,
    logdet: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""K radial steps, each a push from a centre or a pull towards it, and their log-determinant.

    .. math::
        z \leftarrow z + \frac{\hat\beta_k}{\hat\alpha_k + r} (z - c_k), \quad r = |z - c_k|, \quad
        \hat\beta = \mathrm{softplus}(\beta) - \hat\alpha, \quad
        \log\det = \sum_k (D - 1) \log(1 + \hat\beta h) + \log(1 + \hat\beta h + \hat\beta h' r)

    with h = 1 / (α̂ + r) and h' = -h². β̂ > -α̂ makes every step invertible, in closed form. Backward computes the
    states between the steps again: memory does not grow with K but for the parameters' gradients.

    Args:
        z: [B, D], D at least 1.
        centre: c, [K, D] for all samples, or [B, K, D]: parameters of each sample, as an encoder makes them.
        alpha, beta: [K] or [B, K], any numbers.
        alpha_map: α̂ is |alpha|, or softplus(alpha).
        inverse: undo the steps, the last one first, and the log-determinant of that direction.
        logdet: a running log-determinant [B] to add to.
        backend: a backend by name; None chooses.

    Returns:
        z' [B, D] in the dtype of z, and logdet [B] (float64 for float64, float32 for all else).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        BackendError: the backend asked for cannot serve the call.

    Paper: variational inference with normalizing flows, https://arxiv.org/abs/1505.05770.

    >>> z, centre, alpha, beta = torch.randn(5, 3), torch.randn(8, 3), torch.rand(8) + 0.5, torch.randn(8)
    >>> x, logdet = radial(z, centre, alpha, beta)
    >>> back, minus = radial(x, centre, alpha, beta, inverse=True)
    >>> bool(torch.allclose(back, z, atol=1e-4)), bool(torch.allclose(minus, -logdet, atol=1e-3))
    (True, True)
    """
    check_steps(z, {"centre": centre}, {"alpha": alpha, "beta": beta})
    if alpha_map not in ALPHA_MAPS:
        raise ValueError(f"alpha_map: expected one of {', '.join(ALPHA_MAPS)}, got {alpha_map!r}")
    _check.logdet_like("logdet", logdet, z, accumulator(z.dtype))
    tensors, absolute = (z, centre, alpha, beta, logdet), alpha_map == "abs"
    backend = choose(FAMILY, tensors, backend)
    if backend == "reference":
        return reference(*tensors, absolute, inverse)
    if any_grad(*tensors):
        return _Radial.apply(backend, *tensors, absolute, inverse)
    return _forward[backend](*tensors, absolute, inverse)
