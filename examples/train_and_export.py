"""Train a small multigrid network on handwritten digits, find its fastest runtime, write an ONNX file and run that.

python examples/train_and_export.py    (needs the extras train and onnx)
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import mgic
from mgic.data import load_data
from mgic.exporting import load_artefact
from mgic.training import RECIPES, load_run, train


def network() -> nn.Module:
    """One multigrid block of 64 channels at 4 x 4 pixels, one of 128 at 2 x 2."""
    return nn.Sequential(
        mgic.ChannelChange(1, 64, stride=2),
        mgic.MGICBlock(mgic.BasicBlock, 64, group_size=16, coarsest=32),
        mgic.ChannelChange(64, 128, stride=2),
        mgic.MGICBlock(mgic.BasicBlock, 128, group_size=16, coarsest=32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def main() -> None:
    """Train, accelerate, export; compare what the three say."""
    digits = load_data("digits")
    recipe = replace(RECIPES["digits"], model="two blocks", epochs=3, batch_size=64)
    with tempfile.TemporaryDirectory() as folder:
        train(recipe, network, digits, Path(folder, "run"), progress=False)
        net = network()
        net.load_state_dict(load_run(Path(folder, "run")).state_dict)
        net.eval()
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (digits.mean, digits.std))
        images, labels = (digits.test.images / 255 - mean) / std, digits.test.labels

        fast = mgic.accelerate(net, images[:1], paths=["eager", "engine"])
        print(fast.report)
        mgic.export(net, images[:1], Path(folder, "digits.onnx"))
        file = load_artefact(Path(folder, "digits.onnx"), threads=1)
        with torch.no_grad():
            for name, run in {"eager": net, "fastest": fast, "ONNX file": file}.items():
                right = (run(images).argmax(1) == labels).float().mean()
                print(f"{name:10} {right:.1%} of {len(labels)} test images right")


if __name__ == "__main__":
    main()
