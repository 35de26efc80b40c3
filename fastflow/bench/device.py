"""The rows for a GPU, measured one by one into a result file that is complete after every row.

``python -m fastflow.bench.device FILE --device cuda --seconds 300``. A program that crashed the GPU's context can be
started again on the same file: it goes on behind the row at which it stopped. ``fastflow.bench.gpu`` does so.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastflow.bench import machine
from fastflow.bench.contest import Contest, reached, top_kernels
from fastflow.bench.measure import Rounds
from fastflow.bench.row import Row

FAMILIES = (  # the most wanted first
    "coupling",
    "gaussian",
    "glow",
    "conv1x1",
    "trace",
    "ode",
    "gru_ode",
    "mlp_coupling",
    "planar",
    "sylvester",
    "wavenet",
)
SECONDS = 1.5  # for the rounds of a row
BROKEN = 75  # exit status: this process can use its GPU no more


def rows(device: str, only: str = "") -> Iterator[Row]:
    """The rows of every family: tensors of 1 GB where the card has room for it, tiny ones on the CPU."""
    size = 1 << 18
    if device != "cpu":
        size = min(1 << 30, 1 << (torch.cuda.get_device_properties(device).total_memory // 64).bit_length() - 1)
    for family in FAMILIES:
        yield from (row for row in importlib.import_module(f"fastflow.bench.{family}").gpu_rows(size) if only in row.id)


def measure(path: Path, device: str, seconds: float, only: str = "") -> dict[str, Any]:
    """Measures what ``path`` does not have yet for as long as there is time; returns the result."""
    end = time.monotonic() + seconds
    planned = list(rows(device, only))
    result = _begin(path, device)
    if result["running"]:  # a process before this one ended in it
        result["failed"].setdefault(result["running"], "the process died")
        result["running"] = None
    result["planned"] = [row.id for row in planned]
    for row in planned:
        if row.id in _done(result) or end - time.monotonic() < row.seconds:
            continue
        result["running"] = row.id
        _write(path, result)
        print(row.id, file=sys.stderr, flush=True)
        try:
            result["rows"].append(_row(row, device, result["limits"]))
        except Exception as error:  # contenders that disagree, a kernel that cannot run, too little memory
            result["failed"][row.id] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            print(f"FAILED {row.id}: {result['failed'][row.id]}", file=sys.stderr, flush=True)
        result["running"] = None
        _write(path, result)
        _clean(device)
    _write(path, result)
    _profile(path, planned, result, device, end)
    return result


def _begin(path: Path, device: str) -> dict[str, Any]:
    if path.is_file():
        return json.loads(path.read_text())
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "device": device,
        "machine": machine.describe(device),
        "limits": machine.limits(device),
        "planned": [],
        "rows": [],
        "failed": {},
        "running": None,
    }


def _done(result: dict[str, Any]) -> set[str]:
    return {f"{row['family']}: {row['name']}" for row in result["rows"]} | set(result["failed"])


def _row(row: Row, device: str, limits: dict[str, float]) -> dict[str, Any]:
    contest = Contest(row, device)
    rounds = Rounds(contest.contenders, contest.calls, device)
    for _ in range(contest.rounds(SECONDS)):
        rounds.turn()
    return contest.record(rounds.times, limits)


def _clean(device: str) -> None:
    """Gives the memory back; ends the process where the GPU no longer answers it."""
    if device == "cpu":
        return
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.randn(1, device=device)  # a capture that failed may leave the generator in it
    except RuntimeError as error:
        print(f"the GPU does not answer: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(BROKEN)


def _profile(path: Path, planned: list[Row], result: dict[str, Any], device: str, end: float) -> None:
    """For every row below a target: where its time goes. Last of all, because a profiler slows what comes after it."""
    byid = {row.id: row for row in planned}
    for record in result["rows"]:
        row = byid.get(f"{record['family']}: {record['name']}")
        targets = [(reached(record, name), wanted) for name, wanted in record["targets"].items()]
        missed = any(got is not None and got < wanted for got, wanted in targets)
        if row is None or not missed or "profile" in record or end - time.monotonic() < 10:
            continue
        record["profile"] = {"unavailable": "the process died"}
        _write(path, result)
        try:
            with torch.device(device):
                call = row.make()["fastflow"]
            for _ in range(3):
                call()
            record["profile"] = top_kernels(call, device)
        except Exception as error:
            record["profile"] = {"unavailable": f"{type(error).__name__}: {error}"[:300]}
        _write(path, result)
        _clean(device)


def _write(path: Path, result: dict[str, Any]) -> None:
    result["left_out"] = [id for id in result["planned"] if id not in _done(result)]
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    measure(arguments.path, arguments.device, arguments.seconds, arguments.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
