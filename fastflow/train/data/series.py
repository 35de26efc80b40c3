"""Series of values observed at times of their own, some channels at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastflow.errors import UserError, need
from fastflow.nn.observations import OBSERVED, TARGET

from .dataset import Dataset, whole
from .rows import read_text

# what a checkpoint keeps of the held-out series:
_EXAMPLES = 8  # series to draw forecasts of
_COVARIATES = 256  # covariates to draw new series with


@dataclass(frozen=True)
class Series(Dataset):
    """Sporadically observed series: the parts are float32 [N, L, 1 + 2 D + C]; nats an observed value.

    A row is (time, D values, D masks, C covariates), as `fastflow.nn.Observations.to_tensor` gives them: the rows of a
    series rise in time, and those that fill it up to L have the time infinity and zeros. A mask is 0 where nothing was
    observed (the value is 0 then), 1 where it was, and 2 for a target: a value that is forecast and scored, never shown
    to the filter.

    Series that are held out have targets: in the rows after time `cut`, at most `targets` of them, and nothing later.
    Without a `cut` they have none, and every value is predicted from those before it.

    Args:
        channels: the names of the D channels.
        horizon: the end of time.
        cut, targets: as above.
        time: what time is measured in.
        mean, std: of the channels, [D] each, where values were standardised; nats are those of standardised values.
        examples: held-out series with everything after `cut` as targets, to draw forecasts of.
    """

    channels: tuple[str, ...]
    horizon: float
    cut: float | None = None
    targets: int | None = None
    time: str = "time"
    mean: Tensor | None = None
    std: Tensor | None = None
    examples: Tensor | None = None

    kind = "series"
    forecasts = True

    @property
    def unit(self) -> str:
        return "nats/observation"

    @property
    def features(self) -> int:
        """D."""
        return len(self.channels)

    @property
    def covariates(self) -> int:
        """C."""
        return self.train.shape[2] - 1 - 2 * self.features

    @cached_property
    def usual(self) -> float:
        return observations(self.train, self.features).mean().item()

    def inputs(self, stored: Tensor, index: Tensor, key: int) -> Tensor:
        return trimmed(stored)

    def counts(self, x: Tensor) -> Tensor:
        return observations(x, self.features)

    def hold_out(self, samples: Tensor) -> Tensor:
        return samples if self.cut is None else with_targets(samples, self.features, self.cut, self.targets)

    def describe(self) -> dict[str, Any]:
        scale = {} if self.mean is None else {"mean": self.mean.tolist(), "std": self.std.tolist()}
        protocol = {"horizon": self.horizon, "cut": self.cut, "targets": self.targets, "time": self.time}
        return super().describe() | {"channels": list(self.channels)} | protocol | scale

    def keepsakes(self) -> dict[str, Tensor]:
        covariates = split(self.final, self.features)[3]
        examples = self.final if self.examples is None else self.examples
        return {
            "examples": trimmed(examples[:_EXAMPLES]),
            "covariates": covariates[:_COVARIATES, 0],  # the same in every row
        }

    def baseline(self) -> tuple[float, str]:
        nats, mse = mean_predictor(self.train, self.final, self.features)
        last = last_value(self.train, self.final, self.features)
        return nats, f"mean and variance of each channel; MSE {mse:.4g}, of the last value {last:.4g}"


def split(x: Tensor, features: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Times [..., L], values and masks [..., L, D], covariates [..., L, C] of the rows `x` [..., L, 1 + 2 D + C]."""
    values, masks, covariates = x[..., 1:].split([features, features, x.shape[-1] - 1 - 2 * features], dim=-1)
    return x[..., 0], values, masks, covariates


def scored(masks: Tensor) -> Tensor:
    """The values that figures are taken over, bool like `masks`: targets, or all that were observed where there are
    none."""
    targets = masks == TARGET
    return targets if targets.any() else masks == OBSERVED


