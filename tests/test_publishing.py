"""A published folder gives back the run's outputs bit for bit, in a process that knows nothing of the run."""

import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tiny import RECIPE, stripes
from torch.utils._pytree import tree_leaves

import mgic
from mgic import publishing
from mgic.cli import main
from mgic.data import LICENCES, LOADERS, SOURCES, licence, load_data
from mgic.errors import UserError
from mgic.publishing import from_pretrained, publish, push
from mgic.training import RECIPES, CorruptCheckpoint, Recipe, load_network, load_start, train
from mgic.training.files import sha256
from mgic.training.weights import save_weights

FRESH = """
import sys, torch, timm, mgic.models
x = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    y = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()(x)
torch.save(y, sys.argv[3])
"""


def trained(folder, recipe, data):
    arguments = {**data.model_arguments(), **recipe.model_args}
    train(recipe, lambda: mgic.create_model(recipe.model, **arguments), data, folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """MGiaD, whose steps of one level share their modules, with averaged weights and arguments of its own."""
    recipe = replace(RECIPE, data="digits", model="mgiad20", model_args={"coarsest": 16, "pre": 2}, epochs=1)
    return trained(tmp_path_factory.mktemp("runs") / "mgiad", recipe, stripes())


def test_timm_loads_a_classifier_bit_for_bit_in_a_fresh_process(classifier, tmp_path):
    publish(classifier, tmp_path / "hub")
    network = load_network(classifier, mgic.create_model)
    x = torch.randn(3, 1, 8, 8)
    torch.save(x, tmp_path / "x.pt")
    code = ["-W", "error::UserWarning", "-c", FRESH, tmp_path / "hub", tmp_path / "x.pt", tmp_path / "y.pt"]
    subprocess.run([sys.executable, *map(str, code)], check=True)
    with torch.no_grad():
        expected = network.model(x)
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), expected)
    assert torch.equal(from_pretrained(tmp_path / "hub")(x), expected)
    start = load_start(tmp_path / "hub/model.safetensors").state_dict
    assert all(torch.equal(start[k], v) for k, v in network.model.state_dict().items())


def test_a_converted_network_comes_back_bit_for_bit(tmp_path):
    """timm cannot build it: it knows nothing of conversions."""
    arguments = {"width": 0.5, "conversion": {"group_size": 2, "coarsest": 4}}
    recipe = replace(RECIPE, data="digits", model="resnet20", model_args=arguments, epochs=1)
    run = trained(tmp_path / "run", recipe, stripes())
    publish(run, tmp_path / "hub")
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        expected = load_network(run, mgic.create_model).model(x)
        assert torch.equal(from_pretrained(tmp_path / "hub")(x), expected)
    assert "library_name: mgic" in (tmp_path / "hub/README.md").read_text()


def test_r34_weights_with_two_names_are_written_under_both(classifier, tmp_path):
    """safetensors refuses tensors that share memory, and timm wants every name when it loads."""
    model = mgic.create_model("resnet20", num_classes=3, in_chans=1).eval()
    model.stages[0][1] = model.stages[0][2]
    network = load_network(classifier, mgic.create_model)
    network = network._replace(model=model, recipe=replace(network.recipe, model="resnet20", model_args={}))
    publishing._write_timms(network, tmp_path, None)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path)(x), model(x))
    assert model.stages[0][1].conv1.weight is model.stages[0][2].conv1.weight


def test_timm_learns_how_to_prepare_images(classifier, tmp_path):
    from timm.data import resolve_model_data_config

    publish(classifier, tmp_path / "hub", license="cc-by-4.0")
    model = from_pretrained(tmp_path / "hub")
    found = resolve_model_data_config(model)
    assert (found["input_size"], found["mean"], found["std"]) == ((1, 8, 8), [0.3], [0.2])
    assert (found["crop_pct"], model.pretrained_cfg["license"]) == (1.0, "cc-by-4.0")
    network = load_network(classifier, mgic.create_model)
    assert not network.data["cropped"]
    cropped = network._replace(data={**network.data, "cropped": True})
    publishing._write_timms(cropped, tmp_path, None)
    assert resolve_model_data_config(from_pretrained(tmp_path))["crop_pct"] == 0.875


