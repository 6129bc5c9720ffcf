"""Tables that print a network layer by layer: each printed layer beside the one that is built."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from timm.layers import ClassifierHead, NormMlpClassifierHead, SqueezeExcite
from torch import Tensor, nn

from ..cycle import MGICBlock
from ..models.points import GraphStage
from .networks import named_network
from .printed import Values, row_remarks, row_source

LAYER_COLUMNS = ("input", "layer", "kernels", "repetitions", "c_in", "exp", "expansion", "c_out", "se", "pool")


def layer_rows(table: Values) -> list[dict[str, Any]]:
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
        more = {"source": row_source(table, row), **row_remarks(row, table["units"])}
        result.append({"row": row["row"], "printed": printed, "built": match, "differs": differs, **more})
    none: dict[str, Any] = {"source": None, "misprint": None, "should_be": None, "variants": [], "note": None}
    return result + [{"row": "(not printed)", "printed": {}, "built": layer, "differs": [], **none} for layer in built]


def _fits(printed: Values, built: Values) -> bool:
    return all(printed[key] == built[key] for key in ("input", "c_in", "c_out") if key in printed)


def _value(cell: Any, symbols: Values) -> Any:
    """Return a printed cell with its symbols at the values they have in the network that is built."""
    if not isinstance(cell, str):
        return cell
    for name, value in symbols.items():
        cell = cell.replace(name, str(value))
    return int(cell) if cell.isdigit() else cell


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


def _describe(module: nn.Module) -> str:
    if isinstance(module, MGICBlock):
        return f"MGIC {type(module.relax[0]).__name__}, {module.extra_repr()}"
    if isinstance(module, nn.Linear):
        return "FC"
    conv = getattr(module, "conv", module)
    return type(module).__name__ + (f" {_kernel(conv)}" if hasattr(conv, "kernel_size") else "")


def _kernel(conv: nn.Module) -> str:
    size, stride = conv.kernel_size, conv.stride
    side, step = (v if isinstance(v, int) else v[0] for v in (size, stride))  # type: ignore[index]
    groups = getattr(conv, "groups", 1)
    return f"{side}x{side}" + (f" in {groups} groups" if groups > 1 else "") + (f" / {step}" if step != 1 else "")


def _size(shape: Sequence[int]) -> str:
    """Write ``(N, C, H, W)`` as the papers do, ``H^2 x C``."""
    channels, *spatial = shape[1:]
    if len(spatial) < 2:
        return " x ".join(map(str, (*spatial, channels)))
    sides = sorted(set(spatial))
    return f"{sides[0]}^2 x {channels}" if len(sides) == 1 else f"{'x'.join(map(str, spatial))} x {channels}"
