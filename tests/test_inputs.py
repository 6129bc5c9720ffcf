"""What networks are fed: one image, none, tiny, huge, odd, strided, of other types, with NaN. For every family.

The ids R17 to R22 are those of the fault table.
"""

import copy
import os
from dataclasses import replace
from functools import cache

import pytest
import torch
from families import FAMILIES, FUNCTIONS, POINTS, SEGMENTATION, inputs, logits, small
from torch import nn

import mgic
from mgic.data import load_data
from mgic.models import build_model
from mgic.runtime.paths import relative_error
from mgic.training import RECIPES, train

FULL = os.environ.get("MGIC_FAULTS") == "full"
networks = pytest.mark.parametrize("name", mgic.list_models() if FULL else FAMILIES)
IMAGES = [name for name in mgic.list_models() if name not in (*POINTS, *FUNCTIONS)]


@cache
def varied(name):
    """A network whose norms are not the identity, in eval mode; tests that change it copy it."""
    model = small(name)
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
    return model.eval()


@torch.no_grad()
def run(model, x):
    return logits(model(x))


def stride(model):
    return 1 << len(model.down) if hasattr(model, "down") else model.stride


@networks
def test_r17_a_batch_of_one_works_in_eval_mode_and_in_training_is_refused_before_anything_changes(name, trials):
    model = copy.deepcopy(varied(name))
    alone, sizes = (name not in IMAGES, [(32, 32)]) if name not in IMAGES else (False, None)
    if sizes is None:
        coarse = stride(model)
        sizes = [(coarse, coarse), (coarse, coarse + 1), *([(1, 1)] if FULL else [])]
    for size in sizes:
        x = inputs(name, batch=1, size=size)
        assert run(model.eval(), x).isfinite().all()
        before = copy.deepcopy(model.state_dict())
        model.train()
        if alone or max(size) <= stride(model):
            with pytest.raises(ValueError, match=r"batch norms a single value to norm.*give at least 2"):
                model(x)
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        else:
            assert logits(model(x)).isfinite().all()
        assert logits(model(inputs(name, batch=2, size=size))).isfinite().all()
        trials.passes(2)


def test_r17_other_norms_and_frozen_ones_train_on_one_image():
    for change in (lambda norm: nn.GroupNorm(1, norm.num_features), lambda norm: norm.eval()):
        model = small("mgic_resnet20").train()
        for parent in list(model.modules()):
            for child, module in list(parent.named_children()):
                if isinstance(module, nn.BatchNorm2d):
                    setattr(parent, child, change(module))
        assert model(torch.randn(1, 3, 2, 2)).isfinite().all()


def test_r17_a_network_cut_short_is_trained_on_what_its_own_stride_allows():
    model = small("mgic_resnet20")
    model.prune_intermediate_layers(indices=[0])
    assert model.train()(torch.randn(1, 3, 2, 2)).isfinite().all()


@networks
def test_r18_an_empty_batch_gives_an_empty_result_and_too_small_an_input_names_the_least(name, trials):
    model = copy.deepcopy(varied(name))
    least = 0 if name in FUNCTIONS else 10 if name in POINTS else 1
    words = "at least 10 points" if name in POINTS else "smallest possible are 1x1"
    for size in (0, 1, 2, 7, 8, 31, 32, 33) if FULL else (0, 7, 33):
        for batch in (0, 2):
            x = inputs(name, batch=batch, size=(size, size))
            for mode in (True, False):
                model.train(mode)
                if size < least:
                    with pytest.raises(ValueError, match=words):
                        run(model, x)
                else:
                    y = run(model, x)
                    assert y.shape[:2] == (batch, model.num_classes)
                    assert y.isfinite().all()
                trials.passes()
    assert all(value.isfinite().all() for value in model.state_dict().values())


@networks
def test_r18_inputs_of_another_shape_are_refused_with_the_shape(name):
    model = varied(name)
    x = inputs(name)
    for wrong in (x[0], x[None]):
        with pytest.raises(ValueError, match=r"expected .*\(N, C.*, got shape \("):
            model(wrong)


@networks
def test_r19_odd_and_wide_images_of_any_number_of_channels(name, trials):
    sizes, channels = [(65, 97), (224, 160), (33, 1000)], [1, 3, 4, 10]
    cases = [(s, c) for s in sizes for c in channels] if FULL else [((65, 97), 4), ((33, 200), 1), ((40, 64), 10)]
    for size, in_chans in cases:
        if name in POINTS and in_chans < 3:
            with pytest.raises(ValueError, match="in_chans=1: a point has three coordinates"):
                small(name, in_chans=in_chans)
        else:
            model = small(name, in_chans=in_chans).eval()
            y = run(model, inputs(name, batch=1, size=size, in_chans=in_chans))
            assert y.isfinite().all()
            assert y.shape == (1, model.num_classes, *(size if name in SEGMENTATION else ()))
            with pytest.raises((RuntimeError, ValueError), match=rf"channels|size|shape|{in_chans}"):
                model(inputs(name, batch=1, size=size, in_chans=in_chans + 1))
        trials.passes()


