"""Data sets: exact splits and statistics, augmentation that equals a naive loop, and refusals that say what is wrong."""

import gzip
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tiny import RECIPE, stripes

from mgic.data import (
    LOADERS,
    SOURCES,
    Augmentation,
    Images,
    augment_batch,
    epoch_order,
    load_data,
    padded,
    random_key,
)
from mgic.data.images import centre_crop, open_image, size_of
from mgic.errors import UserError
from mgic.training import train

FULL = os.environ.get("MGIC_FAULTS") == "full"

# Augmentation


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
@pytest.mark.parametrize(
    ("shape", "padding", "flip"), [((5, 1, 8, 8), 1, False), ((4, 3, 7, 9), 4, True), ((3, 2, 1, 5), 0, True)]
)
def test_augmentation_equals_a_naive_loop(shape, padding, flip, dtype):
    images = torch.randint(1, 255, shape).to(dtype)
    n, _, height, width = shape
    result = augment_batch(images, torch.Generator().manual_seed(3), padding, flip)
    generator = torch.Generator().manual_seed(3)
    top, left = torch.randint(2 * padding + 1, (2, n, 1), generator=generator)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5 if flip else torch.zeros(n, 1)
    for k in range(n):
        padded = torch.nn.functional.pad(images[k], (padding,) * 4)
        crop = padded[:, top[k] : top[k] + height, left[k] : left[k] + width]
        assert torch.equal(result[k], crop.flip(-1) if mirrored[k] else crop)
    assert result.dtype == dtype


def test_every_offset_and_both_directions_occur_about_equally_often():
    image = torch.zeros(9000, 1, 5, 5, dtype=torch.uint8)
    image[:, :, 2, 1] = 1
    moved = augment_batch(image, torch.Generator().manual_seed(0), 1, True)
    counts = moved.sum((0, 1)).float()
    assert (counts[1:4].nonzero()[:, 1].unique() == torch.arange(5)).all()
    assert counts.sum() == 9000
    rows = counts.sum(1)
    assert rows[0] == rows[4] == 0
    assert ((rows[1:4] / 3000 - 1).abs() < 0.1).all()
    assert counts[:, :2].sum() / 9000 == pytest.approx(1 / 3, abs=0.05)


