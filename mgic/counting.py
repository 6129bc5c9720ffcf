"""What a network costs: parameters and multiply-adds, measured on the network itself without running it.

A MAC is one multiply-add of a convolution, a linear layer or another product of matrices (attention's two, say): what the
papers call a FLOP. Norms (which fold into the convolutions), activations, pooling and additions are not counted.
"""

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .errors import BROKEN, UserError


@dataclass(frozen=True)
class Cost:
    """Parameters and multiply-adds of one forward pass on one input.

    Args:
        params: Trainable parameters; shared ones count once.
        macs: Multiply-adds of convolutions, linear layers and other products of matrices, such as attention's.
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
    with counter, torch.no_grad():
        _call(meta, torch.empty(1, *size, device="meta"))
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


@dataclass(frozen=True)
class Part:
    """What one part of a network costs, or one level of the multigrid blocks in it.

    Args:
        name: Path of the module in the network.
        level: Place of the grid in its hierarchy, 0 the finest; None for the whole part.
        channels: Width of that grid; None for the whole part.
        group_size: Its effective channels per group; ``channels`` where it is dense, None for the whole part.
        blocks: Blocks of the part that have this grid; 0 for the whole part.
        params: Trainable parameters.
        macs: Multiply-adds of one input.
        activations: Bytes of all features the part makes for one input at inference.
        inference: Most bytes alive at once, in the whole network, while the part runs at inference.
        saved: Bytes of features the part keeps for the backward pass, for one input of a batch of two.
    """

    name: str
    level: int | None
    channels: int | None
    group_size: int | None
    blocks: int
    params: int
    macs: int
    activations: int
    inference: int
    saved: int


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of every storage that operations make, until it is freed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.made = 0
        owned = (t.untyped_storage() for t in (*model.parameters(), *model.buffers()))
        self._known = weakref.WeakSet(owned)
        self.running: list[_Tally] = []  # parts of the network that are being run
        self.peaks: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        self.live += storage.nbytes()
        self.made += storage.nbytes()
        self.peak = max(self.peak, self.live)
        for tally in self.running:
            self.peaks[id(tally)] = max(self.peaks.get(id(tally), 0), self.live)
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

    Raises:
        UserError: If the network cannot take such a batch; a batch norm cannot train on one value a channel.

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
            y = _call(meta, x)
            saved = tracker.live
            losses = [leaf.sum() for leaf in tree_leaves(y) if isinstance(leaf, Tensor) and leaf.requires_grad]
            del y
            if losses:
                torch.autograd.backward(losses)
        meta.zero_grad()
        return tracker.peak, saved

    inference, _ = run(train=False)
    training, saved = run(train=True)
    return Memory(inference, saved, training)


def _call(model: nn.Module, x: Tensor) -> Any:
    try:
        return model(x)
    except BROKEN as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{type(model).__name__} cannot take {x.shape[0]} input(s) of size {tuple(x.shape[1:])}: {reason}"
        ) from error


def breakdown(model: nn.Module, input_size: Sequence[int]) -> list[Part]:
    """Count a network part by part: its stem, stages and head (else its children), and the levels within each.

    A level gathers what the modules of one grid do, in all blocks of the part, wherever they are called (MgNet's operators
    are called between stages too). Additions between levels belong to no level.

    Args:
        model: Any network; left as it was.
        input_size: Size of one input without the batch.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False))
        >>> [(part.name, part.params, part.macs) for part in breakdown(net, (3, 2, 2))]
        [('0', 24, 96), ('1', 0, 0), ('2', 32, 128)]
    """
    meta = copy.deepcopy(model).to("meta")
    tallies: dict[tuple[Any, ...], _Tally] = {}
    inside: dict[nn.Module, list[_Tally]] = {}
    for name, part in _named_parts(meta):
        tallies[(name,)] = _Tally(name)
        inside.setdefault(part, []).append(tallies[(name,)])
        for block in part.modules():
            levels = getattr(block, "levels", None)
            if not isinstance(levels, list):
                continue
            # a block that plans levels keeps its modules in lists with one entry a level
            lists = [children for children in block.children() if isinstance(children, nn.ModuleList)]
            for j, level in enumerate(levels):
                tally = tallies.setdefault((name, j, level), _Tally(name, j, level.channels, level.group_size))
                tally.blocks += 1
                for children in lists:
                    for module in _called(children, j):
                        inside.setdefault(module, []).append(tally)
    twins = dict(zip(meta.modules(), model.modules(), strict=True))  # the copy does not share weights that are tied
    for module, owners in inside.items():
        for tally in owners:
            tally.params |= {id(p): p.numel() for p in twins[module].parameters() if p.requires_grad}
    _tally(meta.eval(), inside, input_size)
    _tally(meta.train(), inside, input_size)
    return [tally.part() for tally in tallies.values()]


def _called(children: nn.ModuleList, j: int) -> list[nn.Module]:
    """Return the modules of entry ``j`` that are called: lists are not, what stands in them is."""
    if j >= len(children):
        return []
    entry = children[j]
    return list(entry) if isinstance(entry, nn.ModuleList) else [entry]


def _named_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Stem, each stage (and what else stands in lists), head; the children of other networks."""
    for name, child in model.named_children():
        if name == "stages" or isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{i}", stage) for i, stage in child.named_children())
        else:
            yield name, child


@dataclass
class _Tally:
    """A part in the making."""

    name: str
    level: int | None = None
    channels: int | None = None
    group_size: int | None = None
    blocks: int = 0
    params: dict[int, int] = field(default_factory=dict)
    macs: int = 0
    activations: int = 0
    inference: int = 0
    saved: int = 0

    def part(self) -> Part:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Part(**{**values, "params": sum(self.params.values())})


def _tally(meta: nn.Module, inside: dict[nn.Module, list[_Tally]], input_size: Sequence[int]) -> None:
    """Run a network in its mode and add up what happens inside the modules."""
    counter, tracker = FlopCounterMode(display=False), _LiveBytes(meta)
    train = meta.training

    def account(module: nn.Module, sign: int) -> None:
        for tally in inside[module]:
            if train:
                tally.saved += sign * tracker.live // 2
            else:
                tally.macs += sign * counter.get_total_flops() // 2
                tally.activations += sign * tracker.made

    def enter(module: nn.Module, args: Any) -> None:
        account(module, -1)
        tracker.running += inside[module]

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        account(module, +1)
        for tally in inside[module]:
            if not train:
                tally.inference = max(tally.inference, tracker.peaks.get(id(tally), 0))
            tracker.running.remove(tally)

    hooks = [h for m in inside for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    # two inputs in training: batch norms cannot train on one value a channel
    x = torch.empty(2 if train else 1, *input_size, device="meta")
    with torch.set_grad_enabled(train), counter, tracker:
        tracker.add(x)
        _call(meta, x)
    for hook in hooks:
        hook.remove()
