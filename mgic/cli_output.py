"""What all verbs print with, and what they check before they work."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def console(stderr: bool = False, width: int = 120) -> "Console":
    """Return where text goes: into a file or a pipe as lines of their own width, tables ``width`` wide."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True)
    if not made.is_terminal:
        made.width = width  # into a file or a pipe: tables keep their lines whole
    return made


def print_json(value: Any) -> None:
    """Print for other programs."""
    print(json.dumps(value, indent=2))  # noqa: T201


def check_output(*paths: Path | None) -> None:
    """Refuse, before any work, output files that cannot be written."""
    from .training.files import check_writable

    for path in paths:
        if path is not None:
            check_writable(path)


def check_plot(path: Path | None) -> None:
    """Refuse, before any work, a picture that cannot be written, or drawn because the package that draws is missing."""
    if path is not None:
        import matplotlib  # noqa: F401

        check_output(path)
