"""Files that survive: atomic writes, room on the disk, checksums.

A file is written under a temporary name in its own folder, flushed to the disk and renamed: whoever reads the final name
sees the old contents or the new ones, never a part. Other folders do not work: renaming across file systems copies.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from ..errors import UserError

TEMPORARY = ".tmp-"


class DiskFull(OSError):  # noqa: N818 - names the trouble
    """Not enough room for a checkpoint; the previous one is untouched."""

    def __init__(self, folder: Path, needed: int, free: int):
        super().__init__(errno.ENOSPC, f"disk full: {needed:,} bytes needed and {free:,} free in {folder}")

    def __str__(self) -> str:
        return str(self.strerror)


@contextmanager
def told_when_full(folder: Path, needed: int = 0) -> Iterator[None]:
    """Turn what writers raise on a full disk into `DiskFull`; torch, safetensors and others have errors of their own.

    Args:
        folder: Where the block writes.
        needed: Bytes that it will write, where this is known; they are looked for first.
    """

    def free() -> int:
        return shutil.disk_usage(folder).free

    if free() < needed:
        raise DiskFull(folder, needed, free())
    try:
        yield
    except DiskFull:
        raise
    except (OSError, RuntimeError, UserError, SafetensorError) as error:
        left, first = free(), error.__context__
        if isinstance(error, RuntimeError) and isinstance(first, OSError):  # torch's writer complains once more
            error = first
        if getattr(error, "errno", None) in _NO_ROOM or "No space left" in str(error) or left < needed:
            raise DiskFull(folder, needed or RESERVE, left) from error
        raise error


_NO_ROOM = (errno.ENOSPC, *([errno.EDQUOT] if sys.platform != "win32" else []))
RESERVE = 65_536
"""Bytes for what is written beside the weights."""


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call ``write`` with an open file; ``path`` holds all of what it wrote, or what was there before.

    Raises:
        DiskFull: The disk is full.
        OSError: Any other trouble with the file. The temporary file is gone in every case.
    """
    with staged(path) as temporary, temporary.open("wb") as file:
        write(file)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object atomically. NaN and infinity are no JSON: they raise ``ValueError``."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def staged(path: Path, sidecar: bool = False, needed: int = 0) -> Iterator[Path]:
    """A temporary path beside ``path`` that becomes ``path``, after its sidecar, when the block ends well."""
    short = hashlib.sha256(path.name.encode()).hexdigest()[:16]  # the name itself may be as long as names can be
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{short}")
    try:
        with told_when_full(path.parent, needed):
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors replaces the file by a private one
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest() if sidecar else ""
            if sidecar:
                path.unlink(missing_ok=True)  # a file that exists must match its sidecar at every moment
                write_text(sidecar_of(path), f"{digest}  {path.name}\n")
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":  # a folder cannot be opened there; NTFS journals the rename itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sidecar_of(path: Path) -> Path:
    """Where the SHA-256 of a file is."""
    return path.with_name(path.name + ".sha256")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as ``sha256sum`` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: The file is damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: damaged or not readable ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged: expected a JSON object")
    return value


def check_writable(path: Path) -> None:
    """Find out before any work whether a file can be written: its folder is made, and a probe written in it.

    Raises:
        UserError: It cannot; the message says why.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder, but a file is to be written there")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.parent / f"{TEMPORARY}probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def alive(process: int) -> bool:
    """Whether a process of this machine still runs."""
    if sys.platform == "win32":  # where asking would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
