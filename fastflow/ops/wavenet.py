"""WaveNet's stack of causal gated convolutions over whole sequences.

Channels last, [B, T, C]: a tap of a dilated convolution is then a shift by rows, and the layer a few products

    z = tanh(a) sigmoid(b),  (a, b) = sum over the taps of W_i h_{t - (w - 1 - i) d} + V c_t + bias
    h <- h + R z + r,  skip <- skip + S z + s

of matrices [in, out] with the weights of all layers one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.ops import _check
from fastflow.ops._backend import Family, choose
from fastflow.ops._op import accumulator, any_grad, op, reference_vjp, second_order, without_autocast

__all__ = ["wavenet_stack"]

FAMILY = Family("wavenet")

PAD = 16  # kernels know whole vectors only: channels are padded with zeros to a multiple of this
PIECE = 4096  # steps that go through the stack together where no gradient needs the inputs of its layers

# --- meaning ----------------------------------------------------------------------------------------


def reference(
    x: Tensor, gate: Tensor, bias: Tensor, residual: Tensor, skip: Tensor, context: Tensor | None,
    past: Tensor | None, dilations: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(h [B, T, R], the sum of the skips [B, T, S], the new histories [B, P, R]) in plain PyTorch.

    x [B, T, R]; gate [L, w R + Cc, 2D], oldest tap first, tanh's columns before sigmoid's; bias [L, B, 2D];
    residual [L, D + 1, R] and skip [L, D + 1, S], whose last rows are biases; context [B, T, Cc]; past [B, P, R] are
    the last (w - 1) d inputs of all layers, one layer after the other, zeros where None.
    """
    steps, gated = x.shape[1], residual.shape[1] - 1
    width = _width(x, gate, context)
    total, histories, start = x.new_zeros(()), [], 0
    for layer, d in enumerate(dilations):
        rows = (width - 1) * d
        before = x.new_zeros(x.shape[0], rows, x.shape[2]) if past is None else past[:, start : start + rows]
        h = torch.cat([before, x], 1)
        taps = [h[:, i * d : i * d + steps] for i in range(width)]
        inputs = torch.cat(taps if context is None else [*taps, context], 2)
        a = inputs @ gate[layer] + bias[layer][:, None]
        z = torch.tanh(a[..., :gated]) * torch.sigmoid(a[..., gated:])
        x = x + (z @ residual[layer, :gated] + residual[layer, gated])
        total = total + (z @ skip[layer, :gated] + skip[layer, gated])
        histories.append(h[:, steps:])
        start += rows
    return x, total, torch.cat(histories, 1)


def _width(x: Tensor, gate: Tensor, context: Tensor | None) -> int:
    return (gate.shape[1] - (0 if context is None else context.shape[2])) // x.shape[2]


def _rows(x: Tensor, gate: Tensor, context: Tensor | None, dilations: Sequence[int]) -> list[int]:
    """The steps of every layer's history."""
    return [(_width(x, gate, context) - 1) * d for d in dilations]


# --- contract: all layers in one kernel ---------------------------------------------------------------
# Channels are multiples of PAD. `kept` [B, P + L T, R] are the inputs of all layers, each behind its history.

_FORWARD = (
    "(Tensor x, Tensor gate, Tensor bias, Tensor residual, Tensor skip, Tensor? context, Tensor? past,"
    " int[] dilations) -> (Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor kept, Tensor gate, Tensor bias, Tensor residual, Tensor skip, Tensor? context, int[] dilations,"
    " Tensor gout, Tensor gsum, bool of_context) -> Tensor[]"
)


def _outputs(x: Tensor, gate: Tensor, skip: Tensor, context: Tensor | None, dilations: Sequence[int]) -> list[Tensor]:
    """kept, out and the sum of the skips"""
    rows = sum(_rows(x, gate, context, dilations)) + len(dilations) * x.shape[1]
    return [x.new_empty((x.shape[0], n, c)) for n, c in ((rows, x.shape[2]), x.shape[1:], (x.shape[1], skip.shape[2]))]


