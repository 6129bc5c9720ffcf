"""The training loop: one function and a promise: a run that is killed and continued ends bit for bit the same.

Nothing random depends on what happened before. The order of the samples is a function of (seed, epoch), the augmentation
of (seed, step), every other random number of (seed, step), the learning rate of the step. The position in the epoch is
the step modulo the steps of an epoch. So a checkpoint needs the weights, the optimiser and the step: no generator, no
loader and no scheduler has a state. On GPUs, kernels that add in varying order limit the promise to what PyTorch
documents for them.
"""

from __future__ import annotations

import inspect
import logging
import math
import signal
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..data import Augmentation, Data, WorkerLost, epoch_order, random_key
from ..errors import Stopped, UserError
from .checkpoint import SCHEMA
from .distillation import Distillation, check_teacher, note_sources
from .fast import fast_training_
from .files import write_json
from .folder import RunFolder
from .parallel import ALONE, Processes, check_share, layout, synchronize_norms_, world_size
from .progress import progress_bar, tensorboard, write_csv
from .recipes import Recipe
from .records import provenance, versions
from .signals import Interrupted, Signals
from .weights import Start, TrainedNetwork, save_weights, start_from

MAX_NONFINITE_STEPS = 3
logger = logging.getLogger(__name__)


class NonFiniteLoss(Stopped):
    """The loss or the gradient was NaN or infinite several times in a row; the last checkpoint is finite.

    Args:
        message: What happened.
        samples: Indices of the training samples of each of these steps; ``status.json`` keeps them.
    """

    def __init__(self, message: str, samples: Sequence[list[int]] = ()):
        super().__init__(message)
        self.samples = list(samples)


