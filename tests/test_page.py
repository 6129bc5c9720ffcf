"""The report: drawings that show their numbers, a page that fetches nothing, and what a browser makes of it."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mgic import UserError, page, plan_levels
from mgic.cli import main
from mgic.svg import Axis, Point, hierarchy, number, plot, standalone
from mgic.tables import build_table, table_ids
from mgic.training import make_record, write_record

ROOT = Path(__file__).parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: chromium)")


def marks(drawing):
    """Places of the marks that say something, in pixels, by what they say."""
    found = {}
    for node in ElementTree.fromstring(drawing).iter("path"):
        if "data-says" in node.attrib:
            x, y = re.fullmatch(r"translate\(([\d.]+),([\d.]+)\)", node.attrib["transform"]).groups()
            found[node.attrib["data-says"]] = float(x), float(y)
    return found


@pytest.mark.parametrize("log", [False, True])
def test_marks_lie_where_their_numbers_say_and_keep_their_order(log):
    values = [1.0, 10.0, 100.0, 1000.0]
    points = [Point(v, v, str(v)) for v in values]
    found = marks(plot({"a": points}, Axis("x", log), Axis("y", log)))
    places = [found[str(v)] for v in values]
    across, up = [x for x, _ in places], [y for _, y in places]
    assert across == sorted(across)
    assert up == sorted(up, reverse=True), "larger is higher"
    gaps = [b - a for a, b in pairwise(across)]
    assert gaps == pytest.approx([gaps[0]] * 3, abs=0.2) if log else gaps[2] == pytest.approx(10 * gaps[1], rel=0.02)


def test_axes_have_ticks_inside_and_every_series_is_in_the_legend():
    drawing = plot(
        {"one & two": [Point(3, 93.2, "a", 0.4)], "b": [Point(5e6, 91.0, "b")]}, Axis("n", True), Axis("%"), lines=True
    )
    words = [node.text for node in ElementTree.fromstring(drawing).iter("text")]
    assert {"one & two", "b", "n", "%"} <= set(words)
    assert {"10", "1k", "1M"} <= set(words) or {"100", "10k", "1M"} <= set(words)
    assert {"91", "92", "93"} <= set(words) or {"91", "91.5", "92"} <= set(words)
    assert drawing.count('class="spread') == 1


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="needs a point"):
        plot({}, Axis("x"), Axis("y"))
    with pytest.raises(ValueError, match="no place for 0"):
        plot({"a": [Point(0, 1, "")]}, Axis("x", log=True), Axis("y"))
    one = plot({"a": [Point(5, 5, "alone")]}, Axis("x"), Axis("y"))
    assert list(marks(one)) == ["alone"]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1000, "1k"), (-2.5e6, "-2.5M"), (1e9, "1G"), (1e-4, "0.0001")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_a_hierarchy_shows_every_level_and_group():
    levels = plan_levels(64, group_size=8, coarsest=16)
    drawing = ElementTree.fromstring(hierarchy(levels, "a block"))
    widths = [float(node.attrib["width"]) for node in drawing.iter("rect")]
    assert widths == pytest.approx([widths[0], widths[0] / 2, widths[0] / 4])
    cuts = [node.attrib["d"].count("M") for node in drawing.iter("path") if node.attrib["class"] == "cut"]
    assert cuts == [7, 3, 0]
    said = [node.attrib["data-says"] for node in drawing.iter("g")]
    assert said == [
        "level 0: 64 channels, 8 groups of 8",
        "level 1: 32 channels, 4 groups of 8",
        "level 2: 16 channels, dense",
    ]
    bottleneck = hierarchy(plan_levels(256, group_size=32, coarsest=32, hidden=64), "a bottleneck")
    assert "level 0: 256 channels, 64 inside, 2 groups of 32" in bottleneck, (
        "counted on the narrower side, as elsewhere"
    )


def test_the_picture_of_the_documentation_is_what_is_planned():
    drawn = standalone(hierarchy(plan_levels(256, group_size=16, coarsest=32), "A block of 256 channels"))
    ElementTree.fromstring(drawn)
    assert (ROOT / "docs" / "hierarchy.svg").read_text() == drawn


class Tags(HTMLParser):
    """Whether tags close each other; what is fetched; identifiers."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.ids, self.targets = [], [], [], []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids += [given["id"]] if "id" in given else []
        self.fetched += [given[key] for key in ("src", "srcset", "data") if key in given]
        self.targets += [given["href"]] if "href" in given else []
        if tag not in ("meta", "input", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


TABLES = ["mgic-3", "mgic-4", "mg2020-1", "mgiad-9"]
"""Of all kinds; to count every network of every table takes a minute."""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of this repository's own records, by the verb itself, with some of the tables."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    words = ["report", "--results", str(ROOT / "results"), "--models", "[mgic_resnet56, mgiad18]", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "table_ids", lambda: TABLES)
        assert main(words) == 0
    return out


def test_the_page_has_every_table_of_the_papers(monkeypatch):
    monkeypatch.setattr(page, "build_table", lambda id_, records: build_table("mgic-3", records))
    text = "".join(page._papers({}))
    assert re.findall(r"<summary>([\w-]+): ", text) == table_ids()


def test_the_page_is_whole_and_fetches_nothing(report):
    text = report.read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert len(set(tags.ids)) == len(tags.ids)
    assert tags.fetched == []
    assert tags.targets
    assert all(target.startswith("#") and target[1:] in tags.ids for target in tags.targets)
    assert "url(" not in text
    assert not re.search(r"\b(fetch|XMLHttpRequest|import)\s*\(", text)
    for table in TABLES:
        assert f"<summary>{table}: " in text
    assert text.count("<table") == text.count("<thead>")
    records = page.read_records(ROOT / "results")
    assert all(f"<td>{name}</td>" in text for name in records)


def browse(report, script, *flags):
    """What a script at the end of the page writes into its title; no error may reach the console."""
    tried = report.with_name("tried.html")
    ending = f"<script>\ndocument.title = JSON.stringify((() => {{ {script} }})());\n</script>\n</body>"
    tried.write_text(report.read_text().replace("</body>", ending))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom", *flags]
    done = subprocess.run([*command, tried.as_uri()], capture_output=True, text=True, timeout=300, check=True)
    assert not re.search(r"CONSOLE.*(error|uncaught)", done.stderr, re.IGNORECASE), done.stderr[-2000:]
    assert 'data-ready="yes"' in done.stdout
    return re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]


