"""Segmentation networks: LR-ASPP over MobileNetV3 and its MGIC form (Eliasof et al. 2023, Sec. 4.4), and U-Nets."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from timm.models import FeatureInfo
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

from ..blocks import BasicBlock, Layer
from ..cycle import ChannelChange, Correction, MGICBlock, Scheme, tau_correction
from ..errors import UserError
from ..hierarchy import check_positive
from .inputs import check_images
from .mobilenetv3 import MGIC, STEM, Bneck, InvertedBottleneck, activation, every_level, mgic_stages


class LRASPP(nn.Module):
    """Lite R-ASPP, the segmentation head of MobileNetV3 (Howard et al. 2019, Sec. 6.4, Fig. 10), on any backbone.

    With ``l`` the last features of stride 8 and ``h`` the last of all (stride 16 or more):
    ``W_l l + up(W_h (relu(N K h) * sigmoid(mean(G h))))``, resized to the image.

    The mean over all positions and the 1x1 convolution ``G`` commute. The multiply-adds printed for the dense networks are
    those of ``G`` before the mean, so that is the default; ``pool_first`` computes the same for less.

    Args:
        backbone: Returns a list of features and has timm's ``feature_info``: any ``features_only`` network.
        num_classes: Classes of a pixel.
        filters: Width of the head.
        pool_first: Take the mean before ``G``.

    Shape:
        ``(N, C, H, W) -> {"out": (N, num_classes, H, W)}``

    Raises:
        UserError: If the backbone has no features of stride 8, or none behind them.

    Examples:
        >>> import timm
        >>> backbone = timm.create_model("resnet18", features_only=True, output_stride=16)
        >>> LRASPP(backbone, num_classes=5).eval()(torch.zeros(1, 3, 65, 97))["out"].shape
        torch.Size([1, 5, 65, 97])
    """

    def __init__(
        self, backbone: nn.Module, num_classes: int = 19, filters: int = 128, pool_first: bool = False
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, filters=filters)
        info: Any = backbone.feature_info
        reductions, channels = info.reduction(), info.channels()
        if 8 not in reductions[:-1]:
            raise UserError(
                f"LR-ASPP needs features of stride 8 and deeper ones, the backbone's strides are {reductions}"
            )
        self.backbone = backbone
        self.stride = int(reductions[-1])
        self.low = max(i for i, reduction in enumerate(reductions[:-1]) if reduction == 8)
        self.num_classes = num_classes
        self.features = ChannelChange(channels[-1], filters, kernel_size=1, groups=1)
        self.gate = nn.Conv2d(channels[-1], filters, 1, bias=False)
        self.pool_first = pool_first
        self.low_classifier = nn.Conv2d(channels[self.low], num_classes, 1)
        self.high_classifier = nn.Conv2d(filters, num_classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the logits of every pixel."""
        check_images(self, x, self.stride)
        features = self.backbone(x)
        low, high = features[self.low], features[-1]
        pooled = high.mean((2, 3), keepdim=True) if self.pool_first else high
        scale = self.gate(pooled).mean((2, 3), keepdim=True).sigmoid()
        y = self.low_classifier(low) + resize(self.high_classifier(self.features(high) * scale), low)
        return {"out": resize(y, x)}


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Interpolate bilinearly to another tensor's height and width."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


