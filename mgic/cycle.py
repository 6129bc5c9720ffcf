"""The multigrid-in-channels block: a hierarchy of channel grids around any CNN block, and the cycles that walk it."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .blocks import GroupedLinear, Layer, relu
from .errors import ChannelConfigError
from .hierarchy import Level, check_positive, plan_levels
from .transfer import Transfer, averaging_pair, isometric_pair

Correction = Callable[[Tensor, Tensor], Tensor]
"""``(relaxed, restricted) -> what is prolonged``, both ``(N, C / 2, ...)``: a coarse grid's features after and before."""


def tau_correction(relaxed: Tensor, restricted: Tensor) -> Tensor:
    """Prolong only what the coarse grid changed, ``y - R x`` (eq. (3.3) of Eliasof et al. 2023)."""
    return relaxed - restricted


def plain_prolongation(relaxed: Tensor, restricted: Tensor) -> Tensor:
    """Prolong the coarse features themselves: an ablation, without the identity property."""
    return relaxed


@dataclass(frozen=True)
class scaled_correction:  # noqa: N801  (called as the others are; equal scales are equal corrections, and it can be pickled)
    """The tau-correction damped (below 1) or amplified (Ephrath et al. 2020, Sec. 4.2).

    A batch norm after the prolongation undoes any scale while it trains; use another norm in the `Scheme`.

    Args:
        scale: What the correction is multiplied by.

    Examples:
        >>> scaled_correction(0.5)(torch.tensor(3.0), torch.tensor(1.0))
        tensor(1.)
    """

    scale: float

    def __call__(self, relaxed: Tensor, restricted: Tensor) -> Tensor:
        """Prolong ``scale * (y - R x)``."""
        return self.scale * (relaxed - restricted)


def multiplicative(block: "MGICBlock", x: Tensor, *context: Any) -> Tensor:
    """Walk the levels one after the other, each seeing the correction of the coarser (Algorithm 1; 2020: (11)-(14))."""
    xs = [x]  # xs[j] lives on level j
    for restrict in block.restrict:  # down
        xs.append(restrict(xs[-1]))
    y = block.relax_level(-1, xs[-1], *context)  # the coarsest level: fully coupled
    for j in reversed(range(len(block.restrict))):  # up; a level's features are freed as it is left
        y = block.correction(y, xs.pop())
        y = xs[-1] + block.norm[j](block.prolong[j](y))
        y = block.relax_level(j, y, *context)
    return y


def additive(block: "MGICBlock", x: Tensor, *context: Any) -> Tensor:
    """Relax all levels side by side and add the corrections (eqs. (5)-(8) of Ephrath et al. 2020)."""
    xs = [x]
    for restrict in block.restrict:
        xs.append(restrict(xs[-1]))
    y = block.relax_level(-1, xs[-1], *context)
    for j in reversed(range(len(block.restrict))):
        y = block.correction(y, xs.pop())
        y = block.relax_level(j, xs[-1], *context) + block.norm[j](block.prolong[j](y))
    return y


@dataclass(frozen=True)
class Scheme:
    """The parts of a multigrid block that a family of networks shares.

    Args:
        plan: ``(channels, group_size, coarsest, hidden) -> levels``; bind options with ``functools.partial``.
        transfer: ``(channels, group_size) -> (R, P)`` of one level.
        norm: Makes the norm of a width that follows each prolongation.
        cycle: ``(block, x, *context) -> y``, how the levels are walked: `multiplicative` or `additive`.
    """

    plan: Callable[[int, int, int, int | None], list[Level]] = plan_levels
    transfer: Transfer = averaging_pair
    norm: Layer = nn.BatchNorm2d
    cycle: Callable[..., Tensor] = multiplicative


def frozen(transfer: Transfer) -> Transfer:
    """Return a transfer pair that keeps its initial weights (an ablation)."""

    def pair(channels: int, group_size: int) -> tuple[nn.Module, nn.Module]:
        R, P = transfer(channels, group_size)
        return R.requires_grad_(False), P.requires_grad_(False)

    return pair