@networks
def test_r20_views_give_the_same_output(name, trials):
    """To 1e-5. Where float32 itself is further from float64 than that, to four times as far."""
    model = varied(name)
    x = inputs(name, batch=2)
    rounding = relative_error(run(model, x), run(copy.deepcopy(model).double(), x.double()))
    doubled = torch.stack([x, -x], dim=-1).flatten(-2)[..., ::2]  # every other number of a larger tensor
    turned = x.transpose(0, -1).contiguous().transpose(0, -1)
    views = {
        "strided": (doubled, x),
        "transposed": (turned, x),
        "offset": (torch.cat([x, x])[1:3], torch.cat([x[1:], x[:1]])),
        "expanded": (x[:1].expand(3, *x.shape[1:]), x[:1].repeat(3, *[1] * (x.dim() - 1))),
        "mirrored": (x.flip(-1) if name not in FUNCTIONS else x.flip(0), None),
    }
    if x.dim() == 4:
        views["channels last"] = (x.contiguous(memory_format=torch.channels_last), x)
    for view, plain in views.values():
        plain = view.clone(memory_format=torch.contiguous_format) if plain is None else plain
        error = relative_error(run(model, view), run(model, plain.contiguous()))
        assert error <= max(1e-5, 4 * rounding)
        trials.passes(relative_error=error)


@networks
def test_r21_integers_are_refused_with_the_fix(name, trials):
    model = varied(name)
    x = inputs(name)
    for dtype in (torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64):
        hint = r"x\.float\(\) / 255" if dtype in (torch.uint8, torch.int8, torch.bool) else r"x\.float\(\)"
        with pytest.raises(TypeError, match=rf"floating-point numbers, got {dtype}: convert them first \({hint}"):
            model(x.to(dtype))
        trials.passes()


@pytest.mark.parametrize("name", mgic.list_models() if FULL else FAMILIES[::3])
def test_r21_half_precision_is_close_and_double_precision_the_same(name, trials):
    """To 1e-2 and 2e-2. Where rounding weights and inputs alone moves a network's output by more, to four times that."""
    model, x = varied(name), inputs(name)
    expected = run(model, x)

    def error(model, x):
        y = run(model, x)
        assert y.isfinite().all()
        return float((y.double() - expected.double()).norm() / expected.double().norm())

    for dtype, most in ((torch.float16, 1e-2), (torch.bfloat16, 2e-2)):
        low = copy.deepcopy(model).to(dtype)
        rounded = error(copy.deepcopy(low).float(), x.to(dtype).float())
        errors = [error(low, x.to(dtype))]
        if dtype == torch.bfloat16:
            with torch.autocast("cpu", dtype):
                errors.append(error(model, x))
        assert max(errors) <= max(most, 4 * rounded)
        trials.passes(len(errors), **{f"{dtype}_relative".removeprefix("torch."): max(errors)})
    double = error(copy.deepcopy(model).double(), x.double())
    assert double <= 1e-5
    trials.passes(float64_relative=double)


@pytest.mark.parametrize("name", ["resnet20", "mgic_resnet20", "mgiad20"] if FULL else ["mgic_resnet20"])
def test_r21_half_precision_changes_the_accuracy_of_a_trained_network_by_a_fifth_of_a_point_at_most(
    name, tmp_path, trials
):
    data = load_data("digits")
    recipe = replace(RECIPES["digits"], model=name, model_args={}, epochs=20 if FULL else 6)
    model = build_model(name, {"num_classes": 10, "in_chans": 1})
    train(recipe, lambda: model, data, tmp_path / "run", progress=False, accelerator="cpu")
    both = [split.evaluation_batches(500, 0) for split in (data.train, data.test)]
    inputs, labels = (torch.cat(parts) for parts in zip(*(batch for part in both for batch in part), strict=True))
    inputs = data.normalizer(torch.device("cpu"))(inputs)

    def accuracy(model, x):
        return 100 * float((run(model.eval(), x).argmax(1) == labels).double().mean())

    expected = accuracy(model, inputs)
    assert expected > 90
    found = [accuracy(copy.deepcopy(model).to(dtype), inputs.to(dtype)) for dtype in (torch.float16, torch.bfloat16)]
    with torch.autocast("cpu", torch.bfloat16):
        found.append(accuracy(model, inputs))
    apart = max(abs(x - expected) for x in found)
    assert apart <= 0.2
    trials.passes(len(found), points=apart)


@networks
def test_r22_numbers_that_are_not_finite_pass_through_and_touch_no_other_sample(name, trials):
    model = varied(name)
    x = inputs(name, batch=3)
    expected = run(model, x)
    for value in (float("nan"), float("inf"), 1e30):
        odd = x.clone()
        odd[1].view(-1)[3] = value
        y = run(model, odd)
        assert y.shape == expected.shape
        torch.testing.assert_close(y[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-6)
        if value != value:
            assert y[1].isnan().any()
        trials.passes()
