"""NumPy archives of named arrays; nothing in them is ever unpickled."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

from fastflow.errors import UserError, need


def read_npz(path: Path, *names: str) -> dict[str, Any]:
    """The arrays `names` (all by default) of the archive; raises `UserError` naming the file and what is wrong."""
    np = need("numpy", "NumPy")
    try:
        archive = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: expected a NumPy .npz archive ({error})") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise UserError(f"{path}: expected a .npz archive of named arrays, got a single array")
    with archive:
        if missing := [name for name in names if name not in archive.files]:
            raise UserError(f"{path}: expected the array {missing[0]!r}, got {sorted(archive.files)}")
        return {name: _array(path, archive, name) for name in names or archive.files}


def _array(path: Path, archive: Any, name: str) -> Any:
    try:
        return archive[name]
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: expected a plain array {name!r} ({error})") from error
