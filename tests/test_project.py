"""The project's own promises: imports point one way, public names exist, the README's commands and numbers are true."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

import mgic

ROOT = Path(__file__).parents[1]
ORDER = [  # left to right; a file imports from the left of its own place only
    {"errors", "hierarchy", "cache"},
    {"transfer"},
    {"blocks"},
    {"cycle", "smoothing", "counting", "representation"},
    {"kernels"},
    {"runtime"},
    {"survey", "twins", "conversion_report"},
    {"surgery"},
    {"conversion", "fitting"},
    {"models", "data"},
    {"scaling", "tables"},
    {"training"},
    {"experiments"},
    {"svg", "reporting", "conversion_page"},
    {"formats"},
    {"prediction", "conversion_folder", "exporting"},
    {"publishing"},
    {"benchmarking", "page"},
    {"plots"},
    {"cli_output", "cli_data"},
    {"cli_bench", "cli_convert", "cli_export", "cli_report", "cli_train"},
    {"cli_experiment"},
    {"cli", "__main__", "__init__"},
]


def modules():
    for path in sorted((ROOT / "mgic").rglob("*.py")):
        parts = path.relative_to(ROOT / "mgic").with_suffix("").parts
        yield path, parts


def imported(path, parts):
    """Top-level parts of the package that a file imports, type-checking imports included."""
    package = ["mgic", *parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{full}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            words = name.split(".")
            if words[0] == "mgic":
                yield words[1]


def test_imports_point_one_way():
    places = {name: i for i, names in enumerate(ORDER) for name in names}
    wrong = []
    for path, parts in modules():
        if parts == ("__init__",):
            continue
        here = places[parts[0]]
        for name in imported(path, parts):
            if name in places and name != parts[0] and places[name] > here:
                wrong.append(f"{path.name} imports {name}")
            if name in places and name != parts[0] and places[name] == here and (parts[0], name) not in SIBLINGS:
                wrong.append(f"{path.name} imports its sibling {name}")
    assert not wrong


def test_the_documented_order_of_imports_is_the_one_that_is_kept():
    page = (ROOT / "docs/index.md").read_text()
    said = page.partition("Right may import left:\n\n`")[2].partition("`")[0]
    levels = [{name.strip() for name in level.split(",")} for level in said.split("←")]
    kept = [level for level in ORDER if not any(name.startswith(("cli", "__")) for name in level)]
    assert levels == [*kept, {"cli"}]


def test_the_reference_has_every_module():
    """But for the command line, which `--help` documents, and what is private to its folder."""
    reference = (ROOT / "docs/reference.md").read_text().splitlines()
    missing = []
    for path, parts in modules():
        name = ".".join(["mgic", *parts]).removesuffix(".__init__")
        exempt = parts[-1].startswith(("cli", "__main__")) or name in (
            "mgic",
            "mgic.training",
            "mgic.kernels",
            "mgic.runtime",
        )
        if not exempt and f"::: {name}" not in reference:
            missing.append(str(path.relative_to(ROOT)))
    assert missing == ["mgic/kernels/tiles.py"], "whose programs only a GPU or an interpreter can import"


SIBLINGS = {("hierarchy", "errors"), ("smoothing", "cycle"), ("__main__", "cli"), ("cli", "__version__")}


def test_scripts_import_what_is_there():
    """Also those that need packages which are not installed here, and so are run nowhere."""
    scripts = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests").glob("*.py")]
    wrong = []
    for path in scripts:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mgic":
                home = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(home, alias.name) and not importlib.util.find_spec(f"{node.module}.{alias.name}"):
                        wrong.append(f"{path.name}: {node.module} has no {alias.name}")
    assert not wrong


def test_training_and_reporting_name_no_model():
    """They take a model; only recipes name one, as text."""
    for path, parts in modules():
        if parts[0] in ("training", "reporting"):
            assert "models" not in set(imported(path, parts))


def test_hierarchy_needs_the_standard_library_only():
    tree = ast.parse((ROOT / "mgic" / "hierarchy.py").read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert modules | names <= {"math", "collections.abc", "dataclasses", "errors"}


def test_every_public_name_is_there_and_typed():
    for name in mgic.__all__:
        assert getattr(mgic, name) is not None
    stub = re.findall(r"import (\w+) as \1", (ROOT / "mgic" / "__init__.py").read_text())
    assert sorted(stub) == sorted(set(mgic.__all__) - {"__version__"})
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        mgic.nothing  # noqa: B018


def test_every_recipe_names_a_network_that_can_be_built():
    from mgic.training import RECIPES

    for name, recipe in RECIPES.items():
        model = mgic.create_model(recipe.model, num_classes=7, in_chans=3, **recipe.model_args)
        assert model.num_classes == 7, name


def test_the_readmes_table_is_the_records():
    """Every number of the measured table is in the record its row names."""
    text = (ROOT / "README.md").read_text()
    table = text.partition("<!-- table -->")[2].partition("<!-- /table -->")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) >= 2
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        record = json.loads((ROOT / re.search(r"\((results/.*?)\)", cells[-1]).group(1)).read_text())
        assert record["recipe"]["model"] == cells[0].strip("`")
        counted = mgic.cost(
            mgic.create_model(record["recipe"]["model"], in_chans=1, **record["recipe"]["model_args"]), (1, 28, 28)
        )
        assert cells[1] == f"{counted.params:,}"
        assert cells[2] == f"{counted.macs / 1e6:.1f} M"
        for cell, name in ((cells[3], "train_accuracy"), (cells[4], "test_accuracy")):
            metric = record["metrics"][name]
            assert cell == f"{metric['mean']:.2f} ± {metric['std']:.2f}"


def test_the_readmes_times_are_the_records():
    """Every row of the table of times is a comparison of the record."""
    text = (ROOT / "README.md").read_text()
    rows = [line for line in text.partition("<!-- speed -->")[2].partition("<!-- /speed -->")[0].splitlines()][3:]
    comparisons = json.loads((ROOT / "results/bench-efficiency.json").read_text())["comparisons"]
    names = {"engine": "our engine", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    assert [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in rows] == [
        [
            *(c["network"], names[c["path"]], c["peer"], names[c["peer_path"]]),
            *(f"{c['flop_ratio']:.3f}", f"{c['time_ratio']:.3f}", f"{c['efficiency']:.2f}"),
        ]
        for c in comparisons
    ]


def test_every_record_can_be_read():
    from mgic.training import read_record

    paths = list((ROOT / "results").rglob("*.json"))
    assert paths
    for path in paths:
        record = read_record(path)
        assert record["commit"]["id"]
        assert not re.search(r"/(home|root|tmp|work)/", path.read_text())
