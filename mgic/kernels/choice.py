"""Which way is fastest for a shape: measured once on a device, kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..cache import cache_folder

Result = TypeVar("Result")
Way = Callable[[], Result]
SCHEMA = 1


def choose(name: str, arguments: Sequence[Any], ways: Mapping[str, Way[Result]]) -> Way[Result]:
    """Return the fastest of the ways to compute ``name`` for arguments of these shapes.

    The first time on a device they are timed, which waits for the GPU and so cannot happen while a CUDA graph is captured:
    call once before. The last way is the naive twin, with which every other one must agree.

    Args:
        name: The operation.
        arguments: Its arguments.
        ways: Functions that compute it; the last one is trusted.
    """
    if len(ways) == 1:
        return next(iter(ways.values()))
    device = next(a.device for a in _flat(arguments) if isinstance(a, Tensor))
    choices = Choices(cache_file(device))
    key = describe(name, arguments)
    found = choices.get(key)
    if found is None or found not in ways:
        found = measure(ways, seconds_on(device))
        choices.put(key, found)
    return ways[found]


def describe(name: str, arguments: Sequence[Any]) -> str:
    """The operation with everything its time depends on: types, shapes and numbers of its arguments.

    Examples:
        >>> describe("conv", (torch.zeros(2, 3), None, [4, "relu"]))
        'conv float32[2,3] - 4 relu'
    """
    return " ".join([name, *map(_word, _flat(arguments))])


def _flat(arguments: Sequence[Any]) -> list[Any]:
    flat: list[Any] = []
    for argument in arguments:
        flat += argument if isinstance(argument, list | tuple) else [argument]
    return flat


def _word(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return f"{str(argument.dtype).removeprefix('torch.')}[{','.join(map(str, argument.shape))}]"
    return "-" if argument is None else str(argument)


def measure(ways: Mapping[str, Way[Any]], seconds: Callable[[Way[Any]], float]) -> str:
    """The name of the way with the least median time, taken in turns; one that fails or disagrees with the last is out.

    Args:
        ways: The candidates; the last one is trusted.
        seconds: Measures one call.
    """
    trusted = [*ways][-1]
    expected = _tensors(ways[trusted]())
    good = {}
    for name, way in ways.items():
        try:
            agrees = name == trusted or _agrees(_tensors(way()), expected)
        except RuntimeError as error:  # a tiling that this GPU has no room for
            warnings.warn(f"{name} does not run here: {str(error).splitlines()[0]}", stacklevel=4)
            continue
        if agrees:
            good[name] = way
        else:
            warnings.warn(f"{name} differs from its twin and is not used", stacklevel=4)
    times: dict[str, list[float]] = {name: [] for name in good}
    for _ in range(5):
        for name, way in good.items():
            times[name].append(seconds(way))
    return min(times, key=lambda name: median(times[name]))


def _tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _agrees(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Compare, then spoil: tilings write into the same tensors, and one that writes nothing must not pass."""
    agrees = all(map(_close, found, expected))
    for tensor in found:
        tensor.fill_(float("nan"))
    return agrees


def _close(found: Tensor, expected: Tensor) -> bool:
    """Equal but for the order of additions and one rounding of the features' type."""
    scale = float(expected.abs().max()) or 1.0
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(found.dtype, 5e-3)  # TensorFloat-32 where it is allowed
    return float((found.double() - expected.double()).abs().max()) <= tolerance * scale


def seconds_on(device: torch.device) -> Callable[[Way[Any]], float]:
    """What measures one call on a CUDA device, ten in a row, between two events."""

    def seconds(way: Way[Any]) -> float:
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            way()
            start.record()
            for _ in range(10):
                way()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e4

    return seconds


def cache_file(device: torch.device) -> Path:
    """The file of choices for a device: its name holds the device, the versions and the kernels themselves."""
    return cache_folder() / f"kernels-{_fingerprint(device)}.json"


@cache
def _fingerprint(device: torch.device) -> str:
    source = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    facts = [torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), torch.__version__]
    try:
        facts.append(version("triton"))
    except PackageNotFoundError:  # built from source
        facts.append("triton")
    return hashlib.sha256(repr(facts).encode() + source).hexdigest()[:20]


class Choices:
    """Choices by key in a JSON file; read once a process, written whenever one is added.

    A file that cannot be read counts as empty, with a warning, and is written anew. Processes that write at the same time
    lose at most each other's last choice, which is then measured again.

    Args:
        path: The file.
    """

    _known: ClassVar[dict[Path, dict[str, str]]] = {}
    _lock = threading.Lock()

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._lock:
            if path not in self._known:
                self._known[path] = _read(path)

    def get(self, key: str) -> str | None:
        """The choice, if there is one."""
        return self._known[self.path].get(key)

    def put(self, key: str, choice: str) -> None:
        """Keep a choice, also on disk; a disk that cannot be written is no error."""
        with self._lock:
            merged = {**_read(self.path), **self._known[self.path], key: choice}
            self._known[self.path] = merged
            try:
                _write(self.path, merged)
            except OSError as error:
                warnings.warn(f"the choice of kernels is not kept: {error}", stacklevel=4)


def _read(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{path.name} cannot be read and is written anew: {error}", stacklevel=4)
        return {}
    choices = content.get("choices") if isinstance(content, dict) and content.get("schema") == SCHEMA else None
    if not isinstance(choices, dict) or not all(isinstance(value, str) for value in choices.values()):
        warnings.warn(f"{path.name} holds no choices of kernels and is written anew", stacklevel=4)
        return {}
    return choices


def _write(path: Path, choices: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".kernels-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"schema": SCHEMA, "choices": dict(choices)}, file, indent=1)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)  # there only if it was not moved
