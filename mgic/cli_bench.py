"""The verb ``bench``: what it can time, its flags, what it prints."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from .cli_output import check_output, check_plot, console
from .errors import UserError, suggest

if TYPE_CHECKING:
    from rich.table import Table

    from .benchmarking import Benchmark, Group

INFERENCE = "inference"
MOBILENET = "mgic_mobilenetv3_100"
TWINS = {  # dense network: its multigrid twins
    "resnet50": ("mgic_resnet50:group_size=32,coarsest=32", "mgic_resnet50:group_size=8,coarsest=16"),
    "resnet18": ("mgic_resnet18:group_size=32,coarsest=32", "mgic_resnet18:group_size=8,coarsest=16"),
    "resnet56": ("mgic_resnet56:group_size=8,coarsest=16",),
    "mobilenetv3_large_075": (MOBILENET,),
    "wide_resnet50_2": ("mgic_wide_resnet50_2:group_size=32,coarsest=32",),
}
RIVALS = (
    *("mobilenetv2_100", "mobilenetv3_large_075", "mobilenetv3_large_100", "ghostnet_100", "mobilenetv4_conv_small"),
    *("mobilenetv4_conv_medium@224", "mobileone_s0", "fasternet_t0", "starnet_s1", "repvit_m0_9", "lcnet_100"),
    "efficientnet_lite0",
)
TABLE_8 = ("mobilenetv2_100", "mobilenetv3_large_075", "ghostnet_100", MOBILENET)
SUITES = {
    "efficiency": "multigrid networks against their dense peers, each in its fastest runtime; one thread and two",
    "lightweight": "lightweight networks, each in its fastest runtime, against MGIC-MobileNetV3",
    "table8": "Table 8 of the MGIC paper on this processor: inference of one image, a training step of eight",
}
EXAMPLES = """  mgic bench inference mgic_resnet50:group_size=8,coarsest=16 --dense resnet50 --json a.json --plot a.png
  mgic bench inference mgic_resnet20 resnet20@48 --paths '[eager, engine]' --batch '[1, 16]' --threads '[1, 2]'
