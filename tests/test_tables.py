"""The papers' tables and figures: what is printed, what we count, and that every form of a table says the same.

After a change that is meant to move a table, ``mgic table --all --markdown > docs/tables.md`` writes its page anew.
"""

import csv
import io
import json
from pathlib import Path

import pytest

import mgic
from mgic import UserError
from mgic.cli import main
from mgic.plots import plot_panels
from mgic.reporting import paper_csv, paper_markdown, paper_sheet
from mgic.tables import build_figure, build_table, matching_records, papers, results_row, table_ids
from mgic.tables.layers import layer_rows
from mgic.tables.networks import named_network, network_cost
from mgic.training import read_record

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def everything():
    """Every table, with the records of this repository."""
    paths = sorted((ROOT / "results").rglob("*.json"))
    records = [{**read_record(path), "file": path.relative_to(ROOT).as_posix()} for path in paths]
    return {name: build_table(name, records) for name in table_ids()}


@pytest.fixture
def call(capsys):
    def run(*words):
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def row_of(table, label):
    (found,) = [row for row in table["rows"] if row["row"] == label]
    return found


@pytest.mark.parametrize(
    ("table_id", "label", "printed", "ours", "deviation"),
    [
        ("mgic-1", "s_g = 32", {"params": 3300, "mse": 0.011}, (3328, None), {"params": 0.85}),
        ("mgic-1", "s_g = 16", {"params": 1800, "mse": 0.013}, (1792, None), {"params": -0.44}),
        ("mgic-1", "s_g = 8", {"params": 900, "mse": 0.017}, (896, None), {"params": -0.44}),
        ("mgic-1", "s_g = 4", {"params": 450, "mse": 0.024}, (448, None), {"params": -0.44}),
        (
            "mgic-3",
            "MGIC-ResNet-56",
            {"params": 410_000, "macs": 60_000_000, "top1": 94.2},
            (301_690, 66_466_432),
            {"params": -26.42, "macs": 10.78},
        ),
        (
            "mgic-5",
            "MGIC-ResNet-50 (s_g = 32, s_c = 64)",
            {"params": 9_400_000, "macs": 1_600_000_000, "top1": 75.8, "top5": 92.9},
            (9_198_248, 2_283_550_720),
            {"params": -2.15, "macs": 42.72},
        ),
        (
            "mgic-5",
            "ResNeXt-50",
            {"params": 25_000_000, "macs": 4_200_000_000, "top1": 77.8},
            (25_028_904, 4_230_479_872),
            {"params": 0.12, "macs": 0.73},
        ),
        (
            "mgiad-2",
            "MGiaD c_K = 64, g_s = 4, lambda = 1",
            {"params": 393_000, "top1": 94.62, "top1_std": 0.10, "train_top1": 95.83},
            (389_066, None),
            {"params": -1.0, "paper_weights": 0.01},
        ),
        (
            "mg2020-1",
            "ResNet 64-128-256-512",
            {"params": 28_900_000, "top1": 78.5},
            (28_904_420, None),
            {"params": 0.02},
        ),
    ],
)
def test_a_row_is_what_the_paper_prints_beside_what_we_count(everything, table_id, label, printed, ours, deviation):
    row = row_of(everything[table_id], label)
    assert row["printed"] == printed
    assert row["ours"]["params"] == ours[0]
    assert ours[1] in (None, row["ours"]["macs"])
    assert row["deviation"] == deviation


def test_every_network_is_counted_and_every_deviation_is_its_quotient(everything):
    counted = 0
    for table in everything.values():
        for row in table["rows"]:
            if table["kind"] == "layers" or (row["model"] is None and table["id"] != "mgic-1"):
                continue
            assert row["ours"] is not None, row["row"]
            for line in (row, *row["readings"]):
                ours = row["ours"] if line is row else line
                for name, value in line["deviation"].items():
                    said = row["printed"]["params" if name == "paper_weights" else name]
                    assert value == pytest.approx(100 * (ours[name] - said) / said, abs=0.006), row["row"]
                    counted += 1
            assert {"params", "macs"} & set(row["printed"]) <= set(row["deviation"])
    assert counted > 200


