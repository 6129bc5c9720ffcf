"""The command line: ``mgic VERB ...``, also ``python -m mgic``. Only the verb that runs imports what it needs.

A wrong call prints one line and exits with 2. Flags of configurations are derived from the fields of their dataclasses.
"""

import json
import os
import shlex
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

from . import __version__, cli_bench, cli_convert, cli_export
from .errors import Stopped, UserError, suggest
from .training.recipes import RECIPES, Recipe

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch import nn

    from .counting import Part
    from .data import Data, Task
    from .training import RunSummary, Start, TrainedNetwork

DISTILL_WEIGHT = 0.5
"""Of ``mgic train --teacher`` where neither recipe, file nor flags say what to learn from it."""

DESCRIPTION = """Multigrid in channels: networks whose cost grows linearly with their width.

Start with
  mgic demo                                  train a dense ResNet and its multigrid twin, side by side
  mgic cost mgic_resnet56                    what a network costs, level by level
  mgic train --recipe digits --out runs/a    train; the same command continues a run that was stopped"""


def _console(stderr: bool = False) -> "Console":
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120  # into a file or a pipe: tables keep their lines whole
    return console


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))  # noqa: T201


def _check_output(*paths: Path | None) -> None:
    """Refuse, before any work, output files that cannot be written."""
    from .training.checkpoint import check_writable

    for path in paths:
        if path is not None:
            check_writable(path)


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
        _print_json([{"model": name, "description": describe_model(name)} for name in names])
        return 0
    from rich.table import Table

    table = Table("model", "description", box=None, pad_edge=False)
    for name in names:
        table.add_row(name, describe_model(name))
    _console().print(table)
    return 0


