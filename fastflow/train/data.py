"""Image data sets by name, as uint8 tensors: bundled digits, IDX files, a folder, an npz file."""

import gzip
import math
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import noise
from .errors import UserError, need

NAMES = ("digits", "mnist", "images", "npz")

_SUFFIXES = (".png", ".jpg", ".jpeg")
_GREY_MODES = ("1", "L", "LA")
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L")


@dataclass(frozen=True)
class Images:
    """Integer images: `train` and `held_out` are uint8 [N, C, H, W] with values below `levels`."""

    name: str
    train: Tensor
    held_out: Tensor
    levels: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.train.shape[1:])

    @property
    def dims(self) -> int:
        """Sub-pixels in an image, C*H*W."""
        return math.prod(self.shape)


def load_data(name: str, root: str | Path | None = None, *, size: int | None = None) -> Images:
    """Loads the data set `name`, one of:

    - `digits`: the 1797 digits of 8×8 pixels and 17 grey levels that scikit-learn bundles.
    - `mnist`: IDX files with MNIST's names in the folder `root`, gzipped or not; the official test
      set is held out.
    - `images`: every PNG and JPEG in the folder `root` and its sub-folders. Grey if all are grey,
      RGB otherwise (alpha is dropped). All of one size, or centre-cropped and resized to
      `size` × `size`.
    - `npz`: the NumPy archive `root`: `train` and `test`, or `x` alone, uint8 [N, H, W] or
      [N, C, H, W], and optionally `levels` (256 by default).

    Where the format has no test set, every tenth image (digits: every fifth) of a fixed random
    order is held out.

    Raises `FileNotFoundError` or `UserError` (a `ValueError`) in one line: the file, what was
    expected, what came.

    >>> data = load_data("digits")
    >>> data.shape, data.levels, len(data.train), len(data.held_out)
    ((1, 8, 8), 17, 1438, 359)
    """
    if name not in NAMES:
        raise UserError(f"unknown data set {name!r}: expected one of {', '.join(NAMES)}")
    if size is not None and (name != "images" or size < 1):
        raise UserError(f"size: a positive number for 'images' only, got {size} for {name!r}")
    if name == "digits":
        return _digits()
    if root is None:
        raise UserError(f"data set {name!r} needs a root: the path of its files")
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"{root}: expected the files of data set {name!r}, found nothing")
    if name == "mnist":
        return _mnist(root)
    if name == "images":
        return _split(name, _folder(root, size), 256, every=10)
    return _npz(root)


