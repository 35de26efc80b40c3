"""The cases of the fused MLP dynamics."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastflow import ops
from fastflow.ops.trace_mlp import _NAMES, _PARAMETERS, ACTIVATIONS, LAYERS
from fastflow.testing.case import Case, Inputs, randn

NARROW = {"tiny": (5, 3, (6, 4)), "odd": (37, 5, (33, 17, 7)), "bench": (512, 2, (64, 64, 64))}
WIDE = {"tiny": (16, 3, (130,)), "odd": (11, 3, (131, 145)), "bench": (200, 43, (860, 860))}


def _shapes(layer: str, n: int, m: int) -> tuple[tuple[int, ...], ...]:
    return ((m, n + (layer == "concat")), (m,), (m, 1), (m,), (m, 1))[: _PARAMETERS[layer]]


def _inputs(size: str, sizes: dict, layer: str, activation: str) -> Inputs:
    samples, dim, hidden = sizes[size]
    widths = (dim, *hidden, dim)
    made = {"x": randn(samples, dim), "t": torch.tensor(0.3, dtype=torch.float64)}
    for i, (n, m) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        for name, shape in zip(_NAMES, _shapes(layer, n, m), strict=False):
            gain = n**-0.5 if name == "weight" else 0.5
            made[f"{name}_{i}"] = gain * randn(*shape, seed=i + 1)
        if activation == "swish" and i + 2 < len(widths):
            made[f"beta_{i}"] = 1.5 + 0.1 * randn(seed=i)
    return made


def layers_of(values: list[Tensor], layer: str, activation: str) -> list[list[Tensor]]:
    """The parameters of every layer out of all."""
    each = _PARAMETERS[layer] + (activation == "swish")
    return [values[i : i + each] for i in range(0, len(values), each)]


def _run(
    x: Tensor,
    t: Tensor,
    layer: str,
    count: int | None,
    seed: int | None = None,
    backend=None,
    order: Tensor | None = None,
    **rest,
) -> tuple[Tensor, Tensor]:
    """With a ``seed`` the kernels make the probes.

    With ``order`` the samples, variables and hidden units are permuted on the way in, and back on the way out.
    """
    activation = rest.pop("activation")
    layers = layers_of(list(rest.values()), layer, activation)
    probes = None if count is None else randn(count, *x.shape).to(x)
    options = {"layer": layer, "activation": activation, "backend": backend, "exact": count is None}
    if seed is not None:
        made = ops.trace.signs((count, *x.shape), seed, dtype=x.dtype, device=x.device)
        probes = ops.Rademacher(count, seed) if order is None else made
    if order is None:
        return ops.mlp_trace(x, t, layers, probes=probes, **options)
    x, layers, probes, samples, variables = permuted(x, layers, probes, layer, order)
    value, trace = ops.mlp_trace(x, t, layers, probes=probes, **options)
    return value[samples][:, variables], trace[..., samples]


def permuted(x: Tensor, layers: list, probes: Tensor | None, layer: str, order: Tensor) -> tuple:
    """The same problem with samples, variables and hidden units in another order, and what orders the results again."""
    samples, variables = (_permutation(n, order).to(x.device) for n in x.shape)
    before, made = variables, []
    for i, (weight, *others) in enumerate(layers):
        after = variables if i + 1 == len(layers) else _permutation(weight.shape[0], order).to(x.device)
        columns = torch.cat([before.new_zeros(1), before + 1]) if layer == "concat" else before
        made.append([weight[after][:, columns], *(p[after] if p.dim() else p for p in others)])
        before = after
    probes = None if probes is None else probes[:, samples][:, :, variables]
    return x[samples][:, variables], made, probes, samples.argsort(), variables.argsort()


def _permutation(n: int, order: Tensor) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(int(order)))


def _orders(inputs: Inputs) -> Iterator[Inputs]:
    return ({**inputs, "order": torch.tensor(seed)} for seed in range(12))


def _case(layer: str, activation: str, count: int | None, wide: bool = False, seed: int | None = None) -> Case:
    name = f"{layer}-{activation}-" + ("exact" if count is None else f"{count}") + ("-wide" if wide else "")
    name += "" if seed is None else "-signs"
    make = partial(_inputs, sizes=WIDE if wide else NARROW, layer=layer, activation=activation)
    return Case(
        "trace",
        name,
        partial(_run, layer=layer, activation=activation, count=count, seed=seed),
        make,
        keep=tuple(make("tiny"))[1:],
        orders=_orders,
        selftest=wide,
    )


def cases() -> Iterator[Case]:
    for layer in LAYERS:
        for activation in ACTIVATIONS:
            for count in (1, 3, None):
                yield _case(layer, activation, count)
    for layer, wide in (("concat", False), ("squash", False), ("squash", True)):
        yield _case(layer, "swish", 1, wide)
    for layer, activation, count in zip((*LAYERS, LAYERS[1]), ACTIVATIONS, (1, 3, 1, 1), strict=True):
        yield _case(layer, activation, count, wide=True)
    for wide in (False, True):
        yield _case("concat", "tanh", 3, wide, seed=2**40 + 5)
