"""The Python on the pages runs, in order, and prints what the pages say."""

import json
import re
from pathlib import Path
from statistics import median

import pytest
from pages import run_page

import mgic
from mgic.experiments import EXPERIMENTS, file_name, findings, read_outcomes

ROOT = Path(__file__).parents[1]
PAGES = ("docs/theory.md", "docs/choosing.md")


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran, compared = run_page((ROOT / page).read_text(), page)
    assert ran >= 3
    assert compared >= 3


def whole_table(page, name):
    """All rows between ``<!-- name -->`` and ``<!-- /name -->``, without marks of code."""
    text = (ROOT / page).read_text().partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 2, name
    return [[cell.replace("`", "").strip() for cell in row.strip("|").split("|")] for row in rows]


def table(page, name):
    """The rows below the head."""
    return whole_table(page, name)[2:]


def head(page, name):
    """The names of the columns."""
    return whole_table(page, name)[0]


def short(network):
    """``mgic_resnet50:group_size=32,coarsest=64`` as the page writes it."""
    return network.replace(":group_size=", " ").replace(",coarsest=", " / ")


def record(name):
    return json.loads((ROOT / "results" / name).read_text())


def medians(bench):
    """``(network, path) -> `` the timing of one image on one thread."""
    return {(t["network"], t["path"]): t for t in reversed(bench["timings"]) if (t["batch"], t["threads"]) == (1, 1)}


def test_the_table_of_runtimes_is_the_record():
    """Time ratios of one image: eager by the faster of two layouts, fastest as the comparisons have it."""
    bench = record("bench-efficiency.json")
    timings = medians(bench)

    def eager(network):
        return min(timings[network, path]["ms"] for path in ("eager", "eager_nhwc"))

    assert table("docs/choosing.md", "runtimes") == [
        [
            short(c["network"]),
            f"{c['flop_ratio']:.2f}",
            f"{eager(c['network']) / eager(c['peer']):.2f}",
            f"{c['time_ratio']:.2f}",
        ]
        for c in bench["comparisons"]
    ]


def test_the_table_of_memory_is_the_record():
    bench = record("bench-efficiency.json")
    timings = medians(bench)
    assert table("docs/choosing.md", "peak") == [
        [
            short(c["network"]),
            *(f"{timings[network, 'engine']['peak_mib']:.0f}" for network in (c["peer"], c["network"])),
        ]
        for c in bench["comparisons"]
    ]


def test_the_table_of_what_holds_the_engine_back_is_the_records():
    for name, *shares in table("docs/choosing.md", "held"):
        found = record(f"engine-profile/{name.replace(' / ', '-').replace(' ', '-')}.json")
        held = re.search(r"arithmetic: (\d+)%, around the sums: (\d+)%, memory: (\d+)%", " ".join(found["notes"]))
        assert shares == [f"{share} %" for share in held.groups()]


def test_the_table_of_a_time_budget_is_the_record():
    choices = record("conversion-resnet50-target-ms.json")["budget"]["choices"]
    assert table("docs/choosing.md", "budget") == [
        [c["stage"], str(c["group_size"]), str(c["coarsest"]), f"{c['after'] / c['before']:.2f}"]
        for c in choices
        if c["group_size"]
    ]


FILES = {
    "ONNX": "onnx.onnx",
    "ONNX, int8": "onnx_int8.onnx",
    "OpenVINO": "openvino.xml",
    "ExecuTorch": "executorch.pte",
    "torch.export": "torch.pt2",
}


def test_the_table_of_formats_is_the_record():
    times = {t["network"]: t["ms"] for t in record("export.json")["timings"]}
    pairs = {name: (f"resnet50-{file}", f"resnet50_converted-{file}") for name, file in FILES.items()}
    eager = "torchvision:resnet50"
    pairs["eager PyTorch"] = (eager, f"{eager}:conversion={{group_size: 32, coarsest: 64}}")
    assert table("docs/choosing.md", "formats") == [
        [name, f"{times[dense]:.0f}", f"{times[small]:.0f}", f"{times[small] / times[dense]:.2f}"]
        for name, (dense, small) in pairs.items()
    ]


