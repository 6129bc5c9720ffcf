"""The tutorials, the examples and the notebook run as they stand, and print what they show."""

import doctest
import json
import re
import runpy
import xml.etree.ElementTree as ElementTree
from operator import eq
from pathlib import Path

import pytest
from pages import run_page

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def rounded(text):
    """Leave out what another machine computes otherwise: fractions, with their signs, and what may be a percentage.

    Counts, from three digits on, stay.
    """
    fraction, percent = r"[+-]?(\d+\.\d+(e[+-]?\d+)?|\d+e[+-]?\d+)", r"(?<![\w.,])(100|\d\d?)(?![\w.,])"
    return re.sub(f"{fraction}|{percent}", "#", text)


def same(shown, printed):
    """Fractions and percentages aside."""
    return doctest.OutputChecker().check_output(rounded(shown), rounded(printed), SAME)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs_and_prints_what_it_shows(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran, compared = run_page(path.read_text(), path.name, same)
    assert ran >= 4
    assert compared >= 3


def test_a_tutorial_is_short_and_in_the_menu():
    """At most two screens of about seventy-five lines, and reachable."""
    menu = (ROOT / "mkdocs.yml").read_text()
    assert len(TUTORIALS) >= 4
    for path in TUTORIALS:
        assert len(path.read_text().splitlines()) <= 150, path.name
        assert f"tutorials/{path.name}" in menu


@pytest.mark.parametrize("compare", [same, eq])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("```python\nprint(1 + 1)  # 3\n```", r"wrong.md, block of line 2: \['2'\] is not \['3'\]"),
        ("```python\nprint(0)\nprint(1)  # 1\n```", "block of line 2"),
        ("```python\nx = 1\n```\n\n```python\nprint(x)  # 2\n```", "block of line 6"),
        ("```python\nprint('ten')\n```\n\n```text\neleven\n```", "line 6: 'ten"),
        ("```sh\nmgic models nothing\n```", "mgic models nothing: exit status"),
        ("```sh\nmgic models mgic_resnet20\n```\n\n```text\nresnet20\n```", "line 6"),
    ],
)
def test_a_page_that_says_what_is_not_so_is_found_out(wrong, message, compare):
    with pytest.raises(AssertionError, match=message):
        run_page(wrong, "wrong.md", compare)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_prints_a_table(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(path.read_text().splitlines()) <= 60
    runpy.run_path(str(path), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 3


def test_there_are_three_examples():
    assert [path.stem for path in EXAMPLES] == ["shrink_a_network", "train_and_export", "wrap_a_block"]


def test_the_notebook_is_valid_and_its_cells_run(tmp_path, monkeypatch, capsys):
    """By the keys that format 4.5 requires; without a kernel the cells are plain Python in one namespace."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples/mgic.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert isinstance(notebook["metadata"], dict)
    names, namespace = [], {"__name__": "notebook"}
    for cell in notebook["cells"]:
        names.append(cell["id"])
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            assert cell.keys() == {"cell_type", "id", "metadata", "source"}
            continue
        assert cell.keys() == {"cell_type", "id", "metadata", "source", "outputs", "execution_count"}
        assert cell["outputs"] == []
        exec(compile(source, cell["id"], "exec"), namespace)  # noqa: S102
    assert len(set(names)) == len(names)
    assert "accuracy" in capsys.readouterr().out
    assert ElementTree.fromstring(namespace["drawing"]).tag.endswith("svg")