@op(f"wavenet_fwd{_FORWARD}", backends=("cpu",))
def _forward(kernel, x, gate, bias, residual, skip, context, past, dilations):
    kept, out, total = _outputs(x, gate, skip, context, dilations)
    kernel(x, gate, bias, residual, skip, context, past, dilations, kept, out, total)
    return out, total, kept


@op(f"wavenet_bwd{_BACKWARD}", backends=("cpu",))
def _backward(kernel, kept, gate, bias, residual, skip, context, dilations, gout, gsum, of_context):
    gx, gbias = torch.empty_like(gout), bias.new_empty(bias.shape)
    ggate, gresidual, gskip = (torch.empty_like(w) for w in (gate, residual, skip))
    gcontext = context.new_empty(context.shape if of_context else 0) if context is not None else kept.new_empty(0)
    kernel(
        kept, gate, bias, residual, skip, context, dilations, gout, gsum,
        gx, ggate, gbias, gresidual, gskip, gcontext if of_context else None,
    )  # fmt: skip
    return [gx, ggate, gbias, gresidual, gskip, gcontext]


# --- contract: layer by layer, with the library's products ---------------------------------------------
# acts [B, T, 2D], z [B, T, D + PAD]: a gated row ends in a one, which meets the bias, and in zeros.


def _before_gate(
    h: Tensor, gate: Tensor, bias: Tensor, context: Tensor | None, d: int, steps: int, width: int
) -> Tensor:
    """The sums of one layer from its inputs behind their history, h [B, (w - 1) d + T, R]."""
    samples, _, channels = h.shape
    acts = bias[:, None].expand(-1, steps, -1)
    for i in range(width):
        tap = gate[i * channels : (i + 1) * channels].expand(samples, -1, -1)
        acts = torch.baddbmm(acts, h[:, i * d : i * d + steps], tap)
    return acts if context is None else acts.baddbmm_(context, gate[width * channels :].expand(samples, -1, -1))


def _each_layer(kept: Tensor, rows: Sequence[int], steps: int) -> list[Tensor]:
    """The parts of ``kept`` that are one layer's history and inputs."""
    return list(kept.split([n + steps for n in rows], 1))


@op(f"wavenet_layers_fwd{_FORWARD}", "wavenet_gate_fwd", backends=("cuda", "triton"))
def _layers_forward(gate_kernel, x, gate, bias, residual, skip, context, past, dilations):
    kept, out, total = _outputs(x, gate, skip, context, dilations)
    rows, (samples, steps, _), gated = _rows(x, gate, context, dilations), x.shape, residual.shape[1] - 1
    inputs, width, start = _each_layer(kept, rows, steps), _width(x, gate, context), 0
    z = x.new_empty((samples, steps, gated + PAD))
    inputs[0][:, rows[0] :].copy_(x)
    for i, (h, d) in enumerate(zip(inputs, dilations, strict=True)):
        before = h[:, : rows[i]]
        before.zero_() if past is None else before.copy_(past[:, start : start + rows[i]])
        start += rows[i]
        gate_kernel(_before_gate(h, gate[i], bias[i], context, d, steps, width), z)
        ones = z[..., : gated + 1]
        after = inputs[i + 1][:, rows[i + 1] :] if i + 1 < len(inputs) else out
        after.copy_(torch.baddbmm(h[:, rows[i] :], ones, residual[i].expand(samples, -1, -1)))
        total.baddbmm_(ones, skip[i].expand(samples, -1, -1), beta=1 if i else 0)
    return out, total, kept


