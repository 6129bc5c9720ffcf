"""Point clouds as data: meshes and files read right or refused by name, solids that are solids, clouds that repeat."""

import json
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

import mgic
from mgic import UserError
from mgic.cli import main
from mgic.data import Augmentation, load_data
from mgic.data.points import Changes, PointClouds, prepare_points, read_off, read_points, sample_surface
from mgic.data.solids import (
    FAMILIES,
    VERSION,
    Random,
    circle,
    solid,
    turn,
    write_off,
    write_solids,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from solids_baseline import extents_and_moments

SQUARE = "OFF\n4 1 0\n0 0 0\n2 0 0\n2 1 0\n0 1 0\n4 0 1 2 3\n"


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        SQUARE,
        SQUARE.replace("OFF\n4", "OFF4"),  # as some of ModelNet's files
        SQUARE.replace("OFF\n4", "OFF 4"),
        SQUARE.replace("OFF\n", "# made by hand\nOFF # header\n\n").replace("2 0 0\n", "2 0 0 # corner\n"),
        SQUARE.replace("4 0 1 2 3", "4 0 1 2 3 0.5 0.5 1.0").replace("0 1 0\n", "0 1 0 255 0 0\n"),  # colours
        SQUARE.replace("\n", "\r\n"),
    ],
)
def test_every_form_of_a_square_is_two_triangles(tmp_path, text):
    path = tmp_path / "square.off"
    path.write_bytes(text.encode())
    vertices, faces = read_off(path)
    assert vertices.tolist() == [[0, 0, 0], [2, 0, 0], [2, 1, 0], [0, 1, 0]]
    assert faces.tolist() == [[0, 1, 2], [0, 2, 3]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no OFF file: it begins with ''"),
        ("ply\nformat ascii 1.0\n", "no OFF file: it begins with 'ply'"),
        ("OFF\n", "broken OFF file: its counts of vertices and faces are missing"),
        ("OFF\nfour 1 0\n", "broken OFF file: its counts of vertices and faces are four 1"),
        ("OFF\n-4 1 0\n", "broken OFF file: its counts of vertices and faces are -4 1"),
        ("OFF\n3 1 0\n0 0\n1 0\n0 1\n3 0 1 2\n", "broken OFF file: cannot reshape"),
        (SQUARE.replace("4 0 1 2 3", "-4 0 1 2 3"), "a face announces -4 corners and has 0"),
        (
            SQUARE.replace("4 1 0", "4 2 0"),
            "truncated: 4 vertices and 2 faces are announced, but only 5 of these 6 lines",
        ),
        ("\n".join(SQUARE.split("\n")[:4]), "truncated: 4 vertices and 1 faces are announced, but only 2 of these 5"),
        (SQUARE.replace("4 0 1 2 3", "4 0 1 2"), "truncated: a face announces 4 corners and has 3"),
        (SQUARE.replace("4 0 1 2 3", "4 0 1 2 4"), "a face names vertex 4, but the 4 vertices count from 0"),
        (SQUARE.replace("2 1 0\n", "2 one 0\n"), "broken OFF file: .*one"),
        (SQUARE.replace("2 1 0\n", "2 nan 0\n"), r"vertex 2 has a coordinate that is not finite: \[2.0, nan, 0.0\]"),
        (SQUARE.replace("4 1 0", "4 0 0"), "a mesh without faces that have an area"),
        (SQUARE.replace("2 1 0", "1 0 0").replace("0 1 0", "0 0 0"), "a mesh without faces that have an area"),
    ],
)
def test_a_broken_mesh_is_refused_in_one_line_that_names_it(tmp_path, text, message):
    path = write(tmp_path / "chair_0001.off", text)
    with pytest.raises(UserError, match=message) as error:
        read_points(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_points_of_a_surface_lie_in_its_triangles_and_as_many_as_their_area_says():
    """Two triangles of areas 3 and 1: shares within four standard deviations, each triangle filled evenly."""
    vertices = np.array([[0, 0, 0], [3, 0, 0], [0, 2, 0], [0, 0, 1], [2, 0, 1], [0, 1, 1]], dtype=float)
    points = sample_surface(
        vertices, np.array([[0, 1, 2], [3, 4, 5]]), 20_000, torch.Generator().manual_seed(0)
    ).double()
    low = points[:, 2] < 0.5
    assert set(points[:, 2].tolist()) == {0.0, 1.0}
    assert abs(low.double().mean() - 0.75) < 4 * (0.75 * 0.25 / 20_000) ** 0.5
    for part, (width, height) in ((points[low], (3, 2)), (points[~low], (2, 1))):
        u, v = part[:, 0] / width, part[:, 1] / height
        assert float((u + v).max()) <= 1 + 1e-6
        assert float(part.min()) >= 0
        for coordinate in (u, v):  # mean 1/3, variance 1/18 in a triangle
            assert abs(coordinate.mean() - 1 / 3) < 4 * (1 / 18 / len(part)) ** 0.5


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".xyz", ".txt"])
def test_files_of_points_give_their_first_three_columns(tmp_path, suffix):
    table = np.arange(72, dtype=np.float32).reshape(12, 6) / 7
    path = tmp_path / f"cloud{suffix}"
    if suffix == ".npy":
        np.save(path, table)
    elif suffix == ".npz":
        np.savez(path, only=table)
    else:
        np.savetxt(path, table, delimiter="," if suffix == ".txt" else " ")
    torch.testing.assert_close(read_points(path), torch.from_numpy(table[:, :3]))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.xyz", "0 0 0\n" * 9, "9 points; at least 10 are needed"),
        ("a.xyz", "0 0 0\n" * 9 + "0 nan 0\n", "point 9 has a coordinate that is not finite"),
        ("a.xyz", "0 0\n" * 12, r"expected numbers of shape \(points, 3 or more\)"),
        ("a.txt", "0 0 0\n" * 12 + "0 0\n", "no table of numbers"),
        ("a.txt", "x y z\n" * 12, "no table of numbers"),
        ("a.npy", "no array", "not a readable .npy file"),
        ("a.npz", "no archive", "not a readable .npz file"),
        ("a.stl", "solid", "no point cloud; known are .off"),
    ],
)
def test_broken_files_of_points_are_refused_by_name(tmp_path, name, text, message):
    path = write(tmp_path / name, text)
    with pytest.raises(UserError, match=message) as error:
        read_points(path)
    assert str(path) in str(error.value)
    with pytest.raises(UserError, match=r"cannot be read|not a readable|no point cloud"):
        read_points(tmp_path / "absent" / name)


