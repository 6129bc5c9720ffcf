"""Networks on point clouds: DGCNN, diffGCN and its multigrid form (Eliasof et al. 2023, Sec. 4.5, Tables 10 and 11).

Features of points are ``(N, C, P)``, of edges to the nearest neighbours ``(N, C, P, K)``. The graph is plain tensors:
``neighbours (N, P, K)`` lists for each point the indices of its ``K`` nearest ones, itself first.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks import Layer, relu, zero_scale
from ..cycle import Correction, MGICBlock, Scheme, tau_correction
from ..errors import ChannelConfigError, UserError
from ..transfer import averaging_pair
from .inputs import check_samples


def nearest(x: Tensor, k: int, chunk: int = 1024) -> Tensor:
    """Return the ``k`` nearest points of each point, itself among them and first, the others by distance.

    Distances are Euclidean and summed coordinate by coordinate, so that neither the chunks nor the batch change a bit of
    them. A point with twins is still its own first neighbour; among other equal distances the choice is PyTorch's.

    Args:
        x: Points, or any features of them.
        k: Neighbours; 1 is each point alone, a graph without edges.
        chunk: Points whose distances to all others are held at once: ``N * chunk * P`` numbers.

    Shape:
        ``(N, C, P) -> (N, P, k)``

    Raises:
        UserError: If there are fewer than ``k`` points.

    Examples:
        >>> nearest(torch.tensor([[[0.0, 1.0, 3.0, 7.0]]]), k=2)
        tensor([[[0, 1],
                 [1, 0],
                 [2, 1],
                 [3, 2]]])
    """
    points = x.shape[-1]
    if not 1 <= k <= points:
        raise UserError(f"k={k} nearest neighbours need at least {max(k, 1)} points (and k at least 1), got {points}")
    rows = x.detach().transpose(1, 2)
    rows = rows.float() if rows.dtype.itemsize < 4 else rows  # in half precision CPUs have no distances
    found = []
    for start in range(0, points, chunk):
        some = rows[:, start : start + chunk]
        distances = torch.cdist(some, rows, compute_mode="donot_use_mm_for_euclid_dist")
        distances.diagonal(start, 1, 2).fill_(-1)  # before any twin
        found.append(distances.topk(k, largest=False).indices)
    return torch.cat(found, 1)


def gather(x: Tensor, neighbours: Tensor) -> Tensor:
    """Return the features of each point's neighbours; in memory, the channels of an edge lie side by side.

    Shape:
        ``(N, C, P), (N, P, K) -> (N, C, P, K)``
    """
    batch, points, k = neighbours.shape
    first = torch.arange(batch, device=x.device).view(-1, 1, 1) * points
    channels = x.shape[1]
    rows = x.transpose(1, 2).reshape(batch * points, channels)
    return rows.index_select(0, (first + neighbours).flatten()).view(batch, points, k, channels).permute(0, 3, 1, 2)


TERMS = 7
"""The identity, three first derivatives, three second ones."""


def differential_operators(points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Discretise mass, gradient and Laplacian on the graph of ``k`` nearest neighbours (Eliasof and Treister 2020, Sec. 3).

    With the unit vector ``e`` of an edge from point ``i`` to its neighbour ``j``, the edge's gradient of features ``f`` is
    ``(f_j - f_i) e``. It is not divided by the length once more, so close points do no harm, and a norm follows anyway. The
    terms of a point are ``f_i``, the mean gradient of its edges, ``mean (f_j - f_i) e_d``, and what the transpose of the
    gradient makes of it, ``mean (f_j - f_i) e_d^2``, for ``d = x, y, z``: the last three add up to the Laplacian of the
    graph, ``mean (f_j - f_i)``. Twins have no direction, so their edges add nothing.

    Moving the points changes nothing. Turning them turns the gradient and leaves the sum of the second derivatives alone.

    Args:
        points: Positions.
        k: Neighbours, the point itself among them; with 1 all terms but the first are 0.

    Shape:
        ``(N, 3, P) -> (N, P, k), (N, P, 7, k)``: the graph, and for each point and term the coefficients of its neighbours.

    Raises:
        UserError: If there are fewer than ``k`` points.
    """
    neighbours = nearest(points, k)
    with torch.no_grad():
        edges = gather(points, neighbours) - points.unsqueeze(-1)
        unit = F.normalize(edges, dim=1)
        weights = torch.cat([unit, unit**2], dim=1) / max(k - 1, 1)
        weights[..., 0] = -weights[..., 1:].sum(-1)  # of f_i itself
        mass = torch.zeros_like(weights[:, :1])
        mass[..., 0] = 1
        return neighbours, torch.cat([mass, weights], dim=1).transpose(1, 2).contiguous()


