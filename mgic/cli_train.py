"""The verbs that train networks and those that use trained ones: train, evaluate, predict, publish, demo."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from .cli_data import add_data, add_other_data, load_recipe_data, load_run_data, load_trained
from .cli_output import check_output, check_plot, console, print_json
from .errors import UserError, suggest
from .training.recipes import RECIPES, Recipe

if TYPE_CHECKING:
    from torch import nn

    from .data import Data, Task
    from .training import RunSummary, Start, TrainedNetwork

DISTILL_WEIGHT = 0.5
"""Of ``mgic train --teacher`` where neither recipe, file nor flags say what to learn from it."""

EXAMPLES = {
    "train": """  mgic train --recipe digits --model mgic_resnet20 --out runs/a      the same command continues a stopped run
  mgic train --recipe fashion_mnist --root data --download --seeds '[0, 1, 2]' --out runs/b --record results/b.json
  mgic train --recipe cifar10_mgic --model_args.group_size=16 --epochs 10 --print_recipe > mine.yaml
  mgic train --config mine.yaml --out runs/c
  mgic train --recipe digits --teacher runs/dense --out runs/d           learn from a trained network
  mgic train --recipe digits --init runs/other --new_head --out runs/e   start from its weights

  mgic train --recipe digits --devices 2 --accelerator cpu --out runs/f  two processes share each batch
  torchrun --nproc-per-node 8 -m mgic train --recipe imagenet_mgic_resnet50 --data shards:imagenet --out runs/g

Flags win over --config, which wins over --recipe. --model_args replaces all arguments of the network,
--model_args.NAME one of them, and so does --model NAME:argument=value,..., which flags win over too.""",
    "evaluate": "  mgic evaluate runs/a --split train",
    "predict": """  mgic predict runs/camvid photo.jpg folder/ --out overlays
  mgic predict runs/solids cup.off --json""",
    "publish": """  mgic publish runs/a --to hub/mgic_resnet20
  mgic publish runs/a --to hub/mgic_resnet20 --license mit --push me/mgic_resnet20-digits""",
    "demo": "  mgic demo --out runs/demo --seeds '[0, 1, 2]'",
}
"""By verb."""


def add_train(parser: ArgumentParser) -> None:
    """Add the flags of ``train``."""
    parser.add_argument("--recipe", type=str, default=None, help=f"start from a recipe: {', '.join(RECIPES)}")
    parser.add_argument("--config", type=Path, default=None, help="YAML file with fields of the recipe")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder of the run; with --seeds one folder a seed in it"
    )
    parser.add_argument("--seeds", type=list[int], default=None, help="several runs: '[0, 1, 2]'")
    add_data(parser)
    parser.add_argument("--teacher", type=Path, default=None, help="finished run whose network this one learns from")
    parser.add_argument("--init", type=Path, default=None, help="start from a finished run or a .safetensors file")
    parser.add_argument("--new_head", action="store_true", help="with --init: start the classifier afresh")
    parser.add_argument("--accelerator", type=str, default="auto", help="auto, cpu or cuda")
    parser.add_argument("--devices", type=int, default=1, help="processes on this machine, one a GPU")
    parser.add_argument("--num_nodes", type=int, default=1, help="machines; docs/many-machines.md")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: as many as torch takes")
    parser.add_argument("--strict_resume", action="store_true", help="stop at a corrupt checkpoint, do not fall back")
    parser.add_argument("--json_summary", type=Path, default=None, help="write the result of the run(s) as JSON")
    parser.add_argument("--record", type=Path, default=None, help="write a record of results (JSON)")
    parser.add_argument("--print_recipe", action="store_true", help="print the recipe as YAML and stop")
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
    if isinstance(values["model"], str):
        from .models.spelling import spelled

        asked = spelled(values["model"])
        if asked.size:
            raise UserError(f"--model {values['model']}: the size of images is their data's, not the network's")
        flagged = args.model_args if any(flag.partition(".")[0] == "model_args" for flag in flags) else {}
        values |= {"model": asked.name, "model_args": {**values["model_args"], **asked.arguments, **flagged}}
    return Recipe.from_dict(values)


def run_train(args: Namespace, given: Sequence[str]) -> int:
    """Run ``train``."""
    recipe = _recipe_from(args, given)
    if args.print_recipe:
        print(recipe.to_yaml(), end="")  # noqa: T201
        return 0
    if args.out is None:
        raise UserError("--out is missing: the folder of the run")
    seeds = check_seeds([recipe.seed] if args.seeds is None else args.seeds)
    check_output(args.json_summary, args.record)
    set_threads(args.threads)
    from .training.parallel import check_share, launch, must_launch, rank

    to_launch = must_launch(args.devices, args.num_nodes)
    sources = _load_sources(args)
    data = load_recipe_data(recipe, args)
    if to_launch:
        check_share(recipe.batch_size, args.devices * args.num_nodes)
        return launch(args.devices, args.num_nodes, given)
    folders = [args.out if args.seeds is None else args.out / f"seed-{seed}" for seed in seeds]
    runs = train_seeds(recipe, data, seeds, folders, args, reuse=args.seeds is not None, **sources)
    if rank():  # the first process speaks for all
        return 0
    _show_runs(runs, data.task)
    if args.json_summary is not None:
        from .training.files import write_json

        whole = runs[0].to_dict() if args.seeds is None else {"runs": [run.to_dict() for run in runs]}
        write_json(args.json_summary, whole)
    if args.record is not None:
        from .training.folder import read_sources
        from .training.records import command_of

        write_training_record(args.record, recipe, data, runs, command_of(given), read_sources(folders[0]))
    return 0


def _load_sources(args: Namespace) -> dict[str, Any]:
    """Load the trained weights that a run depends on: arguments of `mgic.training.train`."""
    from .training import load_start

    if args.new_head and args.init is None:
        raise UserError("--new_head belongs to --init")
    return {
        "teacher": None if args.teacher is None else load_trained(args.teacher),
        "init": None if args.init is None else load_start(args.init, args.new_head),
    }


def check_seeds(seeds: list[int]) -> list[int]:
    """Refuse no seed, or one twice."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds must be different seeds, got {seeds}")
    return seeds