class MGICBlock(nn.Module):
    """Multigrid in channels around any block of equal input and output shape.

    The features are restricted through a hierarchy of grids, each half as wide as the one before. On the coarsest, dense
    grid the block couples every channel; on the way back each finer grid receives the coarse change, ``x + N(P(y - R x))``,
    and relaxes in groups. Every output channel depends on every input channel, at a cost linear in the width: about
    ``2 s_g c (d^2 + 1) + s_c^2 d^2`` weights per convolution (Eliasof et al. 2023, Algorithm 1 and eq. (3.5)). If the block
    has an identity mapping, so has its multigrid version.

    Inference holds one level's features more than the wrapped block; training two to three times its memory (Sec. 3.4
    says about twice), which `set_grad_checkpointing` trades for time.

    Args:
        block: ``block(channels, groups)``, or ``block(channels, groups, hidden)`` where ``hidden`` is given, makes the
            relaxation of one level.
        channels: Width ``c`` of the block.
        group_size: Channels per group (``s_g``).
        coarsest: Width at which to stop coarsening (``s_c``). A block no wider than this is the wrapped block itself.
        hidden: Inner width of the block at the finest level, if it has one; it halves with the channels.
        correction: What is prolonged; see `tau_correction`.
        scheme: Plan, transfers, norm and cycle.

    Shape:
        ``(N, channels, H, W)``, unchanged.

    Raises:
        ChannelConfigError: If a width is not a positive integer.

    Examples:
        >>> from mgic.blocks import BasicBlock
        >>> block = MGICBlock(BasicBlock, channels=64, group_size=8, coarsest=16)
        >>> [level.channels for level in block.levels]
        [64, 32, 16]
        >>> block(torch.zeros(1, 64, 8, 8)).shape
        torch.Size([1, 64, 8, 8])
    """

    def __init__(
        self,
        block: Callable[..., nn.Module],
        channels: int,
        group_size: int,
        coarsest: int,
        hidden: int | None = None,
        correction: Correction = tau_correction,
        scheme: Scheme = Scheme(),
    ) -> None:
        super().__init__()
        self.levels = scheme.plan(channels, group_size, coarsest, hidden)
        self.correction = correction
        self.cycle = scheme.cycle
        self.grad_checkpointing = False
        self.relax = nn.ModuleList(
            block(lv.channels, lv.groups) if hidden is None else block(lv.channels, lv.groups, lv.hidden)
            for lv in self.levels
        )
        pairs = [scheme.transfer(level.channels, level.transfer_group_size) for level in self.levels[:-1]]
        self.restrict = nn.ModuleList(R for R, _ in pairs)
        self.prolong = nn.ModuleList(P for _, P in pairs)
        self.norm = nn.ModuleList(scheme.norm(level.channels) for level in self.levels[:-1])

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """Walk one cycle; ``context`` is what else the wrapped block takes, the same on every level, such as a graph."""
        return self.cycle(self, x, *context)

    def relax_level(self, j: int, x: Tensor, *context: Any) -> Tensor:
        """Apply the wrapped block of level ``j``."""
        if self.grad_checkpointing and self.training:
            return checkpointed(self.relax[j], x, *context)
        return self.relax[j](x, *context)  # type: ignore[no-any-return]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each level's relaxation for the backward pass, and compute the rest again there."""
        self.grad_checkpointing = enable

    def to_dense(self, size: tuple[int, ...] = (1, 1)) -> Tensor:
        """Assemble the dense operator of the linear parts, activations replaced by the identity.

        Norms act with their running statistics, as in evaluation; constant terms (biases) are left out. With the default,
        a single position, a 3x3 kernel contributes its centre. In the parameters' type and on their device; without any,
        in PyTorch's default type on the CPU.

        Args:
            size: Spatial size ``(H, W)`` of the features; ``()`` for plain vectors.

        Returns:
            ``(C H W, C H W)``: column ``i`` is the response to a unit in place ``i`` of the flattened ``(C, H, W)``.

        Raises:
            ChannelConfigError: If the block is not linear once its activation modules are gone.
        """
        return dense_operator(self, self.levels[0].channels, size)

    def extra_repr(self) -> str:
        """Widths and groups, finest first."""
        widths = " > ".join(str(level.channels) for level in self.levels)
        groups = ", ".join("dense" if level.groups == 1 else str(level.groups) for level in self.levels)
        return f"channels {widths}; groups {groups}"


