"""What networks can be fed: an input that none of them can read is refused before its first layer changes anything."""

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError


def check_images(network: nn.Module, x: Tensor, stride: int) -> None:
    """Refuse images of a wrong type, without pixels, and one so small that its batch norms could not be trained on it.

    The checks read the tensor's type and shape alone, so they cost nothing and leave no trace in a traced network.

    Args:
        network: The network.
        x: What it was called with.
        stride: Of its coarsest features, which are normed.

    Raises:
        TypeError: These are no floating-point numbers.
        UserError: The shape is not ``(N, C, H, W)`` with at least one pixel, or in training a batch norm would see one value.
    """
    if is_traced(x):
        return
    _check_type(x)
    if x.dim() != 4:
        hint = "; one image is x[None]" if x.dim() == 3 else ""
        raise UserError(f"expected images (N, C, H, W), got shape {tuple(x.shape)}{hint}")
    batch, _, height, width = x.shape
    if height < 1 or width < 1:
        raise UserError(f"images of {height}x{width} pixels: the smallest possible are 1x1")
    if network.training and batch == 1 and height <= stride and width <= stride and _norms_by_batch(network):
        raise UserError(
            f"training on one image of {height}x{width} leaves batch norms a single value to norm, behind a stride of "
            f"{stride}: give at least 2 images, or one larger than {stride}x{stride}, or build the network with another norm"
        )


def check_samples(network: nn.Module, x: Tensor, dims: int, what: str) -> None:
    """Refuse samples of a wrong type or shape, and one alone where its batch norms could not be trained on it.

    Args:
        network: The network, whose head norms one value a sample.
        x: What it was called with.
        dims: Dimensions it should have.
        what: What it should be, for the message.

    Raises:
        TypeError: These are no floating-point numbers.
        UserError: The number of dimensions is another, or in training a batch norm would see one value.
    """
    if is_traced(x):
        return
    _check_type(x)
    if x.dim() != dims:
        raise UserError(f"expected {what}, got shape {tuple(x.shape)}")
    if network.training and x.shape[0] == 1 and _norms_by_batch(network):
        raise UserError(
            "training on a batch of 1 leaves batch norms a single value to norm: give at least 2 samples, or build the "
            "network with another norm"
        )


def is_traced(x: object) -> bool:
    """Whether this is the stand-in that ``torch.fx`` traces with, which has neither type nor shape."""
    return isinstance(x, Proxy)


def _check_type(x: Tensor) -> None:
    if not x.dtype.is_floating_point:
        hint = "x.float() / 255, then the normalisation of training" if x.dtype.itemsize == 1 else "x.float()"
        raise TypeError(f"networks take floating-point numbers, got {x.dtype}: convert them first ({hint})")


def _norms_by_batch(network: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) and module.training for module in network.modules())
