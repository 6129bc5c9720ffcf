"""Networks timed side by side: every way to run each, in turns, with medians and spreads, outputs checked.

Each way runs in a process of its own, because the thread pools of different runtimes disturb one another in one process, and
because memory and crashes are then its own. Only one process computes at a time: in every round each is asked once, in
turn, so that whatever else the machine does falls on all alike. Before and after each time taken, the process multiplies two
small matrices: if that takes longer than it can, somebody else has a share of the processor (on a virtual machine nobody
sees who), and it is asked again.
"""

import csv
import ctypes
import gc
import io
import json
import multiprocessing
import os
import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.models import reparameterize_model
from torch import Tensor, nn
from torch.nn import functional as F

from .counting import Cost, cost
from .errors import UserError, suggest
from .exporting import describe_artefact, format_of, load_artefact
from .formats import FORMATS
from .models import TORCHVISION, build_model
from .runtime.paths import PATHS, PathUnavailable, Run, eager, relative_error
from .survey import input_size_of
from .training.fast import fast_training_

TOLERANCE = 1e-4
"""Largest relative difference from eager PyTorch of a path that counts."""
PAUSE = 0.05
"""Seconds between two processes: what it takes idle threads of a runtime to stop spinning."""
QUIET = 1.2
"""Times the shortest time of the reference computation, up to which a process counts as undisturbed."""
TRIES = 4
"""How often a process is asked in a round until it is undisturbed; after that its least disturbed answer counts."""


@torch.no_grad()
def random_norms_(model: nn.Module) -> None:
    """Give the norms of a network that nobody trained random scales and variances.

    As they are initialised, some networks multiply a branch by zero, and no check of an output would see what it does.
    """
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_var is not None:
            for scale in (norm.weight, norm.running_var):
                scale.uniform_(0.5, 1.5)


def _flow(value: Any) -> str:
    """A value as YAML writes it on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("...\n").strip()


@dataclass(frozen=True)
class Network:
    """A network to time, with random weights; where timm can merge its branches for inference, they are merged.

    Args:
        name: Registered name.
        args: Arguments of the network.
        size: Height and width of its input; its own by default.
    """

    name: str
    args: Mapping[str, Any] = field(default_factory=dict, hash=False)
    size: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Network":
        """Read ``name``, ``name@SIZE``, ``name:argument=value,...`` or ``name@SIZE:argument=value,...``.

        A value may be a list or a mapping in brackets; the name may begin with ``torchvision:``.

        Raises:
            UserError: If the text is none of these.

        Examples:
            >>> Network.parse("mgic_resnet50@160:group_size=8,coarsest=16")
            Network(name='mgic_resnet50', args={'group_size': 8, 'coarsest': 16}, size=160)
            >>> Network.parse("torchvision:resnet18:conversion={group_size: 8, coarsest: 16}").args
            {'conversion': {'group_size': 8, 'coarsest': 16}}
        """
        library = TORCHVISION if text.startswith(TORCHVISION) else ""
        head, _, rest = text.removeprefix(library).partition(":")
        name, _, size = head.partition("@")
        # a comma between two arguments is one that no closing bracket follows before the next opening one
        pairs = [pair.partition("=") for pair in re.split(r",(?![^\[{]*[\]}])", rest) if rest]
        if not name or not all(key and equals and value for key, equals, value in pairs) or not (size or "1").isdigit():
            raise UserError(f"a network is written name, name@SIZE or name:argument=value,..., got {text!r}")
        try:
            args = {key: yaml.safe_load(value) for key, _, value in pairs}
        except yaml.YAMLError as error:
            raise UserError(f"a network is written name, name@SIZE or name:argument=value,..., got {text!r}") from error
        return cls(library + name, args, int(size) if size else None)

    def __str__(self) -> str:
        size = f"@{self.size}" if self.size else ""
        args = ",".join(f"{key}={_flow(value)}" for key, value in self.args.items())
        return f"{self.name}{size}{':' if args else ''}{args}"

    @property
    def file_name(self) -> str:
        """What files of it are called."""
        return self.name.rpartition(":")[2] + ("_converted" if "conversion" in self.args else "")

    def build(self) -> tuple[nn.Module, tuple[int, ...]]:
        """Return the network in eval mode and the size of its input; always with the same weights, see `random_norms_`.

        Raises:
            UserError: If there is no such network, or it does not take the arguments.
        """
        torch.manual_seed(0)
        model = build_model(self.name, self.args)
        random_norms_(model)
        return reparameterize_model(model.eval()), self.input_size(model)

    def input_size(self, model: nn.Module) -> tuple[int, ...]:
        """Size of one input of the network that was built: pixels as asked for, or its own."""
        channels, *pixels = input_size_of(model)
        return (channels, *([self.size] * 2 if self.size else pixels))

    def cost(self) -> Cost:
        """Count it, with branches merged."""
        return cost(*self.build())

    def ways(self, paths: Sequence[str]) -> Sequence[str]:
        """Those of the paths asked for that it can be run by: all."""
        return paths

    def prepare(self, case: "Case") -> tuple[Callable[[], Run], Tensor, Any]:
        """Return what makes the path, an input, and what eager PyTorch makes of it; None for a training step."""
        model, size = self.build()
        x = torch.randn(case.batch, *size)
        expected = None if case.path == TRAINING else eager(model, x, case.threads)(x)
        return lambda: WAYS[case.path](model, x, case.threads), x, expected

    def load_libraries(self, case: "Case") -> None:
        """Run a tiny network first: what a path loads for itself is neither the network's memory nor its build time."""
        tiny, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2)).eval(), torch.ones(1, 3, 3, 3)
        with suppress(PathUnavailable):
            WAYS[case.path](tiny, x, case.threads)(x)


