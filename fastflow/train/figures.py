"""The pictures of a run: samples at several temperatures, points in the plane, and the training curve."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import need
from .metrics import read_metrics

_GAP = 1  # pixels between samples


def new_figure(width: float, height: float):
    """A figure of its own, in inches: pyplot would keep it in a global list."""
    return need("matplotlib.figure", "matplotlib").Figure((width, height), layout="constrained")


def draw_samples(rows: Sequence[Tensor], temperatures: Sequence[float], levels: int, path: str | Path) -> None:
    """Writes a PNG with one labelled row of samples for every temperature.

    `rows[i]` is uint8 [N, C, H, W] with values below `levels`, drawn at `temperatures[i]`.
    """
    n, _, height, width = rows[0].shape
    figure = new_figure(1 + 0.6 * n * width / max(height, width), 0.3 + 0.68 * len(rows) * height / max(height, width))
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, images, temperature in zip(axes, rows, temperatures, strict=True):
        axis.imshow(_strip(images, levels), interpolation="nearest")
        axis.set_ylabel(f"T = {temperature:g}", rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=150)


def _strip(images: Tensor, levels: int):
    """The samples side by side, RGB [H, N*W + gaps, 3] in 0..1."""
    n, channels, height, width = images.shape
    strip = torch.ones(3, height, n, width + _GAP)
    strip[..., :width] = (images.float() / (levels - 1)).expand(n, 3, height, width).permute(1, 2, 0, 3)
    return strip.reshape(3, height, -1)[..., :-_GAP].permute(1, 2, 0).numpy()


def draw_points(
    drawn: Sequence[Tensor], temperatures: Sequence[float], path: str | Path, model: nn.Module | None = None
) -> None:
    """Writes a PNG: a panel of points [N, 2] for every temperature, and one of the density of `model` if given."""
    low, high = limits(drawn)
    panels = len(drawn) + (model is not None)
    figure = new_figure(3 * panels, 0.6 + 3 * tall(low, high))
    axes = figure.subplots(1, panels, squeeze=False, sharex=True, sharey=True)[0]
    for axis, x, temperature in zip(axes, drawn, temperatures, strict=False):
        axis.scatter(*x.T.numpy(), s=1.5, lw=0, alpha=0.6)
        axis.set(title=f"T = {temperature:g}", xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    if model is not None:
        show_density(axes[-1], on_grid(model, low, high), low, high)
        axes[-1].set(title="density", aspect="equal")
    figure.savefig(path, dpi=150)


def limits(drawn: Sequence[Tensor]) -> tuple[list[float], list[float]]:
    """The corners of a rectangle around nearly all points of all [N, 2]."""
    spread = torch.cat([torch.quantile(x, torch.tensor([0.002, 0.998]), dim=0) for x in drawn])
    low, high = spread.amin(0), spread.amax(0)
    margin = 0.15 * (high - low) + 1e-3
    return (low - margin).tolist(), (high + margin).tolist()


def tall(low: Sequence[float], high: Sequence[float]) -> float:
    """Height over width of a picture of that rectangle."""
    return min(3.0, max(0.3, (high[1] - low[1]) / (high[0] - low[0])))


@torch.no_grad()
def on_grid(model: nn.Module, low: Sequence[float], high: Sequence[float], side: int = 160) -> Tensor:
    """p(x) on a grid, [side, side], rows along the second variable."""
    x, y = (torch.linspace(low[k], high[k], side) for k in (0, 1))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), 2).view(-1, 2)
    device = next(chain(model.parameters(), model.buffers())).device
    return model(grid.to(device)).exp().view(side, side).cpu()


def show_density(axis, density: Tensor, low: Sequence[float], high: Sequence[float]) -> None:
    """Draws a density on a grid between two corners."""
    axis.imshow(
        density.numpy(),
        origin="lower",
        extent=(low[0], high[0], low[1], high[1]),
        interpolation="bilinear",
        vmax=density.flatten().quantile(0.998),  # a needle would leave the rest dark
    )


def draw_curve(
    metrics: str | Path,
    path: str | Path,
    baseline: tuple[float, str] | None = None,
    unit: str = "bits/dim",
) -> None:
    """Writes a PNG of the loss in `unit` over steps from `metrics.jsonl`, with a dashed `baseline` and its name."""
    records = read_metrics(Path(metrics))
    train = [(r["step"], r["train"]) for r in records if "train" in r]
    held_out = [(r["step"], r["held_out"]) for r in records if "held_out" in r]
    figure = new_figure(6, 4)
    axis = figure.subplots()
    if train:
        axis.plot(*zip(*train, strict=True), lw=0.7, alpha=0.6, label="training batch")
    if held_out:
        axis.plot(*zip(*held_out, strict=True), "o-", ms=3, label="held out, averaged weights")
    if baseline is not None:
        axis.axhline(baseline[0], ls="--", color="black", lw=1, label=baseline[1])
    if train:  # the first steps are far above everything that follows
        values = sorted(value for _, value in train + held_out)
        low, high = values[0], values[int(0.97 * (len(values) - 1))]
        if baseline is not None:
            low, high = min(low, baseline[0]), max(high, baseline[0])
        axis.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.15 * (high - low) + 1e-3)
    axis.set(xlabel="step", ylabel=unit)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=150)
