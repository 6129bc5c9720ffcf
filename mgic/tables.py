"""The papers' tables and figures: each printed number beside what the library counts and has measured.

The printed numbers are those of ``papers.toml``, digit for digit. Our counts are exact, of networks that are built here and
now; other readings of a text stand beside them under names of their own. Our accuracies come from records only.
"""

import math
import re
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.layers import ClassifierHead, NormMlpClassifierHead, SqueezeExcite
from torch import Tensor, nn
from torchvision.models import get_model

from .blocks import Layer
from .counting import Cost, cost
from .cycle import MGICBlock, Scheme
from .errors import UserError, suggest
from .hierarchy import Level, plan_levels
from .models import create_model
from .models.mg2020 import MG2020
from .models.mgnet import MgNet, paper_weights
from .models.mobilenetv3 import round_width
from .models.points import GraphStage
from .models.resnet import MGIC_RESNET
from .representation import transfers_alone
from .transfer import SparsePointwise

Row = Mapping[str, Any]


@cache
def papers() -> dict[str, Any]:
    """Return ``papers.toml``; its decimal numbers keep their digits."""
    return tomllib.loads(files("mgic").joinpath("papers.toml").read_text(encoding="utf-8"), parse_float=Decimal)


def table_ids() -> list[str]:
    """Return the names of all tables, in the order of the papers."""
    return list(papers()["tables"])


class Network(NamedTuple):
    """What builds a row's network: a function and its arguments, so that a network in several tables is counted once."""

    make: Callable[..., nn.Module]
    arguments: tuple[tuple[str, Any], ...] = ()

    def build(self) -> nn.Module:
        """Build it on the meta device, where weights take neither time nor memory."""
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a published setting stays as it is, advisable or not
            return self.make(**{name: _given(value) for name, value in self.arguments})


@cache
def _maker(library: str, name: str) -> Callable[..., nn.Module]:
    return partial(get_model if library == "torchvision" else create_model, name)


def named_network(name: str, overrides: Row, library: str = "mgic") -> Network:
    """Return what builds a network of a library, with these arguments."""
    return Network(_maker(library, name), tuple((key, _hashable(value)) for key, value in overrides.items()))


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return frozenset((key, _hashable(inner)) for key, inner in value.items())
    return tuple(value) if isinstance(value, list) else float(value) if isinstance(value, Decimal) else value


def _given(value: Any) -> Any:
    """What `_hashable` was given, as a network takes it."""
    return {key: _given(inner) for key, inner in value} if isinstance(value, frozenset) else value


def _transfers(row: Row) -> tuple[str | None, dict[str, Any], Network]:
    return None, {}, Network(transfers_alone, tuple(row["settings"].items()))


def _dense_2020(row: Row) -> tuple[str | None, dict[str, Any], Network]:
    classes = int(row["dataset"].removeprefix("CIFAR-"))
    overrides = {**row["settings"], "multigrid": False, "num_classes": classes}
    return "mg_resnet_cifar", overrides, named_network("mg_resnet_cifar", overrides)


UNNAMED = {"mgic-1": _transfers, "mg2020-1": _dense_2020}
"""By table: the networks of rows that state settings but no name."""


def _network(table_id: str, row: Row) -> tuple[str | None, dict[str, Any], Network | None]:
    """Return a row's model, its overrides and what builds it: None where the row names no network."""
    if "settings" in row:
        return UNNAMED[table_id](row)
    name, library, overrides = row.get("model"), row.get("library", "mgic"), dict(row.get("overrides", {}))
    return name, overrides, None if name is None else named_network(name, overrides, library)


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


@cache
def network_cost(network: Network, input_size: tuple[int, ...]) -> Cost:
    """Count a network, each once."""
    return cost(_Disposable(network.build()), input_size)


@cache
def _paper_weights(network: Network, table: int) -> int | None:
    model = network.build()
    return paper_weights(model, table) if isinstance(model, MgNet) else None


