"""``python -m mgic`` is the command ``mgic``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
