"""How cases are timed: in turns, each in a process of its own, asked again where somebody else has a share of the processor.

A process of its own, because the thread pools of different runtimes disturb one another in one process, and because memory
and crashes are then its own. Only one process computes at a time: in every round each is asked once, in turn, so that
whatever else the machine does falls on all alike. Before and after each time taken, the process multiplies two small
matrices: if that takes longer than it can, somebody else has a share of the processor (on a virtual machine nobody sees
who), and it is asked again.
"""

import ctypes
import gc
import multiprocessing
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..runtime.paths import PathUnavailable, Run, relative_error
from .cases import Case

TOLERANCE = 1e-4
"""Largest relative difference from eager PyTorch of a path that counts."""
PAUSE = 0.05
"""Seconds between two processes: what it takes idle threads of a runtime to stop spinning."""
QUIET = 1.2
"""Times the shortest time of the reference computation, up to which a process counts as undisturbed."""
TRIES = 4
"""How often a process is asked in a round until it is undisturbed; after that its least disturbed answer counts."""


@dataclass(frozen=True)
class Timing:
    """What was found for a case.

    Args:
        case: What was timed.
        seconds: Time of one call in each round: the median of the calls of the round.
        error: Largest relative difference from eager PyTorch.
        build_seconds: What it took to make the path from the network, its libraries loaded before.
        peak_mib: Most memory in a call beyond what the process held before the network was made (libraries loaded), weights
            and what making the path left behind included; None where the system does not tell.
        reason: Why there is no time.
        disturbed: In how many rounds others had a share of the processor, however often it was asked.
    """

    case: Case
    seconds: tuple[float, ...] = ()
    error: float | None = None
    build_seconds: float | None = None
    peak_mib: float | None = None
    reason: str | None = None
    disturbed: int = 0

    @property
    def median(self) -> float:
        """Median of the rounds, in seconds; infinite where there is no time."""
        return statistics.median(self.seconds) if self.seconds else float("inf")


@dataclass(frozen=True)
class _Answer:
    """Time of a call, and of the reference computation before and after."""

    seconds: float
    references: tuple[float, ...]


def _reference() -> float:
    """Time of a small matrix product, in seconds."""
    matrix = torch.ones(256, 256)
    times = []
    for _ in range(9):
        began = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _serve(pipe: Connection, case: Case) -> None:
    """Make the path and say how that went; then, each time it is asked, say how long a call takes."""
    torch.set_num_threads(case.threads)
    with suppress(EOFError, ConnectionError):  # nobody asks any more
        try:
            timing, run, x = _prepare(case)
        except UserError as error:
            pipe.send(Timing(case, reason=str(error)))
            return
        pipe.send(timing)
        while True:
            seconds = pipe.recv()
            before, took, after = _reference(), _time_call(run, x, seconds), _reference()
            pipe.send(_Answer(took, (before, after)))


def _prepare(case: Case) -> tuple[Timing, Run, Tensor]:
    case.network.load_libraries(case)
    gc.collect()
    before = _resident("VmRSS")
    make, x, expected = case.network.prepare(case)
    began = time.perf_counter()
    run = make()
    found = run(x)
    took = time.perf_counter() - began
    error = None if expected is None else relative_error(found, expected)
    if error is not None and error > TOLERANCE:
        raise PathUnavailable(f"differs from eager by {error:.1e}")
    del make, expected, found
    gc.collect()
    with suppress(OSError, AttributeError):  # memory that was freed goes back to the system, where the C library can
        ctypes.CDLL(None).malloc_trim(0)
    peak = _peak(lambda: run(x))
    held = None if peak is None or before is None else (peak - before) / 2**20
    return Timing(case, error=error, build_seconds=took, peak_mib=held), run, x


def _time_call(run: Run, x: Tensor, seconds: float) -> float:
    """Median time of the calls that fit into ``seconds``, at least one, after an untimed one."""
    run(x)
    times: list[float] = []
    while sum(times) < seconds:
        began = time.perf_counter()
        run(x)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _resident(name: str) -> int | None:
    """A figure of this process's memory in bytes, by Linux's name."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    words = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith(name)).split()
    return int(words[1]) * 1024


def _peak(call: Callable[[], object]) -> int | None:
    """Most bytes of memory during a call."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is forgotten
        call()
        return _resident("VmHWM")
    return None


class _Worker:
    """The process of one case."""

    def __init__(self, context: Any, case: Case, serve: Callable[[Connection, Case], None]) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, case), daemon=True)
        self.process.start()
        theirs.close()
        self.timing = Timing(case)
        self.found: list[tuple[float, bool]] = []  # each time taken, and whether it was disturbed

    def receive(self) -> Any:
        """Return its next answer; None if it died, which is then the reason."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            self.timing = Timing(self.timing.case, reason=f"its process ended with status {self.process.exitcode}")
            return None

    def ask(self, seconds: float, fastest: dict[int, float]) -> None:
        """Time it once, if it can be timed. ``fastest``: time of the reference computation, by the number of threads."""
        answers: list[_Answer] = []
        threads = self.timing.case.threads
        while self.timing.reason is None and len(answers) < TRIES:
            time.sleep(PAUSE)
            with suppress(ConnectionError):  # it died since: receive says so
                self.pipe.send(seconds)
            answer = self.receive()
            if answer is None:
                return
            answers.append(answer)
            fastest[threads] = min(fastest.get(threads, float("inf")), *answer.references)
            if max(answer.references) <= QUIET * fastest[threads]:
                break
        if answers:
            best = min(answers, key=lambda answer: max(answer.references))
            self.found.append((best.seconds, max(best.references) > QUIET * fastest[threads]))

    def result(self) -> Timing:
        """What was found after the first time, when nobody knew yet how fast the reference computation can be."""
        if self.timing.reason is not None:
            return self.timing
        counted = self.found[1:]
        disturbed = sum(one[1] for one in counted)
        return replace(self.timing, seconds=tuple(one[0] for one in counted), disturbed=disturbed)

    def stop(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def measure(
    cases: Sequence[Case],
    rounds: int,
    seconds: float,
    serve: Callable[[Connection, Case], None] = _serve,
) -> list[Timing]:
    """Time cases in the same rounds.

    Args:
        cases: What to time; all are held in memory at once.
        rounds: How often each is asked.
        seconds: How long each computes in a round.
        serve: What the process of a case does.
    """
    with _workers(cases, serve) as workers:
        fastest: dict[int, float] = {}
        for _ in range(1 + rounds):
            for worker in workers:
                worker.ask(seconds, fastest)
        return [worker.result() for worker in workers]


@contextmanager
def _workers(cases: Sequence[Case], serve: Callable[[Connection, Case], None]) -> Iterator[list[_Worker]]:
    """The processes of the cases, ready to be asked; as many prepare themselves at once as there are processors."""
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([__name__])  # PyTorch is imported once, not by each
    workers: list[_Worker] = []
    waiting, preparing = deque(cases), dict[Any, _Worker]()
    try:
        while waiting or preparing:
            while waiting and len(preparing) < (os.cpu_count() or 1):
                workers.append(_Worker(context, waiting.popleft(), serve))
                preparing[workers[-1].pipe] = workers[-1]
            for pipe in wait(list(preparing)):
                worker = preparing.pop(pipe)
                worker.timing = worker.receive() or worker.timing
        yield workers
    finally:
        for worker in workers:
            worker.stop()
