"""Couplings whose network is an MLP, and stacks of them that run as one operation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastflow.nn.actnorm import ActNorm
from fastflow.nn.base import Bijection
from fastflow.nn.base import Sequential as Chain
from fastflow.nn.coupling import AdditiveCoupling, AffineCoupling
from fastflow.nn.permutation import Permutation
from fastflow.ops import ActNormStep, CouplingStep, MLPStack, PermutationStep, mlp_coupling
from fastflow.ops.scale_map import ScaleMap, scale_map

__all__ = ["CouplingStack", "MLPCoupling"]

Mask = Literal["second_half", "first_half", "even", "odd"] | slice | Sequence[bool] | Tensor

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
}


class MLPCoupling(Bijection):
    r"""Affine coupling on vectors, :math:`z_2 = x_2 \odot s(h) + t` with :math:`(t, h)` = MLP(x_1, context), z_1 = x_1.

    The network is evaluated inside the kernel; several of these in a :class:`CouplingStack` are one call.

    Args:
        features: D; x is [B, D].
        hidden: widths of the network's hidden layers.
        mask: what changes: half of the features (of an odd number the first half is the larger), those of even or odd
            index, a slice of them, or a bool for each.
        activation: behind every hidden layer: relu, leaky_relu, tanh, elu, silu, softplus.
        slope: of leaky_relu below 0.
        scale, packing, order, shift_gain: as in :func:`fastflow.affine_coupling`; ``scale="none"`` is additive
            coupling, and the network then makes the shift alone.
        rescale: number of learned factors in front of the tanh of ``scale="tanh_rescale"``: 1, one for every changed
            feature, or 0 for none.
        context_features: of a context [B, P] that the network sees behind the features; 0 takes none.
        zero_init: the network's last layer starts as zeros, so that the coupling does not depend on x_1 at first.

    The network is ``network``, an ``nn.Sequential`` of ``nn.Linear`` and activations.

    Papers: RealNVP, https://arxiv.org/abs/1605.08803; NICE, https://arxiv.org/abs/1410.8516.

    >>> layer = MLPCoupling(4, hidden=(32, 32), scale="tanh_rescale", rescale=1)
    >>> z, logdet = layer(torch.randn(8, 4))
    >>> z.shape, logdet.shape
    (torch.Size([8, 4]), torch.Size([8]))
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (64, 64),
        mask: Mask = "second_half",
        *,
        activation: str = "relu",
        slope: float = 0.01,
        scale: str | ScaleMap = "sigmoid2",
        packing: str = "interleaved",
        order: Literal["scale_first", "shift_first"] = "scale_first",
        shift_gain: float = 1.0,
        rescale: int = 0,
        context_features: int = 0,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        if features < 2 and context_features == 0:
            raise ValueError(f"features: expected at least 2, one part to see and one to change, got {features}")
        self.features, self.context_features = features, context_features
        self.step = CouplingStep(
            _changed(features, mask),
            tuple(hidden),
            activation=activation,
            slope=slope,
            packing=packing,
            scale=scale_map(scale),
            order=order,
            shift_gain=shift_gain,
            rescale=rescale,
        )
        if packing == "separate":
            raise ValueError("packing: one network makes shift and raw scale; expected interleaved or chunked")
        (widths,) = self.step.widths(features, context_features)
        kind = _ACTIVATIONS[activation]
        layers: list[nn.Module] = []
        for n, m in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(n, m), kind(slope) if activation == "leaky_relu" else kind()]
        self.network = nn.Sequential(*layers[:-1])
        if zero_init:
            nn.init.zeros_(self.network[-1].weight)
            nn.init.zeros_(self.network[-1].bias)
        self.rescale = nn.Parameter(torch.ones(rescale)) if rescale else None
        self._stack = MLPStack(features, [self.step], context_features)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, context, False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(z, context, True)

    def _run(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        params = [_parameter(m, name) for m, name in _sources(self)]
        return mlp_coupling(
            x, params, self._stack, context=context if self.context_features else None, inverse=inverse
        )  # fmt: skip

    def extra_repr(self) -> str:
        scale = f"changed={list(self.step.changed)}, scale={self.step.map.kind}, packing={self.step.packing}"
        return f"{self.features}, {scale}, order={self.step.order}, context_features={self.context_features}"


class CouplingStack(Chain):
    """Couplings, ActNorms and permutations on vectors [B, D], run as one operation in either direction.

    A :class:`Sequential` of the same layers computes the same, layer by layer; here a whole flow of small networks
    is one call, and training keeps D numbers per sample and coupling. The layers stay modules of their own with their
    own parameters.

    Args:
        layers: :class:`MLPCoupling`; :class:`AffineCoupling` and :class:`AdditiveCoupling` whose network is an
            ``nn.Sequential`` of ``nn.Linear`` (with bias) and one kind of activation between them; :class:`ActNorm`;
            :class:`Permutation`; :class:`Sequential` of these. At least one tells how many features there are.

    Layer by layer it goes where someone must see the layers: the first batch of an ActNorm, hooks, ``fastflow.debug``.

    Raises:
        TypeError, ValueError: naming the layer that does not fit.

    >>> layers = []
    >>> for _ in range(4):
    ...     layers += [ActNorm(2), MLPCoupling(2, (16, 16)), Permutation(2)]
    >>> flow = CouplingStack(*layers)
    >>> x = torch.randn(64, 2)
    >>> z, logdet = flow(x)
    >>> back, minus = flow.inverse(z)
    >>> bool(torch.allclose(back, x, atol=1e-4)), bool(torch.allclose(minus, -logdet, atol=1e-4))
    (True, True)
    """

    def __init__(self, *layers: Bijection) -> None:
        super().__init__(*layers)
        self._prepare()

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._refresh()
        if self._watched() or not all(layer.ready for layer in self._actnorms):
            return super().forward(x, context)
        return self._run(x, context, False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._refresh()
        for layer in self._actnorms:
            layer.require_ready()
        return super().inverse(z, context) if self._watched() else self._run(z, context, True)

    def _run(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        stack = self._stack
        params = [_parameter(m, name) for m, name in self._sources]
        return mlp_coupling(x, params, stack, context=context if stack.context_features else None, inverse=inverse)

    def _prepare(self) -> None:
        """What a call needs of the layers, as they are now."""
        layers = list(_flat(self))
        features = {n for layer in layers if (n := _features(layer)) is not None}
        if len(features) != 1:
            raise ValueError(f"layers: expected one number of features, got {sorted(features) or 'none'}")
        contexts = {getattr(layer, "context_features", 0) for layer in layers if _is_coupling(layer)} or {0}
        if len(contexts) != 1:
            raise ValueError(f"layers: expected couplings that see the same context, got widths {sorted(contexts)}")
        steps = [_step(layer, f"layers[{i}]", *features) for i, layer in enumerate(layers)]
        self._stack = MLPStack(*features, steps, *contexts)
        self._sources = [source for layer in layers for source in _sources(layer)]
        self._actnorms = [layer for layer in layers if isinstance(layer, ActNorm)]
        self._permutations = [layer for layer in layers if isinstance(layer, Permutation)]
        inner = list(self.modules())[1:]
        self._parts = [m._modules for m in (self, *inner) if m._modules]
        self._hooks = [
            hooks
            for m in inner
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]
        self._made_of = self._signature()

    def _refresh(self) -> None:
        """A layer, a part of a network, or a permutation may have been replaced."""
        if not torch.compiler.is_compiling() and self._signature() != self._made_of:
            self._prepare()

    def _signature(self) -> list[Any]:
        buffers = [layer._buffers["indices"] for layer in self._permutations]
        return [*(tuple(parts.values()) for parts in self._parts), *map(id, buffers), *map(_version, buffers)]

    def _watched(self) -> bool:
        """Does someone want to see the layers run?"""
        if torch.compiler.is_compiling():
            return False
        return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks) or any(self._hooks)


# --- what the stack needs to know of a layer ---------------------------------------------------------------


def _flat(chain: Chain) -> Iterator[Bijection]:
    for layer in chain._modules.values():
        if isinstance(layer, Chain):
            yield from _flat(layer)
        else:
            yield layer


def _is_coupling(layer: nn.Module) -> bool:
    return isinstance(layer, (MLPCoupling, AffineCoupling, AdditiveCoupling))


def _features(layer: Bijection) -> int | None:
    if isinstance(layer, MLPCoupling):
        return layer.features
    if isinstance(layer, ActNorm):
        return layer.bias.numel()
    if isinstance(layer, Permutation):
        return layer.indices.numel()
    if isinstance(layer, (AffineCoupling, AdditiveCoupling)) and layer.mask is None:
        return layer.changed.numel() + layer.kept.numel()
    return None


def _step(layer: Bijection, name: str, features: int) -> ActNormStep | CouplingStep | PermutationStep:
    if isinstance(layer, MLPCoupling):
        return layer.step
    if isinstance(layer, ActNorm):
        return ActNormStep(layer.gain)
    if isinstance(layer, Permutation):
        return PermutationStep(tuple(layer.indices.tolist()))
    if not _is_coupling(layer):
        raise TypeError(f"{name}: expected a coupling, ActNorm or Permutation, got {type(layer).__name__}")
    hidden, activation, slope = _hidden(layer.network, f"{name}.network")
    changed = layer.changed.tolist() if layer.mask is None else _changed(features, layer.mask, f"{name}.mask")
    affine = isinstance(layer, AffineCoupling)
    step = CouplingStep(
        tuple(changed),
        hidden,
        activation=activation,
        slope=slope,
        packing=layer.packing if affine else "interleaved",
        scale=layer.scale if affine else "none",
        order=layer.order if affine else "scale_first",
        shift_gain=layer.shift_gain if affine else 1.0,
        rescale=layer.rescale.numel() if affine and layer.rescale is not None else 0,
    )
    shapes = [tuple(_parameter(m, n).shape) for m, n in _sources(layer)]
    if shapes != step.shapes(features, 0):
        raise ValueError(f"{name}.network: expected parameters of shapes {step.shapes(features, 0)}, got {shapes}")
    return step


def _hidden(network: nn.Module, name: str) -> tuple[tuple[int, ...], str, float]:
    """(widths of the hidden layers, activation, its slope) of an MLP."""
    if not isinstance(network, nn.Sequential) or type(network).forward is not nn.Sequential.forward:
        raise TypeError(f"{name}: expected an nn.Sequential of nn.Linear and activations, got {type(network).__name__}")
    parts = list(network)
    widths, activation, slope = [], "relu", 0.01
    for i, part in enumerate(parts):
        if i % 2 == 0:
            if not isinstance(part, nn.Linear) or type(part).forward is not nn.Linear.forward or part.bias is None:
                raise TypeError(f"{name}[{i}]: expected an nn.Linear with bias, got {part}")
            widths.append(part.out_features)
            continue
        kinds = [key for key, kind in _ACTIVATIONS.items() if type(part) is kind]
        plain = getattr(part, "alpha", 1.0) == 1.0 and getattr(part, "beta", 1.0) == 1.0
        if not kinds or not plain or (i > 1 and repr(part) != repr(parts[1])):
            raise TypeError(f"{name}[{i}]: expected one of {', '.join(_ACTIVATIONS)}, the same everywhere, got {part}")
        activation, slope = kinds[0], getattr(part, "negative_slope", 0.01)
    if len(parts) % 2 == 0:
        raise TypeError(f"{name}: expected an nn.Linear as its last layer, got {parts[-1] if parts else 'nothing'}")
    return tuple(widths[:-1]), activation, slope


def _changed(features: int, mask: Any, name: str = "mask") -> tuple[int, ...]:
    half = features // 2
    named = {
        "second_half": slice(features - half, features),
        "first_half": slice(0, features - half),
        "even": slice(0, features, 2),
        "odd": slice(1, features, 2),
    }
    if isinstance(mask, str) and mask not in named:
        raise ValueError(f"{name}: expected one of {', '.join(named)}, a slice or {features} bools, got {mask!r}")
    mask = named[mask] if isinstance(mask, str) else mask
    if isinstance(mask, slice):
        return tuple(range(*mask.indices(features)))
    values = mask.tolist() if isinstance(mask, Tensor) else list(mask)
    if len(values) != features or not all(isinstance(v, bool) for v in values):
        raise ValueError(f"{name}: expected a slice or {features} bools, got {values}")
    return tuple(i for i, v in enumerate(values) if v)


def _sources(layer: Bijection) -> list[tuple[nn.Module, str]]:
    """Where the parameters of a layer are, in the order of its step."""
    if isinstance(layer, ActNorm):
        return [(layer, "log_scale"), (layer, "bias")]
    if isinstance(layer, Permutation):
        return []
    linear = [part for part in layer.network if isinstance(part, nn.Linear)]
    found: list[tuple[nn.Module, str]] = [(part, name) for part in linear for name in ("weight", "bias")]
    return found if getattr(layer, "rescale", None) is None else [*found, (layer, "rescale")]


def _parameter(module: nn.Module, name: str) -> Tensor:
    found = module._parameters.get(name)  # the way of every call; a parametrised one is made by its property
    return getattr(module, name) if found is None else found


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
