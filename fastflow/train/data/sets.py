"""Image data sets by name, each a function from its path to the parts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastflow.errors import UserError, need

from .dataset import parts, same_shape
from .folder import read_folder
from .idx import find_idx, read_idx
from .npz import read_npz


@dataclass(frozen=True)
class Pixels:
    """What a reader hands to `Images`: uint8 [N, C, H, W] below `levels`."""

    train: Tensor
    held_out: Tensor
    levels: int
    test: Tensor | None = None


def digits() -> Pixels:
    """The 1797 digits of 8x8 pixels and 17 grey levels that scikit-learn bundles; a fifth is held out."""
    datasets = need("sklearn.datasets", "scikit-learn")
    pixels = torch.from_numpy(datasets.load_digits().images).to(torch.uint8)
    return Pixels(*parts("digits", pixels[:, None], 5), levels=17)


def mnist(root: Path) -> Pixels:
    """IDX files with MNIST's names in the folder, gzipped or not; the official test set is held out."""
    train, test = (read_idx(find_idx(root, f"{part}-images-idx3-ubyte")) for part in ("train", "t10k"))
    if train.ndim != 3 or train.shape[1:] != test.shape[1:]:
        raise UserError(
            f"{root}: expected train and test images [N, H, W] of one size, "
            f"got {list(train.shape)} and {list(test.shape)}"
        )
    return Pixels(train[:, None], test[:, None], 256)


def mnist_static(root: Path) -> Pixels:
    """Larochelle's binarised MNIST: npz of `train`, `valid`, `test`, uint8 [N, 98], the 784 bits packed in rows."""
    return _bits(root, packed=(28, 28))


def binary(root: Path) -> Pixels:
    """npz of `train`, `test` and perhaps `valid`: rows of 0 and 1, [N, D]; seen as images of one line."""
    return _bits(root)


def freyfaces(root: Path) -> Pixels:
    """npz of `x`, uint8 [N, H, W]; of 1965 faces 200 are held out and 200 are the test set."""
    images = _uint8(root, "x", read_npz(root, "x")["x"], 256)
    train, held_out, test = parts("freyfaces", images, 9, 9)
    if len(images) == 1965:  # the published numbers
        whole = torch.cat((held_out, test, train))
        held_out, test, train = whole[:200], whole[200:400], whole[400:]
    return Pixels(train, held_out, 256, test)


def omniglot(root: Path) -> Pixels:
    """A folder with `*background*.npz` and `*evaluation*.npz`: `ink`, bool [..., H, W], averaged down to 28x28.

    The evaluation alphabets are the test set; a tenth of the background is held out.
    """
    found = []
    for word in ("background", "evaluation"):
        path = next(iter(sorted(root.glob(f"*{word}*.npz"))), None)
        if path is None:
            raise FileNotFoundError(f"{root}: expected a file *{word}*.npz, found none")
        ink = read_npz(path, "ink")["ink"]
        if ink.dtype != bool or ink.ndim < 3 or not ink.size:
            raise UserError(f"{path}: expected 'ink' to be bool [..., H, W], got {ink.dtype} {list(ink.shape)}")
        drawings = torch.from_numpy(ink).view(-1, 1, *ink.shape[-2:])
        small = [torch.nn.functional.adaptive_avg_pool2d(d.float(), 28) for d in drawings.split(4096)]
        found.append((255 * torch.cat(small)).round().to(torch.uint8))
    train, held_out = parts(str(root), found[0], 10)
    return Pixels(train, held_out, 256, found[1])


def caltech(root: Path, *, transpose: bool = True, invert: bool = True) -> Pixels:
    """Silhouettes in a .mat file: `X`, 0/1 [N, S*S]; held out and test set are a tenth each.

    Its images lie on their side with the object 0: `transpose` and `invert` set them upright with the object 1.
    """
    io = need("scipy.io", "SciPy")
    try:
        found = io.loadmat(root)
    except Exception as error:  # scipy raises what it likes on damaged files
        raise UserError(f"{root}: expected a MATLAB file of version 7 or older ({error})") from error
    if "X" not in found:
        raise UserError(f"{root}: expected the matrix 'X', got {sorted(k for k in found if k[0] != '_')}")
    array = found["X"]
    side = round(array.shape[-1] ** 0.5)
    if array.ndim != 2 or array.dtype.kind not in "uif" or array.shape[1] != side**2 or not array.size:
        raise UserError(f"{root}: expected 'X' to be 0/1 [N, S*S], got {array.dtype} {list(array.shape)}")
    if not ((array == 0) | (array == 1)).all():
        raise UserError(f"{root}: expected values 0 and 1 in 'X', got others")
    images = torch.from_numpy(array.astype("uint8")).view(-1, 1, side, side)
    images = images.transpose(2, 3) if transpose else images
    train, held_out, test = parts(str(root), (1 - images if invert else images).contiguous(), 10, 10)
    return Pixels(train, held_out, 2, test)