def test_counting_without_norms_and_activations_counts_the_same():
    """Tables skip them to be quick; a network as it is gives the same numbers."""
    small = {"channels": [8, 16], "repeats": [1, 1], "group_size": 4, "coarsest": 8}
    for name, overrides, size in (
        ("mg_resnet_cifar", small, (3, 32, 32)),
        ("mgic_mobilenetv3_060", {}, (3, 64, 64)),
        ("ghostnet_050", {}, (3, 64, 64)),
    ):
        counted = network_cost(named_network(name, overrides, "mgic"), size)
        assert counted == mgic.cost(mgic.create_model(name, **overrides), size)


def test_the_papers_own_bookkeeping_gives_the_printed_thousands(everything):
    """Within half a thousand on every row that is neither misprinted nor cut off (586,570 is printed as 586k)."""
    checked = 0
    for name in (name for name in everything if name.startswith("mgiad")):
        for row in everything[name]["rows"]:
            if "paper_weights" not in (row["ours"] or {}):
                continue
            miss = abs(row["ours"]["paper_weights"] - row["printed"]["params"])
            wrong = bool(row["should_be"]) or row["printed"]["params"] == 586_000
            assert (miss > 500) == wrong, row["row"]
            checked += 1
    assert checked == 79 - 7 - 3  # all but ResNet18 and ResNet20


def test_misprinted_settings_are_read_as_they_must_have_been_meant(everything):
    for label, meant in (
        ("32, g_s = 32", "group_size=16"),
        ("16, g_s = 4", "group_size=16"),
        ("16, g_s = 16", "group_size=4"),
    ):
        row = row_of(everything["mgiad-3"], f"MGiaD c_K = {label}")
        (reading,) = row["readings"]
        assert reading["reading"] == f"misprint read as {meant}"
        assert abs(reading["paper_weights"] - row["printed"]["params"]) <= 500


def test_other_readings_are_those_of_the_search(everything):
    """The text's transfers, Table 4's extra layer, and the conventions that were fitted to print (params, MACs)."""
    found = {
        reading["reading"].partition(":")[0] + reading["reading"].partition(":")[2][:20]: reading
        for reading in row_of(everything["mgic-5"], "MGIC-ResNet-50 (s_g = 16, s_c = 64)")["readings"]
    }
    assert len(found) == 4
    plain = row_of(everything["mgic-5"], "MGIC-ResNet-50 (s_g = 16, s_c = 64)")["ours"]
    table_4 = found["Table 4 with its second con"]
    assert table_4["params"] - plain["params"] == 9 * 64 * 64 + 2 * 64
    assert table_4["macs"] - plain["macs"] == 9 * 64 * 64 * 112 * 112
    fitted = found["fitted to print R and P left out of"]
    assert fitted["params"] == plain["params"]
    assert round(fitted["macs"] / 1e9, 4) == 1.0395
    masked = row_of(everything["mgic-3"], "MGIC-ResNet-56")["readings"][1]
    assert (round(masked["params"] / 1e6, 4), round(masked["macs"] / 1e9, 5)) == (0.4065, 0.06425)
    dense = row_of(everything["mgic-12"], "s_c = 64, s_g = 16")["readings"][0]
    blocks = 9 * sum(2 * (9 * c * c + 2 * c) for c in (16, 32, 64))  # no width exceeds 64: by the text all are dense
    assert dense["params"] == blocks + (27 + 2) * 16 + (9 + 2) * (32 + 64) + 65 * 10
    assert all(reading["params"] < plain["params"] for name, reading in found.items() if "groups" in name)


