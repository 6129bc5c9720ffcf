"""Grouped 1x1 convolutions in training: PyTorch's convolution against a batched matrix product, forward and backward.

    python benchmarks/grouped_pointwise.py --record results/grouped-pointwise.json

Nothing else should run meanwhile. The shapes are those of MGIC-ResNets and MGIC-MobileNetV3; `mgic.training.fast` takes its
rule from the ratios. Interleaved rounds; the ratio of a round is the product's time over the convolution's.
"""

import argparse
import shlex
import statistics
import sys
import time

import torch
from torch import nn

from mgic.training import make_record, write_record
from mgic.training.fast import MOST_WEIGHTS, _as_product

SHAPES = (  # images, inputs, outputs, groups, height and width
    *(
        (128, 64, 32, 8, 32),
        (128, 32, 64, 8, 32),
        (128, 128, 64, 16, 16),
        (128, 64, 128, 16, 16),
        (128, 256, 128, 32, 8),
    ),
    *((64, 64, 32, 2, 32), (64, 128, 64, 4, 16), (64, 256, 128, 8, 8), (1, 64, 32, 8, 32), (2, 512, 256, 16, 4)),
    *((8, 256, 64, 2, 56), (8, 64, 256, 2, 56), (8, 256, 64, 8, 56), (8, 64, 256, 8, 56), (8, 512, 128, 4, 28)),
    *(
        (8, 1024, 256, 8, 14),
        (8, 256, 1024, 8, 14),
        (8, 1024, 256, 32, 14),
        (8, 256, 1024, 32, 14),
        (8, 2048, 512, 16, 7),
    ),
    *((8, 512, 2048, 16, 7), (8, 2048, 512, 64, 7), (8, 2048, 1024, 16, 7), (8, 240, 120, 4, 14), (8, 960, 480, 15, 7)),
    *((8, 480, 960, 15, 7), (8, 1024, 256, 2, 14), (8, 256, 1024, 2, 14), (32, 512, 2048, 4, 7)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    metrics, notes = {}, []
    for images, inputs, outputs, groups, size in SHAPES:
        layer = nn.Conv2d(inputs, outputs, 1, groups=groups, bias=False)
        x = torch.randn(images, inputs, size, size, requires_grad=True)
        gradient = torch.randn(images, outputs, size, size)

        def step(run):
            began = time.perf_counter()
            run(x).backward(gradient)  # noqa: B023  (called before the next shape)
            return time.perf_counter() - began

        ratios = []
        for round_ in range(args.rounds + 1):  # the first one warms up
            ratio = 1 / step(layer) * step(lambda x: _as_product(layer, x))  # noqa: B023
            ratios += [ratio] if round_ else []
        name = f"{images}x{inputs}x{size}x{size} to {outputs}, {groups} groups"
        taken = "taken" if layer.weight.numel() <= MOST_WEIGHTS * groups else "not taken"
        metrics[f"{name}.ratio"] = ratios
        notes.append(f"{name}: {statistics.median(ratios):.2f} ({taken})")
        print(notes[-1], flush=True)
    if args.record:
        command = shlex.join(["python", "benchmarks/grouped_pointwise.py", *sys.argv[1:]])
        data = f"random features, float32, contiguous, {args.threads} thread(s)"
        write_record(args.record, make_record(command, data, [0] * args.rounds, metrics, notes))


if __name__ == "__main__":
    main()