def observations(x: Tensor, features: int) -> Tensor:
    """How many values of each series figures are taken over, float64 [N]."""
    return scored(split(x, features)[2]).sum((1, 2)).double()


def with_targets(x: Tensor, features: int, cut: float, most: int | None = None) -> Tensor:
    """The series as held out: what follows `cut` becomes targets, in at most `most` rows, and the rest is left out.

    Series without a value before `cut` or without one that is a target are left out.
    """
    times = x[:, :, 0]
    after = (times > cut) & torch.isfinite(times)
    late = after & (after.cumsum(1) > (x.shape[1] if most is None else most))
    x = x.clone()
    x[late] = 0.0
    x[:, :, 0][late] = torch.inf
    masks = split(x, features)[2]
    masks[after] *= TARGET
    x = x[(masks == OBSERVED).any(2).any(1) & (masks == TARGET).any(2).any(1)]
    return trimmed(x)


def trimmed(x: Tensor) -> Tensor:
    """Without the rows at the end that no series of `x` has, but for one."""
    longest = torch.isfinite(x[:, :, 0]).sum(1).amax().item() if len(x) else 0
    return x[:, : max(1, longest)]


def mean_predictor(train: Tensor, held_out: Tensor, features: int) -> tuple[float, float]:
    """(nats, squared error) an observed value of a Gaussian for each channel, fitted on the values of `train`, on what
    is scored of `held_out`."""
    mean, variance = _moments(train, features)
    _, values, masks, _ = split(held_out.double(), features)
    error = (values - mean) ** 2
    nats = 0.5 * (error / variance + (2 * torch.pi * variance).log())
    return _mean(nats, scored(masks)), _mean(error, scored(masks))


def last_value(train: Tensor, held_out: Tensor, features: int) -> float:
    """Squared error an observed value, on what is scored of `held_out`, of what was observed last of the channel; where
    nothing was, of its mean."""
    _, values, masks, _ = split(held_out.double(), features)
    rows = torch.arange(masks.shape[1])[:, None]
    latest = torch.where(masks == OBSERVED, rows, -1).cummax(1).values.roll(1, dims=1)
    latest[:, 0] = -1
    guess = torch.where(latest < 0, _moments(train, features)[0], values.gather(1, latest.clamp(min=0)))
    return _mean((values - guess) ** 2, scored(masks))


