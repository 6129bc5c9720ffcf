"""What the coarse grid keeps: feature maps in 8 channels and back, by R and P alone (Eliasof et al. 2023, Sec. 4.1).

    python benchmarks/coarse_representation.py --run RUN --data cifar10.npz --results results/coarse-representation
    python benchmarks/coarse_representation.py --pretrained resnet50 --data images:IMAGENET --results RESULTS

Table 1 and Figure 3: the feature maps are those of a network's first convolution, of 1,024 training images; as many of the
test set tell what the transfers are worth on others. Beside the trained transfers stands the closed-form optimum of the
same groups. ``--pretrained resnet50`` is the paper's network, from the Hugging Face hub; ``--run`` is a folder of
``mgic train``. One record a group size, trained and optimal; ``--picture`` draws Figure 3.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import mgic
from mgic import UserError
from mgic.data import Data, Split, epoch_order, load_data
from mgic.representation import (
    optimal_error,
    optimal_transfers,
    reconstruction_error,
    second_moments,
    train_transfers,
)
from mgic.training import load_run, make_record, write_record

GROUP_SIZES, COARSEST = (32, 16, 8, 4), 8
IMAGES, BATCH = 1024, 64


def trained_network(run: Path, data: Data) -> nn.Module:
    """Return the network of a run folder, built for the data it was trained on."""
    saved = load_run(run)
    model = mgic.create_model(saved.recipe.model, **{**data.model_arguments(), **saved.recipe.model_args})
    model.load_state_dict(saved.state_dict)
    return model


def pretrained_network(name: str) -> nn.Module:
    """Return a network of timm with its weights, which come over the network the first time."""
    try:
        return timm.create_model(name, pretrained=True)
    except OSError as error:  # what huggingface_hub raises where neither the hub nor its cache has them
        raise UserError(
            f"the weights of {name} cannot be had from the Hugging Face hub ({str(error).splitlines()[0]}); "
            "--run takes a network trained here instead"
        ) from error


def first_convolution(model: nn.Module) -> nn.Conv2d:
    """Return the convolution that sees the images."""
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))


def chosen_images(split: Split, seed: int) -> list[Tensor]:
    """Return batches of `IMAGES` images of a split, drawn at random."""
    drawn = epoch_order(len(split), seed, 0)[:IMAGES].sort().values
    batches = split.evaluation_batches(BATCH, 0)
    found = [x[drawn[(drawn >= i * BATCH) & (drawn < (i + 1) * BATCH)] - i * BATCH] for i, (x, _) in enumerate(batches)]
    return [x for x in found if len(x)]


def feature_maps(convolution: nn.Conv2d, images: Sequence[Tensor], data: Data) -> Iterator[Tensor]:
    """Yield what the convolution makes of normalised images, ``(N, C, H, W)``."""
    normalize = data.normalizer(torch.device("cpu"))
    with torch.no_grad():
        for batch in images:
            yield convolution(normalize(batch))


def draw(path: Path, features: Tensor, transfers: dict[int, nn.Sequential]) -> None:
    """Draw Figure 3: an image's strongest feature map by group size; all its maps, their code, and what comes back."""
    from matplotlib.figure import Figure

    def tiles(maps: Tensor, columns: int) -> Tensor:
        """Lay maps side by side, ``(C, H, W) -> (C / columns H, columns W)``."""
        framed = nn.functional.pad(maps, (1, 1, 1, 1), value=float("nan"))
        return framed.unflatten(0, (-1, columns)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)

    best = max(transfers)
    encoder = transfers[best][: len(transfers[best]) // 2]
    with torch.no_grad():
        decoded = {size: model(features)[0] for size, model in transfers.items()}
        code = encoder(features)[0]
    strongest = int(features[0].square().mean((1, 2)).argmax())
    limit = float(features[0].abs().max())
    shown = {"cmap": "gray", "vmin": -limit, "vmax": limit}
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.6))
    axes = top.subplots(1, 1 + len(transfers))
    axes[0].imshow(features[0, strongest].numpy(), **shown)
    axes[0].set_title(f"feature map {strongest}")
    for axis, (size, maps) in zip(axes[1:], decoded.items(), strict=True):
        axis.imshow(maps[strongest].numpy(), **shown)
        axis.set_title(f"$s_g$ = {size}")
    for axis, maps, columns, title in zip(
        bottom.subplots(1, 3, width_ratios=(8, 3, 8)),
        (features[0], code, decoded[best]),
        (8, 2, 8),
        (f"{features.shape[1]} feature maps", f"{len(code)} coarse maps", f"decoded, $s_g$ = {best}"),
        strict=True,
    ):
        scale = float(maps.abs().max())
        axis.imshow(tiles(maps, columns).numpy(), cmap="gray", vmin=-scale, vmax=scale)
        axis.set_title(title)
    for axis in figure.get_axes():
        axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(given: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--run", type=Path, help="folder of a network trained here")
    network.add_argument("--pretrained", help="name of a network of timm, with weights")
    parser.add_argument("--data", required=True, help="images, as mgic train takes them")
    parser.add_argument("--root", help="folder of named data sets")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of the transfers")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, required=True, help="folder of the records")
    parser.add_argument("--picture", type=Path, help="PNG of Figure 3")
    args = parser.parse_args(given)
    torch.set_num_threads(args.threads)
    data = load_data(args.data, args.root)
    model = pretrained_network(args.pretrained) if args.pretrained else trained_network(args.run, data)
    convolution = first_convolution(model.eval())
    images, others = (chosen_images(split, seed=0) for split in (data.train, data.test))
    moments, held_out = (second_moments(feature_maps(convolution, chosen, data)) for chosen in (images, others))
    power = float(moments.trace()) / len(moments)
    source = "its published weights" if args.pretrained else "trained here"
    what = f"{args.pretrained or load_run(args.run).recipe.model}, {source}"
    note = f"first convolution ({convolution.out_channels} maps) of {what}; {IMAGES} training images of: {data.note}"
    words = ["--pretrained", args.pretrained] if args.pretrained else ["--run", "RUN"]
    words += ["--data", Path(args.data).name, "--results", "RESULTS"]
    command = shlex.join(["python", "benchmarks/coarse_representation.py", *words])
    drawn = {}
    for size in GROUP_SIZES:
        optimum = optimal_error(moments, size, COARSEST)
        trained = [train_transfers(moments, size, COARSEST, steps=args.steps, seed=seed) for seed in range(args.seeds)]
        drawn[size] = trained[0]
        for series, transfers in (("trained", trained), ("optimum", [optimal_transfers(moments, size, COARSEST)])):
            errors = [float(reconstruction_error(one, moments).detach()) for one in transfers]
            metrics = {
                "mse": errors,
                "mse_of_test_images": [float(reconstruction_error(one, held_out).detach()) for one in transfers],
                "share_of_mean_square": [error / power for error in errors],
                "percent_above_optimum": [100 * (error / optimum - 1) for error in errors],
                "params": [sum(p.numel() for p in one.parameters()) for one in transfers],
            }
            notes = [
                f"s_g = {size}, s_c = {COARSEST}; optimum: principal components of each tree of groups, no seed",
                f"mean square of the feature maps: {power:.6g}; s_g = 32 and 16 make one tree, so their optimum is the same",
            ]
            record = make_record(
                command, note, range(len(transfers)), metrics, notes, figure="mgic-3", series=series, group_size=size
            )
            write_record(args.results / f"{series}-{size}.json", record)
            means = {name: metric["mean"] for name, metric in record["metrics"].items()}
            print(
                f"s_g = {size:2d}  {series:8s} {means['params']:5.0f} parameters  mse {means['mse']:.5f} "
                f"({means['percent_above_optimum']:+.2f} % of the optimum; other images {means['mse_of_test_images']:.5f})"
            )
    if args.picture:
        (features,) = feature_maps(convolution, [images[0][:1]], data)
        draw(args.picture, features, drawn)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
