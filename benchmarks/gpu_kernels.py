"""The Triton kernels without a GPU: run by Triton's interpreter against their twins, compiled ahead of time for real GPUs.

    python benchmarks/gpu_kernels.py --compile full --record results/gpu-kernels.json
    python benchmarks/gpu_kernels.py --interpret full --record results/gpu-interpreter.json

``few`` takes the shapes of the tests, ``full`` all, each in every tiling it can have. The interpreter's results are held
against the twin in float64, on fresh random inputs and outputs filled with NaN; the error is the largest difference over the
largest result. With ``--record`` each finished case is kept beside the record: stopped and given again, the command goes on.
Compiled code tells its registers, shared memory and stack (spilled registers) in bytes.
"""

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

CAPABILITIES = {80: 163, 89: 99, 90: 227}
"""Compute capability -> shared memory a program may have, KiB (CUDA programming guide, table of technical specifications)."""


def weight(outputs, inputs, kernel, dtype, device="cpu"):
    return (torch.randn(outputs, inputs, kernel, kernel, device=device) / (inputs * kernel**2) ** 0.5).to(dtype)


def conv_case(batch, height, width, inputs, outputs, groups, kernel, stride, act, operands, dtype, device="cpu"):
    """Arguments of a grouped convolution; ``inputs`` and ``outputs`` count a group's channels."""
    size = (batch, outputs * groups, (height - 1) // stride + 1, (width - 1) // stride + 1)
    before, after = (torch.randn(size, device=device).to(dtype) if some else None for some in operands)
    x = torch.randn(batch, inputs * groups, height, width, device=device).to(dtype)
    w, bias = weight(outputs * groups, inputs, kernel, dtype, device), torch.randn(outputs * groups, device=device)
    return "grouped_conv", (x, w, bias, groups, stride, act, before, after, -1.0)


def chain_case(batch, height, width, group_size, groups, dtype, device="cpu"):
    """Arguments of a chain of halving restrictions with these numbers of groups."""
    x = torch.randn(batch, group_size * groups[0], height, width, device=device).to(dtype)
    weights, channels = [], x.shape[1]
    for g in groups:
        weights.append(weight(channels // 2, channels // g, 1, dtype, device))
        channels //= 2
    return "restriction_chain", (x, weights, list(groups))


def level_case(batch, height, width, channels, hidden, groups, coarse, bottleneck, change, dtype, device="cpu"):
    """Arguments of a level; ``channels`` and ``hidden`` count a group's."""
    wide, narrow = channels * groups, hidden * groups
    x = torch.randn(batch, wide, height, width, device=device).to(dtype)
    below = torch.randn(batch, wide // 2, height, width, device=device).to(dtype) if coarse else None
    shapes = (
        [(narrow, channels, 1), (narrow, hidden, 3), (wide, hidden, 1)]
        if bottleneck
        else [(narrow, channels, 3), (wide, hidden, 3)]
    )
    shapes = [(wide, channels // 2, 1), *shapes] if coarse else shapes
    weights = [weight(*shape, dtype, device) for shape in shapes]
    biases = [torch.randn(len(w), device=device) for w in weights]
    return "level", (x, below, weights, biases, groups, "relu", change)


def few_cases(dtype):
    """Shapes that between them reach every branch of every kernel."""
    return [
        conv_case(3, 5, 7, 8, 8, 3, 3, 1, "relu", (True, True), dtype),
        conv_case(2, 9, 6, 4, 6, 5, 3, 2, "hard_swish", (False, False), dtype),
        conv_case(1, 1, 1, 64, 32, 2, 1, 1, "none", (False, True), dtype),
        conv_case(1, 4, 3, 20, 70, 2, 1, 2, "relu", (True, False), dtype),
        chain_case(1, 5, 7, 8, (8, 4, 2), dtype),
        chain_case(2, 3, 3, 12, (4, 2), dtype),
        level_case(1, 9, 7, 16, 4, 3, True, True, True, dtype),
        level_case(1, 5, 13, 8, 8, 2, True, False, False, dtype),
        level_case(2, 4, 4, 32, 32, 1, False, False, True, dtype),
    ]


def full_cases(dtype):
    """Channels a group 4 to 64, height and width 1 to 33, batch 1 to 5: all sizes by all channels, kinds in rotation."""
    sizes = [(1, 1, 1), (2, 33, 3), (3, 7, 7), (5, 2, 9), (1, 14, 33)]
    channels = [4, 6, 8, 12, 16, 24, 32, 48, 64]
    acts = itertools.cycle(["none", "relu", "hard_swish"])
    operands = itertools.cycle(itertools.product([False, True], [False, True]))
    kinds = itertools.cycle(
        [(1, 1, 3, 2), (3, 1, 2, 1), (3, 2, 5, 1), (1, 2, 1, 1)]
    )  # kernel, stride, groups, narrowing
    turns = itertools.count()
    cases = []
    for (batch, height, width), size in itertools.product(sizes, channels):
        kernel, stride, groups, ratio = next(kinds)
        shape = (batch, height, width, size * ratio, size, groups, kernel, stride)
        cases.append(conv_case(*shape, next(acts), next(operands), dtype))
    for (batch, height, width), size in itertools.product(sizes, (4, 8, 12, 16, 32, 64)):
        base, turn = (batch, height, width), next(turns)
        if turn % 3 == 0:
            cases.append(chain_case(*base, size, (8, 4, 2) if size < 32 else (6, 3), dtype))
        elif turn % 3 == 1:
            cases.append(level_case(*base, size, size, 3, size != 16, False, size == 8, dtype))
        else:
            cases.append(level_case(*base, 2 * size, size // 2, 2, size != 12, True, size > 8, dtype))
    return cases


def real_cases(dtype, full):
    """Shapes of MGIC-ResNet-18, -50 and wide -50 at batch 256, on the meta device; other resolutions give the same code."""
    base = (256, 56, 56)
    for group_size in (32, 8) if full else (32,):
        groups = 64 // group_size
        yield conv_case(*base, group_size, group_size, groups, 3, 1, "relu", (True, True), dtype, "meta")
        yield conv_case(*base, 4 * group_size, group_size, groups, 1, 1, "relu", (False, False), dtype, "meta")
        yield level_case(*base, group_size, group_size, groups, True, False, True, dtype, "meta")
        yield level_case(*base, 4 * group_size, group_size, groups, True, True, True, dtype, "meta")
        yield level_case(*base, 2 * group_size, group_size, groups, True, True, True, dtype, "meta")
        yield chain_case(256, 14, 14, group_size, [256 // group_size >> j for j in range(3)], dtype, "meta")


def words(arguments):
    from mgic.kernels.choice import describe

    return describe("", arguments).strip()


def interpret(cases, once=lambda _, measure: measure()):
    """Largest relative error of each case, over its tilings; without the cases where no tiling fits.

    Args:
        cases: Names of kernels and their arguments.
        once: ``once(key, measure)`` returns ``measure()``, or what it was when `Kept` was asked before.
    """
    from mgic.kernels import launch, ops

    def double(value):
        many = isinstance(value, list)
        if many:
            return [double(v) for v in value]
        return value.double() if isinstance(value, torch.Tensor) else value

    def worst(name, arguments):
        expected = getattr(ops, f"naive_{name}")(*map(double, arguments))
        expected = [expected] if isinstance(expected, torch.Tensor) else expected
        largest = None
        for one in getattr(launch, name)(*arguments):
            for result in one.results:
                result.fill_(float("nan"))
            for found, twin in zip(one.run(), expected, strict=True):
                difference = (found.double() - twin).abs().max() / twin.abs().max().clamp_min(1e-6)
                largest = max(largest or 0.0, float(difference.nan_to_num(float("inf"))))
        return largest

    errors = {}
    for name, arguments in cases:
        key = f"{name} {words(arguments)}"
        error = once(key, partial(worst, name, arguments))
        print(f"{key}: {'too wide' if error is None else error}", flush=True)
        if error is not None:
            errors[key] = max(errors.get(key, 0.0), error)
    return errors


def resources(binary):
    """Registers and stack of a compiled program, read from it by the tool that ships with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary)
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(word.split(":") for word in text.split() if word.startswith(("REG:", "STACK:")))
    return int(found["REG"]), int(found["STACK"])


def compile_all(cases, capabilities):
    """What each tiling of each case needs on each GPU."""
    from mgic.kernels import launch

    rows = []
    for name, arguments in cases:
        for one, capability in itertools.product(getattr(launch, name)(*arguments), capabilities):
            program = one.compile(capability)
            registers, stack = resources(program.asm["cubin"])
            row = {
                "kernel": name,
                "tiling": one.name.removeprefix(f"{name} "),
                "warps": one.warps,
                "arguments": words(arguments),
                "capability": capability,
                "registers": registers,
                "shared_kib": program.metadata.shared / 1024,
                "stack_bytes": stack,
            }
            rows.append(row)
            print(*row.values(), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--interpret", choices=["few", "full"])
    parser.add_argument("--compile", choices=["few", "full"])
    parser.add_argument("--record")
    args = parser.parse_args()
    if bool(args.interpret) == bool(args.compile):
        parser.error("give one of --interpret and --compile")
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    torch.manual_seed(0)
    torch.set_num_threads(1)
    began, full = time.perf_counter(), "full" in (args.interpret, args.compile)
    if args.interpret:
        both = [(full_cases if full else few_cases)(t) for t in (torch.float32, torch.bfloat16)]
        turns = zip(itertools.count(), *both, strict=False)  # in full, four cases in one type, four in the other
        cases = [pair[i // 4 % 2] for i, *pair in turns] if full else list(itertools.chain(*both))
        kept = None
        if args.record:
            from kept import Kept, fingerprint

            import mgic.kernels

            files = [Path(__file__), *Path(mgic.kernels.__file__).parent.glob("*.py")]
            origin = {"sources": fingerprint(*files), "cases": args.interpret, "torch": torch.__version__}
            kept = Kept(Path(args.record), origin)
        found = interpret(cases, kept.once) if kept else interpret(cases)
        seeds = [0]
        metrics = {name: [error] for name, error in found.items()}
        notes = [
            f"{len(found)} cases, all tilings, outputs poisoned with NaN",
            f"worst error in float32 {max(e for n, e in found.items() if 'bfloat16' not in n):.1e}, "
            f"in bfloat16 {max(e for n, e in found.items() if 'bfloat16' in n):.1e}",
            "Triton's interpreter on the CPU: numbers of correctness, no times",
        ]
        extra, data = {}, "random features and weights, float32 and bfloat16, against twins in float64"
    else:
        half = real_cases(torch.bfloat16, full)
        rows = compile_all([*half, *(real_cases(torch.float32, False) if full else [])], CAPABILITIES)
        seeds, metrics = [0], {"programs": [float(len(rows))]}
        notes = ["compiled ahead of time, not run; stack_bytes are spilled registers of a thread"]
        extra, data = {"programs": rows}, "shapes of MGIC-ResNet-18, -50 and wide -50, batch 256"
        found = rows
    print(json.dumps(found))
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    if args.record:
        from mgic.training import make_record, write_record

        command = shlex.join(["python", "benchmarks/gpu_kernels.py", *sys.argv[1:]])
        write_record(args.record, make_record(command, data, seeds, metrics, notes, **extra))
        if args.interpret:
            kept.close()


if __name__ == "__main__":
    main()
