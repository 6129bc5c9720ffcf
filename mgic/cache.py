"""Where what is made once on a machine is kept: the compiled engine, the choices of kernels. Standard library only."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder: ``MGIC_CACHE``, or ``mgic`` in the user's cache folder."""
    base = os.environ.get("MGIC_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mgic"
