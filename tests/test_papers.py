"""papers.toml against numbers typed a second time, and against itself."""

import tomllib
from pathlib import Path

import pytest
import timm
import torchvision

FILE = Path(__file__).parents[1] / "mgic" / "papers.toml"
DATA = tomllib.loads(FILE.read_text(encoding="utf-8"))
PRINTED = tomllib.loads(FILE.read_text(encoding="utf-8"), parse_float=str)  # 2.90 stays "2.90"
PAPERS, TABLES, FIGURES = DATA["papers"], DATA["tables"], DATA["figures"]
ALL = {**TABLES, **{f"figure {name}": figure for name, figure in FIGURES.items()}}

IDS = (
    [f"mgic-{n}" for n in range(1, 14)]
    + ["workshop-4", "workshop-10", "mg2020-1", "mg2020-2"]
    + [f"mgiad-{n}" for n in range(1, 10)]
)
TABLE_KEYS = {"paper", "table", "section", "caption", "kind", "dataset", "input_size", "units", "rows"}
MORE_TABLE_KEYS = {"model", "overrides", "symbols", "also", "note", "misprint"}
FIGURE_KEYS = TABLE_KEYS - {"table", "kind"} | {"figure"}
RESULTS = {
    *("params", "macs", "top1", "top5", "top1_std", "train_top1", "miou", "mse"),
    *("mobile_time", "cpu_time", "train_time", "epochs"),
}
LAYERS = {"input", "layer", "kernels", "repetitions", "c_in", "c_out", "exp", "expansion", "se", "pool"}
ROW_KEYS = {
    *("row", "ours", "theirs", "dataset", "place", "settings", "model", "library", "overrides"),
    *("variants", "misprint", "should_be", "note"),
}
OURS = {
    "mgic_resnet56": {"group_size", "coarsest"},
    "mgic_resnet50": {"group_size", "coarsest"},
    "mgic_mobilenetv3_060": {"group_size", "coarsest", "act"},
    "mgic_mobilenetv3_100": {"group_size", "coarsest", "act"},
    "mgic_mobilenetv3_120": {"group_size", "coarsest", "act"},
    "mgic_lraspp_small": {"group_size", "coarsest"},
    "mgic_lraspp_large": {"group_size", "coarsest"},
    "lraspp_mobilenetv3_small": set(),
    "lraspp_mobilenetv3_large": set(),
    "mgic_function_net": {"widths", "expansion", "in_chans"},
    "dgcnn": set(),
    "diffgcn": set(),
    "mgic_diffgcn": set(),
    "mg_resnet_cifar": {"channels", "repeats", "group_size", "coarsest", "scheme", "num_classes"},
    "mg_resnet34": {"channels", "group_size", "coarsest"},
    "mg_mobilenetv2": {"width", "group_size", "coarsest"},
    "resnet20": {"in_chans"},
    "resnet56": set(),
    "mgnet20": {"share_a", "share_b", "in_chans"},
    "mgnet18": {"share_a", "share_b", "group_a", "group_b", "in_chans", "num_classes"},
    "mgiad20": {"coarsest", "group_size", "in_chans"},
    "mgiad18": {"coarsest", "group_size", "width", "post", "in_chans", "num_classes"},
}


def rows(table_id):
    return ALL[table_id]["rows"]


def row(table_id, label):
    (found,) = [r for r in rows(table_id) if r["row"] == label]
    return found


def column(table_id, key):
    """The column as printed, "-" where the paper has none."""
    return " ".join(str(r.get(key, "-")) for r in PRINTED["tables"][table_id]["rows"])


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def test_every_table_of_the_five_papers_is_there():
    assert DATA["schema"] == 1
    assert sorted(TABLES) == sorted(IDS)
    assert sorted(FIGURES) == ["mgic-6"]
    assert {t["paper"] for t in TABLES.values()} <= set(PAPERS)
    assert all({"title", "authors", "year", "venue"} <= set(p) for p in PAPERS.values())


def test_lines_stay_readable():
    assert max(len(line) for line in FILE.read_text(encoding="utf-8").splitlines()) <= 160


@pytest.mark.parametrize("table_id", IDS)
def test_table_has_the_keys(table_id):
    table = TABLES[table_id]
    assert set(table) >= TABLE_KEYS
    assert set(table) <= TABLE_KEYS | MORE_TABLE_KEYS
    assert table["kind"] == (
        "layers" if table_id in {"mgic-2", "mgic-4", "mgic-6", "mgic-10", "workshop-4"} else "results"
    )
    assert all({"paper", "table"} == set(a) and a["paper"] in PAPERS for a in table.get("also", []))