""" + "\n".join(f"  mgic bench {name:<12} {text}" for name, text in SUITES.items())


def suite(name: str) -> "list[Group]":
    """Return the groups of a fixed benchmark."""
    from .benchmarking import TRAINING, Group, Network, group

    if name == "table8":
        return [group(TABLE_8[1:], TABLE_8[0]), group(TABLE_8[1:], TABLE_8[0], [TRAINING], batches=[8])]
    if name == "lightweight":
        ours = group([MOBILENET], paths=["engine"]).cases
        return [Group((*ours, *group([rival]).cases), Network(MOBILENET)) for rival in RIVALS]
    # torch.compile takes minutes for a multigrid network and is not its fastest path: left out, but where all are asked for
    paths = ["eager", "eager_nhwc", "onnxruntime", "openvino", "engine"]
    twins = [
        Group((*group([dense]).cases, *group(networks, paths=paths).cases), Network(dense))
        for dense, networks in TWINS.items()
    ]
    every = group(["mgiad18:group_size=8,coarsest=64"])
    threads = group([TWINS["resnet50"][0]], None, ["engine"], batches=[1, 16], threads=[1, 2])
    return [*twins, every, threads]


def add_bench(parser: ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("what", type=str, help=f"{INFERENCE}, or a fixed benchmark: {', '.join(SUITES)}")
    parser.add_argument(
        "models",
        nargs="*",
        type=str,
        help="name, name@SIZE (of the input) or name:argument=value,...; of this library or timm",
    )
    parser.add_argument("--dense", type=str, default=None, help="network the others are compared with")
    parser.add_argument("--paths", type=list[str], default=None, help="ways to run each; all by default")
    parser.add_argument("--batch", type=list[int], default=None, help="'[1]' by default")
    parser.add_argument("--threads", type=list[int], default=None, help="'[1]' by default")
    parser.add_argument("--rounds", type=int, default=9, help="how often each way is asked, in turns")
    parser.add_argument("--seconds", type=float, default=0.15, help="how long each computes in a round, at least")
    parser.add_argument("--out", type=Path, default=None, help="keep finished parts here: the same call continues")
    parser.add_argument("--json", type=Path, default=None, help="write all as JSON")
    parser.add_argument("--csv", type=Path, default=None, help="write the times as CSV")
    parser.add_argument("--plot", type=Path, default=None, help="PNG of time against multiply-adds")
    parser.add_argument("--record", type=Path, default=None, help="write a record of results (JSON)")


def run_bench(args: Namespace, given: Sequence[str]) -> int:
    """Time, print, write."""
    from .benchmarking import run_benchmark
    from .training.files import write_json, write_text

    check_plot(args.plot)
    check_output(args.json, args.csv, args.record)
    found = run_benchmark(_groups(args), args.rounds, args.seconds, args.out, console(stderr=True).print)
    out = console(width=140)
    for table in _tables(found):
        out.print(table, "")
    if args.json is not None:
        write_json(args.json, vars(found))
    if args.csv is not None:
        write_text(args.csv, found.to_csv())
    if args.plot is not None:
        from .plots import plot_times

        plot_times(found.timings, args.plot, args.what)
    if args.record is not None:
        from .training.records import command_of

        _write_record(args.record, found, command_of(given, "--json"))
    return 0


def _groups(args: Namespace) -> "list[Group]":
    from .benchmarking import group
    from .runtime.paths import PATHS

    if args.what == INFERENCE:
        if not args.models:
            raise UserError("bench inference needs the names of networks")
        paths = list(PATHS) if args.paths is None else args.paths
        return [group(args.models, args.dense, paths, args.batch or [1], args.threads or [1])]
    if args.what not in SUITES:
        raise UserError(f"bench cannot time {args.what!r}{suggest(args.what, [INFERENCE, *SUITES])}")
    fixed = [name for name in ("models", "dense", "paths", "batch", "threads") if args[name]]
    if fixed:
        raise UserError(f"bench {args.what} is fixed: {', '.join(fixed)} belong to bench inference")
    return suite(args.what)


def _tables(found: "Benchmark") -> "list[Table]":
    from rich.table import Table

    def table(title: str, *columns: str) -> Table:
        grid = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for name in columns:
            words = name in ("network", "path", "peer", "in", "not timed")
            grid.add_column(name, justify="left" if words else "right")
        return grid

    setting = ("batch", "threads")
    times = table(
        f"Medians of {found.rounds} rounds",
        *("network", "path", *setting, "MACs", "ms", "quartiles", "error", "MiB", "not timed"),
    )
    for row in found.timings:
        spread = "" if row["ms"] is None else f"{row['ms_lower_quartile']:.2f}-{row['ms_upper_quartile']:.2f}"
        measured = _cell(row, "ms:.2f"), spread, _cell(row, "error:.0e"), _cell(row, "peak_mib:.0f")
        first = (row["network"], row["path"], str(row["batch"]), str(row["threads"]), f"{row['macs']:,}")
        times.add_row(*first, *measured, row["reason"] or "")
    tables = [times]
    if found.comparisons:
        ratios = ("FLOP ratio", "time ratio", "efficiency")
        pairs = table("Each in its fastest path", "network", "path", "peer", "in", *setting, *ratios)
        for row in found.comparisons:
            names = ("network", "path", "peer", "peer_path", *setting)
            pairs.add_row(*(_cell(row, f) for f in (*names, "flop_ratio:.3f", "time_ratio:.3f", "efficiency:.2f")))
        tables.append(pairs)
    if found.scaling:
        threads = table("Threads", "network", "path", *setting, "time over one thread", "throughput")
        for row in found.scaling:
            words = ("network", "path", "batch", "threads", "time_ratio:.2f", "throughput_ratio:.2f")
            threads.add_row(*(_cell(row, f) for f in words))
        tables.append(threads)
    return tables


def _cell(row: dict[str, Any], key: str) -> str:
    name, _, form = key.partition(":")
    return "" if row[name] is None else format(row[name], form)


def _write_record(path: Path, found: "Benchmark", command: str) -> None:
    from .benchmarking import QUIET, TRIES
    from .training.records import make_record, write_record

    times = [row for row in found.timings if row["seconds"]]
    metrics = {
        f"{r['network']} {r['path']} batch {r['batch']} threads {r['threads']} seconds": r["seconds"] for r in times
    }
    notes = [
        "each path ran in a process of its own, one at a time, in turns; outputs were held against eager PyTorch",
        f"a time counts if a small matrix product before and after took at most {QUIET} times its shortest time, or it was "
        f"the least disturbed of {TRIES} tries; disturbed says how many of the {found.rounds} rounds were",
    ]
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in found.timings]
    record = make_record(
        command,
        "random images, float32; random weights",
        [0] * found.rounds,
        metrics,
        notes,
        runtimes=_runtimes(),
        timings=rows,
        comparisons=found.comparisons,
        scaling=found.scaling,
    )
    write_record(path, record)


def _runtimes() -> dict[str, str]:
    found = {}
    for package in ("onnxruntime", "onnx", "onnxscript", "openvino"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
