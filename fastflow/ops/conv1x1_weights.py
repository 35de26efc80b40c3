"""The matrices of invertible 1x1 convolutions and their log-determinants, for all layers of a model in one call.

:func:`lu_weights` makes them from LU factors, :func:`dense_weights` from the matrices themselves; both fold in the
ActNorm before the convolution, and give the inverse where asked. Everything is computed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastflow.ops import _backend, _check
from fastflow.ops._op import accumulator, any_grad, op, reference_vjp, second_order

__all__ = ["lu_weights", "dense_weights"]

FAMILY = _backend.Family("conv1x1")
GPU_CHANNELS = 128  # above, one block of a GPU for a layer takes longer than PyTorch with all of them
Triple = tuple[Tensor, Tensor, Tensor]  # M [N, C, C], c [N, C], logdet [N]

# --- meaning ----------------------------------------------------------------------------------------


def lu_reference(
    lower: Sequence[Tensor],
    upper: Sequence[Tensor],
    log_s: Sequence[Tensor],
    permutation: Sequence[Tensor],
    sign_s: Sequence[Tensor],
    log_scale: Sequence[Tensor],
    bias: Sequence[Tensor],
    gain: float,
    inverse: bool,
) -> Triple:
    """W = P L (U + diag(sign e^log_s)) for every layer, folded and perhaps inverted."""
    dtype = accumulator(log_s[0].dtype)
    scale = torch.stack(list(log_s)).double()
    diagonal = torch.stack(list(sign_s)).double() * torch.exp(scale)
    n = scale.shape[1]
    left = torch.stack(list(lower)).double().tril(-1) + torch.eye(n, dtype=torch.float64, device=scale.device)
    right = torch.stack(list(upper)).double().triu(1) + torch.diag_embed(diagonal)
    order = torch.stack(list(permutation))[:, :, None].expand(-1, -1, n)
    return _fold(torch.gather(left @ right, 1, order), scale.sum(1), log_scale, bias, gain, inverse, dtype)


def dense_reference(
    weight: Sequence[Tensor], log_scale: Sequence[Tensor], bias: Sequence[Tensor], gain: float, inverse: bool
) -> Triple:
    """W as it is, its log-determinant by LU decomposition in float64."""
    dtype = accumulator(weight[0].dtype)
    stacked = torch.stack(list(weight)).double()
    return _fold(stacked, torch.linalg.slogdet(stacked).logabsdet, log_scale, bias, gain, inverse, dtype)


def _fold(
    weight: Tensor,
    logdet: Tensor,
    log_scale: Sequence[Tensor],
    bias: Sequence[Tensor],
    gain: float,
    inverse: bool,
    dtype: torch.dtype,
) -> Triple:
    """M = W diag(e^(g a)), c = M b, logdet + g sum a; or M^-1, -b, -logdet."""
    shift = torch.zeros_like(weight[:, 0])
    if len(log_scale):
        scale = gain * torch.stack(list(log_scale)).double()
        shift = torch.stack(list(bias)).double()
        weight, logdet = weight * torch.exp(scale)[:, None], logdet + scale.sum(1)
    if inverse:
        weight, shift, logdet = torch.linalg.inv_ex(weight).inverse, -shift, -logdet
    else:
        shift = (weight @ shift[..., None])[..., 0]
    return weight.to(dtype), shift.to(dtype), logdet.to(dtype)


# --- contract ---------------------------------------------------------------------------------------

_LISTS = (
    "Tensor[] lower, Tensor[] upper, Tensor[] log_s, Tensor[] permutation, Tensor[] sign_s, "
    "Tensor[] log_scale, Tensor[] bias"
)


@op(f"lu_weights_fwd({_LISTS}, float gain, bool inverse) -> (Tensor, Tensor, Tensor)")
def _forward(kernel, *arguments):
    log_s = arguments[2]
    n, channels, dtype = len(log_s), log_s[0].shape[0], accumulator(log_s[0].dtype)
    matrix = log_s[0].new_empty((n, channels, channels), dtype=dtype)
    shift, logdet = matrix.new_empty((n, channels)), matrix.new_empty(n)
    kernel(*arguments[:7], matrix, shift, logdet, *arguments[7:])
    return matrix, shift, logdet


@op(
    f"lu_weights_bwd({_LISTS}, Tensor gmatrix, Tensor gshift, Tensor glogdet, float gain, bool inverse)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _backward(kernel, *arguments):
    gmatrix, gshift = arguments[7:9]
    grads = [torch.empty(g.shape, dtype=g.dtype, device=g.device) for g in (gmatrix, gmatrix, gshift, gshift, gshift)]
    kernel(*arguments[:10], *grads, *arguments[10:])
    return tuple(grads)


# --- gradient ---------------------------------------------------------------------------------------


class _LU(torch.autograd.Function):
    """Saves the factors. ``value`` is the result where it is known already; the gradient does not need it."""

    @staticmethod
    def forward(ctx, backend, value, layers, gain, inverse, *factors):
        ctx.backend, ctx.layers, ctx.gain, ctx.inverse = backend, layers, gain, inverse
        ctx.save_for_backward(*factors)
        if value is not None:
            return tuple(t.detach() for t in value)
        return _forward[backend](*_lists(factors, layers), gain, inverse)

    @staticmethod
    def backward(ctx, *grads):
        factors = ctx.saved_tensors
        if second_order() or ctx.backend == "reference":

            def meaning(*factors: Tensor) -> Triple:
                return lu_reference(*_lists(factors, ctx.layers), ctx.gain, ctx.inverse)

            return None, None, None, None, None, *_vjp(meaning, factors, grads)
        lists = _lists(factors, ctx.layers)
        lower, upper, log_s, log_scale, bias = _backward[ctx.backend](*lists, *grads, ctx.gain, ctx.inverse)
        none = (None,) * (2 * ctx.layers)  # permutation and sign
        folded = (*log_scale.unbind(), *bias.unbind()) if lists[5] else ()
        found = (*lower.unbind(), *upper.unbind(), *log_s.unbind(), *none, *folded)
        cast = (g if g is None else g.to(f.dtype) for g, f in zip(found, factors, strict=True))
        return None, None, None, None, None, *cast


class _Dense(torch.autograd.Function):
    """The known ``value`` as a function of the weights. Backward decomposes W again: it needs its inverse."""

    @staticmethod
    def forward(ctx, value, layers, gain, inverse, *tensors):
        ctx.layers, ctx.gain, ctx.inverse = layers, gain, inverse
        ctx.save_for_backward(*tensors)
        return tuple(t.detach() for t in value)

    @staticmethod
    def backward(ctx, *grads):
        def meaning(*tensors: Tensor) -> Triple:
            return dense_reference(*_lists(tensors, ctx.layers, 3), ctx.gain, ctx.inverse)

        return None, None, None, None, *_vjp(meaning, ctx.saved_tensors, grads)


def _vjp(meaning: Callable[..., Triple], tensors: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple:
    """The gradient by the reference, differentiable only where that is asked for."""
    differentiable = second_order()
    with torch.enable_grad():
        found = reference_vjp(meaning, tensors, grads)
    return found if differentiable else tuple(g if g is None else g.detach() for g in found)


def _lists(tensors: Sequence[Tensor], layers: int, kinds: int = 7) -> list[list[Tensor]]:
    """The flat arguments of a Function as lists by kind; a kind that is not there becomes an empty list."""
    return [list(tensors[k * layers : (k + 1) * layers]) for k in range(kinds)]


# --- public -----------------------------------------------------------------------------------------


def lu_weights(
    lower: Sequence[Tensor],
    upper: Sequence[Tensor],
    log_s: Sequence[Tensor],
    permutation: Sequence[Tensor],
    sign_s: Sequence[Tensor],
    *,
    actnorm_log_scale: Sequence[Tensor] = (),
    actnorm_bias: Sequence[Tensor] = (),
    actnorm_gain: float = 1.0,
    inverse: bool = False,
    value: Triple | None = None,
    backend: str | None = None,
) -> Triple:
    r"""Matrices of N layers from their LU factors :math:`W = P L (U + \mathrm{diag}(\sigma e^{\log s}))`.

    With the ActNorm :math:`W (e^{g a} \odot (x + b))` before it a layer is :math:`M x + c`,
    :math:`M = W \mathrm{diag}(e^{g a})`, :math:`c = M b`, :math:`\log|\det M| = \sum \log s + g \sum a`.

    Args:
        lower: N tensors [C, C]; L is their strictly lower triangle and ones, nothing else of them is looked at.
        upper: N tensors [C, C]; U is their strictly upper triangle.
        log_s: N tensors [C].
        permutation: N int64 tensors [C]: row i of W is row permutation[i] of L U.
        sign_s: N tensors [C] of 1 and -1, σ; they have no gradient.
        actnorm_log_scale, actnorm_bias: a and b, N tensors [C] each, or nothing.
        actnorm_gain: g.
        inverse: give M⁻¹, its shift -b and -log|det M| instead.
        value: the result of an earlier call on the same numbers, if it is known: it is not computed again, only
            connected to the gradient.
        backend: a backend by name; None chooses.

    Returns:
        M [N, C, C], c [N, C] and log|det M| [N] per position, computed in float64, in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; or the layer that is singular.

    Paper: Glow, https://arxiv.org/abs/1807.03039.

    >>> lower, upper, log_s = torch.randn(2, 4, 4), torch.randn(2, 4, 4), torch.randn(2, 4)
    >>> permutation, sign = torch.tensor([[2, 0, 1, 3]] * 2), torch.ones(2, 4)
    >>> m, c, logdet = lu_weights(lower, upper, log_s, permutation, sign)
    >>> bool(torch.allclose(logdet, torch.linalg.slogdet(m).logabsdet, atol=1e-4)), m.shape
    (True, torch.Size([2, 4, 4]))
    """
    layers = len(log_s)
    kinds = (lower, upper, log_s, permutation, sign_s, actnorm_log_scale, actnorm_bias)
    if layers == 0 or not isinstance(log_s[0], Tensor):
        _check_lu(*kinds)
    backend = _backend.choose(FAMILY, (log_s[0],), backend)
    if backend != "cpu" and log_s[0].shape[0] > GPU_CHANNELS:
        backend = "reference"
    if backend == "reference" or torch.compiler.is_compiling():
        _check_lu(*kinds)
    factors = [tensor for kind in kinds for tensor in kind]
    try:  # the kernel looks at every tensor: doing so here first would take as long as the products
        found = _lu(backend, value, layers, actnorm_gain, inverse, factors)
    except (TypeError, ValueError):
        _check_lu(*kinds)
        raise
    if value is None:
        _refuse_infinite(log_s, found[2])
    return found


def _lu(
    backend: str, value: Triple | None, layers: int, gain: float, inverse: bool, factors: Sequence[Tensor]
) -> Triple:
    if backend == "reference" and value is None:
        return lu_reference(*_lists(factors, layers), gain, inverse)
    if any_grad(*factors):
        return _LU.apply(backend, value, layers, gain, inverse, *factors)
    return value or _forward[backend](*_lists(factors, layers), gain, inverse)


def _check_lu(lower, upper, log_s, permutation, sign_s, log_scale, bias) -> None:
    """Raises, naming the argument, where the factors do not go together."""
    layers = len(log_s)
    _factors("log_s", log_s, layers, 1, log_s)
    for name, tensors, dims in (("lower", lower, 2), ("upper", upper, 2), ("sign_s", sign_s, 1)):
        _factors(name, tensors, layers, dims, log_s)
    _factors("permutation", permutation, layers, 1, log_s, torch.int64)
    _actnorm(log_scale, bias, layers, log_s)


def dense_weights(
    weight: Sequence[Tensor],
    *,
    actnorm_log_scale: Sequence[Tensor] = (),
    actnorm_bias: Sequence[Tensor] = (),
    actnorm_gain: float = 1.0,
    inverse: bool = False,
    value: Triple | None = None,
) -> Triple:
    """Matrices of N layers from W itself, N tensors [C, C]; log|det W| by decomposition in float64.

    Arguments, results and errors as in :func:`lu_weights`. It is PyTorch on every backend: decompositions are
    LAPACK's trade.
    """
    layers = len(weight)
    rows = [w[0] if isinstance(w, Tensor) and w.dim() == 2 and len(w) else w for w in weight]
    _factors("weight", weight, layers, 2, rows)
    _actnorm(actnorm_log_scale, actnorm_bias, layers, rows)
    tensors = (*weight, *actnorm_log_scale, *actnorm_bias)
    if value is None:
        _refuse_singular(weight)
        return dense_reference(weight, actnorm_log_scale, actnorm_bias, actnorm_gain, inverse)
    return _Dense.apply(value, layers, actnorm_gain, inverse, *tensors) if any_grad(*tensors) else value


def _factors(
    name: str,
    tensors: Sequence[Tensor],
    layers: int,
    dims: int,
    like: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """N tensors [C] or [C, C] of one dtype and device, C and device as those of ``like``."""
    if len(tensors) != layers or layers == 0:
        raise ValueError(f"{name}: expected {max(layers, 1)} tensors, one for every layer, got {len(tensors)}")
    first = like[0]
    shape = torch.Size((first.shape[0],) * dims) if isinstance(first, Tensor) and first.dim() == 1 else None
    expected = dtype or (first.dtype if isinstance(first, Tensor) and first.dtype in _check.FLOATING else None)
    for k, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{k}]: expected a tensor, got {type(tensor).__name__}")
        if expected is None or tensor.dtype != expected:
            raise TypeError(f"{name}[{k}]: expected {expected or 'a floating point dtype'}, got {tensor.dtype}")
        if tensor.shape != shape:
            wanted = "[C] or [C, C]" if shape is None else list(shape)
            raise ValueError(f"{name}[{k}]: expected shape {wanted}, got {list(tensor.shape)}")
        if tensor.device != first.device:
            raise ValueError(f"{name}[{k}]: expected device {first.device}, got {tensor.device}")


def _actnorm(log_scale: Sequence[Tensor], bias: Sequence[Tensor], layers: int, like: Sequence[Tensor]) -> None:
    if len(log_scale) or len(bias):
        _factors("actnorm_log_scale", log_scale, layers, 1, like)
        _factors("actnorm_bias", bias, layers, 1, like)


def _readable(tensor: Tensor) -> bool:
    """May the host look at a value without waiting for a device, inside of no trace and no transform?"""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not _backend.transformed()


def _refuse_infinite(log_s: Sequence[Tensor], logdet: Tensor) -> None:
    if not _readable(logdet) or (finite := torch.isfinite(logdet.detach())).all():
        return
    k = int(finite.logical_not().nonzero()[0])
    raise ValueError(f"log_s[{k}]: the matrix is singular, its condition inf: log s is {log_s[k].detach().tolist()}")


def _refuse_singular(weight: Sequence[Tensor]) -> None:
    """No W whose condition in the 1-norm is beyond float64: its inverse and log-determinant would be noise."""
    if not _readable(weight[0]):
        return
    stacked = torch.stack(list(weight)).detach().double()
    inverse = torch.linalg.inv_ex(stacked).inverse
    condition = torch.linalg.matrix_norm(stacked, 1) * torch.linalg.matrix_norm(inverse, 1)
    if (fine := condition < 1 / torch.finfo(torch.float64).eps).all():  # NaN is not fine
        return
    k = int(fine.logical_not().nonzero()[0])
    raise ValueError(f"weight[{k}]: the matrix is singular, its condition {condition[k].item():.3g}")
