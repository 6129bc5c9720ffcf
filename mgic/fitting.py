"""A start from trained weights: the multigrid operators fitted to what they replaced.

A multigrid convolution is its kernel's block diagonal plus a part of low rank between the blocks, whose bases are nested from
level to level. With the bases known the rest is linear least squares, and with the rest known the best bases are singular
vectors: the two are found in turn, level by level (alternating least squares), in the norm of the features that the layer
really sees. Residual blocks are not linear: their levels start with averages of the block's own weights, as the Galerkin
operators of multigrid do, and are then trained to return what the block returns.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cycle import MGICBlock, MGICConv, MGICLinear, spread
from .errors import UserError
from .representation import second_moments
from .runtime.capture import eval_mode

_NORMS = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True)
class Fit:
    """How much of a replaced layer is kept.

    Args:
        name: Path of the layer in the network.
        fitted: Share of the energy of its output that the fitted operator reproduces, on the dense network's features
            (of a residual block: of what the block adds to its input); 1 is all.
        kept: The same after reconstruction, on the features that the converted network really feeds it.
    """

    name: str
    fitted: float
    kept: float

    def __str__(self) -> str:
        return f"{self.name:<32} {self.fitted:7.1%} of its energy fitted, {self.kept:7.1%} after reconstruction"


class Fits(list[Fit]):
    """The fits of a network's layers in its order; printed, one line each.

    Examples:
        >>> print(Fits([Fit("layer1.0", fitted=0.5, kept=0.75), Fit("layer2.0", fitted=1.0, kept=1.0)]))
        layer1.0                           50.0% of its energy fitted,   75.0% after reconstruction
        layer2.0                          100.0% of its energy fitted,  100.0% after reconstruction
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def warm_start_(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Tensor],
    *,
    steps: int = 100,
    lr: float = 1e-3,
    seed: int = 0,
) -> Fits:
    """Fit the multigrid layers of a converted network to the trained network it was made of, in place.

    Convolutions are fitted in closed form (`fit_convolution_`), weighted by the second moments of their inputs. Then, one
    layer after the other, each is trained for ``steps`` steps of Adam to return what the dense layer returns in the dense
    network, from what the converted network feeds it, so that errors are made good further on.

    Linear layers (`MGICLinear`) are left as they are.

    Args:
        model: The converted network, as `mgic.convert` returned it.
        dense: The trained network itself; left as it is.
        batches: A few batches of inputs, ``(N, C, H, W)``; kept in memory. Labels are not needed.
        steps: Steps of each layer's reconstruction; 0 for the closed form alone.
        lr: Rate of Adam.
        seed: Draws the batch of each step.

    Returns:
        How much of each layer is kept, in the order of the network.

    Raises:
        UserError: There are no batches, or nothing in the network but linear layers stands for a layer of the dense one.
    """
    images = list(batches)
    if not images or not all(isinstance(x, Tensor) and x.numel() for x in images):
        raise UserError("a warm start needs calibration data: batches of inputs of the network, tensors alone")
    like = next(dense.parameters(), images[0])
    for x in images:
        if x.dtype != like.dtype or x.device != like.device:
            raise UserError(f"calibration data is {x.dtype} on {x.device}, the network {like.dtype} on {like.device}")
        if not x.isfinite().all():
            raise UserError("calibration data holds a number that is not finite")
    if steps < 0 or lr <= 0:
        raise UserError(f"steps={steps} must not be negative and lr={lr} must be positive")
    names = _replaced(model, dense)
    generator = torch.Generator().manual_seed(seed)
    fits = Fits()
    with eval_mode(model), eval_mode(dense), torch.enable_grad():
        for name in names:
            new, old = model.get_submodule(name), dense.get_submodule(name)
            seen = _features(dense, name, images)
            fitted = _fit_(new, old, seen)
            fed = _features(model, name, images)
            pairs = [(x, y) for (x, _), (_, y) in zip(fed, seen, strict=True)]
            _reconstruct_(new, pairs, steps, lr, generator)
            fits.append(Fit(name, fitted, _share(new, pairs)))
    return fits


