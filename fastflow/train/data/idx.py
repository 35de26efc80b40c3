"""IDX files: the format of MNIST."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from fastflow.errors import UserError


def find_idx(root: Path, name: str) -> Path:
    """The file `name` in `root`, gzipped or not."""
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{root}: expected the file {name} or {name}.gz, found neither")


def read_idx(path: Path) -> Tensor:
    """The uint8 array of an IDX file, gzipped if it ends in `.gz`."""
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
