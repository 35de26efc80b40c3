"""The cases of GRU-ODE-Bayes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastflow import ops
from fastflow.ops._backend import BACKENDS
from fastflow.ops.gru_ode import Cell, Gru, Observe, Prep, Schedule
from fastflow.ops.ode_method import METHODS
from fastflow.testing.case import Case, Inputs, randn

# series, rows, H, D, P, Q, most steps of a segment
SIZES = {"tiny": (3, 4, 4, 2, 3, 2, 3), "odd": (29, 61, 19, 3, 7, 5, 9), "bench": (50, 150, 50, 2, 25, 25, 40)}


def _inputs(size: str, kind: str, impute: bool) -> Inputs:
    series, rows, h, d, p, q, _ = SIZES[size]
    gates = 3 if kind == "full" else 2
    shapes = {
        "hidden": (gates * h, h),
        **({"input_weight": (gates * h, 2 * d), "input_bias": (gates * h,)} if impute else {}),
        "observe_hidden_weight": (p, h), "observe_hidden_bias": (p,), "observe_weight": (2 * d, p),
        "observe_bias": (2 * d,), "prep_weight": (d, 4, q), "prep_bias": (d, q), "weight_ih": (3 * h, d * q),
        "weight_hh": (3 * h, h), "bias_ih": (3 * h,), "bias_hh": (3 * h,),
    }  # fmt: skip
    made = {"h0": 0.5 * randn(series, h), "values": randn(rows, d)}
    for i, (name, shape) in enumerate(shapes.items()):
        gain = 0.2 if len(shape) < 3 and "bias" in name else (shape[1] if "prep" not in name else 4) ** -0.5
        made[name] = gain * randn(*shape, seed=i + 1)
    return made


def schedule(series: int, rows: int, adaptive: bool = False) -> Schedule:
    """Series of all lengths: none, one and many rows, two at the same time, queries, and segments of any length."""
    generator = torch.Generator().manual_seed(series + rows)
    most = next((m for b, n, *_, m in SIZES.values() if (b, n) == (series, rows)), 1)
    owner = torch.randint(series, (rows,), generator=generator).sort().values if series else torch.zeros(0).long()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(owner, minlength=series).cumsum(0)])
    counts = torch.randint(2 if adaptive else most + 1, (rows + series,), generator=generator)
    sizes = torch.rand(rows + series, generator=generator, dtype=torch.float64) * (1.0 if adaptive else 0.2)
    return Schedule(offsets, counts, sizes, torch.rand(rows, generator=generator) > 0.2)


def _run(
    h0: Tensor,
    values: Tensor,
    kind: str,
    impute: bool,
    method: str,
    drop: bool,
    tol: float = 1e-6,
    backend=None,
    order=None,
    **rest: Tensor,
) -> tuple[Tensor, ...]:
    """What is not observed is NaN. With ``order`` the hidden units are permuted, here and in the prediction."""
    rows, series = len(values), len(h0)
    when = Schedule(*(t.to(h0.device) for t in schedule(series, rows, bool(METHODS[method].error))))
    generator = torch.Generator().manual_seed(rows)
    seen = (torch.rand(values.shape, generator=generator) > 0.3).to(h0.device)
    kept = torch.rand(rows, 2, len(rest["observe_hidden_bias"]), generator=generator) > 0.3
    dropout = (kept.double() / 0.7).to(rest["hidden"]) if drop else None
    back = slice(None)
    if order is not None:
        h0, dropout, rest, back = _permuted(int(order), h0, dropout, rest)
    given = iter(rest.values())
    cell = Cell(next(given), *((next(given), next(given)) if impute else (None, None)), kind)
    networks = [Observe, Prep, Gru]
    networks = [make(*(next(given) for _ in make._fields)) for make in networks]
    out = ops.gru_ode_filter(
        h0, when, values.masked_fill(~seen, math.nan), seen, cell, *networks, dropout=dropout, impute=impute,
        method=method, rtol=tol, atol=tol, backend=backend,
    )  # fmt: skip
    return out.pre, out.post, out.state[:, back], out.states[:, back]


def _permuted(seed: int, h0: Tensor, dropout: Tensor | None, rest: Inputs):
    generator = torch.Generator().manual_seed(seed)
    h, p = (
        torch.randperm(n, generator=generator).to(h0.device) for n in (h0.shape[1], len(rest["observe_hidden_bias"]))
    )
    stacked = {
        name: torch.cat([part[h] for part in rest[name].split(len(h))])
        for name in ("hidden", "input_weight", "input_bias", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
        if name in rest
    }
    changed = {
        **rest, **stacked, "hidden": stacked["hidden"][:, h], "weight_hh": stacked["weight_hh"][:, h],
        "observe_hidden_weight": rest["observe_hidden_weight"][p][:, h],
        "observe_hidden_bias": rest["observe_hidden_bias"][p], "observe_weight": rest["observe_weight"][:, p],
    }  # fmt: skip
    return h0[:, h], None if dropout is None else dropout[:, :, p], changed, h.argsort()


def _orders(inputs: Inputs) -> Iterator[Inputs]:
    return ({**inputs, "order": torch.tensor(seed)} for seed in range(4))


def make_case(
    kind: str, impute: bool, method: str, drop: bool = False, selftest: bool = False, tol: float = 1e-6
) -> Case:
    return Case(
        "gru_ode",
        f"{kind}-{method}" + ("-impute" if impute else "") + ("-dropout" if drop else ""),
        partial(_run, kind=kind, impute=impute, method=method, drop=drop, tol=tol),
        partial(_inputs, kind=kind, impute=impute),
        keep=tuple(_inputs("tiny", kind, impute))[2:],
        derivatives=0 if METHODS[method].error else 2,
        orders=_orders,
        backends=("cpu", "cuda", "reference") if METHODS[method].error else BACKENDS,
        selftest=selftest,
    )


def cases() -> Iterator[Case]:
    """Steps of given sizes, and as tolerances want them."""
    yield make_case("full", False, "euler", drop=True, selftest=True)
    yield make_case("minimal", True, "euler", selftest=True)
    yield make_case("full", True, "midpoint")
    yield make_case("minimal", False, "rk4")
    yield make_case("full", False, "dopri5", selftest=True, tol=1e-3)
    yield make_case("minimal", True, "bosh3", tol=1e-3)
