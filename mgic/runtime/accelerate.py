"""The fastest correct way to run a network, found by trying all."""

import copy
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, suggest
from .gpu import GPU_PATHS
from .paths import PATHS, Path, PathUnavailable, Run, eager, relative_error

SHAPES_KEPT = 8
"""Other input shapes that an accelerated network keeps ready, the least recently used one given up first."""

TOLERANCES = {
    ("cpu", torch.float32): 1e-4,
    ("cuda", torch.float32): 5e-3,  # PyTorch's convolutions use TensorFloat-32: ten bits of mantissa
    ("cuda", torch.float16): 2e-2,
    ("cuda", torch.bfloat16): 5e-2,  # seven bits, rounded after each kernel, and fused kernels round less often
}
"""Device and type of inputs -> largest relative difference from eager PyTorch, by default."""


@dataclass(frozen=True)
class PathResult:
    """What became of one path.

    Args:
        path: Its name.
        milliseconds: Median time of one call; None where it was not timed.
        error: Largest relative difference from eager PyTorch; None where it could not be built.
        reason: Why it cannot be used; None where it can.
    """

    path: str
    milliseconds: float | None = None
    error: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class AccelerationReport:
    """Every path that was tried for an input of this shape, device and type, on so many threads, in the order given."""

    results: tuple[PathResult, ...]
    input_size: tuple[int, ...]
    threads: int
    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        on = f"{self.threads} thread(s)" if self.device.type == "cpu" else f"{self.dtype} on {self.device}"
        lines = [f"input {'x'.join(map(str, self.input_size))}, {on.removeprefix('torch.')}"]
        for one in self.results:
            time_ = "" if one.milliseconds is None else f"{one.milliseconds:.3f} ms"
            error = "" if one.error is None else f"error {one.error:.1e}"
            lines.append(f"{one.path:<12} {time_:>12}  {error:<14}{one.reason or ''}".rstrip())
        return "\n".join(lines)


class Accelerated(nn.Module):
    """A network behind its fastest path; called like the network, for inference only.

    It has no parameters: its paths hold copies of the network's weights as they were. For an input of another shape the
    path is built again and checked again, which takes as long as it took the first time; the last `SHAPES_KEPT` shapes are
    kept. Where that fails, and for empty inputs, other types or devices and inputs that need gradients, eager PyTorch runs.

    Args:
        network: The network in eval mode, for the cases that are eager PyTorch's.
        path: Name of the path.
        run: The path, built for inputs of ``report.input_size``.
        build: Builds the path for another input and checks it.
        report: What was tried.
    """

    def __init__(
        self, network: nn.Module, path: str, run: Run, build: Callable[[Tensor], Run], report: AccelerationReport
    ) -> None:
        super().__init__()
        self.path, self.report = path, report
        self._run, self._build, self._building = run, build, threading.Lock()
        self._run_for = lru_cache(SHAPES_KEPT)(self._built)
        self._network: Run = network.__call__  # not a submodule: no weight here that training or loading could reach
        self._eager = eager(network, torch.empty(report.input_size), report.threads)  # the example plays no part
        self.training = False

    def train(self, mode: bool = True) -> "Accelerated":
        """Refuse to train: accelerate the network again after it was trained."""
        if mode:
            raise UserError(
                "an accelerated network is for inference: train the network itself, then accelerate it again"
            )
        return super().train(False)

    def forward(self, x: Tensor) -> Any:
        """Return what the network returns for ``x``."""
        if x.requires_grad and torch.is_grad_enabled():
            return self._network(x)
        if x.dtype != self.report.dtype or x.device != self.report.device or not x.numel():
            return self._eager(x)
        run = self._run if x.shape == self.report.input_size else self._run_for(x.shape)
        return run(x)

    def _built(self, size: torch.Size) -> Run:
        with self._building:  # exporters and compilers are not made for concurrent calls
            try:
                return self._build(torch.randn(size, device=self.report.device).to(self.report.dtype))
            except PathUnavailable as error:
                warnings.warn(f"eager PyTorch runs inputs of {tuple(size)}: {error}", stacklevel=4)
                return self._eager

    def extra_repr(self) -> str:
        """Path and report."""
        return f"path={self.path}\n{self.report}"


