"""What is drawn from a model of series: forecasts of held-out series as a picture, series of its own as a table."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastflow.nn.observations import OBSERVED, TARGET

from .data.series import split
from .errors import UserError
from .figures import new_figure

_CHANNELS = 4  # columns of the picture
_GRID = 300  # points of a band


def write_series(
    model: nn.Module, description: dict[str, Any], path: Path, temperatures: Sequence[float], n: int, seed: int
) -> int:
    """Writes a PNG of forecasts of `n` held-out series, or `n` new series at each temperature as CSV; returns `n`.

    The CSV has the columns that `load_series` reads, in the units of the data; an ID is `temperature/number`. New
    series have the covariates of held-out ones, in turn.
    """
    if path.suffix == ".png":
        n = min(n, len(description["examples"]))
        draw_forecasts(model, description, path, n)
    else:
        write_samples_of_series(model, description, path, temperatures, n, seed)
    return n


def draw_forecasts(model: nn.Module, description: dict[str, Any], path: str | Path, n: int) -> None:
    """Writes a PNG: a row for each of the first `n` series that the checkpoint keeps, a column for each channel.

    A band is the predicted mean and two standard deviations around it at that time, given what was observed before:
    dots, up to the dashed line. Circles are held out: the model never sees them. Of many channels those are drawn that
    were observed most often.
    """
    examples = description["examples"][:n]
    features = len(description["channels"])
    _, values, masks, _ = split(examples, features)
    often = torch.argsort((masks > 0).sum((0, 1)), descending=True, stable=True)
    columns = sorted(often[: min(_CHANNELS, features)].tolist())
    times = torch.linspace(0, description["horizon"], _GRID, dtype=torch.float64)
    with torch.no_grad():
        mean, std = model.forecast(examples.to(next(model.parameters()).device), times)
    scale, shift = scaling(description)
    mean, std, values = mean.cpu() * scale + shift, std.cpu() * scale, values * scale + shift
    figure = new_figure(1 + 4.2 * len(columns), 0.6 + 2.2 * len(examples))
    axes = figure.subplots(len(examples), len(columns), squeeze=False, sharex=True, sharey="col")
    for b, line in enumerate(axes):
        for axis, d in zip(line, columns, strict=True):
            low, high = (mean[b, :, d] + sign * 2 * std[b, :, d] for sign in (-1, 1))
            axis.fill_between(times, low, high, alpha=0.25, lw=0, label="mean ± 2 std, given the past")
            axis.plot(times, mean[b, :, d], lw=1)
            for mask, style, label in ((OBSERVED, "k.", "observed"), (TARGET, "ro", "held out")):
                chosen = masks[b, :, d] == mask
                axis.plot(
                    examples[b, chosen, 0],
                    values[b, chosen, d],
                    style,
                    ms=5,
                    mfc="none" if mask == TARGET else None,
                    label=label,
                )
            if description["cut"] is not None:
                axis.axvline(description["cut"], ls="--", color="black", lw=0.8)
            axis.margins(x=0.01)
    for axis, d in zip(axes[0], columns, strict=True):
        name = description["channels"][d]
        axis.set_title(f"value {name}" if name.isdigit() else name)
    for axis in axes[-1]:
        axis.set_xlabel(description["time"])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)


def write_samples_of_series(
    model: nn.Module, description: dict[str, Any], path: Path, temperatures: Sequence[float], n: int, seed: int
) -> None:
    """Writes `n` series at each temperature as CSV."""
    device, channels = next(model.parameters()).device, description["channels"]
    given = description["covariates"]
    context = given[torch.arange(n) % len(given)].to(device)
    scale, shift = scaling(description)
    head = [*(f"Value_{c}" for c in channels), *(f"Mask_{c}" for c in channels)]
    covariates = [f"Cov_{i + 1}" for i in range(given.shape[1])]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["ID", "Time", *head, *covariates])
        for temperature in temperatures:
            generator = torch.Generator(device).manual_seed(seed)
            with torch.no_grad():
                x = model.sample(n, context, temperature=temperature, generator=generator).cpu()
            if not torch.isfinite(x).all():
                bad = (~torch.isfinite(x)).flatten(1).any(1).sum().item()
                raise UserError(f"expected finite samples, got {bad} of {n} with inf or nan")
            times, values, masks, covariates = split(x, len(channels))
            rows = torch.cat((times[..., None], values * scale + shift, masks, covariates), 2).tolist()
            for number, series in enumerate(rows):
                writer.writerows([f"{temperature:g}/{number}", *row] for row in series)


def scaling(description: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(std, mean) of the channels as they were before they were standardised."""
    if "mean" not in description:
        return torch.ones(()), torch.zeros(())
    return torch.tensor(description["std"]), torch.tensor(description["mean"])
