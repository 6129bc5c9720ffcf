"""Exported networks: files for other runtimes, each run there and held against eager PyTorch before it gets its name.

A `Format` is how a kind of file is written, loaded and counted; `FORMATS` has them by name, and a `Format` of your own is
taken as well. Beside a file ``NAME`` stands ``NAME.json``, which says what the file is, how far it is from eager PyTorch, and
its SHA-256. A file that is not right never appears, and the one that was there before stays.
"""

import copy
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import reparameterize_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .counting import cost
from .errors import BROKEN, Stopped, UserError, suggest
from .formats import FORMATS, Format, Job
from .runtime.paths import PathUnavailable, Run, onnx_errors, reasons, relative_error
from .training.files import alive, read_json, sha256, told_when_full, write_json
from .training.weights import room_for

SCHEMA = 1
MANY_GROUPS = 64
"""Groups above which some converters and compilers make one operation a group."""


class Rejected(Stopped):
    """A file that was not what the network is, and is gone; ``exit_code`` is 1."""


@dataclass(frozen=True)
class Artefact:
    """What `export` wrote: the contents of ``NAME.json``.

    Args:
        format: Name of the format.
        file: Name of the file.
        model: Name of the network.
        weights: Where its weights are from.
        input_size: Size of one input.
        batches: Least and most inputs at once; None for no limit.
        outputs: Names of the outputs where the network returns a dictionary, their number where it returns a list; None for
            one tensor.
        params: Trainable parameters of the network.
        macs: Multiply-adds of one input.
        error: Largest relative difference from eager PyTorch on all inputs it was tried on.
        decibels: Least ratio of signal to error on them; None where there was no error.
        score: In percent, of the network (``eager``) and of the file (``file``); None where nobody asked for it.
        convolutions: Convolutions that the network runs (``expected``) and nodes of the file that are one (``found``). The
            file has fewer where a convolution of a constant was worked out beforehand.
        sha256: Of each file.
        bytes: Of all files together.
        versions: Of what wrote it.
        schema: Version of this description.
    """

    format: str
    file: str
    model: str
    weights: str
    input_size: tuple[int, ...]
    batches: tuple[int, int | None]
    outputs: list[str] | int | None
    params: int
    macs: int
    error: float
    decibels: float | None
    convolutions: Mapping[str, int | None]
    sha256: Mapping[str, str]
    bytes: int
    versions: Mapping[str, str] = field(default_factory=dict)
    schema: int = SCHEMA
    score: Mapping[str, float] | None = None

    @property
    def takes(self) -> str:
        """The batches it takes, in words."""
        least, most = self.batches
        return f"{least} or more" if most is None else f"{least} to {most}"


