"""Whatever a number, a configuration or a file holds: what was asked for, or one of the library's own errors; nothing else.

``make test`` tries the same few examples every time, ``make faults`` many more. Names carry the id of the fault table where
they belong to one of its rows.
"""

import io
import json
import os
import resource
import time
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from tiny import RECIPE, stripes, tiny

import mgic
from mgic import (
    BasicBlock,
    Bottleneck,
    ChannelChange,
    ChannelConfigError,
    MGICBlock,
    PreActBasicBlock,
    PreActBottleneck,
    Scheme,
    UserError,
    additive,
)
from mgic.conversion_report import Conversion, ConversionReport
from mgic.data import load_data
from mgic.data.images import open_image
from mgic.data.masks import read_mask
from mgic.data.points import _hdf5_file, read_points
from mgic.exporting import describe_artefact
from mgic.models import build_model
from mgic.training import Recipe, make_record, read_record, write_record
from mgic.training.folder import RunFolder
from mgic.training.weights import load_run, read_safetensors, save_weights

FULL = os.environ.get("MGIC_FAULTS") == "full"


def fuzz(examples=25, full=300):
    """The same examples every time; of a file a folder is made anew by every test, not by every example."""
    return settings(
        max_examples=full if FULL else examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@contextmanager
def survived(*errors, seconds=10, megabytes=200):
    """Only these errors, each of one line, in bounded time and memory."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu = time.process_time()
    try:
        yield
    except errors as error:
        assert "\n" not in str(error)  # noqa: PT017 - most cases do not raise
    assert time.process_time() - cpu < seconds, time.monotonic() - began
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < megabytes * 1024


# Numbers

widths = st.integers(1, 70) | st.sampled_from([96, 127, 128])


@fuzz(examples=40)
@given(
    block=st.sampled_from([BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck]),
    channels=widths,
    group_size=widths,
    coarsest=widths,
    hidden=st.none() | widths,
    cycle=st.sampled_from([mgic.multiplicative, additive]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
@example(Bottleneck, 4, 1, 1, None, mgic.multiplicative, (1, 1))
def test_r14_blocks_of_any_numbers_keep_the_shape(block, channels, group_size, coarsest, hidden, cycle, size):
    try:
        module = MGICBlock(block, channels, group_size, coarsest, hidden, scheme=Scheme(cycle=cycle)).eval()
    except ChannelConfigError:
        return
    with torch.no_grad():
        y = module(torch.randn(2, channels, *size))
    assert y.shape == (2, channels, *size)
    assert y.isfinite().all()


@fuzz(examples=40)
@given(st.integers(-2, 40), st.integers(-2, 40), st.integers(-1, 4), st.integers(-1, 6), st.none() | st.integers(-1, 9))
def test_r14_changes_of_width_of_any_numbers_are_built_or_refused(before, after, stride, kernel, groups):
    try:
        module = ChannelChange(before, after, stride, kernel, groups).eval()
    except ChannelConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017 - many do not raise
        return
    with torch.no_grad():
        y = module(torch.randn(1, before, 7, 5))
    assert y.shape == (1, after, -(-7 // stride), -(-5 // stride))


# Configurations

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just([]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=6,
)


def mostly(known):
    """Dictionaries of mostly known keys and any values."""
    return st.dictionaries(st.sampled_from(sorted(known)) | st.text(max_size=6), plain, max_size=5)


@fuzz(examples=60, full=2000)
@given(mostly(RECIPE.to_dict()))
def test_recipes_of_any_values_are_recipes_or_errors(values):
    with survived(UserError):
        recipe = Recipe.from_dict(values)
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@fuzz(full=1000)
@given(st.data())
def test_yaml_of_any_text_is_a_recipe_or_an_error(data):
    text = data.draw(
        st.text(max_size=60) | st.builds(bytes.decode, mutated(RECIPE.to_yaml().encode()), st.just("latin-1"))
    )
    with survived(UserError):
        Recipe.from_yaml(text)


@fuzz(examples=40, full=1000)
@given(mostly(["group_size", "coarsest", "blocks", "linear", "layers"]))
@example({"layers": [{"name": "head.fc", "action": "linear", "group_size": 4, "coarsest": 8, "widths": [8]}]})
def test_conversions_of_any_values_are_built_or_errors(values):
    with survived(UserError):
        Conversion.from_dict(values)
    with survived(UserError), torch.device("meta"):
        build_model("resnet20", {"depth": 8, "conversion": values})


@fuzz(examples=30, full=500)
@given(st.sampled_from(["mgic_resnet20", "mgiad20", "mgic_unet", "mgic_diffgcn", "mgic_function_net"]), st.data())
def test_networks_of_any_arguments_are_built_or_errors(name, data):
    known = ["group_size", "coarsest", "width", "depth", "num_classes", "in_chans", "k", "pre", "channels", "c_max"]
    small = st.integers(-1, 40) | st.booleans() | st.floats(-1, 2) | st.text(max_size=3) | st.none()
    arguments = data.draw(st.dictionaries(st.sampled_from(known), small, max_size=3))
    with survived(UserError, seconds=30), torch.device("meta"):
        build_model(name, arguments)


# Files


def mutated(whole):
    """Bytes cut short, changed in places, or with others put in."""
    places = st.lists(st.tuples(st.integers(0, max(len(whole) - 1, 0)), st.integers(0, 255)), min_size=1, max_size=6)

    def change(where):
        damaged = bytearray(whole)
        for place, value in where:
            damaged[place] = value
        return bytes(damaged)

    head = st.lists(st.tuples(st.integers(0, min(len(whole), 200) - 1), st.integers(0, 255)), min_size=1, max_size=6)
    inserted = st.tuples(st.integers(0, len(whole)), st.binary(max_size=9))
    return (
        st.integers(0, len(whole) - 1).map(lambda end: whole[:end])
        | places.map(change)
        | head.map(change)
        | inserted.map(lambda found: whole[: found[0]] + found[1] + whole[found[0] :])
    )


@cache
def honest():
    """A small file of every kind, by name."""
    dice = np.random.default_rng(0)
    pixels, points = dice.integers(0, 256, (12, 12, 3), dtype=np.uint8), dice.random((20, 3))
    files = {}
    for suffix, save_as in (("png", "PNG"), ("jpg", "JPEG"), ("tif", "TIFF"), ("webp", "WEBP"), ("bmp", "BMP")):
        files[f"a.{suffix}"] = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        options = {"exif": exif} if suffix in ("jpg", "png") else {}
        Image.fromarray(pixels).save(files[f"a.{suffix}"], format=save_as, **options)
    files["mask.png"] = io.BytesIO()
    Image.fromarray(pixels[..., 0] % 3).save(files["mask.png"], format="PNG")
    files["a.npy"], files["a.npz"], files["set.npz"] = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(files["a.npy"], points)
    np.savez_compressed(files["a.npz"], points=points)
    images, labels = pixels[None].repeat(4, 0), np.arange(4) % 2
    np.savez(files["set.npz"], x_train=images, y_train=labels, x_test=images, y_test=labels)
    mesh = "OFF\n4 4 0\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 1 2\n3 0 1 3\n3 0 2 3\n3 1 2 3\n"
    text = "\n".join(" ".join(map(str, row)) for row in points.round(3).tolist())
    files |= {"a.off": io.BytesIO(mesh.encode()), "a.xyz": io.BytesIO(text.encode())}
    files["a.safetensors"] = io.BytesIO(save({"w": torch.ones(3, 4), "n": torch.tensor(7)}))
    return {name: file.getvalue() for name, file in files.items()}


READERS = {
    **dict.fromkeys(["a.png", "a.jpg", "a.tif", "a.webp", "a.bmp"], open_image),
    "mask.png": lambda path: read_mask(path, 3, range(256)),
    **dict.fromkeys(["a.npy", "a.npz", "a.off", "a.xyz"], read_points),
    "set.npz": lambda path: load_data(str(path)),
    "a.safetensors": read_safetensors,
}


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused_by_name(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(honest()[name])
    READERS[name](path)

    @fuzz(full=1000)
    @given(mutated(honest()[name]))
    def damaged(contents):
        path.write_bytes(contents)
        with survived(UserError):
            try:
                READERS[name](path)
            except UserError as error:
                assert name in str(error)  # noqa: PT017 - some are read
                raise

    damaged()


def hdf5(path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file["data"], file["label"] = np.zeros((3, 16, 3), np.float32), np.arange(3)[:, None]
    return path.read_bytes()


def test_damaged_hdf5_files_are_read_or_refused_by_name(tmp_path):
    path = tmp_path / "a.h5"
    whole = hdf5(path)

    @fuzz(full=500)
    @given(mutated(whole))
    def damaged(contents):
        path.write_bytes(contents)
        with survived(UserError):
            _hdf5_file(path)

    damaged()


@pytest.mark.parametrize("suffix", ["npy", "npz", "h5", "safetensors", "off"])
def test_sizes_that_a_file_announces_and_does_not_have_cost_no_memory(suffix, tmp_path):
    """Terabytes announced in a hundred bytes."""
    path = tmp_path / f"a.{suffix}"
    if suffix in ("npy", "npz"):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**11, 3)})
        path.write_bytes(header.getvalue() + bytes(64))
        if suffix == "npz":
            import zipfile

            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("points.npy", header.getvalue() + bytes(64))
    elif suffix == "h5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            file.create_dataset("data", (10**6, 2048, 3), "f4", chunks=(1, 2048, 3))  # nothing is stored: all zeros
            file.create_dataset("label", (10**6,), "i8", chunks=(1000,))
    elif suffix == "safetensors":
        header = b'{"w":{"dtype":"F64","shape":[1000000000000],"data_offsets":[0,8000000000000]}}'
        path.write_bytes(len(header).to_bytes(8, "little") + header)
    else:
        path.write_text("OFF\n100000000000 100000000000 0\n0 0 0\n")
    read = {"h5": _hdf5_file, "safetensors": read_safetensors}.get(suffix, read_points)
    with survived(UserError), pytest.raises(UserError, match=rf"a\.{suffix}"):
        read(path)


def written(kind, folder):
    """A JSON file of each kind, and what reads it."""
    path = folder / f"{kind}.json"
    if kind == "record":
        write_record(path, make_record("mgic", "digits", [0], {"accuracy": [1.0]}))
        return path, read_record
    if kind == "report":
        model = mgic.create_model("resnet20", depth=8)
        path.write_text(mgic.convert(model, Conversion(4, 8))[1].to_json())
        return path, lambda path: ConversionReport.from_json(path.read_text(encoding="utf-8", errors="replace"))
    (folder / "net.onnx").write_bytes(b"x")
    path = folder / "net.onnx.json"
    names = mgic.exporting.Artefact.__dataclass_fields__
    path.write_text(json.dumps({**dict.fromkeys(names, 1), "schema": 1, "sha256": {"net.onnx": "0"}}))
    return path, lambda path: describe_artefact(path.with_suffix(""))


@pytest.mark.parametrize("kind", ["record", "report", "artefact"])
def test_damaged_json_is_read_or_refused(kind, tmp_path):
    path, read = written(kind, tmp_path)
    whole = path.read_bytes()

    @fuzz(full=1000)
    @given(mutated(whole))
    def damaged(contents):
        path.write_bytes(contents)
        with survived(UserError):
            read(path)

    @fuzz(full=1000)
    @given(mostly(json.loads(whole)))
    def changed(values):
        path.write_text(json.dumps({**json.loads(whole), **values}))
        with survived(UserError):
            read(path)

    damaged()
    changed()


def test_damaged_run_folders_are_read_or_refused(tmp_path):
    """Any of the text files of a run: recipe, data, sources."""
    folder = tmp_path / "run"
    with RunFolder(folder, RECIPE, stripes().fingerprint()) as run:
        run.write_status("finished")
    save_weights(folder / "model.safetensors", tiny())
    load_run(folder)
    wholes = {
        name: (folder / name).read_bytes() for name in ("recipe.yaml", "data.json", "sources.json", "status.json")
    }

    @fuzz(full=500)
    @given(st.sampled_from(sorted(wholes)), st.data())
    def damaged(name, data):
        (folder / name).write_bytes(data.draw(mutated(wholes[name])))
        try:
            with survived(UserError):
                load_run(folder)
            with survived(UserError), RunFolder(folder, RECIPE, stripes().fingerprint()):
                pass
        finally:
            for one, whole in wholes.items():
                (folder / one).write_bytes(whole)

    damaged()
    assert yaml.safe_load(wholes["recipe.yaml"])
