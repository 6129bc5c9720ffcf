"""How much the coarse grid keeps: channels encoded by the restrictions alone and decoded by the prolongations alone.

Eliasof et al. 2023, Sec. 4.1, Table 1 and Figure 3: the blocks and skips of a multigrid block are removed, and what is left,
``P_0 ... P_n R_n ... R_0``, is trained to reproduce feature maps. All maps are linear and without bias, so the squared error
depends on the features through their second moments alone: the experiment needs no image once these are known, and its
optimum has a closed form to hold the training against.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .errors import ChannelConfigError, UserError
from .hierarchy import Level, plan_levels
from .transfer import averaging_pair


def plan_transfers(channels: int, group_size: int, coarsest: int) -> list[Level]:
    """Plan the grids of `transfers_alone`; a grid no wider than ``group_size`` is one group."""
    return plan_levels(channels, group_size, coarsest, min_groups=1)


def transfers_alone(channels: int, group_size: int, coarsest: int) -> nn.Sequential:
    """Down to ``coarsest`` channels and back, without blocks and skips: ``P_0 ... P_n R_n ... R_0``.

    Args:
        channels: Width of the features.
        group_size: Channels per group of R and P (``s_g``).
        coarsest: Width of the code (``s_c``).

    Shape:
        ``(N, channels, H, W)``, unchanged.

    Examples:
        >>> [sum(p.numel() for p in transfers_alone(64, s_g, 8).parameters()) for s_g in (32, 16, 8, 4)]
        [3328, 1792, 896, 448]
    """
    levels = plan_transfers(channels, group_size, coarsest)[:-1]
    pairs = [averaging_pair(level.channels, level.transfer_group_size) for level in levels]
    return nn.Sequential(*(R for R, _ in pairs), *(P for _, P in reversed(pairs)))


def second_moments(features: Iterable[Tensor]) -> Tensor:
    """Return the mean of ``x x^T`` over all positions of all feature maps, in float64.

    Args:
        features: Batches of features ``(N, C, H, W)``.

    Shape:
        ``(C, C)``

    Raises:
        UserError: If there are no features.

    Examples:
        >>> second_moments([torch.ones(1, 2, 4, 4), -torch.ones(3, 2, 4, 4)]).tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    total, count = torch.zeros(()), 0
    for batch in features:
        x = batch.detach().transpose(0, 1).flatten(1).double()
        total, count = total + x @ x.t(), count + x.shape[1]
    if not count:
        raise UserError("second moments of no features at all")
    return total / count


def reconstruction_error(transfers: nn.Module, moments: Tensor) -> Tensor:
    """Return the mean squared error per channel of features with these second moments, ``tr((I-A) M (I-A)^T) / C``.

    Args:
        transfers: Linear, ``(N, C, H, W) -> (N, C, H, W)``, without bias: ``A`` is its matrix.
        moments: ``M``, ``(C, C)``.

    Shape:
        ``()``; it has gradients.
    """
    dtype = next(transfers.parameters()).dtype
    unit = torch.eye(len(moments), dtype=dtype)
    missing = unit - transfers(unit[:, :, None, None])[:, :, 0, 0]  # row i: what is lost of channel i
    return torch.einsum("ic,ij,jc->", missing, moments.to(dtype), missing) / len(moments)


