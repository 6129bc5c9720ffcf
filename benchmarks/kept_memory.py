"""What `mgic.training.memory.keep_freed_memory` gains: whole training steps with it and without, and the memory held.

    python benchmarks/kept_memory.py --record results/kept-memory.json

Nothing else should run meanwhile. Each network has two processes, one that keeps freed memory; they take turns, and the
ratio of a round is the time of its step over that of the other. Both train as `mgic train` does (`mgic.training.fast`).
"""

import argparse
import multiprocessing
import resource
import shlex
import statistics
import sys
import time
from multiprocessing.connection import Connection

import torch
from torch import Tensor, nn

import mgic
from mgic.training import make_record, write_record
from mgic.training.fast import fast_training_
from mgic.training.memory import keep_freed_memory

CASES = (  # network, its arguments, shape of a batch
    ("mgic_resnet20", {}, (128, 3, 32, 32)),
    ("mgic_mobilenetv3_100", {}, (128, 3, 32, 32)),
    ("mgic_resnet18", {"width": 0.5, "group_size": 8, "coarsest": 32}, (128, 3, 32, 32)),
    ("resnet50", {}, (16, 3, 224, 224)),
    ("mgic_resnet50", {}, (16, 3, 224, 224)),
    ("lraspp_mobilenetv3_large", {}, (16, 3, 180, 240)),
    ("mgic_lraspp_large", {}, (16, 3, 180, 240)),
    ("diffgcn", {}, (16, 3, 1024)),
    ("dgcnn", {}, (16, 3, 1024)),
)


def serve(pipe: Connection, case: tuple[str, dict[str, object], tuple[int, ...]], keep: bool, threads: int) -> None:
    """In a process of its own: one training step a request, answered by its seconds; the peak memory in MiB at the end."""
    if keep:
        assert keep_freed_memory(), "nothing to compare: this C library is not glibc"
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    name, arguments, shape = case
    model = mgic.create_model(name, num_classes=10, **arguments).train()
    x = torch.randn(shape)
    if len(shape) == 4:
        model, x = (value.to(memory_format=torch.channels_last) for value in (model, x))
    fast_training_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    while pipe.recv():
        began = time.perf_counter()
        optimizer.zero_grad()
        loss(model, x).backward()
        optimizer.step()
        pipe.send(time.perf_counter() - began)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """Cross-entropy with labels that are all zero, of images or of pixels."""
    y = model(x)
    y = y["out"] if isinstance(y, dict) else y
    return nn.functional.cross_entropy(y, y.new_zeros(len(y), *y.shape[2:], dtype=torch.long))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record")
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    metrics, notes, held = {}, [], {}
    for case in CASES:
        pipes = []
        for keep in (False, True):
            here, there = spawn.Pipe()
            spawn.Process(target=serve, args=(there, case, keep, args.threads), daemon=True).start()
            pipes.append(here)

        def ask(pipe: Connection, more: bool) -> float:
            pipe.send(more)
            return pipe.recv()

        times = [[ask(pipe, True) for pipe in pipes] for _ in range(args.rounds + 2)][2:]  # warm
        peaks = [ask(pipe, False) for pipe in pipes]
        label = f"{case[0]}, {'x'.join(map(str, case[2]))}"
        metrics[f"{label}.ratio"] = [kept / plain for plain, kept in times]
        held[label] = dict(zip(("given_back", "kept"), peaks, strict=True))
        plain, kept = (1000 * statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(metrics[f"{label}.ratio"])
        notes.append(f"{label}: {ratio:.2f} ({plain:.0f} to {kept:.0f} ms; peak {peaks[0]:.0f} to {peaks[1]:.0f} MiB)")
        print(notes[-1], flush=True)
    if args.record:
        command = shlex.join(["python", "benchmarks/kept_memory.py", *sys.argv[1:]])
        data = f"random features, float32, {args.threads} thread(s)"
        write_record(args.record, make_record(command, data, [0] * args.rounds, metrics, notes, peak_mib=held))


if __name__ == "__main__":
    main()
