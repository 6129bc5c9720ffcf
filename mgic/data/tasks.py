"""Tasks: what a network is trained for and judged by. A data set carries its task; the training loop asks it for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOID = 255
"""The label of pixels that belong to no class: neither trained on nor counted."""


class Meter(Protocol):
    """Metrics gathered batch by batch.

    Attributes:
        sums: All that has been gathered, float64 ``(n,)``: sums over samples, so that those of several processes add up.
    """

    sums: Tensor

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take one batch into account."""
        ...

    def compute(self) -> dict[str, float]:
        """All metrics of what has been seen; ``loss`` and the task's ``score`` are among them."""
        ...


def call(model: nn.Module, x: Tensor) -> Tensor:
    """``model(x)``."""
    return model(x)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Task:
    """What a network is trained for and judged by.

    Args:
        name: What it is called: ``classification``, ``segmentation``, ``regression``.
        outputs: Channels of the network's output, its ``num_classes``.
        score: The metric that sums up how good a network is.
        unit: Of the score.
        loss: ``(output, target, label_smoothing) -> mean loss``; the output is float32.
        meter: Makes the `Meter` of one evaluation.
        shape: ``input_size -> shape`` of the output for one such input.
        forward: ``(model, x) -> output`` in training.
        infer: The same in evaluation.
        terms: How many terms the mean of the loss has, given a target; None: as many for each sample.
        samples: What they are called in messages: ``images``, ``point clouds``.
        smooths: Whether the loss knows label smoothing.
        classes: Names of the classes, where they have any.
    """

    name: str
    outputs: int
    score: str
    unit: str
    loss: Callable[[Tensor, Tensor, float], Tensor]
    meter: Callable[[], Meter]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    forward: Callable[[nn.Module, Tensor], Tensor] = call
    infer: Callable[[nn.Module, Tensor], Tensor] = call
    terms: Callable[[Tensor], int] | None = None
    samples: str = "images"
    smooths: bool = True
    classes: tuple[str, ...] = ()


def classification(num_classes: int, classes: Sequence[str] = (), samples: str = "images") -> Task:
    """One class for each sample: cross-entropy, judged by accuracy in percent.

    The network maps a batch to ``(N, num_classes)``, targets are int64 ``(N,)``.

    Examples:
        >>> import torch
        >>> meter = classification(3).meter()
        >>> meter.update(torch.eye(3)[[0, 2, 2, 1]], torch.tensor([0, 2, 1, 1]))
        >>> meter.compute()["accuracy"]
        75.0
    """
    return Task(
        name="classification",
        outputs=num_classes,
        score="accuracy",
        unit="%",
        loss=lambda logits, labels, smoothing: F.cross_entropy(logits, labels, label_smoothing=smoothing),
        meter=_Accuracy,
        shape=lambda input_size: (num_classes,),
        samples=samples,
        classes=tuple(classes),
    )


class _Accuracy:
    """Accuracy (percent) and mean cross-entropy (nats)."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)  # correct, loss, samples

    def update(self, output: Tensor, target: Tensor) -> None:
        correct, loss = (output.argmax(1) == target).sum(), F.cross_entropy(output, target, reduction="sum")
        self.sums += torch.tensor([float(correct), float(loss), len(target)], dtype=torch.float64)

    def compute(self) -> dict[str, float]:
        correct, loss, count = self.sums.tolist()
        return {"accuracy": 100 * correct / count, "loss": loss / count}


def segmentation(classes: Sequence[str], infer: Callable[[nn.Module, Tensor], Tensor] | None = None) -> Task:
    """One class for each pixel: cross-entropy over the pixels that have one, judged by the mean IoU in percent.

    The network maps ``(N, C, H, W)`` to ``{"out": (N, len(classes), H, W)}`` as torchvision's do; targets are int64
    ``(N, H, W)`` with 255 for void pixels.

    Args:
        classes: Their names, in the order of the labels.
        infer: How a network sees an image in evaluation; the whole image at once by default.
    """
    return Task(
        name="segmentation",
        outputs=len(classes),
        score="miou",
        unit="%",
        loss=_pixel_loss,
        meter=partial(_Overlap, tuple(classes)),
        shape=lambda input_size: (len(classes), *input_size[1:]),
        forward=whole_image,
        infer=infer or whole_image,
        terms=_pixels,
        classes=tuple(classes),
    )


def whole_image(model: nn.Module, x: Tensor) -> Tensor:
    """``(N, C, H, W) -> (N, classes, H, W)``: the logits of a segmentation network."""
    return model(x)["out"]  # type: ignore[no-any-return]


def _pixels(masks: Tensor) -> int:
    return int((masks != VOID).sum())


def _pixel_loss(logits: Tensor, masks: Tensor, smoothing: float) -> Tensor:
    total = F.cross_entropy(logits, masks, ignore_index=VOID, label_smoothing=smoothing, reduction="sum")
    return total / (masks != VOID).sum().clamp(min=1)  # a batch of void pixels alone is no 0 / 0


class _Overlap:
    """Mean IoU, pixel accuracy, IoU of each class (percent) and mean cross-entropy of a pixel (nats)."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        self.classes = classes
        self.confusion = partial(multiclass_confusion_matrix, num_classes=len(classes), ignore_index=VOID)
        self.sums = torch.zeros(len(classes) ** 2 + 2, dtype=torch.float64)  # the confusion matrix, loss, pixels

    def update(self, output: Tensor, target: Tensor) -> None:
        confusion = self.confusion(output.argmax(1).cpu(), target.cpu())
        loss = F.cross_entropy(output, target, ignore_index=VOID, reduction="sum")
        rest = torch.tensor([float(loss), _pixels(target)], dtype=torch.float64)
        self.sums += torch.cat([confusion.flatten().double(), rest])

    def compute(self) -> dict[str, float]:
        """Classes that are neither in the masks nor predicted have no IoU and no part in the mean."""
        confusion, (loss, pixels) = self.sums[:-2].view(len(self.classes), -1), self.sums[-2:].tolist()
        hits, union = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
        iou = {name: 100 * float(h / u) for name, h, u in zip(self.classes, hits, union, strict=True) if u > 0}
        pixels = max(pixels, 1)
        return {
            "miou": sum(iou.values()) / max(len(iou), 1),
            "pixel_accuracy": 100 * float(hits.sum()) / pixels,
            "loss": loss / pixels,
            **{f"iou_{name}": value for name, value in iou.items()},
        }


def regression(outputs: int = 1, samples: str = "points") -> Task:
    """Numbers for each sample: mean squared error, which is loss and score alike.

    The network maps a batch to ``(N, outputs)``, targets are float32 ``(N, outputs)``.

    Examples:
        >>> import torch
        >>> meter = regression().meter()
        >>> meter.update(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [4.0]]))
        >>> meter.compute()["mse"]
        2.0
    """
    return Task(
        name="regression",
        outputs=outputs,
        score="mse",
        unit="",
        loss=lambda output, target, smoothing: F.mse_loss(output, target),
        meter=_SquaredError,
        shape=lambda input_size: (outputs,),
        samples=samples,
        smooths=False,
    )


class _SquaredError:
    """Mean squared error, over samples and outputs."""

    def __init__(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64)  # squares, numbers

    def update(self, output: Tensor, target: Tensor) -> None:
        squares = (output - target).double().square().sum()
        self.sums += torch.tensor([float(squares), target.numel()], dtype=torch.float64)

    def compute(self) -> dict[str, float]:
        squares, count = self.sums.tolist()
        mse = squares / count
        return {"mse": mse, "loss": mse}
