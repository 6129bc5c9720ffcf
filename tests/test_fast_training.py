"""Grouped 1x1 convolutions as matrix products: the same outputs, gradients and weights, in training only."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import RECIPE, stripes
from torch import nn

import mgic
from mgic.training import loop
from mgic.training.fast import MOST_WEIGHTS, fast_training_
from mgic.transfer import GroupedPointwise


def gradients(model, x):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("size", [(2, 12, 5, 3), (1, 12, 1, 1), (0, 12, 4, 4)])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(12, 18, 1, groups=3),
        lambda: nn.Conv2d(12, 6, 1, groups=6, bias=False),
        lambda: nn.Conv2d(12, 12, 1, groups=12),
        lambda: mgic.Restriction(12, 4),
        lambda: GroupedPointwise(12, 24, 4),
    ],
)
def test_outputs_and_gradients_are_those_of_the_convolution(layer, size):
    plain = layer().double()
    fast = copy.deepcopy(plain)
    assert fast_training_(fast) == [""]
    x = torch.randn(size, dtype=torch.float64)
    torch.testing.assert_close(gradients(fast, x), gradients(plain, x), rtol=1e-12, atol=1e-12)


def test_a_whole_network_trains_the_same_and_keeps_its_weights_names_and_types():
    plain = mgic.create_model("mgic_resnet20", group_size=4).double().train()
    fast = copy.deepcopy(plain)
    names = fast_training_(fast)
    assert names == [n for n, m in plain.named_modules() if isinstance(m, GroupedPointwise)]
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


def test_the_product_is_taken_where_it_was_faster_and_nowhere_else(monkeypatch):
    asked = []
    conv2d = torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda *a, **k: asked.append(1) or conv2d(*a, **k))
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


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Conv2d(8, 8, 1, stride=2, groups=2),
        nn.Conv2d(8, 8, 1, padding=1, groups=2),
        GroupedPointwise(8, 8, 1),
        GroupedPointwise(8, 8, 2, dim=3),
        nn.Conv2d(256, 2 * (MOST_WEIGHTS // 128 + 1), 1, groups=2),
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
    assert asked == [["1"]]
