"""A start from trained weights: what the multigrid operators can represent is found, what they cannot is fitted best."""

import copy

import pytest
import torch
from torch import nn

from mgic.blocks import BasicBlock
from mgic.conversion import convert
from mgic.conversion_report import Conversion
from mgic.cycle import MGICConv
from mgic.errors import UserError
from mgic.fitting import fit_convolution_, warm_start_


def moments(channels):
    torch.manual_seed(1)
    mix = torch.randn(channels, channels)
    return mix @ mix.t() / channels


def energy(error, C):
    return float(torch.einsum("oihw,ij,ojhw->", error.double(), C.double(), error.double()))


@pytest.mark.parametrize(("inputs", "outputs", "kernel"), [(64, 64, 3), (32, 96, 1), (96, 32, (1, 3))])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_kernel_of_the_class_is_found_again(inputs, outputs, kernel, weighted):
    torch.manual_seed(0)
    truth, layer = (MGICConv(inputs, outputs, kernel, group_size=8, coarsest=8) for _ in range(2))
    bias = layer.bias.clone()
    kept = fit_convolution_(layer, truth.dense_weight(), moments(inputs) if weighted else None)
    assert kept == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(layer.dense_weight(), truth.dense_weight(), rtol=1e-3, atol=1e-5)
    assert torch.equal(layer.bias, bias)


def test_the_share_kept_is_that_of_the_assembled_kernel():
    torch.manual_seed(0)
    weight, C = torch.randn(32, 32, 3, 3), moments(32)
    layer = MGICConv(32, 32, 3, group_size=4, coarsest=8)
    kept = fit_convolution_(layer, weight, C)
    assert kept == pytest.approx(1 - energy(weight - layer.dense_weight().detach(), C) / energy(weight, C), abs=1e-4)


def test_no_small_change_of_a_factor_makes_the_fit_better_by_much():
    """Gradient descent from the fit gains little; from random weights it ends no better within the same steps."""
    torch.manual_seed(0)
    weight, C = torch.randn(32, 32, 3, 3), moments(32)

    def descend(layer):
        optimizer = torch.optim.Adam(layer.parameters(), 3e-3)
        for _ in range(150):
            error = weight - layer.dense_weight()
            loss = torch.einsum("oihw,ij,ojhw->", error, C, error)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return 1 - float(loss.detach()) / energy(weight, C)

    fitted, random = (MGICConv(32, 32, 3, group_size=4, coarsest=8, bias=False) for _ in range(2))
    kept = fit_convolution_(fitted, weight, C)
    assert descend(fitted) - kept < 0.05
    assert kept > descend(random) - 0.05


def test_weighting_by_the_features_keeps_more_of_the_output():
    torch.manual_seed(0)
    weight = torch.randn(32, 32, 1, 1)
    scales = torch.logspace(0, -2, 32)[torch.randperm(32)]
    C = torch.diag(scales.square())
    x = torch.randn(512, 32, 1, 1) * scales[:, None, None]
    y = nn.functional.conv2d(x, weight)
    errors = []
    for given in (None, C):
        layer = MGICConv(32, 32, 1, group_size=4, coarsest=8, bias=False)
        fit_convolution_(layer, weight, given)
        errors.append(float((layer(x) - y).detach().square().sum() / y.square().sum()))
    assert errors[1] < 0.7 * errors[0]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.block = BasicBlock(32)
        self.down = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.down(self.block(self.stem(x))).mean((2, 3)))


def trained_net():
    """Random weights of low rank and random statistics stand for a trained network."""
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        for conv in (net.block.conv1, net.block.conv2, net.down):
            low = torch.randn(32, 10, 3, 3) / 10
            conv.weight.copy_(torch.einsum("orhw,ri->oihw", low, torch.randn(10, 32) / 4))
        for norm in (net.block.norm1, net.block.norm2):
            norm.weight.uniform_(0.5, 1.5)
            norm.running_var.uniform_(0.5, 1.5)
    return net


