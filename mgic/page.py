"""The report: one HTML page, without a network, of everything the records say."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from . import __version__
from .cycle import MGICBlock
from .errors import UserError
from .experiments import EXPERIMENTS, Outcome, findings, read_outcomes
from .hierarchy import Level
from .models import create_model
from .reporting import CLAIM_COLUMNS, COSTS, OUTCOME_COLUMNS, claim_cells, mean_std, outcome_cells, paper_sheet
from .smoothing import SmoothingInChannels
from .svg import Axis, Point, hierarchy, plot
from .tables import build_table, table_ids
from .training import read_records
from .training.records import origins

Record = dict[str, Any]
MODELS = ("mgic_resnet56", "mgic_resnet50", "mgic_mobilenetv3_100", "mgiad18")
"""Networks whose hierarchies are drawn where none are asked for."""


@dataclass(frozen=True)
class Section:
    """A chapter of the page.

    Args:
        title: Its heading.
        body: HTML.
    """

    title: str
    body: str

    @property
    def anchor(self) -> str:
        """Where links to it lead."""
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


def build_page(folder: Path, models: Sequence[str] = MODELS) -> str:
    """The page of all records in a folder.

    Args:
        folder: Of results.
        models: Networks whose hierarchies are drawn.

    Raises:
        UserError: The folder holds no records, or a network is unknown or has no hierarchy.
    """
    records = read_records(folder)
    outcomes = {name: read_outcomes(name, folder / "experiments" / name) for name in EXPERIMENTS}
    chapters: list[tuple[str, Callable[[], Iterator[str]]]] = [
        ("Experiments", lambda: _experiments(outcomes)),
        ("Speed", lambda: _speed(records)),
        ("Tables of the papers", lambda: _papers(records)),
        ("Learning curves", lambda: _curves(records)),
        ("Hierarchies", lambda: _hierarchies(models)),
        ("What conversion covers", lambda: _coverage(records)),
        ("Faults survived", lambda: _faults(records)),
        ("All records", lambda: _all(records)),
    ]
    found = [Section(title, body) for title, chapter in chapters if (body := "\n".join(chapter()))]
    links = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in found)
    body = "\n".join(f'<section id="{s.anchor}"><h2>{escape(s.title)}</h2>\n{s.body}</section>' for s in found)
    style, script = (files(__package__).joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mgic: the report</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>mgic: the report</h1>
<p>Multigrid in channels: what {len(records)} records say. Point at a mark to see what it is; click on the head of a column to
sort by it. Nothing on this page is fetched from anywhere.</p>
<nav>{links}</nav>
</header>
<main>
{body}
</main>
<footer>Written by mgic {escape(__version__)}. A record names its command, commit, machine, data and seeds.</footer>
<div id="says" role="status" hidden></div>
<script>
{script}</script>
</body>
</html>
"""


_NUMBER = re.compile(r"[+-]?\d[\d,]*(\.\d+)?([eE][+-]?\d+)?")


