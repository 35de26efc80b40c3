"""Diagonal Gaussians: log-likelihood of a latent, and a tempered sample with its log-likelihood, in one pass each.

Mean and raw scale are read where the prior network wrote them. The KL divergence is in ``gaussian_kl.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflow.ops import _check
from fastflow.ops._backend import Family, choose
from fastflow.ops._op import accumulator, any_grad, op, reference_vjp, second_order
from fastflow.ops.packing import PACKINGS, packing_code, unpack
from fastflow.ops.scale_map import KINDS, ScaleMap, log_scale, scale_map

__all__ = ["gaussian_log_prob", "gaussian_sample"]

FAMILY = Family("gaussian")

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Options(NamedTuple):
    """What a kernel is told beside its tensors."""

    packing: int
    kind: int
    reciprocal: bool
    constants: list[float]


SCHEMA = "int packing, int kind, bool reciprocal, float[] constants"  # of Options


# --- meaning ----------------------------------------------------------------------------------------


def moments(params: Tensor, raw: Tensor | None, o: Options) -> tuple[Tensor, Tensor]:
    """(mean, log s) in the accumulator's dtype."""
    mean, h = unpack(params, raw, PACKINGS[o.packing])
    dtype = accumulator(params.dtype)
    log_s = log_scale(KINDS[o.kind], tuple(o.constants), h.to(dtype), o.constants[2])
    return mean.to(dtype), -log_s if o.reciprocal else log_s


def reference(
    z: Tensor, params: Tensor | None, raw: Tensor | None, running: Tensor | None, *options: Any
) -> tuple[Tensor]:
    """(log N(z; mean, s) [B],) in plain PyTorch. z [B, C, ...]."""
    e, log_s = z.to(accumulator(z.dtype)), None
    if params is not None:
        mean, log_s = moments(params, raw, Options(*options))
        e = (e - mean) * torch.exp(-log_s)
    logp = _log_prob(e, log_s)
    return (logp if running is None else running + logp,)


def reference_sample(
    noise: Tensor, params: Tensor | None, raw: Tensor | None, temperature: float, *options: Any
) -> tuple[Tensor, Tensor]:
    """(z, logp) in plain PyTorch: z = m + t s e, logp = log N(z; m, s)."""
    e = temperature * noise.to(accumulator(noise.dtype))
    if params is None:
        return e.to(noise.dtype), _log_prob(e, None)
    mean, log_s = moments(params, raw, Options(*options))
    return (mean + torch.exp(log_s) * e).to(noise.dtype), _log_prob(e, log_s)


def _log_prob(e: Tensor, log_s: Tensor | None) -> Tensor:
    """log N of the standardised deviation e = (z - m) / s, summed per sample."""
    energy = 0.5 * e.square() if log_s is None else log_s + 0.5 * e.square()
    energy = energy.flatten(1)
    return -energy.sum(1) - HALF_LOG_2PI * energy.shape[1]


# --- contract ---------------------------------------------------------------------------------------


def like(tensor: Tensor | None, z: Tensor) -> Tensor:
    """Room for the gradient of an optional argument; empty where there is none to compute."""
    return z.new_empty(0) if tensor is None else torch.empty_like(tensor)