class ChannelChange(nn.Sequential):
    """Change the width, and with ``stride`` the resolution, before a block: conv, norm, activation.

    A 3x3 convolution in as many groups as divide both widths: depthwise where ``out_channels`` is a multiple of
    ``in_channels`` (Eliasof et al. 2023, Sec. 3.3, "Changing the channel resolution blocks").

    Args:
        in_channels: Width before.
        out_channels: Width after.
        stride: Stride of the convolution.
        kernel_size: Odd; 1 for the pointwise alternative the paper names.
        groups: The greatest common divisor of the widths by default.
        norm: Makes the norm of a width.
        act: Makes the activation.

    Shape:
        ``(N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride))``

    Raises:
        ChannelConfigError: If ``groups`` does not divide both widths, a number is not positive or the kernel's size not odd.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        kernel_size: int = 3,
        groups: int | None = None,
        norm: Layer = nn.BatchNorm2d,
        act: Layer = relu,
    ) -> None:
        check_positive(in_channels=in_channels, out_channels=out_channels, stride=stride, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ChannelConfigError(f"kernel_size must be odd, got {kernel_size}")
        groups = math.gcd(in_channels, out_channels) if groups is None else groups
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ChannelConfigError(f"groups={groups} must divide both in_channels={in_channels} and {out_channels=}")
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.norm = norm(out_channels)
        self.act = act()


class AdditiveChannelChange(nn.Module):
    """The additive cycle between two widths: ``sum_j P_0 ... P_{j-1} K_j R_{j-1} ... R_0``, a norm after each P.

    Ephrath et al. 2020, Sec. 4.2, revert to the additive cycle where channels or resolution change. The restrictions live
    on the grids of the input, the prolongations on those of the output, both in as many groups as the relaxation, or as the
    plan gives the transfers; with no identity between the two there is no tau-correction (the simplification below eq. (14)).

    Args:
        block: ``block(in_channels, out_channels, groups)`` makes one level's step; strides are its own business.
        in_channels: Width before; its grids halve together with those of ``out_channels``.
        out_channels: Width after.
        group_size: Channels per group on the narrower side.
        coarsest: Width (of the narrower side) at which to stop.
        scheme: Plan, transfers and norm.

    Shape:
        ``(N, in_channels, ...) -> (N, out_channels, ...)``
    """

    def __init__(
        self,
        block: Callable[[int, int, int], nn.Module],
        in_channels: int,
        out_channels: int,
        group_size: int,
        coarsest: int,
        scheme: Scheme = Scheme(),
    ) -> None:
        super().__init__()
        self.levels = scheme.plan(in_channels, group_size, coarsest, out_channels)
        self.relax = nn.ModuleList(block(level.channels, level.hidden, level.groups) for level in self.levels)
        fine = self.levels[:-1]
        self.restrict = nn.ModuleList(scheme.transfer(lv.channels, lv.transfer_group_size)[0] for lv in fine)
        sizes = [lv.hidden // _prolongation_groups(lv) for lv in fine]
        self.prolong = nn.ModuleList(scheme.transfer(lv.hidden, size)[1] for lv, size in zip(fine, sizes, strict=True))
        self.norm = nn.ModuleList(scheme.norm(lv.hidden) for lv in fine)

    def forward(self, x: Tensor) -> Tensor:
        """Walk one cycle."""
        return _sum_over_levels(x, self.relax, self.restrict, self.prolong, self.norm)

    def to_dense(self, size: tuple[int, ...] = (1, 1)) -> Tensor:
        """Assemble the dense operator; see `MGICBlock.to_dense`."""
        return dense_operator(self, self.levels[0].channels, size)


def _prolongation_groups(level: Level) -> int:
    """Groups of P on the output's width: the relaxation's, unless the plan gave the transfers groups of their own."""
    own = level.transfer_groups != math.gcd(level.groups, level.channels // 2)
    return math.gcd(level.transfer_groups if own else level.groups, level.hidden // 2)


class MGICLinear(nn.Module):
    """A linear layer whose weights grow linearly with its width: ``y = sum_j P..P A_j R..R x + b``.

    The additive cycle with block-diagonal ``A_j`` (dense on the coarsest grid) in place of a full matrix: the layer for
    the paper's "traditional NNs" (Eliasof et al. 2023, Sec. 5). Every output depends on every input.

    Args:
        in_features: Input width.
        out_features: Output width.
        group_size: Features per group on the narrower side (``s_g``).
        coarsest: Width of the narrower side at which to stop (``s_c``).
        bias: Whether ``b`` is there.

    Shape:
        ``(..., in_features) -> (..., out_features)``

    Examples:
        >>> layer = MGICLinear(512, 512, group_size=16, coarsest=32)
        >>> layer(torch.zeros(2, 7, 512)).shape, sum(p.numel() for p in layer.parameters()) < 512 * 512 / 8
        (torch.Size([2, 7, 512]), True)
    """

    def __init__(self, in_features: int, out_features: int, group_size: int, coarsest: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        scheme = Scheme(transfer=partial(averaging_pair, dim=0), norm=nn.Identity)
        self.cycle = AdditiveChannelChange(GroupedLinear, in_features, out_features, group_size, coarsest, scheme)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to the last dimension."""
        y = self.cycle(x.flatten(0, -2)).unflatten(0, x.shape[:-1]) if x.dim() > 2 else self.cycle(x)
        return y if self.bias is None else y + self.bias  # type: ignore[no-any-return]


