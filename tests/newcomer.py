"""The way of somebody who reads the README and nothing else: every block of it, in order, in an empty folder.

    python tests/newcomer.py FOLDER

It wraps a block, counts a network, accelerates one, converts and exports one of torchvision, and trains and evaluates one.
What each step takes is printed; more than ten minutes is a failure.
"""

import contextlib
import io
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

LIMIT = 600
"""Seconds after installation."""
README = Path(__file__).parents[1] / "README.md"


def steps(text: str) -> Iterator[tuple[str, str]]:
    """``("python", block)`` or ``("mgic", line)``, in the order of the page; what make does comes before."""
    for language, block in re.findall(r"^```(python|sh)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        if language == "python":
            yield "python", block
        else:
            yield from (("mgic", line) for line in block.splitlines() if line.startswith("mgic "))


def follow(kind: str, step: str) -> None:
    """Do one step; a block must print what its comments say."""
    from mgic.cli import main

    if kind == "mgic":
        status = main(shlex.split(step, comments=True)[1:])
        assert status == 0, f"{step}: exit status {status}"
        return
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(step, "README.md", "exec"), {})  # noqa: S102
    promised = re.findall(r"print\(.*\)  # (.*)", step)
    assert promised == said.getvalue().splitlines()[: len(promised)], said.getvalue()
    print(said.getvalue(), end="")


def walk(folder: Path) -> list[tuple[str, float]]:
    """Follow all steps in a folder; return what each was and how many seconds it took."""
    os.chdir(folder)
    taken = []
    for kind, step in steps(README.read_text()):
        began = time.perf_counter()
        follow(kind, step)
        first = (
            step if kind == "mgic" else next(line for line in reversed(step.splitlines()) if not line.startswith("#"))
        )
        taken.append((first, time.perf_counter() - began))
    return taken


if __name__ == "__main__":
    taken = walk(Path(sys.argv[1]))
    print(*(f"{seconds:6.1f} s  {step}" for step, seconds in taken), sep="\n")
    total = sum(seconds for _, seconds in taken)
    sys.exit(0 if total <= LIMIT else f"{total:.0f} s, more than {LIMIT}")
