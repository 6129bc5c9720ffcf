"""Several processes, one run: the same batches, the same losses, one end for all. Real processes, connected by gloo.

The ids R25 and R26 are those of the fault table. Processes are forked from a server that has imported everything.
"""

import contextlib
import copy
import hashlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image
from test_faults import PRELOADED
from test_shards import write_both
from tiny import RECIPE, STEPS_PER_EPOCH, stripes
from torch import distributed, nn
from torch.nn import functional as F

from mgic.cli import main
from mgic.data import Data, classification, load_data, segmentation
from mgic.errors import Stopped, UserError
from mgic.training import LostProcess, TrainedNetwork, evaluate, load_run, train
from mgic.training.checkpoint import list_checkpoints, load_checkpoint, newest_checkpoint
from mgic.training.parallel import Processes, check_share, must_launch, synchronize_norms_

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kill -9 and fork are POSIX")

SAMPLES = 67
STEPS = 2 * STEPS_PER_EPOCH
EACH_STEP = replace(RECIPE, epochs=2, checkpoint_every=1, keep_checkpoints=STEPS)
HANG = 300
"""Seconds after which a process hangs, on a machine that has a lot to do."""


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, "lightning.fabric.strategies"])
    return context


class Seen:
    """Samples that write down which they are: their labels number them, and a hash tells how they were augmented."""

    def __init__(self, split, file):
        self.split, self.file = split, file

    def __getattr__(self, name):
        return getattr(self.split, name)

    def __len__(self):
        return len(self.split)

    def to(self, device):
        return self

    def training_batches(self, batches, augmentation, epoch, step, workers, share):
        stream = self.split.training_batches(batches, augmentation, epoch, step, workers, share)
        for k, (images, labels) in enumerate(stream):
            pixels = [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:12] for image in images]
            with self.file.open("a") as file:
                print(json.dumps([step + k, list(zip(labels.tolist(), pixels, strict=True))]), file=file)
            yield images, labels


def numbered(seen=None) -> Data:
    """The stripes, each image a class of its own."""
    data = stripes(SAMPLES, 20)
    train, test = (replace(s, labels=torch.arange(len(s))) for s in (data.train, data.test))
    return replace(data, train=Seen(train, seen) if seen else train, test=test, task=classification(SAMPLES))


