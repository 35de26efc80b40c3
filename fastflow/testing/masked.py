"""The cases of masked networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from fastflow import ops
from fastflow.ops.autoregressive import hidden_widths, reaches_of
from fastflow.testing.case import Case, Inputs, randn

SIZES = {"tiny": (3, 3, 5), "odd": (37, 7, 19), "bench": (256, 63, 512)}  # samples, variables, width


def degrees(width: int, variables: int) -> Tensor:
    """Sorted, some of them 0, some of them several times."""
    return (torch.arange(width) * variables) // width


def counts_of(widths: Sequence[int], variables: int) -> Tensor:
    """As :func:`fastflow.autoregressive_inverse` takes them."""
    last = torch.arange(variables + 1)
    found = [torch.searchsorted(degrees(width, variables), last, right=True) for width in widths]
    return torch.stack(found) if found else last.new_empty((0, variables + 1))


def network(size: str, layers: int, each: int, direct: bool, context: bool) -> Inputs:
    """x and the parameters: weight_0, start_0, weight_1, ...; ``context`` gives the first layer a start per sample."""
    samples, variables, width = SIZES[size]
    widths = (variables, *[width] * layers, each * variables)
    made = {"x": randn(samples, variables)}
    for i, (n, m) in enumerate(zip(widths, widths[1:], strict=False)):
        made[f"weight_{i}"] = (n + 1) ** -0.5 * randn(m, n, seed=i + 1)
        made[f"start_{i}"] = randn(*(samples, m) if context and i == 0 else (m,), seed=i + 11)
    if direct:
        made["direct"] = 0.5 * (variables + 1) ** -0.5 * randn(each * variables, variables, seed=21)
    return made


def kept(made: Inputs) -> tuple[str, ...]:
    """The parameters: all but x and a start per sample."""
    return tuple(name for name in made if name.startswith(("weight", "direct")) or made[name].dim() == 1)


def reordered(order: Tensor, x: Tensor, weights: list[Tensor], starts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(x in another order of its samples, the way back). Hidden units of the same degree exchange their places, too:
    the same function, summed in another order."""
    variables = x.shape[1]
    samples = torch.randperm(len(x), generator=torch.Generator().manual_seed(int(order))).to(x.device)
    starts[:] = [start if start.dim() == 1 else start[samples] for start in starts]
    for i in range(len(weights) - 1):
        generator = torch.Generator().manual_seed(int(order) + i + 1)
        of, mixed = degrees(len(weights[i]), variables), torch.randperm(len(weights[i]), generator=generator)
        units = mixed[of[mixed].argsort(stable=True)].to(weights[i].device)
        weights[i], starts[i], weights[i + 1] = weights[i][units], starts[i][..., units], weights[i + 1][:, units]
    return x[samples], samples.argsort()


def orders(inputs: Inputs, count: int = 12) -> Iterator[Inputs]:
    return ({**inputs, "order": torch.tensor(seed)} for seed in range(count))


def _run(
    x: Tensor, each: int, backend=None, order: Tensor | None = None, direct: Tensor | None = None, **rest
) -> tuple[Tensor]:
    options = {name: rest.pop(name) for name in ("activation", "residual")}
    weights, starts = list(rest.values())[::2], list(rest.values())[1::2]
    x, back = (x, slice(None)) if order is None else reordered(order, x, weights, starts)
    counts = counts_of(hidden_widths(weights), x.shape[1]).to(x.device)
    *reaches, reach = reaches_of(counts, hidden_widths(weights), x.shape[1], each)
    options |= {} if direct is None else {"direct": direct, "direct_reach": reach}
    return (ops.masked_mlp(x, weights, starts, reaches, backend=backend, **options)[back],)


def _case(
    layers: int, activation: str, each: int = 2, residual: bool = False, direct: bool = False, context: bool = False
) -> Case:
    make = partial(network, layers=layers, each=each, direct=direct, context=context)
    parts = (f"{layers}-{activation}", *(w for w, on in (("residual", residual), ("direct", direct)) if on))
    return Case(
        "masked",
        "-".join((*parts, "context")) if context else "-".join(parts),
        partial(_run, each=each, activation=activation, residual=residual),
        make,
        keep=kept(make("tiny")),
        orders=orders,
        backends=("cpu", "reference"),
    )


def cases() -> Iterator[Case]:
    yield _case(0, "relu", each=1)
    yield _case(2, "relu")
    yield _case(1, "tanh", direct=True, context=True)
    yield _case(3, "elu", residual=True, context=True)
    yield _case(2, "softplus", each=3)
    yield _case(5, "silu", residual=True, direct=True)
