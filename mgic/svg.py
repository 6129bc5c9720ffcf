"""Drawings for the report as SVG text: plots whose points tell what they are, and the hierarchy of a block.

Colours, fonts and the tooltip belong to the page: classes ``s0`` ... ``s7`` are series, and text and lines take the page's
colours, so that one drawing serves the light and the dark page.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from .hierarchy import Level

SERIES = 8
"""Colours there are; further series begin again with other marks and dashed."""
_MARKS = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0",
    "M-4,-4h8v8h-8z",
    "M0,-5l5,9h-10z",
    "M0,-5.5l5.5,5.5l-5.5,5.5l-5.5,-5.5z",
)
"""A circle, a square, a triangle, a diamond."""


@dataclass(frozen=True)
class Axis:
    """One axis of a plot.

    Args:
        label: What it shows, with its unit.
        log: Whether its steps are factors.
    """

    label: str
    log: bool = False


@dataclass(frozen=True)
class Point:
    """One point.

    Args:
        x: Place on the first axis.
        y: Place on the second.
        says: What a reader is told who points at it.
        spread: Drawn as a bar from ``y - spread`` to ``y + spread``.
    """

    x: float
    y: float
    says: str
    spread: float = 0.0


class _Scale:
    """From values to pixels.

    Args:
        values: All that must be seen.
        start: Pixel of the lowest value.
        end: Pixel of the highest.
        log: Whether steps are factors.
    """

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool):
        if log and min(values) <= 0:
            raise ValueError(f"a logarithmic axis has no place for {min(values)}")
        low, high = (math.log10(v) if log else v for v in (min(values), max(values)))
        margin = 0.06 * (high - low) or (abs(high) or 1.0) * 0.1
        self.low, self.high, self.log, self.start, self.end = low - margin, high + margin, log, start, end

    def __call__(self, value: float) -> float:
        place = math.log10(value) if self.log else value
        return self.start + (place - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside, five or so."""
        if not self.log:
            return _round_steps(self.low, self.high)
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        for parts in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
            found = [f * 10.0**d for d in decades for f in parts if self.low <= math.log10(f * 10.0**d) <= self.high]
            if len(found) >= 3:
                return found
        return [v for v in _round_steps(10**self.low, 10**self.high) if v > 0]


def _round_steps(low: float, high: float, wanted: int = 5) -> list[float]:
    rough = (high - low) / wanted
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(f * magnitude for f in (1, 2, 5, 10) if f * magnitude >= rough)
    first = math.ceil(low / step)
    return [float(f"{k * step:.12g}") for k in range(first, math.floor(high / step) + 1)]


