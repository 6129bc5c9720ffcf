"""Compile the engine on first use, keep it in a cache, load it.

The library is built by the C++ compiler of the machine (``CXX``, or the first of ``c++``, ``g++``, ``clang++``), once for
each instruction set that is used, into a file named after everything it depends on. Processes that start together may both
compile; each writes its own file and renames it into place, so none ever sees half a library.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from ..cache import cache_folder
from .capture import EngineUnavailable

SOURCE = Path(__file__).with_name("engine.cpp")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-pthread", "-Wno-psabi")
INSTRUCTION_SETS: dict[str, tuple[int, tuple[str, ...], frozenset[str]]] = {
    "avx512": (
        16,
        ("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma"),
        frozenset({"avx512f", "avx512vl", "avx512dq", "avx512bw", "fma"}),
    ),
    "avx2": (8, ("-mavx2", "-mfma"), frozenset({"avx2", "fma"})),
    "portable": (4, (), frozenset()),
}
"""Name -> (floats in a vector, compiler flags, what the processor must have), best first."""


def instruction_set() -> str:
    """Return the best instruction set of this processor, or the one the variable ``MGIC_ISA`` names.

    Raises:
        EngineUnavailable: ``MGIC_ISA`` is no instruction set, or not one of this processor.
    """
    has = _processor_flags()
    usable = [name for name, (_, _, needs) in INSTRUCTION_SETS.items() if needs <= has]
    wanted = os.environ.get("MGIC_ISA", "")
    if wanted and wanted not in usable:
        raise EngineUnavailable(
            f"MGIC_ISA={wanted!r} cannot be used on this processor: choose from {', '.join(usable)}"
        )
    return wanted or usable[0]


@functools.cache
def _processor_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux: the portable engine runs everywhere
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())


def compiler() -> str:
    """Return the path of the C++ compiler.

    Raises:
        EngineUnavailable: There is none.
    """
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)[0]] if named else ["c++", "g++", "clang++"]
    for candidate in candidates:
        found = shutil.which(candidate)
        if found:
            return found
    raise EngineUnavailable(
        f"no C++ compiler was found ({', '.join(candidates)}); install one (g++ or clang++) or set CXX"
    )


def build(name: str, extra_flags: tuple[str, ...] = ()) -> Path:
    """Return the compiled library of an instruction set; compile it if the cache has none.

    Args:
        name: A key of `INSTRUCTION_SETS`.
        extra_flags: Further compiler flags, for sanitizers.

    Raises:
        EngineUnavailable: There is no compiler, it fails, or the cache cannot be written.
    """
    lanes, flags, _ = INSTRUCTION_SETS[name]
    program = compiler()
    command = [program, *FLAGS, *flags, *extra_flags, f"-DLANES={lanes}", str(SOURCE)]
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    key = hashlib.sha256(repr((SOURCE.read_bytes(), command[1:-1], version, platform.machine())).encode()).hexdigest()
    library = cache_folder() / f"engine-{name}-{key[:20]}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
            made = Path(folder) / library.name
            result = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
            if result.returncode:
                reason = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr[-200:])
                raise EngineUnavailable(f"{program} could not compile the engine for {name}: {reason}")
            os.replace(made, library)
    except OSError as error:
        raise EngineUnavailable(
            f"the engine could not be stored in {library.parent} ({error.strerror}); set MGIC_CACHE to another folder"
        ) from error
    return library


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """Return the library of an instruction set, loaded.

    Raises:
        EngineUnavailable: It cannot be built or loaded.
    """
    library = build(name)
    try:
        engine = ctypes.CDLL(str(library))
    except OSError as error:
        raise EngineUnavailable(f"the compiled engine {library} cannot be loaded ({error}); delete it") from error
    pointer = ctypes.c_void_p
    engine.mgic_run.argtypes = [pointer, ctypes.c_int, pointer, pointer, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    engine.mgic_run.restype = None
    engine.mgic_profile.argtypes = [pointer, ctypes.c_int, pointer, pointer, pointer]
    engine.mgic_profile.restype = None
    engine.mgic_op_size.restype = engine.mgic_step_size.restype = ctypes.c_int64
    return engine


def main() -> None:
    """Build the engine for this processor, as ``make`` does once; say in a line what came of it."""
    try:
        print(f"engine: {build(instruction_set())}")  # noqa: T201
    except EngineUnavailable as error:
        print(f"no engine: {error}; everything else works without it")  # noqa: T201
