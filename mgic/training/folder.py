"""The folder of one run: its lock, its files, and what must be equal for the run to go on in it."""

from __future__ import annotations

import errno
import os
import platform
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import IO, Any

from ..errors import UserError
from .checkpoint import SCHEMA, list_checkpoints, newest_checkpoint, save_checkpoint
from .files import (
    TEMPORARY,
    DiskFull,
    alive,
    check_writable,
    read_json,
    sidecar_of,
    told_when_full,
    write_json,
    write_text,
)
from .recipes import EXECUTION_FIELDS, Recipe


class RunFolder:
    """The folder of one training run; while it is entered, no other process can train in it.

    The lock belongs to the process, so a killed run leaves nothing locked. It is a POSIX record lock, which, unlike
    ``flock``, is not inherited by forked data workers that outlive a killed parent by some seconds; on Windows it is
    a locked byte. ``run.lock`` keeps the process id and the host for the error message. On a network file
    system it is as good as the locks of that file system: NFS passes it on to its server, some others do not.

    ::

        recipe.yaml  data.json      what is trained, and on what
        sources.json                the teacher and the starting weights, where it has any
        status.json                 running, finished, interrupted or failed
        checkpoints/step-*.ckpt     with *.ckpt.sha256
        metrics.csv  tensorboard/   one row an epoch
        model.safetensors  summary.json   when finished

    Args:
        path: The folder; it is made when it does not exist.
        recipe: The run that wants it.
        data: Fingerprint of the data set (plain JSON values).
        sources: Trained weights that the run depends on, by their part in it: ``teacher`` and ``init``, where it has them.

    Raises:
        UserError: On entering: the folder cannot be written, is in use, holds other files, links, a finished run or a
            run of another recipe, data set, teacher or start.
        DiskFull: On entering: there is no room for the first lines.
    """

    def __init__(
        self,
        path: Path,
        recipe: Recipe,
        data: Mapping[str, Any],
        sources: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    ):
        self.path, self.recipe, self.data, self.sources = path, recipe, data, sources
        self.checkpoints = path / "checkpoints"
        self._lock: IO[str] | None = None

    def __enter__(self) -> RunFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_foreign()
            with told_when_full(self.path):
                self._acquire()
        except DiskFull:
            raise
        except OSError as error:
            raise UserError(f"run folder {self.path}: cannot be written ({error.strerror or error})") from error
        with ExitStack() as undo:
            undo.callback(self._release)
            self._claim()
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _refuse_foreign(self) -> None:
        links = sorted(p.name for p in self.path.iterdir() if p.is_symlink())
        if links:
            raise UserError(
                f"run folder {self.path}: holds symbolic links ({', '.join(links[:5])}), so that the run would write "
                "elsewhere; remove them, or choose a new folder"
            )
        entries = [p.name for p in self.path.iterdir()]
        ours = {
            "run.lock",
            "data.json",
            "sources.json",
            "checkpoints",
        }  # all that a run killed before its first line can leave
        foreign = sorted(n for n in entries if n not in ours and not n.startswith(TEMPORARY))
        if foreign and "recipe.yaml" not in entries:
            raise UserError(
                f"run folder {self.path}: not empty and not a run (it holds {', '.join(foreign[:5])}); "
                "choose a new folder"
            )

    def _acquire(self) -> None:
        place = str(self.path.resolve())
        if place in _ENTERED:  # a record lock does not stop its own process
            raise UserError(f"run folder {self.path}: already in use by this process ({os.getpid()})")
        lock = (self.path / "run.lock").open("a+", encoding="utf-8", errors="replace")
        try:
            _lock_file(lock.fileno())
        except OSError as error:
            held = error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
            owner = _owner(lock) if held else ""
            lock.close()
            if not held:
                raise
            raise UserError(f"run folder {self.path}: already in use by process {owner}") from error
        try:
            _note_owner(lock)
        except OSError:
            with suppress(OSError):  # closing tries to write once more
                lock.close()
            raise
        _ENTERED.add(place)
        self._lock = lock

    def _release(self) -> None:
        if self._lock is not None:
            _ENTERED.discard(str(self.path.resolve()))
            self._lock.close()
            self._lock = None

    def _claim(self) -> None:
        recipe_file, data_file = self.path / "recipe.yaml", self.path / "data.json"
        if recipe_file.exists():
            _refuse_other(self.path, read_recipe(self.path), self.recipe)
            _refuse_other_data(self.path, self.data)
            _refuse_other_sources(self.path, self.sources)
            if self.status() == "finished":
                raise UserError(f"run folder {self.path}: holds a finished run; choose a new folder")
        self.checkpoints.mkdir(exist_ok=True)
        check_writable(self.checkpoints / "step-000000000.ckpt")
        self._sweep()
        write_json(data_file, self.data)
        write_json(self.path / "sources.json", dict(self.sources))
        write_text(recipe_file, self.recipe.to_yaml())  # last: it says that the folder is a run

    def _sweep(self) -> None:
        """Remove what killed writers left: temporary files (safetensors' own are ``.tmp*`` too), lone sidecars."""
        for folder in (self.path, self.checkpoints):
            for stale in folder.glob(".tmp*"):
                stale.unlink()
        for sidecar in self.checkpoints.glob("*.sha256"):
            if not sidecar.with_suffix("").exists():
                sidecar.unlink()

    def status(self) -> str:
        """The state in ``status.json``; empty when there is none."""
        file = self.path / "status.json"
        return str(read_json(file).get("state", "")) if file.exists() else ""

    def write_status(self, state: str, **details: Any) -> None:
        """Tell a supervisor where the run stands: running, finished, interrupted or failed."""
        write_json(self.path / "status.json", {"schema": SCHEMA, "state": state, "pid": os.getpid(), **details})

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write the checkpoint of ``step`` and remove the ones that are no longer kept."""
        save_checkpoint(self.checkpoints / f"step-{step:09d}.ckpt", {"schema": SCHEMA, "step": step, **state})
        for old in list_checkpoints(self.checkpoints)[self.recipe.keep_checkpoints :]:
            old.unlink()  # before its sidecar: a checkpoint that exists can always be verified
            sidecar_of(old).unlink(missing_ok=True)

    def newest(self, strict: bool = False) -> dict[str, Any] | None:
        """The newest valid checkpoint, or None when nothing was saved yet.

        Args:
            strict: Stop at the first corrupt checkpoint instead of warning and taking the one before.

        Raises:
            CorruptCheckpoint: With ``strict``, or when every checkpoint is corrupt.
        """
        return newest_checkpoint(self.checkpoints, strict)


_ENTERED: set[str] = set()


if sys.platform == "win32":
    import msvcrt

    def _lock_file(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock_file(descriptor: int) -> None:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _note_owner(lock: IO[str]) -> None:
    lock.seek(0)
    lock.truncate()
    lock.write(f"{os.getpid()} on {platform.node()}")
    lock.flush()


def _owner(lock: IO[str]) -> str:
    """The process that holds the lock: it has it a moment before its name is there instead of a dead one's, or of none."""
    name = ""
    for _ in range(50):
        lock.seek(0)
        name = lock.read().strip()
        number, _, host = name.partition(" on ")
        if number.isdigit() and (host != platform.node() or alive(int(number))):
            break
        time.sleep(0.02)
    return name or "unknown"


