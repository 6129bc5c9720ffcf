"""timm's contract, for every registered network: no test here leaves one out.

Deep and wide networks are built short and narrow by arguments of their own: the contract is one of structure. Their full
size is counted in ``test_networks.py``.
"""

import copy
import math

import pytest
import timm
import torch
from families import small
from timm.models import save_for_hf
from timm.optim import param_groups_layer_decay
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import mgic
from mgic import UserError

models = pytest.mark.parametrize("name", [name for name in mgic.list_models() if timm.is_model(name)])


def side(name):
    return 64 if timm.get_pretrained_cfg(name).input_size[-1] > 64 else 16


def images(name, batch=2, in_chans=3):
    return torch.randn(batch, in_chans, side(name), side(name))


def settled(name, **overrides):
    """A network that has left its start, where much is zero or one, with the statistics of some data."""
    model = small(name, **overrides)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        norm.momentum = None  # the running statistics become those of the one batch
    model(images(name, batch=4))
    for norm in norms:
        norm.momentum = 0.1
    return model


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@models
def test_outputs_are_finite_at_two_sizes(name):
    model = settled(name).eval()
    for height, width in ((side(name), side(name)), (side(name) + 9, side(name) - 3)):
        y = model(torch.randn(2, 3, height, width))
        assert y.shape == (2, model.num_classes)
        assert y.isfinite().all()


@models
def test_every_parameter_has_a_gradient(name):
    model = small(name)
    model(images(name)).square().mean().backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@models
def test_features_have_the_declared_channels_and_reductions(name):
    model = small(name, features_only=True).eval()
    x = torch.randn(1, 3, side(name) + 7, side(name))
    features = model(x)
    info = model.feature_info
    assert [f.shape[1] for f in features] == info.channels()
    assert [f.shape[2:] for f in features] == [
        tuple(math.ceil(n / reduction) for n in x.shape[2:]) for reduction in info.reduction()
    ]
    assert sorted(set(info.reduction())) == info.reduction()


@models
def test_intermediates_are_the_features(name):
    torch.manual_seed(1)
    model = small(name).eval()
    torch.manual_seed(1)
    extractor = small(name, features_only=True).eval()
    x = images(name)
    last, intermediates = model.forward_intermediates(x)
    same(last, model.forward_features(x))
    for feature, intermediate in zip(extractor(x), intermediates, strict=True):
        same(feature, intermediate)
    same(model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True), intermediates[:1])
    same(model.forward_intermediates(x, indices=2, intermediates_only=True), intermediates[-2:])


@models
def test_chosen_features_need_only_their_layers(name):
    torch.manual_seed(1)
    extractor = small(name, features_only=True, out_indices=(0, -2)).eval()
    torch.manual_seed(1)
    model = small(name)
    x = images(name)
    indices = [0, len(model.feature_info) - 2]
    expected = model.eval().forward_intermediates(x, indices=indices, intermediates_only=True)
    for feature, intermediate in zip(extractor(x), expected, strict=True):
        same(feature, intermediate)
    used = extractor.train()(x)[-1].sum() + extractor(x)[0].sum()
    used.backward()
    assert not [key for key, p in extractor.named_parameters() if p.grad is None]
    assert sum(p.numel() for p in extractor.parameters()) < sum(p.numel() for p in model.parameters())


