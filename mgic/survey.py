"""What a network shows of itself without anybody knowing its program: sizes, calls, costs, its head, its residual blocks.

It is run on torch's meta device, where tensors have shapes and no values, and its blocks' programs are traced by `torch.fx`.
"""

import copy
import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, fx, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import Inception3

from .counting import Cost, count_trainable
from .errors import BROKEN, UserError


def refuse(model: nn.Module) -> None:
    """Refuse networks that are not plain modules any more."""
    wrapped = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
    for name, module in model.named_modules():
        kind = type(module)
        where = f"{kind.__name__}{f' at {name}' if name else ''}"
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(f"{where} is scripted: convert the network before torch.jit")
        if kind.__name__ == "OptimizedModule":
            raise UserError(f"{where} is compiled: convert the network itself (its _orig_mod), then compile it")
        if isinstance(module, wrapped) or kind.__name__ in (
            "FullyShardedDataParallel",
            "ModelEma",
            "ModelEmaV2",
            "ModelEmaV3",
        ):
            raise UserError(f"{where} wraps a network: convert the network inside (its module), then wrap it")
        if kind.__module__.startswith(("torch.ao.nn.", "torch.nn.quantized", "torchao.")):
            raise UserError(f"{where} is quantised: convert the network before quantisation")
    integers = [name for name, p in model.named_parameters() if not p.is_floating_point()]
    if integers:
        raise UserError(f"{integers[0]} holds integers: convert the network before quantisation")


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of a network.

    Raises:
        UserError: If it cannot be copied: it holds a tensor that a calculation made.
    """
    try:
        return copy.deepcopy(model)
    except BROKEN as error:
        raise UserError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {first_line(error)}); does it hold a tensor "
            "that a calculation made (an old weight_norm or prune, a stored activation)?"
        ) from error


def name_of(model: nn.Module) -> str:
    """What a network calls itself."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(model).__name__)


def input_size_of(model: nn.Module) -> tuple[int, ...]:
    """Return the size of an input without the batch: what the network says (``pretrained_cfg``), else 224 x 224 pixels.

    Inception 3 of torchvision, which says nothing, cannot be trained on fewer pixels than its 299 x 299. The channels of
    images are those of the first convolution, whatever the configuration says; unless the network does not run on such an
    input and does on what it says (a stem that turns pixels into channels).
    """
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    pixels = 299 if isinstance(model, Inception3) else 224
    size = tuple(config.get("input_size") or (3, pixels, pixels))
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    found = size if first is None or len(size) != 3 else (first.in_channels, *size[1:])
    return size if found != size and _runs_on(model, size) and not _runs_on(model, found) else found


def _runs_on(model: nn.Module, size: tuple[int, ...]) -> bool:
    """Whether a network takes an input of a size, tried on the meta device."""
    try:
        with torch.no_grad():
            copied(model).to("meta", torch.float32).eval()(torch.empty(1, *size, device="meta"))
    except BROKEN:
        return False
    return True


def checked_size(input_size: Sequence[int]) -> tuple[int, ...]:
    """Return the size of an input as a tuple.

    Raises:
        UserError: If it is not a sequence of positive integers.
    """
    sized = isinstance(input_size, Sequence) and not isinstance(input_size, str)
    if not sized or not input_size or not all(type(n) is int and n > 0 for n in input_size):
        raise UserError(f"input_size must be positive integers such as (3, 224, 224), got {input_size!r}")
    return tuple(input_size)


@dataclass
class Call:
    """How a module is called.

    Args:
        inputs: Shape of the first input, where every call takes and returns one tensor.
        output: Shape of the first output, likewise.
        seen: How often it is called with inputs of each shape.
    """

    inputs: tuple[int, ...] | None
    output: tuple[int, ...] | None
    seen: Counter[tuple[int, ...] | None] = field(default_factory=Counter)


