import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml

import mgic
from mgic.cli import VERBS, main
from mgic.training.recipes import RECIPES, Recipe


@pytest.fixture
def call(capsys):
    def run(*words):
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A data set of ten small images of two classes that anything can tell apart."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    y = np.arange(32) % 2
    x = (y[:, None, None] * 200 + np.random.RandomState(0).randint(0, 50, (32, 8, 8))).astype(np.uint8)
    np.savez(path, x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    return path


@pytest.fixture(scope="module")
def run_folder(tiny, tmp_path_factory):
    """A finished run of two epochs."""
    out = tmp_path_factory.mktemp("runs") / "a"
    assert main(["train", *small(tiny, out)]) == 0
    return out


def small(tiny, out, **more):
    flags = {"model": "mgic_resnet20", "model_args": "{group_size: 4}", "epochs": 2, "batch_size": 16} | more
    return [f"--data={tiny}", f"--out={out}", *(f"--{k}={v}" for k, v in flags.items())]


def test_a_run_trains_is_summed_up_recorded_and_evaluated(call, tiny, tmp_path):
    summary, record = tmp_path / "s.json", tmp_path / "deep" / "r.json"
    words = small(tiny, tmp_path / "runs", seeds="[0,1]", **{"json-summary": summary, "record": record})
    status, out, _ = call("train", *words)
    assert status == 0
    assert out.count("mgic_resnet20") == 2
    runs = json.loads(summary.read_text())["runs"]
    assert [run["seed"] for run in runs] == [0, 1]
    written = json.loads(record.read_text())
    assert written["n"] == 2
    assert {"train_accuracy", "test_accuracy"} <= set(written["metrics"])
    assert str(tmp_path) not in written["command"].replace(str(tiny), "")
    assert written["recipe"]["model_args"] == {"group_size": 4}
    status, out, _ = call("evaluate", tmp_path / "runs" / "seed-1", "--json")
    assert status == 0
    assert json.loads(out)["accuracy"] == pytest.approx(runs[1]["test_accuracy"])


def test_several_seeds_are_not_trained_again(call, tiny, tmp_path):
    words = small(tiny, tmp_path / "runs", seeds="[0,1]")
    assert call("train", *words)[0] == 0
    before = (tmp_path / "runs" / "seed-0" / "model.safetensors").stat().st_mtime_ns
    status, _, err = call("train", *words)
    assert status == 0
    assert err.count("finished before") == 2
    assert (tmp_path / "runs" / "seed-0" / "model.safetensors").stat().st_mtime_ns == before


def wrong_calls(tiny, run_folder, tmp_path):
    new = tmp_path / "new"
    bad = tmp_path / "bad.yaml"
    bad.write_text("epoch: 3\n")
    three = tmp_path / "three.npz"
    with np.load(tiny) as arrays:
        np.savez(three, **{**arrays, "y_test": np.full(10, 5)})
    file = tmp_path / "file"
    file.write_text("")
    return {
        "no verb": ([], "verb"),
        "unknown verb": (["trian"], "did you mean train?"),
        "unknown flag": (["train", *small(tiny, new), "--colour=red"], "colour"),
        "no out": (["train", "--recipe", "digits"], "out"),
        "unknown model": (["train", *small(tiny, new, model="mgic_resnet21")], "did you mean mgic_resnet"),
        "unknown model, cost": (["cost", "mgic_resnet21"], "did you mean mgic_resnet"),
        "unknown argument": (["train", *small(tiny, new, model_args="{groupsize: 4}")], "has no argument 'groupsize'"),
        "group size of none": (
            ["train", *small(tiny, new, model_args="{group_size: 0}")],
            "group_size must be a positive",
        ),
        "group size that is text": (["cost", "mgic_resnet20", "--model_args={group_size: big}"], "'big'"),
        "wrong classes": (["train", "--recipe=digits", f"--out={new}", "--model_args={num_classes: 7}"], "10 classes"),
        "labels beyond the classes": (["train", *small(three, new)], "label"),
        "missing data set": (["train", "--data=cifar10", f"--root={new}", f"--out={new}/r"], "download"),
        "unknown data set": (["train", "--data=cifar11", f"--out={new}"], "did you mean cifar10"),
        "missing npz": (["train", "--data=nothing.npz", f"--out={new}"], "nothing.npz"),
        "unknown recipe": (["train", "--recipe=digit", f"--out={new}"], "did you mean digits?"),
        "unknown config key": (["train", f"--config={bad}", f"--out={new}"], "did you mean epochs?"),
        "missing config": (["train", "--config=nothing.yaml", f"--out={new}"], "nothing.yaml"),
        "bad value": (["train", *small(tiny, new, epochs=0)], "epochs must be an integer, at least 1, got 0"),
        "bad type": (["train", *small(tiny, new, epochs="x")], "epochs"),
        "too large a batch": (["train", *small(tiny, new, batch_size=64)], "batch_size=64 is larger than the 32"),
        "no model for the input": (["cost", "mgic_resnet20", "--input_size=[5, 8, 8]"], "cannot take an input"),
        "pretrained": (["cost", "mgic_resnet20", "--model_args={pretrained: true}"], "no pretrained weights exist"),
        "finished run": (["train", *small(tiny, run_folder)], "holds a finished run"),
        "another configuration": (["train", *small(tiny, run_folder, lr=0.5)], "lr is 0.1 there, 0.5 asked"),
        "a file for a folder": (["train", *small(tiny, file / "run")], "cannot be written"),
        "an unwritable record": (["train", *small(tiny, new, record=file / "r.json")], "cannot be written"),
        "no run": (["evaluate", tmp_path], "not a run folder"),
        "unknown split": (["evaluate", run_folder, "--split=val"], "must be train or test, got 'val'"),
        "data of other shape": (["evaluate", run_folder, "--data=digits"], "do not fit"),
        "no match": (["models", "vgg*"], "no model matches 'vgg*'"),
        "repeated seeds": (["train", *small(tiny, new, seeds="[1,1]")], "different seeds"),
        "negative threads": (["train", *small(tiny, new, threads=-1)], "--threads must be 0 or more"),
    }


def test_wrong_calls_give_one_clear_line_and_status_2(call, tiny, run_folder, tmp_path):
    """No traceback, nothing on stdout, nothing trained."""
    failures = []
    for name, (words, said) in wrong_calls(tiny, run_folder, tmp_path).items():
        status, out, err = call(*words)
        if (status, out) != (2, "") or said not in err or err.count("\n") != 1 or not err.startswith("mgic: "):
            failures.append(f"{name}: status {status}, out {out[:80]!r}, err {err!r}, expected {said!r}")
    assert not failures, "\n".join(failures)
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_r8_a_read_only_folder_is_refused_before_training(call, tiny, tmp_path):
    tmp_path.chmod(0o500)
    status, _, err = call("train", *small(tiny, tmp_path / "run"))
    tmp_path.chmod(0o700)
    assert status == 2
    assert "cannot be written" in err


def test_r8_a_read_only_file_system_is_refused_before_training(call, tiny):
    """As root too: /proc takes no new folders."""
    status, _, err = call("train", *small(tiny, "/proc/run"))
    assert status == 2
    assert "cannot be written" in err
    assert err.count("\n") == 1


def test_recipes_files_and_flags_each_win_over_the_one_before(call, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("epochs: 7\nlr: 5e-2\n")
    status, out, _ = call("train", "--recipe=digits", f"--config={config}", "--lr=0.3", "--out=x", "--print-config")
    assert status == 0
    assert Recipe.from_yaml(out) == Recipe(**{**vars(RECIPES["digits"]), "epochs": 7, "lr": 0.3})
    config.write_text(out)
    assert call("train", f"--config={config}", "--out=x", "--print-config")[1] == out
    assert yaml.safe_load(out)["batch_size"] == RECIPES["digits"].batch_size


def test_cost_prints_what_the_library_counts(call):
    status, out, _ = call("cost", "mgic_resnet56", "--model_args={group_size: 16}", "--json")
    assert status == 0
    counted = json.loads(out)
    model = mgic.create_model("mgic_resnet56", group_size=16)
    expected = mgic.cost(model, (3, 32, 32))
    assert (counted["params"], counted["macs"]) == (expected.params, expected.macs)
    assert counted["inference_bytes"] == mgic.memory(model, (3, 32, 32)).inference
    assert len(counted["blocks"]) == 27
    assert "301,690 parameters" in call("cost", "mgic_resnet56")[1]


def test_models_lists_every_network_with_a_description(call):
    status, out, _ = call("models", "--json")
    listed = json.loads(out)
    assert status == 0
    assert [row["model"] for row in listed] == mgic.list_models()
    assert all(row["description"] for row in listed)


def test_the_demo_shows_both_networks_and_leaves_curves_and_records(call, tmp_path):
    words = ["--out", tmp_path, "--seeds=[0,1]", "--epochs=1", f"--json-summary={tmp_path / 's.json'}"]
    status, out, _ = call("demo", *words)
    assert status == 0
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["resnet20", "mgic_resnet20"]
    assert [row["params"] for row in rows] == [269_434, 101_722]
    assert all(f"{row['macs']:,}" in out for row in rows)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    for row in rows:
        record = json.loads((tmp_path / f"record-{row['model']}.json").read_text())
        assert record["metrics"]["test_accuracy"]["values"] == row["test_accuracy"]


def test_info_says_what_is_there(call):
    status, out, _ = call("info", "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["mgic"] == mgic.__version__
    assert facts["extras"]["train"]


def test_help_teaches_every_verb(capsys):
    for words in (["--help"], *([verb, "--help"] for verb in VERBS)):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)
    assert "--label_smoothing" in out


def seconds(code):
    """Wall time of a Python process, the best of three."""
    import time

    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, *code], capture_output=True, text=True, check=True)
        best = min(best, time.perf_counter() - began)
    return best, done


def test_r32_import_is_silent_and_loads_neither_timm_nor_lightning():
    """The times the issue asks for are 3 s and 1.5 s; the limits here are hang guards, ten times as long."""
    code = "import sys, mgic; print(sorted({'timm', 'lightning', 'torch', 'sklearn'} & set(sys.modules)))"
    took, done = seconds(["-c", code])
    assert done.stdout == "[]\n"
    assert done.stderr == ""
    assert took < 30


def test_help_needs_no_torch():
    code = (
        "import sys; sys.argv = ['mgic', '--help']; from mgic.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    )
    took, done = seconds(["-c", code + "print('torch' in sys.modules)"])
    assert done.stdout.splitlines()[-1] == "False"
    assert took < 15


def test_python_dash_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "mgic", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"mgic {mgic.__version__}\n"
