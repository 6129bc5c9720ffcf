"""The GPU queue: everything that wants a GPU, in one command, in steps of under ten minutes that resume.

    python benchmarks/gpu.py --cifar10 cifar10.npz     # all steps whose record is not in results/ yet
    python benchmarks/gpu.py --list                    # what there is to do
    python benchmarks/gpu.py --only bench-resnet18     # steps whose name begins so

In this order: what the device can do; the kernels against their twins; the GPU tests (if pytest is installed); training on
CIFAR-10, each recipe that has no record of a GPU yet, ten minutes at a time; the benchmark. Each step writes a record
``results/gpu-*.json``, and a step whose record is there is skipped, so the command can be stopped and given again, on the
same machine or another. It needs torch, timm, lightning and numpy. ``--cifar10`` is a file with the arrays ``x_train,
y_train, x_test, y_test``.
"""

import argparse
import importlib.util
import itertools
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

import mgic
from mgic.benchmarking import Network
from mgic.training import RECIPES, Interrupted, make_record, train, write_record
from mgic.training.records import training_metrics

HERE = Path(__file__).parent
SECONDS = 540
"""Of one step: training stops there, and continues when the command is given again."""
PEERS = (  # dense network, multigrid network, what else both take
    ("resnet18", "mgic_resnet18", {}, {}),
    ("resnet50", "mgic_resnet50", {}, {}),
    ("wide_resnet50_2", "mgic_wide_resnet50_2", {}, {}),
    ("resnet18", "mgic_resnet18", {"channels": (256, 512, 1024, 2048)}, {"width": 4.0}),
    ("mgnet18", "mgiad18", {}, {}),
)
GROUPS = ((32, 32), (16, 32), (8, 16))  # s_g, s_c
MGIAD_COARSEST = 64
BATCHES = (1, 32, 256)
TABLE_8 = (("mobilenetv3_large_075", "mgic_mobilenetv3_100"), 128)


class OutOfTime(Exception):  # noqa: N818  (nothing went wrong)
    """A step used its minutes; what it did is kept, and the same command continues it."""


@dataclass(frozen=True)
class Step:
    """A part of the queue.

    Args:
        name: Its record is ``results/gpu-NAME.json``.
        work: Returns the record's data, metrics, notes and what else it holds.
    """

    name: str
    work: Callable[[], tuple[str, dict[str, list[float]], list[str], dict]]


def run_queue(steps, results: Path, say=print) -> int:
    """Do what has no record, in order; return how many steps are still open."""
    still_open = 0
    for step in steps:
        path = results / f"gpu-{step.name}.json"
        if path.exists():
            say(f"{step.name}: has a record")
            continue
        began = time.perf_counter()
        try:
            data, metrics, notes, extra = step.work()
        except OutOfTime as reason:
            still_open += 1
            say(f"{step.name}: {reason}")
            continue
        command = shlex.join(["python", "benchmarks/gpu.py", "--only", step.name])
        count = len(next(iter(metrics.values())))
        write_record(path, make_record(command, data, list(range(count)), metrics, notes, **extra))
        say(f"{step.name}: recorded after {time.perf_counter() - began:.0f} s")
        for note in notes:
            say(f"  {note}")
    return still_open


