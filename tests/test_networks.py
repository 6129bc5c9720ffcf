"""Every network against its table row: params in millions, MACs in thousands of millions, as the papers print them.

After a change that is meant to move a count, ``python tests/test_networks.py`` writes the golden file anew.
"""

import csv
import inspect
import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual

import mgic
from mgic import ChannelConfigError, MGICBlock, Scheme, UserError, averaging_pair, plan_levels
from mgic.counting import count_trainable
from mgic.models import functions, mg2020, mgnet, mobilenetv3, points, resnet, segmentation
from mgic.models.mg2020 import MG2020, DoublingTransition
from mgic.models.mobilenetv3 import TABLE_6, InvertedBottleneck

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "golden_counts.json"
ROWS = list(csv.DictReader((DATA / "mgic_counts.csv").read_text(encoding="utf-8").splitlines()))

ELSEWHERE = {
    "MGIC-Small LR-ASPP": "a segmentation network",
    "MGIC-Large LR-ASPP": "a segmentation network",
    "baseline MobileNetV3-Small LR-ASPP": "a segmentation network",
    "baseline MobileNetV3-Large LR-ASPP": "a segmentation network",
    "DGCNN": "a network on point clouds",
    "diffGCN": "a network on point clouds",
    "MGIC-diffGCN": "a network on point clouds",
}
"""Rows that are not image classifiers, so not this file's."""

NOT_PLAIN = {
    (
        "MGIC-ResNet-50 64 64 1.0",
        "macs",
    ): "the plain count leaves the grid of 64 planes dense at s_g = 64; here a grid above "
    "the coarsest has at least two groups, which is nearer to print",
}
"""Counts that are not within 2 % of the plain ones."""

PRINTED_WITHIN = {
    "MGIC-ResNet-50": 0.025,
    "MG-ResNet": 0.025,
    "MG-MobileNetV2 32 64 1.0": 0.03,
    "MG-MobileNetV2 32 64 2.0": 0.07,
}
"""How far params may be from print, by network or row; the others are held against the plain counts."""


def label(row):
    return " ".join(row[key] for key in ("row", "group_size", "coarsest", "width"))


def family(row):
    return row["row"].split(" Table")[0].removesuffix(" no h-swish")


def network(row):
    """The row's registered name, arguments and input size."""
    sizes = {"group_size": int(row["group_size"]), "coarsest": int(row["coarsest"])}
    match family(row):
        case "MGIC-ResNet-56":
            return "mgic_resnet56", sizes, 32
        case "MGIC-ResNet-50":
            return "mgic_resnet50", sizes, 224
        case "MGIC-MobileNetV3":
            act = {"act": "relu"} if "no h-swish" in row["row"] else {}
            return f"mgic_mobilenetv3_{round(100 * float(row['width'])):03d}", {**sizes, **act}, 224
        case "MG-MobileNetV2":
            return "mg_mobilenetv2", {**sizes, "width": float(row["width"])}, 224
    widths, *additive = row["width"].split()
    sizes["channels"] = tuple(map(int, widths.split("-")))
    if family(row) == "MG-ResNet34":
        return "mg_resnet34", sizes, 224
    assert family(row) == "MG-ResNet"
    if row["dataset"] == "CIFAR100":
        sizes |= {"repeats": (3, 5, 7, 4), "num_classes": 100}
    return "mg_resnet_cifar", {**sizes, **({"scheme": {"cycle": "additive"}} if additive else {})}, 32


def count(name, overrides, size):
    with torch.device("meta"):
        model = mgic.create_model(name, **overrides)
    return mgic.cost(model, (3, size, size))


