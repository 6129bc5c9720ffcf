"""Several processes train one network: torchrun starts them, each takes its share of every batch, and none goes on alone.

The batches, their order and the augmentation are those of one process. Gradients are averaged by PyTorch's
``DistributedDataParallel``, batch norms see the whole batch, and what decides how a run goes on (a loss that is not finite,
a signal) is agreed upon. The first process alone reads and writes the run's folder.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data import Share
from ..errors import Stopped, UserError, exit_code
from ..errors import rank as rank  # beside `world_size`

T = TypeVar("T")


class LostProcess(Stopped):
    """Another process of the run has ended; the last checkpoint stays."""


class Elsewhere(Stopped):
    """Another process has said why the run ends."""

    def __init__(self, exit_code: int):
        super().__init__(f"ended by another process (exit code {exit_code})")
        self.exit_code = exit_code


def world_size() -> int:
    """How many processes torchrun has started for this run; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if distributed.is_torchelastic_launched() else 1


def layout() -> tuple[int, int]:
    """Processes on each machine, and machines, as torchrun has started them.

    Raises:
        UserError: The machines have different numbers of processes.
    """
    if world_size() == 1:
        return 1, 1
    devices, nodes = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["GROUP_WORLD_SIZE"])
    if devices * nodes != world_size():
        raise UserError(f"{world_size()} processes on {nodes} machines: each machine needs the same number")
    return devices, nodes


def check_share(batch_size: int, processes: int) -> None:
    """Refuse a batch that cannot be shared equally.

    Raises:
        UserError: The number of processes does not divide it.
    """
    if batch_size % processes:
        near = next(n for n in range(processes, 0, -1) if batch_size % n == 0)
        raise UserError(
            f"batch_size={batch_size} is the batch of all processes together and cannot be shared by {processes}; take "
            f"{near} processes, or a multiple of {processes}"
        )


def must_launch(devices: int, nodes: int) -> bool:
    """Tell whether the processes that are asked for are still to be started.

    Raises:
        UserError: The numbers are none, or not those of the torchrun that has started this process.
    """
    if devices < 1 or nodes < 1:
        raise UserError(f"--devices and --num_nodes must be at least 1, got {devices} and {nodes}")
    if not distributed.is_torchelastic_launched():
        return devices * nodes > 1
    if (devices, nodes) not in ((1, 1), layout()):
        there = "{} processes on {} machines".format(*layout())
        raise UserError(f"torchrun has started {there}, but --devices is {devices} and --num_nodes {nodes}")
    return False


def launch(devices: int, nodes: int, words: Sequence[str]) -> int:
    """Run ``mgic`` in several processes, as torchrun does, and return the exit status of the first that failed, or 0.

    The processes say themselves what is wrong; torchrun's report of it is left out.

    Args:
        devices: Processes on this machine, one a GPU.
        nodes: Machines; beyond one, ``MASTER_ADDR``, ``MASTER_PORT`` and ``NODE_RANK`` say where the first listens and which
            this is.
        words: The command line after ``mgic``.

    Raises:
        UserError: One of the three is missing.
        LostProcess: One was ended by a signal.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    torchrun: Any = importlib.import_module("torch.distributed.run")
    place = ["--standalone"]
    if nodes > 1:
        names = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
        absent = [name for name in names if name not in os.environ]
        if absent:
            raise UserError(f"--num_nodes {nodes} needs {', '.join(absent)} in the environment of each machine")
        address, port, node = (os.environ[name] for name in names)
        place = [f"--nnodes={nodes}", f"--master-addr={address}", f"--master-port={port}", f"--node-rank={node}"]
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // devices, 1)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun.run(torchrun.parse_args([*place, f"--nproc-per-node={devices}", "--module", "mgic", *words]))
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise LostProcess(f"process {number} was ended by {name}; the same command continues the run") from error
        return failure.exitcode
    except SignalException as signalled:
        return 128 + int(signalled.sigval)
    return 0


@dataclass(frozen=True)
class Processes:
    """The processes of a run. Every method is called by all of them, in the same order; one alone needs no communication.

    Args:
        rank: Number of this one; 0 is the first.
        count: How many there are.
        device: Where this one computes.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | str = "cpu"

    @classmethod
    def of(cls, fabric: Any) -> Processes:
        """Those of a Lightning Fabric, which are connected here."""
        if fabric.world_size == 1:
            return ALONE
        for name in ("lightning.fabric", "lightning.pytorch"):  # either may own the banner, whichever came last
            logging.getLogger(name).setLevel(logging.WARNING)
        fabric.launch()
        _end_with_parent()
        return cls(fabric.global_rank, fabric.world_size, fabric.device)

    @property
    def share(self) -> Share:
        """What this one takes of each batch."""
        return Share(self.rank, self.count)

    def total(self, values: Tensor) -> Tensor:
        """The sums over all processes, the same to the last bit in each."""
        if self.count == 1:
            return values
        sums = values.to(self.device)
        distributed.all_reduce(sums)
        return sums.to(values.device)

    def union(self, found: frozenset[int]) -> frozenset[int]:
        """What any of them has found."""
        if self.count == 1:
            return found
        parts: list[Any] = [frozenset()] * self.count
        distributed.all_gather_object(parts, found)
        return frozenset().union(*parts)

    def first(self, action: Callable[[], T]) -> T:
        """Do something in the first process alone; all get its result, or end with its error.

        Raises:
            Elsewhere: In the others, where the first got a `UserError`, an ``OSError`` or a `Stopped`.
        """
        if self.count == 1:
            return action()
        error: Exception | None = None
        told: list[Any] = [None, 0]
        if self.rank == 0:
            try:
                told[0] = action()
            except (UserError, OSError, Stopped) as caught:
                error, told[1] = caught, exit_code(caught)
        distributed.broadcast_object_list(told, src=0, device=torch.device(self.device))
        if error is not None:
            raise error
        if told[1]:
            raise Elsewhere(told[1])
        return told[0]  # type: ignore[no-any-return]

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the first one's values, in place."""
        if self.count > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, src=0)

    def same(self, values: dict[str, Any], what: str) -> None:
        """Refuse processes that differ in what must be one.

        Raises:
            UserError: Here, where this one differs from the first.
            Elsewhere: In the others.
        """
        expected = self.first(lambda: values)
        odd = next((key for key in values if values[key] != expected[key]), None)
        if self.total(torch.tensor([float(odd is not None)])).item():
            if odd is None:
                raise Elsewhere(2)
            raise UserError(f"{what}: {odd} is {values[odd]!r} here, {expected[odd]!r} in the first process")

    def in_step(self, batches: Iterable[T]) -> Iterator[T | None]:
        """What is iterated over, and None as long as another process has more."""
        iterator = iter(batches)
        if self.count == 1:
            yield from iterator
            return
        while True:
            batch = next(iterator, None)
            if not self.total(torch.tensor([float(batch is not None)])).item():
                return
            yield batch

    @contextmanager
    def together(self) -> Iterator[None]:
        """Turn the end of a connection, of which libraries say little, into `LostProcess`."""
        try:
            yield
        except RuntimeError as error:
            said = str(error)
            if self.count == 1 or not any(word in said for word in _CONNECTION):
                raise
            raise LostProcess("another process of the run has ended; the same command continues the run") from error