def test_nothing_changes_without_padding_and_flips():
    images = torch.randint(0, 255, (6, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(augment_batch(images, torch.Generator(), 0, False), images)


def _batches(split, step, workers=0, epoch=0, seed=0, first=0):
    order = epoch_order(len(split), seed, epoch)
    batches = torch.split(order, 4)[first:]
    return list(split.training_batches(batches, Augmentation(0, True, seed), epoch, step, workers))


def _same(one, other):
    return len(one) == len(other) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(one, other, strict=True)
    )


def test_batches_depend_on_seed_step_and_epoch_alone():
    split = stripes().train
    whole = _batches(split, step=0)
    assert _same(_batches(split, step=3, first=3), whole[3:])
    assert not _same(_batches(split, step=1), whole)
    assert not _same(_batches(split, step=0, epoch=1), whole)
    assert not _same(_batches(split, step=0, seed=1), whole)


def test_every_epoch_visits_every_sample_once_in_its_own_order():
    orders = [epoch_order(50, 0, epoch).tolist() for epoch in range(4)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_random_keys_of_different_purposes_differ():
    keys = {
        random_key(*parts)
        for parts in [
            ("order", 0, 1),
            ("order", 1, 0),
            ("augment", 0, 1),
            ("step", 0, 1),
            ("order", 0, 11),
            ("order", 0, 1, 1),
        ]
    }
    assert len(keys) == 6
    assert all(0 <= key < 2**63 for key in keys)


def test_drawn_samples_are_distinct_from_everywhere_and_as_the_network_gets_them():
    pixels = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1)  # sorted, as folders of classes are
    data = replace(stripes(), train=Images(pixels, torch.arange(100)), mean=(0.2,), std=(0.5,))
    batches, labels = zip(*data.drawn(data.train, 20, 8), strict=True)
    assert [len(batch) for batch in batches] == [8, 8, 4]
    chosen = ((torch.cat(batches).flatten() * 0.5 + 0.2) * 255).round()
    assert torch.equal(chosen, torch.cat(labels).float())
    assert len(set(chosen.tolist())) == 20
    assert chosen.min() < 25
    assert chosen.max() > 75
    assert all(
        torch.equal(a, b) for a, b in zip(batches, next(zip(*data.drawn(data.train, 20, 8), strict=True)), strict=True)
    )


def test_evaluation_batches_are_all_images_in_order():
    split = stripes().test
    images, labels = zip(*split.evaluation_batches(6, 0), strict=True)
    assert [len(y) for y in labels] == [6, 6, 6, 2]
    assert torch.equal(torch.cat(images), split.images)
    assert torch.equal(torch.cat(labels), split.labels)


# Named sets


def test_digits_are_split_by_class_without_overlap_and_never_change():
    data = load_data("digits")
    digits = load_digits()
    assert (len(data.train), len(data.test), data.num_classes, data.input_size) == (1198, 599, 10, (1, 8, 8))
    held_out = torch.bincount(data.test.labels).tolist()
    assert held_out == [round(count / 3) for count in np.bincount(digits.target)]
    pixels = torch.cat([data.train.images, data.test.images]).flatten(1)
    original = np.rint(digits.images * 255 / 16).astype(np.uint8).reshape(-1, 64)
    assert sorted(map(bytes, pixels.numpy())) == sorted(map(bytes, original))
    digest = hashlib.sha256(data.test.images.numpy().tobytes() + data.test.labels.numpy().tobytes()).hexdigest()
    assert digest == "bbb82fde88f0ff102b5e636c82ba6059df7770e82ebefa6f3bde9593f9ce56bd"
    assert "1,198 train and 599 test images" in data.note


def _idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return gzip.compress(header + array.tobytes(), mtime=0)


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """FashionMNIST's four archives in the official format, tiny, with the checksums torchvision is told to expect."""
    from torchvision.datasets import FashionMNIST

    dice = np.random.default_rng(0)
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    resources = []
    for (name, _), shape in zip(FashionMNIST.resources, [(30, 28, 28), (30,), (10, 28, 28), (10,)], strict=True):
        array = (
            dice.integers(0, 256, shape, dtype=np.uint8)
            if len(shape) == 3
            else (np.arange(shape[0]) % 10).astype(np.uint8)
        )
        (raw / name).write_bytes(_idx(array))
        resources.append((name, hashlib.md5((raw / name).read_bytes()).hexdigest()))
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    return tmp_path


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    import urllib.request

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("download", [False, True])
def test_archives_that_are_there_are_unpacked_without_a_network(fashion, download):
    data = load_data("fashion_mnist", root=fashion, download=download)
    assert (len(data.train), len(data.test), data.input_size) == (30, 10, (1, 28, 28))
    assert data.test.labels.tolist() == list(range(10))
    again = load_data("fashion_mnist", root=fashion)
    assert torch.equal(again.train.images, data.train.images)


def test_r11_a_missing_or_half_downloaded_or_damaged_set_is_one_line(fashion, tmp_path):
    raw = fashion / "FashionMNIST" / "raw"
    with pytest.raises(
        UserError, match=r"fashion_mnist: not found in .*expected train-images.*found nothing; --download"
    ):
        load_data("fashion_mnist", root=tmp_path / "elsewhere")
    name = "t10k-labels-idx1-ubyte.gz"
    whole = (raw / name).read_bytes()
    (raw / name).write_bytes(whole[:-3])
    with pytest.raises(UserError, match=f"wrong checksum of {name}"):
        load_data("fashion_mnist", root=fashion)
    (raw / name).unlink()
    with pytest.raises(UserError, match=f"expected {name}; found t10k-images"):
        load_data("fashion_mnist", root=fashion)


@pytest.mark.parametrize("name", sorted(LOADERS.keys() - {"fashion_mnist", "cifar10", "cifar100"}))
def test_what_nobody_can_fetch_says_where_to_get_it(tmp_path, name):
    with pytest.raises(UserError, match=rf"^--download has nothing to fetch for '{name}': {SOURCES[name]}$"):
        load_data(name, tmp_path, download=True)
    if name in ("images", "shards", "masks", "camvid", "cityscapes", "modelnet"):
        arguments = {"classes": 2} if name == "masks" else {}
        with pytest.raises(UserError, match=rf"not found in .*; found nothing; {SOURCES[name]}$"):
            load_data(name, tmp_path / "elsewhere", **arguments)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_r11_missing_cifar_names_the_expected_tree(tmp_path, name):
    with pytest.raises(
        UserError, match=rf"{name}: not found in .*expected cifar-.*/; found nothing; --download fetches"
    ):
        load_data(name, root=tmp_path)
    (tmp_path / ("cifar-10-batches-py" if name == "cifar10" else "cifar-100-python")).mkdir()
    with pytest.raises(UserError, match=r"not found or corrupted.*--download fetches it"):
        load_data(name, root=tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fashionmnist", "unknown data 'fashionmnist'; did you mean fashion_mnist?"),
        ("xyzzy", "unknown data 'xyzzy'; known: "),
        ("no/such/folder", "data 'no/such/folder': no such folder; an image folder has train/CLASS"),
        ("absent.npz", "data 'absent.npz': no such file; expected an .npz with x_train, y_train, x_test, y_test"),
    ],
)
def test_r11_unknown_names_and_paths_say_what_exists(name, message):
    with pytest.raises(UserError) as error:
        load_data(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# Files


def _arrays(**changes):
    dice = np.random.default_rng(1)
    arrays = {
        "x_train": dice.integers(0, 256, (12, 6, 5, 3), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": dice.integers(0, 256, (6, 6, 5, 3), dtype=np.uint8),
        "y_test": np.arange(6) % 3,
    }
    return {**arrays, **changes}


def _saved(path, **changes):
    np.savez(path, **{k: v for k, v in _arrays(**changes).items() if v is not None})
    return str(path)


def test_npz_files_come_back_with_exact_statistics(tmp_path):
    data = load_data(_saved(tmp_path / "a.npz"))
    pixels = _arrays()["x_train"] / 255
    assert (data.num_classes, data.input_size) == (3, (3, 6, 5))
    assert torch.equal(data.train.images, torch.from_numpy(_arrays()["x_train"].transpose(0, 3, 1, 2)))
    assert data.mean == pytest.approx(pixels.mean((0, 1, 2)), rel=1e-12)
    assert data.std == pytest.approx(pixels.std((0, 1, 2)), rel=1e-12)
    normal = data.normalizer(torch.device("cpu"))(data.train.images)
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(normal.std((0, 2, 3), correction=0), torch.ones(3))


def test_grey_images_and_labels_as_columns_are_accepted(tmp_path):
    grey = {k: v[..., 0] for k, v in _arrays().items() if k.startswith("x")}
    columns = {k: v[:, None] for k, v in _arrays().items() if k.startswith("y")}
    data = load_data(_saved(tmp_path / "a.npz", **grey, **columns))
    assert data.input_size == (1, 6, 5)
    assert data.train.labels.tolist() == list(range(3)) * 4


def test_a_constant_channel_does_not_divide_by_zero(tmp_path):
    data = load_data(_saved(tmp_path / "a.npz", x_train=np.full((12, 6, 5, 3), 9, np.uint8)))
    assert data.std == (1.0, 1.0, 1.0)


def test_an_incomplete_cifar10_says_how_much_is_missing(tmp_path):
    note = load_data(_saved(tmp_path / "cifar10.npz")).note
    assert note.endswith("of CIFAR-10, 49,988 of 50,000 train and 9,994 of 10,000 test images are missing")
    assert "missing" not in load_data(_saved(tmp_path / "mine.npz")).note


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "y_test not in the file; found x_train, y_train, x_test"),
        ({"x_train": _arrays()["x_train"] / 255}, "x_train: pixels must be uint8 .*, got float64"),
        (
            {"x_train": np.zeros((12, 30), np.uint8)},
            r"x_train: expected shape \(N, H, W\) or \(N, H, W, C\), got \(12, 30\)",
        ),
        ({"x_train": np.zeros((12, 3, 8, 8), np.uint8)}, "8 channels in the last axis .*; expected NHWC"),
        ({"x_test": np.zeros((6, 9, 9, 3), np.uint8)}, r"train images are \(3, 6, 5\) but test images are \(3, 9, 9\)"),
        ({"x_test": np.zeros((0, 6, 5, 3), np.uint8), "y_test": np.zeros(0, int)}, "expected shape"),
        ({"y_train": np.arange(12) / 2}, "y_train: labels must be integer class indices, got float64"),
        ({"y_train": np.eye(3, dtype=int)[np.arange(12) % 3]}, r"got \(12, 3\); of one-hot labels take argmax\(1\)"),
        ({"y_train": np.arange(12) % 3 - 1}, "y_train: label -1 is negative"),
        ({"y_train": np.arange(11) % 3}, "y_train: 11 labels for 12 images"),
        ({"y_train": np.arange(12) % 3 + 1}, "no training image has label 0 although the largest label is 3"),
        ({"y_train": np.where(np.arange(12) == 5, 255, np.arange(12) % 3)}, "no training image has label 3, 4, 5"),
        ({"y_test": np.array([0, 1, 2, 3, 0, 1])}, "y_test has label 3, but 3 classes are 0 ... 2"),
    ],
)
def test_r12_wrong_arrays_are_refused_with_the_array_and_the_value(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        load_data(_saved(tmp_path / "a.npz", **changes))
    assert "\n" not in str(error.value)


def test_r12_labels_beyond_a_given_number_of_classes_are_refused(tmp_path):
    path = _saved(tmp_path / "a.npz")
    assert load_data(path, num_classes=7).num_classes == 7
    with pytest.raises(UserError, match=r"y_train has label 2, but 2 classes are 0 \.\.\. 1"):
        load_data(path, num_classes=2)


@pytest.mark.parametrize("contents", [b"", b"hello", b"PK\x03\x04" + b"\0" * 50])
def test_files_that_are_no_npz_are_refused(tmp_path, contents):
    (tmp_path / "a.npz").write_bytes(contents)
    with pytest.raises(UserError, match=r"a\.npz: not a readable .npz file"):
        load_data(str(tmp_path / "a.npz"))


# Image folders


@pytest.fixture
def folder(tmp_path):
    dice = np.random.default_rng(0)
    for part, count in (("train", 7), ("val", 3)):
        for label in ("cat", "dog"):
            (tmp_path / part / label).mkdir(parents=True)
            for k in range(count):
                pixels = dice.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / label / f"{k}.png")
    return tmp_path