CLASSIFIERS = {
    label(row): row for row in ROWS if row["row"] not in ELSEWHERE and not row["row"].startswith("transfers")
}
LITERAL = Scheme(plan=partial(plan_levels, minimum=1, transfer_group_size=32))
READINGS = {
    "MGIC-ResNet-50, transfers in groups of s_g": ("mgic_resnet50", {"scheme": LITERAL}, 224),
    "MGIC-ResNet-50, with the 3x3 layer of Table 4": ("mgic_resnet50", {"extra_conv": True}, 224),
    "MG-MobileNetV2 1.0, random transfers": ("mg_mobilenetv2", {"scheme": MG2020}, 224),
    "MG-MobileNetV2 2.0, random transfers": ("mg_mobilenetv2", {"scheme": MG2020, "width": 2.0}, 224),
}
"""What else the papers' texts can mean."""
PINNED = {
    **{
        name: (name, {}, timm.get_pretrained_cfg(name).input_size[-1])
        for name in mgic.list_models()
        if timm.is_model(name)
    },
    **{name: network(row) for name, row in CLASSIFIERS.items()},
    **READINGS,
}


@cache
def pinned():
    """The golden counts; a network that has gone is an error."""
    counts = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return {name: mgic.Cost(**cost, input_size=(3, PINNED[name][2], PINNED[name][2])) for name, cost in counts.items()}


def deviation(ours, theirs):
    return ours / float(theirs) - 1


@pytest.mark.parametrize("name", PINNED)
def test_every_count_is_pinned(name):
    """The tests below trust the pinned counts; a change of one belongs in the changelog."""
    assert count(*PINNED[name]) == pinned().get(name), "run python tests/test_networks.py"


@pytest.mark.parametrize("row", [row for row in ROWS if row["row"].startswith("transfers")], ids=label)
def test_transfers_alone_have_the_weights_of_table_1(row):
    """Eliasof et al. 2023, Table 1: 64 channels to 8 and back, 3328, 1792, 896 and 448 weights."""
    weights, channels = 0, int(row["width"])
    while channels > int(row["coarsest"]):
        pair = averaging_pair(channels, min(int(row["group_size"]), channels))
        weights += sum(count_trainable(transfer) for transfer in pair)
        channels //= 2
    assert weights == {"32": 3328, "16": 1792, "8": 896, "4": 448}[row["group_size"]]
    assert weights == round(1e6 * float(row["plain_params"]))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_networks_are_within_two_per_cent_of_the_plain_counts(name):
    row = CLASSIFIERS[name]
    for quantity, unit in (("params", 1e6), ("macs", 1e9)):
        if plain := row[f"plain_{quantity}"]:
            miss = abs(deviation(getattr(pinned()[name], quantity) / unit, plain))
            assert (miss > 0.02) == ((name, quantity) in NOT_PLAIN), f"{quantity}: {miss:.1%}"


@pytest.mark.parametrize(
    "name", [name for name in CLASSIFIERS if {name, family(CLASSIFIERS[name])} & {*PRINTED_WITHIN}]
)
def test_networks_are_near_print_where_the_text_leaves_little_freedom(name):
    row = CLASSIFIERS[name]
    tolerance = PRINTED_WITHIN.get(name, PRINTED_WITHIN.get(family(row)))
    assert abs(deviation(pinned()[name].params / 1e6, row["printed_params"])) < tolerance


def test_every_row_of_the_tables_is_accounted_for():
    """Each row is counted here, or is another file's by name; none is silently left out."""
    rows = {row["row"] for row in ROWS}
    assert rows >= set(ELSEWHERE)
    assert len(CLASSIFIERS) == sum(row["row"] not in ELSEWHERE for row in ROWS) - 4
    assert sum(row["row"] == "MG-ResNet" for row in ROWS) == 16
    assert all(row["plain_params"] or {label(row), family(row)} & {*PRINTED_WITHIN} for row in CLASSIFIERS.values())


