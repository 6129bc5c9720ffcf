"""Faster training on the CPU: a grouped 1x1 convolution as one batched matrix product."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..transfer import GroupedPointwise

MOST_WEIGHTS = 4096
"""Weights a group may have: up to here the product was faster in every shape measured; with more, it soon is not."""


def fast_training_(model: nn.Module) -> list[str]:
    """Let the grouped 1x1 convolutions of a network run as batched matrix products where that is faster, and name them.

    ``y[n, g] = W[g] x[n, g]`` for images ``n`` and groups ``g``, on features as they lie in memory. PyTorch's own convolution
    takes the groups one by one, or, at larger batches, a kernel made for wide groups; forward and backward pass together
    took 0.26 to 0.91 of its time (``benchmarks/grouped_pointwise.py``). The sums are the same in another order.

    The choice is a function of the input alone, so that a resumed run stays the same bit for bit: contiguous (NCHW) features
    on the CPU, without autocast or half precision, and groups of at most `MOST_WEIGHTS` weights. Everything else is the
    convolution it was. Weights, their names and their types stay.

    Args:
        model: Any network; changed in place.

    Returns:
        Names of the convolutions that may run as products.

    Examples:
        >>> fast_training_(nn.Sequential(nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 1)))
        ['0']
    """
    found = []
    for name, module in model.named_modules():
        if _is_grouped_pointwise(module) and module.weight.numel() <= MOST_WEIGHTS * module.groups:
            module.forward = partial(_as_product, module)
            found.append(name)
    return found


def _is_grouped_pointwise(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        plain = (module.kernel_size, module.stride, module.padding) == ((1, 1), (1, 1), (0, 0))
        return plain and type(module).forward is nn.Conv2d.forward and module.groups > 1
    return isinstance(module, GroupedPointwise) and module.dim == 2 and module.groups > 1


def _as_product(module: nn.Conv2d | GroupedPointwise, x: Tensor) -> Tensor:
    groups, (outputs, inputs) = module.groups, module.weight.shape[:2]
    fits = x.is_contiguous() and x.ndim == 4 and x.shape[1] == groups * inputs
    exact = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    if not (fits and exact and x.device.type == "cpu"):
        convolution: Callable[..., Tensor] = type(module).forward
        return convolution(module, x)
    images, _, height, width = x.shape
    weight = module.weight.view(1, groups, outputs // groups, inputs)
    y = (weight @ x.view(images, groups, inputs, height * width)).view(images, outputs, height, width)
    bias: Tensor | None = getattr(module, "bias", None)
    return y if bias is None else y + bias.view(-1, 1, 1)
