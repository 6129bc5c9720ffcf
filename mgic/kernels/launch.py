"""How the Triton programs are started: tiles, grids, and the ways of tiling among which a shape's best is found.

A `Launch` is all that Triton needs for one call, so the same object is run on a GPU, run by Triton's interpreter, and
compiled ahead of time for a GPU that is not there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from . import tiles
from .ops import packed

ROW = 64
"""Channels a program loads side by side if there are so many: 128 bytes in half precision."""
WIDEST = 256
"""Channels of the widest block-diagonal tile; a tree of restrictions above is cut into shorter chains."""
SMALLEST = 16
"""Least depth of a matrix product on tensor cores."""


@dataclass(frozen=True, eq=False)
class Launch:
    """One call of a Triton program.

    Args:
        name: Kernel and tiling, for reports and the cache of choices.
        kernel: The program.
        grid: Programs side by side.
        arguments: Tensors and integers by name.
        constants: What the program is compiled for.
        warps: Warps of a program.
        stages: Depth of the pipeline of loads.
        results: The tensors that are written.
    """

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int
    results: tuple[Tensor, ...]

    def run(self) -> tuple[Tensor, ...]:
        """Run it; return what it wrote.

        Raises:
            RuntimeError: The GPU has no room for this tiling, or Triton cannot compile it.
        """
        try:
            self.kernel[self.grid](**self.arguments, **self.constants, num_warps=self.warps, num_stages=self.stages)
        except TritonError as error:
            raise RuntimeError(f"{self.name}: {error}") from error
        return self.results

    def compile(self, capability: int) -> Any:
        """Compile it for a GPU of compute capability ``80``, ``90`` ...; nothing runs, and no GPU is needed."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        signature = {}
        attributes = {}
        for place, name in enumerate(self.kernel.arg_names):
            if name in self.constants:
                signature[name] = "constexpr"
                continue
            value = self.arguments[name]
            signature[name] = f"*{names[value.dtype]}" if isinstance(value, Tensor) else "i32"
            if isinstance(value, Tensor) or value % 16 == 0:  # PyTorch aligns what it allocates
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constexprs=self.constants, attrs=attributes)
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _tile(channels: int) -> int:
    return max(int(triton.next_power_of_2(channels)), SMALLEST)


