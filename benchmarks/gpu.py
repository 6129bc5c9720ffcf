"""The GPU queue: everything that wants a GPU, in one command, in steps of under ten minutes that resume.

    python benchmarks/gpu.py --cifar10 cifar10.npz     # all steps whose record is not in results/ yet
    python benchmarks/gpu.py --list                    # what there is to do
    python benchmarks/gpu.py --only bench-resnet18     # steps whose name begins so

In this order: what the device can do; the kernels against their twins; the GPU tests (if pytest is installed); training on
CIFAR-10, each recipe that has no record of a GPU yet, nine minutes at a time; the benchmark; where a target is missed, a
profile. Each step writes a record ``results/gpu-*.json``, and a step whose record is there is skipped, so the command can be
stopped and given again, on the same machine or another. Within a step, what is finished is kept beside the record until it
is written; on another GPU, or with other code, such parts are measured again. A way to run a network that takes too long to
build is ended, and recorded with that reason. It needs torch, timm, lightning and numpy. ``--cifar10`` is a file with the
arrays ``x_train, y_train, x_test, y_test``.
"""

import argparse
import importlib.util
import itertools
import json
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from child import in_child
from kept import Kept, OutOfTime, fingerprint
from torch.nn import functional as F

import mgic
from mgic.benchmarking import Network
from mgic.kernels.floors import Floors, Gpu, moved, network_floors
from mgic.kernels.floors import seconds as floor_seconds
from mgic.runtime.gpu import GPU_PATHS
from mgic.runtime.paths import Path as Way
from mgic.runtime.paths import Run, reasons
from mgic.training import RECIPES, Interrupted, make_record, train, write_record
from mgic.training.records import training_metrics

HERE = Path(__file__).parent
SECONDS = 540
"""Of one step: it stops there, and continues when the command is given again."""
SAVING = 60
"""Seconds a training run keeps for reading its data, its last evaluation and its checkpoint."""
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
TARGETS = {"resnet18-sg32": 0.60, "wide_resnet50_2-sg32": 0.80, "resnet50-sg32": 1.00}
"""Largest time ratio to the dense peer that is wanted, inference of a batch of 256 in bf16."""
TABLE_8 = (("mobilenetv3_large_075", "mgic_mobilenetv3_100"), 128)


class NothingToDo(Exception):  # noqa: N818  (nothing went wrong)
    """A step that is not needed, or cannot be done yet."""


@dataclass(frozen=True)
class Step:
    """A part of the queue.

    Args:
        name: Its record is ``results/gpu-NAME.json``.
        work: Takes what is kept of the step; returns the record's data, metrics, notes and what else it holds.
    """

    name: str
    work: Callable[[Kept], tuple[str, dict[str, list[float]], list[str], dict]]


def run_queue(steps, results: Path, say=print, origin=None) -> int:
    """Do what has no record, in order; return how many steps are still open."""
    still_open = 0
    for step in steps:
        path = results / f"gpu-{step.name}.json"
        if path.exists():
            say(f"{step.name}: has a record")
            continue
        kept = Kept(path, origin or {}, SECONDS, say)
        try:
            data, metrics, notes, extra = step.work(kept)
        except OutOfTime as reason:
            still_open += 1
            say(f"{step.name}: {reason}")
            continue
        except NothingToDo as reason:
            say(f"{step.name}: {reason}")
            continue
        command = shlex.join(["python", "benchmarks/gpu.py", "--only", step.name])
        count = len(next(iter(metrics.values())))
        write_record(path, make_record(command, data, list(range(count)), metrics, notes, **extra))
        kept.close()
        say(f"{step.name}: recorded after {SECONDS - kept.left:.0f} s")
        for note in notes:
            say(f"  {note}")
    return still_open


def origin_on(device) -> dict:
    """What the parts of a step must have in common: times of two devices or of two versions make no ratio."""
    files = [*Path(mgic.__file__).parent.rglob("*.py"), *HERE.glob("*.py")]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "torch": torch.__version__, "sources": fingerprint(*files)}


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


def device_ceilings(device, kept, mebibytes=1024, width=8192, rounds=9):
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