class Pyramid(nn.Module):
    """Stages in a row, every output of which is returned, with timm's ``feature_info``.

    Args:
        stages: The stem, then one for each resolution.
        channels: Width after each.
        reductions: Stride after each.

    Shape:
        ``(N, C, H, W) -> [(N, channels[i], H / reductions[i], W / reductions[i]), ...]``
    """

    def __init__(self, stages: Sequence[nn.Module], channels: Sequence[int], reductions: Sequence[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.channels, self.reductions = list(channels), list(reductions)

    @property
    def feature_info(self) -> FeatureInfo:
        """Width and stride of each of the features."""
        info = [
            {"num_chs": width, "reduction": reduction, "module": f"stages.{i}"}
            for i, (width, reduction) in enumerate(zip(self.channels, self.reductions, strict=True))
        ]
        return FeatureInfo(info, tuple(range(len(info))))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features of every stage."""
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class Size(NamedTuple):
    """A MobileNetV3 for segmentation: Tables 1 and 2 of Howard et al. 2019, the last three blocks halved, to stride 16.

    Args:
        table: Rows of each resolution; the last stage follows without a stride, its depthwise convolutions dilated instead.
        strides: Of each stage.
        relu: Stages that have ReLU where the others have h-swish, in the dense network.
        tail: Width of the last 1x1 convolution.
    """

    table: tuple[tuple[Bneck, ...], ...]
    strides: tuple[int, ...]
    relu: int
    tail: int


LARGE = Size(
    table=(
        (Bneck(3, 16, 16),),
        (Bneck(3, 64, 24), Bneck(3, 72, 24)),
        (Bneck(5, 72, 40, True), *2 * (Bneck(5, 120, 40, True),)),
        (
            *(Bneck(3, 240, 80), Bneck(3, 200, 80), Bneck(3, 184, 80), Bneck(3, 184, 80)),
            *(Bneck(3, 480, 112, True), Bneck(3, 672, 112, True)),
        ),
        (Bneck(5, 336, 80, True), *2 * (Bneck(5, 480, 80, True),)),
    ),
    strides=(1, 2, 2, 2, 1),
    relu=3,
    tail=480,
)
SMALL = Size(
    table=(
        (Bneck(3, 16, 16, True),),
        (Bneck(3, 72, 24), Bneck(3, 88, 24)),
        (
            *(Bneck(5, 96, 40, True), *2 * (Bneck(5, 240, 40, True),)),
            *(Bneck(5, 120, 48, True), Bneck(5, 144, 48, True)),
        ),
        (Bneck(5, 144, 48, True), *2 * (Bneck(5, 288, 48, True),)),
    ),
    strides=(2, 2, 2, 1),
    relu=2,
    tail=288,
)
DILATION = 2


def _reductions(size: Size) -> list[int]:
    """Strides after the stem and after each stage."""
    reductions = [2]
    for stride in size.strides:
        reductions.append(reductions[-1] * stride)
    return reductions


def _dense_backbone(size: Size, in_chans: int) -> Pyramid:
    """Torchvision's MobileNetV3, cut into stages."""
    settings, before, cuts = [], STEM, [1]
    for i, (rows, stride) in enumerate(zip(size.table, size.strides, strict=True)):
        act, dilation = ("RE" if i < size.relu else "HS"), (DILATION if i == len(size.table) - 1 else 1)
        for j, row in enumerate(rows):
            step = stride if j == 0 else 1
            shape = (row.kernel_size, row.hidden, row.channels, row.attention)
            settings.append(InvertedResidualConfig(before, *shape, act, step, dilation, 1.0))
            before = row.channels
        cuts.append(cuts[-1] + len(rows))
    layers: Any = MobileNetV3(settings, last_channel=1).features
    if in_chans != 3:
        layers[0][0] = nn.Conv2d(in_chans, STEM, 3, stride=2, padding=1, bias=False)
        nn.init.kaiming_normal_(layers[0][0].weight, mode="fan_out")
    cuts[-1] += 1  # the last stage takes the last 1x1 convolution along
    stages = [layers[a:b] for a, b in zip([0, *cuts[:-1]], cuts, strict=True)]
    return Pyramid(stages, [STEM, *(rows[-1].channels for rows in size.table[:-1]), size.tail], _reductions(size))


def _dilate(stage: nn.Module) -> None:
    """Widen the depthwise convolutions of a stage's blocks."""
    for module in stage.modules():
        if isinstance(module, InvertedBottleneck):
            conv: Any = module.depthwise[0]
            conv.dilation, conv.padding = (DILATION, DILATION), tuple(DILATION * p for p in conv.padding)


def lraspp_mobilenetv3_small(num_classes: int = 19, in_chans: int = 3, pool_first: bool = False) -> LRASPP:
    """MobileNetV3-Small with the LR-ASPP head (Table 9).

    Args:
        num_classes: Classes of a pixel.
        in_chans: Channels of the images.
        pool_first: See `LRASPP`.
    """
    return LRASPP(_dense_backbone(SMALL, in_chans), num_classes, pool_first=pool_first)


def lraspp_mobilenetv3_large(num_classes: int = 19, in_chans: int = 3, pool_first: bool = False) -> LRASPP:
    """MobileNetV3-Large with the LR-ASPP head (Table 9); arguments as `lraspp_mobilenetv3_small`."""
    return LRASPP(_dense_backbone(LARGE, in_chans), num_classes, pool_first=pool_first)


def _mgic_lraspp(
    size: Size,
    group_size: int,
    coarsest: int,
    act: str | Callable[[], nn.Module],
    correction: Correction,
    scheme: Scheme,
    attention: Callable[[int], Layer],
    num_classes: int,
    in_chans: int,
    pool_first: bool,
) -> LRASPP:
    layer = activation(act)

    def multigrid(block: Callable[..., nn.Module], channels: int, hidden: int) -> nn.Module:
        return MGICBlock(block, channels, group_size, coarsest, hidden, correction, scheme)

    stem = ChannelChange(in_chans, STEM, stride=2, groups=1, act=layer)
    stages, channels = mgic_stages(size.table, size.strides, multigrid, layer, attention=attention)
    _dilate(stages[-1])
    stages[-1].append(ChannelChange(channels[-1], size.tail, kernel_size=1, groups=1, act=layer))
    backbone = Pyramid([stem, *stages], [*channels[:-1], size.tail], _reductions(size))
    return LRASPP(backbone, num_classes, pool_first=pool_first)


def mgic_lraspp_small(
    group_size: int = 64,
    coarsest: int = 64,
    act: str | Callable[[], nn.Module] = "hard_swish",
    correction: Correction = tau_correction,
    scheme: Scheme = MGIC,
    attention: Callable[[int], Layer] = every_level,
    num_classes: int = 19,
    in_chans: int = 3,
    pool_first: bool = False,
) -> LRASPP:
    """MGIC-Small with the LR-ASPP head (Table 9).

    Args:
        group_size: Channels per group of the narrower width (``s_g``).
        coarsest: Width of the narrower side at which to stop (``s_c``).
        act: Activation, as timm names it or as a callable.
        correction: What is prolonged.
        scheme: Plan, transfers, norm and cycle.
        attention: Inner width of a block to what makes its attention on each level.
        num_classes: Classes of a pixel.
        in_chans: Channels of the images.
        pool_first: See `LRASPP`.
    """
    network = (group_size, coarsest, act, correction, scheme, attention)
    return _mgic_lraspp(SMALL, *network, num_classes, in_chans, pool_first)


def mgic_lraspp_large(
    group_size: int = 64,
    coarsest: int = 64,
    act: str | Callable[[], nn.Module] = "hard_swish",
    correction: Correction = tau_correction,
    scheme: Scheme = MGIC,
    attention: Callable[[int], Layer] = every_level,
    num_classes: int = 19,
    in_chans: int = 3,
    pool_first: bool = False,
) -> LRASPP:
    """MGIC-Large with the LR-ASPP head (Table 9); arguments as `mgic_lraspp_small`."""
    network = (group_size, coarsest, act, correction, scheme, attention)
    return _mgic_lraspp(LARGE, *network, num_classes, in_chans, pool_first)


class UNet(nn.Module):
    """A U-Net (Ronneberger et al. 2015): blocks at halved resolutions and doubled widths, and back with skips.

    On the way up, features are resized, narrowed, interleaved with those of the skip, so that even a change in groups
    sees both, and narrowed again.

    Args:
        block: ``channels -> module`` of equal input and output shape, one at each stop.
        change: ``(in_channels, out_channels, stride) -> module``, wherever the width changes.
        widths: From the finest resolution to the coarsest.
        num_classes: Classes of a pixel.
        in_chans: Channels of the images.

    Shape:
        ``(N, in_chans, H, W) -> {"out": (N, num_classes, H, W)}``
    """

    def __init__(
        self,
        block: Callable[[int], nn.Module],
        change: Callable[[int, int, int], nn.Module],
        widths: Sequence[int],
        num_classes: int = 19,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_chans=in_chans)
        self.num_classes = num_classes
        self.stem = nn.Sequential(ChannelChange(in_chans, widths[0], groups=1), block(widths[0]))
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList(nn.Sequential(change(a, b, 2), block(b)) for a, b in pairs)
        self.narrow = nn.ModuleList(change(b, a, 1) for a, b in pairs)
        self.up = nn.ModuleList(nn.Sequential(change(2 * a, a, 1), block(a)) for a, _ in pairs)
        self.head = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the logits of every pixel."""
        check_images(self, x, 1 << len(self.down))
        skips = [self.stem(x)]
        for down in self.down:
            skips.append(down(skips[-1]))
        y = skips.pop()
        for narrow, up in zip(reversed(self.narrow), reversed(self.up), strict=True):
            skip = skips.pop()
            y = up(torch.stack((resize(narrow(y), skip), skip), dim=2).flatten(1, 2))
        return {"out": self.head(y)}


def _widths(width: int, depth: int) -> list[int]:
    for name, value in (("width", width), ("depth", depth)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{name} must be a positive integer, got {value!r}")
    return [width << level for level in range(depth + 1)]


def unet(width: int = 32, depth: int = 4, num_classes: int = 19, in_chans: int = 3) -> UNet:
    """U-Net of residual blocks.

    Args:
        width: Channels at the finest resolution; each coarser one has twice as many.
        depth: Number of times the resolution is halved.
        num_classes: Classes of a pixel.
        in_chans: Channels of the images.
    """

    def change(a: int, b: int, stride: int) -> nn.Module:
        return ChannelChange(a, b, stride, groups=1)

    return UNet(BasicBlock, change, _widths(width, depth), num_classes, in_chans)


def mgic_unet(
    group_size: int = 8,
    coarsest: int = 16,
    width: int = 32,
    depth: int = 4,
    correction: Correction = tau_correction,
    scheme: Scheme = MGIC,
    num_classes: int = 19,
    in_chans: int = 3,
) -> UNet:
    """U-Net of MGIC blocks, the outlook of Ephrath et al. 2020: its weights grow linearly with its width.

    Args:
        group_size: Channels per group (``s_g``).
        coarsest: Width at which to stop (``s_c``).
        width: Channels at the finest resolution; each coarser one has twice as many.
        depth: Number of times the resolution is halved.
        correction: What is prolonged.
        scheme: Plan, transfers, norm and cycle.
        num_classes: Classes of a pixel.
        in_chans: Channels of the images.
    """

    def block(channels: int) -> nn.Module:
        return MGICBlock(BasicBlock, channels, group_size, coarsest, None, correction, scheme)

    return UNet(block, ChannelChange, _widths(width, depth), num_classes, in_chans)


NETWORKS = (
    lraspp_mobilenetv3_small,
    lraspp_mobilenetv3_large,
    mgic_lraspp_small,
    mgic_lraspp_large,
    unet,
    mgic_unet,
)