def set_threads(threads: int) -> None:
    """Compute on so many threads; 0 leaves it to PyTorch."""
    import torch

    if threads < 0:
        raise UserError(f"--threads must be 0 or more, got {threads}")
    if threads:
        torch.set_num_threads(threads)


def builder(recipe: Recipe, data: "Data") -> Callable[[], "nn.Module"]:
    """Return what builds the network of a recipe for its data."""
    from .models import build_model

    arguments = {**data.model_arguments(), **recipe.model_args}
    return lambda: build_model(recipe.model, arguments)


def train_seeds(
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
    from .training.distillation import note_sources
    from .training.folder import finished_run
    from .training.memory import keep_freed_memory

    keep_freed_memory()  # this process does nothing else
    runs = []
    for seed, folder in zip(seeds, folders, strict=True):
        one = replace(recipe, seed=seed)
        done = finished_run(folder, one, data.fingerprint(), note_sources(teacher, init)) if reuse else None
        if done is not None:
            console(stderr=True).print(f"{folder}: finished before, not trained again")
            runs.append(RunSummary.from_dict(done))
            continue
        runs.append(
            train(
                one,
                builder(one, data),
                data,
                folder,
                teacher=teacher,
                init=init,
                accelerator=args.get("accelerator", "auto"),
                strict_resume=args.get("strict_resume", False),
            )
        )
    return runs


def write_training_record(
    path: Path,
    recipe: Recipe,
    data: "Data",
    runs: "list[RunSummary]",
    command: str,
    sources: dict[str, Any] | None = None,
) -> None:
    """Write the record of runs of one recipe."""
    from .training.records import make_record, origins_of, training_metrics, without_folder, write_record

    task = data.task
    notes = [
        f"{task.score}{f' in {task.unit}' if task.unit else ''} of the last epoch's weights; the test set picks no epoch"
    ]
    for run in runs[1:]:
        changed = [key for key in ("commit", "machine", "versions") if run.origin[key] != runs[0].origin[key]]
        if changed:
            notes.append(f"seed {run.seed} was finished with another {', '.join(changed)}: see origins")
    stated = recipe.to_dict() | {"data": without_folder(recipe.data)}  # no folder of this machine
    record = make_record(
        command,
        data.note,
        [run.seed for run in runs],
        training_metrics(runs),
        notes=notes,
        origin=origins_of(runs),
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
    console().print(table)


def add_evaluate(parser: ArgumentParser) -> None:
    """Add the flags of ``evaluate``."""
    parser.add_argument("run", type=Path, help="folder of a run")
    add_other_data(parser, "to measure on")
    parser.add_argument("--split", type=str, default="test", help="test or train")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_evaluate(args: Namespace, given: Sequence[str]) -> int:
    """Run ``evaluate``."""
    from .training import evaluate, load_run
    from .training.files import read_json
    from .training.weights import fit_weights

    if args.split not in ("train", "test"):
        raise UserError(f"--split must be train or test, got {args.split!r}")
    recipe, weights = load_run(args.run)
    data = load_run_data(args.run, recipe, read_json(args.run / "data.json"), args)
    model = builder(recipe, data)()
    fit_weights(model, weights, f"{args.run}: its weights do not fit {recipe.model} for {data.name}")
    result = evaluate(model, data, args.split, batch_size=recipe.eval_batch_size, workers=recipe.workers)
    if args.json:
        print_json({"model": recipe.model, "data": data.name, "split": args.split, **result})
    else:
        task = data.task
        unit = f" {task.unit}" if task.unit else ""
        text = f"{task.score} {result.pop(task.score):.4g}{unit}, loss {result.pop('loss'):.4f}"
        text += f" ({result.pop('samples'):,} {task.samples})"
        console().print(f"{recipe.model} on {data.name} ({args.split}): {text}")
        for name, value in result.items():
            console().print(f"  {name:<24} {value:6.2f}")
    return 0


def add_publish(parser: ArgumentParser) -> None:
    """Add the flags of ``publish``."""
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--to", type=Path, required=True, help="new folder for weights, configuration and model card")
    parser.add_argument("--license", type=str, default=None, help="of the weights, as the hub names it: mit, ...")
    parser.add_argument("--push", type=str, default=None, help="upload the folder to this repository, OWNER/NAME")


def run_publish(args: Namespace, given: Sequence[str]) -> int:
    """Run ``publish``."""
    from .publishing import check_repository, publish, push

    if args.push is not None:
        check_repository(args.push)
    publish(args.run, args.to, args.license)
    console().print(f"{args.to}: written, loaded again and compared")
    if args.push is not None:
        console().print(push(args.to, args.push))
    return 0


def add_predict(parser: ArgumentParser) -> None:
    """Add the flags of ``predict``."""
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("inputs", nargs="+", type=Path, help="images, point clouds, or folders of them")
    parser.add_argument("--out", type=Path, default=None, help="folder for overlays, masks and predictions.json")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: as many as torch takes")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_predict(args: Namespace, given: Sequence[str]) -> int:
    """Run ``predict``."""
    from .prediction import Predictor, files_in
    from .training.files import check_writable, write_json
    from .training.progress import progress_bar

    files = files_in(args.inputs)
    if args.out is not None:
        stems = [path.stem for path in files]
        twice = next((path for path in files if stems.count(path.stem) > 1), None)
        if twice is not None:
            raise UserError(f"{twice}: another input has the same name, so that --out could not hold both")
        check_writable(args.out / "predictions.json")
    set_threads(args.threads)
    network = load_trained(args.run)
    predictor, said = Predictor(network.model, network.recipe, network.data), []
    with progress_bar(None, len(files)) as show:
        for count, path in enumerate(files, 1):
            said.append(predictor(path, args.out))
            show(count, path.name)
    if args.out is not None:
        write_json(args.out / "predictions.json", {"model": network.recipe.model, "predictions": said})
    if args.json:
        print_json(said)
        return 0
    for one in said:
        shares = one.get("per_cent_of_pixels")
        if shares is None:
            text = f"{one['class']} ({100 * one['probability']:.1f} %)"
        else:
            text = ", ".join(f"{name} {share:g} %" for name, share in sorted(shares.items(), key=lambda s: -s[1]))
        console().print(f"{one['file']}: {text}")
    return 0


def add_demo(parser: ArgumentParser) -> None:
    """Add the flags of ``demo``."""
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
    parser.add_argument("--json_summary", type=Path, default=None, help="write the table as JSON")


def run_demo(args: Namespace, given: Sequence[str]) -> int:
    """Run ``demo``."""
    from dataclasses import replace

    from .counting import cost
    from .data import load_data
    from .models import check_model
    from .plots import plot_curves
    from .reporting import compare_table
    from .training.files import write_json
    from .training.records import command_of

    check_seeds(args.seeds)
    if not args.models or len(set(args.models)) < len(args.models):
        raise UserError(f"--models must be different networks, got {args.models}")
    for model in args.models:
        check_model(model)
    recipes = [replace(RECIPES["digits"], model=model, epochs=args.epochs) for model in args.models]
    check_plot(args.out / "curves.png")
    check_output(args.json_summary, args.out / "record.json")
    set_threads(args.threads)
    data = load_data("digits")
    out = console()
    out.print(f"{data.note}\nOne recipe: {args.epochs} epochs of SGD; seeds {args.seeds}; runs in {args.out}")
    rows, curves = [], {}
    for recipe in recipes:
        folders = [args.out / recipe.model / f"seed-{seed}" for seed in args.seeds]
        runs = train_seeds(recipe, data, args.seeds, folders, args, reuse=True)
        counted = cost(builder(recipe, data)(), data.input_size)
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
        write_training_record(args.out / f"record-{recipe.model}.json", recipe, data, runs, command_of(given))
    out.print(compare_table(rows))
    plot_curves(curves, args.out / "curves.png", title=f"{data.name}: {len(args.seeds)} seeds each")
    out.print(f"curves: {args.out / 'curves.png'}; records: {args.out}/record-*.json")
    if args.json_summary is not None:
        write_json(args.json_summary, {"data": data.note, "rows": rows})
    return 0