def kernels_against_twins(device, kept, types=(torch.float32, torch.bfloat16, torch.float16), full=True):
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
        placed = ((name, tuple(map(there, arguments))) for name, arguments in cases)
        errors = interpret(placed, kept.once)
        metrics |= {name: [error] for name, error in errors.items()}
    limits = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}
    wrong = [name for name, (error,) in metrics.items() if error > limits[name.split()[1].partition("[")[0]]]
    if wrong:
        kept.close()  # the next call takes other numbers
        raise SystemExit(f"gpu: kernels that differ from their twins: {'; '.join(wrong)}")
    notes = [f"{len(metrics)} cases, largest error {max(e for (e,) in metrics.values()):.1e}"]
    return "random features and weights, against twins in float64, outputs poisoned", metrics, notes, {}


def gpu_tests(kept):
    """The tests marked ``gpu``; without pytest they stay open."""
    if importlib.util.find_spec("pytest") is None:
        raise OutOfTime("pytest is not installed: the tests stay open")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-q", "tests"]
    try:
        done = subprocess.run(
            command, cwd=HERE.parent, check=False, capture_output=True, text=True, timeout=max(1.0, kept.left)
        )
    except subprocess.TimeoutExpired as late:
        raise OutOfTime(f"the tests were ended after {late.timeout:.0f} s and stay open") from late
    if done.returncode:
        raise SystemExit(f"gpu: the tests fail:\n{done.stdout[-3000:]}")
    last = done.stdout.strip().splitlines()[-1]
    return "the tests marked gpu", {"exit_status": [float(done.returncode)]}, [last], {}


def training(name, recipe, data_path, runs: Path, kept, precision="bf16"):
    """One run of a recipe on CIFAR-10: in pieces, each continuing the one before."""
    from mgic.data import load_data

    if data_path is None:
        raise OutOfTime("needs --cifar10 FILE.npz")
    data = load_data(str(data_path))
    recipe = replace(recipe, data="cifar10.npz", precision=precision, channels_last=True)

    def on_step(step: int) -> None:
        if kept.left < SAVING:
            raise Interrupted(signal.SIGTERM)  # as if somebody had stopped it: it is saved here

    build = partial(mgic.create_model, recipe.model, num_classes=data.task.outputs, **recipe.model_args)
    try:
        run = train(recipe, build, data, runs / name, progress=False, on_step=on_step)
    except Interrupted as reason:
        if kept.left >= SAVING:
            raise  # somebody did stop it
        raise OutOfTime("its minutes are over; the same command continues it") from reason
    notes = [f"test accuracy {run.metrics['test_accuracy']:.2f} %, {run.seconds_per_epoch:.1f} s an epoch"]
    return data.note, training_metrics([run]), notes, {"recipe": recipe.to_dict()}


def compiled_by_default(model, example_input, threads: int) -> Run:
    """``torch.compile`` without a search over kernels, NHWC: what is left where that search does not end."""
    with reasons("torch.compile", (RuntimeError,)), torch.no_grad():
        optimized = torch.compile(model.to(memory_format=torch.channels_last), dynamic=False)
        optimized(example_input.contiguous(memory_format=torch.channels_last))

    def run(x):
        with torch.no_grad():
            return optimized(x.contiguous(memory_format=torch.channels_last))

    return run


WAYS: dict[str, Way] = {**GPU_PATHS, "compile_by_default": compiled_by_default}


@dataclass(frozen=True)
class Part:
    """Ways to run a network that are tried in one process.

    Args:
        ways: Their names.
        seconds: After which the process is ended.
        instead_of: Only where this way has no time.
    """

    ways: tuple[str, ...]
    seconds: float
    instead_of: str | None = None


@dataclass(frozen=True)
class Setting:
    """What is timed.

    Args:
        prepare: Makes one call of a network, run in one way: returns it (None where it cannot be) and what is known of it.
        parts: The ways to try.
        batch: Images.
        device: Where.
        dtype: Type of the features.
        rounds: Timed calls.
    """

    prepare: Callable[[Network, str, "Setting"], tuple[Callable[[], Any] | None, dict]]
    parts: tuple[Part, ...]
    batch: int
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    rounds: int = 15


def inference_call(network: Network, way: str, setting: Setting):
    """One call of the network in eval mode, checked against eager."""
    model, size = network.build()
    torch.manual_seed(0)
    x = torch.randn(setting.batch, *size, device=setting.device).to(setting.dtype)
    fast = mgic.accelerate(model.to(setting.device, setting.dtype), x, paths={way: WAYS[way]}, rounds=1)
    (result,) = [one for one in fast.report.results if one.path == way]
    facts = {name: value for name in ("error", "reason") if (value := getattr(result, name)) is not None}
    return (None if result.reason else partial(fast, x)), facts


