"""Masked linear layers whose masks are staircases: with its units sorted by degree, a masked layer sees of its inputs
a leading part that grows from unit to unit, so the half of the weights that is zero is never touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.ops import _check
from fastflow.ops._backend import Family, choose
from fastflow.ops._op import accumulator, any_grad, op, reference_vjp, second_order, without_autocast

__all__ = ["ACTIVATIONS", "Activation", "activate", "masked_linear", "masked_mlp", "staircase"]

FAMILY = Family("masked", gpu=())  # a GPU runs its library's products with masked weights: the reference

Activation = Literal["relu", "tanh", "softplus", "elu", "silu"]
ACTIVATIONS = ("relu", "tanh", "softplus", "elu", "silu")  # as in csrc/masked.h
_ACTIVATE: tuple[Callable[[Tensor], Tensor], ...] = (torch.relu, torch.tanh, F.softplus, F.elu, F.silu)


def activate(activation: int, x: Tensor) -> Tensor:
    """The activation of this index."""
    return _ACTIVATE[activation](x)


# --- meaning ----------------------------------------------------------------------------------------


def staircase(reach: Tensor, columns: int) -> Tensor:
    """The mask [m, columns] of a layer: unit j sees its first reach[j] inputs."""
    return torch.arange(columns, device=reach.device) < reach[:, None]


def reference(
    x: Tensor,
    weights: Sequence[Tensor],
    starts: Sequence[Tensor],
    reaches: Sequence[Tensor],
    direct: Tensor | None,
    direct_reach: Tensor | None,
    activation: int,
    residual: bool,
) -> Tensor:
    """y in plain PyTorch."""
    y, stream, last = x, None, len(weights) - 1
    for i, (weight, start, reach) in enumerate(zip(weights, starts, reaches, strict=True)):
        a = F.linear(y, weight * staircase(reach, weight.shape[1])) + start
        if i == last:
            return a if direct is None else a + F.linear(x, direct * staircase(direct_reach, x.shape[1]))
        if residual and i % 2 == 0:
            a = stream = a if stream is None else a + stream
        y = a if residual and i == last - 1 else activate(activation, a)
    raise AssertionError("a network has at least one layer")


# --- contract ---------------------------------------------------------------------------------------
# saved: what enters the activations, the units of all hidden layers one under the other, [units, B]

_NET = "Tensor[] weights, Tensor[] starts, Tensor[] reaches, Tensor? direct, Tensor? direct_reach, int activation"


@op(f"masked_mlp_fwd(Tensor x, {_NET}, bool residual, bool save) -> (Tensor, Tensor)", backends=("cpu",))
def _forward(kernel, x, weights, starts, reaches, direct, direct_reach, activation, residual, save):
    y = x.new_empty((x.shape[0], weights[-1].shape[0]))
    saved = x.new_empty((sum(w.shape[0] for w in weights[:-1]), x.shape[0]) if save else 0)
    kernel(x, weights, starts, reaches, direct, direct_reach, activation, residual, y, saved if save else None)
    return y, saved


@op(
    f"masked_mlp_bwd(Tensor x, {_NET}, bool residual, Tensor saved, Tensor gy) -> Tensor[]",
    *("masked_mlp_bwd", "masked_weight_bwd"),
    backends=("cpu",),
)
def _backward(
    run, outer, x, weights, starts, reaches, direct, direct_reach, activation, residual, saved, gy
):  # fmt: skip
    gx, ga = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(saved)
    run(weights, reaches, direct, direct_reach, activation, residual, saved, gy, gx, ga)
    net = weights, starts, reaches, direct, direct_reach, activation, residual
    return [gx, *parameter_grads(outer, x, *net, saved, gy, ga)]


def rows(starts: Sequence[Tensor]) -> list[Tensor]:
    """All as [1 or B, m]."""
    return [start.unsqueeze(0) if start.dim() == 1 else start for start in starts]


def parameter_grads(
    outer, x, weights, starts, reaches, direct, direct_reach, activation, residual, saved, gy, ga
):  # fmt: skip
    """Gradients of the weights, the starts, and the direct weight if there is one, from those of all units.

    saved, ga [units, B]: what enters the activations, and its gradient; gy [B, out].
    """
    widths = [w.shape[0] for w in weights[:-1]]
    inputs, grads = [x, *(a.t() for a in saved.split(widths))], [*(g.t() for g in ga.split(widths)), gy]
    gweights, last = [], len(weights) - 1
    for i, (weight, reach) in enumerate(zip(weights, reaches, strict=True)):
        gweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        linear = i == 0 or (residual and i == last)
        outer(grads[i], inputs[i], reach, -1 if linear else activation, gweight)
        gweights.append(gweight)
    gstarts = [
        g.sum(0) if start.dim() == 1 else g.clone(memory_format=torch.contiguous_format)
        for g, start in zip(grads, starts, strict=True)
    ]
    if direct is None:
        return [*gweights, *gstarts]
    gdirect = torch.empty_like(direct, memory_format=torch.contiguous_format)
    outer(gy, x, direct_reach, -1, gdirect)
    return [*gweights, *gstarts, gdirect]


def weight_grad_by_library(g: Tensor, x: Tensor, reach: Tensor, activation: int, gweight: Tensor) -> None:
    """What ``masked_weight_bwd`` is on a GPU: g^T phi(x), and zeros beyond the staircase."""
    torch.mm(g.t(), x if activation < 0 else activate(activation, x), out=gweight)
    gweight.masked_fill_(~staircase(reach, gweight.shape[1]), 0)


# --- gradient ---------------------------------------------------------------------------------------


class _MaskedMlp(torch.autograd.Function):
    """Saves its inputs and what enters the activations."""

    @staticmethod
    def forward(ctx, backend, activation, residual, layers, x, direct, direct_reach, *rest):
        weights, starts, reaches = rest[:layers], rest[layers : 2 * layers], rest[2 * layers :]
        y, saved = _forward[backend](
            x, weights, starts, reaches, direct, direct_reach, activation, residual, True
        )  # fmt: skip
        ctx.backend, ctx.meaning, ctx.layers = backend, (activation, residual), layers
        ctx.save_for_backward(saved, x, direct, direct_reach, *rest)
        return y

    @staticmethod
    def backward(ctx, gy):
        saved, x, direct, direct_reach, *rest = ctx.saved_tensors
        n = ctx.layers
        if second_order():

            def meaning(x, direct, *rest):
                return (reference(x, rest[:n], rest[n:], reaches, direct, direct_reach, *ctx.meaning),)

            reaches = rest[2 * n :]
            gx, gdirect, *grads = reference_vjp(meaning, (x, direct, *rest[: 2 * n]), (gy,))
        else:
            gx, *grads = _backward[ctx.backend](
                x, rest[:n], rest[n : 2 * n], rest[2 * n :], direct, direct_reach, *ctx.meaning, saved, gy
            )
            gdirect = grads.pop() if direct is not None else None
        return *[None] * 4, gx, gdirect, None, *grads, *[None] * n


# --- public -----------------------------------------------------------------------------------------


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, reach: Tensor, *, backend: str | None = None
) -> Tensor:
    r"""A linear layer with a staircase mask, :math:`y_j = b_j + \sum_{i < r_j} W_{ji} x_i`.

    Args:
        x: [B, n].
        weight: W [m, n]; what lies beyond the staircase has no effect and a gradient of exactly 0.
        bias: b [m], or None.
        reach: r [m], int64, not decreasing: of how many leading inputs unit j knows.
        backend: a backend by name; None chooses. There is no kernel for a GPU: its library's product serves.

    Returns:
        y [B, m] of the dtype of x; sums are in float32 (float64 for float64).

    >>> x, weight = torch.ones(1, 3), torch.ones(3, 3)
    >>> masked_linear(x, weight, None, torch.tensor([0, 1, 3]))
    tensor([[0., 1., 3.]])
    """
    bias = weight.new_zeros(weight.shape[:1]) if bias is None else bias
    return masked_mlp(x, [weight], [bias], [reach], backend=backend)


def masked_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    starts: Sequence[Tensor],
    reaches: Sequence[Tensor],
    *,
    activation: Activation = "relu",
    residual: bool = False,
    direct: Tensor | None = None,
    direct_reach: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""A chain of masked linear layers with staircase masks and an activation between them, as one op.

    Layer l computes :math:`a_l = W_l u_{l-1} + s_l`, in which unit j sees the first ``reaches[l][j]`` inputs, and
    :math:`u_l = \phi(a_l)`; the last layer has no activation.

    Args:
        x: [B, n].
        weights: [m, n] of every layer, first to last.
        starts: what the sums start from: a bias [m], or [B, m] where a context has its say.
        reaches: [m], int64, not decreasing; of every layer.
        activation: phi.
        residual: the hidden layers are a first one and residual blocks of two: a_2 = a_0 + W_2 phi(W_1 phi(a_0)), and
            so on; the last layer sees the last sum without activation (as nflows has it).
        direct: [m, n], a masked layer of its own from x to the outputs; with ``direct_reach``.
        backend: a backend by name; None chooses. There is no kernel for a GPU: its library's products serve.

    Returns:
        y [B, m] of the dtype of x; computed in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        BackendError: the backend asked for cannot serve the call.

    Paper: MADE, https://arxiv.org/abs/1502.03509.

    >>> weights, reaches = [torch.randn(4, 3), torch.randn(3, 4)], [torch.tensor([1, 1, 2, 2]), torch.tensor([0, 2, 4])]
    >>> masked_mlp(torch.randn(5, 3), weights, [torch.zeros(4), torch.zeros(3)], reaches).shape
    torch.Size([5, 3])
    """
    if not isinstance(x, Tensor) or x.dim() != 2:
        raise ValueError(f"x: expected [B, n], got {list(x.shape) if isinstance(x, Tensor) else type(x).__name__}")
    _check.floating("x", x)
    code = activation_index(activation)
    check_layers(x, weights, starts, residual)
    if len(reaches) != len(weights):
        raise ValueError(f"reaches: expected one for each of {len(weights)} weights, got {len(reaches)}")
    for i, (weight, reach) in enumerate(zip(weights, reaches, strict=True)):
        _check_reach(f"reaches[{i}]", reach, weight)
    if (direct is None) != (direct_reach is None):
        raise ValueError("direct_reach: expected with direct, and only then")
    if direct is not None:
        _check.beside("direct", direct, x, (weights[-1].shape[0], x.shape[1]))
        _check_reach("direct_reach", direct_reach, direct)
    backend = choose(FAMILY, (x, *weights, *starts, direct), backend)
    dtype = x.dtype
    x, direct, *rest = widened(accumulator(dtype), x, direct, *weights, *starts)
    n = len(weights)
    with without_autocast(x):
        return _run(backend, x, rest[:n], rest[n:], reaches, direct, direct_reach, code, residual).to(dtype)