def fit_convolution_(layer: MGICConv, weight: Tensor, moments: Tensor | None = None, sweeps: int = 3) -> float:
    """Fit a multigrid convolution to the kernel of a dense one; return the share of its energy that is kept.

    Minimises ``|(W - W') C^(1/2)|`` over all weights of the layer, where ``W'`` is the kernel it stands for: the mean squared
    error of the output for inputs of second moments ``C`` that are not correlated from pixel to pixel.

    Args:
        layer: The layer; its bias is left as it is.
        weight: ``(out_channels, in_channels, kH, kW)``.
        moments: ``(in_channels, in_channels)``, see `mgic.representation.second_moments`; the identity by default.
        sweeps: Alternations on each level.

    Raises:
        UserError: If the shapes do not fit.
    """
    shape = tuple(layer.dense_weight().shape)
    if tuple(weight.shape) != shape:
        raise UserError(f"the kernel of shape {tuple(weight.shape)} is not that of the layer, {shape}")
    if moments is None:
        moments = torch.eye(shape[1], device=weight.device)
    if tuple(moments.shape) != (shape[1], shape[1]):
        raise UserError(f"moments of shape {tuple(moments.shape)} are not those of {shape[1]} channels")
    W, C = weight.detach().double().flatten(2), moments.detach().double().to(weight.device)
    C = C + 1e-6 * C.diagonal().mean().clamp_min(1e-30) * torch.eye(len(C), dtype=C.dtype, device=C.device)
    with torch.no_grad():
        found = _fit_level(layer, 0, W, C, sweeps)
        whole = _energy(W, C)
        return 1.0 - float(_energy(W - found, C) / whole) if whole > 0 else 1.0


def _energy(W: Tensor, C: Tensor) -> Tensor:
    return (_weighted(W, C) * W).sum()


def _weighted(W: Tensor, C: Tensor) -> Tensor:
    """A kernel ``(out, in, pixels)`` times a matrix of its inputs."""
    return torch.einsum("oik,ij->ojk", W, C)


def _fit_level(layer: MGICConv, j: int, W: Tensor, C: Tensor, sweeps: int) -> Tensor:
    """Fit level ``j`` and all coarser ones to the kernel ``W``, ``(out, in, pixels)``; return what they stand for."""
    conv: Any = layer.relax[j]
    if j == len(layer.restrict):
        conv.weight.copy_(W.view(conv.weight.shape))
        return W
    R, P, groups = layer.restrict[j], layer.prolong[j], conv.groups
    best: tuple[float, list[Tensor], Tensor] | None = None
    parts: list[Any] = [R, P, *layer.relax[j:], *layer.restrict[j + 1 :], *layer.prolong[j + 1 :]]
    K = W.new_zeros(W.shape)
    D = W - _diagonal(W, groups)  # the diagonal blocks are the finest level's own: any value does for a start
    for _ in range(sweeps):
        _choose_bases_(R, P, D, C)
        r, p = spread(R)[:, :, 0, 0].double(), spread(P)[:, :, 0, 0].double()
        coarse = r @ C @ r.t()
        target = _weighted(_weighted(torch.einsum("oa,oik->aik", p, D), C), r.t())
        target = torch.linalg.solve(coarse, target.transpose(1, 2), left=False).transpose(1, 2)
        found = _fit_level(layer, j + 1, target, coarse, 1 if sweeps == 1 else 2)
        between = torch.einsum("oa,aik->oik", p, _weighted(found, r))
        K = _solve_diagonal(W - between, C, groups)
        conv.weight.copy_(torch.cat(list(_blocks(K, groups))).view(conv.weight.shape))
        whole = K + between
        error = float(_energy(W - whole, C))
        if best is None or error < best[0]:
            best = error, [part.weight.detach().clone() for part in parts], whole
        D = W - K
    assert best is not None
    for part, weight in zip(parts, best[1], strict=True):
        part.weight.copy_(weight)
    return best[2]


