"""The op list: what a network computes in eval mode, a short list of operations on feature maps.

A `Program` is what the engine runs and what the interpreter here, a few lines of plain PyTorch, defines. Every value is a
feature map ``(C, H, W)`` of one image; a vector is a map of one pixel. An `Op` computes something (a convolution, a pooling,
a copy ...) and then applies its `steps` (norm, activation, residual, the cycle's subtraction), which cost no pass over
memory of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Shape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Affine:
    """``v <- scale[c] v + shift[c]`` with constants ``(C,)``: a norm, a scale, a bias."""

    scale: Tensor
    shift: Tensor

    def __call__(self, v: Tensor) -> Tensor:
        """Apply the step."""
        return v * self.scale[:, None, None] + self.shift[:, None, None]


@dataclass(frozen=True)
class Activation:
    """An activation by its name in `ACTIVATIONS`; ``a`` and ``b`` are its bounds or its slope."""

    name: str
    a: float = 0.0
    b: float = 0.0

    def __call__(self, v: Tensor) -> Tensor:
        """Apply the step."""
        return ACTIVATIONS[self.name](v, self.a, self.b)


@dataclass(frozen=True)
class Combine:
    """``v <- v + u``, ``v - u``, ``u - v`` or ``v u`` with another value ``u``: a map as large, or one number a channel."""

    name: str
    value: int

    def __call__(self, v: Tensor, u: Tensor) -> Tensor:
        """Apply the step."""
        return COMBINATIONS[self.name](v, u)


Step = Affine | Activation | Combine

ACTIVATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "relu": lambda v, a, b: v.relu(),
    "clamp": lambda v, a, b: v.clamp(a, b),
    "leaky_relu": lambda v, a, b: F.leaky_relu(v, a),
    "hard_sigmoid": lambda v, a, b: F.hardsigmoid(v),
    "hard_swish": lambda v, a, b: F.hardswish(v),
    "sigmoid": lambda v, a, b: v.sigmoid(),
    "silu": lambda v, a, b: F.silu(v),
    "tanh": lambda v, a, b: v.tanh(),
    "gelu": lambda v, a, b: F.gelu(v),
    "gelu_tanh": lambda v, a, b: F.gelu(v, approximate="tanh"),
    "elu": lambda v, a, b: F.elu(v, a),
}
COMBINATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda v, u: v + u,
    "subtract": lambda v, u: v - u,
    "subtract_from": lambda v, u: u - v,
    "multiply": lambda v, u: v * u,
}
SWAPPED = {"add": "add", "subtract": "subtract_from", "subtract_from": "subtract", "multiply": "multiply"}


@dataclass(frozen=True, eq=False)
class Convolution:
    """A grouped convolution with its bias; a linear layer is one of a map of one pixel.

    Args:
        weight: ``(C_out, C_in / groups, kernel_h, kernel_w)``.
        bias: ``(C_out,)``.
        stride: Vertical, horizontal; likewise the rest.
        padding: Zeros on each side.
        dilation: Distance of the taps.
        groups: Groups.
    """

    weight: Tensor
    bias: Tensor
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        """Compute it."""
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def scaled(self, affine: Affine) -> Convolution:
        """The same convolution with an affine step folded into its weights."""
        weight = self.weight * affine.scale[:, None, None, None]
        return replace(self, weight=weight, bias=self.bias * affine.scale + affine.shift)


@dataclass(frozen=True)
class Pool:
    """Maximum or average over windows; in the average, ``include_padding`` counts the zeros of the padding."""

    maximum: bool
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil: bool = False
    include_padding: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        """Compute it."""
        if self.maximum:
            return F.max_pool2d(x, self.kernel, self.stride, self.padding, self.dilation, self.ceil)
        return F.avg_pool2d(x, self.kernel, self.stride, self.padding, self.ceil, self.include_padding)


@dataclass(frozen=True)
class Mean:
    """The mean over all pixels: ``(C, H, W) -> (C, 1, 1)``."""

    def __call__(self, x: Tensor) -> Tensor:
        """Compute it."""
        return x.mean((2, 3), keepdim=True)


@dataclass(frozen=True)
class Copy:
    """The input itself: what carries steps that no other op could take."""

    def __call__(self, x: Tensor) -> Tensor:
        """Compute it."""
        return x


@dataclass(frozen=True)
class Concat:
    """Maps behind one another in the channels, with ``before`` and ``after`` channels of zeros around them."""

    before: int = 0
    after: int = 0

    def __call__(self, *xs: Tensor) -> Tensor:
        """Compute it."""
        return F.pad(torch.cat(xs, 1), (0, 0, 0, 0, self.before, self.after))


@dataclass(frozen=True)
class Slice:
    """Channels ``start`` to ``stop``: costs nothing."""

    start: int
    stop: int

    def __call__(self, x: Tensor) -> Tensor:
        """Compute it."""
        return x[:, self.start : self.stop]


@dataclass(frozen=True)
class Shuffle:
    """Channel ``i`` of the result is channel ``order[i]`` of the input."""

    order: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Compute it."""
        return x[:, list(self.order)]


