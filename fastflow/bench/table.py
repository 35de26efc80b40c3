"""The figures as a table: plain text for the terminal, Markdown for the README.

``python -m fastflow.bench.table RESULT.json ... README.md`` puts the tables between the marker comments of that file:
those of GPUs between the comments for GPUs.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["align", "between", "markdown", "text"]

BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"
GPU_BEGIN, GPU_END = "<!-- gpu benchmark: begin -->", "<!-- gpu benchmark: end -->"
NOT_IN_MEMORY = ("reference", "triton", "max-autotune", "eager graph")


def align(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need be, the first flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *rest = widths
    lines = ([row[0].ljust(first), *map(str.rjust, row[1:], rest)] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def text(result: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    """The table for a terminal, with what it was measured on; ratios against an earlier result where one is given."""
    return "\n".join([align(_rows(result, before)), "", *_notes(result)])


def markdown(result: dict[str, Any]) -> str:
    """The same as Markdown."""
    head, *body = _rows(result, None)
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *body]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", *_notes(result)])


def _rows(result: dict[str, Any], before: dict[str, Any] | None) -> list[list[str]]:
    counts = Counter(n for row in result["rows"] for n in row["contenders"] if n != "fastflow")
    rivals = [n for n, count in counts.items() if 4 * count >= len(result["rows"])]  # the others share a column
    earlier = {_id(row): row for row in before["rows"]} if before else {}
    gpu = "device" in result
    head = ["", "time", "±", *["GB/s"] * gpu, "of floor", *(f"× {name}" for name in rivals)]
    head += [*["× others"] * (len(rivals) < len(counts)), "memory", "target"]
    table = [head + (["× earlier"] if before else [])]
    for row in result["rows"]:
        ours, others = row["contenders"]["fastflow"], row["contenders"]
        ratios = {n: f"{c['seconds'] / ours['seconds']:.2f}" for n, c in others.items() if n != "fastflow"}
        line = [
            _id(row),
            _time(ours["seconds"]),
            f"{ours['spread']:.0%}",
            *[f"{row['bytes'] / ours['seconds'] / 1e9:.0f}" if row.get("bytes") else ""] * gpu,
            f"{row['floor'] / ours['seconds']:.0%}" if row["floor"] else "",
            *(ratios.pop(n, "") for n in rivals),
            *[", ".join(f"{n} {ratio}" for n, ratio in ratios.items())] * ("× others" in head),
            " / ".join(_size(c["memory"]) for n, c in others.items() if n not in NOT_IN_MEMORY),
            _verdict(row),
        ]
        if before:
            old = earlier.get(_id(row))
            line.append(f"{old['contenders']['fastflow']['seconds'] / ours['seconds']:.2f}" if old else "")
        table.append(line)
    return table


def _id(row: dict[str, Any]) -> str:
    return f"{row['family']}: {row['name']}"


def _verdict(row: dict[str, Any]) -> str:
    """Every target with met or missed."""
    ours, parts = row["contenders"]["fastflow"]["seconds"], []
    for name, wanted in row["targets"].items():
        if name != "floor" and name not in row["contenders"]:
            parts.append(f"{wanted:.3g}× {name} not run")
            continue
        reached = (row["floor"] if name == "floor" else row["contenders"][name]["seconds"]) / ours
        what = f"{wanted:.0%} of floor" if name == "floor" else f"{wanted:.3g}× {name}"
        parts.append(f"{what} {'met' if reached >= wanted else 'MISSED'}")
    return ", ".join(parts)


def _notes(result: dict[str, Any]) -> list[str]:
    machine, limits = result["machine"], result["limits"]
    absent = {f"{name} did not run: {why}" for row in result["rows"] for name, why in row["absent"].items()}
    where = f"{machine['cpu']}, {machine['cores']} threads, library {machine['library']}"
    if "gpu" in machine:
        backends = ", ".join(f"{name} {state}" for name, state in machine["backends"].items() if name != "cpu")
        where = f"{machine['gpu']}, CUDA {machine['cuda']}, {machine['cuda_backend']}; backends: {backends}"
    triad = f"triad {limits['triad'] / 1e9:.1f} GB/s, " if "triad" in limits else ""
    notes = [
        f"{where}, torch {machine['torch']}, Python {machine['python']}; fastflow {machine['fastflow']}"
        + (f" at {result['commit']}" if result["commit"] else "")
        + f", {result['date'][:10]}.",
        f"Measured limits: {triad}copy {limits['copy'] / 1e9:.1f} GB/s, "
        f"matrix product {limits['gemm'] / 1e9:.0f} GFLOP/s. Medians of interleaved runs; ± is the distance between "
        "the quartiles; × NAME is the time of NAME over that of fastflow; memory is the peak of the call, of "
        "fastflow / eager / torch.compile (/ other).",
        *sorted(absent),
        *(f"{id} FAILED: {why}" for id, why in result.get("failed", {}).items()),
    ]
    if left := result.get("left_out"):
        notes.append(f"Not measured, for want of time: {'; '.join(left)}.")
    if result.get("device") == "cpu":
        notes.append("Made on the CPU, on tiny tensors, to test the program: these are no figures of a GPU.")
    return notes


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def _size(count: float) -> str:
    for unit, size in (("G", 2**30), ("M", 2**20), ("K", 2**10)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:g}"


def main(*paths: str) -> None:
    *results, document = map(Path, paths)
    tables: dict[tuple[str, str], list[str]] = {}
    for path in results:
        result = json.loads(path.read_text())
        if result.get("device") == "cpu":
            raise SystemExit(f"{path}: made on the CPU to test the program, not figures of a GPU")
        tables.setdefault((GPU_BEGIN, GPU_END) if "device" in result else (BEGIN, END), []).append(markdown(result))
    for (begin, end), made in tables.items():
        document.write_text(between(document, begin, end, "\n\n".join(made)))


def between(document: Path, begin: str, end: str, made: str) -> str:
    """The text of the document with `made` between these two lines of it."""
    before, found, rest = document.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{document}: expected the lines {begin} and {end}")
    return f"{before}{begin}\n{made}\n{end}{after}"


if __name__ == "__main__":
    main(*sys.argv[1:])
