"""Multigrid in channels: convolutional networks whose cost grows linearly with their width.

The names below are imported on first use, so ``import mgic`` is quick: it loads neither timm nor Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Level": "hierarchy",
    "plan_levels": "hierarchy",
    "fit_group_size": "hierarchy",
    "describe_levels": "hierarchy",
    "Restriction": "transfer",
    "Prolongation": "transfer",
    "averaging_pair": "transfer",
    "sparse_random_pair": "transfer",
    "BasicBlock": "blocks",
    "Bottleneck": "blocks",
    "PreActBasicBlock": "blocks",
    "PreActBottleneck": "blocks",
    "LinearBlock": "blocks",
    "GroupedLinear": "blocks",
    "MGICBlock": "cycle",
    "MGICLinear": "cycle",
    "Scheme": "cycle",
    "ChannelChange": "cycle",
    "AdditiveChannelChange": "cycle",
    "additive": "cycle",
    "multiplicative": "cycle",
    "tau_correction": "cycle",
    "plain_prolongation": "cycle",
    "scaled_correction": "cycle",
    "frozen": "cycle",
    "create_model": "models",
    "list_models": "models",
    "Cost": "cost",
    "cost": "cost",
    "UserError": "errors",
    "ChannelConfigError": "errors",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from .blocks import (
        BasicBlock,
        Bottleneck,
        GroupedLinear,
        LinearBlock,
        PreActBasicBlock,
        PreActBottleneck,
    )
    from .cost import Cost, cost
    from .cycle import (
        AdditiveChannelChange,
        ChannelChange,
        MGICBlock,
        MGICLinear,
        Scheme,
        additive,
        frozen,
        multiplicative,
        plain_prolongation,
        scaled_correction,
        tau_correction,
    )
    from .errors import ChannelConfigError, UserError
    from .hierarchy import Level, describe_levels, fit_group_size, plan_levels
    from .models import create_model, list_models
    from .transfer import Prolongation, Restriction, averaging_pair, sparse_random_pair


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mgic' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value  # the name wins over a submodule of the same name (cost)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