class DiffConv(nn.Module):
    """Graph convolution of diffGCN: a 1x1 convolution of differential operators, ``relu(N sum_t Theta_t D_t f)``.

    ``D_t`` are those of `differential_operators`: the weights depend on what the terms mean, not on the graph (Eliasof and
    Treister 2020, Sec. 3). The terms act channel by channel, which leaves groups of channels apart.

    Args:
        in_channels: Width before.
        out_channels: Width after.
        groups: Independent groups of channels.
        norm: Makes the norm of a width.
        act: Makes the activation.

    Shape:
        ``(N, in_channels, P), (N, P, K), (N, P, 7, K) -> (N, out_channels, P)``

    Examples:
        >>> graph = differential_operators(torch.randn(2, 3, 50), k=10)
        >>> DiffConv(16, 32, groups=4)(torch.randn(2, 16, 50), *graph).shape
        torch.Size([2, 32, 50])
    """

    def __init__(
        self, in_channels: int, out_channels: int, groups: int = 1, norm: Layer = nn.BatchNorm1d, act: Layer = relu
    ) -> None:
        super().__init__()
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ChannelConfigError(f"groups={groups} must divide both in_channels={in_channels} and {out_channels=}")
        self.conv = nn.Conv1d(TERMS * in_channels, out_channels, 1, groups=groups, bias=False)
        self.norm = norm(out_channels)
        self.act = act()

    def forward(self, x: Tensor, neighbours: Tensor, operators: Tensor) -> Tensor:
        """Apply the layer on a graph."""
        terms = operators @ gather(x, neighbours).permute(0, 2, 3, 1)  # (N, P, 7, C)
        terms = terms.permute(0, 3, 2, 1).flatten(1, 2)  # all terms of a channel side by side: groups stay apart
        return self.act(self.norm(self.conv(terms)))  # type: ignore[no-any-return]


class EdgeConv(nn.Module):
    """Graph convolution of DGCNN: ``relu(N max_j h(x_i, x_j - x_i))`` over the neighbours of each point.

    They are those of the graph it is called with or, with ``k``, the nearest *in feature space*. ``h`` is two 1x1
    convolutions with a norm and an activation between them (Wang et al. 2019; its inner width is not printed by Eliasof et
    al.: 128 gives the parameters of their Table 11). The first convolution, ``(W1 - W2) x_i + W2 x_j``, is applied to
    points, not to their ``K`` times as many edges.

    Args:
        in_channels: Width before.
        out_channels: Width after.
        k: Neighbours in feature space, the point itself among them; None: it is called with a graph.
        hidden: Width between the convolutions.
        norm: Makes the norm of a width, for edges (2d) and then for points (1d).
        act: Makes the activation.

    Shape:
        ``(N, in_channels, P), (N, P, K) -> (N, out_channels, P)``
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        k: int | None = None,
        hidden: int = 128,
        norm: tuple[Layer, Layer] = (nn.BatchNorm2d, nn.BatchNorm1d),
        act: Layer = relu,
    ) -> None:
        super().__init__()
        self.k = k
        self.conv1 = nn.Conv1d(2 * in_channels, hidden, 1, bias=False)
        self.norm1 = norm[0](hidden)
        self.act1 = act()
        self.conv2 = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.norm2 = norm[1](out_channels)
        self.act2 = act()

    def forward(self, x: Tensor, neighbours: Tensor | None = None) -> Tensor:
        """Apply the layer."""
        if neighbours is None and self.k is not None:
            neighbours = nearest(x, self.k)
        elif neighbours is None or self.k is not None:
            raise UserError(f"EdgeConv with k={self.k} is called {'with a' if self.k is None else 'without'} graph")
        own, difference = self.conv1.weight.chunk(2, dim=1)
        at_point, at_neighbour = (F.linear(x.mT, w.squeeze(-1)).mT for w in (own - difference, difference))
        edges = at_point.unsqueeze(-1) + gather(at_neighbour, neighbours)
        y = self.conv2(self.act1(self.norm1(edges))).amax(-1)
        return self.act2(self.norm2(y))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Neighbours in feature space."""
        return "" if self.k is None else f"k={self.k}"


