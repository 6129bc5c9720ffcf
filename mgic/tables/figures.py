"""The papers' plots: the points they print, and those of our records."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, suggest
from .networks import row_counts, row_network
from .printed import Values, as_number, papers
from .records import row_accuracy

Series = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Panel:
    """What one plot shows: points by name, printed ones and our own."""

    printed: Series
    measured: Series
    title: str
    xlabel: str
    ylabel: str
    logx: bool = False
    logy: bool = False


def _errors(figure_id: str, records: Sequence[Values], printed: Series, title: str) -> list[Panel]:
    """Draw squared errors over parameters; these exist as records only, which say which figure they are for."""
    measured: Series = {}
    for record in records:
        if record.get("figure") == figure_id:
            point = (record["metrics"]["params"]["mean"], record["metrics"]["mse"]["mean"])
            measured.setdefault(record["series"], []).append(point)
    if not measured:
        raise UserError(
            f"figure {figure_id}, {title}, is drawn from records that say figure: {figure_id} and hold params and mse; "
            f"none of the {len(records)} records does: run that experiment first"
        )
    labels: dict[str, Any] = {"xlabel": "parameters", "ylabel": "mean squared error", "logx": True, "logy": True}
    return [Panel(printed, {name: sorted(points) for name, points in measured.items()}, title, **labels)]


def _figure_3(records: Sequence[Values]) -> list[Panel]:
    printed = [(float(row["params"]), float(row["mse"])) for row in papers()["tables"]["mgic-1"]["rows"]]
    title = "encoding 64 feature maps in 8 channels and back"
    return _errors("mgic-3", records, {"Table 1": sorted(printed)}, title)


def _figure_4(records: Sequence[Values]) -> list[Panel]:
    return _errors("mgic-4", records, {}, "approximation of functions")


def _family(row: Values) -> str:
    """Return the name a row is drawn under: its label without width, group size and so on."""
    name, overrides = row.get("model", ""), row.get("overrides", {})
    if name.startswith("mgiad"):
        return f"MGiaD, g_s = {overrides['group_size']}" + (", wider" if overrides.get("width", 1) > 1 else "")
    if name.startswith("mgnet"):
        kind = "in groups" if "group_a" in overrides else f"({3 if name.endswith('20') else 4} resolutions)"
        return f"MgNet_A{',B' if overrides['share_b'] else ''} {kind}"
    if name == "mgic_resnet56":
        return "MGIC-ResNet-56"
    return re.sub(r" (\d[\d.]*x|\([^)]*\))|, best .*", "", row["row"])


def _accuracies(ids: Sequence[str], x: str, records: Sequence[Values], **labels: Any) -> Panel:
    """Draw accuracy over a column: the printed points, and those of our records at our own counts."""
    panel = Panel({}, {}, **labels)
    for table_id in ids:
        table = {**papers()["tables"], **papers()["figures"]}[table_id]
        for row in table["rows"]:
            family = _family(row)
            if x in row and "top1" in row and "should_be" not in row:  # known to be wrong: not a point
                point = (float(as_number(row[x], table["units"][x])), float(row["top1"]))
                panel.printed.setdefault(family, []).append(point)
            name, overrides, network = row_network(table_id, row)
            found = row_accuracy(name, overrides, row.get("dataset", table["dataset"]), records) if network else None
            if network and found:
                values = {**row_counts(network, table["input_size"], table_id), "epochs": found["epochs"]}
                panel.measured.setdefault(family, []).append((float(values[x]), found["test"]["mean"]))
    for points in (*panel.printed.values(), *panel.measured.values()):
        points[:] = sorted(set(points))
    return panel


def _figure_5(records: Sequence[Values]) -> list[Panel]:
    labels: dict[str, Any] = {"xlabel": "multiply-adds", "ylabel": "top-1 accuracy on ImageNet [%]", "logx": True}
    return [
        _accuracies(["mgic-7"], "macs", records, title="light networks (Table 7)", **labels),
        _accuracies(["mgic-5"], "macs", records, title="compressed ResNet-50 (Table 5)", **labels),
    ]


def _figure_6(records: Sequence[Values]) -> list[Panel]:
    labels: dict[str, Any] = {"xlabel": "epochs", "ylabel": "top-1 accuracy on ImageNet [%]"}
    return [
        _accuracies(["mgic-6"], "epochs", records, title="best within so many epochs, as the caption says", **labels)
    ]


def _figure_7(records: Sequence[Values]) -> list[Panel]:
    ids = ["mgiad-1", "mgiad-2", "mgiad-6", "mgiad-7", "mgic-12"]
    labels: dict[str, Any] = {"xlabel": "weights", "ylabel": "test accuracy on CIFAR-10 [%]", "logx": True}
    return [_accuracies(ids, "params", records, title="Tables I, II, VI, VII; MGIC: its Table 12", **labels)]


FIGURES: dict[str, tuple[str, Callable[[Sequence[Values]], list[Panel]]]] = {
    "mgic-3": ("MGIC, Figure 3: error of the transfers alone", _figure_3),
    "mgic-4": ("MGIC, Figure 4: error of function approximation", _figure_4),
    "mgic-5": ("MGIC, Figure 5: accuracy and multiply-adds", _figure_5),
    "mgic-6": ("MGIC, Figure 6: accuracy and epochs", _figure_6),
    "mgiad-7": ("MGiaD, Figure 7: accuracy and weights", _figure_7),
}
"""Title, and what gathers the points, of the papers' plots."""


def build_figure(figure_id: str, records: Sequence[Values] = ()) -> tuple[str, list[Panel]]:
    """Return the title and the panels of a plot of the papers: printed points, and those of our records.

    Args:
        figure_id: One of :data:`FIGURES`.
        records: Our results, each with its ``file``.

    Raises:
        UserError: If there is no such figure, or it needs a record that is not there.
    """
    if figure_id not in FIGURES:
        raise UserError(f"unknown figure {figure_id!r}{suggest(figure_id, FIGURES)}")
    title, gather = FIGURES[figure_id]
    return title, gather(records)
