import json

import pytest
import torch
from torch import nn

import mgic
from mgic.cli import main
from mgic.counting import breakdown
from mgic.scaling import dense_twin, explain, fit_exponent, scaling

LINEAR = {"group_size": 8, "coarsest": 16}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mgic_resnet20", (3, 32, 32)),
        ("mgic_resnet56", (3, 32, 32)),
        ("mgic_resnet18", (3, 64, 64)),
        ("mgic_resnet50", (3, 64, 64)),
    ],
)
def test_networks_grow_linearly_over_widths_1_to_8_and_their_dense_twins_quadratically(name, size):
    """The claim of the papers, on whole networks: stem, changes of width and head included; s_g = 8, s_c = 16."""
    rows = scaling(name, LINEAR, [1, 2, 4, 8], size)
    for count in ("params", "macs"):
        assert fit_exponent([(row.width, getattr(row, count)) for row in rows]) <= 1.10
        assert fit_exponent([(row.width, getattr(row, f"dense_{count}")) for row in rows]) >= 1.9


@pytest.mark.parametrize("name", [name for name in mgic.list_models("mg*") if not name.startswith("mgnet")])
def test_a_dense_twin_has_no_level_but_one(name):
    with torch.device("meta"):
        twin = dense_twin(name, {})
    levels = [m.levels for m in twin.modules() if isinstance(getattr(m, "levels", None), list)]
    assert all(len(plan) == 1 and plan[0].groups == 1 for plan in levels)


def test_the_dense_twin_of_a_resnet_has_the_blocks_of_the_plain_one():
    """It differs by the grouped changes of width before stages 2 and 3 alone."""
    twin, plain = dense_twin("mgic_resnet20", {}), mgic.create_model("resnet20")
    assert [p.shape for p in twin.stages[0].parameters()] == [p.shape for p in plain.stages[0].parameters()]


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("mgic_mobilenetv3_100", {}, "the dense twin itself grows with the power"),
        ("mgic_resnet20", {"group_size": 32, "coarsest": 64}, "the coarsest, dense grids grow from 32 to 64 channels"),
    ],
)
def test_networks_that_grow_faster_say_why(name, overrides, words):
    rows = scaling(name, overrides, [1, 8], (3, 32, 32))
    assert fit_exponent([(row.width, row.params) for row in rows]) > 1.10
    assert words in explain(rows)


def test_the_command_fits_draws_and_refuses(tmp_path, capsys):
    plot = tmp_path / "p.png"
    words = ["cost", "mgic_resnet20", "--scaling", "--widths=[1,2]", f"--plot={plot}", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["width"] for row in found["rows"]] == [1, 2]
    assert found["rows"][0]["params"] == 102_010
    assert plot.read_bytes().startswith(b"\x89PNG")
    for words, said in (
        (["cost", "resnet50", "--scaling"], "no argument 'width'"),
        (["cost", "mgnet20", "--scaling"], "no channel hierarchy"),
        (
            ["cost", "mgic_resnet20", "--scaling", "--widths=[1]"],
            "two or more different, positive multipliers, got [1.0]",
        ),
        (["cost", "mgic_resnet20", f"--plot={plot}"], "give both"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mgic_resnet20", "mgiad20", "mgic_mobilenetv3_060", "mg_resnet_cifar"])
def test_parts_add_up_to_the_network(name):
    model = mgic.create_model(name)
    size = model.pretrained_cfg["input_size"]
    parts, counted, held = breakdown(model, size), mgic.cost(model, size), mgic.memory(model, size)
    whole = [part for part in parts if part.level is None]
    assert sum(part.params for part in whole) == counted.params
    assert sum(part.macs for part in whole) == counted.macs
    assert max(part.inference for part in whole) == held.inference
    assert sum(part.saved for part in whole) <= held.saved


def test_levels_add_up_to_their_stage():
    """A stage of multigrid blocks alone: levels hold all its parameters and multiply-adds."""
    parts = breakdown(mgic.create_model("mgic_resnet20"), (3, 32, 32))
    stage = next(part for part in parts if part.name == "stages.0" and part.level is None)
    levels = [part for part in parts if part.name == "stages.0" and part.level is not None]
    assert [(part.channels, part.group_size, part.blocks) for part in levels] == [(16, 8, 3), (8, 8, 3)]
    assert sum(part.params for part in levels) == stage.params
    assert sum(part.macs for part in levels) == stage.macs


def test_shared_operators_are_counted_where_they_are_called_and_weighed_once():
    layer = nn.Conv2d(4, 4, 1, bias=False)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    assert [(part.name, part.params, part.macs) for part in breakdown(net, (4, 2, 2))] == [("0", 16, 128), ("1", 0, 0)]


def test_a_network_of_billions_of_weights_is_counted_without_memory():
    with torch.device("meta"):
        model = mgic.create_model("mgic_resnet50", width=32)
    assert mgic.cost(model, (3, 64, 64)).params > 3e8


def test_tied_weights_weigh_once_and_memory_takes_any_output():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.b.weight = self.a.weight
            self.both = nn.Sequential(self.a, self.b)

        def forward(self, x):
            return {"out": self.both(x), "aux": [x]}

    assert mgic.memory(Tied(), (8,)).training > 0
    assert next(part.params for part in breakdown(Tied(), (8,)) if part.name == "both") == 64
