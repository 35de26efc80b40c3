"""What a run reached, as `result.json` in its folder, and many of them as a table.

`python -m fastflow.train.record RUN ... RESULTS.json README.md` merges the results of the run folders into
RESULTS.json, in place of older ones of the same command, and puts the table between the marker comments of README.md.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastflow.bench.machine import commit, describe
from fastflow.bench.table import between

from .checkpoint import write_file
from .config import TrainConfig
from .errors import UserError
from .loop import Result
from .metrics import in_words

BEGIN, END = "<!-- models: begin -->", "<!-- models: end -->"

_KEYS = ("model", "data", "command", "held_out", "unit", "naive", "published", "parameters", "steps", "wall_s")


def write_result(
    out: Path,
    *,
    command: str,
    root: str | None,
    model: torch.nn.Module,
    data: dict[str, Any],
    config: TrainConfig,
    result: Result,
    figure: tuple[float, str],
    metrics: dict[str, float],
    unit: str,
    naive: tuple[float, str],
    published: tuple[float, str] | None,
) -> None:
    """Writes `out/result.json`, atomically.

    `figure` and `naive` are (value, what it is), `metrics` further ones on the same samples by name, `root` is the name
    of the data's files.
    """
    device = next(model.parameters()).device
    record = {
        "model": type(model).__name__,
        "data": data["name"] if root in (None, data["name"]) else f"{data['name']}: {root}",
        "command": command,
        "config": model.config,
        "train": asdict(config),
        "seed": config.seed,
        "steps": result.step,
        "wall_s": round(result.seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out": {"value": figure[0], "what": figure[1]},
        **({"metrics": metrics} if metrics else {}),
        "unit": unit,
        "naive": {"value": naive[0], "what": naive[1]},
        "published": published and {"value": published[0], "what": published[1]},
        "samples": {part: data[part] for part in ("train", "held_out")},
        "machine": describe("cpu" if device.type == "cpu" else str(device)),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    write_file(out / "result.json", json.dumps(record, indent=1, allow_nan=False).encode())


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results in `path`; raises `UserError` where a key is missing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, got {error}") from error
    results = found if isinstance(found, list) else [found]
    for result in results:
        if missing := [key for key in _KEYS if key not in result]:
            raise UserError(f"{path}: expected the key {missing[0]!r} in the result of {result.get('command')!r}")
    return results


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All of both, sorted by model and data; of two with one command the newer."""
    by_command = {result["command"]: result for result in [*old, *new]}
    return sorted(by_command.values(), key=lambda r: (r["model"], r["data"], r["command"]))


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each result."""
    head = ["model", "data", "reached: −log p", "naive", "published", "parameters", "steps", "time", "command"]
    lines = [head, ["---", "---", "--:", "--:", "--:", "--:", "--:", "--:", "---"]]
    for r in results:
        published = r["published"]
        lines.append(
            [
                r["model"],
                r["data"],
                f"{r['held_out']['value']:.4g} {r['unit']}{in_words(r.get('metrics', {}))} ({r['held_out']['what']})",
                f"{r['naive']['value']:.4g} ({r['naive']['what']})",
                f"{published['value']:.4g} ({published['what']})" if published else "",
                _count(r["parameters"]),
                f"{r['steps']}",
                _duration(r["wall_s"]),
                f"`{r['command']}`",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _count(n: int) -> str:
    return f"{n / 1e6:.3g} M" if n >= 1e6 else f"{n / 1e3:.3g} k" if n >= 1e3 else f"{n}"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.0f} s"


def main(*paths: str) -> None:
    """Merges the results of the run folders into a JSON file, and writes the table of all into a document."""
    if len(paths) < 2:
        raise UserError("expected RUN ... RESULTS.json README.md")
    *runs, collected, document = map(Path, paths)
    new = [result for run in runs for result in read_results(run / "result.json")]
    results = merge(read_results(collected) if collected.exists() else [], new)
    text = between(document, BEGIN, END, table(results))
    write_file(collected, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    write_file(document, text.encode())


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f"record: {error}")
