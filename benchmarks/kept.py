"""Finished parts of a measurement, kept in a small file beside its record, so that the same command goes on."""

import contextlib
import json
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mgic.training.files import write_json


def fingerprint(*files: Path) -> int:
    """A number that changes with the content of these files."""
    return zlib.crc32(b"".join(file.read_bytes() for file in sorted(files)))


class OutOfTime(Exception):  # noqa: N818  (nothing went wrong)
    """A step used its minutes; what it did is kept, and the same command continues it."""


class Kept:
    """The parts of one measurement: those that are there already, and time for some more.

    Args:
        record: Where the record will be; the parts are in the file ``NAME.json.part`` beside it.
        origin: What the parts must have in common, plain JSON: parts of another origin are given up, and a line says so.
        seconds: From now on; a part begins only while there is time for it.
        say: Takes that line.
    """

    def __init__(self, record: Path, origin: dict, seconds: float = float("inf"), say: Callable[[str], Any] = print):
        self.path, self.origin, self.parts = record.with_name(f"{record.name}.part"), origin, {}
        self.began, self.seconds = time.perf_counter(), seconds
        if not self.path.exists():
            return
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged file is like one of another origin
            found = json.loads(self.path.read_text())
            if found["origin"] == origin:
                self.parts = dict(found["parts"])
                return
        say(f"{self.path.name}: of another machine or code, or damaged: begun again")

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.perf_counter() - self.began)

    def once(self, key: str, measure: Callable[[], Any], needs: float = 0.0) -> Any:
        """What ``measure()`` returned, plain JSON: now, or when it was first asked for.

        Raises:
            OutOfTime: It is not there, and fewer than ``needs`` seconds are left.
        """
        if key not in self.parts:
            if self.left < needs or self.left <= 0:
                raise OutOfTime(f"time is up after {len(self.parts)} part(s); the same command continues it")
            self.parts[key] = measure()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"origin": self.origin, "parts": self.parts})
        return self.parts[key]

    def close(self) -> None:
        """The record is there: the parts are no longer needed."""
        self.path.unlink(missing_ok=True)
