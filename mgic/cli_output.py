"""What all verbs print with, and what they check before they work."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def console(stderr: bool = False) -> "Console":
    """Return where text goes: into a file or a pipe as lines of their own width."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True)
    if not made.is_terminal:
        made.width = 120  # into a file or a pipe: tables keep their lines whole
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
