"""Segmentation: a head equal to torchvision's, printed counts, masks that follow their images, metrics counted by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision.models import segmentation as torchvision_segmentation

import mgic
from mgic.cli import main
from mgic.data import Augmentation, load_data, segmentation
from mgic.data.masks import CAMVID, overlay, palette, sliding_window
from mgic.errors import UserError
from mgic.models.segmentation import LRASPP
from mgic.tables import build_table
from mgic.training import Recipe, load_run, train

# Networks

NETWORKS = ["lraspp_mobilenetv3_small", "lraspp_mobilenetv3_large", "mgic_lraspp_small", "mgic_lraspp_large"]
COUNTS = {  # parameters, multiply-adds at 1024 x 2048
    "lraspp_mobilenetv3_small": (467_486, 2_931_408_640),
    "lraspp_mobilenetv3_large": (1_505_550, 9_761_253_504),
    "mgic_lraspp_small": (384_438, 2_860_343_168),
    "mgic_lraspp_large": (1_118_826, 7_853_749_760),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_counts_are_pinned(name):
    with torch.device("meta"):
        counted = mgic.cost(mgic.create_model(name), (3, 1024, 2048))
    assert (counted.params, counted.macs) == COUNTS[name]


def test_table_9_is_complete_and_the_dense_networks_are_as_printed():
    """Eliasof et al. 2023, Table 9: within 1.5 %; the fitted reading of the MGIC rows within 10 % and 5 %."""
    rows = build_table("mgic-9")["rows"]
    assert len(rows) == 5
    for row in rows:
        if row["rival"]:
            assert abs(row["deviation"]["params"]) <= 1.5
            assert abs(row["deviation"]["macs"]) <= 1.5
        else:
            (fitted,) = row["readings"]
            assert abs(fitted["deviation"]["params"]) <= 10
            assert abs(fitted["deviation"]["macs"]) <= 5


def test_a_record_of_cityscapes_stands_in_its_row_with_its_mean_iou():
    metric = {"mean": 61.5, "std": 0.5, "values": [61.0, 62.0]}
    record = {
        "recipe": {"model": "mgic_lraspp_small", "data": "cityscapes", "model_args": {}, "epochs": 3},
        "metrics": {"train_miou": {**metric, "mean": 70.0}, "test_miou": metric},
        **{"n": 2, "date": "2026", "data": "made up", "file": "results/r.json"},
    }
    rows = {row["row"]: row["accuracy"] for row in build_table("mgic-9", [record])["rows"]}
    assert rows.pop("MGIC-Small s_g = 64")["test"] == {"mean": 61.5, "std": 0.5}
    assert set(rows.values()) == {None}


def varied(model):
    """Running statistics and norms that are not the identity, in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                value.uniform_(0.5, 1.5)
    return model.eval()


def test_the_head_is_torchvisions():
    """Same weights, same logits: the 1x1 convolutions commute with the mean and with the interpolation."""
    resnet = timm.create_model("resnet18", features_only=True, output_stride=16, out_indices=(2, 4))
    ours = varied(LRASPP(resnet, num_classes=5, filters=16))

    class Both(nn.Module):
        def forward(self, x):
            low, high = resnet(x)
            return {"low": low, "high": high}

    theirs = torchvision_segmentation.LRASPP(Both(), 128, 512, 5, 16).eval()
    head = theirs.classifier
    pairs = [(head.cbr[0], ours.features.conv), (head.cbr[1], ours.features.norm), (head.scale[1], ours.gate)]
    pairs += [(head.low_classifier, ours.low_classifier), (head.high_classifier, ours.high_classifier)]
    for to, source in pairs:
        to.load_state_dict(source.state_dict())
    x = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)["out"], theirs(x)["out"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_mean_before_the_gate_changes_nothing_but_the_cost(name):
    model = varied(mgic.create_model(name, num_classes=3))
    other = mgic.create_model(name, num_classes=3, pool_first=True).eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 48, 80)
    with torch.no_grad():
        torch.testing.assert_close(model(x)["out"], other(x)["out"], rtol=1e-4, atol=1e-4)
    assert mgic.cost(other, (3, 64, 64)).macs < mgic.cost(model, (3, 64, 64)).macs


