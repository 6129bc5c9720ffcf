"""What all verbs share of data and runs: the flags, a run's network, and data as that network sees them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from .errors import UserError

if TYPE_CHECKING:
    from .data import Data
    from .training import Recipe, TrainedNetwork


def add_data(parser: ArgumentParser) -> None:
    """Add the flags that say where data sets are."""
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the torchvision data sets")
    parser.add_argument("--download", action="store_true", help="fetch a missing data set")


def add_other_data(parser: ArgumentParser, use: str) -> None:
    """Add the flags that name data, instead of those of a run or because there is no run."""
    parser.add_argument("--data", type=str, default=None, help=f"data set {use}; the run's own by default")
    parser.add_argument("--data_args", type=dict, default=None, help="arguments of the data set, instead of the run's")
    add_data(parser)


def load_trained(run: Path) -> "TrainedNetwork":
    """Load the network of a run folder."""
    from .models import build_model
    from .training import load_network

    return load_network(run, lambda name, **arguments: build_model(name, arguments))


def load_named_data(args: Namespace) -> "Data":
    """Load what ``--data`` names, as it is."""
    from .data import load_data

    return load_data(args.data, args.root, args.download, **(args.data_args or {}))


def load_recipe_data(recipe: "Recipe", args: Namespace) -> "Data":
    """Check the model's name and load the data, before anything long."""
    from .data import load_data, padded
    from .models import check_model

    check_model(recipe.model)
    return padded(load_data(recipe.data, args.root, args.download, **recipe.data_args), recipe.pad_images)


def load_run_data(run: Path, recipe: "Recipe", noted: Mapping[str, Any], args: Namespace) -> "Data":
    """Load the data of a run, or the others that ``--data`` names, as its network sees them: padded, normalised as its own.

    Args:
        run: The run folder.
        recipe: Its recipe.
        noted: What it noted down about its data, ``data.json``.
        args: The flags of `add_other_data`.

    Raises:
        UserError: The data are not there, or the run's own are others today.
    """
    from dataclasses import replace

    from .training.folder import different

    own = args.data is None and args.data_args is None
    if args.data is not None:
        recipe = replace(recipe, data=args.data, data_args={})
    if args.data_args is not None:
        recipe = replace(recipe, data_args=args.data_args)
    data = load_recipe_data(recipe, args)
    if own and different(noted, data.fingerprint()):
        raise UserError(f"{run}: {recipe.data} is not the data it was trained on; name other data with --data")
    if len(noted["mean"]) == len(data.mean):  # what the network expects, whatever is fed to it
        data = replace(data, mean=tuple(noted["mean"]), std=tuple(noted["std"]))
    return data
