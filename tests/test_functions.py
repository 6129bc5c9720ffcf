"""Approximation of functions: points that follow from their number, and networks that differ in the block alone."""

import importlib.util
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import mgic
from mgic import MGICBlock, UserError
from mgic.cli import main
from mgic.counting import count_trainable
from mgic.data import Augmentation, epoch_order, load_data
from mgic.data.functions import uniform
from mgic.models.functions import (
    FunctionNet,
    doubling_widths,
    function_net,
    ghost_function_net,
    inverted_residual,
    mgic_function_net,
    multigrid_block,
)
from mgic.tables import build_figure
from mgic.training import RECIPES, load_run, read_record, train

NETWORKS = (function_net, ghost_function_net, mgic_function_net)


def splitmix64(seed, n):
    """The n-th number of the published generator, in Python's unbounded integers."""
    word = (1 << 64) - 1
    z = (seed + n * 0x9E3779B97F4A7C15) & word
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
    return z ^ (z >> 31)


def everything(split):
    return [torch.cat(parts) for parts in zip(*split.evaluation_batches(1 << 14, 0), strict=True)]


def test_random_numbers_are_those_of_splitmix64():
    assert splitmix64(1234567, 1) == 6457827717110365317  # the published test vector
    rows = torch.tensor([0, 1, 5, 9_999_999])
    for seed in (0, 1234567, (1 << 63) - 1):
        expected = [[(splitmix64(seed, 5 * int(i) + j + 1) >> 40) / 2**24 for j in range(5)] for i in rows]
        assert uniform(rows, 5, seed).tolist() == expected


def test_points_fill_their_box_evenly_and_without_correlation():
    points, values = everything(load_data("cos_sin_family", points=200_000).train)
    low = torch.tensor([0, 0, 0, 1, 10.0])
    high = torch.tensor([2 * math.pi, 2 * math.pi, 1, 2, 20])
    assert ((points >= low) & (points <= high)).all()
    u = (points - low) / (high - low)
    for column in u.T:
        counts = torch.histc(column, 20, 0, 1)
        assert ((counts - len(u) / 20) ** 2 / (len(u) / 20)).sum() < 45  # chi squared, 19 degrees: p < 0.001 above 43.8
    assert (torch.corrcoef(u.T) - torch.eye(5)).abs().max() < 0.012  # 5 / sqrt(190,000)
    x, y, a, b, c = points.double().unbind(1)
    torch.testing.assert_close(values[:, 0].double(), a * (b * x).cos() * (c * y).sin(), atol=2e-5, rtol=0)


def test_the_workshops_function_is_cos_x_sin_20y():
    data = load_data("cos_sin")
    x, y = everything(data.test)
    assert (len(data.train), len(data.test), data.input_size) == (47_500, 2_500, (2,))
    torch.testing.assert_close(y[:, 0], torch.cos(x[:, 0]) * torch.sin(20 * x[:, 1]))
    assert 0 <= x.min() < 1e-3
    assert 1 - 1e-3 < x.max() < 1


def test_folds_test_on_disjoint_parts_of_the_same_points():
    whole = None
    tested = []
    for fold in (0, 1, 7, 19):
        data = load_data("cos_sin", points=990, fold=fold)
        train, test = everything(data.train)[0], everything(data.test)[0]
        assert len(train) + len(test) == 990
        assert len(test) in (49, 50)
        tested.append(test)
        together = torch.cat([train, test])
        together = together[together[:, 0].argsort()]
        whole = together if whole is None else whole
        assert torch.equal(together, whole)  # so no point of the test is one to train on
    assert len(torch.cat(tested).unique(dim=0)) == sum(map(len, tested))


def test_a_batch_is_the_points_of_its_numbers_whatever_else_was_drawn():
    train = load_data("cos_sin_family").train
    assert len(train) == 9_500_000
    order = epoch_order(1000, seed=3, epoch=2)
    batches = list(train.training_batches(order.split(250), Augmentation(seed=5), 2, 70, 0))
    for indices, (x, y) in zip(order.split(250), batches, strict=True):
        alone = [train.at(i[None]) for i in indices[:5]]
        assert torch.equal(x[:5], torch.cat([point for point, _ in alone]))
        assert torch.equal(y[:5], torch.cat([value for _, value in alone]))


