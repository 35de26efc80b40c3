"""The cases of integrated MLP dynamics.

Their steps are few and their tolerances loose, so that no step is near the border between accepted and rejected, where
the rounding of a dtype decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastflow import ops
from fastflow.ops._backend import BACKENDS
from fastflow.ops.ode_method import METHODS
from fastflow.testing.case import Case, Inputs, randn
from fastflow.testing.trace import _inputs, layers_of, permuted

NARROW = {"tiny": (3, 2, (4,)), "odd": (19, 3, (17, 5)), "bench": (512, 2, (64, 64, 64))}
# a sample and what its steps need do not fit into the shared memory of a GPU's block
WIDEST = {"tiny": (2, 3, (1500,)), "odd": (5, 3, (1501, 7)), "bench": (64, 43, (860, 860))}
WIDE = {"tiny": (16, 3, (130,)), "odd": (7, 5, (131, 145)), "bench": (64, 43, (430, 430))}


def _make(size: str, sizes: dict, layer: str, activation: str) -> Inputs:
    made = _inputs(size, sizes, layer, activation)
    del made["t"]
    return made


def _run(
    x: Tensor,
    layer: str,
    activation: str,
    count: int | None,
    times: tuple[float, ...],
    options: dict[str, Any],
    backend: str | None = None,
    order: Tensor | None = None,
    **rest: Tensor,
) -> tuple[Tensor, ...]:
    """(value, trace, kinetic, jacobian), as many as there are; ``count`` probes, 0: none, None: exact."""
    layers = layers_of(list(rest.values()), layer, activation)
    probes = randn(count, *x.shape).to(x) if count else None
    back = None
    if order is not None:
        x, layers, probes, *back = permuted(x, layers, probes, layer, order)
    solution = ops.mlp_ode(
        x, times, layers, layer=layer, activation=activation, probes=probes, exact=count is None, backend=backend,
        **options,
    )  # fmt: skip
    value, *integrals = (part for part in solution[:4] if part is not None)
    if back is None:
        return value, *integrals
    return value[:, back[0]][:, :, back[1]], *(part[..., back[0]] for part in integrals)


def _orders(inputs: Inputs) -> Iterator[Inputs]:
    return ({**inputs, "order": torch.tensor(seed)} for seed in range(12))


def _case(
    method: str,
    layer: str,
    activation: str,
    count: int | None,
    times: tuple[float, ...] = (0.0, 1.0),
    sizes: dict = NARROW,
    selftest: bool = False,
    **options: Any,
) -> Case:
    marks = [name.split("_")[0] for name in ("per_sample", "regularize", "step_size") if name in options]
    marks += [options["gradient"]] if "gradient" in options else []
    marks += ["wide"] * (sizes is WIDE) + ["widest"] * (sizes is WIDEST) + ["back"] * (times[-1] < times[0])
    name = "-".join([method, layer, activation, "exact" if count is None else str(count), *marks])
    make = partial(_make, sizes=sizes, layer=layer, activation=activation)
    adjoint, each = options.get("gradient") == "adjoint", "per_sample" in options
    without = ("triton",) if adjoint or each else ()
    fixed = not METHODS[method].error or "step_size" in options
    options = {"method": method, "rtol": 1e-3, "atol": 1e-3, **options}
    return Case(
        "ode",
        name,
        partial(_run, layer=layer, activation=activation, count=count, times=times, options=options),
        make,
        keep=tuple(make("tiny"))[1:],
        orders=_orders,
        # adaptive steps move with the inputs; finite differences through hundreds of wide units would take minutes
        derivatives=2 if fixed and sizes is NARROW and "gradient" not in options else 0,
        backends=tuple(b for b in BACKENDS if b not in without),
        selftest=selftest,
    )


def cases() -> Iterator[Case]:
    yield _case("dopri5", "concat", "tanh", None, selftest=True)
    yield _case("dopri5", "concat_squash", "softplus", 1, (1.0, 0.4, 0.1, 0.1, -0.5), regularize=True, selftest=True)
    yield _case("dopri5", "concat_squash", "tanh", 3, (0.0, 1.0), per_sample=True, regularize=True)
    yield _case("dopri5", "concat", "softplus", 2, (0.0, 0.6), gradient="adjoint", regularize=True, selftest=True)
    yield _case("rk4", "concat_squash", "tanh", None, (1.0, 0.5, 0.0), per_sample=True, gradient="adjoint")
    yield _case("dopri5", "ignore", "elu", 0)
    yield _case("dopri5", "concat_squash", "tanh", 1, sizes=WIDE, selftest=True)
    yield _case("dopri5", "concat", "tanh", 1, (0.0, 0.5), step_size=0.2)
    yield _case("tsit5", "concat", "tanh", 2, (0.0, 0.3, 0.8), regularize=True)
    yield _case("bosh3", "squash", "swish", None, (0.0, 0.7), regularize=True)
    yield _case("bosh3", "ignore", "softplus", 2, (0.0, 0.7, 0.9), per_sample=True, rtol=1e-4)
    yield _case("rk4", "concat_squash", "tanh", 2, (1.0, 0.3, 0.0), step_size=0.4, regularize=True, selftest=True)
    yield _case("rk4", "concat", "silu", None, sizes=WIDE)
    yield _case("dopri5", "concat_squash", "silu", None, (0.0, 0.3, 0.5), sizes=WIDEST, regularize=True, selftest=True)
    yield _case("rk4", "concat", "tanh", None, (1.0, 0.5, 0.0), sizes=WIDEST, step_size=0.3, selftest=True)
    yield _case("midpoint", "concat", "elu", 1, (0.0, 0.4, 0.4, 1.0))
    yield _case("euler", "ignore", "tanh", None, step_size=0.5)
