"""GRU-ODE-Bayes: the filter of sporadic series, all integration and all jumps of a batch in one call.

Between the observations of a series its state h follows an ODE, at each of them it jumps by a GRU cell. Series do not
know of each other, so each has its own clock: the :class:`Schedule`.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastflow.errors import SolverError
from fastflow.ops import _check
from fastflow.ops._backend import Family, choose, transformed
from fastflow.ops._op import accumulator, any_grad, op, reference_vjp, second_order, without_autocast
from fastflow.ops.gru_ode_reference import CELLS, owners, reference, where
from fastflow.ops.ode_method import METHODS, Method

__all__ = ["Cell", "Filtered", "Gru", "Observe", "Prep", "Schedule", "gru_ode_filter"]

FAMILY = Family("gru_ode")


class Cell(NamedTuple):
    """The dynamics of the state."""

    hidden: Tensor
    """[3H, H], the matrices of r, z and u one below the other; minimal: [2H, H], of z and n."""
    input_weight: Tensor | None = None
    """[3H or 2H, 2D] and its bias [3H or 2H]: what an imputing cell makes of the prediction; others read neither."""
    input_bias: Tensor | None = None
    kind: Literal["full", "minimal"] = "full"


class Observe(NamedTuple):
    """The prediction from the state: Linear, ReLU, Linear. [P, H], [P], [2D, P], [2D]: means, then log-variances."""

    hidden_weight: Tensor
    hidden_bias: Tensor
    weight: Tensor
    bias: Tensor


class Prep(NamedTuple):
    """What a channel's value, mean, log-variance and error are made to before the jump: [D, 4, Q], [D, Q]."""

    weight: Tensor
    bias: Tensor


class Gru(NamedTuple):
    """The parameters of a torch.nn.GRUCell(D Q, H): [3H, D Q], [3H, H], [3H], [3H]."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor
    bias_hh: Tensor


class Schedule(NamedTuple):
    """When the rows come: sorted by series and then by time, the rows of series b are offsets[b] to offsets[b + 1].

    Before row r its series makes counts[r] steps of sizes[r], and after its last row those of the segment N + b. An
    adaptive method integrates an interval of that size instead of making a step.
    """

    offsets: Tensor
    """[B + 1] int64"""
    counts: Tensor
    """[N + B] int64"""
    sizes: Tensor
    """[N + B] float64"""
    jumps: Tensor
    """[N] bool: False only reads the prediction there."""


class Filtered(NamedTuple):
    """The predictions before and after every row, and the states."""

    pre: Tensor
    """[N, 2D]: means, then log-variances, before the jump."""
    post: Tensor
    """[N, 2D]: after it; where there is none the same as before."""
    state: Tensor
    """[B, H] at the end."""
    states: Tensor
    """[N, H] after every row."""
    steps: Tensor
    """[B, 3] int64: evaluations of the dynamics, accepted and rejected steps."""


# --- contract ---------------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor h0, Tensor values, Tensor masks, Tensor? dropout, Tensor[] params, Tensor offsets, Tensor counts,"
    " Tensor sizes, Tensor jumps, int kind, bool impute, float[] method, float rtol, float atol, int max_steps"
)


@contextlib.contextmanager
def _faults() -> Iterator[None]:
    """A kernel says that it cannot go on by a plain RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        raise SolverError(str(error)) from None


