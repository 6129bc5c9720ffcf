"""Residual networks (He et al. 2016) and their multigrid twins (Eliasof et al. 2023, Sec. 4.3).

For small images both; for ImageNet the twins only: timm and torchvision have the plain networks.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.layers import ClassifierHead
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks import BasicBlock, Bottleneck, relu
from ..cycle import ChannelChange, Correction, MGICBlock, Scheme, tau_correction
from ..errors import UserError
from ..hierarchy import plan_levels
from .classifier import Classifier, build, default_cfg

MGIC_RESNET = Scheme(plan=partial(plan_levels, minimum=1))
"""The papers' ResNets coarsen at least once: their tables count fewer weights than a dense block even where c <= s_c."""


class StridedBasicBlock(nn.Module):
    """The basic block between two stages: stride 2, and a shortcut without parameters (option A of He et al. 2016).

    The shortcut takes every other pixel and pads the new channels with zeros.

    Shape:
        ``(N, in_channels, H, W) -> (N, out_channels, ceil(H / 2), ceil(W / 2))``
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.act1 = relu()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.act2 = relu()
        before = (out_channels - in_channels) // 2
        self.padding = (0, 0, 0, 0, before, out_channels - in_channels - before)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        return self.act2(y + F.pad(x[:, :, ::2, ::2], self.padding))  # type: ignore[no-any-return]


def _assemble(
    depth: int,
    width: float,
    stage: Callable[[int, int, int, int], list[nn.Module]],
    num_classes: int,
    in_chans: int,
    global_pool: str,
    drop_rate: float,
) -> Classifier:
    if depth < 8 or (depth - 2) % 6:
        raise UserError(f"depth must be 6 n + 2 (8, 14, 20, 32, 44, 56, 110, ...), got {depth}")
    if round(16 * width) < 1:
        raise UserError(f"width={width} leaves no channel: it multiplies 16, 32, 64")
    widths = [round(c * width) for c in (16, 32, 64)]
    inputs = [widths[0], *widths[:-1]]
    stages = [
        nn.Sequential(*stage(before, after, (depth - 2) // 6, 1 if i == 0 else 2))
        for i, (before, after) in enumerate(zip(inputs, widths, strict=True))
    ]
    head = ClassifierHead(widths[-1], num_classes, global_pool, drop_rate)
    stem = ChannelChange(in_chans, widths[0], groups=1)
    return Classifier(stem, stages, head, [widths[0], *widths], [1, 1, 2, 4])


def cifar_resnet(
    depth: int,
    width: float = 1.0,
    num_classes: int = 10,
    in_chans: int = 3,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
) -> Classifier:
    """ResNet of depth ``6 n + 2``: three stages of ``n`` basic blocks, 16, 32 and 64 channels (times ``width``)."""

    def stage(before: int, after: int, blocks: int, stride: int) -> list[nn.Module]:
        first = BasicBlock(after) if stride == 1 else StridedBasicBlock(before, after)
        return [first, *(BasicBlock(after) for _ in range(blocks - 1))]

    return _assemble(depth, width, stage, num_classes, in_chans, global_pool, drop_rate)


def mgic_cifar_resnet(
    depth: int,
    group_size: int = 8,
    coarsest: int = 16,
    width: float = 1.0,
    block: Callable[..., nn.Module] = BasicBlock,
    correction: Correction = tau_correction,
    scheme: Scheme = MGIC_RESNET,
    num_classes: int = 10,
    in_chans: int = 3,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
) -> Classifier:
    """Assemble its multigrid twin: every block an `MGICBlock`, a `ChannelChange` before stages 2 and 3."""

    def stage(before: int, after: int, blocks: int, stride: int) -> list[nn.Module]:
        change = [ChannelChange(before, after, stride)] if stride > 1 else []
        cycles = [
            MGICBlock(block, after, group_size, coarsest, correction=correction, scheme=scheme) for _ in range(blocks)
        ]
        return [*change, *cycles]

    return _assemble(depth, width, stage, num_classes, in_chans, global_pool, drop_rate)


def mgic_resnet(
    repeats: Sequence[int],
    expansion: int,
    inner: int = 1,
    group_size: int = 32,
    coarsest: int = 64,
    width: float = 1.0,
    extra_conv: bool = False,
    block: Callable[..., nn.Module] = Bottleneck,
    correction: Correction = tau_correction,
    scheme: Scheme = MGIC_RESNET,
    num_classes: int = 1000,
    in_chans: int = 3,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
) -> Classifier:
    """Assemble the multigrid twin of an ImageNet ResNet (Eliasof et al. 2023, Table 4).

    Stages of 64, 128, 256, 512 planes (times ``width``), each one `ChannelChange` to the new width and resolution
    and then multigrid blocks of equal width. Table 4 also prints a 3x3 convolution at 112 x 112, which ResNet-50 has not:
    ``extra_conv=True``. Its transfers have ``4 s_g`` channels a group where a bottleneck is wrapped; for the text's ``s_g``
    give ``scheme=Scheme(plan=partial(plan_levels, minimum=1, transfer_group_size=group_size))``.

    Args:
        repeats: Blocks of each stage.
        expansion: Outer width of a block in planes.
        inner: Inner width of a block in planes.
        group_size: Channels per group of the narrower width (``s_g``).
        coarsest: Width of the narrower side at which to stop (``s_c``).
        width: Multiplies all widths.
        extra_conv: Whether Table 4's second layer is there.
        block: What is wrapped: ``block(channels, groups, hidden)``.
        correction: What is prolonged.
        scheme: Plan, transfers, norm and cycle.
        num_classes: Outputs; 0 for features.
        in_chans: Channels of the images.
        global_pool: timm's pooling.
        drop_rate: Dropout before the classifier.
    """
    planes = [round(c * width) for c in (64, 128, 256, 512)]
    if planes[0] < 1:
        raise UserError(f"width={width} leaves no channel: it multiplies 64, 128, 256, 512")
    before, stages = planes[0], []
    for i, (p, blocks) in enumerate(zip(planes, repeats, strict=True)):
        stride = 1 if i == 0 else 2
        stage: list[nn.Module] = []
        if i == 0:
            stage += [ChannelChange(before, before, groups=1)] if extra_conv else []
            stage += [nn.MaxPool2d(3, stride=2, padding=1)]
        if stride > 1 or before != expansion * p:
            stage += [ChannelChange(before, expansion * p, stride)]
        before = expansion * p
        stage += [MGICBlock(block, before, group_size, coarsest, inner * p, correction, scheme) for _ in range(blocks)]
        stages.append(nn.Sequential(*stage))
    stem = ChannelChange(in_chans, planes[0], stride=2, kernel_size=7, groups=1)
    head = ClassifierHead(before, num_classes, global_pool, drop_rate)
    return Classifier(stem, stages, head, [planes[0], *(expansion * p for p in planes)], [2, 4, 8, 16, 32])


_CIFAR = default_cfg((3, 32, 32), 10, pool_size=(8, 8), mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
_IMAGENET = default_cfg((3, 224, 224), 1000, pool_size=(7, 7))
_DEPTHS = (20, 32, 44, 56, 110)
_LARGE = ("mgic_resnet18", "mgic_resnet34", "mgic_resnet50", "mgic_resnet101", "mgic_wide_resnet50_2")
default_cfgs = {
    **{f"{family}{depth}": dict(_CIFAR) for family in ("resnet", "mgic_resnet") for depth in _DEPTHS},
    **{name: dict(_IMAGENET) for name in _LARGE},
}


@register_model
def resnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20 for CIFAR: 0.27 M parameters."""
    return build(cifar_resnet, "resnet20", pretrained, {"depth": 20}, kwargs)


