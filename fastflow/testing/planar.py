"""The cases of planar and of radial flows: the steps of one are called like those of the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastflow import ops
from fastflow.testing.case import Case, Inputs, randn

SIZES = {"tiny": (3, 2, 3), "odd": (67, 5, 7), "bench": (1024, 16, 32)}
ONE = {"tiny": (3, 1, 2), "odd": (35, 1, 5), "bench": (4096, 1, 32)}

Names = dict[str, int]


def _inputs(size: str, sizes: dict, names: Names, each: bool) -> Inputs:
    """z [B, D], and of every name a parameter of that many dimensions: 1 is a number, 2 a vector for every step."""
    samples, dim, steps = sizes[size]
    made = {"z": randn(samples, dim)}
    for seed, (name, dims) in enumerate(names.items(), 1):
        shape = (*((samples,) if each else ()), steps, *((dim,) if dims == 2 else ()))
        made[name] = randn(*shape, seed=seed)
    return made


def _run(op: Callable, z: Tensor, order: Tensor | None = None, **rest) -> tuple[Tensor, Tensor]:
    """With ``order`` the variables are permuted on the way in, and back on the way out."""
    if order is None:
        return op(z, **rest)
    d = torch.randperm(z.shape[1], generator=torch.Generator().manual_seed(int(order))).to(z.device)
    vectors = ("u", "w", "centre")
    y, logdet = op(z[:, d], **{k: v[..., d] if k in vectors else v for k, v in rest.items()})
    return y[:, d.argsort()], logdet


def _orders(inputs: Inputs) -> Iterator[Inputs]:
    return ({**inputs, "order": torch.tensor(seed)} for seed in range(12))


def _back(outputs: tuple[Tensor, ...], z: Tensor, op: Callable, inverse: bool = False, **rest) -> Tensor:
    rest.pop("order", None)
    return op(outputs[0], inverse=not inverse, **rest)[0]


def _case(
    family: str, name: str, op: Callable, names: Names, each: bool, sizes: dict = SIZES, selftest=False, **options
) -> Case:
    return Case(
        family,
        name,
        partial(_run, op, **options),
        partial(_inputs, sizes=sizes, names=names, each=each),
        back=partial(_back, op=op, **options),
        logdet=1,
        # a batch of no samples has shared parameters nevertheless
        keep=() if each else tuple(names),
        orders=_orders,
        selftest=selftest,
    )


def _cases(family: str, op: Callable, names: Names, **options) -> Iterator[Case]:
    for each in (False, True):
        for inverse in (False, True):
            name = f"{'each' if each else 'shared'}-{'inverse' if inverse else 'forward'}"
            yield _case(family, name, op, names, each, inverse=inverse, selftest=True, **options)
    yield _case(family, "shared-one", op, names, False, ONE, **options)


def cases() -> Iterator[Case]:
    yield from _cases("planar", ops.planar, {"u": 2, "w": 2, "b": 1})
    radial = {"centre": 2, "alpha": 1, "beta": 1}
    yield from _cases("radial", ops.radial, radial)
    yield _case("radial", "each-softplus-inverse", ops.radial, radial, True, alpha_map="softplus", inverse=True)
