"""The runtime: the op list of a network in eval mode, its interpreter, and the fused CPU engine that runs the same list."""

import torch
from torch import Tensor, nn

from .capture import EngineUnavailable, capture
from .engine import Engine
from .ops import Program

__all__ = ["Engine", "EngineUnavailable", "Program", "capture", "compile_engine"]


def compile_engine(model: nn.Module, example_input: Tensor, threads: int | None = None) -> Engine:
    """Make the fused engine of a network, in eval mode, for images of the size of ``example_input``.

    The weights are copied: later changes of the model do not reach the engine.

    Args:
        model: Any network that takes one tensor of images; it is left as it is.
        example_input: ``(N, C, H, W)``, float32.
        threads: Threads of a call; PyTorch's number by default.

    Raises:
        EngineUnavailable: There is no compiler, or the network cannot be recorded.
    """
    return Engine(capture(model, example_input), torch.get_num_threads() if threads is None else threads)
