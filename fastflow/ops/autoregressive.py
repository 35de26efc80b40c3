"""The inverse of an autoregressive layer in one sweep over its masked network.

Variable d needs the outputs for d, those need hidden units that know the variables before d only: so every unit is
finished once, as soon as its inputs are known, at the cost of about one pass of the network instead of D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.ops import _check, masked
from fastflow.ops._backend import Family, choose
from fastflow.ops._op import accumulator, any_grad, op, reference_vjp, second_order, without_autocast
from fastflow.ops.masked import Activation
from fastflow.ops.scale_map import KINDS, ScaleMap, log_scale, scale_map

__all__ = ["FORMS", "Form", "autoregressive_inverse", "reaches_of"]

FAMILY = Family("autoregressive")
MOST_LAYERS = 32  # as in csrc/cuda/autoregressive.cu

Form = Literal["scale_first", "shift_first", "gate", "bernoulli"]
FORMS = ("scale_first", "shift_first", "gate", "bernoulli")  # as in csrc/autoregressive.h


class Step(NamedTuple):
    """What happens to one variable, as a kernel is told."""

    form: int
    swapped: bool  # (raw, shift) instead of (shift, raw)
    kind: int
    reciprocal: bool
    constants: list[float]


# --- meaning ----------------------------------------------------------------------------------------


def reference(
    z: Tensor,
    weights: Sequence[Tensor],
    starts: Sequence[Tensor],
    counts: Tensor,
    direct: Tensor | None,
    activation: int,
    residual: bool,
    *step: Any,
) -> tuple[Tensor, Tensor]:
    """(x, logdet) in plain PyTorch, by D passes of the network."""
    step = Step(*step)
    variables = z.shape[1]
    each = params_of(step.form)
    *reaches, direct_reach = reaches_of(counts, hidden_widths(weights), variables, each)
    x, total = z[:, :0], z.new_zeros(z.shape[:1])
    for d in range(variables):
        known = torch.cat([x, z.new_zeros(z.shape[0], variables - d)], 1)
        p = masked.reference(known, weights, starts, reaches, direct, direct_reach, activation, residual)
        value, logdet = _element(z[:, d], p[:, each * d : each * (d + 1)], step)
        x, total = torch.cat([x, value[:, None]], 1), total + logdet
    return x, total


def _element(z: Tensor, p: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """(x_d, its part of logdet)"""
    form = FORMS[step.form]
    if form == "bernoulli":
        x = (z < torch.sigmoid(p[:, 0])).to(z.dtype)
        return x, x * p[:, 0] - F.softplus(p[:, 0])
    t, h = p.flip(1).unbind(1) if step.swapped else p.unbind(1)
    log_s = log_scale(KINDS[step.kind], tuple(step.constants), h, step.constants[2])
    log_s = -log_s if step.reciprocal else log_s
    if form == "gate":  # z = s x + (1 - s) t, and (1 - s) / s = e^-v
        gain, offset = step.constants[:2]
        return z + (z - t) * torch.exp(-(gain * h + offset)), -log_s
    if form == "shift_first":
        return z * torch.exp(-log_s) - t, -log_s
    return (z - t) * torch.exp(-log_s), -log_s


def params_of(form: int) -> int:
    """How many outputs of the network a variable has."""
    return 1 if FORMS[form] == "bernoulli" else 2


def hidden_widths(weights: Sequence[Tensor]) -> list[int]:
    return [w.shape[0] for w in weights[:-1]]


def reaches_of(counts: Tensor, widths: Sequence[int], variables: int, each: int) -> list[Tensor]:
    """How many leading inputs each unit sees, of every layer, and at last each output of the variables themselves.

    counts [L, D + 1]: how many units of hidden layer l, of these widths, have a degree of at most d. A hidden unit of
    degree g knows the variables 1 ... g, the ``each`` outputs of variable d those before d.
    """
    before, reaches = torch.arange(variables + 1, device=counts.device), []
    for count, width in zip(counts, widths, strict=True):
        units = torch.arange(width, device=counts.device)
        reaches.append(before[torch.searchsorted(count, units, right=True)])
        before = count
    direct = torch.arange(variables, device=counts.device).repeat_interleave(each)
    return [*reaches, before[:-1].repeat_interleave(each), direct]


# --- contract ---------------------------------------------------------------------------------------
# saved: what enters the activations, the units of all hidden layers one under the other, [units, B]
# params: the network's outputs, [outputs, B]

_SWEEP = (
    "Tensor[] weights, Tensor[] starts, Tensor counts, Tensor? direct, int activation, bool residual,"
    " int form, bool swapped, int kind, bool reciprocal, float[] constants"
)


@op(
    f"autoregressive_fwd(Tensor z, {_SWEEP}, bool save) -> (Tensor, Tensor, Tensor, Tensor)"
)  # fmt: skip
def _forward(kernel, z, weights, starts, counts, direct, activation, residual, *rest):
    *step, save = rest
    x = torch.empty_like(z, memory_format=torch.contiguous_format)
    logdet = z.new_empty(z.shape[:1])
    saved = z.new_empty((sum(w.shape[0] for w in weights[:-1]), z.shape[0]) if save else 0)
    params = z.new_empty((weights[-1].shape[0], z.shape[0]) if save else 0)
    kept = (saved, params) if save else (None, None)
    kernel(z, weights, starts, counts, direct, activation, residual, *step, x, logdet, *kept)
    return x, logdet, saved, params


@op(
    f"autoregressive_bwd(Tensor x, Tensor z, {_SWEEP}, Tensor saved, Tensor params, Tensor gx, Tensor glogdet)"
    " -> Tensor[]",
    *("autoregressive_bwd", "masked_weight_bwd"),
)
def _backward(run, outer, x, z, weights, starts, counts, direct, activation, residual, *rest):
    *step, saved, params, gx, glogdet = rest
    gz = torch.empty_like(x)
    ga, gp = torch.empty_like(saved), torch.empty_like(params)
    run(x, z, weights, counts, direct, activation, residual, *step, saved, params, gx, glogdet, gz, ga, gp)
    *reaches, direct_reach = reaches_of(counts, hidden_widths(weights), x.shape[1], params_of(step[0]))
    grads = masked.parameter_grads(
        outer, x, weights, starts, reaches, direct, direct_reach, activation, residual, saved, gp.t(), ga
    )
    return [gz, *grads]


# --- gradient ---------------------------------------------------------------------------------------


class _Inverse(torch.autograd.Function):
    """Saves z, x, the parameters, what enters the activations, and the network's outputs."""

    @staticmethod
    def forward(ctx, backend, options, layers, z, counts, direct, *rest):
        weights, starts = rest[:layers], rest[layers:]
        x, logdet, saved, params = _forward[backend](z, weights, starts, counts, direct, *options, True)
        ctx.backend, ctx.options, ctx.layers = backend, options, layers
        ctx.save_for_backward(x, saved, params, z, counts, direct, *rest)
        return x, logdet

    @staticmethod
    def backward(ctx, gx, glogdet):
        x, saved, params, z, counts, direct, *rest = ctx.saved_tensors
        n = ctx.layers
        if second_order():

            def meaning(z, direct, *rest):
                return reference(z, rest[:n], rest[n:], counts, direct, *ctx.options)

            gz, gdirect, *grads = reference_vjp(meaning, (z, direct, *rest), (gx, glogdet))
        else:
            gz, *grads = _backward[ctx.backend](
                x, z, rest[:n], rest[n:], counts, direct, *ctx.options, saved, params, gx, glogdet
            )
            gdirect = grads.pop() if direct is not None else None
        return None, None, None, gz, None, gdirect, *grads


