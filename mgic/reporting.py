"""Tables and plots of results."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import UserError
from .experiments import EXPERIMENTS, Finding, Outcome, findings

if TYPE_CHECKING:
    from rich.table import Table

    from .scaling import ScalingRow
    from .surgery import Report, Row
    from .tables import Panel

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
otherwise: three runs decide only what is large, and of some thirty claims chance alone will decide one or two.

`mgic experiment NAME` repeats one; the records are in `results/experiments/`."""


def experiments_markdown(outcomes: Mapping[str, Mapping[str, Outcome]]) -> str:
    """Return experiments as a page of Markdown.

    Args:
        outcomes: By experiment and variant.
    """
    lines = ["# Experiments", "", _EXPERIMENTS]
    for name, found in outcomes.items():
        lines += ["", f"## {name}", "", EXPERIMENTS[name].question, ""]
        if not found:
            lines.append("Not run yet.")
            continue
        rows = [outcome_cells(variant, outcome) for variant, outcome in found.items()]
        lines += [*_markdown_table(OUTCOME_COLUMNS, rows, 1), ""]
        lines += _markdown_table(CLAIM_COLUMNS, [claim_cells(f) for f in findings(name, found)], 3)
        first = next(iter(found.values())).record
        commits = sorted({str(o.record["commit"]["id"])[:9] for o in found.values()})
        lines += ["", f"Data: {first['data']}. Machine: {first['machine']['cpu']}. Commits: {', '.join(commits)}."]
    return "\n".join(lines) + "\n"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], labels: int) -> list[str]:
    rule = "|" + "|".join(" --- " if k < labels else " ---: " for k in range(len(head))) + "|"
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(map(_escape, row))} |" for row in rows)]


COSTS = {"params": "parameters", "macs": "multiply-adds", "ms": "milliseconds of one image, one thread"}
"""What a variant costs, and how an axis calls it."""


def plot_outcomes(outcomes: Mapping[str, Outcome], path: Path, title: str) -> None:
    """Draw accuracy against each cost that is known: families in one colour, joined; bars are standard deviations.

    Args:
        outcomes: By variant.
        path: PNG file.
        title: Above the plots.

    Raises:
        UserError: Nothing was counted or timed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    known = [cost for cost in COSTS if any(cost in outcome.costs for outcome in outcomes.values())]
    if not known:
        raise UserError("no costs to plot against: mgic experiment NAME --times counts and times the networks")
    figure, axes = plt.subplots(1, len(known), figsize=(5 * len(known), 4), layout="constrained", squeeze=False)
    for ax, cost in zip(axes[0], known, strict=True):
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
        ax.set_xlabel(COSTS[cost])
        ax.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("test accuracy [%]")
    axes[0][-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_panels(panels: "Sequence[Panel]", path: Path, title: str) -> None:
    """Draw a figure of the papers: printed points, the papers' own networks bold, and our records as stars.

    Args:
        panels: What `mgic.tables.build_figure` gathered.
        path: PNG file.
        title: Above the plots.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(9 * len(panels), 5), layout="constrained", squeeze=False)
    colors, markers = plt.get_cmap("tab10"), "osD^v<>PXdh"
    for ax, panel in zip(axes[0], panels, strict=True):
        for i, (name, points) in enumerate(panel.printed.items()):
            bold = {"linewidth": 3, "markersize": 9, "zorder": 3} if name.startswith("MG") else {"linewidth": 1}
            ax.plot(*zip(*points, strict=True), marker=markers[i % 11], color=colors(i % 10), label=name, **bold)
        for i, (name, points) in enumerate(panel.measured.items()):
            style = {"color": colors(i % 10), "markeredgecolor": "k", "markersize": 16, "zorder": 4}
            ax.plot(*zip(*points, strict=True), "*", label=f"{name}: our record", **style)
        ax.set_xscale("log" if panel.logx else "linear")
        ax.set_yscale("log" if panel.logy else "linear")
        ax.set_xlabel(panel.xlabel)
        ax.set_ylabel(panel.ylabel)
        ax.set_title(panel.title, fontsize="medium")
        ax.grid(alpha=0.3, which="both")
        ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
        ax.xaxis.get_major_locator().set_params(integer=True)
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


