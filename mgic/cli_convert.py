"""The verb ``convert``: any network in, a converted one with its report out."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from .cli_data import add_other_data, load_named_data, load_run_data, load_trained
from .cli_output import check_output, console, print_json
from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .conversion_report import ConversionReport
    from .fitting import Fit
    from .training import TrainedNetwork

EXAMPLES = """  mgic convert torchvision:resnet50 --group_size 32 --coarsest 64 --dry_run
  mgic convert timm_or_own_name --target_macs 1e9 --out converted
  mgic convert runs/dense --group_size 8 --coarsest 16 --blocks false --warm_start --root data --out converted
  mgic train --recipe digits --config converted/recipe.yaml --init converted/model.safetensors --out runs/a

A run of mgic train keeps its weights; a name starts with random ones unless --pretrained or --checkpoint is given.
--warm_start fits the new layers to the old ones on training images of the run's data, or of --data."""


def add_convert(parser: ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "source", type=str, help="run folder, or a network as mgic cost takes it: NAME:argument=value,..."
    )
    parser.add_argument("--model_args", type=dict, default={}, help="arguments of a network given by name")
    parser.add_argument("--pretrained", action="store_true", help="fetch the weights that belong to the name")
    parser.add_argument(
        "--checkpoint", type=Path, default=None, help="weights of a network given by name (.safetensors)"
    )
    parser.add_argument("--group_size", type=int, default=32, help="channels per group (s_g)")
    parser.add_argument("--coarsest", type=int, default=64, help="width at which to stop coarsening (s_c)")
    parser.add_argument("--blocks", type=bool, default=True, help="replace residual blocks whole")
    parser.add_argument("--linear", type=bool, default=False, help="replace wide linear layers too")
    parser.add_argument(
        "--target_params", type=float, default=None, help="most parameters; chooses s_g and s_c by stage"
    )
    parser.add_argument("--target_macs", type=float, default=None, help="most multiply-adds")
    parser.add_argument("--target_ms", type=float, default=None, help="milliseconds of one input, measured here")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of --target_ms; 1 by default")
    parser.add_argument("--only", type=list[str], default=None, help="shell patterns of layers that may be replaced")
    parser.add_argument("--input_size", type=list[int], default=None, help="'[3, 224, 224]'; its own by default")
    parser.add_argument("--warm_start", action="store_true", help="fit the new layers to the weights of the old")
    add_other_data(parser, "of --warm_start")
    parser.add_argument("--samples", type=int, default=None, help="training samples of --warm_start; 512 by default")
    parser.add_argument("--steps", type=int, default=None, help="steps of each layer's reconstruction; 100 by default")
    parser.add_argument("--out", type=Path, default=None, help="folder for the converted network and its report")
    parser.add_argument("--record", type=Path, default=None, help="write a record of results (JSON)")
    parser.add_argument("--dry_run", action="store_true", help="only report")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run_convert(args: Namespace, given: Sequence[str]) -> int:
    """Convert, print, write."""
    from .conversion import convert
    from .conversion_folder import Converted, save_converted
    from .conversion_page import conversion_table
    from .conversion_report import Conversion

    if args.out is None and not args.dry_run:
        raise UserError("--out is missing: the folder of the converted network; or give --dry_run")
    if args.out is not None:
        if args.out.exists() and any(args.out.iterdir()):
            raise UserError(f"--out {args.out}: not empty; name a new folder")
        check_output(args.out / "conversion.json")
    check_output(args.record)
    _defaults(args)
    model, name, arguments, calibration = _source(args)
    options: dict[str, Any] = {"where": _where(args.only), "input_size": args.input_size, "dry_run": args.dry_run}
    targets = {f"target_{unit}": args[f"target_{unit}"] for unit in ("params", "macs", "ms")}
    options |= {key: value for key, value in targets.items() if value is not None}
    if args.target_ms is not None:
        options["threads"] = args.threads or 1
    converted, report = convert(model, Conversion(args.group_size, args.coarsest, args.blocks, args.linear), **options)
    report = replace(report, model=name)  # torchvision's networks know their class only
    fits: list[Fit] = []
    if args.warm_start and not args.dry_run and any(row.replaced for row in report.rows):
        from .fitting import warm_start_

        fits = warm_start_(converted, model, calibration, steps=args.steps)
    if args.out is not None and not args.dry_run:
        save_converted(args.out, Converted(converted.eval(), name, arguments, report))
    if args.record is not None:
        _write_record(args.record, report, fits, given)
    if args.json:
        print_json({**json.loads(report.to_json()), "fits": [vars(fit) for fit in fits]})
        return 0
    out = console(width=160)
    out.print(conversion_table(report))
    out.print(str(report))
    _print_budget(report, out.print)
    for fit in fits:
        out.print(str(fit))
    if args.out is not None and not args.dry_run:
        out.print(f"written: {args.out} (conversion.json, model.safetensors, recipe.yaml, report.html)")
    return 0


