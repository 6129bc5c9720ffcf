"""What a trained network says about files: classes of images and point clouds, masks of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .data import LOADERS
from .data.images import IMAGE_SUFFIXES, centre_crop, open_image, whole_image
from .data.masks import inference, overlay, palette
from .data.points import POINT_SUFFIXES, prepare_points, read_points
from .errors import UserError
from .training.files import write_atomically
from .training.recipes import Recipe

TOP = 5
"""Classes that are named of a classification, the likeliest first."""


def files_in(places: Sequence[Path]) -> list[Path]:
    """Files as they are, and the images and point clouds in folders and folders in them, in order.

    Raises:
        UserError: A place does not exist, or there is nothing in it.
    """
    found = []
    for place in places:
        if place.is_dir():
            inside = sorted(p for p in place.rglob("*") if p.suffix.lower() in (*IMAGE_SUFFIXES, *POINT_SUFFIXES))
            if not inside:
                raise UserError(f"{place}: no images or point clouds in this folder")
            found += inside
        elif place.is_file():
            found.append(place)
        else:
            raise UserError(f"{place}: no such file or folder")
    return found


@dataclass(frozen=True)
class Predictor:
    """A network and how it sees files: exactly as in the evaluation of its run.

    Args:
        model: In eval mode, on the CPU.
        recipe: What it was trained by.
        data: What its run noted down about its data, ``data.json``.
    """

    model: nn.Module
    recipe: Recipe
    data: Mapping[str, Any]

    @property
    def classes(self) -> list[str]:
        """Names of the classes; their numbers where they have none."""
        return self.data.get("classes") or [str(i) for i in range(self.data["num_classes"])]

    def __call__(self, path: Path, out: Path | None = None) -> dict[str, Any]:
        """Say what is in a file, as plain JSON values.

        Args:
            path: An image, or a point cloud for a network of point clouds.
            out: Folder for the overlay and the mask of a segmentation; none are written without it.

        Raises:
            UserError: The file is not what the network takes, or cannot be read; the message names it.
        """
        task = self.data.get("task", "classification")  # runs of the first version classify
        if task not in _TASKS:
            raise UserError(f"predict takes images and point clouds; this run is of {task}")
        with torch.no_grad():
            return {"file": str(path), **_TASKS[task](self, path, out)}

    def normalized(self, image: Tensor) -> Tensor:
        """A batch of one, as the network takes it."""
        if not self.data["mean"]:
            return image[None].float()
        mean, std = (255 * torch.tensor(self.data[key]).view(-1, 1, 1) for key in ("mean", "std"))
        return (image[None].float() - mean) / std


def _image(predictor: Predictor, path: Path) -> Any:
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"{path}: no image; this network takes {', '.join(IMAGE_SUFFIXES)}")
    return open_image(path)


def _classify(predictor: Predictor, path: Path, out: Path | None) -> dict[str, Any]:
    size, recipe = predictor.data["input_size"], predictor.recipe
    if len(size) == 2:
        x = prepare_points(read_points(path), size[1])
    elif sees_crops(recipe, predictor.data):
        x = centre_crop(size[-1], _image(predictor, path))
    else:
        x = whole_image(tuple(size), recipe.pad_images, _image(predictor, path))
    chances = predictor.model(predictor.normalized(x))[0].float().softmax(0)
    best = chances.topk(min(TOP, len(chances)))
    top = [
        {"class": predictor.classes[i], "index": i, "probability": round(p, 6)}
        for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    return {**top[0], "top": top}


def sees_crops(recipe: Recipe, data: Mapping[str, Any]) -> bool:
    """Whether a run judged the centres of image files, or whole images of one size.

    Args:
        recipe: Of the run.
        data: What it noted down about its data. Runs of earlier versions did not say; then the name of the data does.
    """
    kind = recipe.data.partition(":")[0]
    by_name = kind in ("images", "shards") or (kind not in LOADERS and not recipe.data.endswith(".npz"))
    return bool(data.get("cropped", by_name))


def _segment(predictor: Predictor, path: Path, out: Path | None) -> dict[str, Any]:
    from PIL import Image
    from torchvision.transforms.v2 import functional as transforms

    image = transforms.pil_to_tensor(_image(predictor, path))
    infer: Callable[[nn.Module, Tensor], Tensor] = inference(predictor.recipe.data_args.get("window"))
    mask = infer(predictor.model, predictor.normalized(image))[0].argmax(0)
    share = torch.bincount(mask.flatten(), minlength=len(predictor.classes)) / mask.numel()
    shares = {name: round(100 * s, 2) for name, s in zip(predictor.classes, share.tolist(), strict=True) if s > 0}
    said: dict[str, Any] = {"per_cent_of_pixels": shares}
    if out is not None:
        colours = palette(predictor.data["name"], len(predictor.classes))
        pictures = {
            "overlay": Image.fromarray(overlay(image, mask, colours).permute(1, 2, 0).numpy()),
            "mask": Image.fromarray(mask.to(torch.uint8).numpy()),
        }
        for kind, picture in pictures.items():
            file = out / f"{path.stem}-{kind}.png"
            write_atomically(file, partial(picture.save, format="PNG"))
            said[kind] = str(file)
    return said


_TASKS = {"classification": _classify, "segmentation": _segment}