def test_the_table_of_conversions_is_the_record():
    rows = {row["network"]: row for row in record("conversion-coverage.json")["rows"]}
    for name, *shares in table("docs/choosing.md", "conversions"):
        row = rows[f"torchvision:{name}"]
        assert shares == [f"{row[f'{what}_after'] / row[what]:.2f}" for what in ("params", "macs")]


def test_the_table_of_light_networks_is_the_record():
    assert table("docs/choosing.md", "light") == [
        [c["network"], f"{c['flop_ratio']:.2f}", f"{c['time_ratio']:.2f}"]
        for c in sorted(record("bench-lightweight.json")["comparisons"], key=lambda c: c["time_ratio"])
    ]


def test_the_table_of_functions_is_the_records():
    rows = []
    for width in (32, 64, 128, 256):
        names = (f"{kind}function_net-{width}.json" for kind in ("", "ghost_", "mgic_"))
        metrics = [record(f"function-approximation/{name}")["metrics"] for name in names]
        errors = [
            f"{1e4 * m['mse']['mean']:.2f}\u00a0±\u00a0{1e4 * m['mse']['std']:.2f}" for m in metrics
        ]  # kept on one line
        rows.append([str(width), *errors, *(f"{m['params']['mean']:,.0f}" for m in metrics)])
    assert table("docs/beyond.md", "functions") == rows


def test_the_table_of_coarse_maps_is_the_records():
    rows = []
    for size in (32, 16, 8, 4):
        found = [record(f"coarse-representation/{series}-{size}.json")["metrics"] for series in ("trained", "optimum")]
        shares = [f"{100 * m['share_of_mean_square']['mean']:.2f} %" for m in found]
        rows.append([str(size), f"{found[0]['params']['mean']:,.0f}", *shares])
    assert table("docs/beyond.md", "coarse") == rows


def test_the_table_of_segmentation_is_the_records():
    records = [record(f"camvid/camvid-{name}.json")["metrics"] for name in head("docs/beyond.md", "camvid")[1:]]
    assert len(records) == len(list((ROOT / "results/camvid").glob("*.json")))

    def row(name, key, spread=False):
        cells = [(m[key]["mean"], m[key]["std"], m[key]["values"]) for m in records]
        return [
            name,
            *(f"{mean:.1f} ± {std:.1f}" if spread and len(v) > 1 else f"{mean:.1f}" for mean, std, v in cells),
        ]

    classes = [key for key in records[0] if key.startswith("test_iou_")]
    assert table("docs/beyond.md", "camvid") == [
        ["parameters", *(f"{m['params']['mean']:,.0f}" for m in records)],
        ["seeds", *(str(len(m["test_miou"]["values"])) for m in records)],
        row("mIoU", "test_miou", spread=True),
        row("pixels right", "test_pixel_accuracy", spread=True),
        *(row(key.removeprefix("test_iou_"), key) for key in classes),
    ]


def test_the_table_of_accuracies_is_the_records():
    for variant, group_size, coarsest, params, seeds, score in table("docs/choosing.md", "accuracy"):
        name = "parts" if variant in EXPERIMENTS["parts"].variants else "effects"
        found = record(f"experiments/{name}/{file_name(variant)}")
        stated, right = found["recipe"]["model_args"], found["metrics"]["test_accuracy"]
        assert (group_size, coarsest) == (
            str(stated["group_size"]),
            "-" if "plan" in str(stated) else str(stated["coarsest"]),
        )
        assert params == f"{found['metrics']['params']['values'][0]:,}"
        assert score == f"{right['mean']:.1f} ± {right['std']:.1f}"
        assert seeds == str(found["n"])


def test_what_accuracies_differ_by_is_what_the_records_say():
    said = " ".join((ROOT / "docs/choosing.md").read_text().partition("<!-- /accuracy -->")[2].split())
    claims = {
        "effects": (3, 4, 5, 6),
        "parts": (0, 1, 7),
        "overfitting": (0, 1, 2, 4),
        "width": (0, 1, 2),
    }  # their places
    for name, places in claims.items():
        found = findings(name, read_outcomes(name, ROOT / "results/experiments" / name))
        for finding in (found[k] for k in places):
            gap = finding.difference
            interval = f" ({gap.low:.1f} to {gap.high:.1f})"
            assert f"{gap.mean:.1f}" + (
                interval if "s_g 16" not in finding.claim.says else ", undecided"
            ) in said.replace(" points", "")


