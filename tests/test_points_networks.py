"""Networks on point clouds: graphs and operators against naive ones, what is invariant and what is not, exact counts."""

import json
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mgic
from mgic import MGICBlock, Scheme, UserError, averaging_pair
from mgic.models.points import POINTS, DiffConv, EdgeConv, differential_operators, gather, nearest

NETWORKS = ["dgcnn", "diffgcn", "mgic_diffgcn"]
DYNAMIC = "dgcnn, dynamic"


def cloud(batch=2, points=40, dtype=torch.float64):
    return torch.randn(batch, 3, points, dtype=dtype)


def rotation():
    q, r = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    q = q * r.diagonal().sign()
    return q * torch.linalg.det(q)


def settled(model):
    """In eval mode, with signals that do not fade and norms that do something."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.double().eval()


def naive_neighbours(points, k):
    """Of one cloud ``(C, P)``: sorted by distance, the point itself first."""
    found = []
    for i in range(points.shape[1]):
        distances = [float((points[:, j] - points[:, i]).norm()) if j != i else -1.0 for j in range(points.shape[1])]
        found.append(sorted(range(points.shape[1]), key=distances.__getitem__)[:k])
    return torch.tensor(found)


@pytest.mark.parametrize("channels", [3, 17])
@pytest.mark.parametrize("k", [1, 4, 30])
def test_nearest_neighbours_equal_a_naive_search(channels, k):
    x = torch.randn(2, channels, 30, dtype=torch.float64)
    expected = torch.stack([naive_neighbours(one, k) for one in x])
    assert torch.equal(nearest(x, k), expected)


@pytest.mark.parametrize("chunk", [1, 7, 40, 41])
def test_chunks_and_the_rest_of_the_batch_change_no_neighbour(chunk):
    """Distances are summed the same way whatever is computed beside them, so even rounding errors agree."""
    x = torch.randn(3, 64, 41)
    whole = nearest(x, 10)
    assert torch.equal(nearest(x, 10, chunk=chunk), whole)
    assert torch.equal(nearest(x[1:2], 10), whole[1:2])


def test_a_point_is_its_own_first_neighbour_even_among_twins():
    x = torch.randn(2, 3, 5).repeat(1, 1, 4)  # each point four times
    found = nearest(x, 4)
    assert torch.equal(found[..., 0], torch.arange(20).expand(2, 20))
    assert torch.equal(found.sort(-1).values % 5, (torch.arange(20) % 5)[:, None].expand(2, 20, 4))
    weights = differential_operators(x, 4)[1]
    assert torch.equal(weights[:, :, 1:], torch.zeros_like(weights[:, :, 1:]))  # twins have no direction: no NaN


@pytest.mark.parametrize(("k", "points"), [(10, 9), (0, 9)])
def test_too_few_points_for_the_neighbours_are_refused(k, points):
    with pytest.raises(UserError, match=rf"k={k} nearest neighbours need at least .* points .* got {points}"):
        nearest(torch.randn(1, 3, points), k)
    with pytest.raises(UserError, match=r"at least 10 points .* got 9"):
        mgic.create_model("mgic_diffgcn")(torch.randn(2, 3, 9))


def test_differential_operators_equal_loops_over_edges():
    points, f = cloud(1, 12), torch.randn(1, 5, 12, dtype=torch.float64)
    neighbours, operators = differential_operators(points, 4)
    terms = operators @ gather(f, neighbours).permute(0, 2, 3, 1)
    for i in range(12):
        others = naive_neighbours(points[0], 4)[i, 1:]
        gradient, second = torch.zeros(3, 5, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.float64)
        for j in others:
            e = points[0, :, j] - points[0, :, i]
            e = e / e.norm()
            change = f[0, :, j] - f[0, :, i]
            gradient += torch.outer(e, change) / 3
            second += torch.outer(e * e, change) / 3
        torch.testing.assert_close(terms[0, i], torch.cat([f[0, :, i][None], gradient, second]))
        torch.testing.assert_close(terms[0, i, 4:].sum(0), f[0][:, others].mean(1) - f[0, :, i])  # the Laplacian


def test_moving_points_keeps_all_operators_and_turning_them_turns_the_gradient():
    """Mass and Laplacian are invariant under rotations, the gradient is a vector, single second derivatives are neither."""
    points, f, turn = cloud(), torch.randn(2, 5, 40, dtype=torch.float64), rotation()

    def terms(points):
        neighbours, operators = differential_operators(points, 10)
        return operators @ gather(f, neighbours).permute(0, 2, 3, 1)

    before = terms(points)
    torch.testing.assert_close(terms(points + torch.randn(2, 3, 1, dtype=torch.float64)), before)
    after = terms(turn @ points)
    torch.testing.assert_close(after[:, :, 0], before[:, :, 0])
    torch.testing.assert_close(after[:, :, 1:4], turn @ before[:, :, 1:4])
    torch.testing.assert_close(after[:, :, 4:].sum(2), before[:, :, 4:].sum(2))
    assert (after[:, :, 4:] - before[:, :, 4:]).abs().max() > 0.1


def test_constants_have_neither_gradient_nor_laplacian():
    neighbours, operators = differential_operators(cloud(), 10)
    terms = operators @ gather(torch.ones(2, 4, 40, dtype=torch.float64), neighbours).permute(0, 2, 3, 1)
    expected = torch.zeros_like(terms)
    expected[:, :, 0] = 1
    torch.testing.assert_close(terms, expected)


def test_diffconv_in_groups_equals_convolutions_of_each_group_alone():
    graph = differential_operators(cloud(), 6)
    conv = settled(DiffConv(8, 12, groups=4, act=nn.Identity))
    x = torch.randn(2, 8, 40, dtype=torch.float64)
    parts = []
    for group in range(4):
        alone = DiffConv(2, 3, norm=nn.Identity, act=nn.Identity).double()
        alone.conv.weight.data = conv.conv.weight.data[3 * group : 3 * group + 3]
        parts.append(alone(x[:, 2 * group : 2 * group + 2], *graph))
    torch.testing.assert_close(conv(x, *graph), conv.norm(torch.cat(parts, 1)))
    with pytest.raises(mgic.ChannelConfigError, match="groups=3 must divide both in_channels=8"):
        DiffConv(8, 12, groups=3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dynamic", [False, True])
def test_edgeconv_equals_its_definition_on_edges(training, dynamic):
    """The first convolution, split and moved to the points, is the one of (x_i, x_j - x_i): outputs and gradients."""
    conv = settled(EdgeConv(6, 9, k=5 if dynamic else None, hidden=14)).train(training)
    x = torch.randn(2, 6, 31, dtype=torch.float64, requires_grad=True)
    graph = () if dynamic else (nearest(torch.randn(2, 3, 31), 5),)
    neighbours = nearest(x, 5) if dynamic else graph[0]

    def naive(x: Tensor) -> Tensor:
        centre = x.unsqueeze(-1).expand(-1, -1, -1, 5)
        edges = torch.cat([centre, gather(x, neighbours) - centre], dim=1)
        y = conv.act1(conv.norm1(F.conv2d(edges, conv.conv1.weight.unsqueeze(-1))))
        return conv.act2(conv.norm2(conv.conv2(y).amax(-1)))

    weights = (x, *conv.parameters())
    probe = torch.randn(2, 9, 31, dtype=torch.float64)
    torch.testing.assert_close(conv(x, *graph), naive(x))
    ours = torch.autograd.grad((conv(x, *graph) * probe).sum(), weights)
    theirs = torch.autograd.grad((naive(x) * probe).sum(), weights)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(UserError, match="is called without graph" if dynamic else "k=None is called with a graph"):
        conv(x, *(() if graph else (neighbours,)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_dgcnn_has_one_graph_of_positions_or_one_of_its_features_in_each_layer(dynamic, monkeypatch):
    found = []
    monkeypatch.setattr("mgic.models.points.nearest", lambda x, k: found.append((x.shape[1], k)) or nearest(x, k))
    mgic.create_model("dgcnn", k=7, dynamic=dynamic)(torch.randn(2, 3, 20))
    assert found == ([(3, 7), *[(64, 7)] * 5] if dynamic else [(3, 7)])


@pytest.mark.parametrize("cycle", [mgic.multiplicative, mgic.additive])
def test_the_multigrid_block_hands_the_graph_to_every_level(cycle):
    """Equal to a block whose relaxations hold the graph themselves."""
    graph = differential_operators(cloud(), 6)
    scheme = Scheme(transfer=partial(averaging_pair, dim=1), norm=nn.BatchNorm1d, cycle=cycle)
    block = settled(MGICBlock(lambda c, g: DiffConv(c, c, g), 32, 4, 8, scheme=scheme))
    x = torch.randn(2, 32, 40, dtype=torch.float64)
    given = block(x, *graph)

    class Bound(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return self.conv(x, *graph)

    block.relax = nn.ModuleList(Bound(conv) for conv in block.relax)
    assert [level.channels for level in block.levels] == [32, 16, 8]
    torch.testing.assert_close(block(x), given, rtol=0, atol=0)


def test_r16_every_channel_reaches_every_channel_of_an_mgic_block_on_a_graph():
    graph = differential_operators(cloud(1, 15), 4)
    block = settled(MGICBlock(lambda c, g: DiffConv(c, c, g, act=nn.Softplus), 32, 4, 4, scheme=POINTS))
    x = torch.randn(1, 32, 15, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda x: block(x, *graph).sum((0, 2)))(x)
    assert bool((jacobian.abs().amax(-1) > 0).all())


def test_the_multigrid_block_on_edge_features_is_the_one_on_points_edge_by_edge():
    """``(N, C, P, K)`` with two spatial dimensions, ``(N, C, P K)`` with one: 1x1 convolutions do not look aside."""

    class Pointwise(nn.Module):
        def __init__(self, dim, channels, groups):
            super().__init__()
            self.conv = (nn.Conv1d, nn.Conv2d)[dim - 1](channels, channels, 1, groups=groups)

        def forward(self, x):
            return x + torch.tanh(self.conv(x))

    blocks = []
    for dim, norm in ((1, nn.BatchNorm1d), (2, nn.BatchNorm2d)):
        scheme = Scheme(transfer=partial(averaging_pair, dim=dim), norm=norm)
        blocks.append(settled(MGICBlock(partial(Pointwise, dim), 16, 4, 4, scheme=scheme)))
    state = blocks[0].state_dict()
    blocks[1].load_state_dict({k: v.reshape(blocks[1].state_dict()[k].shape) for k, v in state.items()})
    x = torch.randn(2, 16, 12, 5, dtype=torch.float64)
    torch.testing.assert_close(blocks[1](x), blocks[0](x.flatten(2)).unflatten(2, (12, 5)))


def network(name, **arguments):
    return (
        mgic.create_model("dgcnn", dynamic=True, **arguments)
        if name == DYNAMIC
        else mgic.create_model(name, **arguments)
    )


@pytest.mark.parametrize("name", [*NETWORKS, DYNAMIC])
def test_the_order_of_the_points_plays_no_part(name):
    """Features of points follow their points; the output stays. (Ties between distances are broken by place.)"""
    model = settled(network(name, k=6))
    x, order = cloud(), torch.randperm(40)
    torch.testing.assert_close(model.forward_features(x[:, :, order]), model.forward_features(x)[:, :, order])
    torch.testing.assert_close(model(x[:, :, order]), model(x))


@pytest.mark.parametrize("name", [*NETWORKS, DYNAMIC])
def test_a_cloud_is_judged_alone(name):
    model = settled(network(name, k=6))
    x = cloud(3)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


@pytest.mark.parametrize("name", [*NETWORKS, DYNAMIC])
def test_no_network_is_invariant_to_rotations_or_translations(name):
    """Coordinates are features, as in the paper: what turning changes must be learnt, and the docstring says so."""
    model = settled(network(name, k=6))
    x = cloud()
    for other in (rotation() @ x, x + 0.5):
        assert (model(other) - model(x)).abs().max() > 1e-3


@pytest.mark.parametrize("name", [*NETWORKS, DYNAMIC])
def test_one_neighbour_cuts_the_graph(name):
    """With k = 1 a point's features depend on that point alone; with k = 6 moving one point changes others."""
    x = cloud(1)
    moved = x.clone()
    moved[:, :, 0] += 0.3
    for k, others in ((1, False), (6, True)):
        model = settled(network(name, k=k))
        change = (model.forward_features(moved) - model.forward_features(x)).abs().amax(1)[0]
        assert change[0] > 1e-4
        assert bool((change[1:] > 1e-6).any()) is others


