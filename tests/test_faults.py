"""What a run survives: kill -9 anywhere, kills while saving, full disks, lost workers, signals, two runs at once.

The ids R1, R2, ... are those of the fault table; `trials` (conftest.py) says how often each fault is tried. Trained
processes are forked from one server that has imported everything, so that a restart costs a fraction of a second.
"""

import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import RECIPE, STEPS_PER_EPOCH, stripes, tiny

from mgic.data import load_data, read_batches, reading
from mgic.errors import Stopped, UserError
from mgic.training import DiskFull, Interrupted, load_network, load_start, train
from mgic.training.checkpoint import list_checkpoints, load_checkpoint, newest_checkpoint
from mgic.training.folder import RunFolder, _owner
from mgic.training.weights import load_weights

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


def _train(folder, recipe, steps, kill_after, images, taught_by=None, lose=None):
    """A training process: reports each finished step through ``steps``, kills itself after step ``kill_after``.

    With ``lose`` it does that with its data workers after a step: ``(step, which, signal, seconds, own signal)``.
    """
    torch.set_num_threads(1)

    def on_step(step):
        if steps is not None:
            steps.send(step)
        if step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if lose:
            folder.with_name(f"{folder.name}.step").write_text(str(step))
        if lose and step == lose[0]:
            workers = sorted(multiprocessing.active_children(), key=lambda process: process.pid)
            folder.with_name(f"{folder.name}.workers").write_text(" ".join(str(process.pid) for process in workers))
            if lose[4]:
                os.kill(os.getpid(), lose[4])
            os.kill(workers[lose[1]].pid, lose[2])
            reading.PATIENCE = lose[3]

    data = load_data(str(images), image_size=8) if images else stripes()
    build, given = _rgb if images else tiny, {}
    if taught_by:
        given = {"teacher": load_network(taught_by, lambda name, **_: tiny()), "init": load_start(taught_by)}
    try:
        train(recipe, build, data, folder, on_step=on_step, progress=False, **given)
    except Stopped as stopped:
        folder.with_name(f"{folder.name}.said").write_text(str(stopped))
        sys.exit(stopped.exit_code)
    except UserError:
        sys.exit(2)


def _rgb():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.LazyLinear(2)
    )


def _start(processes, folder, recipe=RECIPE, *, report=False, kill_after=None, images=None, taught_by=None, lose=None):
    receive, send = processes.Pipe(duplex=False) if report else (None, None)
    process = processes.Process(target=_train, args=(folder, recipe, send, kill_after, images, taught_by, lose))
    process.start()
    if send is not None:
        send.close()
    return process, receive


def _finish(process):
    process.join(300)
    assert process.exitcode is not None, "the training process hangs"
    return process.exitcode


def _first_step(receive):
    assert receive.poll(300), "the training process hangs"
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


def test_r1_a_run_killed_at_random_times_ends_bit_identical(processes, uninterrupted, tmp_path, trials):
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
        if kills >= (20 if trials.full else 3):
            trials.passes(kills)
            return


CHAINS = [(8, 16), (12,), (7, 8, 9), (31, 32)]
"""Steps after which a run is killed, started again, killed again: 8, 16, 24 and 32 end an epoch."""
MORE = [(k,) for k in range(1, 2 * STEPS_PER_EPOCH + 1)]
MORE += [(8, 16, 24), (8, 16, 24, 32), (12, 16), (11, 13, 20), (3, 6, 9)]


def test_r1_a_run_killed_right_after_given_steps_ends_bit_identical(processes, uninterrupted, tmp_path, trials):
    for kills in dict.fromkeys([*CHAINS, *MORE]) if trials.full else CHAINS:
        folder, lost = tmp_path / str(kills), 0
        for step in kills:
            assert _finish(_start(processes, folder, kill_after=step)[0]) == -signal.SIGKILL
            lost = max(lost, step - _saved_step(folder))
        assert lost < RECIPE.checkpoint_every
        assert _finish(_start(processes, folder)[0]) == 0
        _assert_same_run(folder, uninterrupted)
        trials.passes(len(kills), steps_lost=lost)


def _saved_step(folder):
    found = newest_checkpoint(folder / "checkpoints")
    return found["step"] if found else 0


