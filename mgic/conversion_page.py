"""The report of a conversion, layer by layer: for the terminal, and as a page of its own."""

from html import escape
from typing import TYPE_CHECKING

from .conversion_report import ConversionReport, LayerReport

if TYPE_CHECKING:
    from rich.table import Table

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


def conversion_page(report: ConversionReport) -> str:
    """Return the report of a conversion as one HTML page that needs nothing else: a bar for every layer, before and after."""
    most = max((row.macs for row in report.rows), default=0) or 1

    def line(row: LayerReport) -> str:
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


def conversion_table(report: ConversionReport) -> "Table":
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
