"""The way of somebody who reads the README and nothing else: every block of it, in order, in an empty folder.

    python tests/newcomer.py FOLDER

It wraps a block, counts a network, accelerates one, converts and exports one of torchvision, and trains and evaluates one.
What each step takes is printed; more than ten minutes is a failure.
"""

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from pages import blocks, commands, run_mgic, run_python

LIMIT = 600
"""Seconds after installation."""
README = Path(__file__).parents[1] / "README.md"


def steps(text: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """What each step is and does, in the order of the page: blocks of Python, lines of mgic; what make does comes before."""
    for _, language, block in blocks(text):
        if language == "python":
            last = next(line for line in reversed(block.splitlines()) if not line.startswith("#"))
            yield last, lambda block=block: run_python(block, {}, "README.md")[0]  # type: ignore[misc]
        elif language == "sh":
            for words in commands(block):
                yield shlex.join(["mgic", *words]), partial(run_mgic, words)


def walk(folder: Path) -> list[tuple[str, float]]:
    """Follow all steps in a folder; return what each was and how many seconds it took."""
    os.chdir(folder)
    taken = []
    for name, follow in steps(README.read_text()):
        began = time.perf_counter()
        print(follow(), end="", flush=True)
        taken.append((name, time.perf_counter() - began))
    return taken


if __name__ == "__main__":
    taken = walk(Path(sys.argv[1]))
    print(*(f"{seconds:6.1f} s  {step}" for step, seconds in taken), sep="\n")
    total = sum(seconds for _, seconds in taken)
    sys.exit(0 if total <= LIMIT else f"{total:.0f} s, more than {LIMIT}")
