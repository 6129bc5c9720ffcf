"""The first multigrid-in-channels networks (Ephrath, Ruthotto & Treister 2020): random transfers, and one level more."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from timm.layers import ClassifierHead, make_divisible
from timm.models import register_model
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual

from ..blocks import BasicBlock
from ..cycle import ChannelChange, Correction, MGICBlock, Scheme, tau_correction
from ..errors import ChannelConfigError, UserError
from ..hierarchy import plan_levels
from ..transfer import averaging_pair, sparse_random_pair
from .classifier import Classifier, build, default_cfg
from .mobilenetv3 import InvertedBottleneck
from .resnet import default_cfgs as resnet_cfgs

MG2020 = Scheme(
    plan=partial(plan_levels, rounding=math.floor, extra=1, minimum=1, min_groups=1), transfer=sparse_random_pair
)
"""Coarsen until the width is below the threshold, at least once; transfers with ``t = group_size`` random places a row."""


class DoublingTransition(nn.Module):
    """Twice the channels at half the resolution: ``pool([x, N D x])`` with a depthwise 3x3 convolution ``D`` (Sec. 5).

    Args:
        channels: Width before.

    Shape:
        ``(N, channels, H, W) -> (N, 2 channels, ceil(H / 2), ceil(W / 2))``

    Examples:
        >>> DoublingTransition(16)(torch.ones(1, 16, 7, 7)).shape
        torch.Size([1, 32, 4, 4])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.pool = nn.AvgPool2d(2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the transition."""
        return self.pool(torch.cat([x, self.norm(self.conv(x))], dim=1))  # type: ignore[no-any-return]


def mg_resnet(
    channels: Sequence[int],
    repeats: Sequence[int],
    group_size: int,
    coarsest: int,
    multigrid: bool = True,
    large_images: bool = False,
    block: Callable[..., nn.Module] = BasicBlock,
    correction: Correction = tau_correction,
    scheme: Scheme = MG2020,
    num_classes: int = 10,
    in_chans: int = 3,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
) -> Classifier:
    """Assemble an MG-ResNet: an opening layer, then stages of multigrid cycles with `DoublingTransition` between.

    Args:
        channels: Width of each stage, twice that of the stage before.
        repeats: Cycles of each stage.
        group_size: Channels per group (``s_g``), and random places in a row of ``P`` (``t``).
        coarsest: Width below which to stop.
        multigrid: Whether the blocks are multigrid cycles; otherwise this is the paper's dense baseline.
        large_images: Open with a 7x7 convolution of stride 2 and max-pooling instead of a 3x3 convolution.
        block: What is wrapped: ``block(channels, groups)``.
        correction: What is prolonged.
        scheme: Plan, transfers, norm and cycle.
        num_classes: Outputs; 0 for features.
        in_chans: Channels of the images.
        global_pool: timm's pooling.
        drop_rate: Dropout before the classifier.

    Raises:
        ChannelConfigError: If a stage is not twice as wide as the one before.
    """
    if len(channels) != len(repeats) or any(after != 2 * before for before, after in pairwise(channels)):
        raise ChannelConfigError(
            f"channels={tuple(channels)} must double from stage to stage, with as many repeats={tuple(repeats)}"
        )
    stages = []
    for i, (c, blocks) in enumerate(zip(channels, repeats, strict=True)):
        stage: list[nn.Module] = [DoublingTransition(c // 2)] if i else []
        if large_images and i == 0:
            stage.append(nn.MaxPool2d(3, stride=2, padding=1))
        for _ in range(blocks):
            cycle = partial(MGICBlock, block, c, group_size, coarsest, correction=correction, scheme=scheme)
            stage.append(cycle() if multigrid else block(c))
        stages.append(nn.Sequential(*stage))
    kernel_size, stride, reduction = (7, 2, 4) if large_images else (3, 1, 1)
    stem = ChannelChange(in_chans, channels[0], stride, kernel_size, groups=1)
    head = ClassifierHead(channels[-1], num_classes, global_pool, drop_rate)
    reductions = [reduction << i for i in range(len(channels))]
    return Classifier(stem, stages, head, [channels[0], *channels], [stride, *reductions])


MG_MOBILENET = replace(MG2020, transfer=averaging_pair)
"""The same with grouped transfers, as is the rest of these networks."""

MOBILENETV2 = (  # one tuple per resolution: strides 2, 4, 8, 16, 32; expansion, channels, blocks
    ((1, 16, 1),),
    ((6, 24, 2),),
    ((6, 32, 3),),
    ((6, 64, 4), (6, 96, 3)),
    ((6, 160, 3), (6, 320, 1)),
)


def mg_mobilenet(
    group_size: int = 32,
    coarsest: int = 64,
    width: float = 1.0,
    multigrid: bool = True,
    correction: Correction = tau_correction,
    scheme: Scheme = MG_MOBILENET,
    num_classes: int = 1000,
    in_chans: int = 3,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
) -> Classifier:
    """Assemble MG-MobileNetV2: MobileNetV2 (Sandler et al. 2018) with its repeated blocks as multigrid cycles.

    Blocks that change width or resolution, the last 1x1 convolution (1280 channels, not widened) and the classifier are
    the dense ones (Sec. 5). The paper does not say which transfers these networks have; the default is grouped, as is the
    rest of the block. The random ones of its Sec. 4.1 (``scheme=MG2020``) make 3.06 and 6.43 instead of 3.04
    and 6.35 million parameters at widths 1 and 2, where 3.0 and 6.0 are printed.

    Args:
        group_size: Channels per group of the narrower width (``s_g``).
        coarsest: Width of the narrower side below which to stop.
        width: Multiplies all widths but the last.
        multigrid: Whether the repeated blocks are multigrid cycles; otherwise this is MobileNetV2.
        correction: What is prolonged.
        scheme: Plan, transfers, norm and cycle.
        num_classes: Outputs; 0 for features.
        in_chans: Channels of the images.
        global_pool: timm's pooling.
        drop_rate: Dropout before the classifier.

    Raises:
        UserError: If ``width`` is not positive.
    """
    if width <= 0:
        raise UserError(f"width must be positive, got {width}")
    round_width = partial(make_divisible, divisor=8)
    block = partial(InvertedBottleneck, act=nn.ReLU6)
    before = round_width(32 * width)
    stem = ChannelChange(in_chans, before, stride=2, groups=1, act=nn.ReLU6)
    stages: list[list[nn.Module]] = []
    channels = [before]
    for rows in MOBILENETV2:
        stage: list[nn.Module] = []
        for expansion, c, blocks in rows:
            after = round_width(c * width)
            stride = 2 if stages and not stage else 1
            stage.append(InvertedResidual(before, after, stride, expansion))
            for _ in range(blocks - 1):
                inner = expansion * after
                cycles = partial(MGICBlock, block, after, group_size, coarsest, inner, correction, scheme)
                stage.append(cycles() if multigrid else block(after, 1, inner))
            before = after
        stages.append(stage)
        channels.append(before)
    channels[-1] = 1280
    stages[-1].append(ChannelChange(before, 1280, kernel_size=1, groups=1, act=nn.ReLU6))
    head = ClassifierHead(1280, num_classes, global_pool, drop_rate)
    return Classifier(stem, [nn.Sequential(*stage) for stage in stages], head, channels, [2, 2, 4, 8, 16, 32])


_IMAGENET = default_cfg((3, 224, 224), 1000, pool_size=(7, 7))
default_cfgs = {
    "mg_resnet_cifar": {**resnet_cfgs["resnet20"], "pool_size": (4, 4)},
    "mg_resnet34": dict(_IMAGENET),
    "mg_mobilenetv2": dict(_IMAGENET),
}


@register_model
def mg_resnet_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MG-ResNet for CIFAR (Table 1); ``multigrid=False`` is the dense network it is compared with."""
    defaults = {"channels": (16, 32, 64, 128), "repeats": (2, 3, 3, 3), "group_size": 16, "coarsest": 16}
    return build(mg_resnet, "mg_resnet_cifar", pretrained, defaults, kwargs)


@register_model
def mg_resnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MG-ResNet-34 for ImageNet (Table 2)."""
    sizes = {"channels": (64, 128, 256, 512), "repeats": (3, 4, 6, 3), "group_size": 32, "coarsest": 64}
    defaults = {**sizes, "large_images": True, "num_classes": 1000}
    return build(mg_resnet, "mg_resnet34", pretrained, defaults, kwargs)


@register_model
def mg_mobilenetv2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MG-MobileNetV2 for ImageNet (Table 2)."""
    return build(mg_mobilenet, "mg_mobilenetv2", pretrained, {}, kwargs)
