import warnings

import pytest
import torch
from torch import nn

import mgic
from mgic import BasicBlock, Bottleneck, MGICBlock, PreActBasicBlock, PreActBottleneck, UserError, cost, memory


@pytest.mark.parametrize(
    ("layer", "size", "macs"),
    [
        (nn.Conv2d(64, 64, 3, padding=1, groups=8, bias=False), (64, 14, 14), 9 * 64 * 8 * 196),
        (nn.Conv2d(64, 32, 1, groups=8), (64, 14, 14), 32 * 8 * 196),
        (nn.Conv1d(64, 64, 3, padding=1, groups=8), (64, 14), 3 * 64 * 8 * 14),
        (nn.Linear(64, 10), (64,), 640),
        (mgic.Restriction(64, 8), (64, 14, 14), 32 * 8 * 196),
        (mgic.GroupedLinear(64, 32, 4), (64,), 64 * 32 // 4),
        (nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)), (8, 4, 4), 0),
    ],
)
def test_macs_of_layers_equal_hand_counts(layer, size, macs):
    assert cost(layer, size).macs == macs


@pytest.mark.parametrize("name", ["resnet20", "mgic_resnet20", "mgic_resnet56"])
def test_macs_agree_with_a_second_counter(name):
    """fvcore counts the same multiply-adds from a trace, norms and pooling left out."""
    fvcore = pytest.importorskip("fvcore.nn")
    model = mgic.create_model(name).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = (
            fvcore.FlopCountAnalysis(model, torch.zeros(1, 3, 32, 32)).unsupported_ops_warnings(False).by_operator()
        )
    assert counts["conv"] + counts["linear"] == cost(model, (3, 32, 32)).macs


@pytest.mark.parametrize(("name", "params"), [("resnet20", 269_722), ("resnet56", 853_018), ("resnet110", 1_727_962)])
def test_plain_resnets_have_the_parameters_of_their_paper(name, params):
    """He et al. 2016, Table 6: 0.27 M, 0.85 M, 1.7 M."""
    assert cost(mgic.create_model(name), (3, 32, 32)).params == params


@pytest.mark.parametrize(
    ("group_size", "coarsest", "params", "macs"),
    [
        (8, 16, 301_690, 66_466_432),
        (16, 64, 512_506, 88_437_376),
        (16, 16, 476_794, 86_078_080),
        (32, 16, 651_898, 97_284_736),
        (4, 16, 203_194, 45_453_952),
    ],
)
def test_mgic_resnet56_has_its_pinned_counts(group_size, coarsest, params, macs):
    """Eliasof et al. 2023, Tables 3 and 12, in the plain count: everything trainable, all multiply-adds."""
    counted = cost(mgic.create_model("mgic_resnet56", group_size=group_size, coarsest=coarsest), (3, 32, 32))
    assert (counted.params, counted.macs) == (params, macs)


def test_counting_leaves_the_network_alone():
    model = mgic.create_model("mgic_resnet20").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cost(model, (3, 32, 32))
    memory(model, (3, 32, 32), batch=2)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_products_of_attention_count_too():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    layers, products = 100 * 4 * 64 * 64, 2 * 100 * 100 * 64
    assert cost(Attention(), (100, 64)).macs == layers + products == 2_918_400


def test_shared_and_frozen_parameters():
    layer = nn.Linear(8, 8, bias=False)
    assert cost(nn.Sequential(layer, layer), (8,)).params == 64
    assert cost(nn.Sequential(layer, nn.Linear(8, 8).requires_grad_(False)), (8,)).params == 64


def test_an_impossible_input_is_refused():
    with pytest.raises(UserError, match=r"Conv2d cannot take 1 input\(s\) of size \(4, 8, 8\)"):
        cost(nn.Conv2d(3, 8, 3), (4, 8, 8))


@pytest.mark.parametrize("channels", [64, 256, 1024])
@pytest.mark.parametrize("block", [BasicBlock, PreActBasicBlock, Bottleneck, PreActBottleneck])
def test_inference_memory_is_that_of_the_finest_level_and_its_input(block, channels):
    """Sec. 3.4: coarse features are released on the way up. Counted bytes, x counted in both: at most 1.34 times."""
    hidden = channels // 4 if "Bottleneck" in block.__name__ else None
    multigrid = MGICBlock(block, channels, 8, 16, hidden)
    size = (channels, 14, 14)
    alone = memory(multigrid.relax[0], size)
    whole = memory(multigrid, size)
    assert whole.inference <= 1.34 * alone.inference
    if len(multigrid.levels) > 1:
        assert whole.inference > alone.inference


@pytest.mark.parametrize("block", [BasicBlock, PreActBasicBlock, Bottleneck, PreActBottleneck])
def test_training_memory_and_what_checkpointing_saves(block, capsys):
    """The paper says about twice one block; counted, transfers and norms included, it is two to three times.

    Checkpointing each level brings it back to at most twice.
    """
    hidden = 64 if "Bottleneck" in block.__name__ else None
    multigrid = MGICBlock(block, 256, 8, 16, hidden)
    alone, whole = memory(multigrid.relax[0], (256, 14, 14)), memory(multigrid, (256, 14, 14))
    multigrid.set_grad_checkpointing()
    saving = memory(multigrid, (256, 14, 14))
    ratio, saved = whole.saved / alone.saved, saving.saved / alone.saved
    with capsys.disabled():
        print(f"\n{block.__name__}: training features {ratio:.2f} x one block's, {saved:.2f} x with checkpointing")
    assert 2 <= ratio <= 3
    assert saved <= min(2, 0.7 * ratio)
    assert saving.training < whole.training


def test_memory_counts_what_is_alive():
    """Maps of 100 floats: a chain holds its input and two maps; training keeps what the backward pass needs."""

    class Chain(nn.Module):
        def forward(self, x):
            for _ in range(3):
                x = x.sin()
            return x

    counted = memory(Chain(), (100,))
    assert counted.inference == 3 * 400  # the input, one map, and the map made from it
    net = nn.Sequential(nn.Linear(100, 100), nn.Sigmoid(), nn.Linear(100, 100), nn.Sigmoid())
    assert memory(net, (100,)).saved == 3 * 400  # the input and what the sigmoids made; not what the linear layers made