def wake(model):
    """Give the corrections from coarse grids, which start at zero, their full scale."""
    for block in model.modules():
        for norm in block.norm if isinstance(block, mgic.MGICBlock) else ():
            nn.init.ones_(norm.weight)
    return model


def test_corrections_from_coarse_grids_start_at_zero():
    model = mgic.create_model("mgic_diffgcn", width=0.5, group_size=8, coarsest=8).eval()
    x = torch.randn(2, 3, 20)
    without = model(x)
    for block in model.modules():
        if isinstance(block, mgic.MGICBlock):
            nn.init.ones_(block.prolong[0].weight)
    assert torch.equal(model(x), without)
    assert not torch.allclose(wake(model)(x), without)


@pytest.mark.parametrize("name", [*NETWORKS, DYNAMIC])
def test_every_parameter_has_a_gradient(name):
    model = network(name, num_classes=40, in_chans=5)
    wake(model)(torch.randn(4, 5, 20)).square().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in model.parameters())


@pytest.mark.parametrize("name", [*NETWORKS, DYNAMIC])
def test_state_is_restored_and_the_classifier_replaced(name):
    model, twin = settled(network(name)), network(name).double().eval()
    twin.load_state_dict(model.state_dict())
    x = cloud()
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    twin.reset_classifier(40)
    assert twin.double()(x).shape == (2, 40)
    assert twin.get_classifier().out_features == twin.num_classes == 40
    twin.reset_classifier(0)
    torch.testing.assert_close(twin(x), model.forward_head(model.forward_features(x), pre_logits=True))


