import copy

import pytest
import torch
from torch import nn

from mgic import ChannelConfigError, Prolongation, Restriction, sparse_random_pair

PAIRS = [(16, 4), (64, 8), (40, 10), (6, 2), (960, 64)]


@pytest.mark.parametrize(("channels", "group_size"), PAIRS)
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_transfers_preserve_constants_and_positivity(channels, group_size, dim):
    """Sec. 3.3: positive weights, rows summing to one."""
    for transfer in (Restriction(channels, group_size, dim), Prolongation(channels, group_size, dim)):
        assert (transfer.weight > 0).all()
        ones = torch.ones(2, transfer.in_channels, *[3] * dim)
        expected = torch.ones(2, transfer.out_channels, *[3] * dim)
        torch.testing.assert_close(transfer(ones), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("channels", "group_size"), PAIRS)
def test_a_transfer_is_a_grouped_1x1_convolution_of_s_g_c_over_2_weights(channels, group_size):
    R, P = Restriction(channels, group_size), Prolongation(channels, group_size)
    assert R.weight.numel() == P.weight.numel() == channels * group_size // 2
    twin = nn.Conv2d(channels, channels // 2, 1, groups=channels // group_size, bias=False)
    twin.weight.data = R.weight.data
    x = torch.randn(2, channels, 5, 3)
    torch.testing.assert_close(R(x), twin(x), rtol=0, atol=0)


@pytest.mark.parametrize("dim", [0, 1, 3])
def test_all_dimensions_agree_with_the_plane(dim):
    R, plane = Restriction(16, 4, dim), Restriction(16, 4)
    plane.weight.data = R.weight.data.view_as(plane.weight)
    x = torch.randn(3, 16, *[4] * dim)
    expected = plane(x.reshape(3, 16, -1, 1)).view(3, 8, *x.shape[2:])
    torch.testing.assert_close(R(x), expected)


def test_an_initialisation_loop_over_convolutions_leaves_transfers_alone():
    """The authors' program lost the row sums to such a loop."""
    R = Restriction(32, 8)
    before = R.weight.clone()
    for module in nn.Sequential(nn.Conv2d(3, 32, 3), R).modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    assert torch.equal(R.weight, before)


@pytest.mark.parametrize(("channels", "group_size"), [(16, 3), (15, 4), (16, 1), (0, 2), (12, 8)])
def test_transfers_that_cannot_halve_are_refused(channels, group_size):
    for make in (Restriction, Prolongation):
        with pytest.raises(
            ChannelConfigError, match=f"channels={channels} must be a multiple of group_size={group_size}"
        ):
            make(channels, group_size)


def test_dimensions_beyond_three_are_refused():
    with pytest.raises(ChannelConfigError, match="dim must be 0, 1, 2 or 3 spatial dimensions, got 4"):
        Restriction(16, 4, dim=4)


@pytest.mark.parametrize(("channels", "nonzeros"), [(16, 4), (32, 8), (64, 16), (16, 16), (256, 8)])
def test_the_random_pair_is_sparse_in_its_parameters_with_transposed_patterns(channels, nonzeros):
    """2020, Sec. 4.1: t non-zeros per row of P at random places, and the pattern of P^T in R."""
    R, P = sparse_random_pair(channels, nonzeros)
    t = min(nonzeros, channels // 2)
    assert R.values.numel() == P.values.numel() == channels * t
    assert [p.numel() for p in (*R.parameters(), *P.parameters())] == [channels * t, channels * t]
    assert torch.equal((P.matrix() != 0).sum(1), torch.full((channels,), t))
    assert torch.equal(R.matrix() != 0, (P.matrix() != 0).t())
    for matrix in (R.matrix(), P.matrix()):
        assert (matrix >= 0).all()
        torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix)))
    x = torch.randn(2, channels, 3, 4)
    torch.testing.assert_close(R(x), torch.einsum("rc,nchw->nrhw", R.matrix(), x))


def test_the_random_pair_depends_on_its_generator_alone():
    pairs = [sparse_random_pair(64, 8, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    patterns = [P.matrix() != 0 for _, P in pairs]
    assert torch.equal(patterns[0], patterns[1])
    assert not torch.equal(patterns[0], patterns[2])


def test_the_random_pattern_is_saved_and_restored():
    (R, P), (R2, P2) = sparse_random_pair(32, 4), sparse_random_pair(32, 4)
    assert not torch.equal(P.matrix(), P2.matrix())
    R2.load_state_dict(R.state_dict())
    P2.load_state_dict(P.state_dict())
    assert torch.equal(R.matrix(), R2.matrix())
    assert torch.equal(P.matrix(), copy.deepcopy(P2).matrix())


def test_random_pairs_that_cannot_be_built_are_refused():
    with pytest.raises(ChannelConfigError, match="channels=15 must be even and nonzeros=4 positive"):
        sparse_random_pair(15, 4)
    with pytest.raises(ChannelConfigError, match="nonzeros=0"):
        sparse_random_pair(16, 0)


def test_gradients_of_the_random_pair_are_those_of_its_matrix():
    R, _ = sparse_random_pair(8, 2)
    R = R.double()
    x = torch.randn(1, 8, 2, 2, dtype=torch.float64, requires_grad=True)

    def apply(x, values):
        return torch.func.functional_call(R, {"values": values}, (x,))

    assert torch.autograd.gradcheck(apply, (x, R.values))
