"""Moving between channel grids: restriction to a grid half as wide, and prolongation back."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ChannelConfigError

_POINTWISE: dict[int, Callable[..., Tensor]] = {
    0: lambda x, weight, groups: F.conv1d(x.unsqueeze(-1), weight.unsqueeze(-1), groups=groups).squeeze(-1),
    1: lambda x, weight, groups: F.conv1d(x, weight, groups=groups),
    2: lambda x, weight, groups: F.conv2d(x, weight, groups=groups),
    3: lambda x, weight, groups: F.conv3d(x, weight, groups=groups),
}


class GroupedPointwise(nn.Module):
    """A grouped 1x1 convolution without bias on features with ``dim`` spatial dimensions.

    Its weights start positive with rows summing to one, so that constants are preserved and features neither vanish nor
    grow under repeated transfers (Eliasof et al. 2023, Sec. 3.3); they are then trained freely. It is not an
    ``nn.Conv2d``, so that a loop which initialises every ``nn.Conv2d`` of a network leaves it alone: the authors'
    program lost its row sums to such a loop.

    Args:
        in_channels: Width of the input; a multiple of ``groups``.
        out_channels: Width of the output; a multiple of ``groups``.
        groups: Independent groups of channels.
        dim: Spatial dimensions, 0 (a plain feature vector) to 3.

    Shape:
        ``(N, in_channels, *spatial) -> (N, out_channels, *spatial)``

    Raises:
        ChannelConfigError: If ``groups`` does not divide both widths.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, dim: int = 2) -> None:
        super().__init__()
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ChannelConfigError(f"groups={groups} must divide both in_channels={in_channels} and {out_channels=}")
        if dim not in _POINTWISE:
            raise ChannelConfigError(f"dim must be 0, 1, 2 or 3 spatial dimensions, got {dim}")
        self.in_channels, self.out_channels, self.groups, self.dim = in_channels, out_channels, groups, dim
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *[1] * dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw positive weights whose rows sum to one."""
        with torch.no_grad():
            weight = self.weight.uniform_(0.5, 1.5)
            weight /= weight.sum(dim=1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the transfer to ``x``."""
        return _POINTWISE[self.dim](x, self.weight, self.groups)

    def extra_repr(self) -> str:
        """Widths and groups."""
        return f"{self.in_channels}, {self.out_channels}, groups={self.groups}"


def _check_halving(channels: int, group_size: int) -> None:
    if channels < 2 or group_size < 2 or channels % 2 or channels % group_size or group_size % 2:
        raise ChannelConfigError(
            f"a transfer halves groups of channels: channels={channels} must be a multiple of group_size={group_size}, "
            "and group_size must be even"
        )