def test_r1_a_run_with_teacher_and_start_that_is_killed_ends_bit_identical(processes, uninterrupted, tmp_path, trials):
    recipe = replace(RECIPE, distill_weight=0.5)
    assert _finish(_start(processes, tmp_path / "whole", recipe, taught_by=uninterrupted)[0]) == 0
    for step in (7, 16, 20) if trials.full else (16,):
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


FILES = replace(RECIPE, batch_size=4, crop_padding=0, workers=2)


@pytest.fixture(scope="module")
def seen(processes, pictures, tmp_path_factory):
    """A whole run on files, without workers."""
    folder = tmp_path_factory.mktemp("seen") / "run"
    assert _finish(_start(processes, folder, replace(FILES, workers=0), images=pictures)[0]) == 0
    return folder


def _assert_same_but_for_workers(one, other):
    states = [newest_checkpoint(folder / "checkpoints") for folder in (one, other)]
    for state in states:
        state["recipe"].pop("workers")
    first, second = (dict(_leaves(state)) for state in states)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]) if torch.is_tensor(value) else value == second[key], key


def test_r1_image_folders_resume_bit_identical_with_any_number_of_workers(processes, pictures, seen, tmp_path):
    for workers, step in ((2, 3), (0, 8), (2, 13)):
        changed = replace(FILES, workers=workers)
        process, _ = _start(processes, tmp_path / "run", changed, images=pictures, kill_after=step)
        assert _finish(process) == -signal.SIGKILL
    assert _finish(_start(processes, tmp_path / "run", FILES, images=pictures)[0]) == 0
    _assert_same_but_for_workers(seen, tmp_path / "run")


def _gone(pid):
    """Whether a process ended; one that only waits for its end to be asked for is not gone."""
    return not Path(f"/proc/{pid}").exists()


LOST = [(k, which) for k in (1, 2, 10, 18, 26) for which in (0, 1)]
"""Step after which a worker is lost, early enough in its epoch that it still has to read; and which of two."""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_r23_a_lost_worker_is_named_ends_the_run_and_loses_nothing(processes, pictures, seen, tmp_path, signum, trials):
    """A worker that is stopped hangs: it listens to no request to end."""
    dies = signum == signal.SIGKILL
    chosen = LOST if trials.full and dies else LOST[:3] if trials.full else LOST[2:3]
    for number, (step, which) in enumerate(chosen):
        folder = tmp_path / str(number)
        lose = (step, which, signum, 300 if dies else 5, None)
        began = time.monotonic()
        assert _finish(_start(processes, folder, FILES, images=pictures, lose=lose)[0]) == 1
        took = time.monotonic() - began
        workers = folder.with_name(f"{number}.workers").read_text().split()
        said = folder.with_name(f"{number}.said").read_text()
        named = re.match(r"data worker (\d) of 2 \(process (\d+)\) (.*) reading samples", said)
        assert named[2] == workers[int(named[1])]
        assert named[3] == ("was ended by signal 9 (Killed) while it was" if dies else "sent nothing for 5 s; it was")
        assert not dies or int(named[1]) == which
        found = re.search(r"reading samples ([\d, ]+); likely causes: .* The same command continues the run", said)
        assert len(found[1].split(", ")) == FILES.batch_size
        assert all(map(_gone, workers))
        assert str(_saved_step(folder)) == folder.with_name(f"{number}.step").read_text(), "no step is lost"
        assert took < 300, "a hang guard"
        trials.passes(seconds_to_exit=took)
    assert _finish(_start(processes, folder, FILES, images=pictures)[0]) == 0
    _assert_same_but_for_workers(seen, folder)


def test_r27_a_signal_that_ends_the_workers_too_saves_the_step(processes, pictures, tmp_path, trials):
    """Supervisors send SIGTERM to all processes of a service; a worker dies of it while its batch is waited for."""
    for number, (step, which) in enumerate(LOST if trials.full else LOST[2:3]):
        folder, lose = tmp_path / str(number), (step, which, signal.SIGTERM, 300, signal.SIGTERM)
        assert _finish(_start(processes, folder, FILES, images=pictures, lose=lose)[0]) == 143
        assert _state(folder) == "interrupted"
        assert str(_saved_step(folder)) == folder.with_name(f"{number}.step").read_text(), "no step is lost"
        trials.passes()


