"""The verb ``export``: where the network comes from, its flags, what it prints."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from .cli_data import add_other_data, load_named_data, load_run_data, load_trained
from .cli_output import check_output, console, print_json
from .errors import Stopped, UserError, suggest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .data import Data
    from .exporting import Artefact
    from .formats import Format
    from .runtime.paths import Run
    from .training import Recipe

EXAMPLES = """  mgic export runs/a --to '[onnx, onnx_int8, openvino]' --out deploy
  mgic export mgic_resnet50:group_size=32,coarsest=32 --checkpoint weights.safetensors --to '[executorch]' --out deploy

Formats: onnx, onnx_int8, openvino, executorch, torch. Every file is run in its own runtime and held against eager PyTorch
before it gets its name; one that differs never appears. int8 is calibrated with the training data of the run, or --data, and
may lose one point of its score on test samples (1,000 at most)."""
CALIBRATION_BATCH = 16
SCORED = 1000
"""Test samples, at most, that an int8 file is scored on."""


@dataclass(frozen=True)
class Source:
    """A network to export.

    Args:
        name: What the files are called.
        model: In eval mode.
        weights: Where its weights are from, in words.
        input_size: Size of one input.
        recipe: What it was trained by, if it was.
        data: What its run noted down about its data, if there was one.
    """

    name: str
    model: "nn.Module"
    weights: str
    input_size: tuple[int, ...]
    recipe: "Recipe | None" = None
    data: dict[str, Any] | None = None


def add_export(parser: ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "source",
        type=str,
        help="folder of mgic train or mgic convert, or a network: name, name@SIZE or name:argument=value,...",
    )
    parser.add_argument("--to", type=list[str], default=["onnx"], help="formats: '[onnx, openvino]'")
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    parser.add_argument("--checkpoint", type=Path, default=None, help="weights of a named network: a safetensors file")
    parser.add_argument(
        "--input_size", type=list[int], default=None, help="'[3, 224, 224]'; the network's own by default"
    )
    parser.add_argument(
        "--max_batch", type=int, default=8, help="most inputs at once, where memory is planned for them"
    )
    add_other_data(parser, "of the calibration")
    parser.add_argument("--calibration_samples", type=int, default=256, help="training samples of the calibration")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_export(args: Namespace, given: Sequence[str]) -> int:
    """Write each format; one that fails is a line, and the others are written all the same."""
    import torch

    from .exporting import export

    formats = _formats(args.to)
    _check(args, formats)
    source = load_source(args)
    calibrated = any(kind.calibrated for kind in formats.values())
    calibration, score = _calibration(source, args) if calibrated else ([], None)
    example = calibration[0] if calibration else torch.randn(2, *source.input_size)
    made, failed = [], 0
    for name, kind in formats.items():
        file = args.out / f"{source.name}{_label(name)}{kind.suffix}"
        try:
            made.append(
                export(
                    source.model,
                    example,
                    file,
                    format=name,
                    calibration=calibration if kind.calibrated else [],
                    score=score if kind.calibrated else None,
                    max_batch=args.max_batch,
                    name=source.name,
                    weights=source.weights,
                )
            )
        except (UserError, Stopped) as error:
            print(f"mgic: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
            failed = failed or getattr(error, "exit_code", 2)
    if args.json:
        print_json([asdict(one) for one in made])
    elif made:
        _show(source, made)
    return failed


def load_source(args: Namespace) -> Source:
    """Load the network: of a run folder, or by its name, with the weights of ``--checkpoint`` or random ones.

    Raises:
        UserError: There is no such run or network, or the weights do not fit.
    """
    if Path(args.source).is_dir():
        from .conversion_folder import is_converted, load_converted

        if args.checkpoint is not None:
            raise UserError(f"--checkpoint is for a named network; {args.source} is a folder, with weights of its own")
        if is_converted(args.source):
            converted = load_converted(args.source)
            size = tuple(args.input_size or converted.report.after.input_size)
            return Source(f"{converted.source.rpartition(':')[2]}_converted", converted.model, "converted", size)
        run = load_trained(Path(args.source))
        size, recipe = tuple(args.input_size or run.data["input_size"]), run.recipe
        weights = f"a run of {recipe.model} on {run.data['name'].rpartition('/')[2]}, seed {recipe.seed}"
        return Source(recipe.model.rpartition(":")[2], run.model, weights, size, recipe, run.data)
    import torch

    from .benchmarking import Network, random_norms_
    from .models import build_model
    from .training.weights import fit_weights, read_safetensors

    network = Network.parse(args.source)
    torch.manual_seed(0)
    model = build_model(network.name, network.args)
    if args.checkpoint is None:
        weights = "random"
        random_norms_(model)
    elif not args.checkpoint.is_file():
        raise UserError(f"--checkpoint {args.checkpoint}: no such file")
    else:
        weights = args.checkpoint.name
        fit_weights(model, read_safetensors(args.checkpoint), f"{args.checkpoint}: its weights do not fit {network}")
    size = tuple(args.input_size or network.input_size(model))
    return Source(network.file_name, model.eval(), weights, size)


def _formats(names: Sequence[str]) -> "dict[str, Format]":
    from .formats import FORMATS

    if not names or len(set(names)) < len(names):
        raise UserError(f"--to must be different formats, got {names}")
    for name in names:
        if name not in FORMATS:
            raise UserError(f"there is no format {name!r}{suggest(name, FORMATS)}")
    return {name: FORMATS[name] for name in names}


def _check(args: Namespace, formats: "dict[str, Format]") -> None:
    """Refuse, before any work, what could not end well."""
    for name, kind in formats.items():
        for package in kind.packages:
            if find_spec(package) is None:
                raise ModuleNotFoundError(f"{package} is not installed", name=package)
        if kind.calibrated and args.data is None and not _is_run(args.source):
            raise UserError(
                f"{name} needs calibration data: --data NAME, with samples such as the network was trained on"
            )
    for flag in ("data", "data_args"):
        if args[flag] is not None and not any(kind.calibrated for kind in formats.values()):
            raise UserError(f"--{flag} is for calibration, and none of these formats needs one")
    if args.calibration_samples < 1 or args.max_batch < 2:
        raise UserError(
            f"--calibration_samples must be 1 or more and --max_batch 2 or more, got {args.calibration_samples} and "
            f"{args.max_batch}"
        )
    if args.input_size is not None and (not args.input_size or min(args.input_size) < 1):
        raise UserError(f"--input_size must be positive numbers, got {args.input_size}")
    check_output(args.out / "model")


def _is_run(source: str) -> bool:
    """Whether a source is a folder that says what data it was trained on."""
    from .conversion_folder import is_converted

    return Path(source).is_dir() and not is_converted(source)


def _calibration(source: Source, args: Namespace) -> "tuple[list[Tensor], Callable[[Run], float] | None]":
    """Random training samples, as the network sees them in training but not augmented; and the score on test samples."""
    if source.recipe is None or source.data is None:
        data = load_named_data(args)
    else:
        data = load_run_data(Path(args.source), source.recipe, source.data, args)
    if data.input_size != source.input_size:
        raise UserError(
            f"{data.name} has inputs of size {list(data.input_size)}, the network's are {list(source.input_size)}; "
            "give --input_size or other --data"
        )
    inputs = [x for x, _ in data.drawn(data.train, args.calibration_samples, CALIBRATION_BATCH)]
    return inputs, partial(_score, data) if data.task.unit == "%" else None


def _score(data: "Data", run: "Run") -> float:
    """What a network or a file is worth on random test samples, in percent."""
    import torch

    meter = data.task.meter()
    for inputs, targets in data.drawn(data.test, SCORED, CALIBRATION_BATCH):
        with torch.no_grad():
            output = data.task.infer(run, inputs)  # type: ignore[arg-type]
        meter.update(output.float(), targets)
    return meter.compute()[data.task.score]


def _label(name: str) -> str:
    """What tells the files of two formats with one suffix apart: ``_int8``."""
    _, underscore, kind = name.partition("_")
    return underscore + kind


def _show(source: Source, made: "Sequence[Artefact]") -> None:
    from rich.table import Table

    out = console()
    out.print(f"{source.name}, input {'x'.join(map(str, source.input_size))}, weights: {source.weights}")
    table = Table(box=None, pad_edge=False)
    for name in ("format", "file", "MiB", "convolutions", "error", "dB", "score", "batches"):
        table.add_column(name, justify="left" if name in ("format", "file", "batches") else "right")
    for one in made:
        counts = one.convolutions
        decibels = "exact" if one.decibels is None else f"{one.decibels:.1f}"
        found = "?" if counts["found"] is None else f"{counts['found']} of {counts['expected']}"
        size = f"{one.bytes / 2**20:.2f}"
        score = "" if one.score is None else f"{one.score['eager']:.2f} -> {one.score['file']:.2f} %"
        table.add_row(one.format, one.file, size, found, f"{one.error:.1e}", decibels, score, one.takes)
    out.print(table)
