"""Point clouds: meshes in OFF files, ModelNet's folders and HDF5 files, generated solids, single files of points."""

from __future__ import annotations

import hashlib
import importlib
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .base import WHOLE, Augmentation, Data, Share
from .files import UNREADABLE, Missing, check_announced, read_arrays
from .reading import in_order, read_batches
from .seeds import random_key
from .solids import write_solids
from .tasks import classification

Array = np.ndarray[Any, Any]

POINT_SUFFIXES = (".off", ".npy", ".npz", ".xyz", ".txt")
"""What `read_points` reads."""
STORED = 2048
"""Points kept of each mesh, as many as the common HDF5 files have; a network sees a random part of them."""


def read_off(path: str | Path) -> tuple[Array, Array]:
    """Read the mesh of an OFF file; polygons become triangles around their first corner.

    The header may share its line with the counts, with or without a space: some of ModelNet's files begin ``OFF490 518 0``.
    Comments and what follows coordinates or corners (colours) are skipped.

    Shape:
        ``(V, 3)`` float64 vertices, ``(F, 3)`` int64 triangles.

    Raises:
        UserError: The file is no OFF file, ends early, or has bad numbers; the message names it.
    """
    lines = _words(Path(path))
    first = lines[0][0] if lines else ""
    if not first.startswith("OFF"):
        raise UserError(f"{path}: no OFF file: it begins with {first[:12]!r} instead of 'OFF'")
    lines[0] = [word for word in (first[3:], *lines[0][1:]) if word]
    header, *body = lines if lines[0] else lines[1:] or [[]]
    counts = [int(word) for word in header[:2] if word.isdecimal()]
    if len(counts) < 2:
        raise UserError(
            f"{path}: broken OFF file: its counts of vertices and faces are {' '.join(header[:2]) or 'missing'}"
        )
    vertex_count, face_count = counts
    if len(body) < sum(counts):
        raise UserError(
            f"{path}: truncated: {vertex_count} vertices and {face_count} faces are announced, "
            f"but only {len(body)} of these {sum(counts)} lines are there"
        )
    try:
        vertices = np.array([words[:3] for words in body[:vertex_count]], dtype=np.float64).reshape(vertex_count, 3)
        rows = [(int(words[0]), words[1:]) for words in body[vertex_count : sum(counts)]]
        polygons = [(corners, [int(word) for word in words[: max(corners, 0)]]) for corners, words in rows]
    except ValueError as error:
        raise UserError(f"{path}: broken OFF file: {error}") from error
    triangles = []
    for corners, polygon in polygons:
        if len(polygon) != corners:
            raise UserError(f"{path}: truncated: a face announces {corners} corners and has {len(polygon)}")
        triangles += [(polygon[0], *side) for side in pairwise(polygon[1:])]
    faces = np.array(triangles, dtype=np.int64).reshape(-1, 3)
    outside = faces[(faces < 0) | (faces >= vertex_count)]
    if outside.size:
        raise UserError(f"{path}: a face names vertex {outside[0]}, but the {vertex_count} vertices count from 0")
    return vertices, faces


def _words(path: Path) -> list[list[str]]:
    """The words of each line that has any, without comments."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return [words for line in text.splitlines() if (words := line.partition("#")[0].split())]


def sample_surface(vertices: Array, faces: Array, count: int, generator: torch.Generator) -> Tensor:
    """Draw points uniformly from a surface: triangles by their area, then a place in each.

    Args:
        vertices: Corners.
        faces: Triangles.
        count: Number of points.
        generator: Source of randomness.

    Shape:
        ``(V, 3), (F, 3) -> (count, 3)`` float32

    Raises:
        UserError: The triangles have no area.
    """
    a, b, c = torch.from_numpy(vertices)[torch.from_numpy(faces)].unbind(1)
    areas = torch.linalg.cross(b - a, c - a).norm(dim=1)
    ends = areas.cumsum(0)
    if not (len(ends) and ends[-1] > 0):
        raise UserError("a mesh without faces that have an area has no surface to take points from")
    u, v, place = torch.rand(3, count, dtype=torch.float64, generator=generator)
    face = torch.searchsorted(ends, place * ends[-1], right=True).clamp_max_(len(ends) - 1)
    outside = u + v > 1  # of the triangle, in the other half of the parallelogram
    u, v = torch.where(outside, 1 - u, u)[:, None], torch.where(outside, 1 - v, v)[:, None]
    return (a[face] + u * (b - a)[face] + v * (c - a)[face]).float()


def read_points(path: str | Path, least: int = 10) -> Tensor:
    """Read a cloud, ``(P, 3)`` float32; of a mesh, 2,048 points of its surface, always the same ones.

    Args:
        path: An OFF mesh; ``.npy``, or ``.npz`` with one array or one named ``points``; ``.xyz`` or ``.txt`` with a point a
            line, separated by spaces or commas. Columns after the third (normals, colours) are left out.
        least: Fewest points; by default the neighbours that the networks look for.

    Raises:
        UserError: The file cannot be read, has fewer points, or a coordinate that is no finite number; the message names it.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in POINT_SUFFIXES:
        raise UserError(f"{path}: no point cloud; known are {', '.join(POINT_SUFFIXES)}")
    if suffix == ".off":
        return _mesh_points(path)
    array = _array(path, suffix)
    if array.ndim != 2 or array.shape[1] < 3 or array.dtype.kind not in "fiu":
        raise UserError(f"{path}: expected numbers of shape (points, 3 or more), got {array.dtype} {array.shape}")
    if len(array) < least:
        raise UserError(f"{path}: {len(array)} points; at least {least} are needed to look for neighbours")
    points = _single(array[:, :3])
    _check_finite(points, f"{path}: point")
    return points