def test_a_worker_that_raises_is_no_lost_worker():
    """An error of the code that reads is not explained away by a lack of memory."""
    for workers in (0, 1):
        with pytest.raises(RuntimeError, match="not a matrix"):
            list(read_batches(_raises, [[0]], (), workers, "cpu"))
        assert multiprocessing.active_children() == []


def _raises(index):
    raise RuntimeError("not a matrix")


def _save_for_ever(folder, megabytes, ready):
    weights = torch.randn(megabytes * 2**18)
    with RunFolder(folder, RECIPE, {}) as run:
        for step in itertools.count(1 + len(list_checkpoints(run.checkpoints))):
            run.save(step, {"model": {"w": weights}})
            if ready is not None:
                ready.send(step)
                ready.close()
                ready = None


def test_r2_kills_while_saving_leave_no_corrupt_file_and_a_restart_cleans_up(processes, tmp_path, trials):
    megabytes, kills = (120, 50) if trials.full else (20, 20)
    clock, folder, torn = random.Random(2), tmp_path / "run", 0
    for _ in range(kills):
        receive, send = processes.Pipe(duplex=False)
        process = processes.Process(target=_save_for_ever, args=(folder, megabytes, send))
        process.start()
        send.close()
        assert receive.poll(300)
        receive.recv()
        process.join(clock.uniform(0, 0.005 * megabytes))
        process.kill()
        process.join()
        torn += any((folder / "checkpoints").glob(".tmp*"))
        for path in list_checkpoints(folder / "checkpoints"):
            load_checkpoint(path)
    assert torn >= kills // 5, "the kills did not hit the writing: this test shows nothing"
    with RunFolder(folder, RECIPE, {}) as run:
        left = {p.name for p in run.checkpoints.iterdir()}
    assert left == {n for p in list_checkpoints(folder / "checkpoints") for n in (p.name, p.name + ".sha256")}
    assert not list(folder.glob(".tmp*"))
    trials.passes(kills)


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


def test_r3_a_kill_before_any_single_file_operation_leaves_a_valid_newest_checkpoint(processes, tmp_path, trials):
    for attempt in range(10 if trials.full else 1):
        trials.passes(_killed_before_each_operation(processes, tmp_path / str(attempt)))


def _killed_before_each_operation(processes, place):
    """The number of operations that were tried."""
    found = []
    for fatal in itertools.count():
        folder = place / str(fatal)
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
    return len(found)