def _run(backend, x, weights, starts, reaches, direct, direct_reach, activation, residual):
    if backend == "reference":
        return reference(x, weights, starts, reaches, direct, direct_reach, activation, residual)
    if any_grad(x, direct, *weights, *starts):
        options = activation, residual, len(weights)
        return _MaskedMlp.apply(backend, *options, x, direct, direct_reach, *weights, *starts, *reaches)
    return _forward[backend](x, weights, starts, reaches, direct, direct_reach, activation, residual, False)[0]


def widened(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype that is computed in."""
    return tuple(t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors)


def activation_index(activation: str) -> int:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return ACTIVATIONS.index(activation)


def check_layers(x: Tensor, weights: Sequence[Tensor], starts: Sequence[Tensor], residual: bool) -> None:
    """Weights that follow one another from x on, and a start for each."""
    if not weights or len(starts) != len(weights):
        raise ValueError(f"starts: expected one for each weight, got {len(starts)} for {len(weights)} weights")
    width = x.shape[1]
    for i, (weight, start) in enumerate(zip(weights, starts, strict=True)):
        if weight.dim() != 2 or weight.shape[1] != width:
            raise ValueError(f"weights[{i}]: expected [m, {width}], got {list(weight.shape)}")
        width = weight.shape[0]
        _check.beside(f"weights[{i}]", weight, x, tuple(weight.shape))
        _check.beside(f"starts[{i}]", start, x, (width,) if start.dim() == 1 else (x.shape[0], width))
    if residual:
        stream = [w.shape[0] for w in weights[:-1:2]]
        if len(weights) % 2 or len(set(stream)) > 1:
            raise ValueError(
                "weights: residual blocks of two layers after a first one, all of one width, need an odd number of "
                f"hidden layers; got hidden widths {[w.shape[0] for w in weights[:-1]]}"
            )


def _check_reach(name: str, reach: Tensor, weight: Tensor) -> None:
    if reach.shape != weight.shape[:1] or reach.dtype != torch.int64 or reach.device != weight.device:
        raise ValueError(
            f"{name}: expected [{weight.shape[0]}] of torch.int64 on {weight.device}, "
            f"got {list(reach.shape)} of {reach.dtype} on {reach.device}"
        )
