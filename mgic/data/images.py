"""Image classification: named sets, ``.npz`` files and image folders."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError
from .base import WHOLE, Augmentation, Data, Share
from .files import UNREADABLE, Missing, read_arrays
from .reading import BadSample, BadSamples, in_order, read_batches
from .seeds import random_key
from .tasks import classification

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def augment_batch(
    images: Tensor, generator: torch.Generator, crop_padding: int, flip: bool, share: Share = WHOLE
) -> Tensor:
    """Pad, crop at random and mirror a batch, each image on its own, with one gather.

    Args:
        images: Images on any device; any dtype.
        generator: Of the CPU, whatever the device: every device then sees the same crops.
        crop_padding: Pixels of black on each side; the offset is uniform on ``0 ... 2 * crop_padding``.
        flip: Mirror with probability 1/2.
        share: What ``images`` are of a larger batch, for all of which random numbers are drawn.

    Shape:
        ``(N, C, H, W) -> (N, C, H, W)``
    """
    n, channels, height, width = images.shape
    drawn = n * share.ranks
    top, left = map(share.of, torch.randint(2 * crop_padding + 1, (2, drawn, 1), generator=generator))
    mirrored = (
        share.of(torch.rand(drawn, 1, generator=generator)) < 0.5 if flip else torch.zeros(n, 1, dtype=torch.bool)
    )
    columns = torch.arange(width).expand(n, width)
    rows = (top + torch.arange(height)).to(images.device)
    columns = (left + torch.where(mirrored, columns.flip(1), columns)).to(images.device)
    padded = F.pad(images, (crop_padding,) * 4)
    image = torch.arange(n, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


@dataclass(frozen=True)
class Images:
    """Images in memory, on the device that trains: for small sets this is faster than any loader.

    Args:
        images: uint8, ``(N, C, H, W)``.
        labels: int64, ``(N,)``.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def to(self, device: torch.device) -> Images:
        """The same images on ``device``."""
        return Images(self.images.to(device), self.labels.to(device))

    def digest(self) -> str:
        """A hash of every pixel and label."""
        both = hashlib.sha256(self.images.cpu().numpy().tobytes())
        both.update(self.labels.cpu().numpy().tobytes())
        return both.hexdigest()

    def check(self, augmentation: Augmentation) -> None:
        """Images in memory take every augmentation."""

    def training_batches(
        self,
        batches: Sequence[Tensor],
        augmentation: Augmentation,
        epoch: int,
        step: int,
        workers: int,
        share: Share = WHOLE,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches augmented by the seed and the step alone; ``epoch`` and ``workers`` play no part."""
        for offset, indices in enumerate(batches):
            chosen = share.of(indices).to(self.images.device)
            generator = torch.Generator().manual_seed(random_key("augment", augmentation.seed, step + offset))
            images = augment_batch(self.images[chosen], generator, augmentation.crop_padding, augmentation.flip, share)
            yield images, self.labels[chosen]

    def evaluation_batches(
        self, batch_size: int, workers: int, share: Share = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Slices of the images, in order."""
        yield from share.turns(
            zip(torch.split(self.images, batch_size), torch.split(self.labels, batch_size), strict=True)
        )


@dataclass(frozen=True)
class ImageFiles:
    """Images on disk, decoded by worker processes.

    Each sample is augmented by the seed, the epoch and its index alone, so neither the number of workers nor the
    place where a run was resumed changes a single pixel.

    Args:
        samples: Path (or open file) and label of each image.
        size: Height and width of the network's input, in pixels.
        device: Where batches go.
        bad: Where images that cannot be read are noted; None makes them an error.
    """

    samples: Sequence[tuple[Any, int]]
    size: int
    device: torch.device | str = "cpu"
    bad: BadSamples | None = field(default=None, compare=False)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.samples)

    def to(self, device: torch.device) -> ImageFiles:
        """The same files, with batches sent to ``device``."""
        return replace(self, device=device)

    def digest(self) -> str:
        """A hash of the file names with their folders, sizes and labels; the pixels are not read."""
        listed = [(path.parent.name, path.name, path.stat().st_size, label) for path, label in self.samples]
        return hashlib.sha256(repr(listed).encode()).hexdigest()

    def check(self, augmentation: Augmentation) -> None:
        """Padded crops are for images in memory."""
        if augmentation.crop_padding:
            raise UserError(
                f"crop_padding={augmentation.crop_padding} is for data sets in memory: image folders are trained "
                "on random resized crops; set crop_padding to 0"
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
        """Random resized crops and flips by torchvision."""
        self.check(augmentation)
        from torchvision.transforms import v2

        flip = v2.RandomHorizontalFlip(0.5 if augmentation.flip else 0.0)
        transform = v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(self.size, antialias=True), flip])
        key = ("sample", augmentation.seed, epoch)
        read = partial(_read_image, self.samples, transform)
        return read_batches(
            read, [share.of(b).tolist() for b in batches], key, workers, self.device, self.bad, len(self)
        )

    def evaluation_batches(
        self, batch_size: int, workers: int, share: Share = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The centres of the images; see `centre_crop`."""
        read = partial(_read_image, self.samples, partial(centre_crop, self.size))
        return read_batches(read, share.turns(in_order(len(self), batch_size)), (), workers, self.device, self.bad)


def _read_image(
    samples: Sequence[tuple[Any, int]], transform: Callable[[Any], Tensor], index: int
) -> tuple[Tensor, Tensor]:
    path, label = samples[index]
    return transform(open_image(path)), torch.tensor(label)


def open_image(path: Path | IO[bytes]) -> Any:
    """Decode an image file as an RGB picture of Pillow, turned as its EXIF data say.

    Raises:
        BadSample: It cannot be decoded, or has more pixels than Pillow takes for an honest image (89 million).
    """
    from PIL import ImageOps

    with opened(path, "an image") as file:
        return _rgb(ImageOps.exif_transpose(file))


@contextmanager
def opened(path: Path | IO[bytes], what: str) -> Iterator[Any]:
    """An image file opened by Pillow; what goes wrong with it becomes one line that names it.

    Args:
        path: The file.
        what: What it should be, for the message.

    Raises:
        BadSample: It cannot be opened, or whatever the block does with it fails.
    """
    from PIL import Image

    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                yield file
    except (*UNREADABLE, *bombs) as error:
        reason = " ".join(str(error).split()).replace(repr(str(path)), "it")
        raise BadSample(f"{path}: cannot be decoded as {what} ({reason}); remove or replace it") from error


def _rgb(picture: Any) -> Any:
    """Any mode as RGB; 16 bits are scaled to 8, where Pillow would make all but the darkest white."""
    from PIL import Image

    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of which nobody knows the range")
    if picture.mode.startswith("I"):
        grey = np.asarray(picture).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65_535:
            raise ValueError("its pixels are integers beyond 16 bits")
        picture = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    return picture.convert("RGB")


def size_of(picture: Any) -> tuple[int, int]:
    """Height and width of an opened image, once turned as its EXIF data say; no pixel is decoded."""
    turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return picture.size if turned else picture.size[::-1]  # type: ignore[no-any-return]


def centre_crop(size: int, picture: Any) -> Tensor:
    """Resize the shorter side of a picture of Pillow to 8/7 of ``size`` (256 for 224) and cut out the centre, uint8."""
    from torchvision.transforms import v2

    transform = v2.Compose([v2.PILToTensor(), v2.Resize(size * 8 // 7), v2.CenterCrop(size)])
    return transform(picture)  # type: ignore[no-any-return]


def whole_image(size: tuple[int, int, int], margin: int, picture: Any) -> Tensor:
    """Resize a picture of Pillow to what a set in memory has, ``(C, H, W)`` with a black margin, uint8."""
    from torchvision.transforms.v2 import functional as transforms

    channels, height, width = size
    image = transforms.pil_to_tensor(picture.convert("L") if channels == 1 else picture)
    inner = [height - 2 * margin, width - 2 * margin]
    return F.pad(transforms.resize(image, inner, antialias=True), (margin,) * 4)


def padded(data: Data, pixels: int) -> Data:
    """The same data with larger images: ``pixels`` black ones on each side, for training and test.

    Raises:
        UserError: The samples are no images in memory.
    """
    if not pixels:
        return data
    if not (isinstance(data.train, Images) and isinstance(data.test, Images)):
        raise UserError(f"pad_images={pixels} is for images in memory, not for {data.name}")
    train, test = (replace(s, images=F.pad(s.images, (pixels,) * 4)) for s in (data.train, data.test))
    channels, height, width = data.input_size
    size = (channels, height + 2 * pixels, width + 2 * pixels)
    note = f"{data.note}; padded to {size[1]}x{size[2]}"
    return replace(data, train=train, test=test, input_size=size, note=note)


def digits(root: Path) -> Data:
    """scikit-learn's digits, which are always there."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)  # 17 grey values, 0 ... 16, spread over 0 ... 255
    rng = np.random.RandomState(0)  # the legacy generator: its stream is frozen for ever
    shuffled = [rng.permutation(np.flatnonzero(found.target == label)) for label in range(10)]
    test = np.sort(np.concatenate([s[: round(len(s) / 3)] for s in shuffled]))
    train = np.setdiff1d(np.arange(len(pixels)), test)
    note = (
        f"scikit-learn digits, 8x8: {len(train):,} train and {len(test):,} test images "
        "(a third of each class, drawn with seed 0; writers are mixed)"
    )
    arrays = (pixels[train], found.target[train], pixels[test], found.target[test])
    return _in_memory("digits", *arrays, num_classes=10, note=note)


def fashion_mnist(root: Path, download: bool, *, train_images: int | None = None) -> Data:
    """FashionMNIST as torchvision keeps it in ``root``.

    Args:
        root: Folder of data sets.
        download: Fetch what is missing.
        train_images: So many of the training images, drawn at random, always the same ones.
    """
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.utils import check_integrity

    folder = root / "FashionMNIST" / "raw"
    archives = [(folder / name, md5) for name, md5 in FashionMNIST.resources]
    unpacked = all(path.with_suffix("").is_file() for path, _ in archives)
    if not (unpacked or download):
        absent = [path.name for path, _ in archives if not path.is_file()]
        if absent:
            raise Missing("fashion_mnist", folder, absent)
        broken = [path.name for path, md5 in archives if not check_integrity(str(path), md5)]
        if broken:
            raise UserError(f"fashion_mnist: wrong checksum of {', '.join(broken)} in {folder}; --download replaces it")
    # With all four archives verified, "download" only unpacks them.
    train, test = (_fetch(FashionMNIST, root, part, download=not unpacked) for part in (True, False))
    note = f"FashionMNIST, official split: {len(train.data):,} train and {len(test.data):,} test images"
    arrays = (train.data.numpy(), train.targets.numpy(), test.data.numpy(), test.targets.numpy())
    return _in_memory("fashion_mnist", *arrays, num_classes=10, note=note, train_images=train_images)


def cifar(name: str, classes: int) -> Callable[..., Data]:
    """The loader of CIFAR-10 or CIFAR-100 as torchvision keeps them in ``root``; arguments as `fashion_mnist`."""

    def load(root: Path, download: bool, *, train_images: int | None = None) -> Data:
        from torchvision import datasets
        from torchvision.datasets.utils import check_integrity

        source = getattr(datasets, name)
        folder, archive = root / source.base_folder, root / source.filename
        if not (download or folder.is_dir() or archive.is_file()):
            raise Missing(name.lower(), root, [f"{source.base_folder}/"])
        unpack = download or (archive.is_file() and not folder.is_dir())
        if unpack and not download and not check_integrity(str(archive), source.tgz_md5):
            raise UserError(f"{archive} is damaged (wrong md5): remove it, or give --download to fetch it again")
        train, test = (_fetch(source, root, part, download=unpack) for part in (True, False))
        note = f"{name}, official split: {len(train.data):,} train and {len(test.data):,} test images"
        arrays = (train.data, np.asarray(train.targets), test.data, np.asarray(test.targets))
        return _in_memory(name.lower(), *arrays, num_classes=classes, note=note, train_images=train_images)

    return load


def npz(path: Path, *, num_classes: int | None = None, train_images: int | None = None) -> Data:
    """A file with ``x_train, y_train, x_test, y_test`` (uint8, NHW or NHWC).

    Args:
        path: The file.
        num_classes: Default: the largest training label plus one.
        train_images: So many of the training images, drawn at random, always the same ones.
    """
    if num_classes is not None and (type(num_classes) is not int or num_classes < 1):
        raise UserError(f"data_args: num_classes must be a positive integer, got {num_classes!r}")
    keys = ("x_train", "y_train", "x_test", "y_test")
    if not path.is_file():
        raise UserError(f"data {str(path)!r}: no such file; expected an .npz with {', '.join(keys)}")
    found = read_arrays(path)
    absent = [key for key in keys if key not in found]
    if absent:
        raise UserError(f"{path}: {', '.join(absent)} not in the file; found {', '.join(found) or 'no array by name'}")
    arrays = [found[key] for key in keys]
    if any(array.ndim == 0 for array in arrays):
        raise UserError(f"{path}: expected arrays of images and labels, got single numbers")
    train, test = len(arrays[0]), len(arrays[2])
    note = f"{path.name}: {train:,} train and {test:,} test images"
    if path.name.startswith("cifar10.") and (train < 50_000 or test < 10_000):
        note += (
            f"; of CIFAR-10, {50_000 - train:,} of 50,000 train and {10_000 - test:,} of 10,000 test images are missing"
        )
    return _in_memory(str(path), *arrays, num_classes=num_classes, note=note, train_images=train_images)


def folder(path: Path, *, image_size: int = 224, on_bad_sample: str = "error") -> Data:
    """A folder with ``train/CLASS/*.jpg`` and ``val`` or ``test`` beside it.

    Args:
        path: The folder.
        image_size: Height and width of the network's input, in pixels.
        on_bad_sample: What to do about an image that cannot be decoded: ``error`` stops; ``skip`` takes another in training,
            leaves it out in evaluation, and stops when more than 1 % of the images are so.
    """
    if type(image_size) is not int or image_size < 1:
        raise UserError(f"data_args: image_size must be a positive integer, got {image_size!r}")
    from torchvision.datasets import ImageFolder

    test_name = "val" if (path / "val").is_dir() else "test"
    if not ((path / "train").is_dir() and (path / test_name).is_dir()):
        raise Missing(f"image folder {path}", path, ["train/CLASS/*.jpg", "val/CLASS/*.jpg (or test/CLASS/*.jpg)"])
    try:
        train, test = (ImageFolder(str(path / part), is_valid_file=_is_image) for part in ("train", test_name))
    except FileNotFoundError as error:  # also torchvision's error for a class without images
        raise UserError(f"image folder {path}: {' '.join(str(error).split())}") from error
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(f"image folder {path}: train and {test_name} differ in the classes {', '.join(odd)}")
    splits = [
        ImageFiles(
            tuple((Path(p), label) for p, label in s.samples),
            image_size,
            bad=BadSamples.policy(on_bad_sample, len(s.samples)),
        )
        for s in (train, test)
    ]
    return Data(
        name=str(path),
        train=splits[0],
        test=splits[1],
        task=classification(len(train.classes), train.classes),
        input_size=(3, image_size, image_size),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        cropped=True,
        note=f"image folder {path.name}: {len(train):,} train and {len(test):,} {test_name} images",
    )


def _is_image(path: str) -> bool:
    return path.lower().endswith(IMAGE_SUFFIXES)


def _fetch(source: Any, root: Path, train: bool, download: bool) -> Any:
    try:
        return source(str(root), train=train, download=download)
    except (RuntimeError, OSError, pickle.UnpicklingError) as error:  # not found, checksum, network, folder, hostile
        raise UserError(
            f"{source.__name__}: cannot be loaded from {root} ({' '.join(str(error).split())}); --download fetches it"
        ) from error


def _in_memory(
    name: str,
    x_train: np.ndarray[Any, Any],
    y_train: np.ndarray[Any, Any],
    x_test: np.ndarray[Any, Any],
    y_test: np.ndarray[Any, Any],
    *,
    num_classes: int | None,
    note: str,
    train_images: int | None = None,
) -> Data:
    train = Images(_pixels(x_train, f"{name}: x_train"), _labels(y_train, f"{name}: y_train", len(x_train)))
    test = Images(_pixels(x_test, f"{name}: x_test"), _labels(y_test, f"{name}: y_test", len(x_test)))
    if train_images is not None:
        if type(train_images) is not int or not 1 <= train_images <= len(x_train):
            raise UserError(f"{name}: train_images must be 1 ... {len(x_train):,}, got {train_images!r}")
        chosen = torch.from_numpy(np.sort(np.random.RandomState(0).permutation(len(x_train))[:train_images]))
        train = Images(train.images[chosen], train.labels[chosen])
        note += f"; {train_images:,} of the train images, drawn with seed 0"
    if train.images.shape[1:] != test.images.shape[1:]:
        sizes = [tuple(s.images.shape[1:]) for s in (train, test)]
        raise UserError(f"{name}: train images are {sizes[0]} but test images are {sizes[1]} (channels, height, width)")
    classes = int(train.labels.max()) + 1 if num_classes is None else num_classes
    for part, split in (("y_train", train), ("y_test", test)):
        largest = int(split.labels.max())
        if largest >= classes:
            raise UserError(f"{name}: {part} has label {largest}, but {classes} classes are 0 ... {classes - 1}")
    if num_classes is None:
        empty = (torch.bincount(train.labels, minlength=classes) == 0).nonzero().flatten().tolist()
        if empty:
            raise UserError(
                f"{name}: no training image has label {', '.join(map(str, empty[:8]))} although the largest label is "
                f"{classes - 1}; labels count from 0, or give num_classes"
            )
    mean, std = _mean_std(train.images)
    channels, height, width = train.images.shape[1:]
    return Data(name, train, test, classification(classes), (channels, height, width), note, mean, std)


def _pixels(array: np.ndarray[Any, Any], what: str) -> Tensor:
    """``(N, H, W)`` or ``(N, H, W, C)`` uint8 as ``(N, C, H, W)``."""
    if array.dtype != np.uint8:
        raise UserError(f"{what}: pixels must be uint8 (0 ... 255), got {array.dtype}")
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or 0 in array.shape:
        raise UserError(f"{what}: expected shape (N, H, W) or (N, H, W, C), got {array.shape}")
    if array.shape[-1] > 4:
        raise UserError(f"{what}: {array.shape[-1]} channels in the last axis of {array.shape}; expected NHWC, 1 to 4")
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def _labels(array: np.ndarray[Any, Any], what: str, images: int) -> Tensor:
    """Class indices as int64 ``(N,)``; Keras' ``(N, 1)`` is flattened."""
    if array.dtype.kind not in "iu":
        raise UserError(f"{what}: labels must be integer class indices, got {array.dtype}")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise UserError(f"{what}: labels must have shape (N,), got {array.shape}; of one-hot labels take argmax(1)")
    if len(array) != images:
        raise UserError(f"{what}: {len(array)} labels for {images} images")
    if array.min() < 0:
        raise UserError(f"{what}: label {array.min()} is negative; classes count from 0")
    return torch.from_numpy(array.astype(np.int64))


def _mean_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, pixels in [0, 1], exactly: from the histogram of grey values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        means.append(float(mean))
        stds.append(float((share * (values - mean) ** 2).sum().sqrt()) or 1.0)  # a constant channel stays constant
    return tuple(means), tuple(stds)
