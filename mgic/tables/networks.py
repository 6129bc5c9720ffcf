"""Which network a row of a table is, and what it counts. Networks are built on the meta device, each counted once."""

import warnings
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import get_model

from ..counting import Cost, cost
from ..models import create_model
from ..models.mgnet import MgNet, paper_weights
from ..representation import transfers_alone
from ..transfer import SparsePointwise
from .printed import Values


class Network(NamedTuple):
    """What builds a row's network: a function and its arguments, so that a network in several tables is counted once."""

    make: Callable[..., nn.Module]
    arguments: tuple[tuple[str, Any], ...] = ()

    def build(self) -> nn.Module:
        """Build it on the meta device, where weights take neither time nor memory."""
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a published setting stays as it is, advisable or not
            return self.make(**{name: _given(value) for name, value in self.arguments})


def named_network(name: str, overrides: Values, library: str = "mgic") -> Network:
    """Return what builds a network of a library, with these arguments."""
    return Network(_maker(library, name), tuple((key, _hashable(value)) for key, value in overrides.items()))


@cache
def _maker(library: str, name: str) -> Callable[..., nn.Module]:
    return partial(get_model if library == "torchvision" else create_model, name)


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return frozenset((key, _hashable(inner)) for key, inner in value.items())
    return tuple(value) if isinstance(value, list) else float(value) if isinstance(value, Decimal) else value


def _given(value: Any) -> Any:
    """What `_hashable` was given, as a network takes it."""
    return {key: _given(inner) for key, inner in value} if isinstance(value, frozenset) else value


def row_network(table_id: str, row: Values) -> tuple[str | None, dict[str, Any], Network | None]:
    """Return a row's model, its overrides and what builds it: None where the row names no network."""
    if "settings" in row:
        return UNNAMED[table_id](row)
    name, library, overrides = row.get("model"), row.get("library", "mgic"), dict(row.get("overrides", {}))
    return name, overrides, None if name is None else named_network(name, overrides, library)


def _transfers(row: Values) -> tuple[str | None, dict[str, Any], Network]:
    return None, {}, Network(transfers_alone, tuple(row["settings"].items()))


def _dense_2020(row: Values) -> tuple[str | None, dict[str, Any], Network]:
    classes = int(row["dataset"].removeprefix("CIFAR-"))
    overrides = {**row["settings"], "multigrid": False, "num_classes": classes}
    return "mg_resnet_cifar", overrides, named_network("mg_resnet_cifar", overrides)


UNNAMED = {"mgic-1": _transfers, "mg2020-1": _dense_2020}
"""By table: the networks of rows that state settings but no name."""


@cache
def network_cost(network: Network, input_size: tuple[int, ...]) -> Cost:
    """Count a network, each once."""
    return cost(_Disposable(network.build()), input_size)


def row_counts(network: Network, size: Sequence[int], table_id: str) -> dict[str, int]:
    """Return what a row's network counts; of MGiaD with the weights as its tables count them."""
    counted = network_cost(network, tuple(size))
    counts = {"params": counted.params, "macs": counted.macs}
    family, _, number = table_id.rpartition("-")
    weights = _paper_weights(network, int(number)) if family == "mgiad" else None
    return counts if weights is None else {**counts, "paper_weights": weights}


@cache
def _paper_weights(network: Network, table: int) -> int | None:
    model = network.build()
    return paper_weights(model, table) if isinstance(model, MgNet) else None


class _Disposable(nn.Module):
    """A network that is built to be counted and thrown away, in half of the time.

    It stands for its own copy, leaves out norms and activations (no multiply-adds, no change of shape), and does not fill
    the matrices of sparse transfers, which are as large filled or empty.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.ReLU | nn.ReLU6 | nn.Hardswish):
                module.forward = _unchanged  # type: ignore[method-assign, assignment]
            elif isinstance(module, SparsePointwise):
                size = (module.out_channels, module.in_channels)
                module.matrix = partial(torch.empty, size, device="meta")  # type: ignore[method-assign]

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Disposable":
        return self

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


def _unchanged(x: Tensor) -> Tensor:
    return x
