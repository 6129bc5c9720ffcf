"""Records of results: one JSON file states what was measured, how often, where and by which command."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from .loop import RunSummary

SCHEMA = 1
_PACKAGES = ("mgic", "torch", "torchvision", "timm", "lightning", "numpy", "scikit-learn")
_FIELDS: dict[str, type] = {
    "schema": int,
    "command": str,
    "commit": dict,
    "date": str,
    "machine": dict,
    "versions": dict,
    "data": str,
    "seeds": list,
    "n": int,
    "metrics": dict,
    "notes": list,
}


def provenance() -> dict[str, Any]:
    """What a result depends on besides its recipe: commit, date, machine, versions; of this process, now."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"commit": commit(), "date": now, "machine": machine(), "versions": versions()}


def make_record(
    command: str,
    data: str,
    seeds: Sequence[int],
    metrics: Mapping[str, Sequence[float]],
    notes: Iterable[str] = (),
    origin: Mapping[str, Any] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """A record of ``n = len(seeds)`` runs.

    Args:
        command: What anybody types to repeat it; without paths of this machine.
        data: Provenance of the data, `mgic.data.Data.note`.
        seeds: One a run.
        metrics: Name to values, one a run; each gets its mean and its sample standard deviation (0 for one run).
            The unit belongs into the name where it is not obvious: ``seconds_per_epoch``; accuracies are percent.
        notes: Sentences a reader needs to judge the numbers.
        origin: The `provenance` of the runs, if they were not made by this process.
        extra: Further plain JSON values, e.g. ``recipe``.

    Raises:
        UserError: There is no run, or a metric has not one value a run.
    """
    if not seeds:
        raise UserError("record: no run to record (seeds is empty)")
    for name, values in metrics.items():
        if len(values) != len(seeds):
            raise UserError(f"record: {name} has {len(values)} values for {len(seeds)} seeds")
    return {
        "schema": SCHEMA,
        "command": command,
        **(origin or provenance()),
        "data": data,
        "seeds": list(seeds),
        "n": len(seeds),
        "metrics": {
            name: {
                "mean": fmean(values),
                "std": stdev(values) if len(values) > 1 else 0.0,
                "values": list(values),
            }
            for name, values in metrics.items()
        },
        "notes": list(notes),
        **extra,
    }


def without_folder(name: str) -> str:
    """Name a file or a data set without folders of this machine: ``masks:/a/b`` is ``masks:b``."""
    kind, colon, place = name.rpartition(":")
    return kind + colon + Path(place).name


_WRITTEN = ("--root", "--out", "--record", "--results", "--json_summary", "--csv", "--plot")
_READ = ("--data", "--config", "--teacher", "--init", "--checkpoint")


def command_of(given: Sequence[str], *written: str) -> str:
    """The call of a verb as anybody would repeat it: what is written to is left out, what is read is named without folders.

    Args:
        given: The words after ``mgic``.
        written: Flags of the verb that name files to write, besides those of all verbs.

    Examples:
        >>> command_of(["train", "--data", "masks:/photos/b", "--out", "/runs/a", "--lr=1"])
        'mgic train --data masks:b --lr=1 --out=RUN'
    """
    words, before, left_out = ["mgic"], "", (*_WRITTEN, *written)
    for word in given:
        if before in left_out:
            before = ""
            continue
        flag, equals, place = word.partition("=")
        if flag not in left_out:
            if flag in _READ and equals:
                word = f"{flag}={without_folder(place)}"
            elif before in _READ or Path(word).is_absolute():
                word = without_folder(word)
            words.append(word)
        before = "" if equals else flag
    return shlex.join([*words, "--out=RUN"] if {"train", "experiment"} & set(words[:2]) else words)


_FACTS = ("epochs", "seconds_per_epoch", "params", "skipped_steps")
"""Numbers of a run that are no metrics, but stand among them in a record."""
_ORIGIN = ("commit", "date", "machine", "versions")
"""Where and when a run was finished."""


def training_metrics(runs: Sequence[RunSummary]) -> dict[str, list[float]]:
    """What a record of training runs states: the metrics of both splits, epochs, seconds an epoch, skipped steps."""
    common = [name for name in runs[0].metrics if all(name in run.metrics for run in runs)]
    return {
        **{name: [run.metrics[name] for run in runs] for name in common},
        **{name: [getattr(run, name) for run in runs] for name in _FACTS},
    }


def origins_of(runs: Sequence[RunSummary]) -> dict[str, Any]:
    """What a record says of where its runs were finished: the last one's origin, and all of them where they differ."""
    each = [{key: run.origin[key] for key in _ORIGIN} for run in runs]
    apart = any(one[key] != each[0][key] for one in each for key in _ORIGIN if key != "date")
    return {**each[-1], **({"origins": each} if apart else {})}


def origins(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Commit, date, machine and versions of each run of a record."""
    return record.get("origins") or [{key: record[key] for key in _ORIGIN}] * record["n"]


def runs_of(record: Mapping[str, Any], path: str | Path) -> list[RunSummary]:
    """The runs of a record of training, as far as it states them.

    Args:
        record: Of one recipe.
        path: Where it lies, for errors.

    Raises:
        UserError: It lacks the recipe, the history of a run or one of the numbers that training records.
    """
    from .loop import RunSummary

    metrics, histories = record["metrics"], record.get("history", ())
    missing = [name for name in _FACTS if name not in metrics]
    if missing or "recipe" not in record or len(histories) != record["n"]:
        lacks = missing or ["recipe and the history of each run"]
        raise UserError(f"{path}: lacks {', '.join(lacks)}: no record of training; remove it")
    return [
        RunSummary(
            model=record["recipe"]["model"],
            data=record["recipe"]["data"],
            seed=seed,
            steps=int(history[-1]["step"]),
            metrics={name: m["values"][k] for name, m in metrics.items() if name not in _FACTS},
            history=history,
            resumed_from=0,
            origin=origin,
            data_note=record["data"],
            **{name: metrics[name]["values"][k] for name in _FACTS},
        )
        for k, (seed, history, origin) in enumerate(zip(record["seeds"], histories, origins(record), strict=True))
    ]


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, atomically; missing folders are made.

    Raises:
        UserError: The record lacks a field, or a field has the wrong type.
    """
    from .files import write_json

    _check(record, str(path))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(path), record)


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        UserError: The file is no JSON, no record, or of another schema version.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a readable record ({error})") from error
    _check(record, str(path))
    return dict(record)


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """All records under a folder, by their path in it.

    Raises:
        UserError: The folder is none, or a file in it is no record.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; records are written by mgic train --record and mgic experiment")
    return {path.relative_to(folder).as_posix(): read_record(path) for path in sorted(folder.rglob("*.json"))}


def _check(record: Any, where: str) -> None:
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: a record is a JSON object, got {type(record).__name__}")
    if record.get("schema") != SCHEMA:
        raise UserError(f"{where}: record of schema {record.get('schema')!r}; this version of mgic reads {SCHEMA}")
    for name, kind in _FIELDS.items():
        if not isinstance(record.get(name), kind):
            raise UserError(f"{where}: {name} must be a {kind.__name__}, got {record.get(name)!r}")
    if record["n"] != len(record["seeds"]):
        raise UserError(f"{where}: n is {record['n']} but there are {len(record['seeds'])} seeds")
    for name, metric in record["metrics"].items():
        if not isinstance(metric, Mapping) or set(metric) != {"mean", "std", "values"}:
            raise UserError(f"{where}: metric {name} must have mean, std and values, got {metric!r}")
        if len(metric["values"]) != record["n"]:
            raise UserError(f"{where}: metric {name} has {len(metric['values'])} values for n = {record['n']}")


def commit() -> dict[str, Any]:
    """The commit this package was run from: ``{"id", "dirty"}``; both are None outside a git checkout."""
    here = Path(__file__).resolve()
    try:
        _git(here.parent, "ls-files", "--error-unmatch", here.name)  # not somebody else's repository around us
        head = _git(here.parent, "rev-parse", "HEAD")
        package = str(here.parents[1])
        return {"id": head, "dirty": bool(_git(here.parent, "status", "--porcelain", "--", package))}
    except (OSError, subprocess.SubprocessError):
        return {"id": None, "dirty": None}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of what computes."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, cores, threads, memory in GiB, GPU. No name of the machine, no path."""
    import torch

    return {
        "system": platform.system(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def instruction_sets() -> list[str]:
    """Vector instructions of this processor that matter for convolutions; empty where they cannot be told."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return []
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "sve")
    return [name for name in wanted if name in flags]


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    if sys.platform == "win32" or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
