"""Continuous flows: FFJORD's training step, density and sampling, fused and as it is written on torchdiffeq.

Both have the same parameters, probes, tolerances and step control, and must make the same number of evaluations (NFE),
which the rows are named after. The rivals' training goes by the adjoint, ours by the exact gradient through the steps.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastflow.bench.plain_ffjord import PlainFFJORD
from fastflow.bench.row import Contenders, Row
from fastflow.models import FFJORD
from fastflow.ops import probes

TOY = {"features": 2, "hidden": (64, 64, 64), "activation": "tanh", "time": 0.5}
MINIBOONE = {"features": 43, "hidden": (860, 860), "activation": "softplus", "time": 1.0}


def model(shape: dict[str, Any], **options: Any) -> FFJORD:
    """With weights that ask for about as many steps as those of a trained one."""
    torch.manual_seed(0)
    made = FFJORD(**{**shape, **options})
    with torch.no_grad():
        for layer in made.blocks[0].dynamics.net:
            layer.linear.weight.mul_(6.0 if made.config["activation"] == "tanh" else 4.0)
    return made


def _inputs(shape: dict[str, Any], batch: int, count: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    size = (count, batch, shape["features"])
    return torch.randn(batch, shape["features"]), probes(size, seed=2, device=torch.get_default_device())


# --- the tasks ----------------------------------------------------------------------------------------


def _step(log_prob: Callable[[], Tensor], parameters: list[Tensor]) -> Callable[[], Tensor]:
    """A training step on a fixed batch; returns the loss. The rate keeps the model where it is."""
    optimizer = torch.optim.Adam(parameters, lr=1e-9)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = -log_prob().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _task(task: str, flow: FFJORD | PlainFFJORD, x: Tensor, e: Tensor | None) -> Callable[[], Any]:
    """The same of both; ``e`` [S, B, D] or None for the exact trace."""
    if isinstance(flow, PlainFFJORD):
        probe = None if e is None else e[0]
        log_prob, sample = partial(flow.log_prob, x, probe), partial(flow.sample_and_log_prob, x, probe)
    else:
        log_prob, sample = partial(flow.log_prob, x, probes=e), partial(_sample, flow, x, e)
    if task == "training step":
        return _step(log_prob, list(flow.parameters()))
    return torch.no_grad()(log_prob if task == "log_prob" else sample)


def _sample(flow: FFJORD, z: Tensor, e: Tensor | None) -> tuple[Tensor, Tensor]:
    x, logdet = flow.blocks[0].inverse(z, probes=e)
    return x, flow.base.log_prob(z) - logdet


def _evaluations(shape: dict[str, Any], batch: int) -> int:
    flow, (x, e) = model(shape), _inputs(shape, batch)
    with torch.no_grad():
        flow.log_prob(x, probes=e)
    return flow.evaluations


# --- rows ---------------------------------------------------------------------------------------------


def _against_plain(task: str, shape: dict[str, Any], batch: int, slack: int = 0) -> Contenders:
    """``slack``: by how many evaluations both may differ, where rounding can decide whether a step is accepted."""
    flow, (x, e) = model(shape), _inputs(shape, batch)
    plain = PlainFFJORD(flow.blocks[0].dynamics, shape["time"], flow.config["rtol"])
    if importlib.util.find_spec("torchdiffeq") is not None:  # else eager is reported as absent
        with torch.no_grad():
            flow.log_prob(x, probes=e)
            plain.log_prob(x, e[0])
        ours, theirs = flow.evaluations, plain.dynamics.evaluations
        if abs(ours - theirs) > slack:
            raise AssertionError(f"fastflow evaluates the dynamics {ours} times, eager {theirs} times")
    made = {"fastflow": _task(task, flow, x, e), "eager": _task(task, plain, x, e)}
    if task == "training step":
        made["adjoint"] = _task(task, model(shape, adjoint=True), x, e)
    return made


def _against_one_probe(shape: dict[str, Any], batch: int, count: int | None) -> Contenders:
    """A training step with the exact trace (``count`` None) or with many probes, and with one."""
    x, e = _inputs(shape, batch, count or 1)
    steps = {"method": "rk4", "step_size": 0.05}  # as many for all
    many = model(shape, trace="hutchinson" if count else "exact", **steps)
    return {
        "fastflow": _task("training step", many, x, e),
        "one probe": _task("training step", model(shape, **steps), x, e[:1]),
    }


def _long(evaluations: int, adjoint: bool = False) -> Callable[[], Tensor]:
    """A training step that takes this many evaluations, in steps of fixed size."""
    flow = model(TOY, time=1.0, method="rk4", step_size=4 / evaluations, adjoint=adjoint, checkpoints=4)
    x, e = _inputs(TOY, 512)
    return _task("training step", flow, x, e)


def _lengths() -> Contenders:
    return {
        "fastflow": _long(200),
        "NFE 20": _long(20),
        "adjoint": _long(200, adjoint=True),
        "adjoint NFE 20": _long(20, adjoint=True),
    }


TASKS = "training step", "log_prob", "sample_and_log_prob"
TARGETS = {2: (10.0, 8.0, 8.0), 43: (2.5, 2.0, 2.0)}  # of the tasks, in so many dimensions


def _tasks(shape: dict[str, Any], batch: int, known: str = "", slack: int = 0) -> Iterator[Row]:
    """``known``: what the names tell of the evaluations."""
    widths = "-".join(map(str, shape["hidden"]))
    for task, target in zip(TASKS, TARGETS[shape["features"]], strict=True):
        name = f"FFJORD D={shape['features']} {widths} B={batch}{known} {task}"
        make, demo = partial(_against_plain, task, shape, batch, slack), bool(known) and shape is TOY
        yield Row("ode", name, make, targets={"eager": target}, demo=demo and task == TASKS[0])


def rows() -> Iterator[Row]:
    for shape, batch in ((TOY, 512), (MINIBOONE, 200)):
        yield from _tasks(shape, batch, f" NFE {_evaluations(shape, batch)}")
    for features in (2, 8):  # against one probe in the same number of dimensions
        make, target = partial(_against_one_probe, {**TOY, "features": features}, 512, None), {"one probe": 1 / 1.3}
        targets = target if features == 2 else {}
        yield Row("ode", f"exact trace D={features} B=512 training step", make, targets=targets, comparable=False)
    make = partial(_against_one_probe, TOY, 512, 16)
    name = "S=16 probes D=2 B=512 training step"
    yield Row("ode", name, make, targets={"one probe": 1 / 8}, comparable=False)
    yield Row("ode", "training step D=2 B=512 NFE 200, 4 checkpoints", _lengths, comparable=False)


def gpu_rows(size: int) -> Iterator[Row]:
    """The same and a large batch, unless ``size`` says that this is only a test."""
    full = ((TOY, 512), (TOY, 65536), (MINIBOONE, 200))
    tiny = (({**TOY, "hidden": (16,)}, 5), ({**MINIBOONE, "hidden": (16, 16)}, 3))
    for shape, batch in full if size >= 2**20 else tiny:
        yield from _tasks(shape, batch, slack=6)  # an attempt of dopri5
