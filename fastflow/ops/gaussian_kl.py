"""The KL divergence between diagonal Gaussians, summed per sample, in one pass over their parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastflow.ops import _check
from fastflow.ops._backend import choose
from fastflow.ops._op import accumulator, any_grad, op, reference_vjp, second_order
from fastflow.ops.gaussian import FAMILY, SCHEMA, Options, broadcast, gaussian_options, given, like, moments
from fastflow.ops.scale_map import ScaleMap

__all__ = ["gaussian_kl"]


# --- meaning ----------------------------------------------------------------------------------------


def reference(
    params: Tensor, raw: Tensor | None, prior: Tensor | None, prior_raw: Tensor | None, *options: Any
) -> tuple[Tensor]:
    """(KL(q || p) [B],) in plain PyTorch: (e^{2 r} - 1) / 2 - r + u^2 / 2, r = log s_q / s_p, u = (m_q - m_p) / s_p."""
    o = Options(*options)
    u, r = moments(params, raw, o)
    if prior is not None:
        mean, log_s = moments(prior, prior_raw, o)
        u, r = (u - mean) * torch.exp(-log_s), r - log_s
    return ((0.5 * (torch.expm1(2 * r) + u.square()) - r).flatten(1).sum(1),)


# --- contract ---------------------------------------------------------------------------------------

_TENSORS = "Tensor params, Tensor? raw, Tensor? prior, Tensor? prior_raw"


@op(f"gaussian_kl_fwd({_TENSORS}, {SCHEMA}) -> Tensor")
def _forward(kernel, params, raw, prior, prior_raw, *options):
    kl = params.new_empty(params.shape[:1], dtype=accumulator(params.dtype))
    kernel(params, raw, prior, prior_raw, kl, options)
    return kl


@op(f"gaussian_kl_bwd({_TENSORS}, Tensor gkl, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)")
def _backward(kernel, params, raw, prior, prior_raw, gkl, *options):
    tensors = (params, raw, prior, prior_raw)
    grads = tuple(like(t, params) for t in tensors)
    kernel(*tensors, gkl, *(given(g, t) for g, t in zip(grads, tensors, strict=True)), options)
    return grads


# --- gradient ---------------------------------------------------------------------------------------


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, params, raw, prior, prior_raw, *options):
        ctx.backend, ctx.options = backend, options
        ctx.save_for_backward(params, raw, prior, prior_raw)
        return _forward[backend](params, raw, prior, prior_raw, *options)

    @staticmethod
    def backward(ctx, gkl):
        saved = ctx.saved_tensors
        if second_order():
            grads = reference_vjp(lambda *t: reference(*t, *ctx.options), saved, (gkl,))
        else:
            grads = _backward[ctx.backend](*(_check.strided(t) for t in saved), gkl, *ctx.options)
            grads = [given(g, t) for g, t in zip(grads, saved, strict=True)]
        return None, *grads, *[None] * len(ctx.options)


# --- public -----------------------------------------------------------------------------------------


def gaussian_kl(
    params: Tensor,
    raw: Tensor | None = None,
    prior: Tensor | None = None,
    prior_raw: Tensor | None = None,
    *,
    packing: str = "interleaved",
    scale: str | ScaleMap = "exp",
    backend: str | None = None,
) -> Tensor:
    r"""KL(q || p) of diagonal Gaussians per sample.

    .. math:: \sum \log\frac{s_p}{s_q} + \frac{s_q^2 + (m_q - m_p)^2}{2 s_p^2} - \frac12

    Args:
        params, raw: mean and raw scale of q as :func:`fastflow.ops.gaussian.gaussian_log_prob` reads them: packed
            [B, 2C, ...], or the mean [B, C, ...] beside ``raw``.
        prior, prior_raw: those of p, packed or separate like q's; batch and positions of size 1 are broadcast, as is
            one value per channel. None is the standard normal.
        packing, scale: of both.
        backend: a backend by name; None chooses.

    Returns:
        [B] in nats (float64 for float64, float32 for all else).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        BackendError: the backend asked for cannot serve the call.

    Paper: auto-encoding variational Bayes, https://arxiv.org/abs/1312.6114.

    >>> mean, log_scale = torch.randn(4, 6), torch.randn(4, 6)
    >>> kl = gaussian_kl(mean, log_scale)
    >>> expected = 0.5 * ((2 * log_scale).exp() + mean**2 - 1) - log_scale
    >>> bool(torch.allclose(kl, expected.sum(1), rtol=1e-4))
    True
    """
    _check.floating("params", params)
    options = gaussian_options(raw, packing, scale)
    if raw is None and params.shape[1] % 2:
        raise ValueError(f"params: expected an even number of channels, got {list(params.shape)}")
    if raw is not None:
        _check.matching("raw", raw, params, of="params")
    if prior is None and prior_raw is not None:
        raise ValueError("prior: expected the mean beside prior_raw, got None")
    if prior is not None:
        if (prior_raw is None) != (raw is None):
            raise ValueError("prior_raw: expected a tensor exactly where raw is one: both packed or both separate")
        prior = broadcast("prior", prior, params, params.shape[1], "params")
        prior_raw = None if raw is None else broadcast("prior_raw", prior_raw, params, params.shape[1], "params")
    tensors = (params, raw, prior, prior_raw)
    backend = choose(FAMILY, tensors, backend)
    if backend == "reference":
        return reference(*tensors, *options)[0]
    tensors = tuple(_check.strided(t) for t in tensors)
    if any_grad(*tensors):
        return _KL.apply(backend, *tensors, *options)
    return _forward[backend](*tensors, *options)
