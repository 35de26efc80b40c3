"""MLP couplings, evaluated inside one kernel: a stack of them with ActNorms and permutations in one call.

A block of samples stays in the cache through a layer, its state of D numbers per sample through all layers. What a
small flow costs is then its arithmetic, not its calls.

Backward evaluates every network once more, so it keeps nothing of the hidden layers. What it needs of a coupling is the
coupling's input. Where it is kept, that is D numbers per sample and coupling (``save="input"``). Or it is made from the
output on the way back, x = (y - g t) / s(h) (``save="output"``), for the network sees only what did not change: nothing
is kept per layer, and nothing is computed twice. A rounding of y grows by 1 / s in every coupling, so that is chosen
where the scale maps promise that it at most doubles through the whole stack: additive stacks, and few couplings of
bounded scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastflow.ops import _backend, _check
from fastflow.ops._backend import BackendError, Family, choose
from fastflow.ops._op import accumulator, any_grad, op, reference_vjp, second_order, without_autocast
from fastflow.ops.mlp_stack import MLPStack

__all__ = ["mlp_coupling"]

FAMILY = Family("mlp_coupling")
WIDEST = {"cuda": 128}  # what shared memory holds; the others take any width
_PLAIN = frozenset(_check.PLAIN)
DOUBLES = math.log(2.0)  # how much a rounding may grow where backward starts from the output


# --- meaning ----------------------------------------------------------------------------------------


def reference(
    x: Tensor, context: Tensor | None, *params: Tensor, stack: MLPStack, inverse: bool
) -> tuple[Tensor, Tensor]:
    """(y [B, D], logdet [B]) in plain PyTorch, layer by layer."""
    pairs = stack.split(params)
    logdet = x.new_zeros(x.shape[:1], dtype=accumulator(x.dtype))
    for step, own in reversed(pairs) if inverse else pairs:
        x, more = step.reference(x, context, own, inverse)
        logdet = logdet + more
    return x, logdet


# --- contract ---------------------------------------------------------------------------------------

_STACK = "int[] code, float[] constants, bool inverse"


@op(f"mlp_coupling_fwd(Tensor x, Tensor? context, Tensor[] params, {_STACK}, int kept) -> (Tensor, Tensor, Tensor)")
def _forward(kernel, x, context, params, code, constants, inverse, kept):
    """``kept``: of how many couplings the inputs are kept, [kept, D, B]."""
    y, logdet = torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.shape[:1])
    inputs = x.new_empty(kept, x.shape[1], x.shape[0])
    kernel(x, context, params, code, constants, inverse, inputs if kept else None, y, logdet)
    return y, logdet, inputs


@op(
    "mlp_coupling_bwd(Tensor y, Tensor? context, Tensor[] params, Tensor inputs, Tensor gy, Tensor glogdet,"
    f" {_STACK}) -> Tensor[]"
)
def _backward(kernel, y, context, params, inputs, gy, glogdet, code, constants, inverse):
    gx, gcontext = torch.empty_like(y), None if context is None else torch.empty_like(context)
    gparams = [torch.empty_like(p) for p in params]
    kept = inputs if inputs.shape[0] else None
    kernel(y, context, params, kept, gy, glogdet, code, constants, inverse, gx, gcontext, gparams)
    return [gx, *([] if context is None else [gcontext]), *gparams]


# --- gradient ---------------------------------------------------------------------------------------


class _MLPCoupling(torch.autograd.Function):
    """Saves x, the output, the parameters, and the couplings' inputs where the output does not give them back."""

    @staticmethod
    def forward(ctx, backend, stack, inverse, kept, x, context, *params):
        y, logdet, inputs = _forward[backend](x, context, params, stack.code, stack.constants, inverse, kept)
        ctx.backend, ctx.stack, ctx.inverse = backend, stack, inverse
        ctx.save_for_backward(x, context, y, inputs, *params)
        return y, logdet

    @staticmethod
    def backward(ctx, gy, glogdet):
        x, context, y, inputs, *params = ctx.saved_tensors
        stack, inverse = ctx.stack, ctx.inverse
        if second_order():

            def meaning(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
                return reference(*tensors, stack=stack, inverse=inverse)

            return *[None] * 4, *reference_vjp(meaning, (x, context, *params), (gy, glogdet))
        grads = _backward[ctx.backend](
            y, context, params, inputs, gy, glogdet, stack.code, stack.constants, inverse
        )  # fmt: skip
        gx, gcontext, gparams = grads[0], None if context is None else grads[1], grads[1 + (context is not None) :]
        return *[None] * 4, gx, gcontext, *gparams


# --- public -----------------------------------------------------------------------------------------


def mlp_coupling(
    x: Tensor,
    params: Sequence[Tensor],
    stack: MLPStack,
    *,
    context: Tensor | None = None,
    inverse: bool = False,
    logdet: Tensor | None = None,
    save: Literal["auto", "input", "output"] = "auto",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A stack of affine couplings :math:`x_2 \odot s(h) + g\,t`, :math:`(t, h)` = MLP(x_1, context), in one call.

    Args:
        x: [B, D], any strides.
        params: the parameters of all steps one after the other, of the shapes ``stack.shapes``.
        stack: the layers from data to latent, :class:`fastflow.ops.MLPStack`.
        context: [B, Cc], where the stack takes one.
        inverse: through the stack from its end to its beginning.
        logdet: a running log-determinant [B] to add to.
        save: what backward starts from: the inputs of every coupling (D numbers per sample and coupling), or the output
            alone; ``auto`` takes the output where the scale maps promise that roundings at most double on the way back.
        backend: a backend by name; None chooses. CUDA's takes networks up to 128 wide.

    Returns:
        y [B, D] of the dtype of x, and logdet [B]: float64 for float64 and float32 for all else, which is also what is
        computed in.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        BackendError: the backend asked for cannot serve the call.

    Papers: RealNVP, https://arxiv.org/abs/1605.08803; NICE, https://arxiv.org/abs/1410.8516.

    >>> from fastflow.ops import CouplingStep, PermutationStep
    >>> steps = [CouplingStep((1,), (8, 8)), PermutationStep((1, 0)), CouplingStep((1,), (8, 8))]
    >>> stack = MLPStack(2, steps)
    >>> params = [0.5 * torch.randn(shape) for shape in stack.shapes]
    >>> x = torch.randn(5, 2)
    >>> z, logdet = mlp_coupling(x, params, stack)
    >>> back, minus = mlp_coupling(z, params, stack, inverse=True)
    >>> bool(torch.allclose(back, x, atol=1e-5)), bool(torch.allclose(minus, -logdet, atol=1e-5))
    (True, True)
    """
    _check.floating("x", x)
    if x.dim() != 2 or x.shape[1] != stack.features:
        raise ValueError(f"x: expected [B, {stack.features}], got {list(x.shape)}")
    if save not in ("auto", "input", "output"):
        raise ValueError(f"save: expected 'auto', 'input' or 'output', got {save!r}")
    dtype = accumulator(x.dtype)
    _check.logdet_like("logdet", logdet, x, dtype)
    _context(context, x, stack)
    if len(params) != len(stack.shapes) or [p.shape for p in params] != stack.shapes:
        _wrong_shapes(params, stack)
    alike = {p.dtype for p in params} <= {dtype} and {p.device for p in params} <= {x.device}
    if not alike or not all(p.is_contiguous() for p in params):
        params = [_fitting(f"params[{i}]", p, x) for i, p in enumerate(params)]
    chosen = _chosen(x, context, params, stack, backend)
    narrow = x if x.dtype == dtype else x.to(dtype)
    context = context if context is None or context.dtype == dtype else context.to(dtype)
    if chosen == "reference":
        with without_autocast(x):
            y, total = reference(narrow, context, *params, stack=stack, inverse=inverse)
    elif any_grad(x, context, *params):
        output = save == "output" or (save == "auto" and stack.amplification[inverse] <= DOUBLES)
        kept = 0 if output else stack.couplings
        y, total = _MLPCoupling.apply(chosen, stack, inverse, kept, narrow, context, *params)
    else:
        y, total, _ = _forward[chosen](narrow, context, params, stack.code, stack.constants, inverse, 0)
    return y if y.dtype == x.dtype else y.to(x.dtype), total if logdet is None else logdet + total


def _chosen(x: Tensor, context: Tensor | None, params: Sequence[Tensor], stack: MLPStack, backend: str | None) -> str:
    # the dtypes and devices of the parameters are known to be right
    odd = [p for p in params if type(p) not in _check.PLAIN] if not _PLAIN.issuperset(map(type, params)) else ()
    chosen = choose(FAMILY, (x, context, *odd), backend)
    if stack.widest > WIDEST.get(chosen, stack.widest):
        if chosen in (backend, _backend._forced.name):
            raise BackendError(
                f"backend {chosen!r} cannot serve this call: a network is {stack.widest} wide, its kernel takes up to"
                f" {WIDEST[chosen]}"
            )
        return "reference"
    return chosen


def _context(context: Tensor | None, x: Tensor, stack: MLPStack) -> None:
    expected = stack.context_features
    if (context is None) != (expected == 0):
        got = "none" if context is None else f"a tensor of shape {list(context.shape)}"
        raise ValueError(f"context: expected {f'[B, {expected}]' if expected else 'none'}, got {got}")
    if context is not None:
        _check.matching("context", context, x, (expected,))


def _wrong_shapes(params: Sequence[Tensor], stack: MLPStack) -> None:
    if len(params) != len(stack.shapes):
        raise ValueError(f"params: expected {len(stack.shapes)} tensors, got {len(params)}")
    for i, (p, shape) in enumerate(zip(params, stack.shapes, strict=True)):
        if p.shape != shape:
            raise ValueError(f"params[{i}]: expected shape {list(shape)}, got {list(p.shape)}")


def _fitting(name: str, tensor: Tensor, x: Tensor) -> Tensor:
    """In the dtype that is computed in, and contiguous; or an error that says what is wrong."""
    _check.beside(name, tensor, x, tuple(tensor.shape))
    return tensor.to(accumulator(x.dtype)).contiguous()
