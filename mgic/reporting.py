"""Tables of results, for the terminal, as Markdown and as CSV."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from .experiments import EXPERIMENTS, Finding, Outcome, findings
from .training.records import origins

if TYPE_CHECKING:
    from rich.table import Table


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


_MEASURES = {
    **{"top1": "top-1", "top5": "top-5", "top1_std": "std", "train_top1": "train", "miou": "mIoU", "mse": "MSE"},
    **{"mobile_time": "phone", "cpu_time": "PC", "train_time": "training step"},
}
_LAYER_WORDS = {"exp": "exp {}", "expansion": "expansion {}", "c_in": "{} ->", "c_out": "-> {}", "repetitions": "x {}"}


class Sheet(NamedTuple):
    """A table of the papers as text: what the terminal and the documentation show.

    Args:
        head: Names of the columns; those after ``labels`` hold numbers.
        lines: Cells.
        remarks: What the numbers in brackets after a row's label stand for.
        labels: Columns of text at the left.
    """

    head: list[str]
    lines: list[list[str]]
    remarks: list[str]
    labels: int


def paper_sheet(table: Mapping[str, Any]) -> Sheet:
    """Lay out what `mgic.tables.build_table` returns."""
    remarks: list[str] = []
    for row in table["rows"]:
        said = _remarks(row)
        if said and said not in remarks:
            remarks.append(said)
    marks = [f" [{remarks.index(said) + 1}]" if (said := _remarks(row)) else "" for row in table["rows"]]
    head, lines = (_layer_cells if table["kind"] == "layers" else _result_cells)(table, marks)
    return Sheet(head, lines, remarks, labels=4 if table["kind"] == "layers" else 1)


def _result_cells(table: Mapping[str, Any], marks: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    rows, units = table["rows"], table["units"]
    others = [key for key in units if key not in ("params", "macs")]
    recorded = any(row["accuracy"] for row in rows)
    counted = {"params": "params", "macs": "MACs"}
    weighed = any("paper_weights" in (row["ours"] or {}) for row in rows)
    head = ["row"]
    for key, name in counted.items():
        head += [f"{name} printed", "ours", "off"] if key in units else [f"{name}, ours"]
    head += ["as the paper counts", "off"] * weighed
    head += [f"{_MEASURES.get(key, key)} {units[key] if units[key] != '1' else ''}".strip() for key in others]
    head += ["our accuracy %"] * recorded
    lines = []
    for row, mark in zip(rows, marks, strict=True):
        readings = [{"row": f"  {reading['reading']}", "ours": reading, **reading} for reading in row["readings"]]
        for line in (row, *readings):
            ours, off, said = line["ours"] or {}, line["deviation"], line.get("as_printed", {})
            cells = [line["row"] + (mark if line is row else "")]
            for key in counted:
                cells += [said.get(key, "")] * (key in units) + [_count(ours.get(key))]
                cells += [_per_cent(off.get(key))] * (key in units)
            cells += [_count(ours.get("paper_weights")), _per_cent(off.get("paper_weights"))] * weighed
            cells += [said.get(key, "") for key in others]
            lines.append(cells + [_accuracy(line.get("accuracy"))] * recorded)
    return head, lines


def _layer_cells(table: Mapping[str, Any], marks: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    shown = [
        key for key in ("kernels", *table["units"], "se", "pool") if any(key in r["printed"] for r in table["rows"])
    ]
    lines = []
    for row, mark in zip(table["rows"], marks, strict=True):
        built = row["built"] or {}
        verdict = (
            "" if not (built and row["printed"]) else f"not in {', '.join(row['differs'])}" if row["differs"] else "yes"
        )
        lines.append([row["row"] + mark, _layer(row["printed"], shown), _layer(built, shown), verdict])
    return ["layer", "printed", "built", "equal"], lines


def _layer(layer: Mapping[str, Any], shown: Sequence[str]) -> str:
    words = [str(layer[key]) for key in ("input", "layer") if key in layer]
    for key in shown:
        value = layer.get(key)
        if value is True:
            words.append({"se": "SE", "pool": "pool"}[key])
        elif value not in (None, False):
            text = " | ".join(value) if isinstance(value, list) else value
            words.append(_LAYER_WORDS.get(key, "{}").format(text))
    return "; ".join(words)


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _per_cent(number: float | None) -> str:
    return "" if number is None else f"{round(number, 1) + 0.0:+.1f} %"  # no minus before zero


def _accuracy(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    test = found["test"]
    return f"{test['mean']:.2f} ± {test['std']:.2f} ({found['n']} runs, {found['epochs']} epochs)"


def _remarks(row: Mapping[str, Any]) -> str:
    """Return all there is to be said of a row, in one paragraph."""
    said = []
    if row["misprint"]:
        said.append(f"Misprint: {row['misprint'].strip()}")
    if row["should_be"]:
        said.append(f"It should be {_values(row['should_be'])}.")
    for variant in row["variants"]:
        values = {key: value for key, value in variant.items() if key not in ("paper", "table", "units")}
        units = f" (in {_values(variant['units'])})" if "units" in variant else ""
        said.append(f"{variant['paper']}, {variant['table']}, prints {_values(values)}{units}.")
    if row["note"]:
        said.append(row["note"].strip())
    if row.get("accuracy"):
        said.append(
            f"Our accuracy: {row['accuracy']['record']}, trained by its own recipe on {row['accuracy']['data']}."
        )
    return " ".join(said)


def _values(values: Mapping[str, Any]) -> str:
    flat = {**{k: v for k, v in values.items() if not isinstance(v, Mapping)}, **values.get("overrides", {})}
    return ", ".join(f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in flat.items())


def _preface(table: Mapping[str, Any]) -> list[str]:
    """Return the paragraphs that stand before a table."""
    also = f" Also {'; '.join(table['also'])}." if table["also"] else ""
    size = " x ".join(map(str, table["input_size"]))
    said = [f"{table['caption']} {table['dataset']}; counted for an input of {size}. Source: {table['source']}.{also}"]
    if table["ours"]:
        name = " ".join([table["model"], *(f"{key}={value}" for key, value in table["overrides"].items())])
        said.append(f"{name}: {table['ours']['params']:,} parameters, {table['ours']['macs']:,} MACs.")
    said += [f"Misprint: {table['misprint'].strip()}"] if table["misprint"] else []
    return said + ([table["note"].strip()] if table["note"] else [])


def paper_table(table: Mapping[str, Any]) -> "Table":
    """Return a table of the papers for the terminal, what is to be said of it below."""
    from rich.table import Table
    from rich.text import Text

    sheet = paper_sheet(table)
    notes = [*_preface(table), *(f"[{i}] {remark}" for i, remark in enumerate(sheet.remarks, 1))]
    caption = Text("\n".join(notes))
    grid = Table(title=Text(table["title"]), caption=caption, box=None, pad_edge=False, caption_justify="left")
    for i, name in enumerate(sheet.head):
        grid.add_column(Text(name), justify="left" if i < sheet.labels else "right", overflow="fold")
    for line in sheet.lines:
        grid.add_row(*map(Text, line))
    return grid


def paper_markdown(table: Mapping[str, Any]) -> str:
    """Return a table of the papers as a section of Markdown."""
    sheet = paper_sheet(table)
    lines = [f"## {table['id']}", "", f"**{_escape(table['title'])}**", ""]
    for paragraph in _preface(table):
        lines += [_escape(paragraph), ""]
    lines.append(f"| {' | '.join(map(_escape, sheet.head))} |")
    lines.append("|" + "|".join([" --- "] * sheet.labels + [" ---: "] * (len(sheet.head) - sheet.labels)) + "|")
    lines += [f"| {' | '.join(_escape(cell.replace('  ', '↳ ', 1)) for cell in line)} |" for line in sheet.lines]
    lines += [f"\n\\[{i}\\] {_escape(remark)}" for i, remark in enumerate(sheet.remarks, 1)]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    for character in ("\\", "|", "*", "<", "[", "]", "_"):
        text = text.replace(character, f"\\{character}")
    return text


def paper_csv(tables: Sequence[Mapping[str, Any]]) -> str:
    """Return tables of the papers as CSV with one line per row, and one for each other reading of a row."""
    lines = []
    for table in tables:
        for row in table["rows"]:
            readings = row.get("readings", [])
            lines.append(_flat({"table": table["id"], **{k: v for k, v in row.items() if k != "readings"}}))
            for reading in readings:
                counts = {key: value for key, value in reading.items() if key not in ("reading", "deviation")}
                again = {"table": table["id"], "row": row["row"], "reading": reading["reading"], "ours": counts}
                lines.append(_flat({**again, "deviation": reading["deviation"], "source": row["source"]}))
    names = list(dict.fromkeys(name for line in lines for name in line))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"ours": {"params": 1}}`` as ``{"ours_params": 1}``; settings and lists stay whole, as JSON."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping) and key not in ("overrides", "should_be"):
            flat |= {f"{key}_{inner}": item for inner, item in _flat(value).items()}
        elif isinstance(value, Mapping | list):
            flat[key] = json.dumps(value) if value else None
        else:
            flat[key] = value
    return flat


OUTCOME_COLUMNS = ("variant", "params", "MACs", "ms", "runs", "train %", "test %")
CLAIM_COLUMNS = ("claim", "who says so", "here", "difference (95 %)", "n")
SUMMARY_COLUMNS = ("experiment", CLAIM_COLUMNS[0], *CLAIM_COLUMNS[2:])


def outcome_cells(variant: str, outcome: Outcome) -> list[str]:
    """A variant's row of `OUTCOME_COLUMNS`."""
    metrics, costs = outcome.record["metrics"], outcome.costs
    shown = [f"{costs[key]:{form}}" if key in costs else "" for key, form in (("macs", ","), ("ms", ".2f"))]
    scores = [mean_std(metrics[f"{split}_accuracy"]["values"]) for split in ("train", "test")]
    return [variant, f"{metrics['params']['values'][0]:,}", *shown, str(outcome.record["n"]), *scores]