def test_built_layers_are_the_printed_ones(everything):
    unlike = {
        (table["id"], row["row"]): row["differs"] or "not built"
        for table in (everything[name] for name in ("mgic-2", "mgic-4", "mgic-6", "workshop-4"))
        for row in table["rows"]
        if row["differs"] or not row["built"]
    }
    assert unlike == {
        ("mgic-2", "last block but one"): ["c_in"],  # misprints, both of them
        ("workshop-4", "closing 2"): ["c_out"],
        ("mgic-4", "second convolution"): "not built",
        ("mgic-6", "stem"): ["exp"],
    }
    stages = [row["built"] for row in everything["mgic-4"]["rows"] if row["row"].startswith("stage")]
    assert [layer["repetitions"] for layer in stages] == [3, 4, 6, 3]
    assert [layer["kernels"][1] for layer in stages] == ["3x3, 64", "3x3, 128", "3x3, 256", "3x3, 512"]
    assert len(everything["mgic-6"]["rows"]) == 21
    for name, blocks in (("mgic-2", [32, 32, 64, 64, 128, 128]), ("workshop-4", [192, 192])):
        layers = [row["built"] for row in everything[name]["rows"]]
        assert [layer["c_out"] for layer in layers] == [16, *blocks, 64, 1]
        expansions = [layer["expansion"] for layer in layers if "expansion" in layer]
        assert expansions == len(blocks) * [{"mgic-2": 4, "workshop-4": 2}[name]]


def test_a_layer_that_is_not_built_as_printed_is_said_to_differ():
    table = papers()["tables"]["mgic-6"]
    rows = [{**row, "exp": 96} if row["row"] == "bneck 2" else row for row in table["rows"] if row["row"] != "bneck 5"]
    compared = layer_rows({**table, "rows": rows})
    assert [row["differs"] for row in compared if row["row"] == "bneck 2"] == [["exp"]]
    assert [row["built"]["exp"] for row in compared if row["row"] == "(not printed)"] == [120]


def test_json_markdown_and_csv_say_the_same(everything):
    for name, table in everything.items():
        assert json.loads(json.dumps(table)) == table
        page, sheet = paper_markdown(table), paper_sheet(table)
        assert len({len(line) for line in (sheet.head, *sheet.lines)}) == 1
        lines = list(csv.DictReader(io.StringIO(paper_csv([table]))))
        readings = [(row, reading) for row in table["rows"] for reading in row.get("readings", [])]
        assert len(lines) == len(table["rows"]) + len(readings)
        assert len(sheet.lines) == len(lines)
        own = [line for line in lines if not line.get("reading")]
        for (row, reading), line in zip(readings, (line for line in lines if line.get("reading")), strict=True):
            assert (line["row"], line["reading"]) == (row["row"], reading["reading"])
            assert (line["ours_params"], line["ours_macs"]) == (str(reading["params"]), str(reading["macs"]))
        for row, line in zip(table["rows"], own, strict=True):
            assert (line["table"], line["row"]) == (name, row["row"])
            if table["kind"] == "layers":
                assert (line.get("built_c_out") or None) == (str(row["built"]["c_out"]) if row["built"] else None)
                continue
            for key, value in (row["ours"] or {}).items():
                assert line[f"ours_{key}"] == str(value)
            for key, value in row["deviation"].items():
                assert float(line[f"deviation_{key}"]) == value
            for key in {"params", "macs"} & set(row["printed"]):
                assert float(line[f"printed_{key}"]) == row["printed"][key]
                assert row["as_printed"][key] in page
            for count in (row["ours"] or {}).values():
                assert f" {count:,} |" in page
            for remark in (row["misprint"], row["note"]):
                assert remark is None or remark.strip()[:30].replace("_", r"\_").replace("*", r"\*") in page


def test_the_page_of_the_documentation_is_what_the_command_prints(everything):
    page = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
    assert page == "# Tables\n\n" + "\n".join(map(paper_markdown, everything.values())), "mgic table --all --markdown"


