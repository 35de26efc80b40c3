"""Patches of grey images, prepared as MAF and FFJORD prepare BSDS300."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastflow.errors import UserError

from .. import noise
from .dataset import Dataset, whole
from .folder import image_paths, read_image
from .rows import gaussian_nats


@dataclass(frozen=True)
class Patches(Dataset):
    """Square patches: the parts are uint8 [N, S*S]; a model sees float32 [B, S*S - 1]; nats a patch.

    Uniform noise is added to the pixels (fresh in every epoch), they are divided by 256, the mean of the patch is
    subtracted, and the last pixel, which the others then determine, is dropped.
    """

    @property
    def shape(self) -> tuple[int]:
        return (self.train.shape[1] - 1,)

    def inputs(self, stored: Tensor, index: Tensor, key: int) -> Tensor:
        x = (stored.float() + noise.uniform(key, index, stored.shape[1])) / 256
        return (x - x.mean(1, keepdim=True))[:, :-1].contiguous()

    def baseline(self) -> tuple[float, str]:
        train, test = (
            self.inputs(part, torch.arange(len(part)), noise.key(0, noise.HELD_OUT, number))
            for number, part in enumerate((self.train[:200_000], self.final))
        )
        return gaussian_nats(train, test), "shrinkage Gaussian"


def load_patches(
    name: str, root: Path, *, side: int = 8, train: int = 1_000_000, held_out: int = 20_000, test: int = 50_000
) -> Patches:
    """`side` x `side` patches at random places of the PNG and JPEG images in `root/train` and `root/test`.

    The held-out patches come from every tenth image of `root/train`, which no training patch comes from.
    """
    whole(2, side=side)
    whole(1, train=train, held_out=held_out, test=test)
    images = {}
    for folder in ("train", "test"):
        if not (root / folder).is_dir():
            raise FileNotFoundError(f"{root}: expected the folders train and test, found no {folder}")
        images[folder] = [(path, read_image(path, "L")[0]) for path in image_paths(root / folder)]
        for path, image in images[folder]:
            if min(image.shape) < side:
                raise UserError(f"{path}: expected at least {side}x{side} pixels, got {list(image.shape)}")
    if len(images["train"]) < 2:
        raise UserError(f"{root / 'train'}: expected at least 2 images, got {len(images['train'])}")
    source = {
        "train": [image for i, (_, image) in enumerate(images["train"]) if i % 10],
        "held_out": [image for i, (_, image) in enumerate(images["train"]) if i % 10 == 0],
        "test": [image for _, image in images["test"]],
    }
    counts = {"train": train, "held_out": held_out, "test": test}
    cut = {p: _cut(source[p], counts[p], side, noise.key(0, noise.SPLIT, n)) for n, p in enumerate(source)}
    return Patches(name, cut["train"], cut["held_out"], test=cut["test"])


def _cut(images: list[Tensor], n: int, side: int, key: int) -> Tensor:
    """uint8 [n, side*side], from images [H, W] chosen by the number of places they have."""
    height, width = (torch.tensor([image.shape[k] for image in images]) for k in (0, 1))
    places = (height - side + 1) * (width - side + 1)
    last = places.cumsum(0)
    start = torch.tensor([image.numel() for image in images]).cumsum(0) - height * width
    pixels = torch.cat([image.flatten() for image in images])
    patches = []
    for counter in torch.arange(n).split(1 << 16):
        place = (noise.random_bits(key, counter) & (1 << 62) - 1) % last[-1]
        image = torch.searchsorted(last, place, right=True)
        place = place - (last - places)[image]
        columns = width[image] - side + 1
        corner = start[image] + place // columns * width[image] + place % columns
        inside = torch.arange(side)
        offset = inside[:, None] * width[image][:, None, None] + inside  # [B, side, side]
        patches.append(pixels[(corner[:, None, None] + offset).flatten(1)])
    return torch.cat(patches)