class MLP(nn.Sequential):
    """A 1x1 convolution, norm and activation of the features of points (the text under Table 10).

    Args:
        in_channels: Width before.
        out_channels: Width after.

    Shape:
        ``(N, in_channels, P) -> (N, out_channels, P)``
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, 1, bias=False)
        self.norm = nn.BatchNorm1d(out_channels)
        self.act = relu()


class GraphStage(nn.Module):
    """Graph convolutions that share what they are called with, then an `MLP`.

    Args:
        convs: Called ``(x, *graph)``, one after the other.
        channels: Width.

    Shape:
        ``(N, channels, P)``, unchanged.
    """

    def __init__(self, convs: Sequence[nn.Module], channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.mlp = MLP(channels, channels)

    def forward(self, x: Tensor, *graph: Tensor) -> Tensor:
        """Apply the stage."""
        for conv in self.convs:
            x = conv(x, *graph)
        return self.mlp(x)  # type: ignore[no-any-return]


def no_graph(points: Tensor) -> tuple[Tensor, ...]:
    """Leave the graph to the layers: each `EdgeConv` looks for neighbours among its own features."""
    return ()


def graph_of_positions(points: Tensor, k: int) -> tuple[Tensor]:
    """The graph of `EdgeConv`: the ``k`` nearest points of each point, found once for all layers."""
    return (nearest(points, k),)


class PointClassifier(nn.Module):
    """The network of Table 10: 1 + 2 graph convolutions, MLP, 3 more, MLP, the maximum over all points, 3 MLPs, FC.

    The order of the points plays no part (but for ties between distances). Neither turning nor moving the cloud leaves the
    output alone: the coordinates are features, as in the paper, and the network learns what training shows it.

    Args:
        conv: ``conv(in_channels, out_channels)`` makes the first graph convolution.
        block: ``block(channels)`` makes each of the others.
        graph: Makes of the positions what the convolutions take beside features, once for all of them.
        channels: Width throughout.
        num_classes: Outputs; 0 for features.
        in_chans: Channels of a point, its position first; at least 3.

    Shape:
        ``(N, in_chans, P) -> (N, num_classes)``

    Raises:
        UserError: If ``in_chans`` has no room for a position.
    """

    def __init__(
        self,
        conv: Callable[[int, int], nn.Module],
        block: Callable[[int], nn.Module],
        graph: Callable[[Tensor], tuple[Tensor, ...]],
        channels: int = 64,
        num_classes: int = 10,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        if in_chans < 3:
            raise UserError(f"in_chans={in_chans}: a point has three coordinates, then any other features")
        self.graph = graph
        self.num_features = channels
        self.pretrained_cfg = {
            "input_size": (in_chans, 1024)
        }  # the clouds of Table 10; any other number of points will do
        self.stem = conv(in_chans, channels)
        self.stages = nn.ModuleList(GraphStage([block(channels) for _ in range(count)], channels) for count in (2, 3))
        head: dict[str, nn.Module] = {
            "pool": nn.AdaptiveMaxPool1d(1),
            "mlp": nn.Sequential(*(MLP(channels, channels) for _ in range(3))),
            "flatten": nn.Flatten(),
        }
        self.head = nn.Sequential(OrderedDict(head))
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """``(N, in_chans, P) -> (N, num_features, P)``."""
        graph = self.graph(x[:, :3])
        x = self.stem(x, *graph)
        for stage in self.stages:
            x = stage(x, *graph)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """``(N, num_features, P) -> (N, num_classes)``; the features of the whole cloud where ``pre_logits``."""
        return self.head[:-1](x) if pre_logits else self.head(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_chans, P) -> (N, num_classes)``."""
        check_samples(self, x, 3, "points (N, C, P)")
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head.fc  # type: ignore[return-value]

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last linear layer by a new one for ``num_classes``; 0 removes it."""
        self.num_classes = num_classes
        self.head.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each multigrid level's relaxation for the backward pass."""
        for module in self.modules():
            if isinstance(module, MGICBlock):
                module.set_grad_checkpointing(enable)