OTHERS = {
    "mgic_unet": ("masks", {"group_size": 4, "coarsest": 8}),
    "mgic_function_net": ("cos_sin", {"c_max": 32}),
    "mgic_diffgcn": ("clouds", {"group_size": 8, "coarsest": 16, "width": 0.5}),
}


def _data(kind):
    """Small data of each task; what publishing looks at is the task and the size."""
    from mgic.data import Images, segmentation
    from mgic.data.points import PointClouds

    if kind == "cos_sin":
        return load_data("cos_sin", points=400)
    images = stripes().train.images[:16]
    if kind == "masks":
        masks = Images(images.repeat(1, 3, 4, 4), (images[:, 0].repeat(1, 4, 4) > 100).long())
        task = segmentation(["dark", "bright"])
        return replace(stripes(), train=masks, test=masks, task=task, input_size=(3, 32, 32), mean=(), std=())
    clouds = PointClouds(torch.rand(16, 64, 3), torch.arange(16) % 3, points=32)
    return replace(stripes(), train=clouds, test=clouds, input_size=(3, 32), mean=(), std=())


@pytest.mark.parametrize("name", OTHERS)
def test_networks_timm_has_no_place_for_come_back_bit_for_bit(name, tmp_path):
    kind, arguments = OTHERS[name]
    data = _data(kind)
    recipe = replace(RECIPE, model=name, model_args=arguments, epochs=1, crop_padding=0, flip=False)
    run = trained(tmp_path / "run", recipe, data)
    publish(run, tmp_path / "hub")
    x = torch.randn(2, *data.input_size)
    with torch.no_grad():
        pairs = [
            tree_leaves(net(x))
            for net in (load_network(run, mgic.create_model).model, from_pretrained(tmp_path / "hub"))
        ]
    assert all(map(torch.equal, *pairs))
    config = json.loads((tmp_path / "hub/config.json").read_text())
    assert (config["architecture"], config["task"]) == (name, data.task.name)
    assert 'from_pretrained("FOLDER")' in (tmp_path / "hub/README.md").read_text()


def test_the_card_states_what_the_run_noted_and_what_nobody_tested(classifier, tmp_path):
    publish(classifier, tmp_path / "hub", license="mit")
    card, summary = ModelCard.load(tmp_path / "hub/README.md"), json.loads((classifier / "summary.json").read_text())
    assert (card.data.library_name, card.data.license, card.data.pipeline_tag) == (
        "timm",
        "mit",
        "image-classification",
    )
    assert card.data.eval_results[0].metric_value == summary["test_accuracy"]
    counted = mgic.cost(load_network(classifier, mgic.create_model).model, (1, 8, 8))
    for said in (
        f"| accuracy | {summary['train_accuracy']:.4g} | {summary['test_accuracy']:.4g} |",
        f"| loss | {summary['train_loss']:.4g} | {summary['test_loss']:.4g} |",
        f"{counted.params:,} parameters and {counted.macs:,} multiply-adds for one input of (1, 8, 8)",
        "Seed 0, 1 epochs, 8 steps (0 skipped)",
        "made up.\n",  # the note of the data
        f"Licence of the data: {LICENCES['digits']}.",
        "mgic train --config recipe.yaml --out RUN\n",
        f"torch {summary['origin']['versions']['torch']}",
        f"Commit of mgic: {summary['origin']['commit']['id']}",
        f"`{sha256(tmp_path / 'hub/model.safetensors')}`",
        "It was tested on the test samples of stripes alone",
    ):
        assert said in card.text, said
    assert (
        Recipe.from_yaml((tmp_path / "hub/recipe.yaml").read_text())
        == load_network(classifier, mgic.create_model).recipe
    )


def test_every_data_set_has_a_word_on_its_licence():
    assert LICENCES.keys() == LOADERS.keys() == SOURCES.keys()
    assert licence("modelnet:some/folder") == LICENCES["modelnet"]
    for place in ("a/b.npz", "a/folder"):
        assert licence(place).startswith("unknown: ask")
    assert all(licence(recipe.data) for recipe in RECIPES.values())


