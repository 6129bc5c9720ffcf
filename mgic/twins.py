"""The multigrid layer that takes the place of a dense one, and the narrower copies of a block that are its levels."""

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import nn

from .cycle import MGICBlock, MGICConv, MGICLinear
from .errors import UserError
from .hierarchy import plan_levels

CONVOLUTIONS = (nn.Conv2d, Conv2dSame)


class Kept(UserError):  # noqa: N818  (a reason, as a rule)
    """Why a layer is not replaced."""


def unknown(module: nn.Module) -> str:
    """Say what a layer is that nothing here can replace."""
    kind = type(module)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "a transposed convolution"
    if isinstance(module, nn.Conv2d):
        return f"a convolution with a program of its own ({kind.__module__}.{kind.__name__})"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "not a convolution of images"
    if isinstance(module, nn.Linear):
        return f"a linear layer with a program of its own ({kind.__name__})"
    return f"weights of its own, used by its program ({kind.__name__}: attention, embedding or functional)"


def make_conv(module: nn.Module, group_size: int, coarsest: int) -> MGICConv:
    """Make the layer for a dense convolution; its weights are drawn as widely as the convolution's are.

    Raises:
        Kept: It cannot be replaced.
    """
    conv: Any = module
    if type(conv) not in CONVOLUTIONS or conv.groups != 1:
        raise Kept(unknown(conv))
    narrow = min(conv.in_channels, conv.out_channels)
    if narrow <= coarsest:
        raise Kept(f"too narrow: {narrow} channels are at most coarsest={coarsest}")
    keywords = {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "bias": conv.bias is not None,
    }
    new = MGICConv(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        group_size,
        coarsest,
        **keywords,
        padding_mode=conv.padding_mode,
    )
    if len(new.levels) < 2:
        raise Kept(f"the widths {conv.in_channels} and {conv.out_channels} cannot be halved")
    if type(conv) is Conv2dSame:  # it pads by itself, as the size of its input asks for
        for relax in new.relax:
            relax.__class__ = Conv2dSame
    with torch.no_grad():
        std = float(conv.weight.std()) if not conv.weight.is_meta else 1.0
        scale = std * math.sqrt(3 * conv.weight[0].numel())  # over the default draw of nn.Conv2d
        for relax in new.relax:
            relax.weight.mul_(scale)  # type: ignore[operator]
        if conv.bias is not None:
            new.relax[0].bias.copy_(conv.bias)  # type: ignore[operator]
    return new


def make_linear(module: nn.Module, group_size: int, coarsest: int) -> MGICLinear:
    """Make the layer for a dense linear one.

    Raises:
        Kept: It cannot be replaced.
    """
    linear: Any = module
    if not isinstance(linear, nn.Linear):
        raise Kept(unknown(linear))
    narrow = min(linear.in_features, linear.out_features)
    if narrow <= coarsest:
        raise Kept(f"too narrow: {narrow} features are at most coarsest={coarsest}")
    new = MGICLinear(linear.in_features, linear.out_features, group_size, coarsest, bias=linear.bias is not None)
    if len(new.cycle.levels) < 2:
        raise Kept(f"the widths {linear.in_features} and {linear.out_features} cannot be halved")
    if linear.bias is not None:
        with torch.no_grad():
            new.bias.copy_(linear.bias)  # type: ignore[union-attr]
    return new