POINTS = Scheme(transfer=partial(averaging_pair, dim=1), norm=zero_scale(nn.BatchNorm1d))
"""The text of Sec. 3.3 on features of points; corrections start at zero.

The graph convolutions have no identity mapping, and in the network of Table 10 fifteen relaxations follow each other: with
corrections of full scale from the start it learns slowly (``results/solids``).
"""
CHANNELS = 64
"""Width of Table 10."""


def dgcnn(
    k: int = 10, width: float = 1.0, dynamic: bool = False, num_classes: int = 10, in_chans: int = 3
) -> PointClassifier:
    """DGCNN with the narrow classifier of Sec. 4.5 (Tables 10 and 11).

    The paper prints k-NN with k = 10 for all its networks and takes their architecture from Wang et al. 2019. Whether the
    graph is found once, among positions, or anew in each layer, among features as in that work, it does not say. Here it is
    found once, so that the networks of Table 11 differ in the convolution alone; ``dynamic`` is the other reading.

    Args:
        k: Neighbours, the point itself among them; 1 cuts the graph.
        width: Multiplies the 64 channels.
        dynamic: Look for neighbours anew in each layer, among its features.
        num_classes: Outputs; 0 for features.
        in_chans: Channels of a point, its position first.
    """
    channels = _channels(width)
    conv = partial(EdgeConv, k=k if dynamic else None, hidden=2 * channels)
    graph = no_graph if dynamic else partial(graph_of_positions, k=k)
    return PointClassifier(conv, lambda channels: conv(channels, channels), graph, channels, num_classes, in_chans)


def diffgcn(k: int = 10, width: float = 1.0, num_classes: int = 10, in_chans: int = 3) -> PointClassifier:
    """Build diffGCN in the network of Table 10 (Table 11); arguments as `dgcnn` but for ``dynamic``."""
    graph = partial(differential_operators, k=k)
    return PointClassifier(DiffConv, _diff_block, graph, _channels(width), num_classes, in_chans)


def mgic_diffgcn(
    group_size: int = 16,
    coarsest: int = 16,
    k: int = 10,
    width: float = 1.0,
    correction: Correction = tau_correction,
    scheme: Scheme = POINTS,
    num_classes: int = 10,
    in_chans: int = 3,
) -> PointClassifier:
    """MGIC-diffGCN: each graph convolution after the first as a multigrid block (Tables 10 and 11).

    Neither ``s_g`` nor ``s_c`` is printed; the defaults are equal, the paper's usual choice.

    Args:
        group_size: Channels per group (``s_g``).
        coarsest: Width at which to stop (``s_c``).
        k: Neighbours, the point itself among them; 1 cuts the graph.
        width: Multiplies the 64 channels.
        correction: What is prolonged.
        scheme: Plan, transfers, norm and cycle.
        num_classes: Outputs; 0 for features.
        in_chans: Channels of a point, its position first.
    """

    def block(channels: int) -> nn.Module:
        return MGICBlock(_diff_block, channels, group_size, coarsest, correction=correction, scheme=scheme)

    graph = partial(differential_operators, k=k)
    return PointClassifier(DiffConv, block, graph, _channels(width), num_classes, in_chans)


def _channels(width: float) -> int:
    """The width of Table 10, multiplied."""
    channels = round(CHANNELS * width)
    if channels < 1:
        raise UserError(f"width={width} leaves none of the {CHANNELS} channels")
    return channels


def _diff_block(channels: int, groups: int = 1) -> DiffConv:
    return DiffConv(channels, channels, groups)


NETWORKS = (dgcnn, diffgcn, mgic_diffgcn)
