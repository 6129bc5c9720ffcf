"""Every fault of the table at its full number of trials: one record, one page.

    make faults

The trials are the tests whose names begin with a fault's id (``test_r7_...``), run with ``MGIC_FAULTS=full``; ``make test``
runs the same tests at fewer trials. An id without a test, or with a trial that failed, fails the command.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from mgic.training import make_record, write_record

ROOT = Path(__file__).parents[1]
FAULTS = {
    "R1": (
        "kill -9 at any time in training",
        "the same command goes on; it ends bit for bit as if nothing had happened",
    ),
    "R2": ("kill -9 while a checkpoint is written", "no file under a final name is incomplete; nothing is left over"),
    "R3": ("kill -9 between any two operations on files", "the old or the new checkpoint is found, whole"),
    "R4": ("truncated, empty or changed checkpoint", "detected by its hash, named, the one before it is used"),
    "R5": ("hostile pickle, in any file that is opened", "refused by every entry point; nothing is executed"),
    "R6": ("hostile names and configurations", "refused; nothing is written outside the run's folder"),
    "R7": ("disk full", "one line with bytes needed and free; the old checkpoint stays byte for byte"),
    "R8": ("folder that cannot be written", "said before training begins"),
    "R9": ("NaN or infinity in loss or gradient", "the step is skipped, three in a row stop; never saved"),
    "R10": ("broken and odd images", "the file is named, or skipped and counted, as asked"),
    "R11": ("missing or incomplete data set", "what is expected, what was found, how to get it"),
    "R12": ("labels that do not fit", "found before training; names the label and the classes"),
    "R13": ("weights of another configuration", "differing keys with shapes, and the field that explains them"),
    "R14": ("group size that does not divide the width", "repaired by a documented rule, or one clear error"),
    "R15": ("widths at, below or near the coarsest", "the plain block, exactly, or a documented repair"),
    "R16": (
        "a network that does not couple all channels",
        "every output channel of every block depends on every input",
    ),
    "R17": ("batch of one", "works in eval mode; in training an error where a norm has one value"),
    "R18": ("empty batch, empty or too small image", "an empty result, or an error with the smallest size"),
    "R19": ("odd, wide and large images, any number of channels", "works; segmentation has the input's size"),
    "R20": ("views: channels last, strided, expanded", "the same output"),
    "R21": ("half, bfloat16, double, autocast, integers", "close to float32, or an error that names the fix"),
    "R22": ("NaN, infinity, 1e30 in the input", "passed on; no crash"),
    "R23": ("data worker killed or hanging", "names the samples and likely causes; no process is left"),
    "R24": ("several runs in one folder", "exactly one runs; a dead run's lock is taken over"),
    "R25": ("resumed with other processes or workers", "the same samples in the same global batches"),
    "R26": ("one process of several dies", "all end; the checkpoint is valid"),
    "R27": ("SIGTERM, SIGINT", "checkpoint, status and exit code; the same command goes on"),
    "R28": ("clock, locale, odd paths, no home, no TMPDIR", "no effect"),
    "R29": ("checkpoint of another release", "loads, with the same outputs; versions are named"),
    "R30": ("exported file that computes something else", "found and deleted; the command fails"),
    "R31": (
        "conversion of networks it does not know",
        "every layer replaced or named with the reason; original unchanged",
    ),
    "R32": ("optional dependency missing", "one line that names the extra; the import stays quick"),
    "R33": ("no network, half a download, wrong hash", "clear error, or the copy at hand; no storm of retries"),
    "R34": ("weights that layers share, in safetensors", "saved once and shared again when loaded"),
    "R35": ("the same run again", "bit for bit equal"),
    "R36": ("a long run", "memory and file descriptors stay flat"),
}


def run_tests(arguments: list[str]) -> list[dict[str, Any]]:
    """What the tests of the fault table counted, a row a test."""
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.json"
        chosen = " or ".join(f"test_{id_.lower()}_" for id_ in FAULTS)
        command = [sys.executable, "-m", "pytest", "tests", "-k", chosen, "--faults", str(counts), *arguments]
        environment = {**os.environ, "MGIC_FAULTS": "full", "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, check=False)
        if not counts.exists():
            raise SystemExit("pytest did not run: see above")
        return json.loads(counts.read_text())


def summed(tests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By id: trials, passes, seconds and worst case, summed over its tests."""
    rows: dict[str, dict[str, Any]] = defaultdict(
        lambda: {"trials": 0, "passes": 0, "seconds": 0.0, "worst": {}, "notes": []}
    )
    for test in tests:
        row = rows[test["id"]]
        passed, ok = test.get("passed", 0), test["outcome"] == "passed"
        if test["outcome"] == "skipped":
            row["notes"].append(f"skipped: {test['reason']}")
            continue
        row["passes"] += max(passed, 1) if ok else passed
        row["trials"] += max(passed, 1) if ok else passed + 1
        row["seconds"] += test["seconds"]
        for name, value in test.get("worst", {}).items():
            row["worst"][name] = max(value, row["worst"].get(name, value))
    return {id_: rows[id_] for id_ in FAULTS if rows[id_]["trials"]}


def page(rows: dict[str, dict[str, Any]]) -> str:
    """The table of the documentation."""
    columns = ("id", "fault", "what happens", "trials", "passes", "s", "worst case")
    lines = [
        (
            *(id_, *FAULTS[id_], f"{row['trials']:,}", f"{row['passes']:,}", f"{row['seconds']:.0f}"),
            ", ".join(f"{name.replace('_', ' ')} {value:,.4g}" for name, value in row["worst"].items()),
        )
        for id_, row in rows.items()
    ]
    rule = ["---:" if name in ("trials", "passes", "s") else "---" for name in columns]
    table = "\n".join(f"| {' | '.join(line)} |" for line in (columns, rule, *lines))
    return f"""# Faults it survives

`make faults` tried each fault so often; `make test` tries each of them less often. The record is `results/faults.json`.

{table}

The bounds of R20 and R21 are relative: 1e-5 for views, 1e-2 for float16 and 2e-2 for bfloat16. Where rounding alone moves a
network's output further than that, the bound is four times as far: MG-MobileNetV2, untrained and with perturbed norms, is
such a network.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=ROOT / "results" / "faults.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "faults.md")
    parser.add_argument("pytest", nargs="*", help="passed on to pytest, after --")
    args = parser.parse_args()
    began = time.perf_counter()
    tests = run_tests(args.pytest or ["-n", "2", "--dist", "worksteal"])
    rows, seconds = summed(tests), time.perf_counter() - began
    totals = {name: [float(sum(row[name] for row in rows.values()))] for name in ("trials", "passes")}
    record = make_record("make faults", "generated", [0], {**totals, "seconds": [seconds]}, faults=rows)
    write_record(args.record, record)
    args.page.write_text(page(rows))
    broken = [
        f"{id_}: {row['passes']} of {row['trials']} passed"
        for id_, row in rows.items()
        if row["passes"] < row["trials"]
    ]
    broken += [f"{id_}: no test" for id_ in FAULTS if id_ not in rows]
    print(f"{len(rows)} of {len(FAULTS)} faults, {seconds:.0f} s; {args.record}, {args.page}")
    raise SystemExit("\n".join(broken) if broken else 0)


if __name__ == "__main__":
    main()
