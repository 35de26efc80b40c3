"""The layers that :func:`fastflow.mlp_coupling` runs in one call: what each is told beside its tensors, and means.

A stack is made once; its kernels get it as a list of numbers. Permutations cost nothing there: they only rename the
rows in which the features lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.ops.actnorm import reference as actnorm
from fastflow.ops.coupling import Options
from fastflow.ops.coupling import reference as affine
from fastflow.ops.packing import PACKINGS
from fastflow.ops.scale_map import KINDS, ScaleMap, scale_map

__all__ = ["ACTIVATIONS", "ActNormStep", "MLPStack", "CouplingStep", "PermutationStep"]

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {  # in the order of HiddenKind in csrc/mlp_coupling.h
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "elu": F.elu,
    "silu": F.silu,
    "softplus": lambda a: F.softplus(a, threshold=50),
}


@dataclass(frozen=True)
class ActNormStep:
    """(x + b) e^(gain a). Parameters: a [D], b [D]."""

    gain: float = 1.0

    def shapes(self, features: int, context: int) -> list[tuple[int, ...]]:
        return [(features,), (features,)]

    def reference(self, x: Tensor, context: Tensor | None, params: Sequence[Tensor], inverse: bool):
        return actnorm(x, *params, None, self.gain, inverse)

    def code(self, at: list[int], context: int) -> tuple[list[int], list[float]]:
        return [0, *at], [float(self.gain)]


@dataclass(frozen=True)
class PermutationStep:
    """z[:, i] = x[:, indices[i]]. No parameters."""

    indices: tuple[int, ...]

    def shapes(self, features: int, context: int) -> list[tuple[int, ...]]:
        if sorted(self.indices) != list(range(features)):
            raise ValueError(f"indices: expected each of 0 ... {features - 1} once, got {list(self.indices)}")
        return []

    def reference(self, x: Tensor, context: Tensor | None, params: Sequence[Tensor], inverse: bool):
        indices = torch.tensor(self.indices, device=x.device)
        return x.index_select(1, indices.argsort() if inverse else indices), x.new_zeros(x.shape[:1])


@dataclass(frozen=True, eq=False)
class CouplingStep:
    r"""Affine coupling :math:`x_2 \odot s(h) + g\,t` with :math:`(t, h)` = MLP(x_1, context).

    Parameters: weight [m, n] and bias [m] of every layer of the network, first to last; of the second network, where
    there is one; and the learned amplitude [rescale], where there is one.
    """

    changed: tuple[int, ...]
    """The features that change; the network sees the others, in their order, and then the context."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers; the activation follows each of them."""
    activation: str = "relu"
    slope: float = 0.01
    """Of leaky_relu below 0."""
    packing: str = "interleaved"
    """How shift and raw scale lie in the output (:mod:`fastflow.ops.packing`). With ``"separate"`` two networks make
    them, the first the shift."""
    hidden_scale: tuple[int, ...] | None = None
    """With ``"separate"``: the widths of the second network where they are others."""
    scale: str | ScaleMap = "sigmoid2"
    """``"none"``: additive, and the network makes the shift alone. The amplitude, where learned, is a parameter."""
    order: Literal["scale_first", "shift_first"] = "scale_first"
    shift_gain: float = 1.0
    rescale: int = 0
    """With a scale map of kind tanh: amplitudes that are learned, 1 or one for every changed feature."""
    masked: bool = False
    """The network sees all features, with zeros where x changes, and its outputs cover all of them."""

    def __post_init__(self) -> None:
        if not self.changed or len(set(self.changed)) != len(self.changed) or min(self.changed) < 0:
            raise ValueError(f"changed: expected features, each once, got {list(self.changed)}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if not 0 <= self.slope < math.inf:
            raise ValueError(f"slope: expected a number of at least 0, got {self.slope}")
        if self.packing not in PACKINGS:
            raise ValueError(f"packing: expected one of {', '.join(PACKINGS)}, got {self.packing!r}")
        if self.order not in ("scale_first", "shift_first"):
            raise ValueError(f"order: expected 'scale_first' or 'shift_first', got {self.order!r}")
        if self.rescale not in (0, 1, len(self.changed)) or (self.rescale and self.map.kind != "tanh"):
            raise ValueError(
                f"rescale: expected 0, or with a scale map of kind tanh 1 or {len(self.changed)}, got {self.rescale}"
                f" with {self.map.kind!r}"
            )
        if isinstance(self.map.amplitude, Tensor):
            raise ValueError("scale: a learned amplitude is one of the parameters (rescale), got a tensor")
        if min([1, *self.hidden, *(self.hidden_scale or ())]) < 1:
            raise ValueError(f"hidden: expected widths of at least 1, got {list(self.hidden)}")

    @property
    def map(self) -> ScaleMap:
        return scale_map(self.scale)

    @property
    def additive(self) -> bool:
        return self.map.kind == "none"

    def inputs(self, features: int) -> list[int]:
        """What the network sees: features, -1 for zeros."""
        if self.masked:
            return [-1 if i in self.changed else i for i in range(features)]
        return [i for i in range(features) if i not in self.changed]

    def widths(self, features: int, context: int) -> list[list[int]]:
        """Of every network the widths from its inputs to its outputs."""
        if max(self.changed) >= features:
            raise ValueError(f"changed: expected features below {features}, got {list(self.changed)}")
        first = len(self.inputs(features)) + context
        if len(self.changed) == features and context == 0:
            raise ValueError(
                f"changed: all {features} features change, so that the network would see nothing; expected at least"
                " one that does not, or a context"
            )
        each = features if self.masked else len(self.changed)
        if self.additive:
            return [[first, *self.hidden, each]]
        if self.packing == "separate":
            second = self.hidden if self.hidden_scale is None else self.hidden_scale
            return [[first, *self.hidden, each], [first, *second, each]]
        return [[first, *self.hidden, 2 * each]]

    def shapes(self, features: int, context: int) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        for widths in self.widths(features, context):
            for n, m in zip(widths, widths[1:], strict=False):
                shapes += [(m, n), (m,)]
        return [*shapes, (self.rescale,)] if self.rescale else shapes

    def options(self, features: int) -> Options:
        scale = self.map
        separate = self.additive or self.packing == "separate"
        return Options(
            PACKINGS.index("separate" if separate else self.packing),
            KINDS.index(scale.kind),
            self.order == "shift_first",
            scale.reciprocal,
            float(self.shift_gain),
            list(map(float, scale.constants)),
            [0, features, -1, 1],
        )

    def reference(self, x: Tensor, context: Tensor | None, params: Sequence[Tensor], inverse: bool):
        features = x.shape[1]
        changed = torch.tensor(self.changed, device=x.device)
        if self.masked:
            seen = x.index_fill(1, changed, 0)
        else:
            seen = x.index_select(1, torch.tensor(self.inputs(features), dtype=torch.int64, device=x.device))
        seen = seen if context is None else torch.cat([seen, context.to(x.dtype)], 1)
        outputs, given = [], iter(params)
        for widths in self.widths(features, seen.shape[1] - len(self.inputs(features))):
            y = seen
            for i in range(1, len(widths)):
                y = F.linear(y, next(given), next(given))
                if i + 1 < len(widths):
                    y = ACTIVATIONS[self.activation](y, *([self.slope] if self.activation == "leaky_relu" else []))
            outputs.append(y)
        amplitude = next(given).reshape(1, -1) if self.rescale else None
        o = self.options(features)
        if inverse:
            o = o._replace(add_first=not o.add_first, divide=not o.divide, shift_gain=-o.shift_gain)
        return affine(x, outputs[0], outputs[1] if len(outputs) > 1 else None, amplitude, changed, None, *o)

    def code(self, at: list[int], context: int) -> tuple[list[int], list[float]]:
        features, n = len(at), len(self.changed)
        networks, o = self.widths(features, context), self.options(features)
        each = features if self.masked else n
        places = list(self.changed) if self.masked else list(range(n))
        if len(networks) == 2 or self.additive:
            shift, raw = places, [each + i for i in places]
        elif self.packing.startswith("interleaved"):
            shift, raw = [2 * i for i in places], [2 * i + 1 for i in places]
        else:
            shift, raw = places, [each + i for i in places]
        if not self.additive and self.packing.endswith("_st"):
            shift, raw = raw, shift
        inputs = [-1 if i < 0 else at[i] for i in self.inputs(features)]
        activation, slope = self.activation, float(self.slope)
        if activation == "leaky_relu" and slope == 0:
            activation = "relu"
        code = [1, len(inputs), *inputs, n, *(at[i] for i in self.changed), *shift]
        code += [int(not self.additive), *([] if self.additive else raw)]
        code += [len(networks)]
        for widths in networks:
            code += [len(widths) - 1, *widths[1:]]
        code += [list(ACTIVATIONS).index(activation), o.kind, int(o.add_first), int(o.divide), self.rescale]
        return code, [*o.constants, o.shift_gain, slope]

    def log_bounds(self) -> tuple[float, float]:
        """Between these log of what multiplies x lies, whatever the network says."""
        map_ = self.map
        low, high = _log_bounds(map_, math.inf if self.rescale else abs(float(map_.amplitude)))
        return (-high, -low) if map_.reciprocal else (low, high)


def _log_bounds(scale: ScaleMap, amplitude: float) -> tuple[float, float]:
    def log(value: float) -> float:
        return math.log(value) if 0 < value < math.inf else -math.inf if value <= 0 else math.inf

    if scale.kind == "none":
        return 0.0, 0.0
    if scale.kind == "sigmoid":
        return log(scale.eps), log(amplitude + scale.eps)
    if scale.kind == "softplus":
        return log(scale.eps), log(scale.maximum)
    if scale.kind == "linear_tanh":
        return log(1 - amplitude), log(1 + amplitude)
    bound = {"tanh": amplitude, "atan": amplitude * math.pi / 2, "soft_clip": amplitude}.get(scale.kind, math.inf)
    return -bound, bound


Step = ActNormStep | PermutationStep | CouplingStep


class MLPStack:
    """Layers for :func:`fastflow.mlp_coupling`, from data to latent: couplings, ActNorms and permutations.

    Args:
        features: D.
        steps: :class:`CouplingStep`, :class:`ActNormStep`, :class:`PermutationStep` in any order.
        context_features: Cc, which every coupling's network sees behind the features.

    ``shapes`` are those of the parameters, step after step. ``code`` is for the kernels, in whole numbers: D, Cc, the
    number of steps but for permutations, the row of every feature behind the last of them; for each of these steps
    where its code, its parameters and its ``constants`` begin, and which coupling it is; then their codes.
    """

    def __init__(self, features: int, steps: Sequence[Step], context_features: int = 0) -> None:
        if features < 1 or context_features < 0:
            raise ValueError(
                f"features: expected at least 1, and a context of at least 0, got {features}, {context_features}"
            )
        self.features, self.context_features, self.steps = features, context_features, tuple(steps)
        self.shapes: list[tuple[int, ...]] = []
        self.counts: list[int] = []
        at, codes, self.constants = list(range(features)), [], []
        places: list[list[int]] = []
        for i, step in enumerate(self.steps):
            try:
                shapes = step.shapes(features, context_features)
            except ValueError as error:
                raise ValueError(f"steps[{i}]: {error}") from None
            numbers_before = sum(map(math.prod, self.shapes))
            self.shapes += shapes
            self.counts.append(len(shapes))
            if isinstance(step, PermutationStep):
                at = [at[j] for j in step.indices]
                continue
            coupling = sum(code[0] for code in codes)
            code, constants = step.code(at, context_features)
            places.append([sum(map(len, codes)), numbers_before, len(self.constants), coupling])
            codes.append(code)
            self.constants += constants
        start = 3 + features + 4 * len(codes)
        self.code = [features, context_features, len(codes), *at]
        for place in places:
            self.code += [start + place[0], *place[1:]]
        for code in codes:
            self.code += code
        self.parameters = sum(map(math.prod, self.shapes))
        couplings = [s for s in self.steps if isinstance(s, CouplingStep)]
        self.couplings = len(couplings)
        self.widest = max([1, *(w for s in couplings for ws in s.widths(features, context_features) for w in ws)])
        bounds = [s.log_bounds() for s in couplings]
        self.amplification = {
            False: sum(max(0.0, -low) for low, _ in bounds),
            True: sum(max(0.0, high) for _, high in bounds),
        }
        """By ``inverse``: log of the factor by which a rounding of the output may grow on the way back to the input."""

    def split(self, params: Sequence[Tensor]) -> list[tuple[Step, Sequence[Tensor]]]:
        """Every step with its own parameters."""
        pairs, start = [], 0
        for step, count in zip(self.steps, self.counts, strict=True):
            pairs.append((step, params[start : start + count]))
            start += count
        return pairs