def export(
    model: nn.Module,
    example_input: Tensor,
    path: str | Path,
    *,
    format: str | Format = "onnx",
    calibration: Sequence[Tensor] = (),
    score: Callable[[Run], float] | None = None,
    max_batch: int = 8,
    name: str | None = None,
    weights: str = "as given",
) -> Artefact:
    """Write a network in eval mode for another runtime, and run the file there before it gets its name.

    The file is held against eager PyTorch on the example (or the calibration) and on fresh inputs, one and three at a time:
    a float32 file may differ by `mgic.formats.TOLERANCE` of the largest output, an int8 file must reach
    `mgic.formats.DECIBELS`. Norms behind convolutions are folded, and every convolution of the network, grouped or not, is
    one node of the file at most.

    Args:
        model: Any network that takes one tensor and returns one, or a list or dictionary of them; it is left as it is.
        example_input: A batch of inputs, float32, on the CPU.
        path: The file; its suffix is the format's.
        format: A name among `FORMATS`, or a `Format` of your own.
        calibration: For int8: batches of real inputs of the example's size.
        score: What a network, or its file, is worth on samples that it was not trained on, in percent: accuracy, say. A file
            more than `mgic.formats.POINTS` below the network is rejected.
        max_batch: Most inputs at once, where the format plans memory for them (ExecuTorch).
        name: What to call the network; by default its class.
        weights: Where its weights are from, for the description.

    Raises:
        UserError: If the call makes no sense, a package is missing, or the exporter cannot export this network.
        Rejected: If the file does not do what the network does. Whatever was at ``path`` before is still there.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = export(nn.Conv2d(4, 8, 3, groups=2), torch.randn(1, 4, 6, 6), f"{folder}/conv.pt2", format="torch")
        ...     load_artefact(f"{folder}/conv.pt2", threads=1)(torch.randn(5, 4, 6, 6)).shape
        torch.Size([5, 8, 4, 4])
        >>> made.takes, made.convolutions
        ('1 or more', {'expected': 1, 'found': 1})
    """
    path, kind = Path(path), _format(format)
    _check(kind, example_input, path, calibration, max_batch)
    reference = copy.deepcopy(model).eval()
    example = example_input.detach().clone()
    outputs = _structure(_eager(reference, example))
    macs = cost(reference, example.shape[1:])
    merged = reparameterize_model(reference)
    expected = count_convolutions(merged, example[:1])
    several = example if len(example) > 1 else torch.cat([example, example])
    job = Job(merged, several, calibration, max_batch, outputs)
    with _workshop(path, merged) as folder:
        written = _write(kind, job, reference, folder / path.name, path)
        _check_written(written, kind, expected, path)
        scores = None if score is None else _scored(score, reference, written.run, kind, path)
        files = sorted(folder.iterdir())
        made = Artefact(
            format=next((key for key, value in FORMATS.items() if value is kind), path.suffix),
            file=path.name,
            model=name or type(model).__name__,
            weights=weights,
            input_size=tuple(example.shape[1:]),
            batches=(1, max_batch if kind.bounded else None),
            outputs=outputs,
            params=macs.params,
            macs=macs.macs,
            error=written.error,
            decibels=written.decibels if math.isfinite(written.decibels) else None,
            convolutions={"expected": expected, "found": written.convolutions},
            sha256={one.name: sha256(one) for one in files},
            bytes=sum(one.stat().st_size for one in files),
            versions=_versions(kind.packages),
            score=scores,
        )
        write_json(folder / _description(path).name, asdict(made))
    return made


class _Written(NamedTuple):
    """A file just written: what runs it, its convolutions, and how far it is from eager PyTorch."""

    run: Run
    convolutions: int | None
    error: float
    decibels: float


def _write(kind: Format, job: Job, reference: nn.Module, file: Path, path: Path) -> _Written:
    """Write a file for ``path``, load it, count its convolutions and run it beside the network."""
    try:
        kind.write(job, file)
        found = None if kind.convolutions is None else kind.convolutions(file)
        leaves = kind.load(file, 1)
        run: Run = lambda x: _restore(job.outputs, leaves(x))  # noqa: E731
        error, decibels = _differences(run, reference, kind, job)
    except PathUnavailable as reason:
        raise UserError(f"{path}: not exported: {str(reason).replace(str(file), path.name)}") from reason
    return _Written(run, found, error, decibels)


def _check_written(written: _Written, kind: Format, expected: int, path: Path) -> None:
    """Reject a file that takes convolutions apart or does not do what the network does."""
    if written.convolutions is not None and written.convolutions > expected:
        raise Rejected(
            f"{path}: not exported: {written.convolutions} convolutions for the network's {expected}; the exporter takes "
            "grouped convolutions apart, which costs the speed they are there for"
        )
    if not (written.error <= kind.tolerance and written.decibels >= kind.decibels):
        limit = f"at most {kind.tolerance:g}" if written.error > kind.tolerance else f"at least {kind.decibels:g} dB"
        raise Rejected(
            f"{path}: not exported: it differs from eager PyTorch by {written.error:.1e} of the largest output "
            f"({written.decibels:.1f} dB); {limit} would do"
        )


def _scored(
    score: Callable[[Run], float], reference: nn.Module, run: Run, kind: Format, path: Path
) -> Mapping[str, float]:
    """Score the network and its file; reject a file that is worth less."""
    scores = {"eager": score(partial(_eager, reference)), "file": score(run)}
    if not scores["file"] >= scores["eager"] - kind.points:
        raise Rejected(
            f"{path}: not exported: it scores {scores['file']:.2f} % where eager PyTorch scores {scores['eager']:.2f} %; "
            f"{kind.points:g} points less would do"
        )
    return scores


