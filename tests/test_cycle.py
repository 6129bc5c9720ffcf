import copy
import pickle
from functools import partial

import pytest
import torch
from oracle import cycle_matrix
from torch import nn

import mgic
from mgic import (
    AdditiveChannelChange,
    BasicBlock,
    Bottleneck,
    ChannelChange,
    ChannelConfigError,
    GroupedLinear,
    LinearBlock,
    MGICBlock,
    MGICConv,
    MGICLinear,
    PreActBasicBlock,
    PreActBottleneck,
    Scheme,
    additive,
    plain_prolongation,
    plan_levels,
    scaled_correction,
    sparse_random_pair,
)
from mgic.counting import count_trainable
from mgic.hierarchy import BASIC, BOTTLENECK, count_macs, count_params

BLOCKS = [BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck]
PLAIN = {"norm": nn.Identity, "act": nn.ReLU}


def hidden_of(block, channels):
    return channels // 4 if block in (Bottleneck, PreActBottleneck) else None


def randomised(module):
    """Give every norm statistics and every weight a value of its own, in float64 and evaluation mode."""
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(m.running_mean, -1, 1)
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -1, 1)
    return module.double().eval()


@pytest.mark.parametrize("cycle", [mgic.multiplicative, additive])
@pytest.mark.parametrize("block", [BasicBlock, PreActBasicBlock])
@pytest.mark.parametrize(
    ("channels", "group_size", "coarsest"),
    [
        (8, 2, 2),
        (8, 4, 4),
        (16, 4, 4),
        (16, 2, 8),
        (16, 8, 4),
        (24, 4, 3),
        (12, 4, 3),
        (20, 5, 10),
        (32, 8, 4),
        (10, 4, 2),
    ],
)
def test_to_dense_equals_an_independent_block_diagonal_oracle(cycle, block, channels, group_size, coarsest):
    """Both cycles of linear blocks, assembled level by level from block-diagonal matrices, to 1e-10."""
    cycles = MGICBlock(block, channels, group_size, coarsest, scheme=Scheme(cycle=cycle))
    size = (3, 2) if channels <= 16 else (1, 2)
    expected = cycle_matrix(randomised(cycles), size, multiplicative=cycle is mgic.multiplicative)
    error = (cycles.to_dense(size) - torch.from_numpy(expected)).abs().max()
    assert error <= 1e-10 * max(1, abs(expected).max())
    assert len(cycles.levels) > 1


def test_to_dense_is_what_the_block_does_to_a_vector():
    """With activations that are the identity already, the matrix acts as the block does, biases apart."""
    block = randomised(MGICBlock(partial(BasicBlock, act=nn.Identity), 16, 4, 4))
    x = torch.randn(3, 16, 2, 2, dtype=torch.float64)
    response = block(x) - block(torch.zeros_like(x[:1]))
    torch.testing.assert_close(response.flatten(1), x.flatten(1) @ block.to_dense((2, 2)).t(), rtol=1e-10, atol=1e-10)


def test_both_transfers_of_a_change_of_width_have_the_groups_of_the_plan():
    scheme = Scheme(plan=partial(plan_levels, transfer_group_size=16))
    change = AdditiveChannelChange(lambda c, d, groups: nn.Conv2d(c, d, 1, groups=groups), 64, 128, 8, 16, scheme)
    planned = [level.transfer_groups for level in change.levels[:-1]]
    assert planned == [4, 2]
    assert [R.groups for R in change.restrict] == planned
    assert [P.groups for P in change.prolong] == planned


def test_to_dense_needs_no_parameters():
    matrix = MGICBlock(lambda channels, groups: nn.Identity(), 16, 8, 16).to_dense()
    torch.testing.assert_close(matrix, torch.eye(16), rtol=0, atol=0)


def test_to_dense_refuses_what_is_not_linear():
    class Square(nn.Module):
        def __init__(self, channels, groups):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x + self.scale * x**2

    with pytest.raises(ChannelConfigError, match="MGICBlock is not linear once its activation modules are gone"):
        MGICBlock(Square, 16, 4, 4).to_dense()


