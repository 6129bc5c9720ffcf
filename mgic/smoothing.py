"""Smoothing ``A(u) = f``: the MgNet step, smoothing in channels, and the way to the next resolution.

``f`` holds data, ``u`` features; ``A`` maps features to data and ``B`` extracts features from a residual. The equations are
those of van Betteray et al. 2022 (MGiaD), which builds on MgNet (He and Xu 2019).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .blocks import Layer, relu
from .cycle import Correction, tau_correction
from .errors import ChannelConfigError
from .hierarchy import plan_levels
from .transfer import Prolongation, Restriction

Operator = Callable[[Tensor], Tensor]
"""``A`` or ``B``: ``(N, C, H, W)``, unchanged."""

Smoother = Callable[[nn.Module, int, int], nn.Module]
"""``(A, channels, groups) -> B``."""


class SmoothingStep(nn.Module):
    """Take one step towards ``A(u) = f``: ``S(f, u; A, B) = u + relu(N_b B r)`` with ``r = relu(N_a (f - A u))``.

    Eq. (3) of van Betteray et al. 2022 with norms and activations in place. The step owns its two norms and nothing else:
    ``A`` and ``B`` are arguments, so steps that share them share one module, which is saved, averaged and counted once.

    Args:
        channels: Width ``C`` of ``f`` and ``u``.
        norm: Makes the norm of a width.
        act: Makes the activation; the default works in place, on what the norm returned.

    Shape:
        ``f`` and ``u``: ``(N, C, H, W)``; the new ``u`` alike.

    Examples:
        >>> A = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        >>> f, u = torch.randn(2, 1, 8, 4, 4)
        >>> step = SmoothingStep(8)
        >>> step(f, u, A, nn.Conv2d(8, 8, 3, padding=1, bias=False)).shape
        torch.Size([1, 8, 4, 4])
        >>> step(f, u, A, lambda r: 0.5 * r - 0.1 * A(r)).shape  # B as a polynomial in A, the outlook of Sec. V
        torch.Size([1, 8, 4, 4])
    """

    def __init__(self, channels: int, norm: Layer = nn.BatchNorm2d, act: Layer = relu) -> None:
        super().__init__()
        self.norm_a = norm(channels)
        self.act_a = act()
        self.norm_b = norm(channels)
        self.act_b = act()

    def forward(self, f: Tensor, u: Tensor, A: Operator, B: Operator) -> Tensor:
        """Return the new ``u``."""
        r: Tensor = self.act_a(self.norm_a(f - A(u)))
        return u + self.act_b(self.norm_b(B(r)))  # type: ignore[no-any-return]


def convolution(A: nn.Module, channels: int, groups: int) -> nn.Module:
    """Return the default ``B``: a 3x3 convolution of its own, whatever ``A`` is."""
    return _convolution(channels, groups)


def _convolution(channels: int, groups: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)


def _groups(channels: int, group_size: int | None, name: str) -> int:
    if group_size is None:
        return 1
    if group_size < 1 or channels % group_size:
        raise ChannelConfigError(f"{name}={group_size} must divide channels={channels} (None makes it dense)")
    return channels // group_size


class Smoothing(nn.Module):
    """Take ``steps`` smoothing steps on one resolution: lines 3 and 4 of Algorithm 1 of van Betteray et al. 2022 (MgNet).

    Without sharing each step has its own ``A_i`` and ``B_i``, as the two convolutions of a residual block. Sharing both
    makes the iteration stationary: ``2 (9 c^2)`` weights and ``4 c`` of norms per step, however many steps.

    Args:
        channels: Width ``c``.
        steps: Number of steps (``nu``).
        share_a: Whether all steps use one ``A``.
        share_b: Whether all steps use one ``B``.
        group_a: Channels per group of ``A``; dense by default.
        group_b: Channels per group of ``B``; dense by default.
        smoother: ``(A, channels, groups) -> B``.

    Shape:
        ``f`` and ``u``: ``(N, c, H, W)``; the new ``u`` alike.

    Raises:
        ChannelConfigError: If ``steps`` is not positive or a group size does not divide ``channels``.

    Examples:
        >>> f = torch.randn(1, 16, 8, 8)
        >>> Smoothing(16, steps=2, share_a=True)(f, torch.zeros_like(f)).shape
        torch.Size([1, 16, 8, 8])

        With ``B`` a polynomial in ``A`` (Sec. V), only its coefficients are new weights:

        >>> class Polynomial(nn.Module):
        ...     def __init__(self, A, channels, groups, degree=2):
        ...         super().__init__()
        ...         self.A = (A,)  # in a tuple: the smoothing owns A, and saves it once
        ...         self.coefficients = nn.Parameter(torch.full((degree + 1,), 0.1))
        ...     def forward(self, r):
        ...         y = self.coefficients[-1] * r
        ...         for i in reversed(range(len(self.coefficients) - 1)):  # Horner's rule
        ...             y = self.A[0](y) + self.coefficients[i] * r
        ...         return y
        >>> smooth = Smoothing(16, steps=2, share_a=True, share_b=True, smoother=Polynomial)
        >>> sum(p.numel() for p in smooth.parameters()) == 9 * 16**2 + 3 + 2 * 4 * 16
        True
    """

    def __init__(
        self,
        channels: int,
        steps: int,
        share_a: bool = False,
        share_b: bool = False,
        group_a: int | None = None,
        group_b: int | None = None,
        smoother: Smoother = convolution,
    ) -> None:
        super().__init__()
        if steps < 1:
            raise ChannelConfigError(f"steps={steps} (nu) must be at least 1")
        groups_a, groups_b = _groups(channels, group_a, "group_a"), _groups(channels, group_b, "group_b")
        self.A = nn.ModuleList(_convolution(channels, groups_a) for _ in range(1 if share_a else steps))
        self.B = nn.ModuleList(
            smoother(self.A[min(i, len(self.A) - 1)], channels, groups_b) for i in range(1 if share_b else steps)
        )
        self.steps = nn.ModuleList(SmoothingStep(channels) for _ in range(steps))

    def forward(self, f: Tensor, u: Tensor) -> Tensor:
        """Return the smoothed ``u``."""
        for i, step in enumerate(self.steps):
            u = step(f, u, self.A[min(i, len(self.A) - 1)], self.B[min(i, len(self.B) - 1)])
        return u

    @property
    def first_A(self) -> nn.Module:  # noqa: N802
        """The operator of the first step: the right-hand side of this level is built with it."""
        return self.A[0]

    @property
    def last_A(self) -> nn.Module:  # noqa: N802
        """The operator of the last step: the residual left on this level is taken with it."""
        return self.A[-1]


class SmoothingInChannels(nn.Module):
    """Smooth by a V-cycle over channel grids: ``SiC(f, u)``, Algorithm 2 of van Betteray et al. 2022.

    Each grid has one grouped ``A_k`` and one grouped ``B_k``, shared by all its steps, residuals and right-hand sides; those
    of the coarsest grid are dense, so that every channel of ``f`` reaches every channel of ``u``. The grids halve while at
    least ``coarsest`` channels are left. The weights are linear in the width: about ``36 s_g c + 18 c_K^2``.

    What is prolonged is the change of the coarse features. Line 7 prints the coarse features themselves
    (`mgic.plain_prolongation`); only the change leaves a solution of ``A(u) = f`` as it is. The norm after ``P``
    stays in both. Every step reads ``f - A u`` only and ``A`` is linear, so the change does not depend on where the coarse
    grid starts: ``Pi`` is in the paper's counts, but it matters only where the features themselves are prolonged.

    Args:
        channels: Width ``c`` of the finest grid.
        group_size: Channels per group (``g_s``); divides the width of every grid but the coarsest, which needs no groups.
        coarsest: Width at which to stop halving (``c_K``).
        pre: Steps before the coarse grid (``eta_pre``).
        post: Steps after it (``eta_post``).
        correction: ``(coarse features after, before) -> what is prolonged``.
        smoother: ``(A, channels, groups) -> B``.

    Shape:
        ``f`` and ``u``: ``(N, c, H, W)``; the new ``u`` alike.

    Raises:
        ChannelConfigError: If a grid's width is no multiple of ``group_size``, or there is no step.

    Examples:
        >>> smooth = SmoothingInChannels(64, group_size=4, coarsest=16).eval()
        >>> [level.channels for level in smooth.levels], [level.groups for level in smooth.levels]
        ([64, 32, 16], [16, 8, 1])
        >>> u = torch.randn(1, 64, 4, 4)
        >>> torch.equal(smooth(smooth.A[0](u), u), u)  # a solution stays
        True
    """

    def __init__(
        self,
        channels: int,
        group_size: int,
        coarsest: int,
        pre: int = 1,
        post: int = 1,
        correction: Correction = tau_correction,
        smoother: Smoother = convolution,
    ) -> None:
        super().__init__()
        if pre < 0 or post < 0 or pre + post < 1:
            raise ChannelConfigError(f"pre={pre} and post={post} must not be negative, and one of them positive")
        # a transfer group is one pair of fine channels and its coarse channel, independent of group_size
        self.levels = plan_levels(
            channels, group_size, coarsest, rounding=math.floor, min_groups=1, transfer_group_size=2
        )
        for level in self.levels[:-1]:
            if level.group_size != group_size:
                raise ChannelConfigError(
                    f"group_size={group_size} does not divide the grid of {level.channels} channels "
                    f"(channels={channels}, coarsest={coarsest}): take a divisor of it, or a wider coarsest grid"
                )
        self.correction = correction
        grids = [(level.channels, level.groups) for level in self.levels]
        fine = self.levels[:-1]
        self.A = nn.ModuleList(_convolution(*grid) for grid in grids)
        self.B = nn.ModuleList(smoother(A, *grid) for A, grid in zip(self.A, grids, strict=True))
        self.pre = nn.ModuleList(nn.ModuleList(SmoothingStep(c) for _ in range(pre)) for c, _ in grids)
        self.post = nn.ModuleList(nn.ModuleList(SmoothingStep(c) for _ in range(post)) for c, _ in grids)
        self.R = nn.ModuleList(Restriction(level.channels, level.transfer_group_size) for level in fine)
        self.Pi = nn.ModuleList(Restriction(level.channels, level.transfer_group_size) for level in fine)
        self.P = nn.ModuleList(Prolongation(level.channels, level.transfer_group_size) for level in fine)
        self.norm = nn.ModuleList(nn.BatchNorm2d(level.channels) for level in fine)

    def forward(self, f: Tensor, u: Tensor) -> Tensor:
        """Return the smoothed ``u``."""
        return self.cycle(0, f, u)

    def cycle(self, k: int, f: Tensor, u: Tensor) -> Tensor:
        """Smooth on grid ``k`` and, from there, on all coarser ones."""
        A, B = self.A[k], self.B[k]
        for step in self.pre[k].children():
            u = step(f, u, A, B)
        if k < len(self.levels) - 1:
            before = self.Pi[k](u)
            after = self.cycle(k + 1, self.R[k](f - A(u)) + self.A[k + 1](before), before)
            u = u + self.norm[k](self.P[k](self.correction(after, before)))
        for step in self.post[k].children():
            u = step(f, u, A, B)
        return u

    @property
    def first_A(self) -> nn.Module:  # noqa: N802
        """The finest operator; see `Smoothing.first_A`."""
        return self.A[0]

    @property
    def last_A(self) -> nn.Module:  # noqa: N802
        """The finest operator; see `Smoothing.last_A`."""
        return self.A[0]

    def extra_repr(self) -> str:
        """Widths and groups, finest first."""
        widths = " > ".join(str(level.channels) for level in self.levels)
        groups = ", ".join("dense" if level.groups == 1 else str(level.groups) for level in self.levels)
        return f"channels {widths}; groups {groups}"


def _pooling(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Return a learnable pooling: a depthwise 3x3 convolution of stride 2."""
    if out_channels % in_channels:
        raise ChannelConfigError(
            f"the pooling between resolutions is depthwise: {out_channels} channels must be a multiple of {in_channels}"
        )
    return nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, groups=in_channels, bias=False)


