"""What a training step costs on many GPUs, predicted: a formula, its assumptions, and the tables of docs/many-machines.md.

    python benchmarks/many_machines.py            # prints the tables
    python benchmarks/many_machines.py --write    # puts them into the page, with the measured data rate where it has a record

Nothing here is measured but the data rate (`benchmarks/data_rate.py`); parameters and norms are counted in the networks.
"""

import argparse
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from mgic.models import build_model

ROOT = Path(__file__).parents[1]
PAGE, RATE = ROOT / "docs" / "many-machines.md", ROOT / "results" / "data-rate.json"
GPUS = (8, 64, 512)
NETWORKS = {  # network: its name and arguments
    "ResNet-50": ("resnet50", {}),
    "MGIC-ResNet-50, s_g 32": ("mgic_resnet50", {"group_size": 32, "coarsest": 32}),
    "MGIC-ResNet-50, s_g 8": ("mgic_resnet50", {"group_size": 8, "coarsest": 16}),
}
BUCKET = 25 * 2**20
"""Bytes of gradients that DDP sends at once: its default."""
BACKWARD = 2 / 3
"""Share of the backward pass in a step: it computes two gradients where the forward pass computes one output."""


@dataclass(frozen=True)
class Link:
    """What connects the GPUs of one ring.

    Args:
        bandwidth: Bytes a second into a machine, and as many out of it.
        latency: Seconds that one message takes, however short.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """Machines of equal GPUs.

    Args:
        name: For the table.
        inside: Between the GPUs of a machine.
        between: Between machines.
        gpus: GPUs of a machine.
    """

    name: str
    inside: Link
    between: Link
    gpus: int = 8

    def link(self, processes: int) -> Link:
        """The slowest link that a ring through so many processes crosses."""
        return self.inside if processes <= self.gpus else self.between


CLUSTERS = (
    Cluster("8 x 400 Gbit/s", Link(300e9, 5e-6), Link(8 * 50e9, 10e-6)),
    Cluster("1 x 100 Gbit/s", Link(300e9, 5e-6), Link(12.5e9, 30e-6)),
)
IMAGES_PER_SECOND = 1000.0
"""Of one GPU that trains alone: assumed, and the same for every network."""
BATCH = 64
"""Images of one GPU in a step."""


def all_reduce(size: float, processes: int, link: Link) -> float:
    """Seconds to sum ``size`` bytes over all processes: the faster of a ring and a double binary tree.

    The ring sends ``2 (n - 1) / n`` of the bytes over each link, in ``2 (n - 1)`` steps; the tree ``2`` times the bytes, in
    ``2 log2(n)`` steps (Thakur et al. 2005, *Optimization of Collective Communication Operations in MPICH*; Sanders et al.
    2009, *Two-Tree Algorithms for Full Bandwidth Broadcast, Reduction and Scan*).
    """
    if processes == 1:
        return 0.0
    ring = 2 * (processes - 1) / processes * size / link.bandwidth + 2 * (processes - 1) * link.latency
    tree = 2 * size / link.bandwidth + 2 * math.ceil(math.log2(processes)) * link.latency
    return min(ring, tree)


def step_seconds(compute: float, gradients: float, norms: int, processes: int, cluster: Cluster) -> dict[str, float]:
    """Seconds of one step, and what they consist of.

    Args:
        compute: Of one GPU alone.
        gradients: Bytes of all gradients.
        norms: Batch norms, each of which waits for a sum in the forward pass and another in the backward pass.
        processes: How many train together.
        cluster: Where.

    Returns:
        ``gradients``: their communication; ``exposed``: what of it the backward pass does not hide, all that lasts longer
        than it and at least the last bucket, which is ready when it ends; ``sums``: those of norms, and the one in which
        processes agree on the loss, which nothing hides; ``step``: all together; ``step_own``: with ``sync_norms: false``.
    """
    link = cluster.link(processes)
    whole = math.ceil(gradients / BUCKET)
    buckets = [BUCKET] * (whole - 1) + [gradients - (whole - 1) * BUCKET]
    times = [all_reduce(size, processes, link) for size in buckets]
    exposed = max(sum(times) - BACKWARD * compute, times[-1])
    one = all_reduce(4096, processes, link)
    sums, own = (2 * norms + 1) * one, compute + exposed + one
    return {"gradients": sum(times), "exposed": exposed, "sums": sums, "step": own + sums - one, "step_own": own}


def counted(name: str, arguments: dict) -> tuple[int, int]:
    """Parameters and batch norms of a network."""
    with torch.device("meta"):
        model = build_model(name, arguments)
    return sum(p.numel() for p in model.parameters()), sum(isinstance(m, _BatchNorm) for m in model.modules())


def rows():
    """One row a network, cluster and number of GPUs."""
    compute = BATCH / IMAGES_PER_SECOND
    for title, (name, arguments) in NETWORKS.items():
        params, norms = counted(name, arguments)
        for cluster in CLUSTERS:
            for gpus in GPUS:
                found = step_seconds(compute, 4 * params, norms, gpus, cluster)
                yield {
                    "network": title,
                    "params": params,
                    "norms": norms,
                    "network link": cluster.name,
                    "gpus": gpus,
                    **found,
                }


def predictions() -> str:
    """The table of the page."""
    lines = [
        "| network | weights | norms | link | GPUs | gradients | exposed | sums | step | efficiency | own norms |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows():
        head = (
            f"{row['network']} | {row['params'] / 1e6:.1f} M | {row['norms']} | {row['network link']} | {row['gpus']}"
        )
        times = " | ".join(f"{1e3 * row[name]:.1f}" for name in ("gradients", "exposed", "sums", "step"))
        shares = " | ".join(f"{BATCH / IMAGES_PER_SECOND / row[name]:.2f}" for name in ("step", "step_own"))
        lines.append(f"| {head} | {times} | {shares} |")
    return "\n".join(lines)


def data_rate(record: Path) -> str:
    """What the record of the data rate says, and how many workers a GPU needs; that there is none, where there is none."""
    if not record.exists():
        return "Not measured yet: `python benchmarks/data_rate.py --record results/data-rate.json`."
    values = json.loads(record.read_text())
    lines = [
        f"{values['data']}; on {values['machine']['cpu']} (`results/{record.name}`):",
        "",
        f"| from | workers | images/s, mean ± std | n | workers for {IMAGES_PER_SECOND:,.0f} images/s |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, metric in values["metrics"].items():
        source, workers = re.fullmatch(r"(\w+)\.images_per_second_(\d+)_workers", name).groups()
        needed = math.ceil(IMAGES_PER_SECOND / metric["mean"] * max(int(workers), 1))
        lines.append(
            f"| {source} | {workers} | {metric['mean']:.0f} ± {metric['std']:.0f} | {values['n']} | {needed} |"
        )
    return "\n".join(lines)


def filled(page: str, record: Path) -> str:
    """The page with its tables between the marks."""
    for mark, text in (("predictions", predictions()), ("data rate", data_rate(record))):
        page, count = re.subn(
            rf"(<!-- {mark} -->\n).*?(\n<!-- /{mark} -->)", lambda m, t=text: m[1] + t + m[2], page, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"{PAGE}: expected one '<!-- {mark} -->', found {count}")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into the page")
    args = parser.parse_args()
    print(predictions(), data_rate(RATE), sep="\n\n")
    if args.write:
        PAGE.write_text(filled(PAGE.read_text(), RATE))


if __name__ == "__main__":
    main()