def _trees(levels: Sequence[Level]) -> tuple[int, int]:
    """Return how many channels of the code hang together, and in how many such trees the channels fall apart.

    Groups are nested where each level's number of groups is a multiple of the next one's. Then the trees are the groups
    of the last transfer, and no group on the way is narrower than what its tree has in the code: it limits nothing.
    """
    groups = [level.transfer_groups for level in levels[:-1]]
    if not groups:
        raise ChannelConfigError(f"no transfer: {levels[0].channels} channels are the coarsest grid already")
    trees = groups[-1]
    code = levels[-1].channels // trees
    nested = all(fine % coarse == 0 for fine, coarse in pairwise(groups))
    if not nested or any(level.transfer_group_size // 2 < code for level in levels[:-1]):
        widths = ", ".join(f"{level.channels} in {level.transfer_groups} groups" for level in levels[:-1])
        raise ChannelConfigError(f"the closed form needs groups that are nested: {widths} are not; take powers of two")
    return trees, code


def optimal_error(moments: Tensor, group_size: int, coarsest: int) -> float:
    """Return the least error any weights of `transfers_alone` can have on features with these second moments.

    The groups tie the channels together in independent trees: the ``C / T`` channels of each of the ``T`` trees are encoded
    in ``s_c / T`` numbers of their own. Within a tree every encoder and every decoder is within reach (`optimal_transfers`
    shows weights), so the best is the principal component analysis of each tree, without a mean, as nothing has a bias:
    what is lost are the smaller eigenvalues of the diagonal blocks of the second moments.

    Groups with ``s_g >= 2 s_c`` make a single tree. A larger ``s_g`` then only adds weights: the optimum is the same.

    Args:
        moments: ``(C, C)``, see `second_moments`.
        group_size: Channels per group (``s_g``).
        coarsest: Width of the code (``s_c``).

    Raises:
        ChannelConfigError: If the groups of the levels are not nested, or nothing is to be coarsened.

    Examples:
        >>> optimal_error(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])), group_size=4, coarsest=2)  # (2 + 1) / 4
        0.75
        >>> optimal_error(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])), group_size=2, coarsest=2)  # (3 + 1) / 4
        1.0
    """
    channels = len(moments)
    trees, code = _trees(plan_transfers(channels, group_size, coarsest))
    lost = [torch.linalg.eigvalsh(block)[:-code].sum() for block in _blocks(moments, trees)]
    return float(sum(lost)) / channels


def optimal_transfers(moments: Tensor, group_size: int, coarsest: int) -> nn.Sequential:
    """Return transfers that reach `optimal_error`: proof that the closed form is no mere bound.

    The finest R projects each group on its channels' part of the principal components; the coarser ones add the parts up.
    P is the transpose of R.

    Args:
        moments: ``(C, C)``.
        group_size: Channels per group (``s_g``).
        coarsest: Width of the code (``s_c``).
    """
    channels = len(moments)
    levels = plan_transfers(channels, group_size, coarsest)
    trees, code = _trees(levels)
    components = [torch.linalg.eigh(block).eigenvectors[:, -code:] for block in _blocks(moments, trees)]
    transfers = transfers_alone(channels, group_size, coarsest)
    parts = torch.cat(components).reshape(levels[0].transfer_groups, -1, code).mT  # of each group, (code, group size)
    weights = list(transfers.parameters())  # R_0 ... R_n, P_n ... P_0
    with torch.no_grad():
        for R, P, (level, coarser) in zip(weights, reversed(weights), pairwise(levels), strict=False):
            weight = torch.zeros(level.transfer_groups, level.transfer_group_size // 2, level.transfer_group_size)
            weight[:, :code] = parts
            R.copy_(weight.reshape(R.shape))
            P.copy_(weight.mT.reshape(P.shape))
            part = torch.eye(code, weight.shape[1])  # the code of one group among its outputs
            parts = part.repeat(1, level.transfer_groups // max(coarser.transfer_groups, 1))
    return transfers


def _blocks(moments: Tensor, trees: int) -> list[Tensor]:
    """The diagonal blocks: the second moments within each tree."""
    size = len(moments) // trees
    return [block[:, i * size : (i + 1) * size] for i, block in enumerate(torch.split(moments.double(), size))]


def train_transfers(
    moments: Tensor, group_size: int, coarsest: int, *, steps: int = 3000, seed: int = 0
) -> nn.Sequential:
    """Train `transfers_alone` to reproduce features with these second moments.

    L-BFGS on `reconstruction_error`, in float64: each step sees all features, through their second moments. These are scaled
    to a mean square of one, so that features of any size train alike. It starts from normal weights: those a block starts
    with are positive averages, which make all channels of the code alike, a saddle that holds long products of wide groups
    for thousands of steps. The trained weights are float32.

    Args:
        moments: ``(C, C)``, see `second_moments`.
        group_size: Channels per group (``s_g``).
        coarsest: Width of the code (``s_c``).
        steps: Most steps; fewer where nothing changes any more.
        seed: Decides the first weights.

    Raises:
        UserError: If the features are all zero, or not finite.
    """
    power = float(moments.trace()) / len(moments)
    if not 0 < power < float("inf"):
        raise UserError(f"features with a mean square of {power} cannot be encoded")
    transfers = transfers_alone(len(moments), group_size, coarsest).double()
    generator = torch.Generator().manual_seed(seed)
    for weight in transfers.parameters():
        nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=generator)
    optimizer = torch.optim.LBFGS(
        transfers.parameters(),
        max_iter=steps,
        max_eval=2 * steps,
        history_size=20,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def error() -> Tensor:
        optimizer.zero_grad()
        loss = reconstruction_error(transfers, moments / power)
        torch.autograd.backward(loss)
        return loss

    optimizer.step(error)  # type: ignore[no-untyped-call]
    return transfers.float()
