"""The verb ``experiment``: train the grids of `mgic.experiments`, measure what they cost, and say what came of the claims."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from .cli_data import add_data, load_recipe_data
from .cli_output import check_output, check_plot, console, print_json
from .cli_train import check_seeds, set_threads, train_seeds, write_training_record
from .errors import UserError, suggest

if TYPE_CHECKING:
    from rich.table import Table

    from .experiments import Experiment, Outcome
    from .training import Recipe

EXAMPLES = """  mgic experiment                                            all of them, and what is there
  mgic experiment effects --root data --out runs/experiments train what is missing; the same command goes on
  mgic experiment width --times                              measure milliseconds, on an idle machine
  mgic experiment width --show --plot width.png              the same, and a picture
  mgic experiment width --show                               the table and the claims, from the records
  mgic experiment --markdown > docs/experiments.md           the page"""


def add_experiment(parser: ArgumentParser) -> None:
    """Add the flags of ``experiment``."""
    parser.add_argument("name", nargs="?", type=str, default=None, help="which; without it all are listed")
    parser.add_argument("--only", type=list[str], default=None, help="some of its variants")
    parser.add_argument("--seeds", type=list[int], default=None, help="instead of its own")
    parser.add_argument("--data", type=str, default=None, help="where its data set is: npz:PATH for cifar10")
    add_data(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path("results/experiments"), help="folder of the records")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 0: as many as torch takes")
    parser.add_argument("--accelerator", type=str, default="auto", help="auto, cpu or cuda")
    parser.add_argument("--times", action="store_true", help="count and time the networks instead of training them")
    parser.add_argument("--plot", type=Path, default=None, help="PNG of accuracy against cost, from the records")
    parser.add_argument("--show", action="store_true", help="show what is there, train nothing")
    parser.add_argument("--json", action="store_true", help="print what is there as JSON, train nothing")
    parser.add_argument("--markdown", action="store_true", help="print what is there as Markdown, train nothing")


def run_experiment(args: Namespace, given: Sequence[str]) -> int:
    """Run ``experiment``."""
    from .experiments import EXPERIMENTS, read_outcomes

    if args.name is not None and args.name not in EXPERIMENTS:
        raise UserError(f"there is no experiment {args.name!r}{suggest(args.name, EXPERIMENTS)}")
    names = list(EXPERIMENTS) if args.name is None else [args.name]
    if args.plot is not None and args.name is None:
        raise UserError("--plot belongs to one experiment")
    check_plot(args.plot)
    if args.times and (args.only or args.seeds or args.data):
        raise UserError("--times counts and times all variants: --only, --seeds and --data belong to training")
    if args.name is not None and not (args.show or args.json or args.markdown):
        if args.times:
            _measure(args.name, args, given)
        else:
            _train(args.name, args, given)
    elif args.only or args.seeds or args.data or args.times:
        raise UserError("--only, --seeds, --data and --times belong to the run of one experiment")
    outcomes = {name: read_outcomes(name, args.results / name) for name in names}
    if args.plot is not None:
        from .plots import plot_outcomes

        plot_outcomes(outcomes[args.name], args.plot, f"{args.name}: {EXPERIMENTS[args.name].question}")
    if args.json:
        print_json({name: _plain(name, found) for name, found in outcomes.items()})
    elif args.markdown:
        from .reporting import experiments_markdown

        print(experiments_markdown(outcomes), end="")  # noqa: T201
    else:
        for name, found in outcomes.items():
            _show(name, found, brief=args.name is None)
    return 0


def _train(name: str, args: Namespace, given: Sequence[str]) -> None:
    """Train what no record holds, seed by seed, so that what is done first can be compared."""
    from .experiments import EXPERIMENTS, file_name, recorded_runs
    from .training import (
        read_record,
        train,  # noqa: F401  (what is missing for it: said before the work)
    )
    from .training.records import command_of

    experiment = EXPERIMENTS[name]
    seeds = check_seeds(list(experiment.seeds) if args.seeds is None else args.seeds)
    variants = list(experiment.variants) if args.only is None else args.only
    recipes = {variant: _recipe(experiment, variant, args) for variant in variants}
    files = {variant: args.results / name / file_name(variant) for variant in variants}
    check_output(*files.values())
    set_threads(args.threads)
    data = {key: load_recipe_data(recipe, args) for key, recipe in {_data_key(r): r for r in recipes.values()}.items()}
    out = console(stderr=True)
    for k, (seed, (variant, recipe)) in enumerate(product(seeds, recipes.items()), 1):
        here, path = data[_data_key(recipe)], files[variant]
        known = recorded_runs(name, variant, args.results, here.note)
        recorded = ": recorded" if seed in known else ""
        out.print(f"{name}, {k} of {len(seeds) * len(recipes)}: {variant}, seed {seed}{recorded}")
        if not recorded:
            folder = args.out / _folder(recipe) / f"seed-{seed}"
            (run,) = train_seeds(recipe, here, [seed], [folder], args, reuse=True)
            known = recorded_runs(name, variant, args.results, here.note) | {seed: run}  # others may have written since
        if not path.exists() or len(known) > read_record(path)["n"]:
            write_training_record(path, recipe, here, list(known.values()), command_of(given))


def _recipe(experiment: "Experiment", variant: str, args: Namespace) -> "Recipe":
    recipe = experiment.recipe(variant)
    return recipe if args.data is None else replace(recipe, data=args.data)


def _data_key(recipe: "Recipe") -> tuple[Any, ...]:
    return recipe.data, repr(recipe.data_args), recipe.pad_images


def _folder(recipe: "Recipe") -> str:
    """The same for the same recipe: experiments that share a variant share its runs."""
    import hashlib

    stated = {key: value for key, value in recipe.to_dict().items() if key not in ("seed", "data")}
    return f"{recipe.model.rpartition(':')[2]}-{hashlib.sha256(repr(stated).encode()).hexdigest()[:8]}"


PATHS = ("eager", "eager_nhwc", "onnxruntime", "engine")


def _measure(name: str, args: Namespace, given: Sequence[str]) -> None:
    """Count, and time one image on one thread, all variants in the same rounds, each in its fastest path."""
    from .benchmarking import Network, group, run_benchmark
    from .experiments import EXPERIMENTS
    from .training.records import command_of, make_record, write_record

    experiment = EXPERIMENTS[name]
    check_output(args.results / name / "costs.json")
    networks = {}
    for variant in experiment.variants:
        recipe = experiment.recipe(variant)
        grey = {"in_chans": 1} if recipe.data == "fashion_mnist" else {}
        networks[variant] = Network(recipe.model, {"num_classes": 10, **grey, **recipe.model_args}, 28 if grey else 32)
    found = run_benchmark([group(list(networks.values()), paths=PATHS)], say=console(stderr=True).print)
    costs, metrics = {}, {}
    for variant, network in networks.items():
        timed = [row for row in found.timings if row["network"] == str(network) and row["seconds"]]
        if not timed:
            reasons = {str(row["reason"]) for row in found.timings if row["network"] == str(network)}
            raise UserError(f"{variant}: {network} could not be timed: {'; '.join(sorted(reasons))}")
        best = min(timed, key=lambda row: row["ms"])
        costs[variant] = {"params": best["params"], "macs": best["macs"], "ms": best["ms"], "path": best["path"]}
        metrics[variant] = [1e3 * s for s in best["seconds"]]
    record = make_record(
        command_of(given),
        "random images, float32; random weights",
        [0] * found.rounds,
        metrics,
        ["milliseconds of one image on one thread, each network in the fastest of its paths, all in the same rounds"],
        costs=costs,
        timings=[{key: value for key, value in row.items() if key != "seconds"} for row in found.timings],
    )
    write_record(args.results / name / "costs.json", record)


def _plain(name: str, outcomes: "dict[str, Outcome]") -> dict[str, Any]:
    from .experiments import EXPERIMENTS, findings

    return {
        "question": EXPERIMENTS[name].question,
        "variants": {
            variant: {"n": o.record["n"], "metrics": o.record["metrics"], "costs": dict(o.costs)}
            for variant, o in outcomes.items()
        },
        "claims": [
            {
                "says": f.claim.says,
                "source": f.claim.source,
                "difference": None if f.difference is None else {k: _finite(v) for k, v in vars(f.difference).items()},
                "verdict": f.verdict,
            }
            for f in findings(name, outcomes)
        ],
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity: the interval of one pair has no ends."""
    return value if math.isfinite(value) else None


def _show(name: str, outcomes: "dict[str, Outcome]", brief: bool) -> None:
    from .experiments import EXPERIMENTS, findings
    from .reporting import CLAIM_COLUMNS, OUTCOME_COLUMNS, claim_cells, outcome_cells

    experiment, out = EXPERIMENTS[name], console()
    done = sum(min(o.record["n"], len(experiment.seeds)) for o in outcomes.values())
    out.print(
        f"{name}: {experiment.question} {done} of {len(experiment.variants) * len(experiment.seeds)} runs recorded."
    )
    if brief:
        return
    if outcomes:
        out.print(_table(OUTCOME_COLUMNS, [outcome_cells(variant, o) for variant, o in outcomes.items()], 1))
    out.print(_table(CLAIM_COLUMNS, [claim_cells(finding) for finding in findings(name, outcomes)], 3))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], labels: int) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for k, column in enumerate(columns):
        table.add_column(column, justify="left" if k < labels else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
