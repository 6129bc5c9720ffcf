"""Converted networks on disk, the verb convert, the page."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from test_cli import call, run_folder, tiny  # noqa: F401  (fixtures)

import mgic
from mgic.conversion import convert
from mgic.conversion_folder import Converted, load_converted, save_converted
from mgic.conversion_page import conversion_page
from mgic.conversion_report import Conversion
from mgic.errors import UserError
from mgic.training.checkpoint import CorruptCheckpoint

ARGUMENTS = {"width": 0.5, "num_classes": 3}
SMALL = ["--model_args={width: 0.5}", "--group_size=2", "--coarsest=4"]


class Kept(type(Path())):
    """A folder, with what was written to it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted ResNet-20 of half the width."""
    where = Kept(tmp_path_factory.mktemp("converted") / "a")
    model, report = convert(mgic.create_model("resnet20", **ARGUMENTS), Conversion(2, 4))
    save_converted(where, Converted(model.eval(), "resnet20", ARGUMENTS, report))
    where.model, where.report = model, report
    return where


def test_a_converted_network_comes_back_bit_for_bit(folder):
    one = load_converted(folder)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(one.model(x), folder.model(x))
    assert one.report == folder.report
    twin = mgic.create_model("resnet20", **one.model_args)
    twin.load_state_dict(one.model.state_dict(), strict=True)
    assert torch.equal(twin.eval()(x), one.model(x))


def test_a_converted_network_is_converted_further(folder, tmp_path):
    """The rest of a network whose first stage was converted before; converted by rule, it is refused."""
    plain = mgic.create_model("resnet20", **ARGUMENTS)
    first, one = convert(plain, Conversion(2, 4), where=lambda name, module: name.startswith("stages.1"))
    both, two = convert(first, Conversion(2, 4))
    arguments = {**ARGUMENTS, "conversion": {"layers": one.layers}}
    save_converted(tmp_path / "b", Converted(both.eval(), "resnet20", arguments, two))
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_converted(tmp_path / "b").model(x), both(x))
    by_rule = {**ARGUMENTS, "conversion": {"group_size": 2, "coarsest": 4}}
    with pytest.raises(UserError, match="convert the network without it"):
        save_converted(tmp_path / "c", Converted(both, "resnet20", by_rule, two))
    assert not (tmp_path / "c").exists()


def test_what_is_no_converted_network_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="holds no converted network"):
        load_converted(tmp_path)
    for name in ("conversion.json", "model.safetensors", "model.safetensors.sha256"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    known = json.loads((folder / "conversion.json").read_text())
    for text, words in (
        (json.dumps(known | {"schema": 9}), "schema 9; this version of mgic reads 1"),
        ("[]", "schema None"),
        (json.dumps({"schema": 1}), "not a conversion"),
        (json.dumps(known | {"source": "resnet21"}), "there is no model 'resnet21'"),
        (json.dumps(known | {"arguments": {"num_classes": 4}}), "its weights do not fit"),
        ("{", "holds no converted network"),
    ):
        (tmp_path / "conversion.json").write_text(text)
        with pytest.raises(UserError, match=words):
            load_converted(tmp_path)
    (tmp_path / "conversion.json").write_text(json.dumps(known))
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(CorruptCheckpoint):
        load_converted(tmp_path)


def test_convert_from_the_command_line_and_train_on(call, run_folder, tiny, tmp_path):  # noqa: F811
    """A run is converted, fitted to itself on its own data, and trained on from there."""
    out = tmp_path / "c"
    flags = ["--group_size=2", "--coarsest=4", "--samples=16", "--steps=1", "--warm_start", "--json", f"--out={out}"]
    plain = tmp_path / "plain"
    words = [f"--data={tiny}", f"--out={plain}", "--model=resnet20", "--model_args={width: 0.5}", "--epochs=1"]
    assert call("train", *words, "--batch_size=16")[0] == 0
    status, text, err = call("convert", plain, *flags)
    assert status == 0, err
    found = json.loads(text)
    assert found["schema"] == 1
    assert len(found["fits"]) == sum(row["action"] != "kept" for row in found["rows"]) > 0
    assert {p.name for p in out.iterdir()} == {
        *("conversion.json", "model.safetensors", "model.safetensors.sha256", "recipe.yaml", "report.html")
    }
    again = tmp_path / "again"
    start = [f"--config={out / 'recipe.yaml'}", f"--init={out / 'model.safetensors'}", f"--teacher={plain}"]
    words = ["train", *start, f"--data={tiny}", f"--out={again}", "--epochs=1", "--batch_size=16"]
    status, _, err = call(*words)
    assert status == 0, err
    assert call("evaluate", again)[0] == 0


def test_a_budget_and_a_dry_run_on_the_command_line(call, tmp_path):  # noqa: F811
    words = ["convert", "resnet20", "--model_args={width: 2}", "--target_macs=1e8"]
    status, text, _ = call(*words, "--dry_run")
    assert status == 0
    assert "macs: before 1" in text
    assert "stage 32x32" in text
    assert "head: the classifier" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resnet20", *SMALL], "--out is missing"),
        (["resnet2O", "--dry_run"], "there is no model 'resnet2O'; did you mean"),
        (["resnet20", "--dry_run", "--group_size=0"], "group_size must be a positive integer, got 0"),
        (["resnet20", "--dry_run", "--target_macs=1"], "target_macs=1 cannot be met"),
        (
            ["resnet20", "--dry_run", "--target_macs=1e6", "--target_params=1e5"],
            "give one of target_params, target_macs",
        ),
        (["resnet20", "--warm_start", "--out=x"], "needs calibration data: --data"),
        (["resnet20", "--data=digits", "--dry_run"], "--data belongs to --warm_start"),
        (["resnet20", "--steps=5", "--dry_run"], "--steps belongs to --warm_start"),
        (["resnet20", "--threads=2", "--dry_run"], "--threads belongs to --target_ms"),
        (
            ["resnet20", "--pretrained", "--checkpoint=a.safetensors", "--dry_run"],
            "give one of --pretrained and --checkpoint",
        ),
        (["resnet20", "--checkpoint=a.safetensors", "--dry_run"], "neither a run folder nor a .safetensors file"),
        (["vit_tiny_patch16_224", "--dry_run", "--input_size=[3, 99, 99]"], "does not run on inputs of (3, 99, 99)"),
        (["resnet18", "--model_args={foo: 1}", "--dry_run"], "resnet18 cannot be built with {'foo': 1} (TypeError"),
        (["torchvision:resnet18", "--model_args={in_chans: 1}", "--dry_run"], "take images of 3 channels"),
    ],
)
def test_wrong_calls_of_convert_are_one_line(call, words, message):  # noqa: F811
    status, _, err = call("convert", *words)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_folder_that_holds_something_is_not_written_to(call, folder, tmp_path):  # noqa: F811
    status, _, err = call("convert", "resnet20", *SMALL, f"--out={folder}")
    assert (status, "not empty; name a new folder" in err) == (2, True)
    status, _, err = call("convert", folder.parent, *SMALL, f"--out={tmp_path / 'b'}")
    assert status == 2


class _Cells(HTMLParser):
    """Counts what the page shows."""

    def __init__(self):
        super().__init__()
        self.rows, self.bars, self.open = 0, [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.rows += tag == "tr"
        if tag == "div" and "bar" in (values.get("class") or "").split():
            self.bars.append(float(values["style"].removeprefix("width:").removesuffix("%")))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_draws_every_layer_before_and_after():
    report = convert(mgic.create_model("resnet20", width=0.5), Conversion(2, 4), dry_run=True)[1]
    page = conversion_page(report)
    cells = _Cells()
    cells.feed(page)
    assert not cells.open
    assert cells.rows == len(report.rows) + 1
    most = max(row.macs for row in report.rows)
    expected = [100 * macs / most for row in report.rows for macs in (row.macs, row.macs_after)]
    assert cells.bars == pytest.approx(expected, abs=0.01)
    assert "http" not in page, "the page needs nothing else"


def test_names_on_the_page_are_text_not_markup():
    report = convert(mgic.create_model("resnet20", width=0.5), Conversion(2, 4), dry_run=True)[1]
    from dataclasses import replace

    page = conversion_page(replace(report, model="<script>x</script>"))
    assert "<script>" not in page


def test_a_converted_network_says_no_data_to_calibrate_with(call, folder, tmp_path):  # noqa: F811
    status, _, err = call("export", folder, "--to=[onnx_int8]", f"--out={tmp_path / 'o'}")
    assert (status, err.count("\n")) == (2, 1)
    assert "onnx_int8 needs calibration data: --data NAME" in err
    assert not (tmp_path / "o").exists()


def test_a_converted_network_is_exported(call, folder, tmp_path):  # noqa: F811
    """Convolution by convolution the grouped ones stay one node each, and the file returns what the network returns."""
    pytest.importorskip("onnxruntime")
    status, text, err = call("export", folder, "--to=[onnx, torch]", f"--out={tmp_path}", "--json")
    assert status == 0, err
    made = json.loads(text)
    assert [one["format"] for one in made] == ["onnx", "torch"]
    from mgic.exporting import load_artefact

    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = folder.model(x)
    for one in made:
        found = load_artefact(next(tmp_path.glob(f"*{'.onnx' if one['format'] == 'onnx' else '.pt2'}")), 1)(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
