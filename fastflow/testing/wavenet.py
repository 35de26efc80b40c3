"""The cases of WaveNet's stack, and of generation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastflow import ops
from fastflow.testing.case import Case, Inputs, randn

# samples, steps, residual, gated and skip channels, dilations
SIZES = {
    "tiny": (2, 5, 3, 2, 4, (1, 2)),
    "odd": (3, 70, 17, 18, 33, (1, 33, 4)),
    "bench": (4, 300, 32, 32, 48, (1, 2, 4, 64)),
}


def _inputs(sizes: tuple, width: int, features: int, each: bool) -> Inputs:
    samples, steps, residual, gated, skip, dilations = sizes
    layers = len(dilations)
    made = {
        "x": randn(samples, steps, residual),
        "weight": randn(layers, 2 * gated, residual, width, seed=1) / (width * residual) ** 0.5,
        "bias": 0.3 * randn(*((layers, samples) if each else (layers,)), 2 * gated, seed=2),
        "residual_weight": randn(layers, residual, gated, seed=3) / gated**0.5,
        "residual_bias": 0.3 * randn(layers, residual, seed=4),
        "skip_weight": randn(layers, skip, gated, seed=5) / gated**0.5,
        "skip_bias": 0.3 * randn(layers, skip, seed=6),
    }
    if features:
        made["context"] = randn(samples, steps, features, seed=7)
        made["context_weight"] = 0.5 * randn(layers, 2 * gated, features, seed=8)
    made["dilations"] = torch.tensor(dilations)
    return made


def _stack_inputs(size: str, **options) -> Inputs:
    return _inputs(SIZES[size], **options)


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual_weight: Tensor,
    residual_bias: Tensor,
    skip_weight: Tensor,
    skip_bias: Tensor,
    dilations: Tensor,
    order: Tensor | None = None,
    context: Tensor | None = None,
    backend: str | None = None,
    **rest: Tensor,
) -> tuple[Tensor, Tensor]:
    """Where every sample has a bias it has a past too.

    With ``order`` samples and channels are permuted on the way in, and back on the way out.
    """
    dilations, past = dilations.tolist(), None
    if bias.dim() == 3:
        rows = (weight.shape[3] - 1) * sum(dilations)
        bias, past = bias[:, : len(x)], randn(x.shape[0], rows, x.shape[2], seed=9).to(x)
    if order is None:
        weights = (weight, bias, residual_weight, residual_bias, skip_weight, skip_bias)
        return ops.wavenet_stack(x, *weights, dilations, context=context, past=past, backend=backend, **rest)
    generator = torch.Generator().manual_seed(int(order))

    def permuted(n: int) -> Tensor:
        return torch.randperm(n, generator=generator).to(x.device)

    b, c, d = permuted(x.shape[0]), permuted(x.shape[2]), permuted(residual_weight.shape[2])
    both = torch.cat([d, d + len(d)])
    h, skip = ops.wavenet_stack(
        x[b][..., c],
        weight[:, both][:, :, c],
        bias[:, both] if bias.dim() == 2 else bias[:, b][..., both],
        residual_weight[:, c][..., d],
        residual_bias[:, c],
        skip_weight[..., d],
        skip_bias,
        dilations,
        context=None if context is None else context[b],
        past=None if past is None else past[b][..., c],
        backend=backend,
        **{name: tensor[:, both] for name, tensor in rest.items()},
    )
    return h[b.argsort()][..., c.argsort()], skip[b.argsort()]


def _generated(
    x: Tensor, embedding: Tensor, hidden: Tensor, output: Tensor, backend: str | None = None, **rest: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The stack over x and, what has no gradient, the logits of codes that the network draws."""
    stack, order = _run(x, backend=backend, **rest), rest.pop("order", None)
    dilations = rest.pop("dilations").tolist()
    if order is not None:
        generator = torch.Generator().manual_seed(int(order))
        sizes = (x.shape[2], rest["residual_weight"].shape[2], hidden.shape[1])
        c, d, s = (torch.randperm(n, generator=generator).to(x.device) for n in sizes)
        both = torch.cat([d, d + len(d)])
        rest |= {"weight": rest["weight"][:, both][:, :, c], "bias": rest["bias"][:, both]}
        rest |= {"residual_weight": rest["residual_weight"][:, c][..., d], "residual_bias": rest["residual_bias"][:, c]}
        rest |= {"skip_weight": rest["skip_weight"][:, s][..., d], "skip_bias": rest["skip_bias"][:, s]}
        embedding, hidden = embedding[..., c], hidden[:, s]
    head = (hidden, hidden.sum(1), output, output.sum(1))
    weights = ops.wavenet_weights(embedding, tuple(rest.values()), head, dilations)
    past = weights.embedding.new_zeros(len(x), weights.rows, weights.embedding.shape[2])
    recent = torch.full((len(x), len(embedding)), -1, device=x.device)
    uniforms = torch.rand(2, len(x), generator=torch.Generator().manual_seed(0), dtype=torch.float64).t().to(x.device)
    _, logits = ops.wavenet_generate(weights, past, recent, uniforms, return_logits=True, backend=backend)
    return *stack, logits


# of the network that generates: the stack's, hidden units of the head, levels
NETWORKS = {
    "tiny": (SIZES["tiny"], 3, 5),
    "odd": ((2, 4, 17, 18, 33, (1, 3)), 20, 33),
    "bench": (SIZES["bench"], 48, 64),
}


def _generation_inputs(size: str) -> Inputs:
    sizes, heads, levels = NETWORKS[size]
    _, _, residual, _, skip, _ = sizes
    return {
        **_inputs(sizes, 2, 0, False),
        "embedding": randn(2, levels, residual),
        "hidden": randn(heads, skip, seed=10) / skip**0.5,
        "output": randn(levels, heads, seed=11) / heads**0.5,
    }


def _orders(inputs: Inputs) -> Iterator[Inputs]:
    return ({**inputs, "order": torch.tensor(seed)} for seed in range(6))


def cases() -> Iterator[Case]:
    for name, width, features, each in (("plain", 2, 0, False), ("conditioned", 3, 5, True)):
        make = partial(_stack_inputs, width=width, features=features, each=each)
        keep = tuple(k for k in make("tiny") if k not in ("x", "context"))
        yield Case("wavenet", name, _run, make, keep=keep, orders=_orders, selftest=True)
    keep = tuple(k for k in _generation_inputs("tiny") if k != "x")
    yield Case("wavenet", "generation", _generated, _generation_inputs, keep=keep, orders=_orders, selftest=True)