def test_figure_has_the_keys():
    figure = FIGURES["mgic-6"]
    assert FIGURE_KEYS <= set(figure) <= FIGURE_KEYS | {"also", "note", "misprint"}


@pytest.mark.parametrize("table_id", ALL)
def test_rows_are_well_formed(table_id):
    table = ALL[table_id]
    columns = LAYERS if table.get("kind") == "layers" else RESULTS
    labels = [(r.get("dataset"), r["row"]) for r in rows(table_id)]
    assert len(set(labels)) == len(labels)
    for r in rows(table_id):
        assert set(r) <= ROW_KEYS | columns, r["row"]
        assert (r.get("ours"), r.get("theirs")) in {(True, None), (None, True)}, r["row"]
        numeric = {key for key in columns if is_number(r.get(key))}
        assert numeric <= set(table["units"]), r["row"]
        assert numeric or table.get("kind") == "layers", r["row"]
        assert "misprint" in r or "should_be" not in r, r["row"]
        for variant in r.get("variants", []):
            assert variant["paper"] in PAPERS
            assert variant["paper"] != table["paper"]
            assert set(variant) - {"paper", "table", "units"} <= columns
    assert all(any(key in r for r in rows(table_id)) for key in table["units"]), "a unit without a column"


@pytest.mark.parametrize("table_id", ALL)
def test_models_can_be_named(table_id):
    for r in [*rows(table_id), ALL[table_id]]:
        model, library = r.get("model"), r.get("library")
        overrides = set(r.get("overrides", {}))
        if library == "timm":
            assert timm.is_model(model)
            assert not overrides
        elif library == "torchvision":
            assert model in torchvision.models.list_models()
            assert not overrides
        elif model:
            assert overrides <= OURS[model]
            assert not ({"overrides"} & set(r.get("should_be", {}))) or set(r["should_be"]["overrides"]) == overrides
        else:
            assert library is None
            assert not overrides
        if r.get("ours") and ALL[table_id].get("kind") == "results" and table_id != "mgic-1":
            assert model in OURS, "a network of ours that nothing builds"


@pytest.mark.parametrize("table_id", ALL)
def test_ours_are_the_multigrid_networks(table_id):
    for r in rows(table_id):
        multigrid = r["row"].startswith(("MGIC", "MG-", "MGiaD", "s_c = ", "s_g = "))
        assert r.get("ours", False) == (multigrid or ALL[table_id].get("kind") == "layers"), r["row"]


MISPRINTS = {
    ("mgic-1", "s_g = 4"),
    ("mgic-2", "last block but one"),
    ("mgic-4", "second convolution"),
    ("mgic-6", "stem"),
    ("mgic-8", "MobileNetV2 1.0x"),
    ("mgic-12", "s_c = 16, s_g = 16 (s_g fixed)"),
    ("mgic-12", "s_c = 16, s_g = 16 (s_c fixed)"),
    ("workshop-4", "closing 2"),
    ("workshop-10", "MobileNetV2 1.0x"),
    ("mgiad-1", "MgNet_A,B (3 resolutions)"),
    ("mgiad-2", "MgNet_A,B (3 resolutions)"),
    ("mgiad-3", "ResNet18"),
    ("mgiad-3", "MGiaD c_K = 32, g_s = 32"),
    ("mgiad-3", "MGiaD c_K = 16, g_s = 4"),
    ("mgiad-3", "MGiaD c_K = 16, g_s = 16"),
    ("mgiad-4", "ResNet20"),
    ("mgiad-7", "MGiaD c_K = 64, g_s = 8, lambda = 2"),
    ("mgiad-8", "MGiaD c_K = 64, g_s = 8, lambda = 3, eta_post = 2"),
    ("mgiad-9", "MGiaD c_K = 64, g_s = 8, lambda = 3, eta_post = 3"),
}


def test_misprints_are_the_known_ones():
    assert {(t, r["row"]) for t in ALL for r in rows(t) if "misprint" in r} == MISPRINTS
    assert {t for t in ALL if "misprint" in ALL[t]} == {"mgic-4", "mgic-6", "mgic-12", "mgiad-7", "figure mgic-6"}
    corrected = {
        (t, r["row"]): r["should_be"]["params"] for t in ALL for r in rows(t) if "params" in r.get("should_be", {})
    }
    assert sorted(corrected.values()) == [269, 448, 699, 1284, 1369, 11173]


