"""Files that survive: atomic writes, checksummed checkpoints, and the folder of one run.

A file is written under a temporary name in its own folder, flushed to the disk and renamed: whoever reads the final name
sees the old contents or the new ones, never a part. Other folders do not work: renaming across file systems copies.
Every checkpoint has a sidecar with its SHA-256 (``sha256sum -c`` reads it), because neither PyTorch's nor safetensors'
format notices a flipped byte. The sidecar is renamed first: a checkpoint that exists can always be verified.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import platform
import re
import shutil
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import IO, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_model
from torch import Tensor, nn

from ..errors import UserError
from .recipes import EXECUTION_FIELDS, Recipe

SCHEMA = 1
TEMPORARY = ".tmp-"


class CorruptCheckpoint(UserError):  # noqa: N818 - names the trouble
    """A checkpoint whose bytes are not the ones that were written, or that is no checkpoint at all.

    Args:
        path: The file.
        size: Its size in bytes.
        expected: What should have been there.
    """

    def __init__(self, path: Path, size: int, expected: str):
        super().__init__(f"{path}: corrupt checkpoint of {size:,} bytes: expected {expected}")
        self.path, self.size, self.expected = path, size, expected


class DiskFull(OSError):  # noqa: N818 - names the trouble
    """Not enough room for a checkpoint; the previous one is untouched."""

    def __init__(self, folder: Path, needed: int, free: int):
        super().__init__(errno.ENOSPC, f"disk full: {needed:,} bytes needed and {free:,} free in {folder}")

    def __str__(self) -> str:
        return str(self.strerror)


@contextmanager
def told_when_full(folder: Path, needed: int = 0) -> Iterator[None]:
    """Turn what writers raise on a full disk into `DiskFull`; torch, safetensors and others have errors of their own.

    Args:
        folder: Where the block writes.
        needed: Bytes that it will write, where this is known; they are looked for first.
    """

    def free() -> int:
        return shutil.disk_usage(folder).free

    if free() < needed:
        raise DiskFull(folder, needed, free())
    try:
        yield
    except DiskFull:
        raise
    except (OSError, RuntimeError, UserError, SafetensorError) as error:
        left, first = free(), error.__context__
        if isinstance(error, RuntimeError) and isinstance(first, OSError):  # torch's writer complains once more
            error = first
        if getattr(error, "errno", None) in _NO_ROOM or "No space left" in str(error) or left < needed:
            raise DiskFull(folder, needed or _RESERVE, left) from error
        raise error


_NO_ROOM = (errno.ENOSPC, *([errno.EDQUOT] if sys.platform != "win32" else []))
_RESERVE = 65_536
"""Bytes for what is written beside the weights."""


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call ``write`` with an open file; ``path`` holds all of what it wrote, or what was there before.

    Raises:
        DiskFull: The disk is full.
        OSError: Any other trouble with the file. The temporary file is gone in every case.
    """
    with _staged(path) as temporary, temporary.open("wb") as file:
        write(file)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object atomically. NaN and infinity are no JSON: they raise ``ValueError``."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def _staged(path: Path, sidecar: bool = False, needed: int = 0) -> Iterator[Path]:
    """A temporary path beside ``path`` that becomes ``path``, after its sidecar, when the block ends well."""
    short = hashlib.sha256(path.name.encode()).hexdigest()[:16]  # the name itself may be as long as names can be
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{short}")
    try:
        with told_when_full(path.parent, needed):
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors replaces the file by a private one
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest() if sidecar else ""
            if sidecar:
                path.unlink(missing_ok=True)  # a file that exists must match its sidecar at every moment
                write_text(_sidecar(path), f"{digest}  {path.name}\n")
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":  # a folder cannot be opened there; NTFS journals the rename itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` (tensors and plain values) and its sidecar.

    Raises:
        DiskFull: Less than 1.2 times the size of the tensors is free, or the disk filled up meanwhile.
    """
    needed = int(1.2 * sum(t.numel() * t.element_size() for t in _tensors(state))) + _RESERVE
    with _staged(path, True, needed) as temporary, temporary.open("wb") as file:
        torch.save(dict(state), file)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU after checking its SHA-256. Nothing in the file is ever executed.

    Raises:
        CorruptCheckpoint: The sidecar is missing, the bytes differ from it, or the contents are not a checkpoint's.
        UserError: The checkpoint was written by a newer version of this library.
    """
    with path.open("rb") as file:
        _verify(path, file)
        if file.read(4) != b"PK\x03\x04":  # torch.load also reads two older formats, which we never write
            raise CorruptCheckpoint(path, path.stat().st_size, "a zip file, as torch.save writes it")
        file.seek(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd pickles, whose end is one of the errors below
                state = torch.load(file, map_location="cpu", weights_only=True)
        except _UNREADABLE as error:
            # Right checksum and wrong contents: not ours, perhaps hostile. torch's advice to trust it is left out.
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = next((line.strip() for line in lines if "Unpickler" in line), lines[0]).partition(". Please")[0]
            raise CorruptCheckpoint(path, path.stat().st_size, f"weights and plain values ({reason})") from error
    if not isinstance(state, dict) or not isinstance(state.get("schema"), int):
        raise CorruptCheckpoint(path, path.stat().st_size, "a mapping with a schema version")
    if state["schema"] != SCHEMA:
        raise UserError(f"{path}: checkpoint of schema {state['schema']}; this version of mgic reads schema {SCHEMA}")
    return state


# What unpickling hostile bytes has been seen to raise (tests/test_checkpoint.py fuzzes it).
_UNREADABLE = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    EOFError,
    OSError,
    ArithmeticError,
    MemoryError,
    struct.error,
    pickle.UnpicklingError,
)