UNLIKE_ITS_PAPER = {
    "mobilenetv3_small_075": "2.4 M is printed; the network has 2.04 M",
    "mobilenetv3_large_100": "5.4 M and 219 M are printed; the network has 5.48 M and 217 M",
    "shufflenet_v2_x1_5": "299 M is printed; the network has 296 M",
    "mg_resnet_cifar 8-16-32-64": "0.27 M is printed; the transition alone is a tenth of a network this narrow",
    "mg_resnet_cifar 16-32-64-128": "1.1 M is printed, and 1.18 M counted; the two wider ones agree",
}
"""Dense networks that are not within 1 % of print."""


def dense_2020(first, **overrides):
    return {"channels": tuple(first << i for i in range(4)), "multigrid": False, **overrides}


@pytest.mark.parametrize(
    ("name", "overrides", "params", "macs"),
    [
        ("resnet56", {}, 0.85, 0.125),
        ("resnet34", {}, 21.8, None),
        ("resnet50", {}, 25.6, 4.1),
        ("resnext50_32x4d", {}, 25.0, 4.2),
        ("mobilenetv2_100", {}, 3.5, 0.300),
        ("mobilenetv3_small_075", {}, 2.4, 0.044),
        ("mobilenetv3_large_075", {}, 4.0, 0.155),
        ("mobilenetv3_large_100", {}, 5.4, 0.219),
        ("ghostnet_050", {}, 2.6, 0.042),
        ("ghostnet_100", {}, 5.2, 0.141),
        ("ghostnet_130", {}, 7.3, 0.226),
        ("shufflenet_v2_x1_0", {}, 2.3, 0.146),
        ("shufflenet_v2_x1_5", {}, 3.5, 0.299),
        ("mg_resnet_cifar 8-16-32-64", dense_2020(8), 0.27, None),
        ("mg_resnet_cifar 16-32-64-128", dense_2020(16), 1.1, None),
        ("mg_resnet_cifar 32-64-128-256", dense_2020(32), 4.7, None),
        ("mg_resnet_cifar 64-128-256-512", dense_2020(64, repeats=(3, 5, 7, 4), num_classes=100), 28.9, None),
    ],
)
def test_dense_baselines_are_within_one_per_cent_of_their_papers(name, overrides, params, macs):
    """As the papers' tables print them (Eliasof et al. 2023, Tables 3, 5, 7; Ephrath et al. 2020)."""
    size = 32 if name.startswith(("resnet56", "mg_")) else 224
    with torch.device("meta"):
        if name.startswith("shufflenet"):
            model = getattr(torchvision.models, name)()
        else:
            model = mgic.create_model(name.split()[0], **overrides)
    cost = mgic.cost(model, (3, size, size))
    misses = [abs(deviation(cost.params / 1e6, params)), abs(deviation(cost.macs / 1e9, macs)) if macs else 0.0]
    assert (max(misses) > 0.0105) == (name in UNLIKE_ITS_PAPER), misses


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2"])
def test_imagenet_twins_have_the_stages_of_the_networks_they_replace(name):
    plain = timm.create_model(name, features_only=True)
    twin = mgic.create_model(f"mgic_{name}", features_only=True)
    assert twin.feature_info.channels() == plain.feature_info.channels()
    assert twin.feature_info.reduction() == plain.feature_info.reduction()
    blocks = [
        [sum(isinstance(block, MGICBlock) for block in stage) for stage in model.stages]
        for model in [mgic.create_model(f"mgic_{name}")]
    ]
    assert blocks == [[len(stage) for stage in (plain.layer1, plain.layer2, plain.layer3, plain.layer4)]]


@pytest.mark.parametrize("name", ["resnet50", "wide_resnet50_2"])
def test_an_imagenet_twin_without_coarse_grids_wraps_the_dense_blocks_of_the_plain_network(name):
    """``maximum=0`` leaves one dense level: with torchvision's weights, torchvision's features."""
    plain = getattr(torchvision.models, name)()
    twin = mgic.create_model(f"mgic_{name}", scheme=Scheme(plan=partial(plan_levels, maximum=0)))
    for ours, theirs in zip(twin.stages, (plain.layer1, plain.layer2, plain.layer3, plain.layer4), strict=True):
        block, bottleneck = ours[-1], theirs[-1]
        block.load_state_dict(dict(zip(block.state_dict(), bottleneck.state_dict().values(), strict=True)))
        x = torch.randn(2, bottleneck.conv1.in_channels, 4, 4)
        torch.testing.assert_close(block(x), bottleneck(x), rtol=0, atol=0)


