import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgic import ChannelConfigError, fit_group_size, plan_levels
from mgic.hierarchy import (
    BASIC,
    BOTTLENECK,
    CONVOLUTION,
    Conv,
    bound_params,
    bound_params_2020,
    count_macs,
    count_params,
    describe_levels,
)
from mgic.scaling import fit_exponent


@pytest.mark.parametrize(
    ("channels", "group_size", "coarsest", "expected"),
    [
        (64, 8, 16, [(64, 8), (32, 4), (16, 1)]),
        (40, 8, 16, [(40, 5), (20, 4), (10, 1)]),
        (96, 64, 64, [(96, 2), (48, 1)]),
        (960, 64, 64, [(960, 15), (480, 8), (240, 4), (120, 2), (60, 1)]),
        (67, 8, 16, [(67, 1)]),
        (134, 8, 16, [(134, 67), (67, 1)]),
        (127, 8, 16, [(127, 1)]),
        (16, 8, 16, [(16, 1)]),
        (1, 8, 16, [(1, 1)]),
        (3, 8, 2, [(3, 1)]),
    ],
)
def test_level_tables_of_awkward_widths(channels, group_size, coarsest, expected):
    """Halve until at most s_c channels are left; an odd width stops the halving."""
    assert [(level.channels, level.groups) for level in plan_levels(channels, group_size, coarsest)] == expected


def test_the_four_rules_for_the_number_of_levels():
    def coarsest(**rule):
        return plan_levels(96, 16, 64, **rule)[-1].channels, plan_levels(64, 16, 64, **rule)[-1].channels

    assert coarsest() == (48, 64)  # the text of Sec. 3.3
    assert coarsest(rounding=math.floor) == (96, 64)  # Algorithm 1
    assert coarsest(minimum=1) == (48, 32)  # MGIC-ResNets
    assert coarsest(rounding=math.floor, extra=1, minimum=1) == (48, 32)  # 2020
    assert coarsest(maximum=0) == (96, 64)  # no hierarchy


@given(
    channels=st.integers(1, 512),
    hidden=st.one_of(st.none(), st.integers(1, 512)),
    group_size=st.integers(1, 64),
    coarsest=st.integers(1, 64),
    minimum=st.integers(0, 2),
    transfer=st.sampled_from([None, 2, 8]),
)
def test_every_plan_can_be_built(channels, hidden, group_size, coarsest, minimum, transfer):
    """Groups divide what they group, transfers halve, and only the last level is dense where that can be."""
    levels = plan_levels(channels, group_size, coarsest, hidden, minimum=minimum, transfer_group_size=transfer)
    assert (levels[0].channels, levels[0].hidden) == (channels, hidden or channels)
    for fine, coarse in itertools.pairwise(levels):
        assert (coarse.channels, coarse.hidden) == (fine.channels / 2, fine.hidden / 2)
        assert fine.channels % fine.transfer_groups == coarse.channels % fine.transfer_groups == 0
        assert fine.channels % fine.groups == fine.hidden % fine.groups == 0
        assert fine.groups > 1 or math.gcd(fine.channels, fine.hidden) == 1
        assert fine.transfer_group_size % 2 == 0
    assert levels[-1].groups == 1
    assert levels[-1].transfer_groups == 0
    narrow = min(levels[-1].channels, levels[-1].hidden)
    odd = levels[-1].channels % 2 or levels[-1].hidden % 2
    assert narrow <= coarsest or odd


def test_group_sizes_of_the_paper():
    """Sec. 4.3: c_out = 40 with #exp = 120 and s_g = 64 gives 40; the library keeps two groups above the coarsest."""
    assert fit_group_size(40, 64, hidden=120, min_groups=1) == 40
    assert fit_group_size(40, 64, hidden=120) == 20
    assert fit_group_size(64, 64, hidden=256) == 32
    assert [fit_group_size(c, 8) for c in (8, 12, 20, 64, 67, 1)] == [4, 6, 5, 8, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 8, 16), "channels must be a positive integer, got 0"),
        ((64, 0, 16), "group_size must be a positive integer, got 0"),
        ((64, 8, -1), "coarsest must be a positive integer, got -1"),
        ((64, 8, 16, 0), "hidden must be a positive integer, got 0"),
        ((64.0, 8, 16), "channels must be a positive integer, got 64.0"),
        ((True, 8, 16), "channels must be a positive integer, got True"),
    ],
)
def test_bad_widths_are_refused_by_name(arguments, words):
    with pytest.raises(ChannelConfigError, match=words):
        plan_levels(*arguments)


