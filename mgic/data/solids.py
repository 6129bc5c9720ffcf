"""Ten families of solids, generated: meshes whose class is in their surface, hardly in their size, place or mass.

Each solid is an outline that is turned around an axis along a circle, a square or a triangle. So a cylinder, a box and a
prism differ in their cross-section alone, a cylinder and a tube in what one sees inside. Solids are stretched and sheared at
random, what is turned away from a random viewer or out of sight is missing, the surface is noisy, the axis leans, and all
headings occur.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

from ..errors import UserError
from .seeds import random_key

Array = np.ndarray[Any, Any]
Random = np.random.RandomState  # the legacy generator: its stream is frozen for ever

VERSION = 1
"""In the name of the folder: to be raised with every change that would draw other solids."""
SIDES = 24
"""Points around a cross-section: a multiple of the corners of all of them."""


def circle(corners: int) -> Array:
    """Return `SIDES` points along a regular polygon in the unit circle, or along the circle (0 corners): ``(24, 2)``."""
    count = corners or SIDES
    angles = 2 * np.pi * (np.arange(count + 1) + 0.5) / count  # half a step: the sides of a square are along the axes
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return _along(points, [SIDES // count] * count)[:-1]


def _along(points: Array, pieces: list[int]) -> Array:
    """Cut each side of a chain of points into equal pieces."""
    sides = [p + np.arange(n)[:, None] / n * (q - p) for p, q, n in zip(points[:-1], points[1:], pieces, strict=True)]
    return np.concatenate([*sides, points[-1:]])


def _outline(*corners: tuple[float, float], longest: float = 0.4) -> Array:
    points = np.array(corners)
    lengths = np.linalg.norm(np.diff(points, axis=0), axis=1)
    return _along(points, [math.ceil(length / longest) for length in lengths])


def _arc(centre: tuple[float, float], radius: float, start: float, stop: float, pieces: int = 12) -> Array:
    angles = np.linspace(start, stop, pieces + 1)
    return np.array(centre) + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def straight(random: Random) -> Array:
    """Outline of a cylinder, from the axis below to the axis above: ``(points, 2)`` of radius and height."""
    return _outline((0, -1), (1, -1), (1, 1), (0, 1))


def pointed(random: Random) -> Array:
    """Outline of a cone; its top may be cut off."""
    return _outline((0, -1), (1, -1), (random.uniform(0.01, 0.25), 1), (0, 1))


def pointed_twice(random: Random) -> Array:
    """Outline of two cones, base to base."""
    return _outline((0, -1), (1, random.uniform(-0.3, 0.3)), (0, 1))


def half_circle(random: Random) -> Array:
    """Outline of a ball."""
    return _arc((0, 0), 1, -np.pi / 2, np.pi / 2)


def stadium(random: Random) -> Array:
    """Outline of a cylinder between two half balls."""
    height = random.uniform(0.4, 1)
    halves = _arc((0, -height), 1, -np.pi / 2, 0, 6), _arc((0, height), 1, 0, np.pi / 2, 6)
    return np.concatenate(halves)


def ring(random: Random) -> Array:
    """Outline of a torus, closed, away from the axis."""
    return _arc((1, 0), random.uniform(0.25, 0.55), -np.pi, np.pi)


def wall(random: Random) -> Array:
    """Outline of a tube, closed, away from the axis."""
    inside = random.uniform(0.45, 0.8)
    return _outline((inside, -1), (1, -1), (1, 1), (inside, 1), (inside, -1))


FAMILIES: dict[str, tuple[Callable[[Random], Array], int]] = {
    "box": (straight, 4),
    "capsule": (stadium, 0),
    "cone": (pointed, 0),
    "cylinder": (straight, 0),
    "ellipsoid": (half_circle, 0),
    "octahedron": (pointed_twice, 4),
    "prism": (straight, 3),
    "pyramid": (pointed, 4),
    "torus": (ring, 0),
    "tube": (wall, 0),
}
"""Outline and corners of the cross-section; 0 is a circle."""


def turn(outline: Array, section: Array) -> tuple[Array, Array]:
    """Return the surface that an outline sweeps along a cross-section.

    Args:
        outline: Radius and height of its points, from below to above where it begins on the axis; else closed.
        section: Points around the unit circle, closed.

    Shape:
        ``(s, 2), (m, 2) -> (V, 3), (F, 3)``: vertices, and triangles whose normals point out of the solid.
    """
    steps, sides = len(outline), len(section)
    flat = outline[:, None, :1] * section
    height = np.broadcast_to(outline[:, None, 1:], (steps, sides, 1))
    vertices = np.concatenate([flat, height], axis=-1).reshape(-1, 3)
    step, side = np.divmod(np.arange((steps - 1) * sides), sides)
    following = (side + 1) % sides
    a, b, c, d = (i * sides + j for i, j in ((step, side), (step, following), (step + 1, following), (step + 1, side)))
    faces = np.concatenate([np.stack([a, b, c], axis=1), np.stack([a, c, d], axis=1)])
    # one vertex for all that are in one place: on the axis, and where a closed outline meets itself
    vertices, places = np.unique(vertices.round(9) + 0.0, axis=0, return_inverse=True)
    faces = places.ravel()[faces]
    return vertices, faces[(faces != np.roll(faces, 1, axis=1)).all(axis=1)]


def lean(random: Random, tilt: float) -> Array:
    """Return a rotation: any heading, then a tilt of at most so many radians towards any side."""
    heading, towards = random.uniform(0, 2 * np.pi, 2)
    angle = random.uniform(0, tilt)

    def about_z(angle: float) -> Array:
        c, s = math.cos(angle), math.sin(angle)
        return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])

    c, s = math.cos(angle), math.sin(angle)
    about_y = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    turned: Array = about_z(towards) @ about_y @ about_z(heading - towards)
    return turned


def solid(
    family: str, random: Random, hidden: float = 0.4, noise: float = 0.015, tilt: float = 30, shear: float = 0.5
) -> tuple[Array, Array]:
    """Draw one solid.

    Args:
        family: One of `FAMILIES`.
        random: Source of all randomness.
        hidden: Largest share of the surface that is turned away from a random viewer and so missing; and then, of what is
            left, the largest share that is out of sight on one side of a random plane.
        noise: Largest standard deviation of the vertices' noise; the solid reaches from -1 to 1.
        tilt: Largest angle of its axis to the vertical, in degrees.
        shear: Largest shift of one axis by another.

    Shape:
        ``(V, 3), (F, 3)``: vertices and triangles.
    """
    outline, corners = FAMILIES[family]
    vertices, faces = turn(outline(random), circle(corners))
    vertices = vertices * np.exp(random.uniform(-math.log(3), 0, 3))  # one third to one, along each axis
    vertices = vertices + vertices @ np.triu(random.uniform(-shear, shear, (3, 3)), 1)
    vertices /= np.abs(vertices).max()
    for of_faces in (_directions, _centres):
        faces = _without_lowest(faces, vertices, of_faces(vertices[faces]) @ random.standard_normal(3), random, hidden)
    vertices = vertices + random.uniform(0, noise) * random.standard_normal(vertices.shape)
    return vertices @ lean(random, math.radians(tilt)).T, faces


def _directions(triangles: Array) -> Array:
    """Unit normals of triangles, ``(F, 3, 3) -> (F, 3)``."""
    normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    unit: Array = normals / np.linalg.norm(normals, axis=1, keepdims=True)
    return unit


def _centres(triangles: Array) -> Array:
    centres: Array = triangles.mean(axis=1)
    return centres


def _without_lowest(faces: Array, vertices: Array, height: Array, random: Random, hidden: float) -> Array:
    """Leave out the faces of least height, up to a random share of the area."""
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    areas = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    order = np.argsort(height, kind="stable")
    seen = order[np.cumsum(areas[order]) >= random.uniform(0, hidden) * areas.sum()]
    left: Array = faces[np.sort(seen)]
    return left


def write_off(path: Path, vertices: Array, faces: Array) -> None:
    """Write a mesh of triangles as an OFF file."""
    lines = ["OFF", f"{len(vertices)} {len(faces)} 0"]
    lines += [f"{x:.4f} {y:.4f} {z:.4f}" for x, y, z in vertices.tolist()]
    lines += [f"3 {i} {j} {k}" for i, j, k in faces.tolist()]
    path.write_text("\n".join(lines) + "\n", encoding="ascii")


def write_solids(root: Path, train: int, test: int) -> Path:
    """Write ``train`` and ``test`` solids of each family as OFF files, unless they are there; return their folder.

    The layout is ModelNet's, ``FAMILY/train/FAMILY_0001.off``. The folder appears at once, when all of it is written.

    Args:
        root: Where the folder goes.
        train: Training solids of each family.
        test: Test solids of each family.

    Raises:
        UserError: The folder cannot be written.
    """
    folder = root / f"solids-v{VERSION}-{train}-{test}"
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        unfinished = Path(mkdtemp(prefix=f".{folder.name}-", dir=root))
        for family in FAMILIES:
            for part, count in (("train", train), ("test", test)):
                (unfinished / family / part).mkdir(parents=True)
                for i in range(1, count + 1):
                    random = Random(random_key("solid", family, part, i) % 2**32)
                    write_off(unfinished / family / part / f"{family}_{i:04d}.off", *solid(family, random))
        try:
            os.replace(unfinished, folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(unfinished)  # another process was faster; its solids are the same
    except OSError as error:
        raise UserError(
            f"solids: cannot be written to {folder} ({error.strerror}); --root names another place"
        ) from error
    return folder