def test_an_archive_of_several_arrays_must_name_the_points(tmp_path):
    arrays = {"points": np.ones((12, 3)), "normals": np.zeros((12, 3))}
    np.savez(tmp_path / "good.npz", **arrays)
    assert float(read_points(tmp_path / "good.npz").sum()) == 36
    np.savez(tmp_path / "bad.npz", a=arrays["points"], b=arrays["normals"])
    with pytest.raises(UserError, match=r"bad.npz: no array named 'points' among a, b"):
        read_points(tmp_path / "bad.npz")


def test_prepared_points_are_centred_in_the_unit_cube_and_the_same_every_time():
    cloud = torch.randn(100, 3) * 5 + 7
    x = prepare_points(cloud, 64)
    torch.testing.assert_close(x.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    assert 0.999 < float(x.abs().max()) <= 1
    assert torch.equal(prepare_points(cloud, 64), x)
    torch.testing.assert_close(prepare_points(3 * cloud + 1, 64), x)
    few = prepare_points(cloud[:40], 64)  # filled up with copies: 24 points twice
    assert len(few.T.unique(dim=0)) == 40


@pytest.mark.parametrize("family", FAMILIES)
def test_solids_are_closed_and_turned_outwards(family):
    """Each edge has one face on either side, run in opposite directions; only torus and tube have a hole."""
    outline, corners = FAMILIES[family]
    vertices, faces = turn(outline(Random(0)), circle(corners))
    edges = list(map(tuple, np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).tolist()))
    assert len(set(edges)) == len(edges)
    assert {(b, a) for a, b in edges} == set(edges)
    assert len(vertices) - len(edges) / 2 + len(faces) == (0 if family in ("torus", "tube") else 2)
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    assert (np.cross(a, b) * c).sum() / 6 > 0.5  # the volume, by Gauss


def test_volumes_of_solids_with_flat_faces_are_exact():
    for corners, area in ((4, 2), (3, 3 * 3**0.5 / 4)):
        vertices, faces = turn(FAMILIES["box"][0](Random(0)), circle(corners))
        a, b, c = (vertices[faces[:, i]] for i in range(3))
        assert (np.cross(a, b) * c).sum() / 6 == pytest.approx(2 * area)


