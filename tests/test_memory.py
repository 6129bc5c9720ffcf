"""Freed memory is kept for the next step where the command line trains, and nowhere else."""

import os
import platform
import subprocess
import sys

import pytest

from mgic import cli_train
from mgic.training.memory import keep_freed_memory
from mgic.training.recipes import RECIPES

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it asks glibc, and this C library is another")

FAULTS = """
import resource
import torch
from mgic.training.memory import keep_freed_memory
torch.set_num_threads(1)
KEEP
for step in range(60):
    if step == 50:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    one = torch.ones(48 << 18)
    other = one + 1
    del one, other
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: str) -> int:
    """Pages the system gives a process for two tensors of 48 MiB made and freed ten times, once the heap has settled."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.replace("KEEP", keep)], check=True, capture_output=True, text=True, env=plain()
    )
    return int(done.stdout)


def plain():
    return {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}


@glibc
def test_large_tensors_made_again_get_the_pages_they_had():
    given_back = faults("")
    assert given_back > 100, "the system counts the pages it gives"
    assert faults("assert keep_freed_memory()") < given_back / 20


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()


def test_training_by_command_keeps_memory(monkeypatch):
    asked = []
    monkeypatch.setattr("mgic.training.memory.keep_freed_memory", lambda: asked.append(True))
    cli_train.train_seeds(RECIPES["digits"], None, [], [], None, reuse=False)
    assert asked == [True]