def _moments(x: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """Mean and variance [D] of what was observed, float64."""
    _, values, masks, _ = split(x, features)
    seen = [values[:, :, d][masks[:, :, d] == OBSERVED].double() for d in range(features)]
    return torch.stack([v.mean() for v in seen]), torch.stack([v.var(correction=0) for v in seen])


def _mean(x: Tensor, chosen: Tensor) -> float:
    return (torch.where(chosen, x, 0.0).sum() / chosen.sum()).item()


def pad(series: Any, n: int, times: Any, values: Any, masks: Any, covariates: Any) -> Tensor:
    """The padded tensor [n, L, 1 + 2 D + C] of rows sorted by series and time: `series` [R] in 0..n-1, `times` [R],
    `values` and `masks` [R, D], `covariates` [R, C], all NumPy arrays."""
    np = need("numpy", "NumPy")
    counts = np.bincount(series, minlength=n)
    position = np.arange(len(series)) - (np.cumsum(counts) - counts)[series]
    x = np.zeros((n, max(1, counts.max(initial=1)), 1 + values.shape[1] * 2 + covariates.shape[1]), np.float32)
    x[:, :, 0] = np.inf
    x[series, position] = np.concatenate((times[:, None], values, masks, covariates), 1)
    return torch.from_numpy(x)


def divide(
    name: str,
    x: Tensor,
    channels: Sequence[str],
    horizon: float,
    *,
    test: float,
    seed: int,
    cut: float | None,
    targets: int | None,
    standardize: bool,
    time: str = "time",
) -> Series:
    """The data set of the series `x`: a part `test` of them, drawn with `seed` by scikit-learn's `train_test_split`,
    is held out, with targets."""
    protocol(test=test, seed=seed, cut=cut, targets=targets)
    train_test_split = need("sklearn.model_selection", "scikit-learn").train_test_split
    if len(x) < 2:
        raise UserError(f"{name}: expected at least 2 series, to train on and to hold out, got {len(x)}")
    train, held_out = (
        x[torch.from_numpy(i)] for i in train_test_split(_arange(len(x)), test_size=test, random_state=seed)
    )
    if len(never := (split(train, len(channels))[2].sum((0, 1)) == 0).nonzero()):
        raise UserError(f"{name}: expected channels that are observed in training, not so {channels[never[0].item()]}")
    scale = {}
    if standardize:
        mean, variance = _moments(train, len(channels))
        mean, std = mean.float(), variance.sqrt().float()
        if len(constant := (std <= 1e-6 * mean.abs()).nonzero()):
            raise UserError(f"{name}: expected channels that vary, not so {channels[constant[0].item()]}")
        for part in (train, held_out):
            _, values, masks, _ = split(part, len(channels))
            values.copy_(torch.where(masks == OBSERVED, (values - mean) / std, 0.0))
        scale = {"mean": mean, "std": std}
    data = Series(
        name, train, held_out, channels=tuple(channels), horizon=horizon, cut=cut, targets=targets, time=time, **scale
    )
    examples = held_out if cut is None else with_targets(held_out, data.features, cut)[:_EXAMPLES]
    data = replace(data, held_out=data.hold_out(held_out), examples=examples)
    if not len(data.held_out) or not observations(data.held_out, data.features).sum():
        raise UserError(f"cut: expected held-out series of {name} with values before and after {cut}, got none")
    return data


def protocol(*, test: float, seed: int, cut: float | None, targets: int | None) -> None:
    """Raises `UserError` naming the option of the split that is out of range."""
    if isinstance(test, bool) or not isinstance(test, (int, float)) or not 0 < test < 1:
        raise UserError(f"test: expected a fraction in (0, 1), got {test!r}")
    whole(0, seed=seed)
    if cut is not None and (isinstance(cut, bool) or not isinstance(cut, (int, float)) or not cut >= 0):
        raise UserError(f"cut: expected a time of at least 0, got {cut!r}")
    if targets is not None:
        whole(1, targets=targets)
        if cut is None:
            raise UserError(f"targets: expected a cut in time with them, got {targets} alone")


def load_series(
    name: str,
    root: Path,
    *,
    horizon: float | None = None,
    cut: float | None = None,
    targets: int | None = None,
    test: float = 0.2,
    seed: int = 432,
    standardize: bool = False,
) -> Series:
    """Series from CSV (`.csv`, `.csv.gz`, or a folder with one such file) as GRU-ODE-Bayes publishes them
    (https://github.com/edebrouwer/gru_ode_bayes): the columns `ID`, `Time`, `Value_*`, `Mask_*` in the same order, and
    perhaps `Cov*`, in any order of rows.

    A mask is 0 or 1; a value whose mask is 0 may be anything. `horizon` is the end of time, by default the last time
    there is. A fifth (`test`) of the series is held out with the `seed` and by the function that their scripts use;
    of these the first rows after time `cut`, at most `targets`, are forecast: with the recipe's options on their
    Brusselator series (`BXLator.csv`) these are the published numbers.

    Raises `UserError` naming the file and the row for what is missing, unreadable, infinite, before time 0, twice at
    one time, for covariates that change in time and for masks other than 0 and 1.
    """
    np = need("numpy", "NumPy")
    path = one_file(root, "*.csv", "*.csv.gz")
    text = read_text(path)
    header, _, body = text.lstrip("\n").partition("\n")
    names = [field.strip() for field in header.rstrip("\r").split(",")]
    channels = [field.removeprefix("Value_") for field in names if field.startswith("Value_")]
    known = ["ID", "Time", *(f"Value_{c}" for c in channels), *(f"Mask_{c}" for c in channels)]
    missing = next((field for field in known if field not in names), None if channels else "Value_1")
    if missing:
        raise UserError(f"{path}: expected the columns ID, Time, Value_*, Mask_*, got no {missing}")
    covariates = [field for field in names if field.startswith("Cov")]
    if unknown := [field for field in names if field not in known and field not in covariates]:
        raise UserError(f"{path}: expected the columns ID, Time, Value_*, Mask_*, Cov*, got {unknown[0]!r}")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: expected every column once, got {header.strip()}")
    table = read_table(path, body, [(field, "U64" if field == "ID" else "f8") for field in names])

    def block(fields: Sequence[str]):
        return np.stack([table[field] for field in fields], 1) if fields else np.zeros((len(table), 0))

    values, masks, given = (
        block(fields) for fields in ([f"Value_{c}" for c in channels], [f"Mask_{c}" for c in channels], covariates)
    )

    def refuse(bad, what: str, field: str) -> None:
        """Names the first row of the file with `bad` [R]."""
        if bad.any():
            row = int(bad.argmax())
            raise UserError(
                f"{path}: expected {what} in row {row + 2} (ID {table['ID'][row]}), got {field}={table[row][field]}"
            )

    for field in known[2 + len(channels) :]:
        refuse((table[field] != 0) & (table[field] != 1), "a mask of 0 or 1", field)
    for channel, mask in zip(channels, masks.T, strict=True):
        refuse(~np.isfinite(table[f"Value_{channel}"]) & (mask == 1), "a finite observed value", f"Value_{channel}")
    refuse(~(table["Time"] >= 0) | np.isinf(table["Time"]), "a time from 0 on", "Time")
    if horizon is None:
        horizon = float(table["Time"].max())
    refuse(table["Time"] > horizon, f"a time of at most horizon={horizon:g}", "Time")
    for field in covariates:
        refuse(~np.isfinite(table[field]), "a finite covariate", field)
    ids, first, series = np.unique(table["ID"], return_index=True, return_inverse=True)
    for field in covariates:
        refuse(table[field] != table[field][first][series], "the covariates of the series to be constant", field)
    rank = np.empty(len(ids), np.int64)
    rank[np.argsort(first)] = np.arange(len(ids))  # series as they appear
    series = rank[series]
    order = np.lexsort((table["Time"], series))
    series, times = series[order], table["Time"].astype(np.float32)[order]
    twice = np.zeros(len(table), bool)
    twice[order[1:]] = (np.diff(series) == 0) & (np.diff(times) == 0)
    refuse(twice, "one row for each time of a series", "Time")
    x = pad(series, len(ids), times, np.where(masks == 1, values, 0)[order], masks[order], given[order])
    options = {"test": test, "seed": seed, "cut": cut, "targets": targets, "standardize": standardize}
    return divide(name, x, channels, horizon, **options)


def one_file(root: Path, *patterns: str) -> Path:
    """`root`, or the one file in the folder `root` that has one of the names `patterns`."""
    if not root.is_dir():
        return root
    found = sorted(path for pattern in patterns for path in root.glob(pattern))
    if len(found) != 1:
        raise UserError(
            f"{root}: expected one file {' or '.join(patterns)}, got {', '.join(p.name for p in found) or 'none'}"
        )
    return found[0]


def read_table(path: Path, body: str, columns: Sequence[tuple[str, str]]):
    """The lines `body` of a CSV file without its header, as a structured array of NumPy."""
    np = need("numpy", "NumPy")
    if not body.strip():
        raise UserError(f"{path}: expected rows below the header, got none")
    try:
        return np.atleast_1d(np.loadtxt(StringIO(body), delimiter=",", dtype=columns, comments=None, quotechar='"'))
    except ValueError as error:
        raise UserError(
            f"{path}: expected {len(columns)} fields in every row, numbers but for names: {error}"
        ) from error


def _arange(n: int):
    return need("numpy", "NumPy").arange(n)
