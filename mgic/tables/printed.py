"""What the papers print: ``papers.toml``, digit for digit, and its cells as plain values."""

import tomllib
from collections.abc import Mapping
from decimal import Decimal
from functools import cache
from importlib.resources import files
from typing import Any

Values = Mapping[str, Any]
"""What is stated by name: a row, the table it is in, the arguments of a network, a record."""


@cache
def papers() -> dict[str, Any]:
    """Return ``papers.toml``; its decimal numbers keep their digits."""
    return tomllib.loads(files("mgic").joinpath("papers.toml").read_text(encoding="utf-8"), parse_float=Decimal)


def table_ids() -> list[str]:
    """Return the names of all tables, in the order of the papers."""
    return list(papers()["tables"])


SUFFIX = {"1e3": " k", "1e6": " M", "1e9": " G"}


def as_number(value: Any, unit: str) -> Any:
    """Return a printed value as a plain number: counts in ones, all else in its unit."""
    if isinstance(value, Decimal | int) and not isinstance(value, bool):
        scaled = value * Decimal(unit) if unit in SUFFIX else Decimal(value)
        return int(scaled) if scaled == int(scaled) else float(scaled)
    return value


def as_text(value: Any, unit: str) -> str:
    """Return a printed value as it is printed, with its unit."""
    return f"{value}{SUFFIX.get(unit, '')}"


def plain(value: Any) -> Any:
    """Return JSON's types."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def row_source(table: Values, row: Values) -> str:
    """Return where a row is printed."""
    place = row.get("place", f"{table.get('table', table.get('figure'))}, section {table['section']}")
    return f"{table['paper']}, {place}"


def row_remarks(row: Values, units: Values) -> dict[str, Any]:
    """Return what is said about a row: that it is misprinted, what it should be, what else is printed for it."""
    should_be = {
        key: as_number(value, units.get(key, "1")) for key, value in row.get("should_be", {}).items() if key in units
    }
    variants = [{key: plain(value) for key, value in variant.items()} for variant in row.get("variants", [])]
    return {
        "misprint": row.get("misprint"),
        "should_be": should_be or plain(row.get("should_be")),
        "variants": variants,
        "note": row.get("note"),
    }
