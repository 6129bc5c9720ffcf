"""What a start from trained weights and a teacher are worth, beside pruning: one record, one plot.

A dense network is trained; it is converted (blocks, and convolutions alone) and pruned (Torch-Pruning, by magnitude) to the
same multiply-adds; all are trained on for the same few epochs. Every start is measured before that, too.

    python benchmarks/conversion_worth.py --root data --out runs/worth --record results/conversion-worth.json --plot worth.png

The same call continues. Times are taken last, in every runtime, in turns: on a machine that does nothing else.
"""

import argparse
import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from mgic import accelerate, cost, create_model
from mgic.conversion import convert
from mgic.conversion_report import Conversion
from mgic.data import load_data
from mgic.fitting import warm_start_
from mgic.training import RECIPES, evaluate, make_record, train, write_record
from mgic.training.weights import load_network

DENSE = replace(
    RECIPES["fashion_mnist"],
    model="resnet18",
    model_args={"channels": [32, 64, 128, 256], "num_classes": 10, "in_chans": 1},
    epochs=5,
)
TUNE = replace(DENSE, epochs=2, lr=0.02)
CONVERSIONS = {"blocks": Conversion(8, 16), "convolutions": Conversion(8, 16, blocks=False)}
CALIBRATION = 8
"""Batches of 64 training images."""
PATHS = ("eager", "onnxruntime", "openvino", "engine")


def build_dense() -> nn.Module:
    return create_model(DENSE.model, **DENSE.model_args)


def pruned(dense: nn.Module, size: tuple[int, ...], macs: int) -> nn.Module:
    """Remove channels by magnitude, the same share everywhere, until the multiply-adds are at most ``macs``."""
    import torch_pruning as tp

    def at(ratio: float) -> nn.Module:
        model = copy.deepcopy(dense)
        importance = tp.importance.GroupMagnitudeImportance(p=2)
        options = {"pruning_ratio": ratio, "ignored_layers": [model.get_classifier()], "global_pruning": False}
        tp.pruner.BasePruner(model, torch.randn(1, *size), importance=importance, **options).step()
        return model

    low, high = 0.0, 0.95
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle), size).macs > macs else (low, middle)
    return at(high)


def starts(dense: nn.Module, size: tuple[int, ...], batches: list[torch.Tensor]) -> dict[str, Callable[[], nn.Module]]:
    """Networks by name, each made when it is called."""

    def converted(conversion: Conversion, warm: bool) -> nn.Module:
        torch.manual_seed(0)
        model, _ = convert(dense, conversion, input_size=size)
        if warm:
            warm_start_(model, dense, batches)
        return model.train()

    made: dict[str, Callable[[], nn.Module]] = {}
    for name, conversion in CONVERSIONS.items():
        macs = convert(dense, conversion, input_size=size, dry_run=True)[1].after.macs
        made[f"{name}, random start"] = partial(converted, conversion, False)
        made[f"{name}, warm start"] = partial(converted, conversion, True)
        made[f"{name}, warm start and teacher"] = partial(converted, conversion, True)
        made[f"pruned to the MACs of {name}"] = lambda macs=macs: pruned(dense, size, macs).train()
    return made


def one_seed(seed: int, args: argparse.Namespace, data: object) -> dict[str, dict[str, float]]:
    """Train the dense network, then everything else on from it."""
    home, size = args.out / f"seed-{seed}", tuple(data.input_size)
    dense_run = home / "dense"
    if not (dense_run / "summary.json").exists():
        train(replace(DENSE, seed=seed), build_dense, data, dense_run)
    teacher = load_network(dense_run, create_model)
    dense = teacher.model
    normalize = data.normalizer(torch.device("cpu"))
    stream = data.train.evaluation_batches(64, 0)
    batches = [normalize(next(stream)[0]) for _ in range(CALIBRATION)]
    summary = json.loads((dense_run / "summary.json").read_text())
    facts = {"params": cost(dense, size).params, "macs": cost(dense, size).macs}
    found = {"before": summary["test_accuracy"], "after": summary["test_accuracy"], "train": summary["train_accuracy"]}
    rows = {"dense": {**found, **facts}}
    for name, make in starts(dense, size, batches).items():
        folder = home / name.replace(", ", "-").replace(" ", "_")
        note = folder.with_suffix(".json")
        if not note.exists():
            model = make()
            before = evaluate(model, data)["accuracy"]
            found = cost(model, size)
            lesson = {"distill_weight": 0.5} if name.endswith("teacher") else {}
            recipe = replace(TUNE, seed=seed, model_args={**TUNE.model_args, "start": name}, **lesson)
            summary = train(recipe, lambda model=model: model, data, folder, teacher=teacher if lesson else None)
            row = {
                "before": before,
                "after": summary.metrics["test_accuracy"],
                "train": summary.metrics["train_accuracy"],
            }
            note.write_text(json.dumps({**row, "params": found.params, "macs": found.macs}))
            print(f"seed {seed}  {name:<42} {before:6.2f} -> {row['after']:6.2f} %  {found}", flush=True)
        rows[name] = json.loads(note.read_text())
    return rows