# Typed again from the papers, column by column; "-" is a dash in print.
PARAMS = {
    "mgic-1": "3300 1800 900 450",
    "mgic-3": "0.85 - 0.73 - 0.43 0.41",
    "mgic-5": "25.6 16.9 14.4 11.0 - 13.0 9.4 15.1 6.0 7.9 6.9 - 6.5 6.2 25.0",
    "mgic-7": "1.0 1.7 1.4 1.8 2.4 2.6 2.3 2.3 1.3 2.2 1.9 2.3 2.5 4.0 5.2 5.2 5.2 "
    "3.5 3.5 3.7 4.5 4.1 3.9 3.4 5.4 7.3 7.1 7.1",
    "mgic-9": "0.47 0.48 1.51 1.32 1.67",
    "mgic-11": "0.16 0.57 0.11",
    "mgic-12": "0.53 0.5 0.47 0.79 0.53 0.41 0.29",
    "mgic-13": "4.2 4.2 4.3 4.5 4.8 5.2 4.2 4.2 4.3 4.5 4.9",
    "mg2020-1": "0.27 1.1 4.7 0.22 0.22 0.41 0.46 0.87 0.94 1.8 28.9 3 5.7 5.6 6.1 11.7 11.6 12.3 23.7 23.6",
    "mg2020-2": "21.8 4.6 8.8 11.7 3.4 6.9 3.0 6.0",
    "mgiad-1": "270 198 101 11174 4115 2751",
    "mgiad-2": "270 101 11174 2751 138 139 148 193 393 236 240 276 458 424 441 586 773 845 1361 1020 1269",
    "mgiad-3": "11003 2747 389 454 1357 189 437 420 144",
    "mgiad-4": "270 101 28 37 55",
    "mgiad-5": "11220 2774 481 1384 745 3067 1338 4822",
    "mgiad-6": "11174 2751 831 425 223 121",
    "mgiad-7": "11174 2751 393 533 1020 458 533 1269",
    "mgiad-8": "1020 1035 1051 1269 1276 1300",
    "mgiad-9": "11220 2774 481 1384 490 1393 1338 4822 1338 4853",
}
MACS = {
    "mgic-3": "125 63 91 63 63 60",
    "mgic-5": "4.1 2.6 2.3 3.0 2.8 2.2 1.6 2.5 - 1.3 1.1 1.0 1.2 1.0 4.2",
    "mgic-7": "40 59 41 80 44 42 48 45 150 141 138 146 210 155 141 145 138 300 299 301 295 320 312 300 219 226 233 217",
    "mgic-9": "2.90 2.73 9.74 8.87 9.62",
    "mgic-11": "125 64 13.7",
    "mgic-12": "91 76 65 100 85 60 45",
}
TOP1 = {
    "mgic-3": "93.0 92.0 92.5 91.9 92.7 94.2",
    "mgic-5": "75.3 72.1 - 74.5 74.2 75.0 75.8 77.9 70.6 71.7 72.1 73.4 74.1 74.3 77.8",
    "mgic-7": "58.8 60.3 61.1 64.7 65.4 66.2 67.0 66.8 63.3 66.7 67.8 69.4 72.0 73.3 73.9 74.8 74.3 "
    "71.8 72.6 72.9 74.1 74.6 75.2 74.0 75.2 75.7 76.1 76.2",
    "mgic-8": "71.8 73.3 73.9 74.8",
    "workshop-10": "71.8 73.3 73.9 74.8",
    "mgic-11": "91.6 92.5 92.9",
    "mgic-12": "94.7 94.6 94.3 94.8 94.7 94.2 92.8",
    "mgic-13": "70.2 70.6 71.6 71.9 73.2 74.8 69.9 70.5 70.9 71.6 72.7",
    "mg2020-1": "90.4 93.3 94.5 89.4 91.5 92.6 92.8 93.8 93.4 94.4 78.5 75.0 75.6 76.5 75.9 77.9 78.1 76.1 78.7 79.5",
    "mg2020-2": "74.0 72.2 74.5 75.4 72.0 74.7 71.7 73.9",
    "mgiad-3": "93.84 93.84 93.45 93.50 93.84 93.32 93.71 93.40 93.28",
    "mgiad-6": "95.58 95.28 93.88 92.05 89.74 87.02",
}
OTHERS = {
    ("mgic-1", "mse"): "0.011 0.013 0.017 0.024",
    ("mgic-5", "top5"): "92.2 90.3 90.8 91.8 91.9 92.3 92.9 93.7 90.1 - - - 91.9 92.0 -",
    ("mgic-7", "top5"): "81.0 82.9 82.6 - - 86.6 87.3 86.9 84.9 - 87.7 88.9 - - 91.4 92.0 91.6 "
    "91.0 90.6 - - 92.2 92.5 - - 92.7 93.2 93.4",
    ("mgic-8", "mobile_time"): "795 418 487 480",
    ("mgic-8", "cpu_time"): "310 140 170 172",
    ("mgic-8", "train_time"): "0.262 0.215 0.237 0.311",
    ("workshop-10", "mobile_time"): "795 418 487 480",
    ("workshop-10", "cpu_time"): "130 140 170 172",
    ("mgic-9", "miou"): "68.38 68.52 72.64 71.02 72.69",
    ("mgiad-1", "top1_std"): "0.16 0.28 0.30 1.56 0.03 0.04",
    ("mgiad-3", "top1_std"): "0.17 0.16 0.12 0.30 0.10 0.06 0.49 0.21 0.08",
    ("mgiad-3", "train_top1"): "100 100 100 100 100 100 100 100 100",
    ("mgiad-4", "train_top1"): "100 100 97.07 97.63 98.48",
    ("mgiad-9", "top1_std"): "0.13 0.28 0.37 0.45 0.10 0.73 0.62 0.14 0.38 0.35",
    ("mgiad-9", "train_top1"): "99.98 99.98 99.25 99.97 99.35 99.96 99.97 99.98 99.96 99.97",
}
COLUMNS = (
    {(t, "params"): v for t, v in PARAMS.items()}
    | {(t, "macs"): v for t, v in MACS.items()}
    | {(t, "top1"): v for t, v in TOP1.items()}
    | OTHERS
)


