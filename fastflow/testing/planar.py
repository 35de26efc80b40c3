"""The cases of planar and of radial flows: the steps of one are called like those of the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastflow import ops
from fastflow.testing.case import Case, Inputs, randn

SIZES = {"tiny": (33, 3, 2), "odd": (67, 5, 5), "bench": (1024, 16, 32)}
ONE = {"tiny": (33, 1, 2), "odd": (131, 1, 5), "bench": (4096, 1, 32)}

Names = dict[str, int]


def _inputs(size: str, sizes: dict, names: Names, each: bool) -> Inputs:
    """z [B, D], and of every name a parameter of that many dimensions: 1 is a number, 2 a vector for every step.

    Vectors are of a length of about one, as an initialisation has them; an alpha near 0 would be a step near a
    singular one, where one sample alone decides on the error.
    """
    samples, dim, steps = sizes[size]
    made = {"z": randn(samples, dim)}
    for number, (name, dims) in enumerate(names.items(), 1):
        shape = (*((samples,) if each else ()), steps, *((dim,) if dims == 2 else ()))
        made[name] = randn(*shape, seed=10 * number) * (dim**-0.5 if dims == 2 else 1.0)
        if name == "alpha":
            made[name] += 0.5 * made[name].sign()
    return made


def _run(op: Callable, z: Tensor, order: Tensor | None = None, **rest) -> tuple[Tensor, Tensor]:
    """With ``order`` samples and variables are permuted on the way in, and back on the way out."""
    if order is None:
        return op(z, **rest)
    generator = torch.Generator().manual_seed(int(order))
    b, d = (torch.randperm(n, generator=generator).to(z.device) for n in z.shape)
    for name, tensor in rest.items():
        if isinstance(tensor, Tensor):
            vector = name in ("u", "w", "centre")
            rest[name] = tensor = tensor[..., d] if vector else tensor
            rest[name] = tensor[b] if tensor.dim() == 2 + vector else tensor
    y, logdet = op(z[b][:, d], **rest)
    return y[b.argsort()][:, d.argsort()], logdet[b.argsort()]


def _orders(inputs: Inputs) -> Iterator[Inputs]:
    return ({**inputs, "order": torch.tensor(seed)} for seed in range(6))


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
