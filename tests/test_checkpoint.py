"""Atomic files and verified checkpoints: every damage is noticed, every refusal names the file."""

import errno
import hashlib
import random
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import RECIPE, stripes, tiny
from torch import nn

import mgic
from mgic.errors import UserError
from mgic.training import CorruptCheckpoint, DiskFull, Recipe, load_run, train
from mgic.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from mgic.training.files import write_atomically, write_text
from mgic.training.folder import RunFolder
from mgic.training.weights import fit_weights, load_start, load_weights, save_weights, start_from


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "step-000000001.ckpt"
    save_checkpoint(path, {"schema": 1, "step": 1, "model": {"w": torch.randn(500)}, "history": [{"loss": 0.5}]})
    return path


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    state = {
        "schema": 1,
        "step": 3,
        "model": {"w": torch.randn(4, 5), "n": torch.tensor(7)},
        "rows": [{"a": 0.1}],
        "s": "é",
    }
    save_checkpoint(tmp_path / "c.ckpt", state)
    back = load_checkpoint(tmp_path / "c.ckpt")
    assert torch.equal(back["model"].pop("w"), state["model"].pop("w"))
    assert back == state


@pytest.mark.skipif(sys.platform == "win32", reason="sha256sum")
def test_sidecars_are_what_sha256sum_checks(checkpoint):
    done = subprocess.run(["sha256sum", "-c", checkpoint.name + ".sha256"], cwd=checkpoint.parent, capture_output=True)
    assert done.returncode == 0


@pytest.mark.parametrize("percent", [0, 1, 10, 50, 90, 99, 99.99])
def test_r4_every_truncation_is_detected(checkpoint, percent):
    whole = checkpoint.read_bytes()
    cut = whole[: min(int(len(whole) * percent / 100), len(whole) - 1)]
    checkpoint.write_bytes(cut)
    with pytest.raises(
        CorruptCheckpoint, match=f"step-000000001.ckpt: corrupt checkpoint of {len(cut):,} bytes"
    ) as error:
        load_checkpoint(checkpoint)
    assert (error.value.path, error.value.size) == (checkpoint, len(cut))


def test_r4_every_flipped_byte_is_detected(checkpoint, trials):
    whole, dice = checkpoint.read_bytes(), random.Random(4)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[dice.randrange(len(whole))] ^= dice.randrange(1, 256)
        checkpoint.write_bytes(damaged)
        with pytest.raises(CorruptCheckpoint, match="expected sha256"):
            load_checkpoint(checkpoint)
        trials.passes()


@pytest.mark.parametrize("sidecar", [None, b"", b"x", b"\xff\xfe", b"0" * 64 + b"  other.ckpt\n", b"0" * 64])
def test_r4_a_missing_or_damaged_sidecar_is_detected(checkpoint, sidecar):
    file = checkpoint.with_name(checkpoint.name + ".sha256")
    file.unlink() if sidecar is None else file.write_bytes(sidecar)
    with pytest.raises(CorruptCheckpoint):
        load_checkpoint(checkpoint)


def _signed(path):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n")


def test_r4_hostile_headers_with_a_right_checksum_end_in_one_error_quickly_and_in_little_memory(checkpoint, trials):
    """The attacker can compute SHA-256 too. Any bytes in the first or last 400 load or raise CorruptCheckpoint."""
    honest = checkpoint.read_bytes()

    @settings(max_examples=1000 if trials.full else 200, deadline=None, database=None)
    @given(data=st.data())
    def fuzz(data):
        damaged = bytearray(honest)
        for _ in range(data.draw(st.integers(1, 8))):
            where = data.draw(st.integers(0, 399)) * data.draw(st.sampled_from((1, -1)))
            damaged[where] = data.draw(st.integers(0, 255))
        checkpoint.write_bytes(damaged)
        _signed(checkpoint)
        began, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            load_checkpoint(checkpoint)
        except CorruptCheckpoint:
            pass
        except UserError as error:
            assert "schema" in str(error)  # noqa: PT017 - most cases load
        took = time.monotonic() - began
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
        assert took < 10, "a hang guard"
        assert more < 200
        trials.passes(seconds=took, more_mib=more)

    fuzz()


