"""Shards: tar files are the image folder they were made of, whatever reads them, and what is wrong with them is named."""

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from mgic.data import Augmentation, Share, epoch_order, load_data, shards
from mgic.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MGIC_CACHE", str(tmp_path / "cache"))


def write_tar(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, contents in members:
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))


def jpeg(seed):
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (12 + seed % 5, 14, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG" if seed % 2 else "PNG")
    return file.getvalue()


def write_both(root, train=11, val=4):
    """The same images as a folder and as shards of three, labels in cls and json files by turns."""
    for part, count in (("train", train), ("val", val)):
        samples = []
        for k in range(count):
            label, suffix = k * 2 // count, "jpg" if k % 2 else "png"
            name = f"{'ab'[label]}/{k:03d}"
            file = root / "folder" / part / f"{name}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(jpeg(k))
            told = ("cls", str(label)) if k % 3 else ("json", json.dumps({"label": label, "words": "x.y"}))
            samples += [[(f"{name}.{suffix}", jpeg(k)), (f"{name}.{told[0]}", told[1].encode()), (f"{name}.txt", b"?")]]
        for i in range(0, count, 3):
            members = [member for sample in samples[i : i + 3] for member in sample]
            write_tar(root / "shards" / f"made-{part}-{i:04d}.tar", [(".hidden", b""), *members])
    return (
        load_data(f"{kind}:{root / place}", image_size=8)
        for kind, place in (("images", "folder"), ("shards", "shards"))
    )


def test_shards_give_the_batches_of_the_folder_they_were_made_of(tmp_path):
    folder, tars = write_both(tmp_path)
    assert (len(tars.train), len(tars.test), tars.num_classes) == (11, 4, 2)
    order = [*torch.split(epoch_order(11, 5, 1), 4)][:2]
    what = (order, Augmentation(0, True, 5), 1, 2)
    for workers, share in ((0, Share()), (2, Share()), (0, Share(1, 2))):
        ours, theirs = (list(d.train.training_batches(*what, workers, share)) for d in (tars, folder))
        assert len(ours) == 2
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
            assert len(one[1]) == 4 // share.ranks
    for one, other in zip(tars.test.evaluation_batches(3, 0), folder.test.evaluation_batches(3, 0), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_the_index_is_made_once_and_again_when_a_shard_changes(tmp_path, monkeypatch):
    _, first = write_both(tmp_path)
    place, read = tmp_path / "shards", []
    whole = shards.read_shard
    monkeypatch.setattr(shards, "read_shard", lambda path: read.append(path.name) or whole(path))
    again = load_data(f"shards:{place}", image_size=8)
    assert not read
    assert again.fingerprint() == first.fingerprint()
    write_tar(place / "made-val-0000.tar", [("0.png", jpeg(2)), ("0.cls", b"1")])
    changed = load_data(f"shards:{place}", image_size=8)
    assert read == ["made-val-0000.tar", "made-val-0003.tar"]
    assert changed.fingerprint()["digest"] != first.fingerprint()["digest"]


def test_a_damaged_index_counts_as_none_and_is_made_anew(tmp_path):
    _, first = write_both(tmp_path)
    kept = sorted((tmp_path / "cache" / "shards").glob("*.npy"))
    assert len(kept) == 2
    whole = [file.read_bytes() for file in kept]
    beyond = io.BytesIO()
    np.save(beyond, np.array([[9, 0, 1, 0]], np.int64))
    for damage in (whole[0][:-9], b"", whole[0][:6], beyond.getvalue()):
        kept[0].write_bytes(damage)
        with pytest.warns(UserWarning, match=f"{kept[0].name} .* is written anew"):
            again = load_data(f"shards:{tmp_path / 'shards'}", image_size=8)
        assert again.fingerprint() == first.fingerprint()
        assert [file.read_bytes() for file in kept] == whole


def test_splits_are_told_by_words_not_by_letters_in_others(tmp_path):
    places = [
        "in1k-Train-0.tar",
        "train/a.tar",
        "train2/constrained.tar",
        "val/constrained.tar",
        "in1k-validation-0.tar",
    ]
    for place in [*places, "contest.tar"]:
        write_tar(tmp_path / place, GOOD)
    data = load_data(f"shards:{tmp_path}", image_size=8)
    found = [[file.relative_to(tmp_path).as_posix() for file in s.samples.files] for s in (data.train, data.test)]
    assert found == [sorted(places[:3]), sorted(places[3:])]
    write_tar(tmp_path / "val" / "train-0.tar", GOOD)
    with pytest.raises(UserError, match=r"val/train-0.tar: is it for train or for val\?"):
        load_data(f"shards:{tmp_path}")


GOOD = [("0.png", jpeg(0)), ("0.cls", b"0")]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("0.png", jpeg(0))], "sample 0 has no label \\(png\\); expected a cls or a json file"),
        ([("0.cls", b"0")], "sample 0 has 0 images"),
        ([("0.png", jpeg(0)), ("0.jpg", jpeg(1)), ("0.cls", b"0")], "sample 0 has 2 images"),
        ([("0.png", jpeg(0)), ("0.cls", b"cat")], "0.cls holds no label"),
        ([("0.png", jpeg(0)), ("0.json", b'{"text": 1}')], "0.json holds no label \\(KeyError"),
        ([("0.png", jpeg(0)), ("0.json", b"[" * 100_000)], "0.json holds no label"),
        ([("0.png", jpeg(0)), ("0.json", b'{"label": true}')], "must be a class number from 0 on, got True"),
        ([("0.png", jpeg(0)), ("0.cls", b"-1")], "must be a class number from 0 on, got -1"),
        ([("readme", b"")], "no image in it"),
    ],
)
def test_samples_that_are_none_are_named(tmp_path, members, words):
    write_tar(tmp_path / "train" / "0.tar", members)
    write_tar(tmp_path / "val" / "0.tar", GOOD)
    with pytest.raises(UserError, match=words):
        load_data(f"shards:{tmp_path}")