def test_what_gives_other_outputs_is_not_published(classifier, tmp_path, monkeypatch):
    """The weights are damaged on their way: the comparison notices, and no folder is left."""
    write = publishing.save_for_hf

    def damaged(model, *args, **kwargs):
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)
        write(model, *args, **kwargs)

    monkeypatch.setattr(publishing, "save_for_hf", damaged)
    with pytest.raises(UserError, match="mgiad20: loaded again, it gives other outputs; nothing was published"):
        publish(classifier, tmp_path / "hub")
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    foreign = {"library": "mgic", "schema": 2, "architecture": "function_net", "model_args": {}}
    (tmp_path / "config.json").write_text(json.dumps(foreign))
    with pytest.raises(UserError, match=r"half a published network: model\.safetensors is missing"):
        from_pretrained(tmp_path)
    save_weights(tmp_path / "model.safetensors", mgic.create_model("function_net", c_max=32))
    with pytest.raises(UserError, match="of schema 2; this version of mgic reads 1"):
        from_pretrained(tmp_path)
    config = {"library": "mgic", "schema": 1, "architecture": "function_net", "model_args": {"c_max": 32}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    save_weights(tmp_path / "model.safetensors", mgic.create_model("function_net", c_max=64))
    with pytest.raises(UserError, match=r"its weights do not fit function_net: .* there, .* here"):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CorruptCheckpoint):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"no published network: config\.json is missing"):
        from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no folder, and not to be had from the hub"):
        from_pretrained(tmp_path / "absent/folder/of/nobody")


class _Silent(BaseHTTPRequestHandler):
    """A hub that is there and does not work: counts what it is asked."""

    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        self.send_error(503)

    do_HEAD = do_GET  # noqa: N815 - the base class asks for this name

    def log_message(self, *args):
        pass


@pytest.fixture
def broken_hub(monkeypatch):
    """`from_pretrained` asks a server of this process that answers 503, and keeps its copies in a folder of the test."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Silent)
    _Silent.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def _through(monkeypatch, cache, endpoint):
    fetch = partial(publishing.snapshot_download, cache_dir=cache, endpoint=endpoint)
    monkeypatch.setattr(publishing, "snapshot_download", fetch)


def _cached(cache, folder):
    """The hub's folder of copies, with one of ``me/net`` in it."""
    place = cache / "models--me--net"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("a" * 40)
    shutil.copytree(folder, place / "snapshots" / ("a" * 40))


def test_r33_a_hub_that_does_not_work_is_one_line_after_few_requests(broken_hub, tmp_path, monkeypatch, trials):
    _through(monkeypatch, tmp_path / "cache", broken_hub)
    with pytest.raises(UserError, match="me/net: no folder, and not to be had from the hub") as error:
        from_pretrained("me/net")
    assert "\n" not in str(error.value)
    assert 1 <= len(_Silent.asked) <= 10
    trials.passes(requests=len(_Silent.asked))


def test_r33_the_copy_at_hand_is_used_where_the_hub_is_down_or_forbidden(classifier, broken_hub, tmp_path, monkeypatch):
    publish(classifier, tmp_path / "hub")
    _cached(tmp_path / "cache", tmp_path / "hub")
    expected = load_network(classifier, mgic.create_model).model
    x = torch.randn(2, 1, 8, 8)
    _through(monkeypatch, tmp_path / "cache", broken_hub)
    with torch.no_grad():
        assert torch.equal(from_pretrained("me/net")(x), expected(x))
        assert len(_Silent.asked) <= 10
        _Silent.asked.clear()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert torch.equal(from_pretrained("me/net")(x), expected(x))
    assert _Silent.asked == []
    with pytest.raises(UserError, match="me/other: no folder, and not to be had from the hub"):
        from_pretrained("me/other")
    assert _Silent.asked == []