# --- public -----------------------------------------------------------------------------------------


def autoregressive_inverse(
    z: Tensor,
    weights: Sequence[Tensor],
    starts: Sequence[Tensor],
    counts: Tensor,
    *,
    activation: Activation = "relu",
    residual: bool = False,
    direct: Tensor | None = None,
    form: Form = "scale_first",
    scale: str | ScaleMap = "exp",
    swapped: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The x of z, where (t, h) of variable d are a masked network's outputs for :math:`x_{<d}`, in one sweep.

    ===============  ===========================================  =============================
    form             the layer that is inverted                   used by
    ===============  ===========================================  =============================
    scale_first      :math:`z = x\, s(h) + t`                     nflows, zuko
    shift_first      :math:`z = (x + t)\, s(h)`                   MAF
    gate             :math:`z = s x + (1 - s)\, t`                IAF; s(h) is a plain sigmoid
    bernoulli        :math:`x = 1` where :math:`z < \sigma(t)`    sampling MADE, z uniform
    ===============  ===========================================  =============================

    Args:
        z: [B, D], the variables in the order of the autoregression.
        weights, starts, activation, residual, direct: the network, as :func:`masked_mlp` has it, its units sorted by
            degree; the outputs of a variable lie side by side: (t_1, h_1, t_2, h_2, ...).
        counts: [L, D + 1], int64: how many units of hidden layer l have a degree of at most d.
        form: the layer, see above.
        scale: s(h), :func:`fastflow.scale_map`; its amplitude may not be learned.
        swapped: the outputs of a variable are (h, t).
        backend: a backend by name; None chooses.

    Returns:
        x of the shape and dtype of z, and the log-determinant [B] of this direction, -sum log s (float64 for float64,
        float32 for all else). For ``bernoulli`` this is log p(x), and nothing is differentiable.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        BackendError: the backend asked for cannot serve the call.

    Papers: MAF, https://arxiv.org/abs/1705.07057; IAF, https://arxiv.org/abs/1606.04934.

    >>> weights, counts = [torch.randn(8, 3), torch.randn(6, 8)], torch.tensor([[0, 4, 8, 8]])
    >>> x, logdet = autoregressive_inverse(torch.randn(5, 3), weights, [torch.zeros(8), torch.zeros(6)], counts)
    >>> x.shape, logdet.shape
    (torch.Size([5, 3]), torch.Size([5]))
    """
    if not isinstance(z, Tensor) or z.dim() != 2:
        raise ValueError(f"z: expected [B, D], got {list(z.shape) if isinstance(z, Tensor) else type(z).__name__}")
    _check.floating("z", z)
    step = _step(form, scale, swapped)
    code = masked.activation_index(activation)
    masked.check_layers(z, weights, starts, residual)
    variables, outputs = z.shape[1], weights[-1].shape[0]
    if outputs != params_of(step.form) * variables:
        raise ValueError(
            f"weights[{len(weights) - 1}]: expected {params_of(step.form)} outputs for each of {variables} variables, "
            f"got {outputs}"
        )
    if counts.shape != (len(weights) - 1, variables + 1) or counts.dtype != torch.int64 or counts.device != z.device:
        raise ValueError(
            f"counts: expected [{len(weights) - 1}, {variables + 1}] of torch.int64 on {z.device}, "
            f"got {list(counts.shape)} of {counts.dtype} on {counts.device}"
        )
    if direct is not None:
        _check.beside("direct", direct, z, (outputs, variables))
    backend = choose(FAMILY, (z, *weights, *starts, direct), backend)
    dtype, n = z.dtype, len(weights)
    if backend == "cuda" and n > MOST_LAYERS:
        backend = "reference"
    z, direct, *rest = masked.widened(accumulator(dtype), z, direct, *weights, *starts)
    with without_autocast(z), torch.set_grad_enabled(torch.is_grad_enabled() and form != "bernoulli"):
        x, logdet = _run(backend, z, rest[:n], rest[n:], counts, direct, (code, residual, *step))
    return x.to(dtype), logdet


def _step(form: str, scale: str | ScaleMap, swapped: bool) -> Step:
    if form not in FORMS:
        raise ValueError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
    chosen = scale_map(scale)
    if isinstance(chosen.amplitude, Tensor):
        raise ValueError("scale: expected a constant amplitude, got a tensor")
    plain = chosen.kind == "sigmoid" and chosen.constants[2:4] == (1.0, 0.0) and not chosen.reciprocal
    if form == "gate" and not plain:
        raise ValueError(f"scale: a gate has a plain sigmoid, scale_map('sigmoid2', offset=...), got {chosen}")
    return Step(FORMS.index(form), swapped, KINDS.index(chosen.kind), chosen.reciprocal, list(chosen.constants))


def _run(backend, z, weights, starts, counts, direct, options):
    if backend == "reference":
        return reference(z, weights, starts, counts, direct, *options)
    if any_grad(z, direct, *weights, *starts):
        return _Inverse.apply(backend, options, len(weights), z, counts, direct, *weights, *starts)
    return _forward[backend](z, weights, starts, counts, direct, *options, False)[:2]
