"""Faster training on the CPU: three kinds of convolution, each computed another way, with the same sums in another order."""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..transfer import GroupedPointwise

MOST_WEIGHTS = 4096
"""Weights a group of a 1x1 convolution may have: up to here the product was faster in every shape measured; with more, it
soon is not."""
MOST_ENTRIES = 16
"""Entries the matrix of a kernel may have for each feature it is applied to: making it costs time too."""
MOST_PARTS = 4
"""Depthwise convolutions that one convolution may become."""


def fast_training_(model: nn.Module) -> list[str]:
    """Let convolutions of a network run as what is faster than PyTorch's own kernels, and name those that may.

    * A grouped 1x1 convolution is one batched matrix product, ``y[n, g] = W[g] x[n, g]`` for images ``n`` and groups ``g``,
      on features as they lie in memory (NCHW). PyTorch takes the groups one by one, or, at larger batches, a kernel made for
      wide groups.
    * On maps of fewer pixels than the kernel has taps most taps meet no pixel: a 5x5 kernel on one pixel is its middle tap.
      The kernel becomes the matrix from all input pixels to all output pixels, the convolution one product a group.
    * A convolution with one input and a few output channels a group, as where the channels of a network double, is a few
      depthwise convolutions.

    How much faster each is, forward and backward pass together: ``benchmarks/fast_training.py``. The sums are the same in
    another order. The choice is a function of the input's shape and storage alone, so that a resumed run stays the same bit
    for bit; under autocast, in half precision and on other devices everything is the convolution it was. Weights, their names
    and their types stay.

    Args:
        model: Any network; changed in place.

    Returns:
        Names of the convolutions that run another way for some inputs.

    Examples:
        >>> fast_training_(nn.Sequential(nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 1)))
        ['0', '1']
    """
    found = []
    for name, module in model.named_modules():
        if (way := _way(module)) is not None:
            module.forward = partial(way, module)
            found.append(name)
    return found


def _way(module: nn.Module) -> Callable[..., Tensor] | None:
    if isinstance(module, GroupedPointwise):
        return pointwise if module.dim == 2 and module.groups > 1 else None
    if not (isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward):
        return None
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        return None
    if module.kernel_size != (1, 1):
        return spatial
    plain = (module.stride, module.padding) == ((1, 1), (0, 0))
    return pointwise if plain and module.groups > 1 else None


def _narrow(module: nn.Conv2d | GroupedPointwise) -> bool:
    return module.weight.numel() <= MOST_WEIGHTS * module.groups


def _fits(module: nn.Conv2d | GroupedPointwise, x: Tensor) -> bool:
    """Whether ``x`` is an input that may run another way; all others, wrong ones too, are the convolution's own."""
    exact = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and exact and x.ndim == 4 and x.shape[1] == module.groups * module.weight.shape[1]


def pointwise(module: nn.Conv2d | GroupedPointwise, x: Tensor) -> Tensor:
    """A grouped 1x1 convolution as a product, of contiguous features or single pixels; of others as it is."""
    if _fits(module, x) and x.shape[2:] == (1, 1):
        return _as_product(module, x, x.new_ones(1, 1, 1, 1))
    if not (_fits(module, x) and x.is_contiguous() and _narrow(module)):
        convolution: Callable[..., Tensor] = type(module).forward
        return convolution(module, x)
    images, _, height, width = x.shape
    groups, (outputs, inputs) = module.groups, module.weight.shape[:2]
    weight = module.weight.view(1, groups, outputs // groups, inputs)
    y = (weight @ x.view(images, groups, inputs, height * width)).view(images, outputs, height, width)
    bias: Tensor | None = getattr(module, "bias", None)
    return y if bias is None else y + bias.view(-1, 1, 1)


def spatial(module: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution as one product a group where the map is smaller than the kernel, or as depthwise ones; else as it is."""
    if _fits(module, x) and x.numel():
        kernel, size = module.kernel_size, (x.shape[2], x.shape[3])
        if math.prod(size) < math.prod(kernel):
            placement = _placement(size, kernel, module.stride, module.padding, module.dilation, x.dtype)
            entries = module.weight[:, :, 0, 0].numel() * placement[0].numel()
            if 0 < entries <= MOST_ENTRIES * x.numel():  # 0: there is no output, which is an error of PyTorch's
                return _as_product(module, x, placement)
        elif 1 < module.groups == x.shape[1] < module.out_channels <= MOST_PARTS * module.groups:
            return _as_depthwise(module, x)
    return nn.Conv2d.forward(module, x)


def _as_product(module: nn.Conv2d | GroupedPointwise, x: Tensor, placement: Tensor) -> Tensor:
    groups, (outputs, inputs) = module.groups, module.weight.shape[:2]
    images, pixels, size = len(x), placement.shape[1], placement.shape[2:]
    matrix = module.weight.reshape(outputs * inputs, -1) @ placement.flatten(1)
    matrix = matrix.view(groups, outputs // groups, inputs, pixels, size.numel()).permute(0, 2, 3, 1, 4)
    y: Tensor = _Product.apply(x.reshape(images, groups, inputs * pixels), matrix.reshape(groups, inputs * pixels, -1))
    y = y.reshape(images, outputs, *size)
    bias: Tensor | None = getattr(module, "bias", None)
    y = y if bias is None else y + bias.view(-1, 1, 1)
    return y.contiguous(memory_format=torch.channels_last) if x.is_contiguous(memory_format=torch.channels_last) else y


class _Product(torch.autograd.Function):
    """``x (images, groups, inputs)`` times ``matrix (groups, inputs, outputs)``, with rows stored as `bmm` is fast for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(x, matrix)
        return torch.bmm(x.transpose(0, 1).contiguous(), matrix).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, matrix = ctx.saved_tensors
        by_group = gradient.transpose(0, 1).contiguous()
        of_matrix = torch.bmm(x.permute(1, 2, 0).contiguous(), by_group)
        return torch.bmm(by_group, matrix.transpose(1, 2)).transpose(0, 1), of_matrix


@lru_cache(maxsize=256)
def _placement(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """``(taps, input pixels, *output size)``: 1 where the tap connects the two pixels."""
    axes = []
    for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True):
        outputs = max(0, (n + 2 * p - d * (k - 1) - 1) // s + 1)
        tap, pixel, output = torch.arange(k), torch.arange(n), torch.arange(outputs)
        axes.append(tap.view(-1, 1, 1) * d + output * s - p == pixel.view(-1, 1))
    rows, columns = (axis.to(dtype) for axis in axes)
    return torch.einsum("aio,bjq->abijoq", rows, columns).flatten(2, 3).flatten(0, 1)


def _as_depthwise(module: nn.Conv2d, x: Tensor) -> Tensor:
    parts, groups = module.out_channels // module.groups, module.groups
    weights = module.weight.view(groups, parts, 1, *module.kernel_size).unbind(1)
    ys = [F.conv2d(x, w, None, module.stride, module.padding, module.dilation, groups) for w in weights]
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        y = torch.stack([y.permute(0, 2, 3, 1) for y in ys], -1).flatten(3).permute(0, 3, 1, 2)
    else:
        y = torch.stack(ys, 2).flatten(1, 2)
    return y if module.bias is None else y + module.bias.view(-1, 1, 1)
