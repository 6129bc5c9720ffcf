"""Convert every classification network of torchvision and CNNs of every family of timm; record what became of each.

A network passes when nothing is raised, every weight belongs to a row of the report, the report's cost is that of
`mgic.cost`, a training step on two random images is finite, and every parameter that conversion made gets a gradient.

    python benchmarks/conversion_coverage.py --out runs/coverage --record results/conversion-coverage.json
"""

import argparse
import json
import re
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import timm
import torch
import torchvision
from torch import nn

from mgic.conversion import convert
from mgic.conversion_report import Conversion
from mgic.counting import cost
from mgic.survey import input_size_of
from mgic.training.records import commit, make_record, read_record, write_record

CONVERSION = Conversion(group_size=32, coarsest=32)
FAMILIES = (  # timm's modules of convolutional networks
    *("byobnet", "convnext", "cspnet", "csatv2", "densenet", "dla", "dpn", "edgenext", "efficientnet", "fasternet"),
    *("ghostnet", "hardcorenas", "hgnet", "hrnet", "inception_next", "inception_resnet_v2", "inception_v3"),
    *("inception_v4", "lcnet", "metaformer", "mobilenetv3", "mobilenetv5", "nasnet", "nfnet", "pnasnet", "rdnet"),
    *("regnet", "repghost", "repvit", "res2net", "resnest", "resnet", "resnetv2", "rexnet", "selecsls", "senet"),
    *("sknet", "starnet", "shvit", "swiftformer", "tresnet", "vgg", "vovnet", "xception", "xception_aligned"),
)
TRANSFORMERS = ("vit_tiny_patch16_224", "deit3_small_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s16_224")
LARGEST = 60e6
"""Parameters; larger variants of a family have the same layers, and training steps of them take memory and minutes."""
PER_FAMILY = 7


def names() -> list[str]:
    found = [f"torchvision:{name}" for name in torchvision.models.list_models(module=torchvision.models)]
    known = set(timm.list_modules())
    for family in FAMILIES:
        if family in known:
            found += _spread([n for n in timm.list_models(module=family) if not n.startswith("test_")], family)
    return [*found, *TRANSFORMERS]


