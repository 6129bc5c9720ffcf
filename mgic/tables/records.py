"""Which of our records belong to a row: same network, same data."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from .networks import named_network
from .printed import Values


def matching_records(name: str | None, overrides: Values, dataset: str, records: Sequence[Values]) -> Iterator[Values]:
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


def row_accuracy(name: str | None, overrides: Values, dataset: str, records: Sequence[Values]) -> dict[str, Any] | None:
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
