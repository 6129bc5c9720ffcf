"""What a network costs: parameters and multiply-adds, measured on the network itself without running it.

A MAC is one multiply-add of a convolution or linear layer: what the papers call a FLOP. Norms (which fold into the
convolutions), activations, pooling and additions are not counted.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .errors import UserError


@dataclass(frozen=True)
class Cost:
    """Parameters and multiply-adds of one forward pass on one input.

    Args:
        params: Trainable parameters; shared ones count once.
        macs: Multiply-adds of convolutions and linear layers.
        input_size: The input counted for, without the batch.
    """

    params: int
    macs: int
    input_size: tuple[int, ...]

    def __str__(self) -> str:
        size = "x".join(map(str, self.input_size))
        return f"{self.params:,} parameters, {self.macs:,} MACs at {size}"


def count_trainable(model: nn.Module) -> int:
    """Return the number of trainable parameters; shared ones count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def cost(model: nn.Module, input_size: Sequence[int]) -> Cost:
    """Count a network's parameters and the multiply-adds of one input.

    The network is run once on torch's meta device: shapes only, no arithmetic, no memory. It is left as it was.

    Args:
        model: Any network.
        input_size: Size of one input without the batch, such as ``(3, 224, 224)``.

    Raises:
        UserError: If the network cannot take an input of this size.

    Example:
        >>> print(cost(nn.Conv2d(3, 8, 3, padding=1, bias=False), (3, 32, 32)))
        216 parameters, 221,184 MACs at 3x32x32
    """
    size = tuple(input_size)
    meta = copy.deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            meta(torch.empty(1, *size, device="meta"))
    except RuntimeError as error:
        raise UserError(f"{type(model).__name__} cannot take an input of size {size}: {error}") from error
    return Cost(count_trainable(model), counter.get_total_flops() // 2, size)
