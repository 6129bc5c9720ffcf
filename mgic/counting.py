"""What a network costs: parameters and multiply-adds, measured on the network itself without running it.

A MAC is one multiply-add of a convolution or linear layer: what the papers call a FLOP. Norms (which fold into the
convolutions), activations, pooling and additions are not counted.
"""

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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

    Examples:
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


@dataclass(frozen=True)
class Memory:
    """Bytes of features a network holds, its input among them, its parameters apart.

    Args:
        inference: Most bytes alive at once in one forward pass without gradients.
        saved: Bytes alive after a training forward pass: what the backward pass will need.
        training: Most bytes alive at once in a forward and backward pass, gradients of parameters among them.
    """

    inference: int
    saved: int
    training: int


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of every storage that operations make, until it is freed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        owned = (t.untyped_storage() for t in (*model.parameters(), *model.buffers()))
        self._known = weakref.WeakSet(owned)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out


def memory(model: nn.Module, input_size: Sequence[int], batch: int = 1) -> Memory:
    """Count the bytes of features of one forward pass, and of one forward and backward pass.

    Counted on torch's meta device, allocation by allocation, as eager PyTorch makes and frees them: exact, repeatable and
    without using the memory. Buffers that single operations use inside are not seen.

    Args:
        model: Any network; left as it was.
        input_size: Size of one input without the batch.
        batch: Inputs at once.

    Examples:
        >>> memory(nn.Conv2d(4, 8, 1), (4, 10, 10)).inference  # 4 and 8 maps of 100 floats of 4 bytes
        4800
    """
    meta = copy.deepcopy(model).to("meta")

    def run(train: bool) -> tuple[int, int]:
        meta.train(train)
        x = torch.empty(batch, *input_size, device="meta")
        with torch.set_grad_enabled(train), _LiveBytes(meta) as tracker:
            tracker.add(x)
            y = meta(x)
            saved = tracker.live
            if y.requires_grad:
                loss = y.sum()
                del y
                loss.backward()
        meta.zero_grad()
        return tracker.peak, saved

    inference, _ = run(train=False)
    training, saved = run(train=True)
    return Memory(inference, saved, training)
