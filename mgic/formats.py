"""The kinds of files for other runtimes: how each is written, loaded and counted.

Nothing here decides whether a file is right: `mgic.exporting` runs it and holds it against the network.
"""

import io
import json
import logging
import math
import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .errors import BROKEN, UserError
from .runtime.paths import (
    onnx_errors,
    onnx_session,
    openvino_request,
    plain,
    reasons,
    require,
    to_onnx,
    torch_threads,
)

TOLERANCE = 1e-4
"""Largest relative difference from eager PyTorch of a float32 file."""
DECIBELS = 25.0
"""Least ratio of signal to error of an int8 file."""
POINTS = 1.0
"""Most that the score of an int8 file may lie below that of eager PyTorch, in percent points."""


@dataclass(frozen=True)
class Job:
    """What a format is to write.

    Args:
        model: A copy of the network in eval mode, branches merged; the format may change it.
        example: Two inputs or more, so that an exporter does not take the number of inputs for a constant.
        calibration: Batches of real inputs; empty where the format needs none.
        max_batch: Most inputs at once, for formats that plan their memory for it.
        outputs: Names of the outputs where the network returns a dictionary, their number where it returns a list; None for
            one tensor.
    """

    model: nn.Module
    example: Tensor
    calibration: Sequence[Tensor]
    max_batch: int
    outputs: list[str] | int | None

    def program(self, most: int | None = None) -> torch.export.ExportedProgram:
        """Return the network as ``torch.export`` sees it, for any number of inputs, or up to ``most``."""
        sizes = ({0: torch.export.Dim("batch", min=1, max=most)},)
        with reasons("torch.export", BROKEN), torch.no_grad():
            return torch.export.export(self.model, (plain(self.example),), dynamic_shapes=sizes)


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Args:
        suffix: How its name ends.
        write: Writes a network to a file, and what belongs to it beside it under the same stem.
        load: ``(file, threads)`` to what runs it: the tensors it returns for an input, in order.
        convolutions: How many nodes of a file are convolutions; None where nobody can tell.
        packages: What must be installed.
        runtime: The module that runs it.
        tolerance: Largest relative difference from eager PyTorch.
        decibels: Least ratio of signal to error.
        points: Most that its score may fall, where there is one to hold against.
        calibrated: Whether it needs real inputs. What it writes is then judged on such inputs, not on noise.
        bounded: Whether a file takes ``max_batch`` inputs at most.
    """

    suffix: str
    write: Callable[[Job, Path], object]
    load: Callable[[Path, int], Callable[[Tensor], Sequence[Tensor]]]
    convolutions: Callable[[Path], int] | None = None
    packages: tuple[str, ...] = ()
    runtime: str = "torch"
    tolerance: float = TOLERANCE
    decibels: float = -math.inf
    points: float = POINTS
    calibrated: bool = False
    bounded: bool = False


def _onnx_program(job: Job) -> bytes:
    names = job.outputs
    labels = names if isinstance(names, list) else [f"output{i}" for i in range(names)] if names else ["output"]
    sizes = ({0: torch.export.Dim("batch")},)
    return to_onnx(job.model, job.example, dynamic_shapes=sizes, input_names=["input"], output_names=labels)[0]


def write_onnx(job: Job, file: Path) -> None:
    """ONNX, float32, any number of inputs."""
    file.write_bytes(_onnx_program(job))


def write_onnx_int8(job: Job, file: Path) -> None:
    """ONNX, int8: static quantisation of weights (per channel) and features, ranges from the calibration.

    Pointwise convolutions of a difference stay in float32: these are the prolongations of the multigrid cycle. A norm behind
    one, folded into it, makes of a small correction what is added to the features, and of its rounding too: of a trained
    network of the digits, 9.9 dB were left with them in int8 and 31.9 dB without.
    """
    quantization = require("onnxruntime.quantization", "onnx")
    preparation = require("onnxruntime.quantization.shape_inference", "onnx")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        batches = iter(job.calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"input": plain(batch).numpy()}

    with tempfile.TemporaryDirectory() as folder, reasons("int8", onnx_errors()):
        plain_file, prepared = Path(folder, "float32.onnx"), Path(folder, "prepared.onnx")
        plain_file.write_bytes(_onnx_program(job))
        preparation.quant_pre_process(str(plain_file), str(prepared), skip_symbolic_shape=True)
        kept = _prolongations(require("onnx", "onnx").load(str(prepared)).graph)
        quantization.quantize_static(str(prepared), str(file), Reader(), per_channel=True, nodes_to_exclude=kept)


def _prolongations(graph: Any) -> list[str]:
    """Names of the 1x1 convolutions whose input is a difference."""
    differences = {name for node in graph.node if node.op_type == "Sub" for name in node.output}
    points = {one.name for one in graph.initializer if all(size == 1 for size in one.dims[2:])}
    return [
        node.name
        for node in graph.node
        if node.op_type == "Conv" and node.input[0] in differences and node.input[1] in points
    ]


def load_onnx(file: Path, threads: int) -> Callable[[Tensor], Sequence[Tensor]]:
    """Run by ONNX Runtime."""
    run = onnx_session(file.read_bytes(), threads, f"{file}: onnxruntime")
    return lambda x: [torch.from_numpy(array) for array in run(x)]


def count_onnx(file: Path) -> int:
    """Nodes of an ONNX file that are convolutions."""
    with reasons(str(file), BROKEN):
        graph = require("onnx", "onnx").load(str(file)).graph
    return sum(node.op_type in ("Conv", "ConvTranspose") for node in graph.node)


def write_openvino(job: Job, file: Path) -> None:
    """OpenVINO's ``.xml`` and ``.bin``, float32, any number of inputs."""
    openvino = require("openvino", "openvino")
    with reasons("OpenVINO export", BROKEN):
        network = openvino.Core().read_model(_onnx_program(job))
        openvino.save_model(network, str(file), compress_to_fp16=False)