def _blocks(W: Tensor, groups: int) -> Iterator[Tensor]:
    """The diagonal blocks of a kernel."""
    rows, columns = W.shape[0] // groups, W.shape[1] // groups
    for g in range(groups):
        yield W[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns]


def _diagonal(W: Tensor, groups: int) -> Tensor:
    """A kernel's block diagonal, zero elsewhere."""
    kept = torch.zeros_like(W)
    for block, place in zip(_blocks(W, groups), _blocks(kept, groups), strict=True):
        place.copy_(block)
    return kept


def _solve_diagonal(W: Tensor, C: Tensor, groups: int) -> Tensor:
    """The block diagonal nearest to a kernel in the norm of ``C``."""
    nearest = torch.zeros_like(W)
    rows, columns = W.shape[0] // groups, W.shape[1] // groups
    for g, place in enumerate(_blocks(nearest, groups)):
        inside = slice(g * columns, (g + 1) * columns)
        right = _weighted(W[g * rows : (g + 1) * rows], C[:, inside])
        place.copy_(torch.linalg.solve(C[inside, inside], right.transpose(1, 2), left=False).transpose(1, 2))
    return nearest


def _choose_bases_(R: Any, P: Any, D: Tensor, C: Tensor) -> None:
    """Set R and P to the leading singular vectors of their rows and columns of ``D``, in the norm of ``C``."""
    size = P.out_channels // P.groups
    rows, weighted = (M.reshape(P.groups, size, -1) for M in (D, _weighted(D, C)))
    gram = weighted @ rows.transpose(1, 2)
    P.weight.copy_(torch.linalg.eigh(gram).eigenvectors[:, :, size - size // 2 :].reshape(P.weight.shape))
    size = R.in_channels // R.groups
    for g in range(R.groups):
        inside = slice(g * size, (g + 1) * size)
        half = torch.linalg.cholesky(C[inside, inside])  # columns h: D_h x_h with x_h = half z and z white
        white = _weighted(D[:, inside], half).transpose(0, 1).flatten(1)
        vectors = torch.linalg.eigh(white @ white.t()).eigenvectors[:, size - size // 2 :]
        basis = torch.linalg.solve_triangular(half.t(), vectors, upper=True)  # R x = vectors^T half^-1 x
        R.weight[g * (size // 2) : (g + 1) * (size // 2)] = torch.linalg.qr(basis).Q.t()[:, :, None, None]


def _replaced(model: nn.Module, dense: nn.Module) -> list[str]:
    """Names of the multigrid layers that stand where the dense network has a layer or block of its own."""
    theirs = dict(dense.named_modules())
    kinds = (MGICBlock, MGICConv)
    names: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{n}.") or not n for n in names)
        if isinstance(module, kinds) and not inside and name in theirs and not isinstance(theirs[name], kinds):
            names.append(name)
    if not names:
        linear = [name for name, module in model.named_modules() if isinstance(module, MGICLinear)]
        if linear:
            some = ", ".join(linear[:3]) + (" ..." if len(linear) > 3 else "")
            raise UserError(
                f"nothing to fit: only linear layers were replaced ({some}), and MGICLinear layers are not fitted: train them"
            )
        raise UserError(
            "nothing to fit: the network holds no multigrid layer where the dense one has a layer of its own"
        )
    return names


class _Reached(Exception):  # noqa: N818  (ends a forward pass early)
    pass


@torch.no_grad()
def _features(network: nn.Module, name: str, images: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Inputs and outputs of a layer; a layer that is called several times gives those of its first call."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append((args[0].detach().clone(), output.detach().clone()))
        raise _Reached

    handle = network.get_submodule(name).register_forward_hook(keep)
    try:
        for x in images:
            try:
                network(x)
            except _Reached:
                continue
    finally:
        handle.remove()
    return seen


def _fit_(new: nn.Module, old: nn.Module, seen: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Set a layer to the best start there is; return the share of the energy it reproduces."""
    if isinstance(new, MGICConv):
        conv: Any = old
        return fit_convolution_(new, conv.weight, second_moments(x for x, _ in seen))
    assert isinstance(new, MGICBlock)
    _average_(new, old)
    _set_norms_(new, [x for x, _ in seen])
    return _share(new, seen)


@torch.no_grad()
def _share(layer: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """One minus the squared error over the energy of the output, of a residual block: of what it adds to its input."""
    block = isinstance(layer, MGICBlock)
    error = sum(float((layer(x) - y).double().square().sum()) for x, y in pairs)
    whole = sum(float((y - x if block else y).double().square().sum()) for x, y in pairs)
    return 1.0 - error / whole if whole > 0 else 1.0


@torch.no_grad()
def _average_(new: MGICBlock, old: nn.Module) -> None:
    """Start every level with averages of the block's weights: ``R W P`` with R the mean of neighbours, P its copies."""
    for relax in new.relax:
        twins = dict(relax.named_modules())
        for name, module in old.named_modules():
            for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                place: Tensor = getattr(twins[name], key)
                if value.shape == place.shape:
                    place.copy_(value)
                elif isinstance(module, nn.Conv2d) and key == "weight":
                    place.copy_(_averaged_kernel(module, twins[name]))
                else:
                    axis = next(a for a in range(value.ndim) if value.shape[a] != place.shape[a])
                    place.copy_(_averaged(value, axis, place.shape[axis]))
    transfers: Any = zip(new.restrict, new.prolong, strict=True)
    for R, P in transfers:
        pairs = torch.eye(R.out_channels // R.groups).repeat_interleave(2, 0)
        P.weight.copy_(pairs.repeat(P.groups, 1)[:, :, None, None])
        R.weight.copy_(pairs.t().repeat(R.groups, 1)[:, :, None, None] / 2)


def _averaged(value: Tensor, axis: int, size: int) -> Tensor:
    """Means of neighbours along an axis; where the sizes do not divide, the first entries."""
    if value.shape[axis] % size:
        return value.narrow(axis, 0, size)
    shape = value.shape
    return value.reshape(*shape[:axis], size, -1, *shape[axis + 1 :]).mean(axis + 1)


def _averaged_kernel(conv: nn.Conv2d, twin: Any) -> Tensor:
    """The kernel of a narrower convolution in groups: sums over neighbouring inputs, means over neighbouring outputs."""
    dense = spread(conv)
    kernel = _averaged(_averaged(dense, 0, twin.out_channels), 1, twin.in_channels)
    kernel = kernel * (conv.in_channels / twin.in_channels)
    groups = twin.groups
    rows, columns = kernel.shape[0] // groups, kernel.shape[1] // groups
    return torch.cat([kernel[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] for g in range(groups)])


@torch.no_grad()
def _set_norms_(block: MGICBlock, inputs: Sequence[Tensor]) -> None:
    """Let the norms after prolongations start as the identity on the features they see."""
    x = torch.cat(list(inputs)) if len({t.shape[1:] for t in inputs}) == 1 else inputs[0]
    for norm in reversed(list(block.norm)):  # the coarsest correction comes first
        if not isinstance(norm, _NORMS) or norm.running_mean is None or norm.running_var is None:
            continue
        seen: list[Tensor] = []
        handle = norm.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        block(x)
        handle.remove()
        mean, variance = seen[0].mean((0, 2, 3)), seen[0].var((0, 2, 3), unbiased=False)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt())
        norm.bias.copy_(mean)


def _reconstruct_(
    layer: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]], steps: int, lr: float, generator: torch.Generator
) -> None:
    """Train a layer to return the second of each pair for the first; keep what it was where that is no better."""
    parameters = [p for p in layer.parameters() if p.requires_grad]
    if not steps or not parameters:
        return
    gradients = [p.grad for p in parameters]
    before, error = copy.deepcopy(layer.state_dict()), _error(layer, pairs)
    optimizer = torch.optim.Adam(parameters, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, y = pairs[int(torch.randint(len(pairs), (), generator=generator))]
        loss = F.mse_loss(layer(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient
    if not _error(layer, pairs) < error:
        layer.load_state_dict(before)


@torch.no_grad()
def _error(layer: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    return sum(float((layer(x) - y).double().square().sum()) for x, y in pairs)
