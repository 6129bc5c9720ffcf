"""The GPU queue without a GPU: its order, its records, what it skips and continues; steps at tiny sizes on the CPU."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import mgic
from mgic.benchmarking import Network
from mgic.training import RECIPES, read_record

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import gpu_kernels  # noqa: E402

CPU = torch.device("cpu")


def step(name, done, result=None):
    def work():
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
    names = [one.name for one in gpu.queue(CPU, None, Path("runs"))]
    assert len(names) == len(set(names))
    assert names[:3] == ["device", "twins", "tests"]
    kinds = [name.partition("-")[0] for name in names[3:]]
    assert kinds == sorted(kinds, key=["train", "bench", "step"].index)
    assert {f"train-{n}" for n, r in RECIPES.items() if r.data == "cifar10"} == {n for n in names if n[:5] == "train"}
    assert {"bench-resnet50-sg32-batch256", "bench-resnet18x4-sg8-batch1", "step-mgnet18-sg16"} <= set(names)


def test_every_network_of_the_benchmark_can_be_built_and_is_cheaper_than_its_peer():
    for name, dense, ours in list(gpu.pairs())[2::3]:  # s_g = 8
        with torch.device("meta"):
            (a, size), (b, other) = dense.build(), ours.build()
        assert size == other
        assert mgic.cost(b, size).macs < mgic.cost(a, size).macs, name


def test_without_a_gpu_it_is_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=None)
    if torch.cuda.is_available():
        pytest.skip("there is one")
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


def test_ceilings_are_positive_and_finite():
    _, metrics, notes, _ = gpu.device_ceilings(CPU, mebibytes=1, width=32, rounds=2)
    assert all(len(values) == 2 and min(values) > 0 for values in metrics.values())
    assert len(notes) == 2


def test_kernels_that_differ_from_their_twins_stop_the_queue(monkeypatch):
    def errors(cases):
        return {f"{name} {gpu_kernels.words(arguments)}": error for name, arguments in cases}

    monkeypatch.setattr(gpu_kernels, "interpret", errors)
    error = 1e-3
    _, metrics, notes, _ = gpu.kernels_against_twins(CPU, [torch.bfloat16], full=False)
    assert len(metrics) == 9
    assert "1.0e-03" in notes[0]
    with pytest.raises(SystemExit, match="differ from their twins: grouped_conv float32"):
        gpu.kernels_against_twins(CPU, [torch.float32], full=False)


def test_both_networks_are_timed_in_turns_and_their_ratio_recorded(tmp_path):
    dense, ours = Network("resnet20", {}, 8), Network("mgic_resnet20", {"group_size": 4}, 8)
    work = [
        lambda: gpu.inference(dense, ours, 2, CPU, torch.float32, rounds=3, paths=["eager", "eager_nhwc"]),
        lambda: gpu.training_step(dense, ours, 2, CPU, rounds=3, compile_too=False),
    ]
    assert gpu.run_queue([gpu.Step(f"bench-{i}", one) for i, one in enumerate(work)], tmp_path, str) == 0
    for path in sorted(tmp_path.iterdir()):
        record = read_record(path)
        ratio, ours_, dense_ = (
            record["metrics"][k]["values"] for k in ("ratio", f"{ours}.seconds", f"{dense}.seconds")
        )
        assert ratio == [a / b for a, b in zip(ours_, dense_, strict=True)]
        assert record["n"] == 3
        assert set(record["ways"]) == {str(dense), str(ours)}


def test_training_goes_on_in_pieces_and_ends_in_a_record(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 32), ("test", 8)):
        arrays[f"x_{split}"] = rng.integers(0, 255, (count, 8, 8, 3), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(count) % 4
    np.savez(tmp_path / "cifar10.npz", **arrays)
    recipe = replace(RECIPES["cifar10_mgic"], model="mgic_resnet20", epochs=2, batch_size=16)

    def piece(seconds):
        return gpu.training("tiny", recipe, tmp_path / "cifar10.npz", tmp_path / "runs", seconds, "32")

    with pytest.raises(gpu.OutOfTime, match="continues"):
        piece(0.0)
    assert gpu.run_queue([gpu.Step("train-tiny", lambda: piece(600))], tmp_path / "results", str) == 0
    record = json.loads((tmp_path / "results/gpu-train-tiny.json").read_text())
    assert record["metrics"]["epochs"]["values"] == [2]
    assert 0 <= record["metrics"]["test_accuracy"]["mean"] <= 100
    assert json.loads((tmp_path / "runs/tiny/summary.json").read_text())["resumed_from"] > 0
    with pytest.raises(gpu.OutOfTime, match="--cifar10"):
        gpu.training("tiny", recipe, None, tmp_path)