def test_a_solid_shows_at_least_what_is_not_hidden_and_repeats():
    vertices, faces = solid("torus", Random(3))
    again = solid("torus", Random(3))
    assert np.array_equal(vertices, again[0])
    assert np.array_equal(faces, again[1])
    counts = [len(solid("torus", Random(seed), noise=0)[1]) for seed in range(20)]
    whole = len(solid("torus", Random(0), hidden=0)[1])
    assert max(counts) <= whole
    assert min(counts) < 0.8 * whole


FACES = [215, 391, 255, 211, 229, 222, 212, 267, 373, 369]
SIZES = [269.8106, 390.1311, 272.9032, 287.9347, 367.2859, 192.3343, 237.9825, 260.3428, 305.4394, 421.2263]


def test_solids_of_a_version_stay_what_they_are():
    """What was drawn when this version began; folders written then are still read."""
    assert VERSION == 1
    drawn = [solid(family, Random(0)) for family in FAMILIES]
    assert [len(faces) for _, faces in drawn] == FACES
    assert [float(np.abs(vertices).sum()) for vertices, _ in drawn] == pytest.approx(SIZES, abs=1e-3)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_solids(folder, 2, 1)
    return folder


def test_solids_are_written_once_and_read_as_modelnet_is(root):
    folder = root / f"solids-v{VERSION}-2-1"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.off")}
    assert len(before) == 30
    generated = load_data("solids", root, points=64, train=2, test=1)
    read = load_data(f"modelnet:{folder}", points=64)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.off")} == before
    assert generated.task.classes == read.task.classes == tuple(FAMILIES)
    for ours, theirs in ((generated.train, read.train), (generated.test, read.test)):
        assert ours.digest() == theirs.digest()
    assert generated.train.labels.tolist() == [i // 2 for i in range(20)]
    assert generated.input_size == (3, 64)
    assert not list(root.glob(".solids*"))  # nothing unfinished is left


def write_hdf5(folder, part, clouds, labels, number=0):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / f"ply_data_{part}{number}.h5", "w") as file:
        file["data"], file["label"] = clouds, labels


def test_hdf5_files_are_read_in_order(tmp_path):
    rng = np.random.default_rng(0)
    clouds = rng.random((7, 50, 3), dtype=np.float32)
    labels = np.arange(7, dtype=np.uint8)[:, None] % 3
    write_hdf5(tmp_path, "train", clouds[:3], labels[:3], 0)
    write_hdf5(tmp_path, "train", clouds[3:5], labels[3:5], 1)
    write_hdf5(tmp_path, "test", clouds[5:], labels[5:])
    (tmp_path / "shape_names.txt").write_text("bed\nchair\ndesk\n")
    data = load_data(f"modelnet:{tmp_path}", points=50)
    assert data.task.classes == ("bed", "chair", "desk")
    assert torch.equal(data.train.clouds, torch.from_numpy(clouds[:5]))
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1]
    assert data.test.labels.tolist() == [2, 0]
    with pytest.raises(UserError, match="points must be an integer from 1 to 50"):
        load_data(f"modelnet:{tmp_path}", points=1024)


@pytest.mark.parametrize("fault", ["label", "finite", "shape", "file", "test"])
def test_broken_hdf5_files_are_refused_by_name(tmp_path, fault):
    clouds = np.zeros((2, 50, 3), dtype=np.float32)
    for part in ("train", "test"):
        write_hdf5(tmp_path, part, clouds, np.array([[0], [1]]))
    path = tmp_path / "ply_data_train0.h5"
    if fault == "label":
        import h5py

        with h5py.File(path, "a") as file:
            del file["label"]
    elif fault == "finite":
        clouds[1, 7, 2] = np.inf
        write_hdf5(tmp_path, "train", clouds, np.array([[0], [1]]))
    elif fault == "shape":
        write_hdf5(tmp_path, "train", clouds, np.array([[0]]))
    elif fault == "file":
        path.write_text("no HDF5")
    else:
        (tmp_path / "ply_data_test0.h5").unlink()
    messages = {
        "label": "ply_data_train0.h5: no label in it; found data",
        "finite": "ply_data_train0.h5: cloud and point 1, 7 has a coordinate that is not finite",
        "shape": r"ply_data_train0.h5: data \(2, 50, 3\) and label \(1, 1\)",
        "file": "ply_data_train0.h5: cannot be read as HDF5",
        "test": r"expected ply_data_test\*.h5; found ply_data_train0.h5",
    }
    with pytest.raises(UserError, match=messages[fault]):
        load_data(f"modelnet:{tmp_path}", points=50)


