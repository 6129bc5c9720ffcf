"""Data sets by name or path: images, masks, point clouds, functions; with augmentation that is a function of its seed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError, suggest
from . import functions, images, masks, points
from .base import Augmentation, Data, Split, epoch_order, random_key, read_batches
from .images import ImageFiles, Images, augment_batch, padded
from .tasks import Meter, Task, classification, regression, segmentation

__all__ = [
    "LOADERS",
    "Augmentation",
    "Data",
    "ImageFiles",
    "Images",
    "Meter",
    "Split",
    "Task",
    "augment_batch",
    "classification",
    "epoch_order",
    "load_data",
    "padded",
    "random_key",
    "read_batches",
    "regression",
    "segmentation",
]

LOADERS: dict[str, Callable[..., Data]] = {
    "digits": images.digits,
    "fashion_mnist": images.fashion_mnist,
    "cifar10": images.cifar("CIFAR10", 10),
    "cifar100": images.cifar("CIFAR100", 100),
    "npz": images.npz,
    "images": images.folder,
    "cos_sin": functions.sampled(functions.COS_SIN),
    "cos_sin_family": functions.sampled(functions.COS_SIN_FAMILY),
    "masks": masks.folder,
    "camvid": masks.camvid,
    "cityscapes": masks.cityscapes,
    "modelnet": points.modelnet,
    "solids": points.solids,
}
"""By name: ``(root, download, **arguments) -> Data``. Arguments are keywords with defaults: a recipe's ``data_args``."""


def load_data(name: str, root: str | Path | None = None, download: bool = False, **arguments: Any) -> Data:
    """Load a data set: ``NAME``, ``NAME:PATH``, or the path of an ``.npz`` file or an image folder alone.

    Args:
        name: One of `LOADERS`; after a colon the folder (or file) it is in, instead of ``root``. A path without a
            name means ``npz:PATH`` where it ends so, and ``images:PATH`` where it is a folder.
        root: Where data sets are kept; default ``data``.
        download: Fetch what is missing. Without it nothing touches the network; archives that are already in
            ``root`` are unpacked either way.
        arguments: Of the loader, e.g. ``image_size``; plain values.

    Raises:
        UserError: The name or an argument is unknown, the data is not there or is not what it should be.
    """
    kind, _, place = name.partition(":")
    if kind not in LOADERS:
        kind, place = _kind(name), name
    loader = LOADERS[kind]
    known = [p.name for p in inspect.signature(loader).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for argument in arguments:
        if argument not in known:
            says = suggest(argument, known) if known else "; it takes none"
            raise UserError(f"data {name!r} has no argument {argument!r}{says}")
    return loader(Path(place or root or "data"), download, **arguments)


def _kind(name: str) -> str:
    """Tell the loader of a path."""
    path = Path(name)
    if path.suffix == ".npz":
        return "npz"
    if path.is_dir():
        return "images"
    if len(path.parts) > 1:
        raise UserError(f"data {name!r}: no such folder; an image folder has train/CLASS/*.jpg and val or test")
    hint = suggest(name, LOADERS)
    stop = "" if hint.endswith("?") else "."
    raise UserError(f"unknown data {name!r}{hint}{stop} The path of an .npz file or of an image folder works too.")