def _split(name: str, images: Tensor, levels: int, every: int) -> Images:
    if len(images) < 2:
        raise UserError(f"{name}: expected at least 2 images to split, got {len(images)}")
    order = noise.permutation(noise.key(0, noise.SPLIT), len(images))
    held = max(1, len(images) // every)
    return Images(name, images[order[held:]], images[order[:held]], levels)


def _digits() -> Images:
    datasets = need("sklearn.datasets", "scikit-learn")
    pixels = torch.from_numpy(datasets.load_digits().images).to(torch.uint8)
    return _split("digits", pixels[:, None], 17, every=5)


def _mnist(root: Path) -> Images:
    train, test = (read_idx(_find_idx(root, f"{part}-images-idx3-ubyte")) for part in ("train", "t10k"))
    if train.ndim != 3 or train.shape[1:] != test.shape[1:]:
        raise UserError(
            f"{root}: expected train and test images [N, H, W] of one size, "
            f"got {list(train.shape)} and {list(test.shape)}"
        )
    return Images("mnist", train[:, None], test[:, None], 256)


def _find_idx(root: Path, name: str) -> Path:
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{root}: expected the file {name} or {name}.gz, found neither")


def read_idx(path: Path) -> Tensor:
    """The uint8 array of an IDX file (the format of MNIST), gzipped if it ends in `.gz`."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: expected a whole gzip file ({error})") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise UserError(f"{path}: expected the magic 00 00 08 of IDX bytes, got {raw[:4].hex(' ')}")
    header = 4 + 4 * raw[3]
    if len(raw) < header:
        raise UserError(f"{path}: expected an IDX header of {header} bytes, got {len(raw)}")
    shape = struct.unpack(f">{raw[3]}I", raw[4:header])
    if len(raw) != header + math.prod(shape):
        raise UserError(f"{path}: expected {math.prod(shape)} bytes of data {list(shape)}, got {len(raw) - header}")
    if not math.prod(shape):
        raise UserError(f"{path}: expected at least one value, got shape {list(shape)}")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=header).view(shape)


def _folder(root: Path, size: int | None) -> Tensor:
    need("PIL", "Pillow")
    from PIL import Image

    if not root.is_dir():
        raise UserError(f"{root}: expected a folder of images, got a file")
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    if not paths:
        raise FileNotFoundError(f"{root}: expected .png or .jpg files, found none")
    grey, first = True, None
    for path in paths:  # headers only: a wrong file is named before anything is decoded
        try:
            with Image.open(path) as image:
                mode, shape = image.mode, image.size
        except OSError as error:
            raise UserError(f"{path}: expected an image ({error})") from error
        if mode in _DEEP_MODES:
            raise UserError(f"{path}: expected 8 bits a channel, got mode {mode}")
        first = first or shape
        if size is None and shape != first:
            raise UserError(
                f"{path}: expected {first[0]}x{first[1]} like {paths[0].name}, "
                f"got {shape[0]}x{shape[1]}; give a size to crop and resize"
            )
        grey = grey and mode in _GREY_MODES
    return torch.stack([_decode(path, "L" if grey else "RGB", size) for path in paths])


def _decode(path: Path, mode: str, size: int | None) -> Tensor:
    """uint8 [C, H, W]."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image = image.convert(mode)
    except (OSError, SyntaxError, EOFError) as error:  # only decoding finds a truncated file
        raise UserError(f"{path}: expected a whole image ({error})") from error
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, -1).permute(2, 0, 1).contiguous()


def _npz(path: Path) -> Images:
    np = need("numpy", "NumPy")
    try:
        archive = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: expected a NumPy .npz archive ({error})") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise UserError(f"{path}: expected a .npz archive of named arrays, got a single array")
    with archive:
        keys = sorted(archive.files)
        names = ("train", "test") if "train" in keys else ("x",)
        if any(name not in keys for name in names):
            raise UserError(f"{path}: expected arrays 'x', or 'train' and 'test', got {keys}")
        levels = _npz_levels(path, archive) if "levels" in keys else 256
        arrays = [_npz_images(path, archive, name, levels) for name in names]
    if len(arrays) == 1:
        return _split("npz", arrays[0], levels, every=10)
    train, test = arrays
    if train.shape[1:] != test.shape[1:]:
        raise UserError(
            f"{path}: expected train and test of one size, got {list(train.shape[1:])} and {list(test.shape[1:])}"
        )
    return Images("npz", train, test, levels)


def _npz_array(path: Path, archive, name: str):
    try:
        return archive[name]
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: expected a plain array {name!r} ({error})") from error


def _npz_levels(path: Path, archive) -> int:
    value = _npz_array(path, archive, "levels")
    if value.ndim or value.dtype.kind not in "iu" or not 2 <= int(value) <= 256:
        raise UserError(f"{path}: expected 'levels' to be one integer of 2..256, got {value}")
    return int(value)


def _npz_images(path: Path, archive, name: str, levels: int) -> Tensor:
    """uint8 [N, C, H, W]."""
    array = _npz_array(path, archive, name)
    if array.dtype != "uint8" or array.ndim not in (3, 4) or not array.size:
        raise UserError(
            f"{path}: expected {name!r} to be uint8 [N, H, W] or [N, C, H, W], got {array.dtype} {list(array.shape)}"
        )
    images = torch.from_numpy(array)
    if int(images.max()) >= levels:
        raise UserError(f"{path}: expected values of {name!r} below levels={levels}, got {int(images.max())}")
    return images[:, None] if images.ndim == 3 else images
