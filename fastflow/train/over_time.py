"""A flow in the plane on its way from its base to the data: densities and samples, as a strip or an animation."""

import copy
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastflow.nn import Continuous, Flow, Permutation, Planar, Radial
from fastflow.nn.base import Bijection, Inverse
from fastflow.nn.base import Sequential as Chain

from .errors import UserError, need
from .figures import limits, new_figure, on_grid, show_density, tall

_FRAMES = {".png": 6, ".gif": 40}
_SIDE = {".png": 160, ".gif": 120}  # of the grid of a density
_MILLISECONDS, _HOLD = 80, 2000  # a frame of an animation, and its last one


class Stage(NamedTuple):
    """What the flow makes of its base in a part of its way: that part has been gone since the stage before."""

    label: str
    part: Bijection
    flow: Flow


def draw_over_time(model: nn.Module, path: str | Path, n: int = 2000, temperature: float = 1.0, seed: int = 0) -> int:
    """Writes a strip (.png) or an animation (.gif) of a flow on points [N, 2]; returns the number of its pictures.

    Each shows the density, and ``n`` samples, after a part of the way from the base to the data: of the time of
    continuous layers, of the layers where there are none. The noise is the same all the way.

    Raises `UserError` for a model that is no flow in the plane.
    """
    path = Path(path)
    if path.suffix not in _FRAMES:
        raise UserError(f"--over-time {path}: expected a name that ends in .png or .gif")
    if not isinstance(model, Flow) or model.base.shape != (2,):
        raise UserError(f"--over-time: expected a flow of points in the plane, got {type(model).__name__}")
    stages = _stages(model, _FRAMES[path.suffix])
    drawn = _samples(model, stages, n, temperature, seed)
    low, high = limits([drawn[0], drawn[-1]])  # what is between may go far beyond
    densities = [on_grid(stage.flow, low, high, _SIDE[path.suffix]) for stage in stages]
    draw = _strip if path.suffix == ".png" else _animation
    draw([stage.label for stage in stages], drawn, densities, low, high, path)
    return len(stages)


# --- the way ----------------------------------------------------------------------------------------


def _stages(model: Flow, frames: int) -> list[Stage]:
    """From the base to the whole flow; as many as ``frames``, or fewer where there are fewer layers."""
    layers = _flat(model.bijection)[::-1]  # from latents to data
    continuous = [layer for layer in layers if isinstance(layer, Continuous)]
    if continuous:
        cuts = max(1, round((frames - 1) / len(continuous)))
        parts = [part for layer in layers for part in (_spans(layer, cuts) if layer in continuous else [layer])]
        ends = [i for i, part in enumerate(parts) if isinstance(part, _Span)]
    else:
        parts, ends = layers, [i for i, layer in enumerate(layers) if not isinstance(layer, Permutation)]
        ends = sorted({ends[round(k * (len(ends) - 1) / (frames - 2))] for k in range(frames - 1)} if ends else ())
    if ends:
        ends[-1] = len(parts) - 1  # what is left belongs to the last one
    stages, start = [Stage("base", Chain(), Flow(model.base, Chain()))], 0
    for number, end in enumerate(ends):
        label = f"{100 * (number + 1) / len(ends):.0f} %" if continuous else f"{end + 1} of {len(parts)} layers"
        part, whole = (Chain(*parts[first : end + 1][::-1]) for first in (start, 0))
        stages.append(Stage(label, part, Flow(model.base, whole)))
        start = end + 1
    return stages


def _flat(layer: Bijection) -> list[Bijection]:
    """A chain as its layers, from data to latents."""
    if isinstance(layer, Inverse):
        return [Inverse(each) for each in reversed(_flat(layer.bijection))]
    if isinstance(layer, Chain):
        return [each for inner in layer for each in _flat(inner)]
    if isinstance(layer, (Planar, Radial)) and not layer.amortised:
        return [_unit(layer, k) for k in range(layer.steps)]
    return [layer]


def _unit(layer: Planar | Radial, k: int) -> Bijection:
    """The k-th step of a layer that has many, by itself."""
    unit = copy.deepcopy(layer)
    unit.steps = 1
    for name, parameter in layer.named_parameters():
        setattr(unit, name, nn.Parameter(parameter.detach()[k : k + 1].clone()))
    return unit


class _Span(Bijection):
    """A continuous layer between two of its times; by the exact trace, as a random one would make a density grainy."""

    def __init__(self, layer: Continuous, start: float, end: float) -> None:
        super().__init__()
        self.layer, self.times = layer, (start, end)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._through(x, self.times)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._through(z, self.times[::-1])

    def _through(self, x: Tensor, times: Sequence[float]) -> tuple[Tensor, Tensor]:
        values, logdets = self.layer.trajectory(x, times, trace="exact")
        return values[-1], logdets[-1]


def _spans(layer: Continuous, count: int) -> list[_Span]:
    """A layer in parts of equal time, from latents to data."""
    times = torch.linspace(float(layer.end_time), 0, count + 1, dtype=torch.float64).tolist()
    return [_Span(layer, start, end) for end, start in zip(times[:-1], times[1:], strict=True)]


@torch.no_grad()
def _samples(model: Flow, stages: Sequence[Stage], n: int, temperature: float, seed: int) -> list[Tensor]:
    """[n, 2] at every stage, each from the one before."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    x = model.base.sample(n, temperature=temperature, generator=generator)
    drawn = []
    for stage in stages:
        x, _ = stage.part.inverse(x)
        drawn.append(x.cpu())
    if not torch.isfinite(torch.stack(drawn)).all():
        raise UserError("expected finite samples, got inf or nan")
    return drawn


# --- pictures ---------------------------------------------------------------------------------------


def _strip(
    labels: Sequence[str],
    drawn: Sequence[Tensor],
    densities: Sequence[Tensor],
    low: Sequence[float],
    high: Sequence[float],
    path: Path,
) -> None:
    """Densities above, samples below, time from left to right."""
    figure = new_figure(2 * len(labels), 0.4 + 4 * tall(low, high))
    axes = figure.subplots(2, len(labels), squeeze=False)
    for column, label, x, density in zip(axes.T, labels, drawn, densities, strict=True):
        show_density(column[0], density, low, high)
        column[0].set_title(label)
        column[1].scatter(*x.T.numpy(), s=1.0, lw=0, alpha=0.6)
        column[1].set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
        for axis in column:
            axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=130)


def _animation(
    labels: Sequence[str],
    drawn: Sequence[Tensor],
    densities: Sequence[Tensor],
    low: Sequence[float],
    high: Sequence[float],
    path: Path,
) -> None:
    """The density beside the samples, time as time; the last picture stays for a while."""
    image = need("PIL.Image", "pillow")
    figure = new_figure(6.4, 0.6 + 3.2 * tall(low, high))
    left, right = figure.subplots(1, 2)
    frames = []
    for label, x, density in zip(labels, drawn, densities, strict=True):
        for axis in (left, right):
            axis.clear()
        show_density(left, density, low, high)
        right.scatter(*x.T.numpy(), s=1.5, lw=0, alpha=0.6)
        right.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
        for axis in (left, right):
            axis.set(xticks=[], yticks=[])
        figure.suptitle(label)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=80)
        frames.append(image.open(file).convert("RGB").quantize(256, dither=image.Dither.NONE))
    lasts = [_MILLISECONDS] * (len(frames) - 1) + [_HOLD]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=lasts, loop=0)
