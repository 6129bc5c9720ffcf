"""A block of your own in multigrid form: its levels, and how its cost grows beside the dense one.

python examples/wrap_a_block.py
"""

import torch
from torch import Tensor, nn

import mgic


class MixerBlock(nn.Module):
    """Look around with a depthwise kernel, then mix the channels; anything of equal input and output shape will do."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.look = nn.Conv2d(channels, channels, 5, padding=2, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.mix1 = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)
        self.act = nn.GELU()
        self.mix2 = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x + K2 act(K1 N D x)``."""
        return x + self.mix2(self.act(self.mix1(self.norm(self.look(x)))))


def main() -> None:
    """Print the levels of one block, then a table over widths."""
    block = mgic.MGICBlock(MixerBlock, channels=256, group_size=16, coarsest=32)
    print("levels:", ", ".join(f"{lv.channels} in groups of {lv.channels // lv.groups}" for lv in block.levels))
    assert block(torch.randn(2, 256, 8, 8)).shape == (2, 256, 8, 8)
    print(f"outputs that depend on an input: {(block.to_dense() != 0).float().mean():.0%}\n")

    print(f"{'channels':>8} {'dense':>11} {'MGIC':>9} weights {'dense':>14} {'MGIC':>12} multiply-adds at 14 x 14")
    for channels in (64, 128, 256, 512, 1024):
        dense, ours = (
            mgic.cost(one, (channels, 14, 14))
            for one in (MixerBlock(channels, 1), mgic.MGICBlock(MixerBlock, channels, 16, 32))
        )
        print(f"{channels:8} {dense.params:11,} {ours.params:9,} {'':7} {dense.macs:14,} {ours.macs:12,}")


if __name__ == "__main__":
    main()