@pytest.mark.parametrize(("table_id", "key"), COLUMNS)
def test_column_is_as_printed(table_id, key):
    """Digit for digit and in print's order: "2.90" is not 2.9."""
    assert column(table_id, key) == COLUMNS[table_id, key]


@pytest.mark.parametrize(
    ("table_id", "label", "values"),
    [
        ("mgiad-1", "MgNet_A (3 resolutions)", "198 91.47 0.28 91.41"),
        ("mgiad-2", "MGiaD c_K = 4, g_s = 4, lambda = 1", "138 90.63 0.16 88.72"),
        ("mgiad-2", "MGiaD c_K = 32, g_s = 8, lambda = 1", "276 93.66 0.25 94.29"),
        ("mgiad-2", "MGiaD c_K = 64, g_s = 16, lambda = 1", "586 94.72 0.35 96.44"),
        ("mgiad-2", "MGiaD c_K = 64, g_s = 8, lambda = 3", "1269 95.95 0.12 97.44"),
        ("mgiad-4", "MGiaD c_K = 16, g_s = 8", "37 93.35 0.09 97.63"),
        ("mgiad-5", "MGiaD c_K = 64, g_s = 64, lambda = 2", "3067 75.12 0.71 99.98"),
        ("mgiad-6", "MgNet_A,B, g_s = 32", "425 92.05 0.28 92.86"),
        ("mgiad-7", "MGiaD c_K = 64, g_s = 4, lambda = 2", "533 95.02 0.21 96.32"),
        ("mgiad-8", "MGiaD c_K = 64, g_s = 8, lambda = 3, eta_post = 3", "1300 95.90 0.23 97.31"),
        ("mgiad-9", "MGiaD c_K = 64, g_s = 64, lambda = 1, eta_post = 3", "1393 72.74 0.73 99.96"),
    ],
)
def test_row_is_as_printed(table_id, label, values):
    printed = next(r for r in PRINTED["tables"][table_id]["rows"] if r["row"] == label)
    assert " ".join(str(printed[key]) for key in ("params", "top1", "top1_std", "train_top1")) == values


def test_figure_6_is_as_printed():
    best = {(r["row"].split(",")[0], r["epochs"]): r["top1"] for r in rows("figure mgic-6")}
    assert best == {
        ("MobileNetV3", 100): 73.34,
        ("MobileNetV3", 150): 73.36,
        ("MGIC-MobileNetV3", 100): 75.02,
        ("MGIC-MobileNetV3", 150): 75.08,
    }