def make_block(
    module: nn.Module, channels: int, group_size: int, coarsest: int, pooled: Iterable[str] = ()
) -> MGICBlock:
    """Wrap a residual block: each level is a copy of it, narrower and in groups.

    Args:
        module: The block.
        channels: Its outer width.
        group_size: Channels per group (``s_g``).
        coarsest: Width at which to stop (``s_c``).
        pooled: Names of its convolutions that work on one pixel.

    Raises:
        Kept: It cannot be replaced.
    """
    convs: dict[str, Any] = {name: m for name, m in module.named_modules() if isinstance(m, nn.Conv2d)}
    dense = [conv for name, conv in convs.items() if name not in pooled and conv.groups < conv.in_channels]
    if not dense:
        raise Kept("it has no dense convolution")
    widths = sorted({w for conv in dense for w in (conv.in_channels, conv.out_channels)})
    others = [w for w in widths if w != channels]
    hidden = min(others) if others else None
    levels = plan_levels(channels, group_size, coarsest, hidden)
    if len(levels) < 2:
        narrow = min(hidden or channels, channels)
        if narrow <= coarsest:
            raise Kept(f"too narrow: {narrow} channels are at most coarsest={coarsest}")
        raise Kept(f"the widths {', '.join(map(str, widths))} cannot be halved")

    def level(width: int, groups: int, *inner: int) -> nn.Module:
        return narrowed(module, channels // width, groups, pooled)

    return MGICBlock(level, channels, group_size, coarsest, hidden)


def narrowed(block: nn.Module, divisor: int, groups: int, pooled: Iterable[str] = ()) -> nn.Module:
    """Return a copy of a block with all widths divided, its dense convolutions in groups.

    Depthwise convolutions stay depthwise, grouped ones keep at least their groups, convolutions on one pixel stay dense.
    Weights are drawn anew, as widely as the fan-in asks for compared with those of the block; norms and scales keep their
    first values.

    Args:
        block: Any block made of convolutions, norms, scales by channel and layers without weights.
        divisor: What widths are divided by.
        groups: Groups of its dense convolutions.
        pooled: Names of its convolutions that work on one pixel.

    Raises:
        UserError: If a layer is of a kind whose width is not known, or a width is not divisible.
    """
    twin = copy.deepcopy(block)
    pooled = set(pooled)
    widths = {w for m in block.modules() if isinstance(m, nn.Conv2d) for w in (m.in_channels, m.out_channels)}
    for name, module in list(twin.named_modules()):
        if isinstance(module, nn.Conv2d):
            _narrow_convolution(name, module, divisor, groups, name in pooled)
        else:
            _narrow_tensors(name, module, divisor, widths)
    return twin


def _narrow_convolution(name: str, conv: nn.Conv2d, divisor: int, groups: int, pooled: bool) -> None:
    if type(conv) not in CONVOLUTIONS:
        raise Kept(f"{name}: {unknown(conv)}")
    inputs, outputs = -(-conv.in_channels // divisor), -(-conv.out_channels // divisor)
    if not pooled and (conv.in_channels % divisor or conv.out_channels % divisor):
        raise Kept(f"{name}: the widths {conv.in_channels} and {conv.out_channels} cannot be divided by {divisor}")
    if conv.groups == conv.in_channels and conv.groups > 1:
        groups = inputs
    elif pooled and conv.groups == 1:
        groups = 1
    else:
        wanted = max(groups, conv.groups // divisor)
        groups = math.gcd(wanted, math.gcd(inputs, outputs))
    if inputs % groups or outputs % groups:
        raise Kept(f"{name}: {groups} groups do not divide {inputs} and {outputs}")
    old = conv.weight
    fan_in = inputs // groups * math.prod(conv.kernel_size)
    std = 0.0 if old.is_meta or old.numel() < 2 else float(old.detach().std()) * math.sqrt(old[0].numel() / fan_in)
    conv.in_channels, conv.out_channels, conv.groups = inputs, outputs, groups
    conv.weight = nn.Parameter(old.new_empty(outputs, inputs // groups, *conv.kernel_size).normal_(std=std))
    if conv.bias is not None:
        conv.bias = nn.Parameter(conv.bias.detach()[:outputs].clone())


def _narrow_tensors(name: str, module: nn.Module, divisor: int, widths: set[int]) -> None:
    """Keep the first channels of a norm, a scale by channel or an activation with weights."""
    sliced = False
    for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if tensor.numel() < 2 and tensor.numel() not in widths:
            continue
        axes = [axis for axis, length in enumerate(tensor.shape) if length > 1]
        if len(axes) != 1 or tensor.shape[axes[0]] not in widths:
            raise Kept(
                f"{name or type(module).__name__}: {key} of {tuple(tensor.shape)} is not a value for each channel"
            )
        kept = tensor.detach().narrow(axes[0], 0, -(-tensor.shape[axes[0]] // divisor)).clone()
        if key in module._parameters:
            module._parameters[key] = nn.Parameter(kept, tensor.requires_grad)
        else:
            module._buffers[key] = kept
        sliced = True
    if not sliced and not isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm):
        return
    for attribute in ("num_features", "num_channels", "num_parameters"):
        if hasattr(module, attribute):
            setattr(module, attribute, -(-getattr(module, attribute) // divisor))
    if isinstance(module, nn.GroupNorm):
        module.num_groups = math.gcd(module.num_groups, module.num_channels)
    if isinstance(module, nn.LayerNorm):
        if len(module.normalized_shape) != 1:
            raise Kept(f"{name}: a layer norm over {module.normalized_shape}")
        module.normalized_shape = (-(-module.normalized_shape[0] // divisor),)