def number(value: float) -> str:
    """A number as short as an axis wants it.

    Examples:
        >>> number(1_500_000), number(30_000), number(0.25), number(7.0)
        ('1.5M', '30k', '0.25', '7')
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


_WIDTH, _LEFT, _TOP, _BOTTOM, _RIGHT = 640, 62, 14, 330, 626
"""Of a plot: its whole width, and where its frame is."""


def plot(series: Mapping[str, Sequence[Point]], x: Axis, y: Axis, marks: bool = True, lines: bool = False) -> str:
    """A plot of points, lines or both.

    Args:
        series: Points by name; each name is an entry of the legend.
        x: First axis.
        y: Second axis.
        marks: Whether points are marked (and can be pointed at).
        lines: Whether the points of a series are joined, from left to right.

    Raises:
        ValueError: There is no point, or one that a logarithmic axis cannot show.
    """
    points = [point for found in series.values() for point in found]
    if not points:
        raise ValueError("a plot needs a point")
    if odd := [p.says for p in points if not (math.isfinite(p.x) and math.isfinite(p.y) and math.isfinite(p.spread))]:
        raise ValueError(f"a plot has no place for {odd[0]!r}, which is not finite")
    across = _Scale([p.x for p in points], _LEFT, _RIGHT, x.log)
    up = _Scale([v for p in points for v in (p.y - p.spread, p.y + p.spread)], _BOTTOM, _TOP, y.log)
    height = _BOTTOM + 48 + 18 * math.ceil(len(series) / 2)
    parts = [_opened("plot", height, f"{y.label} against {x.label}"), *_frame(across, up, x, y)]
    for k, (name, found) in enumerate(series.items()):
        css, mark = f"s{k % SERIES}", _MARKS[(k + k // SERIES) % len(_MARKS)]
        if lines and len(found) > 1:
            path = "L".join(f"{across(p.x):.1f},{up(p.y):.1f}" for p in sorted(found, key=lambda p: p.x))
            dashes = f' stroke-dasharray="{6 // (1 + k // SERIES)} 3"' if k >= SERIES else ""
            parts.append(f'<path class="line {css}"{dashes} d="M{path}"/>')
        if marks:
            parts += [_marked(p, across(p.x), up, css, mark) for p in found]
        place = f"translate({_LEFT + (k % 2) * 290 + 6},{_BOTTOM + 54 + 18 * (k // 2)})"
        key = f'<path class="mark {css}" d="{mark}"/>' if marks else f'<path class="line {css}" d="M-6,0h12"/>'
        parts.append(f'<g transform="{place}">{key}<text x="10" y="4">{escape(name)}</text></g>')
    return "".join([*parts, "</svg>"])


def _opened(kind: str, height: float, says: str) -> str:
    return f'<svg class="{kind}" viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(says)}">'


def _frame(across: _Scale, up: _Scale, x: Axis, y: Axis) -> Iterator[str]:
    for value in across.ticks():
        yield f'<path class="grid" d="M{across(value):.1f},{_TOP}V{_BOTTOM}"/>'
        yield f'<text x="{across(value):.1f}" y="{_BOTTOM + 16}" text-anchor="middle">{number(value)}</text>'
    for value in up.ticks():
        yield f'<path class="grid" d="M{_LEFT},{up(value):.1f}H{_RIGHT}"/>'
        yield f'<text x="{_LEFT - 6}" y="{up(value) + 4:.1f}" text-anchor="end">{number(value)}</text>'
    yield f'<path class="axis" d="M{_LEFT},{_TOP}V{_BOTTOM}H{_RIGHT}"/>'
    middle = f'class="label" text-anchor="middle" transform="translate({(_LEFT + _RIGHT) / 2:g},{_BOTTOM + 34})"'
    yield f"<text {middle}>{escape(x.label)}</text>"
    middle = f'class="label" text-anchor="middle" transform="translate(14,{(_TOP + _BOTTOM) / 2:g}) rotate(-90)"'
    yield f"<text {middle}>{escape(y.label)}</text>"


def _marked(point: Point, place: float, up: _Scale, css: str, mark: str) -> str:
    spread = ""
    if point.spread:
        ends = f"{up(point.y - point.spread):.1f}V{up(point.y + point.spread):.1f}"
        spread = f'<path class="spread {css}" d="M{place:.1f},{ends}"/>'
    moved = f"translate({place:.1f},{up(point.y):.1f})"
    return f'{spread}<path class="mark {css}" {_says(point.says)} transform="{moved}" d="{mark}"/>'


def _says(text: str) -> str:
    """What the page shows to those who point at a mark or reach it with the keyboard, and tells those who cannot see it."""
    said = escape(text, quote=True)
    return f'tabindex="0" role="img" aria-label="{said}" data-says="{said}"'


def hierarchy(levels: Sequence[Level], name: str) -> str:
    """The grids of one block, finest above: a bar as wide as its channels, cut into its groups, with R down and P up.

    Args:
        levels: What `mgic.plan_levels` planned.
        name: Of the block, for readers who do not see it.
    """
    row, full = 46, 330
    parts = [_opened("hierarchy", row * len(levels), name)]
    for j, level in enumerate(levels):
        wide, y = full * level.channels / levels[0].channels, 6 + row * j
        left = (full - wide) / 2 + 8
        grouped = f"{level.groups} groups of {level.group_size}" if level.groups > 1 else "dense"
        inner = "" if level.hidden == level.channels else f", {level.hidden} inside"
        parts.append(f"<g {_says(f'level {j}: {level.channels} channels{inner}, {grouped}')}>")
        parts.append(
            f'<rect class="s{0 if level.groups > 1 else 1}" x="{left:.1f}" y="{y}" width="{wide:.1f}" height="20"/>'
        )
        if level.groups <= 64:  # more would be one dark bar
            cuts = (f"M{left + wide * k / level.groups:.1f},{y}v20" for k in range(1, level.groups))
            parts.append(f'<path class="cut" d="{"".join(cuts)}"/>')
        parts.append(f'</g><text x="{full + 24}" y="{y + 15}">{level.channels} channels{inner}: {grouped}</text>')
        if j + 1 < len(levels):
            middle, low, high = full / 2 + 8, y + row - 4, y + 24
            parts.append(f'<path class="way" d="M{middle - 20},{high}V{low}m-4,-6l4,6l4,-6"/>')
            parts.append(f'<path class="way" d="M{middle + 20},{low}V{high}m-4,6l4,-6l4,6"/>')
            parts.append(f'<text x="{middle - 38}" y="{y + 38}">R</text><text x="{middle + 28}" y="{y + 38}">P</text>')
    return "".join([*parts, "</svg>"])


_STYLE = """
svg { font: 12px system-ui, sans-serif; fill: #1b1f24; }
path { fill: none; stroke: #8a939d; }
.s0 { fill: #0072b2; } .s1 { fill: #d55e00; } .cut { stroke: #ffffff; }
@media (prefers-color-scheme: dark) { svg { fill: #e4e7eb; } }
"""


def standalone(drawing: str) -> str:
    """A hierarchy as a file of its own, with the colours that the page gives it otherwise."""
    head, _, rest = drawing.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{_STYLE}</style>{rest}\n'
