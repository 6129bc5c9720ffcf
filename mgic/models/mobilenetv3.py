"""MGIC-MobileNetV3: GhostNet's inverted bottlenecks as multigrid blocks (Eliasof et al. 2023, Sec. 4.3.2, Table 6)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from timm.layers import NormMlpClassifierHead, SqueezeExcite, get_act_layer, make_divisible
from timm.models import register_model
from torch import Tensor, nn

from ..blocks import Layer, relu
from ..cycle import ChannelChange, Correction, MGICBlock, Scheme, tau_correction
from ..errors import UserError
from .classifier import Classifier, build, default_cfg


class InvertedBottleneck(nn.Module):
    """1x1 to a wider inner width, depthwise convolution, 1x1 back, around a skip (Sandler et al. 2018, Howard et al. 2019).

    ``x + N K3 act(SE(N D act(N K1 x)))``; without ``K1`` where the two widths are equal.

    Args:
        channels: Outer width; a multiple of ``groups``.
        groups: Groups of the two 1x1 convolutions.
        hidden: Inner width; ``channels`` by default.
        kernel_size: Of the depthwise convolution; odd.
        attention: Makes the channel attention (SE) of a width.
        norm: Makes the norm of a width.
        act: Makes the activation.

    Shape:
        ``(N, channels, H, W)``, unchanged.
    """

    def __init__(
        self,
        channels: int,
        groups: int = 1,
        hidden: int | None = None,
        kernel_size: int = 3,
        attention: Layer = nn.Identity,
        norm: Layer = nn.BatchNorm2d,
        act: Layer = relu,
    ) -> None:
        super().__init__()
        hidden = channels if hidden is None else hidden
        self.expand: nn.Module = nn.Identity()
        if hidden != channels:
            conv = nn.Conv2d(channels, hidden, 1, groups=groups, bias=False)
            self.expand = nn.Sequential(conv, norm(hidden), act())
        padding = kernel_size // 2
        conv = nn.Conv2d(hidden, hidden, kernel_size, padding=padding, groups=hidden, bias=False)
        self.depthwise = nn.Sequential(conv, norm(hidden))
        self.attention = attention(hidden)
        self.act = act()
        self.project = nn.Sequential(nn.Conv2d(hidden, channels, 1, groups=groups, bias=False), norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y: Tensor = self.attention(self.depthwise(self.expand(x)))
        return x + self.project(self.act(y))  # type: ignore[no-any-return]


round_width = partial(make_divisible, divisor=4)
"""``channels -> channels``, the nearest multiple of 4 not below nine tenths of it."""


def squeeze_excite(channels: int) -> nn.Module:
    """Return the squeeze-and-excitation of a width: an eighth of it inside, a hard sigmoid as gate, on every level."""
    return SqueezeExcite(channels, rd_channels=round_width(channels / 8), gate_layer="hard_sigmoid")


MGIC = Scheme()
"""The text of Sec. 3.3: halve until at most ``s_c`` channels are left; a narrower block stays as it is."""


class Bneck(NamedTuple):
    """A bottleneck as a row of Table 6 states it; kernel sizes, left out there, are those of GhostNet (Han et al. 2020)."""

    kernel_size: int
    hidden: int
    channels: int
    attention: bool = False


STEM = 16
TABLE_6 = (  # one tuple per resolution: strides 2, 4, 8, 16, 32
    (Bneck(3, 16, 16),),
    (Bneck(3, 48, 24), Bneck(3, 72, 24)),
    (Bneck(5, 72, 40, True), Bneck(5, 120, 40, True)),
    (
        *(Bneck(3, 240, 80), Bneck(3, 200, 80), Bneck(3, 184, 80), Bneck(3, 184, 80)),
        *(Bneck(3, 480, 112, True), Bneck(3, 672, 112, True)),
    ),
    (Bneck(5, 672, 160, True), *2 * (Bneck(5, 960, 160), Bneck(5, 960, 160, True))),
)
TAIL, HEAD = 960, 1280


def mgic_mobilenetv3(
    group_size: int = 64,
    coarsest: int = 64,
    width: float = 1.0,
    act: str | Callable[[], nn.Module] = "hard_swish",
    correction: Correction = tau_correction,
    scheme: Scheme = MGIC,
    num_classes: int = 1000,
    in_chans: int = 3,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
) -> Classifier:
    """Assemble MGIC-MobileNetV3: a `ChannelChange` wherever Table 6 changes width or resolution, then the block.

    Widths are multiples of 4. The inner width follows from the block's (rounded) input and is multiplied once more, as in the
    authors' program: ``hidden = width * c_in * (hidden / c_in)_Table 6``; only so is ``width=0.6`` as small as Table 7 says.
    The last 1280 features are not widened.

    Args:
        group_size: Channels per group of the narrower width (``s_g``).
        coarsest: Width of the narrower side at which to stop (``s_c``).
        width: Multiplies all widths.
        act: Activation, as timm names it or as a callable; ``"relu"`` for the rows without h-swish.
        correction: What is prolonged.
        scheme: Plan, transfers, norm and cycle.
        num_classes: Outputs; 0 for features.
        in_chans: Channels of the images.
        global_pool: timm's pooling.
        drop_rate: Dropout before the classifier.

    Raises:
        UserError: If ``width`` is not positive, or timm has no activation of that name.
    """
    if width <= 0:
        raise UserError(f"width must be positive, got {width}")
    layer = activation(act)

    def multigrid(block: Callable[..., nn.Module], channels: int, hidden: int) -> nn.Module:
        return MGICBlock(block, channels, group_size, coarsest, hidden, correction, scheme)

    stem = ChannelChange(in_chans, round_width(STEM * width), stride=2, groups=1, act=layer)
    stages, channels = mgic_stages(TABLE_6, (1, 2, 2, 2, 2), multigrid, layer, width)
    tail = round_width(TAIL * width)
    stages[-1].append(ChannelChange(channels[-1], tail, kernel_size=1, groups=1, act=layer))
    head = NormMlpClassifierHead(tail, num_classes, HEAD, global_pool, drop_rate, nn.Identity, layer)
    return Classifier(stem, stages, head, [*channels[:-1], tail], [2, 2, 4, 8, 16, 32])


def every_level(hidden: int) -> Layer:
    """Squeeze-and-excitation on every level of a block, whatever its inner width."""
    return squeeze_excite


def mgic_stages(
    table: Sequence[Sequence[Bneck]],
    strides: Sequence[int],
    multigrid: Callable[[Callable[..., nn.Module], int, int], nn.Module],
    act: Callable[[], nn.Module],
    width: float = 1.0,
    attention: Callable[[int], Layer] = every_level,
) -> tuple[list[nn.Sequential], list[int]]:
    """Build the stages of a table: a `ChannelChange` wherever width or resolution changes, then the block.

    Args:
        table: Rows of each stage.
        strides: Of each stage.
        multigrid: ``(block, channels, hidden)`` makes the multigrid block of a row.
        act: Makes the activations.
        width: Multiplies all widths.
        attention: Inner width of a row that has attention to what makes it on each level.

    Returns:
        The stages, and the widths of the stem and of each stage.
    """
    printed, channels, stages = STEM, [round_width(STEM * width)], []
    for rows, stride in zip(table, strides, strict=True):
        stage, before = nn.Sequential(), channels[-1]
        for i, row in enumerate(rows):
            after, hidden = round_width(row.channels * width), round_width(before * row.hidden / printed * width)
            step = stride if i == 0 else 1
            if step > 1 or after != before:
                stage.append(ChannelChange(before, after, step, act=act))
            attend = attention(hidden) if row.attention else nn.Identity
            block = partial(InvertedBottleneck, kernel_size=row.kernel_size, attention=attend, act=act)
            stage.append(multigrid(block, after, hidden))
            printed, before = row.channels, after
        stages.append(stage)
        channels.append(before)
    return stages, channels


def activation(act: str | Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return what makes an activation, given as timm names it or as a callable."""
    if act == "relu":
        return relu
    try:
        return get_act_layer(act)  # type: ignore[no-any-return]
    except KeyError:
        raise UserError(
            f"timm has no activation {act!r}; 'hard_swish', 'relu', 'silu' and 'gelu' are some it has"
        ) from None


_WIDTHS = {"mgic_mobilenetv3_060": 0.6, "mgic_mobilenetv3_100": 1.0, "mgic_mobilenetv3_120": 1.2}
default_cfgs = {name: default_cfg((3, 224, 224), 1000, pool_size=(7, 7)) for name in _WIDTHS}


@register_model
def mgic_mobilenetv3_060(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MGIC-MobileNetV3 0.6x (Table 7)."""
    return build(mgic_mobilenetv3, "mgic_mobilenetv3_060", pretrained, {"width": 0.6}, kwargs)


@register_model
def mgic_mobilenetv3_100(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MGIC-MobileNetV3 1.0x (Tables 6, 7 and 13)."""
    return build(mgic_mobilenetv3, "mgic_mobilenetv3_100", pretrained, {"width": 1.0}, kwargs)


@register_model
def mgic_mobilenetv3_120(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MGIC-MobileNetV3 1.2x (Table 7)."""
    return build(mgic_mobilenetv3, "mgic_mobilenetv3_120", pretrained, {"width": 1.2}, kwargs)
