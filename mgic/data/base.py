"""What every data set is: two splits, a task and provenance; and what is asked of a split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import UserError
from .reading import BadSamples
from .seeds import epoch_order
from .tasks import Task

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """What one of several processes takes of each batch: the ``rank``-th of ``ranks`` equal parts.

    Batches, their order and their random numbers are those of all processes together; so none of them depends on how
    many there are.

    Args:
        rank: Number of the process.
        ranks: How many there are.

    Examples:
        >>> Share(1, 2).of(torch.arange(6)), Share(1, 2).turns([[0, 1], [2, 3], [4]])
        (tensor([3, 4, 5]), [[2, 3]])
    """

    rank: int = 0
    ranks: int = 1

    def of(self, batch: Tensor) -> Tensor:
        """The part of a batch to train on; ``ranks`` divides its length."""
        return batch.chunk(self.ranks)[self.rank]

    def turns(self, batches: Iterable[T]) -> list[T]:
        """The whole batches to evaluate: every ``ranks``-th."""
        return list(batches)[self.rank :: self.ranks]


WHOLE = Share()
"""All of each batch: one process."""


@dataclass(frozen=True)
class Augmentation:
    """What a recipe asks to be done to training samples at random; a split refuses what it cannot do.

    Args:
        crop_padding: Pad by so many black pixels on each side, then crop the old size at random; 0 is off.
        flip: Mirror half of the images.
        seed: Together with the step (in memory) or the epoch and the index (files) it decides everything.
    """

    crop_padding: int = 0
    flip: bool = False
    seed: int = 0

    def refuse(self, samples: str) -> None:
        """Refuse padded crops and flips of what is no image in memory.

        Raises:
            UserError: One of them is asked for.
        """
        if self.crop_padding or self.flip:
            raise UserError(
                f"crop_padding={self.crop_padding} and flip={self.flip} are for images: {samples} need 0 and False"
            )


class Split(Protocol):
    """One half of a data set. Batches are (inputs, targets), both with one entry a sample, on its device."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def to(self, device: torch.device) -> Split:
        """The same samples where the network is."""
        ...

    def digest(self) -> str:
        """A hash that tells these samples (or their files) and targets from others."""
        ...

    def check(self, augmentation: Augmentation) -> None:
        """Refuse an augmentation these samples cannot have, before training begins."""
        ...

    def training_batches(
        self,
        batches: Sequence[Tensor],
        augmentation: Augmentation,
        epoch: int,
        step: int,
        workers: int,
        share: Share = WHOLE,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented batches of the given indices, or a share of each; the first of them belongs to step ``step``.

        Whatever is random must follow from the seed and the epoch, the step or a sample's index alone: a share of a batch
        is what one cuts out of the whole.
        """
        ...

    def evaluation_batches(
        self, batch_size: int, workers: int, share: Share = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples once, in order, without augmentation; batches may be smaller. A share is every so many-th batch."""
        ...


@dataclass(frozen=True)
class Data:
    """A data set, ready to train on.

    Args:
        name: The name or path it was asked for by.
        train: Training samples.
        test: Samples the network is judged by.
        task: What is to be learnt.
        input_size: Of one sample as the network sees it in training, ``(C, ...)``.
        note: Provenance: where the samples are from, how many, and what is missing.
        mean: Of the training inputs, per channel, in units of ``scale``; empty where inputs are fed as they are.
        std: Standard deviation, likewise.
        scale: What 1 stands for: 255 for pixels.
        cropped: Images are files of any size, judged on their centres (`mgic.data.images.centre_crop`), not as they are.
    """

    name: str
    train: Split
    test: Split
    task: Task
    input_size: tuple[int, ...]
    note: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    scale: float = 255
    cropped: bool = False

    @property
    def num_classes(self) -> int:
        """Outputs of a network for this set, by the name timm has for them."""
        return self.task.outputs

    def to(self, device: torch.device) -> Data:
        """The same data where the network is."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def model_arguments(self) -> dict[str, Any]:
        """What a network for this set must be built with."""
        return {"num_classes": self.num_classes, "in_chans": self.input_size[0]}

    def normalizer(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """The function from a batch to the network's float32 input: ``(x / scale - mean) / std``."""
        if not self.mean:
            return Tensor.float
        shape = (-1, *[1] * (len(self.input_size) - 1))
        mean = torch.tensor(self.mean, device=device).view(shape) * self.scale
        std = torch.tensor(self.std, device=device).view(shape) * self.scale
        return lambda x: (x.float() - mean) / std

    def drawn(self, split: Split, samples: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        """Samples of a split drawn at random, always the same ones: not augmented, as a network gets them, and targets."""
        chosen = torch.split(epoch_order(len(split), 0, 0)[:samples], batch_size)
        normalize = self.normalizer(torch.device("cpu"))
        return [(normalize(x), y) for x, y in split.training_batches(chosen, Augmentation(), 0, 0, 0)]

    @property
    def bad_samples(self) -> frozenset[int]:
        """Indices of training samples that could not be read so far, and were skipped."""
        bad = getattr(self.train, "bad", None)
        return frozenset(bad.found) if isinstance(bad, BadSamples) else frozenset()

    def fingerprint(self) -> dict[str, Any]:
        """Plain values that tell this data set from another: a resumed run must find the same ones."""
        return {
            "name": self.name,
            "task": self.task.name,
            "classes": list(self.task.classes),
            "train": len(self.train),
            "test": len(self.test),
            "num_classes": self.num_classes,
            "digest": hashlib.sha256(f"{self.train.digest()} {self.test.digest()}".encode()).hexdigest(),
            "input_size": list(self.input_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "cropped": self.cropped,
        }
