"""Pages that run: their blocks of Python and of shell, in order, beside what they say they print."""

import contextlib
import io
import re
import shlex
from collections.abc import Callable, Iterator
from operator import eq
from typing import Any

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def blocks(text: str) -> Iterator[tuple[int, str, str]]:
    """The fenced blocks of a page, in order: number of the line above the first, language, text."""
    for match in BLOCK.finditer(text):
        yield text.count("\n", 0, match.start(2)), match[1], match[2]


def commands(block: str) -> list[list[str]]:
    """The words of each line of a shell block that calls mgic, without ``mgic``; a backslash continues a line."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("mgic ")]


def run_python(code: str, namespace: dict[str, Any], where: str, line: int = 0) -> tuple[str, int]:
    """Run a block; what it says behind its print calls, ``print(...)  # said``, must be its first lines of output.

    Args:
        code: Its text.
        namespace: Its global names.
        where: Its page, for errors.
        line: Number of the line above the first.

    Returns:
        What it printed, and how many lines were compared.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * line + code, where, "exec"), namespace)  # noqa: S102
    said = re.findall(r"print\(.*\)  # (.*)", code)
    lines = printed.getvalue().splitlines()[: len(said)]
    assert lines == said, f"{where}, block of line {line + 1}: {lines} is not {said}"
    return printed.getvalue(), len(said)


def run_mgic(words: list[str]) -> str:
    """Run the command line; return what it printed."""
    from mgic.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(words)
    assert status == 0, f"mgic {shlex.join(words)}: exit status {status}"
    return printed.getvalue()


def run_page(text: str, where: str, same: Callable[[str, str], bool] = eq) -> tuple[int, int]:
    """Run a page from top to bottom, its Python in one namespace; files go to the current folder.

    A ``text`` block is what the block before it prints.

    Args:
        text: Of the page.
        where: Its name, for errors.
        same: ``same(shown, printed)``: whether an output is what the page shows.

    Returns:
        How many blocks ran, and how many lines and outputs were compared.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed, ran, compared = "", 0, 0
    for line, language, block in blocks(text):
        if language == "text":
            assert same(block, printed), f"{where}, line {line + 1}: {printed!r} is not {block!r}"
            compared += 1
        elif language == "python":
            printed, lines = run_python(block, namespace, where, line)
            ran, compared = ran + 1, compared + lines
        elif language == "sh":
            printed = "".join(run_mgic(words) for words in commands(block))
            ran += 1
    return ran, compared
