"""What every data set is: two splits, a task and provenance; every random number is a function of its purpose and place."""

from __future__ import annotations

import hashlib
import math
import signal
import struct
import sys
import threading
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import BROKEN, Stopped, UserError
from .tasks import Task

T = TypeVar("T")

PATIENCE = 300.0
"""Seconds that a batch may take before the worker that reads it counts as hanging."""


class WorkerLost(Stopped):
    """A process that reads samples died or hangs. Nothing else is wrong: the run can be continued."""


def random_key(*parts: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. ``random_key("order", seed, epoch)``: nearby parts give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def epoch_order(length: int, seed: int, epoch: int) -> Tensor:
    """The order in which epoch ``epoch`` visits ``length`` samples: ``(length,)`` int64, a function of its arguments."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(random_key("order", seed, epoch)))


@dataclass(frozen=True)
class Share:
    """What one of several processes takes of each batch: the ``rank``-th of ``ranks`` equal parts.

    Batches, their order and their random numbers are those of all processes together; so none of them depends on how
    many there are.

    Args:
        rank: Number of the process.
        ranks: How many there are.

    Examples:
        >>> Share(1, 2).of(torch.arange(6)), Share(1, 2).turns([[0, 1], [2, 3], [4]])
        (tensor([3, 4, 5]), [[2, 3]])
    """

    rank: int = 0
    ranks: int = 1

    def of(self, batch: Tensor) -> Tensor:
        """The part of a batch to train on; ``ranks`` divides its length."""
        return batch.chunk(self.ranks)[self.rank]

    def turns(self, batches: Iterable[T]) -> list[T]:
        """The whole batches to evaluate: every ``ranks``-th."""
        return list(batches)[self.rank :: self.ranks]


WHOLE = Share()
"""All of each batch: one process."""


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
        self,
        batches: Sequence[Tensor],
        augmentation: Augmentation,
        epoch: int,
        step: int,
        workers: int,
        share: Share = WHOLE,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented batches of the given indices, or a share of each; the first of them belongs to step ``step``.

        Whatever is random must follow from the seed and the epoch, the step or a sample's index alone: a share of a batch
        is what one cuts out of the whole.
        """
        ...

    def evaluation_batches(
        self, batch_size: int, workers: int, share: Share = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples once, in order, without augmentation; batches may be smaller. A share is every so many-th batch."""
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
        cropped: Images are files of any size, judged on their centres (`mgic.data.images.centre_crop`), not as they are.
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
    cropped: bool = False

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

    def drawn(self, split: Split, samples: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        """Samples of a split drawn at random, always the same ones: not augmented, as a network gets them, and targets."""
        chosen = torch.split(epoch_order(len(split), 0, 0)[:samples], batch_size)
        normalize = self.normalizer(torch.device("cpu"))
        return [(normalize(x), y) for x, y in split.training_batches(chosen, Augmentation(), 0, 0, 0)]

    @property
    def bad_samples(self) -> frozenset[int]:
        """Indices of training samples that could not be read so far, and were skipped."""
        bad = getattr(self.train, "bad", None)
        return frozenset(bad.found) if isinstance(bad, BadSamples) else frozenset()

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
            "cropped": self.cropped,
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
        WorkerLost: A worker died, or sent nothing for `PATIENCE` seconds. The others are ended.
    """
    # Forked workers notice within seconds when their parent was killed; those of a fork server never do.
    context = "fork" if workers and sys.platform == "linux" else None
    iterator: Any = iter(
        DataLoader(
            _Samples(read, key, others if bad else 0),
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_batch,
            multiprocessing_context=context,
        )
    )
    with _deaths_are_asked_for() if workers else nullcontext():
        try:
            for number in range(len(batches)):
                found, batch = _next_batch(iterator, number, batches) if workers else next(iterator)
                for place, reason, skippable in found:
                    if bad is None or not skippable:
                        raise UserError(f"{reason} (sample {place})" if skippable else reason)
                    bad.note(place, reason)
                if batch is not None:
                    inputs, targets = batch
                    yield inputs.to(device), targets.to(device)
        finally:
            del iterator  # ends its processes


_Trouble = tuple[int, str, bool]
"""Index of a sample, why it cannot be read, and whether it may be skipped."""
_Pair = tuple[Tensor, Tensor]


def _batch(samples: Sequence[tuple[_Pair | None, list[_Trouble]]]) -> tuple[list[_Trouble], _Pair | None]:
    """Stack samples where they were read: a batch on its way takes two file descriptors, not two a sample."""
    found = [trouble for _, troubles in samples for trouble in troubles]
    whole = [sample for sample, _ in samples if sample is not None]
    if not whole or not all(skippable for *_, skippable in found):
        return found, None
    inputs, targets = zip(*whole, strict=True)
    return found, (torch.stack(inputs), torch.stack(targets))


@contextmanager
def _deaths_are_asked_for() -> Iterator[None]:
    """Keep PyTorch's handler of SIGCHLD away: it raises wherever the main thread is, in the middle of a step too."""
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _next_batch(iterator: Any, number: int, batches: Sequence[Sequence[int]]) -> Any:
    """Wait for batch ``number`` as long as the workers live and `PATIENCE` lasts."""
    processes, trouble = iterator._workers, []
    awaited = number % len(processes)

    def give_up() -> None:
        trouble.append(_said_of(awaited, processes, number, batches))
        _end(processes)

    # Not PyTorch's timeout: a worker that is stopped may owe us the rest of a batch, and that is waited for without one.
    late = threading.Timer(PATIENCE, give_up)
    late.daemon = True
    late.start()
    try:
        return next(iterator)
    except (RuntimeError, OSError, EOFError) as error:
        if isinstance(error, ConnectionError | EOFError):  # it is dying
            processes[awaited].join(1)
        dead = [place for place, process in enumerate(processes) if not process.is_alive()]
        if not dead:
            _end(processes)  # the error that goes up holds on to the iterator, which would end them
            raise
        trouble.append(_said_of(dead[0], processes, number, batches))  # after what `give_up` said
    finally:
        late.cancel()
    _end(processes)
    raise WorkerLost(trouble[0])


def _end(processes: Sequence[Any]) -> None:
    """Kill workers: asking would take seconds each, and one that hangs does not listen."""
    for process in processes:
        process.kill()
        process.join(5)


def _said_of(place: int, processes: Sequence[Any], number: int, batches: Sequence[Sequence[int]]) -> str:
    """Name a worker, the samples it had, and why it may be lost. Workers take batches in turns."""
    count, process = len(processes), processes[place]
    mine = number + (place - number) % count
    indices = batches[min(mine, len(batches) - 1)]
    samples = ", ".join(map(str, indices[:16])) + (f" and {len(indices) - 16} more" if len(indices) > 16 else "")
    if process.is_alive():
        return (
            f"data worker {place} of {count} (process {process.pid}) sent nothing for {PATIENCE:g} s; it was reading "
            f"samples {samples}; likely causes: a folder on a network that does not answer, or a file that blocks. "
            "The same command continues the run"
        )
    code = process.exitcode or 0
    how = f"by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with status {code}"
    return (
        f"data worker {place} of {count} (process {process.pid}) was ended {how} while it was reading samples {samples}; "
        f"likely causes: too little memory (use fewer workers than {count}) or a small /dev/shm. The same command "
        "continues the run"
    )


@dataclass(frozen=True)
class _Samples(Dataset[tuple[_Pair | None, list[_Trouble]]]):
    """What the workers run. A broken file comes back as the text of its error: exceptions do not survive the trip.

    Args:
        read: Reads one sample.
        key: What the random numbers depend on besides the index.
        others: So many samples there are to choose another one from; 0 leaves a broken one out.
    """

    read: Read
    key: tuple[int | str, ...]
    others: int

    def __getitem__(self, index: int) -> tuple[_Pair | None, list[_Trouble]]:
        place, found = index, list[_Trouble]()
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
