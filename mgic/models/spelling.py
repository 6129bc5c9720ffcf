"""How a network is written in one word: ``mgic_resnet50@160:group_size=8,coarsest=16``."""

import re
from typing import Any, NamedTuple

import yaml
from torch import nn

from ..errors import UserError
from ..survey import input_size_of

TORCHVISION = "torchvision:"
"""What the names of torchvision's networks start with here: timm has other networks of the same names."""


class Spelled(NamedTuple):
    """What such a word says.

    Args:
        name: Registered name.
        arguments: Arguments of the network.
        size: Height and width of its input, if it is said.
    """

    name: str
    arguments: dict[str, Any]
    size: int | None


def spelled(text: str) -> Spelled:
    """Read ``name``, ``name@SIZE``, ``name:argument=value,...`` or ``name@SIZE:argument=value,...``.

    A value may be a list or a mapping in brackets; the name may begin with ``torchvision:``. Whether there is such a network
    is not asked here.

    Raises:
        UserError: If the text is none of these.

    Examples:
        >>> spelled("mgic_resnet50@160:group_size=8,coarsest=16")
        Spelled(name='mgic_resnet50', arguments={'group_size': 8, 'coarsest': 16}, size=160)
        >>> spelled("torchvision:resnet18:conversion={group_size: 8, coarsest: 16}").arguments
        {'conversion': {'group_size': 8, 'coarsest': 16}}
    """
    library = TORCHVISION if text.startswith(TORCHVISION) else ""
    head, _, rest = text.removeprefix(library).partition(":")
    name, _, size = head.partition("@")
    # a comma between two arguments is one that no closing bracket follows before the next opening one
    pairs = [pair.partition("=") for pair in re.split(r",(?![^\[{]*[\]}])", rest) if rest]
    if not name or not all(key and equals and value for key, equals, value in pairs) or not (size or "1").isdigit():
        raise UserError(f"a network is written name, name@SIZE or name:argument=value,..., got {text!r}")
    try:
        arguments = {key: yaml.safe_load(value) for key, _, value in pairs}
    except yaml.YAMLError as error:
        raise UserError(f"a network is written name, name@SIZE or name:argument=value,..., got {text!r}") from error
    return Spelled(library + name, arguments, int(size) if size else None)


def input_size(model: nn.Module, size: int | None) -> tuple[int, ...]:
    """Return the size of an input of a network that was spelled: pixels as asked for, or its own; without the batch."""
    channels, *pixels = input_size_of(model)
    return (channels, *([size] * 2 if size else pixels))