def test_settings_are_those_of_the_rows():
    """Each row's label repeats print; its overrides must build that network."""
    for table_id, t in TABLES.items():
        for r in t["rows"]:
            label, overrides = r["row"].replace(",", ""), r.get("overrides", {})
            for word, key in (("s_c", "coarsest"), ("c_K", "coarsest"), ("lambda", "width"), ("eta_post", "post")):
                if f"{word} = " in label and key in overrides:
                    assert f"{word} = {overrides[key]}" in label, (table_id, label)
            if "g_s = " in label:
                assert f"g_s = {overrides.get('group_size', overrides.get('group_a'))}" in label, (table_id, label)
            if "s_g = " in label:
                assert f"s_g = {overrides.get('group_size', r.get('settings', {}).get('group_size'))}" in label
            if r.get("model") == "mg_resnet_cifar":
                widths = "-".join(map(str, overrides["channels"]))
                assert f" {widths} group size {overrides['group_size']} coarsest {overrides['coarsest']}" in label
                assert overrides.get("scheme", {}) == ({"cycle": "additive"} if "*" in label else {})
                assert overrides.get("num_classes", 10) == int(r["dataset"].removeprefix("CIFAR-"))
            if t["dataset"] == "FashionMNIST" and "model" in r:
                assert overrides["in_chans"] == 1
            if t["dataset"] == "CIFAR-100" and "model" in r:
                assert overrides["num_classes"] == 100


def test_one_network_has_one_count_and_one_accuracy():
    """A network that stands in several tables is printed alike everywhere, misprints aside."""
    seen = {}
    for table_id, t in TABLES.items():
        for r in t["rows"]:
            if t["kind"] == "layers" or "library" in r or "model" not in r or "misprint" in r:
                continue
            defaults = {"width": 1, "post": 1}
            overrides = defaults | r["overrides"] if "overrides" in r else defaults
            network = (r["model"], r.get("dataset", t["dataset"]), str(sorted(overrides.items())))
            for key in ("params", "top1", "train_top1"):
                if key in r:
                    assert seen.setdefault((network, key), r[key]) == r[key], (table_id, r["row"], key)
    assert len(seen) > 150


@pytest.mark.parametrize("table_id", ["mgic-4", "mgic-6", "mgic-10"])
def test_layers_fit_end_to_end(table_id):
    """A layer's input has the channels that the layer before gives out."""
    layers = rows(table_id)
    given = [r.get("should_be", r)["c_out"] if "c_out" not in r else r["c_out"] for r in layers]
    taken = [int(r["input"].split(" x ")[-1]) for r in layers[1:]]
    assert given[:-1] == taken


def test_mobilenet_rows_halve_where_they_pool():
    layers = rows("mgic-6")
    sizes = [int(r["input"].split("^")[0]) for r in layers]
    for r, size, following in zip(layers, sizes, sizes[1:], strict=False):
        expected = 1 if r["layer"].startswith("AvgPool") else size // 2 if r["pool"] else size
        assert following == expected, r["row"]
    assert [r["exp"] for r in layers if "exp" in r] == [
        *(16, 16, 48, 72, 72, 120, 240, 200, 184, 184, 480, 672, 672, 960, 960, 960, 960),
    ]
    assert [r["row"] for r in layers if r["se"]] == [f"bneck {n}" for n in (4, 5, 10, 11, 12, 14, 16)]


def test_resnet50_rows():
    stages = [r for r in rows("mgic-4") if "kernels" in r]
    assert [r["repetitions"] for r in stages] == [3, 4, 6, 3]
    assert stages[3]["kernels"] == ["1x1, 512", "3x3, 512", "1x1, 2048"]


def test_versions_of_a_paper_differ_where_they_differ():
    """Table 1 in other units, and MobileNetV2's time on a PC: 310 ms or 130 ms."""
    assert row("mgic-8", "MobileNetV2 1.0x")["variants"] == [
        {"paper": "mgic-workshop", "table": "Table 10", "cpu_time": 130},
    ]
    for r, mse, params in zip(rows("mgic-1"), (11, 13, 17, 24), (3.3, 1.8, 0.9, 0.4), strict=True):
        (variant,) = r["variants"]
        assert (variant["mse"], variant["params"]) == (mse, params)
        assert variant["units"] == {"mse": "1e-3", "params": "1e3"}
        assert mse * 1e-3 == pytest.approx(r["mse"])