def network() -> nn.Module:
    """Batch statistics and no dropout, whose masks depend on how a batch is shared."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, SAMPLES),
    )


def member(rank, count, port, job, arguments):
    """One process, as torchrun would start it; its exit status is the command's."""
    torch.set_num_threads(1)
    if count > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        rest = {"GROUP_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        os.environ.update({name: str(value) for name, value in (numbers | rest).items()})
    try:
        job(rank, *arguments)
    except Stopped as stopped:
        sys.exit(stopped.exit_code)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def start(server, count, job, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = [server.Process(target=member, args=(rank, count, port, job, arguments)) for rank in range(count)]
    for process in group:
        process.start()
    return group


def finish(group):
    """Exit statuses; processes that hang are ended and fail the test."""
    end = time.monotonic() + HANG
    for process in group:
        process.join(max(end - time.monotonic(), 0))
    hanging = [process for process in group if process.exitcode is None]
    for process in hanging:
        process.kill()
    assert not hanging
    return [process.exitcode for process in group]


def training(rank, folder, recipe=EACH_STEP, task=None, stop=None, steps=None):
    """Train; ``stop`` is ``(rank, step, signal)``, ``steps`` a pipe that hears of the first process's."""

    def on_step(step):
        if steps is not None and rank == 0:
            steps.send(step)
        if stop is not None and stop[:2] == (rank, step):
            os.kill(os.getpid(), stop[2])

    data = numbered(folder.with_suffix(f".{rank}"))
    data = data if task is None else replace(data, task=task())
    train(recipe, network, data, folder, progress=False, accelerator="cpu", on_step=on_step)


def seen(folder, ranks):
    """Of each step the samples of its whole batch, in order, and how they were augmented."""
    steps = {}
    for rank in range(ranks):
        file = folder.with_suffix(f".{rank}")
        for line in file.read_text().splitlines() if file.exists() else ():
            step, batch = json.loads(line)
            steps.setdefault(step, []).extend(map(tuple, batch))
    return steps


def losses(folder):
    """After each step the mean loss of its epoch so far; after the last of an epoch the evaluation's."""
    found = []
    for path in reversed(list_checkpoints(folder / "checkpoints")):
        progress = load_checkpoint(path)["progress"]
        found.append(progress["loss_sum"] / progress["losses"] if progress["losses"] else progress["test"]["loss"])
    return found


def close(ours, theirs):
    """Largest relative difference."""
    assert len(ours) == len(theirs)
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def alone(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert finish(start(server, 1, training, folder)) == [0]
    assert len(losses(folder)) == STEPS
    return folder


@pytest.mark.parametrize("count", [2, 4])
def test_r25_several_processes_see_the_batches_and_reach_the_losses_of_one(server, alone, tmp_path, trials, count):
    folder = tmp_path / "run"
    assert finish(start(server, count, training, folder)) == [0] * count
    assert seen(folder, count) == seen(alone, 1)
    assert sorted(len(batch) for batch in seen(folder, count).values()) == [RECIPE.batch_size] * STEPS
    apart = close(losses(folder), losses(alone))
    assert apart < 1e-3
    ours, theirs = (newest_checkpoint(f / "checkpoints") for f in (folder, alone))
    for part in ("model", "average"):
        assert ours[part].keys() == theirs[part].keys(), "the names do not depend on the number of processes"
        for name, value in theirs[part].items():
            torch.testing.assert_close(ours[part][name], value, rtol=1e-3, atol=1e-4, msg=name)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["processes"] == count
    trials.passes(relative_loss_difference=apart)


@pytest.mark.parametrize("chain", [(1, 2, 1), (2, 1, 4)], ids=str)
def test_r25_a_run_goes_on_with_another_number_of_processes(server, alone, tmp_path, trials, chain):
    """Stopped by a signal to its last process alone: all of them save the same step, and end by it."""
    folder = tmp_path / "run"
    for count, step in zip(chain, (5, 11, None), strict=True):
        stop = None if step is None else (count - 1, step, signal.SIGTERM)
        codes = finish(start(server, count, training, folder, EACH_STEP, None, stop))
        assert codes == [128 + signal.SIGTERM if stop else 0] * count
        if stop:
            assert newest_checkpoint(folder / "checkpoints")["step"] in (step, step + 1)
            assert json.loads((folder / "status.json").read_text())["state"] == "interrupted"
    assert seen(folder, 4) == seen(alone, 1)
    apart = close(losses(folder), losses(alone))
    assert apart < 1e-3
    trials.passes(relative_loss_difference=apart)


def coloured() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))


def reading(rank, folder, shards, workers, stop):
    """Train on shards with so many data workers; the first process gets a signal after step ``stop``."""
    os.environ["MGIC_CACHE"] = str(shards / "cache")
    recipe = replace(RECIPE, batch_size=4, epochs=2, crop_padding=0, checkpoint_every=1, workers=workers)

    def on_step(step):
        if (rank, step) == (0, stop):
            os.kill(os.getpid(), signal.SIGTERM)

    data = load_data(f"shards:{shards}", image_size=8)
    train(recipe, coloured, data, folder, progress=False, accelerator="cpu", on_step=on_step)


def test_r25_other_data_workers_change_no_bit_of_a_run_on_shards(server, tmp_path):
    list(write_both(tmp_path))
    shards, whole, run = tmp_path / "shards", tmp_path / "whole", tmp_path / "run"
    assert finish(start(server, 2, reading, whole, shards, 0, None)) == [0, 0]
    assert finish(start(server, 2, reading, run, shards, 2, 1)) == [143, 143]
    assert finish(start(server, 2, reading, run, shards, 1, None)) == [0, 0]
    ours, theirs = (newest_checkpoint(folder / "checkpoints") for folder in (run, whole))
    assert ours["step"] == theirs["step"] == 4
    for part in ("model", "average"):
        assert all(torch.equal(value, ours[part][name]) for name, value in theirs[part].items())
    losses_there = [[row["train_loss"], row["test_loss"]] for row in theirs["progress"]["history"]]
    assert [[row["train_loss"], row["test_loss"]] for row in ours["progress"]["history"]] == losses_there


def skipping(rank, folder, images):
    data = load_data(f"images:{images}", image_size=8, on_bad_sample="skip")
    recipe = replace(RECIPE, epochs=2, crop_padding=0, eval_batch_size=8, data_args={"on_bad_sample": "skip"})
    train(recipe, coloured, data, folder, progress=False, accelerator="cpu")


def test_r10_broken_images_are_counted_once_by_all_processes_together(server, tmp_path, trials):
    root = tmp_path / "images"
    for k in range(320):
        path = root / ("train" if k < 300 else "val") / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (k % 256, 0, 255 * (k % 2))).save(path)
        if k in (7, 100, 150):
            path.write_bytes(b"broken")
    assert finish(start(server, 2, skipping, tmp_path / "run", root)) == [0, 0]
    assert json.loads((tmp_path / "run/summary.json").read_text())["bad_samples"] == 3
    trials.passes(3)