class MGICConv(nn.Module):
    """A convolution whose weights grow linearly with its width: ``y = sum_j P_0..P_{j-1} K_j R_{j-1}..R_0 x + b``.

    A drop-in for a dense ``nn.Conv2d``, for any stride, dilation and widths: the additive cycle (Ephrath et al. 2020,
    eqs. (5)-(8)) without activations and norms, hence a linear operator. The restrictions act before the stride, the
    prolongations after it. Off the block diagonal of level ``j`` its matrix has low rank with nested bases, so that it can be
    fitted to a trained kernel (`mgic.warm_start_`). Every output channel depends on every input channel.

    Args:
        in_channels: Width of the input.
        out_channels: Width of the output.
        kernel_size: As of ``nn.Conv2d``.
        group_size: Channels per group on the narrower side, and of the transfers on either side (``s_g``).
        coarsest: Width of the narrower side at which to stop (``s_c``).
        conv: Further arguments of ``nn.Conv2d``: ``stride, padding, dilation, bias, padding_mode``.

    Shape:
        That of the convolution: ``(N, in_channels, H, W) -> (N, out_channels, H', W')``.

    Raises:
        ChannelConfigError: If a width is not a positive integer, or ``groups`` is given.

    Examples:
        >>> layer = MGICConv(64, 128, 3, group_size=8, coarsest=16, stride=2, padding=1)
        >>> layer(torch.zeros(1, 64, 9, 9)).shape, sum(p.numel() for p in layer.parameters())  # dense: 73,856
        (torch.Size([1, 128, 5, 5]), 19712)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        group_size: int,
        coarsest: int,
        **conv: Any,
    ) -> None:
        super().__init__()
        if conv.pop("groups", 1) != 1:
            raise ChannelConfigError("groups: the groups of an MGICConv follow from group_size")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, 1
        self.levels = plan_levels(in_channels, group_size, coarsest, out_channels)
        bias = conv.pop("bias", True)
        self.relax = nn.ModuleList(
            nn.Conv2d(lv.channels, lv.hidden, kernel_size, groups=lv.groups, bias=bias and j == 0, **conv)
            for j, lv in enumerate(self.levels)
        )
        fine = self.levels[:-1]
        pairs = [
            (
                isometric_pair(lv.channels, _even_divisor(lv.channels, group_size))[0],
                isometric_pair(lv.hidden, _even_divisor(lv.hidden, group_size))[1],
            )
            for lv in fine
        ]
        self.restrict = nn.ModuleList(R for R, _ in pairs)
        self.prolong = nn.ModuleList(P for _, P in pairs)
        self._balance()

    def _balance(self) -> None:
        """Let every level start with an equal share of the variance: each prolongation halves that of its channels."""
        with torch.no_grad():
            for j, relax in enumerate(self.relax):
                relax.weight.mul_(math.sqrt(2**j / len(self.levels)))  # type: ignore[operator]

    @property
    def bias(self) -> Tensor | None:
        """The bias, that of the finest level's convolution."""
        return self.relax[0].bias  # type: ignore[return-value]

    @property
    def stride(self) -> tuple[int, ...]:
        """Stride of the convolution."""
        return self.relax[0].stride  # type: ignore[return-value]

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Size of its kernel."""
        return self.relax[0].kernel_size  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the convolution."""
        return _sum_over_levels(x, self.relax, self.restrict, self.prolong, None)

    def dense_weight(self) -> Tensor:
        """Return the kernel of the equal dense convolution, ``(out_channels, in_channels, kH, kW)``; differentiable."""
        weight = spread(self.relax[-1])
        for j in reversed(range(len(self.restrict))):
            R, P = (spread(transfer)[:, :, 0, 0] for transfer in (self.restrict[j], self.prolong[j]))
            weight = spread(self.relax[j]) + torch.einsum("ap,pqhw,qb->abhw", P, weight, R)
        return weight

    def extra_repr(self) -> str:
        """Widths and groups, finest first."""
        widths = " > ".join(f"{level.channels}-{level.hidden}" for level in self.levels)
        groups = ", ".join("dense" if level.groups == 1 else str(level.groups) for level in self.levels)
        return f"channels {widths}; groups {groups}"