ALONE = Processes()
"""One process."""

_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Gloo", "gloo")
"""What errors of gloo and NCCL say, which have no class of their own."""


def _end_with_parent() -> None:
    """End this process soon after the one that started it, however that ended: kill -9 of a launcher leaves nobody."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    if sys.platform != "win32":  # there a parent's number stays
        threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


class _Sum(torch.autograd.Function):
    """The sum over all processes, in which the gradient of each is the sum of theirs."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        x = x.clone()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        distributed.all_reduce(gradient)
        return gradient


def moments(x: Tensor, axes: list[int]) -> tuple[Tensor, Tensor, int]:
    """Mean and (biased) variance over ``axes`` in all processes together, kept as axes of length 1, and the number of values.

    The gradient flows through all of it, to every process.
    """
    count = math.prod(x.shape[axis] for axis in axes)
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        return mean, variance, count
    count *= distributed.get_world_size()  # shares are equal
    add: Callable[[Tensor], Tensor] = _Sum.apply
    mean = add(x.sum(axes, keepdim=True)) / count
    return mean, add((x - mean).square().sum(axes, keepdim=True)) / count, count


def synchronize_norms_(model: nn.Module, device: torch.device) -> nn.Module:
    """Let batch norms see the batch of all processes together: the statistics of one process, up to rounding.

    On CUDA they become PyTorch's ``SyncBatchNorm`` (timm's, where they have an activation); that refuses the CPU, where
    they compute with `moments` instead. Weights and their names stay.

    Args:
        model: Any network; changed in place.
        device: Where it is.

    Returns:
        The network; a new module only where it is nothing but a norm.

    Raises:
        UserError: On the CPU, a norm of a kind that is not known.
    """
    if device.type == "cuda":
        return importlib.import_module("timm.layers").convert_sync_batchnorm(model)  # type: ignore[no-any-return]
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            if type(module).forward is not _BatchNorm.forward and not {"drop", "act"} <= set(
                dict(module.named_children())
            ):
                raise UserError(f"{name}: {type(module).__name__} cannot be shared by several processes on the CPU")
            module.forward = partial(_synchronized, module)  # type: ignore[method-assign]
    return model


def _synchronized(module: Any, x: Tensor) -> Tensor:
    """A batch norm, and what timm's ``BatchNormAct2d`` does after it."""
    if not module.training:
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean, variance, count = moments(wide, [0, *range(2, x.ndim)])
    if module.track_running_stats:
        module.num_batches_tracked += 1
        share = module.momentum if module.momentum is not None else 1 / float(module.num_batches_tracked)
        with torch.no_grad():
            module.running_mean.lerp_(mean.flatten(), share)
            module.running_var.lerp_(variance.flatten() * (count / (count - 1)), share)
    y = (wide - mean) * (variance + module.eps).rsqrt()
    if module.affine:
        shape = mean.shape
        y = y * module.weight.view(shape) + module.bias.view(shape)
    y = y.to(x.dtype)
    return module.act(module.drop(y)) if hasattr(module, "act") else y  # type: ignore[no-any-return]
