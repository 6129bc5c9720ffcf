"""Checkpoints that can be verified: the state of a run, with a sidecar that holds its SHA-256.

``sha256sum -c`` reads the sidecar. It is there because neither PyTorch's nor safetensors' format notices a flipped byte, and
is renamed first: a checkpoint that exists can always be verified.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import BROKEN, UserError
from .files import RESERVE, sidecar_of, staged

SCHEMA = 1


class CorruptCheckpoint(UserError):  # noqa: N818 - names the trouble
    """A checkpoint whose bytes are not the ones that were written, or that is no checkpoint at all.

    Args:
        path: The file.
        size: Its size in bytes.
        expected: What should have been there.
    """

    def __init__(self, path: Path, size: int, expected: str):
        super().__init__(f"{path}: corrupt checkpoint of {size:,} bytes: expected {expected}")
        self.path, self.size, self.expected = path, size, expected


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` (tensors and plain values) and its sidecar.

    Raises:
        DiskFull: Less than 1.2 times the size of the tensors is free, or the disk filled up meanwhile.
    """
    needed = int(1.2 * sum(t.numel() * t.element_size() for t in _tensors(state))) + RESERVE
    with staged(path, True, needed) as temporary, temporary.open("wb") as file:
        torch.save(dict(state), file)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU after checking its SHA-256. Nothing in the file is ever executed.

    Raises:
        CorruptCheckpoint: The sidecar is missing, the bytes differ from it, or the contents are not a checkpoint's.
        UserError: The checkpoint was written by a newer version of this library.
    """
    with path.open("rb") as file:
        verify(path, file)
        if file.read(4) != b"PK\x03\x04":  # torch.load also reads two older formats, which we never write
            raise CorruptCheckpoint(path, path.stat().st_size, "a zip file, as torch.save writes it")
        file.seek(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd pickles, whose end is one of the errors below
                state = torch.load(file, map_location="cpu", weights_only=True)
        except _UNREADABLE as error:
            # Right checksum and wrong contents: not ours, perhaps hostile. torch's advice to trust it is left out.
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = next((line.strip() for line in lines if "Unpickler" in line), lines[0]).partition(". Please")[0]
            raise CorruptCheckpoint(path, path.stat().st_size, f"weights and plain values ({reason})") from error
    if not isinstance(state, dict) or not isinstance(state.get("schema"), int):
        raise CorruptCheckpoint(path, path.stat().st_size, "a mapping with a schema version")
    if state["schema"] != SCHEMA:
        raise UserError(f"{path}: checkpoint of schema {state['schema']}; this version of mgic reads schema {SCHEMA}")
    return state


# What unpickling hostile bytes has been seen to raise (tests/test_checkpoint.py fuzzes it).
_UNREADABLE = (*BROKEN, EOFError, OSError, MemoryError, struct.error, pickle.UnpicklingError)


def verify(path: Path, file: IO[bytes]) -> None:
    """Compare the file with its sidecar and rewind it."""
    size = os.fstat(file.fileno()).st_size
    try:
        words = sidecar_of(path).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptCheckpoint(path, size, f"its checksum in {sidecar_of(path).name}") from error
    if len(words) != 2 or words[1] != path.name:
        raise CorruptCheckpoint(path, size, f"a line 'SHA256  {path.name}' in {sidecar_of(path).name}")
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    if digest != words[0]:
        raise CorruptCheckpoint(path, size, f"sha256 {words[0][:16]}..., got {digest[:16]}...")
    file.seek(0)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, newest first; the names sort by step."""
    return sorted(folder.glob("step-*.ckpt"), reverse=True)


def newest_checkpoint(folder: Path, strict: bool = False) -> dict[str, Any] | None:
    """See `mgic.training.folder.RunFolder.newest`; this one needs no lock."""
    corrupt: list[CorruptCheckpoint] = []
    for path in list_checkpoints(folder):
        try:
            state = load_checkpoint(path)
        except CorruptCheckpoint as error:
            if strict:
                raise
            corrupt.append(error)
        else:
            for damage in corrupt:
                warnings.warn(f"{damage}; continuing from {path.name}", stacklevel=2)
            return state
    if corrupt:
        raise corrupt[0]
    return None