def test_the_dense_backbone_is_torchvisions_with_its_last_blocks_halved():
    """Everything before the halved blocks has the weights of torchvision's dilated network."""
    from torchvision.models import mobilenet_v3_small

    reference = mobilenet_v3_small(dilated=True, reduced_tail=True).features
    ours = nn.Sequential(*(layer for stage in mgic.create_model(NETWORKS[0]).backbone.stages for layer in stage))
    shapes = [[tuple(p.shape) for p in layers.parameters()] for layers in (reference, ours)]
    assert len(shapes[0]) == len(shapes[1])
    differ = [i for i, pair in enumerate(zip(*shapes, strict=True)) if pair[0] != pair[1]]
    first_halved = sum(len(list(layer.parameters())) for layer in reference[:9])
    assert differ
    assert min(differ) >= first_halved
    assert reference[9].block[1][0].dilation == ours[9].block[1][0].dilation == (2, 2)


@pytest.mark.parametrize(("size", "in_chans"), [((65, 97), 1), ((8, 8), 3), ((33, 200), 4)])
@pytest.mark.parametrize("name", [*NETWORKS, "unet", "mgic_unet"])
def test_every_pixel_gets_its_logits_at_any_size(name, size, in_chans):
    small = {"width": 8, "depth": 2} if "unet" in name else {}
    model = mgic.create_model(name, num_classes=5, in_chans=in_chans, **small).eval()
    with torch.no_grad():
        assert model(torch.randn(2, in_chans, *size))["out"].shape == (2, 5, *size)


