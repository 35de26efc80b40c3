"""Rows of real numbers: tables."""

import csv
import gzip
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastflow.errors import UserError, need

from .dataset import Dataset, finite, parts, same_shape
from .npz import read_npz

_SEPARATORS = ";,\t"


@dataclass(frozen=True)
class Rows(Dataset):
    """Rows of numbers: the parts are float32 [N, D]; nats a row.

    Standardised rows remember the `mean` and `std` [D] they had, and their nats are those of the standardised rows.
    """

    mean: Tensor | None = None
    std: Tensor | None = None

    def describe(self) -> dict[str, Any]:
        scale = {} if self.mean is None else {"mean": self.mean.tolist(), "std": self.std.tolist()}
        return super().describe() | scale

    def baseline(self) -> tuple[float, str]:
        return gaussian_nats(self.train, self.final), "shrinkage Gaussian"


def gaussian_nats(train: Tensor, held_out: Tensor) -> float:
    """Nats a row of a Gaussian with full covariance, shrunk as Ledoit and Wolf do, fitted on `train` [N, D], measured
    on `held_out`."""
    ledoit_wolf = need("sklearn.covariance", "scikit-learn").ledoit_wolf
    train, held_out = train.double(), held_out.double()
    mean, dims = train.mean(0), train.shape[1]
    root = torch.linalg.cholesky(torch.from_numpy(ledoit_wolf(train.numpy())[0]))
    z = torch.linalg.solve_triangular(root, (held_out - mean).T, upper=False)
    log_det = root.diagonal().log().sum()
    return (0.5 * (z**2).sum(0).mean() + log_det + 0.5 * dims * math.log(2 * math.pi)).item()


def load_rows(
    name: str, root: Path, *, standardize: bool = True, drop: int | Sequence[int] = (), separator: str | None = None
) -> Rows:
    """Rows from CSV (`.csv`, `.csv.gz`), from npz, or from a folder of `*train*.npz`, `*val*.npz`, `*test*.npz`.

    CSV: with or without a header, all numbers; the separator is found in the first line if none is given. npz: `x`,
    or `train`, `test` and perhaps `valid` (`val`), all [N, D]; each file of a folder has `x`. A folder without
    training rows trains on the validation rows (MINIBOONE is passed around like that). Columns `drop` are left out;
    with `standardize` every column gets mean 0 and standard deviation 1 on the training rows. Where there is one part
    only, a tenth is held out, and another tenth is the test set.

    Raises `UserError` for a missing, unreadable or infinite number (naming its row) and for a constant column.
    """
    found = _parts(root, separator)
    same_shape(root, found)
    for part, rows in found.items():
        finite(root, part, rows)
    width, drop = found["train"].shape[1], [drop] if isinstance(drop, int) else drop
    if bad := [column for column in drop if not isinstance(column, int) or not -width <= column < width]:
        raise UserError(f"drop: expected columns of {-width}..{width - 1} in {root}, got {bad[0]}")
    dropped = {column % width for column in drop}
    keep = [column for column in range(width) if column not in dropped]
    if not keep:
        raise UserError(f"drop: expected to keep at least one of the {width} columns of {root}")
    found = {part: rows[:, keep] for part, rows in found.items()}
    if "held_out" not in found:
        shares = (10,) if "test" in found else (10, 10)
        found |= dict(zip(("train", "held_out", "test"), parts(str(root), found["train"], *shares), strict=False))
    mean, std = found["train"].mean(0), found["train"].std(0, correction=0)
    # of what is constant, rounding leaves a part in 1e16
    if len(wide := (~torch.isfinite(std)).nonzero()):
        raise UserError(f"{root}: expected numbers whose variance is finite, not so in column {keep[wide[0].item()]}")
    constant = (std <= 1e-12 * mean.abs().clamp(min=1e-300)).nonzero()
    if len(constant):
        raise UserError(f"{root}: expected columns that vary, got the constant column {keep[constant[0].item()]}")
    scale = (mean, std) if standardize else ()
    if scale:
        found = {part: (rows - mean) / std for part, rows in found.items()}
    found = {part: rows.float() for part, rows in found.items()}
    for part, rows in found.items():
        finite(f"{root} in float32", part, rows)
    return Rows(name, found["train"], found["held_out"], *scale, test=found.get("test"))