@dataclass(frozen=True)
class ExportedFile:
    """A file that `mgic.export` wrote: its runtime is the one way to run it, and it was held against eager PyTorch then.

    Args:
        file: Its place.
        sha256: Of the file, for what is kept of its times.
    """

    file: str
    sha256: str

    @classmethod
    def open(cls, file: str) -> "ExportedFile":
        """Take a file, if it is the one its description is of.

        Raises:
            UserError: If there is no such file, it is damaged, or there is no description beside it.
        """
        one = cls(file, "")
        return replace(one, sha256=one.described()["sha256"][Path(file).name])

    def described(self) -> dict[str, Any]:
        """Its description."""
        described = describe_artefact(Path(self.file))
        if described is None:
            raise UserError(f"{self.file}: without {Path(self.file).name}.json nobody knows the size of its input")
        return described

    def __str__(self) -> str:
        return Path(self.file).name

    def cost(self) -> Cost:
        """What the network was counted for when it was exported."""
        described = self.described()
        return Cost(described["params"], described["macs"], tuple(described["input_size"]))

    def ways(self, paths: Sequence[str]) -> Sequence[str]:
        """Its own runtime, whatever is asked for."""
        return [self.described()["format"]]

    def prepare(self, case: "Case") -> tuple[Callable[[], Run], Tensor, Any]:
        """As of a network; what it was held against stayed behind."""
        described = self.described()
        most = described["batches"][1]
        if most is not None and case.batch > most:
            raise PathUnavailable(f"it takes {most} inputs at most")
        x = torch.randn(case.batch, *described["input_size"])
        return lambda: load_artefact(self.file, case.threads), x, None

    def load_libraries(self, case: "Case") -> None:
        """Import its runtime."""
        import_module(format_of(Path(self.file)).runtime)


def training_step(model: nn.Module, example_input: Tensor, threads: int) -> Run:
    """One step of SGD in eager PyTorch, as ``mgic train`` takes it, on made-up labels: forward, backward, update."""
    fast_training_(model.train())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def run(x: Tensor) -> None:
        logits = model(x)
        loss = F.cross_entropy(logits, torch.arange(len(x)) % logits.shape[1])
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return run


TRAINING = "training"
WAYS = {**PATHS, TRAINING: training_step}
"""What can be timed: every path of inference, and a training step."""


