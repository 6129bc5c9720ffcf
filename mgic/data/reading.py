"""Samples read by worker processes: the same batches with any number of them; broken samples; workers that die or hang."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import Stopped, UserError
from .seeds import random_key

PATIENCE = 300.0
"""Seconds that a batch may take before the worker that reads it counts as hanging."""


class WorkerLost(Stopped):
    """A process that reads samples died or hangs. Nothing else is wrong: the run can be continued."""


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


def in_order(length: int, batch_size: int) -> list[list[int]]:
    """All indices in order, ``batch_size`` at a time.

    Examples:
        >>> in_order(5, 2)
        [[0, 1], [2, 3], [4]]
    """
    return [list(range(i, min(i + batch_size, length))) for i in range(0, length, batch_size)]


_Trouble = tuple[int, str, bool]
"""Index of a sample, why it cannot be read, and whether it may be skipped."""
_Pair = tuple[Tensor, Tensor]


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
