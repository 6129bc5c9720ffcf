"""From an op list to the engine: where each value lies in memory, how weights are packed, and the calls themselves.

Geometry. All maps of one resolution share one layout: rows of ``width + gap`` floats, where the gap, and guards of zeros
above and below, are as large as any convolution at this resolution reads over the edge. A convolution with stride reads
maps that were split into phases, of the resolution of its output, so it too is a sum over shifted pixels.

Memory. Every value gets its place before anything runs: planes of one geometry are used again as soon as their last reader
is done. Parts of a concatenation are written where they belong, slices of channels are views.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .build import INSTRUCTION_SETS, instruction_set, load
from .capture import EngineUnavailable
from .ops import (
    Activation,
    Affine,
    Combine,
    Concat,
    Convolution,
    Copy,
    Flatten,
    Mean,
    Op,
    Pool,
    Program,
    Resize,
    Shuffle,
    Slice,
    Step,
    Subsample,
    TorchCall,
)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# In the order of engine.cpp.
KINDS = _words("conv linear depthwise max_pool average_pool mean map phases resize zero flatten load store")
STEP_KINDS = _words(
    "add subtract subtract_from multiply channel_add channel_subtract channel_subtract_from channel_multiply affine "
    "relu clamp leaky_relu hard_sigmoid hard_swish sigmoid silu tanh gelu gelu_tanh elu"
)
LINE = 16  # floats in a cache line
AHEAD = 100  # taps of arithmetic that hide the way to memory; longer sums hide it by themselves


class _Step(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("a", ctypes.c_float),
        ("b", ctypes.c_float),
        ("offset", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
    )


_INTEGERS = _words(
    "x_row y_row in_channels in_height in_width channels height width groups depth rows length exact port ahead"
)
_WINDOW = _words("kernel_h kernel_w stride_h stride_w pad_h pad_w dilation_h dilation_w multiplier")


class _Op(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("steps_count", ctypes.c_int32),
        ("steps", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("x", "y", "x_plane", "y_plane")),
        *((name, ctypes.c_int32) for name in _INTEGERS),
        *((name, ctypes.c_void_p) for name in ("taps", "weight", "bias", "mask")),
        *((name, ctypes.c_int32) for name in _WINDOW),
    )


@dataclass(eq=False)
class Geometry:
    """Layout of the planes of one resolution; how far convolutions read over each edge decides gap and guards."""

    height: int
    width: int
    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0

    def widen(self, rows: Sequence[int], columns: Sequence[int], height: int, width: int) -> bool:
        """Make room for outputs of ``height x width`` that read at these row and column offsets; say if room is needed."""
        need = (-min(columns), width - 1 + max(columns) - (self.width - 1))
        over = (-min(rows), height - 1 + max(rows) - (self.height - 1))
        self.left, self.right = max(self.left, need[0]), max(self.right, need[1])
        self.top, self.bottom = max(self.top, over[0]), max(self.bottom, over[1])
        return max(*need, *over) > 0

    @property
    def row(self) -> int:
        """From row to row."""
        return self.width + max(self.left, self.right)

    def body(self, lanes: int) -> int:
        """Floats that are written: the rows, up to a whole vector."""
        return self.height * self.row if self.is_vector else -(-self.height * self.row // lanes) * lanes

    @property
    def is_vector(self) -> bool:
        """Whether a map is a single pixel; its channels then follow one another directly."""
        return self.height == self.width == 1

    @property
    def padded(self) -> bool:
        """Whether there are zeros to preserve around the rows."""
        return max(self.left, self.right, self.top, self.bottom) > 0

    @property
    def lead(self) -> int:
        """Zeros in front of a plane."""
        return -(-(self.top * self.row + self.left) // LINE) * LINE

    def plane(self, lanes: int) -> int:
        """From channel to channel."""
        if self.is_vector:
            return 1
        guard = max(self.lead, self.bottom * self.row + self.right)
        size = -(-(self.body(lanes) + guard) // LINE) * LINE
        # An odd number of lines spreads the channels over all sets of the cache.
        return size + LINE if size >= 64 * LINE and size // LINE % 2 == 0 else size


@dataclass(eq=False)
class Buffer:
    """Planes of one geometry that are allocated together."""

    channels: int
    geometry: Geometry
    zeros_around: bool = False  # whether anybody reads over its edges
    first: int = -1
    last: int = -1
    origin: int = 0

    def touch(self, node: int) -> None:
        """Extend the life of the buffer to a node."""
        self.first = node if self.first < 0 else self.first
        self.last = max(self.last, node)


@dataclass(frozen=True, eq=False)
class View:
    """Some channels of a buffer."""

    buffer: Buffer
    start: int
    channels: int

    def offset(self, lanes: int) -> int:
        """Of its first pixel in the arena."""
        return self.buffer.origin + self.start * self.buffer.geometry.plane(lanes)


@dataclass(eq=False)
class Node:
    """One operation of the engine before addresses are known. ``fields`` are members of the C structure."""

    kind: str
    x: View | None
    y: View | None
    steps: tuple[Step, ...] = ()
    step_views: tuple[View | None, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Callable[[], np.ndarray[Any, Any]]] = field(default_factory=dict)
    of: str = ""
    macs: int = 0


@dataclass(frozen=True, eq=False)
class HostCall:
    """A call of PyTorch between two stretches of the engine. Ports name the tensors that go in and come out."""

    call: TorchCall
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class _Layout:
    """Turns ops into nodes, and decides geometries and buffers on the way."""

    def __init__(self, program: Program, lanes: int, block: int) -> None:
        self.program, self.lanes, self.block = program, lanes, block
        self.geometries: dict[tuple[int, int], Geometry] = {}
        self.views: dict[int, View] = {}
        self.nodes: list[Node | HostCall] = []
        self.ports: list[tuple[int, ...]] = []  # shape of one image's tensor
        self.port_of: dict[int, int] = {}  # values that are tensors of PyTorch -> port
        self.buffers: list[Buffer] = []
        self._place_concatenations()
        self._load(program.inputs[0])
        for op in program.ops:
            _LOWER[type(op.compute)](self, op, op.compute)
        self.output_ports = [self._port(value) for value in program.outputs]

    def geometry(self, height: int, width: int) -> Geometry:
        """The one layout of a resolution."""
        return self.geometries.setdefault((height, width), Geometry(height, width))

    def new(self, channels: int, height: int, width: int) -> View:
        """A new buffer, all of it."""
        self.buffers.append(Buffer(channels, self.geometry(height, width)))
        return View(self.buffers[-1], 0, channels)

    def result(self, value: int) -> View:
        """Where a value is written."""
        if value not in self.views:
            channels, height, width = self.program.shapes[value]
            self.views[value] = self.new(channels, height, width)
        return self.views[value]

    def read(self, value: int) -> View:
        """Where a value is read; a tensor of PyTorch is loaded first."""
        if value not in self.views:
            self._load(value)
        return self.views[value]

    def add(self, kind: str, op: Op | None, x: View | None, y: View | None, **node: Any) -> None:
        """Append a node."""
        steps = op.steps if op else ()
        views = tuple(self.read(s.value) if isinstance(s, Combine) else None for s in steps)
        made = Node(kind, x, y, steps, views, **node)
        for view in (x, y, *views):
            if view:
                view.buffer.touch(len(self.nodes))
        self.nodes.append(made)

    def _place_concatenations(self) -> None:
        """Let the parts of a concatenation be written where they belong, where no other one has claimed them."""
        made = {
            v for op in self.program.ops if not isinstance(op.compute, Slice | TorchCall | Concat) for v in op.outputs
        }
        for op in self.program.ops:
            if isinstance(op.compute, Concat):
                whole = self.result(op.outputs[0])
                start = op.compute.before
                for value in op.inputs:
                    channels = self.program.shapes[value][0]
                    if value in made and value not in self.views:
                        self.views[value] = View(whole.buffer, whole.start + start, channels)
                    start += channels

    def _new_port(self, shape: tuple[int, ...]) -> int:
        self.ports.append(shape)
        return len(self.ports) - 1

    def _load(self, value: int) -> None:
        if value not in self.port_of:
            self.port_of[value] = self._new_port(self.program.shapes[value])
        self.add("load", None, None, self.result(value), fields={"port": self.port_of[value]})

    def _port(self, value: int) -> int:
        """The value as a tensor of PyTorch."""
        if value not in self.port_of:
            self.port_of[value] = self._new_port(self.program.shapes[value])
            self.add("store", None, self.views[value], None, fields={"port": self.port_of[value]})
        return self.port_of[value]

    def convolution(self, op: Op, conv: Convolution) -> None:
        """A convolution as a linear layer, a depthwise one, or a sum over taps."""
        x, y = self.read(op.inputs[0]), self.result(op.outputs[0])
        _, per_group, *kernel = conv.weight.shape
        if x.buffer.geometry.is_vector and y.buffer.geometry.is_vector:
            self._linear(op, conv, x, y)
        elif per_group == 1 and max(kernel) > 1 and y.channels % x.channels == 0:
            self._depthwise(op, conv, x, y)
        else:
            self._taps(op, conv, x, y)

    def _linear(self, op: Op, conv: Convolution, x: View, y: View) -> None:
        """A convolution from one pixel to one: the tap that lands on it, if there is one; the others meet zeros."""
        (_, per_group, *kernel), groups = conv.weight.shape, conv.groups
        hits = [
            [k for k in range(n) if k * d == p] for n, d, p in zip(kernel, conv.dilation, conv.padding, strict=True)
        ]
        weight = conv.weight[:, :, hits[0][0], hits[1][0]] if all(hits) else torch.zeros(y.channels, per_group)
        self.add(
            *("linear", op, x, y),
            fields={"groups": groups},
            arrays={
                "weight": lambda: self._packed_linear(weight.numpy(), groups),
                "bias": lambda: conv.bias.numpy(),
            },
            of=f"linear {groups} x {per_group} -> {y.channels // groups}",
            macs=weight.numel(),
        )

    def _depthwise(self, op: Op, conv: Convolution, x: View, y: View) -> None:
        """A convolution of each channel by itself, into one or more."""
        kernel = conv.weight.shape[2:]
        self.add(
            *("depthwise", op, x, y),
            fields={**_window(kernel, conv), "multiplier": y.channels // x.channels},
            arrays={"weight": lambda: conv.weight.numpy(), "bias": lambda: conv.bias.numpy()},
            of=f"depthwise {kernel[0]} x {kernel[1]}, stride {conv.stride[0]}",
            macs=_macs(conv, y),
        )

    def _taps(self, op: Op, conv: Convolution, x: View, y: View) -> None:
        """A convolution as a sum over taps, offsets into the planes of a group; with a stride, of planes in phases."""
        (_, per_group, *kernel), groups = conv.weight.shape, conv.groups
        source, target = x.buffer.geometry, y.buffer.geometry
        rows = [k * conv.dilation[0] - conv.padding[0] for k in range(kernel[0])]
        columns = [k * conv.dilation[1] - conv.padding[1] for k in range(kernel[1])]
        phases = [(0, 0)]
        if conv.stride != (1, 1) or source.is_vector:  # a vector has no room around it
            (down, across) = conv.stride
            phases = sorted({(r % down, c % across) for r in rows for c in columns})
            height = max(-(-source.height // down), target.height)
            width = max(-(-source.width // across), target.width, 2 if height == 1 else 1)
            split = self.new(x.channels * len(phases), height, width)
            self._phases(x, split, conv.stride, phases)
            x = split
        taps = [
            (phases.index((r % conv.stride[0], c % conv.stride[1])), r // conv.stride[0], c // conv.stride[1])
            for r in rows
            for c in columns
        ]
        frame = x.buffer.geometry
        if frame.widen([t[1] for t in taps], [t[2] for t in taps], target.height, target.width):
            x.buffer.zeros_around = True

        def offsets() -> np.ndarray[Any, Any]:
            plane, row = frame.plane(self.lanes), frame.row
            within = np.array([p * plane + r * row + c for p, r, c in taps])
            offsets: np.ndarray[Any, Any] = np.arange(per_group)[:, None] * (plane * len(phases)) + within
            return offsets.astype(np.int32).ravel()

        flat, depth = frame is target, per_group * len(taps)
        self.add(
            *("conv", op, x, y),
            fields={
                "groups": groups,
                "depth": depth,
                "rows": lambda: 1 if flat else target.height,
                "length": lambda: target.height * target.row if flat else target.width,
                "exact": int(not flat),
                "ahead": -(-AHEAD // depth) if depth < 2 * AHEAD else 0,
            },
            arrays={
                "weight": lambda: self._packed(conv.weight.numpy(), groups),
                "bias": lambda: conv.bias.numpy(),
                "taps": offsets,
            },
            of=f"{groups} x {per_group} -> {y.channels // groups}, {kernel[0]} x {kernel[1]}, stride {conv.stride[0]}",
            macs=_macs(conv, y),
        )

    def _phases(self, x: View, y: View, stride: tuple[int, int], phases: list[tuple[int, int]]) -> None:
        if not y.buffer.geometry.is_vector:
            y.buffer.zeros_around = True
        self.add(
            *("phases", None, x, y),
            fields={"depth": len(phases), "stride_h": stride[0], "stride_w": stride[1]},
            arrays={"taps": lambda: np.array(phases, np.int32).ravel()},
        )

    def _packed(self, weight: np.ndarray[Any, Any], groups: int) -> np.ndarray[Any, Any]:
        """``[group][block of outputs][tap][output]``, in blocks as the kernel takes them."""
        outputs = len(weight) // groups
        w = weight.reshape(groups, outputs, -1)
        parts, start = [], 0
        for size in (self.block, 4, 2, 1):
            while size <= self.block and outputs - start >= size:
                count = (outputs - start) // size
                blocks = w[:, start : start + count * size].reshape(groups, count, size, -1)
                parts.append(blocks.transpose(0, 1, 3, 2).reshape(groups, -1))
                start += count * size
        return np.concatenate(parts, 1)

    def _packed_linear(self, weight: np.ndarray[Any, Any], groups: int) -> np.ndarray[Any, Any]:
        """``[group][chunk of four vectors of outputs][input][output]``, filled up with zeros."""
        outputs, inputs = len(weight) // groups, weight.shape[1]
        padded = np.zeros((groups, -(-outputs // self.lanes) * self.lanes, inputs), np.float32)
        padded[:, :outputs] = weight.reshape(groups, outputs, inputs)
        chunk = 4 * self.lanes
        parts = [
            padded[:, i : i + chunk].transpose(0, 2, 1).reshape(groups, -1) for i in range(0, padded.shape[1], chunk)
        ]
        return np.concatenate(parts, 1)

    def pool(self, op: Op, pool: Pool) -> None:
        """Windows of maxima or averages."""
        x, y = self.read(op.inputs[0]), self.result(op.outputs[0])
        arrays = {}
        if not pool.maximum:
            ones = torch.ones(1, 1, x.buffer.geometry.height, x.buffer.geometry.width)
            count = F.avg_pool2d(ones, pool.kernel, pool.stride, pool.padding, pool.ceil, divisor_override=1)
            arrays["weight"] = lambda: (pool(ones) / count).numpy()
        kind = "max_pool" if pool.maximum else "average_pool"
        self.add(kind, op, x, y, fields={**_window(pool.kernel, pool), "multiplier": 1}, arrays=arrays)

    def copy(self, op: Op, _: Copy) -> None:
        """A pass of steps alone."""
        self.add("map", op, self.read(op.inputs[0]), self.result(op.outputs[0]))

    def mean(self, op: Op, _: Mean) -> None:
        """The mean of each channel."""
        self.add("mean", op, self.read(op.inputs[0]), self.result(op.outputs[0]))

    def concat(self, op: Op, concat: Concat) -> None:
        """Copy the parts that are not there already; zero what is around them."""
        whole, start = self.result(op.outputs[0]), concat.before
        for value in op.inputs:
            part = self.read(value)
            if part.buffer is not whole.buffer or part.start != whole.start + start:
                self.add("map", None, part, View(whole.buffer, whole.start + start, part.channels))
            start += part.channels
        for begin, channels in ((0, concat.before), (start, concat.after)):
            if channels:
                self.add("zero", None, None, View(whole.buffer, whole.start + begin, channels))

    def slice(self, op: Op, part: Slice) -> None:
        """A view."""
        x = self.read(op.inputs[0])
        view = View(x.buffer, x.start + part.start, part.stop - part.start)
        if op.outputs[0] in self.views:  # its place in a concatenation
            self.add("map", None, view, self.views[op.outputs[0]])
        else:
            self.views[op.outputs[0]] = view

    def shuffle(self, op: Op, shuffle: Shuffle) -> None:
        """A copy, channel by channel."""
        order = {"taps": lambda: np.array(shuffle.order, np.int32)}
        self.add("map", op, self.read(op.inputs[0]), self.result(op.outputs[0]), arrays=order)

    def subsample(self, op: Op, subsample: Subsample) -> None:
        """The first of the phases."""
        self._phases(self.read(op.inputs[0]), self.result(op.outputs[0]), subsample.stride, [(0, 0)])

    def resize(self, op: Op, resize: Resize) -> None:
        """Interpolation by tables."""
        places = torch.cat([resize.rows.flatten(), resize.columns.flatten()])
        shares = torch.cat([resize.row_share, resize.column_share])
        arrays = {"taps": lambda: places.numpy().astype(np.int32), "weight": lambda: shares.float().numpy()}
        self.add("resize", op, self.read(op.inputs[0]), self.result(op.outputs[0]), arrays=arrays)

    def flatten(self, op: Op, _: Flatten) -> None:
        """Rows without gaps."""
        self.add("flatten", op, self.read(op.inputs[0]), self.result(op.outputs[0]))

    def torch_call(self, op: Op, call: TorchCall) -> None:
        """Leave the engine and come back."""
        inputs = tuple(self._port(value) for value in op.inputs)
        for value in op.outputs:
            self.port_of[value] = self._new_port(self.program.shapes[value])
        self.nodes.append(HostCall(call, inputs, tuple(self.port_of[value] for value in op.outputs)))

    def allocate(self) -> int:
        """Give every buffer its place; return the floats of an arena. First fit, by the order of first use."""
        pools: dict[Geometry | None, list[Buffer]] = {}
        for buffer in sorted(self.buffers, key=lambda b: b.first):
            if buffer.first >= 0:
                pools.setdefault(buffer.geometry if buffer.geometry.padded else None, []).append(buffer)
        top = 8 * LINE
        for geometry, buffers in pools.items():
            # Zeros around the rows survive because only planes of the same geometry take each other's place.
            lead = 0 if geometry is None else geometry.lead
            unit = LINE if geometry is None else geometry.plane(self.lanes)
            placed: list[tuple[int, int, Buffer]] = []
            highest = 0
            for buffer in buffers:
                floats = buffer.channels * buffer.geometry.plane(self.lanes) + (LINE if geometry is None else 0)
                units = -(-floats // unit)
                live = sorted((b, e) for b, e, other in placed if other.last >= buffer.first)
                at = 0
                for begin, end in live:
                    if begin - at >= units:
                        break
                    at = max(at, end)
                placed.append((at, at + units, buffer))
                buffer.origin = top + lead + at * unit
                highest = max(highest, at + units)
            top += lead + highest * unit + (0 if geometry is None else lead + geometry.row + LINE)
            top = -(-top // LINE) * LINE
        return top + 64 * LINE  # vectors may read, never write, a little behind the last plane


def _value(value: Any) -> Any:
    return value() if callable(value) else value


def _macs(conv: Convolution, y: View) -> int:
    return conv.weight[0].numel() * y.channels * y.buffer.geometry.height * y.buffer.geometry.width


def _window(kernel: Sequence[int], of: Convolution | Pool) -> dict[str, int]:
    names = ("kernel", "stride", "pad", "dilation")
    values = (kernel, of.stride, of.padding, of.dilation)
    return {f"{n}_{axis}": v[i] for n, v in zip(names, values, strict=True) for i, axis in enumerate("hw")}


_LOWER: dict[type, Callable[[_Layout, Op, Any], None]] = {
    Convolution: _Layout.convolution,
    Pool: _Layout.pool,
    Copy: _Layout.copy,
    Mean: _Layout.mean,
    Concat: _Layout.concat,
    Slice: _Layout.slice,
    Shuffle: _Layout.shuffle,
    Subsample: _Layout.subsample,
    Resize: _Layout.resize,
    Flatten: _Layout.flatten,
    TorchCall: _Layout.torch_call,
}


class Engine:
    """A network that runs in the fused engine: images ``(N, C, H, W)`` of one size in, what the network returns out.

    Calls from several threads at once are safe: each has its own memory.

    Args:
        program: What to run.
        threads: Threads of a call: they share the images of a batch, or, if there are fewer, each operation.
        name: Instruction set; see `mgic.runtime.build.instruction_set`.

    Raises:
        EngineUnavailable: The engine cannot be built here.
    """

    def __init__(self, program: Program, threads: int, name: str | None = None) -> None:
        self.instruction_set = name or instruction_set()
        self.threads = threads
        self._library = load(self.instruction_set)
        assert self._library.mgic_op_size() == ctypes.sizeof(_Op)
        assert self._library.mgic_step_size() == ctypes.sizeof(_Step)
        lanes = INSTRUCTION_SETS[self.instruction_set][0]
        layout = _Layout(program, lanes, self._library.mgic_block())
        self.input_shape = tuple(program.shapes[program.inputs[0]])
        self._output_shapes, self._pack = program.output_shapes, program.pack
        self._ports, self._output_ports = layout.ports, layout.output_ports
        self.arena_floats = layout.allocate()
        self.nodes = [node for node in layout.nodes if isinstance(node, Node)]
        self._write(layout.nodes, lanes)
        for node in self.nodes:  # what is packed is not kept twice
            node.arrays.clear()
        self._arenas: list[_Arena] = []
        self._lock = threading.Lock()

    def __call__(self, x: Tensor) -> Any:
        """Run the network.

        Raises:
            EngineUnavailable: The input is not a float32 tensor on the CPU of the size the engine was made for.
        """
        if x.dtype != torch.float32 or x.device.type != "cpu" or tuple(x.shape[1:]) != self.input_shape:
            raise EngineUnavailable(
                f"this engine is for float32 images on the CPU of shape (N, {', '.join(map(str, self.input_shape))}), "
                f"got {x.dtype} {tuple(x.shape)} on {x.device}"
            )
        n = len(x)
        x = x.detach().contiguous()
        results = {p: torch.empty(n, *self._ports[p]) if p else x.clone() for p in self._output_ports}
        apart = len(self._segments) > 1
        spread = 1 if apart else max(1, min(self.threads, n))
        arenas = self._take(spread if n >= self.threads else 1)
        try:
            if apart:
                for i in range(n):
                    self._run_with_torch(x[i], {p: t[i] for p, t in results.items()}, arenas)
            elif n:
                tensors: list[Tensor | None] = [x if p == 0 else results.get(p) for p in range(len(self._ports))]
                addresses = np.array([0 if t is None else t.data_ptr() for t in tensors], np.uint64)
                sizes = np.array([0 if t is None else 4 * t[0].numel() for t in tensors], np.uint64)
                images = addresses + sizes * np.arange(n, dtype=np.uint64)[:, None]
                self._call(self._segments[0], arenas, images, n)
        finally:
            with self._lock:
                self._arenas.extend(arenas)
        shapes = zip(self._output_ports, self._output_shapes, strict=True)
        return self._pack([results[port].reshape(n, *shape) for port, shape in shapes])

    def _run_with_torch(self, image: Tensor, results: dict[int, Tensor], arenas: list[_Arena]) -> None:
        tensors = {0: image, **results}
        for segment in self._segments:
            if isinstance(segment, HostCall):
                inputs = [
                    tensors[p].reshape(shape)
                    for p, shape in zip(segment.inputs, segment.call.input_shapes, strict=True)
                ]
                with torch.no_grad():
                    outputs = segment.call.function(*inputs)
                for port, tensor in zip(segment.outputs, outputs, strict=True):
                    if port in results:
                        results[port].copy_(tensor.reshape(results[port].shape))
                    else:
                        tensors[port] = tensor.contiguous()
                continue
            for port in range(len(self._ports)):
                if port not in tensors:
                    tensors[port] = torch.empty(self._ports[port])
            images = np.array([[tensors[p].data_ptr() for p in range(len(self._ports))]], np.uint64)
            self._call(segment, arenas, images, 1)

    def _call(self, segment: Any, arenas: list[_Arena], images: np.ndarray[Any, Any], n: int) -> None:
        places = (ctypes.c_void_p * len(arenas))(*(arena.address for arena in arenas))
        images = np.ascontiguousarray(images)
        self._library.mgic_run(
            ctypes.addressof(segment), len(segment), places, images.ctypes.data, len(self._ports), n, self.threads
        )

    def profile(self, x: Tensor, rounds: int = 20) -> list[tuple[Node, float]]:
        """Time each operation where it stands, on one thread: ``(node, seconds)``, medians.

        Only for programs without calls of PyTorch.
        """
        if len(self._segments) > 1:
            raise EngineUnavailable("a program with operations of PyTorch cannot be profiled")
        arenas = self._take(1)
        results = {p: torch.empty(1, *self._ports[p]) for p in self._output_ports}
        tensors: list[Tensor | None] = [
            x[:1].contiguous() if p == 0 else results.get(p) for p in range(len(self._ports))
        ]
        images = np.array([[0 if t is None else t.data_ptr() for t in tensors]], np.uint64)
        seconds = np.zeros((rounds, len(self.nodes)))
        for row in seconds:
            segment = self._segments[0]
            self._library.mgic_profile(
                ctypes.addressof(segment), len(segment), arenas[0].address, images.ctypes.data, row.ctypes.data
            )
        with self._lock:
            self._arenas.extend(arenas)
        return list(zip(self.nodes, np.median(seconds, 0).tolist(), strict=True))

    def _take(self, count: int) -> list[_Arena]:
        with self._lock:
            taken = [self._arenas.pop() for _ in range(min(count, len(self._arenas)))]
        return taken + [_Arena(self.arena_floats) for _ in range(count - len(taken))]

    def _write(self, nodes: list[Node | HostCall], lanes: int) -> None:
        """Fill the C structures; all constants go into one piece of memory."""
        constants = _Constants()
        structures = {node: _structure(node, lanes, constants) for node in nodes if isinstance(node, Node)}
        self._constants = _Arena(constants.floats)
        constants.write(self._constants)
        self._steps: list[Any] = []  # kept alive: the operations point to them
        self._segments: list[Any] = []
        for is_host, stretch in itertools.groupby(nodes, lambda node: isinstance(node, HostCall)):
            if is_host:
                self._segments += stretch
            else:
                operations = [self._operation(*structures[node]) for node in stretch if isinstance(node, Node)]
                self._segments.append((_Op * len(operations))(*operations))

    def _operation(self, values: dict[str, Any], steps: list[dict[str, Any]]) -> _Op:
        array = (_Step * max(len(steps), 1))()
        for k, step in enumerate(steps):
            array[k] = _Step(**{name: _resolve(value, self._constants) for name, value in step.items()})
        self._steps.append(array)
        resolved = {name: _resolve(value, self._constants) for name, value in values.items()}
        return _Op(**resolved, steps=ctypes.addressof(array), steps_count=len(steps))


@dataclass(frozen=True)
class _Place:
    """An array among the constants, by its offset."""

    offset: int


def _resolve(value: Any, memory: _Arena) -> Any:
    return memory.address + 4 * value.offset if isinstance(value, _Place) else value


class _Constants:
    """Arrays laid behind one another, each at the start of a cache line with some room behind it; equal ones once."""

    def __init__(self) -> None:
        self.floats = 0
        self._alike: dict[tuple[int, bytes, bytes], list[tuple[_Place, np.ndarray[Any, Any]]]] = {}
        self._arrays: list[tuple[int, np.ndarray[Any, Any]]] = []
        self._masks: dict[Geometry, _Place] = {}

    def add(self, array: np.ndarray[Any, Any]) -> _Place:
        """Remember an array of 4-byte numbers."""
        kind = np.int32 if array.dtype.kind in "iu" else np.float32
        flat = np.ascontiguousarray(array, kind).ravel().view(np.float32)
        bits = flat.view(np.int32)
        alike = self._alike.setdefault((flat.size, bits[:LINE].tobytes(), bits[-LINE:].tobytes()), [])
        for place, other in alike:  # layers that are run more than once
            if np.array_equal(other, bits):
                return place
        place = _Place(self.floats)
        alike.append((place, bits))
        self._arrays.append((self.floats, flat))
        self.floats += -(-(flat.size + 4 * LINE) // LINE) * LINE
        return place

    def mask(self, geometry: Geometry, lanes: int) -> _Place:
        """All ones where a plane has pixels, zeros in its gaps."""
        if geometry not in self._masks:
            at = np.arange(geometry.body(lanes) + lanes)
            inside = (at < geometry.height * geometry.row) & (at % geometry.row < geometry.width)
            self._masks[geometry] = self.add(np.where(inside, -1, 0).astype(np.int32))
        return self._masks[geometry]

    def write(self, memory: _Arena) -> None:
        """Copy all arrays."""
        for offset, flat in self._arrays:
            memory.floats[offset : offset + flat.size] = flat
        self._arrays.clear()
        self._alike.clear()


class _Arena:
    """Zeroed memory in large pages where the system has them."""

    def __init__(self, floats: int) -> None:
        # Private, because shared memory gets no large pages; without them every channel of a tile costs a page lookup.
        self._memory = mmap.mmap(-1, max(4 * floats, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.floats = np.frombuffer(self._memory, np.float32)
        self.address: int = self.floats.ctypes.data


def _structure(node: Node, lanes: int, constants: _Constants) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The members of the C structures of a node; pointers as places among the constants."""
    values: dict[str, Any] = {"kind": KINDS.index(node.kind)}
    for name, view, size in (("x", node.x, "in_"), ("y", node.y, "")):
        if view:
            geometry = view.buffer.geometry
            values |= {name: view.offset(lanes), f"{name}_plane": geometry.plane(lanes), f"{name}_row": geometry.row}
            values |= {
                f"{size}channels": view.channels,
                f"{size}height": geometry.height,
                f"{size}width": geometry.width,
            }
    if node.y and node.y.buffer.zeros_around and node.y.buffer.geometry.padded and node.kind not in ("load", "zero"):
        values["mask"] = constants.mask(node.y.buffer.geometry, lanes)
    values |= {name: _value(value) for name, value in node.fields.items()}
    values |= {name: constants.add(make()) for name, make in node.arrays.items()}
    steps = []
    for step, view in zip(node.steps, node.step_views, strict=True):
        if isinstance(step, Affine):
            scale, shift = constants.add(step.scale.numpy()), constants.add(step.shift.numpy())
            steps.append({"kind": STEP_KINDS.index("affine"), "scale": scale, "shift": shift})
        elif isinstance(step, Activation):
            steps.append({"kind": STEP_KINDS.index(step.name), "a": step.a, "b": step.b})
        else:
            assert view is not None
            assert node.y is not None
            spread = view.buffer.geometry.is_vector and not node.y.buffer.geometry.is_vector
            kind = STEP_KINDS.index(("channel_" if spread else "") + step.name)
            steps.append({"kind": kind, "offset": view.offset(lanes)})
    return values, steps