def _parts(root: Path, separator: str | None) -> dict[str, Tensor]:
    """The rows in float64, by part; only `train` is always there."""
    if root.is_dir():
        files, words = sorted(root.glob("*.npz")), {"train": "train", "held_out": "val", "test": "test"}
        found = {part: [f for f in files if word in f.stem.lower()] for part, word in words.items()}
        if any(len(f) > 1 for f in found.values()) or not (found["train"] or found["held_out"]):
            raise UserError(
                f"{root}: expected one file each of *train*.npz (or *val*.npz) and *test*.npz, "
                f"got {', '.join(f.name for f in files) or 'none'}"
            )
        rows = {part: _matrix(f[0], "x", read_npz(f[0], "x")["x"]) for part, f in found.items() if f}
        if "train" not in rows:
            rows["train"] = rows.pop("held_out")
        return rows
    if root.suffix != ".npz":
        return {"train": read_csv(root, separator)}
    arrays = read_npz(root)
    names = {"train": "train", "valid": "held_out", "val": "held_out", "test": "test"}
    if "train" not in arrays:
        names = {"x": "train"}
    found = {part: _matrix(root, key, arrays[key]) for key, part in names.items() if key in arrays}
    if not found:
        raise UserError(f"{root}: expected arrays 'x', or 'train' and 'test', got {sorted(arrays)}")
    return found


def _matrix(path: Path, name: str, array) -> Tensor:
    if array.ndim != 2 or array.dtype.kind not in "fiu" or not array.size:
        raise UserError(f"{path}: expected {name!r} to be numbers [N, D], got {array.dtype} {list(array.shape)}")
    return torch.from_numpy(array.astype("float64"))


def read_text(path: Path) -> str:
    """The text of a file, gzipped if its name ends in `.gz`; raises `UserError` where it is damaged."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: expected a whole gzip file ({error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected text in UTF-8 ({error})") from error


def read_csv(path: Path, separator: str | None = None) -> Tensor:
    """The numbers of a CSV file, float64 [N, D]; a first row with a field that is no number is a header."""
    lines = read_text(path).splitlines()
    if separator is None:
        separator = max(_SEPARATORS, key=lambda s: lines[0].count(s) if lines else 0)
    if not isinstance(separator, str) or len(separator) != 1:
        raise UserError(f"separator: expected one character, got {separator!r}")
    try:
        return _numbers(path, csv.reader(lines, delimiter=separator))
    except csv.Error as error:
        raise UserError(f"{path}: expected CSV ({error})") from error


def _numbers(path: Path, reader) -> Tensor:
    rows: list[list[float]] = []
    names: list[str] | None = None
    for fields in reader:
        if not fields:
            continue
        if not rows and names is None and not all(map(_is_number, fields)):
            names = fields
            continue
        width = len(rows[0] if rows else names or fields)
        if len(fields) != width:
            raise UserError(f"{path}: expected {width} values in row {reader.line_num}, got {len(fields)}")
        try:
            rows.append([float(field) for field in fields])
        except ValueError:
            column = next(i for i, field in enumerate(fields) if not _is_number(field))
            where = f"row {reader.line_num}, column {names[column] if names else column}"
            raise UserError(f"{path}: expected a number in {where}, got {fields[column]!r}") from None
        if not all(map(math.isfinite, rows[-1])):
            raise UserError(f"{path}: expected finite numbers in row {reader.line_num}, got {fields}")
    if not rows:
        raise UserError(f"{path}: expected rows of numbers, got none")
    return torch.tensor(rows, dtype=torch.float64)


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True
