"""MgNet (He and Xu 2019) and MGiaD, multigrid in all dimensions (van Betteray et al. 2022)."""

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.layers import ClassifierHead
from timm.models import register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..counting import count_trainable
from ..cycle import ChannelChange, Correction, checkpointed, tau_correction
from ..errors import UserError
from ..smoothing import FullApproximation, Smoother, Smoothing, SmoothingInChannels, convolution
from .classifier import Classifier, build, init_weights
from .resnet import default_cfgs as resnet_cfgs

Coarsening = Callable[[int, int], nn.Module]
"""``(in_channels, out_channels) -> `` `mgic.smoothing.FullApproximation` or alike."""


class MgNet(Classifier):
    """The descending leg of a V-cycle over resolutions: Algorithms 1 and 3 of van Betteray et al. 2022.

    The stem makes the data ``f``; each resolution level smooths the features ``u`` of ``A(u) = f``, starting from ``u = 0``
    on the first, and hands both to the next; the head reads the last ``u``. The printed loop of Algorithm 3 ends before
    the last level; here that is smoothed too, as the counts of the paper's tables say.

    Args:
        stem: First layers, ``(N, in_chans, H, W) -> (N, channels[0], H, W)``.
        levels: What smooths on each resolution level, ``(f, u) -> u``, with ``first_A`` and ``last_A``.
        head: Pooling and classifier; see `Classifier`.
        channels: Width of each level.
        coarsen: Makes the way from one level to the next.

    Shape:
        ``(N, in_chans, H, W) -> (N, num_classes)``
    """

    def __init__(
        self,
        stem: nn.Module,
        levels: Sequence[Smoothing] | Sequence[SmoothingInChannels],
        head: nn.Module,
        channels: Sequence[int],
        coarsen: Coarsening = FullApproximation,
    ) -> None:
        reductions = [2**i for i in range(len(channels))]
        super().__init__(stem, levels, head, [channels[0], *channels], [1, *reductions])
        self.widths = tuple(channels)
        # The operators of a level run once more after it, for its residual: who takes features by the name of a module needs
        # one that runs no more once ``u`` is there.
        self.features = nn.ModuleList(nn.Identity() for _ in channels)
        for i, info in enumerate(self.feature_info):
            info["module"] = f"features.{i}"
        self.coarsen = nn.ModuleList(coarsen(fine, coarse) for fine, coarse in pairwise(channels))
        self.coarsen.apply(init_weights)

    def forward_features(self, x: Tensor) -> Tensor:
        """``(N, in_chans, H, W) -> (N, num_features, H / reduction, W / reduction)``: ``u`` of the last level."""
        f = self.stem(x)
        u = torch.zeros_like(f)
        for i in range(len(self.stages)):
            f, u = self.forward_level(i, f, u)
        return u

    def forward_level(self, i: int, f: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Take ``f`` and ``u`` of the level before to level ``i``, and smooth there."""
        smooth = self.stages[i]
        if i > 0:
            f, u = self.coarsen[i - 1](f, u, self.stages[i - 1].last_A, smooth.first_A)
        u = checkpointed(smooth, f, u) if self.grad_checkpointing and self.training else smooth(f, u)
        return f, self.features[i](u)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the last ``u`` and those of the levels asked for; arguments as `Classifier.forward_intermediates`."""
        if output_fmt != "NCHW":
            raise UserError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.feature_info), indices)
        f = self.stem(x)
        u = torch.zeros_like(f)
        intermediates = []
        for i in range(last + 1 if stop_early else len(self.stages)):
            f, u = self.forward_level(i, f, u)
            if i in take:
                intermediates.append(u)
        return intermediates if intermediates_only else (u, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the levels that the features asked for do not need, and return their places."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        self.stages = self.stages[: last + 1]
        self.features = self.features[: last + 1]
        self.coarsen = self.coarsen[:last]
        self.stride = int(str(self.feature_info[last]["reduction"]))
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's grouping of parameters into layers: the stem, then each level with its way to the next."""
        return {"stem": r"^stem", "blocks": r"^(?:stages|coarsen)\.(\d+)"}


def _widths(channels: Sequence[int], width: float) -> list[int]:
    widths = [round(c * width) for c in channels]
    if min(widths) < 1:
        raise UserError(f"width={width} leaves no channel: it multiplies {', '.join(map(str, channels))}")
    return widths


def mgnet(
    channels: Sequence[int],
    nu: int = 2,
    width: float = 1.0,
    share_a: bool = False,
    share_b: bool = False,
    group_a: int | None = None,
    group_b: int | None = None,
    coarsen: Coarsening = FullApproximation,
    smoother: Smoother = convolution,
    num_classes: int = 10,
    in_chans: int = 3,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
) -> MgNet:
    """Assemble an MgNet: ``nu`` smoothing steps on each resolution level.

    Without sharing, the first ``A`` of the first level only ever meets ``u = 0``: it is there, as in the paper's counts,
    and its gradient is zero.

    Args:
        channels: Width of each level.
        nu: Steps on each level.
        width: Multiplies ``channels``.
        share_a: One ``A`` for all steps of a level (MgNet_A).
        share_b: One ``B`` for all steps of a level (with ``share_a``: MgNet_{A,B}).
        group_a: Channels per group of ``A``; dense by default.
        group_b: Channels per group of ``B``; dense by default.
        coarsen: The way to the next level: the full approximation scheme, or `mgic.smoothing.ResidualOnly`.
        smoother: ``(A, channels, groups) -> B``; see `mgic.smoothing.Smoothing` for ``B`` as a polynomial in ``A``.
        num_classes: Classes.
        in_chans: Channels of the images.
        global_pool: Pooling of the head.
        drop_rate: Dropout before the classifier.
    """
    widths = _widths(channels, width)
    levels = [Smoothing(c, nu, share_a, share_b, group_a, group_b, smoother) for c in widths]
    stem = ChannelChange(in_chans, widths[0], groups=1)
    head = ClassifierHead(widths[-1], num_classes, global_pool, drop_rate)
    return MgNet(stem, levels, head, widths, coarsen)


def mgiad(
    channels: Sequence[int],
    group_size: int = 8,
    coarsest: int = 64,
    width: float = 1.0,
    pre: int = 1,
    post: int = 1,
    correction: Correction = tau_correction,
    coarsen: Coarsening = FullApproximation,
    smoother: Smoother = convolution,
    num_classes: int = 10,
    in_chans: int = 3,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
) -> MgNet:
    """Assemble an MGiaD network: an MgNet that smooths in channels, so its weights are linear in the width as well.

    A level no wider than ``coarsest`` is a level of MgNet with ``pre + post`` steps that share ``A`` and ``B``.

    Args:
        channels: Width of each level.
        group_size: Channels per group above the coarsest grid (``g_s``).
        coarsest: Width at which to stop halving (``c_K``).
        width: Multiplies ``channels`` (``lambda``), but not ``coarsest``.
        pre: Steps on each grid before the coarser one (``eta_pre``).
        post: Steps on each grid after it (``eta_post``).
        correction: What is prolonged; see `mgic.smoothing.SmoothingInChannels`.
        coarsen: The way to the next level: the full approximation scheme, or `mgic.smoothing.ResidualOnly`.
        smoother: ``(A, channels, groups) -> B``.
        num_classes: Classes.
        in_chans: Channels of the images.
        global_pool: Pooling of the head.
        drop_rate: Dropout before the classifier.

    Warns:
        UserWarning: If halving stops at grids wider than ``coarsest``, whose dense weights grow with their square.
    """
    widths = _widths(channels, width)
    levels = [SmoothingInChannels(c, group_size, coarsest, pre, post, correction, smoother) for c in widths]
    if (widest := max(level.levels[-1].channels for level in levels)) > coarsest:
        warnings.warn(
            f"width={width} with coarsest={coarsest} ends in dense grids of {widest} channels, because half of that is below "
            f"{coarsest}: the weights are not linear in the width there (coarsest={widest // 2} would halve once more)",
            stacklevel=2,
        )
    stem = ChannelChange(in_chans, widths[0], groups=1)
    head = ClassifierHead(widths[-1], num_classes, global_pool, drop_rate)
    return MgNet(stem, levels, head, widths, coarsen)


_MGIAD_IDLE = {2: (1, 1), 3: (1, 0), 4: (0, 0), 5: (1, 1), 7: (1, 1), 8: (1, 1), 9: (1, 1)}
"""By table: idle (R, Pi) pairs of the first level, and idle pairs of norms per level."""


def paper_weights(model: MgNet, table: int) -> int:
    """Count weights as a table of van Betteray et al. 2022 does: the used ones and the idle ones of its program.

    The printed thousands hold parameters that no forward pass reads. How many is not stated but follows from the numbers:

    * ``R`` and ``Pi`` for the first level too, ``18 c_1``: in every row but the MGiaD rows of Table IV;
    * one more pair of norms per level, ``4 sum(c_l)``: in MGiaD rows on CIFAR (Tables II, V, VII, VIII, IX);
    * one pair of norms per level in place of ``nu``: MgNet on FashionMNIST with four levels (Table III) and grouped (VI).

    Args:
        model: An MgNet or MGiaD network.
        table: Number of the table whose convention to follow.

    Raises:
        UserError: If the table has no row of such a network.

    Examples:
        >>> model = mgiad((64, 128, 256, 256), group_size=4, coarsest=64)
        >>> paper_weights(model, table=2), count_trainable(model)
        (393034, 389066)
    """
    first = model.stages[0]
    if isinstance(first, Smoothing):
        grouped = any(m.groups > 1 for m in model.stages.modules() if isinstance(m, nn.Conv2d))
        norms = 1 - len(first.steps) if table == 3 or grouped else 0
        idle = dict.fromkeys((1, 2, 3, 4, 5, 6, 7, 9), (1, norms))
    else:
        idle = _MGIAD_IDLE
    if table not in idle:
        raise UserError(f"table {table} has no such network; {', '.join(map(str, idle))} have")
    transfers, norms = idle[table]
    return count_trainable(model) + 18 * model.widths[0] * transfers + 4 * sum(model.widths) * norms


_CHANNELS_18 = (64, 128, 256, 256)
_CHANNELS_20 = (16, 32, 64)
default_cfgs = {
    name: {**resnet_cfgs["resnet20"], "pool_size": pool_size}
    for name, pool_size in (("mgnet18", (4, 4)), ("mgnet20", (8, 8)), ("mgiad18", (4, 4)), ("mgiad20", (8, 8)))
}


@register_model
def mgnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MgNet with four levels of 64 to 256 channels, two steps each: beside ResNet-18."""
    return build(mgnet, "mgnet18", pretrained, {"channels": _CHANNELS_18}, kwargs)


@register_model
def mgnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MgNet with three levels of 16 to 64 channels, three steps each: beside ResNet-20."""
    return build(mgnet, "mgnet20", pretrained, {"channels": _CHANNELS_20, "nu": 3}, kwargs)


@register_model
def mgiad18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MGiaD with four levels of 64 to 256 channels (van Betteray et al. 2022, Tables II, III, V, VII to IX)."""
    return build(mgiad, "mgiad18", pretrained, {"channels": _CHANNELS_18}, kwargs)


@register_model
def mgiad20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MGiaD with three levels of 16 to 64 channels (van Betteray et al. 2022, Table IV)."""
    return build(mgiad, "mgiad20", pretrained, {"channels": _CHANNELS_20}, kwargs)