def given(grad: Tensor, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else grad


@op(f"gaussian_log_prob_fwd(Tensor z, Tensor? params, Tensor? raw, Tensor? running, {SCHEMA}) -> Tensor")
def _forward(kernel, z, params, raw, running, *options):
    logp = z.new_empty(z.shape[:1], dtype=accumulator(z.dtype))
    kernel(z, params, raw, running, logp, options)
    return logp


@op(f"gaussian_log_prob_bwd(Tensor z, Tensor? params, Tensor? raw, Tensor glogp, {SCHEMA}) -> (Tensor, Tensor, Tensor)")
def _backward(kernel, z, params, raw, glogp, *options):
    gz, gparams, graw = torch.empty_like(z), like(params, z), like(raw, z)
    kernel(z, params, raw, glogp, gz, given(gparams, params), given(graw, raw), options)
    return gz, gparams, graw


@op(f"gaussian_sample_fwd(Tensor noise, Tensor? params, Tensor? raw, float temperature, {SCHEMA}) -> (Tensor, Tensor)")
def _sample(kernel, noise, params, raw, temperature, *options):
    z = torch.empty_like(noise)
    logp = noise.new_empty(noise.shape[:1], dtype=accumulator(noise.dtype))
    kernel(noise, params, raw, z, logp, temperature, options)
    return z, logp


@op(
    f"gaussian_sample_into(Tensor(a!) noise, Tensor? params, Tensor? raw, float temperature, {SCHEMA}) -> Tensor",
    "gaussian_sample_fwd",
)
def _sample_into(kernel, noise, params, raw, temperature, *options):
    logp = noise.new_empty(noise.shape[:1], dtype=accumulator(noise.dtype))
    kernel(noise, params, raw, noise, logp, temperature, options)
    return logp


@op(
    "gaussian_sample_bwd(Tensor noise, Tensor? params, Tensor? raw, Tensor gz, Tensor glogp, float temperature,"
    f" {SCHEMA}) -> (Tensor, Tensor, Tensor)"
)
def _sample_backward(kernel, noise, params, raw, gz, glogp, temperature, *options):
    gnoise, gparams, graw = torch.empty_like(noise), like(params, noise), like(raw, noise)
    kernel(
        noise, params, raw, gz, glogp, gnoise, given(gparams, params), given(graw, raw), temperature, options
    )  # fmt: skip
    return gnoise, gparams, graw


# --- gradient ---------------------------------------------------------------------------------------


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, z, params, raw, running, *options):
        ctx.backend, ctx.options, ctx.has_running = backend, options, running is not None
        ctx.save_for_backward(z, params, raw)
        return _forward[backend](z, params, raw, running, *options)

    @staticmethod
    def backward(ctx, glogp):
        saved = ctx.saved_tensors
        if second_order():
            grads = reference_vjp(lambda *t: reference(*t, None, *ctx.options), saved, (glogp,))
        else:
            grads = _backward[ctx.backend](*(_check.strided(t) for t in saved), glogp, *ctx.options)
            grads = [given(g, t) for g, t in zip(grads, saved, strict=True)]
        return None, *grads, glogp if ctx.has_running else None, *[None] * len(ctx.options)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, noise, params, raw, *options):
        ctx.backend, ctx.options = backend, options
        ctx.save_for_backward(noise, params, raw)
        return _sample[backend](noise, params, raw, *options)

    @staticmethod
    def backward(ctx, gz, glogp):
        saved = ctx.saved_tensors
        if second_order():
            grads = reference_vjp(lambda *t: reference_sample(*t, *ctx.options), saved, (gz, glogp))
        else:
            grads = _sample_backward[ctx.backend](
                *(_check.strided(t) for t in saved), _check.strided(gz), glogp, *ctx.options
            )
            grads = [given(g, t) for g, t in zip(grads, saved, strict=True)]
        return None, *grads, *[None] * len(ctx.options)


# --- public -----------------------------------------------------------------------------------------