def _table(name: str, head: Sequence[str], rows: Sequence[Sequence[str]], labels: int, search: bool = False) -> str:
    """A table that can be sorted; columns after ``labels`` hold numbers, of which the first of a cell counts."""
    kinds = ["" if k < labels else ' class="n"' for k in range(len(head))]
    columns = zip(head, kinds, strict=True)
    top = "".join(f'<th scope="col"{kind}><button type="button">{escape(text)}</button></th>' for text, kind in columns)
    lines = []
    for row in rows:
        cells = []
        for text, kind in zip(row, kinds, strict=True):
            counted = _NUMBER.search(text) if kind else None
            value = f' data-value="{counted[0].replace(",", "")}"' if counted else ""
            verdict = f' class="{text.replace(" ", "-")}"' if text in ("holds", "does not hold") else kind
            cells.append(f"<td{verdict}{value}>{escape(text)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    box = f'<label class="filter">Show rows with <input type="search" data-table="{name}"></label>' if search else ""
    body = "\n".join(lines)
    return f'{box}<div class="scroll"><table id="{name}"><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _figure(drawing: str, caption: str) -> str:
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def _experiments(outcomes: Mapping[str, Mapping[str, Outcome]]) -> Iterator[str]:
    for name, found in outcomes.items():
        yield f"<h3>{escape(name)}</h3><p>{escape(EXPERIMENTS[name].question)}</p>"
        if not found:
            yield '<p class="soft">Not run yet.</p>'
            continue
        yield _table(f"outcomes-{name}", OUTCOME_COLUMNS, [outcome_cells(v, o) for v, o in found.items()], 1)
        drawings = [_against_cost(found, cost, label) for cost, label in COSTS.items()]
        yield f'<div class="plots">{"".join(filter(None, drawings))}</div>'
        yield _table(f"claims-{name}", CLAIM_COLUMNS, [claim_cells(f) for f in findings(name, found)], 3)


def _against_cost(found: Mapping[str, Outcome], cost: str, label: str) -> str:
    """Accuracy of the variants against what they cost; families in one colour, their points joined."""
    families: dict[str, list[Point]] = {}
    for variant, outcome in found.items():
        if cost not in outcome.costs:
            continue
        metric = outcome.record["metrics"]["test_accuracy"]
        says = f"{variant}\n{mean_std(metric['values'])} % test\n{outcome.costs[cost]:,.4g} {label}"
        family = variant.partition(":")[0]
        families.setdefault(family, []).append(Point(outcome.costs[cost], metric["mean"], says, metric["std"]))
    if not families:
        return ""
    return _figure(
        plot(families, Axis(label, log=True), Axis("test accuracy, %"), lines=True), f"Accuracy against {label}."
    )


def _speed(records: Mapping[str, Record]) -> Iterator[str]:
    rows: list[list[str]] = []
    points: dict[str, list[Point]] = {}
    for file, record in records.items():
        for one in record.get("comparisons", ()):
            setting = f"batch {one['batch']}, {one['threads']} thread{'s' if one['threads'] > 1 else ''}"
            numbers = [f"{one[key]:.2f}" for key in ("flop_ratio", "time_ratio", "efficiency")]
            names = [str(one[key]) for key in ("network", "path", "peer", "peer_path", "batch", "threads")]
            rows.append([*names, *numbers, file])
            says = f"{one['network']} ({one['path']})\nagainst {one['peer']} ({one['peer_path']}), {setting}\n"
            says += f"{numbers[0]} of the multiply-adds, {numbers[1]} of the time"
            if min(one["flop_ratio"], one["time_ratio"]) > 0:
                points.setdefault(one["path"], []).append(Point(one["flop_ratio"], one["time_ratio"], says))
    if not rows:
        return
    yield (
        "<p>Each network in its fastest path against its peer in the fastest path of that one. Below a time ratio of 1 it is "
        "faster. Efficiency is the ratio of multiply-adds over that of times: 1 where fewer operations became as much less "
        "time.</p>"
    )
    axes = Axis("ratio of multiply-adds", log=True), Axis("ratio of time", log=True)
    yield _figure(plot(points, *axes), "Time against multiply-adds, both as ratios to the peer; one mark a comparison.")
    head = (
        "network",
        "path",
        "peer",
        "peer's path",
        "batch",
        "threads",
        "MAC ratio",
        "time ratio",
        "efficiency",
        "record",
    )
    yield _table("comparisons", head, rows, 4, search=True)


def _papers(records: Mapping[str, Record]) -> Iterator[str]:
    yield "<p>Every number the five papers print in a table, what we count, and what we measured.</p>"
    ours = [{**record, "file": file} for file, record in records.items()]
    for id_ in table_ids():
        table = build_table(id_, ours)
        sheet = paper_sheet(table)
        rows = [[cell.strip() for cell in line] for line in sheet.lines]
        remarks = "".join(f"<li>{escape(remark)}</li>" for remark in sheet.remarks)
        notes = f'<ol class="soft">{remarks}</ol>' if remarks else ""
        grid = _table(f"table-{id_}", sheet.head, rows, sheet.labels, search=len(rows) > 12)
        yield f"<details><summary>{escape(id_)}: {escape(table['caption'])}</summary>{grid}{notes}</details>"


def _curves(records: Mapping[str, Record]) -> Iterator[str]:
    """One plot a data set and score: the mean over seeds after each epoch."""
    plots: dict[tuple[str, str, str], dict[str, list[Point]]] = {}
    for file, record in records.items():
        histories = [h for h in record.get("history", ()) if h]
        if not histories or "recipe" not in record:
            continue
        score = next((key for key in histories[0][0] if key.startswith("test_") and key != "test_loss"), "test_loss")
        line = []
        for rows in zip(*histories, strict=False):
            values = [row[score] for row in rows if math.isfinite(row.get(score, math.nan))]
            if len(values) == len(rows):  # a run that went wrong has no mean
                line.append(
                    Point(rows[0]["epoch"], fmean(values), f"{file}\nepoch {rows[0]['epoch']}: {fmean(values):.4g}")
                )
        folder, _, name = file.removesuffix(".json").rpartition("/")
        if line:
            plots.setdefault((folder, record["recipe"]["data"], score), {})[name] = line
    drawings = []
    for (folder, data, score), lines in sorted(plots.items()):
        label = score.removeprefix("test_").replace("accuracy", "accuracy, %").replace("miou", "mean IoU, %")
        positive = min(p.y for line in lines.values() for p in line) > 0
        drawing = plot(
            lines, Axis("epoch"), Axis(f"test {label}", log=score == "test_mse" and positive), marks=False, lines=True
        )
        drawings.append(
            _figure(drawing, f"{folder + ': ' if folder else ''}{data}: mean over the seeds of each record.")
        )
    if drawings:
        yield f'<div class="plots">{"".join(drawings)}</div>'


def _hierarchies(models: Sequence[str]) -> Iterator[str]:
    yield "<p>Blocks of some networks, level by level: bars are channels, cuts are groups; R restricts, P prolongs.</p>"
    for name in models:
        with torch.device("meta"):
            network = create_model(name)
        blocks = [m for m in network.modules() if isinstance(m, MGICBlock | SmoothingInChannels)]
        if not blocks:
            raise UserError(f"{name} has no hierarchy to draw: it holds no multigrid block")
        kinds: dict[tuple[Level, ...], int] = {}
        for block in blocks:
            kinds[tuple(block.levels)] = kinds.get(tuple(block.levels), 0) + 1
        drawings = [
            _figure(hierarchy(levels, f"{name}: {levels[0].channels} channels"), f"{count} of {len(blocks)} blocks.")
            for levels, count in kinds.items()
        ]
        yield f"<h3>{escape(name)}</h3><div class='plots'>{''.join(drawings)}</div>"


def _coverage(records: Mapping[str, Record]) -> Iterator[str]:
    record = records.get("conversion-coverage.json")
    if record is None:
        return
    head = ("network", "layers", "blocks", "convolutions", "kept", "params", "after", "MACs", "after")
    counts = ("rows", "block", "conv", "kept", "params", "params_after", "macs", "macs_after")
    yield f"<p>{len(record['rows'])} networks, each converted by one rule; every layer is replaced or kept with a reason.</p>"
    yield _table(
        "coverage", head, [[row["network"], *(f"{row[key]:,}" for key in counts)] for row in record["rows"]], 1, True
    )


def _faults(records: Mapping[str, Record]) -> Iterator[str]:
    record = records.get("faults.json")
    if record is None:
        return
    rows = [
        [id_, f"{row['trials']:,}", f"{row['passes']:,}", f"{row['seconds']:.0f}"]
        for id_, row in record["faults"].items()
    ]
    total = sum(row["trials"] for row in record["faults"].values())
    yield f"<p>{total:,} trials of {len(rows)} kinds of fault; what each is: docs/faults.md.</p>"
    yield _table("faults", ("fault", "trials", "passed", "seconds"), rows, 1)


def _all(records: Mapping[str, Record]) -> Iterator[str]:
    head = ("record", "command", "runs", "commit", "date", "processor")
    rows = []
    for file, r in records.items():
        commits, processors = (
            dict.fromkeys(map(_commit, origins(r))),
            {o["machine"].get("cpu") or "" for o in origins(r)},
        )
        rows.append(
            [file, r["command"], str(r["n"]), ", ".join(commits), r["date"][:10], ", ".join(sorted(processors))]
        )
    yield _table("records", head, rows, len(head), search=True)


def _commit(origin: Mapping[str, Any]) -> str:
    commit = origin["commit"]
    return f"{str(commit.get('id'))[:9]}{' (changed)' if commit.get('dirty') else ''}"