def load_artefact(path: str | Path, threads: int = 1) -> Run:
    """Load an exported file into its runtime: what runs it, called like the network.

    If there is a ``NAME.json`` beside it, the file must be the one it describes. Nothing in a file is executed as Python; a
    ``.pt2`` file that would make PyTorch do so is refused. The native runtimes read their own formats, and none of them
    was made for files of strangers.

    Args:
        path: The file; its suffix tells the runtime.
        threads: CPU threads of a call; for ExecuTorch, of the whole process.

    Raises:
        UserError: If there is no such file, it is damaged, or its runtime is not installed or does not take it.
    """
    path = Path(path)
    kind = format_of(path)
    described = describe_artefact(path)
    if threads < 1:
        raise UserError(f"threads must be positive, got {threads}")
    leaves = kind.load(path, threads)
    if described is not None:
        return lambda x: _restore(described["outputs"], leaves(x))

    def run(x: Tensor) -> Any:
        found = list(leaves(x))
        return found[0] if len(found) == 1 else found

    return run


def describe_artefact(path: Path) -> dict[str, Any] | None:
    """Read the description beside an exported file, and hold the file against it; None where there is none.

    Raises:
        UserError: The file is missing or not the one described, or the description is damaged.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    place = _description(path)
    if not place.exists():
        return None
    described = read_json(place)
    known = {one.name for one in Artefact.__dataclass_fields__.values()}
    if described.get("schema") != SCHEMA or set(described) != known or not isinstance(described["sha256"], dict):
        raise UserError(f"{place}: no description of an exported file that this version of mgic reads")
    for name, digest in described["sha256"].items():
        one = path.parent / Path(name).name
        if not one.is_file() or sha256(one) != digest:
            raise UserError(f"{one}: damaged or of another export: its SHA-256 is not the one in {place.name}")
    return described


def format_of(path: Path) -> Format:
    """Return the format of a file by its suffix.

    Raises:
        UserError: No format has it.
    """
    for kind in FORMATS.values():
        if kind.suffix == path.suffix:
            return kind
    known = ", ".join(sorted({kind.suffix for kind in FORMATS.values()}))
    raise UserError(f"{path}: no exported network: its name must end in one of {known}")


class _Convolutions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Note the groups of every convolution that is run, and its input channels per group."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[int, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.found.append((args[8], args[0].shape[1] // args[8]))
        return func(*args, **(kwargs or {}))


def count_convolutions(model: nn.Module, x: Tensor) -> int:
    """Count the convolutions a network runs for an input: shared and functional ones as often as they are executed.

    Examples:
        >>> shared = nn.Conv2d(4, 4, 3, padding=1)
        >>> count_convolutions(nn.Sequential(shared, nn.ReLU(), shared), torch.ones(1, 4, 6, 6))
        2
    """
    counter = _Convolutions()
    with torch.no_grad(), counter:
        model(x)
    most = max((groups for groups, channels in counter.found if channels > 1), default=0)  # depthwise is no trouble
    if most > MANY_GROUPS:
        warnings.warn(
            f"a convolution has {most} groups: some converters and compilers make one operation of each group; "
            f"at most {MANY_GROUPS} are safe",
            stacklevel=3,
        )
    return len(counter.found)


def _format(name: str | Format) -> Format:
    if isinstance(name, Format):
        return name
    if name not in FORMATS:
        raise UserError(f"there is no format {name!r}{suggest(name, FORMATS)}")
    return FORMATS[name]


def _check(kind: Format, example: Tensor, path: Path, calibration: Sequence[Tensor], max_batch: int) -> None:
    if example.dtype != torch.float32 or example.device.type != "cpu" or example.ndim < 2 or not example.numel():
        raise UserError(
            f"example_input must be a float32 batch on the CPU, got {tuple(example.shape)} of {example.dtype} on "
            f"{example.device}"
        )
    if path.suffix != kind.suffix:
        raise UserError(f"{path}: the name of such a file must end in {kind.suffix}")
    if max_batch < 2:
        raise UserError(f"max_batch must be at least 2, got {max_batch}")
    for package in kind.packages:
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"{package} is not installed", name=package)
    if kind.calibrated and not calibration:
        raise UserError(f"{path}: int8 needs calibration: batches of real inputs, such as the network was trained on")
    for batch in calibration:
        if batch.dtype != torch.float32 or batch.shape[1:] != example.shape[1:] or not batch.numel():
            raise UserError(
                f"calibration must be float32 batches of size {tuple(example.shape[1:])}, got {tuple(batch.shape)} of "
                f"{batch.dtype}"
            )


def _eager(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return model(x)


def _structure(value: Any) -> list[str] | int | None:
    """What is kept of the structure of a network's output, see `Artefact`."""
    if isinstance(value, Tensor):
        return None
    leaves = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(leaves, list | tuple) or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise UserError(
            f"a network to export returns a tensor, or a list or dictionary of them, not {type(value).__name__}"
        )
    return list(value) if isinstance(value, dict) else len(leaves)