@models
def test_a_new_classifier_leaves_the_features_alone(name):
    model = small(name).eval()
    x = images(name)
    features, pooled = model.forward_features(x), model.forward_head(model.forward_features(x), pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    assert features.shape[1] == model.num_features
    model.reset_classifier(7)
    assert model(x).shape == (2, model.num_classes) == (2, 7)
    assert model.get_classifier().out_features == 7
    same(model.forward_features(x), features)
    model.reset_classifier(0)
    same(model(x), pooled)
    model.reset_classifier(0, "")
    assert model(x).shape[2:] == features.shape[2:]


@models
@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_images_have_any_number_of_channels_and_classes(name, in_chans):
    model = small(name, in_chans=in_chans, num_classes=5).eval()
    assert model(images(name, in_chans=in_chans)).shape == (2, 5)
    assert model.num_classes == 5
    headless = small(name, in_chans=in_chans, num_classes=0).eval()
    assert headless(images(name, in_chans=in_chans)).shape == (2, headless.head_hidden_size)


@models
def test_checkpointing_changes_neither_outputs_nor_gradients_nor_statistics(name):
    plain = settled(name)
    recomputed = copy.deepcopy(plain)
    recomputed.set_grad_checkpointing()
    x = images(name)
    for model in (plain, recomputed):
        model(x).square().mean().backward()
    same(recomputed(x), plain(x))
    for (key, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=0, msg=key)
    for (key, p), q in zip(plain.named_buffers(), recomputed.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=0, msg=key)


@models
def test_traced_by_fx_it_is_the_same(name):
    model = settled(name).eval()
    x = images(name)
    same(torch.fx.symbolic_trace(model)(x), model(x))
    nodes = create_feature_extractor(model, {"head": "y"})
    same(nodes(x)["y"], model(x))


@models
def test_exported_it_is_the_same(name):
    model = settled(name).eval()
    x = images(name)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for batch in (x, images(name, batch=3)):
        close(exported(batch), model(batch), 1e-5)


@pytest.mark.parametrize("name", ["mgic_resnet20", "mgic_resnet50", "mg_resnet_cifar", "mgiad20"])
def test_compiled_without_a_graph_break_it_is_the_same(name):
    model = settled(name)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    x = images(name)
    losses = [m(x).square().mean() for m in (model, compiled)]
    close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for p, q in zip(model.parameters(), compiled.parameters(), strict=True):
        close(q.grad, p.grad, 1e-3)


@models
def test_channels_last_gives_the_same(name):
    model = settled(name).eval()
    x = images(name)
    expected = model(x)
    close(model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)), expected)


@models
def test_bfloat16_autocast_is_finite_and_close(name):
    """Within 5 %, at the start: rounding weights and images alone moves these outputs by up to 2 %."""
    model = small(name).eval()
    x = images(name)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    expected = model(x)
    assert y.isfinite().all()
    assert (y.float() - expected).norm() < 0.05 * expected.norm()


@models
def test_saved_weights_load_strictly_into_another_start(name, tmp_path):
    model, other = settled(name).eval(), small(name).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
    x = images(name)
    same(other(x), model(x))


@models
def test_a_local_directory_of_timm_round_trips(name, tmp_path):
    model = settled(name, num_classes=6).eval()
    save_for_hf(model, tmp_path, safe_serialization=False)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(name)
    same(loaded(x), model(x))


@models
def test_metadata_describe_the_network(name):
    with torch.device("meta"):
        model = mgic.create_model(name)
    cfg = model.pretrained_cfg
    assert cfg["architecture"] == name
    assert model.num_classes == cfg["num_classes"] == model.get_submodule(cfg["classifier"]).out_features
    conv = model.get_submodule(cfg["first_conv"])
    assert conv is next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert conv.in_channels == cfg["input_size"][0]
    features = model.eval().forward_features(torch.empty(1, *cfg["input_size"], device="meta"))
    assert features.shape == (1, model.num_features, *cfg["pool_size"])
    assert timm.data.resolve_model_data_config(model)["input_size"] == cfg["input_size"]
    assert timm.is_model(name)
    assert not timm.is_model_pretrained(name)


@models
def test_layer_decay_knows_every_layer(name):
    model = small(name)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scales[id(model.get_classifier().weight)] == 1.0
    first, last = model.stem.conv.weight, next(iter(model.stages[-1].parameters()))
    assert scales[id(first)] < scales[id(last)] < 1.0


@models
def test_weights_that_do_not_exist_are_refused_with_what_to_do_instead(name):
    with pytest.raises(
        UserError, match=rf"no pretrained weights exist for '{name}': train it .*checkpoint_path=.*timm"
    ):
        timm.create_model(name, pretrained=True)


@models
def test_unknown_arguments_are_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match=rf"{name} has no argument 'groupsize'; it has .*num_classes"):
        timm.create_model(name, groupsize=8)