def _mesh_points(path: Path) -> Tensor:
    vertices, faces = read_off(path)
    _check_finite(_single(vertices), f"{path}: vertex")
    generator = torch.Generator().manual_seed(random_key("surface", path.name))
    try:
        return sample_surface(vertices, faces, STORED, generator)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _array(path: Path, suffix: str) -> Array:
    if suffix in (".xyz", ".txt"):
        lines = [" ".join(words).replace(",", " ").split() for words in _words(path)]
        try:
            return np.array(lines, dtype=np.float64).reshape(len(lines), -1)
        except ValueError as error:
            raise UserError(f"{path}: no table of numbers ({error})") from error
    arrays = read_arrays(path)
    name = "points" if "points" in arrays or len(arrays) != 1 else next(iter(arrays))
    if name not in arrays:
        raise UserError(f"{path}: no array named 'points' among {', '.join(arrays) or 'none'}")
    return np.asarray(arrays[name])


def _single(array: Array) -> Tensor:
    """As float32; what is beyond its range becomes infinite."""
    with np.errstate(over="ignore"):
        return torch.from_numpy(array.astype(np.float32))


def _check_finite(rows: Tensor, what: str) -> None:
    bad = (~rows.isfinite().all(-1)).nonzero()
    if len(bad):
        place = tuple(bad[0].tolist())
        raise UserError(
            f"{what} {', '.join(map(str, place))} has a coordinate that is not finite: {rows[place].tolist()}"
        )