def load_openvino(file: Path, threads: int) -> Callable[[Tensor], Sequence[Tensor]]:
    """Run by OpenVINO's CPU plug-in, in float32."""
    run = openvino_request(str(file), threads, f"{file}: openvino")
    return lambda x: [torch.from_numpy(array) for array in run(x)]


def count_openvino(file: Path) -> int:
    """Nodes of an OpenVINO file that are convolutions."""
    with reasons(str(file), BROKEN):
        network = require("openvino", "openvino").Core().read_model(str(file))
    return sum("Convolution" in node.get_type_name() for node in network.get_ops())


def write_executorch(job: Job, file: Path) -> None:
    """ExecuTorch for XNNPACK, float32, up to ``max_batch`` inputs: its memory is planned for that many."""
    edge = require("executorch.exir", "executorch")
    xnnpack = require("executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch")
    with reasons("ExecuTorch export", BROKEN):
        program = edge.to_edge_transform_and_lower(
            job.program(job.max_batch), partitioner=[xnnpack.XnnpackPartitioner()]
        )
        file.write_bytes(program.to_executorch().buffer)


def load_executorch(file: Path, threads: int) -> Callable[[Tensor], Sequence[Tensor]]:
    """Run by ExecuTorch's own runtime."""
    runtime = require("executorch.runtime", "executorch")
    binding = require("executorch.extension.pybindings.portable_lib", "executorch")
    contents = _whole_pte(file)
    if binding._threadpool_get_thread_count() != threads:
        binding._unsafe_reset_threadpool(threads)
    with reasons(f"{file}: executorch", BROKEN):
        program = runtime.Runtime.get().load_program(contents)
        method = program.load_method("forward")

    def run(x: Tensor, program: Any = program) -> list[Tensor]:  # the program's memory is the method's
        return list(method.execute([plain(x)]))  # copies: the next call leaves them alone

    return run


def _whole_pte(file: Path) -> bytes:
    """Read a ``.pte`` file, refusing one that is cut off: the runtime would read beyond its end."""
    reader = require("executorch.exir._serialize._program", "executorch")
    contents = file.read_bytes()
    with reasons(f"{file}: executorch", BROKEN):
        header = reader._get_extended_header(contents)
        if contents[4:6] != b"ET" or header is None:
            raise ValueError("not a .pte file")
        if len(contents) < max(header.program_size, header.segment_base_offset + header.segment_data_size):
            raise ValueError("the file ends too early")
    return contents


def count_executorch(file: Path) -> int:
    """Convolutions of an ExecuTorch file: nodes of XNNPACK's graphs, and calls of the portable kernel."""
    program = (
        require("executorch.exir._serialize._program", "executorch").deserialize_pte_binary(_whole_pte(file)).program
    )
    found = 0
    for plan in program.execution_plan:
        for delegate in plan.delegates:
            found += _count_xnnpack(bytes(program.backend_delegate_data[delegate.processed.index].data))
        names = [one.name for one in plan.operators]
        calls = (step.instr_args for chain in plan.chains for step in chain.instructions)
        found += sum(names[call.op_index] == "aten::convolution" for call in calls if hasattr(call, "op_index"))
    return found


def _count_xnnpack(payload: bytes) -> int:
    """Convolutions of one of XNNPACK's graphs, which is a flatbuffer with its own header."""
    serializer = require("executorch.backends.xnnpack.serialization.xnnpack_graph_serialize", "executorch")
    flatbuffer = require("executorch.exir._serialize._flatbuffer", "executorch")
    header = serializer.XNNHeader.from_bytes(payload[: serializer.XNNHeader.EXPECTED_LENGTH])
    with tempfile.TemporaryDirectory() as folder:
        schema, graph = Path(folder, "schema.fbs"), Path(folder, "graph.bin")
        schema.write_bytes(serializer._get_schema_bytes())
        graph.write_bytes(payload[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size])
        flatbuffer._flatc_decompile(folder, str(schema), str(graph), ["--raw-binary"])
        text = graph.with_suffix(".json").read_text(encoding="utf-8")  # no JSON: it has numbers like -inf
    nodes = re.findall(
        r'"xnode_union_type": "XNN(Conv2d|DepthwiseConv2d|ConvTranspose2d)",\s*"xnode_union": {(.*?)}', text, re.S
    )
    return sum(kind != "DepthwiseConv2d" or not _is_norm(fields) for kind, fields in nodes)


