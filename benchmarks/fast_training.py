"""What `mgic.training.fast` gains: PyTorch's own convolutions against its ways, forward and backward, and whole networks.

    python benchmarks/fast_training.py --record results/fast-training.json

Nothing else should run meanwhile. Interleaved rounds; the ratio of a round is the time of the new way over that of the old
one. Layers are those of MGIC-ResNets, MGiaD, MGIC-MobileNetV3 and others that PyTorch computes as it always did.
"""

import argparse
import copy
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

import mgic
from mgic.training import make_record, write_record
from mgic.training.fast import fast_training_

NCHW, NHWC = torch.contiguous_format, torch.channels_last
POINTWISE = (  # images, inputs, outputs, groups, height and width
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
    *((128, 960, 160, 4, 1), (128, 160, 960, 4, 1), (32, 256, 128, 32, 1)),
)
SMALLER_THAN_THE_KERNEL = (  # images, inputs, outputs, groups, kernel, stride, height and width
    *(
        (128, 960, 960, 960, 5, 1, 1),
        (128, 480, 480, 480, 3, 1, 1),
        (128, 672, 672, 672, 5, 2, 2),
        (128, 240, 240, 240, 3, 1, 2),
    ),
    *(
        (128, 256, 256, 32, 3, 1, 1),
        (128, 128, 128, 16, 3, 1, 2),
        (128, 64, 64, 16, 3, 1, 2),
        (128, 128, 256, 128, 3, 2, 2),
    ),
    *(
        (128, 256, 256, 1, 3, 1, 1),
        (128, 128, 128, 1, 3, 1, 2),
        (128, 120, 120, 120, 5, 1, 4),
        (32, 960, 960, 960, 5, 1, 2),
    ),
    *((8, 960, 960, 960, 5, 1, 2), (8, 512, 512, 64, 3, 1, 2), (8, 240, 240, 240, 7, 1, 6)),
)
FEW_OUTPUTS_OF_ONE_INPUT = (
    *(
        (128, 16, 32, 16, 3, 2, 32),
        (128, 32, 64, 32, 3, 2, 16),
        (128, 64, 128, 64, 3, 2, 8),
        (128, 32, 64, 32, 3, 2, 8),
    ),
    *(
        (8, 64, 128, 64, 3, 2, 56),
        (8, 128, 256, 128, 3, 2, 28),
        (32, 32, 96, 32, 3, 1, 14),
        (32, 64, 256, 64, 3, 1, 14),
    ),
)
OTHERS = ((128, 32, 32, 4, 3, 1, 8), (128, 64, 64, 64, 3, 1, 8), (8, 64, 64, 1, 7, 1, 6))
NETWORKS = (
    *(("mgic_resnet18", {"width": 0.5, "group_size": 8, "coarsest": 32}), ("mgic_mobilenetv3_100", {})),
    *(("mgiad20", {"coarsest": 16, "group_size": 8}), ("mobilenetv3_large_075", {}), ("mgic_resnet20", {})),
)


def cases() -> Iterator[tuple[str, nn.Module, tuple[int, ...], torch.memory_format]]:
    """What is timed: a name, the module, its input's shape and storage."""
    for images, inputs, outputs, groups, size in POINTWISE:
        layer = nn.Conv2d(inputs, outputs, 1, groups=groups, bias=False)
        yield (
            f"1x1, {images}x{inputs}x{size}x{size} to {outputs}, {groups} groups",
            layer,
            (images, inputs, size, size),
            NCHW,
        )
    for kind, shapes in (
        ("smaller", SMALLER_THAN_THE_KERNEL),
        ("one input", FEW_OUTPUTS_OF_ONE_INPUT),
        ("as it was", OTHERS),
    ):
        for images, inputs, outputs, groups, kernel, stride, size in shapes:
            layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
            for storage in (NCHW, NHWC):
                words = (
                    f"{images}x{inputs}x{size}x{size} to {outputs}, {groups} groups, {kernel}x{kernel} stride {stride}"
                )
                name = f"{kind}, {words}, {'NCHW' if storage is NCHW else 'NHWC'}"
                yield name, layer, (images, inputs, size, size), storage
    for model, arguments in NETWORKS:
        network = mgic.create_model(model, num_classes=10, **arguments).to(memory_format=NHWC)
        yield f"network {model}, 128x3x32x32, NHWC", network, (128, 3, 32, 32), NHWC


def step(module: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, gradient: torch.Tensor) -> float:
    """Seconds of a forward and backward pass."""
    began = time.perf_counter()
    module(x).backward(gradient)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    metrics, notes = {}, []
    for name, plain, shape, storage in cases():
        fast = copy.deepcopy(plain)
        fast_training_(fast)
        x = torch.randn(shape).contiguous(memory_format=storage).requires_grad_()
        gradient = torch.randn_like(plain(x))
        times = [(step(plain, x, gradient), step(fast, x, gradient)) for _ in range(args.rounds + 1)][1:]  # warm
        metrics[f"{name}.ratio"] = [new / old for old, new in times]
        old, new = (1000 * statistics.median(t) for t in zip(*times, strict=True))
        notes.append(f"{name}: {statistics.median(metrics[f'{name}.ratio']):.2f} ({old:.2f} to {new:.2f} ms)")
        print(notes[-1], flush=True)
    if args.record:
        command = shlex.join(["python", "benchmarks/fast_training.py", *sys.argv[1:]])
        data = f"random features, float32, {args.threads} thread(s)"
        write_record(args.record, make_record(command, data, [0] * args.rounds, metrics, notes))


if __name__ == "__main__":
    main()