@dataclass(frozen=True)
class Case:
    """One thing to time: a network, how it is run, on how many inputs and threads."""

    network: Network | ExportedFile
    path: str
    batch: int = 1
    threads: int = 1


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


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the lower and upper quartile, of measured values themselves.

    Examples:
        >>> quartiles([5, 1, 4, 2, 3])
        (2, 4)
    """
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 4], ordered[len(ordered) - 1 - (len(ordered) - 1) // 4]


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


@dataclass(frozen=True)
class Group:
    """Cases timed in the same rounds, and the network the others are compared with.

    Args:
        cases: What is timed.
        peer: The network whose fastest path is the baseline of the others; None for no comparison.
    """

    cases: tuple[Case, ...]
    peer: Network | ExportedFile | None = None


def group(
    networks: Sequence[Network | ExportedFile | str],
    peer: Network | ExportedFile | str | None = None,
    paths: Sequence[str] = tuple(PATHS),
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
) -> Group:
    """Every combination of networks (the peer among them), paths, batches and threads; a file has one path.

    Raises:
        UserError: If a path, a batch or a number of threads is none.
    """
    for path in paths:
        if path not in WAYS:
            raise UserError(f"there is no path {path!r}{suggest(path, WAYS)}")
    for name, numbers in (("batch", batches), ("threads", threads)):
        if not numbers or min(numbers) < 1:
            raise UserError(f"{name} must be positive numbers, got {list(numbers)}")
    first = [_network(peer)] if peer is not None else []
    every = list(dict.fromkeys([*first, *map(_network, networks)]))
    cases = [
        Case(n, path, batch, count) for batch in batches for count in threads for n in every for path in n.ways(paths)
    ]
    return Group(tuple(cases), first[0] if first else None)


def _network(network: Network | ExportedFile | str) -> Network | ExportedFile:
    if not isinstance(network, str):
        return network
    exported = Path(network.partition(":")[0]).suffix in {kind.suffix for kind in FORMATS.values()}
    return ExportedFile.open(network) if exported else Network.parse(network)


def compare(peer: Network | ExportedFile, timings: Sequence[Timing], costs: Mapping[Any, Cost]) -> list[dict[str, Any]]:
    """Hold each network, in its fastest path, against its peer in the fastest path of that one, in the same setting.

    The time ratio is the median of the ratios of the rounds, the FLOP ratio that of the multiply-adds;
    ``efficiency = FLOP ratio / time ratio``: 1 where a network is as much faster as it is smaller.
    """
    rows = []
    settings = dict.fromkeys((t.case.batch, t.case.threads, t.case.path == TRAINING) for t in timings)
    for setting in settings:
        fastest: dict[Network | ExportedFile, Timing] = {}
        for one in timings:
            same = (one.case.batch, one.case.threads, one.case.path == TRAINING) == setting
            if same and one.seconds and one.median < fastest.get(one.case.network, Timing(one.case)).median:
                fastest[one.case.network] = one
        if peer not in fastest:
            continue
        base = fastest.pop(peer)
        for network, one in fastest.items():
            ratios = [a / b for a, b in zip(one.seconds, base.seconds, strict=True)]
            flops, ratio = costs[network].macs / costs[peer].macs, statistics.median(ratios)
            rows.append(
                {
                    "network": str(network),
                    "path": one.case.path,
                    "peer": str(peer),
                    "peer_path": base.case.path,
                    "batch": setting[0],
                    "threads": setting[1],
                    "flop_ratio": flops,
                    "time_ratio": ratio,
                    "time_ratio_quartiles": quartiles(ratios),
                    "efficiency": flops / ratio,
                }
            )
    return rows


def thread_scaling(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """Time on several threads over the time on one, of what was timed on both in the same rounds."""
    single = {(t.case.network, t.case.path, t.case.batch): t for t in timings if t.case.threads == 1 and t.seconds}
    rows = []
    for one in timings:
        base = single.get((one.case.network, one.case.path, one.case.batch))
        if one.case.threads > 1 and base and one.seconds:
            ratios = [a / b for a, b in zip(one.seconds, base.seconds, strict=True)]
            case = {"network": str(one.case.network), "path": one.case.path, "batch": one.case.batch}
            rows.append(
                {
                    **case,
                    "threads": one.case.threads,
                    "time_ratio": statistics.median(ratios),
                    "time_ratio_quartiles": quartiles(ratios),
                    "throughput_ratio": 1 / statistics.median(ratios),
                }
            )
    return rows


@dataclass(frozen=True)
class Benchmark:
    """What `run_benchmark` found: the rows of its tables, plain values."""

    rounds: int
    timings: list[dict[str, Any]]
    comparisons: list[dict[str, Any]]
    scaling: list[dict[str, Any]]

    def to_csv(self) -> str:
        """The timings without the single rounds, as CSV."""
        text = io.StringIO()
        rows = [{key: value for key, value in row.items() if key != "seconds"} for row in self.timings]
        writer = csv.DictWriter(text, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def run_benchmark(
    groups: Sequence[Group],
    rounds: int = 9,
    seconds: float = 0.15,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Benchmark:
    """Time groups of cases, one group after the other.

    Args:
        groups: What to time.
        rounds: How often each case is asked.
        seconds: How long each case computes in a round.
        folder: Where each finished group is kept; the same call again, of the same commit on the same machine, takes it
            from there.
        say: Told what is being done.

    Raises:
        UserError: If ``rounds`` or ``seconds`` is not positive, or a network cannot be built.
    """
    if rounds < 1 or not 0 < seconds < float("inf"):
        raise UserError(f"rounds={rounds} and seconds={seconds} must be positive")
    networks = dict.fromkeys(case.network for one in groups for case in one.cases)
    costs = {network: network.cost() for network in networks}
    found = Benchmark(rounds, [], [], [])
    for number, one in enumerate(groups, 1):
        names = ", ".join(dict.fromkeys(str(case.network) for case in one.cases))
        say(f"{number} of {len(groups)}: {names}")
        timings = _kept(one, rounds, seconds, folder / f"{number}.json" if folder else None)
        found.timings.extend(_row(timing, costs[timing.case.network]) for timing in timings)
        found.comparisons.extend(compare(one.peer, timings, costs) if one.peer else [])
        found.scaling.extend(thread_scaling(timings))
    return found


def _kept(one: Group, rounds: int, seconds: float, file: Path | None) -> list[Timing]:
    """The timings of a group: those of the file if it is of the same setting, else new ones, which the file then gets."""
    from .training.files import write_json
    from .training.records import commit, machine, versions

    setting = {"cases": [asdict(case) for case in one.cases], "rounds": rounds, "seconds": seconds}
    setting |= {"commit": commit(), "machine": machine(), "versions": versions()}
    if file is not None and file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["setting"] == json.loads(json.dumps(setting)):
            return [
                Timing(case, **row | {"seconds": tuple(row["seconds"])})
                for case, row in zip(one.cases, kept["timings"], strict=True)
            ]
    timings = measure(one.cases, rounds, seconds)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [{key: value for key, value in asdict(t).items() if key != "case"} for t in timings]
        write_json(file, {"setting": setting, "timings": rows})
    return timings


def _row(timing: Timing, counted: Cost) -> dict[str, Any]:
    case = timing.case
    spread = [1e3 * value for value in quartiles(timing.seconds)] if timing.seconds else [None, None]
    return {
        "network": str(case.network),
        "input_size": "x".join(map(str, counted.input_size)),
        "params": counted.params,
        "macs": counted.macs,
        "path": case.path,
        "batch": case.batch,
        "threads": case.threads,
        "ms": 1e3 * timing.median if timing.seconds else None,
        "ms_lower_quartile": spread[0],
        "ms_upper_quartile": spread[1],
        "disturbed": timing.disturbed,
        "error": timing.error,
        "build_seconds": timing.build_seconds,
        "peak_mib": timing.peak_mib,
        "reason": timing.reason,
        "seconds": list(timing.seconds),
    }
