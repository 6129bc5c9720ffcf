"""How a run is watched while it trains: the progress bar, CSV files, TensorBoard. A log that fails is a warning."""

from __future__ import annotations

import csv
import importlib.util
import io
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .files import write_text


@contextmanager
def progress_bar(wanted: bool | None, total: int) -> Iterator[Callable[[int, str], None]]:
    """A progress bar on stderr; where there is no terminal, a function that does nothing."""
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield lambda step, text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda step, text: bar.update(task, completed=step, description=text)


def write_csv(path: Path, rows: list[dict[str, float]]) -> None:
    """All rows again: a resumed run then leaves exactly the file of an uninterrupted one.

    A file that cannot be written is a warning: a run does not end because of its log.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    try:
        write_text(path, text.getvalue())
    except OSError as error:
        _go_on_without(path, error)


@contextmanager
def tensorboard(folder: Path, step: int) -> Iterator[Callable[[Mapping[str, float], int], None]]:
    """A function that writes the values of a step as events; what a killed process left after ``step`` is hidden.

    After the first event that cannot be written there is a warning, and nothing more is tried.
    """
    if importlib.util.find_spec("tensorboard") is None:
        warnings.warn("TensorBoard is not installed, so no event files: pip install 'mgic[train]'", stacklevel=3)
        yield lambda values, step: None
        return
    from torch.utils.tensorboard import SummaryWriter

    writers: list[SummaryWriter] = []

    def write(values: Mapping[str, float], step: int) -> None:
        try:
            for writer in writers:
                for name, value in values.items():
                    writer.add_scalar(name, value, step)
                writer.flush()
        except OSError as error:
            writers.clear()
            _go_on_without(folder, error)

    try:
        writers.append(SummaryWriter(str(folder), purge_step=step + 1 if step else None))
    except OSError as error:
        _go_on_without(folder, error)
    try:
        yield write
    finally:
        for writer in writers:
            try:
                writer.close()
            except OSError as error:
                _go_on_without(folder, error)


def _go_on_without(path: Path, error: OSError) -> None:
    warnings.warn(f"{path}: the log cannot be written ({error.strerror or error}); the run goes on", stacklevel=3)