@pytest.fixture
def interruptible():
    """SIGINT interrupts, also where the tests run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _state(folder):
    return json.loads((folder / "status.json").read_text())["state"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_r27_a_signal_saves_the_step_and_the_same_command_continues(processes, uninterrupted, tmp_path, signum, trials):
    for k in range(10 if trials.full else 1):
        folder = tmp_path / str(k)
        process, steps = _start(processes, folder, report=True)
        _first_step(steps)
        sent = time.monotonic()
        os.kill(process.pid, signum)
        assert _finish(process) == 128 + signum
        took = time.monotonic() - sent
        assert took < 100, "a hang guard"
        assert _state(folder) == "interrupted"
        assert _finish(_start(processes, folder)[0]) == 0
        _assert_same_run(folder, uninterrupted)
        trials.passes(seconds_to_exit=took)


@pytest.mark.usefixtures("interruptible")
def test_r27_a_second_signal_ends_at_once_and_the_same_command_continues(uninterrupted, tmp_path, trials):
    """The second one comes within the step of the first: nothing of the step is saved."""

    def twice(step):
        if step == 13:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    for k in range(10 if trials.full else 1):
        with pytest.raises(KeyboardInterrupt):
            train(RECIPE, tiny, stripes(), tmp_path / str(k), progress=False, on_step=twice)
        assert _state(tmp_path / str(k)) == "interrupted"
        assert _saved_step(tmp_path / str(k)) == 12
        train(RECIPE, tiny, stripes(), tmp_path / str(k), progress=False)
        _assert_same_run(tmp_path / str(k), uninterrupted)
        trials.passes()


def test_r27_a_signal_during_validation_resumes_with_the_validation(uninterrupted, tmp_path, monkeypatch, trials):
    for k in range(10 if trials.full else 1):
        _interrupted_in_validation(tmp_path / str(k), monkeypatch)
        _assert_same_run(tmp_path / str(k), uninterrupted)
        trials.passes()


def _interrupted_in_validation(folder, monkeypatch):
    from mgic.training import loop

    whole, calls = loop.evaluate, itertools.count()

    def evaluate(*args, **kwargs):
        if next(calls) == 1:  # the second epoch's
            signal.raise_signal(signal.SIGTERM)
        return whole(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", evaluate)
        with pytest.raises(Interrupted) as interrupted:
            train(RECIPE, tiny, stripes(), folder, progress=False)
    assert interrupted.value.exit_code == 143
    assert _saved_step(folder) == 2 * STEPS_PER_EPOCH
    assert len(newest_checkpoint(folder / "checkpoints")["progress"]["history"]) == 1
    train(RECIPE, tiny, stripes(), folder, progress=False)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_r27_an_interrupted_export_leaves_nothing_new_and_nothing_half_written(tmp_path, monkeypatch, signum, trials):
    from mgic.cli import main
    from mgic.formats import FORMATS

    def write(job, file):
        file.write_bytes(b"half")
        signal.raise_signal(signum)

    monkeypatch.setitem(FORMATS, "torch", replace(FORMATS["torch"], write=write))
    older = tmp_path / "mgic_resnet20.pt2"
    older.write_bytes(b"older")
    for _ in range(10 if trials.full else 1):
        words = ["export", "mgic_resnet20:width=0.25", "--to=[torch]", f"--out={tmp_path}", "--input_size=[3, 8, 8]"]
        assert main(words) == 128 + signum
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {older.name: b"older"}
        trials.passes()


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_r27_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch, signum, trials):
    from mgic import conversion_folder
    from mgic.cli import main

    monkeypatch.setattr(conversion_folder, "write_text", lambda path, text: signal.raise_signal(signum))
    for k in range(10 if trials.full else 1):
        words = ["convert", "resnet20", "--model_args={width: 0.25}", "--group_size=2", "--coarsest=4"]
        assert main([*words, f"--out={tmp_path / str(k)}"]) == 128 + signum
        assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
        trials.passes()


def _hold(folder, start, over, outcomes):
    start.wait()
    try:
        with RunFolder(folder, RECIPE, {}):
            outcomes.put("runs")
            over.wait()
    except UserError as error:
        outcomes.put(str(error))


def test_r24_of_many_simultaneous_starts_exactly_one_runs(processes, tmp_path, trials):
    start, over, outcomes = processes.Event(), processes.Event(), processes.Queue()
    count = 20 if trials.full else 6
    crowd = [processes.Process(target=_hold, args=(tmp_path / "run", start, over, outcomes)) for _ in range(count)]
    for process in crowd:
        process.start()
    time.sleep(1)
    start.set()
    said = [outcomes.get(timeout=300) for _ in crowd]
    over.set()
    for process in crowd:
        process.join()
    assert said.count("runs") == 1
    pids = {str(process.pid) for process in crowd}
    for text in said:
        if text != "runs":
            owner = re.search(rf"already in use by process (\d+) on {re.escape(platform.node())}$", text)
            assert owner, text
            assert owner[1] in pids
    trials.passes(count)


def test_r24_the_name_of_a_dead_process_is_not_taken_for_the_holders(tmp_path):
    """Who takes the lock of a dead run over has it a moment before its own name replaces the dead one's."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with (tmp_path / "run.lock").open("w+") as lock:
        lock.write(f"{process.pid} on {platform.node()}")
        lock.flush()
        holder = f"{os.getpid()} on {platform.node()}"
        threading.Timer(0.2, lambda: (tmp_path / "run.lock").write_text(holder)).start()
        assert _owner(lock) == holder


def _lock_and_die(folder):
    with RunFolder(folder, RECIPE, {}):
        os.kill(os.getpid(), signal.SIGKILL)


