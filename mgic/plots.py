"""Pictures of results, by matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from .benchmarking import TRAINING
from .errors import UserError
from .experiments import Outcome
from .reporting import COSTS
from .scaling import ScalingRow
from .tables import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, float]]
PLAIN, WITH_NAMES = (5, 4), (9, 5)
"""Sizes of a panel in inches, alone and with a legend beside it."""


def _panels(count: int, size: tuple[float, float] = PLAIN) -> "tuple[Figure, Sequence[Axes]]":
    """A figure of its own, in no window, with panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * count, size[1]), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _log_ticks(axis: "Axis", *, prefixes: bool = False) -> None:
    """Numbers at 1, 2 and 5 times the powers of ten, even steps on a short axis; with ``prefixes`` 200k, not 200000."""
    from matplotlib.ticker import EngFormatter, LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(EngFormatter(sep="") if prefixes else "{x:g}")
    axis.set_minor_formatter("")


def _save(figure: "Figure", path: Path, title: str) -> None:
    figure.suptitle(title)
    figure.savefig(path, dpi=120, format="png")


def plot_outcomes(outcomes: Mapping[str, Outcome], path: Path, title: str) -> None:
    """Draw accuracy against each cost that is known: families in one colour, joined; bars are standard deviations.

    Args:
        outcomes: By variant.
        path: PNG file.
        title: Above the plots.

    Raises:
        UserError: Nothing was counted or timed.
    """
    known = [cost for cost in COSTS if any(cost in outcome.costs for outcome in outcomes.values())]
    if not known:
        raise UserError("no costs to plot against: mgic experiment NAME --times counts and times the networks")
    figure, axes = _panels(len(known))
    for ax, cost in zip(axes, known, strict=True):
        families: dict[str, list[tuple[float, float, float]]] = {}
        for variant, outcome in outcomes.items():
            metric = outcome.record["metrics"]["test_accuracy"]
            if cost in outcome.costs:
                point = (outcome.costs[cost], metric["mean"], metric["std"])
                families.setdefault(variant.partition(":")[0], []).append(point)
        for name, points in families.items():
            x, y, spread = zip(*sorted(points), strict=True)
            ax.errorbar(x, y, spread, marker="o", capsize=3, label=name)
        ax.set_xscale("log")
        _log_ticks(ax.xaxis, prefixes=cost != "ms")
        ax.set_xlabel(COSTS[cost])
        ax.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("test accuracy [%]")
    axes[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path, title)


def plot_panels(panels: Sequence[Panel], path: Path, title: str) -> None:
    """Draw a figure of the papers: printed points, the papers' own networks bold, and our records as stars.

    Args:
        panels: What `mgic.tables.build_figure` gathered.
        path: PNG file.
        title: Above the plots.
    """
    from matplotlib import colormaps

    figure, axes = _panels(len(panels), WITH_NAMES)
    colors, markers = colormaps["tab10"], "osD^v<>PXdh"
    for ax, panel in zip(axes, panels, strict=True):
        for i, (name, points) in enumerate(panel.printed.items()):
            bold: dict[str, Any] = (
                {"linewidth": 3, "markersize": 9, "zorder": 3} if name.startswith("MG") else {"linewidth": 1}
            )
            ax.plot(*zip(*points, strict=True), marker=markers[i % 11], color=colors(i % 10), label=name, **bold)
        for i, (name, points) in enumerate(panel.measured.items()):
            style: dict[str, Any] = {"color": colors(i % 10), "markeredgecolor": "k", "markersize": 16, "zorder": 4}
            ax.plot(*zip(*points, strict=True), "*", label=f"{name}: our record", **style)
        ax.set_xscale("log" if panel.logx else "linear")
        ax.set_yscale("log" if panel.logy else "linear")
        ax.set_xlabel(panel.xlabel)
        ax.set_ylabel(panel.ylabel)
        ax.set_title(panel.title, fontsize="medium")
        ax.grid(alpha=0.3, which="both")
        ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path, title)


