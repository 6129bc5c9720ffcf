"""Approximation of functions with the blocks of MobileNetV3, GhostNet and MGIC: error over parameters, fold by fold.

    python benchmarks/function_approximation.py --out RUNS --results results/function-approximation

Eliasof et al. 2023, Sec. 4.2 and Figure 4, made small enough for a CPU (the recipe ``functions_small``); ``--full`` is the
paper's own setting, for GPUs and days. Each network is trained on each fold in a folder of its own, so that the same command
continues what was stopped. One record a network and width; ``mgic figure mgic-4`` draws them.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import mgic
from mgic.data import load_data
from mgic.training import RECIPES, Recipe, RunSummary, make_record, train, write_record
from mgic.training.folder import finished_run
from mgic.training.records import training_metrics

SERIES = {"function_net": "MobileNetV3", "ghost_function_net": "GhostNet", "mgic_function_net": "MGIC"}
NOTES = (
    "mse is the test error of the last epoch's weights; n counts folds, and a fold's number is its seed",
    "MGIC: s_g = s_c = 8; the paper states neither",
)


def run_fold(recipe: Recipe, fold: int, out: Path) -> tuple[RunSummary, str]:
    """Train on a fold, or find it trained before; return how it went, and the note of the data."""
    recipe = replace(recipe, seed=fold, data_args={**recipe.data_args, "fold": fold})
    data = load_data(recipe.data, **recipe.data_args)
    done = finished_run(out, recipe, data.fingerprint())
    if done is not None:
        return RunSummary.from_dict(done), data.note
    arguments = {**data.model_arguments(), **recipe.model_args}
    return train(recipe, lambda: mgic.create_model(recipe.model, **arguments), data, out), data.note


def plan(base: Recipe, widths: Sequence[int]) -> Iterator[Recipe]:
    """Yield the recipe of every network, narrow ones first."""
    for c_max in widths:
        for name in SERIES:
            yield replace(base, model=name, model_args={"c_max": c_max})


def main(given: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="the paper's setting: 10 million points, 1,000 epochs")
    parser.add_argument("--c-max", type=int, nargs="+", help="greatest widths; 32 to 256, with --full 64 to 1024")
    parser.add_argument("--folds", type=int, help="3, with --full 10")
    parser.add_argument("--epochs", type=int, help="in place of the recipe's")
    parser.add_argument("--points", type=int, help="in place of the paper's number")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--results", type=Path, required=True, help="folder of the records")
    args = parser.parse_args(given)
    torch.set_num_threads(args.threads)
    base = RECIPES["functions" if args.full else "functions_small"]
    base = replace(
        base,
        epochs=args.epochs or base.epochs,
        data_args={"points": args.points} if args.points else {},
    )
    widths = args.c_max or ([64, 128, 256, 512, 1024] if args.full else [32, 64, 128, 256])
    folds = range(args.folds or (10 if args.full else 3))
    stated = [word for word in given if word not in ("--out", str(args.out), "--results", str(args.results))]
    command = shlex.join(["python", "benchmarks/function_approximation.py", *stated, "--out=RUNS", "--results=RESULTS"])
    for recipe in plan(base, widths):
        name = f"{recipe.model}-{recipe.model_args['c_max']}"
        runs, notes = zip(*(run_fold(recipe, fold, args.out / name / f"fold-{fold}") for fold in folds), strict=True)
        metrics = training_metrics(runs)
        record = make_record(
            command,
            notes[0].replace(", fold 0", f", folds {', '.join(map(str, folds))}"),
            folds,
            {"mse": metrics["test_mse"], **metrics},
            NOTES,
            runs[-1].origin,
            figure="mgic-4",
            series=SERIES[recipe.model],
            recipe=recipe.to_dict(),
        )
        write_record(args.results / f"{name}.json", record)
        mse = record["metrics"]["mse"]
        print(f"{name:24s} {runs[0].params:9,} parameters  mse {mse['mean']:.2e} ± {mse['std']:.1e}", flush=True)


if __name__ == "__main__":
    main()