def _add_cost(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="a name of 'mgic models', or any of timm's")
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

    with torch.device("meta"):
        model = build_model(args.model, args.model_args)
    config: Any = getattr(model, "pretrained_cfg", {})
    size = tuple(args.input_size or config.get("input_size", (3, 224, 224)))
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
        _print_json(
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
    out = _console()
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

    from .reporting import plot_scaling
    from .scaling import explain, fit_exponent, scaling

    if len(set(args.widths)) < max(2, len(args.widths)) or not all(0 < width < float("inf") for width in args.widths):
        raise UserError(f"--widths must be two or more different, positive multipliers, got {args.widths}")
    _check_output(args.plot)
    rows = scaling(args.model, args.model_args, args.widths, size)
    names = ("params", "macs", "dense_params", "dense_macs")
    exponents = {name: fit_exponent([(row.width, getattr(row, name)) for row in rows]) for name in names}
    if args.plot is not None:
        plot_scaling(rows, args.plot, f"{args.model} {args.model_args or ''}")
    reason = explain(rows) if max(exponents["params"], exponents["macs"]) > 1.10 else None
    if args.json:
        found = {"model": args.model, "rows": [vars(row) for row in rows], "exponents": exponents}
        _print_json({**found, "why_above_1.10": reason})
        return 0
    table = Table(box=None, pad_edge=False)
    for name in ("width", "params", "MACs", "dense params", "dense MACs"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(f"{row.width:g}", *(f"{getattr(row, name):,}" for name in names))
    table.add_row("exponent", *(f"{exponents[name]:.3f}" for name in names))
    out = _console()
    out.print(table)
    if reason:
        out.print(f"above 1.10: {reason}")
    return 0


def _add_results(parser: ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of our own records")


def _add_table(parser: ArgumentParser) -> None:
    parser.add_argument("id", nargs="?", default=None, type=str, help="such as mgic-5; --list names all")
    parser.add_argument("--list", action="store_true", help="name the tables")
    parser.add_argument("--all", action="store_true", help="print every table")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--csv", action="store_true", help="print CSV")
    _add_results(parser)


def _read_records(folder: Path) -> list[dict[str, Any]]:
    from .training import read_record

    return [{**read_record(path), "file": path.as_posix()} for path in sorted(folder.rglob("*.json"))]


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
            _print_json([{"id": name, "caption": title} for name, title in titles.items()])
        else:
            print("\n".join(f"{name:<12} {title}" for name, title in titles.items()))  # noqa: T201
        return 0
    records = _read_records(args.results)
    tables = [build_table(name, records) for name in (table_ids() if args.all else [args.id])]
    if args.json:
        _print_json(tables if args.all else tables[0])
    elif args.csv:
        print(paper_csv(tables), end="")  # noqa: T201
    elif args.markdown:
        print(("# Tables\n\n" if args.all else "") + "\n".join(map(paper_markdown, tables)), end="")  # noqa: T201
    else:
        for table in tables:
            _console().print(paper_table(table), "")
    return 0


def _add_figure(parser: ArgumentParser) -> None:
    parser.add_argument("id", type=str, help="mgic-3, mgic-4, mgic-5, mgic-6 or mgiad-7")
    parser.add_argument("--out", type=Path, required=True, help="PNG file")
    _add_results(parser)


def _run_figure(args: Namespace) -> int:
    from .reporting import plot_panels
    from .tables import build_figure

    title, panels = build_figure(args.id, _read_records(args.results))
    _check_output(args.out)
    plot_panels(panels, args.out, title)
    _console().print(f"{title}: {args.out}")
    return 0


def _add_data(parser: ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the torchvision data sets")
    parser.add_argument("--download", action="store_true", help="fetch a missing data set")


def _add_train(parser: ArgumentParser) -> None:
    parser.add_argument("--recipe", type=str, default=None, help=f"start from a recipe: {', '.join(RECIPES)}")
    parser.add_argument("--config", type=Path, default=None, help="YAML file with fields of the recipe")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder of the run; with --seeds one folder a seed in it"
    )
    parser.add_argument("--seeds", type=list[int], default=None, help="several runs: '[0, 1, 2]'")
    _add_data(parser)
    parser.add_argument("--teacher", type=Path, default=None, help="finished run whose network this one learns from")
    parser.add_argument("--init", type=Path, default=None, help="start from a finished run or a .safetensors file")
    parser.add_argument("--new-head", action="store_true", help="with --init: start the classifier afresh")
    parser.add_argument("--accelerator", type=str, default="auto", help="auto, cpu or cuda")
    parser.add_argument("--devices", type=int, default=1, help="processes on this machine, one a GPU")
    parser.add_argument("--num-nodes", type=int, default=1, help="machines; docs/many-machines.md")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: as many as torch takes")
    parser.add_argument("--strict-resume", action="store_true", help="stop at a corrupt checkpoint, do not fall back")
    parser.add_argument("--json-summary", type=Path, default=None, help="write the result of the run(s) as JSON")
    parser.add_argument("--record", type=Path, default=None, help="write a record of results (JSON)")
    parser.add_argument("--print-config", action="store_true", help="print the recipe as YAML and stop")
    parser.add_class_arguments(Recipe)


def _recipe_from(args: Namespace, given: Sequence[str]) -> Recipe:
    """Combine, each over the one before: the recipe named, the YAML file, the flags."""
    if args.recipe is not None and args.recipe not in RECIPES:
        raise UserError(f"unknown recipe {args.recipe!r}{suggest(args.recipe, RECIPES)}")
    values = RECIPES[args.recipe].to_dict() if args.recipe else Recipe().to_dict()
    if args.config is not None:
        try:
            text = args.config.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--config {args.config}: cannot be read ({error})") from error
        import yaml

        checked = Recipe.from_yaml(text, source=args.config)
        values |= {key: checked.to_dict()[key] for key in yaml.safe_load(text)}
    flags = {word.removeprefix("--").partition("=")[0] for word in given if word.startswith("--")}
    for field in ("model_args", "data_args"):
        if any(flag.startswith(f"{field}.") for flag in flags):  # one argument; the others stay
            values[field] = {**values[field], **args[field]}
    values |= {key: args[key] for key in values if key in flags}
    if args.teacher and not (values["distill_weight"] or values["distill_features"] or "distill_weight" in flags):
        values["distill_weight"] = DISTILL_WEIGHT
    return Recipe.from_dict(values)


def _run_train(args: Namespace, given: Sequence[str]) -> int:
    recipe = _recipe_from(args, given)
    if args.print_config:
        print(recipe.to_yaml(), end="")  # noqa: T201
        return 0
    if args.out is None:
        raise UserError("--out is missing: the folder of the run")
    seeds = _check_seeds([recipe.seed] if args.seeds is None else args.seeds)
    _check_output(args.json_summary, args.record)
    _set_threads(args.threads)
    from .training.parallel import check_share, launch, must_launch, rank

    to_launch = must_launch(args.devices, args.num_nodes)
    sources = _load_sources(args)
    data = _load_data(recipe, args)
    if to_launch:
        check_share(recipe.batch_size, args.devices * args.num_nodes)
        return launch(args.devices, args.num_nodes, given)
    folders = [args.out if args.seeds is None else args.out / f"seed-{seed}" for seed in seeds]
    runs = _train_seeds(recipe, data, seeds, folders, args, reuse=args.seeds is not None, **sources)
    if rank():  # the first process speaks for all
        return 0
    _show_runs(runs, data.task)
    if args.json_summary is not None:
        from .training.checkpoint import write_json

        whole = runs[0].to_dict() if args.seeds is None else {"runs": [run.to_dict() for run in runs]}
        write_json(args.json_summary, whole)
    if args.record is not None:
        from .training.checkpoint import read_sources

        _write_training_record(args.record, recipe, data, runs, _command(given), read_sources(folders[0]))
    return 0


def _load_sources(args: Namespace) -> dict[str, Any]:
    """Load the trained weights that a run depends on: arguments of `mgic.training.train`."""
    from .training import load_start

    if args.new_head and args.init is None:
        raise UserError("--new-head belongs to --init")
    return {
        "teacher": None if args.teacher is None else _load_network(args.teacher),
        "init": None if args.init is None else load_start(args.init, args.new_head),
    }


def _load_network(run: Path) -> "TrainedNetwork":
    from .models import build_model
    from .training import load_network

    return load_network(run, lambda name, **arguments: build_model(name, arguments))


def _load_data(recipe: Recipe, args: Namespace) -> "Data":
    """Check the model's name and load the data, before anything long."""
    from .data import load_data, padded
    from .models import check_model

    check_model(recipe.model)
    return padded(load_data(recipe.data, args.root, args.download, **recipe.data_args), recipe.pad_images)


def _check_seeds(seeds: list[int]) -> list[int]:
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds must be different seeds, got {seeds}")
    return seeds


def _set_threads(threads: int) -> None:
    import torch

    if threads < 0:
        raise UserError(f"--threads must be 0 or more, got {threads}")
    if threads:
        torch.set_num_threads(threads)


def _builder(recipe: Recipe, data: "Data") -> Callable[[], "nn.Module"]:
    from .models import build_model

    arguments = {**data.model_arguments(), **recipe.model_args}
    return lambda: build_model(recipe.model, arguments)


def _train_seeds(
    recipe: Recipe,
    data: "Data",
    seeds: Sequence[int],
    folders: Sequence[Path],
    args: Namespace,
    reuse: bool,
    teacher: "TrainedNetwork | None" = None,
    init: "Start | None" = None,
) -> "list[RunSummary]":
    """Train each seed in its folder; with ``reuse``, those that are finished are not trained again."""
    from dataclasses import replace

    from .training import RunSummary, train
    from .training.checkpoint import finished_run
    from .training.distillation import note_sources

    runs = []
    for seed, folder in zip(seeds, folders, strict=True):
        one = replace(recipe, seed=seed)
        done = finished_run(folder, one, data.fingerprint(), note_sources(teacher, init)) if reuse else None
        if done is not None:
            _console(stderr=True).print(f"{folder}: finished before, not trained again")
            runs.append(RunSummary.from_dict(done))
            continue
        runs.append(
            train(
                one,
                _builder(one, data),
                data,
                folder,
                teacher=teacher,
                init=init,
                accelerator=args.get("accelerator", "auto"),
                strict_resume=args.get("strict_resume", False),
            )
        )
    return runs


def _command(given: Sequence[str]) -> str:
    """Return the call as a user would repeat it, without folders of this machine."""
    from .training.records import without_folder

    words, skip = ["mgic"], False
    for word in given:
        flag = word.partition("=")[0]
        if skip:
            skip = False
            continue
        if flag in ("--root", "--out", "--record", "--json-summary"):
            skip = "=" not in word
            continue
        if flag in ("--data", "--config", "--teacher", "--init") and "=" in word:
            word = f"{flag}={without_folder(word.partition('=')[2])}"
        elif words[-1] in ("--data", "--config", "--teacher", "--init"):
            word = without_folder(word)
        words.append(word)
    return shlex.join([*words, "--out=RUN"] if "train" in words else words)


def _write_training_record(
    path: Path,
    recipe: Recipe,
    data: "Data",
    runs: "list[RunSummary]",
    command: str,
    sources: dict[str, Any] | None = None,
) -> None:
    from .training.records import make_record, training_metrics, without_folder, write_record

    task = data.task
    notes = [
        f"{task.score}{f' in {task.unit}' if task.unit else ''} of the last epoch's weights; the test set picks no epoch"
    ]
    for run in runs[1:]:
        changed = [key for key in ("commit", "machine", "versions") if run.origin[key] != runs[0].origin[key]]
        if changed:
            notes.append(
                f"seed {run.seed} was finished with another {', '.join(changed)}: {[run.origin[k] for k in changed]}"
            )
    stated = recipe.to_dict() | {"data": without_folder(recipe.data)}  # no folder of this machine
    record = make_record(
        command,
        data.note,
        [run.seed for run in runs],
        training_metrics(runs),
        notes=notes,
        origin=runs[-1].origin,
        recipe=stated,
        history=[run.history for run in runs],
        **(sources or {}),
    )
    write_record(path, record)


def _show_runs(runs: "list[RunSummary]", task: "Task") -> None:
    from rich.table import Table

    score = f"{task.score} {task.unit}".strip()
    table = Table(
        "model", "data", "seed", "epochs", f"train {score}", f"test {score}", "s/epoch", box=None, pad_edge=False
    )
    for run in runs:
        scores = (f"{run.metrics[f'{split}_{task.score}']:.4g}" for split in ("train", "test"))
        table.add_row(*(run.model, run.data, str(run.seed), str(run.epochs)), *scores, f"{run.seconds_per_epoch:.2f}")
    _console().print(table)


def _add_evaluate(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--data", type=str, default=None, help="another data set than the run's own")
    parser.add_argument("--data_args", type=dict, default=None, help="arguments of the data set, instead of the run's")
    parser.add_argument("--split", type=str, default="test", help="test or train")
    _add_data(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run_evaluate(args: Namespace) -> int:
    from dataclasses import replace

    from .training import evaluate, load_run
    from .training.checkpoint import different, fit_weights, read_json

    if args.split not in ("train", "test"):
        raise UserError(f"--split must be train or test, got {args.split!r}")
    saved = load_run(args.run)
    recipe = saved.recipe if args.data is None else replace(saved.recipe, data=args.data, data_args={})
    recipe = replace(recipe, data_args=recipe.data_args if args.data_args is None else args.data_args)
    data = _load_data(recipe, args)
    trained_on = read_json(args.run / "data.json")
    if args.data is None and args.data_args is None and different(trained_on, data.fingerprint()):
        raise UserError(f"{args.run}: {recipe.data} is not the data it was trained on; name other data with --data")
    if len(trained_on["mean"]) == len(data.mean):  # what the network expects, whatever is fed to it
        data = replace(data, mean=tuple(trained_on["mean"]), std=tuple(trained_on["std"]))
    model = _builder(recipe, data)()
    fit_weights(model, saved.state_dict, f"{args.run}: its weights do not fit {recipe.model} for {data.name}")
    result = evaluate(model, data, args.split, batch_size=recipe.eval_batch_size, workers=recipe.workers)
    if args.json:
        _print_json({"model": recipe.model, "data": data.name, "split": args.split, **result})
    else:
        task = data.task
        unit = f" {task.unit}" if task.unit else ""
        text = f"{task.score} {result.pop(task.score):.4g}{unit}, loss {result.pop('loss'):.4f}"
        text += f" ({result.pop('samples'):,} {task.samples})"
        _console().print(f"{recipe.model} on {data.name} ({args.split}): {text}")
        for name, value in result.items():
            _console().print(f"  {name:<24} {value:6.2f}")
    return 0


def _add_publish(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--to", type=Path, required=True, help="new folder for weights, configuration and model card")
    parser.add_argument("--license", type=str, default=None, help="of the weights, as the hub names it: mit, ...")
    parser.add_argument("--push", type=str, default=None, help="upload the folder to this repository, OWNER/NAME")


def _run_publish(args: Namespace) -> int:
    from .publishing import check_repository, publish, push

    if args.push is not None:
        check_repository(args.push)
    publish(args.run, args.to, args.license)
    _console().print(f"{args.to}: written, loaded again and compared")
    if args.push is not None:
        _console().print(push(args.to, args.push))
    return 0


def _add_predict(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("inputs", nargs="+", type=Path, help="images, point clouds, or folders of them")
    parser.add_argument("--out", type=Path, default=None, help="folder for overlays, masks and predictions.json")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: as many as torch takes")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run_predict(args: Namespace) -> int:
    from .prediction import Predictor, files_in
    from .training.checkpoint import check_writable, write_json
    from .training.outside import progress_bar

    files = files_in(args.inputs)
    if args.out is not None:
        stems = [path.stem for path in files]
        twice = next((path for path in files if stems.count(path.stem) > 1), None)
        if twice is not None:
            raise UserError(f"{twice}: another input has the same name, so that --out could not hold both")
        check_writable(args.out / "predictions.json")
    _set_threads(args.threads)
    network = _load_network(args.run)
    predictor, said = Predictor(network.model, network.recipe, network.data), []
    with progress_bar(None, len(files)) as show:
        for count, path in enumerate(files, 1):
            said.append(predictor(path, args.out))
            show(count, path.name)
    if args.out is not None:
        write_json(args.out / "predictions.json", {"model": network.recipe.model, "predictions": said})
    if args.json:
        _print_json(said)
        return 0
    for one in said:
        shares = one.get("per_cent_of_pixels")
        if shares is None:
            text = f"{one['class']} ({100 * one['probability']:.1f} %)"
        else:
            text = ", ".join(f"{name} {share:g} %" for name, share in sorted(shares.items(), key=lambda s: -s[1]))
        _console().print(f"{one['file']}: {text}")
    return 0


def _add_demo(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder of the runs, the curves and the record"
    )
    parser.add_argument("--seeds", type=list[int], default=[0, 1, 2], help="seeds of the runs of each network")
    parser.add_argument(
        "--models", type=list[str], default=["resnet20", "mgic_resnet20"], help="networks, side by side"
    )
    parser.add_argument("--epochs", type=int, default=RECIPES["digits"].epochs, help="epochs of each run")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; networks this small gain nothing from more"
    )
    parser.add_argument("--json-summary", type=Path, default=None, help="write the table as JSON")


def _run_demo(args: Namespace, given: Sequence[str]) -> int:
    from dataclasses import replace

    from .counting import cost
    from .data import load_data
    from .models import check_model
    from .reporting import compare_table, plot_curves
    from .training.checkpoint import write_json

    _check_seeds(args.seeds)
    if not args.models or len(set(args.models)) < len(args.models):
        raise UserError(f"--models must be different networks, got {args.models}")
    for model in args.models:
        check_model(model)
    recipes = [replace(RECIPES["digits"], model=model, epochs=args.epochs) for model in args.models]
    _check_output(args.json_summary, args.out / "record.json")
    _set_threads(args.threads)
    data = load_data("digits")
    out = _console()
    out.print(f"{data.note}\nOne recipe: {args.epochs} epochs of SGD; seeds {args.seeds}; runs in {args.out}")
    rows, curves = [], {}
    for recipe in recipes:
        folders = [args.out / recipe.model / f"seed-{seed}" for seed in args.seeds]
        runs = _train_seeds(recipe, data, args.seeds, folders, args, reuse=True)
        counted = cost(_builder(recipe, data)(), data.input_size)
        rows.append(
            {
                "model": recipe.model,
                "params": counted.params,
                "macs": counted.macs,
                "train_accuracy": [run.metrics["train_accuracy"] for run in runs],
                "test_accuracy": [run.metrics["test_accuracy"] for run in runs],
                "seconds_per_epoch": [run.seconds_per_epoch for run in runs],
            }
        )
        curves[recipe.model] = [run.history for run in runs]
        _write_training_record(args.out / f"record-{recipe.model}.json", recipe, data, runs, _command(given))
    out.print(compare_table(rows))
    plot_curves(curves, args.out / "curves.png", title=f"{data.name}: {len(args.seeds)} seeds each")
    out.print(f"curves: {args.out / 'curves.png'}; records: {args.out}/record-*.json")
    if args.json_summary is not None:
        write_json(args.json_summary, {"data": data.note, "rows": rows})
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
        _print_json(facts)
        return 0
    out = _console()
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
    "train": ("train a network, or continue a run", _add_train, _run_train),
    "evaluate": ("measure how good a run is", _add_evaluate, lambda args, given: _run_evaluate(args)),
    "predict": ("say what is in images or point clouds", _add_predict, lambda args, given: _run_predict(args)),
    "publish": (
        "write a run as a folder for others, with a model card",
        _add_publish,
        lambda args, given: _run_publish(args),
    ),
    "convert": ("put multigrid into any network, with a report", cli_convert.add_convert, cli_convert.run_convert),
    "export": ("write files for other runtimes, checked", cli_export.add_export, cli_export.run_export),
    "bench": ("time networks, each way to run them, side by side", cli_bench.add_bench, cli_bench.run_bench),
    "demo": ("train a dense ResNet and its multigrid twin on real digits", _add_demo, _run_demo),
    "info": ("versions, machine, extras", _add_info, lambda args, given: _run_info(args)),
}


EXAMPLES = {
    "models": "  mgic models 'mgic_*'",
    "cost": """  mgic cost mgic_resnet56 --model_args '{group_size: 16}'
  mgic cost mgic_resnet50 --scaling --model_args '{group_size: 8, coarsest: 16}' --plot scaling.png""",
    "train": """  mgic train --recipe digits --model mgic_resnet20 --out runs/a      the same command continues a stopped run
  mgic train --recipe fashion_mnist --root data --download --seeds '[0, 1, 2]' --out runs/b --record results/b.json
  mgic train --recipe cifar10_mgic --model_args.group_size=16 --epochs 10 --print-config > mine.yaml
  mgic train --config mine.yaml --out runs/c
  mgic train --recipe digits --teacher runs/dense --out runs/d           learn from a trained network
  mgic train --recipe digits --init runs/other --new-head --out runs/e   start from its weights

  mgic train --recipe digits --devices 2 --accelerator cpu --out runs/f  two processes share each batch
  torchrun --nproc-per-node 8 -m mgic train --recipe imagenet_mgic_resnet50 --data shards:imagenet --out runs/g

Flags win over --config, which wins over --recipe. --model_args replaces all arguments of the network,
--model_args.NAME one of them.""",
    "evaluate": "  mgic evaluate runs/a --split train",
    "predict": """  mgic predict runs/camvid photo.jpg folder/ --out overlays
  mgic predict runs/solids cup.off --json""",
    "publish": """  mgic publish runs/a --to hub/mgic_resnet20
  mgic publish runs/a --to hub/mgic_resnet20 --license mit --push me/mgic_resnet20-digits""",
    "convert": cli_convert.EXAMPLES,
    "export": cli_export.EXAMPLES,
    "bench": cli_bench.EXAMPLES,
    "demo": "  mgic demo --out runs/demo --seeds '[0, 1, 2]'",
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

    0: done. 2: a wrong call, said in one line. 74: no room or no permission to write. 130, 143: interrupted, saved.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    verb = next((word for word in given if not word.startswith("-")), None)
    warnings.showwarning = lambda message, *rest, **more: print(f"mgic: warning: {message}", file=sys.stderr)  # noqa: T201
    try:
        if verb is not None and verb not in VERBS:
            raise UserError(f"unknown verb {verb!r}{suggest(verb, VERBS)}")
        args = _parser(verb).parse_args(given)
        with _ended_tidily():
            return VERBS[args.verb][2](args[args.verb], given)
    except (UserError, ArgumentError) as error:
        return _fail(error, 2)
    except ImportError as error:
        return _fail(_missing_extra(error), 2)
    except OSError as error:
        return _fail(error, 74)
    except KeyboardInterrupt as signalled:
        return _fail("interrupted; no file was left half written", 143 if isinstance(signalled, _Terminated) else 130)
    except Stopped as error:
        return _fail(error, error.exit_code)


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
    process = int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0
    if process and isinstance(error, Stopped):  # all have stopped: the first process says why
        return code
    print(f"mgic{f' (process {process})' if process else ''}: {line}", file=sys.stderr)  # noqa: T201
    return code
