"""Weights on disk and back in a network: final ones, those of a run, those to start from, and why they do not fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_model
from torch import Tensor, nn

from ..errors import UserError
from .checkpoint import CorruptCheckpoint, newest_checkpoint, verify
from .files import RESERVE, read_json, sha256, sidecar_of, staged
from .folder import read_recipe
from .recipes import Recipe


def save_weights(path: Path, model: nn.Module) -> None:
    """Write a model as safetensors with a sidecar; weights that are shared are stored once."""
    with staged(path, True, room_for(model)) as temporary:
        save_model(model, str(temporary))


def room_for(model: nn.Module) -> int:
    """Bytes that the weights of a network take on disk, and what is written beside them."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) + RESERVE


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read what `save_weights` wrote, shared weights under all their names.

    Raises:
        CorruptCheckpoint: The bytes are not the ones of the sidecar, or no safetensors.
    """
    with path.open("rb") as file:
        verify(path, file)
    return read_safetensors(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of anybody, shared weights under all their names; no checksum is asked for.

    Raises:
        CorruptCheckpoint: It is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as archive:
            state = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118 - no mapping
            aliases = archive.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CorruptCheckpoint(path, path.stat().st_size, f"safetensors ({error})") from error
    # save_model's metadata maps each name it left out to the one it kept.
    return state | {name: state[kept] for name, kept in aliases.items() if kept in state}


class SavedRun(NamedTuple):
    """What a run folder gives back."""

    recipe: Recipe
    state_dict: dict[str, Tensor]


def load_run(folder: str | Path) -> SavedRun:
    """The recipe and the weights of a run: the final ones, or those of the newest valid checkpoint.

    The weights are the averaged ones where the recipe has ``ema_decay``, as in every evaluation of the run.

    Raises:
        UserError: The folder holds no run, or no weights yet.
        CorruptCheckpoint: The weights are damaged.
    """
    folder = Path(folder)
    recipe = read_recipe(folder)
    final = folder / "model.safetensors"
    if final.exists():
        return SavedRun(recipe, load_weights(final))
    state = newest_checkpoint(folder / "checkpoints")
    if state is None:
        raise UserError(f"{folder}: the run has saved no weights yet")
    return SavedRun(recipe, state["average"] or state["model"])


class TrainedNetwork(NamedTuple):
    """A run's network, in eval mode with its weights, and where they are from.

    Args:
        model: The network.
        recipe: What it was trained by.
        data: What its run noted down about its data, ``data.json``.
        origin: Plain values that tell these weights from others: ``model``, ``model_args``, ``sha256`` of
            ``model.safetensors`` and the ``scores`` of the run; no ``sha256`` as long as the run is not finished.
    """

    model: nn.Module
    recipe: Recipe
    data: dict[str, Any]
    origin: dict[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """All that its function needs beside its name."""
        return _arguments(self.recipe, self.data)


def _arguments(recipe: Recipe, data: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_classes": data["num_classes"], "in_chans": data["input_size"][0], **recipe.model_args}


def load_network(folder: str | Path, build: Callable[..., nn.Module]) -> TrainedNetwork:
    """The network of a run.

    Args:
        folder: The run folder.
        build: ``(name, **arguments) -> network``; `mgic.create_model`.

    Raises:
        UserError: The folder holds no run, no weights yet, or weights of another network.
        CorruptCheckpoint: The weights are damaged.
    """
    folder = Path(folder)
    (recipe, weights), data = load_run(folder), read_json(folder / "data.json")
    model = build(recipe.model, **_arguments(recipe, data))
    fit_weights(model, weights, f"{folder}: its weights do not fit {recipe.model} for {data['name']}")
    return TrainedNetwork(model.eval(), recipe, data, _origin(folder, recipe))


def _origin(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """What identifies the final weights of a run, and how good they are."""
    known: dict[str, Any] = {"model": recipe.model, "model_args": recipe.model_args}
    final, summary = folder / "model.safetensors", folder / "summary.json"
    if final.exists():
        known["sha256"] = sha256(final)
    if summary.exists():
        known["scores"] = scores(read_json(summary))
    return known


def scores(summary: Mapping[str, Any]) -> dict[str, float]:
    """The training and the test score of a run's summary, by the names they have there: ``test_accuracy``, ..."""
    test = next(name for name in summary["history"][-1] if name.startswith("test_") and name != "test_loss")
    return {name: summary[name] for name in (test.replace("test_", "train_", 1), test)}


class Start(NamedTuple):
    """Weights to start from instead of random ones.

    Args:
        place: Where they are from, for messages.
        state_dict: The weights.
        origin: Plain values that tell them from others: ``sha256``; of a run's also ``model``, ``model_args`` and ``scores``.
        new_head: Leave the classifier as it is initialised, whatever the weights say about it.
    """

    place: str
    state_dict: dict[str, Tensor]
    origin: dict[str, Any]
    new_head: bool = False


