"""Every network by name. Importing this package registers the classification networks with timm."""

import fnmatch
from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from ..errors import UserError, suggest
from . import functions, mg2020, mgnet, mobilenetv3, points, resnet, segmentation
from .classifier import known_arguments

_CLASSIFIERS = (mg2020, mgnet, mobilenetv3, resnet)
_OTHERS = {make.__name__: make for module in (functions, points, segmentation) for make in module.NETWORKS}
"""Networks by name that are not image classifiers, so not for timm's registry: ``NETWORKS`` of their modules."""


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of this library's networks that match a shell pattern, sorted.

    Examples:
        >>> list_models("mgic_resnet?6")
        ['mgic_resnet56']
    """
    names = {name for module in _CLASSIFIERS for name in module.default_cfgs}
    return sorted(fnmatch.filter(names | _OTHERS.keys(), pattern))


def describe_model(name: str) -> str:
    """Return the first line of a network's docstring."""
    make = _OTHERS.get(name) or timm.models.model_entrypoint(name)
    return (make.__doc__ or "").strip().split("\n")[0]


def check_model(name: str) -> None:
    """Refuse a name that neither this library nor timm knows, naming the nearest ones."""
    if name not in _OTHERS and not timm.is_model(name):
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
    if name not in _OTHERS:
        return timm.create_model(name, **overrides)
    known = known_arguments(_OTHERS[name], name, overrides)
    model: Any = _OTHERS[name](**overrides)
    model.arguments = known  # as of the classifiers
    return model  # type: ignore[no-any-return]


def build_model(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a network as `create_model` does; whatever a wrong value of an argument breaks inside, it is the user's error.

    Raises:
        UserError: If the network cannot be built with these arguments.
    """
    broken = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, AssertionError, RuntimeError)
    try:
        return create_model(name, **arguments)
    except UserError:
        raise
    except broken as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{name} cannot be built with {dict(arguments)} ({reason})") from error