def _refuse_other(path: Path, there: Recipe, asked: Recipe) -> None:
    old, new = there.to_dict(), asked.to_dict()
    differences = [
        f"{k} is {old[k]!r} there, {new[k]!r} asked" for k in new if k not in EXECUTION_FIELDS and old[k] != new[k]
    ]
    if differences:
        raise UserError(
            f"run folder {path}: holds another configuration ({'; '.join(differences)}); choose a new folder"
        )


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a run folder.

    Raises:
        UserError: The folder holds no run, or its recipe is not one of this version.
    """
    file = folder / "recipe.yaml"
    try:
        return Recipe.from_yaml(file.read_text(encoding="utf-8"), source=file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder}: not a run folder: {file.name} cannot be read") from error


def finished_run(
    folder: Path,
    recipe: Recipe,
    data: Mapping[str, Any],
    sources: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> dict[str, Any] | None:
    """The summary of the finished run of ``recipe`` on ``data`` in ``folder``; None where there is none, or not yet.

    Args:
        folder: The run folder.
        recipe: The run that is wanted.
        data: Fingerprint of its data set.
        sources: Its teacher and its starting weights, as of `RunFolder`.

    Raises:
        UserError: The folder holds a finished run of another recipe, other data, another teacher or start, or another
            version of the summary.
    """
    summary, status = folder / "summary.json", folder / "status.json"
    if not (summary.exists() and status.exists()) or read_json(status).get("state") != "finished":
        return None
    _refuse_other(folder, read_recipe(folder), recipe)
    _refuse_other_data(folder, data)
    _refuse_other_sources(folder, sources)
    found = read_json(summary)
    if found.pop("schema", None) != SCHEMA:
        raise UserError(f"{summary}: of another version of mgic; this one reads schema {SCHEMA}; choose a new folder")
    return found


def different(there: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Name the first value that a run noted down about its data and that is another now; None where none is.

    Only what it noted down counts: a run of an earlier version knew less about its data.
    """
    return next((key for key in there if there[key] != now.get(key)), None)


def _refuse_other_data(folder: Path, data: Mapping[str, Any]) -> None:
    there = read_json(folder / "data.json")
    odd = different(there, data)
    if odd is not None:
        raise UserError(
            f"run folder {folder}: its run used other data ({odd}: {there[odd]!r} there, "
            f"{data.get(odd)!r} now); choose a new folder"
        )


def read_sources(folder: Path) -> dict[str, Any]:
    """The teacher and the starting weights of a run, as of `RunFolder`; empty where it has none."""
    file = folder / "sources.json"
    return read_json(file) if file.exists() else {}  # runs of the first version had neither


_IDENTITY = {"teacher": ("sha256", "model", "model_args", "mean", "std"), "init": ("sha256", "new_head")}
"""What of a source decides the result of a run; the rest is told to readers."""


def _refuse_other_sources(folder: Path, asked: Mapping[str, Mapping[str, Any]]) -> None:
    there = read_sources(folder)
    for part, keys in _IDENTITY.items():
        old, new = there.get(part, {}), asked.get(part, {})
        odd = next((key for key in keys if old.get(key) != new.get(key)), None)
        if odd is not None:
            raise UserError(
                f"run folder {folder}: its run has another {part} ({odd}: {old.get(odd)!r} there, {new.get(odd)!r} "
                f"asked); give the same {part}, or choose a new folder"
            )
