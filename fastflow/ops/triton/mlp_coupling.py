"""Stacks of MLP couplings out of what is here and in the library: the networks' products are the library's, what
surrounds them are the kernels of couplings and ActNorms. Backward evaluates every network once more, like the others.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastflow.ops.coupling import Options
from fastflow.ops.mlp_stack import ACTIVATIONS
from fastflow.ops.packing import PACKINGS
from fastflow.ops.triton.actnorm import actnorm_bwd, actnorm_fwd
from fastflow.ops.triton.coupling import coupling_bwd, coupling_fwd

# --- the stack, as MLPStack.code has it ---------------------------------------------------------------


class _Step(NamedTuple):
    """``rows``: an ActNorm's features, or what a coupling's networks see."""

    number: int
    rows: tuple[int, ...]
    changed: tuple[int, ...] = ()
    shift: tuple[int, ...] = ()
    raw: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    """Layers of every network; none for an ActNorm."""
    activation: str = ""
    kind: int = 0
    add_first: bool = False
    divide: bool = False
    rescale: int = 0
    constants: tuple[float, ...] = ()

    @property
    def tensors(self) -> int:
        return 2 * sum(self.depths) + (self.rescale > 0) if self.depths else 2


def _steps(code: Sequence[int], constants: Sequence[float]) -> Iterator[_Step]:
    features, count = code[0], code[2]
    for i in range(count):
        at, _, constant, number = code[3 + features + 4 * i : 7 + features + 4 * i]
        if code[at] == 0:
            yield _Step(number, tuple(code[at + 1 : at + 1 + features]), constants=(constants[constant],))
            continue
        given = iter(code[at + 1 :])
        take = lambda n: tuple(next(given) for _ in range(n))  # noqa: B023, E731
        rows = take(next(given))
        changes = next(given)
        changed, shift = take(changes), take(changes)
        raw = take(changes) if next(given) else ()
        depths = []
        for _ in range(next(given)):
            depths.append(next(given))
            take(depths[-1])
        activation, kind, add_first, divide, rescale = take(5)
        own = tuple(constants[constant : constant + 7])
        name = tuple(ACTIVATIONS)[activation]
        yield _Step(
            number, rows, changed, shift, raw, tuple(depths), name, kind, bool(add_first), bool(divide), rescale, own
        )  # fmt: skip


class _Stack:
    """The steps with their tensors, and the state's way in and out."""

    def __init__(self, code: Sequence[int], constants: Sequence[float], params: Sequence[Tensor], inverse: bool):
        self.end, self.inverse = tuple(code[3 : 3 + code[0]]), inverse
        self.steps, start = [], 0
        for step in _described(tuple(code), tuple(constants)):
            self.steps.append((step, params[start : start + step.tensors], start))
            start += step.tensors

    def rows(self, features: Tensor, at_end: bool) -> Tensor:
        """Features in their order, at the beginning or the end of the stack, as the rows of the state."""
        return features.index_select(1, _index(_inverted(self.end), features.device)) if at_end else features

    def features(self, rows: Tensor, at_end: bool) -> Tensor:
        return rows.index_select(1, _index(self.end, rows.device)) if at_end else rows


_described = functools.lru_cache(maxsize=256)(lambda code, constants: tuple(_steps(code, constants)))


def _inverted(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


@functools.lru_cache(maxsize=4096)
def _index(values: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.int64, device=device)


# --- networks ---------------------------------------------------------------------------------------


def _seen(step: _Step, state: Tensor, context: Tensor | None) -> Tensor:
    places = tuple(i for i, row in enumerate(step.rows) if row >= 0)
    seen = state.index_select(1, _index(tuple(step.rows[i] for i in places), state.device))
    if len(places) < len(step.rows):  # zeros where x changes
        zeros = state.new_zeros(state.shape[0], len(step.rows))
        seen = zeros.index_copy(1, _index(places, state.device), seen)
    return seen if context is None else torch.cat([seen, context], 1)


def _networks(step: _Step, seen: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, list[list[Tensor]]]:
    """(outputs of all networks, for each of them the inputs of its layers: before the activation where it is silu)"""
    outputs, inputs, given = [], [], iter(params)
    for depth in step.depths:
        y, own = seen, []
        for i in range(depth):
            weight, bias = next(given), next(given)
            own.append(y)
            if i > 0 and step.activation == "silu":
                y = ACTIVATIONS["silu"](y)
            y = torch.addmm(bias, y, weight.t())
            if i + 1 < depth and step.activation != "silu":
                y = ACTIVATIONS[step.activation](y, *([step.constants[6]] if step.activation == "leaky_relu" else []))
        outputs.append(y)
        inputs.append(own)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), inputs


def _slope(step: _Step, kept: Tensor) -> Tensor:
    """phi'(a) from what is kept of a layer: phi(a), or a itself of silu."""
    if step.activation == "silu":
        s = torch.sigmoid(kept)
        return s * (1 + kept * (1 - s))
    if step.activation == "tanh":
        return 1 - kept * kept
    if step.activation == "softplus":
        return -torch.expm1(-kept)
    low = {"relu": torch.zeros_like, "elu": lambda y: y + 1}.get(
        step.activation, lambda y: torch.full_like(y, step.constants[6])
    )
    return torch.where(kept <= 0, low(kept), torch.ones_like(kept))


