"""Intensive-care stays of the PhysioNet/CinC Challenge 2012 (https://physionet.org/content/challenge-2012/)."""

from pathlib import Path

from fastflow.errors import UserError, need

from .rows import read_text
from .series import Series, divide, one_file, pad, read_table

_COLUMNS = [("RecordID", "i8"), ("Minutes", "f8"), ("Parameter", "S16"), ("Value", "f8")]
_NUMBERS = ("Age", "Gender", "Height", "Weight")  # descriptors; -1 stands for one that is missing
_UNITS = 4  # kinds of intensive-care units, ICUType 1..4


def load_physionet(
    name: str,
    root: Path,
    *,
    horizon: float = 48.0,
    cut: float | None = 24.0,
    targets: int | None = 3,
    test: float = 0.2,
    seed: int = 432,
    outliers: float = 0.005,
) -> Series:
    """The stays of one set in long form: CSV (`.csv`, `.csv.gz`, or a folder with one `set*` of them) with the columns
    `RecordID, Minutes, Parameter, Value`.

    Time is in hours since admission, up to `horizon`. Every parameter is a channel, but for one that never varies
    (`MechVent` is a flag that is 1 or absent), standardised on the observed values of the stays to train on. The
    descriptors of minute 0 are covariates: Age, Gender, Height and Weight standardised over all stays, 0 where missing
    (-1 in the file), then for each whether it is known, then ICUType as one of four. The later values of Weight repeat
    one number for hours and are no channel. Several values of a parameter at one time are averaged. Values beyond the
    quantiles `outliers` and 1 - `outliers` of their parameter (over all stays; such as a pH of 735, or a blood pressure
    of 0 of a line that came off) are left out. A stay without any value is left out.

    Every fifth stay (`test`) is held out, at random; its first `targets` rows after `cut` hours are forecast from what
    was observed until then, as GRU-ODE-Bayes does with the stays of MIMIC-III (the next three after 36 hours).

    Raises `UserError` naming file and row for what is missing, unreadable, infinite, or outside of time.
    """
    np = need("numpy", "NumPy")
    if isinstance(outliers, bool) or not isinstance(outliers, (int, float)) or not 0 <= outliers < 0.5:
        raise UserError(f"outliers: expected a fraction in [0, 0.5), got {outliers!r}")
    path = one_file(root, "set*.csv", "set*.csv.gz")
    header, _, body = read_text(path).partition("\n")
    if [field.strip() for field in header.split(",")] != [field for field, _ in _COLUMNS]:
        raise UserError(
            f"{path}: expected the columns {', '.join(f for f, _ in _COLUMNS)}, got {header.strip()[:80]!r}"
        )
    table = read_table(path, body, _COLUMNS)
    hours, number = table["Minutes"] / 60, table["Value"]
    for bad, field, what in (
        (~np.isfinite(number), "Value", "a finite number"),
        (~((hours >= 0) & np.isfinite(hours)), "Minutes", "a time from 0 on"),
    ):
        if bad.any():
            row = int(bad.argmax())
            raise UserError(f"{path}: expected {what} in row {row + 2}, got {field}={table[field][row]}")
    parameters, which = np.unique(table["Parameter"], return_inverse=True)
    parameters = [p.decode("ascii", "replace") for p in parameters]
    stays, stay = np.unique(table["RecordID"], return_inverse=True)

    def of(parameter: str):
        return which == parameters.index(parameter) if parameter in parameters else np.zeros(len(table), bool)

    first = {p: of(p) & (hours == 0) for p in (*_NUMBERS, "ICUType")}
    covariates = _descriptors({p: (stay[rows], number[rows]) for p, rows in first.items()}, len(stays))
    channel = np.full(len(parameters), -1)
    channels, kept = [], np.ones(len(table), bool)
    for i, parameter in enumerate(parameters):
        rows = which == i
        if parameter in (*_NUMBERS, "ICUType", "RecordID") or number[rows].min() == number[rows].max():
            continue
        low, high = np.quantile(number[rows], (outliers, 1 - outliers))
        kept[rows] = (number[rows] >= low) & (number[rows] <= high)
        channel[i] = len(channels)
        channels.append(parameter)
    kept &= (channel[which] >= 0) & (hours <= horizon)
    if not kept.any():
        raise UserError(f"{path}: expected values of parameters that vary until hour {horizon:g}, got none")
    number, column = number[kept], channel[which[kept]]
    # a row is what one stay has at one time
    seconds = np.round(3600 * hours[kept]).astype(np.int64)
    moments, row = np.unique(stay[kept] * (1 << 32) + seconds, return_inverse=True)
    cell, shape = row * len(channels) + column, (len(moments), len(channels))
    count = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)
    values = np.bincount(cell, weights=number, minlength=shape[0] * shape[1]).reshape(shape) / count.clip(1)
    present, series = np.unique(moments >> 32, return_inverse=True)
    x = pad(series, len(present), (moments & 0xFFFFFFFF) / 3600, values, count > 0, covariates[present][series])
    options = {"test": test, "seed": seed, "cut": cut, "targets": targets, "standardize": True, "time": "hours"}
    return divide(name, x, channels, horizon, **options)


def _descriptors(found, stays: int):
    """Covariates [stays, 2 * 4 + 4] of {name: (stay, value)}."""
    np = need("numpy", "NumPy")
    columns, known = [], []
    for name in _NUMBERS:
        stay, value = (x[found[name][1] >= 0] for x in found[name])
        column, there = np.zeros(stays), np.zeros(stays, bool)
        column[stay], there[stay] = value, True
        spread = column[there].std() if there.any() else 0.0
        columns.append((column - column[there].mean()) / spread * there if spread > 0 else np.zeros(stays))
        known.append(there)
    stay, unit = found["ICUType"]
    kinds = np.zeros((stays, _UNITS))
    for kind in range(_UNITS):
        kinds[stay[unit == kind + 1], kind] = 1
    return np.concatenate((np.stack(columns + known, 1), kinds), 1)
