"""Files that others made, and may be missing or damaged: every failure is one error that names the file."""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BROKEN, UserError


class Missing(UserError):  # noqa: N818  (what is wrong, not that something is)
    """A set is not where it was looked for: what is expected there, and what is. `load_data` adds where to get it.

    Args:
        what: The set, or the part of it.
        folder: Where it was looked for.
        expected: Files or folders.
    """

    def __init__(self, what: str, folder: Path, expected: Sequence[str]):
        found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else []
        super().__init__(
            f"{what}: not found in {folder}; expected {', '.join(expected)}; found {', '.join(found) or 'nothing'}"
        )


UNREADABLE = (
    *BROKEN,
    OSError,
    EOFError,
    SyntaxError,
    MemoryError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What readers of other libraries have been seen to raise for damaged files (``tests/test_fuzz.py``)."""


def read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of an ``.npz`` file by name; that of an ``.npy`` file is called ``points``.

    Raises:
        UserError: The file is damaged, or none of these; the message names it.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                file.seek(0)
                _check_header(path, file)
                file.seek(0)
                return {"points": np.load(file, allow_pickle=False)}
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                for name in archive.zip.namelist():
                    with archive.zip.open(name) as member:
                        _check_header(path, member)
                return {name: archive[name] for name in archive.files}
    except UNREADABLE as error:
        raise UserError(f"{path}: not a readable {path.suffix} file ({' '.join(str(error).split())})") from error


def _check_header(path: Path, file: Any) -> None:
    versions: dict[Any, Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in versions:
        raise ValueError(f"version {version} of NumPy's format is not known")
    shape, _, dtype = versions[version](file)
    check_announced(path, math.prod(shape) * dtype.itemsize)


MOST_SQUEEZED = 1100
"""Bytes that a byte of a file can stand for: deflate reaches 1,032."""


def check_announced(path: Path, announced: int) -> None:
    """Refuse to make room for more than a file can hold.

    Raises:
        ValueError: The array it announces is larger.
    """
    size = path.stat().st_size
    if announced > MOST_SQUEEZED * size:
        raise ValueError(f"an array of {announced:,} bytes is announced in a file of {size:,}")