def test_table_6_is_built_row_by_row():
    printed = [  # expansion, c_out, SE, and the input's side
        *[(16, 16, False, 112), (48, 24, False, 112), (72, 24, False, 56), (72, 40, True, 56), (120, 40, True, 28)],
        *[(240, 80, False, 28), (200, 80, False, 14), (184, 80, False, 14), (184, 80, False, 14), (480, 112, True, 14)],
        *[(672, 112, True, 14), (672, 160, True, 14), (960, 160, False, 7), (960, 160, True, 7), (960, 160, False, 7)],
        (960, 160, True, 7),
    ]
    model = mgic.create_model("mgic_mobilenetv3_100")
    built, side = [], 112
    for stage in model.stages:
        before = side
        for layer in stage:
            if not isinstance(layer, MGICBlock):
                side //= layer.conv.stride[0]
                continue
            finest = layer.relax[0]
            attends = not isinstance(finest.attention, nn.Identity)
            built.append((layer.levels[0].hidden, layer.levels[0].channels, attends, before))
            before = side
    assert built == printed
    kernels = [row.kernel_size for rows in TABLE_6 for row in rows]
    assert kernels == [3, 3, 3, 5, 5, 3, 3, 3, 3, 3, 3, 5, 5, 5, 5, 5]  # GhostNet's; the paper prints none


def test_two_groups_at_least_move_no_row_of_the_mobilenets():
    """The text's group rule alone, with dense grids above the coarsest allowed, plans the same levels on every row."""
    rows = [row for row in CLASSIFIERS.values() if family(row) == "MGIC-MobileNetV3"]
    for width in {row["width"] for row in rows}:
        with torch.device("meta"):
            model = mgic.create_model("mgic_mobilenetv3_100", width=float(width))
        finest = [block.levels[0] for block in model.modules() if isinstance(block, MGICBlock)]
        for row in rows:
            sizes = int(row["group_size"]), int(row["coarsest"])
            for level in finest:
                if row["width"] == width:
                    text = plan_levels(level.channels, *sizes, hidden=level.hidden, min_groups=1)
                    assert text == plan_levels(level.channels, *sizes, hidden=level.hidden)


def test_mobilenets_scale_the_inner_width_twice():
    """``width`` multiplies the block's input and the expansion: 0.6 x 960 = 576 would be the inner width if it did once."""
    levels = [
        block.levels[0] for block in mgic.create_model("mgic_mobilenetv3_060").stages[-1] if hasattr(block, "levels")
    ]
    assert (levels[-1].channels, levels[-1].hidden) == (96, 344)


def test_an_inverted_bottleneck_in_one_group_is_that_of_mobilenetv2():
    ours, theirs = InvertedBottleneck(24, hidden=144, act=nn.ReLU6), InvertedResidual(24, 24, 1, 6)
    for module in (ours, theirs):
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.uniform_(norm.weight, 0.5, 2.0)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    x = torch.randn(2, 24, 7, 7)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_squeeze_and_excitation_comes_before_the_activation():
    block = InvertedBottleneck(8, hidden=16, attention=lambda width: nn.Hardtanh(-8.0, -7.0), norm=nn.Identity)
    nn.init.ones_(block.project[0].weight)
    x = torch.randn(1, 8, 3, 3)
    torch.testing.assert_close(block(x), x, rtol=0, atol=0)  # relu(-7) = 0: nothing is added