def refused(rank, folder, recipe):
    try:
        training(rank, folder, recipe)
    except UserError as error:
        folder.with_suffix(f".said{rank}").write_text(str(error))
        raise


def test_r25_another_global_batch_is_refused_in_one_line_by_all(server, alone, tmp_path):
    folder = tmp_path / "run"
    assert finish(start(server, 2, training, folder, EACH_STEP, None, (0, 3, signal.SIGINT))) == [130, 130]
    assert finish(start(server, 2, refused, folder, replace(EACH_STEP, batch_size=16))) == [2, 2]
    (said,) = tmp_path.glob("run.said*")  # one process speaks for all
    assert "batch_size is 8 there, 16 asked" in said.read_text()
    assert newest_checkpoint(folder / "checkpoints")["step"] in (3, 4)


def test_a_batch_that_cannot_be_shared_is_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"batch_size=8 .* cannot be shared by 3; take 2 processes, or a multiple of 3"):
        train(RECIPE, network, numbered(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check_share(9, 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    assert not must_launch(1, 1)
    assert not must_launch(3, 1)
    with pytest.raises(UserError, match="torchrun has started 3 processes on 1 machines, but --devices is 2"):
        must_launch(2, 1)
    with pytest.raises(UserError, match="at least 1, got 0"):
        must_launch(0, 1)


def uneven():
    """A mean over some of the samples, as segmentation's over pixels that are not void; infinite with sample 5."""

    def loss(output, target, smoothing):
        total = F.cross_entropy(output, target.where(target < 40, -100), reduction="sum")
        return total / (target < 40).sum().clamp(min=1) * (float("inf") if (target == 5).any() else 1)

    return replace(classification(SAMPLES), loss=loss, terms=lambda target: int((target < 40).sum()))


def test_uneven_means_and_losses_that_are_not_finite_are_those_of_one_process(server, tmp_path):
    folders = [tmp_path / "1", tmp_path / "2"]
    for count, folder in enumerate(folders, 1):
        assert finish(start(server, count, training, folder, replace(EACH_STEP, clip_grad=0.5), uneven)) == [0] * count
    assert [load_checkpoint(f / "checkpoints" / "step-000000016.ckpt")["progress"]["skipped"] for f in folders] == [
        2,
        2,
    ]
    assert close(losses(folders[1]), losses(folders[0])) < 1e-3


def test_the_terms_of_a_segmentation_are_the_pixels_of_its_mean():
    task, generator = segmentation(("a", "b")), torch.Generator().manual_seed(0)
    logits = torch.randn(4, 2, 5, 5, generator=generator)
    masks = torch.randint(0, 2, (4, 5, 5), generator=generator)
    masks[0, :4] = masks[1, 2:] = 255
    parts = [(task.loss(z, m, 0.0), task.terms(m)) for z, m in zip(logits.chunk(2), masks.chunk(2), strict=True)]
    together = sum(loss * terms for loss, terms in parts) / sum(terms for _, terms in parts)
    torch.testing.assert_close(together, task.loss(logits, masks, 0.0))
    assert parts[0][1] != parts[1][1]


def norms(rank, results):
    """A network's output, gradient and statistics: of half a batch in each of two processes, and of the whole here."""
    from timm.layers import BatchNormAct2d

    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), BatchNormAct2d(6, momentum=None), nn.Flatten()]
    whole = nn.Sequential(*layers, nn.LazyLinear(3), nn.BatchNorm1d(3, affine=False)).double()
    x, target = torch.randn(8, 2, 5, 5).double(), torch.randn(8, 3).double()
    whole(x)  # makes the lazy weights
    shared = synchronize_norms_(copy.deepcopy(whole), torch.device("cpu"))
    share = Processes(rank, 2).share
    for _ in range(2):
        y, y_shared = whole(x), shared(share.of(x))
        torch.testing.assert_close(y_shared, share.of(y))
        F.mse_loss(y, target).backward()
        F.mse_loss(y_shared, share.of(target)).backward()
    for (name, p), q in zip(whole.named_parameters(), shared.parameters(), strict=True):
        distributed.all_reduce(q.grad)
        torch.testing.assert_close(q.grad / 2, p.grad, msg=name)
    assert whole.state_dict().keys() == shared.state_dict().keys()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], value, msg=name)
    torch.testing.assert_close(shared.eval()(x), whole.eval()(x))


