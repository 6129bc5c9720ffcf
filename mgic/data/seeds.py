"""Where random numbers come from: each is a function of its purpose and its place, never of what was drawn before."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def random_key(*parts: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. ``random_key("order", seed, epoch)``: nearby parts give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def epoch_order(length: int, seed: int, epoch: int) -> Tensor:
    """The order in which epoch ``epoch`` visits ``length`` samples: ``(length,)`` int64, a function of its arguments."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(random_key("order", seed, epoch)))