def _parameters(step: _Step, outputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """(shift, raw scale) of the changed features."""
    t = outputs.index_select(1, _index(step.shift, outputs.device))
    return t, outputs.index_select(1, _index(step.raw, outputs.device)) if step.raw else None


def _options(step: _Step, features: int, inverse: bool) -> Options:
    gain = -step.constants[5] if inverse else step.constants[5]
    return Options(
        PACKINGS.index("separate"),
        step.kind,
        step.add_first != inverse,
        step.divide != inverse,
        gain,
        list(step.constants[:5]),
        [0, features, -1, 1],
    )


# --- what the ops call --------------------------------------------------------------------------------


def mlp_coupling_fwd(x, context, params, code, constants, inverse: bool, kept, y, logdet) -> None:
    stack = _Stack(code, constants, params, inverse)
    state, total = stack.rows(x, inverse), torch.zeros_like(logdet)
    for step, own, _ in reversed(stack.steps) if inverse else stack.steps:
        state, more = _forward(step, own, state, context, inverse, kept)
        total += more
    y.copy_(stack.features(state, not inverse))
    logdet.copy_(total)


def _forward(step: _Step, own, state: Tensor, context, inverse: bool, kept) -> tuple[Tensor, Tensor]:
    out, logdet = torch.empty_like(state), state.new_empty(state.shape[0])
    if not step.depths:
        scale, bias = (p.index_select(0, _index(_inverted(step.rows), p.device)) for p in own)
        actnorm_fwd(state, scale, bias, None, out, logdet, step.constants[0], inverse)
        return out, logdet
    if kept is not None:
        kept[step.number].copy_(state.t())
    outputs, _ = _networks(step, _seen(step, state, context), own)
    t, h = _parameters(step, outputs)
    amplitude = own[-1][None] if step.rescale else None
    index = _index(step.changed, state.device)
    coupling_fwd(state, t, h, amplitude, index, None, out, logdet, _options(step, state.shape[1], inverse))
    return out, logdet


def mlp_coupling_bwd(
    y, context, params, kept, gy, glogdet, code, constants, inverse: bool, gx, gcontext, gparams
) -> None:  # fmt: skip
    stack = _Stack(code, constants, params, inverse)
    state, g = stack.rows(y, not inverse), stack.rows(gy, not inverse)
    glogdet = glogdet.contiguous()
    if gcontext is not None:
        gcontext.zero_()
    for step, own, start in stack.steps if inverse else reversed(stack.steps):
        made = gparams[start : start + step.tensors]
        if step.depths:
            state, g = _coupling_grad(step, own, state, g, context, glogdet, inverse, kept, gcontext, made)
        else:
            state, g = _actnorm_grad(step, own, state, g, glogdet, inverse, made)
    gx.copy_(stack.features(g, inverse))


def _actnorm_grad(step: _Step, own, state: Tensor, g: Tensor, glogdet, inverse: bool, made) -> tuple[Tensor, Tensor]:
    order = _index(_inverted(step.rows), state.device)
    scale, bias = (p.index_select(0, order) for p in own)
    x, nothing = torch.empty_like(state), torch.empty_like(glogdet)
    actnorm_fwd(state, scale, bias, None, x, nothing, step.constants[0], not inverse)
    gx, of_scale, of_bias = torch.empty_like(g), torch.empty_like(scale), torch.empty_like(bias)
    actnorm_bwd(x, scale, bias, g, glogdet, gx, of_scale, of_bias, step.constants[0], inverse)
    for to, found in zip(made, (of_scale, of_bias), strict=True):
        to.copy_(found.index_select(0, _index(step.rows, state.device)))
    return x, gx


def _coupling_grad(
    step: _Step, own, state: Tensor, g: Tensor, context, glogdet, inverse: bool, kept, gcontext, made
) -> tuple[Tensor, Tensor]:  # fmt: skip
    features, index = state.shape[1], _index(step.changed, state.device)
    if kept is not None:
        state = kept[step.number].t().contiguous()
    seen = _seen(step, state, context)
    outputs, inputs = _networks(step, seen, own)
    t, h = _parameters(step, outputs)
    amplitude = own[-1][None] if step.rescale else None
    gx, gt, gh = torch.empty_like(g), torch.empty_like(t), None if h is None else torch.empty_like(h)
    gamplitude = None if amplitude is None else torch.empty_like(t)
    options = _options(step, features, inverse)
    coupling_bwd(
        state, t, h, amplitude, index, g.contiguous(), glogdet, gx, gt, gh, gamplitude, kept is None, options
    )  # fmt: skip
    if gamplitude is not None:
        made[-1].copy_(gamplitude.sum(0) if step.rescale > 1 else gamplitude.sum().reshape(1))
    if kept is None:
        x, nothing = torch.empty_like(state), torch.empty_like(glogdet)
        coupling_fwd(state, t, h, amplitude, index, None, x, nothing, _options(step, features, not inverse))
        state = x
    gout = torch.zeros_like(outputs).index_copy(1, _index(step.shift, g.device), gt)
    if gh is not None:
        gout = gout.index_copy(1, _index(step.raw, g.device), gh)
    gseen, first, column = torch.zeros_like(seen), 0, 0
    for depth, layers in zip(step.depths, inputs, strict=True):
        width = own[first + 2 * depth - 1].shape[0]
        one = gout[:, column : column + width]
        for i in reversed(range(depth)):
            y, weight = layers[i], own[first + 2 * i]
            activated = ACTIVATIONS["silu"](y) if i > 0 and step.activation == "silu" else y
            made[first + 2 * i].copy_(one.t() @ activated)
            made[first + 2 * i + 1].copy_(one.sum(0))
            one = one @ weight
            if i > 0:
                one = one * _slope(step, y)
        gseen, first, column = gseen + one, first + 2 * depth, column + width
    places = tuple(i for i, row in enumerate(step.rows) if row >= 0)
    rows = _index(tuple(step.rows[i] for i in places), g.device)
    gx.index_add_(1, rows, gseen.index_select(1, _index(places, g.device)))
    if gcontext is not None:
        gcontext += gseen[:, len(step.rows) :]
    return state, gx
