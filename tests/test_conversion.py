"""Multigrid in existing networks: what is replaced, what is kept and why, and that nothing else changes."""

import copy
import hashlib
import json
import os

import pytest
import timm
import torch
import torchvision
from torch import nn

import mgic
from mgic.blocks import BasicBlock
from mgic.conversion import convert, convert_
from mgic.conversion_report import Conversion, ConversionReport
from mgic.counting import cost, count_trainable
from mgic.cycle import MGICBlock, MGICConv, MGICLinear
from mgic.errors import ChannelConfigError, UserError
from mgic.hierarchy import BASIC, BOTTLENECK, count_macs, count_params, plan_levels
from mgic.surgery import rebuild_
from mgic.survey import is_residual
from mgic.twins import narrowed

FULL = os.environ.get("MGIC_FAULTS") == "full"
NARROW = Conversion(group_size=4, coarsest=8)
pytestmark = pytest.mark.filterwarnings("ignore:nothing was replaced")


class Tiny(nn.Module):
    """A stem, a residual block, a strided convolution and a head."""

    def __init__(self, width=32):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.block = BasicBlock(width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x):
        return self.head(self.down(self.block(self.stem(x))).mean((2, 3)))


def rows_of(report):
    return {row.name: row for row in report.rows}


def test_resnet50_in_one_line_costs_what_the_report_says():
    model, report = convert(torchvision.models.resnet50(), Conversion(group_size=32, coarsest=64))
    assert cost(model, (3, 224, 224)) == report.after
    assert (report.before.params, report.before.macs) == (25_557_032, 4_089_184_256)
    assert (report.after.params, report.after.macs) == (8_871_976, 2_247_925_760)
    rows = rows_of(report)
    levels = plan_levels(2048, 32, 64, 512)
    assert rows["layer4.1"].params_after == count_params(levels, BOTTLENECK)
    assert rows["layer4.1"].macs_after == count_macs(levels, 49, BOTTLENECK)
    assert rows["layer4.1"].widths == (2048, 1024, 512, 256)
    assert rows["layer4.1"].effective == (32, 32, 32, 64)
    assert rows["layer1.1.conv1"].reason == "too narrow: 64 channels are at most coarsest=64"
    assert rows["fc"].reason == "head: the classifier"
    assert any("depthwise convolution between stages" in note for note in report.notes)
    saved = sum(row.params - row.params_after for row in report.rows)
    assert report.before.params - report.after.params == saved
    assert report.before.macs - report.after.macs == sum(row.macs - row.macs_after for row in report.rows)


def test_a_residual_block_becomes_the_papers_block():
    """The copies of torchvision's block at every level are what `MGICBlock` around our own block has, weight for weight."""
    model, report = convert(torchvision.models.resnet18(), Conversion(group_size=8, coarsest=16))
    block = model.layer2[1]
    assert isinstance(block, MGICBlock)
    assert count_trainable(block) == count_params(plan_levels(128, 8, 16), BASIC)
    ours = MGICBlock(BasicBlock, 128, group_size=8, coarsest=16)
    with torch.no_grad():
        for mine, theirs in zip(ours.parameters(), block.parameters(), strict=True):
            mine.copy_(theirs)
    x = torch.randn(2, 128, 5, 5)
    torch.testing.assert_close(ours.eval()(x), block.eval()(x))
    assert rows_of(report)["layer2.1"].action == "block"


def test_r31_the_original_is_untouched_by_convert_and_converted_in_place_by_convert_():
    model = Tiny()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    y = model.eval()(x)
    converted, report = convert(model, NARROW, input_size=(3, 8, 8))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model(x), y)
    assert isinstance(converted.block, MGICBlock)
    assert isinstance(converted.down, MGICConv)
    again = convert_(model, NARROW, input_size=(3, 8, 8))
    assert isinstance(model.block, MGICBlock)
    assert again.rows == report.rows


def test_a_dry_run_changes_nothing_and_reports_all():
    model = Tiny()
    report = convert_(model, NARROW, input_size=(3, 8, 8), dry_run=True)
    assert type(model.block) is BasicBlock
    assert report == convert_(model, NARROW, input_size=(3, 8, 8))