def test_norms_of_two_processes_are_those_of_the_whole_batch(server, tmp_path):
    assert finish(start(server, 2, norms, tmp_path)) == [0, 0]


def test_a_norm_that_cannot_be_shared_is_named():
    class Odd(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    with pytest.raises(UserError, match="0: Odd cannot be shared"):
        synchronize_norms_(nn.Sequential(Odd(3)), torch.device("cpu"))


def differing(rank, folder):
    distributed.init_process_group("gloo")
    Processes(rank, 3).same({"seed": 0}, "processes differ")
    try:
        Processes(rank, 3).same({"seed": 0, "digest": "b" if rank == 1 else "a"}, "processes differ")
    except UserError as error:
        (folder / f"said{rank}").write_text(str(error))
        raise


def test_a_process_with_other_data_ends_all(server, tmp_path):
    assert finish(start(server, 3, differing, tmp_path)) == [2, 2, 2]
    said = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert said == {"said1": "processes differ: digest is 'b' here, 'a' in the first process"}


def evaluation(rank, folder):
    distributed.init_process_group("gloo")
    model = network()
    model.load_state_dict(load_run(folder).state_dict)
    data = numbered()
    calls = []
    together = evaluate(model, data, batch_size=3, on_batch=lambda: calls.append(1), processes=Processes(rank, 3))
    one = evaluate(model, data, batch_size=3)
    assert len(calls) == 3, "20 samples are 7 batches, so three turns of three processes"
    assert together["accuracy"] == one["accuracy"]
    assert together["samples"] == one["samples"]
    assert abs(together["loss"] - one["loss"]) < 1e-12


def test_processes_evaluate_together_what_one_does(server, alone):
    assert finish(start(server, 3, evaluation, alone)) == [0, 0, 0]


def test_norms_of_their_own_are_the_first_processs_in_evaluation_and_in_the_weights(server, tmp_path):
    recipe = replace(EACH_STEP, sync_norms=False)
    assert finish(start(server, 2, training, tmp_path / "run", recipe)) == [0, 0]
    model, summary = network(), json.loads((tmp_path / "run" / "summary.json").read_text())
    model.load_state_dict(load_run(tmp_path / "run").state_dict)
    found = evaluate(model, numbered(), batch_size=recipe.eval_batch_size)
    assert found["accuracy"] == summary["test_accuracy"]
    assert found["loss"] == pytest.approx(summary["test_loss"], rel=1e-6)


class Staged(nn.Module):
    """Has stages to take features from."""

    def __init__(self):
        super().__init__()
        parts = list(network())
        self.stages, self.rest = nn.ModuleList([nn.Sequential(*parts[:3])]), nn.Sequential(*parts[3:])

    def forward(self, x):
        return self.rest(self.stages[0](x))


def distilling(rank, folder):
    torch.manual_seed(3)
    data, origin = numbered(), {"model": "staged", "sha256": "0"}
    known = {"num_classes": SAMPLES, "classes": [], "input_size": [1, 8, 8], "mean": [0.3], "std": [0.2]}
    teacher = TrainedNetwork(Staged().eval(), RECIPE, known, origin)
    recipe = replace(EACH_STEP, epochs=1, distill_weight=0.5, distill_features=1.0)
    train(recipe, Staged, data, folder, teacher=teacher, progress=False, accelerator="cpu")


def test_two_processes_distil_as_one_does_features_included(server, tmp_path):
    folders = [tmp_path / "1", tmp_path / "2"]
    for count, folder in enumerate(folders, 1):
        assert finish(start(server, count, distilling, folder)) == [0] * count
    assert close(losses(folders[1]), losses(folders[0])) < 1e-3


def test_r26_when_one_process_is_killed_all_end_and_the_checkpoint_is_valid(server, tmp_path, trials, capfd):
    clock, recipe = random.Random(26), replace(RECIPE, epochs=4000, checkpoint_every=2)
    for trial in range(10 if trials.full else 2):
        receive, send = server.Pipe(duplex=False)
        folder = tmp_path / str(trial)
        group = start(server, 2, training, folder, recipe, None, None, send)
        send.close()
        assert receive.poll(HANG)
        receive.recv()
        time.sleep(clock.uniform(0, 0.3))
        killed, left = group[trial % 2], group[1 - trial % 2]
        killed.kill()
        began = time.monotonic()
        codes = finish(group)
        seconds = time.monotonic() - began
        assert codes[trial % 2] == -signal.SIGKILL
        assert left.exitcode == LostProcess.exit_code
        assert "Traceback" not in capfd.readouterr().err
        saved = newest_checkpoint(folder / "checkpoints", strict=True)
        assert saved is None or saved["step"] > 0
        if trial % 2:
            assert json.loads((folder / "status.json").read_text())["state"] == "failed"
        trials.passes(seconds_to_end=seconds)


def descendants(pid):
    """Processes that a process has started, and those they have."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children") as file:
            for child in map(int, file.read().split()):
                found += [child, *descendants(child)]
    return found


def environment(pid):
    with open(f"/proc/{pid}/environ") as file:
        return dict(word.partition("=")[::2] for word in file.read().split("\0"))


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def started(folder):
    """``mgic train --devices 2`` after its first step: its words, the launcher, the run's processes by rank, and all."""
    words = ["train", "--recipe", "digits", "--model", "mgic_resnet20", "--batch_size", "64", "--epochs", "200"]
    words += ["--checkpoint_every", "1", "--accelerator", "cpu", "--threads", "1", "--out", str(folder)]
    command = [sys.executable, "-m", "mgic", *words, "--devices", "2"]
    with folder.with_suffix(".said").open("w") as said:
        launcher = subprocess.Popen(command, stdout=said, stderr=said)
    end = time.monotonic() + HANG
    while not list_checkpoints(folder / "checkpoints"):
        assert launcher.poll() is None, folder.with_suffix(".said").read_text()
        assert time.monotonic() < end
        time.sleep(0.1)
    pids = descendants(launcher.pid)
    ranks = {environment(pid).get("RANK"): pid for pid in pids if "RANK" in environment(pid)}
    assert set(ranks) == {"0", "1"}
    return words, launcher, ranks, pids


@linux
def test_r26_the_command_starts_processes_and_ends_them_all_when_one_is_killed(tmp_path, capsys):
    folder = tmp_path / "run"
    words, launcher, ranks, pids = started(folder)
    os.kill(ranks["1"], signal.SIGKILL)
    assert launcher.wait(HANG) == LostProcess.exit_code
    said = folder.with_suffix(".said").read_text()
    assert "mgic: process 1 was ended by SIGKILL; the same command continues the run\n" in said
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    saved = newest_checkpoint(folder / "checkpoints", strict=True)
    assert saved["step"] >= 1
    assert main([*words, "--epochs", "100"]) == 2
    assert "epochs is 200 there, 100 asked" in capsys.readouterr().err


@linux
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_r27_a_signal_to_the_launcher_saves_the_step_and_ends_all(tmp_path, trials, signum):
    """As a scheduler sends it: to the process it knows, not to those that train."""
    folder = tmp_path / "run"
    _, launcher, _, pids = started(folder)
    launcher.send_signal(signum)
    assert launcher.wait(HANG) == 128 + signum
    assert "Traceback" not in folder.with_suffix(".said").read_text()
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    assert json.loads((folder / "status.json").read_text())["state"] == "interrupted"
    assert newest_checkpoint(folder / "checkpoints", strict=True)["step"] >= 1
    trials.passes()


def test_a_wrong_call_with_several_processes_is_one_line(tmp_path, capsys, monkeypatch):
    words = ["train", "--recipe", "digits", "--accelerator", "cpu", "--out", str(tmp_path / "run")]
    assert main([*words, "--devices", "3"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NODE_RANK", "0")
    assert main([*words, "--devices", "2", "--num_nodes", "2"]) == 2
    assert "--num_nodes 2 needs MASTER_ADDR, MASTER_PORT in the environment" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