def test_r24_the_lock_of_a_dead_process_is_taken_over(processes, tmp_path, trials):
    for _ in range(10 if trials.full else 2):
        process = processes.Process(target=_lock_and_die, args=(tmp_path / "run",))
        process.start()
        assert _finish(process) == -signal.SIGKILL
        assert (tmp_path / "run/run.lock").read_text() == f"{process.pid} on {platform.node()}"
        with RunFolder(tmp_path / "run", RECIPE, {}):
            assert (tmp_path / "run/run.lock").read_text() == f"{os.getpid()} on {platform.node()}"
        trials.passes()


# R7: a file system of 8 MB that is nearly full.


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting needs privileges")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _fill(disk, free):
    """Leave so many bytes of a disk."""
    (disk / "filler").write_bytes(b"x" * max(shutil.disk_usage(disk).free - free, 0))


@pytest.mark.parametrize("elsewhere", [True, False])
def test_r7_a_full_disk_stops_the_run_and_with_room_it_goes_on(
    small_disk, uninterrupted, tmp_path, elsewhere, monkeypatch, trials
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path if elsewhere else small_disk))  # $TMPDIR
    for k in range(3 if trials.full else 1):
        run, kept = small_disk / f"run{k}", {}

        def fill(step, run=run, kept=kept):
            if step == 13:
                _fill(small_disk, 20_000)
                kept.update({p.name: p.read_bytes() for p in (run / "checkpoints").iterdir()})

        with pytest.raises(DiskFull, match=r"^disk full: [\d,]+ bytes needed and [\d,]+ free in .*checkpoints$"):
            train(RECIPE, tiny, stripes(), run, progress=False, on_step=fill)
        assert {p.name: p.read_bytes() for p in (run / "checkpoints").iterdir()} == kept
        assert _saved_step(run) == 12
        (small_disk / "filler").unlink()
        train(RECIPE, tiny, stripes(), run, progress=False)
        _assert_same_run(run, uninterrupted)
        trials.passes()


def test_r7_on_a_full_disk_every_verb_that_writes_says_so_and_leaves_what_was_there(small_disk, tmp_path, capsys):
    """Status 74 and one line; nothing new, whether there is no byte left or too few."""
    from mgic.cli import main

    y = np.arange(32) % 2
    np.savez(tmp_path / "d.npz", x_train=np.zeros((32, 8, 8), np.uint8), y_train=y,
             x_test=np.zeros((8, 8, 8), np.uint8), y_test=y[:8])  # fmt: skip
    small = ["--model_args={width: 0.25}", "--group_size=2", "--coarsest=4"]
    older = small_disk / "mgic_resnet20.pt2"
    older.write_bytes(b"older")
    for free in (0, 45_000):
        _fill(small_disk, free)
        for words in (
            ["train", f"--data={tmp_path / 'd.npz'}", "--model=mgic_resnet20", "--batch_size=16"],
            ["convert", "resnet20", *small],
            ["export", "mgic_resnet20:width=0.25", "--to=[torch]", "--input_size=[3, 8, 8]"],
        ):
            out = small_disk if words[0] == "export" else small_disk / words[0]
            assert main([*words, f"--out={out}"]) == 74, capsys.readouterr().err
            said = capsys.readouterr().err
            assert re.fullmatch(r"mgic: disk full: [\d,]+ bytes needed and [\d,]+ free in \S+\n", said), said
        assert older.read_bytes() == b"older"
        assert not [
            p for p in small_disk.rglob("*") if p.name.startswith(".tmp") or p.suffix in (".safetensors", ".ckpt")
        ]
        shutil.rmtree(small_disk / "train")
        (small_disk / "filler").unlink()


def test_r7_an_export_that_fills_the_disk_keeps_the_older_file(small_disk):
    from mgic.exporting import export
    from mgic.formats import FORMATS

    path = small_disk / "net.pt2"
    path.write_bytes(b"older")
    endless = replace(FORMATS["torch"], write=lambda job, file: file.write_bytes(bytes(9 * 2**20)))
    with pytest.raises(DiskFull, match=r"disk full: [\d,]+ bytes needed and [\d,]+ free"):
        export(torch.nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8), path, format=endless)
    assert {p.name: p.read_bytes() for p in small_disk.iterdir()} == {"net.pt2": b"older"}