@dataclass(frozen=True)
class RunSummary:
    """How a run went. Times are seconds of training without evaluation.

    Args:
        steps: Optimisation steps, the skipped ones included.
        metrics: By name, ``train_loss``, ``test_loss`` and the task's others, of the final weights on all training and test
            samples, in eval mode, without augmentation. No epoch is picked by what it reaches on the test samples.
        skipped_steps: Steps left out because the loss or the gradient was not finite.
        bad_samples: Training samples that could not be read and were skipped; see ``on_bad_sample`` of image folders.
        params: Trainable parameters.
        history: One row an epoch: ``epoch, step, lr, train_loss, test_loss``, the score on the test samples, ``seconds``.
        resumed_from: Step the last process continued from; 0 for a run in one piece.
        processes: How many finished the run together.
        origin: Commit, date, machine and versions of the process that finished the run.
        data_note: Provenance of the data.
    """

    model: str
    data: str
    seed: int
    epochs: int
    steps: int
    metrics: dict[str, float]
    seconds_per_epoch: float
    skipped_steps: int
    params: int
    history: list[dict[str, float]]
    resumed_from: int
    origin: dict[str, Any]
    data_note: str = ""  # summaries of the first version had none
    processes: int = 1
    bad_samples: int = 0  # nor this

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the metrics among the others."""
        values = asdict(self)
        metrics = values.pop("metrics")
        return {**values, **metrics}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunSummary:
        """Read what `to_dict` wrote."""
        known = {field.name for field in fields(cls)}
        metrics = {name: value for name, value in values.items() if name not in known}
        return cls(metrics=metrics, **{name: value for name, value in values.items() if name in known})


def train(
    recipe: Recipe,
    build_model: Callable[[], nn.Module],
    data: Data,
    out: str | Path,
    *,
    teacher: TrainedNetwork | None = None,
    init: Start | None = None,
    accelerator: str = "auto",
    strict_resume: bool = False,
    progress: bool | None = None,
    on_step: Callable[[int], None] | None = None,
) -> RunSummary:
    """Train a network in the folder ``out``, or continue the unfinished run of the same recipe that is there.

    Under torchrun all its processes call this and train together, each on its share of every batch: see `parallel`. The
    recipe does not change, and a run may be continued by another number of processes.

    Args:
        recipe: What to do.
        build_model: Makes the network; called once, with PyTorch's generator seeded by the recipe.
        data: What to train on; see `mgic.data.load_data`.
        out: Folder of the run; see `mgic.training.folder.RunFolder`. Of several processes the first alone uses it.
        teacher: Network to learn from, as the recipe's ``distill_`` fields say; see `mgic.training.distillation`. It is left
            as it is. A run is continued with the same teacher only.
        init: Weights to start from; a run is continued with the same ones only.
        accelerator: ``auto``, ``cpu`` or ``cuda``, as in Lightning Fabric.
        strict_resume: Stop at a corrupt checkpoint instead of falling back to the one before it.
        progress: Show a progress bar; default: on a terminal.
        on_step: Called with the number of finished steps after each, when all that belongs to it is saved; in each process.

    Raises:
        UserError: The folder, the data and the network do not fit together.
        Elsewhere: The first of several processes has got the error.
        LostProcess: Another one of them has ended.
        Interrupted: SIGTERM or SIGINT; the checkpoint is written.
        NonFiniteLoss: Three steps in a row had no finite loss or gradient.
        CorruptCheckpoint: No valid checkpoint is left, or ``strict_resume`` found a corrupt one.
        DiskFull: No room for the next checkpoint.
    """
    steps_per_epoch = len(data.train) // recipe.batch_size
    if steps_per_epoch == 0:
        raise UserError(
            f"batch_size={recipe.batch_size} is larger than the {len(data.train)} training {data.task.samples}"
        )
    check_share(recipe.batch_size, world_size())
    if recipe.label_smoothing and not data.task.smooths:
        raise UserError(f"label_smoothing={recipe.label_smoothing} is for classes: {data.task.name} has none")
    check_teacher(recipe, teacher, data)
    # all this before the folder is claimed: what cannot be trained leaves nothing behind
    data.train.check(Augmentation(recipe.crop_padding, recipe.flip, recipe.seed))
    fabric = _fabric(recipe, accelerator)
    model = _seeded(build_model, recipe.seed)
    _check_fit(model, data, "the network")
    if init is not None:
        start_from(model, init)
    distillation = None
    if teacher is not None:
        _check_fit(teacher.model, data, f"the teacher {teacher.recipe.model}")
        distillation = Distillation.of(recipe, teacher, data, model, fabric.device)
    processes, fingerprint = Processes.of(fabric), data.fingerprint()
    folder = RunFolder(Path(out), recipe, fingerprint, note_sources(teacher, init))
    with Signals() as signals, processes.together(), ExitStack() as opened:
        processes.same({**recipe.to_dict(), **fingerprint, **folder.sources}, "processes differ")
        processes.first(lambda: opened.enter_context(folder) and None)
        outcome: dict[str, Any] = {"state": "failed"}
        processes.first(lambda: folder.write_status("running"))
        try:
            with torch.random.fork_rng([fabric.device] if fabric.device.type == "cuda" else []):
                run = _Run(recipe, model, data, folder, fabric, processes, steps_per_epoch, strict_resume, distillation)
                with progress_bar(progress if processes.rank == 0 else False, run.total_steps) as show:
                    summary = run.finish(signals, show, on_step)
            outcome = {"state": "finished"}
        except (Interrupted, KeyboardInterrupt):
            outcome = {"state": "interrupted"}
            raise
        except NonFiniteLoss as error:
            outcome["samples"] = error.samples
            raise
        finally:
            if outcome["state"] == "finished":
                processes.first(lambda: folder.write_status(**outcome))
            elif processes.rank == 0:
                with suppress(OSError):  # the error under way says more than a full disk
                    folder.write_status(**outcome)
    return summary


def evaluate(
    model: nn.Module,
    data: Data,
    split: str = "test",
    *,
    batch_size: int = 512,
    workers: int = 0,
    on_batch: Callable[[], None] | None = None,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """The metrics of the data set's task on ``train`` or ``test``, with ``model`` in eval mode.

    Args:
        model: The network; it stays where it is, and in the mode it is in.
        data: The data set.
        split: ``train`` or ``test``; training samples are not augmented.
        batch_size: Samples at a time.
        workers: Processes that read files.
        on_batch: Called after each batch; may raise to stop.
        processes: Those that evaluate together, each some of the batches.

    Returns:
        ``loss``, the task's score and its other metrics, and ``samples``, how many were read.

    Raises:
        UserError: ``split`` is neither of the two.
    """
    splits = {"train": data.train, "test": data.test}
    if split not in splits:
        raise UserError(f"split must be 'train' or 'test', got {split!r}")
    device = next(chain(model.parameters(), model.buffers())).device
    normalize, samples = data.normalizer(device), splits[split].to(device)
    was_training, meter, count = model.training, data.task.meter(), 0
    model.eval()
    try:
        with torch.no_grad():
            for batch in processes.in_step(samples.evaluation_batches(batch_size, workers, processes.share)):
                if batch is not None:
                    inputs, targets = batch
                    meter.update(data.task.infer(model, normalize(inputs)).float(), targets)
                    count += len(targets)
                if on_batch:
                    on_batch()
    finally:
        model.train(was_training)
    meter.sums = processes.total(meter.sums)
    return {**meter.compute(), "samples": int(processes.total(torch.tensor([count])))}


def average_(average: nn.Module, model: nn.Module, decay: float) -> None:
    """One step of the exponential moving average: ``a <- decay * a + (1 - decay) * w``, in place.

    Floating-point buffers (the statistics of normalisation layers) are averaged too, counters copied. Weights that are
    shared are averaged once: going through ``state_dict`` would do it once per name.
    """
    old = list(chain(average.parameters(), average.buffers()))
    new = list(chain(model.parameters(), model.buffers()))
    pairs = [(a, w) for a, w in zip(old, new, strict=True) if a.is_floating_point()]
    update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    update([a for a, _ in pairs], [w for _, w in pairs], 0)
    with torch.no_grad():
        for a, w in zip(old, new, strict=True):
            if not a.is_floating_point():
                a.copy_(w)


def _fabric(recipe: Recipe, accelerator: str) -> Any:
    """The one place that chooses device, precision and processes."""
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    if accelerator not in ("auto", "cpu", "cuda", "gpu"):
        raise UserError(f"accelerator must be auto, cpu or cuda, got {accelerator!r}")
    precision = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[recipe.precision]
    if recipe.precision == "16" and (accelerator == "cpu" or not torch.cuda.is_available()):
        raise UserError("precision '16' needs a GPU; on the CPU use 'bf16' or '32'")
    if accelerator in ("cuda", "gpu") and not torch.cuda.is_available():
        raise UserError(f"accelerator {accelerator!r} is not available here; use 'cpu' or 'auto'")
    devices, nodes = layout()
    if accelerator != "cpu" and 0 < torch.cuda.device_count() < devices:
        raise UserError(
            f"{devices} processes on a machine of {torch.cuda.device_count()} GPUs: one a GPU, or accelerator cpu"
        )
    # Each process has its own buffers: those of synchronised norms are equal, and no forward pass needs the others'.
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    broadcast = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.15
    strategy: Any = DDPStrategy(**{broadcast: False}) if devices * nodes > 1 else "auto"  # type: ignore[arg-type]
    return Fabric(
        accelerator=accelerator,
        strategy=strategy,
        devices=devices,
        num_nodes=nodes,
        precision=precision,  # type: ignore[arg-type]
    )


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if recipe.decay_norms or parameter.ndim > 1 else plain).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return _OPTIMIZERS[recipe.optimizer](recipe)(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)


def _sgd(recipe: Recipe) -> Callable[..., torch.optim.Optimizer]:
    return partial(torch.optim.SGD, momentum=recipe.momentum, nesterov=recipe.nesterov)


def _rmsprop(recipe: Recipe) -> Callable[..., torch.optim.Optimizer]:
    from timm.optim import RMSpropTF

    return partial(RMSpropTF, alpha=0.9, eps=1.0, momentum=recipe.momentum)


def _adam(recipe: Recipe) -> Callable[..., torch.optim.Optimizer]:
    return partial(torch.optim.Adam, betas=(recipe.momentum, 0.999))


_OPTIMIZERS = {"sgd": _sgd, "rmsprop": _rmsprop, "adam": _adam}


@dataclass
class _Progress:
    """The part of a checkpoint that is plain numbers."""

    step: int = 0
    loss_sum: float = 0.0  # of this epoch
    losses: int = 0
    seconds: float = 0.0  # of this epoch, summed over the processes that trained it
    skipped: int = 0
    skipped_in_row: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    test: dict[str, float] = field(default_factory=dict)  # all metrics of the last epoch


class _Run:
    """A network in training: all its state, and the loop over it."""

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        data: Data,
        folder: RunFolder,
        fabric: Any,
        processes: Processes,
        steps_per_epoch: int,
        strict_resume: bool,
        distillation: Distillation | None,
    ):
        self.recipe, self.folder, self.fabric, self.distillation = recipe, folder, fabric, distillation
        self.processes, self.signalled = processes, 0
        self.data = data.to(fabric.device)
        self.steps_per_epoch, self.total_steps = steps_per_epoch, recipe.epochs * steps_per_epoch
        model = model.to(fabric.device)
        if recipe.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if fabric.device.type == "cpu" and not recipe.compile:
            fast_training_(model)
        self.normalize = data.normalizer(fabric.device)
        self.average = deepcopy(model).eval().requires_grad_(False) if recipe.ema_decay else None
        if processes.count > 1 and recipe.sync_norms:
            model = synchronize_norms_(model, fabric.device)
        if recipe.compile:
            model.compile()
        self.model = model
        self.wrapped, self.optimizer = fabric.setup(model, _optimizer(model, recipe))
        if hasattr(model, "forward_intermediates"):  # how features are asked for; see `Distillation`
            for method in ("forward_intermediates", "forward_head"):
                self.wrapped.mark_forward_method(method)
        self.at, self.saved = _Progress(), (-1, 0)
        checkpoint = processes.first(lambda: folder.newest(strict_resume))
        if checkpoint is not None:
            self._restore(checkpoint)
        self.resumed_from = self.at.step

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.fabric.strategy.precision.state_dict(),
            "progress": asdict(self.at),
            "steps_per_epoch": self.steps_per_epoch,
            "recipe": self.recipe.to_dict(),
            "versions": versions(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["scaler"])
        self.at = _Progress(**state["progress"])
        self.saved = (self.at.step, len(self.at.history))
        changed = [f"{k} {v} -> {versions().get(k)}" for k, v in state["versions"].items() if versions().get(k) != v]
        if changed and self.processes.rank == 0:
            warnings.warn(
                f"continuing a run of other versions ({', '.join(changed)}): it may differ from an uninterrupted one",
                stacklevel=2,
            )
        assert state["step"] == self.at.step, "the checkpoint's name and contents disagree about the step"
        assert state["steps_per_epoch"] == self.steps_per_epoch, "the length of an epoch changed"
        # A run can stop after the last step of an epoch and before its evaluation, hence the two values.
        epochs = self.at.step // self.steps_per_epoch
        at_end = self.at.step % self.steps_per_epoch == 0 and epochs > 0
        assert len(self.at.history) in ({epochs - 1, epochs} if at_end else {epochs}), "the history misses epochs"

    def finish(
        self,
        signals: Signals,
        show: Callable[[int, str], None],
        on_step: Callable[[int], None] | None,
    ) -> RunSummary:
        """Train from where the run stands to its end, write the weights, and say how it went."""
        self.signals, first = signals, self.processes.rank == 0
        with tensorboard(self.folder.path / "tensorboard", self.at.step) if first else nullcontext() as log:
            try:
                while True:
                    if self.at.step == (len(self.at.history) + 1) * self.steps_per_epoch:
                        self._end_epoch(log)
                        if on_step:
                            on_step(self.at.step)
                    if self.at.step == self.total_steps:
                        break
                    self._train_epoch(show, on_step)
                summary = self._summary()
            except Interrupted:
                self._save()
                raise
            except WorkerLost:  # between two steps, so nothing is lost; it may have got the signal that came here too
                if self.processes.count == 1:  # the others do not know of it: they cannot save together
                    self._save()
                    signals.check()
                raise
        self.processes.first(lambda: self._write_results(summary))
        return summary

    def _write_results(self, summary: RunSummary) -> None:
        write_csv(self.folder.path / "metrics.csv", self.at.history)  # again: a kill may have come before the last row
        save_weights(self.folder.path / "model.safetensors", self.average or self.model)
        write_json(self.folder.path / "summary.json", {"schema": SCHEMA, **summary.to_dict()})

    def _agreed(self, value: float) -> float:
        """The mean of a number over the processes. A signal that one of them has got, all know of from here on."""
        if self.processes.count == 1:
            return value
        seen = [self.signals.received == signum for signum in (signal.SIGTERM, signal.SIGINT)]
        mean, *heard = self.processes.total(
            torch.tensor([value / self.processes.count, *seen], dtype=torch.float64)
        ).tolist()
        self.signalled = signal.SIGTERM if heard[0] else signal.SIGINT if heard[1] else 0
        return float(mean)

    def _check_signals(self) -> None:
        """Raise `Interrupted` if a signal has come: here, or, of several processes, to any when they last agreed."""
        if self.processes.count == 1:
            self.signals.check()
        elif self.signalled:
            raise Interrupted(self.signalled)

    def _train_epoch(self, show: Callable[[int, str], None], on_step: Callable[[int], None] | None) -> None:
        """The steps of this epoch that are not done yet."""
        recipe, at = self.recipe, self.at
        epoch, first = divmod(at.step, self.steps_per_epoch)
        order = epoch_order(len(self.data.train), recipe.seed, epoch)
        used = order[first * recipe.batch_size : self.steps_per_epoch * recipe.batch_size]
        augmentation = Augmentation(recipe.crop_padding, recipe.flip, recipe.seed)
        batches = self.data.train.training_batches(
            torch.split(used, recipe.batch_size), augmentation, epoch, at.step, recipe.workers, self.processes.share
        )
        self.wrapped.train()
        began = time.perf_counter()
        for inputs, targets in batches:
            self._step(inputs, targets)
            at.seconds += time.perf_counter() - began
            show(at.step, f"epoch {epoch + 1}/{recipe.epochs}  loss {at.loss_sum / max(at.losses, 1):.3f}")
            if at.step % self.steps_per_epoch:  # the last step of an epoch is saved after its evaluation
                if recipe.checkpoint_every and at.step % recipe.checkpoint_every == 0:
                    self._save()
                if on_step:
                    on_step(at.step)
            self._check_signals()
            began = time.perf_counter()
        assert at.step == (epoch + 1) * self.steps_per_epoch

    def _step(self, inputs: Tensor, targets: Tensor) -> None:
        """One step of the optimiser, with its averaging, so that no checkpoint can come between the two."""
        recipe, at = self.recipe, self.at
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate(at.step, self.steps_per_epoch)
        lesson = self.distillation.lesson(inputs, self.fabric.autocast()) if self.distillation else None
        rank = [self.processes.rank] if self.processes.rank else []  # the first draws what one process alone would
        torch.manual_seed(random_key("step", recipe.seed, at.step, *rank))
        buffers = [b.clone() for b in self.model.buffers()]  # a forward pass with NaN spoils running statistics
        x = self.normalize(inputs)
        if recipe.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        task = self.data.task
        if self.distillation and lesson:
            output, features = self.distillation.read(self.wrapped, x)
            loss = task.loss(output.float(), targets, recipe.label_smoothing)
            loss = self.distillation.loss(loss, output.float(), features, lesson)
        else:
            loss = task.loss(task.forward(self.wrapped, x).float(), targets, recipe.label_smoothing)
        if self.processes.count > 1 and task.terms:  # DDP takes the mean: each process counts by the terms of its own
            terms = torch.tensor([float(task.terms(targets))], dtype=torch.float64)
            loss = loss * float(terms * self.processes.count / self.processes.total(terms).clamp(min=1))
        value = self._agreed(loss.item())
        finite = math.isfinite(value)
        if finite:
            self.fabric.backward(loss)
            finite = self._clip() or recipe.precision == "16"  # overflow in half precision is the scaler's business
        if finite:
            self.optimizer.step()
            if self.average:
                average_(self.average, self.model, recipe.ema_decay)
            at.loss_sum, at.losses, at.skipped_in_row = at.loss_sum + value, at.losses + 1, 0
        else:
            with torch.no_grad():
                for buffer, kept in zip(self.model.buffers(), buffers, strict=True):
                    buffer.copy_(kept)
            at.skipped, at.skipped_in_row = at.skipped + 1, at.skipped_in_row + 1
        self.optimizer.zero_grad()
        at.step += 1
        if at.skipped_in_row == MAX_NONFINITE_STEPS:
            epoch, batch = divmod(at.step - 1, self.steps_per_epoch)
            raise NonFiniteLoss(
                f"the loss or its gradient was not finite in {MAX_NONFINITE_STEPS} steps in a row, last in step "
                f"{at.step - 1} (epoch {epoch}, batch {batch}; status.json names the samples); a lower lr than "
                f"{recipe.lr:g}, clip_grad or precision '32' may help",
                [self._samples_of(step) for step in range(at.step - MAX_NONFINITE_STEPS, at.step)],
            )

    def _samples_of(self, step: int) -> list[int]:
        """Indices of the training samples of a step."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        order, size = epoch_order(len(self.data.train), self.recipe.seed, epoch), self.recipe.batch_size
        return order[batch * size : (batch + 1) * size].tolist()

    def _clip(self) -> bool:
        """Clip the gradient if the recipe says so; tell whether it is finite."""
        if self.recipe.clip_grad:
            norm = self.fabric.clip_gradients(
                self.wrapped, self.optimizer, max_norm=self.recipe.clip_grad, error_if_nonfinite=False
            )
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return bool(norm.isfinite())

    def _evaluate(self, split: str) -> dict[str, float]:
        def on_batch() -> None:
            self._agreed(0.0)
            self._check_signals()

        model = self.average or self.model
        if not self.recipe.sync_norms:
            self.processes.copy_first(model.buffers())
        with self.fabric.autocast():
            return evaluate(
                model,
                self.data,
                split,
                batch_size=self.recipe.eval_batch_size,
                workers=self.recipe.workers,
                on_batch=on_batch,
                processes=self.processes,
            )

    def _end_epoch(self, log: Callable[[Mapping[str, float], int], None] | None) -> None:
        at = self.at
        test = self._evaluate("test")
        score = self.data.task.score
        row = {
            "epoch": len(at.history) + 1,
            "step": at.step,
            "lr": self.recipe.learning_rate(at.step - 1, self.steps_per_epoch),
            "train_loss": at.loss_sum / max(at.losses, 1),
            "test_loss": test["loss"],
            f"test_{score}": test[score],
            "seconds": at.seconds,
        }
        at.history.append(row)
        at.test = test
        at.loss_sum, at.losses, at.seconds = 0.0, 0, 0.0
        self._save()
        self.processes.first(lambda: write_csv(self.folder.path / "metrics.csv", at.history))
        if log is None:  # the first process speaks for all
            return
        log({name: row[name] for name in ("lr", "train_loss", "test_loss", f"test_{score}")}, at.step)
        train, test_score = row["train_loss"], f"{test[score]:.4g} {self.data.task.unit}".strip()
        logger.info("epoch %d: train loss %.4f, test %s %s", row["epoch"], train, score, test_score)

    def _save(self) -> None:
        """Write a checkpoint, unless this step has one already. Weights that are not finite are never saved."""
        if (self.at.step, len(self.at.history)) == self.saved:
            return
        bad = [n for n, t in self.model.state_dict().items() if t.is_floating_point() and not t.isfinite().all()]
        if bad:
            raise NonFiniteLoss(
                f"after step {self.at.step - 1} the weights are not finite ({', '.join(bad[:3])}); nothing was saved"
            )
        self.processes.first(lambda: self.folder.save(self.at.step, self._state()))
        self.saved = (self.at.step, len(self.at.history))

    def _summary(self) -> RunSummary:
        at, recipe = self.at, self.recipe
        assert at.step == self.total_steps
        assert len(at.history) == recipe.epochs
        test = at.test or self._evaluate("test")  # an older checkpoint has no metrics but the score
        splits = {"train": self._evaluate("train"), "test": test}
        metrics = {f"{s}_{k}": v for s, found in splits.items() for k, v in found.items() if k != "samples"}
        return RunSummary(
            model=recipe.model,
            data=self.data.name,
            seed=recipe.seed,
            epochs=recipe.epochs,
            steps=at.step,
            metrics=metrics,
            seconds_per_epoch=sum(row["seconds"] for row in at.history) / recipe.epochs,
            skipped_steps=at.skipped,
            params=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            history=at.history,
            resumed_from=self.resumed_from,
            origin=provenance(),
            data_note=self.data.note,
            processes=self.processes.count,
            bad_samples=len(self.processes.union(self.data.bad_samples)),
        )


def _seeded(build_model: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The network with the initial weights of ``seed``; PyTorch's generator is left as it was."""
    with torch.random.fork_rng([]):
        torch.manual_seed(random_key("init", seed))
        return build_model()


def _check_fit(model: nn.Module, data: Data, what: str) -> None:
    """Run two zeros through a network, in eval mode: it changes nothing and finds what does not fit."""
    task, device = data.task, next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad():
            output = task.forward(model, torch.zeros(2, *data.input_size, device=device))
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        layout = " (C, H, W)" if len(data.input_size) == 3 else ""
        raise UserError(
            f"{what} cannot read {task.samples} of {data.name}, {data.input_size}{layout}: {reason}"
        ) from error
    except (TypeError, IndexError, KeyError, AttributeError) as error:
        raise UserError(f"{what} is none for {task.name}: its output is not what {data.name} needs") from error
    if output.shape != (2, *task.shape(data.input_size)):
        raise UserError(
            f"{data.name} has {task.outputs} classes, but the output of {what} for two {task.samples} has shape "
            f"{tuple(output.shape)}; build it with num_classes={task.outputs}"
        )