@op(f"wavenet_layers_bwd{_BACKWARD}", "wavenet_gate_bwd", backends=("cuda", "triton"))
def _layers_backward(gate_kernel, kept, gate, bias, residual, skip, context, dilations, gout, gsum, of_context):
    gbias, ggate, gresidual, gskip = (t.new_empty(t.shape) for t in (bias, gate, residual, skip))
    gcontext = torch.zeros_like(context) if of_context else kept.new_empty(0)
    (samples, steps, channels), gated = gout.shape, residual.shape[1] - 1
    rows, width = _rows(gout, gate, context, dilations), _width(gout, gate, context)
    z, g = kept.new_empty((samples, steps, gated + PAD)), gout
    inputs = _each_layer(kept, rows, steps)
    for i in reversed(range(len(dilations))):
        h, d = inputs[i], dilations[i]
        acts = _before_gate(h, gate[i], bias[i], context, d, steps, width)
        gz = g @ residual[i, :gated].t() + gsum @ skip[i, :gated].t()
        gate_kernel(acts, gz, z)  # acts becomes its gradient
        ones = z[..., : gated + 1].flatten(0, 1).t()
        gresidual[i], gskip[i], gbias[i] = ones @ g.flatten(0, 1), ones @ gsum.flatten(0, 1), acts.sum(1)
        of_taps, back = ggate[i], gate[i].t()
        if context is not None:
            of_taps[width * channels :] = context.flatten(0, 1).t() @ acts.flatten(0, 1)
            if of_context:
                gcontext += acts @ back[:, width * channels :]
        previous = g.clone()
        for k in range(width):
            tap, shift = slice(k * channels, (k + 1) * channels), (width - 1 - k) * d
            of_taps[tap] = (h[:, k * d : k * d + steps].transpose(1, 2) @ acts).sum(0)
            if shift < steps:
                previous[:, : steps - shift] += acts[:, shift:] @ back[:, tap]
        g = previous
    return [g, ggate, gbias, gresidual, gskip, gcontext]


FORWARD = {**_forward, **_layers_forward}
BACKWARD = {**_backward, **_layers_backward}


# --- gradient ---------------------------------------------------------------------------------------