def _verify(path: Path, file: IO[bytes]) -> None:
    """Compare the file with its sidecar and rewind it."""
    size = os.fstat(file.fileno()).st_size
    try:
        words = _sidecar(path).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptCheckpoint(path, size, f"its checksum in {_sidecar(path).name}") from error
    if len(words) != 2 or words[1] != path.name:
        raise CorruptCheckpoint(path, size, f"a line 'SHA256  {path.name}' in {_sidecar(path).name}")
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    if digest != words[0]:
        raise CorruptCheckpoint(path, size, f"sha256 {words[0][:16]}..., got {digest[:16]}...")
    file.seek(0)


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
        try:
            self._claim()
        except BaseException:
            self._release()
            raise
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
            owner = _owner(lock)
            lock.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
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
            _sidecar(old).unlink(missing_ok=True)

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
    """The process that holds the lock: the winner of a race has it a moment before it has written its name."""
    for _ in range(50):
        lock.seek(0)
        if name := lock.read().strip():
            return name
        time.sleep(0.02)
    return "unknown"


def _refuse_other(path: Path, there: Recipe, asked: Recipe) -> None:
    old, new = there.to_dict(), asked.to_dict()
    differences = [
        f"{k} is {old[k]!r} there, {new[k]!r} asked" for k in new if k not in EXECUTION_FIELDS and old[k] != new[k]
    ]
    if differences:
        raise UserError(
            f"run folder {path}: holds another configuration ({'; '.join(differences)}); choose a new folder"
        )


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, newest first; the names sort by step."""
    return sorted(folder.glob("step-*.ckpt"), reverse=True)


def newest_checkpoint(folder: Path, strict: bool = False) -> dict[str, Any] | None:
    """See `RunFolder.newest`; this one needs no lock."""
    corrupt: list[CorruptCheckpoint] = []
    for path in list_checkpoints(folder):
        try:
            state = load_checkpoint(path)
        except CorruptCheckpoint as error:
            if strict:
                raise
            corrupt.append(error)
        else:
            for damage in corrupt:
                warnings.warn(f"{damage}; continuing from {path.name}", stacklevel=2)
            return state
    if corrupt:
        raise corrupt[0]
    return None


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


def save_weights(path: Path, model: nn.Module) -> None:
    """Write a model as safetensors with a sidecar; weights that are shared are stored once."""
    with _staged(path, True, room_for(model)) as temporary:
        save_model(model, str(temporary))


def room_for(model: nn.Module) -> int:
    """Bytes that the weights of a network take on disk, and what is written beside them."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) + _RESERVE


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read what `save_weights` wrote, shared weights under all their names.

    Raises:
        CorruptCheckpoint: The bytes are not the ones of the sidecar, or no safetensors.
    """
    with path.open("rb") as file:
        _verify(path, file)
    return read_safetensors(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of anybody, shared weights under all their names; no checksum is asked for.

    Raises:
        CorruptCheckpoint: It is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as archive:
            state = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118 - no mapping
            aliases = archive.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CorruptCheckpoint(path, path.stat().st_size, f"safetensors ({error})") from error
    # save_model's metadata maps each name it left out to the one it kept.
    return state | {name: state[kept] for name, kept in aliases.items() if kept in state}


class SavedRun(NamedTuple):
    """What a run folder gives back."""

    recipe: Recipe
    state_dict: dict[str, Tensor]


def load_run(folder: str | Path) -> SavedRun:
    """The recipe and the weights of a run: the final ones, or those of the newest valid checkpoint.

    The weights are the averaged ones where the recipe has ``ema_decay``, as in every evaluation of the run.

    Raises:
        UserError: The folder holds no run, or no weights yet.
        CorruptCheckpoint: The weights are damaged.
    """
    folder = Path(folder)
    recipe = read_recipe(folder)
    final = folder / "model.safetensors"
    if final.exists():
        return SavedRun(recipe, load_weights(final))
    state = newest_checkpoint(folder / "checkpoints")
    if state is None:
        raise UserError(f"{folder}: the run has saved no weights yet")
    return SavedRun(recipe, state["average"] or state["model"])


class TrainedNetwork(NamedTuple):
    """A run's network, in eval mode with its weights, and where they are from.

    Args:
        model: The network.
        recipe: What it was trained by.
        data: What its run noted down about its data, ``data.json``.
        origin: Plain values that tell these weights from others: ``model``, ``model_args``, ``sha256`` of
            ``model.safetensors`` and the ``scores`` of the run; no ``sha256`` as long as the run is not finished.
    """

    model: nn.Module
    recipe: Recipe
    data: dict[str, Any]
    origin: dict[str, Any]


def load_network(folder: str | Path, build: Callable[..., nn.Module]) -> TrainedNetwork:
    """The network of a run.

    Args:
        folder: The run folder.
        build: ``(name, **arguments) -> network``; `mgic.create_model`.

    Raises:
        UserError: The folder holds no run, no weights yet, or weights of another network.
        CorruptCheckpoint: The weights are damaged.
    """
    folder = Path(folder)
    (recipe, weights), data = load_run(folder), read_json(folder / "data.json")
    arguments = {"num_classes": data["num_classes"], "in_chans": data["input_size"][0], **recipe.model_args}
    model = build(recipe.model, **arguments)
    fit_weights(model, weights, f"{folder}: its weights do not fit {recipe.model} for {data['name']}")
    return TrainedNetwork(model.eval(), recipe, data, _origin(folder, recipe))


def _origin(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """What identifies the final weights of a run, and how good they are."""
    known: dict[str, Any] = {"model": recipe.model, "model_args": recipe.model_args}
    final, summary = folder / "model.safetensors", folder / "summary.json"
    if final.exists():
        known["sha256"] = sha256(final)
    if summary.exists():
        known["scores"] = scores(read_json(summary))
    return known


def scores(summary: Mapping[str, Any]) -> dict[str, float]:
    """The training and the test score of a run's summary, by the names they have there: ``test_accuracy``, ..."""
    test = next(name for name in summary["history"][-1] if name.startswith("test_") and name != "test_loss")
    return {name: summary[name] for name in (test.replace("test_", "train_", 1), test)}


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as ``sha256sum`` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Start(NamedTuple):
    """Weights to start from instead of random ones.

    Args:
        place: Where they are from, for messages.
        state_dict: The weights.
        origin: Plain values that tell them from others: ``sha256``; of a run's also ``model``, ``model_args`` and ``scores``.
        new_head: Leave the classifier as it is initialised, whatever the weights say about it.
    """

    place: str
    state_dict: dict[str, Tensor]
    origin: dict[str, Any]
    new_head: bool = False


