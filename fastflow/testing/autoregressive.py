"""The cases of the autoregressive inverse."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastflow import ops
from fastflow.ops.autoregressive import hidden_widths, reaches_of
from fastflow.ops.scale_map import ScaleMap, scale_map
from fastflow.testing.case import Case, Inputs
from fastflow.testing.masked import counts_of, kept, network, orders, reordered


def _inputs(size: str, **options) -> Inputs:
    """Weights so small that D steps do not blow up what was rounded in the first."""
    made = network(size, **options)
    return {name: 0.5 * tensor if name.startswith(("weight", "direct")) else tensor for name, tensor in made.items()}


def _counts(x: Tensor, weights: list[Tensor]) -> Tensor:
    return counts_of(hidden_widths(weights), x.shape[1]).to(x.device)


def _run(
    x: Tensor, network: dict, layer: dict, backend=None, order=None, direct: Tensor | None = None, **rest: Tensor
) -> tuple[Tensor, Tensor]:
    weights, starts = list(rest.values())[::2], list(rest.values())[1::2]
    x, back = (x, slice(None)) if order is None else reordered(order, x, weights, starts)
    options = {"direct": direct, "backend": backend, **network, **layer}
    value, logdet = ops.autoregressive_inverse(x, weights, starts, _counts(x, weights), **options)
    return value[back], logdet[back]


def _back(
    outputs: tuple[Tensor, Tensor],
    x: Tensor,
    network: dict,
    layer: dict,
    backend=None,
    direct: Tensor | None = None,
    **rest: Tensor,
) -> Tensor:
    """The layer itself, in plain PyTorch."""
    value, weights, starts = outputs[0], list(rest.values())[::2], list(rest.values())[1::2]
    *reaches, reach = reaches_of(_counts(x, weights), hidden_widths(weights), x.shape[1], 2)
    if direct is not None:
        network = {**network, "direct": direct, "direct_reach": reach}
    params = ops.masked_mlp(value, weights, starts, reaches, backend="reference", **network)
    packing, gate = "interleaved_st" if layer["swapped"] else "interleaved", layer["form"] == "gate"
    order = {"order": "shift_first", "shift_gain": -1.0} if gate else {"order": layer["form"]}
    z = ops.affine_coupling(value, params, packing=packing, scale=layer["scale"], backend="reference", **order)[0]
    return z + params[:, int(layer["swapped"]) :: 2] if gate else z


def _case(
    name: str,
    layers: int,
    activation: str,
    form: str,
    scale: str | ScaleMap,
    swapped: bool = False,
    residual: bool = False,
    direct: bool = False,
    context: bool = False,
    selftest: bool = False,
) -> Case:
    make = partial(_inputs, layers=layers, each=1 if form == "bernoulli" else 2, direct=direct, context=context)
    meaning = {
        "network": {"activation": activation, "residual": residual},
        "layer": {"form": form, "scale": scale, "swapped": swapped},
    }
    sampling = form == "bernoulli"
    return Case(
        "autoregressive",
        name,
        partial(_run, **meaning),
        make if not sampling else partial(_uniform, make),
        back=None if sampling else partial(_back, **meaning),
        logdet=None if sampling else 1,
        keep=(*kept(make("tiny")), *(("x",) if sampling else ())),
        orders=partial(orders, count=6),  # of D passes each
        selftest=selftest,
        derivatives=0 if sampling else 2,
    )


def _uniform(make, size: str) -> Inputs:
    inputs = make(size)
    return {**inputs, "x": torch.special.ndtr(inputs["x"])}


def cases() -> Iterator[Case]:
    soft = scale_map("softplus_eps", offset=1.0)
    yield _case("linear", 0, "relu", "shift_first", scale_map("exp", gain=0.5))
    yield _case("nflows", 2, "relu", "scale_first", soft, swapped=True, selftest=True)
    yield _case("gate", 1, "elu", "gate", "sigmoid2", context=True, selftest=True)
    yield _case("residual", 3, "tanh", "scale_first", "soft_clip", residual=True, direct=True, selftest=True)
    yield _case("reciprocal", 2, "softplus", "shift_first", scale_map("sigmoid2_eps", reciprocal=True))
    yield _case("blocks", 5, "silu", "scale_first", "tanh_rescale", residual=True, context=True)
    yield _case("bernoulli", 2, "relu", "bernoulli", "none")
