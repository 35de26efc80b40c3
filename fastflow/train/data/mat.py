"""Matrices of numbers in MATLAB files of version 5 to 7.

scipy reads them, too, but dies of a segmentation fault on some damaged ones. The format is public: a header of 128
bytes, then elements, each a tag (type, bytes) and its content, padded to 8 bytes; a compressed element has one of them
in it, a matrix has flags, sizes, name and numbers.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastflow.errors import UserError, need

# types of elements
_DTYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MATRIX, _COMPRESSED = 14, 15

_NUMERIC = range(6, 16)  # classes of matrices: double, single, and integers
_COMPLEX = 0x0800


def read_mat(path: Path, name: str) -> Any:
    """The matrix `name` as a NumPy array; raises `UserError` where there is none or the file is damaged."""
    raw = path.read_bytes()
    if len(raw) < 128 or raw[126:128] not in (b"IM", b"MI"):
        raise UserError(f"{path}: expected a MATLAB file of version 5 to 7, got {raw[:8]!r}...")
    order = "<" if raw[126:128] == b"IM" else ">"
    names = []
    try:
        for kind, content in _elements(raw[128:], order):
            if kind == _COMPRESSED:
                kind, content = next(_elements(zlib.decompress(content), order))
            if kind != _MATRIX:
                continue
            found, array = _matrix(content, order, name)
            if array is not None:
                return array
            names.append(found)
    except (struct.error, zlib.error, ValueError, StopIteration) as error:
        raise UserError(f"{path}: expected a whole MATLAB file ({error or 'an element is empty'})") from error
    raise UserError(f"{path}: expected a matrix of numbers {name!r}, got {names}")


def _elements(raw: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """(type, content) of every element."""
    at = 0
    while at < len(raw):
        kind, size = struct.unpack_from(f"{order}2I", raw, at)
        if kind >> 16:  # a small one has its content in the tag
            kind, size, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + 8
            if size > 4:
                raise ValueError(f"a small element of {size} bytes")
        else:
            start, end = at + 8, at + 8 + size + (0 if kind == _COMPRESSED else -size % 8)
        if start + size > len(raw):
            raise ValueError(f"an element of {size} bytes, {len(raw) - start} are left")
        yield kind, raw[start : start + size]
        at = end


def _matrix(raw: bytes, order: str, wanted: str) -> tuple[str, Any]:
    """(name, array), the array None unless it is the one wanted and its class is numeric."""
    np = need("numpy", "NumPy")
    elements = _elements(raw, order)
    flags = struct.unpack(f"{order}2I", next(elements)[1])[0]
    kind, sizes = next(elements)
    shape = struct.unpack(f"{order}{len(sizes) // 4}i", sizes)
    name = next(elements)[1].decode("latin-1")
    if name != wanted or flags & 0xFF not in _NUMERIC or flags & _COMPLEX:
        return name, None
    kind, content = next(elements)
    if kind not in _DTYPES:
        raise ValueError(f"numbers of the unknown type {kind} in {name!r}")
    array = np.frombuffer(content, order + _DTYPES[kind])
    if min(shape, default=0) < 0 or array.size != math.prod(shape):
        raise ValueError(f"{array.size} numbers in {name!r} for the sizes {list(shape)}")
    return name, array.reshape(shape, order="F")