def test_a_converted_network_is_rebuilt_from_its_name_and_the_report():
    model = timm.create_model("efficientnet_b0", num_classes=5)
    converted, report = convert(model, Conversion(group_size=16, coarsest=32))
    layers = ConversionReport.from_json(report.to_json()).layers
    assert json.loads(json.dumps(layers))[0]["name"] == layers[0]["name"]
    twin = rebuild_(timm.create_model("efficientnet_b0", num_classes=5), layers)
    twin.load_state_dict(converted.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(twin.eval()(x), converted.eval()(x))
    assert any(layer["pooled"] for layer in layers), "attention stays dense inside"


def test_create_model_builds_converted_networks():
    plain = mgic.create_model("resnet20")
    settings = {"group_size": 4, "coarsest": 8}
    converted, report = convert(plain, Conversion(**settings))
    by_rule = mgic.create_model("resnet20", conversion=settings)
    by_list = mgic.create_model("resnet20", conversion={"layers": report.layers})
    for model in (by_rule, by_list):
        model.load_state_dict(converted.state_dict(), strict=True)
    with pytest.raises(UserError, match="conversion has no 'groupsize'; it has group_size, coarsest, blocks, linear"):
        mgic.create_model("resnet20", conversion={"groupsize": 4})


def test_torchvisions_networks_are_built_by_name():
    model = mgic.create_model("torchvision:resnet18", num_classes=7)
    assert isinstance(model, torchvision.models.ResNet)
    assert model.fc.out_features == 7
    with pytest.raises(UserError, match=r"torchvision has no network 'resnet19'; did you mean resnet1"):
        mgic.create_model("torchvision:resnet19")


def test_a_stem_that_turns_pixels_into_channels_takes_images_all_the_same():
    model = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 48, 3, padding=1))
    assert convert_(model, NARROW).after.input_size == (3, 224, 224)
    assert convert_(nn.Sequential(nn.Conv2d(48, 48, 3)), NARROW).after.input_size == (48, 224, 224)


def test_timms_contract_holds_after_conversion():
    model = timm.create_model("resnet18", in_chans=1, num_classes=4)
    report = convert_(model, Conversion(group_size=8, coarsest=32))
    assert report.after.input_size == (1, 224, 224), "the channels are those of the network, not of its configuration"
    x = torch.randn(2, 1, 64, 64)
    assert model(x).shape == (2, 4)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.forward_features(x).shape == (2, 512, 2, 2)
    features = timm.create_model("resnet18", features_only=True, out_indices=(1, -1))
    convert_(features, Conversion(group_size=8, coarsest=32))
    assert [f.shape[1] for f in features(torch.randn(1, 3, 64, 64))] == [64, 512]
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    average.update(model)
    assert copy.deepcopy(model)(x).shape == (2, 3)


def test_every_parameter_gets_a_gradient():
    model = timm.create_model("mobilenetv3_small_100", num_classes=4)
    converted, report = convert(model, Conversion(group_size=16, coarsest=24))
    assert sum(row.replaced for row in report.rows) > 5
    converted(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in converted.parameters())


def test_every_weight_is_in_one_row():
    for model in (timm.create_model("regnety_002"), timm.create_model("vit_tiny_patch16_224"), Tiny()):
        size = (3, 64, 64) if not hasattr(model, "patch_embed") else None
        report = convert_(model, NARROW, input_size=size, dry_run=True)
        names = [row.name for row in report.rows]
        assert len(set(names)) == len(names)
        for name, module in model.named_modules():
            if any(p.ndim > 1 for p in module.parameters(recurse=False)):
                inside = [n for n in names if name == n or (name.startswith(f"{n}.") and rows_of(report)[n].replaced)]
                assert len(inside) == 1, name


def test_transformers_come_back_unchanged_with_the_reason():
    model = timm.create_model("vit_tiny_patch16_224")
    before = copy.deepcopy(model.state_dict())
    report = convert_(model)
    assert not any(row.replaced for row in report.rows)
    assert model.state_dict().keys() == before.keys()
    assert rows_of(report)["blocks.0.attn.qkv"].reason == "linear: replaced with linear=True only"
    assert report.notes[-1] == "nothing was replaced"


