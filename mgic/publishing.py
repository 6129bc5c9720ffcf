"""Publishing a trained network: a folder that others load, with a card that says what the network is and what it is not.

Image classifiers become folders of timm: ``timm.create_model("local-dir:FOLDER", pretrained=True)`` after
``import mgic.models``, or ``hf-hub:REPO`` once they are uploaded. The other networks have a ``config.json`` with their name
and arguments. `from_pretrained` loads both. A folder is loaded again and compared before it gets its name: its outputs are
those of the run, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
import yaml
from huggingface_hub import EvalResult, HfApi, ModelCardData, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import nn
from torch.utils._pytree import tree_leaves

from .counting import cost
from .data import licence
from .errors import BROKEN, UserError
from .models import build_model, check_strange
from .prediction import sees_crops
from .training.files import read_json, sha256, told_when_full, write_json, write_text
from .training.folder import read_sources
from .training.recipes import Recipe
from .training.records import without_folder
from .training.weights import (
    TrainedNetwork,
    fit_weights,
    load_network,
    load_weights,
    read_safetensors,
    require_finished,
    room_for,
    save_weights,
    scores,
)

SCHEMA = 1
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
# What the hub and the network below it raise: httpx' or requests' errors, the first base of the hub's own; bad names.
_HUB_ERRORS: Any = (HfHubHTTPError.__bases__[0], OSError, ValueError)
_HUB_WORDS = {"classification": "image-classification", "segmentation": "image-segmentation"}
_HUB_METRICS = {"accuracy": "accuracy", "miou": "mean_iou", "mse": "mse"}


def publish(run: str | Path, folder: str | Path, license: str | None = None) -> None:
    """Write what is needed to use the network of a finished run, and its card, to a new folder.

    Args:
        run: The run folder.
        folder: Where to; it must not exist, or be empty. It stays so where anything goes wrong.
        license: Of the weights, as the hub names licences (``mit``, ``cc-by-nc-4.0``); none is stated by default.

    Raises:
        UserError: The run is not finished, the folder is not empty, or what was written does not give back the
            outputs of the run.
    """
    run, folder = Path(run), Path(folder)
    network = load_network(run, lambda name, **arguments: build_model(name, arguments))
    require_finished(run, network.origin)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there and not empty; choose a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory(prefix=".tmp-", dir=folder.parent) as temporary,
        told_when_full(folder.parent, room_for(network.model)),
    ):
        staged = Path(temporary) / folder.name
        staged.mkdir()
        if _timms(network.recipe):
            _write_timms(network, staged, license)
        else:
            _write_ours(network, staged)
        _compare(network, staged)
        stated = replace(network.recipe, data=without_folder(network.recipe.data))
        write_text(staged / "recipe.yaml", stated.to_yaml())
        write_text(staged / "README.md", model_card(run, network, sha256(staged / _WEIGHTS), license))
        staged.replace(folder)


def from_pretrained(place: str | Path, revision: str | None = None) -> nn.Module:
    """Load a published network, in eval mode. Nothing in its files is executed.

    Args:
        place: The folder, or the repository on the hub, ``OWNER/NAME``; what was fetched before needs no network.
        revision: Branch, tag or commit of the repository.

    Raises:
        UserError: There is no such place, or it holds no network that this version reads.
    """
    folder = Path(place)
    if not folder.is_dir():
        try:
            files = [_CONFIG, f"{_WEIGHTS}*"]
            folder = Path(snapshot_download(str(place), revision=revision, allow_patterns=files))
        except _HUB_ERRORS as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{place}: no folder, and not to be had from the hub ({reason})") from error
    if not (folder / _CONFIG).is_file():
        raise UserError(f"{place}: no published network: {_CONFIG} is missing")
    if not (folder / _WEIGHTS).is_file():  # weights in other formats, which timm would look for, are not read
        raise UserError(f"{place}: half a published network: {_WEIGHTS} is missing; fetch it again")
    config = read_json(folder / _CONFIG)
    timms = config.get("library") != "mgic"
    name, arguments = config.get("architecture"), config.get("model_args", {})
    check_strange(name, arguments, f"{place}: {_CONFIG}")
    signed = (folder / f"{_WEIGHTS}.sha256").exists() or not timms
    weights = load_weights(folder / _WEIGHTS) if signed else read_safetensors(folder / _WEIGHTS)
    if timms:
        try:
            return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        except (*BROKEN, SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{place}: {name} cannot be built from it ({reason})") from error
    if config.get("schema") != SCHEMA:
        raise UserError(f"{place}: of schema {config.get('schema')!r}; this version of mgic reads {SCHEMA}")
    model = build_model(str(name), arguments)
    fit_weights(model, weights, f"{place}: its weights do not fit {name}")
    return model.eval()


def check_repository(repository: str) -> None:
    """Refuse what cannot be the name of a repository on the hub.

    Raises:
        UserError: It is none.
    """
    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise UserError(f"{repository!r} is no repository, OWNER/NAME: {' '.join(str(error).split())}") from error


def push(folder: str | Path, repository: str) -> str:
    """Upload a published folder as it is to the hub, and return the address of the commit.

    Args:
        folder: What `publish` wrote.
        repository: ``OWNER/NAME``; made where it does not exist, public as the hub's default is.

    Raises:
        UserError: The hub refuses, or cannot be reached.
    """
    api = HfApi()
    try:
        name = api.create_repo(repository, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Publish a trained network"))
    except _HUB_ERRORS as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder} is written, but cannot be uploaded to {repository}: {reason}") from error


def _write_timms(network: TrainedNetwork, folder: Path, license: str | None) -> None:
    model: Any = deepcopy(network.model)
    data, cut = network.data, sees_crops(network.recipe, network.data)
    # how its images are prepared, for timm.data.resolve_model_data_config; the licence there is that of the code
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        **{key: tuple(data[key]) for key in ("input_size", "mean", "std")},
        **{"crop_pct": 0.875 if cut else 1.0, "interpolation": "bilinear", "pool_size": None, "license": license},
    }
    model.register_state_dict_post_hook(_unshare)
    labels = {"label_names": data["classes"]} if data.get("classes") else {}
    save_for_hf(model, str(folder), model_config=labels, model_args=network.arguments, safe_serialization=True)
    write_text(folder / f"{_WEIGHTS}.sha256", f"{sha256(folder / _WEIGHTS)}  {_WEIGHTS}\n")


def _unshare(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Give every name its own tensor: timm's file holds no shared ones, and timm wants all names when it loads."""
    for name, value in state.items():
        state[name] = value.clone(memory_format=torch.contiguous_format)


