"""The least time a network's blocks can take on a GPU: bytes and multiply-adds of each kernel, at three depths of fusion.

A kernel takes at least as long as its features take to move, or its multiplications to be done, whichever is longer: a
roofline, without caches, halos, launches or weights. *Per operation*: each convolution a kernel, all that follows it inside.
*Per level*: the restrictions one kernel, and one for each level. *Per block*: the input read once, the output written once.
What the dense block is held against is fused per operation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..cycle import MGICBlock
from ..errors import UserError
from ..hierarchy import Level


@dataclass(frozen=True)
class Gpu:
    """What a GPU can do at best.

    Args:
        name: Its name and the type of the features.
        bytes_per_second: Of its memory.
        flops: Multiplications and additions a second, of dense matrix products.
        width: Bytes of a feature.
    """

    name: str
    bytes_per_second: float
    flops: float
    width: int = 2


H200 = Gpu("H200 bf16", 4.3e12, 780e12)
"""Attainable, not advertised: the device of the project's estimates."""


@dataclass(frozen=True)
class Traffic:
    """What one kernel moves and multiplies for one pixel: features read and written, and multiply-adds."""

    features: int
    macs: int

    def seconds(self, pixels: int, gpu: Gpu) -> float:
        """Its floor for so many pixels."""
        return max(self.features * pixels * gpu.width / gpu.bytes_per_second, 2 * self.macs * pixels / gpu.flops)


@dataclass(frozen=True)
class Floors:
    """Kernels of one block, or of many, at each depth of fusion, with the pixels each sees.

    Args:
        dense: Of the dense block, an operation each.
        operation: Of the multigrid block, an operation each.
        level: One a level, and one for the restrictions.
        block: One.
    """

    dense: tuple[tuple[Traffic, int], ...] = ()
    operation: tuple[tuple[Traffic, int], ...] = ()
    level: tuple[tuple[Traffic, int], ...] = ()
    block: tuple[tuple[Traffic, int], ...] = ()

    def __add__(self, other: Floors) -> Floors:
        return Floors(
            self.dense + other.dense,
            self.operation + other.operation,
            self.level + other.level,
            self.block + other.block,
        )


def seconds(kernels: Iterable[tuple[Traffic, int]], gpu: Gpu) -> float:
    """Floor of kernels that run one after the other."""
    return sum(traffic.seconds(pixels, gpu) for traffic, pixels in kernels)


def moved(kernels: Iterable[tuple[Traffic, int]], gpu: Gpu) -> int:
    """Bytes they move."""
    return sum(traffic.features * pixels * gpu.width for traffic, pixels in kernels)


def macs(kernels: Iterable[tuple[Traffic, int]]) -> int:
    """Multiply-adds they do."""
    return sum(traffic.macs * pixels for traffic, pixels in kernels)


def relaxation(channels: int, hidden: int, groups: int, bottleneck: bool) -> list[Traffic]:
    """The convolutions of a block, the last one with its residual."""
    if bottleneck:
        return [
            Traffic(channels + hidden, channels * hidden // groups),
            Traffic(2 * hidden, 9 * hidden * hidden // groups),
            Traffic(hidden + 2 * channels, hidden * channels // groups),
        ]
    each = 9 * channels * hidden // groups
    return [Traffic(channels + hidden, each), Traffic(hidden + 2 * channels, each)]


def block_floors(levels: Sequence[Level], pixels: int, bottleneck: bool) -> Floors:
    """The kernels of a multigrid block, finest level first, and of the dense block of its width.

    Args:
        levels: Its plan, `mgic.plan_levels`.
        pixels: Of all images of a batch.
        bottleneck: Whether the block is 1x1, 3x3, 1x1, else two 3x3.

    Examples:
        >>> from mgic import plan_levels
        >>> floors = block_floors(plan_levels(256, 32, 32, hidden=64, minimum=1), 256 * 56 * 56, bottleneck=True)
        >>> [round(moved(kernels, H200) / 1e6) for kernels in (floors.dense, floors.operation, floors.level, floors.block)]
        [1644, 4316, 2055, 822]
    """
    top = levels[0]
    operation, level = [], []
    for fine, coarse in pairwise(levels):
        transfer = fine.channels * coarse.channels // fine.transfer_groups
        operation.append(Traffic(fine.channels + coarse.channels, transfer))  # restrict
        operation.append(Traffic(coarse.channels + 2 * fine.channels, transfer))  # prolong and add
    if len(levels) > 1:
        chain = sum(one.channels for one in levels)
        level.append(Traffic(chain, sum(t.macs for t in operation[::2])))
    for j, one in enumerate(levels):
        relax = relaxation(one.channels, one.hidden, one.groups, bottleneck)
        if j:  # the last convolution subtracts the restricted features
            relax[-1] = Traffic(relax[-1].features + one.channels, relax[-1].macs)
        operation += relax
        last = j == len(levels) - 1
        prolong = 0 if last else operation[2 * j + 1].macs
        read = one.channels + (0 if last else levels[j + 1].channels)
        level.append(Traffic(read + one.channels, sum(t.macs for t in relax) + prolong))
    whole = Traffic(2 * top.channels, sum(t.macs for t in operation))
    dense = relaxation(top.channels, top.hidden, 1, bottleneck)
    return Floors(*(tuple((t, pixels) for t in kernels) for kernels in (dense, operation, level, [whole])))


def network_floors(model: nn.Module, input_size: Sequence[int], batch: int) -> list[Floors]:
    """The kernels of each multigrid block of a network, and of a dense block in its place; stem and head are left out.

    Args:
        model: A network of multigrid blocks around basic blocks or bottlenecks; left as it was.
        input_size: Size of one image, ``(C, H, W)``.
        batch: Images.

    Raises:
        UserError: A block wraps something else, or there is none.
    """
    meta = copy.deepcopy(model).to("meta").eval()
    found: list[Floors] = []

    def count(block: Any, args: Any) -> None:
        kernels = [m.kernel_size[0] for m in block.relax[0].modules() if isinstance(m, nn.Conv2d)]
        if kernels not in ([3, 3], [1, 3, 1]):
            raise UserError(f"floors are for basic blocks and bottlenecks, got convolutions of {kernels}")
        pixels = args[0].shape[0] * args[0].shape[2] * args[0].shape[3]
        found.append(block_floors(block.levels, pixels, bottleneck=len(kernels) == 3))

    for module in meta.modules():
        if isinstance(module, MGICBlock):
            module.register_forward_pre_hook(count)
    with torch.no_grad():
        meta(torch.empty(batch, *input_size, device="meta"))
    if not found:
        raise UserError(f"{type(model).__name__} has no multigrid blocks")
    return found