def _save_beyond_a_limit(folder, outcomes):
    """As quotas do, the system refuses to write more than 100,000 bytes of a file."""
    import resource

    with RunFolder(folder, RECIPE, {}) as run:
        run.save(1, {"model": {"w": torch.ones(9)}})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            run.save(2, {"model": {"w": torch.ones(10**6)}})
        except OSError as error:
            outcomes.put((error.errno, str(error)))


def test_r7_a_refused_write_keeps_the_older_checkpoint(processes, tmp_path, trials):
    for k in range(10 if trials.full else 1):
        outcomes = processes.Queue()
        process = processes.Process(target=_save_beyond_a_limit, args=(tmp_path / str(k), outcomes))
        process.start()
        assert outcomes.get(timeout=300)[0] == errno.EFBIG
        assert _finish(process) == 0
        assert torch.equal(
            newest_checkpoint(tmp_path / str(k) / "checkpoints", strict=True)["model"]["w"], torch.ones(9)
        )
        names = [p.name for p in (tmp_path / str(k) / "checkpoints").iterdir()]
        assert sorted(names) == ["step-000000001.ckpt", "step-000000001.ckpt.sha256"]
        trials.passes()


def test_r7_a_log_that_cannot_be_written_is_a_warning(uninterrupted, tmp_path, monkeypatch):
    """A folder where ``metrics.csv`` goes, a file where the events go."""
    with RunFolder(tmp_path / "run", RECIPE, stripes().fingerprint()):
        (tmp_path / "run/metrics.csv").mkdir()
        (tmp_path / "run/tensorboard").write_text("")
    with pytest.warns(UserWarning, match="the log cannot be written") as said:
        train(RECIPE, tiny, stripes(), tmp_path / "run", progress=False)
    assert {Path(str(w.message).partition(":")[0]).name for w in said} == {"metrics.csv", "tensorboard"}
    _assert_same_run(tmp_path / "run", uninterrupted)


def test_r7_events_that_cannot_be_written_any_more_are_a_warning(uninterrupted, tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "flush", full)
    with pytest.warns(UserWarning, match=r"tensorboard: the log cannot be written \(No space left") as said:
        train(RECIPE, tiny, stripes(), tmp_path / "run", progress=False)
    assert len(said) == 1, "it is said once"
    _assert_same_run(tmp_path / "run", uninterrupted)


# R8


@contextlib.contextmanager
def _unprivileged():
    """As nobody, where we are root: root may write anywhere."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public():
    """A folder that nobody can reach: those of pytest are private."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


def test_r8_a_folder_that_cannot_be_written_is_said_before_training(public, trials):
    train(
        replace(RECIPE, epochs=1), tiny, stripes(), public / "fine", progress=False
    )  # as nobody, nothing can be imported
    (public / "read-only").mkdir()
    with RunFolder(public / "begun", RECIPE, stripes().fingerprint()) as begun:
        pass
    for path in (public / "begun", *(public / "begun").iterdir()):
        path.chmod(0o777)
    begun.checkpoints.chmod(0o555)
    (public / "read-only").chmod(0o555)
    (public / "file").write_text("")
    places = [public / "read-only" / "run", public / "read-only", public / "begun", public / "file" / "run"]
    for place in [*places, Path("/proc/run")] if sys.platform == "linux" else places:
        began = time.monotonic()
        with _unprivileged(), pytest.raises(UserError, match="cannot be written"):
            train(RECIPE, tiny, stripes(), place, progress=False)
        took = time.monotonic() - began
        assert took < 50, "a hang guard"
        trials.passes(seconds_to_refusal=took)
    assert not list(begun.checkpoints.iterdir())


# R28

_JUMP = """
import sys, time, datetime
real, began = time.time, time.monotonic()
time.time = lambda: real() - 86_400 * (time.monotonic() - began > {after})
from mgic.cli import main
sys.exit(main(sys.argv[1:]))
"""
LONG = "ein Lauf mit Lücken, çığ 日本 " + "x" * 219


def _turkish(folder):
    """A Turkish locale, where its sources are installed: i is no small I there, and numbers have commas."""
    with contextlib.suppress(OSError):
        subprocess.run(["localedef", "-i", "tr_TR", "-f", "UTF-8", folder / "tr_TR.UTF-8"], capture_output=True)
    return {"LC_ALL": "tr_TR.UTF-8", "LOCPATH": str(folder)}