def images(root: Path, size: int | None = None) -> Pixels:
    """Every PNG and JPEG in the folder and its sub-folders; grey if all are grey, RGB otherwise (alpha is dropped).

    All of one size, or centre-cropped and resized to `size` x `size`; a tenth is held out.
    """
    return Pixels(*parts("images", read_folder(root, size), 10), levels=256)


def npz(root: Path) -> Pixels:
    """npz of `train` and `test`, or of `x` alone (a tenth is held out), uint8 [N, H, W] or [N, C, H, W], and optionally
    `levels` (256 by default)."""
    arrays = read_npz(root)
    names = ("train", "test") if "train" in arrays else ("x",)
    if any(name not in arrays for name in names):
        raise UserError(f"{root}: expected arrays 'x', or 'train' and 'test', got {sorted(arrays)}")
    levels = 256
    if "levels" in arrays:
        value = arrays["levels"]
        if value.ndim or value.dtype.kind not in "iu" or not 2 <= int(value) <= 256:
            raise UserError(f"{root}: expected 'levels' to be one integer of 2..256, got {value}")
        levels = int(value)
    found = {name: _uint8(root, name, arrays[name], levels) for name in names}
    same_shape(root, found)
    if len(found) == 1:
        return Pixels(*parts("npz", found["x"], 10), levels)
    return Pixels(found["train"], found["test"], levels)


IMAGES: dict[str, Callable[..., Pixels]] = {
    "digits": digits,
    "mnist": mnist,
    "mnist-static": mnist_static,
    "binary": binary,
    "freyfaces": freyfaces,
    "omniglot": omniglot,
    "caltech": caltech,
    "images": images,
    "npz": npz,
}


def _uint8(path: Path, name: str, array, levels: int) -> Tensor:
    """uint8 [N, C, H, W]."""
    if array.dtype != "uint8" or array.ndim not in (3, 4) or not array.size:
        raise UserError(
            f"{path}: expected {name!r} to be uint8 [N, H, W] or [N, C, H, W], got {array.dtype} {list(array.shape)}"
        )
    pixels = torch.from_numpy(array)
    if int(pixels.max()) >= levels:
        raise UserError(f"{path}: expected values of {name!r} below levels={levels}, got {int(pixels.max())}")
    return pixels[:, None] if pixels.ndim == 3 else pixels


def _bits(path: Path, packed: tuple[int, int] | None = None) -> Pixels:
    np = need("numpy", "NumPy")
    arrays = read_npz(path)
    if missing := {"train", "test"} - arrays.keys():
        raise UserError(f"{path}: expected the arrays 'train', 'test' and perhaps 'valid', got no {min(missing)!r}")
    found = {}
    for name in ("train", "valid", "test"):
        if (rows := arrays.get(name)) is None:
            continue
        if packed:
            size = packed[0] * packed[1]
            if rows.dtype != "uint8" or rows.ndim != 2 or rows.shape[1] != (size + 7) // 8 or not rows.size:
                raise UserError(
                    f"{path}: expected {name!r} to be uint8 [N, {(size + 7) // 8}], {size} packed bits each, "
                    f"got {rows.dtype} {list(rows.shape)}"
                )
            rows = np.unpackbits(rows, axis=1)[:, :size]
        elif rows.ndim != 2 or rows.dtype.kind not in "biuf" or not rows.size or not ((rows == 0) | (rows == 1)).all():
            raise UserError(f"{path}: expected {name!r} to be 0/1 [N, D], got {rows.dtype} {list(rows.shape)}")
        shape = packed or (1, rows.shape[1])
        found[name] = torch.from_numpy(rows.astype("uint8")).view(-1, 1, *shape)
    same_shape(path, found)
    return Pixels(found["train"], found.get("valid", found["test"]), 2, found["test"] if "valid" in found else None)