def test_linear_layers_are_replaced_when_asked_for():
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    report = convert_(model, Conversion(group_size=16, coarsest=32, linear=True))
    assert isinstance(model.blocks[0].mlp.fc1, MGICLinear)
    assert rows_of(report)["head"].reason == "head: the classifier"
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 1000)


def test_convolutions_alone_are_replaced_where_blocks_are_not_wanted():
    converted, report = convert(Tiny(), Conversion(4, 8, blocks=False), input_size=(3, 8, 8))
    assert {row.action for row in report.rows if row.replaced} == {"conv"}
    assert isinstance(converted.block.conv1, MGICConv)


def test_where_chooses():
    report = convert_(Tiny(), NARROW, where=lambda name, module: not name.startswith("block"), input_size=(3, 8, 8))
    rows = rows_of(report)
    assert rows["block.conv1"].reason == "excluded by where="
    assert rows["down"].replaced


class Odd(nn.Module):
    """One layer each that cannot be replaced."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(32, 32, 1)
        self.again = self.shared
        self.tied = nn.Conv2d(32, 32, 1)
        self.twin = nn.Conv2d(32, 32, 1)
        self.twin.weight = self.tied.weight
        self.functional = nn.Conv2d(32, 32, 1)
        self.hooked = nn.Conv2d(32, 32, 1)
        self.hooked.register_forward_hook(lambda module, args, output: output)
        self.computed = nn.utils.parametrizations.weight_norm(nn.Conv2d(32, 32, 1))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(32, 32, 1))
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.grouped = nn.Conv2d(32, 32, 1, groups=4)
        self.transposed = nn.ConvTranspose2d(32, 32, 1)
        self.odd = nn.Conv2d(32, 27, 1)
        self.back = nn.Conv2d(27, 1000, 1)
        self.thousand = nn.Conv2d(1000, 1000, 1, groups=1000)
        self.lifted = nn.Conv1d(1000, 32, 1)
        self.matrix = nn.Parameter(torch.eye(32))
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = self.again(self.shared(x))
        x = self.twin(self.tied(x))
        x = nn.functional.conv2d(x, self.functional.weight)
        x = self.depthwise(self.spectral(self.computed(self.hooked(x))))
        x = self.thousand(self.back(self.odd(self.transposed(self.grouped(x)))))
        return self.head(self.lifted(x.flatten(2)).mean(2) @ self.matrix)


def test_r31_what_cannot_be_replaced_is_kept_with_the_reason():
    model = Odd()
    x = torch.randn(2, 32, 6, 6)
    expected = model.eval()(x)
    rows = rows_of(convert_(model, NARROW, input_size=(32, 6, 6)))
    reasons = {name: row.reason for name, row in rows.items()}
    assert not any(row.replaced for row in rows.values())
    assert torch.equal(model(x), expected)
    assert reasons["shared"] == "shared: the same module stands at shared, again"
    assert reasons["tied"] == reasons["twin"] == "shared: its weights are those of another module too"
    assert reasons["functional"] == "functional: it is not called as a module in eval mode"
    assert reasons["hooked"] == "it has hooks, which would be lost"
    assert "computed" in reasons["computed"]
    assert "computed" in reasons["spectral"]
    assert reasons["depthwise"] == reasons["thousand"] == "depthwise"
    assert reasons["grouped"] == "grouped: 4 groups of 8 channels"
    assert reasons["transposed"] == "a transposed convolution"
    assert reasons["odd"] == "the widths 32 and 27 cannot be halved"
    assert reasons["lifted"] == "not a convolution of images"
    assert reasons[""].startswith("weights of its own, used by its program (Odd")
    assert reasons["head"] == "head: the classifier"


class Strided(nn.Module):
    """Reads an attribute of its layer that no replacement has."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 1)
        self.other = nn.Linear(32, 2)

    def forward(self, x):
        return self.other((self.conv(x) * self.conv.weight.mean()).mean((2, 3)))


def test_r31_a_network_that_does_not_run_with_a_layer_replaced_keeps_it():
    report = convert_(Strided(), NARROW, input_size=(32, 4, 4))
    assert rows_of(report)["conv"].reason.startswith("the network does not run with it replaced (AttributeError")


