"""R and P alone: their error follows from second moments, and its minimum from the principal components of each tree."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mgic import ChannelConfigError, UserError
from mgic.counting import count_trainable
from mgic.representation import (
    optimal_error,
    optimal_transfers,
    reconstruction_error,
    second_moments,
    train_transfers,
    transfers_alone,
)
from mgic.tables import build_figure

ROOT = Path(__file__).parents[1]
SIZES = [(64, 32, 8), (64, 16, 8), (64, 8, 8), (64, 4, 8), (64, 2, 8), (32, 8, 2), (16, 4, 4), (48, 16, 24), (8, 8, 4)]
"""``(channels, group_size, coarsest)``, the four of Table 1 first."""


def features(channels, positions=400):
    """Feature maps with neighbours that are alike, of unequal strength."""
    mix = torch.randn(channels, channels).cumsum(0) * torch.logspace(0, -1, channels)
    return (mix @ torch.randn(channels, positions)).view(channels, 4, -1, 10).transpose(0, 1).contiguous()


@pytest.mark.parametrize(("group_size", "params"), [(32, 3328), (16, 1792), (8, 896), (4, 448)])
def test_table_1_counts_these_weights(group_size, params):
    assert count_trainable(transfers_alone(64, group_size, 8)) == params


def test_the_error_from_second_moments_is_the_mean_squared_error_of_the_maps_and_so_is_its_gradient():
    x = features(16)
    transfers = transfers_alone(16, 4, 4)
    moments = second_moments(x.split(1))
    torch.testing.assert_close(moments, torch.einsum("nchw,ndhw->cd", x.double(), x.double()) / 400)
    by_moments = torch.autograd.grad(reconstruction_error(transfers, moments), list(transfers.parameters()))
    loss = nn.functional.mse_loss(transfers(x), x)
    torch.testing.assert_close(reconstruction_error(transfers, moments), loss)
    torch.testing.assert_close(by_moments, torch.autograd.grad(loss, list(transfers.parameters())))


@pytest.mark.parametrize(("channels", "group_size", "coarsest"), SIZES)
def test_the_optimum_is_reached_by_weights_that_are_given(channels, group_size, coarsest):
    x = features(channels)
    moments = second_moments([x])
    transfers = optimal_transfers(moments, group_size, coarsest)
    assert count_trainable(transfers) == count_trainable(transfers_alone(channels, group_size, coarsest))
    with torch.no_grad():
        error = nn.functional.mse_loss(transfers(x), x)
    assert float(error) == pytest.approx(optimal_error(moments, group_size, coarsest), rel=1e-4)


@pytest.mark.parametrize(("channels", "group_size", "coarsest"), SIZES)
def test_no_weights_do_better_than_the_optimum(channels, group_size, coarsest):
    """Nor do those a descent from the optimum's neighbourhood finds; at the optimum the gradient vanishes."""
    moments = second_moments([features(channels)])
    moments = moments / moments.trace() * channels
    least = optimal_error(moments, group_size, coarsest)
    transfers = optimal_transfers(moments, group_size, coarsest).double()
    loss = reconstruction_error(transfers, moments)
    gradients = torch.autograd.grad(loss, list(transfers.parameters()))
    assert max(float(g.abs().max()) for g in gradients) < 1e-6
    with torch.no_grad():
        for parameter in transfers.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    optimizer = torch.optim.Adam(transfers.parameters(), lr=0.003)
    for _ in range(60):
        optimizer.zero_grad()
        loss = reconstruction_error(transfers, moments)
        torch.autograd.backward(loss)
        optimizer.step()
        assert float(loss.detach()) > least * (1 - 1e-9)


def test_one_tree_is_the_best_approximation_of_low_rank():
    """Eckart and Young: with groups of twice the code or more, no linear code of this length is better."""
    x = features(32)
    pixels = x.transpose(0, 1).flatten(1).double()
    lost = torch.linalg.svdvals(pixels)[4:].square().sum() / pixels.numel()
    for group_size in (8, 16, 32):
        assert optimal_error(second_moments([x]), group_size, 4) == pytest.approx(float(lost))


