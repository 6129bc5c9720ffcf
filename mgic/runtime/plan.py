"""From an op list to the engine: where each value lies in memory, how weights are packed, and in which order it all runs.

Geometry. All maps of one resolution share one layout: rows of ``width + gap`` floats, where the gap, and guards of zeros
above and below, are as large as any convolution at this resolution reads over the edge. A convolution with stride reads
maps that were split into phases, of the resolution of its output, so it too is a sum over shifted pixels.

Memory. Every value gets its place before anything runs: planes of one geometry are used again as soon as their last reader
is done. Parts of a concatenation are written where they belong, slices of channels are views.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .ops import (
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

LINE = 16  # floats in a cache line
AHEAD = 100  # taps of arithmetic that hide the way to memory; longer sums hide it by themselves


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


class Layout:
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


def _macs(conv: Convolution, y: View) -> int:
    return conv.weight[0].numel() * y.channels * y.buffer.geometry.height * y.buffer.geometry.width


def _window(kernel: Sequence[int], of: Convolution | Pool) -> dict[str, int]:
    names = ("kernel", "stride", "pad", "dilation")
    values = (kernel, of.stride, of.padding, of.dilation)
    return {f"{n}_{axis}": v[i] for n, v in zip(names, values, strict=True) for i, axis in enumerate("hw")}


_LOWER: dict[type, Callable[[Layout, Op, Any], None]] = {
    Convolution: Layout.convolution,
    Pool: Layout.pool,
    Copy: Layout.copy,
    Mean: Layout.mean,
    Concat: Layout.concat,
    Slice: Layout.slice,
    Shuffle: Layout.shuffle,
    Subsample: Layout.subsample,
    Resize: Layout.resize,
    Flatten: Layout.flatten,
    TorchCall: Layout.torch_call,
}
