"""The GPU queue without a GPU: its order, its records, what it skips and continues; steps at tiny sizes on the CPU."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import mgic
from mgic import plan_levels
from mgic.benchmarking import Network
from mgic.kernels.floors import Gpu, block_floors
from mgic.training import RECIPES, read_record

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import gpu_kernels  # noqa: E402
from kept import Kept  # noqa: E402

CPU = torch.device("cpu")
DENSE, OURS = Network("resnet20", {}, 8), Network("mgic_resnet20", {"group_size": 4}, 8)


def here(seconds, function, *arguments):
    """In place of a child process."""
    return function(*arguments)


@pytest.fixture
def kept(tmp_path):
    return Kept(tmp_path / "step.json", {}, gpu.SECONDS)


def step(name, done, result=None):
    def work(kept):
        done.append(name)
        if isinstance(result, Exception):
            raise result
        return "no data", {"seconds": [1.0, 2.0]}, ["a note"], {}

    return gpu.Step(name, work)


def test_a_step_with_a_record_is_skipped_and_an_unfinished_one_is_taken_up_again(tmp_path):
    done, said = [], []
    steps = [step("a", done), step("b", done, gpu.OutOfTime("not yet")), step("c", done)]
    assert gpu.run_queue(steps, tmp_path, said.append) == 1
    assert done == ["a", "b", "c"]
    assert "b: not yet" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-a.json", "gpu-c.json"]
    record = read_record(tmp_path / "gpu-a.json")
    assert record["metrics"]["seconds"]["mean"] == 1.5
    assert record["command"] == "python benchmarks/gpu.py --only a"
    done.clear()
    assert gpu.run_queue([step("a", done), step("b", done), step("c", done)], tmp_path, said.append) == 0
    assert done == ["b"]


def test_an_error_leaves_what_was_done_and_no_record_of_its_own(tmp_path):
    done = []
    with pytest.raises(RuntimeError, match="broken"):
        gpu.run_queue([step("a", done), step("b", done, RuntimeError("broken")), step("c", done)], tmp_path, str)
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-a.json"]


def test_the_queue_checks_before_it_trains_and_trains_before_it_measures():
    names = [one.name for one in gpu.queue(CPU, None, Path("runs"), Path("results"))]
    assert len(names) == len(set(names))
    assert names[:3] == ["device", "twins", "tests"]
    kinds = [name.partition("-")[0] for name in names[3:]]
    assert kinds == sorted(kinds, key=["train", "bench", "step", "profile"].index)
    assert {f"train-{n}" for n, r in RECIPES.items() if r.data == "cifar10"} == {n for n in names if n[:5] == "train"}
    assert {"bench-resnet50-sg32-batch256", "bench-resnet18x4-sg8-batch1", "step-mgnet18-sg16"} <= set(names)
    assert {f"profile-{name}" for name in gpu.TARGETS} == {name for name in names if name.startswith("profile")}


def test_every_network_of_the_benchmark_can_be_built_and_is_cheaper_than_its_peer():
    for name, dense, ours in list(gpu.pairs())[2::3]:  # s_g = 8
        with torch.device("meta"):
            (a, size), (b, other) = dense.build(), ours.build()
        assert size == other
        assert mgic.cost(b, size).macs < mgic.cost(a, size).macs, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no CUDA device")
def test_without_a_gpu_it_is_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=None)
    assert done.returncode == 2
    assert done.stderr == "gpu: PyTorch sees no CUDA device here; run this where there is one\n"


def test_a_missing_data_set_is_named_before_any_work(tmp_path, capsys):
    assert gpu.main(["--cifar10", str(tmp_path / "absent.npz")]) == 2
    assert "absent.npz is no file" in capsys.readouterr().err


def test_the_list_says_what_is_open(tmp_path, capsys):
    gpu.run_queue([step("device", [])], tmp_path, str)
    assert gpu.main(["--list", "--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["device: recorded", "twins: open"]


def test_ceilings_are_positive_and_finite(kept):
    _, metrics, notes, _ = gpu.device_ceilings(CPU, kept, mebibytes=1, width=32, rounds=2)
    assert all(len(values) == 2 and min(values) > 0 for values in metrics.values())
    assert len(notes) == 2


def test_kernels_that_differ_from_their_twins_stop_the_queue(monkeypatch, kept):
    def errors(cases, once):
        return {f"{name} {gpu_kernels.words(arguments)}": error for name, arguments in cases}

    monkeypatch.setattr(gpu_kernels, "interpret", errors)
    error = 1e-3
    _, metrics, notes, _ = gpu.kernels_against_twins(CPU, kept, [torch.bfloat16], full=False)
    assert len(metrics) == 9
    assert "1.0e-03" in notes[0]
    with pytest.raises(SystemExit, match="differ from their twins: grouped_conv float32"):
        gpu.kernels_against_twins(CPU, kept, [torch.float32], full=False)


def test_finished_parts_are_kept_for_the_next_call_and_given_up_for_another_device(tmp_path):
    record, said, made = tmp_path / "gpu-a.json", [], []

    def measure(name):
        made.append(name)
        return {"ms": 1.0}

    first = Kept(record, {"device": "a"}, 100, said.append)
    assert first.once("x", lambda: measure("x"), needs=90) == {"ms": 1.0}
    with pytest.raises(gpu.OutOfTime, match="after 1 part"):
        first.once("y", lambda: measure("y"), needs=101)
    second = Kept(record, {"device": "a"}, 100, said.append)
    second.once("x", lambda: measure("x"))
    second.once("y", lambda: measure("y"))
    assert made == ["x", "y"]
    assert not said
    assert Kept(record, {"device": "b"}, 100, said.append).parts == {}
    first.path.write_text("{")
    assert Kept(record, {"device": "a"}, 100, said.append).parts == {}
    assert len(said) == 2
    second.close()
    assert not list(tmp_path.iterdir())


def test_a_step_goes_on_where_it_was_stopped_and_leaves_only_its_record(tmp_path):
    made = []

    def work(kept):
        def part(name):
            made.append(name)
            kept.seconds = 0  # as if it had taken all the time

        for name in "ab":
            kept.once(name, lambda name=name: part(name), needs=1)
        return "no data", {"parts": [2.0]}, [], {}

    assert gpu.run_queue([gpu.Step("s", work)], tmp_path, str, {"device": "a"}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-s.json.part"]
    assert gpu.run_queue([gpu.Step("s", work)], tmp_path, str, {"device": "a"}) == 0
    assert made == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-s.json"]


def test_a_process_that_hangs_or_dies_is_ended_with_its_reason():
    began = time.perf_counter()
    assert gpu.in_child(0.5, time.sleep, 60) == {"reason": "ended after 0 s"}
    assert time.perf_counter() - began < 20
    assert gpu.in_child(60, sys.exit, 3) == {"reason": "its process ended with exit code 3"}


def test_both_networks_are_timed_in_turns_and_their_ratio_recorded(tmp_path):
    parts = (gpu.Part(("eager", "eager_nhwc"), 60),)
    setting = gpu.Setting(gpu.inference_call, parts, 2, CPU, torch.float32, 3)
    settings = [setting, replace(setting, prepare=gpu.training_call, parts=(gpu.Part(("eager",), 60),))]
    steps = [
        gpu.Step(f"bench-{i}", lambda kept, one=one: gpu.comparison(DENSE, OURS, one, kept, here))
        for i, one in enumerate(settings)
    ]
    assert gpu.run_queue(steps, tmp_path, str) == 0
    for path in sorted(tmp_path.iterdir()):
        record = read_record(path)
        ratio, ours, dense = (record["metrics"][k]["values"] for k in ("ratio", f"{OURS}.seconds", f"{DENSE}.seconds"))
        assert ratio == [a / b for a, b in zip(ours, dense, strict=True)]
        assert record["n"] == 3
        assert set(record["ways"]) == set(record["fastest"]) == {str(DENSE), str(OURS)}
    assert read_record(tmp_path / "gpu-bench-0.json")["ways"][str(OURS)]["eager_nhwc"]["error"] < 1e-4


def test_a_way_that_was_cut_off_is_recorded_with_its_reason_and_replaced(kept):
    asked = []

    def child(seconds, function, *arguments):
        if function is gpu.in_turns:
            chosen, _ = arguments
            assert {way for _, way in chosen.values()} == {"compile_by_default"}
            return {"reason": "ended after 300 s"}
        network, ways, _ = arguments
        asked.append((str(network), *ways))
        if ways == ("compile",):
            return {"reason": "ended after 240 s"}
        times = {"compile_by_default": 1.0 if network is DENSE else 0.5}
        return {way: {"ms": times.get(way, 2.0)} for way in ways}

    setting = gpu.Setting(gpu.inference_call, gpu.INFERENCE, 2, CPU)
    _, metrics, notes, extra = gpu.comparison(DENSE, OURS, setting, kept, child)
    assert len(asked) == len(set(asked)) == 8
    assert metrics["ratio"] == [0.5]
    assert extra["ways"][str(DENSE)]["compile"] == {"reason": "ended after 240 s"}
    assert f"{OURS}, compile: ended after 240 s" in notes
    assert any("not timed in turns (ended after 300 s)" in note for note in notes)


def test_a_comparison_without_any_time_stays_open_and_begins_anew(kept):
    setting = gpu.Setting(gpu.inference_call, (gpu.Part(("eager",), 60),), 2, CPU)
    with pytest.raises(gpu.OutOfTime, match=r"no way to run resnet20.*eager: out of memory"):
        gpu.comparison(DENSE, OURS, setting, kept, lambda *_: {"reason": "out of memory"})
    assert not kept.path.exists()


def bench_and_device(folder, ratio, fastest="kernels"):
    """Made-up records of a benchmark and of a device of 1 TB/s."""
    fast = {str(DENSE): "compile", str(OURS): fastest}
    machine = {"machine": {"gpu": "a device"}, "metrics": {}}
    for name in ("copy_terabytes_per_second", "bf16_matmul_teraflops"):
        machine["metrics"][name] = {"mean": 1.0}
    (folder / "gpu-bench-resnet18-sg32-batch256.json").write_text(
        json.dumps({"ratio_of_medians": ratio, "fastest": fast})
    )
    (folder / "gpu-device.json").write_text(json.dumps(machine))


def test_only_a_missed_target_is_profiled(tmp_path):
    said = []

    def work(kept):
        return gpu.profile("resnet18-sg32", DENSE, OURS, setting, tmp_path, kept, child)

    def child(seconds, function, network, way, setting):
        assert function is gpu.profiled
        times = {"level": 400.0, "restriction_chain": 100.0, "stem": 200.0} if way == "kernels" else {"conv": 900.0}
        rows = [{"name": name, "calls": 1.0, "us": us} for name, us in times.items()]
        return {"call_us": sum(times.values()) + 100, "kernels": rows}

    setting = gpu.Setting(gpu.inference_call, gpu.INFERENCE, 2, CPU)
    step = gpu.Step("profile-resnet18-sg32", work)
    assert gpu.run_queue([step], tmp_path, said.append) == 0
    assert said == ["profile-resnet18-sg32: gpu-bench-resnet18-sg32-batch256.json is not there"]
    bench_and_device(tmp_path, 0.6)
    assert gpu.run_queue([step], tmp_path, said.append) == 0
    assert "no target missed: 0.600" in said[-1]
    bench_and_device(tmp_path, 0.8, fastest="eager_graph")
    assert gpu.run_queue([step], tmp_path, said.append) == 0
    record = read_record(tmp_path / "gpu-profile-resnet18-sg32.json")
    assert set(record["gap"]) == {str(OURS), f"{OURS}, kernels"}
    assert record["profiles"][f"{OURS}, kernels"]["kernels"][0] == {"name": "level", "calls": 1.0, "us": 400.0}
    gap = record["gap"][f"{OURS}, kernels"]
    assert gap["gap_us"] == pytest.approx(800 - 0.6 * 1000)
    assert set(gap["parts"]) >= {"level", "restriction_chain", "other kernels", "between kernels"}
    assert "level" not in record["gap"][str(OURS)]["parts"]
    assert sum(part["share"] for part in gap["parts"].values()) == pytest.approx(1)


def test_a_program_owns_what_it_takes_beyond_its_floor():
    floors = [block_floors(plan_levels(16, 8, 8, minimum=1), 1000, bottleneck=False)]
    device = Gpu("1 GB/s", 1e9, 1e15)
    chain, top, bottom = ((t.features * 1000 * 2) / 1e3 for t, _ in floors[0].level)  # us: a byte a nanosecond
    rows = {"restriction_chain": chain + 30, "level": top + bottom + 10, "stem": 50.0}
    ours = {"call_us": sum(rows.values()) + 10, "kernels": [{"name": n, "us": us} for n, us in rows.items()]}
    found = gpu.shares(ours, {"call_us": 1e6}, floors, device, 0.5)
    shares = {name: round(part["share"], 6) for name, part in found["parts"].items()}
    expected = {"restriction_chain": 0.3, "level": 0.1, "other kernels": 0.5, "between kernels": 0.1}
    assert shares == expected | {"floor above the target": 0}
    assert found["parts"]["level"]["bytes"] == round((top + bottom) * 1e3)
    assert found["parts"]["level"]["of_copy_bandwidth"] == pytest.approx((top + bottom) / (top + bottom + 10))
    tight = gpu.shares(ours, {"call_us": chain}, floors, device, 1.0)["parts"]
    assert tight["floor above the target"]["excess_us"] == pytest.approx(top + bottom)
    other = gpu.shares(ours | {"kernels": [{"name": "conv", "us": 1e3}]}, {"call_us": 1e6}, floors, device, 0.5)[
        "parts"
    ]
    assert other["other kernels"]["floor_us"] == pytest.approx(chain + top + bottom)


def test_a_profile_lists_only_what_runs_on_the_device():
    setting = gpu.Setting(gpu.inference_call, (), 2, CPU, torch.float32, 2)
    found = gpu.profiled(OURS, "eager", setting)
    assert found["kernels"] == []
    assert found["call_us"] > 0


def test_training_goes_on_in_pieces_and_ends_in_a_record(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 32), ("test", 8)):
        arrays[f"x_{split}"] = rng.integers(0, 255, (count, 8, 8, 3), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(count) % 4
    np.savez(tmp_path / "cifar10.npz", **arrays)
    recipe = replace(RECIPES["cifar10_mgic"], model="mgic_resnet20", epochs=2, batch_size=16)

    def piece(seconds):
        kept = Kept(tmp_path / "train.json", {}, seconds)
        return gpu.training("tiny", recipe, tmp_path / "cifar10.npz", tmp_path / "runs", kept, "32")

    with pytest.raises(gpu.OutOfTime, match="continues"):
        piece(0.0)
    assert gpu.run_queue([gpu.Step("train-tiny", lambda _: piece(600))], tmp_path / "results", str) == 0
    record = json.loads((tmp_path / "results/gpu-train-tiny.json").read_text())
    assert record["metrics"]["epochs"]["values"] == [2]
    assert 0 <= record["metrics"]["test_accuracy"]["mean"] <= 100
    assert json.loads((tmp_path / "runs/tiny/summary.json").read_text())["resumed_from"] > 0
    with pytest.raises(gpu.OutOfTime, match="--cifar10"):
        gpu.training("tiny", recipe, None, tmp_path, Kept(tmp_path / "train.json", {}))
