"""Predicted time of multigrid networks on a GPU against the dense ones: bytes and multiply-adds, counted; nothing is run.

    python benchmarks/gpu_floors.py --record results/gpu-floors.json

Inference of a batch of 256 images of 224 x 224 in bf16 on an H200; see `mgic.kernels.floors` for what is counted.
"""

import argparse
import shlex
import sys

import torch

import mgic
from mgic.kernels.floors import H200, Floors, macs, moved, network_floors, seconds
from mgic.training import make_record, write_record

NETWORKS = {  # network: its name and arguments
    "ResNet-18": ("mgic_resnet18", {}),
    "ResNet-50": ("mgic_resnet50", {}),
    "Wide-ResNet-50-2": ("mgic_wide_resnet50_2", {}),
    "ResNet-18, four times wide": ("mgic_resnet18", {"width": 4.0}),
}
GROUPS = ((32, 32), (16, 32), (8, 16))  # s_g, s_c
BATCH = 256


def rows():
    """One row a network and group size: bytes, multiply-adds, milliseconds and ratios to the dense blocks."""
    for title, (name, arguments) in NETWORKS.items():
        for group_size, coarsest in GROUPS:
            with torch.device("meta"):
                model = mgic.create_model(name, group_size=group_size, coarsest=coarsest, **arguments)
            floors = sum(network_floors(model, (3, 224, 224), BATCH), Floors())
            depths = {d: getattr(floors, d) for d in ("dense", "operation", "level", "block")}
            dense = seconds(floors.dense, H200)
            yield {
                "network": title,
                "group_size": group_size,
                "coarsest": coarsest,
                "flop_ratio": macs(floors.block) / macs(floors.dense),
                "gigabytes": {d: moved(kernels, H200) / 1e9 for d, kernels in depths.items()},
                "milliseconds": {d: 1e3 * seconds(kernels, H200) for d, kernels in depths.items()},
                "ratio": {d: seconds(kernels, H200) / dense for d, kernels in depths.items() if d != "dense"},
            }


def markdown(table) -> str:
    """The table of the documentation."""
    lines = [
        "| network | s_g | s_c | FLOP ratio | GB dense | per operation | per level | per block |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in table:
        ratios = " | ".join(f"{row['ratio'][d]:.2f}" for d in ("operation", "level", "block"))
        head = f"{row['network']} | {row['group_size']} | {row['coarsest']}"
        lines.append(f"| {head} | {row['flop_ratio']:.2f} | {row['gigabytes']['dense']:.1f} | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record")
    args = parser.parse_args()
    table = list(rows())
    print(markdown(table))
    if args.record:
        command = shlex.join(["python", "benchmarks/gpu_floors.py", *sys.argv[1:]])
        data = f"counted for {BATCH} images of 3 x 224 x 224; {H200.name}: 4.3 TB/s, 780 TFLOP/s"
        metrics = {f"{r['network']}, s_g {r['group_size']}.level_ratio": [r["ratio"]["level"]] for r in table}
        notes = [
            "floors, not times: blocks only, no halos, no launches, no weights; dense is fused per operation",
            "Wide-ResNet-50-2 has ResNet-50's outer widths; both widths doubled would give 1.83, 0.78 and 0.32",
        ]
        write_record(args.record, make_record(command, data, [0], metrics, notes, rows=table))


if __name__ == "__main__":
    main()
