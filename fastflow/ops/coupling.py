"""Affine coupling: value and per-sample log-determinant in one pass.

Part of ``x`` is scaled and shifted by parameters that a network made from the other part; the network's output is
read where it lies. Additive coupling is the same without a scale.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastflow.ops import _check
from fastflow.ops._backend import Family, choose
from fastflow.ops._op import accumulator, any_grad, op, second_order
from fastflow.ops.packing import PACKINGS, packing_code, unpack
from fastflow.ops.scale_map import KINDS, ScaleMap, log_scale, scale_map

__all__ = ["affine_coupling", "additive_coupling"]

FAMILY = Family("coupling")

Mask = slice | Tensor | Literal["checkerboard_even", "checkerboard_odd"] | None


class Options(NamedTuple):
    """What a kernel is told beside its tensors.  y = x m + g t  or  (x + g t) m,  log m = +-log s(h)."""

    packing: int
    kind: int
    add_first: bool
    divide: bool
    shift_gain: float
    constants: list[float]
    where: list[int]  # channels start, stop; parity of a checkerboard or -1; width of a row of positions


# --- meaning ----------------------------------------------------------------------------------------


def reference(
    x: Tensor,
    params: Tensor,
    raw: Tensor | None,
    amplitude: Tensor | None,
    index: Tensor | None,
    running: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """(y, logdet) in plain PyTorch. x [B, C, ...]; logdet [B]."""
    o = Options(*options)
    changed, t, log_m = _operands(x, params, raw, amplitude, index, o)
    m = torch.exp(log_m)
    y = (changed + t) * m if o.add_first else changed * m + t
    active = _active(changed, o.where)
    if active is not None:
        y, log_m = torch.where(active, y, changed), torch.where(active, log_m, 0)
    logdet = log_m.flatten(1).sum(1)
    return _place(x, y.to(x.dtype), index, o.where), logdet if running is None else running + logdet


def reference_backward(
    value: Tensor,
    params: Tensor,
    raw: Tensor | None,
    amplitude: Tensor | None,
    index: Tensor | None,
    gy: Tensor,
    glogdet: Tensor,
    from_output: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of (x, params, raw, amplitude) from x or from y: x m = y - g t needs no division."""
    o = Options(*options)
    inputs = [t for t in (params, raw, amplitude) if t is not None]
    with torch.enable_grad():
        roots = [t if t.requires_grad else t.detach().requires_grad_() for t in inputs]
        given = iter(roots)
        params, raw, amplitude = (next(given) if t is not None else None for t in (params, raw, amplitude))
        changed, t, log_m = _operands(value, params, raw, amplitude, index, o)
        m = torch.exp(log_m)
        g = _select(gy, index, o.where).to(log_m.dtype)
        gx = g * m
        if o.add_first:
            scaled = changed if from_output else (changed + t) * m
        else:
            scaled = changed - t if from_output else changed * m
        glog_m = g * scaled + glogdet.view(-1, *[1] * (g.dim() - 1))
        gt = gx if o.add_first else g
        active = _active(changed, o.where)
        if active is not None:
            gx, gt, glog_m = torch.where(active, gx, g), torch.where(active, gt, 0), torch.where(active, glog_m, 0)
        outputs = [(t, gt), (log_m, glog_m)] if log_m.requires_grad else [(t, gt)]
        grads = iter(
            torch.autograd.grad(
                [a for a, _ in outputs], roots, [b for _, b in outputs], create_graph=True, allow_unused=True
            )
        )
    gparams, graw, gamplitude = (next(grads) if t is not None else None for t in (params, raw, amplitude))
    return _place(gy, gx.to(gy.dtype), index, o.where), gparams, graw, gamplitude