@op(f"gru_ode_fwd({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
def _forward(kernel, h0, values, masks, *rest):
    rows, channels = values.shape
    pre, post = h0.new_empty(rows, 2 * channels), h0.new_empty(rows, 2 * channels)
    state, states = torch.empty_like(h0), h0.new_empty(rows, h0.shape[1])
    steps = h0.new_empty(h0.shape[0], 3, dtype=torch.int64)
    with _faults():
        kernel(h0, values, masks, *rest, pre, post, state, states, steps)
    return pre, post, state, states, steps


@op(f"gru_ode_bwd({_ARGUMENTS}, Tensor states, Tensor gpre, Tensor gpost, Tensor gstate, Tensor gstates) -> Tensor[]")
def _backward(kernel, h0, values, masks, dropout, params, *rest):
    gh0, gvalues, gparams = torch.empty_like(h0), torch.empty_like(values), [torch.empty_like(p) for p in params]
    with _faults():
        kernel(h0, values, masks, dropout, params, *rest, gh0, gvalues, gparams)
    return [gh0, gvalues, *gparams]


# --- gradient ---------------------------------------------------------------------------------------


class _Filter(torch.autograd.Function):
    """Saves its inputs and the states after the rows, from which the backward integrates anew."""

    @staticmethod
    def forward(ctx, backend, meaning, h0, values, masks, dropout, schedule, *params):
        options = _native(meaning)
        pre, post, state, states, steps = _forward[backend](h0, values, masks, dropout, params, *schedule, *options)
        ctx.backend, ctx.meaning, ctx.schedule = backend, meaning, schedule
        ctx.save_for_backward(h0, values, masks, dropout, states, *params)
        ctx.mark_non_differentiable(steps)
        return pre, post, state, states, steps

    @staticmethod
    def backward(ctx, gpre, gpost, gstate, gstates, _):
        h0, values, masks, dropout, states, *params = ctx.saved_tensors
        grads = (gpre, gpost, gstate, gstates)
        if second_order():
            names = ("offsets", "counts", "sizes", "jumps")
            run = partial(_without_steps, masks, dropout, **dict(zip(names, ctx.schedule, strict=True)), **ctx.meaning)
            gh0, gvalues, *gparams = reference_vjp(run, (h0, values, *params), grads)
        else:
            gh0, gvalues, *gparams = _backward[ctx.backend](
                h0, values, masks, dropout, params, *ctx.schedule, *_native(ctx.meaning), states,
                *(g.contiguous() for g in grads),
            )  # fmt: skip
        return None, None, gh0, gvalues, None, None, None, *gparams


def _without_steps(masks, dropout, h0, values, *params, **rest):
    return reference(h0, values, masks, dropout, *params, **rest)[:4]


def _native(meaning: dict) -> tuple:
    """kind to max_steps of the ops."""
    method = METHODS[meaning["method"]].pack()
    return (meaning["kind"], meaning["impute"], method, *(meaning[name] for name in ("rtol", "atol", "max_steps")))


# --- public -----------------------------------------------------------------------------------------


def gru_ode_filter(
    h0: Tensor,
    schedule: Schedule,
    values: Tensor,
    masks: Tensor,
    cell: Cell,
    observe: Observe,
    prep: Prep,
    gru: Gru,
    *,
    dropout: Tensor | None = None,
    impute: bool = False,
    method: str = "euler",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 1000,
    backend: str | None = None,
) -> Filtered:
    r"""The states of B series and their predictions at N rows, each a time at which a series is observed or asked.

    Between rows :math:`\dot h = (1 - z) \odot (u - h)`, with :math:`r, z = \sigma(W_{r,z} x + U_{r,z} h)` and
    :math:`u = \tanh(W_u x + U_u (r \odot h))`; the minimal cell has z in the place of r. The autonomous cell has
    neither x nor biases, an imputing one the prediction :math:`x = p(h)` at every evaluation.

    At a row :math:`h \leftarrow \mathrm{GRUCell}(q, h)`, where q has for each channel d that is observed
    :math:`\mathrm{relu}([y, \mu, \log\sigma^2, (y - \mu) / \sigma]_d W_d + b_d)`, and zeros for the others.

    Args:
        h0: the states at the start [B, H].
        schedule: the rows and the steps before each.
        values: y [N, D]. What is not observed is not read, it may be NaN.
        masks: [N, D], of any dtype; zero where a channel is not observed.
        cell, observe, prep, gru: the networks, see there.
        dropout: [N, 2, P], factors of the hidden units of a row's two predictions, before and after the jump; for
            the autonomous cell.
        impute: feed the prediction to the cell.
        method: ``euler``, ``midpoint``, ``rk4``: as many steps as the schedule says; ``dopri5``, ``tsit5``, ``bosh3``:
            as many as the tolerances take, for each series by itself.
        rtol, atol, max_steps: of the adaptive methods; steps tried in an interval.
        backend: a backend by name; None chooses.

    Returns:
        :class:`Filtered`, in float64 for float64 and float32 for all else. Differentiable with respect to h0, values
        and the networks: exactly, through the steps made, whose sizes count as constants.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        SolverError: naming the series and the row or time where the state stops being finite or the steps do not end.
        BackendError: the backend asked for cannot serve the call.

    Paper: GRU-ODE-Bayes, https://arxiv.org/abs/1905.12374.

    >>> B, N, H, D, P, Q = 2, 3, 8, 2, 4, 5
    >>> cell = Cell(torch.randn(3 * H, H))
    >>> observe = Observe(torch.randn(P, H), torch.zeros(P), torch.randn(2 * D, P), torch.zeros(2 * D))
    >>> prep, gru = Prep(torch.randn(D, 4, Q), torch.zeros(D, Q)), Gru(*torch.nn.GRUCell(D * Q, H).parameters())
    >>> schedule = Schedule(  # series 0 is seen after 10 and 15 steps, series 1 after 7 and asked at the end
    ...     torch.tensor([0, 2, 3]), torch.tensor([10, 5, 7, 5, 13]), torch.full((5,), 0.05).double(),
    ...     torch.tensor([True, True, True]))
    >>> out = gru_ode_filter(torch.zeros(B, H), schedule, torch.randn(N, D), torch.ones(N, D), cell, observe, prep, gru)
    >>> out.pre.shape, out.state.shape, out.steps[:, 1].tolist()
    (torch.Size([3, 4]), torch.Size([2, 8]), [20, 20])
    """
    params = _networks(h0, values, cell, observe, prep, gru, impute)
    _rows(h0, schedule, values, masks, dropout, observe.hidden_weight.shape[0], impute)
    _numbers(method, rtol, atol, max_steps)
    _schedule(schedule, values.shape[0], h0.shape[0])
    look = partial(_contents, schedule, values, masks, bool(METHODS[method].error))
    dtype = accumulator(h0.dtype)
    limit = partial(_too_large, h0=h0, values=values, params=params, method=METHODS[method], impute=impute)
    backend = choose(FAMILY, (h0, values, dropout, *params), backend, limit)
    h0, values, dropout, *params = (
        t if t is None or t.dtype == dtype else t.to(dtype) for t in (h0, values, dropout, *params)
    )
    if backend != "cpu":
        look()
    if backend != "cpu" or masks.dtype != dtype:  # a compiled kernel takes all that is not 0 for observed
        masks = (masks != 0).to(dtype)
    steps = (schedule.offsets, schedule.counts, schedule.sizes)
    meaning = {
        "kind": CELLS.index(cell.kind), "impute": impute, "method": method, "rtol": float(rtol),
        "atol": max(float(atol), sys.float_info.min),  # 0 / 0 where a state is at rest
        "max_steps": max_steps,
    }  # fmt: skip
    with without_autocast(h0):
        if backend == "reference":
            names = dict(zip(("offsets", "counts", "sizes", "jumps"), schedule, strict=True))
            out = reference(h0, values, masks, dropout, *params, **names, **meaning)
            if _readable(h0):
                if (fault := where(*steps, out[0].detach(), out[3].detach(), out[2].detach())) is not None:
                    raise SolverError(fault)
            return Filtered(*out)
        native = tuple(t.to(h0.device).contiguous() for t in (*steps, schedule.jumps.to(torch.int64)))
        h0, values, masks, *params = (t.contiguous() for t in (h0, values, masks, *params))
        dropout = None if dropout is None else dropout.contiguous()
        try:
            if any_grad(h0, values, *params):
                return Filtered(*_Filter.apply(backend, meaning, h0, values, masks, dropout, native, *params))
            return Filtered(*_forward[backend](h0, values, masks, dropout, params, *native, *_native(meaning)))
        except ValueError:  # the compiled kernel looks at the contents itself, in a pass; here is said what is wrong
            look()
            raise


def _too_large(
    backend: str, h0: Tensor, values: Tensor, params: list[Tensor], method: Method, impute: bool
) -> str | None:
    """Why a backend cannot serve this method or states of this size, None if it can."""
    if backend == "triton":
        from fastflow.ops.triton.gru_ode import MATRIX, matrix_bytes

        if method.error:
            return f"has no adaptive steps, method={method.name!r}"
        if matrix_bytes(params, accumulator(h0.dtype)) > MATRIX:
            return "a matrix of the networks does not fit into a program's registers"
    elif backend == "cuda":
        from fastflow.ops.cuda.gru_ode import fits

        if not fits(h0, values, params, method.stages, bool(method.error), impute):
            return "a series and what its steps need do not fit into a block's shared memory"
    return None


# --- checks -----------------------------------------------------------------------------------------


def _networks(h0: Tensor, values: Tensor, cell: Cell, observe: Observe, prep: Prep, gru: Gru, impute: bool) -> list:
    """All parameters one after the other, checked."""
    _check.floating("h0", h0)
    _check.floating("values", values)
    for name, tensor in (("h0", h0), ("values", values)):
        if tensor.dim() != 2:
            raise ValueError(f"{name}: expected two dimensions, got {list(tensor.shape)}")
    if cell.kind not in CELLS:
        raise ValueError(f"cell: expected the kind {' or '.join(CELLS)}, got {cell.kind!r}")
    if impute and (cell.input_weight is None or cell.input_bias is None):
        raise ValueError("cell: expected input_weight and input_bias for impute=True, got None")
    n, d = h0.shape[1], values.shape[1]
    gates = (3 if cell.kind == "full" else 2) * n
    p = observe.hidden_weight.shape[0]
    q = prep.weight.shape[-1]
    wanted = [
        ("cell.hidden", cell.hidden, (gates, n)),
        *(
            (("cell.input_weight", cell.input_weight, (gates, 2 * d)), ("cell.input_bias", cell.input_bias, (gates,)))
            if impute
            else ()
        ),
        ("observe.hidden_weight", observe.hidden_weight, (p, n)),
        ("observe.hidden_bias", observe.hidden_bias, (p,)),
        ("observe.weight", observe.weight, (2 * d, p)),
        ("observe.bias", observe.bias, (2 * d,)),
        ("prep.weight", prep.weight, (d, 4, q)),
        ("prep.bias", prep.bias, (d, q)),
        ("gru.weight_ih", gru.weight_ih, (3 * n, d * q)),
        ("gru.weight_hh", gru.weight_hh, (3 * n, n)),
        ("gru.bias_ih", gru.bias_ih, (3 * n,)),
        ("gru.bias_hh", gru.bias_hh, (3 * n,)),
    ]
    for name, tensor, shape in wanted:
        _check.beside(name, tensor, h0, shape, "h0")
    return [tensor for _, tensor, _ in wanted]


def _rows(h0, schedule, values, masks, dropout, p: int, impute: bool) -> None:
    n = values.shape[0]
    _check.beside("values", values, h0, tuple(values.shape), "h0")
    if masks.shape != values.shape or masks.device != values.device:
        raise ValueError(
            f"masks: expected {list(values.shape)} on {values.device} like values, got {list(masks.shape)} on"
            f" {masks.device}"
        )
    if dropout is not None:
        if impute:
            raise ValueError("dropout: expected None with impute=True, whose predictions are part of the dynamics")
        _check.beside("dropout", dropout, h0, (n, 2, p), "h0")


def _schedule(schedule: Schedule, rows: int, series: int) -> None:
    for name, tensor, shape, dtype in (
        ("offsets", schedule.offsets, [series + 1], torch.int64),
        ("counts", schedule.counts, [rows + series], torch.int64),
        ("sizes", schedule.sizes, [rows + series], torch.float64),
        ("jumps", schedule.jumps, [rows], torch.bool),
    ):
        if list(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"schedule.{name}: expected {shape} of {dtype} for {rows} rows of {series} series, got"
                f" {list(tensor.shape)} of {tensor.dtype}"
            )


def _contents(schedule: Schedule, values: Tensor, masks: Tensor, adaptive: bool) -> None:
    """What can only be seen by looking at the numbers."""
    if not _readable(values):
        return
    rows, offsets = len(values), schedule.offsets
    if adaptive and bool((schedule.counts > 1).any()):
        raise ValueError("schedule.counts: expected 0 or 1, intervals, with an adaptive method")
    if offsets[0] != 0 or offsets[-1] != rows or bool((offsets.diff() < 0).any()):
        raise ValueError(f"schedule.offsets: expected to rise from 0 to {rows}, got {offsets.tolist()[:8]} ...")
    for name, tensor, good in (
        ("counts", schedule.counts, schedule.counts >= 0),
        ("sizes", schedule.sizes, (schedule.sizes >= 0) & (schedule.sizes < math.inf)),
    ):
        if not bool(good.all()):
            segment = int((~good).nonzero()[0])
            place = f"before row {segment}" if segment < rows else f"at the end of series {segment - rows}"
            raise ValueError(
                f"schedule.{name}: expected finite numbers of at least 0, got {tensor[segment].item()} {place}"
            )
    bad = ~(values.isfinite() | (masks == 0))
    if bool(bad.any()):
        row, channel = bad.nonzero()[0].tolist()
        raise ValueError(
            f"values: expected finite numbers where observed, got {values[row, channel]} in row {row}"
            f" of series {int(owners(offsets)[row])}"
        )


def _readable(tensor: Tensor) -> bool:
    """May the host look at values now?"""
    capturing = tensor.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (torch.compiler.is_compiling() or transformed() or capturing)


def _numbers(method: str, rtol: float, atol: float, max_steps: int) -> None:
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    if METHODS[method].error and rtol == 0 and atol == 0:
        raise ValueError("rtol: expected a tolerance above 0 in rtol or atol, got 0 in both")
    if max_steps < 1:
        raise ValueError(f"max_steps: expected at least 1, got {max_steps}")