def load_start(place: str | Path, new_head: bool = False) -> Start:
    """Weights of a finished run, or of a safetensors file.

    Args:
        place: The run folder or the file; a file is compared with its ``.sha256`` where it has one.
        new_head: See `Start`.

    Raises:
        UserError: There is neither, or the run is not finished.
        CorruptCheckpoint: The weights are damaged.
    """
    place = Path(place)
    if place.is_dir():
        recipe, weights = load_run(place)
        origin = _origin(place, recipe)
        require_finished(place, origin)
        return Start(str(place), weights, origin, new_head)
    if not place.is_file() or place.suffix != ".safetensors":
        raise UserError(f"{place}: neither a run folder nor a .safetensors file")
    weights = load_weights(place) if _sidecar(place).exists() else read_safetensors(place)
    return Start(str(place), weights, {"sha256": sha256(place)}, new_head)


def require_finished(place: str | Path, origin: Mapping[str, Any]) -> None:
    """Refuse weights that will be others tomorrow, when the run that started from them is continued.

    Raises:
        UserError: The run has not finished.
    """
    if "sha256" not in origin:
        raise UserError(f"{place}: the run is not finished; its weights may still change")


def fit_weights(model: nn.Module, weights: Mapping[str, Tensor], complaint: str) -> None:
    """Load weights, all of them and no others.

    Args:
        model: The network.
        weights: By the names of its ``state_dict``.
        complaint: How the message begins where they do not fit.

    Raises:
        UserError: A name or a shape differs; the first ten are named, and the argument of the network that explains it.
    """
    own = model.state_dict()
    wrong = [
        f"{name} is {_size(weights.get(name))} there, {_size(own.get(name))} here"
        for name in (own | dict(weights))
        if _size(weights.get(name)) != _size(own.get(name))
    ]
    if wrong:
        more = f" and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise UserError(f"{complaint}: {'; '.join(wrong[:LISTED])}{more}{_explanation(model, weights)}")
    model.load_state_dict(weights)