def training_call(network: Network, way: str, setting: Setting):
    """One step of SGD in mixed precision."""
    model, size = network.build()
    model = model.to(setting.device).train().to(memory_format=torch.channels_last)
    x = torch.randn(setting.batch, *size, device=setting.device).contiguous(memory_format=torch.channels_last)
    return step_of(torch.compile(model) if way == "compile" else model, x, setting.device), {}


INFERENCE = (
    Part(("eager", "eager_nhwc", "eager_graph"), 120),
    Part(("kernels",), 300),
    Part(("compile",), 240),
    Part(("compile_by_default",), 120, instead_of="compile"),
)
TRAINING = (Part(("eager",), 120), Part(("compile",), 240))
TURNS = 300
"""Seconds in which both networks are built again, with what their compilers kept, and timed."""


def times_of(network: Network, ways: Iterable[str], setting: Setting) -> dict:
    """Milliseconds of each way, or the reason why there are none."""
    found = {}
    for way in ways:
        run, facts = setting.prepare(network, way, setting)
        times = [] if run is None else [timed(run, setting.device) for _ in range(setting.rounds)]
        found[way] = facts | ({"ms": 1e3 * statistics.median(times)} if times else {})
    return found


def in_turns(chosen: dict[str, tuple[Network, str]], setting: Setting) -> dict:
    """Seconds of several networks, each in its way, one call each in turns."""
    runs = {}
    for name, (network, way) in chosen.items():
        runs[name], facts = setting.prepare(network, way, setting)
        if runs[name] is None:
            return {"reason": f"{name}: {way}: {facts['reason']}"}
    times = {name: [] for name in runs}
    for _ in range(setting.rounds):
        for name, run in runs.items():
            times[name].append(timed(run, setting.device))
    return {"seconds": times}


def ways_of(network: Network, setting: Setting, kept: Kept, child) -> dict[str, dict]:
    """Every way of a network with its time or its reason; each part in a process that cannot hang the queue."""
    found: dict[str, dict] = {}
    for part in setting.parts:
        if "ms" in found.get(part.instead_of, ()):
            continue
        measure = partial(child, part.seconds, times_of, network, part.ways, setting)
        rows = kept.once(f"{network} {' '.join(part.ways)}", measure, needs=part.seconds)
        found |= {way: {"reason": rows["reason"]} for way in part.ways} if "reason" in rows else rows
    return found


def comparison(dense: Network, ours: Network, setting: Setting, kept: Kept, child=in_child):
    """Both networks in their fastest way, in turns, and the ratio of their times."""
    ways = {str(network): ways_of(network, setting, kept, child) for network in (dense, ours)}
    chosen = {}
    for network in (dense, ours):
        timed_ways = {way: row["ms"] for way, row in ways[str(network)].items() if "ms" in row}
        if not timed_ways:
            kept.close()  # what failed is tried again
            whys = "; ".join(f"{way}: {row['reason']}" for way, row in ways[str(network)].items())
            raise OutOfTime(f"no way to run {network} was timed: {whys}")
        chosen[str(network)] = (network, min(timed_ways, key=timed_ways.get))
    found = kept.once("in turns", partial(child, TURNS, in_turns, chosen, setting), needs=TURNS)
    notes = [
        f"{name}, {way}: {row['reason']}" for name, rows in ways.items() for way, row in rows.items() if "reason" in row
    ]
    if "seconds" in found:
        times = found["seconds"]
    else:
        notes.append(f"not timed in turns ({found['reason']}): the ratio is that of medians of two processes")
        times = {name: [ways[name][way]["ms"] / 1e3] for name, (_, way) in chosen.items()}
    fastest = {name: way for name, (_, way) in chosen.items()}
    (_, size), (_, _) = built = [network.build() for network in (dense, ours)]
    macs = [mgic.cost(model, size).macs for model, _ in built]
    base, other = times
    metrics = {f"{name}.seconds": values for name, values in times.items()}
    metrics["ratio"] = [a / b for a, b in zip(times[other], times[base], strict=True)]
    ratio = statistics.median(times[other]) / statistics.median(times[base])
    first = f"{other} ({fastest[other]}): {ratio:.3f} times {base} ({fastest[base]}), at {macs[1] / macs[0]:.3f} of its MACs"
    data = f"batch {setting.batch} of {size}, {setting.dtype}, {setting.prepare.__name__.removesuffix('_call')}"
    return data, metrics, [first, *notes], {"ways": ways, "fastest": fastest, "ratio_of_medians": ratio}


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


