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
    "isometric_pair": "transfer",
    "sparse_random_pair": "transfer",
    "BasicBlock": "blocks",
    "Bottleneck": "blocks",
    "PreActBasicBlock": "blocks",
    "PreActBottleneck": "blocks",
    "LinearBlock": "blocks",
    "GroupedLinear": "blocks",
    "MGICBlock": "cycle",
    "MGICConv": "cycle",
    "MGICLinear": "cycle",
    "zero_scale": "blocks",
    "Scheme": "cycle",
    "ChannelChange": "cycle",
    "AdditiveChannelChange": "cycle",
    "additive": "cycle",
    "multiplicative": "cycle",
    "tau_correction": "cycle",
    "plain_prolongation": "cycle",
    "scaled_correction": "cycle",
    "frozen": "cycle",
    "SmoothingStep": "smoothing",
    "Smoothing": "smoothing",
    "SmoothingInChannels": "smoothing",
    "FullApproximation": "smoothing",
    "ResidualOnly": "smoothing",
    "create_model": "models",
    "list_models": "models",
    "Conversion": "conversion_report",
    "ConversionReport": "conversion_report",
    "convert": "conversion",
    "convert_": "conversion",
    "rebuild_": "surgery",
    "Fit": "fitting",
    "fit_convolution_": "fitting",
    "warm_start_": "fitting",
    "Cost": "counting",
    "Memory": "counting",
    "memory": "counting",
    "cost": "counting",
    "accelerate": "runtime.accelerate",
    "export": "exporting",
    "UserError": "errors",
    "ChannelConfigError": "errors",
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604  (they are strings)

if TYPE_CHECKING:
    from .blocks import BasicBlock as BasicBlock
    from .blocks import Bottleneck as Bottleneck
    from .blocks import GroupedLinear as GroupedLinear
    from .blocks import LinearBlock as LinearBlock
    from .blocks import PreActBasicBlock as PreActBasicBlock
    from .blocks import PreActBottleneck as PreActBottleneck
    from .blocks import zero_scale as zero_scale
    from .conversion import convert as convert
    from .conversion import convert_ as convert_
    from .conversion_report import Conversion as Conversion
    from .conversion_report import ConversionReport as ConversionReport
    from .counting import Cost as Cost
    from .counting import Memory as Memory
    from .counting import cost as cost
    from .counting import memory as memory
    from .cycle import AdditiveChannelChange as AdditiveChannelChange
    from .cycle import ChannelChange as ChannelChange
    from .cycle import MGICBlock as MGICBlock
    from .cycle import MGICConv as MGICConv
    from .cycle import MGICLinear as MGICLinear
    from .cycle import Scheme as Scheme
    from .cycle import additive as additive
    from .cycle import frozen as frozen
    from .cycle import multiplicative as multiplicative
    from .cycle import plain_prolongation as plain_prolongation
    from .cycle import scaled_correction as scaled_correction
    from .cycle import tau_correction as tau_correction
    from .errors import ChannelConfigError as ChannelConfigError
    from .errors import UserError as UserError
    from .exporting import export as export
    from .fitting import Fit as Fit
    from .fitting import fit_convolution_ as fit_convolution_
    from .fitting import warm_start_ as warm_start_
    from .hierarchy import Level as Level
    from .hierarchy import describe_levels as describe_levels
    from .hierarchy import fit_group_size as fit_group_size
    from .hierarchy import plan_levels as plan_levels
    from .models import create_model as create_model
    from .models import list_models as list_models
    from .runtime.accelerate import accelerate as accelerate
    from .smoothing import FullApproximation as FullApproximation
    from .smoothing import ResidualOnly as ResidualOnly
    from .smoothing import Smoothing as Smoothing
    from .smoothing import SmoothingInChannels as SmoothingInChannels
    from .smoothing import SmoothingStep as SmoothingStep
    from .surgery import rebuild_ as rebuild_
    from .transfer import Prolongation as Prolongation
    from .transfer import Restriction as Restriction
    from .transfer import averaging_pair as averaging_pair
    from .transfer import isometric_pair as isometric_pair
    from .transfer import sparse_random_pair as sparse_random_pair


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mgic' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