def _sum_over_levels(
    x: Tensor, relax: nn.ModuleList, restrict: nn.ModuleList, prolong: nn.ModuleList, norm: nn.ModuleList | None
) -> Tensor:
    """``sum_j N_0 P_0 .. N_{j-1} P_{j-1} K_j R_{j-1} .. R_0 x``: the additive cycle without corrections."""
    xs = [x]
    for coarsen in restrict:
        xs.append(coarsen(xs[-1]))
    y: Tensor = relax[-1](xs.pop())
    for j in reversed(range(len(restrict))):
        y = prolong[j](y)
        y = relax[j](xs.pop()) + (y if norm is None else norm[j](y))
    return y


def spread(conv: nn.Module) -> Tensor:
    """Return the weights of a grouped convolution as those of a dense one, zero between groups."""
    weight: Tensor = conv.weight  # type: ignore[assignment]
    groups: int = conv.groups  # type: ignore[assignment]
    if groups == 1:
        return weight
    blocks = weight.view(groups, -1, *weight.shape[1:])  # (groups, out, in, kH, kW)
    dense = torch.einsum("gh,goi...->gohi...", torch.eye(groups, dtype=weight.dtype, device=weight.device), blocks)
    return dense.flatten(2, 3).flatten(0, 1)


def _even_divisor(channels: int, size: int) -> int:
    """Return the largest even divisor of an even width that is not above ``size``; 2 at least."""
    return max(s for s in range(2, max(size, 2) + 1, 2) if channels % s == 0)


def checkpointed(module: nn.Module, *inputs: Any) -> Tensor:
    """Run ``module`` keeping only its inputs for the backward pass, without counting its batch statistics twice.

    The second forward pass would move the running statistics of batch norms once more; here it leaves them alone, so
    training with and without checkpointing is the same.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(module)

    return checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    counts = [norm.num_batches_tracked for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def dense_operator(module: nn.Module, channels: int, size: tuple[int, ...]) -> Tensor:
    """Return the matrix of ``module`` on ``(channels, *size)`` features; see `MGICBlock.to_dense`."""
    linear = copy.deepcopy(module).eval()
    for parent in linear.modules():
        for name, child in parent.named_children():
            if type(child).__module__.endswith(("nn.modules.activation", "timm.layers.activations")):
                setattr(parent, name, nn.Identity())
    like = next(linear.parameters(), torch.empty(0))
    unknowns = channels * math.prod(size)
    with torch.no_grad():

        def apply(x: Tensor) -> Tensor:
            y: Tensor = linear(x.reshape(-1, channels, *size)) - linear(like.new_zeros(1, channels, *size))
            return y.flatten(1)

        matrix = apply(torch.eye(unknowns, dtype=like.dtype, device=like.device)).t()
        probe = torch.randn(2, unknowns, dtype=like.dtype, device=like.device)
        error = (apply(probe) - probe @ matrix.t()).abs().max() / matrix.abs().max().clamp_min(1e-30)
        if error > 1e3 * torch.finfo(like.dtype).eps * unknowns:
            raise ChannelConfigError(
                f"{type(module).__name__} is not linear once its activation modules are gone (relative error {error:.1e}): "
                "make its activations modules of torch.nn, so that they can be replaced"
            )
    return matrix