def _is_norm(fields: str) -> bool:
    """A depthwise convolution of one pixel: what a norm becomes in XNNPACK that follows no convolution."""
    size = dict(re.findall(r'"(kernel_height|kernel_width|group_input_channels|group_output_channels)": (\d+)', fields))
    return len(size) == 4 and set(size.values()) == {"1"}


def write_torch(job: Job, file: Path) -> None:
    """``torch.export``'s ``.pt2``, float32, any number of inputs; norms stay as they are."""
    contents = io.BytesIO()
    torch.export.save(job.program(), contents)
    file.write_bytes(contents.getvalue())


def load_torch(file: Path, threads: int) -> Callable[[Tensor], Sequence[Tensor]]:
    """Run by PyTorch, as the file's own code."""
    module = _torch_program(file).module()

    def run(x: Tensor) -> list[Tensor]:
        with torch.no_grad(), torch_threads(threads):
            return tree_leaves(module(plain(x)))

    return run


def count_torch(file: Path) -> int:
    """Nodes of a ``.pt2`` file that are convolutions."""
    names = (str(node.target) for node in _torch_program(file).graph.nodes if node.op == "call_function")
    return sum(bool(re.match(r"aten\.(conv\d|conv_transpose\d|convolution)", name)) for name in names)


_ARCHIVE = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
)
_SIZE = re.compile(
    r"(\b(Symbol|Integer|Add|Mul|Pow|Max|Min|Mod|FloorDiv|positive|nonnegative|integer|True|False)\b|'[su]\d+'"
    r"|\b[su]\d+\b|[\d\s(),=*+/-])*"
)


def _torch_program(file: Path) -> torch.export.ExportedProgram:
    """Read a ``.pt2`` file that is data alone.

    ``torch.export.load`` unpickles what the file marks as pickled, without limits; it falls back to that for the sample
    inputs; it evaluates sizes and guards as Python (torch 2.15). So only what is none of these is handed to it, in an archive
    of what was looked at.
    """
    clean = io.BytesIO()
    with reasons(str(file), (*BROKEN, OSError, EOFError, zipfile.BadZipFile)):
        with zipfile.ZipFile(file) as archive, zipfile.ZipFile(clean, "w") as copied:
            names = archive.namelist()
            if len(set(names)) < len(names):
                raise ValueError("two parts have the same name")
            for name in names:
                part, contents = name.partition("/")[2], archive.read(name)
                _refuse_code(part, contents)
                copied.writestr(name, contents)
        clean.seek(0)
        with _silent("torch.export"):
            return torch.export.load(clean)


@contextmanager
def _silent(logger: str) -> Iterator[None]:
    """Keep a logger from printing what the error that follows says."""
    log = logging.getLogger(logger)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _refuse_code(part: str, contents: bytes) -> None:
    if not _ARCHIVE.fullmatch(part):
        raise UserError(f"{part} is no part of a network that mgic exports: it may hold code")
    if part.endswith("config.json") and any(one["use_pickle"] for one in json.loads(contents)["config"].values()):
        raise UserError(f"{part} asks for pickled weights, which can run code")
    if part.endswith(".pt"):
        try:
            torch.load(io.BytesIO(contents), weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(f"{part} holds more than tensors and plain values, which can run code") from error
    if part.endswith("model.json"):
        model = json.loads(contents)
        if model["guards_code"]:
            raise UserError(f"{part} holds guards, which are code")
        for size in _values(model, "expr_str"):
            if not _SIZE.fullmatch(size):
                raise UserError(f"{part} has the size {size!r}, which is code")


def _values(tree: Any, key: str) -> Iterator[Any]:
    """All values of a key in nested JSON."""
    if isinstance(tree, dict):
        if key in tree:
            yield tree[key]
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from _values(branch, key)


_ONNX = ("onnx", "onnxscript", "onnxruntime")
FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", write_onnx, load_onnx, count_onnx, _ONNX, "onnxruntime"),
    "onnx_int8": Format(
        *(".onnx", write_onnx_int8, load_onnx, count_onnx, _ONNX, "onnxruntime"),
        tolerance=math.inf,
        decibels=DECIBELS,
        calibrated=True,
    ),
    "openvino": Format(
        ".xml", write_openvino, load_openvino, count_openvino, ("onnx", "onnxscript", "openvino"), "openvino"
    ),
    "executorch": Format(
        ".pte", write_executorch, load_executorch, count_executorch, ("executorch",), "executorch.runtime", bounded=True
    ),
    "torch": Format(".pt2", write_torch, load_torch, count_torch),
}
"""Every format by name."""