@browser
def test_tables_sort_and_filter_and_marks_speak(report):
    said = browse(
        report,
        """
        const rows = (id) => [...document.querySelectorAll(`#${id} tbody tr`)].filter((row) => !row.hidden);
        const column = (id, k) => rows(id).map((row) => row.cells[k]);
        const numbers = (k) => column("coverage", k).map((c) => Number(c.dataset.value));
        const head = document.querySelectorAll("#coverage th button")[5];
        head.click();
        const up = numbers(5).every((v, k, all) => !k || all[k - 1] <= v);
        head.click();
        const down = numbers(5).every((v, k, all) => !k || all[k - 1] >= v);
        const all = column("coverage", 0).length;
        const box = document.querySelector("input[data-table=coverage]");
        box.value = "ResNet50";
        box.dispatchEvent(new Event("input"));
        const names = column("coverage", 0).map((c) => c.textContent);
        const mark = document.querySelector("svg .mark[data-says]");
        mark.dispatchEvent(new Event("pointerenter"));
        const tip = document.getElementById("says");
        const shown = !tip.hidden && tip.textContent === mark.dataset.says;
        mark.dispatchEvent(new Event("pointerleave"));
        const some = all > names.length && names.length > 0 && names.every((name) => name.includes("resnet50"));
        return [up, down, some, shown, tip.hidden];
        """,
    )
    assert said == "[true,true,true,true,true]"


@browser
@pytest.mark.parametrize("width", [1400, 768, 390])
def test_the_page_fits_windows_of_any_width(report, width):
    said = browse(
        report,
        """
        const figures = [...document.querySelectorAll("figure svg")].map((svg) => svg.getBoundingClientRect());
        const room = document.documentElement.clientWidth;
        const inside = figures.every((figure) => figure.width > 0 && figure.right <= room);
        return [document.documentElement.scrollWidth <= room, figures.length > 5, inside];
        """,
        f"--window-size={width},900",
    )
    assert said == "[true,true,true]"


@browser
@pytest.mark.parametrize(("flags", "dark"), [([], False), (["--blink-settings=preferredColorScheme=0"], True)])
def test_the_page_follows_the_readers_light_or_dark(report, flags, dark):
    said = browse(
        report,
        r"""
        const light = (color) => color.match(/\d+/g).slice(0, 3).map(Number).reduce((a, b) => a + b);
        const style = getComputedStyle(document.body);
        return light(style.backgroundColor) < light(style.color);
        """,
        *flags,
    )
    assert said == str(dark).lower()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--results", "nowhere"], "nowhere: no such folder"),
        (["--models", "[resnet20]"], "resnet20 has no hierarchy to draw"),
        (["--models", "[mgic_resnet57]"], "did you mean mgic_resnet56"),
    ],
)
def test_a_wrong_call_is_one_line(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(page, "table_ids", list)
    assert main(["report", *words]) == 2
    assert re.search(f"^mgic: .*{said}", capsys.readouterr().err, re.MULTILINE)
    assert not (tmp_path / "report.html").exists()


def test_what_a_record_says_is_text_and_never_markup(tmp_path, monkeypatch):
    evil = "\"><script>alert(1)</script><b x='"
    record = make_record(evil, evil, [0], {evil: [1.0]}, notes=[evil])
    record |= {"commit": {"id": evil, "dirty": False}, "machine": {"cpu": evil}}
    one = {"network": evil, "path": evil, "peer": evil, "peer_path": evil, "batch": 1, "threads": 1}
    comparison = {**one, "flop_ratio": 0.5, "time_ratio": 0.6, "efficiency": 0.8}
    history = [[{"epoch": 1, "test_accuracy": 50.0, "test_loss": 1.0}]]
    write_record(
        tmp_path / "a<b>.json", {**record, "comparisons": [comparison], "history": history, "recipe": {"data": evil}}
    )
    fault = {"trials": 1, "passes": 1, "seconds": 0.0}
    write_record(tmp_path / "faults.json", {**record, "faults": {evil: fault}})
    monkeypatch.setattr(page, "table_ids", list)
    text = page.build_page(tmp_path, ["mgiad18"])
    tags = Tags()
    tags.feed(text)
    assert text.count("<script>") == 1, "the page's own"
    assert "alert(1)" in text
    assert "a<b>" not in text


@pytest.mark.parametrize("values", [[float("nan"), 50.0], [float("inf"), 50.0]])
def test_runs_that_went_wrong_leave_gaps_not_errors(values, tmp_path):
    history = [[{"epoch": k, "test_accuracy": v, "test_loss": 1.0} for k, v in enumerate(values)]]
    records = {"a.json": {"history": history, "recipe": {"data": "d"}}}
    (drawn,) = page._curves(records)
    assert drawn.count("<svg") == 1
    with pytest.raises(ValueError, match="which is not finite"):
        plot({"a": [Point(1, values[0], "odd")]}, Axis("x"), Axis("y"))


def test_a_file_that_is_no_record_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match=r"a\.json: record of schema None"):
        page.read_records(tmp_path)
