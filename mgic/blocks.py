"""The plain CNN blocks one wraps: ``(channels, groups) -> nn.Module`` with equal input and output shape.

A block with an inner width of its own is called ``(channels, groups, hidden)``. Nothing here knows about multigrid. The
convolution, norm and activation are callables, so each block exists in one, two and three dimensions:
``functools.partial(BasicBlock, conv=nn.Conv3d, norm=nn.BatchNorm3d)``.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ChannelConfigError

Layer = Callable[..., nn.Module]


def relu() -> nn.Module:
    """Return the default activation; it works in place, on a tensor no one else holds."""
    return nn.ReLU(inplace=True)


def zero_scale(norm: Layer) -> Layer:
    """Let norms start with a scale of 0: what they follow adds nothing at first, and grows as training finds use for it.

    As the norm of a `Scheme`, the corrections from coarse grids start at zero. It helps where many multigrid blocks without
    an identity mapping follow each other: they train as the relaxations of the finest grids alone would, at first.

    Args:
        norm: Makes the norm of a width, with a ``weight``.

    Examples:
        >>> float(zero_scale(nn.BatchNorm2d)(8).weight.detach().abs().max())
        0.0
    """

    def make(channels: int) -> nn.Module:
        layer = norm(channels)
        nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
        return layer

    return make


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a skip: ``relu(x + N K2 relu(N K1 x))`` (He et al. 2016; eq. (1) of Ephrath et al. 2020).

    Post-activation, as in the ResNets it is compared with; `PreActBasicBlock` is the order the papers print.

    Args:
        channels: Width; a multiple of ``groups``.
        groups: Groups of both convolutions.
        hidden: Width between them; ``channels`` by default.
        norm: Makes the norm of a width.
        act: Makes the activation.
        conv: ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``.

    Shape:
        ``(N, channels, *spatial)``, unchanged.

    Examples:
        >>> BasicBlock(16, groups=2)(torch.ones(1, 16, 4, 4)).shape
        torch.Size([1, 16, 4, 4])
    """

    def __init__(
        self,
        channels: int,
        groups: int = 1,
        hidden: int | None = None,
        norm: Layer = nn.BatchNorm2d,
        act: Layer = relu,
        conv: Layer = nn.Conv2d,
    ) -> None:
        super().__init__()
        hidden = channels if hidden is None else hidden
        self.conv1 = conv(channels, hidden, 3, padding=1, groups=groups, bias=False)
        self.norm1 = norm(hidden)
        self.act1 = act()
        self.conv2 = conv(hidden, channels, 3, padding=1, groups=groups, bias=False)
        self.norm2 = norm(channels)
        self.act2 = act()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y: Tensor = self.act1(self.norm1(self.conv1(x)))
        return self.act2(self.norm2(self.conv2(y)) + x)  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """1x1 to the inner width, 3x3, 1x1 back, around a skip (He et al. 2016); arguments as `BasicBlock`.

    Args:
        channels: Outer width.
        groups: Groups of all three convolutions.
        hidden: Inner width; a quarter of ``channels`` by default.
        norm: Makes the norm of a width.
        act: Makes the activation.
        conv: ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``.

    Shape:
        ``(N, channels, *spatial)``, unchanged.

    Raises:
        ChannelConfigError: Without ``hidden``, if a quarter of ``channels`` is no whole number, or no multiple of ``groups``.
    """

    def __init__(
        self,
        channels: int,
        groups: int = 1,
        hidden: int | None = None,
        norm: Layer = nn.BatchNorm2d,
        act: Layer = relu,
        conv: Layer = nn.Conv2d,
    ) -> None:
        super().__init__()
        hidden = _quarter(channels, groups) if hidden is None else hidden
        self.conv1 = conv(channels, hidden, 1, groups=groups, bias=False)
        self.norm1 = norm(hidden)
        self.act1 = act()
        self.conv2 = conv(hidden, hidden, 3, padding=1, groups=groups, bias=False)
        self.norm2 = norm(hidden)
        self.act2 = act()
        self.conv3 = conv(hidden, channels, 1, groups=groups, bias=False)
        self.norm3 = norm(channels)
        self.act3 = act()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y: Tensor = self.act1(self.norm1(self.conv1(x)))
        y = self.act2(self.norm2(self.conv2(y)))
        return self.act3(self.norm3(self.conv3(y)) + x)  # type: ignore[no-any-return]


