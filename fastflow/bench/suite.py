"""The rows under pytest-benchmark; ``fastflow bench`` runs this file.

pytest-benchmark times ``fastflow``; in the set-up of each of its rounds every other contender has its turn.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest

from fastflow.bench.contest import Contest
from fastflow.bench.machine import limits
from fastflow.bench.measure import Rounds
from fastflow.bench.row import FAMILIES, Row

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
    contest = Contest(row)
    rounds, contenders = contest.rounds(SECONDS), dict(contest.contenders)
    fastflow, n = contenders.pop("fastflow"), contest.calls["fastflow"]
    others = Rounds(contenders, contest.calls)
    benchmark.pedantic(lambda: [fastflow() for _ in range(n)], setup=others.turn, rounds=rounds)
    times = {"fastflow": [t / n for t in benchmark.stats.stats.data], **others.times}
    benchmark.extra_info["limits"] = machine
    benchmark.extra_info["row"] = contest.record(times, machine)
