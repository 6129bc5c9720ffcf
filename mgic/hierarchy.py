"""Grid hierarchies in the channel dimension: plain integers, known before any weight exists.

A block of width ``c`` becomes levels of width ``c, c/2, c/4, ...``. Every level but the coarsest relaxes in groups, so that
its cost is linear in its width; the coarsest is dense and couples everything (Eliasof et al. 2023, Sec. 3.3 and 3.4).
This module plans the levels and counts what they cost in closed form. It needs the standard library only.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .errors import ChannelConfigError


@dataclass(frozen=True)
class Level:
    """One grid of a hierarchy.

    Args:
        channels: Width of the feature maps on this level.
        groups: Groups of the relaxation; 1 on the coarsest level.
        hidden: Inner width of the block on this level; equals ``channels`` where the block has none of its own.
        transfer_groups: Groups of the restriction to, and the prolongation from, the next coarser level; 0 on the
            coarsest, which has neither.
    """

    channels: int
    groups: int
    hidden: int
    transfer_groups: int

    @property
    def group_size(self) -> int:
        """Channels per group on the narrower side of the block: the effective ``s_g``."""
        return min(self.channels, self.hidden) // self.groups

    @property
    def transfer_group_size(self) -> int:
        """Fine channels averaged together by the restriction; 0 on the coarsest level."""
        return self.channels // self.transfer_groups if self.transfer_groups else 0


def check_positive(**values: int) -> None:
    """Refuse values that are no positive integers, by name."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ChannelConfigError(f"{name} must be a positive integer, got {value!r}")