def claim_cells(finding: Finding) -> list[str]:
    """A claim's row of `CLAIM_COLUMNS`."""
    claim, found = finding.claim, finding.difference
    says = claim.says + (f" (to {claim.margin:g} points)" if claim.margin else "")
    note = f"; {finding.note}" if finding.note else ""
    return [says, claim.source, finding.verdict, f"{found}{note}" if found else "", str(found.n) if found else ""]


_EXPERIMENTS = """What the papers claim, tested at a budget that two CPU cores can pay: 20,000 training images, 10 epochs
(15 where it says longer), a schedule of that length, and all test images there are. A difference is the mean, over seeds, of
what two runs of one seed differ by, in points, with its 95 % interval by Student's t. A claim *holds* where the whole
interval is above zero (or above minus the margin in brackets), *does not hold* where all of it is below, and is *undecided*
otherwise: three to five runs decide only what is large, and of some thirty claims chance alone will decide one or two.

`mgic experiment NAME` repeats one; the records are in `results/experiments/`."""


def experiments_markdown(outcomes: Mapping[str, Mapping[str, Outcome]]) -> str:
    """Return experiments as a page of Markdown.

    Args:
        outcomes: By experiment and variant.
    """
    lines = ["# Experiments", "", _EXPERIMENTS]
    if rows := [row for name, found in outcomes.items() for row in _summary(name, found)]:
        lines += ["", "## In short", "", *_markdown_table(SUMMARY_COLUMNS, rows, 3)]
    for name, found in outcomes.items():
        lines += ["", f"## {name}", "", EXPERIMENTS[name].question, ""]
        if not found:
            lines.append("Not run yet.")
            continue
        rows = [outcome_cells(variant, outcome) for variant, outcome in found.items()]
        lines += [*_markdown_table(OUTCOME_COLUMNS, rows, 1), ""]
        lines += _markdown_table(CLAIM_COLUMNS, [claim_cells(f) for f in findings(name, found)], 3)
        data = sorted({outcome.record["data"] for outcome in found.values()})
        places = [origin for outcome in found.values() for origin in origins(outcome.record)]
        machines = sorted({str(origin["machine"]["cpu"]) for origin in places})
        commits = sorted({str(origin["commit"]["id"])[:9] for origin in places})
        lines += ["", f"Data: {'; '.join(data)}. Machine: {', '.join(machines)}. Commits: {', '.join(commits)}."]
    return "\n".join(lines) + "\n"


def _summary(name: str, outcomes: Mapping[str, Outcome]) -> list[list[str]]:
    """The claims of an experiment that its runs say anything about."""
    cells = [claim_cells(finding) for finding in findings(name, outcomes) if finding.difference]
    return [[name, says, *rest] for says, _, *rest in cells]


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], labels: int) -> list[str]:
    rule = "|" + "|".join(" --- " if k < labels else " ---: " for k in range(len(head))) + "|"
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(map(_escape, row))} |" for row in rows)]


COSTS = {"params": "parameters", "macs": "multiply-adds", "ms": "milliseconds of one image, one thread"}
"""What a variant costs, and how an axis calls it."""