def test_files_that_cannot_be_read_at_any_place_are_refused(tmp_path):
    write_tar(tmp_path / "train.tar", GOOD, "w:gz")
    write_tar(tmp_path / "val.tar", GOOD)
    with pytest.raises(UserError, match=r"train.tar: not a tar file that can be read at any place"):
        load_data(f"shards:{tmp_path}")
    write_tar(tmp_path / "train.tar", [("0.cls", b"0"), ("0.png", jpeg(0) * 40)])
    whole = (tmp_path / "train.tar").read_bytes()
    (tmp_path / "train.tar").write_bytes(whole[:2500])
    with pytest.raises(UserError, match=r"train.tar: (sample 0 is cut off|not a tar file)"):
        load_data(f"shards:{tmp_path}")
    (tmp_path / "val.tar").unlink()
    with pytest.raises(UserError, match=r"not found .* expected train\*.tar .* found train.tar"):
        load_data(f"shards:{tmp_path}")


def test_labels_and_broken_images_are_named_with_their_shard(tmp_path):
    write_tar(tmp_path / "train.tar", [("0.png", jpeg(0)), ("0.cls", b"0"), ("1.png", b"broken"), ("1.cls", b"1")])
    write_tar(tmp_path / "val.tar", [("0.png", jpeg(0)), ("0.cls", b"2")])
    with pytest.raises(UserError, match=r"val.tar: has label 2, but 2 classes are 0 ... 1"):
        load_data(f"shards:{tmp_path}")
    data = load_data(f"shards:{tmp_path}", num_classes=3, image_size=8)
    with pytest.raises(UserError, match=r"train.tar, image at byte \d+: cannot be decoded"):
        list(data.train.training_batches([torch.tensor([1])], Augmentation(), 0, 0, 0))
    many = [(f"{k:03d}.{end}", jpeg(k) if end == "png" else b"0") for k in range(120) for end in ("png", "cls")]
    write_tar(tmp_path / "train.tar", [*many, ("x.png", b"broken"), ("x.cls", b"1")])
    data = load_data(f"shards:{tmp_path}", num_classes=3, image_size=8, on_bad_sample="skip")
    ((images, labels),) = data.train.training_batches([torch.tensor([0, 120])], Augmentation(), 0, 0, 0)
    assert (len(images), labels.tolist(), len(data.bad_samples)) == (2, [0, 0], 1), (
        "another is taken for the broken one"
    )
    with pytest.raises(UserError, match="image_size must be a positive integer, got 0"):
        load_data(f"shards:{tmp_path}", image_size=0)
    shortened = replace(data.train.samples, table=data.train.samples.table + np.array([0, 10**6, 0, 0]))
    with pytest.raises(UserError, match="ends before the image at byte"):
        shortened[0]