def test_bad_options_are_refused_by_name():
    with pytest.raises(ChannelConfigError, match=r"transfer_group_size must be even .* got 3"):
        plan_levels(64, 8, 16, transfer_group_size=3)
    for size in ("8", 8.0, 0, True):
        with pytest.raises(ChannelConfigError, match=f"transfer_group_size must be a positive integer, got {size!r}"):
            plan_levels(64, 8, 16, transfer_group_size=size)
    with pytest.raises(ChannelConfigError, match="minimum must be an integer, at least 0, got -1"):
        plan_levels(64, 8, 16, minimum=-1)
    with pytest.raises(ChannelConfigError, match=r"extra must be an integer, at least 0, got 0\.5"):
        plan_levels(64, 8, 16, extra=0.5)


def test_a_transfer_group_size_that_does_not_divide_becomes_fewer_larger_groups():
    assert [level.transfer_group_size for level in plan_levels(24, 8, 6, transfer_group_size=16)] == [24, 12, 0]
    assert plan_levels(40, 8, 20, transfer_group_size=16)[0].transfer_groups == 2


@pytest.mark.parametrize("group_size", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_counts_never_exceed_the_printed_bounds(group_size, kernel_size):
    """(3.5) and (15): they count one convolution a level, groups of s_g, and a coarsest level of at most s_c channels."""
    convs = (Conv(kernel_size, norm=False),)
    for channels in range(8, 4097):
        for coarsest in (group_size, 4 * group_size):
            levels = plan_levels(channels, group_size, coarsest)
            if levels[-1].channels > coarsest:  # an odd width stopped the halving
                continue
            assert all(level.group_size <= group_size for level in levels[:-1])
            if any(level.transfer_group_size > group_size for level in levels[:-1]):
                continue  # the common divisor with the next width has fewer groups than (3.5) assumes
            norms = sum(2 * level.channels for level in levels[:-1])
            assert count_params(levels, convs) - norms <= bound_params(channels, group_size, coarsest, kernel_size)
            relaxations = sum(convs[0].weights(level, 2) for level in levels)
            assert relaxations <= bound_params_2020(channels, group_size, len(levels) - 1, kernel_size)


def test_formula_3_5_is_exact_for_powers_of_two():
    """sum_j s_g c (d^2 + 1) / 2^j + s_c^2 d^2, where every width is a power of two."""
    for channels in (64, 128, 1024, 4096):
        for size, coarsest in ((8, 8), (8, 16), (16, 32), (32, 32)):
            levels = plan_levels(channels, size, coarsest)
            printed = sum(size * channels * 10 // 2**j for j in range(len(levels) - 1)) + coarsest**2 * 9
            assert count_macs(levels, 1, CONVOLUTION) == printed


@pytest.mark.parametrize("convs", [BASIC, BOTTLENECK, CONVOLUTION])
@pytest.mark.parametrize(("group_size", "coarsest"), [(4, 8), (8, 16), (16, 16), (32, 32)])
def test_cost_is_linear_in_the_width_and_that_of_the_dense_twin_quadratic(convs, group_size, coarsest):
    """The claim of all five papers, fitted over c = 2 s_c ... 4096 (a bottleneck's inner width: it plans the levels)."""
    outer = 4 if convs is BOTTLENECK else 1
    widths = [2**k for k in range(3, 13) if 2**k >= 2 * coarsest]

    def fitted(count, **rule):
        plans = {c: plan_levels(outer * c, group_size, coarsest, c, **rule) for c in widths}
        return fit_exponent([(c, count(plans[c])) for c in widths])

    for count in (lambda levels: count_params(levels, convs), lambda levels: count_macs(levels, 49, convs)):
        assert fitted(count) <= 1.10
        assert fitted(count, maximum=0) >= 1.9


def test_the_level_table_adds_up():
    text = describe_levels(plan_levels(960, 64, 64))
    weights = [int(line.split()[-2]) for line in text.splitlines()[1:]]
    assert sum(weights) == count_macs(plan_levels(960, 64, 64), 1)
