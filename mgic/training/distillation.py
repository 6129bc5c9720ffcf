"""Distillation: a network learns from a trained one, the teacher, what it answers and what it sees on the way.

With ``w = distill_weight``, ``T = distill_temperature`` and ``v = distill_features`` of the recipe the loss of a batch is

``(1 - w) loss + w T^2 KL(softmax(z_t / T) || softmax(z / T)) + v mean(1 - r)``

where ``z`` and ``z_t`` are the logits of the network and of its teacher (Hinton et al. 2015, Sec. 2: ``T^2`` keeps the
gradients of both parts of one size), and ``r`` is Pearson's correlation of a channel of the network's features with
the same channel of the teacher's: half the mean squared error of features that are standardised channel by channel (Cao
et al. 2022, *PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient*, eqs. (2) to (4)).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import Data
from ..errors import UserError
from .parallel import moments
from .recipes import Recipe
from .weights import Start, TrainedNetwork, require_finished


def logit_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(z_t / T) || softmax(z / T))``, the mean over samples.

    Shape:
        two of ``(N, classes) -> ()``

    Examples:
        >>> float(logit_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), temperature=4.0))
        0.0
    """
    ours, theirs = (F.log_softmax(z / temperature, dim=1) for z in (logits, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def feature_loss(features: Tensor, teacher: Tensor) -> Tensor:
    """``1 - r``, the mean over channels: 0 where each follows the teacher's up to a positive factor and a shift.

    Shape:
        two of ``(N, C, ...) -> ()``

    Examples:
        >>> x = torch.randn(4, 2, 5, 5)
        >>> torch.testing.assert_close(feature_loss(3 * x + 7, x), torch.tensor(0.0), rtol=0, atol=1e-5)
    """
    return F.mse_loss(_standardised(features.float()), _standardised(teacher.float())) / 2


def _standardised(x: Tensor) -> Tensor:
    axes = [0, *range(2, x.ndim)]
    mean, variance, _ = moments(x, axes)
    return (x - mean) * (variance + 1e-6).rsqrt()  # a channel that is constant is zero, and learns nothing


def outputs_and_features(model: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The logits of a classifier, and its features at the ends of the stages.

    They come from ``forward_intermediates`` as timm has it, else from hooks on the children of ``stages``.

    Raises:
        UserError: The network has neither.
    """
    if hasattr(model, "forward_intermediates"):
        last, features = model.forward_intermediates(x)
        return model.forward_head(last), features
    if not hasattr(model, "stages"):
        raise UserError(
            "distill_features: the network has neither forward_intermediates nor stages to take features from; "
            "set it to 0 and learn from the logits alone"
        )
    features = []
    hooks = [stage.register_forward_hook(lambda _, inputs, y: features.append(y)) for stage in model.stages]
    try:
        return model(x), features
    finally:
        for hook in hooks:
            hook.remove()


def common_features(ours: list[tuple[int, ...]], theirs: list[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Places of features of one shape; where several have it, the last belongs to the last.

    Args:
        ours: Shapes of one sample's features, ``(C, ...)``, in order.
        theirs: Those of the teacher.

    Raises:
        UserError: There are none.

    Examples:
        >>> common_features([(16, 8, 8), (32, 4, 4)], [(16, 8, 8), (16, 8, 8), (64, 4, 4)])
        [(0, 1)]
    """
    places = [
        [[i for i, s in enumerate(shapes) if s == shape] for shapes in (ours, theirs)] for shape in dict.fromkeys(ours)
    ]
    pairs = sorted(pair for a, b in places for pair in zip(reversed(a), reversed(b), strict=False))
    if not pairs:
        raise UserError(
            f"distill_features: the network's features are {_listed(ours)}, the teacher's {_listed(theirs)} (channels x "
            "size): none in common; take a teacher of the same widths, or set it to 0"
        )
    return pairs


def _listed(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)


@dataclass(frozen=True)
class Lesson:
    """What the teacher makes of a batch: its logits, and its features where they are wanted."""

    logits: Tensor
    features: list[Tensor]


@dataclass(frozen=True)
class Distillation:
    """A teacher at work: made by `of`, asked for a `lesson` each step.

    The teacher sees the pixels the network sees, augmented alike, normalised as it was trained. It stays in eval mode, draws
    no random numbers, and no checkpoint holds it: a run that is continued is given it again.

    Args:
        recipe: What to learn.
        model: The teacher, a frozen copy on the device of the run.
        normalize: From a batch of pixels to the teacher's input.
        pairs: Features that are compared: place in the network's, place in the teacher's.
    """

    recipe: Recipe
    model: nn.Module
    normalize: Callable[[Tensor], Tensor]
    pairs: list[tuple[int, int]]

    @classmethod
    def of(
        cls, recipe: Recipe, teacher: TrainedNetwork, data: Data, model: nn.Module, device: torch.device
    ) -> Distillation:
        """Prepare the distillation of a recipe, whose parts `check_teacher` has passed.

        Args:
            recipe: What to learn.
            teacher: Whom to learn from.
            data: The run's data.
            model: The network that learns.
            device: Where it does.

        Raises:
            UserError: Features are wanted, and there are none, or none of one shape.
        """
        frozen = deepcopy(teacher.model).eval().requires_grad_(False)
        pairs: list[tuple[int, int]] = []
        if recipe.distill_features:
            pairs = common_features(_feature_shapes(model, data), _feature_shapes(frozen, data))
        seen = replace(data, mean=tuple(teacher.data["mean"]), std=tuple(teacher.data["std"]))
        frozen = frozen.to(device)
        if recipe.channels_last:
            frozen = frozen.to(memory_format=torch.channels_last)
        return cls(recipe, frozen, seen.normalizer(device), pairs)

    def read(self, model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The logits of ``model``, and its features where they are wanted."""
        return outputs_and_features(model, x) if self.pairs else (model(x), [])

    def lesson(self, inputs: Tensor, precision: AbstractContextManager[Any]) -> Lesson:
        """What the teacher makes of a batch.

        Args:
            inputs: As the data set gives them, augmented, not normalised.
            precision: The context in which the network computes.
        """
        x = self.normalize(inputs)
        if self.recipe.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), precision:
            logits, features = self.read(self.model, x)
        return Lesson(logits.float(), [features[j] for _, j in self.pairs])

    def loss(self, loss: Tensor, logits: Tensor, features: list[Tensor], lesson: Lesson) -> Tensor:
        """Combine the loss of the labels with those of the lesson; see the head of this file."""
        recipe = self.recipe
        if recipe.distill_weight:
            taught = logit_loss(logits, lesson.logits, recipe.distill_temperature)
            loss = (1 - recipe.distill_weight) * loss + recipe.distill_weight * taught
        if recipe.distill_features:
            ours = [features[i] for i, _ in self.pairs]
            apart = [feature_loss(a, b) for a, b in zip(ours, lesson.features, strict=True)]
            loss = loss + recipe.distill_features * torch.stack(apart).mean()
        return loss


def note_sources(teacher: TrainedNetwork | None, init: Start | None) -> dict[str, Any]:
    """What a run notes down about the trained weights it depends on; see `mgic.training.folder.RunFolder`."""
    sources: dict[str, Any] = {}
    if teacher is not None:
        sources["teacher"] = {**teacher.origin, "mean": teacher.data["mean"], "std": teacher.data["std"]}
    if init is not None:
        sources["init"] = {**init.origin, "new_head": init.new_head}
    return sources


def check_teacher(recipe: Recipe, teacher: TrainedNetwork | None, data: Data) -> None:
    """Find out before any work whether recipe, teacher and data fit together.

    Raises:
        UserError: They do not; the message says what would.
    """
    wanted = recipe.distill_weight or recipe.distill_features
    if teacher is None:
        if wanted:
            raise UserError(
                f"distill_weight={recipe.distill_weight:g} and distill_features={recipe.distill_features:g} need a "
                "teacher: --teacher RUN"
            )
        return
    if not wanted:
        raise UserError("distill_weight=0 and distill_features=0 leave the teacher no part: raise one, say to 0.5")
    if data.task.name != "classification":
        raise UserError(f"a teacher is for classification; {data.name} is for {data.task.name}")
    who, there = f"the teacher {teacher.recipe.model}", teacher.data
    require_finished(who, teacher.origin)
    if there["num_classes"] != data.num_classes:
        raise UserError(f"{who} knows {there['num_classes']} classes, {data.name} has {data.num_classes}")
    odd = next(((a, b) for a, b in zip(there.get("classes", []), data.task.classes, strict=False) if a != b), None)
    if odd:
        raise UserError(f"{who} knows other classes than {data.name}: {odd[0]!r} where that has {odd[1]!r}")
    if there["input_size"][0] != data.input_size[0]:
        raise UserError(f"{who} sees {there['input_size'][0]} channels, {data.name} has {data.input_size[0]}")


def _feature_shapes(model: nn.Module, data: Data) -> list[tuple[int, ...]]:
    """Shapes of a network's features of one sample; two zeros in eval mode change nothing."""
    device = next(model.parameters()).device
    with torch.no_grad():
        _, features = outputs_and_features(model.eval(), torch.zeros(2, *data.input_size, device=device))
    return [tuple(feature.shape[1:]) for feature in features]