def test_the_additive_cycle_is_one_structured_resnet_step():
    """2020, (9) and (10): x + [K5, P1 K3, P1 P2 K1] sigma([K6; K4 R1; K2 R2 R1] sigma(x)), without norms.

    The identity needs sigma(R x) = R sigma(x), which holds for the non-negative features a ReLU network carries, since
    R starts non-negative.
    """
    scheme = Scheme(cycle=additive, norm=nn.Identity)
    block = MGICBlock(partial(PreActBasicBlock, **PLAIN), 16, 4, 4, scheme=scheme).double()
    x = torch.rand(2, 16, 5, 4, dtype=torch.float64)
    (R1, R2), (P1, P2) = block.restrict, block.prolong
    down = [lambda x: x, R1, lambda x: R2(R1(x))]
    up = [lambda y: y, P1, lambda y: P1(P2(y))]
    step = x
    stacked = [torch.relu(relax.conv1(move(torch.relu(x)))) for relax, move in zip(block.relax, down, strict=True)]
    for relax, hidden, move in zip(block.relax, stacked, up, strict=True):
        step = step + move(relax.conv2(hidden))
    torch.testing.assert_close(block(x), step, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cycle", [mgic.multiplicative])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("channels", "group_size", "coarsest"), [(32, 4, 8), (40, 8, 16), (64, 8, 4), (7, 2, 2)])
def test_identity_relaxation_makes_the_block_the_identity(cycle, training, channels, group_size, coarsest):
    """Sec. 3.3: only the coarse change is prolonged, so no change in means no change out: exactly."""
    block = MGICBlock(lambda channels, groups: nn.Identity(), channels, group_size, coarsest).train(training)
    x = torch.randn(2, channels, 6, 6)
    torch.testing.assert_close(block(x), x, rtol=0, atol=0)


def test_plain_prolongation_loses_the_identity():
    block = MGICBlock(lambda c, g: nn.Identity(), 32, 4, 8, correction=plain_prolongation).eval()
    x = torch.randn(2, 32, 6, 6)
    assert (block(x) - x).abs().max() > 0.1


def test_a_scaled_correction_scales_the_coarse_change():
    """With linear parts and no norm the change of the block is linear in the scale."""
    torch.manual_seed(1)
    block = MGICBlock(lambda c, g: nn.Conv2d(c, c, 1, groups=g), 8, 2, 4, scheme=Scheme(norm=nn.Identity))
    x = torch.randn(1, 8, 2, 2)
    block.relax[0] = nn.Identity()
    change = block(x) - x
    block.correction = scaled_correction(0.5)
    torch.testing.assert_close(block(x) - x, 0.5 * change)
    assert block.correction == scaled_correction(0.5) != scaled_correction(1)
    assert pickle.dumps(block)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("cycle", [mgic.multiplicative, additive])
def test_r16_every_input_channel_reaches_every_output_channel(block, cycle):
    """Union of the non-zeros of the Jacobian over random inputs; the grouped block alone couples its groups only."""
    channels, group_size = 32, 4

    def coupled(module, channels):
        found = torch.zeros(channels, channels, dtype=torch.bool)
        for _ in range(16):
            x = torch.randn(1, channels, 3, 3, dtype=torch.float64)
            jacobian = torch.func.jacrev(lambda x: module(x).sum((0, 2, 3)))(x)
            found |= (jacobian != 0).any(-1).any(-1)[:, 0]
        return found.double().mean()

    hidden = 8 if hidden_of(block, channels) else None
    multigrid = MGICBlock(block, channels, group_size, 4, hidden, scheme=Scheme(cycle=cycle))
    assert coupled(randomised(multigrid), channels) == 1.0
    grouped = MGICBlock(block, channels, group_size, 4, hidden).relax[0]
    assert coupled(randomised(grouped), channels) <= 0.5


@pytest.mark.parametrize("block", BLOCKS)
def test_gradcheck_in_float64(block):
    multigrid = MGICBlock(partial(block, act=nn.Softplus), 8, 2, 2, hidden_of(block, 8)).double()
    x = torch.randn(2, 8, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(multigrid, (x,))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("group_size", "coarsest"), [(8, 16), (32, 64), (4, 4)])
def test_counts_of_built_blocks_equal_the_closed_form(block, group_size, coarsest):
    """Parameters of the modules and multiply-adds of a real forward pass, for widths from 8 to 4096."""
    for channels in (8, 40, 64, 96, 320, 960, 4096):
        hidden = hidden_of(block, channels)
        with torch.device("meta"):
            multigrid = MGICBlock(block, channels, group_size, coarsest, hidden)
        kind = BASIC if hidden is None else BOTTLENECK
        levels = plan_levels(channels, group_size, coarsest, hidden)
        # a pre-activation block norms its input instead of its output: K1's norm sits on the outer width
        assert multigrid.levels == levels
        counted = mgic.cost(multigrid, (channels, 4, 4))
        assert counted.macs == count_macs(levels, 16, kind)
        assert counted.params == count_params(levels, kind)


@pytest.mark.parametrize(("channels", "params"), [(64, 19_840), (256, 80_512), (1024, 323_200)])
def test_pinned_parameter_counts(channels, params):
    assert count_trainable(MGICBlock(BasicBlock, channels, group_size=8, coarsest=16)) == params


@pytest.mark.parametrize("channels", [1, 3, 7, 8, 13, 16])
def test_r15_no_wider_than_the_coarsest_grid_is_the_wrapped_block(channels):
    multigrid = MGICBlock(BasicBlock, channels, group_size=4, coarsest=16)
    (block,) = multigrid.relax
    x = torch.randn(2, channels, 5, 5)
    assert len(multigrid.levels) == 1
    torch.testing.assert_close(multigrid.eval()(x), block.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dim", "conv", "norm"),
    [(1, nn.Conv1d, nn.BatchNorm1d), (2, nn.Conv2d, nn.BatchNorm2d), (3, nn.Conv3d, nn.BatchNorm3d)],
)
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_in_one_two_and_three_dimensions(block, dim, conv, norm):
    """A feature map that is one pixel wide in the other dimensions gives the same result in each dimension."""
    scheme = Scheme(transfer=partial(mgic.averaging_pair, dim=dim), norm=norm)
    multigrid = MGICBlock(partial(block, conv=conv, norm=norm), 16, 4, 4, hidden_of(block, 16), scheme=scheme)
    plane = MGICBlock(block, 16, 4, 4, hidden_of(block, 16))
    kernels = {k: v for k, v in multigrid.state_dict().items()}
    for name, value in plane.state_dict().items():
        source = kernels[name]
        if source.dim() > 2:  # put the kernel's line (or middle plane) where the plane's kernel has it
            new = torch.zeros_like(value)
            if dim == 1:
                new[..., value.shape[-2] // 2, :] = source
            elif dim == 2:
                new = source
            else:
                new = source[:, :, source.shape[2] // 2]
            kernels[name] = new
    plane.load_state_dict(kernels)
    x = torch.randn(2, 16, 6)
    shaped = {1: x, 2: x[:, :, None], 3: x[:, :, None, None]}[dim]
    torch.testing.assert_close(multigrid.eval()(shaped).view(2, 16, 6), plane.eval()(x[:, :, None]).view(2, 16, 6))


def test_linear_blocks_are_convolutions_on_one_pixel():
    scheme = Scheme(transfer=partial(mgic.averaging_pair, dim=0), norm=nn.BatchNorm1d)
    multigrid = randomised(MGICBlock(LinearBlock, 32, 4, 8, scheme=scheme))
    matrix = multigrid.to_dense(())
    assert matrix.shape == (32, 32)
    assert (matrix != 0).all()
    x = torch.randn(5, 32, dtype=torch.float64)
    assert torch.autograd.gradcheck(multigrid, (x[:2].requires_grad_(),))


@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(8, 4, 2), (6, 9, 3), (5, 7, 1)])
def test_a_grouped_linear_layer_is_a_block_diagonal_matrix(inputs, outputs, groups):
    layer = GroupedLinear(inputs, outputs, groups).double()
    dense = torch.block_diag(*layer.weight.transpose(1, 2))
    x = torch.randn(4, 3, inputs, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ dense.t())


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (64, 32), (48, 96)])
def test_mgic_linear_is_the_sum_of_its_levels_and_couples_everything(inputs, outputs):
    layer = MGICLinear(inputs, outputs, group_size=4, coarsest=8).double()
    dense = torch.zeros(outputs, inputs, dtype=torch.float64)
    down, up = torch.eye(inputs, dtype=torch.float64), torch.eye(outputs, dtype=torch.float64)
    for j, relax in enumerate(layer.cycle.relax):
        dense += up @ torch.block_diag(*relax.weight.transpose(1, 2)) @ down
        if j < len(layer.cycle.restrict):
            R, P = layer.cycle.restrict[j], layer.cycle.prolong[j]
            down = torch.block_diag(*R.weight.unflatten(0, (R.groups, -1))) @ down
            up = up @ torch.block_diag(*P.weight.unflatten(0, (P.groups, -1)))
    assert (dense != 0).all()
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 5, inputs, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ dense.t() + layer.bias)
    assert count_trainable(layer) < inputs * outputs or inputs == 64 > outputs