@pytest.mark.parametrize("name", [*NETWORKS, "unet", "mgic_unet"])
def test_every_parameter_has_a_gradient(name):
    small = {"width": 16, "depth": 2} if "unet" in name else {}
    model = mgic.create_model(name, num_classes=3, **small)
    for module in model.modules():
        if hasattr(module, "fc1"):  # the few ReLUs of an attention could all be off
            module.fc1.bias.data.fill_(2)
    model(torch.randn(2, 3, 64, 64))["out"].square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_backbones_end_at_stride_16_with_the_skip_at_8():
    for name in NETWORKS:
        model = mgic.create_model(name)
        info = model.backbone.feature_info
        assert info.reduction()[-1] == 16
        assert (info.reduction()[model.low], info.channels()[model.low]) == (8, 40 if "large" in name else 24)
        dilated = [m for m in model.backbone.stages[-1].modules() if getattr(m, "dilation", 1) == (2, 2)]
        assert {m.kernel_size for m in dilated} == {(5, 5)}
        features = model.eval().backbone(torch.zeros(1, 3, 64, 96))
        assert [f.shape[2] for f in features] == [64 // r for r in info.reduction()]


def test_any_features_of_timm_carry_the_head_and_others_are_refused():
    backbone = timm.create_model("mgic_resnet18", features_only=True)
    assert LRASPP(backbone, 4).eval()(torch.zeros(1, 3, 64, 64))["out"].shape == (1, 4, 64, 64)
    shallow = timm.create_model("resnet18", features_only=True, out_indices=(0, 1))
    with pytest.raises(UserError, match=r"needs features of stride 8 and deeper ones, .* \[2, 4\]"):
        LRASPP(shallow, 4)


def test_the_u_nets_weights_grow_fourfold_and_the_mgic_u_nets_twofold_with_the_width():
    def growth(name):
        with torch.device("meta"):
            small, large = (mgic.create_model(name, width=width, depth=2) for width in (64, 128))
        return sum(p.numel() for p in large.parameters()) / sum(p.numel() for p in small.parameters())

    assert growth("unet") == pytest.approx(4, abs=0.02)
    assert growth("mgic_unet") == pytest.approx(2, abs=0.05)
    with pytest.raises(UserError, match="depth must be a positive integer, got 0"):
        mgic.create_model("mgic_unet", depth=0)


# Task


def test_metrics_equal_torchmetrics_and_a_naive_count_and_void_counts_for_nothing():
    classes = ["a", "b", "c", "d"]  # nobody has d
    logits = torch.randn(3, 4, 5, 6)
    logits[:, 3] = -99
    target = torch.randint(0, 3, (3, 5, 6))
    target[:, 0] = 255
    meter = segmentation(classes).meter()
    meter.update(logits[:1], target[:1])
    meter.update(logits[1:], target[1:])
    found = meter.compute()
    predicted, known = logits.argmax(1)[target != 255], target[target != 255]
    for i, name in enumerate("abc"):
        both, either = ((predicted == i) & (known == i)).sum(), ((predicted == i) | (known == i)).sum()
        assert found[f"iou_{name}"] == pytest.approx(100 * float(both / either))
    assert "iou_d" not in found
    reference = MulticlassJaccardIndex(4, ignore_index=255)(logits.argmax(1), target)
    assert found["miou"] == pytest.approx(100 * float(reference), rel=1e-5)
    assert found["pixel_accuracy"] == pytest.approx(100 * float((predicted == known).float().mean()))
    chosen = logits.permute(0, 2, 3, 1)[target != 255]
    assert found["loss"] == pytest.approx(float(F.cross_entropy(chosen, known)), rel=1e-5)
    assert float(segmentation(classes).loss(logits, target, 0.1)) == pytest.approx(
        float(F.cross_entropy(chosen, known, label_smoothing=0.1)), rel=1e-5
    )


def test_a_batch_of_void_alone_has_no_loss_and_no_gradient():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = segmentation(["a", "b", "c"]).loss(logits, torch.full((1, 4, 4), 255), 0.0)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


class Pointwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return {"out": self.conv(x)}


@pytest.mark.parametrize(
    ("size", "window"), [((20, 31), (8, 9)), ((7, 40), (8, 16)), ((16, 16), (16, 16)), ((5, 5), (1, 1))]
)
def test_sliding_windows_cover_every_pixel(size, window):
    """A network that sees single pixels gives the same in any window."""
    model, x = Pointwise(), torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(sliding_window(window, model, x), model(x)["out"])


def test_sliding_windows_are_averaged():
    class Place(nn.Module):
        def forward(self, x):
            return {"out": torch.arange(x.shape[-1]).float().expand(1, 1, x.shape[-2], -1)}

    found = sliding_window((1, 4), Place(), torch.zeros(1, 3, 1, 6))  # windows at 0 and 2
    assert found.flatten().tolist() == [0, 1, (2 + 0) / 2, (3 + 1) / 2, 2, 3]


# Data

COLOURS = torch.tensor([[200, 0, 0], [0, 200, 0], [0, 0, 200]], dtype=torch.uint8)


def write_pair(folder, name, height, width, seed=0, void=True):
    """A picture whose colours are its labels: red 0, green 1, blue 2; a border of void."""
    mask = np.random.default_rng(seed).integers(0, 3, (height // 4, width // 4)).astype(np.uint8)
    mask = mask.repeat(4, 0).repeat(4, 1)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    Image.fromarray(COLOURS.numpy()[mask]).save(folder / "images" / f"{name}.png")
    if void:
        mask[0] = 255
    Image.fromarray(mask).save(folder / "labels" / f"{name}.png")


@pytest.fixture
def folder(tmp_path):
    for k in range(6):
        write_pair(tmp_path / "train", f"{k}", 24, 32, k)
    for k, size in enumerate([(24, 32), (24, 32), (16, 24), (24, 32)]):
        write_pair(tmp_path / "test", f"{k}", *size, k)
    return tmp_path


def load(folder, **arguments):
    return load_data(f"masks:{folder}", **{"classes": 3, "crop_size": [20, 28], **arguments})


def batches(data, epoch=0, seed=0, workers=0, first=0):
    chosen = [torch.tensor([4, 1]), torch.tensor([0, 5]), torch.tensor([2, 3])][first:]
    return list(data.train.training_batches(chosen, Augmentation(0, True, seed), epoch, first, workers))


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(one, other, strict=True)
    )


def test_masks_follow_their_images_through_crops_flips_and_padding(folder):
    """Unscaled, the colour of every pixel says its label; what is padded is void."""
    data = load(folder, crop_size=[20, 40], scale=1.0)
    for images, masks in batches(data):
        assert images.shape == (2, 3, 20, 40)
        known = masks != 255
        assert torch.equal(images.permute(0, 2, 3, 1)[known], COLOURS[masks[known]])
        assert known.any(2).any(1).all()
        assert (masks == 255).sum(2).min() >= 8  # the picture has 32 columns of 40


def test_images_are_scaled_by_random_factors_within_the_bounds(folder):
    """The area of a picture in a crop that holds all of it says by how much it was scaled."""
    data = load(folder, crop_size=[60, 80], scale=[0.5, 2.0])
    flat = torch.cat([masks != 255 for epoch in range(20) for _, masks in batches(data, epoch)])
    widths = flat.any(1).sum(1) / 32
    assert 0.5 - 0.05 <= widths.min() < 0.7
    assert 1.8 < widths.max() <= 2.0 + 0.05


def test_crops_depend_on_seed_epoch_and_index_alone(folder):
    data = load(folder)
    whole = batches(data)
    assert same(batches(data, first=1), whole[1:])
    assert same(batches(data, workers=2), whole)
    assert not same(batches(data, epoch=1), whole)
    assert not same(batches(data, seed=1), whole)


def test_evaluation_sees_every_whole_image_once_in_order_and_batches_have_one_size(folder):
    data = load(folder)
    found = list(data.test.evaluation_batches(3, 0))
    assert [tuple(images.shape) for images, _ in found] == [(2, 3, 24, 32), (1, 3, 16, 24), (1, 3, 24, 32)]
    assert (found[0][1][:, 0] == 255).all()
    flat = found[1][1][0, 1:]
    assert torch.equal(found[1][0][0, :, 1:].permute(1, 2, 0), COLOURS[flat])
    assert data.note == f"images and masks of {folder.name}, of 2 sizes: 6 train and 4 test images"


def test_cityscapes_is_read_as_it_is_distributed(tmp_path):
    """labelIds become the 19 classes of the benchmark: road 7 -> 0, car 26 -> 13, out of roi 3 -> void."""
    for part, city in (("train", "ulm"), ("val", "bonn")):
        image, fine = tmp_path / "leftImg8bit" / part / city, tmp_path / "gtFine" / part / city
        image.mkdir(parents=True)
        fine.mkdir(parents=True)
        Image.new("RGB", (16, 8)).save(image / f"{city}_000001_000019_leftImg8bit.png")
        ids = np.full((8, 16), 7, np.uint8)
        ids[0], ids[1] = 26, 3
        Image.fromarray(ids).save(fine / f"{city}_000001_000019_gtFine_labelIds.png")
    data = load_data("cityscapes", tmp_path)
    assert (data.num_classes, data.task.classes[:2], data.task.classes[13]) == (19, ("road", "sidewalk"), "car")
    ((_, mask),) = data.test.evaluation_batches(1, 0)
    assert mask[0, :, 0].tolist() == [13, 255, 0, 0, 0, 0, 0, 0]
    assert data.note == "Cityscapes, fine annotations: 1 train and 1 val images"
    for path in tmp_path.rglob("*labelIds.png"):
        Image.fromarray(np.full((8, 16), 18, np.uint8)).save(str(path).replace("labelIds", "labelTrainIds"))
    ((_, mask),) = load_data("cityscapes", tmp_path).test.evaluation_batches(1, 0)
    assert mask.unique().tolist() == [18]


def spoil(folder, what):
    image, mask = folder / "train/images/3.png", folder / "train/labels/3.png"
    changes = {
        "no mask": mask.unlink,
        "label 12": lambda: Image.fromarray(np.full((24, 32), 12, np.uint8)).save(mask),
        "no label": lambda: Image.fromarray(np.full((24, 32), 3, np.uint8)).save(mask),
        "colours": lambda: Image.new("RGB", (32, 24)).save(mask),
        "deep": lambda: Image.fromarray(np.full((24, 32), 300, np.uint16)).save(mask),
        "another size": lambda: Image.new("L", (30, 24)).save(mask),
        "one pixel": lambda: (Image.new("RGB", (1, 1)).save(image), Image.new("L", (1, 1)).save(mask)),
        "no image": lambda: image.write_bytes(b"text"),
        "half a mask": lambda: mask.write_bytes(mask.read_bytes()[:60]),
    }
    changes[what]()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no mask", r"train/images/3\.png: has no mask; expected .*train/labels/3\.png"),
        ("label 12", r"train/labels/3\.png: label 12, but 3 classes are 0 \.\.\. 2, and 255 is void"),
        ("colours", r"train/labels/3\.png: a mask has one channel of labels, this image is RGB"),
        ("deep", r"train/labels/3\.png: labels are 0 \.\.\. 255, found 300 \.\.\. 300"),
        ("another size", r"train/labels/3\.png: is 24x30, its image .*3\.png is 24x32"),
        ("one pixel", r"train/images/3\.png: is 1x1; at least 8x8 pixels are needed"),
        ("no image", r"train/images/3\.png: cannot be decoded as an image"),
        ("no label", r"train/labels/3\.png: label 3, but 3 classes are 0"),
        ("half a mask", r"train/labels/3\.png: cannot be decoded as a mask"),
    ],
)
def test_r12_bad_files_and_labels_are_one_line_that_names_the_file(folder, what, message):
    spoil(folder, what)
    with pytest.raises(UserError, match=message) as error:
        batches(load(folder), workers=2 if what == "label 12" else 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": None}, "classes must be their names or their number, got None"),
        ({"classes": 0}, "classes must be their names or their number, got 0"),
        ({"crop_size": 0}, "crop_size must be one or two positive ints, got 0"),
        ({"crop_size": [1, 2, 3]}, "crop_size must be one or two positive ints"),
        ({"scale": "big"}, "scale must be one or two positive floats, got 'big'"),
        ({"scale": [2, 1]}, r"scale must be \(least, greatest\), got \[2, 1\]"),
        ({"window": [8, -8]}, "window must be one or two positive ints"),
        ({"test": "valid"}, r"expected train/images/, train/labels/, valid/images/"),
        ({"crops": 3}, "has no argument 'crops'; did you mean crop_size"),
    ],
)
def test_wrong_arguments_are_refused_with_their_values(folder, arguments, message):
    with pytest.raises(UserError, match=message):
        load(folder, **arguments)


