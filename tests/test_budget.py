"""Budgets: what is chosen is within the target, the best within it, and what was predicted."""

import itertools
import json
import math

import pytest
import torch
import torchvision
from torch import nn

from mgic.conversion import COARSEST, GROUP_SIZES, choose, convert, convert_, time_in_path
from mgic.conversion_report import Conversion, ConversionReport
from mgic.counting import cost
from mgic.errors import UserError

SIZE = (3, 64, 64)


@pytest.fixture(autouse=True)
def few_settings(monkeypatch):
    monkeypatch.setattr("mgic.conversion.GROUP_SIZES", (32, 8))
    monkeypatch.setattr("mgic.conversion.COARSEST", (64, 16))


@pytest.mark.parametrize("unit", ["params", "macs"])
@pytest.mark.parametrize("share", [0.7, 0.35])
def test_a_budget_is_met_and_used(unit, share):
    model = torchvision.models.resnet18()
    before = getattr(cost(model, SIZE), unit)
    converted, report = convert(model, input_size=SIZE, **{f"target_{unit}": share * before})
    after = getattr(cost(converted, SIZE), unit)
    assert after == getattr(report.after, unit) == report.budget["predicted"] == report.budget["measured"]
    assert 0.5 * share * before < after <= share * before, "four settings and few stages leave gaps"
    assert report.budget["unit"] == unit
    assert sum(choice["before"] for choice in report.budget["choices"]) <= before


def test_the_choice_is_the_best_of_all():
    """Against trying every combination: the largest sum of (share of the cost) log(remaining part)."""
    generator = torch.Generator().manual_seed(0)
    stages = ["a", "b", "c", "d"]
    dense = dict(zip(stages, (100.0, 300.0, 50.0, 200.0), strict=True))
    settings = [Conversion(g, c) for g in GROUP_SIZES[:2] for c in COARSEST[:3]]
    options = {None: dense}
    for setting in settings:
        options[setting] = {s: dense[s] * (0.1 + 0.9 * float(torch.rand((), generator=generator))) for s in stages}
    total = sum(dense.values())

    def score(combination):
        kept = zip(stages, combination, strict=True)
        return sum(dense[s] / total * math.log(options[o][s] / dense[s]) for s, o in kept)

    for target in (300.0, 400.0, 600.0):
        possible = [
            c
            for c in itertools.product(options, repeat=4)
            if sum(options[o][s] for s, o in zip(stages, c, strict=True)) <= target
        ]
        best = max(possible, key=score)
        chosen = choose(options, 0.0, target, "target")
        found = tuple(Conversion(c.group_size, c.coarsest) if c.group_size else None for c in chosen)
        assert score(found) == pytest.approx(score(best), abs=1e-3)


class Slow:
    """A clock that makes milliseconds of multiply-adds, with an overhead that no layer alone shows."""

    def __init__(self):
        self.calls = 0

    def __call__(self, module, x):
        self.calls += 1
        macs = cost(module, tuple(x.shape[1:])).macs
        layers = sum(isinstance(m, nn.Conv2d) for m in module.modules())
        return macs / 1e6 + (0.05 * layers if layers > 8 else 0.0)


def test_a_time_budget_is_met_by_measuring_and_correcting():
    model = torchvision.models.resnet18()
    clock = Slow()
    dense = clock(model, torch.empty(1, *SIZE))
    clock.calls = 0
    converted, report = convert(model, input_size=SIZE, target_ms=0.5 * dense, time=clock)
    assert clock.calls == len(report.budget["layers"]) + 1 + len(report.budget["tried"]), "each kind of layer once"
    budget = report.budget
    measured = clock(converted, torch.empty(1, *SIZE))
    assert budget["measured"] == pytest.approx(measured)
    assert abs(measured - 0.5 * dense) < 0.1 * 0.5 * dense
    assert budget["before"] == pytest.approx(dense)
    assert {"layer", "group_size", "coarsest", "ms", "path"} == set(budget["layers"][0])
    assert {entry["path"] for entry in budget["layers"]} == {"given"}
    assert min(abs(t["measured"] - 0.5 * dense) for t in budget["tried"]) == abs(budget["measured"] - 0.5 * dense)


def test_a_layer_that_its_path_cannot_run_is_timed_in_eager_and_said_to_be(monkeypatch):
    assert time_in_path("engine", 1, nn.Linear(4, 4), torch.randn(1, 4))[1] == "eager", "the engine takes images alone"
    clock = Slow()

    def engine_of_big_layers(path, threads, module, x):
        return clock(module, x), "eager" if isinstance(module, nn.Conv2d) and module.in_channels == 3 else path

    monkeypatch.setattr(
        "mgic.conversion._fastest", lambda model, *_: ("engine", *2 * (clock(model, torch.empty(1, *SIZE)),))
    )
    monkeypatch.setattr("mgic.conversion.time_in_path", engine_of_big_layers)
    model = torchvision.models.resnet18()
    with pytest.warns(UserWarning, match="timed in eager PyTorch, since engine does not run them: conv1$"):
        report = convert_(model, input_size=SIZE, target_ms=0.5 * clock(model, torch.empty(1, *SIZE)), dry_run=True)
    timed = {entry["layer"]: entry["path"] for entry in report.budget["layers"]}
    assert timed.pop("conv1") == "eager"
    assert set(timed.values()) == {"engine"}
    assert ConversionReport.from_json(report.to_json()) == report
    old = json.loads(report.to_json())
    for entry in old["budget"]["layers"]:
        del entry["path"]
    assert "path" not in ConversionReport.from_json(json.dumps(old)).budget["layers"][0]


def test_a_target_above_the_cost_replaces_nothing():
    model = torchvision.models.resnet18()
    with pytest.warns(UserWarning, match="nothing was replaced"):
        report = convert_(model, input_size=SIZE, target_params=10**9)
    assert not any(row.replaced for row in report.rows)


class Reads(nn.Module):
    """A wide convolution that cannot be replaced, because its weight is read."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(128, 128, 1), nn.Linear(128, 2)

    def forward(self, x):
        return self.head((self.conv(x) * self.conv.weight.mean()).mean((2, 3)))


def test_a_budget_that_layers_stand_in_the_way_of_is_refused_and_nothing_changes():
    model = Reads()
    with pytest.raises(UserError, match="target_params=12,000 cannot be met: conv cannot be replaced"):
        convert_(model, input_size=(128, 4, 4), target_params=12_000)
    assert type(model.conv) is nn.Conv2d


def test_times_are_of_float32_networks():
    with pytest.raises(UserError, match=r"float32 networks on the CPU, this one is torch\.float64"):
        convert_(torchvision.models.resnet18().double(), input_size=SIZE, target_ms=1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_macs": 10}, "target_macs=10 cannot be met: groups of 8 and a coarsest width of 16 leave"),
        ({"target_macs": -1}, "target_macs must be a positive number, got -1"),
        ({"target_ms": float("nan")}, "target_ms must be a positive number, got nan"),
        ({"target_macs": 10, "target_params": 10}, "give one of target_params, target_macs and target_ms, got 2"),
    ],
)
def test_wrong_targets_are_one_clear_line(options, words):
    model = torchvision.models.resnet18()
    with pytest.raises(UserError, match=words):
        convert_(model, input_size=SIZE, **options)
    assert type(model.layer2[1]).__name__ == "BasicBlock"
