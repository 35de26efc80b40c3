"""Scale maps: how the raw output ``h`` of a network becomes a positive scale ``s(h)``.

Every map is given by its logarithm, computed without ever taking the log of a rounded scale, and every map sees
``v = gain * h + offset``:

=============  ==========================================  =========================================
kind           log s                                       used by
=============  ==========================================  =========================================
none           0                                           NICE (additive coupling)
exp            v                                           RealNVP, MAF, normflows, survae
sigmoid        log(amplitude * sigmoid(v) + eps)           Glow, nflows, SRFlow, Wolf
softplus       log(min(softplus(v) + eps, maximum))        Winkler et al., nflows (general)
tanh           amplitude * tanh(v)                         RealNVP (learned amplitude), FrEIA, bgflow
linear_tanh    log(1 + amplitude * tanh(v))                Wolf with alpha below one
atan           amplitude * atan(v)                         FrEIA
soft_clip      v / (1 + |v| / amplitude)                   zuko
=============  ==========================================  =========================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ScaleMap", "KINDS", "kernel_map", "scale_map"]

KINDS = ("none", "exp", "sigmoid", "softplus", "tanh", "linear_tanh", "atan", "soft_clip")  # as in csrc/scale_map.h


@dataclass(frozen=True, eq=False)
class ScaleMap:
    """One scale map with its constants.

    ``amplitude`` may be a tensor, of any shape that broadcasts against ``[C]``: it is then learned, which the maps
    ``tanh`` allows. ``reciprocal`` exchanges ``s`` for ``1 / s``.
    """

    kind: str
    gain: float = 1.0
    offset: float = 0.0
    amplitude: float | Tensor = 1.0
    eps: float = 0.0
    maximum: float = math.inf
    reciprocal: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"scale_map: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if isinstance(self.amplitude, Tensor) and self.kind != "tanh":
            raise ValueError(f"scale_map: only 'tanh' learns its amplitude, got a tensor for {self.kind!r}")

    @property
    def constants(self) -> tuple[float, float, float, float, float]:
        """``(gain, offset, amplitude, eps, maximum)``; the amplitude is 1 where it is learned."""
        amplitude = 1.0 if isinstance(self.amplitude, Tensor) else self.amplitude
        return self.gain, self.offset, amplitude, self.eps, self.maximum

    def log_scale(self, h: Tensor) -> Tensor:
        """log s(h), elementwise, in the dtype of ``h``."""
        log_s = log_scale(self.kind, self.constants, h, self.amplitude)
        return -log_s if self.reciprocal else log_s


def log_scale(kind: str, constants: tuple[float, ...], h: Tensor, amplitude: float | Tensor) -> Tensor:
    """The meaning of every map. ``amplitude`` is the constant or a tensor that broadcasts against ``h``."""
    gain, offset, _, eps, maximum = constants
    v = gain * h + offset
    if kind == "none":
        return torch.zeros_like(h)
    if kind == "exp":
        return v
    if kind == "sigmoid":
        if eps == 0:
            return math.log(amplitude) + F.logsigmoid(v)
        return torch.log(amplitude * torch.sigmoid(v) + eps)
    if kind == "softplus":
        # softplus(v) = e^v (1 - e^v / 2 + ...) below -15, where its logarithm would lose everything
        tail = (v < -15) & (eps == 0)
        s = F.softplus(torch.where(tail, torch.zeros_like(v), v), threshold=50) + eps
        return torch.where(tail, v - 0.5 * torch.exp(v.clamp(max=0)), torch.log(s.clamp(max=maximum)))
    if kind == "tanh":
        return amplitude * torch.tanh(v)
    if kind == "linear_tanh":
        return torch.log(1 + amplitude * torch.tanh(v))
    if kind == "atan":
        return amplitude * torch.atan(v)
    return v / (1 + v.abs() / amplitude)  # soft_clip


def kernel_map(kind: int, constants: Sequence[float]) -> tuple[int, tuple[float, ...]]:
    """(kind, constants) as the GPU kernels take them: gain, offset, amplitude, eps, maximum, log amplitude.

    A sigmoid with eps is a kind of its own, the one behind :data:`KINDS`, as in csrc/scale_map.h.
    """
    gain, offset, amplitude, eps, maximum = map(float, constants)
    sigmoid = KINDS[kind] == "sigmoid"
    log_amplitude = 0.0
    if sigmoid and eps == 0:
        log_amplitude = math.log(amplitude) if amplitude > 0 else math.nan
    kind = len(KINDS) if sigmoid and eps != 0 else kind
    return kind, (gain, offset, amplitude, eps, maximum, log_amplitude)


_PRESETS = {
    "none": ScaleMap("none"),
    "exp": ScaleMap("exp"),
    "sigmoid2": ScaleMap("sigmoid", offset=2.0),
    "sigmoid2_eps": ScaleMap("sigmoid", offset=2.0, eps=1e-3),
    "softplus": ScaleMap("softplus"),
    "softplus_eps": ScaleMap("softplus", eps=1e-3),
    "softplus_clamped": ScaleMap("softplus", eps=1e-3, maximum=3.0),
    "tanh_rescale": ScaleMap("tanh"),
    "wolf_tanh": ScaleMap("sigmoid", amplitude=2.0),
    "atan_clamp": ScaleMap("atan", gain=1 / 2.0, amplitude=2.0 * 0.636),
    "soft_clip": ScaleMap("soft_clip", amplitude=-math.log(1e-3)),
}


def scale_map(name: str | ScaleMap, **constants: float | Tensor) -> ScaleMap:
    """A scale map by the name the field knows it by, with constants of your own where they differ.

    ================== ============================================ ==============================================
    name               s(h)                                         published in
    ================== ============================================ ==============================================
    none               1                                            NICE
    exp                e^h                                          RealNVP, normflows
    sigmoid2           sigmoid(h + 2)                               Glow (openai, rosinality, chaiyujin, ffjord)
    sigmoid2_eps       sigmoid(h + 2) + eps                         nflows 1e-3 (here), SRFlow 1e-4
    softplus           softplus(h)                                  Winkler et al.
    softplus_eps       softplus(h) + 1e-3                           nflows MAF
    softplus_clamped   min(softplus(h) + 1e-3, 3)                   nflows "general"
    tanh_rescale       exp(amplitude * tanh(h))                     RealNVP, bgflow; the amplitude may be learned
    wolf_tanh          1 + tanh(h / 2) = 2 sigmoid(h)               Wolf, alpha = 1
    atan_clamp         exp(c * 0.636 * atan(h / c)), c = 2          FrEIA
    soft_clip          exp(h / (1 + |h / log 1e-3|))                zuko
    ================== ============================================ ==============================================

    >>> scale_map("sigmoid2_eps", eps=1e-4).eps
    0.0001
    """
    if isinstance(name, ScaleMap):
        return replace(name, **constants) if constants else name
    try:
        preset = _PRESETS[name]
    except (KeyError, TypeError):
        raise ValueError(f"scale_map: expected one of {', '.join(_PRESETS)} or a ScaleMap, got {name!r}") from None
    return replace(preset, **constants) if constants else preset