class Twice(nn.Module):
    """One convolution at two resolutions; another beside it whose weight is read."""

    def __init__(self):
        super().__init__()
        self.conv, self.read, self.other = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 2)

    def forward(self, x):
        x = self.other(self.conv(x))
        x = self.conv(nn.functional.avg_pool2d(x, 2))
        return self.head((self.read(x) * self.read.weight.mean()).mean((2, 3)))


def test_calls_of_several_sizes_are_counted_each_and_only_what_breaks_is_kept():
    report = convert_(Twice(), NARROW, input_size=(32, 8, 8))
    rows = rows_of(report)
    assert rows["conv"].replaced
    assert rows["other"].replaced
    assert rows["read"].reason.startswith("the network does not run with it replaced (AttributeError")
    assert report.before.macs - report.after.macs == sum(row.macs - row.macs_after for row in report.rows)
    assert rows["conv"].macs == 32 * 32 * (64 + 16)


def test_a_network_that_is_a_block_itself_is_kept_and_put_into_a_sequential_it_is_not():
    alone = BasicBlock(64)
    report = convert_(alone, Conversion(8, 16), input_size=(64, 8, 8))
    assert cost(alone, (64, 8, 8)) == report.after
    model = nn.Sequential(BasicBlock(64))
    report = convert_(model, Conversion(8, 16), input_size=(64, 8, 8))
    assert isinstance(model[0], MGICBlock)
    assert cost(model, (64, 8, 8)) == report.after


def test_tied_weights_are_counted_once():
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1))
    model[1].weight = model[0].weight
    report = convert_(model, NARROW, input_size=(16, 4, 4))
    assert report.before == report.after == cost(model, (16, 4, 4))


def test_frozen_networks_stay_frozen():
    model = Tiny().requires_grad_(False)
    model.block.norm1.eval()
    convert_(model.train(), NARROW, input_size=(3, 8, 8))
    assert isinstance(model.block, MGICBlock)
    assert not any(p.requires_grad for p in model.parameters())
    part = Tiny()
    part.block.norm1.eval()
    convert_(part, NARROW, input_size=(3, 8, 8))
    assert not any(relax.norm1.training for relax in part.block.relax)
    assert all(relax.norm2.training for relax in part.block.relax)


def test_networks_on_the_meta_device_are_converted_there():
    with torch.device("meta"):
        model = Tiny()
    convert_(model, NARROW, input_size=(3, 8, 8))
    assert isinstance(model.down, MGICConv)
    assert {p.device.type for p in model.parameters()} == {"meta"}