@pytest.mark.parametrize("contents", [[1, 2], {"step": 1}, {"schema": "1"}, torch.zeros(2)])
def test_r4_other_contents_are_no_checkpoint(tmp_path, contents):
    path = tmp_path / "c.ckpt"
    torch.save(contents, path)
    _signed(path)
    with pytest.raises(CorruptCheckpoint, match="a mapping with a schema version"):
        load_checkpoint(path)


def test_a_checkpoint_of_another_schema_says_so(tmp_path):
    save_checkpoint(tmp_path / "c.ckpt", {"schema": 99})
    with pytest.raises(UserError, match="schema 99; this version of mgic reads schema 1"):
        load_checkpoint(tmp_path / "c.ckpt")


def _three_saved(path):
    with RunFolder(path, RECIPE, {}) as run:
        for step in (1, 2, 3):
            run.save(step, {"model": {"w": torch.full((3,), float(step))}})
        return run.checkpoints


def test_r4_the_newest_valid_checkpoint_is_found_with_a_warning_and_strict_stops(tmp_path):
    folder = _three_saved(tmp_path / "run")
    (folder / "step-000000003.ckpt").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"step-000000003\.ckpt: corrupt checkpoint.*continuing from step-000000002"):
        assert newest_checkpoint(folder)["step"] == 2
    with pytest.raises(CorruptCheckpoint, match="step-000000003"):
        newest_checkpoint(folder, strict=True)
    for step in (1, 2):
        (folder / f"step-00000000{step}.ckpt").write_bytes(b"")
    with pytest.raises(CorruptCheckpoint, match="step-000000003"):
        newest_checkpoint(folder)


def test_r4_training_falls_back_over_a_corrupt_checkpoint_and_ends_the_same(tmp_path):
    whole = train(RECIPE, tiny, stripes(), tmp_path / "whole")

    class Stop(Exception):  # noqa: N818
        pass

    def stop(step):
        if step == 15:
            raise Stop

    with pytest.raises(Stop):
        train(RECIPE, tiny, stripes(), tmp_path / "run", on_step=stop)
    newest = max((tmp_path / "run/checkpoints").glob("*.ckpt"))
    assert newest.name == "step-000000015.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpoint, match="step-000000015"):
        train(RECIPE, tiny, stripes(), tmp_path / "run", strict_resume=True)
    with pytest.warns(UserWarning, match="continuing from step-000000012"):
        resumed = train(RECIPE, tiny, stripes(), tmp_path / "run")
    assert resumed.resumed_from == 12
    assert resumed.metrics == whole.metrics


def test_only_the_last_checkpoints_are_kept_with_their_sidecars(tmp_path):
    with RunFolder(tmp_path / "run", replace(RECIPE, keep_checkpoints=2), {}) as run:
        for step in (1, 5, 10, 100):
            run.save(step, {})
        names = sorted(p.name for p in run.checkpoints.iterdir())
    assert names == [f"step-{s:09d}.ckpt{end}" for s in (10, 100) for end in ("", ".sha256")]


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(file):
        file.write(b"new")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_r7_too_little_space_is_one_message_with_both_numbers_and_the_old_checkpoint_stays(tmp_path, monkeypatch):
    folder = _three_saved(tmp_path / "run")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(DiskFull, match=r"disk full: 1,265,5\d\d bytes needed and 1,000,000 free") as error:
        save_checkpoint(folder / "step-000000004.ckpt", {"schema": 1, "w": torch.zeros(250_000)})
    assert error.value.errno == errno.ENOSPC
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small file system")
def test_r7_a_disk_that_fills_up_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode != 0:
        pytest.skip("mounting needs privileges")
    try:
        save_checkpoint(folder / "a.ckpt", {"schema": 1, "w": torch.zeros(50_000)})
        with pytest.raises(DiskFull, match=r"bytes needed and .* free"):
            save_checkpoint(folder / "b.ckpt", {"schema": 1, "w": torch.zeros(500_000)})
        usage = shutil.disk_usage(folder)  # and when somebody else takes the room after we looked:
        answers = iter([usage._replace(free=10**9)])
        monkeypatch.setattr(shutil, "disk_usage", lambda path: next(answers, usage))
        with pytest.raises(DiskFull, match=r"bytes needed and .* free"):
            save_checkpoint(folder / "b.ckpt", {"schema": 1, "w": torch.zeros(500_000)})
        monkeypatch.undo()
        assert load_checkpoint(folder / "a.ckpt")["w"].shape == (50_000,)
        assert sorted(p.name for p in folder.iterdir()) == ["a.ckpt", "a.ckpt.sha256"]
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class _Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight


