"""Pictures of the report at three window sizes, for the documentation; needs Chromium.

python benchmarks/report_pictures.py
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mgic.cli import main as run

ROOT = Path(__file__).parents[1]
SIZES = {"wide": (1280, 900), "medium": (820, 900), "phone": (390, 844)}
"""Windows, in pixels."""
NAMES = ("chromium", "chromium-browser", "google-chrome")


def main() -> int:
    """Write the report and take its pictures."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        sys.stderr.write(f"no browser: none of {', '.join(NAMES)} is installed (Debian: chromium)\n")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        if status := run(["report", "--results", str(ROOT / "results"), "--out", str(page)]):
            return status
        for name, (width, height) in SIZES.items():
            picture = ROOT / "docs" / f"report-{name}.png"
            flags = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},{height}"]
            command = [browser, *flags, f"--screenshot={picture}", page.as_uri()]
            subprocess.run(command, check=True, timeout=120, capture_output=True)  # it says much that is of no concern
    return 0


if __name__ == "__main__":
    sys.exit(main())