def test_r11_a_folder_without_clouds_says_what_is_expected(tmp_path):
    with pytest.raises(UserError, match=r"expected CLASS/train/\*.off, .* or ply_data_train\*.h5"):
        load_data(f"modelnet:{tmp_path}")
    for part in ("train", "test"):
        (tmp_path / "bed" / part).mkdir(parents=True)
        write(tmp_path / "bed" / part / "bed_1.off", SQUARE)
    path = write(tmp_path / "bed" / "train" / "bed_2.off", SQUARE.replace("4 1 0", "4 0 0"))
    with pytest.raises(UserError, match=f"{path}: a mesh without faces"):
        load_data(f"modelnet:{tmp_path}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points": 0}, "points must be an integer from 1 to 2048"),
        ({"points": 4096}, "points must be an integer from 1 to 2048"),
        ({"rotate": 200.0}, "rotate must be a number from 0 to 180"),
        ({"scale": -0.1}, "scale must be a number from 0 to 0.9"),
        ({"jitter": float("nan")}, "jitter must be a number"),
        ({"train": 0}, "solids: train must be an integer, at least 1"),
        ({"turn": 3}, "has no argument 'turn'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(root, arguments, message):
    with pytest.raises(UserError, match=message):
        load_data("solids", root, **{"train": 2, "test": 1, **arguments})


def clouds(**changes):
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(6, 60, 3, generator=generator) * torch.tensor([1.0, 2.0, 3.0])
    return PointClouds(points, torch.arange(6), 40, Changes(**changes))


def batches(split, seed=0, epoch=0, order=(0, 1, 2, 3), step=0, workers=0):
    parts = torch.tensor(order).split(2)
    return list(split.training_batches(parts, Augmentation(seed=seed), epoch, step, workers))


def test_training_clouds_follow_from_seed_epoch_and_index_alone():
    """Neither their place in the epoch, nor the step, nor workers, nor any generator outside changes a bit."""
    split = clouds(rotate=180.0, scale=0.2, jitter=0.02)
    first = dict(zip((0, 1, 2, 3), torch.cat([x for x, _ in batches(split)]), strict=True))
    torch.manual_seed(99)
    again = batches(split, order=(3, 1), step=17)
    assert torch.equal(again[0][0], torch.stack([first[3], first[1]]))
    assert again[0][1].tolist() == [3, 1]
    parallel = batches(split, workers=1)
    assert torch.equal(torch.cat([x for x, _ in parallel]), torch.stack(list(first.values())))
    for other in (batches(split, seed=1), batches(split, epoch=1)):
        assert not torch.equal(other[0][0][0], first[0])


def test_reading_clouds_leaves_pythons_generator_alone():
    import random

    random.seed(5)
    before = random.getstate()
    batches(clouds(rotate=180.0, scale=0.2))
    assert random.getstate() == before


def test_changes_do_what_they_say():
    """Turning keeps heights and distances to the axis, scaling keeps shape, jitter moves by no more than it may."""
    plain = clouds()
    base = batches(plain)[0][0]
    assert base.shape == (2, 3, 40)
    torch.testing.assert_close(base.mean(2), torch.zeros(2, 3), atol=1e-6, rtol=0)
    turned = batches(clouds(rotate=180.0))[0][0]
    torch.testing.assert_close(turned[:, 2], base[:, 2])
    torch.testing.assert_close(turned[:, :2].norm(dim=1), base[:, :2].norm(dim=1))
    assert (turned[:, :2] - base[:, :2]).abs().max() > 0.1
    scaled = batches(clouds(scale=0.5))[0][0]
    ratio = (scaled.norm(dim=(1, 2)) / base.norm(dim=(1, 2)))[:, None, None]
    torch.testing.assert_close(scaled, ratio * base)
    assert bool(((ratio > 0.5) & (ratio < 1.5) & ((ratio - 1).abs() > 1e-3)).all())
    moved = (batches(clouds(jitter=0.01))[0][0] - base).abs()
    assert 0.005 < float(moved.max()) <= 0.01 + 1e-6


def test_evaluation_sees_every_cloud_once_as_prepared():
    split = clouds(rotate=180.0, jitter=0.1)
    found = list(split.evaluation_batches(4, workers=0))
    assert [len(labels) for _, labels in found] == [4, 2]
    expected = torch.stack([prepare_points(cloud, 40) for cloud in split.clouds])
    assert torch.equal(torch.cat([x for x, _ in found]), expected)
    assert list(chain.from_iterable(labels.tolist() for _, labels in found)) == list(range(6))


def test_crops_and_flips_are_refused():
    with pytest.raises(UserError, match="are for images: point clouds need 0 and False"):
        clouds().check(Augmentation(flip=True))


def test_r32_a_missing_extra_is_one_line(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch_geometric.transforms", None)
    with pytest.raises(UserError, match=r"point clouds need torch_geometric .*: pip install 'mgic\[points\]'"):
        prepare_points(torch.rand(20, 3), 10)


def test_a_network_trains_on_solids_from_the_command_line_and_resumes_bit_for_bit(root, tmp_path, capsys):
    common = ["train", "--model", "mgic_diffgcn", "--model_args", "{width: 0.25, group_size: 4, coarsest: 8, k: 4}"]
    common += ["--data", "solids", "--root", str(root), "--data_args", "{points: 24, train: 2, test: 1, rotate: 90.0}"]
    common += ["--batch_size", "4", "--optimizer", "adam", "--lr", "0.01", "--epochs", "2"]
    for name in ("a", "b"):
        summary = tmp_path / f"{name}.json"
        assert main([*common, "--out", str(tmp_path / name), "--json_summary", str(summary)]) == 0, (
            capsys.readouterr().err
        )
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    assert 0 <= json.loads((tmp_path / "a.json").read_text())["test_accuracy"] <= 100
    assert main(["train", *common[1:-2], "--epochs", "1", "--out", str(tmp_path / "c"), "--model_args.k", "40"]) == 2
    assert "k=40 nearest neighbours need at least 40 points" in capsys.readouterr().err


def test_extents_and_moments_do_not_tell_the_families_apart():
    """Logistic regression on them, at the size a test can have; the record of the baseline has the whole set."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def numbers(family, seed):
        cloud = sample_surface(*solid(family, Random(seed)), 1024, torch.Generator().manual_seed(seed))
        return extents_and_moments(cloud.double().numpy())

    train, test = (
        np.array([[numbers(f, seed) for seed in seeds] for f in FAMILIES]) for seeds in (range(30), range(30, 45))
    )
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    model.fit(train.reshape(300, -1), np.repeat(np.arange(10), 30))
    accuracy = model.score(test.reshape(150, -1), np.repeat(np.arange(10), 15))
    assert 0.3 < accuracy < 0.6, accuracy  # far above chance: what is left is in the surface


def test_moments_are_those_of_a_known_cloud_and_forget_place_and_size():
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=float)
    numbers = extents_and_moments(corners)
    given = numbers[:21].reshape(7, 3) * 3 ** np.array([0.5, 0.5, 1, 2, 1, 1.5, 2])[:, None]  # corners at distance 1
    expected = [1, -1, 0, 1, 1, 0, 1]  # largest, smallest, xy, x^2 y^2, x^2, x^3, x^4
    np.testing.assert_allclose(given, np.repeat(expected, 3).reshape(7, 3), atol=1e-12)
    cloud = np.random.default_rng(0).random((50, 3)) * [1, 2, 3]
    np.testing.assert_allclose(extents_and_moments(5 * cloud + 7), extents_and_moments(cloud), atol=1e-12)
    turned = extents_and_moments(cloud @ np.linalg.qr(np.random.default_rng(1).random((3, 3)))[0])
    np.testing.assert_allclose(turned[21:], extents_and_moments(cloud)[21:], atol=1e-9)  # principal axes do not care


def test_written_meshes_are_read_back(tmp_path):
    vertices, faces = solid("cone", Random(1))
    write_off(tmp_path / "cone.off", vertices, faces)
    read = read_off(tmp_path / "cone.off")
    np.testing.assert_allclose(read[0], vertices, atol=5.1e-5)
    assert np.array_equal(read[1], faces)
    assert mgic.create_model("diffgcn").eval()(prepare_points(read_points(tmp_path / "cone.off"), 64)[None]).shape == (
        1,
        10,
    )
