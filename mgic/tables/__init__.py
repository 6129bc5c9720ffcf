"""The papers' tables and figures: each printed number beside what the library counts and has measured.

The printed numbers are those of ``papers.toml``, digit for digit. Our counts are exact, of networks that are built here and
now; other readings of a text stand beside them under names of their own. Our accuracies come from records only.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError, suggest
from .figures import FIGURES, Panel, build_figure
from .layers import layer_rows
from .networks import row_counts, row_network
from .printed import SUFFIX, Values, as_number, as_text, papers, plain, row_remarks, row_source, table_ids
from .readings import row_readings
from .records import matching_records, row_accuracy

__all__ = ["FIGURES", "Panel", "build_figure", "build_table", "matching_records", "papers", "table_ids"]


def build_table(table_id: str, records: Sequence[Values] = ()) -> dict[str, Any]:
    """Return a table of the papers with our counts and accuracies, as plain values.

    Args:
        table_id: One of :func:`table_ids`.
        records: Our results (:func:`mgic.training.read_record`), each with its ``file``.

    Returns:
        ``rows`` of ``{row, model, overrides, printed, ours, deviation, readings, accuracy, source, ...}``; of layers
        ``{row, printed, built, differs, source, ...}``. ``printed`` and ``ours`` count in ones; deviations are per cent.

    Raises:
        UserError: If there is no such table; the message names the nearest ones.

    Examples:
        >>> row = build_table("mgic-3")["rows"][-1]
        >>> row["row"], row["printed"]["macs"], row["ours"]["macs"], row["deviation"]["macs"]
        ('MGIC-ResNet-56', 60000000, 66466432, 10.78)
    """
    tables = papers()["tables"]
    if table_id not in tables:
        raise UserError(f"unknown table {table_id!r}{suggest(table_id, tables)}")
    table = tables[table_id]
    layers = table["kind"] == "layers"
    name, overrides, network = row_network(table_id, table)
    return {
        "id": table_id,
        "title": f"{papers()['papers'][table['paper']]['title']}, {table['table']}",
        "caption": table["caption"],
        "kind": table["kind"],
        "source": row_source(table, {}),
        "also": [f"{other['paper']}, {other['table']}" for other in table.get("also", [])],
        "dataset": table["dataset"],
        "input_size": table["input_size"],
        "units": {key: "1" if unit in SUFFIX else unit for key, unit in table["units"].items()},
        "model": name,
        "overrides": plain(overrides),
        "ours": row_counts(network, table["input_size"], table_id) if network else None,
        "note": table.get("note"),
        "misprint": table.get("misprint"),
        "rows": layer_rows(table) if layers else [results_row(table_id, table, row, records) for row in table["rows"]],
    }


def results_row(table_id: str, table: Values, row: Values, records: Sequence[Values]) -> dict[str, Any]:
    """Return one row of a table of results, as `build_table` has it."""
    units, size = table["units"], table["input_size"]
    name, overrides, network = row_network(table_id, row)
    printed = {key: as_number(row[key], unit) for key, unit in units.items() if key in row}
    counts = row_counts(network, size, table_id) if network else None
    readings = []
    for label, other in row_readings(name, overrides, row) if network else ():
        more = row_counts(other, size, table_id)
        readings.append({"reading": label, **more, "deviation": _deviation(more, printed)})
    return {
        "row": row["row"],
        "rival": row.get("theirs", False),
        "dataset": row.get("dataset", table["dataset"]),
        "model": name,
        "library": row.get("library", "mgic" if name else None),
        "overrides": plain(overrides),
        "printed": printed,
        "as_printed": {key: as_text(row[key], unit) for key, unit in units.items() if key in row},
        "ours": counts,
        "deviation": _deviation(counts or {}, printed),
        "readings": readings,
        "accuracy": row_accuracy(name, overrides, row.get("dataset", table["dataset"]), records) if network else None,
        "source": row_source(table, row),
        **row_remarks(row, units),
    }


def _deviation(counts: Mapping[str, int | None], printed: Values) -> dict[str, float]:
    """Return, in per cent, how far counts are from print; the paper's own bookkeeping is held against its params."""
    said = {**printed, "paper_weights": printed.get("params")}
    return {key: round(100 * (n / said[key] - 1), 2) for key, n in counts.items() if n and said.get(key)}
