"""Images in tar files as WebDataset has them, read at any place: an index that is made once says where each one is.

A sample is a run of files of one name up to the first dot of its last part: ``n01/0001.jpg``, ``n01/0001.cls``. With an
index they are a data set like any other: the order of every epoch, resuming and shares of batches are those of image folders.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import secrets
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..cache import cache_folder
from ..errors import UserError
from .base import Data
from .files import UNREADABLE, Missing
from .images import IMAGE_SUFFIXES, IMAGENET_MEAN, IMAGENET_STD, ImageFiles
from .reading import BadSamples
from .tasks import classification

MOST_LABEL_BYTES = 1 << 20
"""A ``json`` or ``cls`` file larger than this is no label."""
_SPLIT = re.compile(r"(?<![a-z])(train|val|test)")
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")  # as webdataset cuts them; hidden files are none


class Member(io.BytesIO):
    """The bytes of a file in a tar file, which say where they are from."""

    def __init__(self, contents: bytes, place: str):
        super().__init__(contents)
        self.place = place

    def __str__(self) -> str:
        return self.place


@dataclass(frozen=True)
class Members(Sequence[tuple[IO[bytes], int]]):
    """The images of some tar files and their labels, read when they are asked for.

    Args:
        files: The tar files.
        table: int64 ``(samples, 4)``: number of the file, offset, bytes, label.
    """

    files: tuple[Path, ...]
    table: np.ndarray[Any, Any]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        """An image file, opened, and its label."""
        number, offset, size, label = self.table[index].tolist()
        path = self.files[number]
        with path.open("rb") as file:
            file.seek(offset)
            contents = file.read(size)
        if len(contents) < size:
            raise UserError(f"{path}: ends before the image at byte {offset:,}; it has changed since training began")
        return Member(contents, f"{path}, image at byte {offset}"), label

    def digest(self) -> str:
        """A hash of the names of the files, and of the places and labels in them; the pixels are not read."""
        both = hashlib.sha256(repr([path.name for path in self.files]).encode())
        both.update(self.table.tobytes())
        return both.hexdigest()


class ShardedImages(ImageFiles):
    """Images in tar files, decoded by worker processes; otherwise as `ImageFiles`."""

    def digest(self) -> str:
        """See `Members.digest`."""
        assert isinstance(self.samples, Members)
        return self.samples.digest()


def folder(path: Path, *, image_size: int = 224, num_classes: int | None = None, on_bad_sample: str = "error") -> Data:
    """A folder of tar files: ``train*.tar`` and ``val*.tar`` (or ``test``), or any names in folders so called.

    Something may stand before the word, if no letter does: ``imagenet1k-train-0000.tar``, not ``constrained.tar``.
    A sample has one image (jpg, png, webp, ...) and a ``cls`` file with the number of its class, or a ``json`` file with
    such a ``label``. The first time, the headers of all files are read; the index is kept in the cache
    folder (``MGIC_CACHE``). Tar files compressed as a whole cannot be read at any place, and are refused.

    Args:
        path: The folder.
        image_size: Height and width of the network's input, in pixels.
        num_classes: Default: the largest training label plus one.
        on_bad_sample: As of image folders.
    """
    for name, value in (("image_size", image_size), ("num_classes", 1 if num_classes is None else num_classes)):
        if type(value) is not int or value < 1:
            raise UserError(f"data_args: {name} must be a positive integer, got {value!r}")
    found = _by_split(path)
    train, test = found["train"], found["val"] or found["test"]
    if not (train and test):
        raise Missing(f"shards {path}", path, ["train*.tar or train/*.tar", "val*.tar or val/*.tar (or test)"])
    splits = [_indexed(files) for files in (train, test)]
    classes = int(splits[0].table[:, 3].max()) + 1 if num_classes is None else num_classes
    for part in splits:
        largest = int(part.table[:, 3].max())
        if largest >= classes:
            number = int(part.table[part.table[:, 3].argmax(), 0])
            raise UserError(f"{part.files[number]}: has label {largest}, but {classes} classes are 0 ... {classes - 1}")
    counts = [
        f"{len(part):,} {name} images in {len(part.files):,} shards"
        for part, name in zip(splits, ("train", "test"), strict=True)
    ]
    return Data(
        name=str(path),
        train=ShardedImages(splits[0], image_size, bad=BadSamples.policy(on_bad_sample, len(splits[0]))),
        test=ShardedImages(splits[1], image_size, bad=BadSamples.policy(on_bad_sample, len(splits[1]))),
        task=classification(classes),
        input_size=(3, image_size, image_size),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        cropped=True,
        note=f"shards of {path.name}: {' and '.join(counts)}",
    )


def _by_split(path: Path) -> dict[str, tuple[Path, ...]]:
    """The tar files of each split.

    Raises:
        UserError: Of one of them, name and folder say different things.
    """
    found: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    for file in sorted(path.rglob("*.tar")):
        words = set(_SPLIT.findall(file.relative_to(path).as_posix().lower()))
        if len(words) > 1:
            raise UserError(f"{file}: is it for {' or for '.join(sorted(words))}? Its name and its folders say both")
        for word in words:
            found[word].append(file)
    return {word: tuple(files) for word, files in found.items()}


def _indexed(files: tuple[Path, ...]) -> Members:
    """The index of some tar files: the one that is kept, as long as none of them has changed."""
    facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    kept = cache_folder() / "shards" / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.npy"
    table = _kept(kept, len(files))
    if table is not None:
        return Members(files, table)
    rows = [(number, *row) for number, path in enumerate(files) for row in read_shard(path)]
    table = np.array(rows, np.int64).reshape(-1, 4)
    if not len(table):
        raise UserError(f"{files[0]}: no image in it, nor in the other {len(files) - 1} shards")
    kept.parent.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_name(f".tmp-{secrets.token_hex(8)}-{kept.name}")  # machines may share the folder
    with temporary.open("wb") as file:
        np.save(file, table)
    os.replace(temporary, kept)
    return Members(files, table)


def _kept(path: Path, files: int) -> np.ndarray[Any, Any] | None:
    """The index that is kept of so many files; None where there is none, or a damaged one, of which it warns."""
    try:
        table: np.ndarray[Any, Any] = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        return None
    except UNREADABLE as error:
        warnings.warn(f"{path.name} cannot be read and is written anew: {' '.join(str(error).split())}", stacklevel=5)
        return None
    rows = isinstance(table, np.ndarray) and table.dtype == np.int64 and table.ndim == 2 and table.shape[1] == 4
    if not (rows and len(table) and table.min() >= 0 and table[:, 0].max() < files):
        warnings.warn(f"{path.name} holds no index of shards and is written anew", stacklevel=5)
        return None
    return table


def read_shard(path: Path) -> Iterator[tuple[int, int, int]]:
    """Offset, bytes and label of each image of a tar file, in order; of the images nothing is read.

    Raises:
        UserError: It is no plain tar file, is cut off, or a sample has not one image and one label.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            end = path.stat().st_size
            regular = (member for member in archive if member.isreg())
            named = ((match, member) for member in regular if (match := _NAME.fullmatch(member.name)))
            for key, run in itertools.groupby(named, lambda pair: pair[0][1]):
                yield _sample(path, archive, key, {match[2].lower(): member for match, member in run}, end)
    except (tarfile.TarError, OSError, EOFError, OverflowError) as error:
        raise UserError(
            f"{path}: not a tar file that can be read at any place ({error}); compressed ones cannot"
        ) from error