class _Uncounted(nn.Module):
    """A transfer of ``weights`` parameters whose multiply-adds nobody counts."""

    def __init__(self, weights: int, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(weights))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)


def _uncounted_pair(masked: bool, channels: int, group_size: int) -> tuple[nn.Module, nn.Module]:
    """R and P as the MACs of print seem to see them; ``masked``: each stored dense, with a mask of the same size."""
    weights = channels * channels if masked else channels * group_size // 2
    halve: Callable[[Tensor], Tensor] = lambda x: x[:, ::2]  # noqa: E731
    return _Uncounted(weights, halve), _Uncounted(weights, partial(torch.repeat_interleave, repeats=2, dim=1))


Reading = tuple[str, Callable[[Any], dict[str, Any]]]
"""What it is called, and ``s_g -> overrides``; dense networks have no ``s_g``."""

_NO_COARSENING: Reading = ("text: no coarsening of blocks that are no wider than s_c", lambda s_g: {"scheme": Scheme()})
_POOL_FIRST: Reading = (
    "the same function for less: the mean before the gate's convolution",
    lambda s_g: {"pool_first": True},
)


def _any_two_groups(channels: int, group_size: int, coarsest: int, hidden: int | None) -> list[Level]:
    """Algorithm 1's number of levels; at least two groups, as few more as needed to divide both widths."""
    inner = channels if hidden is None else hidden
    coarsenings, levels = max(math.floor(math.log2(min(channels, inner) / coarsest)), 0), []
    for _ in range(coarsenings):
        common = math.gcd(channels, inner)
        groups = max(g for g in range(1, max(min(channels, inner) // group_size, 2) + 1) if common % g == 0)
        levels.append(Level(channels, groups, inner, math.gcd(groups, channels // 2)))
        channels, inner = channels // 2, inner // 2
    return [*levels, Level(channels, 1, inner, 0)]


def _finest_attention(hidden: int) -> Layer:
    """Squeeze-and-excitation with a quarter inside, as MobileNetV3 has it, on a block's finest level alone."""

    def attention(channels: int) -> nn.Module:
        if channels != hidden:
            return nn.Identity()
        return SqueezeExcite(channels, rd_channels=round_width(channels / 4), gate_layer="hard_sigmoid")

    return attention


_FITTED_SEGMENTATION: Reading = (
    "fitted to print: Algorithm 1's levels, other groups, larger attention on the finest level alone",
    lambda s_g: {"scheme": Scheme(plan=_any_two_groups), "attention": _finest_attention},
)
READINGS: dict[str, tuple[Reading, ...]] = {
    "mgic_resnet50": (
        (
            "text: R and P in groups of s_g channels",
            lambda s_g: {"scheme": Scheme(plan=partial(plan_levels, minimum=1, transfer_group_size=s_g))},
        ),
        ("Table 4: with its second convolution, 3x3 at 112 x 112", lambda s_g: {"extra_conv": True}),
        _NO_COARSENING,
        (
            "fitted to print: R and P left out of the MACs",
            lambda s_g: {"scheme": replace(MGIC_RESNET, transfer=partial(_uncounted_pair, False))},
        ),
    ),
    "mgic_resnet56": (
        _NO_COARSENING,
        (
            "fitted to print: R and P stored dense with masks, and left out of the MACs",
            lambda s_g: {"scheme": replace(MGIC_RESNET, transfer=partial(_uncounted_pair, True))},
        ),
    ),
    "mg_mobilenetv2": (("section 4.1: random R and P", lambda s_g: {"scheme": MG2020}),),
    "dgcnn": (("fitted to print: the edge convolution on one edge a point", lambda s_g: {"k": 1}),),
    "lraspp_mobilenetv3_small": (_POOL_FIRST,),
    "lraspp_mobilenetv3_large": (_POOL_FIRST,),
    "mgic_lraspp_small": (_FITTED_SEGMENTATION,),
    "mgic_lraspp_large": (_FITTED_SEGMENTATION,),
}
"""By model: what else its text can mean, and conventions found by fitting; never the count."""


SUFFIX = {"1e3": " k", "1e6": " M", "1e9": " G"}


def _number(value: Any, unit: str) -> Any:
    """Return a printed value as a plain number: counts in ones, all else in its unit."""
    if isinstance(value, Decimal | int) and not isinstance(value, bool):
        scaled = value * Decimal(unit) if unit in SUFFIX else Decimal(value)
        return int(scaled) if scaled == int(scaled) else float(scaled)
    return value


def _text(value: Any, unit: str) -> str:
    return f"{value}{SUFFIX.get(unit, '')}"


def _deviation(counts: Mapping[str, int | None], printed: Row) -> dict[str, float]:
    """Return, in per cent, how far counts are from print; the paper's own bookkeeping is held against its params."""
    said = {**printed, "paper_weights": printed.get("params")}
    return {key: round(100 * (n / said[key] - 1), 2) for key, n in counts.items() if n and said.get(key)}


def _counts(network: Network, size: Sequence[int], table_id: str) -> dict[str, int]:
    counted = network_cost(network, tuple(size))
    counts = {"params": counted.params, "macs": counted.macs}
    family, _, number = table_id.rpartition("-")
    weights = _paper_weights(network, int(number)) if family == "mgiad" else None
    return counts if weights is None else {**counts, "paper_weights": weights}


def _readings(name: str | None, overrides: Row, row: Row) -> Iterator[tuple[str, Network]]:
    for label, more in READINGS.get(str(name), ()):
        yield label, named_network(str(name), {**overrides, **more(overrides.get("group_size"))})
    if "overrides" in (should_be := row.get("should_be", {})):
        changed = {key: value for key, value in should_be["overrides"].items() if value != overrides[key]}
        words = ", ".join(f"{key}={value}" for key, value in changed.items())
        yield f"misprint read as {words}", named_network(str(name), should_be["overrides"])


def _source(table: Row, row: Row) -> str:
    place = row.get("place", f"{table.get('table', table.get('figure'))}, section {table['section']}")
    return f"{table['paper']}, {place}"


def _remarks(row: Row, units: Row) -> dict[str, Any]:
    should_be = {
        key: _number(value, units.get(key, "1")) for key, value in row.get("should_be", {}).items() if key in units
    }
    variants = [{key: _plain(value) for key, value in variant.items()} for variant in row.get("variants", [])]
    return {
        "misprint": row.get("misprint"),
        "should_be": should_be or _plain(row.get("should_be")),
        "variants": variants,
        "note": row.get("note"),
    }


def _plain(value: Any) -> Any:
    """Return JSON's types."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def results_row(table_id: str, table: Row, row: Row, records: Sequence[Row]) -> dict[str, Any]:
    """Return one row of a table of results, as `build_table` has it."""
    units, size = table["units"], table["input_size"]
    name, overrides, network = _network(table_id, row)
    printed = {key: _number(row[key], unit) for key, unit in units.items() if key in row}
    counts = _counts(network, size, table_id) if network else None
    readings = []
    for label, other in _readings(name, overrides, row) if network else ():
        more = _counts(other, size, table_id)
        readings.append({"reading": label, **more, "deviation": _deviation(more, printed)})
    return {
        "row": row["row"],
        "rival": row.get("theirs", False),
        "dataset": row.get("dataset", table["dataset"]),
        "model": name,
        "library": row.get("library", "mgic" if name else None),
        "overrides": _plain(overrides),
        "printed": printed,
        "as_printed": {key: _text(row[key], unit) for key, unit in units.items() if key in row},
        "ours": counts,
        "deviation": _deviation(counts or {}, printed),
        "readings": readings,
        "accuracy": _accuracy(name, overrides, row.get("dataset", table["dataset"]), records) if network else None,
        "source": _source(table, row),
        **_remarks(row, units),
    }


def _same_network(one: nn.Module, other: nn.Module) -> bool:
    """Tell whether two networks are module by module of the same kind, with the same public attributes."""

    def trait(value: Any) -> Any:  # two equal partials are not equal to Python
        return (value.func, value.args, value.keywords) if isinstance(value, partial) else value

    def traits(model: nn.Module) -> list[Any]:
        return [(type(m), {k: trait(v) for k, v in vars(m).items() if not k.startswith("_")}) for m in model.modules()]

    return traits(one) == traits(other)


def _data_name(name: str) -> str:
    """``CIFAR-10``, ``cifar10`` and ``folder/cifar10.npz`` are one data set."""
    return re.sub(r"[\W_]", "", Path(name).stem.lower())


def matching_records(name: str | None, overrides: Row, dataset: str, records: Sequence[Row]) -> Iterator[Row]:
    """Yield the records of a row's network on all of a row's data; arguments that are left out are their defaults."""
    for record in records:
        recipe = record.get("recipe")  # only a training has one
        if recipe is None or recipe["model"] != name or _data_name(recipe["data"]) != _data_name(dataset):
            continue
        if recipe.get("data_args", {}).get("train_images") is not None:  # an experiment on a part of them
            continue
        implied = {key: value for key, value in overrides.items() if key in ("num_classes", "in_chans")}
        trained = named_network(str(name), {**implied, **recipe["model_args"]})
        if _same_network(trained.build(), named_network(str(name), overrides).build()):
            yield record


def _accuracy(name: str | None, overrides: Row, dataset: str, records: Sequence[Row]) -> dict[str, Any] | None:
    """Return what the longest training of a row's network reached: accuracy, or mean IoU."""
    found = list(matching_records(name, overrides, dataset, records))
    if not found:
        return None
    record = max(found, key=lambda record: (record["recipe"]["epochs"], record["n"], record["date"]))
    metrics = record["metrics"]
    score = "miou" if "test_miou" in metrics else "accuracy"
    return {
        **{kind: {k: metrics[f"{kind}_{score}"][k] for k in ("mean", "std")} for kind in ("train", "test")},
        "n": record["n"],
        "epochs": record["recipe"]["epochs"],
        "data": record["data"],
        "record": record["file"],
    }


def _size(shape: Sequence[int]) -> str:
    """Write ``(N, C, H, W)`` as the papers do, ``H^2 x C``."""
    channels, *spatial = shape[1:]
    if len(spatial) < 2:
        return " x ".join(map(str, (*spatial, channels)))
    sides = sorted(set(spatial))
    return f"{sides[0]}^2 x {channels}" if len(sides) == 1 else f"{'x'.join(map(str, spatial))} x {channels}"


def _kernel(conv: nn.Module) -> str:
    size, stride = conv.kernel_size, conv.stride
    side, step = (v if isinstance(v, int) else v[0] for v in (size, stride))  # type: ignore[index]
    groups = getattr(conv, "groups", 1)
    return f"{side}x{side}" + (f" in {groups} groups" if groups > 1 else "") + (f" / {step}" if step != 1 else "")


def _describe(module: nn.Module) -> str:
    if isinstance(module, MGICBlock):
        return f"MGIC {type(module.relax[0]).__name__}, {module.extra_repr()}"
    if isinstance(module, nn.Linear):
        return "FC"
    conv = getattr(module, "conv", module)
    return type(module).__name__ + (f" {_kernel(conv)}" if hasattr(conv, "kernel_size") else "")


@dataclass
class _Layer:
    """A layer of a built network, or the repeated blocks of a stage with the change before them."""

    stage: str
    text: str
    input: tuple[int, ...]
    output: tuple[int, ...]
    module: nn.Module
    repetitions: int = 1

    def facts(self) -> dict[str, Any]:
        """Return what tables of layers print."""
        facts: dict[str, Any] = {
            "input": _size(self.input),
            "layer": self.text,
            "repetitions": self.repetitions,
            "c_in": self.input[1],
            "c_out": self.output[1],
            "pool": len(self.output) == 4 and self.input[2] == 2 * self.output[2],
            "se": any(isinstance(m, SqueezeExcite) for m in self.module.modules()),
        }
        if isinstance(self.module, MGICBlock):
            convs = [m for m in self.module.relax[0].modules() if isinstance(m, nn.Conv2d)]
            facts["kernels"] = [f"{_kernel(conv).split()[0]}, {conv.out_channels}" for conv in convs]
            finest = self.module.levels[0]
            facts |= {"exp": finest.hidden, "expansion": finest.hidden // finest.channels}
        return facts


CONTAINERS = (nn.Sequential, nn.ModuleList, GraphStage, ClassifierHead, NormMlpClassifierHead)


def _run_layers(model: nn.Module, input_size: Sequence[int]) -> list[_Layer]:
    """Return the layers of a network on the meta device in the order in which they run, containers opened."""
    layers: list[_Layer] = []

    def note(place: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if any(True for _ in module.parameters()) or inputs[0].numel() != output.numel():  # not what only reshapes
            stage = place.rpartition(".")[0]
            taken = (*inputs[0].shape, *[1] * (1 + len(input_size) - inputs[0].dim()))  # a vector is a single position
            layers.append(_Layer(stage, _describe(module), taken, tuple(output.shape), module))

    def watch(place: str, module: nn.Module) -> None:
        if not place or type(module) in CONTAINERS:
            for name, child in module.named_children():
                watch(f"{place}.{name}", child)
        else:
            module.register_forward_hook(partial(note, place))

    watch("", model)
    with torch.no_grad():
        model.eval()(torch.empty(1, *input_size, device="meta"))
    return layers


def _merge(layers: Iterable[_Layer], repeat: bool) -> list[_Layer]:
    """Join, within a stage, a change of width or resolution to the block it prepares; ``repeat``: and equal layers to one."""
    merged: list[_Layer] = []
    for layer in layers:
        last = merged[-1] if merged else layer
        same_stage = last is not layer and last.stage == layer.stage
        if same_stage and repeat and _describe(last.module) == _describe(layer.module):
            last.repetitions += 1
        elif same_stage and layer.stage.startswith(".stages") and not isinstance(last.module, MGICBlock):
            merged[-1] = replace(layer, input=last.input, text=f"{last.text}; {layer.text}")
        else:
            merged.append(layer)
    return merged


LAYER_COLUMNS = ("input", "layer", "kernels", "repetitions", "c_in", "exp", "expansion", "c_out", "se", "pool")


def _fits(printed: Row, built: Row) -> bool:
    return all(printed[key] == built[key] for key in ("input", "c_in", "c_out") if key in printed)


def _value(cell: Any, symbols: Row) -> Any:
    """Return a printed cell with its symbols at the values they have in the network that is built."""
    if not isinstance(cell, str):
        return cell
    for name, value in symbols.items():
        cell = cell.replace(name, str(value))
    return int(cell) if cell.isdigit() else cell


def layer_rows(table: Row) -> list[dict[str, Any]]:
    """Return the printed layers, each with the built one that takes and gives the same, then built ones left over."""
    name, rows, symbols = table.get("model"), table["rows"], table.get("symbols", {})
    built: list[dict[str, Any]] = []
    if name is not None:
        network = named_network(name, table.get("overrides", {}))
        layers = _run_layers(network.build(), table["input_size"])
        built = [layer.facts() for layer in _merge(layers, repeat="repetitions" in table["units"])]
    result = []
    for row in rows:
        printed = {key: row[key] for key in LAYER_COLUMNS if key in row}
        meant = {key: _value(cell, symbols) for key, cell in {**printed, **row.get("should_be", {})}.items()}
        match = next((layer for layer in built if _fits(meant, layer)), None)
        if match is not None:
            built.remove(match)
        stated = {key: _value(cell, symbols) for key, cell in printed.items() if key != "layer"}
        differs = [key for key, cell in stated.items() if match and cell != match.get(key)]
        more = {"source": _source(table, row), **_remarks(row, table["units"])}
        result.append({"row": row["row"], "printed": printed, "built": match, "differs": differs, **more})
    none: dict[str, Any] = {"source": None, "misprint": None, "should_be": None, "variants": [], "note": None}
    return result + [{"row": "(not printed)", "printed": {}, "built": layer, "differs": [], **none} for layer in built]


def build_table(table_id: str, records: Sequence[Row] = ()) -> dict[str, Any]:
    """Return a table of the papers with our counts and accuracies, as plain values.

    Args:
        table_id: One of :func:`table_ids`.
        records: Our results (:func:`mgic.training.read_record`), each with its ``file``.

    Returns:
        ``rows`` of ``{row, model, overrides, printed, ours, deviation, readings, accuracy, source, ...}``; of layers
        ``{row, printed, built, differs, source, ...}``. ``printed`` and ``ours`` count in ones; deviations are per cent.

    Raises:
        UserError: If there is no such table; the message names the nearest ones.

    Examples:
        >>> row = build_table("mgic-3")["rows"][-1]
        >>> row["row"], row["printed"]["macs"], row["ours"]["macs"], row["deviation"]["macs"]
        ('MGIC-ResNet-56', 60000000, 66466432, 10.78)
    """
    tables = papers()["tables"]
    if table_id not in tables:
        raise UserError(f"unknown table {table_id!r}{suggest(table_id, tables)}")
    table = tables[table_id]
    layers = table["kind"] == "layers"
    name, overrides, network = _network(table_id, table)
    return {
        "id": table_id,
        "title": f"{papers()['papers'][table['paper']]['title']}, {table['table']}",
        "caption": table["caption"],
        "kind": table["kind"],
        "source": _source(table, {}),
        "also": [f"{other['paper']}, {other['table']}" for other in table.get("also", [])],
        "dataset": table["dataset"],
        "input_size": table["input_size"],
        "units": {key: "1" if unit in SUFFIX else unit for key, unit in table["units"].items()},
        "model": name,
        "overrides": _plain(overrides),
        "ours": _counts(network, table["input_size"], table_id) if network else None,
        "note": table.get("note"),
        "misprint": table.get("misprint"),
        "rows": layer_rows(table) if layers else [results_row(table_id, table, row, records) for row in table["rows"]],
    }


Series = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Panel:
    """What one plot shows: points by name, printed ones and our own."""

    printed: Series
    measured: Series
    title: str
    xlabel: str
    ylabel: str
    logx: bool = False
    logy: bool = False


def _family(row: Row) -> str:
    """Return the name a row is drawn under: its label without width, group size and so on."""
    name, overrides = row.get("model", ""), row.get("overrides", {})
    if name.startswith("mgiad"):
        return f"MGiaD, g_s = {overrides['group_size']}" + (", wider" if overrides.get("width", 1) > 1 else "")
    if name.startswith("mgnet"):
        kind = "in groups" if "group_a" in overrides else f"({3 if name.endswith('20') else 4} resolutions)"
        return f"MgNet_A{',B' if overrides['share_b'] else ''} {kind}"
    if name == "mgic_resnet56":
        return "MGIC-ResNet-56"
    return re.sub(r" (\d[\d.]*x|\([^)]*\))|, best .*", "", row["row"])


def _accuracies(ids: Sequence[str], x: str, records: Sequence[Row], **labels: Any) -> Panel:
    """Draw accuracy over a column: the printed points, and those of our records at our own counts."""
    panel = Panel({}, {}, **labels)
    for table_id in ids:
        table = {**papers()["tables"], **papers()["figures"]}[table_id]
        for row in table["rows"]:
            family = _family(row)
            if x in row and "top1" in row and "should_be" not in row:  # known to be wrong: not a point
                point = (float(_number(row[x], table["units"][x])), float(row["top1"]))
                panel.printed.setdefault(family, []).append(point)
            name, overrides, network = _network(table_id, row)
            found = _accuracy(name, overrides, row.get("dataset", table["dataset"]), records) if network else None
            if network and found:
                values = {**_counts(network, table["input_size"], table_id), "epochs": found["epochs"]}
                panel.measured.setdefault(family, []).append((float(values[x]), found["test"]["mean"]))
    for points in (*panel.printed.values(), *panel.measured.values()):
        points[:] = sorted(set(points))
    return panel


def _figure_5(records: Sequence[Row]) -> list[Panel]:
    labels: dict[str, Any] = {"xlabel": "multiply-adds", "ylabel": "top-1 accuracy on ImageNet [%]", "logx": True}
    return [
        _accuracies(["mgic-7"], "macs", records, title="light networks (Table 7)", **labels),
        _accuracies(["mgic-5"], "macs", records, title="compressed ResNet-50 (Table 5)", **labels),
    ]


def _figure_6(records: Sequence[Row]) -> list[Panel]:
    labels: dict[str, Any] = {"xlabel": "epochs", "ylabel": "top-1 accuracy on ImageNet [%]"}
    return [
        _accuracies(["mgic-6"], "epochs", records, title="best within so many epochs, as the caption says", **labels)
    ]


def _figure_7(records: Sequence[Row]) -> list[Panel]:
    ids = ["mgiad-1", "mgiad-2", "mgiad-6", "mgiad-7", "mgic-12"]
    labels: dict[str, Any] = {"xlabel": "weights", "ylabel": "test accuracy on CIFAR-10 [%]", "logx": True}
    return [_accuracies(ids, "params", records, title="Tables I, II, VI, VII; MGIC: its Table 12", **labels)]


def _errors(figure_id: str, records: Sequence[Row], printed: Series, title: str) -> list[Panel]:
    """Draw squared errors over parameters; these exist as records only, which say which figure they are for."""
    measured: Series = {}
    for record in records:
        if record.get("figure") == figure_id:
            point = (record["metrics"]["params"]["mean"], record["metrics"]["mse"]["mean"])
            measured.setdefault(record["series"], []).append(point)
    if not measured:
        raise UserError(
            f"figure {figure_id}, {title}, is drawn from records that say figure: {figure_id} and hold params and mse; "
            f"none of the {len(records)} records does: run that experiment first"
        )
    labels: dict[str, Any] = {"xlabel": "parameters", "ylabel": "mean squared error", "logx": True, "logy": True}
    return [Panel(printed, {name: sorted(points) for name, points in measured.items()}, title, **labels)]


def _figure_3(records: Sequence[Row]) -> list[Panel]:
    printed = [(float(row["params"]), float(row["mse"])) for row in papers()["tables"]["mgic-1"]["rows"]]
    title = "encoding 64 feature maps in 8 channels and back"
    return _errors("mgic-3", records, {"Table 1": sorted(printed)}, title)


def _figure_4(records: Sequence[Row]) -> list[Panel]:
    return _errors("mgic-4", records, {}, "approximation of functions")


FIGURES: dict[str, tuple[str, Callable[[Sequence[Row]], list[Panel]]]] = {
    "mgic-3": ("MGIC, Figure 3: error of the transfers alone", _figure_3),
    "mgic-4": ("MGIC, Figure 4: error of function approximation", _figure_4),
    "mgic-5": ("MGIC, Figure 5: accuracy and multiply-adds", _figure_5),
    "mgic-6": ("MGIC, Figure 6: accuracy and epochs", _figure_6),
    "mgiad-7": ("MGiaD, Figure 7: accuracy and weights", _figure_7),
}
"""Title, and what gathers the points, of the papers' plots."""


def build_figure(figure_id: str, records: Sequence[Row] = ()) -> tuple[str, list[Panel]]:
    """Return the title and the panels of a plot of the papers: printed points, and those of our records.

    Args:
        figure_id: One of :data:`FIGURES`.
        records: Our results, each with its ``file``.

    Raises:
        UserError: If there is no such figure, or it needs a record that is not there.
    """
    if figure_id not in FIGURES:
        raise UserError(f"unknown figure {figure_id!r}{suggest(figure_id, FIGURES)}")
    title, gather = FIGURES[figure_id]
    return title, gather(records)