def synchronize(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run, device) -> float:
    """Seconds of one call that ran once before."""
    run()
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def device_ceilings(device, mebibytes=1024, width=8192, rounds=9):
    """Bytes a second of a copy, and floating-point operations a second of a matrix product."""
    source = torch.empty(mebibytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(width, width, device=device).bfloat16()
    metrics = {"copy_terabytes_per_second": [], "bf16_matmul_teraflops": []}
    for _ in range(rounds):
        metrics["copy_terabytes_per_second"].append(
            2e-12 * source.numel() / timed(lambda: target.copy_(source), device)
        )
        metrics["bf16_matmul_teraflops"].append(2e-12 * width**3 / timed(lambda: a @ a, device))
    notes = [f"{name}: {statistics.median(values):.3g}" for name, values in metrics.items()]
    return f"{mebibytes} MiB copied (read and written); {width} x {width} matrices", metrics, notes, {}


def kernels_against_twins(device, types=(torch.float32, torch.bfloat16, torch.float16), full=True):
    """Largest error of every tiling, fresh random inputs, poisoned outputs, the twin in float64."""
    from gpu_kernels import few_cases, interpret, real_cases

    torch.manual_seed(time.time_ns() % 2**31)  # other numbers than last time
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 here

    def there(value, batch=None):
        if isinstance(value, list):
            return [there(v) for v in value]
        if not isinstance(value, torch.Tensor):
            return value
        if value.is_meta:  # a shape only: random numbers, two images, weights of the right size
            kernel = value.dim() == 4 and value.shape[2] <= 3
            shape = value.shape if value.dim() < 4 or kernel else (2, *value.shape[1:])
            scale = value[0].numel() ** -0.5 if kernel else 1.0
            return (torch.randn(shape, device=device) * scale).to(value.dtype)
        return value.to(device)

    metrics = {}
    for dtype in types:
        cases = [*few_cases(dtype), *(real_cases(dtype, True) if full else [])]
        errors = interpret((name, tuple(map(there, arguments))) for name, arguments in cases)
        metrics |= {name: [error] for name, error in errors.items()}
    limits = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}
    wrong = [name for name, (error,) in metrics.items() if error > limits[name.split()[1].partition("[")[0]]]
    if wrong:
        raise SystemExit(f"gpu: kernels that differ from their twins: {'; '.join(wrong)}")
    notes = [f"{len(metrics)} cases, largest error {max(e for (e,) in metrics.values()):.1e}"]
    return "random features and weights, against twins in float64, outputs poisoned", metrics, notes, {}


def gpu_tests():
    """The tests marked ``gpu``; without pytest they stay open."""
    if importlib.util.find_spec("pytest") is None:
        raise OutOfTime("pytest is not installed: the tests stay open")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-q", "tests"]
    done = subprocess.run(command, cwd=HERE.parent, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"gpu: the tests fail:\n{done.stdout[-3000:]}")
    last = done.stdout.strip().splitlines()[-1]
    return "the tests marked gpu", {"exit_status": [float(done.returncode)]}, [last], {}


def training(name, recipe, data_path, runs: Path, seconds=SECONDS, precision="bf16"):
    """One run of a recipe on CIFAR-10: in pieces, each continuing the one before."""
    from mgic.data import load_data

    if data_path is None:
        raise OutOfTime("needs --cifar10 FILE.npz")
    data = load_data(str(data_path))
    recipe = replace(recipe, data="cifar10.npz", precision=precision, channels_last=True)
    began = time.perf_counter()

    def on_step(step: int) -> None:
        if time.perf_counter() - began > seconds:
            raise Interrupted(signal.SIGTERM)  # as if somebody had stopped it: it is saved here

    build = partial(mgic.create_model, recipe.model, num_classes=data.task.outputs, **recipe.model_args)
    try:
        run = train(recipe, build, data, runs / name, progress=False, on_step=on_step)
    except Interrupted as reason:
        if time.perf_counter() - began <= seconds:
            raise
        raise OutOfTime(f"after {seconds} s of training; the same command continues it") from reason
    notes = [f"test accuracy {run.metrics['test_accuracy']:.2f} %, {run.seconds_per_epoch:.1f} s an epoch"]
    return data.note, training_metrics([run]), notes, {"recipe": recipe.to_dict()}


def built(network: Network, device, dtype):
    """The network on the device, and the size of its images."""
    model, size = network.build()
    return model.to(device, dtype), size


def inference(dense: Network, ours: Network, batch, device, dtype=torch.bfloat16, rounds=15, paths=None):
    """Both networks in their fastest way, one call each in turns."""
    runs, reports = {}, {}
    for network in (dense, ours):
        model, size = built(network, device, dtype)
        x = torch.randn(batch, *size, device=device).to(dtype)
        fast = mgic.accelerate(model, x, paths=paths)
        runs[str(network)] = partial(fast, x)
        reports[str(network)] = {
            r.path: {"ms": r.milliseconds, "error": r.error, "reason": r.reason} for r in fast.report.results
        }
        reports[str(network)]["fastest"] = fast.path
    macs = [mgic.cost(network.build()[0], size).macs for network in (dense, ours)]
    return compared(runs, device, rounds, f"batch {batch} of {size}, {dtype}", macs, {"ways": reports})


