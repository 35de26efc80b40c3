"""Invertible 1x1 convolution: one matrix applied to the channels of every position.

The matrix comes from :mod:`fastflow.ops.conv1x1_weights`; vectors [B, C] are images of one position.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastflow.ops import _check
from fastflow.ops._backend import choose
from fastflow.ops._op import accumulator, any_grad, op, reference_vjp, second_order
from fastflow.ops.conv1x1_weights import FAMILY, dense_weights

__all__ = ["conv1x1"]

KERNEL_CHANNELS = 64  # above, the GEMM of torch is as fast as the kernel or faster

# --- meaning ----------------------------------------------------------------------------------------


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_logdet: Tensor, running: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(y, logdet) in plain PyTorch: a GEMM without a copy, y in the memory format of x."""
    dtype = accumulator(x.dtype)
    flat = x.flatten(2) if x.dim() > 2 else x[..., None]  # [B, C, S]
    with torch.autocast(x.device.type, enabled=False):
        matrix, values = weight.to(dtype), flat.to(dtype)
        shift = None if bias is None else bias.to(dtype)
        if x.dim() == 2 or flat.stride(1) < flat.stride(2):
            y = F.linear(values.transpose(1, 2), matrix, shift).transpose(1, 2)
        else:
            y = torch.bmm(matrix.expand(x.shape[0], -1, -1), values)
            y = y if shift is None else y + shift[:, None]
    positions = flat.shape[2]
    logdet = (positions * weight_logdet.to(dtype)).expand(x.shape[0])
    return y.to(x.dtype).view(x.shape), logdet if running is None else running + logdet


# --- contract ---------------------------------------------------------------------------------------


@op("conv1x1_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor weight_logdet, Tensor? running) -> (Tensor, Tensor)")
def _forward(kernel, x, weight, bias, weight_logdet, running):
    y = torch.empty_like(x)
    logdet = x.new_empty(x.shape[:1], dtype=accumulator(x.dtype))
    kernel(x, weight, bias, weight_logdet, running, y, logdet)
    return y, logdet


@op("conv1x1_bwd(Tensor x, Tensor weight, Tensor gy, Tensor glogdet) -> (Tensor, Tensor, Tensor, Tensor)")
def _backward(kernel, x, weight, gy, glogdet):
    dtype, channels = accumulator(x.dtype), x.shape[1]
    gx = torch.empty_like(x)
    gweight = x.new_empty((channels, channels), dtype=dtype)
    gbias = x.new_empty(channels, dtype=dtype)
    gweight_logdet = x.new_empty((), dtype=dtype)
    kernel(x, weight, gy, glogdet, gx, gweight, gbias, gweight_logdet)
    return gx, gweight, gbias, gweight_logdet


# --- gradient ---------------------------------------------------------------------------------------


class _Conv1x1(torch.autograd.Function):
    """Saves its inputs."""

    @staticmethod
    def forward(ctx, backend, x, weight, bias, weight_logdet, running):
        ctx.backend = backend
        ctx.save_for_backward(x, weight, bias, weight_logdet, running)
        return _forward[backend](x, weight, bias, weight_logdet, running)

    @staticmethod
    def backward(ctx, gy, glogdet):
        x, weight, bias, weight_logdet, running = saved = ctx.saved_tensors
        if second_order():
            return None, *reference_vjp(reference, saved, (gy, glogdet))
        gx, gweight, gbias, gweight_logdet = _backward[ctx.backend](x, weight, _check.strided(gy), glogdet)
        return (
            None,
            gx,
            gweight.to(weight.dtype),
            None if bias is None else gbias.to(bias.dtype),
            gweight_logdet.to(weight_logdet.dtype),
            None if running is None else glogdet,
        )


# --- public -----------------------------------------------------------------------------------------


def conv1x1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    weight_logdet: Tensor | None = None,
    *,
    logdet: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Invertible 1x1 convolution :math:`y_{b,:,s} = M x_{b,:,s} + c`; log-determinant :math:`S \log|\det M|`.

    The inverse is the same call with M⁻¹, -M⁻¹ c and -log|det M|.

    Args:
        x: [B, C, ...] with S positions, or vectors [B, C]; any strides.
        weight: M [C, C]; may be float32 where x is half precision.
        bias: c [C].
        weight_logdet: log|det M|, a tensor without dimensions, where it is known; None computes it, in float64.
        logdet: a running log-determinant [B] to add to.
        backend: a backend by name; None chooses.

    Returns:
        y of the shape, dtype and memory format of x, and logdet [B] (float64 for float64, float32 for all else).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; or that M is singular.
        BackendError: the backend asked for cannot serve the call.

    Paper: Glow, https://arxiv.org/abs/1807.03039.

    >>> x, weight = torch.randn(4, 6, 8, 8), torch.randn(6, 6)
    >>> z, logdet = conv1x1(x, weight)
    >>> back, minus = conv1x1(z, torch.linalg.inv(weight.double()).float())
    >>> bool(torch.allclose(back, x, atol=1e-3)), bool(torch.allclose(minus, -logdet, rtol=1e-4))
    (True, True)
    """
    _check.floating("x", x)
    channels = x.shape[1]
    _check.beside("weight", weight, x, (channels, channels))
    if bias is not None:
        _check.beside("bias", bias, x, (channels,))
    _check.logdet_like("logdet", logdet, x, accumulator(x.dtype))
    if weight_logdet is None:
        weight_logdet = dense_weights([weight])[2][0]
    _check.beside("weight_logdet", weight_logdet, x, ())
    tensors = (x, weight, bias, weight_logdet, logdet)
    backend = choose(FAMILY, tensors, backend)
    if backend == "reference" or channels > KERNEL_CHANNELS:
        return reference(*tensors)
    tensors = (_check.strided(x), *tensors[1:])
    if any_grad(*tensors):
        return _Conv1x1.apply(backend, *tensors)
    return _forward[backend](*tensors)
