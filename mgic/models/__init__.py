"""Every network by name. Importing this package registers the classification networks with timm."""

import fnmatch
import pickle
from collections.abc import Mapping
from typing import Any

import timm
import torchvision
from torch import nn

from ..errors import BROKEN, UserError, suggest
from . import functions, mg2020, mgnet, mobilenetv3, points, resnet, segmentation
from .classifier import known_arguments
from .parts import with_parts
from .spelling import TORCHVISION

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
    """Refuse a name that neither this library nor timm nor torchvision knows, naming the nearest ones."""
    if name.startswith(TORCHVISION):
        names, known = torchvision.models.list_models(), name.removeprefix(TORCHVISION)
        if known not in names:
            raise UserError(f"torchvision has no network {known!r}{suggest(known, names)}")
        return
    if name not in _OTHERS and not timm.is_model(name):
        near = suggest(name, {*list_models(), *timm.list_models()})
        raise UserError(f"there is no model {name!r}{near if 'did you mean' in near else '; mgic models lists all'}")


_OUTSIDE = (
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),  # timm's
    *("weights", "weights_backbone"),  # torchvision's
)


def check_strange(name: object, arguments: object, source: str) -> None:
    """Refuse a network of a stranger's file that is none of the known, or with arguments that open files or connections.

    Args:
        name: What the file says is the network's name.
        arguments: What the file says are its arguments.
        source: The file, for the message.

    Raises:
        UserError: It is one of these.
    """
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise UserError(f"{source}: names no network with arguments, but {name!r} with {arguments!r}")
    check_model(name)
    outside = [key for key in _OUTSIDE if arguments.get(key)]
    if outside:
        raise UserError(
            f"{source}: {name} with {outside[0]}={arguments[outside[0]]!r} would open other files or the network; "
            "a file of others may not ask for that"
        )


def create_model(name: str, *, conversion: Mapping[str, Any] | None = None, **overrides: Any) -> nn.Module:
    """Build a network by name: one of `list_models`, any of timm's, or one of torchvision's (``torchvision:resnet50``).

    Args:
        name: Registered name.
        conversion: Put multigrid into it: the fields of `mgic.Conversion`, or the ``layers`` of a report of `mgic.convert`.
        overrides: Arguments of the network; unknown ones are errors.

    Raises:
        UserError: If the name or an argument is unknown; the message names the nearest ones.

    Examples:
        >>> create_model("mgic_resnet20", group_size=4).num_classes
        10
    """
    if conversion is not None:
        return _converted(create_model(name, **overrides), conversion)
    check_model(name)
    if name.startswith(TORCHVISION):
        return _torchvision(name.removeprefix(TORCHVISION), overrides)
    if name not in _OTHERS:
        return timm.create_model(name, **overrides)
    known = known_arguments(_OTHERS[name], name, overrides)
    model: Any = _OTHERS[name](**with_parts(_OTHERS[name], overrides))
    model.arguments = known  # as of the classifiers
    return model  # type: ignore[no-any-return]


def _torchvision(name: str, overrides: Mapping[str, Any]) -> nn.Module:
    in_chans = overrides.get("in_chans", 3)
    if in_chans != 3:
        raise UserError(
            f"torchvision's networks take images of 3 channels, got in_chans={in_chans}; timm has most of them"
        )
    overrides = {key: value for key, value in overrides.items() if key != "in_chans"}
    if name in ("googlenet", "inception_v3"):  # they warn, unless told, that drawing their weights takes long
        overrides = {"init_weights": True, **overrides}
    try:
        return torchvision.models.get_model(name, **overrides)
    except TypeError as error:
        raise UserError(f"torchvision's {name} cannot be built with {dict(overrides)}: {error}") from error


def _converted(model: nn.Module, conversion: Mapping[str, Any]) -> nn.Module:
    """Convert by rule, or exactly as a report says."""
    from ..conversion_report import Conversion
    from ..surgery import apply_, rebuild_

    if not isinstance(conversion, Mapping):
        raise UserError(f"conversion must be a mapping, such as {{group_size: 16, coarsest: 32}}, got {conversion!r}")
    if "layers" in conversion:
        if others := sorted(set(conversion) - {"layers"}):
            raise UserError(
                f"conversion: layers say all there is to say; {', '.join(map(repr, others))} cannot be given with them"
            )
        return rebuild_(model, conversion["layers"])
    settings = Conversion.from_dict(conversion)
    apply_(model, lambda name: settings)
    return model


def build_model(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a network as `create_model` does; whatever a wrong value of an argument breaks inside, it is the user's error.

    Raises:
        UserError: If the network cannot be built with these arguments.
    """
    try:
        return create_model(name, **arguments)
    except UserError:
        raise
    except (*BROKEN, pickle.UnpicklingError) as error:  # of timm's checkpoint_path: what it reads is never executed
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{name} cannot be built with {dict(arguments)} ({reason})") from error