def test_checkpointed_levels_give_the_same_gradients():
    model = mgic.create_model("mgic_diffgcn").double()
    x = cloud()
    plain = torch.autograd.grad(model(x).square().sum(), tuple(model.parameters()))
    model.set_grad_checkpointing()
    again = torch.autograd.grad(model(x).square().sum(), tuple(model.parameters()))
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)


COUNTS = {  # params, MACs at 3 x 1024: those of the operators among them, 7 k a channel and point
    "dgcnn": (155_914, 596_390_528),
    "diffgcn": (167_242, 179_731_072),
    "mgic_diffgcn": (95_722, 122_223_232),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_counts_are_pinned_and_follow_from_the_layers(name):
    counted = mgic.cost(mgic.create_model(name), (3, 1024))
    assert (counted.params, counted.macs) == COUNTS[name]
    outside = 5 * (64 * 64 + 2 * 64) + 650  # MLPs and FC
    if name == "dgcnn":
        first, other = (2 * c * 128 + 2 * 128 + 128 * 64 + 2 * 64 for c in (3, 64))
    else:
        first = 7 * 3 * 64 + 2 * 64
        other = 7 * 64 * 64 + 2 * 64
    if name == "mgic_diffgcn":
        relax = sum(7 * c * s + 2 * c for c, s in ((64, 16), (32, 16), (16, 16)))
        other = relax + sum(c * 16 + 2 * c for c in (64, 32))  # R and P, the norm after P
    assert counted.params == first + 5 * other + outside


def test_the_multigrid_network_has_the_fewest_parameters_and_grows_linearly_inside():
    assert min(COUNTS, key=COUNTS.get) == "mgic_diffgcn"

    def inside(name, width):
        stages = mgic.create_model(name, width=width).stages
        return sum(p.numel() for stage in stages for p in stage.convs.parameters())

    dense, multigrid = ([inside(name, width) for width in (4, 8, 16)] for name in ("diffgcn", "mgic_diffgcn"))
    assert all(3.9 < wide / narrow < 4 for narrow, wide in pairwise(dense))
    assert all(1.9 < wide / narrow < 2.1 for narrow, wide in pairwise(multigrid))


def test_the_command_counts_a_network_at_its_own_size_part_by_part(capsys):
    from mgic.cli import main

    assert main(["cost", "mgic_diffgcn", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["input_size"] == [3, 1024]
    assert (said["params"], said["macs"]) == COUNTS["mgic_diffgcn"]
    parts = [part for part in said["parts"] if part["level"] is None]
    assert [part["name"] for part in parts] == ["stem", "stages.0", "stages.1", "head"]
    assert sum(part["params"] for part in parts) == said["params"]
    assert sum(part["macs"] for part in parts) == said["macs"]
    assert [part["channels"] for part in said["parts"] if part["name"] == "stages.0"] == [None, 64, 32, 16]


def test_a_point_needs_three_coordinates():
    with pytest.raises(UserError, match="in_chans=2: a point has three coordinates"):
        mgic.create_model("dgcnn", in_chans=2)
    with pytest.raises(UserError, match=r"width=0\.001 leaves none of the 64 channels"):
        mgic.create_model("dgcnn", width=0.001)
    with pytest.raises(UserError, match="dgcnn has no argument 'neighbours'; it has k, width, dynamic"):
        mgic.create_model("dgcnn", neighbours=3)
