"""Training: recipes, the one loop, checkpoints that survive, and records of results.

Importing this package imports nothing heavy; the names below load their module when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import CorruptCheckpoint
    from .files import DiskFull
    from .loop import NonFiniteLoss, RunSummary, evaluate, train
    from .parallel import Elsewhere, LostProcess
    from .recipes import RECIPES, Recipe
    from .records import make_record, read_record, read_records, write_record
    from .signals import Interrupted
    from .weights import SavedRun, Start, TrainedNetwork, load_network, load_run, load_start

_HOME = {
    "CorruptCheckpoint": "checkpoint",
    "DiskFull": "files",
    "SavedRun": "weights",
    "Start": "weights",
    "TrainedNetwork": "weights",
    "load_network": "weights",
    "load_run": "weights",
    "load_start": "weights",
    "Elsewhere": "parallel",
    "LostProcess": "parallel",
    "Interrupted": "signals",
    "NonFiniteLoss": "loop",
    "RunSummary": "loop",
    "evaluate": "loop",
    "train": "loop",
    "make_record": "records",
    "read_record": "records",
    "read_records": "records",
    "write_record": "records",
    "RECIPES": "recipes",
    "Recipe": "recipes",
}

__all__ = [
    "RECIPES",
    "CorruptCheckpoint",
    "DiskFull",
    "Elsewhere",
    "Interrupted",
    "LostProcess",
    "NonFiniteLoss",
    "Recipe",
    "RunSummary",
    "SavedRun",
    "Start",
    "TrainedNetwork",
    "evaluate",
    "load_network",
    "load_run",
    "load_start",
    "make_record",
    "read_record",
    "read_records",
    "train",
    "write_record",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