def test_larger_groups_are_better_until_there_is_one_tree():
    moments = second_moments([features(64)])
    errors = [optimal_error(moments, group_size, 8) for group_size in (2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == 4
    assert optimal_error(moments, 32, 8) == errors[-1]


@pytest.mark.parametrize("group_size", [8, 4, 2])
def test_training_comes_within_two_percent_of_the_optimum(group_size):
    moments = 1e4 * second_moments([features(16)])
    transfers = train_transfers(moments, group_size, 4, steps=400)
    error = float(reconstruction_error(transfers, moments).detach())
    least = optimal_error(moments, group_size, 4)
    assert least * (1 - 1e-5) < error < 1.02 * least


def test_training_follows_from_its_seed_alone():
    moments = second_moments([features(16)])
    one, same, other = (train_transfers(moments, 4, 4, steps=3, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: second_moments([]), UserError, "no features at all"),
        (lambda: train_transfers(torch.zeros(8, 8), 4, 4), UserError, "mean square of 0.0"),
        (lambda: train_transfers(torch.full((8, 8), float("nan")), 4, 4), UserError, "mean square of nan"),
        (lambda: optimal_error(torch.eye(8), 4, 8), ChannelConfigError, "8 channels are the coarsest grid already"),
        (lambda: optimal_error(torch.eye(48), 16, 12), ChannelConfigError, "48 in 3 groups, 24 in 2 groups are not"),
    ],
)
def test_what_cannot_be_encoded_is_refused(call, error, said):
    with pytest.raises(error, match=said):
        call()


@pytest.fixture(scope="module")
def experiment():
    spec = importlib.util.spec_from_file_location("coarse", ROOT / "benchmarks" / "coarse_representation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_experiment_writes_what_the_figure_draws(experiment, tmp_path, monkeypatch, capsys):
    network = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 3, 1))
    monkeypatch.setattr(experiment, "trained_network", lambda run, data: network)
    monkeypatch.setattr(experiment, "load_run", lambda run: type("Saved", (), {"recipe": experiment_recipe}))
    words = ["--run=runs/a", "--data=digits", "--seeds=2", "--steps=5", f"--results={tmp_path}"]
    experiment.main([*words, f"--picture={tmp_path / 'three.png'}"])
    assert (tmp_path / "three.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    _, (panel,) = build_figure("mgic-3", records)
    assert {name: [int(x) for x, _ in points] for name, points in panel.measured.items()} == {
        "trained": [448, 896, 1792, 3328],
        "optimum": [448, 896, 1792, 3328],
    }
    optima = [y for _, y in panel.measured["optimum"]]
    assert optima[0] > optima[1] > optima[2] == pytest.approx(optima[3], rel=1e-6)
    for record in records:
        above = record["metrics"]["percent_above_optimum"]["mean"]
        assert abs(above) < 1e-3 if record["series"] == "optimum" else above > 0
        assert "runs/a" not in record["command"]
    assert capsys.readouterr().out.count("s_g = ") == 8


class experiment_recipe:  # noqa: N801
    model = "a network"


def test_images_are_drawn_once_and_from_anywhere_in_the_split(experiment):
    from mgic.data import load_data

    split = load_data("digits").train
    drawn = torch.cat(experiment.chosen_images(split, seed=0))
    order = experiment.epoch_order(len(split), 0, 0)[:1024].sort().values
    assert torch.equal(drawn, split.images[order])
    assert len(drawn) == 1024


def test_weights_that_cannot_be_fetched_are_one_clear_error(experiment, monkeypatch):
    def unreachable(name, pretrained):
        raise FileNotFoundError("cannot reach the hub\nand more lines")

    monkeypatch.setattr(experiment.timm, "create_model", unreachable)
    said = r"weights of resnet50 cannot be had from the Hugging Face hub \(cannot reach the hub\); --run takes"
    with pytest.raises(UserError, match=said):
        experiment.pretrained_network("resnet50")
