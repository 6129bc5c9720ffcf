"""The tutorials, the examples and the notebook run as they stand, and print what they show."""

import doctest
import json
import re
import runpy
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from mgic.cli import main

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(page):
    """Language and text of each fenced block of a page, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)


def rounded(text):
    """Leave out what another machine computes otherwise: fractions, with their signs, and what may be a percentage.

    Counts, from three digits on, stay.
    """
    fraction, percent = r"[+-]?(\d+\.\d+(e[+-]?\d+)?|\d+e[+-]?\d+)", r"(?<![\w.,])(100|\d\d?)(?![\w.,])"
    return re.sub(f"{fraction}|{percent}", "#", text)


def commands(block):
    """The words of each line of a shell block that calls mgic; a backslash continues a line."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("mgic ")]


def run_page(page, name, capsys):
    """Run a page from top to bottom; return how many blocks ran and how many shown outputs were compared.

    A ``text`` block is the output of the block before it, decimal numbers aside; ``# ...`` behind a print is exact.
    """
    namespace, printed, ran, compared = {"__name__": "tutorial"}, "", 0, 0
    for language, text in blocks(page):
        if language == "text":
            assert doctest.OutputChecker().check_output(rounded(text), rounded(printed), SAME), (name, text, printed)
            compared += 1
            continue
        if language == "python":
            exec(compile(text, name, "exec"), namespace)  # noqa: S102
            printed = capsys.readouterr().out
            said = re.findall(r"print\(.*\)  # (.*)", text)
            assert printed.splitlines()[: len(said)] == said, (name, text)
            compared += bool(said)
        elif language == "sh":
            for words in commands(text):
                assert main(words) == 0, (name, words, capsys.readouterr().err)
            printed = capsys.readouterr().out
        ran += language in ("python", "sh")
    return ran, compared


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs_and_prints_what_it_shows(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran, compared = run_page(path.read_text(), path.name, capsys)
    assert ran >= 4
    assert compared >= 3


def test_a_tutorial_is_short_and_in_the_menu():
    """At most two screens of about seventy-five lines, and reachable."""
    menu = (ROOT / "mkdocs.yml").read_text()
    assert len(TUTORIALS) >= 4
    for path in TUTORIALS:
        assert len(path.read_text().splitlines()) <= 150, path.name
        assert f"tutorials/{path.name}" in menu


@pytest.mark.parametrize(
    "wrong",
    [
        "```python\nprint(1 + 1)  # 3\n```",
        "```python\nprint('ten')\n```\n\n```text\neleven\n```",
        "```sh\nmgic models nothing\n```",
        "```sh\nmgic models mgic_resnet20\n```\n\n```text\nresnet20\n```",
    ],
)
def test_a_page_that_says_what_is_not_so_is_found_out(wrong, capsys):
    with pytest.raises(AssertionError):
        run_page(wrong, "wrong.md", capsys)


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
