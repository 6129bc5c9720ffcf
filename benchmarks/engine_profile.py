"""Where the engine's time goes: each kind of operation with its GFLOP/s, its bytes, and what holds it back.

    python benchmarks/engine_profile.py mgic_resnet50:group_size=32,coarsest=32 --record results/engine-profile/FILE.json

Nothing else should run meanwhile. One thread, one image. An operation's bytes are what it reads and writes, once each, with
its weights. Two ceilings are measured before and after: the arithmetic of a dense 3x3 convolution that stays in the
second-level cache, and the copying of 64 MiB. What would have taken longer at its ceiling, arithmetic or memory, is named
if it explains at least two thirds of an operation's time; otherwise it is what surrounds the sums: loads from and stores to
the caches, first and last taps, activations, edges.
"""

import argparse
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mgic.benchmarking import Network
from mgic.runtime import Engine, capture
from mgic.runtime.plan import Node, View
from mgic.training import make_record, write_record

EXPLAINED = 2 / 3


@dataclass
class Row:
    """Operations of one shape."""

    count: int = 0
    macs: int = 0
    bytes: int = 0
    seconds: float = 0.0


def peak_flops() -> float:
    """FLOP/s of a dense convolution whose maps and weights stay in the cache."""
    layer, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 28, 28)
    profile = Engine(capture(layer.eval(), x), 1).profile(x, 200)
    return max(2 * node.macs / seconds for node, seconds in profile if node.kind == "conv")


def copy_speed() -> float:
    """Bytes per second of a copy, read and written."""
    source = np.ones(2**24, np.float32)
    target = np.empty_like(source)
    times = []
    for _ in range(12):
        began = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - began)
    return 2 * source.nbytes / min(times)


def floats(view: View | None) -> int:
    return 0 if view is None else view.channels * view.buffer.geometry.height * view.buffer.geometry.width


def moved(node: Node) -> int:
    """Bytes that an operation reads and writes, each once."""
    pixels = node.y.buffer.geometry.height * node.y.buffer.geometry.width if node.y else 1
    weights = node.macs // pixels if node.macs else 0
    return 4 * (floats(node.x) + floats(node.y) + weights + sum(floats(view) for view in node.step_views))


def title(node: Node) -> str:
    place = node.y or node.x
    steps = ", ".join(getattr(step, "name", type(step).__name__.lower()) for step in node.steps)
    return f"{node.of or node.kind}, {place.buffer.geometry.height} high{f' ({steps})' if steps else ''}"


def verdict(row: Row, flops: float, copy: float) -> str:
    arithmetic, memory = 2 * row.macs / flops / row.seconds, row.bytes / copy / row.seconds
    if max(arithmetic, memory) < EXPLAINED:
        return "around the sums"
    return "arithmetic" if arithmetic >= memory else "memory"


def main(given: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("network", type=Network.parse, help="name, name@SIZE or name:argument=value,...")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--record", type=Path)
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    model, size = args.network.build()
    x = torch.randn(1, *size)
    engine = Engine(capture(model, x), 1)
    flops, copy = peak_flops(), copy_speed()
    rows: defaultdict[str, Row] = defaultdict(Row)
    for node, seconds in engine.profile(x, args.rounds):
        row = rows[title(node)]
        row.count, row.macs, row.seconds = row.count + 1, row.macs + node.macs, row.seconds + seconds
        row.bytes += moved(node)
    flops, copy = max(flops, peak_flops()), max(copy, copy_speed())
    total = sum(row.seconds for row in rows.values())
    held: defaultdict[str, float] = defaultdict(float)
    table = []
    for name, row in sorted(rows.items(), key=lambda item: -item[1].seconds):
        why = verdict(row, flops, copy)
        held[why] += row.seconds
        table.append(
            {
                "operation": name,
                "count": row.count,
                "ms": 1e3 * row.seconds,
                "share": row.seconds / total,
                "gflops": 2e-9 * row.macs / row.seconds,
                "mb": 1e-6 * row.bytes,
                "gb_per_s": 1e-9 * row.bytes / row.seconds,
                "held_by": why,
            }
        )
        print(
            f"{row.count:4d} {name:70s} {1e3 * row.seconds:7.2f} ms {row.seconds / total:6.1%} "
            f"{2e-9 * row.macs / row.seconds:6.1f} GFLOP/s {1e-9 * row.bytes / row.seconds:6.1f} GB/s  {why}"
        )
    macs, bytes_ = sum(row.macs for row in rows.values()), sum(row.bytes for row in rows.values())
    notes = [
        f"ceilings: {flops / 1e9:.1f} GFLOP/s, copying {copy / 1e9:.1f} GB/s (read and written)",
        f"in all: {2e-9 * macs / total:.1f} GFLOP/s, {bytes_ / 1e6:.0f} MB, {bytes_ / total / 1e9:.1f} GB/s; at the "
        f"arithmetic ceiling {2e3 * macs / flops:.2f} ms",
        "held back by " + ", ".join(f"{why}: {seconds / total:.0%}" for why, seconds in sorted(held.items())),
    ]
    print(*notes, sep="\n")
    if args.record:
        args.record.parent.mkdir(parents=True, exist_ok=True)
        command = shlex.join(["python", "benchmarks/engine_profile.py", *given])
        metrics = {"ms": [1e3 * total], "gflops": [2e-9 * macs / total], "ceiling_gflops": [flops / 1e9]}
        data = f"{args.network}, random weights and input {'x'.join(map(str, size))}, one image, one thread"
        write_record(args.record, make_record(command, data, [0], metrics, notes, operations=table))


if __name__ == "__main__":
    main()