def test_r34_shared_weights_are_stored_once_and_come_back_under_all_names(tmp_path):
    model = _Shared()
    save_weights(tmp_path / "w.safetensors", model)
    state = load_weights(tmp_path / "w.safetensors")
    assert state.keys() == model.state_dict().keys()
    assert state["first.weight"].data_ptr() == state["second.weight"].data_ptr()
    fresh = _Shared()
    fresh.load_state_dict(state)
    assert all(torch.equal(fresh.state_dict()[k], v) for k, v in model.state_dict().items())
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o077 == (
        tmp_path / "w.safetensors.sha256"
    ).stat().st_mode & 0o077


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_r4_damaged_final_weights_are_detected(tmp_path, damage):
    file = tmp_path / "w.safetensors"
    save_weights(file, tiny())
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CorruptCheckpoint, match=r"w\.safetensors"):
        load_weights(file)
    file.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    _signed(file)
    with pytest.raises(CorruptCheckpoint, match="safetensors"):
        load_weights(file)


# The folder of a run


def test_a_folder_with_other_files_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with (
        pytest.raises(UserError, match=r"not empty and not a run \(it holds thesis.tex\)"),
        RunFolder(tmp_path, RECIPE, {}),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_path_that_cannot_be_a_folder_is_one_error_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot be written"), RunFolder(path, RECIPE, {}):
            pass


def test_another_configuration_is_refused_with_both_values_but_execution_may_change(tmp_path):
    with RunFolder(tmp_path / "run", RECIPE, {}):
        pass
    other = replace(RECIPE, lr=0.3, seed=5)
    message = r"lr is 0.1 there, 0.3 asked; seed is 0 there, 5 asked"
    with pytest.raises(UserError, match=message), RunFolder(tmp_path / "run", other, {}):
        pass
    with RunFolder(tmp_path / "run", replace(RECIPE, workers=3, checkpoint_every=1, keep_checkpoints=9), {}):
        pass


def test_other_data_and_finished_runs_are_refused(tmp_path):
    train(RECIPE, tiny, stripes(), tmp_path / "run")
    with pytest.raises(UserError, match="holds a finished run; choose a new folder"):
        train(RECIPE, tiny, stripes(), tmp_path / "run")
    with pytest.raises(UserError, match=r"used other data .train: 67 there, 59 now"):
        train(RECIPE, tiny, stripes(train=59), tmp_path / "run")


def test_a_folder_in_use_by_this_process_is_refused(tmp_path):
    with (
        RunFolder(tmp_path / "run", RECIPE, {}),
        pytest.raises(UserError, match="already in use by this process"),
        RunFolder(tmp_path / "run", RECIPE, {}),
    ):
        pass
    with RunFolder(tmp_path / "run", RECIPE, {}):
        pass


def test_stale_temporary_files_and_lone_sidecars_are_swept_at_start(tmp_path):
    folder = _three_saved(tmp_path / "run")
    for stale in (folder / ".tmp-9-x", folder.parent / ".tmpAbC123", folder / "step-000000009.ckpt.sha256"):
        stale.write_text("")
    with RunFolder(tmp_path / "run", RECIPE, {}):
        left = [p.name for p in folder.parent.rglob("*") if p.name.startswith(".tmp") or "000009" in p.name]
    assert left == []


def test_load_run_gives_final_weights_else_those_of_the_newest_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"not a run folder: recipe.yaml cannot be read"):
        load_run(tmp_path)
    with RunFolder(tmp_path / "run", RECIPE, {}) as run:
        with pytest.raises(UserError, match="has saved no weights yet"):
            load_run(tmp_path / "run")
        run.save(1, {"model": {"w": torch.zeros(1)}, "average": {"w": torch.ones(1)}})
        run.save(2, {"model": {"w": torch.zeros(1)}, "average": {"w": torch.full((1,), 2.0)}})
    recipe, state = load_run(tmp_path / "run")
    assert recipe == RECIPE
    assert state == {"w": torch.full((1,), 2.0)}
    save_weights(tmp_path / "run/model.safetensors", model := tiny())
    state = load_run(tmp_path / "run").state_dict
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_a_run_folder_keeps_its_recipe_readable(tmp_path):
    with RunFolder(tmp_path / "run", RECIPE, {}):
        assert Recipe.from_yaml((tmp_path / "run/recipe.yaml").read_text()) == RECIPE


