"""Samples of a trained model in the form of its data: pictures, points, tables, sound, forecasts."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastflow.models.wavenet import mu_law_decode

from .data.audio import write_wav
from .errors import UserError, need
from .figures import draw_points, draw_samples
from .forecast import write_series
from .pixels import quantize

_SUFFIXES = {
    "images": (".png",),
    "points": (".png", ".csv", ".npz"),
    "rows": (".csv", ".npz"),
    "audio": (".wav",),
    "series": (".png", ".csv"),
}
_COUNT = {"images": 12, "points": 2000, "rows": 1000, "audio": 4, "series": 4}


def default_name(description: dict[str, Any]) -> str:
    """The file that samples go to where none is named, by the kind of the data that a checkpoint describes."""
    kind = _kind(description)
    return f"{'forecast' if kind == 'series' else 'samples'}{_SUFFIXES[kind][0]}"


def write_samples(
    model: nn.Module,
    description: dict[str, Any],
    path: Path,
    temperatures: Sequence[float],
    n: int | None = None,
    seed: int = 0,
) -> int:
    """Writes `n` samples at each temperature to `path`, of a kind that fits the data; returns `n`.

    The noise is the same at every temperature, so that one sees a sample cool down. Images go to a PNG, one row a
    temperature (the means of their pixels, if the model has `sample_mean`); points in the plane to a PNG with their
    density beside them, or, as all rows, to a CSV or npz file in the units of the original table; audio to a WAV
    file, one clip after another. Of models of series a PNG has forecasts, a CSV new series (`write_series`).
    """
    kind = _kind(description)
    if path.suffix not in _SUFFIXES[kind]:
        raise UserError(f"--out {path}: expected a name that ends in {' or '.join(_SUFFIXES[kind])} for this model")
    n = n or _COUNT[kind]
    if kind == "series":
        return write_series(model, description, path, temperatures, n, seed)
    with torch.no_grad():
        drawn = [_draw(model, description, n, temperature, seed) for temperature in temperatures]
    if kind == "images":
        draw_samples([_pixels(x, description) for x in drawn], temperatures, description["levels"], path)
    elif kind == "audio":
        gap = torch.zeros(description["rate"] // 5)
        write_wav(
            path,
            torch.cat([piece for x in drawn for clip in x for piece in (mu_law_decode(clip), gap)]),
            description["rate"],
        )
    elif path.suffix == ".png":
        draw_points(drawn, temperatures, path, model)
    else:
        _write_table([_original(x, description) for x in drawn], temperatures, path)
    return n


def _kind(description: dict[str, Any]) -> str:
    kind = description.get("kind", "images")
    return "points" if kind == "rows" and description["shape"] == [2] else kind


def _draw(model: nn.Module, description: dict[str, Any], n: int, temperature: float, seed: int) -> Tensor:
    device = next(model.parameters()).device
    arguments = {"length": description["shape"][0]} if description.get("kind") == "audio" else {}
    generator = torch.Generator(device).manual_seed(seed)
    # a picture of what a VAE has in mind shows more than its pixels' noise on top
    sample = getattr(model, "sample_mean", model.sample)
    x = sample(n, temperature=temperature, generator=generator, **arguments).cpu()
    bad = 0 if not x.is_floating_point() else (~torch.isfinite(x)).flatten(1).any(1).sum().item()
    if bad:
        raise UserError(f"expected finite samples, got {bad} of {len(x)} with inf or nan")
    return x


def _pixels(x: Tensor, description: dict[str, Any]) -> Tensor:
    """uint8 [n, C, H, W]."""
    x, levels = x.view(len(x), *description["shape"]), description["levels"]
    if description.get("form", "dequantized") == "dequantized":
        return quantize(x, levels)
    if description["form"] == "integers":
        return x.float().round().clamp(0, levels - 1).to(torch.uint8)
    return ((levels - 1) * x).round().clamp(0, levels - 1).to(torch.uint8)  # bits, or their probabilities


def _original(x: Tensor, description: dict[str, Any]) -> Tensor:
    """Rows as they were before they were standardised."""
    if "mean" not in description:
        return x
    return x * torch.tensor(description["std"]) + torch.tensor(description["mean"])


def _write_table(drawn: Sequence[Tensor], temperatures: Sequence[float], path: Path) -> None:
    if path.suffix == ".npz":
        np = need("numpy", "NumPy")
        np.savez(path, x=torch.cat(list(drawn)).numpy(), temperature=np.repeat(temperatures, len(drawn[0])))
        return
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["temperature", *(f"x{i}" for i in range(drawn[0].shape[1]))])
        for x, temperature in zip(drawn, temperatures, strict=True):
            writer.writerows([temperature, *row] for row in x.tolist())