def gaussian_log_prob(
    z: Tensor,
    params: Tensor | None = None,
    raw: Tensor | None = None,
    *,
    packing: str = "interleaved",
    scale: str | ScaleMap = "exp",
    running: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Log-likelihood :math:`\sum -\log s - \tfrac12 (z - m)^2 / s^2 - \tfrac12 \log 2\pi` of every sample.

    Args:
        z: [B, C, ...], any strides.
        params: a network's output [B, 2C, ...]: mean m and raw scale h, packed as ``packing`` names
            (:mod:`fastflow.ops.packing`); or m alone [B, C, ...] where ``raw`` is given. Batch and positions of size
            1 are broadcast, and [2C] or [C] holds one value per channel. None is the standard normal.
        raw: h, where it is a tensor of its own.
        scale: how h becomes the standard deviation s, :func:`fastflow.ops.scale_map.scale_map`: ``"exp"`` is
            log s = h, ``scale_map("exp", gain=3.0)`` log s = 3 h, ``"softplus"`` s = softplus(h).
        running: a sum [B] to add to, for example the log-determinant.
        backend: a backend by name; None chooses.

    Returns:
        [B] in nats (float64 for float64, float32 for all else).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        BackendError: the backend asked for cannot serve the call.

    Paper: Glow (split prior), https://arxiv.org/abs/1807.03039.

    >>> z, h = torch.randn(4, 6, 8, 8), torch.randn(4, 12, 8, 8)
    >>> normal = torch.distributions.Normal(h[:, 0::2], h[:, 1::2].exp())
    >>> bool(torch.allclose(gaussian_log_prob(z, h), normal.log_prob(z).sum((1, 2, 3)), rtol=1e-4))
    True
    """
    _check.floating("z", z)
    options, params, raw = _arguments(z, params, raw, packing, scale, "z")
    _check.logdet_like("running", running, z, accumulator(z.dtype))
    tensors = (z, params, raw, running)
    backend = choose(FAMILY, tensors, backend)
    if backend == "reference":
        return reference(*tensors, *options)[0]
    tensors = tuple(_check.strided(t) for t in tensors)
    if any_grad(*tensors):
        return _LogProb.apply(backend, *tensors, *options)
    return _forward[backend](*tensors, *options)


def gaussian_sample(
    params: Tensor | None = None,
    raw: Tensor | None = None,
    *,
    shape: Sequence[int] | None = None,
    noise: Tensor | None = None,
    packing: str = "interleaved",
    scale: str | ScaleMap = "exp",
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A sample :math:`z = m + \tau s \epsilon` and its log-likelihood under the untempered :math:`N(m, s)`.

    Differentiable in mean and raw scale (reparametrised), and in ``noise``. The same generator state gives the same
    noise whatever the memory format. The log-likelihood is that of z before it is rounded to its dtype.

    Args:
        params, raw, packing, scale: as in :func:`gaussian_log_prob`; None is the standard normal.
        shape: [B, C, ...] of the sample, where neither ``params`` nor ``noise`` has it.
        noise: the standard normal numbers epsilon [B, C, ...]; None draws them with ``generator``.
        temperature: tau >= 0, a factor on the standard deviation; 0 gives the mean.
        dtype, device: of the sample; by default those of ``noise``, ``params``, or torch's.

    Returns:
        z [B, C, ...] and logp [B].

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        BackendError: the backend asked for cannot serve the call.

    >>> h = torch.randn(4, 12, 8, 8)
    >>> z, logp = gaussian_sample(h, temperature=0.7, generator=torch.Generator().manual_seed(0))
    >>> z.shape, bool(torch.allclose(logp, gaussian_log_prob(z, h), rtol=1e-4))
    (torch.Size([4, 6, 8, 8]), True)
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a number of at least 0, got {temperature}")
    drawn = noise is None
    if drawn:
        noise = _draw(params, raw, shape, generator, dtype, device)
    _check.floating("noise", noise)
    options, params, raw = _arguments(noise, params, raw, packing, scale, "noise")
    tensors = (noise, params, raw)
    backend = choose(FAMILY, tensors, backend)
    if backend == "reference":
        return reference_sample(*tensors, float(temperature), *options)
    tensors = tuple(_check.strided(t) for t in tensors)
    if any_grad(*tensors):
        return _Sample.apply(backend, *tensors, float(temperature), *options)
    if drawn and not torch.compiler.is_compiling():
        return noise, _sample_into[backend](*tensors, float(temperature), *options)
    return _sample[backend](*tensors, float(temperature), *options)


def _draw(params, raw, shape, generator, dtype, device) -> Tensor:
    """Standard normal numbers for a sample, in the memory format of the parameters."""
    if shape is None:
        if params is None or params.dim() < 2:
            raise ValueError("shape: expected [B, C, ...] where no params of that shape are given, got None")
        shape = (params.shape[0], params.shape[1] // (2 if raw is None else 1), *params.shape[2:])
    if params is not None:
        dtype, device = dtype or params.dtype, device or params.device
    noise = torch.randn(tuple(shape), generator=generator, dtype=dtype, device=device)
    if noise.dim() == 4 and params is not None and not params.is_contiguous():
        if params.is_contiguous(memory_format=torch.channels_last):
            return noise.contiguous(memory_format=torch.channels_last)
    return noise


def _arguments(
    z: Tensor, params: Tensor | None, raw: Tensor | None, packing: str, scale: str | ScaleMap, of: str
) -> tuple[Options, Tensor | None, Tensor | None]:
    """The options, and the parameters as views that go with ``z``."""
    options = gaussian_options(raw, packing, scale)
    if params is None:
        if raw is not None:
            raise ValueError("params: expected the mean beside raw, got None")
        return options, None, None
    params = broadcast("params", params, z, z.shape[1] * (2 if raw is None else 1), of)
    return options, params, None if raw is None else broadcast("raw", raw, z, z.shape[1], of)


def gaussian_options(raw: Tensor | None, packing: str, scale: str | ScaleMap) -> Options:
    code = packing_code(packing) if raw is None else PACKINGS.index("separate")
    chosen = scale_map(scale)
    if isinstance(chosen.amplitude, Tensor):
        raise TypeError("scale.amplitude: expected a number, a Gaussian does not learn it; got a tensor")
    return Options(code, KINDS.index(chosen.kind), chosen.reciprocal, list(chosen.constants))


def broadcast(name: str, tensor: Tensor, z: Tensor, channels: int, of: str) -> Tensor:
    """``tensor`` as a view [B, channels, ...]: given so, or with batch and positions of size 1, or as [channels]."""
    _check.floating(name, tensor, dims=1)
    if tensor.shape != (z.shape[0], channels, *z.shape[2:]):
        if tensor.shape == (channels,):
            tensor = tensor.view(1, -1, *[1] * (z.dim() - 2))
        if tensor.dim() == z.dim():
            sizes = zip(tensor.shape, (z.shape[0], tensor.shape[1], *z.shape[2:]), strict=True)
            tensor = tensor.expand([to if size == 1 else size for size, to in sizes])
    _check.matching(name, tensor, z, (channels,), of)
    return tensor
