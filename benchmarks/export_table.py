"""Every format of a few networks: size, error, convolutions, and time beside each other; one record.

    python benchmarks/export_table.py --record results/export.json --page docs/deploy.md

Nothing else should run meanwhile. Weights are random, and int8 is calibrated on random images: sizes, convolutions and times
do not depend on that. How well int8 does would, so its files are kept here whatever their decibels are.
"""

import argparse
import math
import shlex
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from mgic.benchmarking import Network, group, run_benchmark
from mgic.exporting import Rejected, export
from mgic.formats import FORMATS
from mgic.training import make_record, write_record

NETWORKS = ("torchvision:resnet50", "torchvision:resnet50:conversion={group_size: 32, coarsest: 64}")

MARKS = ("<!-- from results/export.json -->", "<!-- end -->")


def write(network: Network, formats: list[str], folder: Path) -> list[dict]:
    """Export a network to each format; one that its check rejects is a row with the reason."""
    model, size = network.build()
    images = [torch.randn(8, *size) for _ in range(4)]
    rows = []
    FORMATS["onnx_int8"] = replace(FORMATS["onnx_int8"], decibels=-math.inf)
    for name in formats:
        file = folder / f"{network.file_name}-{name}{FORMATS[name].suffix}"
        kind = FORMATS[name]
        try:
            made = export(
                model,
                images[0][:2],
                file,
                format=name,
                calibration=images if kind.calibrated else (),
                name=str(network),
                weights="random",
            )
        except Rejected as reason:
            said = str(reason).partition("not exported: ")[2]
            rows.append({"network": str(network), "format": name, "reason": said})
            continue
        rows.append({"network": str(network), **asdict(made)})
        print(f"{network} {name}: {made.bytes / 2**20:.2f} MiB, error {made.error:.1e}", flush=True)
    return rows


def markdown(record: dict) -> str:
    """The table of the documentation: what a row's file weighs, how far it is off, and how long it takes."""
    lines = ["| network | format | MiB | error | convolutions | ms |", "|---|---|---:|---:|---:|---:|"]
    times = {row["network"]: row["ms"] for row in record["timings"]}
    for row in record["artefacts"]:
        if "file" not in row:
            lines.append(f"| `{row['network']}` | `{row['format']}` | not exported: {row['reason']} | | | |")
            continue
        cells = (f"{row['bytes'] / 2**20:.1f}", f"{row['error']:.0e}", row["convolutions"]["found"])
        lines.append(
            f"| `{row['network']}` | `{row['format']}` | "
            + " | ".join(map(str, cells))
            + f" | {times[row['file']]:.0f} |"
        )
    lines += [f"| `{name}` | eager PyTorch | | | | {ms:.0f} |" for name, ms in times.items() if "." not in name]
    return "\n".join(lines) + "\n"


def insert(page: Path, table: str) -> None:
    """Put the table into a page, between its marks."""
    before, begin, rest = page.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    assert begin
    assert end
    page.write_text(f"{before}{begin}\n{table}{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("networks", nargs="*", default=NETWORKS, help="as mgic bench takes them")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.15)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--page", type=Path, help="with --record: page whose table is rewritten, docs/deploy.md")
    args = parser.parse_args()
    rows, groups = [], []
    with tempfile.TemporaryDirectory() as folder:
        for text in args.networks:
            network = Network.parse(text)
            written = write(network, args.formats, Path(folder))
            rows += written
            files = [str(Path(folder, row["file"])) for row in written if "file" in row]
            groups.append(group([*files, network], paths=["eager"]))
        found = run_benchmark(groups, args.rounds, args.seconds, say=print)
    for row in found.timings:
        print(
            f"{row['network']} ({row['path']}): {row['ms']:.2f} ms"
            if row["ms"]
            else f"{row['network']}: {row['reason']}"
        )
    if args.record:
        metrics = {f"{row['network']} {row['path']} seconds": row["seconds"] for row in found.timings if row["seconds"]}
        notes = ["batch 1, one thread; each file in a process of its own, in turns, beside eager PyTorch"]
        command = shlex.join(["python", "benchmarks/export_table.py", *sys.argv[1:]])
        data = "random images, float32; random weights"
        timings = [{key: value for key, value in row.items() if key != "seconds"} for row in found.timings]
        seeds = [0] * args.rounds
        record = make_record(command, data, seeds, metrics, notes, artefacts=rows, timings=timings)
        write_record(args.record, record)
        if args.page:
            insert(args.page, markdown(record))


if __name__ == "__main__":
    main()