class _Stack(torch.autograd.Function):
    """Saves the inputs of all layers, L [B, T, R]; the gates are made again. The histories count as constants."""

    @staticmethod
    def forward(ctx, backend, x, gate, bias, residual, skip, context, past, dilations):
        out, total, kept = FORWARD[backend](x, gate, bias, residual, skip, context, past, dilations)
        ctx.backend, ctx.dilations = backend, dilations
        ctx.save_for_backward(x, gate, bias, residual, skip, context, past, kept)
        ctx.mark_non_differentiable(kept)
        ctx.set_materialize_grads(False)
        return out, total, kept

    @staticmethod
    def backward(ctx, gout, gtotal, _):
        x, gate, bias, residual, skip, context, past, kept = ctx.saved_tensors
        gout = torch.zeros_like(x) if gout is None else gout
        gtotal = x.new_zeros((*x.shape[:2], skip.shape[2])) if gtotal is None else gtotal
        if second_order():

            def meaning(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
                return reference(*tensors, past, ctx.dilations)[:2]

            inputs = (x, gate, bias, residual, skip, context)
            return None, *reference_vjp(meaning, inputs, (gout, gtotal)), None, None
        of_context = context is not None and context.requires_grad
        *grads, gcontext = BACKWARD[ctx.backend](
            kept, gate, bias, residual, skip, context, ctx.dilations, gout.contiguous(), gtotal.contiguous(), of_context
        )  # fmt: skip
        return None, *grads, gcontext if of_context else None, None, None


# --- public -----------------------------------------------------------------------------------------


def wavenet_stack(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual_weight: Tensor,
    residual_bias: Tensor,
    skip_weight: Tensor,
    skip_bias: Tensor,
    dilations: Sequence[int],
    *,
    context: Tensor | None = None,
    context_weight: Tensor | None = None,
    past: Tensor | None = None,
    remember: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    r"""Causal gated convolutions with residual and skip connections, all layers in one pass:

    .. math:: z = \tanh(a) \odot \sigma(b), \quad
        (a, b)_t = \sum_{i<w} W_i h_{t - (w-1-i) d} + V c_t + \beta, \quad
        h \leftarrow h + R z + r, \quad s \leftarrow s + S z + \gamma

    Before its first step every layer has seen zeros: its own inputs are padded, which is not the same as zeros before
    x, because layers have biases.

    Args:
        x: h [B, T, R], channels last.
        weight: W [L, 2D, R, w] of L layers, the D rows of tanh before those of the sigmoid, the oldest tap first.
        bias: beta [L, 2D]; or [L, B, 2D], one for every sample: global conditioning is added to it.
        residual_weight, residual_bias: R [L, R, D], r [L, R].
        skip_weight, skip_bias: S [L, S, D], gamma [L, S].
        dilations: d of every layer.
        context: local conditioning c [B, T, Cc].
        context_weight: V [L, 2D, Cc]; goes with ``context``.
        past: what ``remember`` gave for the steps before: the stack then goes on where it stopped. Has no gradient.
        remember: return the inputs that the next steps need too.

    Returns:
        h after the last layer [B, T, R] and the sum of the skips [B, T, S] in the dtype of x; with ``remember`` also
        the last (w - 1) d inputs of every layer, one after the other [B, P, R], in float64 for float64 and float32
        for all else, which is also what is computed in.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        BackendError: the backend asked for cannot serve the call.

    Paper: WaveNet, https://arxiv.org/abs/1609.03499.

    >>> L, R, D, S = 3, 4, 5, 6
    >>> weights = [torch.randn(s) for s in ((L, 2 * D, R, 2), (L, 2 * D), (L, R, D), (L, R), (L, S, D), (L, S))]
    >>> x = torch.randn(2, 10, R)
    >>> h, skip = wavenet_stack(x, *weights, dilations=(1, 2, 4))
    >>> h.shape, skip.shape
    (torch.Size([2, 10, 4]), torch.Size([2, 10, 6]))
    >>> _, first, past = wavenet_stack(x[:, :7], *weights, dilations=(1, 2, 4), remember=True)
    >>> _, rest = wavenet_stack(x[:, 7:], *weights, dilations=(1, 2, 4), past=past)
    >>> bool(torch.allclose(torch.cat([first, rest], 1), skip, atol=1e-5))
    True
    """
    weights = (weight, bias, residual_weight, residual_bias, skip_weight, skip_bias)
    dilations = [int(d) for d in dilations]
    _check_stack(x, weights, dilations, context, context_weight, past)
    dtype, channels, skipped = accumulator(x.dtype), x.shape[2], skip_weight.shape[1]
    given = (x, *weights, context, context_weight, past)
    backend = choose(FAMILY, given, backend)
    with without_autocast(x):
        x, *weights, context, context_weight, past = (t if t is None else t.to(dtype) for t in given)
        pad = 1 if backend == "reference" else PAD
        matrices = pack(*weights, context_weight, samples=x.shape[0], pad=pad)
        context = None if context is None else padded(context, 2, pad).contiguous()
        past = None if past is None else padded(past, 2, pad).detach().contiguous()
        out, total, past = run(backend, padded(x, 2, pad), *matrices, context, past, dilations, remember)
    out, total = out[..., :channels].to(given[0].dtype), total[..., :skipped].to(given[0].dtype)
    return (out, total, past[..., :channels]) if remember else (out, total)


def padded(tensor: Tensor, dim: int, pad: int) -> Tensor:
    """Zeros at the end of a dimension, up to a multiple of ``pad``."""
    missing = -tensor.shape[dim] % pad
    return tensor if missing == 0 else F.pad(tensor, (0, 0) * (tensor.dim() - 1 - dim) + (0, missing))


def pack(
    weight: Tensor, bias: Tensor, residual_weight: Tensor, residual_bias: Tensor, skip_weight: Tensor,
    skip_bias: Tensor, context_weight: Tensor | None, *, samples: int, pad: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(gate [L, w R + Cc, 2D], bias [L, B, 2D], residual [L, D + 1, R], skip [L, D + 1, S]) for kernels."""
    layers, both, _, _ = weight.shape

    def halves(t: Tensor) -> Tensor:  # [L, ..., 2D], each half padded
        return padded(t.unflatten(-1, (2, both // 2)), t.dim(), pad).flatten(-2)

    gate = padded(weight.permute(0, 3, 2, 1), 2, pad).flatten(1, 2)
    if context_weight is not None:
        gate = torch.cat([gate, padded(context_weight.transpose(1, 2), 1, pad)], 1)
    bias = bias[:, None] if bias.dim() == 2 else bias
    return (
        halves(gate).contiguous(),
        halves(bias).expand(-1, samples, -1),
        _with_bias(residual_weight, residual_bias, pad),
        _with_bias(skip_weight, skip_bias, pad),
    )


def _with_bias(weight: Tensor, bias: Tensor, pad: int) -> Tensor:
    """[L, out, in] and [L, out] to [L, in + 1, out]"""
    rows = torch.cat([padded(weight.transpose(-1, -2), weight.dim() - 2, pad), bias.unsqueeze(-2)], -2)
    return padded(rows, rows.dim() - 1, pad).contiguous()


def run(
    backend: str, x: Tensor, gate: Tensor, bias: Tensor, residual: Tensor, skip: Tensor, context: Tensor | None,
    past: Tensor | None, dilations: list[int], remember: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The stack of packed matrices: (out, sum of the skips, histories)."""
    if backend == "reference":
        out, total, past = reference(x, gate, bias, residual, skip, context, past, dilations)
        return out, total, past.detach()
    tensors = (x if x.stride(2) == 1 else x.contiguous(), gate, bias, residual, skip, context)
    if any_grad(*tensors):
        out, total, kept = _Stack.apply(backend, *tensors, past, dilations)
        return out, total, _remembered(kept, tensors, dilations) if remember else None
    pieces = []
    for start in range(0, max(1, x.shape[1]), PIECE):  # longer sequences would only need more memory
        part = slice(start, start + PIECE)
        some = (tensors[0][:, part], *tensors[1:5], None if context is None else context[:, part].contiguous())
        out, total, kept = FORWARD[backend](*some, past, dilations)
        if remember or start + PIECE < x.shape[1]:
            past = _remembered(kept, some, dilations)
        pieces.append((out, total))
    if len(pieces) > 1:
        out, total = (torch.cat(parts, 1) for parts in zip(*pieces, strict=True))
    return out, total, past


def _remembered(kept: Tensor, tensors: Sequence[Tensor | None], dilations: Sequence[int]) -> Tensor:
    """The last steps of every layer's inputs [B, P, R]."""
    x, gate, *_, context = tensors
    ends, start = [], 0
    for rows in _rows(x, gate, context, dilations):
        start += rows + x.shape[1]
        ends.append(kept[:, start - rows : start])
    return torch.cat(ends, 1)


def _check_stack(
    x: Tensor, weights: Sequence[Tensor], dilations: list[int], context: Tensor | None, context_weight: Tensor | None,
    past: Tensor | None,
) -> None:  # fmt: skip
    _check.floating("x", x, 3)
    weight, bias, residual_weight, _, skip_weight, _ = weights
    _check.floating("weight", weight, 4)
    if x.dim() != 3:
        raise ValueError(f"x: expected [B, T, R], got {list(x.shape)}")
    (layers, both, channels, width), samples = weight.shape, x.shape[0]
    if both % 2 or channels != x.shape[2] or width < 1 or layers < 1:
        raise ValueError(
            f"weight: expected [L, 2D, {x.shape[2]}, w] for x of {list(x.shape)}, got {list(weight.shape)}"
        )
    if len(dilations) != layers or min(dilations) < 1:
        raise ValueError(f"dilations: expected {layers} positive numbers, got {dilations}")
    gated, skipped = both // 2, skip_weight.shape[1] if skip_weight.dim() == 3 else 0
    shapes = {
        "weight": weight.shape,
        "bias": (layers, samples, both) if bias.dim() == 3 else (layers, both),
        "residual_weight": (layers, channels, gated),
        "residual_bias": (layers, channels),
        "skip_weight": (layers, skipped, gated),
        "skip_bias": (layers, skipped),
    }
    for (name, shape), tensor in zip(shapes.items(), weights, strict=True):
        _check.beside(name, tensor, x, tuple(shape))
    if (context is None) != (context_weight is None):
        raise ValueError("context: expected context and context_weight together, got one of them")
    if context is not None:
        _check.floating("context", context, 3)
        _check.beside("context", context, x, (*x.shape[:2], context.shape[-1]))
        _check.beside("context_weight", context_weight, x, (layers, both, context.shape[2]))
    if past is not None:
        _check.beside("past", past, x, (samples, (width - 1) * sum(dilations), channels))
