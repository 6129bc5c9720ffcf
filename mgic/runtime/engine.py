"""A plan in the hands of ``engine.cpp``: its structures, its constants and memory, and the calls themselves."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .build import INSTRUCTION_SETS, instruction_set, load
from .capture import EngineUnavailable
from .ops import Activation, Affine, Program
from .plan import LINE, Geometry, HostCall, Layout, Node


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
        layout = Layout(program, lanes, self._library.mgic_block())
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


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# In the order of engine.cpp.
KINDS = _words("conv linear depthwise max_pool average_pool mean map phases resize zero flatten load store")
STEP_KINDS = _words(
    "add subtract subtract_from multiply channel_add channel_subtract channel_subtract_from channel_multiply affine "
    "relu clamp leaky_relu hard_sigmoid hard_swish sigmoid silu tanh gelu gelu_tanh elu"
)


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


def _value(value: Any) -> Any:
    return value() if callable(value) else value


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
