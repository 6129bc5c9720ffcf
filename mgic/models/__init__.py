"""Every network by name. Importing this package registers the classification networks with timm."""

import fnmatch
from typing import Any

import timm
from torch import nn

from ..errors import UserError, suggest
from . import mg2020, mgnet, mobilenetv3, resnet

_MODULES = (mg2020, mgnet, mobilenetv3, resnet)


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of this library's networks that match a shell pattern, sorted.

    Examples:
        >>> list_models("mgic_resnet?6")
        ['mgic_resnet56']
    """
    names = {name for module in _MODULES for name in module.default_cfgs}
    return sorted(fnmatch.filter(names, pattern))


def describe_model(name: str) -> str:
    """Return the first line of a network's docstring."""
    return (timm.models.model_entrypoint(name).__doc__ or "").strip().split("\n")[0]


def check_model(name: str) -> None:
    """Refuse a name that neither this library nor timm knows, naming the nearest ones."""
    if not timm.is_model(name):
        near = suggest(name, {*list_models(), *timm.list_models()})
        raise UserError(f"there is no model {name!r}{near if 'did you mean' in near else '; mgic models lists all'}")


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Build a network by name: one of `list_models`, or any of timm's.

    Args:
        name: Registered name.
        overrides: Arguments of the network; unknown ones are errors.

    Raises:
        UserError: If the name or an argument is unknown; the message names the nearest ones.

    Examples:
        >>> create_model("mgic_resnet20", group_size=4).num_classes
        10
    """
    check_model(name)
    return timm.create_model(name, **overrides)
