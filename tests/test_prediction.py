"""Predictions of files equal the evaluation of the run they come from."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import mgic
from mgic.cli import main
from mgic.data import load_data, padded
from mgic.data.images import open_image, whole_image
from mgic.data.points import prepare_points
from mgic.training import Recipe, evaluate, load_run
from mgic.training.files import write_json, write_text
from mgic.training.weights import save_weights


@pytest.fixture
def call(capsys):
    def run(*words):
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def pictures(folder, count, size):
    """Dark cats and bright dogs; the names of the files say nothing."""
    dice = np.random.default_rng(0)
    for label, light in (("cat", 20), ("dog", 200)):
        (folder / label).mkdir(parents=True)
        for k in range(count):
            pixels = light + dice.integers(0, 40, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{label}{k}.png")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder, run = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("runs") / "a"
    pictures(folder / "train", 8, (20, 24))
    pictures(folder / "val", 4, (24, 30))
    words = ["--model=resnet20", "--data_args={image_size: 16}", "--epochs=3", "--batch_size=4", "--lr=0.05"]
    assert main(["train", *words, f"--data={folder}", f"--out={run}"]) == 0
    return folder, run


def test_classes_of_an_image_folder_are_named_and_agree_with_evaluation(classifier, call):
    folder, run = classifier
    status, out, _ = call("predict", run, folder / "val", "--json")
    assert status == 0
    said = json.loads(out)
    assert [s["file"] for s in said] == sorted(str(p) for p in (folder / "val").rglob("*.png"))
    right = [s["class"] in s["file"].rpartition("/")[2] for s in said]
    evaluated = json.loads(call("evaluate", run, "--json")[1])
    assert 100 * np.mean(right) == evaluated["accuracy"]
    losses = [
        -np.log(next(t["probability"] for t in s["top"] if t["class"] in s["file"].rpartition("/")[2])) for s in said
    ]
    assert np.mean(losses) == pytest.approx(evaluated["loss"], rel=1e-2, abs=1e-4)
    assert all(sum(t["probability"] for t in s["top"]) == pytest.approx(1, abs=1e-5) for s in said)


def as_shards(folder, target):
    """The pictures of a folder of classes as tar files."""
    target.mkdir()
    for part in ("train", "val"):
        with tarfile.open(target / f"{part}.tar", "w") as archive:
            for k, file in enumerate(sorted((folder / part).rglob("*.png"))):
                label = str(int(file.parent.name == "dog")).encode()
                for suffix, contents in (("png", file.read_bytes()), ("cls", label)):
                    info = tarfile.TarInfo(f"{k:03d}.{suffix}")
                    info.size = len(contents)
                    archive.addfile(info, io.BytesIO(contents))


@pytest.mark.parametrize("told", [True, False], ids=["noted", "of an earlier version"])
@pytest.mark.parametrize("kind", ["shards:", "images"])
def test_centres_are_seen_wherever_the_run_was_judged_on_centres(classifier, call, tmp_path, monkeypatch, kind, told):
    """Tar files, and folders that only --root names; the pictures are no squares, so that squashed ones differ."""
    monkeypatch.setenv("MGIC_CACHE", str(tmp_path / "cache"))
    folder, root = classifier[0], None
    if kind == "images":
        root = folder
    else:
        as_shards(folder, tmp_path / "tars")
        kind += str(tmp_path / "tars")
    recipe = Recipe(model="resnet20", data=kind, data_args={"image_size": 16})
    data = load_data(kind, root, image_size=16)
    noted = data.fingerprint()
    if not told:
        del noted["cropped"]
    model = write_run(tmp_path / "run", recipe, noted)
    said = json.loads(call("predict", tmp_path / "run", folder / "val", "--json")[1])
    ((images, _),) = data.test.evaluation_batches(8, 0)
    with torch.no_grad():
        chances = model(data.normalizer("cpu")(images)).softmax(1)
    assert [s["probability"] for s in said] == pytest.approx(chances.amax(1).tolist(), abs=1e-6)
    squashed = torch.stack([whole_image((3, 16, 16), 0, open_image(s["file"])) for s in said])
    with torch.no_grad():
        others = model(data.normalizer("cpu")(squashed)).softmax(1)
    assert float((others - chances).abs().max()) > 1e-4


def write_run(folder, recipe, data):
    """A run folder of a network that was not trained."""
    folder.mkdir()
    model = mgic.create_model(
        recipe.model, num_classes=data["num_classes"], in_chans=data["input_size"][0], **recipe.model_args
    )
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    write_json(folder / "data.json", data)
    save_weights(folder / "model.safetensors", model)
    return model.eval()


def test_images_of_a_set_in_memory_are_seen_as_in_evaluation(call, tmp_path):
    """Digits written as pictures of 8x8 and read again: the same logits, padding included."""
    recipe, data = Recipe(model="mgic_resnet20", data="digits", pad_images=1), padded(load_data("digits"), 1)
    model = write_run(tmp_path / "run", recipe, data.fingerprint())
    files = [tmp_path / f"{k:02d}.png" for k in range(12)]
    for file, image in zip(files, load_data("digits").test.images, strict=False):
        Image.fromarray(image[0].numpy()).save(file)
    said = json.loads(call("predict", tmp_path / "run", *files, "--json")[1])
    with torch.no_grad():
        chances = model(data.normalizer("cpu")(data.test.images[:12])).softmax(1)
    assert [s["index"] for s in said] == chances.argmax(1).tolist()
    assert [s["probability"] for s in said] == pytest.approx(chances.amax(1).tolist(), abs=1e-5)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    folder, run = tmp_path_factory.mktemp("scenes"), tmp_path_factory.mktemp("runs") / "s"
    for part in ("train", "test"):
        for kind in ("images", "labels"):
            (folder / part / kind).mkdir(parents=True)
        for k in range(4):
            mask = np.zeros((16, 24), np.uint8)
            mask[:, 4 * (k + 1) :] = 1
            Image.fromarray(np.where(mask[..., None] == 1, [220, 30, 30], [30, 30, 220]).astype(np.uint8)).save(
                folder / part / "images" / f"{k}.png"
            )
            Image.fromarray(mask).save(folder / part / "labels" / f"{k}.png")
    words = ["--model=mgic_unet", "--model_args={width: 8, depth: 1}", "--epochs=8", "--batch_size=2", "--lr=0.2"]
    data = [f"--data=masks:{folder}", "--data_args={classes: [blue, red], crop_size: [16, 24]}"]
    assert main(["train", *words, *data, f"--out={run}"]) == 0
    return folder, run


def test_masks_agree_with_evaluation_and_overlays_are_tinted(segmenter, call, tmp_path):
    folder, run = segmenter
    out = tmp_path / "new" / "out"
    status, text, _ = call("predict", run, folder / "test/images", "--out", out)
    assert status == 0
    assert "red" in text
    said = json.loads((out / "predictions.json").read_text())["predictions"]
    right = total = 0
    for one in said:
        mask = np.array(Image.open(one["mask"]))
        known = np.array(Image.open(one["file"].replace("images", "labels")))
        right, total = right + (mask == known).sum(), total + mask.size
        assert one["per_cent_of_pixels"].get("red", 0) == pytest.approx(100 * mask.mean(), abs=0.01)
        image, overlay = (np.array(Image.open(one[k])).astype(float) for k in ("file", "overlay"))
        for label, colour in ((0, (128, 0, 0)), (1, (0, 128, 0))):
            np.testing.assert_allclose(
                overlay[mask == label], (0.4 * image + 0.6 * np.array(colour))[mask == label], atol=1
            )
    evaluated = evaluate_run(run, folder)
    assert 100 * right / total == pytest.approx(evaluated["pixel_accuracy"])
    assert evaluated["pixel_accuracy"] > 80


def evaluate_run(run, folder):
    model = mgic.create_model("mgic_unet", width=8, depth=1, num_classes=2)
    model.load_state_dict(load_run(run).state_dict)
    return evaluate(model, load_data(f"masks:{folder}", classes=["blue", "red"]))


def test_point_clouds_are_classified_as_in_evaluation(call, tmp_path):
    data = {"name": "solids", "task": "classification", "classes": ["a", "b", "c"], "num_classes": 3}
    data |= {"input_size": [3, 32], "mean": [], "std": []}
    model = write_run(tmp_path / "run", Recipe(model="dgcnn", data="solids"), data)
    cloud = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    np.save(tmp_path / "cloud.npy", cloud)
    (said,) = json.loads(call("predict", tmp_path / "run", tmp_path / "cloud.npy", "--json")[1])
    with torch.no_grad():
        chances = model(prepare_points(torch.from_numpy(cloud), 32)[None]).softmax(1)[0]
    assert said["class"] == "abc"[int(chances.argmax())]
    assert said["probability"] == pytest.approx(float(chances.max()), abs=1e-5)


def test_a_run_that_approximates_a_function_has_nothing_to_say_about_files(classifier, call, tmp_path):
    data = {"name": "cos_sin", "task": "regression", "num_classes": 1, "input_size": [2], "mean": [], "std": []}
    recipe = Recipe(model="function_net", model_args={"widths": [8]}, data="cos_sin")
    write_run(tmp_path / "run", recipe, data)
    status, _, err = call("predict", tmp_path / "run", classifier[0] / "val")
    assert status == 2
    assert "this run is of regression" in err


def test_what_cannot_be_predicted_is_one_line_and_writes_nothing(classifier, segmenter, call, tmp_path):
    folder, run = classifier
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "broken.png").write_bytes(b"hello")
    one = folder / "val/cat/cat0.png"
    twin = tmp_path / "cat0.png"
    twin.write_bytes(one.read_bytes())
    wrong = {
        "no such file or folder": [run, tmp_path / "absent.png"],
        "no images or point clouds": [run, tmp_path / "empty"],
        "text.txt: no image; this network takes": [run, tmp_path / "text.txt"],
        "broken.png: cannot be decoded": [run, tmp_path / "broken.png"],
        "not a run folder": [tmp_path / "empty", one],
        "another input has the same name": [run, one, twin, f"--out={tmp_path / 'out'}"],
    }
    for said, words in wrong.items():
        status, out, err = call("predict", *words)
        assert (status, out, err.count("\n")) == (2, "", 1), (said, err)
        assert said in err
    assert not (tmp_path / "out").exists()
