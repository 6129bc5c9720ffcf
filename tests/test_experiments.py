"""The experiments: grids that can be trained, claims that name what is there, statistics against SciPy's, and the verb."""

import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from mgic import UserError, cli_experiment
from mgic.cli import main
from mgic.experiments import (
    EXPERIMENTS,
    Claim,
    Difference,
    Experiment,
    Outcome,
    difference,
    file_name,
    findings,
    read_outcomes,
)
from mgic.models import build_model
from mgic.plots import plot_outcomes
from mgic.reporting import experiments_markdown
from mgic.tables import matching_records
from mgic.training import RECIPES, read_record
from mgic.training.records import origins, origins_of, runs_of, training_metrics

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_variant_is_a_network_and_every_claim_is_about_variants(name):
    experiment = EXPERIMENTS[name]
    assert len({file_name(variant) for variant in experiment.variants}) == len(experiment.variants)
    for variant in experiment.variants:
        recipe = experiment.recipe(variant)
        assert recipe.epochs >= 10
        assert recipe.data_args["train_images"] >= 20_000
        with torch.device("meta"):
            build_model(recipe.model, {"num_classes": 10, **recipe.model_args})
    assert len(experiment.seeds) >= 3
    families = {variant.partition(":")[0] for variant in experiment.variants}
    for claim in experiment.claims:
        assert {claim.better, claim.other} <= (families if claim.cost else experiment.variants.keys())


def test_no_variant_is_called_twice_what_it_is_not():
    """Variants of one recipe in one experiment would be one run under two names."""
    for experiment in EXPERIMENTS.values():
        recipes = [experiment.recipe(variant).to_yaml() for variant in experiment.variants]
        assert len(set(recipes)) == len(recipes)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_intervals_are_those_of_the_paired_t_test(n):
    rng = np.random.default_rng(n)
    ours, theirs = rng.normal(90.5, 0.4, n), rng.normal(90, 0.4, n)
    found = difference(ours.tolist(), theirs.tolist())
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high, found.n) == (pytest.approx(expected.low), pytest.approx(expected.high), n)
    assert found.mean == pytest.approx((ours - theirs).mean())


def test_verdicts():
    assert Difference(1.0, 0.2, 1.8, 3).verdict() == "holds"
    assert Difference(1.0, -0.2, 2.2, 3).verdict() == "undecided"
    assert Difference(1.0, -0.2, 2.2, 3).verdict(margin=0.5) == "holds"
    assert Difference(-1.0, -1.8, -0.2, 3).verdict() == "does not hold"
    assert Difference(-1.0, -1.8, -0.2, 3).verdict(margin=0.5) == "undecided"
    assert difference([91.0], [90.0]).verdict() == "undecided", "one run is an anecdote"
    with pytest.raises(ValueError, match="no pair"):
        difference([], [])


def outcome(values, seeds=(0, 1, 2), **costs):
    metrics = {
        "test_accuracy": {"mean": fmean(values), "std": 0.5, "values": list(values)},
        "train_accuracy": {"values": [v + 5 for v in values]},
        "params": {"values": [costs.get("params", 1)] * len(values)},
    }
    facts = {"data": "made up", "machine": {"cpu": "a CPU"}, "commit": {"id": "0" * 40}}
    return Outcome({"metrics": metrics, "seeds": list(seeds), "n": len(values), **facts}, costs)


@pytest.fixture
def grid(monkeypatch):
    """An experiment of two networks, and of two families, on scikit-learn's digits."""
    claims = (
        Claim("ours is better", "nobody", "ours: 1", "theirs: 1"),
        Claim("ours overfits less", "nobody", "ours: 1", "theirs: 1", "gap"),
        Claim("ours is better at equal cost", "nobody", "ours", "theirs", cost="macs"),
    )
    base = replace(RECIPES["digits"], epochs=1, model="resnet20")
    variants = {
        "ours: 1": {"model": "mgic_resnet20", "model_args": {"width": 0.25, "group_size": 2, "coarsest": 4}},
        "theirs: 1": {"model_args": {"width": 0.25}},
        "theirs: 2": {"model_args": {"width": 0.125}},
    }
    experiment = Experiment("Which?", base, variants, claims, (0, 1))
    monkeypatch.setitem(EXPERIMENTS, "grid", experiment)
    return experiment


def test_pairs_are_of_the_same_seed_and_a_missing_run_is_no_pair(grid):
    outcomes = {"ours: 1": outcome([91, 94, 92], (0, 2, 1)), "theirs: 1": outcome([90, 91], (0, 1))}
    side, gap, cost = findings("grid", outcomes)
    assert (side.difference.mean, side.difference.n) == (1, 2)  # 91 - 90 and 92 - 91
    assert gap.difference.mean == 0
    assert cost.verdict == "not run"
    assert findings("grid", {})[0].verdict == "not run"