def plot_scaling(rows: "Sequence[ScalingRow]", path: Path, title: str) -> None:
    """Draw parameters and multiply-adds over the width, beside the dense twin's, on logarithmic axes.

    Args:
        rows: What `mgic.scaling.scaling` counted.
        path: PNG file.
        title: Above the plots.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
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
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --before: #9aa7b8; --after: #1f77b4; --line: #8884; }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ padding: .25rem .5rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }}
td.n, th.n {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
td.bars {{ min-width: 8rem; width: 25%; }} td.why {{ min-width: 14rem; }}
.bar {{ height: .55rem; border-radius: 2px; }}
.before {{ background: var(--before); }} .after {{ background: var(--after); margin-top: 2px; }}
.kept td {{ opacity: .7; }}
.scroll {{ overflow-x: auto; }}
.key span {{ display: inline-block; width: 1rem; height: .6rem; margin: 0 .3rem 0 1rem; }}
</style></head><body>
<h1>{title}</h1>
<p>{summary}</p>
<ul>{notes}</ul>
<p class="key">Multiply-adds of each layer: <span class="before"></span>before <span class="after"></span>after</p>
<div class="scroll"><table><thead><tr><th>layer</th><th>kind</th><th></th><th class="n">parameters</th><th class="n">MACs</th>
<th>widths; channels per group</th><th>why</th></tr></thead><tbody>
{rows}
</tbody></table></div>
</body></html>
"""


def conversion_page(report: "Report") -> str:
    """Return the report of a conversion as one HTML page that needs nothing else: a bar for every layer, before and after."""
    most = max((row.macs for row in report.rows), default=0) or 1

    def line(row: "Row") -> str:
        def cell(before: int, after: int) -> str:
            return f"{before:,}" + (f"<br>{after:,}" if row.replaced else "")

        bars = "".join(
            f'<div class="bar {kind}" style="width:{100 * macs / most:.2f}%"></div>'
            for kind, macs in (("before", row.macs), ("after", row.macs_after))
        )
        grids = " ".join(map(str, row.widths)) + ("; " + " ".join(map(str, row.effective)) if row.widths else "")
        words = "kept" if not row.replaced else f"{row.action}, s_g {row.group_size}, s_c {row.coarsest}"
        reason = f"{words}: {row.reason}" if row.reason else words
        return (
            f'<tr class="{"" if row.replaced else "kept"}"><td>{escape(row.name or "(the network)")}</td>'
            f'<td>{escape(row.kind)}</td><td class="bars">{bars}</td><td class="n">{cell(row.params, row.params_after)}</td>'
            f'<td class="n">{cell(row.macs, row.macs_after)}</td><td>{grids}</td><td class="why">{escape(reason)}</td></tr>'
        )

    replaced = sum(row.replaced for row in report.rows)
    summary = (
        f"{replaced} of {len(report.rows)} layers and blocks replaced. Before: {report.before}. After: {report.after}: "
        f"{report.after.params / max(report.before.params, 1):.1%} of the parameters, "
        f"{report.after.macs / max(report.before.macs, 1):.1%} of the multiply-adds."
    )
    return _PAGE.format(
        title=escape(f"{report.model}, converted"),
        summary=escape(summary),
        notes="".join(f"<li>{escape(note)}</li>" for note in report.notes),
        rows="\n".join(map(line, report.rows)),
    )


def conversion_table(report: "Report") -> "Table":
    """Return the layers of a converted network for the terminal."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("layer", "became", "params", "MACs", "channels/group", "why"):
        table.add_column(name, justify="right" if name in ("params", "MACs") else "left")
    for row in report.rows:
        became = row.action if not row.replaced else f"{row.action} {row.group_size}/{row.coarsest}"
        params, macs = (
            f"{before:,} -> {after:,}" if row.replaced else f"{before:,}"
            for before, after in ((row.params, row.params_after), (row.macs, row.macs_after))
        )
        levels = " ".join(f"{width}/{size}" for width, size in zip(row.widths, row.effective, strict=True))
        table.add_row(row.name or "(the network)", became, params, macs, levels, row.reason)
    return table