def test_a_data_set_is_told_from_another_by_its_function_size_and_fold():
    prints = [
        load_data(name, **given).fingerprint()["digest"]
        for name in ("cos_sin", "cos_sin_family")
        for given in ({}, {"points": 1000}, {"points": 1000, "fold": 3})
    ]
    assert len(set(prints)) == 6
    assert load_data("cos_sin").fingerprint() == load_data("cos_sin").fingerprint()


def test_inputs_are_standardised():
    data = load_data("cos_sin_family", points=200_000)
    x = data.normalizer(torch.device("cpu"))(everything(data.train)[0])
    assert x.mean(0).abs().max() < 0.01
    assert (x.std(0) - 1).abs().max() < 0.01


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"points": 19}, "points must be an integer, at least 20, got 19"),
        ({"points": 1e6}, "got 1000000.0"),
        ({"fold": 20}, "fold must be an integer, 0 to 19, got 20"),
        ({"fold": True}, "got True"),
        ({"folds": 3}, "no argument 'folds'; did you mean fold"),
    ],
)
def test_points_that_cannot_be_drawn_are_refused(given, said):
    with pytest.raises(UserError, match=said):
        load_data("cos_sin", **given)


def test_images_augmentations_are_refused():
    with pytest.raises(UserError, match="points of a function need 0 and False"):
        load_data("cos_sin").train.check(Augmentation(flip=True))


@pytest.mark.parametrize("make", NETWORKS)
def test_a_batch_of_points_is_a_batch_of_images_of_one_pixel(make):
    """In training too, where a batch norm sees the same numbers in another shape."""
    model, x = make(c_max=32).train(), torch.randn(9, 5)
    pixels = model.head(model.stages(model.stem(x[:, :, None, None])))
    torch.testing.assert_close(model(x), pixels[:, :, 0, 0])


@pytest.mark.parametrize("make", NETWORKS)
def test_every_weight_and_every_input_matters(make):
    model, x = make(c_max=64), torch.randn(32, 5, requires_grad=True)
    model(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    assert (x.grad.abs().sum(0) > 0).all()


def test_r16_the_blocks_of_a_multigrid_net_couple_all_channels():
    block = multigrid_block(group_size=8, coarsest=8)(64, 64, 4)
    assert isinstance(block, MGICBlock)
    assert [level.channels for level in block.levels] == [64, 32, 16, 8]
    for parameter in block.parameters():
        if parameter.dim() == 4:
            nn.init.uniform_(parameter, 0.1, 1.0)  # nothing cancels
    assert (block.to_dense() != 0).all()


PARAMS = {
    function_net: [63_985, 252_657, 990_449, 3_907_825, 15_509_745],
    ghost_function_net: [37_377, 142_785, 550_209, 2_151_489, 8_499_777],
    mgic_function_net: [38_161, 90_097, 195_665, 408_497, 835_857],
}
"""For c_max = 64, 128, 256, 512 and 1024."""


def plain_params(c_max):
    """Counted by hand: two 1x1 convolutions, a 1x1 depthwise one and three norms a block."""
    widths = [16, *doubling_widths(c_max)]
    blocks = sum(4 * c * c + 4 * c * d + 4 * c + 2 * (4 * c + 4 * c + d) for c, d in pairwise(widths))
    return (5 * 16 + 2 * 16) + blocks + (c_max * 64 + 2 * 64) + (64 + 1)


@pytest.mark.parametrize("make", NETWORKS)
def test_parameters_grow_fourfold_with_each_doubling_of_c_max_but_twofold_with_multigrid(make):
    counts = []
    with torch.device("meta"):
        for c_max in (64, 128, 256, 512, 1024):
            counts.append(count_trainable(make(c_max)))
    assert counts == PARAMS[make]
    ratios = [b / a for a, b in pairwise(counts)]
    if make is mgic_function_net:
        assert [round(r, 2) for r in ratios] == [2.36, 2.17, 2.09, 2.05]
        steps = [b - a for a, b in pairwise(counts)]
        assert steps[-1] / steps[-2] == pytest.approx(2, abs=0.01)  # linear: a doubling adds twice what the last added
    else:
        assert all(3.8 < r < 4 for r in ratios)
    if make is function_net:
        assert counts == [plain_params(c_max) for c_max in (64, 128, 256, 512, 1024)]


@pytest.mark.parametrize(("alpha", "width"), [(0.6, 96), (0.8, 128), (1.2, 192)])
def test_the_workshops_net_has_two_blocks_of_160_alpha_channels(alpha, width):
    assert round(160 * alpha) == width
    model = function_net(widths=(width, width), expansion=2, in_chans=2)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    shapes = [(c.in_channels, c.out_channels) for c in convs if c.groups == 1]
    inner = [(16, 32), (32, width), (width, 2 * width), (2 * width, width)]
    assert shapes == [(2, 16), *inner, (width, 64), (64, 1)]


def test_networks_are_built_by_name_and_not_by_timm(capsys):
    for name in ("function_net", "ghost_function_net", "mgic_function_net"):
        model = mgic.create_model(name, c_max=32, num_classes=3, in_chans=2)
        assert isinstance(model, FunctionNet)
        assert model(torch.zeros(4, 2)).shape == (4, 3)
        assert name in mgic.list_models("*function*")
        assert "c_max" in model.arguments
    assert main(["cost", "mgic_function_net"]) == 0
    assert "90,097 parameters, 72,624 MACs at 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: mgic.create_model("function_net", width=3), "function_net has no argument 'width'; it has c_max"),
        (lambda: mgic.create_model("function_nets"), "did you mean .*function_net"),
        (lambda: function_net(96), "c_max must be a power of two, at least 32, got 96"),
        (lambda: function_net(16), "got 16"),
        (lambda: FunctionNet(inverted_residual, ()), "at least one block"),
        (lambda: function_net(widths=[32, 0]), r"widths=\[32, 0\]"),
        (lambda: mgic_function_net(expansion=0), "expansion=0"),
    ],
)
def test_networks_that_cannot_be_built_are_refused(call, said):
    with pytest.raises(UserError, match=said):
        call()


