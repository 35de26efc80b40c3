"""Folders of PNG and JPEG images."""

from pathlib import Path

import torch
from torch import Tensor

from fastflow.errors import UserError, need

_SUFFIXES = (".png", ".jpg", ".jpeg")
_GREY_MODES = ("1", "L", "LA")
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L")


def image_paths(root: Path) -> list[Path]:
    """The images in `root` and its sub-folders, sorted."""
    if not root.is_dir():
        raise UserError(f"{root}: expected a folder of images, got a file")
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    if not paths:
        raise FileNotFoundError(f"{root}: expected .png or .jpg files, found none")
    return paths


def read_folder(root: Path, size: int | None) -> Tensor:
    """uint8 [N, C, H, W]: grey if all are grey, RGB otherwise; all of one size unless `size` crops and resizes."""
    need("PIL", "Pillow")
    from PIL import Image

    paths = image_paths(root)
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
    return torch.stack([read_image(path, "L" if grey else "RGB", size) for path in paths])


def read_image(path: Path, mode: str, size: int | None = None) -> Tensor:
    """uint8 [C, H, W] in PIL's `mode`; the centre resized to `size` x `size` if one is given."""
    need("PIL", "Pillow")
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