class Remembers(nn.Module):
    """Holds what a calculation made, so that it cannot be copied."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 1)

    def forward(self, x):
        self.last = self.conv(x)
        return self.last


def test_r31_a_network_that_cannot_be_copied_is_one_line():
    model = Remembers()
    model(torch.randn(1, 32, 4, 4))
    with pytest.raises(UserError, match=r"Remembers cannot be copied .* a stored activation"):
        convert_(model, NARROW, input_size=(32, 4, 4))


def test_features_have_no_classifier_to_keep():
    features = timm.create_model("resnet18", features_only=True)
    rows = rows_of(convert_(features, Conversion(16, 32, blocks=False), dry_run=True))
    assert rows["layer4.1.conv2"].replaced


def test_nothing_replaced_is_a_warning():
    with pytest.warns(UserWarning, match="nothing was replaced: the rows of the report say why"):
        convert_(Tiny(8), NARROW, input_size=(3, 8, 8))


def test_multigrid_networks_are_left_alone():
    model = mgic.create_model("mgic_resnet20")
    report = convert_(model, NARROW)
    assert not any(row.replaced for row in report.rows)
    assert sum(row.reason == "multigrid already" for row in report.rows) == 9
    converted, _ = convert(Tiny(), NARROW, input_size=(3, 8, 8))
    assert not any(row.replaced for row in convert_(converted, NARROW, input_size=(3, 8, 8)).rows)


def _compiled():
    return torch.compile(Tiny())


def _scripted():
    return torch.jit.trace(Tiny().eval(), torch.randn(1, 3, 8, 8))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore:.*quantized tensor creation.*")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_compiled, "OptimizedModule is compiled: convert the network itself"),
        (_scripted, "is scripted: convert the network before torch.jit"),
        (lambda: nn.DataParallel(Tiny()), "DataParallel wraps a network: convert the network inside"),
        (lambda: torch.optim.swa_utils.AveragedModel(Tiny()), "AveragedModel wraps a network"),
        (lambda: nn.Sequential(timm.utils.ModelEmaV3(Tiny())), "ModelEmaV3 at 0 wraps a network"),
        (lambda: torch.ao.nn.quantized.Conv2d(8, 8, 1), "Conv2d is quantised: convert the network before"),
    ],
)
def test_r31_networks_that_are_no_plain_modules_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        convert_(make(), NARROW, input_size=(3, 8, 8))


def test_r31_an_optimizer_of_replaced_parameters_is_refused_before_anything_changes():
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match="the optimizer holds parameters of block, which would be replaced"):
        convert_(model, NARROW, optimizer=optimizer, input_size=(3, 8, 8))
    assert type(model.block) is BasicBlock
    convert_(model, NARROW, optimizer=torch.optim.SGD(model.head.parameters(), lr=0.1), input_size=(3, 8, 8))


LAYER = {"name": "down", "action": "conv", "group_size": 4, "coarsest": 8, "widths": [32]}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: convert_(Tiny(), NARROW, input_size=8),
            "input_size must be positive integers such as .3, 224, 224., got 8",
        ),
        (lambda: rebuild_(Tiny(), 5), "layers must be a list of layers, got int"),
        (lambda: mgic.create_model("resnet20", conversion=3), "conversion must be a mapping"),
        (
            lambda: mgic.create_model("resnet20", conversion={"layers": [], "group_size": 4}),
            "layers say all there is to say; 'group_size' cannot be given",
        ),
        (lambda: Conversion(group_size=0), "group_size must be a positive integer, got 0"),
        (lambda: Conversion(coarsest=2.5), "coarsest must be a positive integer, got 2.5"),
        (lambda: convert_(Tiny(), NARROW, input_size=(4, 8, 8)), r"Tiny does not run on inputs of \(4, 8, 8\)"),
        (lambda: ConversionReport.from_json("{}"), "schema None; this mgic reads 1"),
        (lambda: ConversionReport.from_json('{"schema": 1}'), "not the report of a conversion"),
        (lambda: rebuild_(Tiny(), [{"name": "x"}]), "a layer has name, action, group_size, coarsest, widths"),
        (
            lambda: rebuild_(Tiny(), [{**LAYER, "name": "x"}]),
            "the network has no layer 'x'; is it the network that was converted",
        ),
        (
            lambda: rebuild_(Tiny(), [{**LAYER, "action": "cut"}]),
            "down has action 'cut'; known: block, conv, linear",
        ),
        (
            lambda: rebuild_(Tiny(), [{**LAYER, "name": "head"}]),
            "head cannot be replaced: a linear layer",
        ),
    ],
)
def test_wrong_settings_are_one_clear_line(call, words):
    with pytest.raises((UserError, ChannelConfigError), match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_convolution_without_channels_is_kept():
    model = nn.Sequential(nn.Conv2d(32, 0, 1), nn.Conv2d(0, 32, 1, bias=True))
    rows = rows_of(convert_(model, NARROW, input_size=(32, 4, 4)))
    assert rows["0"].reason == "too narrow: 0 channels are at most coarsest=8"


def test_narrow_copies_keep_what_is_not_wide():
    block = torchvision.models.efficientnet_b0().features[4][1].eval()
    twin = narrowed(block, 2, 4, pooled=["block.2.fc1", "block.2.fc2"])
    convs = {name: m for name, m in twin.named_modules() if isinstance(m, nn.Conv2d)}
    assert (convs["block.0.0"].in_channels, convs["block.0.0"].out_channels, convs["block.0.0"].groups) == (40, 240, 4)
    assert convs["block.1.0"].groups == convs["block.1.0"].in_channels == 240, "depthwise stays depthwise"
    assert convs["block.2.fc1"].groups == 1, "attention stays dense"
    assert twin(torch.randn(1, 40, 6, 6)).shape == (1, 40, 6, 6)


def test_residual_blocks_are_found_by_their_program():
    net = timm.create_model("resnet18")
    assert is_residual(net.layer1[0])
    assert not is_residual(net.layer2[0]), "its shortcut is a convolution"
    assert not is_residual(net.layer1)
    assert is_residual(timm.create_model("convnext_atto").stages[0].blocks[0])


def test_new_weights_are_drawn_as_widely_as_their_fan_in_asks_for():
    """The features of the converted network are as large as those of the network itself at the start."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    converted, _ = convert(model, Conversion(group_size=16, coarsest=32, blocks=False))
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        ratio = converted.eval()(x).std() / model(x).std()
    assert 0.3 < ratio < 3


