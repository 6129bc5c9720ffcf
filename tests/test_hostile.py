"""What strangers' files cannot do: run code (R5), or reach outside the folder they are meant for (R6).

The attacker writes checkpoints, weights, configurations, archives and whole run folders, checksums included.
"""

import gzip
import hashlib
import json
import os
import pickle
import struct
import tarfile
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import RECIPE, stripes, tiny

import mgic
from mgic.benchmarking import Case, ExportedFile
from mgic.cli import main
from mgic.data import load_data
from mgic.data.points import read_points
from mgic.errors import UserError
from mgic.exporting import Artefact, load_artefact
from mgic.publishing import from_pretrained
from mgic.training import CorruptCheckpoint, Recipe, load_network, load_run, load_start, read_record, train
from mgic.training.checkpoint import load_checkpoint, save_checkpoint
from mgic.training.folder import RunFolder, read_recipe

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
    path.with_name(path.name + ".sha256").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")


def _write(path, payload, container):
    """Write a payload as PyTorch would, or as a bare pickle; with the checksum of an honest file."""
    if container == "zip":
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps(payload))
    _signed(path)


@pytest.mark.parametrize("container", ["zip", "pickle"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_r5_no_entry_point_executes_what_a_checkpoint_says(tmp_path, payload, container):
    sentinel, folder = tmp_path / "sentinel", tmp_path / "run"
    with RunFolder(folder, RECIPE, stripes().fingerprint()) as run:
        path = run.checkpoints / "step-000000001.ckpt"
    _write(path, _payloads(sentinel)[payload], container)
    for load in (
        lambda: load_checkpoint(path),
        lambda: load_run(folder),
        lambda: load_start(folder),
        lambda: load_network(folder, mgic.create_model),
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


def _arrays(path):
    y = np.arange(32) % 2
    x = (y[:, None, None] * 200).astype(np.uint8) * np.ones((1, 8, 8), np.uint8)
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    return path


def _verbs(place, payload, container):
    """Every verb that opens weights, with a file or a run folder that is a payload; and what it must name."""
    recipe = Recipe(model="mgic_resnet20", data=str(_arrays(place / "d.npz")), epochs=1, batch_size=16)
    run, done = place / "run", place / "done"
    for folder in (run, done):
        with RunFolder(folder, recipe, load_data(recipe.data).fingerprint()) as entered:
            entered.write_status("interrupted" if folder == run else "finished")
    _write(run / "checkpoints/step-000000001.ckpt", payload, container)
    _write(done / "model.safetensors", payload, container)
    (done / "summary.json").write_text("{}")
    file = place / "w.safetensors"
    file.write_bytes((done / file.name.replace("w", "model")).read_bytes())  # without a checksum
    picture, out = place / "p.png", f"--out={place / 'out'}"
    Image.new("RGB", (8, 8)).save(picture)
    yield "train", ["train", f"--config={run / 'recipe.yaml'}", f"--out={run}"], "step-000000001.ckpt"
    for flag, source in (("teacher", run), ("teacher", done), ("init", run), ("init", done), ("init", file)):
        yield f"train --{flag}", ["train", f"--config={run / 'recipe.yaml'}", out, f"--{flag}={source}"], "corrupt"
    for source in (run, done):
        yield "evaluate", ["evaluate", str(source)], "corrupt"
        yield "predict", ["predict", str(source), str(picture)], "corrupt"
        yield "publish", ["publish", str(source), f"--to={place / 'hub'}"], "corrupt"
        yield "export", ["export", str(source), "--to=[torch]", out], "corrupt"
        yield "convert", ["convert", str(source), out], "corrupt"
    yield "export --checkpoint", ["export", "mgic_resnet20", "--to=[torch]", out, f"--checkpoint={file}"], "corrupt"
    yield "convert --checkpoint", ["convert", "resnet20", out, f"--checkpoint={file}"], "corrupt"
    yield "bench", ["bench", "inference", str(file)], "mgic: "
    if container == "pickle":  # torch warns of it, and so does the next verb
        return
    weights = f"--model_args={{checkpoint_path: {place / 'run/checkpoints/step-000000001.ckpt'}}}"
    yield "cost of timm's", ["cost", "resnet10t", weights], "resnet10t cannot be built"


@pytest.mark.parametrize("container", ["zip", "pickle"])
def test_r5_no_verb_executes_what_weights_say(tmp_path, container, capsys, trials):
    """One line, status 2, nothing executed."""
    for payload in PAYLOADS if trials.full else ("os.system",):
        place = tmp_path / payload.replace(" ", "_")
        place.mkdir()
        for name, words, said in _verbs(place, _payloads(tmp_path / "sentinel")[payload], container):
            status = main(words)
            err = capsys.readouterr().err
            assert (status, err.count("\n"), said in err) == (2, 1, True), (name, status, err)
            assert not (tmp_path / "sentinel").exists(), name
            trials.passes()


def _described(file):
    """Describe a file as `mgic.export` would."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    known = Artefact(
        "torch", file.name, "m", "w", (3, 8, 8), (1, None), None, 1, 1, 0.0, None, {}, {file.name: digest}, 1
    )
    file.with_name(f"{file.name}.json").write_text(json.dumps(asdict(known)))


def test_r5_no_runtime_executes_what_an_exported_file_says(tmp_path, trials):
    """As ``mgic bench`` opens them, with a description of the attacker's."""
    for payload in PAYLOADS if trials.full else ("os.system",):
        for container in ("zip", "pickle"):
            for suffix in (".pt2", ".onnx", ".xml", ".pte") if trials.full else (".pt2",):
                file = tmp_path / f"net{suffix}"
                _write(file, _payloads(tmp_path / "sentinel")[payload], container)
                _described(file)
                with pytest.raises(UserError, match=file.name):
                    load_artefact(file)
                one = ExportedFile.open(str(file))
                with pytest.raises(UserError, match=file.name):
                    one.prepare(Case(one, "torch"))[0]()
                assert not (tmp_path / "sentinel").exists()
                trials.passes(2)


@pytest.mark.parametrize("config", [
    {"library": "mgic", "schema": 1, "architecture": "mgic_resnet20", "model_args": {}},
    {"architecture": "mgic_resnet20", "num_classes": 10, "pretrained_cfg": {"input_size": [3, 32, 32]}},
])  # fmt: skip
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_r5_no_published_folder_executes_what_its_weights_say(tmp_path, config, name, trials):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for payload in PAYLOADS if trials.full else ("os.system",):
        for container in ("zip", "pickle"):
            _write(tmp_path / name, _payloads(tmp_path / "sentinel")[payload], container)
            with pytest.raises(UserError, match=r"model\.safetensors"):
                from_pretrained(tmp_path)
            assert not (tmp_path / "sentinel").exists()
            trials.passes()


def _cifar(root, payload):
    (root / "cifar-10-batches-py").mkdir()
    for name in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (root / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(payload))
    return lambda: load_data("cifar10", root)


def _fashion(root, payload):
    """torchvision reads ``processed/training.pt`` of an old version, if it is there."""
    for name in ("raw", "processed"):
        (root / "FashionMNIST" / name).mkdir(parents=True)
    for name in (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ):
        (root / "FashionMNIST/raw" / name).write_bytes(pickle.dumps(payload))
    for name in ("training.pt", "test.pt"):
        torch.save(payload, root / "FashionMNIST/processed" / name)
    return lambda: load_data("fashion_mnist", root)


def _masks(root, payload):
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (root / part / kind).mkdir(parents=True)
            (root / part / kind / "a.png").write_bytes(pickle.dumps(payload))
    return lambda: load_data(f"masks:{root}", classes=2)


def _pictures(root, payload):
    for part in ("train", "val"):
        (root / part / "cat").mkdir(parents=True)
        (root / part / "cat/a.png").write_bytes(pickle.dumps(payload))
    return lambda: next(load_data(str(root)).test.evaluation_batches(1, 0))


def _meshes(root, payload):
    for part in ("train", "test"):
        (root / "cup" / part).mkdir(parents=True)
        (root / "cup" / part / "a.off").write_bytes(pickle.dumps(payload))
    return lambda: load_data(f"modelnet:{root}")


def _generated(root, payload):
    _meshes(root / "solids-v1-1-1", payload)
    return lambda: load_data("solids", root, train=1, test=1)


def _hdf5(root, payload):
    for part in ("train", "test"):
        (root / f"ply_data_{part}0.h5").write_bytes(pickle.dumps(payload))
    return lambda: load_data(f"modelnet:{root}")


def _cloud(root, payload):
    evil = np.empty(3, dtype=object)
    evil[:] = [payload] * 3
    np.save(root / "a.npy", evil)
    return lambda: read_points(root / "a.npy")


@pytest.mark.parametrize("make", [_cifar, _fashion, _masks, _pictures, _meshes, _generated, _hdf5, _cloud])
def test_r5_no_data_set_executes_what_its_files_say(tmp_path, make, trials):
    for payload in PAYLOADS if trials.full else ("os.system", "subprocess"):
        (tmp_path / payload).mkdir()
        read = make(tmp_path / payload, _payloads(tmp_path / "sentinel")[payload])
        with pytest.raises(UserError):
            read()
        assert not (tmp_path / "sentinel").exists()
        trials.passes()


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
    assert main(["train", f"--config={tmp_path / 'recipe.yaml'}", f"--out={tmp_path / 'out'}"]) == 2
    assert main(["cost", "resnet20", f"--model_args=!!python/{tag} [\"touch '{sentinel}'\"]"]) == 2
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


# R6: names and configurations that point elsewhere. Everything is tried in one place whose files must not change.


def _tree(place):
    """Every file of a folder with its contents, every link with its target."""
    return {
        str(p.relative_to(place)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in sorted(place.rglob("*"))
    }


def _run(place):
    """A run folder of a stranger, without weights."""
    recipe = Recipe(model="mgic_resnet20", data=str(place / "d.npz"), epochs=1, batch_size=16)
    with RunFolder(place / "run", recipe, load_data(recipe.data).fingerprint()):
        pass
    return place / "run"


def _edited(file, **changes):
    """The file with other values: YAML where JSON is asked for is fine, too."""
    import yaml

    file.write_text(json.dumps(yaml.safe_load(file.read_text()) | changes))
    return file


def _train(place, **changes):
    words = {"model": "mgic_resnet20", "data": place / "d.npz", "epochs": 1, "out": place / "new"} | changes
    return lambda: main(["train", *(f"--{key}={value}" for key, value in words.items())])


def _config(place, text):
    (place / "c.yaml").write_text(text)
    return lambda: main(["train", f"--config={place / 'c.yaml'}", f"--out={place / 'new'}"])


def _evaluate(place, **changes):
    run = _run(place)
    _edited(run / "recipe.yaml", **changes)
    return lambda: main(["evaluate", str(run), f"--data={place / 'd.npz'}"])


def _linked(place, name, target):
    """A run folder in which one of its own parts is a link to somewhere else."""
    run = _run(place)
    (run / name).rmdir() if (run / name).is_dir() else (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(place / target)
    return lambda: main(["train", f"--config={run / 'recipe.yaml'}", f"--out={run}"])


def _conversion(place, layer=None, **changes):
    report = {"schema": 1, "model": "resnet20", "rows": [layer] if layer else [], "notes": [], "budget": {}}
    cost = {"params": 1, "macs": 1, "input_size": [3, 8, 8]}
    known = {"schema": 1, "source": "resnet20", "arguments": {}, "report": {**report, "before": cost, "after": cost}}
    (place / "converted").mkdir()
    (place / "converted/conversion.json").write_text(json.dumps(known | changes))
    return lambda: main(["export", str(place / "converted"), "--to=[torch]", f"--out={place / 'new'}"])


def _layer(**changes):
    row = {"name": "stages.0", "kind": "", "action": "convolution", "reason": "", "params": 0, "params_after": 0}
    return {**row, "macs": 0, "macs_after": 0, "group_size": 2, "coarsest": 4, "widths": [16], "pooled": []} | changes


def _published(place, **changes):
    config = {"library": "mgic", "schema": 1, "architecture": "mgic_resnet20", "model_args": {}} | changes
    (place / "hub").mkdir()
    (place / "hub/config.json").write_text(json.dumps(config))
    (place / "hub/model.safetensors").write_bytes(b"")
    return lambda: from_pretrained(place / "hub")


def _slipping_pt2(place):
    with zipfile.ZipFile(place / "net.pt2", "w") as archive:
        archive.writestr("../../slipped", b"x")
    return lambda: load_artefact(place / "net.pt2")


def _slipping_npz(place):
    with zipfile.ZipFile(place / "evil.npz", "w") as archive:
        archive.writestr("../../slipped.npy", b"x")
    return _train(place, data=place / "evil.npz")


def _slipping_tar(place):
    (place / "root").mkdir()
    with tarfile.open(place / "root/cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(place / "d.npz", arcname="../../slipped")
    return lambda: main(["train", "--data=cifar10", f"--root={place / 'root'}", f"--out={place / 'new'}"])


def _slipping_gz(place):
    (place / "root/FashionMNIST/raw").mkdir(parents=True)
    for kind in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        with gzip.open(place / f"root/FashionMNIST/raw/{kind}-ubyte.gz", "wb") as file:
            file.write(struct.pack(">ii", 2049, 2**30))
    return lambda: main(["train", "--data=fashion_mnist", f"--root={place / 'root'}", f"--out={place / 'new'}"])


def _record(place):
    (place / "results").mkdir()
    (place / "results/a.json").write_text('{"schema": 1, "command": "../../x"}')
    return lambda: read_record(place / "results/a.json")


def _description(place):
    file = place / "net.onnx"
    file.write_bytes(b"x")
    _described(file)
    _edited(file.with_name("net.onnx.json"), sha256={"../../../etc/passwd": "0"})
    return lambda: load_artefact(file)


def _linked_out(place):
    (place / "link").symlink_to(place / "home")
    return _train(place, out=place / "link")


CRAFTED = {
    "model is a path": lambda p: _train(p, model="../../x"),
    "model is a local folder": lambda p: _train(p, model=f"local-dir:{p}"),
    "model is on the hub": lambda p: _train(p, model="hf-hub:nobody/nothing"),
    "torchvision's model is a path": lambda p: _train(p, model="torchvision:../../x"),
    "data is a path": lambda p: _train(p, data="../../x"),
    "data of an unknown kind": lambda p: _train(p, data="os:../../x"),
    "data_args with a root": lambda p: _train(p, data_args="{root: ../../x}"),
    "recipe with an unknown key": lambda p: _config(p, "out: ../../x\n"),
    "recipe with a class path": lambda p: _config(p, "model: {class_path: os.system, init_args: {command: x}}\n"),
    "recipe with text for a number": lambda p: _config(p, "epochs: __import__('os').getpid()\n"),
    "recipe of a run with another model": lambda p: _evaluate(p, model="../../x"),
    "recipe of a run with an unknown key": lambda p: _evaluate(p, checkpoints="../../x"),
    "recipe of a run with a number for arguments": lambda p: _evaluate(p, model_args=7),
    "--out is a link to somebody's files": _linked_out,
    "run.lock is a link": lambda p: _linked(p, "run.lock", "home/diary"),
    "checkpoints is a link": lambda p: _linked(p, "checkpoints", "home"),
    "tensorboard is a link": lambda p: _linked(p, "tensorboard", "home"),
    "conversion of a path": lambda p: _conversion(p, source="../../x"),
    "conversion with arguments that read files": lambda p: _conversion(p, arguments={"checkpoint_path": "../../x"}),
    "conversion of a layer that is a path": lambda p: _conversion(p, _layer(name="../../x")),
    "conversion of an attribute": lambda p: _conversion(p, _layer(name="__class__")),
    "conversion by another action": lambda p: _conversion(p, _layer(action="os.system")),
    "published architecture is a path": lambda p: _published(p, architecture="../../x"),
    "published architecture is a folder": lambda p: _published(p, architecture=f"local-dir:{p}"),
    "published arguments read files": lambda p: _published(p, architecture="resnet10t", model_args={"checkpoint_path": "x"}),
    "published arguments fetch weights": lambda p: _published(p, architecture="resnet10t", model_args={"pretrained": True}),
    "timm's configuration is of a path": lambda p: _published(p, library="timm", architecture="../../x"),
    "timm's configuration names a file": lambda p: _published(
        p, library="timm", architecture="resnet10t", pretrained_cfg={"file": "../../x", "custom_load": True}
    ),
    "archive of a network": _slipping_pt2,
    "archive of arrays": _slipping_npz,
    "archive of CIFAR-10": _slipping_tar,
    "archive of FashionMNIST": _slipping_gz,
    "record": _record,
    "description of an exported file": _description,
}  # fmt: skip


@pytest.mark.parametrize("name", CRAFTED)
def test_r6_hostile_names_and_configurations_are_refused_and_nothing_is_written(name, tmp_path, monkeypatch, capsys):
    """Status 2, one line; not a file made, changed or removed beside the probes that are gone again."""
    place = tmp_path / "a/b"
    (place / "home").mkdir(parents=True)
    (place / "home/diary").write_text("mine")
    (place / "home/.tmp-mine").write_text("mine")
    _arrays(place / "d.npz")
    for variable in ("HOME", "XDG_CACHE_HOME", "TMPDIR", "HF_HOME", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(place / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(place)
    call = CRAFTED[name](place)
    before = _tree(tmp_path)
    try:
        status, said = call(), capsys.readouterr().err.removesuffix("\n")
    except UserError as error:
        status, said = 2, str(error)
    assert (status, len(said.splitlines())) == (2, 1), said
    after = _tree(tmp_path)
    if after.get("a/b/new", "") is None:  # the empty folder that a check made
        del after["a/b/new"]
    assert after == before
