"""The page on many machines: its formula, its tables, and the benchmark its data rate comes from."""

import json
import sys
from pathlib import Path

import pytest

from mgic.training import read_record

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import data_rate  # noqa: E402
import many_machines as model  # noqa: E402


def test_the_tables_of_the_page_are_those_of_the_formula_and_the_record():
    page = model.PAGE.read_text()
    assert page == model.filled(page, model.RATE), "python benchmarks/many_machines.py --write"


def test_a_sum_over_processes_takes_what_the_formula_says():
    link = model.Link(bandwidth=1e9, latency=1e-3)
    assert model.all_reduce(1e9, 1, link) == 0
    assert model.all_reduce(1e9, 2, link) == pytest.approx(1 + 2e-3)
    assert model.all_reduce(0, 512, link) == pytest.approx(2 * 9e-3), "the tree wins where latency counts"
    assert model.all_reduce(1e9, 4, link) == pytest.approx(1.5 + 6e-3), "the ring where bandwidth does"


def test_a_step_hides_gradients_behind_the_backward_pass_but_for_the_last_bucket():
    link = model.Link(bandwidth=1e9, latency=0.0)
    cluster = model.Cluster("test", inside=link, between=link)
    two = 2 * model.BUCKET
    each = model.all_reduce(model.BUCKET, 8, link)
    hidden = model.step_seconds(compute=10.0, gradients=two, norms=0, processes=8, cluster=cluster)
    assert hidden["step"] == pytest.approx(10 + each + hidden["sums"])
    bare = model.step_seconds(compute=0.03, gradients=two, norms=5, processes=8, cluster=cluster)
    assert bare["exposed"] == pytest.approx(2 * each - 0.02)
    assert bare["sums"] == pytest.approx(11 * model.all_reduce(4096, 8, link))
    assert bare["step"] - bare["step_own"] == pytest.approx(10 * model.all_reduce(4096, 8, link))


def test_machines_share_the_slower_link():
    cluster = model.CLUSTERS[1]
    assert cluster.link(8) == cluster.inside
    assert cluster.link(9) == cluster.between


def test_the_data_rate_is_measured_and_fills_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MGIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data_rate, "BATCH", 2)
    monkeypatch.setattr(data_rate, "WIDTH", 40)
    record = tmp_path / "data-rate.json"
    words = [
        "--images",
        "6",
        "--shard",
        "4",
        "--size",
        "8",
        "--repeats",
        "2",
        "--workers",
        "0",
        "1",
        "--record",
        str(record),
    ]
    data_rate.main(words)
    rates = read_record(record)["metrics"]
    assert set(rates) == {f"{kind}.images_per_second_{w}_workers" for kind in ("folder", "shards") for w in (0, 1)}
    assert all(value > 0 for metric in rates.values() for value in metric["values"])
    assert capsys.readouterr().out.count("median") == 4
    rates["folder.images_per_second_1_workers"] |= {"mean": 400.0, "std": 100.0}
    record.write_text(json.dumps({**read_record(record), "metrics": rates}))
    assert "| folder | 1 | 400 ± 100 | 2 | 3 |" in model.data_rate(record)
    assert "Not measured yet" in model.data_rate(tmp_path / "none.json")