def test_r11_folders_without_images_and_missing_sets_say_what_is_expected(folder, tmp_path):
    for file in (folder / "test/images").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"test/images; expected images; found nothing"):
        load(folder)
    with pytest.raises(UserError, match=r"camvid: not found in .*expected train/images/"):
        load_data("camvid", tmp_path / "nothing")
    with pytest.raises(UserError, match=r"cityscapes: not found in .*leftImg8bit/train/CITY/"):
        load_data("cityscapes", tmp_path / "nothing")


def test_r10_pairs_that_cannot_be_read_are_skipped_and_counted_where_asked(tmp_path, trials):
    """One has no readable header, so it is left out from the start; of another half the pixels are missing."""
    for k in range(200):
        write_pair(tmp_path / "train", f"{k:03}", 12, 16, k)
    write_pair(tmp_path / "val", "0", 12, 16)
    (tmp_path / "train/images/003.png").write_bytes(b"text")
    mask = tmp_path / "train/labels/090.png"
    mask.write_bytes(mask.read_bytes()[:60])
    with pytest.raises(UserError, match=r"train/images/003\.png: cannot be decoded as an image"):
        load(tmp_path)
    data = load(tmp_path, on_bad_sample="skip")
    assert (len(data.train), len(data.bad_samples)) == (199, 1)
    whole = [torch.arange(199)]
    ((images, _),) = data.train.training_batches(whole, Augmentation(), 0, 0, 0)
    assert (len(images), len(data.bad_samples)) == (199, 2)
    ((again, _),) = load(tmp_path, on_bad_sample="skip").train.training_batches(whole, Augmentation(), 0, 0, 2)
    assert torch.equal(images, again)
    assert sum(len(x) for x, _ in data.train.evaluation_batches(50, 0)) == 198
    write_label = Image.fromarray(np.full((12, 16), 7, np.uint8))
    write_label.save(tmp_path / "train/labels/100.png")
    with pytest.raises(UserError, match=r"100\.png: label 7, but 3 classes"):  # a wrong label is no bad sample
        list(data.train.training_batches(whole, Augmentation(), 0, 0, 0))
    trials.passes(2)