class Survey:
    """What one run of a network on the meta device shows.

    Args:
        model: The network; left as it is.
        size: Size of one input without the batch.

    Raises:
        UserError: If the network does not run on such an input.
    """

    def __init__(self, model: nn.Module, size: tuple[int, ...]) -> None:
        self.model, self.size = model, size
        self.meta = copied(model).to("meta", torch.float32).eval()  # shapes are all that matters
        self.calls: dict[str, Call] = {}
        self.order: list[str] = []
        counter = FlopCounterMode(display=False)
        names = list(self.meta.named_modules())
        handles = [module.register_forward_hook(partial(self._see, name), with_kwargs=True) for name, module in names]
        try:
            with counter, torch.no_grad():
                self.meta(torch.empty(1, *size, device="meta"))
        except BROKEN as error:
            reason = str(error).strip().splitlines()
            raise UserError(
                f"{type(model).__name__} does not run on inputs of {size}: {type(error).__name__}: "
                f"{reason[0] if reason else ''}; give input_size= (its program sees shapes here, no values)"
            ) from error
        for handle in handles:
            handle.remove()
        self.macs = _macs_by_name(counter, self.meta)
        self.cost = Cost(count_trainable(model), counter.get_total_flops() // 2, size)

    def _see(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        one = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor)
        inputs, shape = (tuple(args[0].shape), tuple(output.shape)) if one else (None, None)
        if name not in self.calls:
            self.order.append(name)
            self.calls[name] = Call(inputs, shape)
        call = self.calls[name]
        if not one:
            call.inputs = call.output = None
        call.seen[inputs] += 1


def _macs_by_name(counter: FlopCounterMode, model: nn.Module) -> dict[str, int]:
    root = type(model).__name__
    found = {}
    for name, flops in counter.get_flop_counts().items():
        if name.startswith(f"{root}."):
            found[name[len(root) + 1 :]] = sum(flops.values()) // 2
    found[""] = counter.get_total_flops() // 2
    return found


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def heads(survey: Survey) -> set[str]:
    """Names of the classifiers: what timm says, else the layer that is called last, if what it returns leaves the network."""
    config: Any = getattr(survey.model, "pretrained_cfg", None) or {}
    named = config.get("classifier") or ()
    found = {name for name in ([named] if isinstance(named, str) else named) if name in survey.calls}
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    last = [name for name in survey.order if isinstance(survey.meta.get_submodule(name), layers)][-1:]
    ends = [survey.calls[name].output for name in ("", *last)]
    if found or len(ends) < 2 or None in ends or math.prod(ends[0] or ()) != math.prod(ends[1] or ()):
        return found
    return set(last)


_ADDITIONS = (operator.add, operator.iadd, torch.add)


class _Shallow(fx.Tracer):
    """Traces one module's own program; the modules in it are called, not looked into."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def is_residual(module: nn.Module) -> bool:
    """Return whether a module adds its unchanged input to something, as `torch.fx` shows.

    Examples:
        >>> from mgic.blocks import BasicBlock
        >>> is_residual(BasicBlock(8)), is_residual(nn.Conv2d(8, 8, 1))
        (True, False)
    """
    try:
        graph = _Shallow().trace(module)
    except (*BROKEN, fx.proxy.TraceError):
        return False
    inputs = [node for node in graph.nodes if node.op == "placeholder"][:1]

    def unchanged(node: Any) -> bool:
        if not isinstance(node, fx.Node):
            return False
        if node.op != "call_module":
            return node in inputs
        called = module.get_submodule(str(node.target))
        empty = isinstance(called, nn.Sequential) and len(called) == 0
        return (empty or isinstance(called, nn.Identity | nn.Dropout | DropPath)) and unchanged(node.args[0])

    return any(
        (node.op == "call_function" and node.target in _ADDITIONS)
        or (node.op == "call_method" and node.target in ("add", "add_"))
        for node in graph.nodes
        if len(node.args) > 1 and (unchanged(node.args[0]) or unchanged(node.args[1]))
    )
