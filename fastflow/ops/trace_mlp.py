"""The dynamics of a continuous flow, an MLP f(x, t), and the trace of its Jacobian in one forward sweep.

Value and tangents go through the layers together, as rows of the same products:

    a = W y + b,  a' = W y',   y <- phi(a),  y' <- phi'(a) a'        from y = x, y' = e to  f(x, t), J e

and e . J e is the trace's estimate for the probe e. Training needs only the ordinary reverse of this sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.ops import _check
from fastflow.ops._backend import Family, choose, transformed
from fastflow.ops._op import accumulator, any_grad, op, reference_vjp, second_order, without_autocast
from fastflow.ops.trace import Rademacher, signs

__all__ = ["mlp_trace"]

FAMILY = Family("trace")

ACTIVATIONS = ("tanh", "softplus", "elu", "silu")  # as in csrc/trace.h
LAYERS = ("concat", "concat_squash", "ignore")  # as in csrc/cpu/dynamics.h
# up to this width a block of samples stays in the cache through all layers; wider ones, and others, go one by one
FUSED_WIDTH = {"cpu": 128}

# what the kernels do not know is written in what they do: a gate alone with a shift of 0; a sigmoid(beta a) as
# silu(beta a) / beta, with beta in the layer before and 1 / beta in the layer after
WRITTEN_AS = {"squash": "concat_squash", "swish": "silu"}

_PARAMETERS = {"concat": 2, "concat_squash": 5, "ignore": 2, "squash": 4}
_NAMES = ("weight", "bias", "gate_weight", "gate_bias", "hyper_weight")


# --- meaning ----------------------------------------------------------------------------------------


def reference(x: Tensor, t: Tensor, probes: Tensor, *params: Tensor, layer: int, activation: int):
    """(f(x, t) [B, D], e . J e [S, B]) in plain PyTorch. x [B, D]; t []; probes e [S, B, D]."""
    y, tangent = sweep(x, t, probes, params, layer, activation)
    return y, (tangent * probes).sum(2)


def sweep(x: Tensor, t: Tensor, probes: Tensor | None, params: Sequence[Tensor], layer: int, activation: int):
    """(f(x, t) [B, D], J e [S, B, D] or None without probes). t [], or a time for every sample, [B, 1]."""
    y, tangent = x, probes
    layers = _layers(params, layer)
    for i, (weight, bias, *gating) in enumerate(layers):
        if LAYERS[layer] == "concat":
            weight, bias = weight[:, 1:], bias + t * weight[:, 0]
        y = F.linear(y, weight) + bias
        tangent = None if tangent is None else F.linear(tangent, weight)
        if gating:
            gate, shift = _gate(t, *gating)
            y, tangent = gate * y + shift, None if tangent is None else gate * tangent
        if i + 1 < len(layers):
            y, slope = _activate(y, ACTIVATIONS[activation])
            tangent = None if tangent is None else slope * tangent
    return y, tangent


def _activate(a: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(phi(a), phi'(a))"""
    if activation == "tanh":
        y = torch.tanh(a)
        return y, 1 - y * y
    if activation == "softplus":
        return F.softplus(a, threshold=50), torch.sigmoid(a)
    if activation == "elu":
        y = F.elu(a)
        return y, torch.where(a > 0, 1, y + 1)
    s = torch.sigmoid(a)
    return a * s, s * (1 + a * (1 - s))


def _affine(t: Tensor, params: Sequence[Tensor], layer: int) -> list[tuple[Tensor, Tensor]]:
    """(W, b) of every layer: at one t each of them is W y + b."""
    layers = []
    for weight, bias, *gating in _layers(params, layer):
        if LAYERS[layer] == "concat":
            weight, bias = weight[:, 1:], bias + t * weight[:, 0]
        elif LAYERS[layer] == "concat_squash":
            gate, shift = _gate(t, *gating)
            weight, bias = gate[:, None] * weight, gate * bias + shift
        layers.append((weight, bias))
    return layers


def _layers(params: Sequence[Tensor], layer: int) -> list[Sequence[Tensor]]:
    each = _PARAMETERS[LAYERS[layer]]
    return [params[i : i + each] for i in range(0, len(params), each)]


