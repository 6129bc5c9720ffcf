"""The command line: ``mgic VERB ...``, also ``python -m mgic``. Only the verb that runs imports what it needs.

A wrong call prints one line and exits with 2. Flags of configurations are derived from the fields of their dataclasses.
"""

import signal
import sys
import threading
import warnings
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from . import __version__, cli_bench, cli_convert, cli_experiment, cli_export, cli_report, cli_train
from .cli_output import check_plot, console, print_json
from .errors import Stopped, UserError, exit_code, rank, suggest

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from .counting import Part

DESCRIPTION = """Multigrid in channels: networks whose cost grows linearly with their width.

Start with
  mgic demo                                  train a dense ResNet and its multigrid twin, side by side
  mgic cost mgic_resnet56                    what a network costs, level by level
  mgic train --recipe digits --out runs/a    train; the same command continues a run that was stopped"""


RESULTS = Path("results")
"""Where our own records are, unless it is said."""


class _Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keep the lines of descriptions as they are written."""


def _add_models(parser: ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", default="*", type=str, help="shell pattern, such as 'mgic_*'")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run_models(args: Namespace) -> int:
    from .models import describe_model, list_models

    names = list_models(args.pattern)
    if not names:
        raise UserError(f"no model matches {args.pattern!r}; mgic models lists all")
    if args.json:
        print_json([{"model": name, "description": describe_model(name)} for name in names])
        return 0
    from rich.table import Table

    table = Table("model", "description", box=None, pad_edge=False)
    for name in names:
        table.add_row(name, describe_model(name))
    console().print(table)
    return 0


def _add_cost(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model", type=str, help="name (ours, timm's, torchvision:NAME); NAME:argument=value,... and NAME@SIZE too"
    )
    parser.add_argument("--model_args", type=dict, default={}, help="arguments of the network: '{group_size: 4}'")
    parser.add_argument(
        "--input_size", type=list[int], default=None, help="'[3, 224, 224]'; the network's own by default"
    )
    parser.add_argument("--scaling", action="store_true", help="fit how the cost grows with the width")
    parser.add_argument("--widths", type=list[float], default=[1, 2, 3, 4, 6, 8], help="width multipliers of --scaling")
    parser.add_argument("--plot", type=Path, default=None, help="PNG of the curves of --scaling")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run_cost(args: Namespace) -> int:
    import torch

    from .counting import breakdown, cost, memory
    from .models import build_model
    from .models.spelling import input_size, spelled

    asked = spelled(args.model)
    args.model, args.model_args = asked.name, {**asked.arguments, **args.model_args}
    with torch.device("meta"):
        model = build_model(args.model, args.model_args)
    size = tuple(args.input_size or input_size(model, asked.size))
    if args.scaling:
        return _run_scaling(args, size)
    if args.plot is not None:
        raise UserError("--plot draws what --scaling fits: give both")
    counted, held, parts = cost(model, size), memory(model, size, batch=2), breakdown(model, size)
    notes = [
        f"{part.name}, {part.channels} channels: groups of {part.group_size}; below 8 they use processors badly"
        for part in parts
        if part.group_size and part.channels and part.group_size < min(8, part.channels)
    ]
    if args.json:
        print_json(
            {
                "model": args.model,
                "model_args": args.model_args,
                "input_size": size,
                "params": counted.params,
                "macs": counted.macs,
                "bytes_of_one_input_in_a_batch_of_2": {name: value // 2 for name, value in vars(held).items()},
                "parts": [vars(part) for part in parts],
                "layers": _layers(model),
                "notes": notes,
            }
        )
        return 0
    out = console()
    out.print(f"{args.model}: {counted}")
    inference, saved, training = (value / 2 / 2**20 for value in (held.inference, held.saved, held.training))
    out.print(f"features of one input (of two): at most {inference:.2f} MiB alive at inference,")
    out.print(f"{saved:.2f} MiB kept for the backward pass, at most {training:.2f} MiB alive in a training step")
    out.print(_parts_table(parts))
    for note in notes:
        out.print(f"note: {note}")
    return 0


def _layers(model: "nn.Module") -> list[dict[str, Any]]:
    """Return the convolutions of a network with their effective group sizes."""
    return [
        {"name": name, "inputs": m.in_channels, "outputs": m.out_channels, "group_size": m.in_channels // m.groups}
        for name, m in model.named_modules()
        if hasattr(m, "groups") and hasattr(m, "in_channels") and hasattr(m, "out_channels")
    ]


def _parts_table(parts: "list[Part]") -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("part", "grid", "groups of", "params", "MACs", "made MiB", "peak MiB", "kept MiB"):
        table.add_column(name, justify="left" if name in ("part", "grid") else "right")
    for part in parts:
        if not (part.params or part.macs or part.activations):
            continue
        head = (part.name, "", "")
        if part.level is not None:
            dense = part.group_size == part.channels
            head = (
                "",
                f"level {part.level}: {part.channels} ({part.blocks}x)",
                "dense" if dense else str(part.group_size),
            )
        mib = (f"{value / 2**20:.2f}" for value in (part.activations, part.inference, part.saved))
        table.add_row(*head, f"{part.params:,}", f"{part.macs:,}", *mib)
    return table


def _run_scaling(args: Namespace, size: tuple[int, ...]) -> int:
    from rich.table import Table

    from .plots import plot_scaling
    from .scaling import explain, fit_exponent, scaling

    if len(set(args.widths)) < max(2, len(args.widths)) or not all(0 < width < float("inf") for width in args.widths):
        raise UserError(f"--widths must be two or more different, positive multipliers, got {args.widths}")
    check_plot(args.plot)
    rows = scaling(args.model, args.model_args, args.widths, size)
    names = ("params", "macs", "dense_params", "dense_macs")
    exponents = {name: fit_exponent([(row.width, getattr(row, name)) for row in rows]) for name in names}
    if args.plot is not None:
        plot_scaling(rows, args.plot, f"{args.model} {args.model_args or ''}")
    reason = explain(rows) if max(exponents["params"], exponents["macs"]) > 1.10 else None
    if args.json:
        found = {"model": args.model, "rows": [vars(row) for row in rows], "exponents": exponents}
        print_json({**found, "why_above_1.10": reason})
        return 0
    table = Table(box=None, pad_edge=False)
    for name in ("width", "params", "MACs", "dense params", "dense MACs"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(f"{row.width:g}", *(f"{getattr(row, name):,}" for name in names))
    table.add_row("exponent", *(f"{exponents[name]:.3f}" for name in names))
    out = console()
    out.print(table)
    if reason:
        out.print(f"above 1.10: {reason}")
    return 0


def _add_results(parser: ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of our own records")


def _add_table(parser: ArgumentParser) -> None:
    parser.add_argument("id", nargs="?", default=None, type=str, help="such as mgic-5; --list names all")
    parser.add_argument("--list", action="store_true", help="name the tables")
    parser.add_argument("--all", action="store_true", help="print every table")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--csv", action="store_true", help="print CSV")
    _add_results(parser)


def _read_records(folder: Path) -> list[dict[str, Any]]:
    """Our own records; the default folder need not be there."""
    from .training import read_records

    if folder == RESULTS and not folder.exists():
        return []
    return [{**record, "file": (folder / name).as_posix()} for name, record in read_records(folder).items()]


def _run_table(args: Namespace) -> int:
    from .reporting import paper_csv, paper_markdown, paper_table
    from .tables import build_table, papers, table_ids

    if args.json + args.markdown + args.csv > 1:
        raise UserError("give one of --json, --markdown and --csv")
    if (args.id is not None) + args.list + args.all != 1:
        raise UserError("give the id of a table, or --all, or --list")
    if args.list:
        titles = {name: table["caption"] for name, table in papers()["tables"].items()}
        if args.json:
            print_json([{"id": name, "caption": title} for name, title in titles.items()])
        else:
            print("\n".join(f"{name:<12} {title}" for name, title in titles.items()))  # noqa: T201
        return 0
    records = _read_records(args.results)
    tables = [build_table(name, records) for name in (table_ids() if args.all else [args.id])]
    if args.json:
        print_json(tables if args.all else tables[0])
    elif args.csv:
        print(paper_csv(tables), end="")  # noqa: T201
    elif args.markdown:
        print(("# Tables\n\n" if args.all else "") + "\n".join(map(paper_markdown, tables)), end="")  # noqa: T201
    else:
        for table in tables:
            console().print(paper_table(table), "")
    return 0


def _add_figure(parser: ArgumentParser) -> None:
    parser.add_argument("id", type=str, help="mgic-3, mgic-4, mgic-5, mgic-6 or mgiad-7")
    parser.add_argument("--out", type=Path, required=True, help="PNG file")
    _add_results(parser)


def _run_figure(args: Namespace) -> int:
    from .plots import plot_panels
    from .tables import build_figure

    title, panels = build_figure(args.id, _read_records(args.results))
    check_plot(args.out)
    plot_panels(panels, args.out, title)
    console().print(f"{title}: {args.out}")
    return 0


EXTRAS = {
    "train": ("lightning", "tensorboard", "torchmetrics"),
    "points": ("torch_geometric", "h5py"),
    "plots": ("matplotlib",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
    "bench": ("fvcore",),
}


def _add_info(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run_info(args: Namespace) -> int:
    import shutil
    from importlib.util import find_spec

    from .training.records import instruction_sets, machine, versions

    facts: dict[str, Any] = {
        "mgic": __version__,
        "versions": versions(),
        "machine": machine(),
        "instruction_sets": instruction_sets(),
        "compiler": next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None),
        "extras": {name: all(find_spec(package) for package in needs) for name, needs in EXTRAS.items()},
    }
    if args.json:
        print_json(facts)
        return 0
    out = console()
    out.print(f"mgic {__version__}")
    out.print("versions: " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if k != "mgic"))
    out.print("machine: " + ", ".join(f"{k} {v}" for k, v in facts["machine"].items() if v is not None))
    out.print("instruction sets: " + (", ".join(facts["instruction_sets"]) or "unknown"))
    out.print(f"C++ compiler: {facts['compiler'] or 'none found'}")
    for name, there in facts["extras"].items():
        state = "installed" if there else f"missing: pip install 'mgic[{name}]'"
        out.print(f"extra {name}: {state} ({', '.join(EXTRAS[name])})")
    return 0


VERBS: dict[str, tuple[str, Callable[[ArgumentParser], None], Callable[..., int]]] = {
    "models": ("list the networks", _add_models, lambda args, given: _run_models(args)),
    "cost": ("count parameters, multiply-adds and memory", _add_cost, lambda args, given: _run_cost(args)),
    "table": ("a table of the papers beside our counts", _add_table, lambda args, given: _run_table(args)),
    "figure": ("a plot of the papers with our points", _add_figure, lambda args, given: _run_figure(args)),
    "train": ("train a network, or continue a run", cli_train.add_train, cli_train.run_train),
    "evaluate": ("measure how good a run is", cli_train.add_evaluate, cli_train.run_evaluate),
    "predict": ("say what is in images or point clouds", cli_train.add_predict, cli_train.run_predict),
    "publish": (
        "write a run as a folder for others, with a model card",
        cli_train.add_publish,
        cli_train.run_publish,
    ),
    "convert": ("put multigrid into any network, with a report", cli_convert.add_convert, cli_convert.run_convert),
    "export": ("write files for other runtimes, checked", cli_export.add_export, cli_export.run_export),
    "bench": ("time networks, each way to run them, side by side", cli_bench.add_bench, cli_bench.run_bench),
    "experiment": (
        "train and show the experiments that test the papers' claims",
        cli_experiment.add_experiment,
        cli_experiment.run_experiment,
    ),
    "report": ("one HTML page of everything the records say", cli_report.add_report, cli_report.run_report),
    "demo": ("train a dense ResNet and its multigrid twin on real digits", cli_train.add_demo, cli_train.run_demo),
    "info": ("versions, machine, extras", _add_info, lambda args, given: _run_info(args)),
}


EXAMPLES = {
    "models": "  mgic models 'mgic_*'",
    "cost": """  mgic cost mgic_resnet56:group_size=16
  mgic cost mgic_resnet50 --scaling --model_args '{group_size: 8, coarsest: 16}' --plot scaling.png""",
    **cli_train.EXAMPLES,
    "convert": cli_convert.EXAMPLES,
    "export": cli_export.EXAMPLES,
    "bench": cli_bench.EXAMPLES,
    "experiment": cli_experiment.EXAMPLES,
    "report": cli_report.EXAMPLES,
    "info": "  mgic info --json",
}


def _parser(verb: str | None) -> ArgumentParser:
    """Make the parser; the flags of a verb are built only when it is called."""
    parser = ArgumentParser(
        prog="mgic", description=DESCRIPTION, exit_on_error=False, allow_abbrev=False, formatter_class=_Help
    )
    parser.add_argument("--version", action="version", version=f"mgic {__version__}", help="print the version")
    verbs = parser.add_subcommands(dest="verb", required=True)
    for name, (summary, add, _) in VERBS.items():
        teaching = f"{summary.capitalize()}.\n\n{EXAMPLES.get(name, '')}"
        sub = ArgumentParser(exit_on_error=False, allow_abbrev=False, description=teaching, formatter_class=_Help)
        if name == verb:
            add(sub)
        verbs.add_subcommand(name, sub, help=summary)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``mgic``; return the exit status.

    0: done. 1: work that stopped, said in one line: a file that was rejected, a loss that is not finite, another process that
    ended. 2: a wrong call, said in one line. 74: no room or no permission to write. 130, 143: interrupted, saved.
    """
    given = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    verb = next((word for word in given if not word.startswith("-")), None)
    warnings.showwarning = lambda message, *rest, **more: print(f"mgic: warning: {message}", file=sys.stderr)  # noqa: T201
    try:
        if verb is not None and verb not in VERBS:
            raise UserError(f"unknown verb {verb!r}{suggest(verb, VERBS)}")
        args = _parser(verb).parse_args(given)
        with _ended_tidily():
            return VERBS[args.verb][2](args[args.verb], given)
    except (UserError, ArgumentError, OSError, Stopped) as error:
        return _fail(error, exit_code(error))
    except ImportError as error:
        return _fail(_missing_extra(error), 2)
    except KeyboardInterrupt as signalled:
        return _fail("interrupted; no file was left half written", 143 if isinstance(signalled, _Terminated) else 130)


def _underscored(word: str) -> str:
    """A flag as it is declared, ``--batch_size``, of either spelling; fields of recipes have underscores, so all have."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word[2:].partition("=")
    return f"--{flag.replace('-', '_')}{equals}{value}"


class _Terminated(KeyboardInterrupt):
    """SIGTERM: what SIGINT is, from a supervisor."""


@contextmanager
def _ended_tidily() -> Iterator[None]:
    """Let SIGTERM end a verb as SIGINT does: what is half written is removed. ``train`` saves, with handlers of its own."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers nowhere else
        yield
        return

    def end(signum: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _missing_extra(error: ImportError) -> str:
    package = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            return f"{package} is not installed: pip install 'mgic[{extra}]'"
    raise error


def _fail(error: object, code: int) -> int:
    line = " ".join(str(error).split())
    process = rank()
    if process and isinstance(error, Stopped):  # all have stopped: the first process says why
        return code
    print(f"mgic{f' (process {process})' if process else ''}: {line}", file=sys.stderr)  # noqa: T201
    return code