def test_the_transition_of_2020_keeps_the_old_channels_and_adds_depthwise_ones():
    transition = DoublingTransition(4).eval()
    scale = nn.init.uniform_(transition.norm.weight, 1.5, 2.5) / (1 + transition.norm.eps) ** 0.5
    x = torch.randn(2, 4, 6, 6)
    averaged = x.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(-2, -1))
    torch.testing.assert_close(transition(x)[:, :4], averaged)
    jacobian = torch.autograd.functional.jacobian(lambda v: transition(v)[0, :, 1, 1], x[:1]).sum(dim=(1, 3, 4))
    torch.testing.assert_close(jacobian[4:], torch.diag(scale * transition.conv.weight.sum(dim=(1, 2, 3))))


def test_the_additive_cycle_has_the_same_weights_and_another_result():
    small = {"channels": (16, 32), "repeats": (1, 1), "group_size": 4, "coarsest": 8}
    by_name = mgic.create_model("mg_resnet_cifar", scheme={"cycle": "additive"}, **small).eval()
    by_function = mgic.create_model("mg_resnet_cifar", scheme=replace(MG2020, cycle=mgic.additive), **small).eval()
    multiplicative = mgic.create_model("mg_resnet_cifar", **small).eval()
    for other in (by_function, multiplicative):
        other.load_state_dict(by_name.state_dict())
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(by_name(x), by_function(x), rtol=0, atol=0)
    assert (by_name(x) - multiplicative(x)).abs().max() > 1e-3


def test_networks_of_2020_have_t_random_places_a_row():
    model = mgic.create_model("mg_resnet_cifar", channels=(64, 128), repeats=(1, 1), group_size=8)
    for block in (m for m in model.modules() if isinstance(m, MGICBlock)):
        for level, prolong in zip(block.levels, block.prolong, strict=False):
            assert (prolong.matrix() != 0).sum(dim=1).unique().tolist() == [min(8, level.channels // 2)]


@pytest.mark.parametrize(
    ("name", "overrides", "error", "words"),
    [
        ("mgic_resnet50", {"width": 0.001}, UserError, "width=0.001 leaves no channel"),
        ("mgic_mobilenetv3_100", {"width": 0}, UserError, "width must be positive, got 0"),
        ("mgic_mobilenetv3_100", {"act": "swishy"}, UserError, "no activation 'swishy'"),
        ("mg_mobilenetv2", {"width": -1.0}, UserError, "width must be positive, got -1.0"),
        ("mg_resnet_cifar", {"channels": (16, 32, 64, 100)}, ChannelConfigError, r"\(16, 32, 64, 100\) must double"),
        ("mg_resnet34", {"repeats": (1, 1)}, ChannelConfigError, r"as many repeats=\(1, 1\)"),
        ("mgic_resnet18", {"group_size": 0}, ChannelConfigError, "group_size must be a positive integer, got 0"),
    ],
)
def test_networks_refuse_what_they_cannot_build(name, overrides, error, words):
    with pytest.raises(error, match=words):
        mgic.create_model(name, **overrides)


def write_golden():
    costs = {name: count(*network) for name, network in PINNED.items()}
    lines = [f' {json.dumps(name)}: {{"params": {c.params}, "macs": {c.macs}}}' for name, c in costs.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


@pytest.mark.parametrize(
    "make",
    [
        *(mgnet.mgiad, mg2020.mg_mobilenet, mg2020.mg_resnet, mobilenetv3.mgic_mobilenetv3, resnet.mgic_cifar_resnet),
        *(resnet.mgic_resnet, *points.NETWORKS, *functions.NETWORKS, *segmentation.NETWORKS),
    ],
)
def test_arguments_of_all_networks_stand_in_one_order(make):
    order = ["group_size", "coarsest", "width", "correction", "scheme"]
    names = [name for name in inspect.signature(make).parameters if name in order]
    assert names == [name for name in order if name in names]


if __name__ == "__main__":
    write_golden()