def profiled(network: Network, way: str, setting: Setting) -> dict:
    """Device time of each kernel in one call, by `torch.profiler`, and the time of the call itself."""
    run, facts = setting.prepare(network, way, setting)
    if run is None:
        return facts
    call = statistics.median([timed(run, setting.device) for _ in range(setting.rounds)])
    kind = torch.profiler.ProfilerActivity
    activities = [kind.CPU, kind.CUDA] if setting.device.type == "cuda" else [kind.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(setting.rounds):
            run()
        synchronize(setting.device)
    rows = [
        {"name": e.key, "calls": e.count / setting.rounds, "us": e.self_device_time_total / setting.rounds}
        for e in profile.key_averages()
        if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation and e.self_device_time_total > 0
    ]
    return {"call_us": 1e6 * call, "kernels": sorted(rows, key=lambda row: -row["us"])}


KERNELS = ("restriction_chain", "level")  # programs of ours for which `floors` counts what they have to move


def shares(ours: dict, dense: dict, floors: Iterable[Floors], gpu: Gpu, target: float) -> dict:
    """Who owns the gap between the time of a network and its target.

    A program's excess is what it takes beyond its floor on this device. All other kernels (stem, changes of resolution, head;
    the blocks too, where ours do not run) are one entry, and what no kernel takes is another. What would remain of the gap
    without any excess is the floor's: only a deeper fusion helps there. A program above the copy bandwidth did not run all
    blocks: some are among the other kernels.

    Args:
        ours: What `profiled` found.
        dense: The same, for the dense peer.
        floors: Of the multigrid blocks.
        gpu: What the device can do, measured.
        target: Largest ratio that is wanted.
    """
    floors = list(floors)
    chains = [kernel for one in floors if len(one.level) > 1 for kernel in one.level[:1]]
    levels = [kernel for one in floors for kernel in one.level[len(one.level) > 1 :]]
    parts, otherwise = {}, []
    for name, counted in zip(KERNELS, (chains, levels), strict=True):
        us = sum(row["us"] for row in ours["kernels"] if row["name"] == name)
        if not us:
            otherwise += counted
            continue
        parts[name] = {"us": us, "floor_us": 1e6 * floor_seconds(counted, gpu), "bytes": moved(counted, gpu)}
        parts[name]["of_copy_bandwidth"] = parts[name]["bytes"] / (1e-6 * us) / gpu.bytes_per_second
    rest = sum(row["us"] for row in ours["kernels"] if row["name"] not in KERNELS)
    parts["other kernels"] = {
        "us": rest,
        "floor_us": 1e6 * floor_seconds(otherwise, gpu),
        "bytes": moved(otherwise, gpu),
    }
    busy = sum(row["us"] for row in ours["kernels"])
    parts["between kernels"] = {"us": max(0.0, ours["call_us"] - busy), "floor_us": 0.0, "bytes": 0}
    wanted = target * dense["call_us"]
    for part in parts.values():
        part["excess_us"] = max(0.0, part["us"] - part["floor_us"])
    floor = sum(part["floor_us"] for part in parts.values())
    parts["floor above the target"] = {
        "us": floor,
        "floor_us": floor,
        "bytes": 0,
        "excess_us": max(0.0, floor - wanted),
    }
    total = sum(part["excess_us"] for part in parts.values())
    for part in parts.values():
        part["share"] = part["excess_us"] / total if total else 0.0
    dense_counted = [kernel for one in floors for kernel in one.dense]
    return {
        "gap_us": ours["call_us"] - wanted,
        "target_us": wanted,
        "parts": parts,
        "dense_blocks": {"floor_us": 1e6 * floor_seconds(dense_counted, gpu), "bytes": moved(dense_counted, gpu)},
    }


def missed_target(name: str, results: Path) -> tuple[dict, dict]:
    """The records of the benchmark and of the device, if the benchmark misses its target."""
    paths = [results / f"gpu-bench-{name}-batch256.json", results / "gpu-device.json"]
    for path in paths:
        if not path.is_file():
            raise NothingToDo(f"{path.name} is not there")
    bench, device = (json.loads(path.read_text()) for path in paths)
    ratio = bench["ratio_of_medians"]
    if ratio <= TARGETS[name]:
        raise NothingToDo(f"no target missed: {ratio:.3f} times the dense peer, at most {TARGETS[name]:.2f} wanted")
    return bench, device


def profile(name: str, dense: Network, ours: Network, setting: Setting, results: Path, kept: Kept, child=in_child):
    """Where the time goes in a network that misses its target."""
    bench, ceilings = missed_target(name, results)
    copy, product = (ceilings["metrics"][key]["mean"] for key in ("copy_terabytes_per_second", "bf16_matmul_teraflops"))
    gpu = Gpu(ceilings["machine"]["gpu"] or "no GPU", 1e12 * copy, 1e12 * product, setting.dtype.itemsize)
    wanted = {f"{dense}": (dense, bench["fastest"][str(dense)]), f"{ours}": (ours, bench["fastest"][str(ours)])}
    if bench["fastest"][str(ours)] != "kernels":
        wanted[f"{ours}, kernels"] = (ours, "kernels")
    found = {}
    for key, (network, way) in wanted.items():
        found[key] = kept.once(key, partial(child, 180, profiled, network, way, setting), needs=180) | {"way": way}
    failed = {key: one["reason"] for key, one in found.items() if "reason" in one}
    if str(dense) in failed or str(ours) in failed:
        kept.close()
        raise OutOfTime(f"not profiled: {failed}")
    with torch.device("meta"):
        model, size = ours.build()
    floors = network_floors(model, size, setting.batch)
    good = {key: one for key, one in found.items() if key not in failed and key != str(dense)}
    owners = {key: shares(one, found[str(dense)], floors, gpu, TARGETS[name]) for key, one in good.items()}
    metrics = {f"{key}.call_us": [one["call_us"]] for key, one in found.items() if key not in failed}
    notes = [f"{key}: {reason}" for key, reason in failed.items()]
    for key, one in owners.items():
        ranked = sorted(one["parts"].items(), key=lambda item: -item[1]["share"])
        said = ", ".join(f"{part} {100 * row['share']:.0f} %" for part, row in ranked if row["share"])
        notes.append(f"{key}: {one['gap_us']:.0f} us above the target of {one['target_us']:.0f} us; owned by {said}")
    extra = {"profiles": found, "gap": owners, "copy_bytes_per_second": gpu.bytes_per_second, "target": TARGETS[name]}
    return f"batch {setting.batch} of {size}, {setting.dtype}, floors on {gpu.name} as measured", metrics, notes, extra


def pairs():
    """Name, dense network and multigrid network of each comparison."""
    for (dense, ours, dense_args, our_args), (group_size, coarsest) in itertools.product(PEERS, GROUPS):
        coarsest = MGIAD_COARSEST if ours.startswith("mgiad") else coarsest
        wide = "x4" if our_args else ""
        arguments = {"group_size": group_size, "coarsest": coarsest, **our_args}
        yield f"{dense}{wide}-sg{group_size}", Network(dense, dense_args), Network(ours, arguments)


def queue(device, cifar10, runs: Path, results: Path):
    """All steps, in order."""
    yield Step("device", partial(device_ceilings, device))
    yield Step("twins", partial(kernels_against_twins, device))
    yield Step("tests", gpu_tests)
    for name, recipe in RECIPES.items():
        if recipe.data == "cifar10":
            yield Step(f"train-{name}", partial(training, name, recipe, cifar10, runs))
    for batch in reversed(BATCHES):
        setting = Setting(inference_call, INFERENCE, batch, device)
        for name, dense, ours in pairs():
            yield Step(f"bench-{name}-batch{batch}", partial(comparison, dense, ours, setting))
    (dense, ours), batch = TABLE_8
    setting = Setting(inference_call, INFERENCE, batch, device)
    yield Step("bench-table8", partial(comparison, Network(dense), Network(ours), setting))
    setting = Setting(training_call, TRAINING, 128, device)
    for name, dense, ours in pairs():
        yield Step(f"step-{name}", partial(comparison, dense, ours, setting))
    setting = Setting(inference_call, INFERENCE, 256, device)
    for name, dense, ours in pairs():
        if name in TARGETS:
            yield Step(f"profile-{name}", partial(profile, name, dense, ours, setting, results))


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
    steps = [
        s for s in queue(torch.device("cuda"), args.cifar10, args.runs, args.results) if s.name.startswith(args.only)
    ]
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
    still_open = run_queue(steps, args.results, origin=origin_on(torch.device("cuda")))
    print(f"{still_open} step(s) open" if still_open else "all steps have a record")
    return 1 if still_open else 0


if __name__ == "__main__":
    sys.exit(main())