def _restore(outputs: list[str] | int | None, leaves: Sequence[Tensor]) -> Any:
    if outputs is None:
        return leaves[0]
    return dict(zip(outputs, leaves, strict=True)) if isinstance(outputs, list) else list(leaves)


def signal_to_error(found: Any, expected: Any) -> float:
    """Return the energy of the expected outputs over that of the differences, in decibels; infinite where they are equal.

    Examples:
        >>> round(signal_to_error(torch.tensor([3.0, 4.1]), torch.tensor([3.0, 4.0])))
        34
    """
    pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return -math.inf
    signal = sum(float(b.double().square().sum()) for _, b in pairs)
    error = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    if not error:
        return math.inf
    return 10 * math.log10(signal / error) if 0 < error < math.inf and signal else -math.inf  # NaN too


def _differences(run: Run, reference: nn.Module, kind: Format, job: Job) -> tuple[float, float]:
    """Largest relative error and least decibels over all inputs a file is tried on."""
    errors, decibels = [0.0], [math.inf]
    broken = onnx_errors() if "onnxruntime" in kind.packages else BROKEN
    for x in _trials(kind, job):
        with reasons(f"its runtime does not take {len(x)} input(s)", broken):
            found = run(x)
        expected = _eager(reference, x)
        errors.append(relative_error(found, [*expected] if isinstance(expected, tuple) else expected))
        decibels.append(signal_to_error(found, expected))
    return max(errors), min(decibels)


def _trials(kind: Format, job: Job) -> Iterator[Tensor]:
    """The inputs a file is tried on: known ones, then fresh ones, one, three and as many as it takes.

    Fresh inputs are noise; where a file was calibrated, mixtures of pairs of real inputs, for its ranges are theirs.
    """
    generator = torch.Generator().manual_seed(0)
    known = torch.cat(list(job.calibration)) if kind.calibrated else job.example
    sizes = dict.fromkeys([1, 3, job.max_batch] if kind.bounded else [1, 3])
    for size in sizes:
        yield known[: min(size, job.max_batch)]
        if not kind.calibrated:
            yield torch.randn(size, *known.shape[1:], generator=generator)
            continue
        pairs = torch.randint(len(known), (2, size), generator=generator)
        share = torch.rand(size, *[1] * (known.ndim - 1), generator=generator)
        yield share * known[pairs[0]] + (1 - share) * known[pairs[1]]


def _description(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in ("mgic", "torch", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # mgic run from its sources
            continue
    return found


@contextmanager
def _workshop(path: Path, model: nn.Module) -> Iterator[Path]:
    """A folder beside ``path`` whose files move there when the block ends well; it is gone in every case.

    The description moves last: between two renames, the description that is there does not fit, and loading says so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".tmp-*-{path.name}"):
        if not alive(int(stale.name.split("-")[1])):  # of a process that was killed
            shutil.rmtree(stale)
    folder = path.parent / f".tmp-{os.getpid()}-{path.name}"
    try:
        with told_when_full(path.parent, 2 * room_for(model)):
            folder.mkdir()
            yield folder
            for one in sorted(folder.iterdir(), key=lambda one: one.name == _description(path).name):
                with one.open("rb+") as file:
                    os.fsync(file.fileno())
                os.replace(one, path.with_name(one.name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
