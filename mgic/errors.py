"""The errors a user can cause. The command line prints them as one line and exits with a status that `exit_code` gives."""

import difflib
import os
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message names the offending value and says what would work."""


class ChannelConfigError(UserError):
    """Widths, groups or grids that cannot be built."""


class Stopped(Exception):  # noqa: N818  (nobody did anything wrong)
    """Work that ended early for a reason its user must know; ``exit_code`` is the command's exit status."""

    exit_code = 1


BROKEN = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)
"""What other people's code raises for what its author did not think of: a network for its input, a runtime for a network."""


def exit_code(error: Exception) -> int:
    """The exit status of the command for an error: its own where work `Stopped`, 74 of files, 2 else."""
    if isinstance(error, Stopped):
        return error.exit_code
    return 74 if isinstance(error, OSError) else 2


def rank() -> int:
    """The number of this process among those that torchrun has started; 0 without it."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def suggest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known names, else all of them.

    Examples:
        >>> suggest("epoch", ["epochs", "lr"])
        '; did you mean epochs?'
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(known)}"
