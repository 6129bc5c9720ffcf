"""The ways to run a network in eval mode on the CPU: eager PyTorch, torch.compile, ONNX Runtime, OpenVINO, our engine.

A path is a function ``(model, example_input, threads) -> callable``. It leaves ``model`` alone; the callable takes inputs of
the example's shape and type, of any memory format, and returns what ``model`` returns, without gradients. A path that cannot
be had here, or not for this network, raises `PathUnavailable` with the reason.
"""

import copy
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..errors import BROKEN, UserError

Run = Callable[[Tensor], Any]
Path = Callable[[nn.Module, Tensor, int], Run]
Arrays = Callable[[Tensor], Sequence[Any]]
"""What a runtime makes of an input: NumPy arrays, one an output."""
Outputs = Callable[[Sequence[Any]], Any]
"""Makes what the network returns of the arrays of a runtime."""


class PathUnavailable(UserError):  # noqa: N818  (a reason to report, as a rule)
    """A way to run a network that is not installed here, or not able to run this network."""


def eager(model: nn.Module, example_input: Tensor, threads: int) -> Run:
    """PyTorch as it stands."""

    def run(x: Tensor) -> Any:
        with torch.no_grad(), torch_threads(threads):
            return model(x)

    return run


def eager_channels_last(model: nn.Module, example_input: Tensor, threads: int) -> Run:
    """PyTorch as it stands, features stored pixel by pixel (NHWC): faster for some networks, slower for others."""
    if example_input.ndim != 4:
        raise PathUnavailable(f"channels_last is for four dimensions, the input has {example_input.ndim}")
    run = eager(copy.deepcopy(model).to(memory_format=torch.channels_last), example_input, threads)
    return lambda x: run(x.contiguous(memory_format=torch.channels_last))


def compiled(model: nn.Module, example_input: Tensor, threads: int) -> Run:
    """``torch.compile`` with frozen weights: folded norms, packed weights, fused elementwise operations.

    Freezing is a setting of the whole process while the network is traced and compiled: as an option of ``torch.compile`` it
    reaches the code generator alone, and nothing is frozen. What is compiled is the exported network: its code is its own,
    so that networks which share the code of a class do not use up each other's recompilations.
    """
    inductor: Any = import_module("torch._inductor.config")
    with reasons("torch.compile", BROKEN), torch.no_grad(), torch_threads(threads):
        program = torch.export.export(model, (plain(example_input),)).module()
        optimized = torch.compile(program, dynamic=False)
        with inductor.patch(freezing=True):
            optimized(plain(example_input))

    def run(x: Tensor) -> Any:
        with torch.no_grad(), torch_threads(threads):
            return optimized(plain(x))

    return run


def onnx_runtime(model: nn.Module, example_input: Tensor, threads: int) -> Run:
    """ONNX Runtime's CPU provider, all optimisations on, for exactly this shape."""
    program, outputs = to_onnx(model, example_input)
    arrays = onnx_session(program, threads, "onnxruntime")
    with reasons("onnxruntime", onnx_errors()):
        arrays(example_input)
    return lambda x: outputs(arrays(x))


def open_vino(model: nn.Module, example_input: Tensor, threads: int) -> Run:
    """OpenVINO's CPU plug-in in float32 (it would take lower precision by itself), tuned for latency."""
    program, outputs = to_onnx(model, example_input)
    arrays = openvino_request(program, threads, "openvino")
    with reasons("openvino", BROKEN):
        arrays(example_input)
    return lambda x: outputs(arrays(x))


def engine(model: nn.Module, example_input: Tensor, threads: int) -> Run:
    """The fused engine of this library; it needs a C++ compiler once."""
    from . import EngineUnavailable, compile_engine

    try:
        run: Run = compile_engine(model, example_input, threads=threads)
    except EngineUnavailable as error:
        raise PathUnavailable(str(error)) from error
    return run


PATHS: dict[str, Path] = {
    "eager": eager,
    "eager_nhwc": eager_channels_last,
    "compile": compiled,
    "onnxruntime": onnx_runtime,
    "openvino": open_vino,
    "engine": engine,
}
"""Every path by name; the first is what the others are held against."""