@register_model
def resnet32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-32 for CIFAR."""
    return build(cifar_resnet, "resnet32", pretrained, {"depth": 32}, kwargs)


@register_model
def resnet44(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-44 for CIFAR."""
    return build(cifar_resnet, "resnet44", pretrained, {"depth": 44}, kwargs)


@register_model
def resnet56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-56 for CIFAR: 0.85 M parameters."""
    return build(cifar_resnet, "resnet56", pretrained, {"depth": 56}, kwargs)


@register_model
def resnet110(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-110 for CIFAR: 1.7 M parameters."""
    return build(cifar_resnet, "resnet110", pretrained, {"depth": 110}, kwargs)


@register_model
def mgic_resnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MGIC-ResNet-20."""
    return build(mgic_cifar_resnet, "mgic_resnet20", pretrained, {"depth": 20}, kwargs)


@register_model
def mgic_resnet32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MGIC-ResNet-32."""
    return build(mgic_cifar_resnet, "mgic_resnet32", pretrained, {"depth": 32}, kwargs)


@register_model
def mgic_resnet44(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MGIC-ResNet-44."""
    return build(mgic_cifar_resnet, "mgic_resnet44", pretrained, {"depth": 44}, kwargs)


@register_model
def mgic_resnet56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MGIC-ResNet-56 (Eliasof et al. 2023, Tables 3 and 12)."""
    return build(mgic_cifar_resnet, "mgic_resnet56", pretrained, {"depth": 56}, kwargs)


@register_model
def mgic_resnet110(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MGIC-ResNet-110."""
    return build(mgic_cifar_resnet, "mgic_resnet110", pretrained, {"depth": 110}, kwargs)


@register_model
def mgic_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MGIC-ResNet-18: basic blocks."""
    defaults = {"repeats": (2, 2, 2, 2), "expansion": 1, "block": BasicBlock}
    return build(mgic_resnet, "mgic_resnet18", pretrained, defaults, kwargs)


@register_model
def mgic_resnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MGIC-ResNet-34: basic blocks."""
    defaults = {"repeats": (3, 4, 6, 3), "expansion": 1, "block": BasicBlock}
    return build(mgic_resnet, "mgic_resnet34", pretrained, defaults, kwargs)


@register_model
def mgic_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MGIC-ResNet-50 (Eliasof et al. 2023, Tables 4 and 5)."""
    defaults = {"repeats": (3, 4, 6, 3), "expansion": 4}
    return build(mgic_resnet, "mgic_resnet50", pretrained, defaults, kwargs)


@register_model
def mgic_resnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MGIC-ResNet-101."""
    defaults = {"repeats": (3, 4, 23, 3), "expansion": 4}
    return build(mgic_resnet, "mgic_resnet101", pretrained, defaults, kwargs)


@register_model
def mgic_wide_resnet50_2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MGIC-Wide-ResNet-50-2: the inner width of every bottleneck doubled (Zagoruyko & Komodakis 2016)."""
    defaults = {"repeats": (3, 4, 6, 3), "expansion": 4, "inner": 2}
    return build(mgic_resnet, "mgic_wide_resnet50_2", pretrained, defaults, kwargs)