# Weights of another configuration

EDITS = {
    "group_size": ("mgic_resnet20", {"depth": 8, "group_size": 4}, r"the groups are others \(group_size\)"),
    "coarsest": ("mgic_resnet20", {"depth": 8, "coarsest": 4}, r"another number of levels \(coarsest\)"),
    "width": ("mgic_resnet20", {"depth": 8, "width": 2.0}, r"the widths are others \(width, channels\)"),
    "num_classes": ("mgic_resnet20", {"depth": 8, "num_classes": 7}, r"num_classes=7 would fit"),
    "in_chans": ("mgic_resnet20", {"depth": 8, "in_chans": 1}, r"in_chans=1 would fit"),
    "depth": ("mgic_resnet20", {"depth": 14}, r"other layers are there \(depth, repeats"),
    "channels": ("mgiad18", {"channels": (8, 8, 16, 16), "coarsest": 8}, r"the widths are others \(width, channels\)"),
    "coarsest of MGiaD": ("mgiad18", {"channels": (8, 16, 16, 16), "coarsest": 4}, r"number of levels \(coarsest\)"),
    "group_size of MGiaD": (
        "mgiad18",
        {"channels": (8, 16, 16, 16), "coarsest": 8, "group_size": 2},
        r"the groups are others \(group_size\)",
    ),
    "classes of pixels": (
        "mgic_unet",
        {"width": 8, "depth": 1, "num_classes": 3, "group_size": 2, "coarsest": 4},
        r"num_classes=3 would fit",
    ),
    "another network": ("function_net", {"c_max": 32}, r"another network|the widths are others"),
}
FITTING = {
    "mgic_resnet20": {"depth": 8, "group_size": 8, "coarsest": 16},
    "mgiad18": {"channels": (8, 16, 16, 16), "coarsest": 8, "group_size": 4},
    "mgic_unet": {"width": 8, "depth": 1, "group_size": 2, "coarsest": 4},
    "function_net": {"c_max": 64},
}


@pytest.mark.parametrize("edit", EDITS)
def test_r13_weights_of_another_configuration_are_refused_with_shapes_and_the_argument_that_explains_them(edit):
    """One argument is another: at most ten tensors with both shapes, then the argument. Nothing is loaded."""
    name, arguments, words = EDITS[edit]
    model = mgic.create_model(name, **FITTING[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights = mgic.create_model(name, **{**FITTING[name], **arguments}).state_dict()
    with pytest.raises(UserError, match=words) as error:
        fit_weights(model, weights, "the weights do not fit")
    said = str(error.value)
    assert 1 <= said.count(" there, ") <= 10
    assert all(
        " is (" in part or " is missing" in part for part in said.split(": ", 1)[1].split("; ")[:10] if "there" in part
    )
    assert "\n" not in said
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_r13_a_classifier_of_another_number_of_classes_is_left_out_when_asked(tmp_path):
    there = mgic.create_model("resnet20", depth=8, num_classes=7)
    save_weights(tmp_path / "w.safetensors", there)
    model = mgic.create_model("resnet20", depth=8, num_classes=10)
    with pytest.raises(
        UserError, match=r"in the classifier alone \(--new_head starts it afresh\).*num_classes=7 would fit"
    ):
        start_from(model, load_start(tmp_path / "w.safetensors"))
    head = model.head.fc.weight.clone()
    start_from(model, load_start(tmp_path / "w.safetensors", new_head=True))
    assert torch.equal(model.head.fc.weight, head)
    assert torch.equal(model.stem.conv.weight, there.stem.conv.weight)
