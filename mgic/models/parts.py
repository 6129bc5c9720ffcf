"""Parts of networks by name: what a configuration, which is text, says where Python passes a function.

A recipe, a paper's row or a command line writes ``correction: plain_prolongation`` or
``scheme: {cycle: additive, plan: {maximum: 1}}``; names are looked up here and nowhere else.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

from torch import nn

from ..blocks import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck, zero_scale
from ..cycle import Scheme, additive, frozen, multiplicative, plain_prolongation, tau_correction
from ..errors import UserError, suggest
from ..hierarchy import plan_groups
from ..smoothing import FullApproximation, ResidualOnly
from ..transfer import averaging_pair, isometric_pair, sparse_random_pair

_TRANSFERS: dict[str, Any] = {
    "averaging_pair": averaging_pair,
    "isometric_pair": isometric_pair,
    "sparse_random_pair": sparse_random_pair,
}
PARTS: dict[str, dict[str, Any]] = {
    "block": {block.__name__: block for block in (BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck)},
    "coarsen": {"FullApproximation": FullApproximation, "ResidualOnly": ResidualOnly},
    "correction": {"tau_correction": tau_correction, "plain_prolongation": plain_prolongation},
}
"""Argument of a network, to the parts it may have."""

_SCHEME: dict[str, dict[str, Any]] = {
    "cycle": {"multiplicative": multiplicative, "additive": additive},
    "norm": {"BatchNorm2d": nn.BatchNorm2d, "Identity": nn.Identity, "ZeroBatchNorm2d": zero_scale(nn.BatchNorm2d)},
    "plan": {"plan_groups": plan_groups},
    "transfer": {**_TRANSFERS, **{f"frozen_{name}": frozen(pair) for name, pair in _TRANSFERS.items()}},
}
"""Field of `mgic.Scheme`, to the parts it may have; ``plan`` may also be options of the network's own plan."""


def _named(where: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        near = suggest(name, known)
        raise UserError(f"{where} has no {name!r}{near if 'did you mean' in near else '; it has ' + ', '.join(known)}")
    return known[name]


def _part(where: str, value: Any, known: Mapping[str, Any]) -> Any:
    if isinstance(value, str):
        return _named(where, value, known)
    if not callable(value):
        raise UserError(f"{where} must be a function or the name of one ({', '.join(known)}), got {value!r}")
    return value


def _scheme(own: Scheme, asked: Mapping[str, Any]) -> Scheme:
    known = [field.name for field in fields(Scheme)]
    parts: dict[str, Any] = {}
    for name, value in asked.items():
        if name not in known:
            raise UserError(f"scheme has no {name!r}; it has {', '.join(known)}")
        if name == "plan" and isinstance(value, Mapping):
            options = [p.name for p in inspect.signature(own.plan).parameters.values() if p.kind == p.KEYWORD_ONLY]
            if unknown := sorted(set(value) - set(options)):
                raise UserError(f"scheme: plan has no {', '.join(map(repr, unknown))}; it has {', '.join(options)}")
            parts[name] = partial(own.plan, **value)
        else:
            parts[name] = _part(f"scheme: {name}", value, _SCHEME[name])
    return replace(own, **parts)


def with_parts(make: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a network with the parts that are named in them.

    Args:
        make: Function that assembles the network; its own ``scheme`` is what is left unsaid in one that is given.
        given: Arguments, some of which may be names.

    Raises:
        UserError: There is no such part; the message names those there are.

    Examples:
        >>> from mgic.models.resnet import mgic_cifar_resnet
        >>> found = with_parts(mgic_cifar_resnet, {"correction": "plain_prolongation", "scheme": {"cycle": "additive"}})
        >>> found["correction"].__name__, found["scheme"].cycle.__name__
        ('plain_prolongation', 'additive')
    """
    found = dict(given)
    for name, value in given.items():
        if name in PARTS:
            found[name] = _part(name, value, PARTS[name])
        if name == "scheme" and isinstance(value, Mapping):
            found[name] = _scheme(inspect.signature(make).parameters[name].default, value)
        elif name == "scheme" and not isinstance(value, Scheme):
            raise UserError(f"scheme must be a Scheme or a mapping such as {{cycle: additive}}, got {value!r}")
    return found