@pytest.mark.parametrize(("before", "after", "stride"), [(16, 32, 2), (24, 40, 1), (40, 24, 2), (16, 16, 1)])
def test_the_additive_channel_change_is_the_sum_of_its_levels(before, after, stride):
    """2020, Sec. 4.2: each level steps from the grids of the input to those of the output."""

    def step(inputs, outputs, groups):
        return nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False)

    change = AdditiveChannelChange(step, before, after, 4, 8, Scheme(norm=nn.Identity)).double()
    x = torch.randn(2, before, 6, 5, dtype=torch.float64)
    expected, down = 0, x
    ups = []
    for j, relax in enumerate(change.relax):
        y = relax(down)
        for P in reversed(ups):
            y = P(y)
        expected = expected + y
        if j < len(change.restrict):
            down = change.restrict[j](down)
            ups.append(change.prolong[j])
    assert len(change.levels) > 1
    torch.testing.assert_close(change(x), expected)


@pytest.mark.parametrize(
    ("before", "after", "groups"), [(16, 32, 16), (64, 32, 32), (16, 24, 8), (24, 40, 8), (80, 112, 16), (3, 16, 1)]
)
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_channel_change_is_grouped_as_finely_as_both_widths_allow(before, after, groups, kernel_size, stride):
    change = ChannelChange(before, after, stride, kernel_size)
    assert change.conv.groups == groups
    assert count_trainable(change) == before * after // groups * kernel_size**2 + 2 * after
    x = torch.randn(2, before, 7, 6)
    dense = nn.functional.conv2d(
        x[:, : before // groups], change.conv.weight[: after // groups], None, stride, kernel_size // 2
    )
    torch.testing.assert_close(change.conv(x)[:, : after // groups], dense)


def test_a_channel_change_refuses_groups_that_do_not_divide():
    with pytest.raises(ChannelConfigError, match="groups=16 must divide both in_channels=16 and out_channels=24"):
        ChannelChange(16, 24, groups=16)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("cycle", [mgic.multiplicative, additive])
def test_checkpointing_a_level_changes_nothing_but_memory(block, cycle):
    """Outputs, gradients and the batch norms' statistics are equal, to the last bit."""
    plain = MGICBlock(block, 16, 4, 4, hidden_of(block, 16), scheme=Scheme(cycle=cycle))
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x = torch.randn(2, 16, 4, 4)
    results = []
    for module in (plain, saving):
        inputs = x.clone().requires_grad_()
        for _ in range(2):
            module(inputs).square().sum().backward()
        results.append((inputs.grad, *(p.grad for p in module.parameters()), *module.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_frozen_transfers_keep_their_start_and_everything_else_learns():
    scheme = Scheme(transfer=mgic.frozen(mgic.averaging_pair))
    block = MGICBlock(BasicBlock, 32, 4, 8, scheme=scheme)
    learned = {name.split(".")[0] for name, p in block.named_parameters() if p.requires_grad}
    assert learned == {"relax", "norm"}
    assert count_trainable(MGICBlock(BasicBlock, 32, 4, 8)) - count_trainable(block) == 32 * 4 + 16 * 4


def test_a_cap_on_levels_cuts_the_hierarchy():
    for cap in range(4):
        block = MGICBlock(BasicBlock, 64, 4, 8, scheme=Scheme(plan=partial(plan_levels, maximum=cap)))
        assert [level.channels for level in block.levels] == [64 >> j for j in range(cap + 1)]


def test_the_sparse_pair_works_in_a_block():
    """The blocks of 2020: one level more, random transfers with s_g non-zeros a row."""
    scheme = Scheme(plan=partial(plan_levels, minimum=1), transfer=sparse_random_pair)
    block = MGICBlock(PreActBasicBlock, 16, 4, 8, scheme=scheme)
    assert block.restrict[0].values.numel() == 16 * 4
    block(torch.randn(2, 16, 4, 4)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_the_block_explains_itself():
    text = repr(MGICBlock(BasicBlock, 64, 8, 16))
    assert "channels 64 > 32 > 16; groups 8, 4, dense" in text


@pytest.mark.parametrize("channels", [0, -8, 2.5])
def test_widths_that_are_none_are_refused(channels):
    with pytest.raises(ChannelConfigError, match=f"channels must be a positive integer, got {channels}"):
        MGICBlock(BasicBlock, channels, 8, 16)


def test_a_bottleneck_without_an_inner_width_needs_four_channels():
    with pytest.raises(ChannelConfigError, match="give hidden= for channels=10"):
        Bottleneck(10)


CONVOLUTIONS = [
    (64, 128, 3, 8, 16, {"stride": 2, "padding": 1}),
    (256, 64, 1, 32, 16, {"bias": False}),
    (96, 40, 3, 64, 8, {"padding": 2, "dilation": 2}),
    (48, 48, (1, 3), 6, 4, {"padding": (0, 1), "padding_mode": "reflect"}),
]


@pytest.mark.parametrize(("inputs", "outputs", "kernel", "group_size", "coarsest", "conv"), CONVOLUTIONS)
def test_a_multigrid_convolution_is_the_dense_one_of_its_assembled_kernel(
    inputs, outputs, kernel, group_size, coarsest, conv
):
    layer = MGICConv(inputs, outputs, kernel, group_size, coarsest, **conv).double()
    dense = nn.Conv2d(inputs, outputs, kernel, **conv).double()
    x = torch.randn(2, inputs, 11, 9, dtype=torch.double)
    weight = layer.dense_weight()
    assert weight.shape == dense.weight.shape
    assert (weight.abs().amax((2, 3)) > 1e-12).all(), "every output channel sees every input channel"
    with torch.no_grad():
        dense.weight.copy_(weight)
        if dense.bias is not None:
            dense.bias.copy_(layer.bias)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-10, atol=1e-10)
    assert (layer.stride, layer.kernel_size) == (dense.stride, dense.kernel_size)


@pytest.mark.parametrize(("channels", "params"), [(32, 4_864), (64, 9_984), (128, 20_224)])
def test_params_of_a_multigrid_convolution_grow_linearly(channels, params):
    layer = MGICConv(channels, channels, 3, group_size=8, coarsest=16, padding=1, bias=False)
    levels = layer.levels
    fine = sum(9 * lv.channels**2 // lv.groups for lv in levels) + sum(lv.channels * 8 for lv in levels[:-1])
    assert sum(p.numel() for p in layer.parameters()) == fine == params


@torch.no_grad()
def test_a_multigrid_convolution_starts_with_features_as_large_as_a_dense_one():
    """Without norms between the levels nothing else would bring the coarse contributions to size."""
    torch.manual_seed(0)
    x = torch.randn(4, 128, 12, 12)
    layer = MGICConv(128, 128, 3, group_size=16, coarsest=16, bias=False, padding=1)
    y, dense = layer(x), nn.Conv2d(128, 128, 3, bias=False, padding=1)(x)
    assert y.std() / dense.std() == pytest.approx(1, rel=0.1)
    coarse = (y - layer.relax[0](x)).var()
    assert coarse / y.var() == pytest.approx(3 / 4, rel=0.15), "three of four levels are coarse"


def test_a_multigrid_convolution_has_no_groups_of_its_own():
    with pytest.raises(ChannelConfigError, match="groups: the groups of an MGICConv follow"):
        MGICConv(32, 32, 3, 8, 8, groups=2)


def test_gradients_of_a_multigrid_convolution():
    layer = MGICConv(8, 12, 3, 2, 2, stride=2, padding=1).double()
    assert torch.autograd.gradcheck(layer, torch.randn(2, 8, 5, 4, dtype=torch.double, requires_grad=True))
