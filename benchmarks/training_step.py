"""Time of one training step of networks side by side: interleaved rounds, medians, one record.

    python benchmarks/training_step.py resnet20 mgic_resnet20 --record results/training-step.json

Nothing else should run meanwhile. The first network named is the baseline of the ratios.
"""

import argparse
import shlex
import statistics
import sys
import time

import torch
from torch.nn import functional as F

import mgic
from mgic.training import make_record, write_record


def make_step(name: str, size: tuple[int, int, int], batch: int):
    """Return a function that does one SGD step of a network on fixed random images, channels last."""
    torch.manual_seed(0)
    model = mgic.create_model(name, in_chans=size[0], num_classes=10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(batch, *size).contiguous(memory_format=torch.channels_last)
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
    parser.add_argument("models", nargs="+")
    parser.add_argument("--size", type=int, nargs=3, default=(1, 28, 28))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    steps = {name: make_step(name, tuple(args.size), args.batch) for name in args.models}
    times = {name: [] for name in args.models}
    for round_ in range(args.rounds + 2):  # two rounds to warm up
        for name, (step, _) in steps.items():
            took = step()
            if round_ >= 2:
                times[name].append(took)
    base = args.models[0]
    metrics = {f"{name}.seconds": values for name, values in times.items()}
    notes = []
    for name in args.models[1:]:
        metrics[f"{name}.ratio"] = [a / b for a, b in zip(times[name], times[base], strict=True)]
        macs = steps[name][1].macs / steps[base][1].macs
        ratio = statistics.median(times[name]) / statistics.median(times[base])
        notes.append(f"{name}: {ratio:.2f} times the step of {base} (ratio of medians), at {macs:.2f} of its MACs")
    for name, values in times.items():
        print(
            f"{name}: median {statistics.median(values) * 1e3:.0f} ms, {min(values) * 1e3:.0f} to {max(values) * 1e3:.0f}"
        )
    print("\n".join(notes))
    if args.record:
        command = shlex.join(["python", "benchmarks/training_step.py", *sys.argv[1:]])
        data = f"random images {tuple(args.size)}, batch {args.batch}, {args.threads} thread(s), float32, channels last"
        write_record(args.record, make_record(command, data, [0] * args.rounds, metrics, notes))


if __name__ == "__main__":
    main()