def test_modes_types_and_devices_are_kept():
    model = Tiny().double().eval()
    convert_(model, NARROW, input_size=(3, 8, 8))
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(m.training for m in model.modules())


def fingerprint(model):
    """A hash of every weight and buffer, and of the kinds of all modules."""
    both = hashlib.sha256(repr([(name, type(m).__name__) for name, m in model.named_modules()]).encode())
    for name, value in model.state_dict().items():
        both.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return both.hexdigest()


def _pretrained(name):
    return lambda: mgic.create_model(name)


def _hooked():
    model = Tiny()
    model.block.register_forward_hook(lambda module, args, output: output)
    return model


def _tied():
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1))
    model[2].weight = model[1].weight
    return model


def _used_twice():
    shared = nn.Conv2d(32, 32, 1)
    return nn.Sequential(nn.Conv2d(3, 32, 1), shared, nn.ReLU(), shared)


def _normed(norm):
    return lambda: nn.Sequential(nn.Conv2d(3, 32, 1), norm(nn.Conv2d(32, 32, 3, padding=1)), nn.Conv2d(32, 64, 1))


def _functional():
    model = Odd()
    return nn.Sequential(nn.Conv2d(3, 32, 1), model)


class Own(nn.Conv2d):
    """A convolution of somebody's own."""


def _own():
    return nn.Sequential(nn.Conv2d(3, 32, 1), Own(32, 32, 3, padding=1), nn.Conv2d(32, 64, 1))


UNKNOWN = {
    "plain": Tiny,
    "functional": _functional,
    "hooks": _hooked,
    "tied weights": _tied,
    "shared modules": _used_twice,
    "spectral norm": _normed(nn.utils.parametrizations.spectral_norm),
    "weight norm": _normed(nn.utils.parametrizations.weight_norm),
    "a subclass": _own,
    "timm": _pretrained("mobilenetv3_small_050"),
    "torchvision": _pretrained("torchvision:squeezenet1_1"),
}
if FULL:
    for family in (
        "resnet18",
        "regnetx_002",
        "ghostnet_050",
        "efficientnet_lite0",
        "convnext_atto",
        "dla34",
        "vovnet39a",
    ):
        UNKNOWN[family] = _pretrained(family)
    for family in ("shufflenet_v2_x0_5", "mnasnet0_5", "googlenet", "densenet121", "mobilenet_v2", "vgg11"):
        UNKNOWN[f"torchvision {family}"] = _pretrained(f"torchvision:{family}")


@pytest.mark.parametrize("kind", UNKNOWN)
def test_r31_every_layer_is_in_the_report_and_the_original_is_what_it_was(kind):
    model = UNKNOWN[kind]().eval()
    before = fingerprint(model)
    converted, report = convert(model, NARROW, input_size=(3, 64, 64))
    assert fingerprint(model) == before
    with torch.no_grad():
        assert converted(torch.randn(2, 3, 64, 64)).isfinite().all()
    rows = rows_of(report)
    for name, module in model.named_modules():
        if any(p.ndim > 1 for p in module.parameters(recurse=False)) and "parametrizations" not in name:
            assert any(name == row or (rows[row].replaced and name.startswith(f"{row}.")) for row in rows), name
    assert all(row.replaced or row.reason for row in rows.values())


def test_r31_a_network_wrapped_for_several_processes_is_refused():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(Tiny())
        with pytest.raises(UserError, match="DistributedDataParallel wraps a network: convert the network inside"):
            convert_(wrapped, NARROW, input_size=(3, 8, 8))
    finally:
        torch.distributed.destroy_process_group()
