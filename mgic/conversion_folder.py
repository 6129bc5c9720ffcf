"""A converted network on disk: the name of its source, what was replaced, its weights. Never a pickle."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from torch import nn

from .conversion_page import conversion_page
from .conversion_report import ConversionReport
from .errors import UserError
from .models import build_model, check_strange, create_model
from .training.files import write_json, write_text
from .training.weights import fit_weights, load_weights, save_weights

SCHEMA = 1
FILE, WEIGHTS, PAGE, RECIPE = "conversion.json", "model.safetensors", "report.html", "recipe.yaml"


@dataclass(frozen=True)
class Converted:
    """A converted network and where it comes from.

    Args:
        model: The network, with its weights, in eval mode.
        source: Registered name of the network that was converted.
        arguments: Arguments it was built with.
        report: What was replaced.
    """

    model: nn.Module
    source: str
    arguments: Mapping[str, Any]
    report: ConversionReport

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments that make `mgic.create_model` build the converted network.

        Raises:
            UserError: The source was itself converted, by rule and not layer by layer.
        """
        before = dict(self.arguments).pop("conversion", {"layers": []})
        if "layers" not in before:
            raise UserError(f"{self.source} was built with conversion={before}: convert the network without it")
        layers = [{k: list(v) if isinstance(v, tuple) else v for k, v in layer.items()} for layer in self.report.layers]
        return {**self.arguments, "conversion": {"layers": [*before["layers"], *layers]}}


def save_converted(folder: Path, converted: Converted) -> None:
    """Write ``conversion.json``, ``model.safetensors`` and its checksum, ``report.html``, and ``recipe.yaml`` for training.

    They are written in a folder beside it, which gets its name at the end: there is all of it or nothing.

    Raises:
        DiskFull: There is no room for it.
        OSError: The folder cannot be written, or is not empty.
        UserError: What is written would not give back the network.
    """
    recipe = {"model": converted.source, "model_args": converted.model_args}
    twin = create_model(converted.source, **converted.model_args)
    fit_weights(twin, converted.model.state_dict(), "the network cannot be built again")
    folder.mkdir(parents=True, exist_ok=True)
    report = json.loads(converted.report.to_json())
    known = {"schema": SCHEMA, "source": converted.source, "arguments": dict(converted.arguments), "report": report}
    with TemporaryDirectory(prefix=".tmp-", dir=folder.parent) as temporary:
        staged = Path(temporary) / folder.name
        staged.mkdir()
        save_weights(staged / WEIGHTS, converted.model)
        write_text(staged / PAGE, conversion_page(converted.report))
        write_text(staged / RECIPE, yaml.safe_dump(recipe, sort_keys=False))
        write_json(staged / FILE, known)
        folder.rmdir()  # it is empty, or somebody else wrote there meanwhile
        staged.rename(folder)


def is_converted(folder: str | Path) -> bool:
    """Whether a folder holds what `save_converted` wrote."""
    return (Path(folder) / FILE).is_file()


def load_converted(folder: str | Path) -> Converted:
    """Build a converted network again and load its weights.

    Raises:
        UserError: The folder holds no converted network, or of another schema version.
        CorruptCheckpoint: The weights are damaged.
    """
    file = Path(folder) / FILE
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{folder}: holds no converted network ({error})") from error
    if not isinstance(known, dict) or known.get("schema") != SCHEMA:
        found = known.get("schema") if isinstance(known, dict) else None
        raise UserError(f"{file}: a conversion of schema {found!r}; this version of mgic reads {SCHEMA}")
    try:
        source, arguments, report = str(known["source"]), dict(known["arguments"]), json.dumps(known["report"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: not a conversion ({type(error).__name__}: {error})") from error
    converted = Converted(nn.Identity(), source, arguments, ConversionReport.from_json(report, str(file)))
    check_strange(source, arguments, str(file))
    model = build_model(source, converted.model_args)
    fit_weights(model, load_weights(Path(folder) / WEIGHTS), f"{folder}: its weights do not fit")
    return Converted(model.eval(), source, arguments, converted.report)