class PreActBasicBlock(nn.Module):
    """``x + K2 relu(N K1 relu(N x))``: the order of eq. (1) of Ephrath et al. 2020; arguments as `BasicBlock`.

    Its skip is a true identity. It has as many parameters and multiply-adds as the post-activation block. The activation
    must not work in place: with an identity norm its first argument is ``x`` itself.

    Shape:
        ``(N, channels, *spatial)``, unchanged.
    """

    def __init__(
        self,
        channels: int,
        groups: int = 1,
        hidden: int | None = None,
        norm: Layer = nn.BatchNorm2d,
        act: Layer = nn.ReLU,
        conv: Layer = nn.Conv2d,
    ) -> None:
        super().__init__()
        hidden = channels if hidden is None else hidden
        self.norm1 = norm(channels)
        self.act1 = act()
        self.conv1 = conv(channels, hidden, 3, padding=1, groups=groups, bias=False)
        self.norm2 = norm(hidden)
        self.act2 = act()
        self.conv2 = conv(hidden, channels, 3, padding=1, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y: Tensor = self.conv1(self.act1(self.norm1(x)))
        return x + self.conv2(self.act2(self.norm2(y)))  # type: ignore[no-any-return]


class PreActBottleneck(nn.Module):
    """``x + K3 relu(N K2 relu(N K1 relu(N x)))``: eq. (2.2) of Eliasof et al. 2023; arguments as `Bottleneck`.

    Shape:
        ``(N, channels, *spatial)``, unchanged.
    """

    def __init__(
        self,
        channels: int,
        groups: int = 1,
        hidden: int | None = None,
        norm: Layer = nn.BatchNorm2d,
        act: Layer = nn.ReLU,
        conv: Layer = nn.Conv2d,
    ) -> None:
        super().__init__()
        hidden = _quarter(channels, groups) if hidden is None else hidden
        self.norm1 = norm(channels)
        self.act1 = act()
        self.conv1 = conv(channels, hidden, 1, groups=groups, bias=False)
        self.norm2 = norm(hidden)
        self.act2 = act()
        self.conv2 = conv(hidden, hidden, 3, padding=1, groups=groups, bias=False)
        self.norm3 = norm(hidden)
        self.act3 = act()
        self.conv3 = conv(hidden, channels, 1, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y: Tensor = self.conv1(self.act1(self.norm1(x)))
        y = self.conv2(self.act2(self.norm2(y)))
        return x + self.conv3(self.act3(self.norm3(y)))  # type: ignore[no-any-return]


class GroupedLinear(nn.Module):
    """A block-diagonal linear layer: each group of inputs reaches its own group of outputs, ``y = W x``, no bias.

    Args:
        in_features: Input width; a multiple of ``groups``.
        out_features: Output width; a multiple of ``groups``.
        groups: Diagonal blocks; 1 is a dense layer.

    Shape:
        ``(..., in_features) -> (..., out_features)``

    Raises:
        ChannelConfigError: If ``groups`` does not divide both widths.

    Examples:
        >>> GroupedLinear(8, 4, groups=2)(torch.ones(3, 8)).shape
        torch.Size([3, 4])
    """

    def __init__(self, in_features: int, out_features: int, groups: int = 1) -> None:
        super().__init__()
        if groups < 1 or in_features % groups or out_features % groups:
            raise ChannelConfigError(f"groups={groups} must divide both in_features={in_features} and {out_features=}")
        self.in_features, self.out_features, self.groups = in_features, out_features, groups
        self.weight = nn.Parameter(torch.empty(groups, in_features // groups, out_features // groups))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights as ``nn.Linear`` does for the group's own number of inputs."""
        bound = (self.in_features // self.groups) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to the last dimension."""
        if self.groups == 1:
            return F.linear(x, self.weight[0].t())
        grouped = x.view(*x.shape[:-1], self.groups, -1)
        return torch.einsum("...gi,gio->...go", grouped, self.weight).flatten(-2)

    def extra_repr(self) -> str:
        """Widths and groups."""
        return f"{self.in_features}, {self.out_features}, groups={self.groups}"


class LinearBlock(nn.Module):
    """A residual layer of a fully connected network: ``relu(x + N W2 relu(N W1 x))``, the paper's "traditional NNs".

    Args:
        channels: Width; a multiple of ``groups``.
        groups: Groups of both linear maps.
        hidden: Width between them; ``channels`` by default.
        norm: Makes the norm of a width.
        act: Makes the activation.

    Shape:
        ``(N, channels)``, unchanged.
    """

    def __init__(
        self,
        channels: int,
        groups: int = 1,
        hidden: int | None = None,
        norm: Layer = nn.BatchNorm1d,
        act: Layer = relu,
    ) -> None:
        super().__init__()
        hidden = channels if hidden is None else hidden
        self.linear1 = GroupedLinear(channels, hidden, groups)
        self.norm1 = norm(hidden)
        self.act1 = act()
        self.linear2 = GroupedLinear(hidden, channels, groups)
        self.norm2 = norm(channels)
        self.act2 = act()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y: Tensor = self.act1(self.norm1(self.linear1(x)))
        return self.act2(self.norm2(self.linear2(y)) + x)  # type: ignore[no-any-return]


def _quarter(channels: int, groups: int) -> int:
    if channels % 4:
        raise ChannelConfigError(f"a bottleneck's inner width is channels / 4: give hidden= for channels={channels}")
    if channels // 4 % groups:
        raise ChannelConfigError(
            f"groups={groups} must divide a bottleneck's inner width, {channels // 4} for channels={channels}: give hidden=, "
            "and groups are chosen that divide both"
        )
    return channels // 4