def test_image_folders_give_the_same_pixels_with_any_number_of_workers_and_any_start(folder):
    data = load_data(str(folder), image_size=16)
    assert (len(data.train), len(data.test), data.num_classes, data.input_size) == (14, 6, 2, (3, 16, 16))
    whole = _batches(data.train, step=0)
    assert whole[0][0].shape == (4, 3, 16, 16)
    assert whole[0][0].dtype == torch.uint8
    assert _same(_batches(data.train, step=0, workers=2), whole)
    assert _same(_batches(data.train, step=2, first=2), whole[2:])
    one_batch = torch.arange(4)[None]
    epochs = [list(data.train.training_batches(one_batch, Augmentation(seed=0), epoch, 0, 0)) for epoch in (0, 1)]
    assert not _same(*epochs)
    assert _same(list(data.test.evaluation_batches(4, 0)), list(data.test.evaluation_batches(4, 2)))


@pytest.mark.parametrize(("height", "width"), [(18, 18), (18, 30), (26, 18)])
def test_evaluation_cuts_the_centre_out_of_an_image_an_eighth_larger(height, width):
    """At 16 the shorter side becomes 18; it is 18 already, so the pixels stay what they are."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    top, left = (height - 16) // 2, (width - 16) // 2
    expected = torch.from_numpy(pixels[top : top + 16, left : left + 16].copy()).permute(2, 0, 1)
    assert torch.equal(centre_crop(16, Image.fromarray(pixels)), expected)


def test_some_of_the_training_images_are_always_the_same_ones(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.arange(40) % 2, x_test=x[:4], y_test=np.arange(4) % 2)
    some, again = (load_data(str(tmp_path / "a.npz"), train_images=10) for _ in range(2))
    assert torch.equal(some.train.images, again.train.images)
    assert len(some.train) == 10
    assert len(some.test) == 4
    whole = load_data(str(tmp_path / "a.npz")).train.images
    assert all((whole == image).flatten(1).all(1).any() for image in some.train.images)
    assert "10 of the train images" in some.note
    for wrong in (0, 41, 2.0, True):
        with pytest.raises(UserError, match=r"train_images must be 1 ... 40, got"):
            load_data(str(tmp_path / "a.npz"), train_images=wrong)


def test_r10_images_of_every_mode_are_read_as_colour(folder):
    picture = Image.open(folder / "train/cat/0.png")
    for k, mode in enumerate(("L", "RGBA", "P", "1")):
        picture.convert(mode).save(folder / f"train/cat/mode{k}.png")
    picture.convert("CMYK").save(folder / "train/cat/mode.jpg")
    Image.new("RGB", (1, 1)).save(folder / "train/cat/one.png")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(folder / "train/cat/deep.png")
    batches = _batches(load_data(str(folder), image_size=16).train, step=0)
    assert sum(len(labels) for _, labels in batches) == 14 + 7


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b"text", lambda b: b[: len(b) // 2]], ids=["empty", "text", "cut"]
)
def test_r10_a_corrupt_image_is_an_error_with_its_path(folder, damage, workers):
    bad = folder / "train/dog/3.png"
    bad.write_bytes(damage(bad.read_bytes()))
    with pytest.raises(UserError, match=r"train/dog/3\.png: cannot be decoded as an image .*remove or replace it"):
        _batches(load_data(str(folder), image_size=16).train, step=0, workers=workers)


# R10: a folder with everything that can be wrong with an image


def _png(width, height, colour):
    """A PNG of one grey value, written row by row: no picture of that size is ever in memory."""
    squeeze = zlib.compressobj()
    row = b"\0" + bytes([colour]) * (width // 8)  # one bit a pixel
    pixels = b"".join(squeeze.compress(row) for _ in range(height)) + squeeze.flush()

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """1,000 images (300 in the short version): 10 (3) of them cannot be read, five are odd but fine."""
    root, count = tmp_path_factory.mktemp("zoo"), 1000 if FULL else 300
    dice = np.random.default_rng(0)
    for label in ("cat", "dog"):
        for part in ("train", "val"):
            (root / part / label).mkdir(parents=True)
        for k in range(count // 2):
            Image.fromarray(dice.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(
                root / "train" / label / f"{k:03}.png"
            )
    Image.new("RGB", (8, 8)).save(root / "val/cat/0.png")
    Image.new("RGB", (8, 8)).save(root / "val/dog/0.png")
    cat = root / "train/cat"
    whole = (cat / "000.png").read_bytes()
    bad = {"cat/000.png": whole[: len(whole) // 2], "cat/001.png": b"", "dog/000.png": _png(20_000, 20_000, 0)}
    if FULL:
        cuts = {f"cat/{k:03}.png": whole[:k] for k in (10, 40, 80, 120)}
        texts = {"dog/001.png": b"no image\n" * 9, "dog/002.png": "naïve\n".encode(), "dog/003.png": b""}
        bad = {**bad, **cuts, **texts}
    for name, contents in bad.items():
        (root / "train" / name).write_bytes(contents)
    Image.new("RGB", (9, 9), (200, 0, 0)).save(cat / "130.png", format="JPEG")  # another format than its name says
    (cat / "131.png").unlink()
    Image.new("CMYK", (9, 9)).save(cat / "131.jpg")
    Image.fromarray(np.full((9, 9), 0x8000, np.uint16)).save(cat / "132.png")
    Image.new("RGB", (1, 1)).save(cat / "133.png")
    return root, sorted(bad)


def _seen(split, epochs=(0,), workers=0):
    order = [torch.arange(len(split))[i : i + 50] for i in range(0, len(split), 50)]
    return [
        torch.cat([x for x, _ in split.training_batches(order, Augmentation(0, True, 5), epoch, 0, workers)])
        for epoch in epochs
    ]


def test_r10_every_broken_image_is_named_with_its_index(zoo, trials):
    root, bad = zoo
    files = load_data(f"images:{root}", image_size=8).train
    places = [f"{path.parent.name}/{path.name}" for path, _ in files.samples]
    for name in bad:
        index = places.index(name)
        with pytest.raises(
            UserError, match=rf"train/{name}: cannot be decoded as an image .*\(sample {index}\)$"
        ) as error:
            list(files.training_batches([torch.tensor([index])], Augmentation(), 0, 0, 0))
        assert "\n" not in str(error.value)
        trials.passes()


def test_r10_skipped_images_are_counted_and_replaced_by_the_same_others_every_time(zoo, trials):
    root, bad = zoo
    data = load_data(f"images:{root}", image_size=8, on_bad_sample="skip")
    first, second = _seen(data.train, (0, 1))
    assert len(data.bad_samples) == len(bad)
    assert {Path(reason.split(":")[0]).name for reason in data.train.bad.found.values()} == {Path(n).name for n in bad}
    assert len(first) == len(second) == len(data.train)
    again = load_data(f"images:{root}", image_size=8, on_bad_sample="skip")
    assert torch.equal(_seen(again.train, workers=2)[0], first)
    assert not torch.equal(first, second)
    assert sum(len(y) for _, y in data.train.evaluation_batches(50, 0)) == len(data.train) - len(bad)
    trials.passes(len(bad))


def test_r10_more_than_one_per_cent_stop_and_the_policy_is_checked(zoo, tmp_path):
    root, bad = zoo
    shutil.copytree(root, tmp_path / "zoo")
    (tmp_path / "zoo/train/dog/090.png").write_bytes(b"one more")
    data = load_data(f"images:{tmp_path / 'zoo'}", image_size=8, on_bad_sample="skip")
    total = len(data.train)
    with pytest.raises(
        UserError, match=rf"{len(bad) + 1} of {total:,} samples cannot be read, more than 1%; the last: .*\.png"
    ):
        _seen(data.train)
    with pytest.raises(UserError, match="on_bad_sample must be 'error' or 'skip', got 'ignore'"):
        load_data(f"images:{root}", on_bad_sample="ignore")


def test_r10_a_bomb_costs_no_memory(zoo, trials):
    """20,000 x 20,000 pixels in 50 kB: refused by the header, in a process that may grow by 1 GB at most."""
    root, _ = zoo
    code = (
        "import resource, sys, pathlib; from mgic.data.images import open_image; from mgic.errors import UserError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: open_image(pathlib.Path(sys.argv[1]))\n"
        "except UserError as error: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)"
    )
    bomb = str(root / "train/dog/000.png")
    done = subprocess.run([sys.executable, "-c", code, bomb], capture_output=True, text=True, check=True)
    kilobytes, said = done.stdout.split(" ", 1)
    assert re.match(r".*000\.png: cannot be decoded as an image \(Image size \(400000000 pixels\) exceeds limit", said)
    assert int(kilobytes) < 1_000_000
    trials.passes(1, megabytes=int(kilobytes) / 1024)


def test_r10_a_picture_is_turned_as_its_exif_data_say_and_16_bits_are_scaled(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    turns = {1: pixels, 3: np.rot90(pixels, 2), 6: np.rot90(pixels, -1), 8: np.rot90(pixels, 1)}
    for orientation, expected in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
        assert (np.asarray(open_image(tmp_path / "a.png")) == expected).all()
        with Image.open(tmp_path / "a.png") as file:
            assert size_of(file) == expected.shape[:2]
    deep = np.array([[0, 128, 257, 0x8000, 0xFFFF]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.asarray(open_image(tmp_path / "deep.png"))[0].tolist() == [[v] * 3 for v in (0, 0, 1, 128, 255)]
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match=r"float\.tif: cannot be decoded .*floating-point numbers"):
        open_image(tmp_path / "float.tif")


def test_r10_the_summary_of_a_run_counts_what_was_skipped(zoo, tmp_path):
    def colour():
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))

    root, bad = zoo
    data = load_data(f"images:{root}", image_size=8, on_bad_sample="skip")
    recipe = replace(RECIPE, batch_size=64, epochs=1, crop_padding=0, data_args={"on_bad_sample": "skip"})
    summary = train(recipe, colour, data, tmp_path / "run", progress=False)
    assert summary.bad_samples == len(bad)
    assert json.loads((tmp_path / "run/summary.json").read_text())["bad_samples"] == len(bad)


def test_r11_wrong_folders_are_one_line(folder, tmp_path):
    def colour():
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))

    with pytest.raises(UserError, match="crop_padding=1 is for data sets in memory"):
        train(replace(RECIPE, batch_size=4), colour, load_data(str(folder), image_size=16), tmp_path / "run")
    (folder / "val/dog").rename(folder / "val/wolf")
    with pytest.raises(UserError, match="train and val differ in the classes dog, wolf"):
        load_data(str(folder))
    for file in (folder / "val/wolf").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="wolf"):
        load_data(str(folder))
    (folder / "val").rename(folder / "valid")
    with pytest.raises(UserError, match=r"expected train/CLASS/\*.jpg, val/CLASS/\*.jpg .*; found .*train, valid"):
        load_data(str(folder))


def test_images_move_to_a_device_together():
    moved = stripes().train.to(torch.device("meta"))
    assert isinstance(moved, Images)
    assert moved.images.device == moved.labels.device == torch.device("meta")


def test_padding_puts_black_pixels_around_every_image():
    data = load_data("digits")
    larger = padded(data, 2)
    assert larger.input_size == (1, 12, 12)
    for small, large in ((data.train, larger.train), (data.test, larger.test)):
        assert torch.equal(large.images[:, :, 2:-2, 2:-2], small.images)
        assert int(large.images.sum()) == int(small.images.sum())
    assert larger.fingerprint() != data.fingerprint()
    assert padded(data, 0) is data