LISTED = 10
"""Tensors that do not fit and are named; the others are counted."""
_LEVELS = re.compile(r"^(.*?)(?:^|\.)(?:relax|A)\.\d+\.")
"""A tensor of one level of a multigrid block, and the block's name."""


def _explanation(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """The end of a message about weights that do not fit: the argument of the network that is another, as shapes tell."""
    shapes, own = ({k: tuple(v.shape) for k, v in some.items()} for some in (weights, model.state_dict()))
    common = own.keys() & shapes.keys()
    changed = {name: (shapes[name], own[name]) for name in own if name in common and shapes[name] != own[name]}
    odd = own.keys() ^ shapes.keys()
    if not common:
        return "; these are weights of another network"
    classes = getattr(model, "num_classes", None)
    firsts = {(there[:1], here[:1]) for there, here in changed.values()}
    if not odd and len(firsts) == 1 and next(iter(firsts))[1] == (classes,):
        return f"; num_classes={next(iter(firsts))[0][0]} would fit"
    first = next((name for name, shape in own.items() if len(shape) > 1), "")
    if not odd and list(changed) == [first] and changed[first][0][:1] == changed[first][1][:1]:
        return f"; in_chans={changed[first][0][1]} would fit"
    if any(len(here) == 1 and here != (classes,) for _, here in changed.values()):
        return "; the widths are others (width, channels)"
    blocks = {found[1] for name in odd if (found := _LEVELS.match(name))}
    both = {found[1] for name in common if (found := _LEVELS.match(name))}
    if blocks and blocks <= both:
        return "; the blocks have another number of levels (coarsest)"
    if odd:
        return "; other layers are there (depth, repeats, or another network)"
    if all(there[:1] == here[:1] for there, here in changed.values()):
        return "; the groups are others (group_size)"
    return ""


def _size(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))


def start_from(model: nn.Module, start: Start) -> None:
    """Put the weights of ``start`` into a network.

    Raises:
        UserError: They do not fit, or a new head is wanted of a network that names no classifier.
    """
    own, weights, head = model.state_dict(), start.state_dict, _head(model)
    if start.new_head:
        if not head:
            raise UserError(f"new_head: {type(model).__name__} names no classifier (get_classifier) to start afresh")
        weights = {name: value for name, value in weights.items() if name not in head}
        weights |= {name: own[name] for name in head}
    there = start.origin.get("model")
    complaint = f"{start.place}: its weights{f' (of {there})' if there else ''} do not fit the network"
    others = own.keys() - head
    if head and weights.keys() - head == others and all(weights[name].shape == own[name].shape for name in others):
        complaint += " in the classifier alone (--new-head starts it afresh)"
    fit_weights(model, weights, complaint)


def _head(model: nn.Module) -> set[str]:
    """The names of the classifier's weights, in networks that tell which layer it is, as timm's do."""
    tell = getattr(model, "get_classifier", None)
    classifier = tell() if tell else None
    prefix = next((name for name, module in model.named_modules() if module is classifier), None)
    return set() if prefix is None else {name for name in model.state_dict() if name.startswith(f"{prefix}.")}


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


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: The file is damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: damaged or not readable ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged: expected a JSON object")
    return value


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


def check_writable(path: Path) -> None:
    """Find out before any work whether a file can be written: its folder is made, and a probe written in it.

    Raises:
        UserError: It cannot; the message says why.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder, but a file is to be written there")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.parent / f"{TEMPORARY}probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