def training_step(dense: Network, ours: Network, batch, device, rounds=15, compile_too=True):
    """One step of SGD in mixed precision, eager and compiled; the faster of the two for each network."""
    runs, reports = {}, {}
    for network in (dense, ours):
        ways = {}
        for way in ("eager", "compile") if compile_too else ("eager",):
            model, size = built(network, device, torch.float32)
            model = model.train().to(memory_format=torch.channels_last)
            x = torch.randn(batch, *size, device=device).contiguous(memory_format=torch.channels_last)
            ways[way] = step_of(torch.compile(model) if way == "compile" else model, x, device)
        seconds = {way: statistics.median([timed(run, device) for _ in range(3)]) for way, run in ways.items()}
        best = min(seconds, key=seconds.get)
        runs[str(network)], reports[str(network)] = ways[best], {**seconds, "fastest": best}
    macs = [mgic.cost(network.build()[0], size).macs for network in (dense, ours)]
    return compared(runs, device, rounds, f"training step, batch {batch} of {size}", macs, {"ways": reports})


def step_of(model, x, device):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    labels = torch.zeros(len(x), dtype=torch.long, device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compared(runs, device, rounds, data, macs, extra):
    """Seconds of both, in turns, and their ratio."""
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(timed(run, device))
    base, ours = times
    metrics = {f"{name}.seconds": values for name, values in times.items()}
    metrics["ratio"] = [a / b for a, b in zip(times[ours], times[base], strict=True)]
    ratio, flops = statistics.median(times[ours]) / statistics.median(times[base]), macs[1] / macs[0]
    notes = [f"{ours}: {ratio:.3f} times {base} (medians), at {flops:.3f} of its MACs"]
    return data, metrics, notes, extra


def pairs():
    """Name, dense network and multigrid network of each comparison."""
    for (dense, ours, dense_args, our_args), (group_size, coarsest) in itertools.product(PEERS, GROUPS):
        coarsest = MGIAD_COARSEST if ours.startswith("mgiad") else coarsest
        wide = "x4" if our_args else ""
        arguments = {"group_size": group_size, "coarsest": coarsest, **our_args}
        yield f"{dense}{wide}-sg{group_size}", Network(dense, dense_args), Network(ours, arguments)


def queue(device, cifar10, runs: Path):
    """All steps, in order."""
    yield Step("device", partial(device_ceilings, device))
    yield Step("twins", partial(kernels_against_twins, device))
    yield Step("tests", gpu_tests)
    for name, recipe in RECIPES.items():
        if recipe.data == "cifar10":
            yield Step(f"train-{name}", partial(training, name, recipe, cifar10, runs))
    for batch in reversed(BATCHES):
        for name, dense, ours in pairs():
            yield Step(f"bench-{name}-batch{batch}", partial(inference, dense, ours, batch, device))
    (dense, ours), batch = TABLE_8
    yield Step("bench-table8", partial(inference, Network(dense), Network(ours), batch, device))
    for name, dense, ours in pairs():
        yield Step(f"step-{name}", partial(training_step, dense, ours, 128, device))


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--cifar10", type=Path, help="CIFAR-10 as an .npz file; without it the training steps stay open"
    )
    parser.add_argument("--results", type=Path, default=HERE.parent / "results")
    parser.add_argument(
        "--runs", type=Path, default=HERE.parent / "runs" / "gpu", help="where training keeps its checkpoints"
    )
    parser.add_argument("--only", default="", help="steps whose name begins so")
    parser.add_argument("--list", action="store_true", help="name the steps and which have a record")
    args = parser.parse_args(arguments)
    steps = [s for s in queue(torch.device("cuda"), args.cifar10, args.runs) if s.name.startswith(args.only)]
    if args.list:
        for step in steps:
            print(f"{step.name}: {'recorded' if (args.results / f'gpu-{step.name}.json').exists() else 'open'}")
        return 0
    if args.cifar10 is not None and not args.cifar10.is_file():
        print(f"gpu: {args.cifar10} is no file: --cifar10 takes an .npz", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("gpu: PyTorch sees no CUDA device here; run this where there is one", file=sys.stderr)
        return 2
    still_open = run_queue(steps, args.results)
    print(f"{still_open} step(s) open" if still_open else "all steps have a record")
    return 1 if still_open else 0


if __name__ == "__main__":
    sys.exit(main())