def test_overlays_tint_classes_by_their_colours_and_leave_void_alone():
    image = torch.full((3, 2, 3), 100, dtype=torch.uint8)
    mask = torch.tensor([[0, 3, 255], [3, 3, 0]])
    tinted = overlay(image, mask, palette("camvid", 11))
    assert tinted[:, 0, 2].tolist() == [100] * 3
    for place, name in (((0, 0), "sky"), ((0, 1), "road")):
        expected = [0.4 * 100 + 0.6 * c for c in CAMVID[name]]
        assert tinted[:, *place].tolist() == pytest.approx(expected, abs=1)
    assert len(set(palette("cityscapes", 19))) == 19
    assert len(set(palette("anything", 200))) == 200


# Training


class Tiny(nn.Module):
    """Batch statistics, dropout, and logits at the input's size."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 3, 1)
        )

    def forward(self, x):
        return {"out": self.layers(x)}


RECIPE = Recipe(
    model="tiny", data="masks", epochs=6, batch_size=2, lr=0.2, schedule="poly", flip=True, checkpoint_every=2
)


class Stop(Exception):  # noqa: N818
    pass


def test_training_learns_colours_and_a_stopped_run_ends_bit_identical(folder, tmp_path):
    whole = train(RECIPE, Tiny, load(folder), tmp_path / "whole")
    assert whole.metrics["test_miou"] > 90
    assert {"test_iou_class 0", "train_pixel_accuracy", "test_loss"} <= whole.metrics.keys()
    assert whole.history[-1]["test_miou"] == whole.metrics["test_miou"]

    def stop_at(step):
        def stop(done):
            if done == step:
                raise Stop

        return stop

    for workers, step in ((0, 5), (2, 11)):
        with pytest.raises(Stop):
            train(replace(RECIPE, workers=workers), Tiny, load(folder), tmp_path / "run", on_step=stop_at(step))
    resumed = train(RECIPE, Tiny, load(folder), tmp_path / "run")
    assert resumed.resumed_from == 10
    assert resumed.metrics == whole.metrics
    one, other = (load_run(tmp_path / name).state_dict for name in ("whole", "run"))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_a_classifier_is_no_segmentation_network(folder, tmp_path):
    with pytest.raises(UserError, match="the network is none for segmentation"):
        train(RECIPE, lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), load(folder), tmp_path / "run")
    with pytest.raises(UserError, match=r"has 4 classes, but .* shape \(2, 3, 20, 28\); build it with num_classes=4"):
        train(RECIPE, Tiny, load(folder, classes=4), tmp_path / "run")


def test_the_command_line_trains_and_evaluates(folder, tmp_path, capsys):
    run, record = tmp_path / "run", tmp_path / "record.json"
    words = ["--model=mgic_unet", "--model_args={width: 8, depth: 1}", f"--data=masks:{folder}", "--lr=0.1"]
    words += ["--data_args={classes: [red, green, blue], crop_size: 16}", "--epochs=2", "--batch_size=2", "--seeds=[0]"]
    assert main(["train", *words, f"--out={run}", f"--record={record}"]) == 0
    assert "test miou %" in capsys.readouterr().out
    written = json.loads(record.read_text())
    assert {"test_miou", "test_iou_green", "train_loss", "params"} <= written["metrics"].keys()
    assert written["recipe"]["data"] == f"masks:{folder.name}"
    assert str(folder) not in record.read_text()
    for more in ([], ["--data_args={classes: [red, green, blue], window: 16}"]):
        assert main(["evaluate", str(run / "seed-0"), "--json", *more]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["samples"] == 4
        if not more:
            assert found["miou"] == pytest.approx(written["metrics"]["test_miou"]["mean"])
    assert main(["evaluate", str(run / "seed-0")]) == 0
    assert "iou_green" in capsys.readouterr().out
