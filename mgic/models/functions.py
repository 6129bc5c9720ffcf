"""Networks that approximate functions of a few numbers, the block exchanged (Eliasof et al. 2023, Sec. 4.2, Table 2)."""

from collections.abc import Callable, Sequence
from functools import partial

from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.ghostnet import GhostBottleneck, GhostModule
from torch import Tensor, nn

from ..cycle import ChannelChange, Correction, MGICBlock, Scheme, tau_correction
from ..errors import UserError
from .inputs import check_samples, is_traced
from .mobilenetv3 import MGIC, InvertedBottleneck

PointBlock = Callable[[int, int, int], nn.Module]
"""``(in_channels, out_channels, expansion) -> block``, with 1x1 convolutions alone."""

STEM, TAIL = 16, 64


class FunctionNet(nn.Module):
    """Approximate a function of some numbers: opening, blocks, closing, with 1x1 convolutions alone.

    A point is an image of one pixel. A batch runs as the pixels of one image, ``(1, C, 1, N)``, which for 1x1 convolutions
    and batch norms is the same as N images of one pixel, and up to twice as fast.

    Args:
        block: Makes the blocks.
        widths: Width after each block.
        expansion: Inner width of a block over the width that enters it.
        in_chans: Numbers the function takes.
        num_classes: Numbers it gives.

    Shape:
        ``(N, in_chans) -> (N, num_classes)``

    Raises:
        UserError: If there is no block, or a width or the expansion is not a positive integer.

    Examples:
        >>> import torch
        >>> FunctionNet(inverted_residual, widths=(32, 64))(torch.zeros(7, 5)).shape
        torch.Size([7, 1])
    """

    def __init__(
        self,
        block: PointBlock,
        widths: Sequence[int],
        expansion: int = 4,
        in_chans: int = 5,
        num_classes: int = 1,
    ) -> None:
        super().__init__()
        numbers = (*widths, expansion, in_chans, num_classes)
        if not widths or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
            raise UserError(
                f"a function net needs at least one block and positive integers, got {widths=!r}, {expansion=!r}, "
                f"{in_chans=!r}, {num_classes=!r}"
            )
        self.in_chans, self.num_classes = in_chans, num_classes
        self.pretrained_cfg = {"input_size": (in_chans,)}  # what it is counted for, as of the classifiers
        self.stem = ChannelChange(in_chans, STEM, kernel_size=1, groups=1)
        before = (STEM, *widths[:-1])
        self.stages = nn.Sequential(*(block(*pair, expansion) for pair in zip(before, widths, strict=True)))
        closing = ChannelChange(widths[-1], TAIL, kernel_size=1, groups=1)
        self.head = nn.Sequential(closing, nn.Conv2d(TAIL, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the function at points."""
        check_samples(self, x, 2, "points (N, C)")
        if not is_traced(x) and len(x) == 0:  # an image without pixels is none for convolutions
            return x.new_zeros(0, self.num_classes)
        y: Tensor = self.head(self.stages(self.stem(x.t()[None, :, None])))
        return y[0, :, 0].t()


def inverted_residual(in_channels: int, out_channels: int, expansion: int) -> nn.Module:
    """Return MobileNetV3's block, as timm has it: its inner width follows from its input, a skip is between equal widths."""
    return InvertedResidual(in_channels, out_channels, dw_kernel_size=1, exp_ratio=expansion)


def ghost_bottleneck(in_channels: int, out_channels: int, expansion: int) -> nn.Module:
    """Return GhostNet's block, as timm has it but for its cheap 3x3 operations: on one pixel they are 1x1."""
    hidden = expansion * in_channels
    block = GhostBottleneck(in_channels, hidden, out_channels, dw_kernel_size=1)
    block.ghost1 = GhostModule(in_channels, hidden, dw_size=1)
    block.ghost2 = GhostModule(hidden, out_channels, dw_size=1, act_layer=nn.Identity)
    return block


def multigrid_block(
    group_size: int, coarsest: int, correction: Correction = tau_correction, scheme: Scheme = MGIC
) -> PointBlock:
    """Return what makes MobileNetV3's block in its MGIC form, after a `ChannelChange` where the width changes.

    The change comes first, so the block's inner width follows from ``out_channels``.

    Args:
        group_size: Channels per group of the narrower width (``s_g``).
        coarsest: Width of the narrower side at which to stop (``s_c``).
        correction: What is prolonged.
        scheme: Plan, transfers, norm and cycle.
    """
    relax = partial(InvertedBottleneck, kernel_size=1)

    def make(in_channels: int, out_channels: int, expansion: int) -> nn.Module:
        hidden = expansion * out_channels
        block = MGICBlock(relax, out_channels, group_size, coarsest, hidden, correction, scheme)
        if in_channels == out_channels:
            return block
        return nn.Sequential(ChannelChange(in_channels, out_channels, kernel_size=1), block)

    return make


def doubling_widths(c_max: int) -> tuple[int, ...]:
    """Return the widths of Table 2: two blocks for each power of two from 32 to ``c_max``.

    Raises:
        UserError: If ``c_max`` is not a power of two, at least 32.

    Examples:
        >>> doubling_widths(128)
        (32, 32, 64, 64, 128, 128)
    """
    if isinstance(c_max, bool) or not isinstance(c_max, int) or c_max < 32 or c_max & (c_max - 1):
        raise UserError(f"c_max must be a power of two, at least 32, got {c_max!r}")
    return tuple(1 << k for k in range(5, c_max.bit_length()) for _ in range(2))


def function_net(
    c_max: int = 128,
    block: PointBlock = inverted_residual,
    widths: Sequence[int] | None = None,
    expansion: int = 4,
    in_chans: int = 5,
    num_classes: int = 1,
) -> FunctionNet:
    """Network of Table 2 with MobileNetV3's block, for the approximation of functions.

    Args:
        c_max: Greatest width, a power of two; see `doubling_widths`.
        block: Makes the blocks; `ghost_bottleneck` is another.
        widths: Widths in place of those that follow from ``c_max``; the workshop paper's Table 4 has ``160 alpha`` twice.
        expansion: Inner width of a block over the width that enters it.
        in_chans: Numbers the function takes.
        num_classes: Numbers it gives.
    """
    widths = doubling_widths(c_max) if widths is None else widths
    return FunctionNet(block, widths, expansion, in_chans, num_classes)


def ghost_function_net(
    c_max: int = 128,
    widths: Sequence[int] | None = None,
    expansion: int = 4,
    in_chans: int = 5,
    num_classes: int = 1,
) -> FunctionNet:
    """Network of Table 2 with GhostNet's block; arguments as `function_net`."""
    return function_net(c_max, ghost_bottleneck, widths, expansion, in_chans, num_classes)


def mgic_function_net(
    c_max: int = 128,
    group_size: int = 8,
    coarsest: int = 8,
    widths: Sequence[int] | None = None,
    expansion: int = 4,
    correction: Correction = tau_correction,
    scheme: Scheme = MGIC,
    in_chans: int = 5,
    num_classes: int = 1,
) -> FunctionNet:
    """Network of Table 2 with MobileNetV3's block in its MGIC form: its weights grow linearly with ``c_max``.

    The paper states neither ``s_g`` nor ``s_c`` for it.

    Args:
        c_max: Greatest width, a power of two.
        group_size: Channels per group of the narrower width (``s_g``).
        coarsest: Width of the narrower side at which to stop (``s_c``).
        widths: Widths in place of those that follow from ``c_max``.
        expansion: Inner width of a block over the width that enters it.
        correction: What is prolonged.
        scheme: Plan, transfers, norm and cycle.
        in_chans: Numbers the function takes.
        num_classes: Numbers it gives.
    """
    block = multigrid_block(group_size, coarsest, correction, scheme)
    return function_net(c_max, block, widths, expansion, in_chans, num_classes)


NETWORKS = (function_net, ghost_function_net, mgic_function_net)
