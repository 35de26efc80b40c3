"""Data sets by name: images, rows, toys, patches, audio, series. One interface, `Dataset`, for the loop."""

import inspect
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastflow.errors import UserError

from .audio import Audio, load_audio
from .dataset import Dataset
from .images import FORMS, Images
from .patches import Patches, load_patches
from .physionet import load_physionet
from .processes import PROCESSES
from .rows import Rows, load_rows
from .series import Series, load_series
from .sets import IMAGES
from .toys import TOYS, load_toy

__all__ = ["BUNDLED", "FORMS", "NAMES", "Audio", "Dataset", "Images", "Patches", "Rows", "Series", "load_data"]

_BITS = ("mnist-static", "binary", "caltech")  # seen as bits unless another form is asked for

_FILES = {
    "rows": load_rows,
    "miniboone": partial(load_rows, standardize=False),
    "patches": load_patches,
    "audio": load_audio,
    "series": load_series,
    "physionet2012": load_physionet,
}

NAMES = (*IMAGES, *_FILES, *TOYS, *PROCESSES)

BUNDLED = ("digits", *TOYS, *PROCESSES)
"""Those that need no files."""


def load_data(
    name: str,
    root: str | Path | None = None,
    *,
    size: int | None = None,
    form: str | None = None,
    flat: bool | None = None,
    valid: int = 0,
    **options: Any,
) -> Dataset:
    """Loads the data set `name`; `root` is the path of its files.

    Images (`Images` has their `form` and `flat`): `digits`, bundled with scikit-learn; `mnist`, a folder of IDX
    files; `mnist-static`, `binary`, `freyfaces`, `npz`, archives of NumPy; `omniglot`, a folder of them; `caltech`, a
    MATLAB file; `images`, a folder of PNG and JPEG (`size`: crop and resize). Rows: `rows`, CSV or npz (options of
    `load_rows`), `miniboone`, the same, left as it is (it is passed around whitened), and the toys `moons`,
    `circles`, `rings`, `gaussians`, `pinwheel`, `spirals`, `checkerboard`.
    `patches`: of the images in two folders (`load_patches`). `audio`: WAV files or npz (`load_audio`). Series:
    `series`, CSV (`load_series`), `physionet2012`, CSV of that challenge (`load_physionet`), and the generated
    `double-ou` and `brusselator`.

    Without a `form`, `mnist-static`, `binary` and `caltech` are seen as bits, other images dequantised.

    `valid`: so many of the last training samples are held out instead, and what was held out is the test set.

    Raises `FileNotFoundError` or `UserError` (a `ValueError`) in one line: the file, what was
    expected, what came.

    >>> data = load_data("digits")
    >>> data.shape, data.levels, len(data.train), len(data.held_out)
    ((1, 8, 8), 17, 1438, 359)
    >>> load_data("digits", form="dynamic", flat=True).shape, load_data("moons").unit
    ((64,), 'nats')
    """
    if name not in NAMES:
        raise UserError(f"unknown data set {name!r}: expected one of {', '.join(NAMES)}")
    if size is not None:
        if name != "images" or not isinstance(size, int) or size < 1:
            raise UserError(f"size: a positive number for 'images' only, got {size!r} for {name!r}")
        options["size"] = size
    if name not in IMAGES and (form or flat):
        raise UserError(f"form, flat: for images only, got {name!r}")
    _check(name, options)
    if not isinstance(valid, int) or valid < 0:
        raise UserError(f"valid: expected a number of samples, got {valid!r}")
    if name in BUNDLED:
        root = None
    elif root is None:
        raise UserError(f"data set {name!r} needs a root: the path of its files")
    elif not (root := Path(root)).exists():
        raise FileNotFoundError(f"{root}: expected the files of data set {name!r}, found nothing")
    paths = [] if root is None else [root]
    if name in TOYS:
        data = load_toy(name)
    elif loader := _FILES.get(name) or PROCESSES.get(name):
        data = loader(name, *paths, **options)
    else:
        found = IMAGES[name](*paths, **options)
        form = form or ("static" if name in _BITS else "dequantized")
        data = Images(name, found.train, found.held_out, found.levels, form, bool(flat), test=found.test)
    return _with_validation(data, valid)


def _check(name: str, options: dict[str, Any]) -> None:
    """Raises `UserError` for an option that the loader does not take."""
    known = set()
    if loader := _FILES.get(name) or PROCESSES.get(name) or IMAGES.get(name):
        known = inspect.signature(loader).parameters.keys() - {"name", "root"}
    if unknown := options.keys() - known:
        raise UserError(f"{min(unknown)}: no option of {name!r}, which has {', '.join(sorted(known)) or 'none'}")


def _with_validation(data: Dataset, valid: int) -> Dataset:
    if not valid:
        return data
    if valid >= len(data.train):
        raise UserError(
            f"valid: expected fewer than the {len(data.train)} training samples of {data.name}, got {valid}"
        )
    held_out = data.hold_out(data.train[-valid:])
    return replace(data, train=data.train[:-valid], held_out=held_out, test=data.final)