@dataclass(frozen=True)
class Subsample:
    """Every ``stride``-th row and column, from the first."""

    stride: tuple[int, int]

    def __call__(self, x: Tensor) -> Tensor:
        """Compute it."""
        return x[:, :, :: self.stride[0], :: self.stride[1]]


@dataclass(frozen=True, eq=False)
class Resize:
    """Interpolation between two rows and two columns: bilinear, or, with shares of zero, the nearest neighbour.

    Args:
        rows: Indices of the two rows, ``(H_out, 2)``.
        row_share: Share of the second, ``(H_out,)``.
        columns: The same for columns.
        column_share: The same for columns.
    """

    rows: Tensor
    row_share: Tensor
    columns: Tensor
    column_share: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Compute it."""
        first, second = x[:, :, self.rows[:, 0]], x[:, :, self.rows[:, 1]]
        share = self.column_share.to(x.dtype)
        y = [r[..., self.columns[:, 0]] * (1 - share) + r[..., self.columns[:, 1]] * share for r in (first, second)]
        share = self.row_share.to(x.dtype)[:, None]
        return y[0] * (1 - share) + y[1] * share


@dataclass(frozen=True)
class Flatten:
    """``(C, H, W) -> (C H W, 1, 1)``."""

    def __call__(self, x: Tensor) -> Tensor:
        """Compute it."""
        return x.flatten(1)[:, :, None, None]


@dataclass(frozen=True, eq=False)
class TorchCall:
    """An operation the engine does not know: PyTorch runs it, on one image.

    Args:
        name: The operation, as PyTorch calls it.
        function: ``(tensors of the inputs) -> list of tensors``, all with a leading batch dimension of 1.
        input_shapes: What each input is reshaped to.
    """

    name: str
    function: Callable[..., list[Tensor]]
    input_shapes: tuple[tuple[int, ...], ...]

    def __call__(self, *xs: Tensor) -> list[Tensor]:
        """Compute it image by image."""
        images = [
            self.function(*(x[i].reshape(shape) for x, shape in zip(xs, self.input_shapes, strict=True)))
            for i in range(len(xs[0]))
        ]
        return [torch.cat(parts) for parts in zip(*images, strict=True)]


Compute = Convolution | Pool | Mean | Copy | Concat | Slice | Shuffle | Subsample | Resize | Flatten | TorchCall
TAKES_STEPS = (Convolution, Pool, Mean, Copy)


@dataclass(frozen=True, eq=False)
class Op:
    """One operation: ``outputs = steps(compute(inputs))``. All but `TorchCall` have one output."""

    compute: Compute
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    steps: tuple[Step, ...] = ()

    def reads(self) -> tuple[int, ...]:
        """Every value the op reads, those of its steps included."""
        return (*self.inputs, *(step.value for step in self.steps if isinstance(step, Combine)))


@dataclass(eq=False)
class Program:
    """A network in eval mode as a list of ops.

    Args:
        shapes: ``(C, H, W)`` of each value; of a value only PyTorch reads, any shape behind the batch dimension.
        ops: In an order in which they can run.
        inputs: Values of the image. There is one.
        outputs: Values of the results.
        pack: Makes what the network returns from the list of result tensors.
        output_shapes: Shape of each result behind the batch dimension.
    """

    shapes: list[tuple[int, ...]]
    ops: list[Op]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    output_shapes: list[tuple[int, ...]]
    pack: Callable[[list[Tensor]], Any] = field(default=lambda results: results[0])

    def __call__(self, x: Tensor) -> Any:
        """Interpret the program: ``(N, C, H, W)`` to what the network returns. The twin every engine is held against."""
        values = {self.inputs[0]: x.reshape(len(x), *self.shapes[self.inputs[0]])}
        last = {value: i for i, op in enumerate(self.ops) for value in op.reads()}
        for i, op in enumerate(self.ops):
            results = op.compute(*(values[v] for v in op.inputs))
            ys = results if isinstance(results, list) else [results]
            for step in op.steps:
                ys[0] = step(ys[0], values[step.value]) if isinstance(step, Combine) else step(ys[0])
            values.update(
                {v: y.reshape(len(x), *self.shapes[v]) for v, y in zip(op.outputs, ys, strict=True) if y is not None}
            )
            for value in set(op.reads()):
                if last[value] == i and value not in self.outputs:
                    del values[value]
        results = [values[v].reshape(len(x), *shape) for v, shape in zip(self.outputs, self.output_shapes, strict=True)]
        return self.pack(results)

    def torch_calls(self) -> list[str]:
        """Names of the operations the engine does not know."""
        return [op.compute.name for op in self.ops if isinstance(op.compute, TorchCall)]

    def describe(self) -> str:
        """One line an op."""
        lines = []
        for op in self.ops:
            words = [type(op.compute).__name__.lower(), *map(_describe_step, op.steps)]
            reads, writes = ", ".join(map(str, op.inputs)), ", ".join(map(str, op.outputs))
            shape = " x ".join(map(str, self.shapes[op.outputs[0]]))
            lines.append(f"{writes} = {' '.join(words)} ({reads}): {shape}")
        return "\n".join(lines)


def _describe_step(step: Step) -> str:
    if isinstance(step, Combine):
        return f"{step.name}({step.value})"
    return step.name if isinstance(step, Activation) else "affine"


def simplify(program: Program) -> Program:
    """Drop what nobody reads, let ops take over the steps behind them, and fold constants into convolutions."""
    ops = _alive(program.ops, program.outputs)
    ops = _fused(ops, program)
    ops = [_folded(replace(op, steps=_merged(op.steps))) for op in ops]
    return replace(program, ops=ops)


def _alive(ops: Sequence[Op], outputs: Iterable[int]) -> list[Op]:
    needed, kept = set(outputs), []
    for op in reversed(ops):
        if needed.intersection(op.outputs):
            needed.update(op.reads())
            kept.append(op)
    return kept[::-1]


def _fused(ops: list[Op], program: Program) -> list[Op]:
    """Merge every copy into the op before it where it is the only reader and all it needs is there by then."""
    uses = Counter(value for op in ops for value in op.reads())
    uses.update(program.outputs)
    merged: list[Op] = []
    made_at: dict[int, int] = {value: -1 for value in program.inputs}
    for op in ops:
        if isinstance(op.compute, Copy):
            for candidate in (op, _swapped(op, program)):
                at = made_at[candidate.inputs[0]] if candidate else -1
                if candidate and at >= 0 and _can_take(merged[at], candidate, uses, made_at, at):
                    merged[at] = replace(
                        merged[at], steps=(*merged[at].steps, *candidate.steps), outputs=candidate.outputs
                    )
                    made_at[op.outputs[0]] = at
                    break
            else:
                made_at[op.outputs[0]] = len(merged)
                merged.append(op)
            continue
        made_at.update({value: len(merged) for value in op.outputs})
        merged.append(op)
    return merged


def _swapped(op: Op, program: Program) -> Op | None:
    """The same copy seen from the other operand of its first step, if that is a map of the same size."""
    step = op.steps[0] if op.steps else None
    if not isinstance(step, Combine) or program.shapes[step.value] != program.shapes[op.inputs[0]]:
        return None
    steps = (Combine(SWAPPED[step.name], op.inputs[0]), *op.steps[1:])
    return replace(op, inputs=(step.value,), steps=steps)


def _can_take(producer: Op, copy: Op, uses: Counter[int], made_at: dict[int, int], at: int) -> bool:
    others = [step.value for step in copy.steps if isinstance(step, Combine)]
    return (
        isinstance(producer.compute, TAKES_STEPS)
        and uses[copy.inputs[0]] == 1
        and all(made_at[value] < at for value in others)
    )


def _merged(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Two affine steps in a row are one."""
    kept: list[Step] = []
    for step in steps:
        if isinstance(step, Affine) and kept and isinstance(before := kept[-1], Affine):
            step = Affine(before.scale * step.scale, before.shift * step.scale + step.shift)
            kept.pop()
        kept.append(step)
    return tuple(kept)


def _folded(op: Op) -> Op:
    if isinstance(op.compute, Convolution) and op.steps and isinstance(op.steps[0], Affine):
        return _folded(replace(op, compute=op.compute.scaled(op.steps[0]), steps=op.steps[1:]))
    return op
