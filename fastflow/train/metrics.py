"""Metrics as JSON lines: one object a line, appended, cut back to the checkpoint on resume.

A training step writes `{"step", "epoch", "train", "grad_norm", "lr"}` (of continuous flows some also `"evaluations"`,
those of the dynamics), an evaluation `{"step", "epoch", "held_out"}` and the model's own metrics by name; `train` and
`held_out` are in the data's unit.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def append_metrics(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Appends `records`; they are on disk when this returns."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every record of the file; a last line torn by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def truncate_metrics(path: Path, step: int) -> None:
    """Drops the records after `step`: a resumed run will write them again."""
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    draft = path.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    append_metrics(draft, kept)
    os.replace(draft, path)


def in_words(figures: Mapping[str, float]) -> str:
    """`, name value` for each."""
    return "".join(f", {name} {value:.4g}" for name, value in figures.items())