def _sample(
    path: Path, archive: tarfile.TarFile, key: str, parts: dict[str, tarfile.TarInfo], end: int
) -> tuple[int, int, int]:
    images = [member for suffix, member in parts.items() if f".{suffix}" in IMAGE_SUFFIXES]
    if len(images) != 1:
        raise UserError(f"{path}: sample {key} has {len(images)} images ({', '.join(parts)}); expected one")
    if images[0].issparse() or images[0].offset_data + images[0].size > end:
        raise UserError(f"{path}: sample {key} is cut off or sparse; fetch the file again")
    return images[0].offset_data, images[0].size, _label(path, archive, key, parts)


def _label(path: Path, archive: tarfile.TarFile, key: str, parts: dict[str, tarfile.TarInfo]) -> int:
    suffix = next((s for s in ("cls", "json") if s in parts), None)
    if suffix is None:
        raise UserError(f"{path}: sample {key} has no label ({', '.join(parts)}); expected a cls or a json file")
    file = archive.extractfile(parts[suffix])
    text = file.read(MOST_LABEL_BYTES) if file else b""
    try:
        found = int(text) if suffix == "cls" else json.loads(text)["label"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path}: {key}.{suffix} holds no label ({type(error).__name__}: {error})") from error
    if type(found) is not int or not 0 <= found < 1 << 31:
        raise UserError(f"{path}: {key}.{suffix}: the label must be a class number from 0 on, got {found!r}")
    return found
