"""Shared settings: one thread a worker, a fixed seed for every test, and the count of the faults survived."""

import json
import os
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Trials:
    """How often a test of the fault table (``test_r7_...``) tried its fault. Without a word it is once.

    Attributes:
        full: ``make faults`` is running: the table's whole counts. ``make test`` runs a short version of each.
    """

    def __init__(self) -> None:
        self.full = os.environ.get("MGIC_FAULTS") == "full"
        self.passed = 0
        self.worst: dict[str, float] = {}

    def passes(self, count: int = 1, **worst: float) -> None:
        """Note ``count`` passed trials, and the largest value seen of a named quantity, its unit in the name."""
        self.passed += count
        for name, value in worst.items():
            self.worst[name] = max(value, self.worst.get(name, value))


@pytest.fixture
def trials(request):
    counted = Trials()
    yield counted
    request.node.user_properties.append(("trials", {"passed": counted.passed, "worst": counted.worst}))


def pytest_addoption(parser):
    parser.addoption("--faults", type=Path, default=None, help="write what each test_rN_ tried to this JSON file")


def pytest_configure(config):
    if config.getoption("--faults") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_FaultCounts(config.getoption("--faults")), "fault-counts")


class _FaultCounts:
    """Sums trials, passes and seconds over all tests of an id; runs where the reports arrive, not in the workers."""

    def __init__(self, path: Path) -> None:
        self.path, self.seconds, self.outcomes = path, defaultdict(float), {}

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.rpartition("::")[2]
        found = re.match(r"test_(r\d+)_", name)
        if not found:
            return
        key = (found[1].upper(), report.nodeid)
        self.seconds[key] += report.duration
        if report.when == "teardown" and not report.failed:
            if key in self.outcomes:
                self.outcomes[key].update(dict(report.user_properties).get("trials", {}))
        elif report.when == "call" or not report.passed:
            reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
            self.outcomes[key] = {"outcome": report.outcome, "reason": reason}

    def pytest_sessionfinish(self):
        rows = [{"id": id_, "test": test, "seconds": self.seconds[id_, test], **found}
                for (id_, test), found in sorted(self.outcomes.items())]  # fmt: skip
        self.path.write_text(json.dumps(rows, indent=1))
