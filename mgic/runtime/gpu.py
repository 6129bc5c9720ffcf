"""The GPU engine: the op list of a network, fused into kernels, and the ways to run a network on a CUDA device.

The same list that the CPU engine runs is cut into calls: a level on its way up (prolongation, residual block, subtraction), a
chain of restrictions, a convolution with what follows it, each an operation of `mgic.kernels`; what fits none of them stays
the op of PyTorch that it is. Without a GPU the calls run the kernels' twins, so that the cutting is tested anywhere.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import BROKEN
from ..kernels import ACTIVATIONS, grouped_conv, level, packed, restriction_chain
from .capture import EngineUnavailable, capture
from .ops import Activation, Combine, Convolution, Op, Program, Step
from .paths import Path, PathUnavailable, Run, eager, eager_channels_last, reasons

LONGEST_CHAIN = 3
WIDEST_TREE = 256
"""Channels below one group of a chain's last restriction; wider trees are cut."""
FEWEST_INPUTS = 4
"""Channels a group from which on a convolution is one of ours: with fewer, nearly all of a tile would be zeros."""


@dataclass(frozen=True, eq=False)
class Call:
    """A kernel, or an op left as it is: ``outputs = function(inputs)``."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    function: Callable[..., Sequence[Tensor]]


class FusedProgram:
    """A program cut into calls, its weights on one device in one type; called with images of that type.

    Args:
        program: What to compute.
        device: Where.
        dtype: In which type; biases stay float32, and so do the sums inside a kernel.

    Raises:
        EngineUnavailable: The program has an operation that is tied to the device it was captured on.
    """

    def __init__(self, program: Program, device: torch.device, dtype: torch.dtype) -> None:
        calls = program.torch_calls()
        if calls:
            raise EngineUnavailable(f"the kernels cannot take {', '.join(sorted(set(calls)))}")
        self.program, self.device, self.dtype = program, device, dtype
        self.calls = _Cutter(program, device, dtype).calls()

    def __call__(self, x: Tensor) -> Any:
        """Run it: ``(N, C, H, W)`` to what the network returns."""
        program = self.program
        values = {program.inputs[0]: x.contiguous(memory_format=torch.channels_last)}
        last = {value: i for i, call in enumerate(self.calls) for value in call.inputs}
        for i, call in enumerate(self.calls):
            results = call.function(*(values[v] for v in call.inputs))
            for value, y in zip(call.outputs, results, strict=True):
                values[value] = y.reshape(len(x), *program.shapes[value])
            for value in set(call.inputs):
                if last[value] == i and value not in program.outputs:
                    del values[value]
        shapes = zip(program.outputs, program.output_shapes, strict=True)
        return program.pack([values[v].reshape(len(x), *shape) for v, shape in shapes])


def fuse(model: nn.Module, example: Tensor) -> FusedProgram:
    """Record a network and cut it into kernels, on the device and in the type of ``example``; the network is left as it is.

    Raises:
        EngineUnavailable: The network cannot be recorded.
    """
    plain = copy.deepcopy(model).cpu().float()
    return FusedProgram(capture(plain, example.detach().cpu().float()), example.device, example.dtype)


class _Cutter:
    """Finds the patterns. An op that became part of a call is taken by it; the call stands where its last op stood."""

    def __init__(self, program: Program, device: torch.device, dtype: torch.dtype) -> None:
        self.program, self.device, self.dtype = program, device, dtype
        self.maker = {value: op for op in program.ops for value in op.outputs}
        self.uses = Counter(value for op in program.ops for value in op.reads())
        self.uses.update(program.outputs)

    def calls(self) -> list[Call]:
        """All calls, in an order in which they can run."""
        taken: set[int] = set()
        at: dict[int, Call] = {}
        for op in self.program.ops:
            found = self._level(op)
            if found:
                at[id(op)], parts = found
                taken |= {id(part) for part in parts}
        for op in self.program.ops:
            chain = [] if id(op) in taken else self._chain(op, taken)
            if len(chain) > 1:
                at[id(op)] = self._restrictions(chain)
                taken |= {id(part) for part in chain[1:]}
        return [at.get(id(op)) or self._single(op) for op in self.program.ops if id(op) in at or id(op) not in taken]

    def _level(self, final: Op) -> tuple[Call, list[Op]] | None:
        """The call that ends with this op, and the ops before it that it takes over, if it is the end of a level."""
        add, act, change = _epilogue(final.steps)
        groups = _groups(final, 1, 3)
        shape = self.program.shapes[final.outputs[0]]
        if not groups or not _fits(final.steps, self.program, shape) or add is None or act == "none":
            return None
        if change is not None and change.name != "subtract":
            return None
        relax = [final]
        for kernel in (3,) if _kernel(final) == 3 else (3, 1):
            before = self.maker.get(relax[0].inputs[0])
            if before is None or _groups(before, kernel) != groups or self.uses[before.outputs[0]] != 1:
                return None
            if len(before.steps) != 1 or _epilogue(before.steps)[1] != act:
                return None
            relax.insert(0, before)
        z = add.value
        if relax[0].inputs[0] != z:
            return None
        prolong = self.maker.get(z)
        parts = list(relax)
        x, coarse = z, None
        if prolong is not None and self._prolongs(prolong, groups, change):
            parts.insert(0, prolong)
            (x,), coarse = [step.value for step in prolong.steps if isinstance(step, Combine)], prolong.inputs[0]
        if change is not None and change.value != x:
            return None
        weights, biases = self._weights(parts), [self._float(conv.bias) for conv in map(_conv, parts)]

        def run(x: Tensor, coarse: Tensor | None = None) -> list[Tensor]:
            return [level(x, coarse, weights, biases, groups, act, change is not None)]

        inputs = (x,) if coarse is None else (x, coarse)
        return Call("level", inputs, final.outputs, run), parts[:-1]

    def _prolongs(self, op: Op, groups: int, change: Combine | None) -> bool:
        """Whether the op is ``x + P coarse`` of a level whose block alone reads it."""
        step = op.steps[0] if len(op.steps) == 1 else None
        return (
            _groups(op, 1) == groups
            and isinstance(step, Combine)
            and step.name == "add"
            and self.program.shapes[step.value] == self.program.shapes[op.outputs[0]]
            and self.uses[op.outputs[0]] == 2
            and (change is None or change.value == step.value)
        )

    def _chain(self, op: Op, taken: set[int]) -> list[Op]:
        """Restrictions that follow one another, beginning with this op."""
        chain: list[Op] = []
        following: Op | None = op
        while following is not None and _restricts(following) and len(chain) < LONGEST_CHAIN:
            groups = _groups(following, 1)
            first = _conv(chain[0] if chain else following)
            if id(following) in taken or first.groups % groups:
                break
            if chain and first.weight.shape[1] * first.groups // groups > WIDEST_TREE:
                break
            chain.append(following)
            value = following.outputs[0]
            readers = [o for o in self.program.ops if o.inputs == (value,) and _restricts(o)]
            following = readers[0] if len(readers) == 1 else None
        return chain

    def _restrictions(self, chain: list[Op]) -> Call:
        weights, groups = self._weights(chain), [_conv(op).groups for op in chain]
        outputs = tuple(op.outputs[0] for op in chain)
        return Call("restriction_chain", chain[0].inputs, outputs, lambda x: restriction_chain(x, weights, groups))

    def _single(self, op: Op) -> Call:
        """A convolution with as many of its steps as fit, or the op as it is; steps that are left over run behind it."""
        if isinstance(op.compute, Convolution) and _groups(op, 1, 3, strides=(1, 2)):
            return self._convolution(op)
        compute = self._moved(op.compute)
        steps = tuple(map(self._moved, op.steps))

        def run(*values: Tensor) -> list[Tensor]:
            return [_stepped(compute(*values[: len(op.inputs)]), steps, iter(values[len(op.inputs) :]))]

        return Call(type(compute).__name__.lower(), op.reads(), op.outputs, run)

    def _convolution(self, op: Op) -> Call:
        conv, shape = _conv(op), self.program.shapes[op.outputs[0]]
        fitting = 0
        while fitting < len(op.steps) and _fits(op.steps[: fitting + 1], self.program, shape):
            fitting += 1
        add, act, change = _epilogue(op.steps[:fitting])
        rest = tuple(map(self._moved, op.steps[fitting:]))
        (weight,), bias = self._weights([op]), self._float(conv.bias)
        sign = -1.0 if change is not None and change.name == "subtract" else 1.0

        def run(x: Tensor, *values: Tensor) -> list[Tensor]:
            operands = iter(values)
            before = None if add is None else next(operands)
            after = None if change is None else next(operands)
            y = grouped_conv(x, weight, bias, conv.groups, conv.stride[0], act, before, after, sign)
            return [_stepped(y, rest, operands)]

        return Call("grouped_conv", op.reads(), op.outputs, run)

    def _weights(self, ops: Sequence[Op]) -> list[Tensor]:
        """As the kernels read them: ``(row, column, input, output)`` in memory, so that they need no copy a call."""
        return [packed(_conv(op).weight.to(self.device, self.dtype)) for op in ops]

    def _float(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, torch.float32)

    def _moved(self, part: Any) -> Any:
        """A compute or a step with its tensors on the device, numbers in the type."""
        changes = {
            f.name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            for f in dataclasses.fields(part)
            if isinstance(value := getattr(part, f.name), Tensor)
        }
        return dataclasses.replace(part, **changes) if changes else part


def _conv(op: Op) -> Convolution:
    assert isinstance(op.compute, Convolution)
    return op.compute


def _kernel(op: Op) -> int:
    return _conv(op).weight.shape[2]


def _groups(op: Op, *kernels: int, strides: tuple[int, ...] = (1,)) -> int:
    """Groups of a convolution the kernels can do; 0 for any other op."""
    conv = op.compute
    if not isinstance(conv, Convolution):
        return 0
    size = tuple(conv.weight.shape[2:])
    known = (
        size in [(k, k) for k in kernels]
        and conv.padding == (size[0] // 2, size[0] // 2)
        and conv.dilation == (1, 1)
        and conv.stride in [(s, s) for s in strides]
        and conv.weight.shape[1] >= FEWEST_INPUTS
    )
    return conv.groups if known else 0


def _restricts(op: Op) -> bool:
    return bool(_groups(op, 1)) and not op.steps and not bool(_conv(op).bias.any())


def _epilogue(steps: Sequence[Step]) -> tuple[Combine | None, str, Combine | None]:
    """Added ahead of the activation, the activation, combined behind it; what fits nowhere is left to `_fits`."""
    add, act, change = None, "none", None
    for step in steps:
        if isinstance(step, Activation):
            act = step.name if step.name in ACTIVATIONS else "none"
        elif isinstance(step, Combine):
            if act == "none" and add is None and step.name == "add":
                add = step
            else:
                change = step
    return add, act, change


def _fits(steps: Sequence[Step], program: Program, shape: tuple[int, ...]) -> bool:
    """Whether a kernel can do all of these steps: an addition, an activation, an addition or subtraction, in this order."""
    place = 0  # 0: before the addition, 1: before the activation, 2: before what is combined behind it, 3: at the end
    for step in steps:
        if isinstance(step, Activation) and place < 2 and step.name in ACTIVATIONS:
            place = 2
        elif isinstance(step, Combine) and program.shapes[step.value] == shape:
            if place == 0 and step.name == "add":
                place = 1
            elif place < 3 and step.name in ("add", "subtract"):
                place = 3
            else:
                return False
        else:
            return False
    return True


def _stepped(y: Tensor, steps: Sequence[Step], operands: Iterator[Tensor]) -> Tensor:
    for step in steps:
        y = step(y, next(operands)) if isinstance(step, Combine) else step(y)
    return y


def graphed(run: Run, example: Tensor) -> Run:
    """The same function as one CUDA graph, for inputs of exactly this shape; one call at a time."""
    static, lock = example.clone(), threading.Lock()
    side = torch.cuda.Stream(example.device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(example.device))
    with torch.cuda.stream(side):
        for _ in range(3):  # kernels are compiled and chosen here: a capture cannot wait for the GPU
            run(static)
    torch.cuda.current_stream(example.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(static)

    def replay(x: Tensor) -> Any:
        with lock, torch.no_grad():
            static.copy_(x)
            graph.replay()
            return tree_map_only(Tensor, torch.clone, captured)

    return replay


def eager_graph(model: nn.Module, example_input: Tensor, threads: int) -> Run:
    """PyTorch as it stands, NHWC, as a CUDA graph: no time between its kernels."""
    run = eager_channels_last(model, example_input, threads)
    with reasons("CUDA graph", BROKEN):
        return graphed(run, example_input)


def compiled(model: nn.Module, example_input: Tensor, threads: int) -> Run:
    """``torch.compile`` at its best: every kernel autotuned, CUDA graphs, NHWC."""
    network = copy.deepcopy(model).to(memory_format=torch.channels_last)
    with reasons("torch.compile", BROKEN), torch.no_grad():
        optimized = torch.compile(network, mode="max-autotune", dynamic=False)
        optimized(example_input.contiguous(memory_format=torch.channels_last))

    def run(x: Tensor) -> Any:
        with torch.no_grad():
            found = optimized(x.contiguous(memory_format=torch.channels_last))
        return tree_map_only(Tensor, torch.clone, found)  # the graph writes there again

    return run


def kernels(model: nn.Module, example_input: Tensor, threads: int) -> Run:
    """The fused kernels of this library as a CUDA graph."""
    try:
        fused = fuse(model, example_input)
    except EngineUnavailable as error:
        raise PathUnavailable(str(error)) from error
    with reasons("kernels", BROKEN), torch.no_grad():
        return graphed(fused, example_input)


GPU_PATHS: dict[str, Path] = {
    "eager": eager,
    "eager_nhwc": eager_channels_last,
    "eager_graph": eager_graph,
    "compile": compiled,
    "kernels": kernels,
}
"""Every way to run a network on a CUDA device, by name."""
