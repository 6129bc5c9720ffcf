"""Semantic segmentation: images with a class for each pixel. CamVid, Cityscapes, and any folder of images and masks."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from .base import WHOLE, Augmentation, Data, Share
from .files import Missing
from .images import IMAGE_SUFFIXES, IMAGENET_MEAN, IMAGENET_STD, open_image, opened, size_of
from .reading import BadSample, BadSamples, read_batches
from .tasks import VOID, segmentation, whole_image

LEAST_SIDE = 8
"""Images that are narrower or lower are refused: less than one position of the features that LR-ASPP classifies."""

CAMVID = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}
"""The eleven classes of Badrinarayanan et al. 2017 and their colours."""


@dataclass(frozen=True)
class Pair:
    """An image and its mask, as files.

    Args:
        image: Decoded as RGB.
        mask: One channel of labels, of the image's size.
        size: Height and width.
    """

    image: Path
    mask: Path
    size: tuple[int, int]


@dataclass(frozen=True)
class Crops:
    """What is cut from a training image: scaled by a random factor, padded where that is too small, cropped at random.

    Args:
        size: Height and width.
        scale: Least and greatest factor.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)


@dataclass(frozen=True)
class MaskedImages:
    """Images and masks on disk.

    Each sample is augmented by the seed, the epoch and its index alone.

    Args:
        pairs: The files.
        crops: What training sees of them; evaluation sees whole images.
        classes: Number of classes.
        labels: Class of each of the 256 values in a mask; `VOID` where it has none.
        device: Where batches go.
        bad: Where images and masks that cannot be read are noted; None makes them an error.
    """

    pairs: tuple[Pair, ...]
    crops: Crops
    classes: int
    labels: tuple[int, ...]
    device: torch.device | str = "cpu"
    bad: BadSamples | None = field(default=None, compare=False)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.pairs)

    def to(self, device: torch.device) -> MaskedImages:
        """The same files, with batches sent to ``device``."""
        return replace(self, device=device)

    def digest(self) -> str:
        """A hash of the names and sizes of the files; the pixels are not read."""
        listed = [(p.image.name, p.image.stat().st_size, p.mask.name, p.mask.stat().st_size) for p in self.pairs]
        return hashlib.sha256(repr(listed).encode()).hexdigest()

    def check(self, augmentation: Augmentation) -> None:
        """Padded crops are for images in memory: these have crops of their own."""
        if augmentation.crop_padding:
            raise UserError(
                f"crop_padding={augmentation.crop_padding} is for images in memory: images with masks are trained on "
                "random crops (crop_size and scale in data_args); set crop_padding to 0"
            )

    def training_batches(
        self,
        batches: Sequence[Tensor],
        augmentation: Augmentation,
        epoch: int,
        step: int,
        workers: int,
        share: Share = WHOLE,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Random scales, crops and flips by torchvision, the same for an image and its mask."""
        self.check(augmentation)
        read = partial(_read_crop, self, 0.5 if augmentation.flip else 0.0)
        key = ("sample", augmentation.seed, epoch)
        return read_batches(
            read, [share.of(b).tolist() for b in batches], key, workers, self.device, self.bad, len(self)
        )

    def evaluation_batches(
        self, batch_size: int, workers: int, share: Share = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Whole images; a batch ends where the next image has another size."""
        batches = []
        for _, run in itertools.groupby(range(len(self)), lambda i: self.pairs[i].size):
            same = list(run)
            batches += [same[i : i + batch_size] for i in range(0, len(same), batch_size)]
        return read_batches(partial(_read_pair, self), share.turns(batches), (), workers, self.device, self.bad)


def _read_pair(files: MaskedImages, index: int) -> tuple[Tensor, Tensor]:
    """``(uint8 (3, H, W), int64 (H, W))``."""
    image, mask = _read_bytes(files, index)
    return image, mask.long()


def _read_bytes(files: MaskedImages, index: int) -> tuple[Tensor, Tensor]:
    """The same with a mask of bytes, which are moved faster."""
    from torchvision.transforms.v2 import functional as transforms

    pair = files.pairs[index]
    return transforms.pil_to_tensor(open_image(pair.image)), read_mask(pair.mask, files.classes, files.labels)


def _read_crop(files: MaskedImages, flip: float, index: int) -> tuple[Tensor, Tensor]:
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    image, mask = _read_bytes(files, index)
    crops = files.crops
    factor = float(torch.empty(()).uniform_(*crops.scale))
    height, width = (max(round(side * factor), 1) for side in mask.shape)
    # Padding has the mean colour, zero for the network, and no class.
    fill: dict[type | str, Any] = {tv_tensors.Image: [round(255 * m) for m in IMAGENET_MEAN], tv_tensors.Mask: VOID}
    transform = v2.Compose(
        [
            v2.Resize((height, width)),
            v2.RandomCrop(crops.size, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(flip),
        ]
    )
    cut = transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
    return cut[0].as_subclass(Tensor), cut[1].as_subclass(Tensor).long()


def read_mask(path: Path, classes: int, labels: Sequence[int]) -> Tensor:
    """Read a mask as uint8 ``(H, W)``.

    Args:
        path: An image of one channel.
        classes: Number of classes.
        labels: Class of each of the 256 values.

    Raises:
        BadSample: It cannot be decoded.
        UserError: It has several channels or a value that is no class.
    """
    with opened(path, "a mask") as file:
        values, mode = np.array(file), file.mode
    if values.ndim != 2:
        raise UserError(f"{path}: a mask has one channel of labels, this image is {mode}")
    if values.max() > VOID or values.min() < 0:
        raise UserError(f"{path}: labels are 0 ... {VOID}, found {values.min()} ... {values.max()}")
    mask = np.asarray(labels, np.uint8)[values.astype(np.uint8)]
    present = np.bincount(mask.ravel(), minlength=VOID + 1)[classes:VOID].nonzero()[0] + classes
    if len(present):
        raise UserError(
            f"{path}: label {present[0]}, but {classes} classes are 0 ... {classes - 1}, and {VOID} is void"
        )
    return torch.from_numpy(mask)


def _pair(image: Path, mask: Path) -> Pair:
    """Check that two files belong together, by their headers."""
    if not mask.is_file():
        raise UserError(f"{image}: has no mask; expected {mask}")
    sizes = []
    for path in (image, mask):
        with opened(path, "an image" if path is image else "a mask") as file:
            sizes.append(size_of(file) if path is image else (file.height, file.width))
    if sizes[0] != sizes[1]:
        raise UserError(f"{mask}: is {sizes[1][0]}x{sizes[1][1]}, its image {image} is {sizes[0][0]}x{sizes[0][1]}")
    if min(sizes[0]) < LEAST_SIDE:
        raise UserError(
            f"{image}: is {sizes[0][0]}x{sizes[0][1]}; at least {LEAST_SIDE}x{LEAST_SIDE} pixels are needed"
        )
    return Pair(image, mask, sizes[0])


def _images(folder: Path, what: str) -> list[Path]:
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise Missing(what, folder, ["images"])
    return found


Paired = tuple[tuple[Pair, ...], BadSamples | None]
"""The pairs of a split, and where those that cannot be read are noted."""


def _paired(places: Sequence[tuple[Path, Path]], on_bad_sample: str) -> Paired:
    """Check every pair; what has no readable header is left out where that is asked for."""
    bad, pairs = BadSamples.policy(on_bad_sample, len(places)), []
    for i, (image, mask) in enumerate(places, 1):
        try:
            pairs.append(_pair(image, mask))
        except BadSample as error:
            if bad is None:
                raise
            bad.note(-i, str(error))  # no index of a pair
    return tuple(pairs), bad


def _pairs_in(folder: Path, what: str, on_bad_sample: str) -> Paired:
    """``images/NAME.*`` with ``labels/NAME.png``."""
    for part in ("images", "labels"):
        if not (folder / part).is_dir():
            raise Missing(what, folder, ["images/", "labels/"])
    places = [(p, folder / "labels" / f"{p.stem}.png") for p in _images(folder / "images", what)]
    return _paired(places, on_bad_sample)


def _data(
    name: str,
    splits: Sequence[Paired],
    classes: Sequence[str],
    labels: Sequence[int],
    crops: Crops,
    infer: Callable[[nn.Module, Tensor], Tensor] | None,
    note: str,
) -> Data:
    """Put a data set together; ``note`` has places for the numbers of training and test images."""
    train, test = (MaskedImages(pairs, crops, len(classes), tuple(labels), bad=bad) for pairs, bad in splits)
    return Data(
        name=name,
        train=train,
        test=test,
        task=segmentation(classes, infer),
        input_size=(3, *crops.size),
        note=note.format(len(train), len(test)),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


Side = int | Sequence[int]
Factor = float | Sequence[float]


def _crops(size: Side, scale: Factor) -> Crops:
    crops = Crops(_two(size, "crop_size", int), _two(scale, "scale", float))
    if crops.scale[0] > crops.scale[1]:
        raise UserError(f"data_args: scale must be (least, greatest), got {scale!r}")
    return crops


def inference(window: Side | None) -> Callable[[nn.Module, Tensor], Tensor]:
    """How a network sees an image: whole, or in windows of that height and width (`sliding_window`)."""
    return whole_image if window is None else partial(sliding_window, _two(window, "window", int))


def _two(value: Any, name: str, kind: type) -> Any:
    """Two positive numbers, given as two or as one."""
    pair = tuple(value) if isinstance(value, list | tuple) else (value, value)
    numbers = (int,) if kind is int else (int, float)
    if len(pair) != 2 or not all(isinstance(v, numbers) and not isinstance(v, bool) and v > 0 for v in pair):
        raise UserError(f"data_args: {name} must be one or two positive {kind.__name__}s, got {value!r}")
    return tuple(kind(v) for v in pair)


_AS_THEY_ARE = tuple(range(256))


def folder(
    root: Path,
    *,
    classes: int | Sequence[str] | None = None,
    crop_size: Side = (512, 512),
    scale: Factor = (0.5, 2.0),
    window: Side | None = None,
    test: str = "",
    on_bad_sample: str = "error",
) -> Data:
    """A folder with ``{train,val,test}/images/NAME.jpg`` (or png, ...) and ``{train,val,test}/labels/NAME.png``.

    Args:
        root: The folder.
        classes: Their names, or their number. Labels count from 0; 255 is void.
        crop_size: Height and width of training crops.
        scale: Least and greatest factor by which training images are scaled.
        window: Height and width of the windows in which images are evaluated; the whole image by default.
        test: Folder that the network is judged on; ``test`` by default, ``val`` where there is none.
        on_bad_sample: What to do about an image or a mask that cannot be decoded: ``error`` stops; ``skip`` takes another in
            training, leaves it out in evaluation, and stops when more than 1 % of the pairs are so.
    """
    named = [f"class {i}" for i in range(classes)] if type(classes) is int else classes
    if not (isinstance(named, list | tuple) and named and all(isinstance(c, str) for c in named)):
        raise UserError(f"data_args: classes must be their names or their number, got {classes!r}")
    note = f"images and masks of {root.name}"
    crops = _crops(crop_size, scale)
    return _folder(root, root.name, named, test, crops, inference(window), note, on_bad_sample)


def camvid(
    root: Path,
    *,
    crop_size: Side = (180, 240),
    scale: Factor = (0.5, 2.0),
    window: Side | None = None,
    test: str = "test",
    on_bad_sample: str = "error",
) -> Data:
    """CamVid in ``root/camvid``, laid out as `folder`: eleven classes in the order of Badrinarayanan et al. 2017.

    Args:
        root: The folder that holds ``camvid``.
        crop_size: See `folder`.
        scale: See `folder`.
        window: See `folder`.
        test: ``test`` or ``val``.
        on_bad_sample: See `folder`.
    """
    crops, place = _crops(crop_size, scale), root / "camvid"
    return _folder(place, "camvid", list(CAMVID), test, crops, inference(window), "CamVid", on_bad_sample)


def _folder(
    root: Path,
    name: str,
    classes: Sequence[str],
    test: str,
    crops: Crops,
    infer: Callable[[nn.Module, Tensor], Tensor],
    note: str,
    on_bad_sample: str,
) -> Data:
    test = test or ("test" if (root / "test").is_dir() else "val")
    parts = ("train", test)
    if not all((root / part).is_dir() for part in parts):
        raise Missing(name, root, [f"{part}/images/, {part}/labels/" for part in parts])
    splits = [_pairs_in(root / part, f"{name}, {part}", on_bad_sample) for part in parts]
    sizes = sorted({pair.size for pairs, _ in splits for pair in pairs})
    size = f"{sizes[0][1]}x{sizes[0][0]}" if len(sizes) == 1 else f"of {len(sizes)} sizes"
    return _data(
        name, splits, classes, _AS_THEY_ARE, crops, infer, f"{note}, {size}: {{:,}} train and {{:,}} {test} images"
    )


def cityscapes(
    root: Path,
    *,
    crop_size: Side = (769, 769),
    scale: Factor = (0.5, 2.0),
    window: Side | None = None,
    on_bad_sample: str = "error",
) -> Data:
    """Cityscapes as it is distributed: ``leftImg8bit/{train,val}/CITY`` and ``gtFine/{train,val}/CITY``, judged on ``val``.

    The 19 classes of the benchmark. Masks are the distributed ``*_gtFine_labelIds.png``, or ``*_gtFine_labelTrainIds.png``
    where these were made.

    Args:
        root: The folder that holds the two.
        crop_size: See `folder`.
        scale: See `folder`.
        window: See `folder`.
        on_bad_sample: See `folder`.
    """
    from torchvision.datasets import Cityscapes

    ids = [VOID] * 256
    for known in Cityscapes.classes:
        if 0 <= known.train_id < VOID:
            ids[known.id] = known.train_id
    trained = sorted((c for c in Cityscapes.classes if 0 <= c.train_id < VOID), key=lambda c: c.train_id)
    made = any((root / "gtFine").rglob("*_gtFine_labelTrainIds.png"))
    suffix, labels = ("labelTrainIds", _AS_THEY_ARE) if made else ("labelIds", tuple(ids))
    splits = []
    for part in ("train", "val"):
        folder = root / "leftImg8bit" / part
        if not folder.is_dir():
            raise Missing("cityscapes", root, [f"leftImg8bit/{part}/CITY/", f"gtFine/{part}/CITY/"])
        places = []
        for image in _images(folder, f"cityscapes, {part}"):
            name = image.name.replace("_leftImg8bit.png", f"_gtFine_{suffix}.png")
            places.append((image, root / "gtFine" / part / image.parent.name / name))
        splits.append(_paired(places, on_bad_sample))
    classes = [c.name for c in trained]
    note = "Cityscapes, fine annotations: {:,} train and {:,} val images"
    return _data("cityscapes", splits, classes, labels, _crops(crop_size, scale), inference(window), note)


def sliding_window(window: tuple[int, int], model: nn.Module, x: Tensor) -> Tensor:
    """The mean of the logits of windows that overlap by half: how images larger than the training crops are evaluated.

    Args:
        window: Height and width; images that are smaller are seen whole.
        model: A segmentation network.
        x: Images.

    Shape:
        ``(N, C, H, W) -> (N, classes, H, W)``
    """
    tops, lefts = (_starts(length, side) for length, side in zip(x.shape[-2:], window, strict=True))
    total, count = None, x.new_zeros(x.shape[-2:])
    for top, left in itertools.product(tops, lefts):
        part = (slice(top, top + window[0]), slice(left, left + window[1]))
        logits = whole_image(model, x[..., part[0], part[1]]).float()
        if total is None:
            total = logits.new_zeros((*logits.shape[:2], *x.shape[-2:]))
        total[..., part[0], part[1]] += logits
        count[part] += 1
    assert total is not None
    return total / count


def _starts(length: int, side: int) -> list[int]:
    """Where windows begin: at every half, the last one at the end.

    Examples:
        >>> _starts(10, 4), _starts(9, 4), _starts(3, 4)
        ([0, 2, 4, 6], [0, 2, 4, 5], [0])
    """
    last = max(length - side, 0)
    return sorted({*range(0, last, max(side // 2, 1)), last})


def palette(name: str, classes: int) -> list[tuple[int, int, int]]:
    """Colours of a data set's classes: its own, or distinct ones for any number (those of PASCAL VOC).

    Examples:
        >>> palette("camvid", 11)[3], palette("mine", 3)
        ((128, 64, 128), [(128, 0, 0), (0, 128, 0), (128, 128, 0)])
    """
    from torchvision.datasets import Cityscapes

    official = {
        "camvid": list(CAMVID.values()),
        "cityscapes": [c.color for c in sorted(Cityscapes.classes, key=lambda c: c.train_id) if 0 <= c.train_id < VOID],
    }
    return official.get(name) or [_voc_colour(i) for i in range(1, classes + 1)]


def _voc_colour(index: int) -> tuple[int, int, int]:
    """Spread the bits of an index over the high bits of red, green and blue."""
    red, green, blue = (sum((index >> (3 * bit + c) & 1) << (7 - bit) for bit in range(8)) for c in range(3))
    return red, green, blue


def overlay(image: Tensor, mask: Tensor, colours: Sequence[tuple[int, int, int]]) -> Tensor:
    """Tint an image by the class of each pixel; void stays as it is.

    Shape:
        ``(3, H, W) uint8, (H, W) -> (3, H, W) uint8``
    """
    from torchvision.utils import draw_segmentation_masks

    classes = F.one_hot(torch.where(mask == VOID, len(colours), mask), len(colours) + 1)[..., :-1]
    return draw_segmentation_masks(image, classes.permute(2, 0, 1).bool(), alpha=0.6, colors=list(colours))
