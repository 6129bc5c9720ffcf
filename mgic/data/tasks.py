"""Tasks: what a network is trained for and judged by. A data set carries its task; the training loop asks it for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import functional as F

VOID = 255
"""The label of pixels that belong to no class: neither trained on nor counted."""


class Meter(Protocol):
    """Metrics gathered batch by batch."""

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
        self.correct, self.loss, self.count = 0, 0.0, 0

    def update(self, output: Tensor, target: Tensor) -> None:
        self.correct += int((output.argmax(1) == target).sum())
        self.loss += float(F.cross_entropy(output, target, reduction="sum"))
        self.count += len(target)

    def compute(self) -> dict[str, float]:
        return {"accuracy": 100 * self.correct / self.count, "loss": self.loss / self.count}


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
        classes=tuple(classes),
    )


def whole_image(model: nn.Module, x: Tensor) -> Tensor:
    """``(N, C, H, W) -> (N, classes, H, W)``: the logits of a segmentation network."""
    return model(x)["out"]  # type: ignore[no-any-return]


def _pixel_loss(logits: Tensor, masks: Tensor, smoothing: float) -> Tensor:
    total = F.cross_entropy(logits, masks, ignore_index=VOID, label_smoothing=smoothing, reduction="sum")
    return total / (masks != VOID).sum().clamp(min=1)  # a batch of void pixels alone is no 0 / 0


class _Overlap:
    """Mean IoU, pixel accuracy, IoU of each class (percent) and mean cross-entropy of a pixel (nats)."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        from torchmetrics.classification import MulticlassConfusionMatrix

        self.classes = classes
        self.confusion: Any = MulticlassConfusionMatrix(len(classes), ignore_index=VOID)
        self.loss, self.pixels = 0.0, 0

    def update(self, output: Tensor, target: Tensor) -> None:
        self.confusion.update(output.argmax(1).cpu(), target.cpu())
        self.loss += float(F.cross_entropy(output, target, ignore_index=VOID, reduction="sum"))
        self.pixels += int((target != VOID).sum())

    def compute(self) -> dict[str, float]:
        """Classes that are neither in the masks nor predicted have no IoU and no part in the mean."""
        confusion = self.confusion.confmat.double()
        hits, union = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
        iou = {name: 100 * float(h / u) for name, h, u in zip(self.classes, hits, union, strict=True) if u > 0}
        pixels = max(self.pixels, 1)
        return {
            "miou": sum(iou.values()) / max(len(iou), 1),
            "pixel_accuracy": 100 * float(hits.sum()) / pixels,
            "loss": self.loss / pixels,
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
        self.total, self.count = 0.0, 0

    def update(self, output: Tensor, target: Tensor) -> None:
        self.total += float((output - target).double().square().sum())
        self.count += target.numel()

    def compute(self) -> dict[str, float]:
        mse = self.total / self.count
        return {"mse": mse, "loss": mse}
