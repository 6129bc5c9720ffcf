"""What every data set is: two splits, a task and provenance; every random number is a function of its purpose and place."""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from .tasks import Task


def random_key(*parts: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. ``random_key("order", seed, epoch)``: nearby parts give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def epoch_order(length: int, seed: int, epoch: int) -> Tensor:
    """The order in which epoch ``epoch`` visits ``length`` samples: ``(length,)`` int64, a function of its arguments."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(random_key("order", seed, epoch)))


@dataclass(frozen=True)
class Augmentation:
    """What a recipe asks to be done to training samples at random; a split refuses what it cannot do.

    Args:
        crop_padding: Pad by so many black pixels on each side, then crop the old size at random; 0 is off.
        flip: Mirror half of the images.
        seed: Together with the step (in memory) or the epoch and the index (files) it decides everything.
    """

    crop_padding: int = 0
    flip: bool = False
    seed: int = 0

    def refuse(self, samples: str) -> None:
        """Refuse padded crops and flips of what is no image in memory.

        Raises:
            UserError: One of them is asked for.
        """
        if self.crop_padding or self.flip:
            raise UserError(
                f"crop_padding={self.crop_padding} and flip={self.flip} are for images: {samples} need 0 and False"
            )


class Split(Protocol):
    """One half of a data set. Batches are (inputs, targets), both with one entry a sample, on its device."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def to(self, device: torch.device) -> Split:
        """The same samples where the network is."""
        ...

    def digest(self) -> str:
        """A hash that tells these samples (or their files) and targets from others."""
        ...

    def check(self, augmentation: Augmentation) -> None:
        """Refuse an augmentation these samples cannot have, before training begins."""
        ...

    def training_batches(
        self, batches: Sequence[Tensor], augmentation: Augmentation, epoch: int, step: int, workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented batches of the given indices; the first of them belongs to step ``step``.

        Whatever is random must follow from the seed and the epoch, the step or a sample's index alone.
        """
        ...

    def evaluation_batches(self, batch_size: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples once, in order, without augmentation; batches may be smaller."""
        ...


@dataclass(frozen=True)
class Data:
    """A data set, ready to train on.

    Args:
        name: The name or path it was asked for by.
        train: Training samples.
        test: Samples the network is judged by.
        task: What is to be learnt.
        input_size: Of one sample as the network sees it in training, ``(C, ...)``.
        note: Provenance: where the samples are from, how many, and what is missing.
        mean: Of the training inputs, per channel, in units of ``scale``; empty where inputs are fed as they are.
        std: Standard deviation, likewise.
        scale: What 1 stands for: 255 for pixels.
    """

    name: str
    train: Split
    test: Split
    task: Task
    input_size: tuple[int, ...]
    note: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    scale: float = 255

    @property
    def num_classes(self) -> int:
        """Outputs of a network for this set, by the name timm has for them."""
        return self.task.outputs

    def to(self, device: torch.device) -> Data:
        """The same data where the network is."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def model_arguments(self) -> dict[str, Any]:
        """What a network for this set must be built with."""
        return {"num_classes": self.num_classes, "in_chans": self.input_size[0]}

    def normalizer(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """The function from a batch to the network's float32 input: ``(x / scale - mean) / std``."""
        if not self.mean:
            return Tensor.float
        shape = (-1, *[1] * (len(self.input_size) - 1))
        mean = torch.tensor(self.mean, device=device).view(shape) * self.scale
        std = torch.tensor(self.std, device=device).view(shape) * self.scale
        return lambda x: (x.float() - mean) / std

    @property
    def bad_samples(self) -> int:
        """Training samples that could not be read so far; others were taken instead. 0 where that is an error."""
        bad = getattr(self.train, "bad", None)
        return len(bad.found) if isinstance(bad, BadSamples) else 0

    def fingerprint(self) -> dict[str, Any]:
        """Plain values that tell this data set from another: a resumed run must find the same ones."""
        return {
            "name": self.name,
            "task": self.task.name,
            "classes": list(self.task.classes),
            "train": len(self.train),
            "test": len(self.test),
            "num_classes": self.num_classes,
            "digest": hashlib.sha256(f"{self.train.digest()} {self.test.digest()}".encode()).hexdigest(),
            "input_size": list(self.input_size),
            "mean": list(self.mean),
            "std": list(self.std),
        }


class BadSample(UserError):  # noqa: N818  (what is wrong, not that something is)
    """A sample that cannot be read; the message names its file."""


MOST_BAD = 0.01
"""Share of the samples of a split that may be skipped; more of them stop the run."""


@dataclass
class BadSamples:
    """The samples of a split that could not be read, where its loader was told to skip such.

    Args:
        total: Samples of the split.
        found: By index, why.
    """

    total: int
    found: dict[int, str] = field(default_factory=dict)

    @classmethod
    def policy(cls, on_bad_sample: str, total: int) -> BadSamples | None:
        """``skip`` gives a place to note them in, ``error`` none.

        Raises:
            UserError: It is neither.
        """
        if on_bad_sample not in ("error", "skip"):
            raise UserError(f"data_args: on_bad_sample must be 'error' or 'skip', got {on_bad_sample!r}")
        return cls(total) if on_bad_sample == "skip" else None

    def note(self, index: int, reason: str) -> None:
        """Note one.

        Raises:
            UserError: With it they are more than `MOST_BAD` of all.
        """
        self.found[index] = reason
        if len(self.found) > MOST_BAD * self.total:
            raise UserError(
                f"{len(self.found)} of {self.total:,} samples cannot be read, more than {MOST_BAD:.0%}; the last: {reason}"
            )


Read = Callable[[int], tuple[Tensor, Tensor]]
"""``index -> (input, target)``; it takes its random numbers from PyTorch's generator, and raises `UserError`."""


def read_batches(
    read: Read,
    batches: Sequence[Sequence[int]],
    key: tuple[int | str, ...],
    workers: int,
    device: torch.device | str,
    bad: BadSamples | None = None,
    others: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of samples that worker processes read, on ``device``.

    Each sample is read with PyTorch's generator seeded by ``key`` and its index alone, so neither the number of workers
    nor the place where a run was resumed changes anything.

    Args:
        read: Reads one sample. It goes to other processes: a function of a module, or a `functools.partial` of one.
        batches: Indices.
        key: What the random numbers depend on besides the index, e.g. ``("sample", seed, epoch)``.
        workers: Number of processes; 0 reads here.
        device: Where the batches go.
        bad: Where samples that cannot be read (`BadSample`) are noted; None makes the first of them an error.
        others: So many samples there are to take another from instead of such a one; which follows from ``key`` and the
            index. With 0 it is left out.

    Raises:
        UserError: ``read`` raised one, or too many samples cannot be read.
        RuntimeError: A worker died.
    """
    # Forked workers notice within seconds when their parent was killed; those of a fork server never do.
    context = "fork" if workers and sys.platform == "linux" else None
    iterator = iter(
        DataLoader(
            _Samples(read, key, others if bad else 0),
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=list,
            multiprocessing_context=context,
        )
    )
    for indices in batches:
        try:
            samples = next(iterator)
        except (RuntimeError, ConnectionError, EOFError) as error:
            raise RuntimeError(
                f"a data worker died while reading samples {indices[0]} ... {indices[-1]}; likely causes: memory "
                f"(use fewer workers than {workers}) or a small /dev/shm. The run can be continued."
            ) from error
        for place, reason, skippable in itertools.chain.from_iterable(found for _, found in samples):
            if bad is None or not skippable:
                raise UserError(f"{reason} (sample {place})" if skippable else reason)
            bad.note(place, reason)
        whole = [sample for sample, _ in samples if sample is not None]
        if whole:
            inputs, targets = zip(*whole, strict=True)
            yield torch.stack(inputs).to(device), torch.stack(targets).to(device)


_Trouble = tuple[int, str, bool]
"""Index of a sample, why it cannot be read, and whether it may be skipped."""


@dataclass(frozen=True)
class _Samples(Dataset[tuple[tuple[Tensor, Tensor] | None, list[_Trouble]]]):
    """What the workers run. A broken file comes back as the text of its error: exceptions do not survive the trip.

    Args:
        read: Reads one sample.
        key: What the random numbers depend on besides the index.
        others: So many samples there are to choose another one from; 0 leaves a broken one out.
    """

    read: Read
    key: tuple[int | str, ...]
    others: int

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor] | None, list[_Trouble]]:
        place, found = index, []
        while True:
            # Of the CPU alone: a millisecond less a sample.
            torch.default_generator.manual_seed(random_key(*self.key, place))
            try:
                return self.read(place), found
            except UserError as error:
                skippable = isinstance(error, BadSample)
                found.append((place, str(error), skippable))
            if not skippable or not self.others or len(found) == 100:  # all of them bad: too many for any run
                return None, found
            place = random_key("instead", *self.key, index, len(found)) % self.others


def in_order(length: int, batch_size: int) -> list[list[int]]:
    """All indices in order, ``batch_size`` at a time.

    Examples:
        >>> in_order(5, 2)
        [[0, 1], [2, 3], [4]]
    """
    return [list(range(i, min(i + batch_size, length))) for i in range(0, length, batch_size)]


UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    SyntaxError,
    MemoryError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What readers of other libraries have been seen to raise for damaged files (``tests/test_fuzz.py``)."""

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


def missing(what: str, folder: Path, expected: Sequence[str]) -> UserError:
    """The error about a set that is not where it was looked for: what is expected there, and what is."""
    found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else []
    return UserError(
        f"{what}: not found in {folder}; expected {', '.join(expected)}; found {', '.join(found) or 'nothing'}; "
        "--download fetches named sets, --root names their folder"
    )
