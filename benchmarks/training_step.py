"""Time of one training step of networks side by side: interleaved rounds, medians, one record.

    python benchmarks/training_step.py resnet20 mgic_resnet20 --record results/training-step.json
    python benchmarks/training_step.py mgic_resnet50:group_size=8 --size 3 224 224 --batch 8 --how nchw fast channels_last

Nothing else should run meanwhile. The first network, in the first way named, is the baseline of the ratios. The ways are
features stored NHWC (``channels_last``) or NCHW, and ``fast``: NCHW as ``mgic train`` takes it, where three kinds of
convolution are computed another way (`mgic.training.fast`): grouped 1x1 ones, those on few pixels, those that multiply the
channels.
"""

import argparse
import shlex
import statistics
import sys
import time

import torch
from torch.nn import functional as F

import mgic
from mgic.benchmarking import Network
from mgic.training import make_record, write_record
from mgic.training.fast import fast_training_

WAYS = {
    "channels_last": (torch.channels_last, lambda model: None),
    "nchw": (torch.contiguous_format, lambda model: None),
    "fast": (torch.contiguous_format, fast_training_),
}


def make_step(network: str, way: str, size: tuple[int, int, int], batch: int):
    """Return a function that does one SGD step of a network on fixed random images, and what the network costs."""
    torch.manual_seed(0)
    parsed, (memory_format, change) = Network.parse(network), WAYS[way]
    model = mgic.create_model(parsed.name, in_chans=size[0], num_classes=10, **parsed.args).to(
        memory_format=memory_format
    )
    change(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(batch, *size).contiguous(memory_format=memory_format)
    labels = torch.randint(10, (batch,))

    def step() -> float:
        began = time.perf_counter()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    return step, mgic.cost(model, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", help="name or name:argument=value,...")
    parser.add_argument("--how", nargs="+", choices=WAYS, default=["channels_last"])
    parser.add_argument("--size", type=int, nargs=3, default=(1, 28, 28))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    steps = {}
    for name in args.models:
        for way in args.how:
            label = name if len(args.how) == 1 else f"{name} {way}"
            steps[label] = make_step(name, way, tuple(args.size), args.batch)
    times = {label: [] for label in steps}
    for round_ in range(args.rounds + 2):  # two rounds to warm up
        for label, (step, _) in steps.items():
            took = step()
            if round_ >= 2:
                times[label].append(took)
    base, *others = steps
    metrics = {f"{label}.seconds": values for label, values in times.items()}
    notes = []
    for label in others:
        metrics[f"{label}.ratio"] = [a / b for a, b in zip(times[label], times[base], strict=True)]
        macs = steps[label][1].macs / steps[base][1].macs
        ratio = statistics.median(times[label]) / statistics.median(times[base])
        notes.append(f"{label}: {ratio:.2f} times the step of {base} (ratio of medians), at {macs:.2f} of its MACs")
    for label, values in times.items():
        low, middle, high = (f(values) * 1e3 for f in (min, statistics.median, max))
        print(f"{label}: median {middle:.0f} ms, {low:.0f} to {high:.0f}")
    print("\n".join(notes))
    if args.record:
        command = shlex.join(["python", "benchmarks/training_step.py", *sys.argv[1:]])
        how = ", ".join(args.how)
        data = f"random images {tuple(args.size)}, batch {args.batch}, {args.threads} thread(s), float32, {how}"
        write_record(args.record, make_record(command, data, [0] * args.rounds, metrics, notes))


if __name__ == "__main__":
    main()