@pytest.mark.parametrize("library", ["timm", "mgic"])
def test_r33_half_a_download_and_a_wrong_checksum_are_refused(classifier, library, tmp_path, trials):
    if library == "timm":
        publish(classifier, tmp_path / "hub")
    else:
        (tmp_path / "hub").mkdir()
        model = mgic.create_model("function_net", c_max=32)
        save_weights(tmp_path / "hub/model.safetensors", model)
        config = {"library": "mgic", "schema": 1, "architecture": "function_net", "model_args": {"c_max": 32}}
        (tmp_path / "hub/config.json").write_text(json.dumps(config))
    assert from_pretrained(tmp_path / "hub") is not None
    weights = tmp_path / "hub/model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        weights.write_bytes(damaged)
        with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors: corrupt checkpoint .* sha256"):
            from_pretrained(tmp_path / "hub")
        trials.passes()
    weights.unlink()
    with pytest.raises(UserError, match=r"half a published network: model\.safetensors is missing; fetch it again"):
        from_pretrained(tmp_path / "hub")
    weights.write_bytes(whole)
    for config in ("{", "[]", "{}", '{"architecture": 3}', '{"architecture": "resnet20", "model_args": [1]}'):
        (tmp_path / "hub/config.json").write_text(config)
        with pytest.raises(UserError, match=r"config\.json"):
            from_pretrained(tmp_path / "hub")
    (tmp_path / "hub/config.json").write_text('{"architecture": "../../x", "library": "timm"}')
    with pytest.raises(UserError, match="there is no model"):
        from_pretrained(tmp_path / "hub")


class _Hub:
    """Stands for the hub: remembers what it was sent."""

    def __init__(self, refuses=None):
        self.refuses, self.sent = refuses, []

    def create_repo(self, repository, exist_ok):
        if self.refuses:
            raise self.refuses
        return type("Url", (), {"repo_id": repository})

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.sent.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
        return f"https://hub/{repo_id}/commit/1"


def test_the_folder_is_uploaded_as_it_is_and_a_refusal_is_one_line(classifier, tmp_path, monkeypatch, capsys):
    hub = _Hub()
    monkeypatch.setattr(publishing, "HfApi", lambda: hub)
    to = ["--to", str(tmp_path / "hub"), "--push"]
    assert main(["publish", str(classifier), *to, "me/net"]) == 0
    assert hub.sent == [
        ("me/net", ["README.md", "config.json", "model.safetensors", "model.safetensors.sha256", "recipe.yaml"])
    ]
    assert "https://hub/me/net/commit/1" in capsys.readouterr().out
    for error in (ConnectionError("no network"), publishing._HUB_ERRORS[0]("no route")):
        hub.refuses = error
        with pytest.raises(UserError, match="is written, but cannot be uploaded to me/net: no"):
            push(tmp_path / "hub", "me/net")


def test_the_command_writes_no_folder_of_this_machine_and_refuses_in_one_line(tmp_path, capsys):
    y = np.arange(32) % 2
    x = (y[:, None, None] * 200 + np.zeros((32, 8, 8))).astype(np.uint8)
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    run, hub = tmp_path / "run", tmp_path / "deep" / "hub"
    flags = [f"--data={tmp_path / 'd.npz'}", "--epochs=1", "--batch_size=16", "--model=resnet20"]
    assert main(["train", *flags, "--out", str(run)]) == 0
    assert main(["publish", str(run), "--to", str(hub)]) == 0
    for file in hub.rglob("*"):
        assert str(tmp_path).encode() not in file.read_bytes(), file
    assert yaml.safe_load((hub / "recipe.yaml").read_text())["data"] == "d.npz"
    (tmp_path / "again").mkdir()
    assert main(["publish", str(run), "--to", str(tmp_path / "again")]) == 0, "an empty folder will do"
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    for name in ("recipe.yaml", "data.json", "checkpoints"):
        (run / name).rename(unfinished / name)
    for words, said in (
        ([unfinished, "--to", tmp_path / "new"], "unfinished: the run is not finished"),
        ([tmp_path, "--to", tmp_path / "new"], "not a run folder"),
        ([unfinished, "--to", tmp_path / "new", "--push", "a/b/c"], "'a/b/c' is no repository, OWNER/NAME"),
    ):
        capsys.readouterr()
        assert main(["publish", *map(str, words)]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_not_empty_is_left_alone(classifier, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is there and not empty; choose a new folder"):
        publish(classifier, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