def test_one_pair_has_no_interval_and_is_json_all_the_same(grid, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "mgic.experiments.read_outcomes",
        lambda name, folder: {"ours: 1": outcome([91], (0,)), "theirs: 1": outcome([90], (0,))},
    )
    assert main(["experiment", "grid", "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["grid"]["claims"][0]
    assert (found["difference"]["low"], found["verdict"]) == (None, "undecided")


def test_an_experiment_on_a_part_of_the_images_is_no_result_of_a_papers_row():
    record = {"recipe": {"model": "mgiad20", "model_args": {"coarsest": 16, "group_size": 8}, "data": "fashion_mnist"}}
    overrides = {"coarsest": 16, "group_size": 8, "in_chans": 1}
    whole = {"recipe": {**record["recipe"], "data_args": {}}}
    part = {"recipe": {**record["recipe"], "data_args": {"train_images": 20_000}}}
    assert list(matching_records("mgiad20", overrides, "FashionMNIST", [whole, part])) == [whole]


def test_at_equal_cost_the_other_family_is_read_off_the_line_between_its_variants(grid):
    outcomes = {
        "ours: 1": outcome([92, 93], (0, 1), macs=200),
        "theirs: 1": outcome([90, 90], (0, 1), macs=100),
        "theirs: 2": outcome([94, 92], (0, 1), macs=400),
    }
    found = findings("grid", outcomes)[2]
    # 200 is half way between 100 and 400 in logarithms: 92 and 91 there
    assert found.difference.mean == pytest.approx(((92 - 92) + (93 - 91)) / 2)
    assert "1 of 1 widths" in found.note
    outside = {**outcomes, "ours: 1": outcome([92, 93], (0, 1), macs=50)}
    assert findings("grid", outside)[2].verdict == "no common cost"


def test_the_verb_trains_what_is_missing_and_shows_what_came_of_it(grid, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["experiment", "grid", "--out", "runs", "--accelerator", "cpu"]
    assert main([*words, "--only", '["ours: 1"]', "--seeds", "[0]"]) == 0
    assert "1 of 6 runs recorded" in capsys.readouterr().out
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.err.count(": recorded") == 1
    assert "6 of 6 runs recorded" in said.out
    record = read_record(Path("results/experiments/grid") / file_name("ours: 1"))
    assert (record["seeds"], record["recipe"]["model"]) == ([0, 1], "mgic_resnet20")
    assert "runs" not in record["command"].replace("--out=RUN", "")
    assert main(["experiment", "grid", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["grid"]
    assert [claim["verdict"] for claim in shown["claims"]][2] == "not run", "nothing was timed or counted"
    assert shown["variants"]["ours: 1"]["n"] == 2
    page = experiments_markdown({"grid": read_outcomes("grid", Path("results/experiments/grid"))})
    assert re.search(r"\| ours: 1 \| [\d,]+ \|", page)
    assert "\n## In short\n" in page
    assert re.search(r"\| grid \| ours is better \| (undecided|holds|does not hold) \| [+-]", page)
    assert main([*words, "--seeds", "[1]"]) == 0
    assert read_record(Path("results/experiments/grid") / file_name("ours: 1"))["seeds"] == [0, 1]
    monkeypatch.setitem(EXPERIMENTS, "grid", replace(grid, base=replace(grid.base, lr=0.5)))
    with pytest.raises(UserError, match=r"ours-1\.json: lr is 0.1, but 'ours: 1' has 0.5"):
        read_outcomes("grid", Path("results/experiments/grid"))


@pytest.fixture
def shared(grid, monkeypatch):
    """Another experiment with a variant of the grid, and one of the same name but another recipe."""
    experiment = replace(grid, variants={"same": grid.variants["ours: 1"], "theirs: 1": {"lr": 0.2}}, claims=())
    monkeypatch.setitem(EXPERIMENTS, "shared", experiment)


def run(name, out, only, seeds="[0]"):
    return main(["experiment", name, "--out", out, "--only", only, "--seeds", seeds, "--accelerator", "cpu"])


def test_what_is_recorded_is_not_trained_again_also_where_its_runs_are_not(shared, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("grid", "here", '["ours: 1"]') == 0
    record = Path("results/experiments/grid") / file_name("ours: 1")
    before = record.read_bytes()
    capsys.readouterr()
    assert run("grid", "there", '["ours: 1"]') == 0
    assert "ours: 1, seed 0: recorded" in capsys.readouterr().err
    assert run("shared", "there", "[same]") == 0
    assert record.read_bytes() == before, "nothing new"
    same = Path("results/experiments/shared/same.json")
    one, other = read_record(record), read_record(same)
    assert {**one, "command": ""} == {**other, "command": ""}, "one run, two experiments"
    assert not Path("there").exists()
    assert run("shared", "there", '["theirs: 1"]') == 0
    assert len(list(Path("there").iterdir())) == 1, "of the same name, but another recipe"


def test_runs_of_several_origins_make_one_record_that_states_each(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("shared", "here", "[same]") == 0
    monkeypatch.setattr("mgic.training.records.commit", lambda: {"id": "1" * 40, "dirty": False})
    same = Path("results/experiments/shared/same.json")
    first = read_record(same)
    assert run("shared", "there", "[same]", "[2, 0]") == 0
    assert sorted(p.name for p in Path("there").glob("*/*")) == ["seed-2"]
    found = read_record(same)
    assert found["seeds"] == [0, 2]
    assert found["metrics"]["test_accuracy"]["values"][0] == first["metrics"]["test_accuracy"]["mean"]
    assert [o["commit"]["id"] for o in origins(found)] == [first["commit"]["id"], "1" * 40]
    assert found["notes"][-1] == "seed 2 was finished with another commit: see origins"
    assert {**found, **origins_of(runs_of(found, same))} == found
    assert training_metrics(runs_of(found, same)) == {k: m["values"] for k, m in found["metrics"].items()}
    for commit in (first["commit"]["id"], "1" * 40):
        assert commit[:9] in experiments_markdown({"shared": read_outcomes("shared", same.parent)})


def test_records_of_other_data_or_of_no_training_are_refused_and_those_of_other_experiments_left(
    shared, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert run("shared", "here", "[same]") == 0
    same = Path("results/experiments/shared/same.json")
    found = read_record(same)
    for wrong, said in (
        ({"data": "half of the digits"}, r"same\.json: of other data: half of the digits, not .*; remove the record"),
        ({"history": []}, r"same\.json: lacks recipe and the history of each run"),
    ):
        same.write_text(json.dumps(found | wrong))
        capsys.readouterr()
        assert run("shared", "here", "[same]") == 2
        assert re.search(said, capsys.readouterr().err)
    same.write_text(json.dumps(found | {"data": "half of the digits", "seeds": [5]}))
    assert run("grid", "there", '["ours: 1"]') == 0
    assert read_record(Path("results/experiments/grid") / file_name("ours: 1"))["seeds"] == [0]


def test_costs_are_counted_and_the_fastest_path_is_taken(grid, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run_benchmark(groups, say):
        cases = groups[0].cases
        rows = [
            {"network": str(c.network), "path": c.path, "params": 7, "macs": 9, "ms": ms, "seconds": (ms / 1e3,) * 2}
            for c in cases
            for ms in [9.0 - list(cli_experiment.PATHS).index(c.path)]
        ]
        return SimpleNamespace(timings=rows, rounds=2)

    monkeypatch.setattr("mgic.benchmarking.run_benchmark", run_benchmark)
    assert main(["experiment", "grid", "--times"]) == 0
    costs = read_record(Path("results/experiments/grid/costs.json"))["costs"]
    assert costs["ours: 1"] == {"params": 7, "macs": 9, "ms": 6.0, "path": cli_experiment.PATHS[-1]}


def test_accuracy_is_drawn_against_what_is_known_to_cost(tmp_path):
    from PIL import Image

    outcomes = {
        "ours: 1": outcome([92, 93], (0, 1), macs=200, ms=1.5),
        "theirs: 1": outcome([90, 90], (0, 1), macs=100),
    }
    plot_outcomes(outcomes, tmp_path / "two.png", "title")
    plot_outcomes({"theirs: 1": outcomes["theirs: 1"]}, tmp_path / "one.png", "title")
    for name, width in (("two", 1200), ("one", 600)):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.size[0] == width
    with pytest.raises(UserError, match="no costs to plot against"):
        plot_outcomes({"a": outcome([1])}, tmp_path / "none.png", "title")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["efects"], "there is no experiment 'efects'; did you mean effects"),
        (
            ["effects", "--only", "[additif]"],
            "there is no variant 'additif'; did you mean 'additive'|did you mean additive",
        ),
        (["effects", "--seeds", "[1, 1]"], "--seeds must be different seeds"),
        (["--plot", "a.png"], "--plot belongs to one experiment"),
        (["--seeds", "[0]"], "belong to the run of one experiment"),
        (["effects", "--show", "--times"], "belong to the run of one experiment"),
        (["effects", "--times", "--only", "[additive]"], "--times counts and times all variants"),
    ],
)
def test_a_wrong_call_is_one_line(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["experiment", *words]) == 2
    found = capsys.readouterr()
    assert found.err.count("\n") == 1
    assert re.search(said, found.err)
    assert not list(tmp_path.rglob("*.json"))


def test_the_page_is_what_the_records_say():
    outcomes = {name: read_outcomes(name, ROOT / "results" / "experiments" / name) for name in EXPERIMENTS}
    assert (ROOT / "docs" / "experiments.md").read_text() == experiments_markdown(outcomes), (
        "mgic experiment --markdown > docs/experiments.md"
    )


def test_the_readme_has_the_summary_of_the_page():
    page, readme = ((ROOT / name).read_text() for name in ("docs/experiments.md", "README.md"))
    summary = page.partition("## In short\n\n")[2].partition("\n\n")[0]
    assert summary.count("\n") >= 2
    assert f"<!-- claims -->\n{summary}\n<!-- /claims -->" in readme