def record(model, data, model_args, **more):
    metric = {"mean": 91.5, "std": 0.25, "values": [91.25, 91.75]}
    return {
        "recipe": {"model": model, "data": data, "model_args": model_args, "epochs": 7},
        "metrics": {"train_accuracy": {**metric, "mean": 99.0}, "test_accuracy": metric},
        **{"n": 2, "date": "2026-01-01", "data": "CIFAR-10, a note", "file": "results/a.json", **more},
    }


def test_a_record_stands_in_the_rows_of_its_network_and_data_alone(everything):
    """Arguments left out are their defaults; the longest training is shown."""
    args = {"channels": [16, 32, 64, 128], "group_size": 8}
    records = [
        record("mg_resnet_cifar", "cifar10", args),
        record("mg_resnet_cifar", "folder/cifar10.npz", args, file="results/b.json", date="2026-01-02"),
        record("mg_resnet_cifar", "cifar100", {**args, "coarsest": 32}),
    ]
    table = papers()["tables"]["mg2020-1"]
    narrow = [row for row in table["rows"] if "16-32-64-128" in row["row"]]  # dense, additive, and two multiplicative
    rows = [row for row in (results_row("mg2020-1", table, row, records) for row in narrow) if row["accuracy"]]
    assert [row["row"] for row in rows] == [
        "MG-ResNet 16-32-64-128, group size 8, coarsest 16"
    ]  # not its additive twin
    assert rows[0]["accuracy"] == {
        "train": {"mean": 99.0, "std": 0.25},
        "test": {"mean": 91.5, "std": 0.25},
        **{"n": 2, "epochs": 7, "data": "CIFAR-10, a note", "record": "results/b.json"},
    }
    assert "| 91.50 ± 0.25 (2 runs, 7 epochs) |" in paper_markdown({**everything["mg2020-1"], "rows": rows})


@pytest.mark.parametrize("name", ["diffgcn", "mgic_diffgcn"])
def test_a_record_of_a_network_on_points_stands_in_its_row(name):
    """They hold functions with arguments bound, made anew for each network; another number of neighbours is another one."""
    args = {"k": 10} if name == "diffgcn" else {"k": 10, "group_size": 16}
    records = [record(name, "modelnet10", {**args, **more}, file=file) for more, file in (({}, "a"), ({"k": 5}, "b"))]
    rows = [row for row in build_table("mgic-11", records)["rows"] if row["accuracy"]]
    assert [(row["model"], row["accuracy"]["record"]) for row in rows] == [(name, "a")]