def _spread(architectures: list[str], family: str) -> list[str]:
    """Return up to `PER_FAMILY` names, evenly spread over the family's list; more of the largest families."""
    wanted = min(len(architectures), 3 * PER_FAMILY if len(architectures) > 80 else PER_FAMILY)
    return [architectures[i * len(architectures) // wanted] for i in range(wanted)]


def build(name: str) -> nn.Module:
    if name.startswith("torchvision:"):
        extra = {"init_weights": False} if name.endswith(("googlenet", "inception_v3")) else {}
        return torchvision.models.get_model(name.removeprefix("torchvision:"), weights=None, **extra)
    return timm.create_model(name)


def try_one(name: str) -> dict:
    if not name.startswith("torchvision:"):  # some of torchvision's cannot be built on the meta device
        with torch.device("meta"):
            params = sum(p.numel() for p in build(name).parameters())
        if params > LARGEST:
            return {"network": name, "skipped": f"{params:,} parameters"}
    torch.manual_seed(0)
    model = build(name)
    size = input_size_of(model)
    converted, report = convert(model, CONVERSION, input_size=size)
    after = cost(converted, size)
    assert after == report.after, f"report {report.after}, mgic.cost {after}"
    rows = [row.name for row in report.rows]
    covered = {row.name for row in report.rows if row.replaced}
    own = {row.name for row in report.rows}
    homeless = [
        f"{where}.{key}"
        for where, module in model.named_modules()
        for key, p in module.named_parameters(recurse=False)
        if p.ndim > 1 and where not in own and not any(where.startswith(f"{r}.") or not r for r in covered)
    ]
    assert not homeless, f"in no row: {homeless[:3]}"
    step = step_at(converted, size)
    made = {
        f"{where}.{key}" if where else key
        for where, _ in converted.named_modules()
        for key in dict(converted.get_submodule(where).named_parameters(recurse=False))
        if any(where.startswith(f"{r}.") or where == r or not r for r in covered)
    }
    gradients = {key: p.grad is not None for key, p in converted.named_parameters()}
    without = [key for key, there in gradients.items() if not there]
    assert not made & set(without), f"no gradient: {sorted(made & set(without))[:3]}"
    actions = Counter(row.action for row in report.rows)
    reasons = Counter(row.reason.split(":")[0].split(" (")[0] for row in report.rows if not row.replaced)
    return {
        "network": name,
        "rows": len(rows),
        **{action: actions[action] for action in ("block", "conv", "kept")},
        "params": report.before.params,
        "params_after": report.after.params,
        "macs": report.before.macs,
        "macs_after": report.after.macs,
        "input": list(size),
        "kept_because": dict(reasons.most_common()),
        "unused_in_training": without,
        **step,
    }


def step_at(model: nn.Module, size: tuple[int, ...]) -> dict:
    """A training step on images as small as the network takes."""
    for pixels in sorted({96, 128, 160, size[-1]}):
        torch.manual_seed(1)
        x = torch.randn(2, 3, pixels, pixels)
        try:
            found = model.train()(x)
        except (RuntimeError, ValueError, AssertionError):
            if pixels >= size[-1]:
                raise
            continue
        outputs = [found] if isinstance(found, torch.Tensor) else [t for t in found if isinstance(t, torch.Tensor)]
        assert all(t.isfinite().all() for t in outputs), "the forward pass is not finite"
        sum(t.square().mean() for t in outputs).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None), (
            "a gradient is not finite"
        )
        return {"step_at": pixels}
    raise AssertionError("unreachable")


def markdown(record: dict) -> str:
    """The table of the documentation."""
    done = [row for row in record["rows"] if "rows" in row]
    reasons: Counter[str] = Counter()
    for row in done:
        for reason, count in row["kept_because"].items():
            # without names and numbers: merged by reparameterize() of NAME, the widths 75 and 107 cannot be halved
            reasons[re.sub(r"(\(\)) of .*| \d+ and \d+", r"\1", reason)] += count
    lines = [
        "# Coverage of conversion",
        "",
        f"`mgic.convert(model, Conversion(group_size={CONVERSION.group_size}, coarsest={CONVERSION.coarsest}))` on "
        f"{len(done)} networks of torchvision and timm: {int(record['metrics']['crashes']['mean'])} crashes. Every weight is "
        "in a row of each report, the report's cost is that of `mgic.cost`, a training step of the converted network is "
        "finite, and every parameter that conversion made gets a gradient. The record, with the reasons of what was kept, is "
        "`results/conversion-coverage.json`. Transformers come back unchanged: their layers are linear (`linear=True` "
        "replaces them).",
        "",
        "`blocks` and `convolutions` count what was replaced, `kept` the other layers with weights. The reasons for those: "
        + ", ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common())
        + ".",
        "",
        "| network | blocks | convolutions | kept | parameters, M | converted | MACs, M | converted |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in done:
        params, macs = ((row[key] / 1e6, row[f"{key}_after"] / 1e6) for key in ("params", "macs"))
        cells = (row["network"], row["block"], row["conv"], row["kept"])
        sizes = (f"{params[0]:.2f}", f"{params[1]:.2f}", f"{macs[0]:,.0f}", f"{macs[1]:,.0f}")
        lines.append("| " + " | ".join(map(str, (*cells, *sizes))) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of finished networks: the same call continues")
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--table", type=Path, default=None, help="Markdown of the record, for docs/coverage.md")
    parser.add_argument("--only", nargs="*", default=None, help="these networks only, nothing recorded")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    pool = ProcessPoolExecutor(1, get_context("spawn"), warnings.simplefilter, ("ignore",), max_tasks_per_child=25)
    for name in args.only or names():
        file = args.out / f"{name.replace(':', '-')}.json"
        if not file.exists() or args.only:
            began = time.perf_counter()
            future = pool.submit(try_one, name)
            error = future.exception()
            lines = str(error).splitlines()[:1]
            row = {"network": name, "crash": f"{type(error).__name__}: {lines}"} if error else future.result()
            row["commit"] = commit()["id"]
            print(f"{time.perf_counter() - began:6.1f} s  {json.dumps(row)[:150]}", flush=True)
            file.write_text(json.dumps(row))
        rows.append(json.loads(file.read_text()))
    if args.only:
        return
    done = [row for row in rows if "rows" in row]
    crashes = [row for row in rows if "crash" in row]
    metrics = {
        "networks": [len(done) + len(crashes)],
        "crashes": [len(crashes)],
        "torchvision": [sum(row["network"].startswith("torchvision:") for row in done)],
        "timm": [sum(not row["network"].startswith("torchvision:") for row in done)],
        "converted": [sum(row["block"] + row["conv"] > 0 for row in done)],
    }
    notes = [
        f"s_g = {CONVERSION.group_size}, s_c = {CONVERSION.coarsest}; random weights; a training step on two random images",
        f"timm: up to {PER_FAMILY} names (thrice that of the largest families) spread evenly over each family's list, "
        f"those above {LARGEST / 1e6:.0f} million parameters left out: {sum('skipped' in row for row in rows)}",
        f"networks by commit: {dict(Counter(str(row['commit'])[:7] for row in done))}",
    ]
    command = "python benchmarks/conversion_coverage.py --out RUN --record results/conversion-coverage.json"
    write_record(args.record, make_record(command, "random images", [0], metrics, notes, rows=[*crashes, *done]))
    if args.table:
        args.table.write_text(markdown(read_record(args.record)))
    print({name: values[0] for name, values in metrics.items()})


if __name__ == "__main__":
    main()