def prepare_points(points: Tensor, size: int) -> Tensor:
    """Make of a cloud what a network takes in evaluation: so many points, centred, within the unit cube.

    The points are chosen by a fixed draw; a smaller cloud is filled up with copies of its points.

    Args:
        points: The cloud.
        size: Points for the network.

    Shape:
        ``(P, 3) -> (3, size)``
    """
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    return _normalized(points[order.repeat(-(-size // len(order)))[:size]]).T.contiguous()


def _normalized(points: Tensor) -> Tensor:
    transforms = _needs("torch_geometric.transforms")
    return _transformed(points, transforms.NormalizeScale())


def _transformed(points: Tensor, transform: Any) -> Tensor:
    cloud = _needs("torch_geometric.data").Data(pos=points)
    return transform(cloud).pos  # type: ignore[no-any-return]


def _needs(module: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it scripts functions as it is imported
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"point clouds need {module.partition('.')[0]} ({error}): pip install 'mgic[points]'"
        ) from error


@dataclass(frozen=True)
class Changes:
    """What training does to clouds at random, besides taking some of their points.

    Args:
        rotate: Turn about the vertical axis (z) by at most so many degrees to either side.
        scale: Make larger or smaller by at most this share.
        jitter: Move each coordinate of each point by at most so much, where the cloud reaches from -1 to 1.

    Raises:
        UserError: A value is outside its range.
    """

    rotate: float = 0.0
    scale: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        for name, most in (("rotate", 180), ("scale", 0.9), ("jitter", 1)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= most:
                raise UserError(f"{name} must be a number from 0 to {most:g}, got {value!r}")

    def transform(self) -> Any:
        """The same as one of torch_geometric's transforms."""
        t = _needs("torch_geometric.transforms")
        steps = [t.NormalizeScale()]
        if self.rotate:
            steps.append(t.RandomRotate(self.rotate, axis=2))
        if self.scale:
            steps.append(t.RandomScale((1 - self.scale, 1 + self.scale)))
        if self.jitter:
            steps.append(t.RandomJitter(self.jitter))
        return t.Compose(steps)


@dataclass(frozen=True)
class PointClouds:
    """Clouds in memory; training takes a random part of each, evaluation a fixed one.

    Each sample is changed by the seed, the epoch and its index alone.

    Args:
        clouds: ``(N, S, 3)`` float32.
        labels: int64, ``(N,)``.
        points: Points that a network sees of a cloud.
        changes: What training does besides.
        device: Where batches go.
    """

    clouds: Tensor
    labels: Tensor
    points: int
    changes: Changes = Changes()
    device: torch.device | str = "cpu"

    def __len__(self) -> int:
        """Number of clouds."""
        return len(self.labels)

    def to(self, device: torch.device) -> PointClouds:
        """The same clouds, with batches sent to ``device``."""
        return replace(self, device=device)

    def digest(self) -> str:
        """A hash of every coordinate and label, and of what is done to them."""
        both = hashlib.sha256(self.clouds.numpy().tobytes())
        both.update(self.labels.numpy().tobytes())
        both.update(repr((self.points, self.changes)).encode())
        return both.hexdigest()

    def check(self, augmentation: Augmentation) -> None:
        """Crops and flips are for images."""
        augmentation.refuse("point clouds")

    def training_batches(
        self,
        batches: Sequence[Tensor],
        augmentation: Augmentation,
        epoch: int,
        step: int,
        workers: int,
        share: Share = WHOLE,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """A random part of each cloud, turned, scaled and jittered; ``step`` plays no part."""
        read = partial(_changed, self.clouds, self.labels, self.points, self.changes.transform())
        key = ("cloud", augmentation.seed, epoch)
        return read_batches(read, [share.of(b).tolist() for b in batches], key, workers, self.device)

    def evaluation_batches(
        self, batch_size: int, workers: int, share: Share = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What `prepare_points` makes of each cloud."""
        read = partial(_prepared, self.clouds, self.labels, self.points)
        return read_batches(read, share.turns(in_order(len(self), batch_size)), ("cloud",), workers, self.device)


def _changed(clouds: Tensor, labels: Tensor, points: int, transform: Any, index: int) -> tuple[Tensor, Tensor]:
    cloud = clouds[index]
    chosen = torch.randperm(len(cloud))[:points]
    outside = random.getstate()  # some of the transforms draw from Python's generator
    random.seed(int(torch.randint(2**62, ())))
    try:
        return _transformed(cloud[chosen], transform).T.contiguous(), labels[index]
    finally:
        random.setstate(outside)


def _prepared(clouds: Tensor, labels: Tensor, points: int, index: int) -> tuple[Tensor, Tensor]:
    return prepare_points(clouds[index], points), labels[index]


def modelnet(root: Path, *, points: int = 1024, rotate: float = 0.0, scale: float = 0.0, jitter: float = 0.0) -> Data:
    """ModelNet10 or 40 with its official split, from OFF meshes or from the common HDF5 files.

    Args:
        root: Folder with ``CLASS/train/*.off`` and ``CLASS/test/*.off``, or with ``ply_data_train*.h5`` and
            ``ply_data_test*.h5``.
        points: Points a network sees of a cloud.
        rotate: See `Changes`.
        scale: See `Changes`.
        jitter: See `Changes`.

    Raises:
        UserError: The folder has neither, or a file in it is broken.
    """
    changes = Changes(rotate, scale, jitter)
    if any(root.glob("ply_data_train*.h5")):
        return _hdf5(root, points, changes)
    return _meshes(root, str(root), points, changes, note=f"{root.name}, OFF meshes")


def solids(
    root: Path,
    *,
    points: int = 256,
    train: int = 100,
    test: int = 40,
    rotate: float = 0.0,
    scale: float = 0.0,
    jitter: float = 0.0,
) -> Data:
    """Ten generated families of solids, written once as OFF files under ``root`` and read like ModelNet.

    Args:
        root: Folder of data sets.
        points: Points a network sees of a cloud.
        train: Training solids of each family.
        test: Test solids of each family.
        rotate: See `Changes`.
        scale: See `Changes`.
        jitter: See `Changes`.

    Raises:
        UserError: A number makes no sense, or the folder cannot be written.
    """
    changes = Changes(rotate, scale, jitter)
    for name, count in (("train", train), ("test", test)):
        if type(count) is not int or count < 1:
            raise UserError(f"solids: {name} must be an integer, at least 1, got {count!r}")
    return _meshes(write_solids(root, train, test), "solids", points, changes, note="generated solids")


def _meshes(root: Path, name: str, points: int, changes: Changes, note: str) -> Data:
    expected = ["CLASS/train/*.off", "CLASS/test/*.off", "or ply_data_train*.h5, ply_data_test*.h5"]
    classes = sorted(p.name for p in root.glob("*") if (p / "train").is_dir() and (p / "test").is_dir())
    files = {part: [sorted((root / c / part).glob("*.off")) for c in classes] for part in ("train", "test")}
    if not classes or not all(all(found) for found in files.values()):
        raise Missing(name, root, expected)
    clouds, labels = {}, {}
    for part, found in files.items():
        clouds[part] = torch.stack([_mesh_points(path) for paths in found for path in paths])
        labels[part] = torch.tensor([label for label, paths in enumerate(found) for _ in paths])
    return _point_data(name, clouds, labels, points, changes, classes, f"{note}, {STORED:,} points of each surface")


def _hdf5(root: Path, points: int, changes: Changes) -> Data:
    clouds, labels = {}, {}
    for part in ("train", "test"):
        paths = sorted(root.glob(f"ply_data_{part}*.h5"))
        if not paths:
            raise Missing(str(root), root, [f"ply_data_{part}*.h5"])
        pieces = [_hdf5_file(path) for path in paths]
        clouds[part], labels[part] = (torch.cat(column) for column in zip(*pieces, strict=True))
    names = root / "shape_names.txt"
    count = int(max(found.max() for found in labels.values())) + 1
    classes = names.read_text(encoding="utf-8").split() if names.is_file() else [str(i) for i in range(count)]
    if len(classes) < count:
        raise UserError(f"{names}: {len(classes)} names, but the labels of {root} go up to {count - 1}")
    return _point_data(str(root), clouds, labels, points, changes, classes, f"{root.name}, HDF5 files")


def _hdf5_file(path: Path) -> tuple[Tensor, Tensor]:
    h5py = _needs("h5py")
    try:
        with h5py.File(path, "r") as file:
            absent = [key for key in ("data", "label") if key not in file]
            if absent:
                raise UserError(f"{path}: no {' and no '.join(absent)} in it; found {', '.join(file) or 'nothing'}")
            for key in ("data", "label"):
                check_announced(path, file[key].size * file[key].dtype.itemsize)
            clouds, labels = np.asarray(file["data"]), np.asarray(file["label"])
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be read as HDF5 ({' '.join(str(error).split())})") from error
    if clouds.ndim != 3 or clouds.shape[2] < 3 or clouds.size == 0 or labels.size != len(clouds):
        raise UserError(f"{path}: data {clouds.shape} and label {labels.shape} are not (N, points, 3) and (N,)")
    if clouds.dtype.kind not in "fiu" or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UserError(
            f"{path}: data must be numbers and labels class indices from 0, got {clouds.dtype} and {labels.dtype}"
            + (f" down to {labels.min()}" if labels.dtype.kind == "i" else "")
        )
    points = _single(clouds[..., :3])
    _check_finite(points, f"{path}: cloud and point")
    return points, torch.from_numpy(labels.astype(np.int64).ravel())


def _point_data(
    name: str,
    clouds: dict[str, Tensor],
    labels: dict[str, Tensor],
    points: int,
    changes: Changes,
    classes: Sequence[str],
    note: str,
) -> Data:
    stored = min(found.shape[1] for found in clouds.values())
    if type(points) is not int or not 1 <= points <= stored:
        raise UserError(
            f"{name}: points must be an integer from 1 to {stored}, the points stored of a cloud; got {points!r}"
        )
    train, test = (PointClouds(clouds[part], labels[part], points, changes) for part in ("train", "test"))
    return Data(
        name=name,
        train=train,
        test=test,
        task=classification(len(classes), classes, samples="point clouds"),
        input_size=(3, points),
        note=f"{note}: {len(train):,} train and {len(test):,} test clouds; networks see {points:,} points of each",
    )
