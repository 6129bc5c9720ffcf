"""The kernels as operations of PyTorch, each with its naive twin: a few lines of plain PyTorch that define it.

They are registered with ``torch.library``, so that ``torch.compile``, ``torch.export`` and CUDA graphs take them as they are.
On a CUDA device the fastest tiling of the Triton kernel runs, or the twin where that is faster; anywhere else the twin
runs. All are for inference: they have no gradients. Features are ``(N, C, H, W)`` in any memory format; what comes back is
``channels_last``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError
from .choice import choose

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda v: v,
    "relu": F.relu,
    "hard_swish": F.hardswish,
}
"""The activations the kernels know."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The types of features the kernels know."""


def packed(weight: Tensor) -> Tensor:
    """The same weight ``(outputs, inputs, h, w)``, lying in memory as the kernels read it; itself if it does already."""
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def naive_grouped_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    stride: int,
    act: str,
    before: Tensor | None = None,
    after: Tensor | None = None,
    sign: float = 1.0,
) -> Tensor:
    """The twin of `grouped_conv`."""
    y = F.conv2d(x, weight, bias.to(x.dtype), stride, weight.shape[2] // 2, groups=groups)
    y = ACTIVATIONS[act](y if before is None else y + before)
    return y if after is None else y + sign * after


def naive_restriction_chain(x: Tensor, weights: Sequence[Tensor], groups: Sequence[int]) -> list[Tensor]:
    """The twin of `restriction_chain`."""
    xs = [x]
    for weight, g in zip(weights, groups, strict=True):
        xs.append(F.conv2d(xs[-1], weight, groups=g))
    return xs[1:]


def naive_level(
    x: Tensor,
    coarse: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    groups: int,
    act: str,
    change: bool,
) -> Tensor:
    """The twin of `level`."""

    def conv(v: Tensor, i: int) -> Tensor:
        return F.conv2d(v, weights[i], biases[i].to(v.dtype), padding=weights[i].shape[2] // 2, groups=groups)

    first = 0 if coarse is None else 1
    z = x if coarse is None else x + conv(coarse, 0)
    y = z
    for i in range(first, len(weights)):
        y = conv(y, i) + z if i == len(weights) - 1 else conv(y, i)
        y = ACTIVATIONS[act](y)
    return y - x if change else y


@torch.library.custom_op("mgic::grouped_conv", mutates_args=())
def grouped_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    stride: int,
    act: str,
    before: Tensor | None = None,
    after: Tensor | None = None,
    sign: float = 1.0,
) -> Tensor:
    """A grouped convolution and all that follows it: ``act(conv(x) + bias + before) + sign * after``.

    Args:
        x: ``(N, C_in, H, W)``.
        weight: ``(C_out, C_in / groups, k, k)`` with ``k`` 1 or 3; the padding is ``k // 2``.
        bias: ``(C_out,)``, float32.
        groups: Groups.
        stride: 1 or 2, in both directions.
        act: A key of `ACTIVATIONS`.
        before: Added ahead of the activation, as large as the result: a residual.
        after: Added behind it, times ``sign``: -1 is the cycle's subtraction.
        sign: Factor of ``after``.
    """
    _check(x, weight, groups, stride, act)
    return _as_rows(naive_grouped_conv(x, weight, bias, groups, stride, act, before, after, sign))


@torch.library.custom_op("mgic::restriction_chain", mutates_args=())
def restriction_chain(x: Tensor, weights: Sequence[Tensor], groups: Sequence[int]) -> list[Tensor]:
    """The features of all coarser grids, ``x1 = R1 x``, ``x2 = R2 x1`` ..., each written once and not read again.

    Args:
        x: ``(N, C, H, W)``.
        weights: ``(C_j, C_{j-1} / groups_j, 1, 1)`` of each restriction.
        groups: Groups of each.
    """
    for weight, g in zip(weights, groups, strict=True):
        _check(x, weight, g, 1, "none")
    return [_as_rows(y) for y in naive_restriction_chain(x, weights, groups)]


@torch.library.custom_op("mgic::level", mutates_args=())
def level(
    x: Tensor,
    coarse: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    groups: int,
    act: str,
    change: bool,
) -> Tensor:
    """One level on the way up, a block of residual convolutions after the coarse correction, in one kernel.

    ``z = x + P coarse + b``, then ``y = act(z + K2 act(K1 z))`` (two 3x3) or ``act(z + K3 act(K2 act(K1 z)))`` (1x1, 3x3,
    1x1), each convolution with its bias, and then ``y - x`` if ``change``: what the next finer level prolongs.

    Args:
        x: Features of this level, ``(N, C, H, W)``.
        coarse: The correction of the coarser level; None on the coarsest, where ``z = x``.
        weights: Of P (with ``coarse`` only) and of the two or three convolutions.
        biases: ``(C_out,)`` of each, float32.
        groups: Groups of all of them.
        act: A key of `ACTIVATIONS`.
        change: Whether to subtract ``x``.
    """
    _check_level(x, coarse, weights, biases, groups, act)
    return _as_rows(naive_level(x, coarse, weights, biases, groups, act, change))


@grouped_conv.register_fake
def _(x: Any, weight: Any, bias: Any, groups: Any, stride: Any, act: Any, *rest: Any, **named: Any) -> Tensor:
    size = ((n - 1) // stride + 1 for n in x.shape[2:])
    return _rows_like(x, weight.shape[0], *size)


@restriction_chain.register_fake
def _(x: Any, weights: Any, groups: Any) -> list[Tensor]:
    return [_rows_like(x, weight.shape[0], *x.shape[2:]) for weight in weights]


@level.register_fake
def _(x: Any, *rest: Any) -> Tensor:
    return _rows_like(x, *x.shape[1:])


@grouped_conv.register_kernel("cuda")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    stride: int,
    act: str,
    before: Tensor | None = None,
    after: Tensor | None = None,
    sign: float = 1.0,
) -> Tensor:
    _check(x, weight, groups, stride, act)
    arguments = (x, weight, bias, groups, stride, act, before, after, sign)
    (y,) = _fastest("grouped_conv", arguments, lambda: (_as_rows(naive_grouped_conv(*arguments)),))
    return y


@restriction_chain.register_kernel("cuda")
def _(x: Tensor, weights: Sequence[Tensor], groups: Sequence[int]) -> list[Tensor]:
    for weight, g in zip(weights, groups, strict=True):
        _check(x, weight, g, 1, "none")
    arguments = (x, weights, groups)

    def one_by_one() -> tuple[Tensor, ...]:
        xs = [x]
        for weight, g in zip(weights, groups, strict=True):
            zeros = torch.zeros(len(weight), device=x.device)
            xs.append(grouped_conv(xs[-1], weight, zeros, g, 1, "none"))
        return tuple(xs[1:])

    def twin() -> tuple[Tensor, ...]:
        return tuple(map(_as_rows, naive_restriction_chain(*arguments)))

    return list(_fastest("restriction_chain", arguments, twin, one_by_one))


@level.register_kernel("cuda")
def _(
    x: Tensor,
    coarse: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    groups: int,
    act: str,
    change: bool,
) -> Tensor:
    _check_level(x, coarse, weights, biases, groups, act)
    arguments = (x, coarse, weights, biases, groups, act, change)

    def twin() -> tuple[Tensor, ...]:
        return (_as_rows(naive_level(*arguments)),)

    (y,) = _fastest("level", arguments, twin, lambda: (level_by_operations(*arguments),))
    return y


def level_by_operations(
    x: Tensor,
    coarse: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    groups: int,
    act: str,
    change: bool,
) -> Tensor:
    """`level` by the kernels of its convolutions: for groups too wide for one kernel."""
    convs = list(zip(weights, biases, strict=True))
    z = x if coarse is None else grouped_conv(coarse, *convs.pop(0), groups, 1, "none", x)
    y = z
    for conv in convs[:-1]:
        y = grouped_conv(y, *conv, groups, 1, act)
    return grouped_conv(y, *convs[-1], groups, 1, act, z, x if change else None, -1.0)  # type: ignore[no-any-return]


def _fastest(
    name: str,
    arguments: tuple[Any, ...],
    twin: Callable[[], tuple[Tensor, ...]],
    parts: Callable[[], tuple[Tensor, ...]] | None = None,
) -> tuple[Tensor, ...]:
    """Run the way that `choose` finds for these shapes: a tiling of the kernel, the kernels of its parts, or the twin."""
    if find_spec("triton") is None:
        return twin()
    from . import launch

    ways: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    ways |= {one.name: one.run for one in getattr(launch, name)(*arguments)}
    ways |= {} if parts is None else {"parts": parts}
    # Triton launches on the current device
    with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
        return choose(name, arguments, {**ways, "twin": twin})()


def _check(x: Tensor, weight: Tensor, groups: int, stride: int, act: str) -> None:
    kernel = tuple(weight.shape[2:])
    if kernel not in ((1, 1), (3, 3)) or stride not in (1, 2):
        raise UserError(f"the kernels are for 1x1 and 3x3 convolutions of stride 1 or 2, got {kernel}, stride {stride}")
    if act not in ACTIVATIONS:
        raise UserError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    if x.dtype not in DTYPES:
        raise UserError(f"features must be float32, bfloat16 or float16, got {x.dtype}")
    if len(weight) % groups:
        raise UserError(f"groups={groups} must divide the {len(weight)} outputs of the weight")


def _check_level(
    x: Tensor,
    coarse: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    groups: int,
    act: str,
) -> None:
    kernels = [w.shape[2] for w in weights]
    blocks = ([3, 3], [1, 3, 1])
    if kernels[(coarse is not None) :] not in blocks or (coarse is not None and kernels[0] != 1):
        raise UserError(
            f"a level is (1x1 with a coarse correction, then) two 3x3 or 1x1, 3x3, 1x1, got kernels {kernels}"
        )
    if len(biases) != len(weights):
        raise UserError(f"{len(weights)} weights need as many biases, got {len(biases)}")
    for weight in weights:
        _check(x, weight, groups, 1, act)


def _as_rows(y: Tensor) -> Tensor:
    """The tensor in ``channels_last`` memory, never a view of an argument, with the strides the fake kernels promise."""
    rows = _rows_like(y, *y.shape[1:])
    return y if y.stride() == rows.stride() else rows.copy_(y)


def _rows_like(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    shape = (x.shape[0], channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