def relative_error(found: Any, expected: Any) -> float:
    """Largest difference of two outputs of a network, over the largest magnitude of the expected one.

    The outputs are tensors or nested lists, tuples and dictionaries of tensors. Infinite where they differ in structure or
    shape, or hold a number that is not finite.

    Examples:
        >>> relative_error(torch.tensor([1.0, 3.5]), torch.tensor([1.0, 4.0]))
        0.125
    """
    leaves, spec = tree_flatten(found)
    wanted, expected_spec = tree_flatten(expected)
    if spec != expected_spec:
        return float("inf")
    pairs = zip(leaves, wanted, strict=True)
    return max((_tensor_error(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs), default=0.0)


@torch.no_grad()
def _tensor_error(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    difference = float((found.double() - expected.double()).abs().max())
    scale = float(expected.double().abs().max())
    error = difference / scale if scale else difference
    return error if error < float("inf") else float("inf")  # NaN too


def plain(x: Tensor) -> Tensor:
    """Return ``x`` without gradients and in the common memory format, as runtimes take it."""
    return x.detach().contiguous()


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """PyTorch with so many threads, and afterwards with as many as before."""
    before = torch.get_num_threads()
    if threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def reasons(path: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn what a runtime raises into the reason why its path is not available; its warnings are nobody's here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except errors as error:
        cause: BaseException = error
        while (
            cause.__cause__ is not None
        ):  # an exporter's own message is how to report a bug; the first error is the reason
            cause = cause.__cause__
        lines = str(cause).strip().splitlines()
        said = [line for line in lines if not line.startswith(("Exception from ", "Check '"))]  # OpenVINO's own places
        raise PathUnavailable(f"{path}: {type(cause).__name__}: {next(iter([*said, *lines]), '')}") from error


def require(package: str, extra: str) -> Any:
    """Import a package of an extra.

    Raises:
        PathUnavailable: It is not installed; the message names the extra.
    """
    try:
        with warnings.catch_warnings():  # of the package about itself
            warnings.simplefilter("ignore")
            return import_module(package)
    except ImportError as error:
        raise PathUnavailable(f"{error.name or package} is not installed: pip install 'mgic[{extra}]'") from error


def to_onnx(model: nn.Module, example_input: Tensor, **options: Any) -> tuple[bytes, Outputs]:
    """Return the network as ONNX, and what makes its outputs of the arrays that a runtime returns.

    Args:
        model: The network, in eval mode.
        example_input: What it is traced with.
        options: Further arguments of ``torch.onnx.export``, such as ``dynamic_shapes``.

    Raises:
        PathUnavailable: The exporter is not installed, or cannot export this network.
    """
    require("onnx", "onnx")
    require("onnxscript", "onnx")
    with reasons("ONNX export", BROKEN), torch.no_grad():
        spec: TreeSpec = tree_flatten(model(example_input))[1]
        program = torch.onnx.export(model, (plain(example_input),), dynamo=True, verbose=False, **options)
        assert program is not None
        serialized = program.model_proto.SerializeToString()
    return serialized, lambda arrays: tree_unflatten([torch.from_numpy(array) for array in arrays], spec)


def onnx_errors() -> tuple[type[Exception], ...]:
    """Return what ONNX Runtime raises: its errors have no common base."""
    state = require("onnxruntime.capi.onnxruntime_pybind11_state", "onnx")
    own = (kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return (*own, *BROKEN)


def onnx_session(program: bytes, threads: int, name: str) -> Arrays:
    """Return what runs an ONNX network on ONNX Runtime's CPU provider, all optimisations on.

    Args:
        program: The network.
        threads: CPU threads.
        name: What an error begins with.

    Raises:
        PathUnavailable: ONNX Runtime is not installed, or does not take the network.
    """
    runtime = require("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors only
    with reasons(name, onnx_errors()):
        session = runtime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
        entry = session.get_inputs()[0].name
    return lambda x: session.run(None, {entry: plain(x).numpy()})


def openvino_request(program: object, threads: int, name: str) -> Arrays:
    """Return what runs a network on OpenVINO's CPU plug-in, in float32 and tuned for latency.

    Args:
        program: An ONNX network in bytes, or the path of an ``.xml`` file.
        threads: CPU threads.
        name: What an error begins with.

    Raises:
        PathUnavailable: OpenVINO is not installed, or does not take the network.
    """
    openvino = require("openvino", "openvino")
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    with reasons(name, BROKEN):
        core = openvino.Core()
        network = core.compile_model(core.read_model(program), "CPU", options)
    requests = threading.local()  # a request serves one call at a time

    def run(x: Tensor) -> list[Any]:
        if not hasattr(requests, "one"):
            requests.one = network.create_infer_request()
        found = requests.one.infer({0: plain(x).numpy()}, share_inputs=True)
        return [found[port] for port in network.outputs]

    return run
