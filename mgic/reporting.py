"""Tables and plots of results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

History = Sequence[Mapping[str, float]]


def mean_std(values: Sequence[float], digits: int = 2) -> str:
    """Return ``mean +- sample standard deviation`` as text; of one value the value alone.

    Examples:
        >>> mean_std([97.0, 98.0])
        '97.50 ± 0.71'
    """
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


def compare_table(rows: Sequence[Mapping[str, Any]]) -> "Table":
    """Return networks side by side: counts, ratios to the first row, accuracies, time.

    Args:
        rows: Each with ``model, params, macs``, and lists ``train_accuracy, test_accuracy, seconds_per_epoch``.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("model", "params", "MACs", "train %", "test %", "s/epoch"):
        table.add_column(name, justify="left" if name == "model" else "right")
    first = rows[0]
    seconds = fmean(first["seconds_per_epoch"])
    for row in rows:
        ratio = "" if row is first else " ({:.2f}x)"
        table.add_row(
            row["model"],
            f"{row['params']:,}" + ratio.format(row["params"] / first["params"]),
            f"{row['macs']:,}" + ratio.format(row["macs"] / first["macs"]),
            mean_std(row["train_accuracy"]),
            mean_std(row["test_accuracy"]),
            mean_std(row["seconds_per_epoch"]) + ratio.format(fmean(row["seconds_per_epoch"]) / seconds),
        )
    return table


def plot_curves(curves: Mapping[str, Sequence[History]], path: Path, title: str) -> None:
    """Draw test accuracy and training loss by epoch: the mean of each network's runs, and their range.

    Args:
        curves: Name of a network to the histories of its runs.
        path: PNG file.
        title: Above the plots.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
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
        ax.set_xlabel("epoch")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    last = [row["test_accuracy"] for histories in curves.values() for history in histories for row in history[-5:]]
    axes[0].set_ylim(max(0.0, min(last) - 10), 100.5)
    axes[0].legend(loc="lower right")
    axes[1].set_yscale("log")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
