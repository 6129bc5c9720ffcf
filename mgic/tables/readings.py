"""What else a paper's text can mean, and conventions found by fitting: networks beside a row's own, never its count."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.layers import SqueezeExcite
from torch import Tensor, nn

from ..blocks import Layer
from ..cycle import Scheme
from ..hierarchy import Level, plan_levels
from ..models.mg2020 import MG2020
from ..models.mobilenetv3 import round_width
from ..models.resnet import MGIC_RESNET
from .networks import Network, named_network
from .printed import Values


def row_readings(name: str | None, overrides: Values, row: Values) -> Iterator[tuple[str, Network]]:
    """Yield what else a row can mean: what that reading is called, and its network."""
    for label, more in READINGS.get(str(name), ()):
        yield label, named_network(str(name), {**overrides, **more(overrides.get("group_size"))})
    if "overrides" in (should_be := row.get("should_be", {})):
        changed = {key: value for key, value in should_be["overrides"].items() if value != overrides[key]}
        words = ", ".join(f"{key}={value}" for key, value in changed.items())
        yield f"misprint read as {words}", named_network(str(name), should_be["overrides"])


class _Uncounted(nn.Module):
    """A transfer of ``weights`` parameters whose multiply-adds nobody counts."""

    def __init__(self, weights: int, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(weights))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)


def _uncounted_pair(masked: bool, channels: int, group_size: int) -> tuple[nn.Module, nn.Module]:
    """R and P as the MACs of print seem to see them; ``masked``: each stored dense, with a mask of the same size."""
    weights = channels * channels if masked else channels * group_size // 2
    halve: Callable[[Tensor], Tensor] = lambda x: x[:, ::2]  # noqa: E731
    return _Uncounted(weights, halve), _Uncounted(weights, partial(torch.repeat_interleave, repeats=2, dim=1))


Reading = tuple[str, Callable[[Any], dict[str, Any]]]
"""What it is called, and ``s_g -> overrides``; dense networks have no ``s_g``."""

_NO_COARSENING: Reading = ("text: no coarsening of blocks that are no wider than s_c", lambda s_g: {"scheme": Scheme()})
_POOL_FIRST: Reading = (
    "the same function for less: the mean before the gate's convolution",
    lambda s_g: {"pool_first": True},
)


def _any_two_groups(channels: int, group_size: int, coarsest: int, hidden: int | None) -> list[Level]:
    """Algorithm 1's number of levels; at least two groups, as few more as needed to divide both widths."""
    inner = channels if hidden is None else hidden
    coarsenings, levels = max(math.floor(math.log2(min(channels, inner) / coarsest)), 0), []
    for _ in range(coarsenings):
        common = math.gcd(channels, inner)
        groups = max(g for g in range(1, max(min(channels, inner) // group_size, 2) + 1) if common % g == 0)
        levels.append(Level(channels, groups, inner, math.gcd(groups, channels // 2)))
        channels, inner = channels // 2, inner // 2
    return [*levels, Level(channels, 1, inner, 0)]


def _finest_attention(hidden: int) -> Layer:
    """Squeeze-and-excitation with a quarter inside, as MobileNetV3 has it, on a block's finest level alone."""

    def attention(channels: int) -> nn.Module:
        if channels != hidden:
            return nn.Identity()
        return SqueezeExcite(channels, rd_channels=round_width(channels / 4), gate_layer="hard_sigmoid")

    return attention


_FITTED_SEGMENTATION: Reading = (
    "fitted to print: Algorithm 1's levels, other groups, larger attention on the finest level alone",
    lambda s_g: {"scheme": Scheme(plan=_any_two_groups), "attention": _finest_attention},
)
READINGS: dict[str, tuple[Reading, ...]] = {
    "mgic_resnet50": (
        (
            "text: R and P in groups of s_g channels",
            lambda s_g: {"scheme": Scheme(plan=partial(plan_levels, minimum=1, transfer_group_size=s_g))},
        ),
        ("Table 4: with its second convolution, 3x3 at 112 x 112", lambda s_g: {"extra_conv": True}),
        _NO_COARSENING,
        (
            "fitted to print: R and P left out of the MACs",
            lambda s_g: {"scheme": replace(MGIC_RESNET, transfer=partial(_uncounted_pair, False))},
        ),
    ),
    "mgic_resnet56": (
        _NO_COARSENING,
        (
            "fitted to print: R and P stored dense with masks, and left out of the MACs",
            lambda s_g: {"scheme": replace(MGIC_RESNET, transfer=partial(_uncounted_pair, True))},
        ),
    ),
    "mg_mobilenetv2": (("section 4.1: random R and P", lambda s_g: {"scheme": MG2020}),),
    "dgcnn": (("fitted to print: the edge convolution on one edge a point", lambda s_g: {"k": 1}),),
    "lraspp_mobilenetv3_small": (_POOL_FIRST,),
    "lraspp_mobilenetv3_large": (_POOL_FIRST,),
    "mgic_lraspp_small": (_FITTED_SEGMENTATION,),
    "mgic_lraspp_large": (_FITTED_SEGMENTATION,),
}
"""By model: what else its text can mean, and conventions found by fitting; never the count."""