class FullApproximation(nn.Module):
    """Go to the next resolution with data and features: ``u' = Pi u``, ``f' = R (f - A u) + A' u'``.

    The full approximation scheme, eqs. (6) and (7) of van Betteray et al. 2022: the features found so far are the first
    guess there. ``R`` and ``Pi`` are depthwise 3x3 convolutions of stride 2, ``9 out_channels`` weights each.

    Args:
        in_channels: Width of this resolution.
        out_channels: Width of the next; a multiple of ``in_channels``.

    Shape:
        ``f`` and ``u``: ``(N, in_channels, H, W)``; both become ``(N, out_channels, ceil(H / 2), ceil(W / 2))``.

    Raises:
        ChannelConfigError: If ``out_channels`` is no multiple of ``in_channels``.

    Examples:
        >>> f, u = torch.randn(2, 1, 4, 8, 8)
        >>> coarse = FullApproximation(4, 8)(f, u, nn.Identity(), nn.Identity())
        >>> [x.shape for x in coarse]
        [torch.Size([1, 8, 4, 4]), torch.Size([1, 8, 4, 4])]
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.R = _pooling(in_channels, out_channels)
        self.Pi = _pooling(in_channels, out_channels)

    def forward(self, f: Tensor, u: Tensor, A: Operator, A_next: Operator) -> tuple[Tensor, Tensor]:
        """Return ``(f', u')``."""
        u_next = self.Pi(u)
        return self.R(f - A(u)) + A_next(u_next), u_next


class ResidualOnly(nn.Module):
    """Go to the next resolution with the residual only: ``u' = 0``, ``f' = R (f - A u)``.

    Lines 5 and 6 of Algorithm 1 of van Betteray et al. 2022. The first ``A`` there meets ``u = 0``, so where the steps do not
    share it, it is idle.

    Args:
        in_channels: Width of this resolution.
        out_channels: Width of the next; a multiple of ``in_channels``.

    Shape:
        As `FullApproximation`.

    Raises:
        ChannelConfigError: If ``out_channels`` is no multiple of ``in_channels``.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.R = _pooling(in_channels, out_channels)

    def forward(self, f: Tensor, u: Tensor, A: Operator, A_next: Operator) -> tuple[Tensor, Tensor]:
        """Return ``(f', 0)``."""
        f_next = self.R(f - A(u))
        return f_next, torch.zeros_like(f_next)