def plot_curves(curves: Mapping[str, Sequence[History]], path: Path, title: str) -> None:
    """Draw test accuracy and training loss by epoch: the mean of each network's runs, and their range.

    Args:
        curves: Name of a network to the histories of its runs.
        path: PNG file.
        title: Above the plots.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _panels(2)
    for ax, key, label in zip(
        axes, ("test_accuracy", "train_loss"), ("test accuracy [%]", "training loss"), strict=True
    ):
        for name, histories in curves.items():
            epochs = [row["epoch"] for row in histories[0]]
            values = [[row[key] for row in history] for history in histories]
            columns = list(zip(*values, strict=True))
            (line,) = ax.plot(epochs, [fmean(column) for column in columns], label=name)
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            ax.fill_between(epochs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("epoch")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    last = [row["test_accuracy"] for histories in curves.values() for history in histories for row in history[-5:]]
    axes[0].set_ylim(max(0.0, min(last) - 10), 100.5)
    axes[0].legend(loc="lower right")
    axes[1].set_yscale("log")
    _save(figure, path, title)


def plot_scaling(rows: Sequence[ScalingRow], path: Path, title: str) -> None:
    """Draw parameters and multiply-adds over the width, beside the dense twin's, on logarithmic axes.

    Args:
        rows: What `mgic.scaling.scaling` counted.
        path: PNG file.
        title: Above the plots.
    """
    figure, axes = _panels(2)
    widths = [row.width for row in rows]
    for ax, ours, dense, label in (
        (axes[0], [row.params for row in rows], [row.dense_params for row in rows], "parameters"),
        (axes[1], [row.macs for row in rows], [row.dense_macs for row in rows], "multiply-adds"),
    ):
        ax.loglog(widths, dense, "s-", label="dense twin")
        ax.loglog(widths, ours, "o-", label="multigrid in channels")
        ax.loglog(widths, [ours[0] * w / widths[0] for w in widths], "k:", linewidth=1, label="linear")
        ax.set_xticks(widths, [f"{w:g}" for w in widths], minor=False)
        ax.minorticks_off()
        ax.set_xlabel("width multiplier")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    axes[0].legend()
    _save(figure, path, title)


def plot_times(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw time against multiply-adds, each network in its fastest path; a panel for each setting of several networks.

    Args:
        rows: Of a benchmark's record.
        path: PNG file.
        title: Above the plots.
    """
    times: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["ms"] is not None and row["path"] != TRAINING:
            times.setdefault((row["batch"], row["threads"], row["network"], row["path"]), []).append(row)
    panels: dict[tuple[int, int], dict[str, Mapping[str, Any]]] = {}
    for (batch, threads, network, _), alike in times.items():  # a network may have been timed beside several others
        row = {**alike[0], "ms": median(row["ms"] for row in alike)}
        fastest = panels.setdefault((batch, threads), {})
        if network not in fastest or row["ms"] < fastest[network]["ms"]:
            fastest[network] = row
    most = max(map(len, panels.values()), default=0)
    panels = {setting: fastest for setting, fastest in panels.items() if len(fastest) > 1 or most < 2}
    count = max(len(panels), 1)
    figure, axes = _panels(count, WITH_NAMES)
    for axis, ((batch, threads), fastest) in zip(axes, panels.items(), strict=False):
        for number, (name, row) in enumerate(fastest.items(), 1):  # numbers, for names would cover each other
            at, ours = (row["macs"] / 1e6, row["ms"]), name.startswith("mg")
            style: dict[str, Any] = {"marker": "o" if ours else "s", "color": "C0" if ours else "C1", "linestyle": ""}
            axis.plot(*at, markersize=6, label=f"{number}  {name} ({row['path']})", **style)
            axis.annotate(str(number), at, fontsize=9, xytext=(5, 4), textcoords="offset points")
        axis.set(xscale="log", yscale="log", xlabel="multiply-adds of one input [10⁶]", ylabel="time of a call [ms]")
        axis.set_title(f"batch {batch}, {threads} thread(s)")
        for direction in (axis.xaxis, axis.yaxis):
            _log_ticks(direction)
        axis.margins(0.1)
        axis.grid(visible=True, which="both", alpha=0.3)
        if fastest:
            axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path, title)