FAMILIES = [
    "dgcnn",
    "diffgcn",
    "mgic_diffgcn",
    "function_net",
    "ghost_function_net",
    "mgic_function_net",
    "lraspp_mobilenetv3_small",
    "mgic_lraspp_small",
    "mg_mobilenetv2",
    "mgic_mobilenetv3_060",
    "mgiad20",
    "mgnet20",
    "mgic_resnet18",
    "mgic_resnet20",
    "resnet20",
    "mgic_unet",
    "unet",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_record_of_every_kind_of_network_finds_its_network(name):
    one = record(name, "some-data", {})
    assert list(matching_records(name, {}, "some data", [one])) == [one]


def test_a_record_of_no_training_stands_nowhere():
    timing = {key: value for key, value in record("", "", {}).items() if key != "recipe"}
    assert [row["accuracy"] for row in build_table("mgic-1", [timing])["rows"]] == [None] * 4


def test_points_of_figures_are_the_printed_ones_and_those_of_records():
    _, (light, resnets) = build_figure("mgic-5")
    assert light.printed["MGIC-MobileNetV3"] == [(48e6, 67.0), (145e6, 74.8), (233e6, 76.1)]
    assert light.printed["GhostNet"] == [(42e6, 66.2), (141e6, 73.9), (226e6, 75.7)]
    assert resnets.printed["MGIC-ResNet-50"] == [(1.0e9, 74.3), (1.6e9, 75.8), (2.5e9, 77.9)]
    _, (epochs,) = build_figure("mgic-6")
    assert epochs.printed == {
        "MobileNetV3": [(100, 73.34), (150, 73.36)],
        "MGIC-MobileNetV3": [(100, 75.02), (150, 75.08)],
    }
    _, (weights,) = build_figure("mgiad-7", [record("mgiad18", "cifar10", {"coarsest": 64, "group_size": 4})])
    small = [(138e3, 90.63), (139e3, 90.82), (148e3, 91.81), (193e3, 93.01), (393e3, 94.62)]
    assert weights.printed["MGiaD, g_s = 4"] == small
    assert weights.printed["MGiaD, g_s = 8, wider"] == [(1269e3, 95.95)]  # lambda = 2 is a misprint, so no point
    assert weights.measured == {"MGiaD, g_s = 4": [(389_066, 91.5)]}
    assert not light.measured
    assert not epochs.measured


@pytest.mark.parametrize("name", ["mgic-3", "mgic-4"])
def test_a_figure_of_an_experiment_is_drawn_from_its_records_alone(name, tmp_path):
    with pytest.raises(UserError, match=f"records that say figure: {name} .* none of the 1 records"):
        build_figure(name, [record("mgic_resnet20", "digits", {})])
    metrics = {"params": {"mean": 448.0}, "mse": {"mean": 0.02}}
    title, panels = build_figure(name, [{"figure": name, "series": "ours", "metrics": metrics}])
    assert panels[0].measured == {"ours": [(448.0, 0.02)]}
    plot_panels(panels, tmp_path / "f.png", title)
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_a_table_in_every_form(call):
    status, out, _ = call("table", "mgic-1")
    assert status == 0
    assert "3,328" in out
    assert json.loads(call("table", "mgic-1", "--json")[1])["rows"][3]["should_be"] == {"params": 448}
    assert call("table", "mgic-1", "--csv")[1].count("\n") == 5
    assert "| s\\_g = 8 \\[3\\] | 900 | 896 | -0.4 % |" in call("table", "mgic-1", "--markdown")[1]


def test_the_list_names_every_table(call):
    status, out, _ = call("table", "--list")
    named = [line.split()[0] for line in out.splitlines()]
    assert status == 0
    assert named == table_ids()
    assert [row["id"] for row in json.loads(call("table", "--list", "--json")[1])] == named
    assert named == [
        *(f"mgic-{i}" for i in range(1, 14)),
        *("workshop-4", "workshop-10", "mg2020-1", "mg2020-2"),
        *(f"mgiad-{i}" for i in range(1, 10)),
    ]


def test_wrong_calls_are_one_line_that_says_what_works(call, tmp_path):
    out = f"--out={tmp_path / 'f.png'}"
    for words, said in (
        (["table", "mgic-55"], "unknown table 'mgic-55'; did you mean mgic-5"),
        (["table", "x"], "known: mg2020-1, mg2020-2, mgiad-1"),
        (["table"], "give the id of a table, or --all, or --list"),
        (["table", "mgic-1", "--all"], "give the id of a table, or --all, or --list"),
        (["table", "mgic-1", "--csv", "--json"], "one of --json, --markdown and --csv"),
        (["figure", "mgiad-6", out], "unknown figure 'mgiad-6'; did you mean mgiad-7"),
        (["figure", "mgic-4", out, f"--results={tmp_path}"], "none of the 0 records"),
        (["figure", "mgic-5"], "out"),
    ):
        status, printed, err = call(*words)
        assert (status, printed, err.count("\n")) == (2, "", 1), (words, err)
        assert said in err, words
    assert not list(tmp_path.iterdir())


def test_the_command_draws_a_figure(call, tmp_path):
    status, out, _ = call("figure", "mgic-6", f"--out={tmp_path / 'f.png'}", f"--results={tmp_path}")
    assert status == 0
    assert "Figure 6" in out
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
