"""Blocks of any width and group size are built, are the plain block where they should be, and couple all channels.

The ids R14 to R16 are those of the fault table.
"""

import os
from functools import partial

import pytest
import torch
from families import FAMILIES, small
from torch import nn

import mgic
from mgic import (
    BasicBlock,
    Bottleneck,
    ChannelConfigError,
    MGICBlock,
    PreActBasicBlock,
    PreActBottleneck,
    Scheme,
    additive,
)
from mgic.models.mobilenetv3 import InvertedBottleneck

FULL = os.environ.get("MGIC_FAULTS") == "full"


@pytest.mark.parametrize(
    ("block", "expansions"), [(BasicBlock, [None]), (Bottleneck, [0.25, 0.5, 1.5]), (InvertedBottleneck, [2, 3, 6])]
)
def test_r14_every_width_and_group_size_is_built_or_refused_in_one_way(block, expansions, trials):
    """More than 10,000 combinations of width, expansion and group size on the meta device."""
    built = refused = 0
    for channels in range(8, 257, 1 if FULL else 31):
        for expansion in expansions:
            hidden = None if expansion is None else max(int(channels * expansion), 1)
            for group_size in (1, 3, 8, 16, 40, 64):
                try:
                    with torch.device("meta"):
                        module = MGICBlock(block, channels, group_size, 16, hidden).eval()
                except ChannelConfigError:
                    refused += 1
                    continue
                with torch.no_grad():
                    y = module(torch.empty(2, channels, 3, 2, device="meta"))
                assert y.shape == (2, channels, 3, 2)
                for level in module.levels:
                    assert level.channels % level.groups == level.hidden % level.groups == 0
                assert module.levels[-1].groups == 1
                built += 1
    assert refused == 0, "nothing is too odd for the repair"
    trials.passes(built)


@pytest.mark.parametrize("arguments", [(0, 8, 16), (-4, 8, 16), (16, 0, 16), (16, 8, 0), (16.0, 8, 16), (16, True, 16)])
def test_r14_what_is_no_width_is_refused_by_name(arguments):
    with pytest.raises(ChannelConfigError, match=r"(channels|group_size|coarsest) must be a positive integer, got "):
        MGICBlock(BasicBlock, *arguments)


@pytest.mark.parametrize("cycle", [mgic.multiplicative, additive])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck])
def test_r15_where_nothing_is_coarsened_the_block_is_the_wrapped_one(block, cycle, trials):
    """At and below the coarsest width, and above it where the width is odd: one dense level, equal to the last bit."""
    coarsest = 16
    for channels in (1, 2, 3, 5, 7, 8, 13, 15, 16, 17, 19, 31, 33, 97):
        hidden = max(channels // 4, 1) if block in (Bottleneck, PreActBottleneck) else None
        multigrid = MGICBlock(block, channels, 4, coarsest, hidden, scheme=Scheme(cycle=cycle))
        assert [level.groups for level in multigrid.levels] == [1]
        plain = block(channels, 1) if hidden is None else block(channels, 1, hidden)
        plain.load_state_dict(multigrid.relax[0].state_dict())
        x = torch.randn(2, channels, 5, 5)
        for training in (True, False):
            with torch.no_grad():
                difference = (multigrid.train(training)(x) - plain.train(training)(x)).abs().max()
            assert difference == 0
            trials.passes(difference=float(difference))


@pytest.mark.parametrize(("channels", "widths"), [(18, [18, 9]), (32, [32, 16]), (34, [34, 17]), (68, [68, 34, 17])])
def test_r15_just_above_the_coarsest_width_it_is_halved_until_that_or_an_odd_width(channels, widths):
    block = MGICBlock(BasicBlock, channels, 4, 16)
    assert [level.channels for level in block.levels] == widths
    assert block(torch.randn(2, channels, 3, 3)).shape == (2, channels, 3, 3)


def coupled(block, channels, inputs=16):
    """The share of pairs of channels in which the input reaches the output: the union over random inputs.

    One input channel at a time is changed; what it does not reach stays as it is, to rounding.
    """
    found = torch.zeros(channels, channels, dtype=torch.bool)
    for _ in range(inputs):
        base = torch.randn(1, channels, 3, 3, dtype=torch.float64)
        for chunk in torch.arange(channels).split(64):
            changed = base.repeat(len(chunk) + 1, 1, 1, 1)
            changed[torch.arange(len(chunk)), chunk] += torch.randn(len(chunk), 3, 3, dtype=torch.float64)
            with torch.no_grad():
                y = block(changed)
            moved = (y[:-1] - y[-1]).abs().amax((2, 3))
            found[chunk] |= moved > 1e-12 * y.abs().max()
        if found.all():
            break
    return found.double().mean().item()


def block_width(block):
    return block.levels[0].channels


MULTIGRID = [n for n in mgic.list_models() if "mgic" in n or n.startswith("mg_")]


@pytest.mark.parametrize("name", [n for n in (MULTIGRID if FULL else FAMILIES) if n in MULTIGRID and "gcn" not in n])
def test_r16_every_block_of_every_network_couples_all_its_channels(name, trials):
    """One block of each kind and width; its grouped relaxation alone, the control, leaves groups apart."""
    blocks = {}
    for block in small(name).double().eval().modules():
        if isinstance(block, MGICBlock):
            blocks.setdefault((block_width(block), block.levels[0].hidden, type(block.relax[0])), block)
    assert blocks
    controls = []
    for (channels, _, _), block in blocks.items():
        assert coupled(block, channels) == 1
        if block.levels[0].groups > 1 and not _attends(block.relax[0]):
            controls.append(coupled(block.relax[0], channels, inputs=2))
        trials.passes()
    assert all(share < 1 for share in controls)


def _attends(block):
    """Whether the block looks at all channels at once: squeeze and excitation."""
    return not isinstance(getattr(block, "attention", nn.Identity()), nn.Identity)


@pytest.mark.parametrize("name", ["mgiad18", "mgiad20", "mgnet18"])
def test_r16_smoothing_of_every_level_couples_all_its_channels(name, trials):
    model = small(name).double().eval()
    for smooth in model.stages:
        channels = smooth.levels[0].channels if hasattr(smooth, "levels") else smooth.first_A.in_channels
        data = torch.randn(1, channels, 3, 3, dtype=torch.float64)
        assert coupled(lambda u, smooth=smooth, data=data: smooth(data.expand(len(u), -1, -1, -1), u), channels) == 1
        trials.passes()


def test_r16_the_measure_sees_what_is_not_coupled():
    block = MGICBlock(partial(BasicBlock), 16, 4, 4).double().eval()
    assert coupled(block.relax[0], 16) == 0.25
    block.correction = lambda relaxed, restricted: 0 * relaxed
    assert coupled(block, 16) == 0.25