@pytest.fixture(scope="module")
def experiment():
    path = Path(__file__).parents[1] / "benchmarks" / "function_approximation.py"
    spec = importlib.util.spec_from_file_location("function_approximation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_experiment_trains_each_network_on_each_fold_once_and_writes_what_the_figure_draws(
    experiment, tmp_path, monkeypatch
):
    words = ["--c-max", "32", "--folds", "2", "--epochs", "1", "--points", "1060"]
    words += ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    experiment.main(words)
    paths = sorted((tmp_path / "results").iterdir())
    first = {path.name: path.read_text() for path in paths}
    monkeypatch.setattr(experiment, "train", None)
    experiment.main(words)  # finished runs are not trained again
    records = [read_record(path) for path in paths]
    assert [record["metrics"] for record in records] == [json.loads(text)["metrics"] for text in first.values()]
    for record in records:
        assert (record["n"], record["seeds"], record["recipe"]["epochs"]) == (2, [0, 1], 1)
        assert record["metrics"]["mse"] == record["metrics"]["test_mse"]
        assert record["data"].endswith("1,007 random points to train on and 53 to test, folds 0, 1")
        assert str(tmp_path) not in json.dumps(record)
        values = record["metrics"]["mse"]["values"]
        assert values[0] != values[1]
    _, (panel,) = build_figure("mgic-4", records)
    with torch.device("meta"):
        params = {make.__name__: count_trainable(make(c_max=32, in_chans=2)) for make in NETWORKS}
    assert {name: points[0][0] for name, points in panel.measured.items()} == {
        "MobileNetV3": params["function_net"],
        "GhostNet": params["ghost_function_net"],
        "MGIC": params["mgic_function_net"],
    }


def test_a_stopped_run_ends_as_one_in_one_piece(tmp_path):
    recipe = replace(RECIPES["functions_small"], model_args={"c_max": 32}, batch_size=64, epochs=2)
    data = load_data("cos_sin", points=600)

    class Stop(Exception):  # noqa: N818
        pass

    def stop(step):
        if step == 11:
            raise Stop

    def build():
        return mgic.create_model(recipe.model, **data.model_arguments(), **recipe.model_args)

    whole = train(recipe, build, data, tmp_path / "whole")
    with pytest.raises(Stop):
        train(recipe, build, data, tmp_path / "parts", on_step=stop)
    parts = train(recipe, build, data, tmp_path / "parts")
    assert (whole.steps, parts.resumed_from) == (16, 8)
    assert parts.metrics == whole.metrics
    assert whole.metrics["test_mse"] > 0
    one, other = (load_run(tmp_path / name).state_dict for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