def _operands(
    x: Tensor, params: Tensor, raw: Tensor | None, amplitude: Tensor | None, index: Tensor | None, o: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """(the changed part of x, g t, log m) in the accumulator's dtype."""
    dtype = accumulator(x.dtype)
    changed = _select(x, index, o.where).to(dtype)
    t, h = unpack(params, raw, PACKINGS[o.packing])
    if t.shape[1] == x.shape[1]:
        t, h = _select(t, index, o.where), None if h is None else _select(h, index, o.where)
    t = o.shift_gain * t.to(dtype)
    if h is None:
        return changed, t, torch.zeros_like(changed)
    scale: Tensor | float = o.constants[2]
    if amplitude is not None:
        wide = amplitude.to(dtype).expand(1, x.shape[1] if amplitude.shape[1] == x.shape[1] else changed.shape[1])
        wide = _select(wide, index, o.where) if wide.shape[1] == x.shape[1] else wide
        scale = wide.view(1, -1, *[1] * (x.dim() - 2))
    log_s = log_scale(KINDS[o.kind], tuple(o.constants), h.to(dtype), scale)
    return changed, t, -log_s if o.divide else log_s


def _select(x: Tensor, index: Tensor | None, where: list[int]) -> Tensor:
    if index is not None:
        return x[:, index]
    return x if where[0] == 0 and where[1] == x.shape[1] else x[:, where[0] : where[1]]


def _place(x: Tensor, y: Tensor, index: Tensor | None, where: list[int]) -> Tensor:
    """``x`` with its changed part replaced by ``y``."""
    if index is not None:
        return x.index_copy(1, index, y)
    if y.shape[1] == x.shape[1]:
        return y
    return torch.cat([x[:, : where[0]], y, x[:, where[1] :]], 1)


def checkerboard(x: Tensor, parity: int) -> Tensor:
    """True where (row + column) % 2 == parity; [H, W], or [T] for one-dimensional positions."""
    column = torch.arange(x.shape[-1], device=x.device)
    row = torch.arange(x.shape[-2], device=x.device)[:, None] if x.dim() > 3 else 0
    return (row + column) % 2 == parity


def _active(x: Tensor, where: list[int]) -> Tensor | None:
    return None if where[2] < 0 else checkerboard(x, where[2])


# --- contract ---------------------------------------------------------------------------------------

_TENSORS = "Tensor params, Tensor? raw, Tensor? amplitude, Tensor? index"
_OPTIONS = "int packing, int kind, bool add_first, bool divide, float shift_gain, float[] constants, int[] where"


@op(f"coupling_fwd(Tensor x, {_TENSORS}, Tensor? running, {_OPTIONS}) -> (Tensor, Tensor)")
def _forward(kernel, x, params, raw, amplitude, index, running, *options):
    y = torch.empty_like(x)
    logdet = x.new_empty(x.shape[:1], dtype=accumulator(x.dtype))
    kernel(x, params, raw, amplitude, index, running, y, logdet, options)
    return y, logdet


@op(
    f"coupling_fwd_out(Tensor x, {_TENSORS}, Tensor? running, Tensor(a!) out, {_OPTIONS}) -> Tensor",
    "coupling_fwd",
)
def _forward_out(kernel, x, params, raw, amplitude, index, running, out, *options):
    logdet = x.new_empty(x.shape[:1], dtype=accumulator(x.dtype))
    kernel(x, params, raw, amplitude, index, running, out, logdet, options)
    return logdet


@op(
    f"coupling_bwd(Tensor value, {_TENSORS}, Tensor gy, Tensor glogdet, bool from_output, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _backward(kernel, value, params, raw, amplitude, index, gy, glogdet, from_output, *options):
    o = Options(*options)
    channels = value.shape[1]
    changed = index.shape[0] if index is not None else o.where[1] - o.where[0]
    # parameters of unchanged channels have no gradient
    full = changed < channels and params.shape[1] == channels * (1 if PACKINGS[o.packing] == "separate" else 2)
    like = torch.zeros_like if full else torch.empty_like
    gx, gparams = torch.empty_like(value), like(params)
    graw = value.new_empty(0) if raw is None else like(raw)
    gamplitude = value.new_empty(0)
    if amplitude is not None:
        gamplitude = value.new_empty((value.shape[0], changed, *value.shape[2:]), dtype=accumulator(value.dtype))
    kernel(
        value, params, raw, amplitude, index, gy, glogdet, gx, gparams, None if raw is None else graw,
        None if amplitude is None else gamplitude, from_output, options,
    )  # fmt: skip
    if amplitude is not None:
        gamplitude = _sum_to_amplitude(gamplitude, amplitude, index, o.where)
    return gx, gparams, graw, gamplitude


def _sum_to_amplitude(g: Tensor, amplitude: Tensor, index: Tensor | None, where: list[int]) -> Tensor:
    """[B, changed, ...] summed to the amplitude's [1, 1], [1, changed] or [1, C]."""
    per_channel = g.transpose(0, 1).flatten(1).sum(1)
    if amplitude.shape[1] == per_channel.shape[0]:
        total = per_channel
    elif amplitude.shape[1] == 1:
        total = per_channel.sum(0, keepdim=True)
    else:
        total = per_channel.new_zeros(amplitude.shape[1])
        total[slice(where[0], where[1]) if index is None else index] = per_channel
    return total[None].to(amplitude.dtype)


# --- gradient ---------------------------------------------------------------------------------------


class _Coupling(torch.autograd.Function):
    """Saves x and the parameters; or, written in place, y and the parameters."""

    @staticmethod
    def forward(ctx, backend, in_place, save_output, x, params, raw, amplitude, index, running, *options):
        if in_place:
            y, logdet = x, _forward_out[backend](x, params, raw, amplitude, index, running, x, *options)
            ctx.mark_dirty(x)
        else:
            y, logdet = _forward[backend](x, params, raw, amplitude, index, running, *options)
        ctx.backend, ctx.options, ctx.from_output, ctx.has_running = backend, options, save_output, running is not None
        ctx.save_for_backward(y if save_output else x, params, raw, amplitude, index)
        return y, logdet

    @staticmethod
    def backward(ctx, gy, glogdet):
        saved = ctx.saved_tensors
        if second_order():
            grads = reference_backward(*saved, gy, glogdet, ctx.from_output, *ctx.options)
        else:
            grads = _backward[ctx.backend](
                *(_check.strided(t) for t in saved), _check.strided(gy), glogdet, ctx.from_output, *ctx.options
            )
        given = [g if t is not None else None for g, t in zip(grads, saved[:4], strict=True)]
        grunning = glogdet if ctx.has_running else None
        return None, None, None, *given, None, grunning, *[None] * len(ctx.options)


# --- public -----------------------------------------------------------------------------------------


def affine_coupling(
    x: Tensor,
    params: Tensor,
    raw: Tensor | None = None,
    *,
    packing: str = "interleaved",
    scale: str | ScaleMap = "sigmoid2",
    order: Literal["scale_first", "shift_first"] = "scale_first",
    mask: Mask = None,
    inverse: bool = False,
    shift_gain: float = 1.0,
    logdet: Tensor | None = None,
    out: Tensor | None = None,
    save: Literal["input", "output"] = "input",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Affine coupling :math:`y = x \odot s(h) + g\,t` and its log-determinant :math:`\sum \log s(h)`.

    Args:
        x: [B, C, ...], any strides. All of it is changed unless ``mask`` says less.
        params: the network's output: shift t and raw scale h of every changed channel, packed along dimension 1 as
            ``packing`` names (:mod:`fastflow.ops.packing`); or t alone where ``raw`` is given. The parameters may
            also cover all C channels; those of unchanged channels are then ignored.
        raw: h, where it is a tensor of its own.
        scale: the scale map, by name or as a :class:`ScaleMap`, :func:`fastflow.ops.scale_map.scale_map`.
        order: ``scale_first`` is x s + t, ``shift_first`` is (x + t) s.
        mask: what is changed: None everything, a slice of channels, a tensor of channel indices (or a bool tensor
            [C]), ``"checkerboard_even"`` or ``"checkerboard_odd"`` the positions whose row + column is even or odd.
        inverse: compute x from y instead, and the log-determinant of that direction.
        shift_gain: g; -1 subtracts.
        logdet: a running log-determinant [B] to add to.
        out: where to write; ``out=x`` works in place and is differentiable, any other tensor needs no-grad.
        save: what backward keeps: the input, or the output (frees the input; always so in place).
        backend: a backend by name; None chooses.

    Returns:
        y of the shape and dtype of x, and logdet [B] (float64 for float64, float32 for all else).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        BackendError: the backend asked for cannot serve the call.

    Papers: RealNVP, https://arxiv.org/abs/1605.08803; Glow, https://arxiv.org/abs/1807.03039.

    >>> x = torch.randn(4, 6, 8, 8)
    >>> h = torch.randn(4, 6, 8, 8)                     # made from x[:, :3]: shift and raw scale of x[:, 3:]
    >>> z, logdet = affine_coupling(x, h, mask=slice(3, None))
    >>> back, minus = affine_coupling(z, h, mask=slice(3, None), inverse=True)
    >>> bool(torch.allclose(back, x, atol=1e-5)), z.shape, logdet.shape
    (True, torch.Size([4, 6, 8, 8]), torch.Size([4]))
    """
    chosen = scale_map(scale)
    code = packing_code(packing) if raw is None else PACKINGS.index("separate")
    return _coupling(x, params, raw, code, chosen, order, mask, inverse, shift_gain, logdet, out, save, backend)


def additive_coupling(
    x: Tensor,
    shift: Tensor,
    *,
    mask: Mask = None,
    inverse: bool = False,
    shift_gain: float = 1.0,
    logdet: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Additive coupling y = x + g t; its log-determinant is 0, or ``logdet`` as it came.

    Arguments as in :func:`affine_coupling`. Paper: NICE, https://arxiv.org/abs/1410.8516.
    """
    separate = PACKINGS.index("separate")
    additive = scale_map("none")
    return _coupling(
        x, shift, None, separate, additive, "scale_first", mask, inverse, shift_gain, logdet, out, "input", backend
    )


def _coupling(x, params, raw, packing, scale, order, mask, inverse, shift_gain, running, out, save, backend):
    _check.floating("x", x)
    if order not in ("scale_first", "shift_first"):
        raise ValueError(f"order: expected 'scale_first' or 'shift_first', got {order!r}")
    if save not in ("input", "output"):
        raise ValueError(f"save: expected 'input' or 'output', got {save!r}")
    index, where, changed = _where(x, mask)
    per_channel = 1 if PACKINGS[packing] == "separate" else 2
    channels = (per_channel * changed, per_channel * x.shape[1])
    _check.matching("params", params, x, channels)
    if raw is not None:
        _check.matching("raw", raw, x, (params.shape[1],))
    _check.logdet_like("logdet", running, x, accumulator(x.dtype))
    amplitude = _amplitude(scale, x, changed)
    options = Options(
        packing,
        KINDS.index(scale.kind),
        (order == "shift_first") != inverse,
        scale.reciprocal != inverse,
        -shift_gain if inverse else shift_gain,
        list(scale.constants),
        where,
    )
    tensors = (x, params, raw, amplitude, index, running)
    backend = choose(FAMILY, (x, params, raw, amplitude, running), backend)
    if out is None:
        return _fresh(backend, save == "output", tensors, options)
    return _into(out, backend, tensors, options)


def _fresh(backend: str, save_output: bool, tensors: tuple, options: Options) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return reference(*tensors, *options)
    tensors = tuple(_check.strided(t) for t in tensors)
    if any_grad(*tensors):
        return _Coupling.apply(backend, False, save_output, *tensors, *options)
    return _forward[backend](*tensors, *options)


def _into(out: Tensor, backend: str, tensors: tuple, options: Options) -> tuple[Tensor, Tensor]:
    x, in_place = tensors[0], out is tensors[0]
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(
            f"out: expected {list(x.shape)} of {x.dtype} on {x.device}, "
            f"got {list(out.shape)} of {out.dtype} on {out.device}"
        )
    grad = any_grad(*tensors)
    if not in_place and (grad or (torch.is_grad_enabled() and out.requires_grad)):
        raise ValueError("out: only out=x is differentiable; write to another tensor under torch.no_grad()")
    if not in_place and out.untyped_storage()._cdata == x.untyped_storage()._cdata and torch._C._overlaps(out, x):
        raise ValueError("out: overlaps x; pass x itself to work in place")
    if backend == "reference" or torch.compiler.is_compiling() or _check.strided(out) is not out:
        # backward may need x as it was
        y, logdet = _fresh(backend, False, (x.clone() if in_place else x, *tensors[1:]), options)
        return out.copy_(y), logdet
    tensors = (out if in_place else _check.strided(x), *(_check.strided(t) for t in tensors[1:]))
    if grad:
        return _Coupling.apply(backend, True, True, *tensors, *options)
    logdet = _forward_out[backend](*tensors, out, *options)
    torch.autograd.graph.increment_version(out)
    return out, logdet


def _where(x: Tensor, mask: Mask) -> tuple[Tensor | None, list[int], int]:
    """(index, [start, stop, parity, width], number of changed channels)"""
    channels = x.shape[1]
    width = x.shape[-1] if x.dim() > 2 else 1
    if mask is None:
        return None, [0, channels, -1, width], channels
    if isinstance(mask, slice):
        start, stop, step = mask.indices(channels)
        if step != 1:
            raise ValueError(f"mask: expected a slice of step 1, got {mask}")
        return None, [start, max(start, stop), -1, width], max(start, stop) - start
    if isinstance(mask, Tensor):
        if mask.dtype == torch.bool:
            if mask.shape != (channels,):
                raise ValueError(f"mask: expected a bool tensor [{channels}], got {list(mask.shape)}")
            mask = mask.nonzero().flatten()
        if mask.dim() != 1 or mask.dtype != torch.int64:
            raise ValueError(f"mask: expected int64 channel indices [n], got {mask.dtype} {list(mask.shape)}")
        if mask.device != x.device:
            raise ValueError(f"mask: expected device {x.device} like x, got {mask.device}")
        return mask.contiguous(), [0, channels, -1, width], mask.shape[0]
    if mask in ("checkerboard_even", "checkerboard_odd"):
        if x.dim() not in (3, 4):
            raise ValueError(f"mask: a checkerboard needs x [B, C, W] or [B, C, H, W], got shape {list(x.shape)}")
        return None, [0, channels, int(mask == "checkerboard_odd"), width], channels
    raise ValueError(f"mask: expected None, a slice, a tensor, 'checkerboard_even' or 'checkerboard_odd', got {mask!r}")


def _amplitude(scale: ScaleMap, x: Tensor, changed: int) -> Tensor | None:
    """The learned amplitude as [1, n], n one of 1, the changed channels, all channels."""
    if not isinstance(scale.amplitude, Tensor):
        return None
    amplitude = scale.amplitude.reshape(1, -1)
    if amplitude.shape[1] not in (1, changed, x.shape[1]):
        raise ValueError(
            f"scale.amplitude: expected 1, {changed} or {x.shape[1]} values, got {list(scale.amplitude.shape)}"
        )
    return amplitude