def accelerate(
    model: nn.Module,
    example_input: Tensor,
    *,
    threads: int | None = None,
    paths: Iterable[str] | Mapping[str, Path] | None = None,
    tolerance: float | None = None,
    rounds: int = 9,
) -> Accelerated:
    """Return the fastest correct way to run a network where it is, with a report on every way tried.

    Every path is built for a copy of the network in eval mode, held against eager PyTorch on the example and on random
    numbers, and timed: round after round each path is called once, after a call that warms it up. What is not installed,
    not possible or not equal is reported with its reason; where that is every path, eager PyTorch runs the network, with a
    warning. Building takes seconds, ``torch.compile`` up to minutes; name fewer paths if that is too long.

    Args:
        model: The network; it is left as it is, and later changes of its weights do not reach the result.
        example_input: One input batch, on the network's device; float32, on a CUDA device also bfloat16 or float16.
        threads: CPU threads; as many as PyTorch uses by default.
        paths: The ways to try: names among ``mgic.runtime.paths.PATHS`` (on a CUDA device ``mgic.runtime.gpu.GPU_PATHS``),
            or functions of your own by name. All by default.
        tolerance: Largest relative difference from eager PyTorch; `TOLERANCES` by default.
        rounds: Timed calls of each path.

    Raises:
        UserError: If the input, its device, ``threads``, ``rounds`` or ``paths`` make no sense.

    Warns:
        UserWarning: If none of the paths can run the network, so that eager PyTorch does.

    Examples:
        >>> fast = accelerate(nn.Conv2d(3, 8, 3), torch.randn(1, 3, 16, 16), paths=["eager"])
        >>> fast.path, fast(torch.randn(2, 3, 9, 9)).shape
        ('eager', torch.Size([2, 8, 7, 7]))
    """
    threads = torch.get_num_threads() if threads is None else threads
    known = GPU_PATHS if example_input.is_cuda else PATHS
    paths = known if paths is None else _by_name(paths, known)
    _check(model, example_input, threads, rounds, paths)
    limit = TOLERANCES[example_input.device.type, example_input.dtype] if tolerance is None else tolerance
    network = copy.deepcopy(model).eval()
    example = example_input.detach().clone()
    reference = eager(network, example, threads)

    def checked(build: Path, inputs: list[Tensor]) -> tuple[Run, float]:
        run = build(network, inputs[0], threads)
        return run, max(relative_error(run(x), reference(x)) for x in inputs)

    runs: dict[str, Run] = {}
    results: dict[str, PathResult] = {}
    for name, build in paths.items():
        try:
            run, error = checked(build, [example, torch.randn_like(example)])
        except PathUnavailable as reason:
            results[name] = PathResult(name, reason=str(reason))
            continue
        wrong = None if error <= limit else f"not equal to eager within {limit:g}"
        results[name] = PathResult(name, None, error, wrong)
        if wrong is None:
            runs[name] = run
    if not runs:
        reasons = "; ".join(f"{one.path}: {one.reason}" for one in results.values())
        warnings.warn(f"eager PyTorch runs the network, no path could: {reasons}", stacklevel=2)
        runs, results["eager"] = {"eager": reference}, PathResult("eager", error=0.0)
    times = _interleaved(runs, example, rounds)
    for name, seconds in times.items():
        results[name] = PathResult(name, 1e3 * statistics.median(seconds), results[name].error)
    best = min(runs, key=lambda name: results[name].milliseconds or 0.0)

    def rebuild(x: Tensor) -> Run:
        run, error = checked(paths.get(best, eager), [x])
        if error > limit:
            raise PathUnavailable(f"{best} differs from eager by {error:.1e}, more than {limit:g}")
        return run

    report = AccelerationReport(tuple(results.values()), tuple(example.shape), threads, example.device, example.dtype)
    return Accelerated(network, best, runs[best], rebuild, report)


def _interleaved(runs: Mapping[str, Run], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of ``rounds`` calls of each callable, taken in turn, each after an untimed call of the same."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run(x)
            _wait(x)
            began = time.perf_counter()
            run(x)
            _wait(x)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def _wait(x: Tensor) -> None:
    """Wait for the GPU, if ``x`` is on one: calls return before their work is done."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _by_name(paths: Iterable[str] | Mapping[str, Path], known: Mapping[str, Path]) -> Mapping[str, Path]:
    if isinstance(paths, Mapping):
        return paths
    names = [paths] if isinstance(paths, str) else list(paths)
    for name in names:
        if name not in known:
            raise UserError(f"there is no path {name!r}{suggest(name, known)}")
    return {name: known[name] for name in names}


def _check(model: nn.Module, example: Tensor, threads: int, rounds: int, paths: Mapping[str, Path]) -> None:
    if threads < 1 or rounds < 1 or not paths:
        raise UserError(f"threads={threads} and rounds={rounds} must be positive, and paths must not be empty")
    if not example.numel():
        raise UserError(f"example_input must not be empty, got a batch of {tuple(example.shape)}")
    elsewhere = {str(t.device) for t in (example, *model.parameters(), *model.buffers()) if t.device != example.device}
    if elsewhere:
        raise UserError(f"the input is on {example.device}, but there are weights on {', '.join(sorted(elsewhere))}")
    dtypes = [str(dtype).removeprefix("torch.") for device, dtype in TOLERANCES if device == example.device.type]
    if not dtypes:
        raise UserError(f"accelerate is for the CPU and CUDA devices, the input is on {example.device}")
    if (example.device.type, example.dtype) not in TOLERANCES:
        raise UserError(f"on {example.device} example_input must be {' or '.join(dtypes)}, got {example.dtype}")
