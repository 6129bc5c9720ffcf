"""How the cost of a network grows with its width: the papers' claim, measured and fitted beside the dense twin."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .counting import cost
from .cycle import Scheme
from .errors import UserError
from .hierarchy import plan_levels
from .models import create_model

NO_HIERARCHY = Scheme(plan=partial(plan_levels, maximum=0))


def _arguments(name: str, overrides: Mapping[str, Any]) -> tuple[str, ...]:
    with torch.device("meta"):
        return getattr(create_model(name, **overrides), "arguments", ())


def dense_twin(name: str, overrides: Mapping[str, Any]) -> nn.Module:
    """Build the same network with every hierarchy reduced to one dense level.

    Raises:
        UserError: If the network has no hierarchy.
    """
    known = _arguments(name, overrides)
    for argument, value in (("multigrid", False), ("scheme", NO_HIERARCHY), ("coarsest", 1 << 30)):
        if argument in known:
            return create_model(name, **{**overrides, argument: value})
    raise UserError(
        f"{name} has no channel hierarchy whose scaling could be fitted; mgic models 'mg*' lists those that have"
    )


@dataclass(frozen=True)
class ScalingRow:
    """One width: counts of the network and of its dense twin.

    Args:
        width: Multiplier of the network's widths.
        params: Trainable parameters.
        macs: Multiply-adds of one input.
        dense_params: Of the dense twin.
        dense_macs: Of the dense twin.
        narrowest: Least planned width over the network's blocks.
        coarsest: Width of the widest coarsest grid.
        outside: Parameters that belong to no block with levels.
    """

    width: float
    params: int
    macs: int
    dense_params: int
    dense_macs: int
    narrowest: int
    coarsest: int
    outside: int


def explain(rows: Sequence[ScalingRow]) -> str:
    """Return why a network grows faster than its width: what its counts themselves show."""
    first, last = rows[0], rows[-1]
    dense = fit_exponent([(row.width, row.dense_params) for row in rows])
    if dense > 2.1:
        return (
            f"the dense twin itself grows with the power {dense:.2f}: inner widths take the multiplier more than once"
        )
    if last.coarsest >= 1.25 * first.coarsest:
        return f"the coarsest, dense grids grow from {first.coarsest} to {last.coarsest} channels over these widths"
    if last.outside > 0.25 * last.params:
        share = last.outside / last.params
        return f"{share:.0%} of the parameters at width {last.width:g} stand outside the hierarchies (dense layers)"
    if first.narrowest < 2 * first.coarsest:
        return f"blocks of {first.narrowest} channels at width {first.width:g} are hardly coarsened yet, so they start cheap"
    return "what the blocks wrap grows faster than the width"


def scaling(
    name: str, overrides: Mapping[str, Any], widths: Sequence[float], input_size: Sequence[int]
) -> list[ScalingRow]:
    """Count a network and its dense twin over widths.

    Args:
        name: A network with the argument ``width`` and a channel hierarchy.
        overrides: Its other arguments.
        widths: Multipliers.
        input_size: Size of one input without the batch.

    Raises:
        UserError: If the network has no ``width`` or no hierarchy.
    """
    if "width" not in _arguments(name, overrides):
        raise UserError(f"{name} has no argument 'width', so its scaling cannot be fitted")
    rows = []
    for width in widths:
        given = {**overrides, "width": width}
        with torch.device("meta"):  # a wide network of billions of weights takes no memory
            model, dense = create_model(name, **given), dense_twin(name, given)
        planned = [m for m in model.modules() if isinstance(getattr(m, "levels", None), list)]
        inside = {id(p): p.numel() for m in planned for p in m.parameters() if p.requires_grad}
        levels: Any = [block.levels for block in planned]
        ours, theirs = cost(model, input_size), cost(dense, input_size)
        rows.append(
            ScalingRow(
                width,
                ours.params,
                ours.macs,
                theirs.params,
                theirs.macs,
                narrowest=min(min(plan[0].channels, plan[0].hidden) for plan in levels),
                coarsest=max(min(plan[-1].channels, plan[-1].hidden) for plan in levels),
                outside=ours.params - sum(inside.values()),
            )
        )
    return rows


def fit_exponent(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of the least-squares line through ``(log x, log y)``.

    Examples:
        >>> round(fit_exponent([(1, 5), (2, 20), (4, 80)]), 6)
        2.0
    """
    xs, ys = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    x0, y0 = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - x0) * (y - y0) for x, y in zip(xs, ys, strict=True)) / sum((x - x0) ** 2 for x in xs)