def test_r28_clock_locale_paths_and_missing_folders_have_no_effect(tmp_path, trials):
    from mgic.cli import main

    assert len(LONG.encode()) <= 255
    y = np.arange(32) % 2
    x = np.random.RandomState(0).randint(0, 256, (32, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x[:8], y_test=y[:8])
    words = ["train", f"--data={tmp_path / 'd.npz'}", "--model=mgic_resnet20", "--model_args={width: 0.25}"]
    words += ["--batch_size=16", "--epochs=2", "--threads=1", "--schedule=onecycle", "--accelerator=cpu"]
    assert main([*words, f"--out={tmp_path / 'plain'}"]) == 0
    plain = {k: v for k, v in os.environ.items() if k not in ("TMPDIR", "LC_ALL", "LANG") and not k.startswith("XDG")}
    cases = {
        "clock": ({}, "run", _JUMP.format(after=3)),
        "C": ({"LC_ALL": "C"}, "run", None),
        "Turkish": (_turkish(tmp_path), "run", None),
        "no TMPDIR": ({}, "run", None),
        "HOME": ({"HOME": "/proc"}, "run", None),
        "names": ({}, LONG, None),
    }
    if not trials.full:
        cases = {"all": ({**_turkish(tmp_path), "HOME": "/proc"}, LONG, _JUMP.format(after=3))}
    for name, (changes, folder, code) in cases.items():
        out = tmp_path / name / folder
        summary = out.with_name("y" * 250 + ".json")
        command = [sys.executable, *(["-c", code] if code else ["-m", "mgic"]), *words]
        done = subprocess.run(
            [*command, f"--out={out}", f"--json_summary={summary}"],
            env=plain | changes, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (name, done.stderr)
        weights = (folder / "model.safetensors.sha256" for folder in (out, tmp_path / "plain"))
        assert next(weights).read_text() == next(weights).read_text(), name
        assert json.loads(summary.read_text())["steps"] == 4
        trials.passes()


# R35, R36


def test_r35_three_runs_are_bit_equal(processes, uninterrupted, tmp_path, trials):
    for name in ("second", "third"):
        assert _finish(_start(processes, tmp_path / name)[0]) == 0
        _assert_same_run(tmp_path / name, uninterrupted)
    trials.passes(3, largest_difference=0.0)


def _train_long(folder, epochs, images, rows):
    """A long run in memory, then one on files: what the process holds after each epoch of the one and the other."""
    torch.set_num_threads(1)

    def look(step, every):
        if step % every == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            held.append((resident, len(os.listdir("/proc/self/fd")), len(children)))

    held = []
    memory = replace(RECIPE, epochs=epochs, checkpoint_every=0)
    train(memory, tiny, stripes(400), folder / "memory", progress=False, on_step=lambda step: look(step, 50))
    files = replace(FILES, epochs=max(epochs // 5, 3), checkpoint_every=0)
    data = load_data(str(images), image_size=8)
    train(files, _rgb, data, folder / "files", progress=False, on_step=lambda step: look(step, len(data.train) // 4))
    rows.put(held)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_r36_memory_and_file_descriptors_stay_flat_and_no_process_is_left(processes, pictures, tmp_path, trials):
    """2,000 steps in memory (300 in the short version), 50 an epoch, the first quarter to warm up."""
    epochs, most = (40, 0.01) if trials.full else (6, 0.03)
    rows = processes.Queue()
    process = processes.Process(target=_train_long, args=(tmp_path, epochs, pictures, rows))
    process.start()
    held = rows.get(timeout=550)
    assert _finish(process) == 0
    memory, files = held[:epochs], held[epochs:]
    warm = memory[epochs // 4 :]
    growth = max(resident for resident, _, _ in warm) / warm[0][0] - 1
    assert growth < most
    for part in (memory, files):
        assert len({descriptors for _, descriptors, _ in part[1:]}) == 1, part
        assert {children for _, _, children in part} == {0}
    trials.passes(steps=50 * epochs, percent_of_growth=100 * growth)
