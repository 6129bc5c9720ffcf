"""What a run survives: kill -9 anywhere, kills while saving, damaged and hostile files, signals, two runs at once.

The ids R1, R2, ... are those of the fault table. Trained processes are forked from one server that has imported
everything, so that a restart costs a fraction of a second. ``MGIC_FAULTS=full`` runs the full sizes.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import pickle
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import RECIPE, STEPS_PER_EPOCH, stripes, tiny

from mgic.data import load_data
from mgic.errors import UserError
from mgic.training import CorruptCheckpoint, Interrupted, Recipe, load_network, load_run, load_start, train
from mgic.training.checkpoint import (
    RunFolder,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    read_recipe,
    save_checkpoint,
)

FULL = os.environ.get("MGIC_FAULTS") == "full"
TOTAL = RECIPE.epochs * STEPS_PER_EPOCH
PRELOADED = [
    "mgic.training.loop",
    "lightning.fabric",
    "torch.utils.tensorboard",
    "torchvision.datasets",
    "torchvision.transforms.v2",
]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kill -9 and fork are POSIX")


@pytest.fixture(scope="session")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _train(folder, recipe, steps, kill_after, images, taught_by=None):
    """A training process: reports each finished step through ``steps``, kills itself after step ``kill_after``."""
    torch.set_num_threads(1)

    def on_step(step):
        if steps is not None:
            steps.send(step)
        if step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    data = load_data(str(images), image_size=8) if images else stripes()
    build, given = _rgb if images else tiny, {}
    if taught_by:
        given = {"teacher": load_network(taught_by, lambda name, **_: tiny()), "init": load_start(taught_by)}
    try:
        train(recipe, build, data, folder, on_step=on_step, progress=False, **given)
    except Interrupted as interrupted:
        sys.exit(interrupted.exit_code)
    except UserError:
        sys.exit(2)


def _rgb():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.LazyLinear(2)
    )


def _start(processes, folder, recipe=RECIPE, *, report=False, kill_after=None, images=None, taught_by=None):
    receive, send = processes.Pipe(duplex=False) if report else (None, None)
    process = processes.Process(target=_train, args=(folder, recipe, send, kill_after, images, taught_by))
    process.start()
    if send is not None:
        send.close()
    return process, receive


def _finish(process):
    process.join(120)
    assert process.exitcode is not None, "the training process hangs"
    return process.exitcode


def _first_step(receive):
    assert receive.poll(120), "the training process hangs"
    with contextlib.suppress(EOFError):  # it had nothing left to train
        receive.recv()


def _leaves(value, name=""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}")
    elif isinstance(value, list):
        for key, item in enumerate(value):
            yield from _leaves(item, f"{name}.{key}")
    elif not name.endswith("seconds"):
        yield name, value


def _assert_same_run(one, other):
    """Weights, average, statistics, momentum, step, history: equal to the last bit; only times may differ."""
    first, second = (dict(_leaves(newest_checkpoint(folder / "checkpoints"))) for folder in (one, other))
    assert first.keys() == second.keys()
    different = [
        k
        for k in first
        if not (torch.equal(first[k], second[k]) if torch.is_tensor(first[k]) else first[k] == second[k])
    ]
    assert different == []
    assert first[".step"] == TOTAL == first[".progress.step"]
    weights = [load_weights(folder / "model.safetensors") for folder in (one, other)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.fixture(scope="module")
def uninterrupted(processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert _finish(_start(processes, folder)[0]) == 0
    return folder


def test_r1_a_run_killed_at_random_times_ends_bit_identical(processes, uninterrupted, tmp_path):
    clock, kills = random.Random(1), 0
    for attempt in itertools.count():
        folder = tmp_path / str(attempt)
        while True:
            process, steps = _start(processes, folder, report=True)
            _first_step(steps)
            process.join(clock.uniform(0, 0.25))
            if process.exitcode is None:
                process.kill()
                _finish(process)
                kills += 1
            if (folder / "status.json").exists() and json.loads((folder / "status.json").read_text())[
                "state"
            ] == "finished":
                break
        _assert_same_run(folder, uninterrupted)
        if kills >= 20:
            return


CHAINS = [(k,) for k in range(1, 2 * STEPS_PER_EPOCH + 1)]
CHAINS += [(8, 16), (8, 16, 24), (8, 16, 24, 32), (12, 16), (11, 13, 20), (3, 6, 9), (7, 8, 9), (31, 32)]


@pytest.mark.parametrize("kills", CHAINS, ids=str)
def test_r1_a_run_killed_right_after_given_steps_ends_bit_identical(processes, uninterrupted, tmp_path, kills):
    for step in kills:
        assert _finish(_start(processes, tmp_path / "run", kill_after=step)[0]) == -signal.SIGKILL
    assert _finish(_start(processes, tmp_path / "run")[0]) == 0
    _assert_same_run(tmp_path / "run", uninterrupted)


def test_r1_a_run_with_teacher_and_start_that_is_killed_ends_bit_identical(processes, uninterrupted, tmp_path):
    recipe = replace(RECIPE, distill_weight=0.5)
    assert _finish(_start(processes, tmp_path / "whole", recipe, taught_by=uninterrupted)[0]) == 0
    for step in (7, 16, 20):
        process, _ = _start(processes, tmp_path / "run", recipe, kill_after=step, taught_by=uninterrupted)
        assert _finish(process) == -signal.SIGKILL
    assert _finish(_start(processes, tmp_path / "run", recipe)[0]) == 2, "without its teacher it is refused"
    assert _finish(_start(processes, tmp_path / "run", recipe, taught_by=uninterrupted)[0]) == 0
    _assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    from PIL import Image

    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part, count in (("train", 17), ("val", 3)):
        for label in ("cat", "dog"):
            (folder / part / label).mkdir(parents=True)
            for k in range(count):
                pixels = generator.integers(0, 256, (12, 14, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{k}.png")
    return folder


def test_r1_image_folders_resume_bit_identical_with_any_number_of_workers(processes, pictures, tmp_path):
    recipe = replace(RECIPE, batch_size=4, crop_padding=0)
    assert _finish(_start(processes, tmp_path / "whole", recipe, images=pictures)[0]) == 0
    for workers, step in ((2, 3), (0, 8), (2, 13)):
        changed = replace(recipe, workers=workers)
        process, _ = _start(processes, tmp_path / "run", changed, images=pictures, kill_after=step)
        assert _finish(process) == -signal.SIGKILL
    assert _finish(_start(processes, tmp_path / "run", replace(recipe, workers=2), images=pictures)[0]) == 0
    torch_recipes = [newest_checkpoint(tmp_path / name / "checkpoints") for name in ("whole", "run")]
    for state in torch_recipes:
        state["recipe"].pop("workers")
    one, other = (dict(_leaves(state)) for state in torch_recipes)
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]) if torch.is_tensor(one[key]) else one[key] == other[key], key


def _save_for_ever(folder, megabytes, ready):
    weights = torch.randn(megabytes * 2**18)
    with RunFolder(folder, RECIPE, {}) as run:
        for step in itertools.count(1 + len(list_checkpoints(run.checkpoints))):
            run.save(step, {"model": {"w": weights}})
            if ready is not None:
                ready.send(step)
                ready.close()
                ready = None


def test_r2_kills_while_saving_leave_no_corrupt_file_and_a_restart_cleans_up(processes, tmp_path):
    megabytes, clock, folder, torn = (120 if FULL else 20), random.Random(2), tmp_path / "run", 0
    for _ in range(50):
        receive, send = processes.Pipe(duplex=False)
        process = processes.Process(target=_save_for_ever, args=(folder, megabytes, send))
        process.start()
        send.close()
        assert receive.poll(120)
        receive.recv()
        process.join(clock.uniform(0, 0.005 * megabytes))
        process.kill()
        process.join()
        torn += any((folder / "checkpoints").glob(".tmp*"))
        for path in list_checkpoints(folder / "checkpoints"):
            load_checkpoint(path)
    assert torn >= 10, "the kills did not hit the writing: this test shows nothing"
    with RunFolder(folder, RECIPE, {}) as run:
        left = {p.name for p in run.checkpoints.iterdir()}
    assert left == {n for p in list_checkpoints(folder / "checkpoints") for n in (p.name, p.name + ".sha256")}
    assert not list(folder.glob(".tmp*"))


def _save_and_die(folder, fatal):
    """Save one checkpoint and die right before the ``fatal``-th call that changes the disk."""
    calls = itertools.count()

    def deadly(function):
        def call(*args, **kwargs):
            if next(calls) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    with RunFolder(folder, replace(RECIPE, keep_checkpoints=1), {}) as run:
        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, deadly(getattr(os, name)))
        run.save(2, {"model": {"w": torch.full((9,), 2.0)}})


def test_r3_a_kill_before_any_single_file_operation_leaves_a_valid_newest_checkpoint(processes, tmp_path):
    found = []
    for fatal in itertools.count():
        folder = tmp_path / str(fatal)
        with RunFolder(folder, replace(RECIPE, keep_checkpoints=1), {}) as run:
            run.save(1, {"model": {"w": torch.full((9,), 1.0)}})
        process = processes.Process(target=_save_and_die, args=(folder, fatal))
        process.start()
        code = _finish(process)
        with RunFolder(folder, replace(RECIPE, keep_checkpoints=1), {}) as run:
            state = run.newest(strict=True)
            assert not list(run.checkpoints.glob(".tmp*"))
            assert not [s for s in run.checkpoints.glob("*.sha256") if not s.with_suffix("").exists()]
        assert torch.equal(state["model"]["w"], torch.full((9,), float(state["step"])))
        found.append(state["step"])
        if code == 0:
            break
    assert found == sorted(found), "the new checkpoint appears at one instant"
    assert set(found) == {1, 2}
    assert len(found) >= 8


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_r27_a_signal_saves_the_step_and_the_same_command_continues(processes, uninterrupted, tmp_path, signum):
    process, steps = _start(processes, tmp_path / "run", report=True)
    _first_step(steps)
    sent = time.monotonic()
    os.kill(process.pid, signum)
    assert _finish(process) == 128 + signum
    assert time.monotonic() - sent < 100
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "interrupted"
    assert _finish(_start(processes, tmp_path / "run")[0]) == 0
    _assert_same_run(tmp_path / "run", uninterrupted)


def test_r27_a_signal_during_validation_resumes_with_the_validation(uninterrupted, tmp_path, monkeypatch):
    from mgic.training import loop

    whole, calls = loop.evaluate, itertools.count()

    def evaluate(*args, **kwargs):
        if next(calls) == 1:  # the second epoch's
            signal.raise_signal(signal.SIGTERM)
        return whole(*args, **kwargs)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    with pytest.raises(Interrupted) as interrupted:
        train(RECIPE, tiny, stripes(), tmp_path / "run", progress=False)
    assert interrupted.value.exit_code == 143
    assert newest_checkpoint(tmp_path / "run/checkpoints")["step"] == 2 * STEPS_PER_EPOCH
    assert len(newest_checkpoint(tmp_path / "run/checkpoints")["progress"]["history"]) == 1
    train(RECIPE, tiny, stripes(), tmp_path / "run", progress=False)
    _assert_same_run(tmp_path / "run", uninterrupted)


def _hold(folder, start, outcomes):
    start.wait()
    try:
        with RunFolder(folder, RECIPE, {}):
            outcomes.put("runs")
            time.sleep(3)
    except UserError as error:
        outcomes.put(str(error))


def test_r24_of_many_simultaneous_starts_exactly_one_runs(processes, tmp_path):
    start, outcomes = processes.Event(), processes.Queue()
    crowd = [processes.Process(target=_hold, args=(tmp_path / "run", start, outcomes)) for _ in range(20)]
    for process in crowd:
        process.start()
    time.sleep(1)
    start.set()
    said = [outcomes.get(timeout=60) for _ in crowd]
    for process in crowd:
        process.join()
    assert said.count("runs") == 1
    assert all("already in use by process" in text for text in said if text != "runs")


# R5: whoever loads one of these with an unrestricted unpickler creates the sentinel file (or allocates 2^60 bytes).


class _Calls:
    """Pickles as a call of ``function`` with ``args``."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class _State:
    """Pickles as an object whose state is a call."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return torch.nn.Module, (), self.state


def _payloads(sentinel):
    import builtins
    import functools
    import importlib
    import operator
    import subprocess

    code = f"open({str(sentinel)!r}, 'w').close()"
    touch = f"touch '{sentinel}'"
    return {
        "os.system": _Calls(os.system, touch),
        "os.open": _Calls(os.open, str(sentinel), os.O_CREAT),
        "eval": _Calls(builtins.eval, code),
        "exec": _Calls(builtins.exec, code),
        "open": _Calls(builtins.open, str(sentinel), "w"),
        "subprocess": _Calls(subprocess.call, ["touch", str(sentinel)]),
        "pathlib": _Calls(Path.touch, Path(sentinel)),
        "partial": _Calls(functools.partial(os.system, touch)),
        "methodcaller": _Calls(operator.methodcaller("touch"), Path(sentinel)),
        "getattr": _Calls(builtins.getattr, _Calls(importlib.import_module, "os"), "system"),
        "pickle.loads": _Calls(pickle.loads, pickle.dumps(_Calls(os.system, touch))),
        "module state": _State({"x": _Calls(os.system, touch)}),
        "in a checkpoint": {"schema": 1, "step": 1, "model": {"w": _Calls(os.system, touch)}},
        "torch.load": _Calls(torch.load, str(sentinel)),
    }


PAYLOADS = sorted(_payloads("x"))


def _signed(path):
    """Give a file the sidecar of an honest checkpoint: the attacker can do so too."""
    import hashlib

    path.with_name(path.name + ".sha256").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")


@pytest.mark.parametrize("container", ["zip", "pickle"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_r5_no_entry_point_executes_what_a_checkpoint_says(tmp_path, payload, container):
    sentinel = tmp_path / "sentinel"
    evil = _payloads(sentinel)[payload]
    folder = tmp_path / "run"
    with RunFolder(folder, RECIPE, stripes().fingerprint()) as run:
        path = run.checkpoints / "step-000000001.ckpt"
    if container == "zip":
        torch.save(evil, path)
    else:
        path.write_bytes(pickle.dumps(evil))
    _signed(path)
    for load in (
        lambda: load_checkpoint(path),
        lambda: load_run(folder),
        lambda: train(RECIPE, tiny, stripes(), folder, progress=False, strict_resume=True),
    ):
        with pytest.raises(CorruptCheckpoint, match=r"step-000000001\.ckpt: corrupt checkpoint"):
            load()
    final = folder / "model.safetensors"
    final.write_bytes(path.read_bytes())
    _signed(final)
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors: corrupt checkpoint"):
        load_run(folder)
    assert not sentinel.exists()


@pytest.mark.parametrize("payload", PAYLOADS)
def test_r5_data_files_execute_nothing(tmp_path, payload):
    sentinel = tmp_path / "sentinel"
    evil = np.empty(3, dtype=object)
    evil[:] = [_payloads(sentinel)[payload]] * 3
    np.savez(tmp_path / "evil.npz", x_train=evil, y_train=evil, x_test=evil, y_test=evil)
    (tmp_path / "raw.npz").write_bytes(pickle.dumps(_payloads(sentinel)[payload]))
    for name in ("evil.npz", "raw.npz"):
        with pytest.raises(UserError, match=f"{name}: not a readable .npz"):
            load_data(str(tmp_path / name))
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "tag", ["object/apply:os.system", "object/apply:eval", "name:os.system", "module:os", "object/new:os.system"]
)
def test_r5_recipes_execute_nothing(tmp_path, tag):
    sentinel = tmp_path / "sentinel"
    (tmp_path / "recipe.yaml").write_text(f"model: !!python/{tag} [\"touch '{sentinel}'\"]\n")
    with pytest.raises(UserError, match="not valid YAML"):
        read_recipe(tmp_path)
    with pytest.raises(UserError, match="not valid YAML"):
        Recipe.from_yaml((tmp_path / "recipe.yaml").read_text())
    assert not sentinel.exists()


def test_r5_a_tensor_that_lies_about_its_storage_is_refused(tmp_path):
    path = tmp_path / "step-000000001.ckpt"
    save_checkpoint(path, {"schema": 1, "model": {"w": torch.zeros(16)}})
    honest = path.read_bytes()
    for old, new in ((b"K\x10", b"K\xff"), (b"K\x10", b"K\x7f")):
        path.write_bytes(honest.replace(old, new))
        _signed(path)
        with pytest.raises(CorruptCheckpoint):
            load_checkpoint(path)
