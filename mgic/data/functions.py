"""Functions sampled at random points: as many points as wanted, and none of them stored (Eliasof et al. 2023, Sec. 4.2)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from .base import WHOLE, Augmentation, Data, Share
from .seeds import random_key
from .tasks import regression

PARTS = 20
"""A fold tests on a twentieth of the points, 5 %, and trains on the others."""


@dataclass(frozen=True)
class Function:
    """A function of a few numbers, each uniform on its interval.

    Args:
        name: What it is called.
        text: Its formula.
        formula: ``(N, numbers) -> (N,)``.
        low: Lower ends of the intervals.
        high: Upper ends.
        points: As many as its paper draws.
    """

    name: str
    text: str
    formula: Callable[[Tensor], Tensor]
    low: tuple[float, ...]
    high: tuple[float, ...]
    points: int


def _family(p: Tensor) -> Tensor:
    x, y, a, b, c = p.unbind(1)
    return a * (b * x).cos() * (c * y).sin()


COS_SIN_FAMILY = Function(
    "cos_sin_family",
    "a cos(bx) sin(cy), x and y in [0, 2 pi], a in [0, 1], b in [1, 2], c in [10, 20]",
    _family,
    low=(0.0, 0.0, 0.0, 1.0, 10.0),
    high=(2 * math.pi, 2 * math.pi, 1.0, 2.0, 20.0),
    points=10_000_000,
)
"""Eq. (4.1)."""

COS_SIN = Function(
    "cos_sin",
    "cos(x) sin(20y), x and y in [0, 1]",
    lambda p: p[:, 0].cos() * (20 * p[:, 1]).sin(),
    low=(0.0, 0.0),
    high=(1.0, 1.0),
    points=50_000,
)
"""The one function of the workshop paper, Sec. B.1."""


def uniform(indices: Tensor, columns: int, key: int) -> Tensor:
    """Random numbers by their place, ``(i, j) -> u_ij`` on [0, 1): any of them at any time, on any device, the same.

    The number ``columns * i + j`` of the generator SplitMix64 (Steele, Lea and Flood 2014) seeded with ``key``, its upper
    24 bits, which float32 holds exactly.

    Args:
        indices: The rows wanted, int64.
        columns: Numbers in a row.
        key: Seed.

    Shape:
        ``(N,) -> (N, columns)``, float32
    """
    place = columns * indices[:, None] + torch.arange(1, columns + 1, device=indices.device)
    z = place * _GAMMA + key  # int64 wraps around, as the generator asks for
    z = (z ^ _shift(z, 30)) * _MIX[0]
    z = (z ^ _shift(z, 27)) * _MIX[1]
    return _shift(z ^ _shift(z, 31), 40) / (1 << 24)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift right, zeros coming in at the left."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


@dataclass(frozen=True)
class FunctionSamples:
    """Points ``first, first + 1, ...`` (modulo ``points``) of a function's random points, drawn anew in each batch.

    Args:
        function: What is sampled.
        points: Points in all.
        first: Number of this split's first point.
        length: Points of this split.
        device: Where they are drawn.
    """

    function: Function
    points: int
    first: int
    length: int
    device: torch.device | str = "cpu"

    def __len__(self) -> int:
        """Number of points."""
        return self.length

    def to(self, device: torch.device) -> FunctionSamples:
        """The same points, drawn on ``device``."""
        return replace(self, device=device)

    def digest(self) -> str:
        """A hash of what the points follow from."""
        function = self.function
        parts = (function.text, function.low, function.high, self.points, self.first, self.length)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def check(self, augmentation: Augmentation) -> None:
        """Points take no augmentation."""
        augmentation.refuse("points of a function")

    def at(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return points of this split and the function there, ``(N,) -> (N, numbers), (N, 1)``."""
        function = self.function
        rows = (indices.to(self.device) + self.first) % self.points
        low, high = (torch.tensor(ends, device=self.device) for ends in (function.low, function.high))
        x = low + (high - low) * uniform(rows, len(function.low), random_key("function", function.name))
        return x, function.formula(x)[:, None]

    def training_batches(
        self,
        batches: Sequence[Tensor],
        augmentation: Augmentation,
        epoch: int,
        step: int,
        workers: int,
        share: Share = WHOLE,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The points of the given numbers; nothing else plays a part."""
        return map(self.at, map(share.of, batches))

    def evaluation_batches(
        self, batch_size: int, workers: int, share: Share = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All points, in order."""
        return map(self.at, share.turns(torch.split(torch.arange(self.length), batch_size)))


def sampled(function: Function) -> Callable[..., Data]:
    """Return the loader of a function's points.

    Every fold has the same points; fold ``k`` tests on the k-th twentieth of them, and trains on the others. Inputs are
    standardised, by the mean and the deviation of the intervals.
    """

    def load(root: Path, *, points: int = function.points, fold: int = 0) -> Data:
        if isinstance(points, bool) or not isinstance(points, int) or points < PARTS:
            raise UserError(f"{function.name}: points must be an integer, at least {PARTS}, got {points!r}")
        if isinstance(fold, bool) or not isinstance(fold, int) or not 0 <= fold < PARTS:
            raise UserError(f"{function.name}: fold must be an integer, 0 to {PARTS - 1}, got {fold!r}")
        start, stop = points * fold // PARTS, points * (fold + 1) // PARTS
        train = FunctionSamples(function, points, stop, points - (stop - start))
        test = FunctionSamples(function, points, start, stop - start)
        return Data(
            name=function.name,
            train=train,
            test=test,
            task=regression(),
            input_size=(len(function.low),),
            note=f"{function.text}: {len(train):,} random points to train on and {len(test):,} to test, fold {fold}",
            mean=tuple((a + b) / 2 for a, b in zip(function.low, function.high, strict=True)),
            std=tuple((b - a) / math.sqrt(12) for a, b in zip(function.low, function.high, strict=True)),
            scale=1.0,
        )

    return load