def load_start(place: str | Path, new_head: bool = False) -> Start:
    """Weights of a finished run, or of a safetensors file.

    Args:
        place: The run folder or the file; a file is compared with its ``.sha256`` where it has one.
        new_head: See `Start`.

    Raises:
        UserError: There is neither, or the run is not finished.
        CorruptCheckpoint: The weights are damaged.
    """
    place = Path(place)
    if place.is_dir():
        recipe, weights = load_run(place)
        origin = _origin(place, recipe)
        require_finished(place, origin)
        return Start(str(place), weights, origin, new_head)
    if not place.is_file() or place.suffix != ".safetensors":
        raise UserError(f"{place}: neither a run folder nor a .safetensors file")
    weights = load_weights(place) if sidecar_of(place).exists() else read_safetensors(place)
    return Start(str(place), weights, {"sha256": sha256(place)}, new_head)


def require_finished(place: str | Path, origin: Mapping[str, Any]) -> None:
    """Refuse weights that will be others tomorrow, when the run that started from them is continued.

    Raises:
        UserError: The run has not finished.
    """
    if "sha256" not in origin:
        raise UserError(f"{place}: the run is not finished; its weights may still change")


def fit_weights(model: nn.Module, weights: Mapping[str, Tensor], complaint: str) -> None:
    """Load weights, all of them and no others.

    Args:
        model: The network.
        weights: By the names of its ``state_dict``.
        complaint: How the message begins where they do not fit.

    Raises:
        UserError: A name or a shape differs; the first ten are named, and the argument of the network that explains it.
    """
    own = model.state_dict()
    wrong = [
        f"{name} is {_size(weights.get(name))} there, {_size(own.get(name))} here"
        for name in (own | dict(weights))
        if _size(weights.get(name)) != _size(own.get(name))
    ]
    if wrong:
        more = f" and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise UserError(f"{complaint}: {'; '.join(wrong[:LISTED])}{more}{_explanation(model, weights)}")
    model.load_state_dict(weights)


LISTED = 10
"""Tensors that do not fit and are named; the others are counted."""
_LEVELS = re.compile(r"^(.*?)(?:^|\.)(?:relax|A)\.\d+\.")
"""A tensor of one level of a multigrid block, and the block's name."""


def _explanation(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """The end of a message about weights that do not fit: the argument of the network that is another, as shapes tell."""
    shapes, own = ({k: tuple(v.shape) for k, v in some.items()} for some in (weights, model.state_dict()))
    common = own.keys() & shapes.keys()
    changed = {name: (shapes[name], own[name]) for name in own if name in common and shapes[name] != own[name]}
    odd = own.keys() ^ shapes.keys()
    if not common:
        return "; these are weights of another network"
    classes = getattr(model, "num_classes", None)
    firsts = {(there[:1], here[:1]) for there, here in changed.values()}
    if not odd and len(firsts) == 1 and next(iter(firsts))[1] == (classes,):
        return f"; num_classes={next(iter(firsts))[0][0]} would fit"
    first = next((name for name, shape in own.items() if len(shape) > 1), "")
    if not odd and list(changed) == [first] and changed[first][0][:1] == changed[first][1][:1]:
        return f"; in_chans={changed[first][0][1]} would fit"
    if any(len(here) == 1 and here != (classes,) for _, here in changed.values()):
        return "; the widths are others (width, channels)"
    blocks = {found[1] for name in odd if (found := _LEVELS.match(name))}
    both = {found[1] for name in common if (found := _LEVELS.match(name))}
    if blocks and blocks <= both:
        return "; the blocks have another number of levels (coarsest)"
    if odd:
        return "; other layers are there (depth, repeats, or another network)"
    if all(there[:1] == here[:1] for there, here in changed.values()):
        return "; the groups are others (group_size)"
    return ""


def _size(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))


def start_from(model: nn.Module, start: Start) -> None:
    """Put the weights of ``start`` into a network.

    Raises:
        UserError: They do not fit, or a new head is wanted of a network that names no classifier.
    """
    own, weights, head = model.state_dict(), start.state_dict, _head(model)
    if start.new_head:
        if not head:
            raise UserError(f"new_head: {type(model).__name__} names no classifier (get_classifier) to start afresh")
        weights = {name: value for name, value in weights.items() if name not in head}
        weights |= {name: own[name] for name in head}
    there = start.origin.get("model")
    complaint = f"{start.place}: its weights{f' (of {there})' if there else ''} do not fit the network"
    others = own.keys() - head
    if head and weights.keys() - head == others and all(weights[name].shape == own[name].shape for name in others):
        complaint += " in the classifier alone (--new_head starts it afresh)"
    fit_weights(model, weights, complaint)


def _head(model: nn.Module) -> set[str]:
    """The names of the classifier's weights, in networks that tell which layer it is, as timm's do."""
    tell = getattr(model, "get_classifier", None)
    classifier = tell() if tell else None
    prefix = next((name for name, module in model.named_modules() if module is classifier), None)
    return set() if prefix is None else {name for name in model.state_dict() if name.startswith(f"{prefix}.")}