def _fit_groups(channels: int, hidden: int, group_size: int, min_groups: int) -> int:
    """Groups for two widths: the rule of Sec. 4.3 of the paper, made buildable.

    The group size is the largest divisor of both widths not above ``group_size``. Where the number of groups this gives does
    not divide both widths (or is below ``min_groups``), it is raised to their next common divisor; where there is none, it
    is their greatest common divisor, and the groups are larger than asked for.
    """
    common = math.gcd(channels, hidden)
    size = max(s for s in range(1, min(group_size, common) + 1) if common % s == 0)
    wanted = max(min(channels, hidden) // size, min_groups)
    return next((g for g in range(wanted, common + 1) if common % g == 0), common)


def fit_group_size(channels: int, group_size: int, hidden: int | None = None, min_groups: int = 2) -> int:
    """Return the effective group size that ``group_size`` becomes for a block of these widths.

    Sec. 4.3 of Eliasof et al. 2023: where a width is not divisible by ``s_g``, the closest smaller size that divides both
    widths is taken. It is counted on the narrower of the two. It exceeds ``group_size`` only where the number of groups
    it gives does not divide the other width, and no larger number does.

    Args:
        channels: Outer width of the block.
        group_size: The size asked for (``s_g``).
        hidden: Inner width of the block, if it differs.
        min_groups: Fewest groups; 2 keeps a level above the coarsest from being dense.

    Raises:
        ChannelConfigError: If a value is not a positive integer.

    Examples:
        >>> fit_group_size(64, 32), fit_group_size(40, 64), fit_group_size(40, 64, hidden=120, min_groups=1)
        (32, 20, 40)
        >>> fit_group_size(80, 64, hidden=184)  # 10 groups would not divide 184: 8 groups of 10
        10
    """
    inner = channels if hidden is None else hidden
    check_positive(channels=channels, group_size=group_size, hidden=inner, min_groups=min_groups)
    return min(channels, inner) // _fit_groups(channels, inner, group_size, min_groups)


def plan_levels(
    channels: int,
    group_size: int,
    coarsest: int,
    hidden: int | None = None,
    *,
    rounding: Callable[[float], int] = math.ceil,
    extra: int = 0,
    minimum: int = 0,
    maximum: int | None = None,
    min_groups: int = 2,
    transfer_group_size: int | None = None,
) -> list[Level]:
    """Plan the grids of one block, finest first.

    The number of coarsenings is ``n = max(rounding(log2(c / s_c)) + extra, minimum)``, where ``c`` is the narrower of the
    block's two widths; each halves both widths, and an odd width stops the halving. The default, ``ceil``, is the text of
    Sec. 3.3 of Eliasof et al. 2023 (halve until at most ``s_c`` channels are left); Algorithm 1 prints ``math.floor``. The
    networks of the 2020 paper have one more level (``floor``, ``extra=1``, ``minimum=1``, ``min_groups=1``), and MGIC-ResNets
    at least one coarsening (``minimum=1``).

    Args:
        channels: Width ``c`` of the block.
        group_size: Channels per group asked for (``s_g``); see `fit_group_size` for widths it does not divide.
        coarsest: Width ``s_c`` at which to stop.
        hidden: Inner width of the block at the finest level; it halves with the channels.
        rounding: Turns ``log2(c / s_c)`` into a number of coarsenings.
        extra: Coarsenings added to that number.
        minimum: Fewest coarsenings.
        maximum: Most coarsenings (an ablation: 0 leaves the wrapped block alone).
        min_groups: Fewest groups above the coarsest level.
        transfer_group_size: Fine channels per group of R and P. By default their number of groups follows the
            relaxation's, so a bottleneck's transfers have four times ``group_size`` channels a group; give ``group_size``
            here for the text's literal reading. Where it does not divide a width there are fewer, larger groups: the
            greatest common divisor of ``channels // transfer_group_size`` and ``channels / 2`` (24 channels with 16: one
            group of 24).

    Raises:
        ChannelConfigError: If a value is not a positive integer (``extra``, ``minimum``, ``maximum``: not negative), or
            ``transfer_group_size`` is odd.

    Examples:
        >>> for level in plan_levels(64, group_size=8, coarsest=16):
        ...     print(level)
        Level(channels=64, groups=8, hidden=64, transfer_groups=8)
        Level(channels=32, groups=4, hidden=32, transfer_groups=4)
        Level(channels=16, groups=1, hidden=16, transfer_groups=0)
    """
    inner = channels if hidden is None else hidden
    check_positive(channels=channels, group_size=group_size, coarsest=coarsest, hidden=inner, min_groups=min_groups)
    if transfer_group_size is not None:
        check_positive(transfer_group_size=transfer_group_size)
        if transfer_group_size % 2:
            raise ChannelConfigError(
                f"transfer_group_size must be even (pairs are averaged), got {transfer_group_size}"
            )
    for name, value in (("extra", extra), ("minimum", minimum), ("maximum", 0 if maximum is None else maximum)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ChannelConfigError(f"{name} must be an integer, at least 0, got {value!r}")

    coarsenings = max(rounding(math.log2(min(channels, inner) / coarsest)) + extra, minimum, 0)
    if maximum is not None:
        coarsenings = min(coarsenings, maximum)
    levels = []
    while coarsenings > 0 and channels % 2 == 0 and inner % 2 == 0:
        groups = _fit_groups(channels, inner, group_size, min_groups)
        wanted = groups if transfer_group_size is None else max(channels // transfer_group_size, 1)
        levels.append(Level(channels, groups, inner, math.gcd(wanted, channels // 2)))
        channels, inner, coarsenings = channels // 2, inner // 2, coarsenings - 1
    return [*levels, Level(channels, 1, inner, 0)]


def plan_groups(channels: int, group_size: int, coarsest: int, hidden: int | None = None) -> list[Level]:
    """Plan groups and no hierarchy: channels of different groups never meet (an ablation; arguments as `plan_levels`).

    Raises:
        ChannelConfigError: If a value is not a positive integer.

    Examples:
        >>> plan_groups(64, group_size=8, coarsest=16)
        [Level(channels=64, groups=8, hidden=64, transfer_groups=0)]
    """
    inner = channels if hidden is None else hidden
    check_positive(channels=channels, group_size=group_size, coarsest=coarsest, hidden=inner)
    groups = _fit_groups(channels, inner, group_size, 2) if min(channels, inner) > coarsest else 1
    return [Level(channels, groups, inner, 0)]


@dataclass(frozen=True)
class Conv:
    """One convolution of a block, for counting: from and to the outer width, or the inner one where marked hidden."""

    kernel_size: int
    from_hidden: bool = False
    to_hidden: bool = False
    norm: bool = True

    def weights(self, level: Level, dim: int) -> int:
        """Weights on a level: every output channel sees its own group of input channels."""
        inputs = level.hidden if self.from_hidden else level.channels
        outputs = level.hidden if self.to_hidden else level.channels
        return inputs * outputs * int(self.kernel_size**dim) // level.groups


CONVOLUTION = (Conv(3, norm=False),)
BASIC = (Conv(3, to_hidden=True), Conv(3, from_hidden=True))
BOTTLENECK = (Conv(1, to_hidden=True), Conv(3, from_hidden=True, to_hidden=True), Conv(1, from_hidden=True))


def count_params(levels: Sequence[Level], convs: Sequence[Conv] = BASIC, dim: int = 2) -> int:
    """Trainable parameters of a multigrid block: formula (3.5), and (15) of 2020, made exact.

    Counts each convolution, its norm's weight and bias, the transfers, and the norm after each prolongation.

    Args:
        levels: The plan, finest first.
        convs: The convolutions of the wrapped block (`BASIC`, `BOTTLENECK`, `CONVOLUTION` or your own).
        dim: Spatial dimensions of the convolutions.

    Examples:
        >>> count_params(plan_levels(64, group_size=8, coarsest=16))
        19840
    """
    total = 0
    for level in levels:
        for conv in convs:
            norm = 2 * (level.hidden if conv.to_hidden else level.channels) if conv.norm else 0
            total += conv.weights(level, dim) + norm
        if level.transfer_groups:
            # R and P have c * s / 2 weights each; the norm after P has 2 c
            total += level.channels * level.transfer_group_size + 2 * level.channels
    return total


def count_macs(levels: Sequence[Level], pixels: int, convs: Sequence[Conv] = BASIC, dim: int = 2) -> int:
    """Multiply-adds of convolutions and transfers of a multigrid block on ``pixels`` positions (norms are folded)."""
    weights = sum(conv.weights(level, dim) for level in levels for conv in convs)
    return pixels * (weights + sum(level.channels * level.transfer_group_size for level in levels))


def bound_params(channels: int, group_size: int, coarsest: int, kernel_size: int = 3) -> int:
    """Return the right side of (3.5): ``2 s_g c (d^2 + 1) + s_c^2 d^2``, for blocks of one convolution.

    It holds where every level but the coarsest has groups of at most ``s_g`` and the coarsest has at most ``s_c`` channels.
    """
    return 2 * group_size * channels * (kernel_size**2 + 1) + coarsest**2 * kernel_size**2


def bound_params_2020(channels: int, group_size: int, coarsenings: int, kernel_size: int = 3) -> float:
    """Return the right side of (15) in Ephrath et al. 2020: ``2 s_g c d^2 + c^2 d^2 / 2^p``, without transfers."""
    return 2 * group_size * channels * kernel_size**2 + channels**2 * kernel_size**2 / (1 << coarsenings)


def describe_levels(levels: Sequence[Level], convs: Sequence[Conv] = BASIC, dim: int = 2) -> str:
    """Return a text table of a plan: widths, groups, and each level's share of the weights (norms left out).

    Examples:
        >>> print(describe_levels(plan_levels(64, group_size=8, coarsest=16)))
        level  channels  hidden  groups  group size  transfers    weights  share
            0        64      64       8           8  8 x 8->4        9728    51%
            1        32      32       4           8  4 x 8->4        4864    25%
            2        16      16   dense          16                  4608    24%
    """
    lines = ["level  channels  hidden  groups  group size  transfers    weights  share"]
    shares = [count_macs([level], 1, convs, dim) for level in levels]
    for j, (level, weights) in enumerate(zip(levels, shares, strict=True)):
        groups = "dense" if level.groups == 1 else str(level.groups)
        size = level.transfer_group_size
        transfers = f"{level.transfer_groups} x {size}->{size // 2}" if size else ""
        lines.append(
            f"{j:5d}  {level.channels:8d}  {level.hidden:6d}  {groups:>6}  {level.group_size:10d}  {transfers:<11}"
            f"{weights:9d}  {weights / sum(shares):5.0%}"
        )
    return "\n".join(lines)
