"""Networks timed side by side: every way to run each, in turns, with medians and spreads, outputs checked.

A group of cases (`mgic.benchmarking.cases`) is timed in the same rounds (`mgic.benchmarking.timing`); each network, in its
fastest path, is then held against one of them.
"""

import csv
import io
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..counting import Cost
from ..errors import UserError, suggest
from ..formats import FORMATS
from ..runtime.paths import PATHS
from .cases import TRAINING, WAYS, Case, ExportedFile, Network, random_norms_
from .timing import QUIET, TRIES, Timing, measure

__all__ = [
    "QUIET",
    "TRAINING",
    "TRIES",
    "WAYS",
    "Benchmark",
    "Case",
    "ExportedFile",
    "Group",
    "Network",
    "Timing",
    "compare",
    "group",
    "measure",
    "quartiles",
    "random_norms_",
    "run_benchmark",
    "thread_scaling",
]


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


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the lower and upper quartile, of measured values themselves.

    Examples:
        >>> quartiles([5, 1, 4, 2, 3])
        (2, 4)
    """
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 4], ordered[len(ordered) - 1 - (len(ordered) - 1) // 4]


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
    from ..training.files import write_json
    from ..training.records import commit, machine, versions

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