def _gate(t: Tensor, gate_weight: Tensor, gate_bias: Tensor, hyper_weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sigmoid(t * gate_weight[:, 0] + gate_bias), t * hyper_weight[:, 0]


# --- contract: narrow layers, all in one kernel -----------------------------------------------------

_FORWARD = "(Tensor x, Tensor t, Tensor probes, Tensor[] params, int layer, int activation, bool save)"
_BACKWARD = (
    "(Tensor x, Tensor t, Tensor probes, Tensor[] params, Tensor saved, Tensor gvalue, Tensor gtrace, int layer,"
    " int activation)"
)


@op(f"mlp_trace_fwd{_FORWARD} -> (Tensor, Tensor, Tensor)", backends=tuple(FUSED_WIDTH))
def _forward(kernel, x, t, probes, params, layer, activation, save):
    value, trace = torch.empty_like(x), x.new_empty(probes.shape[:2])
    # the rows of every hidden layer, padded to whole vectors as csrc/cpu/tile.h has them
    hidden = sum((p[0].shape[0] + 15) // 16 * 16 for p in _layers(params, layer)[:-1])
    saved = x.new_empty(x.shape[0] * (1 + probes.shape[0]) * hidden if save else 0)
    kernel(x, t, probes, params, layer, activation, value, trace, saved if save else None)
    return value, trace, saved


@op(f"mlp_trace_bwd{_BACKWARD} -> Tensor[]", backends=tuple(FUSED_WIDTH))
def _backward(kernel, x, t, probes, params, saved, gvalue, gtrace, layer, activation):
    gx, gt, gparams = torch.empty_like(x), torch.empty_like(t), [torch.empty_like(p) for p in params]
    kernel(x, t, probes, params, layer, activation, saved, gvalue, gtrace, gx, gt, gparams)
    return [gx, gt, *gparams]


# --- contract: wide layers, one kernel each ---------------------------------------------------------
# rows [B, 1 + S, n]: every sample's value, then its tangents. Where no probes are given, S signs are made of the seed.


def _signed(signature: str) -> str:
    return signature.replace("Tensor probes", "Tensor? probes, int count, int seed")


@op(
    f"mlp_trace_wide_fwd{_signed(_FORWARD)} -> (Tensor, Tensor, Tensor)",
    *("trace_rows", "trace_layer_fwd", "trace_contract"),
)
def _wide_forward(stack, run, contract, x, t, probes, count, seed, params, layer, activation, save):
    layers = _affine(t, params, layer)
    rows = x.new_empty((x.shape[0], 1 + count, x.shape[1]))
    stack(x, probes, seed, rows)
    saved, kept = _kept(rows, layers)
    y = rows
    for (weight, bias), a in zip(layers[:-1], kept, strict=True):
        z = torch.empty_like(a) if _keeps_input(activation) else a
        run(y, weight, bias, a, z, activation)
        y = z
    weight, bias = layers[-1]
    last = torch.empty_like(rows)
    run(y, weight, None, last, None, activation)
    value, trace = torch.empty_like(x), x.new_empty((count, x.shape[0]))
    contract(last, bias, probes, seed, value, trace)
    return value, trace, saved


@op(
    f"mlp_trace_wide_bwd{_signed(_BACKWARD)} -> Tensor[]",
    *("trace_rows", "trace_rows_bwd", "trace_layer_bwd"),
)
def _wide_backward(
    stack, unstack, run, x, t, probes, count, seed, params, saved, gvalue, gtrace, layer, activation
):  # fmt: skip
    layers = _affine(t, params, layer)
    rows = x.new_empty((x.shape[0], 1 + count, x.shape[1]))
    g = torch.empty_like(rows)
    stack(x, probes, seed, rows)
    unstack(gvalue, gtrace, probes, seed, g)
    _, kept = _kept(rows, layers, saved)
    gt, gparams = torch.zeros_like(t), []
    for i in reversed(range(len(layers))):
        weight, before = layers[i][0], kept[i - 1] if i > 0 else None
        y = rows if before is None else torch.empty_like(before) if _keeps_input(activation) else before
        previous = torch.empty_like(rows[:, 0] if before is None else before)
        gweight = weight.new_empty(weight.shape)
        run(g, weight, before, y, gweight, previous, activation)
        of_t, *grads = _unfold(t, _layers(params, layer)[i], layer, gweight, g[:, 0].sum(0))
        gt, gparams = gt + of_t, [*grads, *gparams]
        g = previous
    return [g, gt, *gparams]


def _keeps_input(activation: int) -> bool:
    return ACTIVATIONS[activation] == "silu"  # as in csrc/trace.h


def _kept(rows: Tensor, layers: list, saved: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """One buffer for the rows of all hidden layers, and its parts [B, 1 + S, width]."""
    shapes = [(*rows.shape[:2], weight.shape[0]) for weight, _ in layers[:-1]]
    sizes = [shape[0] * shape[1] * shape[2] for shape in shapes]
    saved = rows.new_empty(sum(sizes)) if saved is None else saved
    return saved, [part.view(shape) for part, shape in zip(saved.split(sizes), shapes, strict=True)]


def _unfold(t: Tensor, params: Sequence[Tensor], layer: int, gweight: Tensor, gbias: Tensor) -> tuple[Tensor, ...]:
    """From the gradients of (W, b) of :func:`_affine` to those of t and of the layer's parameters."""
    weight, bias, *gating = params
    if LAYERS[layer] == "ignore":
        return torch.zeros_like(t), gweight, gbias
    if LAYERS[layer] == "concat":
        return gbias @ weight[:, 0], torch.cat([(t * gbias)[:, None], gweight], 1), gbias
    gate, _ = _gate(t, *gating)
    ginner = ((gweight * weight).sum(1) + gbias * bias) * gate * (1 - gate)
    gt = ginner @ gating[0][:, 0] + gbias @ gating[2][:, 0]
    return gt, gate[:, None] * gweight, gate * gbias, (t * ginner)[:, None], ginner, (t * gbias)[:, None]


# --- gradient ---------------------------------------------------------------------------------------


class _MlpTrace(torch.autograd.Function):
    """Saves x, the probes (or their seed), the parameters and the rows of the hidden layers."""

    @staticmethod
    def forward(ctx, run, backward, meaning, source, x, t, probes, *params):
        value, trace, saved = run(x, t, probes, *source, params, *meaning, True)
        ctx.backward_of, ctx.meaning, ctx.source = backward, meaning, source
        ctx.save_for_backward(saved, x, t, probes, *params)
        return value, trace

    @staticmethod
    def backward(ctx, gvalue, gtrace):
        saved, x, t, probes, *params = ctx.saved_tensors
        if second_order():
            probes = _materialised(x, probes, *ctx.source)
            meaning = partial(reference, layer=ctx.meaning[0], activation=ctx.meaning[1])
            return *[None] * 4, *reference_vjp(meaning, (x, t, probes, *params), (gvalue, gtrace))
        gx, gt, *gparams = ctx.backward_of(
            x, t, probes, *ctx.source, params, saved, gvalue, gtrace, *ctx.meaning
        )  # fmt: skip
        return *[None] * 4, gx, gt, None, *gparams


# --- public -----------------------------------------------------------------------------------------


def mlp_trace(
    x: Tensor,
    t: Tensor | float,
    layers: Sequence[Sequence[Tensor]],
    *,
    activation: Literal["tanh", "softplus", "elu", "silu", "swish"] = "tanh",
    layer: Literal["concat", "concat_squash", "ignore", "squash"] = "concat",
    probes: Tensor | Rademacher | None = None,
    exact: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""An MLP :math:`f(x, t)` and the trace of its Jacobian, or the estimates :math:`e^\top \partial_x f\, e` of it.

    Args:
        x: [B, D].
        t: the time, a number or a tensor of one element.
        layers: the parameters of every layer, first to last; the activation follows every layer but the last.
            ``concat``: (weight [m, 1 + n], bias [m]), the layer is weight [t, y] + bias;
            ``concat_squash``: (weight [m, n], bias [m], gate_weight [m, 1], gate_bias [m], hyper_weight [m, 1]), the
            layer is (weight y + bias) sigmoid(gate_weight t + gate_bias) + hyper_weight t;
            ``squash``: (weight [m, n], bias [m], gate_weight [m, 1], gate_bias [m]), the same without the last term;
            ``ignore``: (weight [m, n], bias [m]).
        activation: ``swish``, a sigmoid(beta a), has a beta [], not 0, as one more parameter of the layers it follows.
        probes: e, [S, B, D] or [B, D], from :func:`fastflow.probes`; they count as constants. Or
            :class:`fastflow.Rademacher`: signs that a kernel makes of a seed where it needs them.
        exact: the trace itself by D unit tangents instead; for small D.
        backend: a backend by name; None chooses.

    Returns:
        f(x, t) of the shape and dtype of x; and the trace [B], or the probes' estimates [S, B] ([B] for probes
        [B, D]), in float64 for float64 and float32 for all else, which is also what is computed in.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        BackendError: the backend asked for cannot serve the call.

    Paper: FFJORD, https://arxiv.org/abs/1810.01367.

    >>> layers = [(torch.randn(8, 1 + 2), torch.zeros(8)), (torch.randn(2, 1 + 8), torch.zeros(2))]
    >>> x = torch.randn(5, 2)
    >>> value, trace = mlp_trace(x, 0.5, layers, exact=True)
    >>> value.shape, trace.shape
    (torch.Size([5, 2]), torch.Size([5]))
    >>> mlp_trace(x, 0.5, layers, probes=torch.randn(3, 5, 2))[1].shape
    torch.Size([3, 5])
    """
    _check.floating("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected [B, D], got {list(x.shape)}")
    dtype = accumulator(x.dtype)
    probes, count, seed, reduce = _probes(x, probes, exact)
    time = _time(t, x)
    with without_autocast(x):
        params, *kind = network(x, layers, layer, activation)
        backend = choose(FAMILY, (x, probes, *params), backend)
        tensors = tuple(p if p is None or p.dtype == dtype else p.to(dtype) for p in (x, time, probes, *params))
        value, trace = _run(backend, tensors, count, seed, *kind)
    return value.to(x.dtype), {"sum": lambda: trace.sum(0), "only": lambda: trace[0], "all": lambda: trace}[reduce]()


def _run(
    backend: str, tensors: tuple[Tensor | None, ...], count: int, seed: int, layer: int, activation: int
) -> tuple[Tensor, Tensor]:
    x, t, probes, *params = tensors
    widest = max(x.shape[1], *(p[0].shape[0] for p in _layers(params, layer)))
    fused = widest <= FUSED_WIDTH.get(backend, 0)
    if fused or backend == "reference":
        probes = _materialised(x, probes, count, seed)
    if backend == "reference":
        return reference(x, t, probes, *params, layer=layer, activation=activation)
    forward, backward = (_forward, _backward) if fused else (_wide_forward, _wide_backward)
    source, meaning = () if fused else (count, seed), (layer, activation)
    if any_grad(*tensors):
        return _MlpTrace.apply(forward[backend], backward[backend], meaning, source, x, t, probes, *params)
    return forward[backend](x, t, probes, *source, params, *meaning, False)[:2]


def _materialised(x: Tensor, probes: Tensor | None, count: int = 0, seed: int = 0) -> Tensor:
    """The probes [S, B, D], made of the seed where they are not given."""
    return signs((count, *x.shape), seed, dtype=x.dtype, device=x.device) if probes is None else probes


def _probes(x: Tensor, probes: Tensor | Rademacher | None, exact: bool) -> tuple[Tensor | None, int, int, str]:
    """(probes [S, B, D] or None for signs, S, their seed, what to make of the estimates [S, B])"""
    if exact == (probes is not None):
        raise ValueError("probes: expected either probes or exact=True, got " + ("both" if exact else "neither"))
    if exact:
        unit = torch.eye(x.shape[1], dtype=accumulator(x.dtype), device=x.device)
        return unit[:, None].expand(-1, x.shape[0], -1), x.shape[1], 0, "sum"
    if isinstance(probes, Rademacher):
        if probes.count < 1 or not 0 <= probes.seed < 2**63:
            raise ValueError(f"probes: expected a count of at least 1 and a seed from 0 to 2^63 - 1, got {probes}")
        return None, probes.count, probes.seed, "all"
    if not isinstance(probes, Tensor):
        raise TypeError(f"probes: expected a tensor or Rademacher, got {type(probes).__name__}")
    if probes.dim() not in (2, 3) or probes.shape[-2:] != x.shape:
        raise ValueError(f"probes: expected [S, {x.shape[0]}, {x.shape[1]}] or x's shape, got {list(probes.shape)}")
    _goes_with(x, "probes", probes)
    probes = probes.detach()
    return (probes[None], 1, 0, "only") if probes.dim() == 2 else (probes, probes.shape[0], 0, "all")


def _time(t: Tensor | float, x: Tensor) -> Tensor:
    if not isinstance(t, Tensor):
        return torch.full((), t, dtype=accumulator(x.dtype), device=x.device)
    if t.numel() != 1:
        raise ValueError(f"t: expected one element, got {list(t.shape)}")
    _goes_with(x, "t", t)
    return t.reshape(()) if t.dim() else t


def network(
    x: Tensor, layers: Sequence[Sequence[Tensor]], layer: str, activation: str
) -> tuple[list[Tensor], int, int]:
    """All parameters one after the other in the accumulator's dtype, checked, and the kernels' (layer, activation)."""
    if activation not in (*ACTIVATIONS, "swish"):
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, swish, got {activation!r}")
    if layer not in _PARAMETERS:
        raise ValueError(f"layer: expected one of {', '.join(_PARAMETERS)}, got {layer!r}")
    params = _checked(x, layers, layer, activation == "swish")
    dtype = accumulator(x.dtype)
    params = [[p if p.dtype == dtype else p.to(dtype) for p in given] for given in params]
    if activation == "swish":
        params = _folded(params, layer)
    if layer == "squash":
        params = [[*given, torch.zeros_like(given[2])] for given in params]
    kinds = (WRITTEN_AS.get(layer, layer), WRITTEN_AS.get(activation, activation))
    return [p for given in params for p in given], LAYERS.index(kinds[0]), ACTIVATIONS.index(kinds[1])


def _folded(params: list[list[Tensor]], layer: str) -> list[list[Tensor]]:
    """The parameters with each layer's beta, its last one, in the weights around it."""
    inverse, folded = None, []
    for i, (weight, bias, *gating) in enumerate(params):
        if inverse is not None and layer == "concat":
            weight = torch.cat([weight[:, :1], inverse * weight[:, 1:]], 1)
        elif inverse is not None:
            weight = inverse * weight
        if i + 1 < len(params):
            *gating, beta = gating
            beta = beta.reshape(())
            weight, bias, inverse = beta * weight, beta * bias, 1 / beta
            gating = [*gating[:2], *(beta * hyper for hyper in gating[2:])]
        folded.append([weight, bias, *gating])
    return folded


def _checked(x: Tensor, layers: Sequence[Sequence[Tensor]], layer: str, swish: bool) -> list[list[Tensor]]:
    if not isinstance(layers, (list, tuple)):
        raise TypeError(f"layers: expected a list of the tensors of every layer, got {type(layers).__name__}")
    if not layers:
        raise ValueError("layers: expected at least one layer, got none")
    width, params = x.shape[1], []
    for i, given in enumerate(layers):
        names = _NAMES[: _PARAMETERS[layer]] + (("beta",) if swish and i + 1 < len(layers) else ())
        if not isinstance(given, (list, tuple)):
            raise TypeError(f"layers[{i}]: expected ({', '.join(names)}), got {type(given).__name__}")
        if len(given) != len(names):
            kind = f"{layer!r}" + (" with swish" if swish else "")
            raise ValueError(f"layers[{i}]: expected ({', '.join(names)}) for {kind}, got {len(given)} tensors")
        out = given[0].shape[0]
        shapes = ((out, width + (layer == "concat")), (out,), (out, 1), (out,), (out, 1))
        expected = dict(zip(_NAMES, shapes, strict=True)) | {"beta": ()}
        for name, tensor in zip(names, given, strict=True):
            if tensor.shape != expected[name] and not (name == "beta" and tensor.numel() == 1):
                raise ValueError(f"layers[{i}] {name}: expected {list(expected[name])}, got {list(tensor.shape)}")
            if tensor.dtype != x.dtype or tensor.device != x.device:
                _goes_with(x, f"layers[{i}] {name}", tensor)
            if name == "beta" and _readable(tensor) and tensor.item() == 0:
                raise ValueError(f"layers[{i}] beta: expected a number other than 0")
        params.append(list(given))
        width = out
    if width != x.shape[1]:
        raise ValueError(f"layers[{len(layers) - 1}]: expected {x.shape[1]} outputs like x, got {width}")
    return params


def _readable(tensor: Tensor) -> bool:
    """May its values be looked at, without waiting for a GPU?"""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()


def _goes_with(x: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} like x, got {tensor.device}")
    if tensor.dtype not in _check.FLOATING or (tensor.dtype == torch.float64) != (x.dtype == torch.float64):
        raise TypeError(f"{name}: expected a dtype that goes with x of {x.dtype}, got {tensor.dtype}")