def _write_ours(network: TrainedNetwork, folder: Path) -> None:
    known = ("task", "input_size", "mean", "std", "classes")
    config = {
        **{"schema": SCHEMA, "library": "mgic", "architecture": network.recipe.model},
        "model_args": network.arguments,
        **{key: network.data[key] for key in known if key in network.data},
    }
    write_json(folder / _CONFIG, config)
    save_weights(folder / _WEIGHTS, network.model)


def _compare(network: TrainedNetwork, folder: Path) -> None:
    x = torch.randn(2, *network.data["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (tree_leaves(model(x)) for model in (network.model, from_pretrained(folder)))
    if not all(map(torch.equal, ours, theirs)):
        raise UserError(f"{network.recipe.model}: loaded again, it gives other outputs; nothing was published")


def model_card(run: str | Path, network: TrainedNetwork, digest: str, license: str | None = None) -> str:
    """The card of a run, as the hub reads it: what it is, how it was made, how good it is, what nobody tested.

    Args:
        run: The run folder.
        network: The network in it.
        digest: SHA-256 of the published weights.
        license: Of the weights.
    """
    recipe, data, summary = network.recipe, network.data, read_json(Path(run) / "summary.json")
    sources, found = read_sources(Path(run)), scores(summary)
    size, origin, name = tuple(data["input_size"]), summary["origin"], without_folder(data["name"])
    counted, commit = cost(network.model, size), summary["origin"]["commit"]
    task, timms = data.get("task", "classification"), _timms(recipe)
    word = None if task == "classification" and not timms else _HUB_WORDS.get(task)
    versions = ", ".join(f"{key} {value}" for key, value in origin["versions"].items())
    guesses = "It names one of its classes whatever it is shown. " if data["num_classes"] > 1 else ""
    note = summary.get("data_note") or f"{data['train']:,} training and {data['test']:,} test samples"
    lines = [
        _metadata(recipe, name, word, found, license),
        f"# {recipe.model} trained on {name}",
        f"A network trained with mgic, multigrid in channels. Task: {task}; input {size} "
        f"(channels first); {data['num_classes']} outputs.",
        "## Use",
        _usage(timms),
        "## Data",
        f"{note}.\n\n- Licence of the data: {licence(recipe.data)}.\n- Licence of these weights: {license or 'not stated'}.",
        "## Scores",
        "| | training samples | test samples |\n|---|---:|---:|\n" + "\n".join(_rows(summary)),
        "Accuracies and IoU are per cent. Of the last epoch's weights, in eval mode, without augmentation; the test samples "
        "picked no epoch. One seed: how far others are from it is not known from this run.",
        "## Cost",
        f"{counted.params:,} parameters and {counted.macs:,} multiply-adds for one input of {size}.",
        "## Training",
        f"Seed {summary['seed']}, {summary['epochs']} epochs, {summary['steps']:,} steps "
        f"({summary['skipped_steps']} skipped). All fields are in `recipe.yaml`; the same command, data, machine and "
        "versions give the same weights bit for bit:",
        f"```sh\n{_command(sources)}\n```",
        "\n".join(
            [
                *_told(sources),
                f"- Commit of mgic: {commit['id'] or 'unknown'}{' with changes' if commit['dirty'] else ''}",
                f"- Finished: {origin['date']}",
                f"- Versions: {versions}",
                "- Machine: " + ", ".join(f"{k} {v}" for k, v in origin["machine"].items() if v is not None),
                f"- SHA-256 of `{_WEIGHTS}`: `{digest}`",
            ]
        ),
        "## Limits",
        f"It was tested on the test samples of {name} alone, and on nothing else: not on other or changed data, other sizes "
        "of input, noise or attacks; nobody examined whether its probabilities are calibrated or whom its errors concern. "
        f"{guesses}Test it on your own data before you rely on it.",
    ]
    return "\n\n".join(lines) + "\n"


def _timms(recipe: Recipe) -> bool:
    """Whether timm can build the network by its name; it knows nothing of conversions."""
    return bool(timm.is_model(recipe.model)) and "conversion" not in recipe.model_args


def _metadata(recipe: Recipe, data: str, word: str | None, found: Mapping[str, float], license: str | None) -> str:
    """The head of the card, which the hub reads."""
    test = next(key for key in found if key.startswith("test_"))
    kind = test.removeprefix("test_")
    result = EvalResult(
        task_type=word or "other",
        dataset_type=data,
        dataset_name=data,
        dataset_split="test",
        metric_type=_HUB_METRICS[kind],
        metric_value=found[test],
        metric_name=kind,
    )
    library = "timm" if _timms(recipe) else "mgic"
    card: Any = ModelCardData(
        model_name=recipe.model,
        library_name=library,
        pipeline_tag=word,
        license=license,
        tags=["mgic", "multigrid"],
        eval_results=[result],
    )
    return f"---\n{yaml.safe_dump(card.to_dict(), sort_keys=False)}---"


def _usage(timms: bool) -> str:
    if timms:
        code = (
            'import timm\nimport mgic.models  # registers the networks\n\nnet = timm.create_model("local-dir:FOLDER", '
        )
        return f'```python\n{code}pretrained=True)  # or "hf-hub:OWNER/NAME"\n```'
    return '```python\nfrom mgic.publishing import from_pretrained\n\nnet = from_pretrained("FOLDER")  # or "OWNER/NAME"\n```'


def _rows(summary: Mapping[str, Any]) -> list[str]:
    tests = [name for name in summary if name.startswith("test_")]
    return [
        f"| {name.removeprefix('test_')} | {summary[name.replace('test_', 'train_', 1)]:.4g} | {summary[name]:.4g} |"
        for name in tests
    ]


def _command(sources: Mapping[str, Any]) -> str:
    words = ["mgic train --config recipe.yaml --out RUN"]
    if "teacher" in sources:
        words.append("--teacher TEACHER_RUN")
    if "init" in sources:
        words.append("--init START --new_head" if sources["init"]["new_head"] else "--init START")
    return " ".join(words)


def _told(sources: Mapping[str, Any]) -> list[str]:
    """What the run says about the trained weights it depends on."""
    words = {"teacher": "Teacher", "init": "Started from"}
    return [
        f"- {words[part]}: {source.get('model', 'weights')}, SHA-256 `{source['sha256']}`"
        + "".join(f", {key} {value:.2f}" for key, value in source.get("scores", {}).items())
        for part, source in sources.items()
    ]
