"""The rows under pytest-benchmark; ``fastflow bench`` runs this file.

pytest-benchmark times ``fastflow``; in the set-up of each of its rounds every other contender has its turn.
"""

from __future__ import annotations

import importlib
import statistics
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastflow.bench.machine import limits
from fastflow.bench.measure import Rounds, calls_for, peak_memory, spread, timed
from fastflow.bench.row import Contenders, Row

FAMILIES = ("coupling", "conv1x1", "gaussian", "trace", "glow")
SECONDS = 4.0  # for the rounds of a row


def rows() -> Iterator[Row]:
    """The rows of every family."""
    for family in FAMILIES:
        yield from importlib.import_module(f"fastflow.bench.{family}").rows()


@pytest.fixture(scope="session")
def machine() -> dict[str, float]:
    return limits()


@pytest.mark.parametrize("row", tuple(rows()), ids=lambda row: row.id + (" (demo)" if row.demo else ""))
def test_row(row: Row, benchmark: Any, machine: dict[str, float]) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    contenders = row.make()
    absent = agree(contenders, row.comparable)
    memory = {name: peak_memory(call) for name, call in contenders.items()}
    calls = {name: calls_for(call) for name, call in contenders.items()}
    rounds = max(5, min(50, int(SECONDS / sum(timed(c, calls[n]) * calls[n] for n, c in contenders.items()))))

    fastflow = contenders.pop("fastflow")
    others = Rounds(contenders, calls)
    n = calls["fastflow"]
    benchmark.pedantic(lambda: [fastflow() for _ in range(n)], setup=others.turn, rounds=rounds)
    times = {"fastflow": [t / n for t in benchmark.stats.stats.data], **others.times}
    benchmark.extra_info["limits"] = machine
    benchmark.extra_info["row"] = {
        "family": row.family,
        "name": row.name,
        "floor": max(row.bytes / machine["triad"], row.flops / machine["gemm"]),
        "targets": dict(row.targets),
        "rounds": rounds,
        "contenders": {
            name: {"seconds": statistics.median(t), "spread": spread(t), "memory": memory[name]}
            for name, t in times.items()
        },
        "absent": absent,
    }


def agree(contenders: Contenders, comparable: bool) -> dict[str, str]:
    """Warms everybody up and raises unless all say what ``eager`` says; whom this machine cannot run is taken out."""
    results, absent = {}, {}
    for name in list(contenders):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch.compile, about its own workings
                results[name] = _tensors(contenders[name]())
                contenders[name]()
        except Exception as error:  # no compiler for torch.compile, a library that is not installed
            if name == "fastflow":
                raise
            absent[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            del contenders[name]
    if comparable:
        for name, tensors in results.items():
            for ours, theirs in zip(results["fastflow"], tensors, strict=True):
                torch.testing.assert_close(
                    ours, theirs, rtol=1e-3, atol=1e-3 * max(1.0, theirs.abs().max().item()),
                    msg=lambda text, name=name: f"fastflow and {name} disagree: {text}",
                )  # fmt: skip
    return absent


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone() for t in ((result,) if isinstance(result, Tensor) else result))