def _defaults(args: Namespace) -> None:
    """Refuse flags that would do nothing, and fill in the others."""
    for flag in ("data", "data_args", "download", "samples", "steps"):
        if args[flag] not in (None, False) and not args.warm_start:
            raise UserError(f"--{flag} belongs to --warm_start")
    if args.threads is not None and args.target_ms is None:
        raise UserError("--threads belongs to --target_ms")
    args.samples = 512 if args.samples is None else args.samples
    args.steps = 100 if args.steps is None else args.steps
    if args.samples < 1:
        raise UserError(f"--samples must be at least 1, got {args.samples}")


def _write_record(path: Path, report: "ConversionReport", fits: "list[Fit]", given: Sequence[str]) -> None:
    from .training.records import command_of, make_record, write_record

    pairs = {"before": report.before, "after": report.after}
    metrics = {f"{unit}_{when}": [getattr(cost, unit)] for when, cost in pairs.items() for unit in ("params", "macs")}
    budget = dict(report.budget)
    if budget:
        metrics |= {f"{budget['unit']}_{key}": [budget[key]] for key in ("before", "target", "predicted", "measured")}
    rows = json.loads(report.to_json())["rows"]
    data = "no data; random weights" if not fits else "calibration inputs only"
    extra: dict[str, Any] = {"rows": rows, "budget": budget, "fits": [vars(fit) for fit in fits]}
    write_record(path, make_record(command_of(given), data, [0], metrics, report.notes, **extra))


def _where(patterns: list[str] | None) -> Any:
    if patterns is None:
        return None
    from fnmatch import fnmatch

    return lambda name, module: any(fnmatch(name, pattern) for pattern in patterns)


def _print_budget(report: "ConversionReport", say: Any) -> None:
    budget = report.budget
    if not budget:
        return
    for choice in budget["choices"]:
        setting = f"s_g {choice['group_size']}, s_c {choice['coarsest']}" if choice["group_size"] else "dense"
        say(
            f"stage {choice['stage'] or '(others)':<10} {setting:<18} {choice['before']:>14,.6g} -> {choice['after']:,.6g}"
        )
    words = " ".join(f"{key} {budget[key]:,.6g}" for key in ("before", "target", "predicted", "measured"))
    say(f"{budget['unit']}: {words}" + (f" ({budget['path']}, {budget['threads']} thread)" if "path" in budget else ""))


def _source(args: Namespace) -> "tuple[nn.Module, str, dict[str, Any], list[Tensor]]":
    """Return the network, its name and arguments, and calibration inputs where they are asked for."""
    from .models import build_model
    from .models.spelling import TORCHVISION, input_size, spelled
    from .training.weights import fit_weights, load_start

    folder = Path(args.source)
    if folder.is_dir():
        for flag in ("model_args", "checkpoint", "pretrained"):
            if args[flag]:
                raise UserError(f"--{flag} belongs to a network given by name; {folder} is a run folder")
        run = load_trained(folder)
        if args.input_size is None:
            args.input_size = run.data["input_size"]
        return run.model, run.recipe.model, run.arguments, _calibration(args, run)
    if args.pretrained and args.checkpoint:
        raise UserError("give one of --pretrained and --checkpoint")
    name, arguments, size = spelled(args.source)
    arguments |= args.model_args
    weights = (
        {} if not args.pretrained else {"weights": "DEFAULT"} if name.startswith(TORCHVISION) else {"pretrained": True}
    )
    model = build_model(name, {**arguments, **weights})
    if size and args.input_size is None:
        args.input_size = list(input_size(model, size))
    if args.checkpoint is not None:
        fit_weights(model, load_start(args.checkpoint).state_dict, f"{args.checkpoint}: its weights do not fit {name}")
    if args.warm_start and args.data is None:
        raise UserError("--warm_start of a network given by name needs calibration data: --data")
    return model.eval(), name, arguments, _calibration(args, None)


def _calibration(args: Namespace, run: "TrainedNetwork | None") -> "list[Tensor]":
    """Return training inputs, normalised as the network expects, in batches."""
    if not args.warm_start or args.dry_run:
        return []
    data = load_named_data(args) if run is None else load_run_data(Path(args.source), run.recipe, run.data, args)
    return [inputs for inputs, _ in data.drawn(data.train, args.samples, min(64, args.samples))]