def test_what_is_learned_of_the_training_images_is_what_the_records_say():
    said = " ".join((ROOT / "docs/choosing.md").read_text().split())
    found = read_outcomes("width", ROOT / "results/experiments/width")
    learned, lost = {}, {}
    for name, outcome in found.items():
        right, test = (outcome.record["metrics"][f"{part}_accuracy"]["mean"] for part in ("train", "test"))
        learned.setdefault(name.partition(":")[0], []).append(right)
        lost.setdefault(name.partition(":")[0], []).append(right - test)
    for family, start in (("MGIC", "a width gets"), ("dense", "a dense one")):
        assert f"{start} {min(learned[family]):.0f} to {max(learned[family]):.0f} %" in said
    assert f"they lose {min(lost['MGIC']):.1f} to {max(lost['MGIC']):.1f} points" in said
    assert f"the dense ones {min(lost['dense']):.1f} to {max(lost['dense']):.1f}" in said


def test_the_light_networks_accuracies_are_the_records():
    found = read_outcomes("lightweight", ROOT / "results/experiments/lightweight")
    shown = {name: cells for name, *cells in table("docs/choosing.md", "contest")}
    assert shown.keys() == found.keys()
    for name, (params, macs, ms, score) in shown.items():
        right, costs = found[name].record["metrics"]["test_accuracy"], found[name].costs
        assert params == f"{costs['params'] / 1e6:.1f} M"
        assert macs == f"{costs['macs'] / 1e6:.1f} M"
        assert ms == f"{costs['ms']:.2f}"
        assert score == f"{right['mean']:.1f} ± {right['std']:.1f}"
    ours, theirs = (found[name].costs for name in ("MGIC-MobileNetV3 1.0", "MobileNetV3-Large 0.75"))
    said = " ".join((ROOT / "docs/choosing.md").read_text().split())
    assert f"takes {ours['ms'] / theirs['ms']:.2f} times the time of MobileNetV3-Large 0.75" in said
    assert f"at {ours['macs'] / theirs['macs']:.2f} of its multiply-adds" in said


def test_what_a_block_needs_in_training_is_what_the_page_says():
    ratios = {False: [], True: []}
    for block in (mgic.BasicBlock, mgic.Bottleneck):
        for width in (128, 256, 512, 1024):
            hidden = width // 4 if block is mgic.Bottleneck else None
            multigrid = mgic.MGICBlock(block, width, group_size=8, coarsest=16, hidden=hidden)
            alone = mgic.memory(multigrid.relax[0], (width, 16, 16), batch=4).training
            for checkpoints, found in ratios.items():
                multigrid.set_grad_checkpointing(checkpoints)
                found.append(mgic.memory(multigrid, (width, 16, 16), batch=4).training / alone)
    page = " ".join((ROOT / "docs/index.md").read_text().split())
    for found in ratios.values():
        assert f"{min(found):.2f} to {max(found):.2f} times" in page


def test_the_table_of_solids_is_the_records():
    names = [row[0] for row in table("docs/beyond.md", "solids")]
    assert set(names) == {path.stem for path in (ROOT / "results/solids").glob("*.json")}
    rows = []
    for name in names:
        metrics = record(f"solids/{name}.json")["metrics"]
        right = metrics["test_accuracy"]
        seeds = len(right["values"])
        score = f"{right['mean']:.1f}" + (f" ± {right['std']:.1f}" if seeds > 1 else "")
        params = f"{metrics['params']['mean']:,.0f}" if "params" in metrics else "-"  # the linear model is no network
        rows.append([name, params, str(seeds), score])
    assert table("docs/beyond.md", "solids") == rows


def test_what_kept_memory_is_worth_is_the_record():
    kept = record("kept-memory.json")
    ratios = [median(metric["values"]) for metric in kept["metrics"].values()]
    held = [peak["kept"] / peak["given_back"] for peak in kept["peak_mib"].values()]
    said = " ".join((ROOT / "docs/choosing.md").read_text().split())
    assert f"take {min(ratios):.2f} to {max(ratios):.2f} of the time" in said
    assert f"hold up to {max(held):.2f} times the memory" in said
