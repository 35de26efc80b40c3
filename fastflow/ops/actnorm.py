"""ActNorm: one scale and one shift for every channel, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow.ops import _check
from fastflow.ops._backend import Family, choose
from fastflow.ops._op import accumulator, any_grad, op, reference_vjp, second_order

__all__ = ["actnorm"]

FAMILY = Family("actnorm")

# --- meaning ----------------------------------------------------------------------------------------


def reference(
    x: Tensor, log_scale: Tensor, bias: Tensor, running: Tensor | None, gain: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """(y, logdet) in plain PyTorch."""
    dtype = accumulator(x.dtype)
    shape = (1, -1, *[1] * (x.dim() - 2))
    a, b = gain * log_scale.to(dtype), bias.to(dtype).view(shape)
    positions = x.shape[2:].numel()
    if inverse:
        y, logdet = x.to(dtype) * torch.exp(-a).view(shape) - b, -positions * a.sum()
    else:
        y, logdet = (x.to(dtype) + b) * torch.exp(a).view(shape), positions * a.sum()
    logdet = logdet.expand(x.shape[0])
    return y.to(x.dtype), logdet if running is None else running + logdet


# --- contract ---------------------------------------------------------------------------------------


@op(
    "actnorm_fwd(Tensor x, Tensor log_scale, Tensor bias, Tensor? running, float gain, bool inverse)"
    " -> (Tensor, Tensor)"
)
def _forward(kernel, x, log_scale, bias, running, gain, inverse):
    y = torch.empty_like(x)
    logdet = x.new_empty(x.shape[:1], dtype=accumulator(x.dtype))
    kernel(x, log_scale, bias, running, y, logdet, gain, inverse)
    return y, logdet


@op(
    "actnorm_bwd(Tensor x, Tensor log_scale, Tensor bias, Tensor gy, Tensor glogdet, float gain, bool inverse)"
    " -> (Tensor, Tensor, Tensor)"
)
def _backward(kernel, x, log_scale, bias, gy, glogdet, gain, inverse):
    dtype, channels = accumulator(x.dtype), x.shape[1]
    gx = torch.empty_like(x)
    glog_scale, gbias = x.new_empty(channels, dtype=dtype), x.new_empty(channels, dtype=dtype)
    kernel(x, log_scale, bias, gy, glogdet, gx, glog_scale, gbias, gain, inverse)
    return gx, glog_scale, gbias


# --- gradient ---------------------------------------------------------------------------------------


class _ActNorm(torch.autograd.Function):
    """Saves its inputs."""

    @staticmethod
    def forward(ctx, backend, x, log_scale, bias, running, gain, inverse):
        ctx.backend, ctx.gain, ctx.inverse = backend, gain, inverse
        ctx.save_for_backward(x, log_scale, bias, running)
        return _forward[backend](x, log_scale, bias, running, gain, inverse)

    @staticmethod
    def backward(ctx, gy, glogdet):
        x, log_scale, bias, running = saved = ctx.saved_tensors
        if second_order():

            def meaning(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
                return reference(*tensors, ctx.gain, ctx.inverse)

            return None, *reference_vjp(meaning, saved, (gy, glogdet)), None, None
        gx, glog_scale, gbias = _backward[ctx.backend](
            x, log_scale, bias, _check.strided(gy), glogdet, ctx.gain, ctx.inverse
        )
        grunning = None if running is None else glogdet
        return None, gx, glog_scale.to(log_scale.dtype), gbias.to(bias.dtype), grunning, None, None


# --- public -----------------------------------------------------------------------------------------


def actnorm(
    x: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    *,
    gain: float = 1.0,
    inverse: bool = False,
    logdet: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""ActNorm :math:`y = (x + b_c)\, e^{g a_c}` and its log-determinant :math:`S g \sum_c a_c`.

    Args:
        x: [B, C, ...] with S positions, or [B, C]; any strides.
        log_scale: a [C].
        bias: b [C].
        gain: g.
        inverse: compute :math:`x = y e^{-g a} - b` instead, and the log-determinant of that direction.
        logdet: a running log-determinant [B] to add to.
        backend: a backend by name; None chooses.

    Returns:
        y of the shape, dtype and memory format of x, and logdet [B] (float64 for float64, float32 for all else).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        BackendError: the backend asked for cannot serve the call.

    Paper: Glow, https://arxiv.org/abs/1807.03039.

    >>> x, a, b = torch.randn(4, 6, 8, 8), torch.randn(6), torch.randn(6)
    >>> z, logdet = actnorm(x, a, b)
    >>> back, minus = actnorm(z, a, b, inverse=True)
    >>> bool(torch.allclose(back, x, atol=1e-5)), bool(torch.equal(minus, -logdet))
    (True, True)
    """
    _check.floating("x", x)
    for name, tensor in (("log_scale", log_scale), ("bias", bias)):
        _check.beside(name, tensor, x, (x.shape[1],))
    _check.logdet_like("logdet", logdet, x, accumulator(x.dtype))
    tensors = (x, log_scale, bias, logdet)
    backend = choose(FAMILY, tensors, backend)
    if backend == "reference":
        return reference(*tensors, gain, inverse)
    tensors = (_check.strided(x), *tensors[1:])
    if any_grad(*tensors):
        return _ActNorm.apply(backend, *tensors, gain, inverse)
    return _forward[backend](*tensors, gain, inverse)