def measure(args: argparse.Namespace, data: object) -> dict[str, dict[str, float]]:
    """Milliseconds of one image in every runtime."""
    size = tuple(data.input_size)
    dense = load_network(args.out / "seed-0" / "dense", create_model).model
    models = {"dense": lambda: dense, **starts(dense, size, [])}
    found = {}
    for name, make in models.items():
        if "warm" in name:
            continue  # the network of the random start, other weights
        report = accelerate(make().eval(), torch.randn(1, *size), threads=1, paths=PATHS, rounds=51).report
        found[name.replace(", random start", "")] = {r.path: r.milliseconds for r in report.results}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--plot", type=Path, default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train-only", action="store_true", help="leave the times and the record for another call")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    data = load_data(DENSE.data, args.root)
    runs = [one_seed(seed, args, data) for seed in args.seeds]
    if args.train_only:
        return
    times = measure(args, data)
    metrics = {
        f"{name} {key}": [run[name][key] for run in runs]
        for name in runs[0]
        for key in ("before", "after", "train", "params", "macs")
    }
    notes = [
        f"test accuracy in %, before and after {TUNE.epochs} more epochs (rate {TUNE.lr}, the same for all); dense: "
        f"{DENSE.epochs} epochs; warm start: {CALIBRATION} batches of 64 training images; teacher: half of the loss, T = 4",
        "the weights of the last epoch; the test set picks no epoch",
        "times: milliseconds of one image, one thread, medians of 51 rounds in turns",
    ]
    command = "python benchmarks/conversion_worth.py --root data --out RUN --record results/conversion-worth.json"
    record = make_record(command, data.note, args.seeds, metrics, notes, milliseconds=times, recipe=DENSE.to_dict())
    write_record(args.record, record)
    if args.plot:
        draw(args.plot, record)


def draw(path: Path, record: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metrics, times = record["metrics"], record["milliseconds"]
    names = [name.removesuffix(" after") for name in metrics if name.endswith(" after")][::-1]
    figure, panels = plt.subplots(1, 2, figsize=(11, 5), layout="constrained", sharey=True, width_ratios=(2, 1))
    for axes in panels:
        for i, name in enumerate(names):
            for key, marker, color in (("before", "o", "C7"), ("after", "s", "C0")):
                one = metrics[f"{name} {key}"]
                axes.errorbar(one["mean"], i, xerr=one["std"], marker=marker, color=color, capsize=3)
        axes.grid(axis="x", alpha=0.3)
    ends = [metrics[f"{name} after"] for name in names]
    panels[1].set_xlim(min(m["mean"] - m["std"] for m in ends) - 0.3, max(m["mean"] + m["std"] for m in ends) + 0.3)
    panels[0].set_xlabel("test accuracy in %: grey before training on, blue after; mean and std")
    panels[1].set_xlabel("the same, closer")
    labels = []
    for name in names:
        fastest = min(times[name.partition(", ")[0]].values())
        counts = [metrics[f"{name} {key}"]["mean"] / 1e6 for key in ("params", "macs")]
        labels.append(f"{name}\n{counts[0]:.2f} M parameters, {counts[1]:.2f} M MACs, {fastest:.2f} ms")
    panels[0].set_yticks(range(len(names)), labels, fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
