"""Convolutions computed another way in training: the same outputs, gradients and weights."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import RECIPE, stripes
from torch import nn
from torch.nn import functional as F

import mgic
from mgic.training import loop
from mgic.training.fast import MOST_WEIGHTS, fast_training_
from mgic.transfer import GroupedPointwise


def gradients(model, x):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


POINTWISE = [
    lambda: nn.Conv2d(12, 18, 1, groups=3),
    lambda: nn.Conv2d(12, 6, 1, groups=6, bias=False),
    lambda: nn.Conv2d(12, 12, 1, groups=12),
    lambda: mgic.Restriction(12, 4),
    lambda: GroupedPointwise(12, 24, 4),
]


@pytest.mark.parametrize("size", [(2, 12, 5, 3), (1, 12, 1, 1), (0, 12, 4, 4)])
@pytest.mark.parametrize("layer", POINTWISE)
def test_outputs_and_gradients_are_those_of_the_convolution(layer, size):
    check_layer(layer(), torch.randn(size, dtype=torch.float64))


def check_layer(plain, x):
    plain = plain.double()
    fast = copy.deepcopy(plain)
    assert fast_training_(fast) == [""]
    torch.testing.assert_close(gradients(fast, x), gradients(plain, x), rtol=1e-12, atol=1e-12)


@pytest.fixture
def asked(monkeypatch):
    """What is computed by PyTorch's convolution: the shapes of its weights."""
    shapes = []
    conv2d, functional = torch.conv2d, F.conv2d
    monkeypatch.setattr(torch, "conv2d", lambda x, w, *rest: shapes.append(tuple(w.shape)) or conv2d(x, w, *rest))
    monkeypatch.setattr(F, "conv2d", lambda x, w, *a, **k: shapes.append(tuple(w.shape)) or functional(x, w, *a, **k))
    return shapes


KERNELS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 5, "padding": 2, "stride": 2},
    {"kernel_size": (1, 3), "padding": (0, 1)},
    {"kernel_size": (2, 4), "padding": (2, 3), "stride": (2, 1), "bias": False},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": (5, 3), "padding": (2, 3), "dilation": (1, 2), "stride": (1, 3)},
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 2), (2, 1), (4, 4), (1, 6)])
@pytest.mark.parametrize("channels", [(6, 6, 6), (8, 4, 2), (3, 5, 1)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_on_maps_smaller_than_the_kernel_a_convolution_is_one_product(kernel, channels, size, channels_last, asked):
    inputs, outputs, groups = channels
    layer = nn.Conv2d(inputs, outputs, groups=groups, **kernel).double()
    x = torch.randn(40, inputs, *size, dtype=torch.float64)
    check_layer(layer, x.contiguous(memory_format=torch.channels_last) if channels_last else x)
    smaller = size[0] * size[1] < layer.kernel_size[0] * layer.kernel_size[1]
    assert len(asked) == 1 + (not smaller)  # the plain one is a convolution always


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("outputs", [8, 12, 16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_few_outputs_of_one_input_are_depthwise_convolutions(kernel, outputs, channels_last, asked):
    layer = nn.Conv2d(4, outputs, groups=4, **kernel).double()
    x = torch.randn(3, 4, 7, 6, dtype=torch.float64)
    check_layer(layer, x.contiguous(memory_format=torch.channels_last) if channels_last else x)
    assert len(asked) == 1 + outputs // 4


def test_what_a_large_matrix_would_cost_more_than_it_saves_stays_a_convolution(asked):
    layer = nn.Conv2d(64, 64, 3, padding=1)
    fast_training_(layer)
    layer(torch.randn(1, 64, 2, 2))
    assert len(asked) == 1
    layer(torch.randn(16, 64, 2, 2))
    assert len(asked) == 1


def test_products_can_be_differentiated_twice():
    layer = nn.Conv2d(4, 4, 3, padding=1, groups=2).double()
    fast_training_(layer)
    x = torch.randn(8, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (2, 4, 4, 1), (2, 5, 3, 3), (4, 1, 1)])
def test_wrong_inputs_get_the_error_of_the_convolution(shape):
    plain = nn.Conv2d(4, 8, 3, groups=4)
    fast = copy.deepcopy(plain)
    fast_training_(fast)
    with pytest.raises(RuntimeError) as expected:
        plain(torch.randn(shape))
    with pytest.raises(RuntimeError) as error:
        fast(torch.randn(shape))
    assert str(error.value) == str(expected.value)


def test_a_whole_network_trains_the_same_and_keeps_its_weights_names_and_types():
    plain = mgic.create_model("mgic_resnet20", group_size=4).double().train()
    fast = copy.deepcopy(plain)
    names = fast_training_(fast)
    convolutions = [n for n, m in plain.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    transfers = [n for n, m in plain.named_modules() if isinstance(m, GroupedPointwise)]
    assert set(names) == {*convolutions, *transfers}
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in fast.modules()] == [type(m) for m in plain.modules()]
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(gradients(fast, x), gradients(plain, x), rtol=1e-6, atol=1e-8)


def test_a_copy_computes_with_its_own_weights():
    """The moving average of a network is a copy of it."""
    fast = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2))
    fast_training_(fast)
    copied = copy.deepcopy(fast)
    nn.init.zeros_(fast[0].weight)
    nn.init.zeros_(fast[0].bias)
    x = torch.randn(2, 8, 3, 3)
    assert float(fast(x).detach().abs().max()) == 0
    assert float(copied(x).detach().abs().max()) > 0


def test_the_product_is_taken_where_it_was_faster_and_nowhere_else(asked):
    fast = mgic.Restriction(8, 4)
    fast_training_(fast)
    x = torch.randn(2, 8, 4, 4)
    fast(x)
    assert asked == []
    fast(x.to(memory_format=torch.channels_last))
    assert len(asked) == 1
    fast(x[:, :, ::2])
    assert len(asked) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(x).dtype == torch.bfloat16
    assert len(asked) == 3
    fast.bfloat16()(x.bfloat16())
    assert len(asked) == 4


def test_wide_groups_are_products_on_single_pixels_only(asked):
    layer = nn.Conv2d(256, 2 * (MOST_WEIGHTS // 128 + 1), 1, groups=2)
    fast_training_(layer)
    layer(torch.randn(8, 256, 1, 1))
    assert asked == []
    layer(torch.randn(8, 256, 2, 2))
    assert len(asked) == 1


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 8, 1, stride=2, groups=2),
        nn.Conv2d(8, 8, 1, padding=1, groups=2),
        GroupedPointwise(8, 8, 1),
        GroupedPointwise(8, 8, 2, dim=3),
        nn.Conv1d(8, 8, 3),
    ],
)
def test_other_layers_stay_as_they_are(layer):
    assert fast_training_(layer) == []
    assert "forward" not in vars(layer)


def test_mgic_train_uses_it_on_the_cpu(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(loop, "fast_training_", lambda model: asked.append(fast_training_(model)))

    def build():
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        )

    loop.train(replace(RECIPE, epochs=1), build, stripes(), tmp_path / "run", accelerator="cpu")
    assert asked == [["0", "1"]]