@pytest.mark.parametrize("blocks", [False, True])
def test_a_warm_start_brings_a_converted_network_near_the_dense_one(blocks):
    dense = trained_net()
    before = copy.deepcopy(dense.state_dict())
    batches = [torch.randn(8, 3, 8, 8) for _ in range(4)]
    cold, report = convert(dense, Conversion(8, 8, blocks=blocks), input_size=(3, 8, 8))
    fitted, warm = copy.deepcopy(cold), copy.deepcopy(cold).train()
    shares = [warm_start_(net, dense, batches, steps=n, lr=3e-3) for net, n in ((fitted, 0), (warm, 60))]
    assert str(shares[1]).splitlines() == [str(fit) for fit in shares[1]]
    assert [fit.name for fit in shares[1]] == [row.name for row in report.rows if row.replaced]
    fresh = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        expected = dense(fresh)
        errors = [float((net.eval()(fresh) - expected).square().mean()) for net in (cold, fitted, warm)]
    assert errors[1] < errors[0]
    assert errors[2] < 0.5 * errors[0]
    assert errors[2] < errors[1]
    assert all(fit.kept <= 1 and fit.fitted <= 1 + 1e-9 for fits in shares for fit in fits)
    assert sum(fit.kept for fit in shares[1]) > sum(fit.kept for fit in shares[0])
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())
    assert not any(module.training for module in dense.modules())


def test_a_warm_start_leaves_modes_and_gradients_alone_and_is_repeatable():
    dense = trained_net()
    batches = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    cold, _ = convert(dense, Conversion(8, 8, blocks=False), input_size=(3, 8, 8))
    one, two = copy.deepcopy(cold).train(), copy.deepcopy(cold).train()
    one.head.weight.grad = torch.ones_like(one.head.weight)
    one.down.relax[0].weight.grad = torch.ones_like(one.down.relax[0].weight)
    for net in (one, two):
        with torch.no_grad():
            warm_start_(net, dense, batches, steps=5)
    assert all(module.training for module in one.modules())
    kept = {name for name, p in one.named_parameters() if p.grad is not None}
    assert kept == {"head.weight", "down.relax.0.weight"}
    assert torch.equal(one.down.relax[0].weight.grad, torch.ones_like(one.down.relax[0].weight))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_where_linear_layers_alone_were_replaced_it_says_that_they_are_not_fitted():
    dense = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Flatten(2), nn.Linear(64, 64), nn.Flatten(), nn.Linear(64 * 64, 4))
    converted, report = convert(
        dense, Conversion(8, 16, linear=True), where=lambda name, module: name == "2", input_size=(3, 8, 8)
    )
    assert [row.name for row in report.rows if row.replaced] == ["2"]
    with pytest.raises(
        UserError, match=r"only linear layers were replaced \(2\), and MGICLinear layers are not fitted"
    ):
        warm_start_(converted, dense, [torch.randn(1, 3, 8, 8)])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, d: warm_start_(m, d, []), "a warm start needs calibration data"),
        (lambda m, d: warm_start_(m, d, [(torch.randn(1, 3, 8, 8), 1)]), "tensors alone"),
        (
            lambda m, d: warm_start_(m, d, [torch.randn(1, 3, 8, 8).double()]),
            "calibration data is torch.float64 on cpu",
        ),
        (lambda m, d: warm_start_(m, d, [torch.full((1, 3, 8, 8), torch.nan)]), "holds a number that is not finite"),
        (lambda m, d: warm_start_(m, d, [torch.randn(1, 3, 8, 8)], steps=-1), "steps=-1 must not be negative"),
        (
            lambda m, d: warm_start_(d, d, [torch.randn(1, 3, 8, 8)]),
            "nothing to fit: the network holds no multigrid layer",
        ),
        (
            lambda m, d: fit_convolution_(m.down, d.stem.weight),
            r"shape \(32, 3, 3, 3\) is not that of the layer, \(32, 32",
        ),
        (
            lambda m, d: fit_convolution_(m.down, d.down.weight, torch.eye(3)),
            r"moments of shape \(3, 3\) are not those of 32",
        ),
    ],
)
def test_wrong_calls_are_one_clear_line(call, words):
    dense = trained_net()
    model, _ = convert(dense, Conversion(8, 8, blocks=False), input_size=(3, 8, 8))
    with pytest.raises(UserError, match=words):
        call(model, dense)