def _merged(groups: int, channels: int) -> int:
    """Groups of a bundle: the fewest whose rows have `ROW` channels."""
    return min(groups, max(1, int(triton.next_power_of_2(-(-ROW // channels)))))


def _products(dtype: torch.dtype) -> dict[str, Any]:
    """In what type tiles are multiplied, and how: TensorFloat-32 where PyTorch's convolutions may use it too."""
    types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    dot = tl.float32 if triton.knobs.runtime.interpret else types[dtype]
    return {"DOT": dot, "PRECISION": "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"}


def _rows(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    return torch.empty(
        *(len(x), channels, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )


def grouped_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    stride: int,
    act: str,
    before: Tensor | None,
    after: Tensor | None,
    sign: float,
) -> list[Launch]:
    """The launches of `mgic.kernels.grouped_conv`, one a tiling."""
    outputs, inputs, kernel = len(weight) // groups, weight.shape[1], weight.shape[2]
    height, width = x.shape[2:]
    out_height, out_width = (height - 1) // stride + 1, (width - 1) // stride + 1
    pixels, merged = len(x) * out_height * out_width, _merged(groups, min(inputs, outputs))
    x, y = _rows(x), _empty(x, len(weight), out_height, out_width)
    arguments = {
        "x": x,
        "weight": packed(weight),
        "bias": bias,
        "before": x if before is None else _rows(before),
        "after": x if after is None else _rows(after),
        "y": y,
        "pixels": pixels,
        "height": height,
        "width": width,
        "out_height": out_height,
        "out_width": out_width,
        "groups": groups,
    }
    launches = []
    widest = min(_tile(merged * outputs), 128)
    depth = min(_tile(merged * inputs), 64)
    for block, tile_out in itertools.product((64, 128), sorted({widest, min(widest, 64)})):
        constants = {
            "INPUTS": inputs,
            "OUTPUTS": outputs,
            "KERNEL": kernel,
            "STRIDE": stride,
            "ACT": act,
            "BEFORE": before is not None,
            "AFTER": 0.0 if after is None else sign,
            "MERGED": merged,
            "PIXELS": block,
            "TILE_IN": depth,
            "TILE_OUT": tile_out,
            **_products(x.dtype),
        }
        grid = (-(-pixels // block), -(-groups // merged) * -(-merged * outputs // tile_out))
        warps = 4 if block * tile_out <= 64 * 128 else 8
        name = f"grouped_conv {block}x{tile_out}"
        launches.append(Launch(name, tiles.grouped_conv, grid, arguments, constants, warps, 3, (y,)))
    return launches


def restriction_chain(x: Tensor, weights: Sequence[Tensor], groups: Sequence[int]) -> list[Launch]:
    """The launches of two or three restrictions in one program, one a tiling; none if their trees are too wide.

    A tree are the channels below one group of the last restriction: nothing outside it is read.
    """
    inputs = [weight.shape[1] for weight in weights]
    outputs = [len(weight) // g for weight, g in zip(weights, groups, strict=True)]
    trees = _merged(groups[-1], x.shape[1] // groups[-1])
    merged = [trees * g // groups[-1] for g in groups]
    widths = [merged[0] * inputs[0], *(m * o for m, o in zip(merged, outputs, strict=True))]
    if not 2 <= len(weights) <= 3 or max(widths) > WIDEST or any(g % groups[-1] for g in groups):
        return []
    pixels, x = x.numel() // x.shape[1], _rows(x)
    ys = [_empty(x, len(weight), *x.shape[2:]) for weight in weights]
    count, last = len(weights), len(weights) - 1
    arguments: dict[str, Any] = {"x": x, "pixels": pixels, "channels": x.shape[1]}
    constants: dict[str, Any] = {"LENGTH": count, "TILE0": _tile(widths[0]), **_products(x.dtype)}
    for i in range(3):  # two restrictions leave the arguments of the third unused
        j = min(i, last)
        arguments |= {f"weight{i + 1}": packed(weights[j]), f"y{i + 1}": ys[j], f"channels{i + 1}": len(weights[j])}
        constants |= {f"INPUTS{i + 1}": inputs[j], f"OUTPUTS{i + 1}": outputs[j], f"MERGED{i + 1}": merged[j]}
        constants |= {f"TILE{i + 1}": _tile(widths[j + 1])}
    launches = []
    for block, warps in ((32, 4), (64, 4), (64, 8)):
        grid = (-(-pixels // block), -(-groups[-1] // trees))
        name = f"restriction_chain {block}, {warps} warps"
        launch = Launch(
            *(name, tiles.restriction_chain, grid, arguments, {**constants, "PIXELS": block}, warps, 2, tuple(ys))
        )
        launches.append(launch)
    return launches


def level(
    x: Tensor,
    coarse: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    groups: int,
    act: str,
    change: bool,
) -> list[Launch]:
    """The launches of `mgic.kernels.level`, one a tiling; none if a group is too wide for a tile on the chip."""
    prolong, *relax = weights if coarse is not None else (weights[0], *weights)
    bias_p, *bias = biases if coarse is not None else (biases[0], *biases)
    bottleneck, channels, hidden = len(relax) == 3, x.shape[1] // groups, len(relax[0]) // groups
    merged = _merged(groups, min(channels, 4 * hidden))
    tile, tile_hidden = _tile(merged * channels), _tile(merged * hidden)
    if max(tile, tile_hidden) > WIDEST // 2:
        return []
    height, width = x.shape[2:]
    x, y = _rows(x), _empty(x, *x.shape[1:])
    part = channels // 2 if coarse is None else coarse.shape[1] // groups
    halo = 1 if bottleneck else 2
    arguments = {
        "x": x,
        "coarse": x if coarse is None else _rows(coarse),
        "weight_p": packed(prolong),
        "bias_p": bias_p,
        "y": y,
        "height": height,
        "width": width,
        "groups": groups,
    }
    for i in range(3):  # a basic block leaves the third convolution's arguments unused
        j = min(i, len(relax) - 1)
        arguments |= {f"weight{i + 1}": packed(relax[j]), f"bias{i + 1}": bias[j]}
    constants = {
        "CHANNELS": channels,
        "COARSE": part if coarse is not None else 0,
        "HIDDEN": hidden,
        "BOTTLENECK": bottleneck,
        "CHANGE": change,
        "ACT": act,
        "MERGED": merged,
        "TILE_X": tile,
        "TILE_COARSE": _tile(merged * part),
        "TILE_HIDDEN": tile_hidden,
        **_products(x.dtype),
    }
    launches = []
    for (rows, columns), warps in (((8, 8), 4), ((8, 8), 8), ((16, 8), 8), ((16, 16), 16)):
        down, across = math.ceil(height / (rows - 2 * halo)), math.ceil(width / (columns - 2 * halo))
        grid = (len(x) * down * across, -(-groups // merged))
        launch = Launch(
            *(f"level {rows}x{columns}, {warps} warps", tiles.level, grid),
            {**arguments, "down": down, "across": across},
            {**constants, "ROWS": rows, "COLUMNS": columns},
            *(warps, 2, (y,)),
        )
        launches.append(launch)
    return launches