class Restriction(GroupedPointwise):
    """Average channels into a grid half as wide: ``x[j+1] = R_j x[j]``.

    A grouped 1x1 convolution: each group of ``group_size`` fine channels is mapped to ``group_size / 2`` coarse ones, so
    ``R`` costs ``channels * group_size / 2`` weights: linear in the width (Eliasof et al. 2023, Sec. 3.3 and 3.4).

    Args:
        channels: Width ``C`` of the fine grid; a multiple of ``group_size``.
        group_size: Fine channels averaged together (``s_g`` in the paper); even.
        dim: Spatial dimensions, 0 to 3.

    Shape:
        ``(N, C, H, W) -> (N, C / 2, H, W)``

    Raises:
        ChannelConfigError: If ``group_size`` is odd or does not divide ``channels``.

    Examples:
        >>> Restriction(channels=16, group_size=4)(torch.ones(1, 16, 8, 8)).shape
        torch.Size([1, 8, 8, 8])
    """

    def __init__(self, channels: int, group_size: int, dim: int = 2) -> None:
        _check_halving(channels, group_size)
        super().__init__(channels, channels // 2, channels // group_size, dim)


class Prolongation(GroupedPointwise):
    """Spread a coarse change over a grid twice as wide: ``P_j``, the same groups as ``R_j``.

    Args:
        channels: Width ``C`` of the fine grid; a multiple of ``group_size``.
        group_size: Fine channels that one group writes to; even.
        dim: Spatial dimensions, 0 to 3.

    Shape:
        ``(N, C / 2, H, W) -> (N, C, H, W)``

    Raises:
        ChannelConfigError: If ``group_size`` is odd or does not divide ``channels``.

    Examples:
        >>> P = Prolongation(channels=16, group_size=4)
        >>> torch.allclose(P(torch.ones(1, 8, 2, 2)), torch.ones(1, 16, 2, 2))
        True
    """

    def __init__(self, channels: int, group_size: int, dim: int = 2) -> None:
        _check_halving(channels, group_size)
        super().__init__(channels // 2, channels, channels // group_size, dim)


class SparsePointwise(nn.Module):
    """A 1x1 convolution whose matrix has few non-zeros at fixed random places.

    Only the non-zeros are parameters (``values``); their places (``rows``, ``columns``) are buffers, so both are saved,
    restored and moved with the network. The matrix is assembled as it is applied: a dense 1x1 convolution is faster than
    gathering at the widths of interest, and `mgic.cost` counts the multiply-adds that are really executed.

    Args:
        rows: Output channel of each non-zero, ``(nnz,)``.
        columns: Input channel of each non-zero, ``(nnz,)``.
        out_channels: Rows of the matrix.
        in_channels: Columns of the matrix.

    Shape:
        ``(N, in_channels, H, W) -> (N, out_channels, H, W)``
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, rows: Tensor, columns: Tensor, out_channels: int, in_channels: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.register_buffer("rows", rows.clone())
        self.register_buffer("columns", columns.clone())
        self.values = nn.Parameter(torch.empty(rows.numel()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw positive weights whose rows sum to one; the places stay."""
        with torch.no_grad():
            values = self.values.uniform_(0.5, 1.5)
            sums = torch.zeros(self.out_channels, dtype=values.dtype, device=values.device)
            values /= sums.index_add_(0, self.rows, values)[self.rows]

    def matrix(self) -> Tensor:
        """Return the matrix, ``(out_channels, in_channels)``."""
        dense = self.values.new_zeros(self.out_channels * self.in_channels)
        return dense.index_put((self.rows * self.in_channels + self.columns,), self.values).view(self.out_channels, -1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the transfer to ``x``."""
        return F.conv2d(x, self.matrix()[:, :, None, None])

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """Return the convolution it is, its matrix assembled once: for inference (timm's ``reparameterize_model``)."""
        conv = nn.Conv2d(self.in_channels, self.out_channels, 1, bias=False)
        conv.weight = nn.Parameter(self.matrix()[:, :, None, None], requires_grad=False)
        return conv

    def extra_repr(self) -> str:
        """Widths and non-zeros."""
        return f"{self.in_channels}, {self.out_channels}, nonzeros={self.rows.numel()}"


Transfer = Callable[[int, int], tuple[nn.Module, nn.Module]]
"""``(channels, group_size) -> (restriction, prolongation)`` for one level of width ``channels``."""


def averaging_pair(channels: int, group_size: int, dim: int = 2) -> tuple[nn.Module, nn.Module]:
    """Return the grouped pair of the MGIC block (Eliasof et al. 2023, Sec. 3.3)."""
    return Restriction(channels, group_size, dim), Prolongation(channels, group_size, dim)


def isometric_pair(channels: int, group_size: int, dim: int = 2) -> tuple[nn.Module, nn.Module]:
    """Return the grouped pair with random orthonormal weights: ``R R^T = I`` and ``P^T P = I`` in every group.

    For an operator without norms, such as `MGICConv`: averages of unrelated channels are small, and no norm would bring
    them back to size.
    """
    R, P = averaging_pair(channels, group_size, dim)
    with torch.no_grad():
        for block in R.weight.view(-1, group_size // 2, group_size):  # type: ignore[operator]
            nn.init.orthogonal_(block)
        for block in P.weight.view(-1, group_size, group_size // 2):  # type: ignore[operator]
            nn.init.orthogonal_(block)
    return R, P


def sparse_random_pair(
    channels: int, nonzeros: int, generator: torch.Generator | None = None
) -> tuple[SparsePointwise, SparsePointwise]:
    """Return the random transfers of Ephrath et al. 2020, Sec. 4.1: they shuffle channels, so that distant ones meet.

    ``P`` has ``nonzeros`` entries per row (``t`` in the paper) at random places, ``R`` has the pattern of the transpose,
    so channels that go to the coarse grid and back end up where they were. Every coarse channel is used at least twice,
    so that no row of ``R`` is empty.

    Args:
        channels: Width ``C`` of the fine grid; even.
        nonzeros: Entries per row of ``P``; more than ``C / 2`` becomes ``C / 2``.
        generator: Source of randomness; torch's global one by default.

    Returns:
        ``(R, P)``: ``(N, C, H, W) -> (N, C / 2, H, W)`` and back.

    Raises:
        ChannelConfigError: If ``channels`` is odd or ``nonzeros`` is not positive.

    Examples:
        >>> R, P = sparse_random_pair(16, nonzeros=4)
        >>> sum(p.numel() for p in R.parameters()), sum(p.numel() for p in P.parameters())
        (64, 64)
    """
    if channels < 2 or channels % 2 or nonzeros < 1:
        raise ChannelConfigError(f"channels={channels} must be even and nonzeros={nonzeros} positive")
    coarse = channels // 2
    # one entry of each row goes round all coarse channels in random order; the others are drawn among the rest
    first = torch.arange(channels)[torch.randperm(channels, generator=generator)] % coarse
    scores = torch.rand(channels, coarse, generator=generator)
    scores[torch.arange(channels), first] = 2.0
    columns = scores.topk(min(nonzeros, coarse), dim=1).indices.sort(dim=1).values
    fine = torch.arange(channels)[:, None].expand_as(columns).flatten()
    columns = columns.flatten()
    order = torch.argsort(columns, stable=True)  # the same places, listed row by row of the transpose
    R = SparsePointwise(columns[order], fine[order], coarse, channels)
    return R, SparsePointwise(fine, columns, channels, coarse)
