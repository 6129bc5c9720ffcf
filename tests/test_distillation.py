"""Trained weights that a run depends on: a teacher to learn from, and weights to start from."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import RECIPE, STEPS_PER_EPOCH, stripes, tiny
from torch import nn
from torch.nn import functional as F

import mgic
from mgic.cli import main
from mgic.data import augment_batch, epoch_order, random_key, regression
from mgic.errors import UserError
from mgic.training import CorruptCheckpoint, load_network, load_run, load_start, read_record, train
from mgic.training.checkpoint import newest_checkpoint
from mgic.training.distillation import common_features, feature_loss, logit_loss, outputs_and_features
from mgic.training.files import sha256
from mgic.training.folder import read_recipe, read_sources
from mgic.training.weights import save_weights


class Staged(nn.Module):
    """Two stages with batch statistics, dropout before a classifier that tells where it is."""

    def __init__(self, width=6, classes=3):
        super().__init__()
        self.stages = nn.Sequential(self.stage(1, width), self.stage(width, 2 * width))
        self.fc = nn.Linear(2 * width, classes)

    @staticmethod
    def stage(before, width):
        return nn.Sequential(nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())

    def forward_features(self, x):
        return self.stages(x)

    def forward_head(self, x):
        return self.fc(F.dropout(x.mean((2, 3)), 0.2, self.training))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    def get_classifier(self):
        return self.fc


class Intermediate(Staged):
    """The same with timm's way to features."""

    def forward_intermediates(self, x):
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return x, features


TAUGHT = replace(RECIPE, distill_weight=0.7, distill_temperature=3.0, distill_features=0.4)


def build(name="tiny", **arguments):
    return {"tiny": tiny, "staged": Staged, "intermediate": Intermediate}[name]()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs of three epochs: the teacher ``staged``, another one of another seed, and ``tiny``."""
    folder = tmp_path_factory.mktemp("runs")
    for name, model, seed in (("staged", "staged", 5), ("other", "staged", 6), ("tiny", "tiny", 5)):
        recipe = replace(RECIPE, model=model, epochs=3, seed=seed)
        train(recipe, lambda model=model: build(model), stripes(), folder / name, progress=False)
    return folder


@pytest.fixture
def teacher(runs):
    return load_network(runs / "staged", build)


def weights(folder):
    return load_run(folder).state_dict


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# The losses


def test_the_logit_loss_is_the_divergence_written_out_with_gradients_of_one_size():
    """T^2 sum p_t (log p_t - log p): for large T its gradient no longer depends on T (Hinton et al. 2015, Sec. 2.1)."""
    z, t = torch.randn(5, 4, dtype=torch.double, requires_grad=True), torch.randn(5, 4, dtype=torch.double)
    p, q = (t / 3).softmax(1), (z / 3).softmax(1)
    torch.testing.assert_close(logit_loss(z, t, 3.0), 9 * (p * (p / q).log()).sum(1).mean())
    gradients = [torch.autograd.grad(logit_loss(z, t, temperature), z)[0] for temperature in (1e3, 1e4)]
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-5)
    assert torch.autograd.gradcheck(lambda z: logit_loss(z, t, 2.0), z)


@pytest.mark.parametrize("shape", [(6, 3, 5, 4), (7, 2, 9), (8, 4)])
def test_the_feature_loss_is_one_minus_the_correlation_of_each_channel(shape):
    ours, theirs = torch.randn(2, *shape)
    pairs = zip(ours.transpose(0, 1).flatten(1), theirs.transpose(0, 1).flatten(1), strict=True)
    expected = torch.stack([1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean()
    torch.testing.assert_close(feature_loss(ours, theirs), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(feature_loss(2 * ours - 3, 5 * theirs + 1), expected, rtol=1e-4, atol=1e-5)


def test_a_constant_channel_of_the_teacher_gives_finite_gradients():
    x = torch.zeros(4, 2, 3, 3, requires_grad=True)
    feature_loss(x, torch.ones(4, 2, 3, 3)).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", ["mgic_resnet20", "resnet20", "mgiad20", "resnet18"])
def test_features_come_with_the_logits_of_the_ordinary_forward_pass(name):
    """Asking for features must not change what is trained: in training mode, with the same random numbers."""
    model = mgic.create_model(name, num_classes=3, drop_rate=0.3).train()
    x, found = torch.randn(2, 3, 32, 32), []
    for forward in (model, lambda x: outputs_and_features(model, x)[0]):
        torch.manual_seed(1)
        found.append(forward(x))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_hooks_on_stages_find_what_forward_intermediates_returns():
    torch.manual_seed(0)
    one, other = Staged().eval(), Intermediate().eval()
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 1, 8, 8)
    (a, features), (b, intermediates) = outputs_and_features(one, x), outputs_and_features(other, x)
    assert torch.equal(a, b)
    assert all(map(torch.equal, features, intermediates))
    assert len(features) == 2
    assert not one.stages[0]._forward_hooks


def test_features_of_one_shape_are_paired_from_the_end():
    shapes = [(8, 4, 4), (8, 4, 4), (16, 2, 2)]
    assert common_features(shapes, [(16, 2, 2), (8, 4, 4)]) == [(1, 1), (2, 0)]
    with pytest.raises(UserError, match=r"features are 8x4x4, 16x2x2, the teacher's 4x4x4 .*none in common"):
        common_features([(8, 4, 4), (16, 2, 2)], [(4, 4, 4)])


# The loop


def _plain_loop(recipe, data, network, teacher):
    """The naive twin: everything of the lesson written out."""
    torch.manual_seed(random_key("init", recipe.seed))
    model, length = network(), len(data.train)
    per_epoch = length // recipe.batch_size
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    for step in range(recipe.epochs * per_epoch):
        epoch, batch = divmod(step, per_epoch)
        chosen = epoch_order(length, recipe.seed, epoch)[batch * recipe.batch_size :][: recipe.batch_size]
        generator = torch.Generator().manual_seed(random_key("augment", recipe.seed, step))
        images = augment_batch(data.train.images[chosen], generator, recipe.crop_padding, recipe.flip)
        x = (images / 255 - 0.3) / 0.2
        with torch.no_grad():
            seen = [teacher.stages[0](x), teacher.stages(x)]
            taught = (teacher.fc(seen[1].mean((2, 3))) / recipe.distill_temperature).softmax(1)
        torch.manual_seed(random_key("step", recipe.seed, step))
        ours = [model.stages[0](x)]
        ours.append(model.stages[1](ours[0]))
        logits = model.forward_head(ours[1])
        told = (taught * (taught.log() - (logits / recipe.distill_temperature).log_softmax(1))).sum(1).mean()
        loss = (1 - recipe.distill_weight) * F.cross_entropy(logits, data.train.labels[chosen])
        loss = loss + recipe.distill_weight * recipe.distill_temperature**2 * told
        apart = []
        for a, b in zip(ours, seen, strict=True):
            a, b = (y.transpose(0, 1).flatten(1) for y in (a, b))
            a, b = (
                (y - y.mean(1, keepdim=True)) / (y.var(1, correction=0, keepdim=True) + 1e-6).sqrt() for y in (a, b)
            )
            apart.append(1 / 2 * ((a - b) ** 2).mean())
        loss = loss + recipe.distill_features * sum(apart) / 2
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(step, per_epoch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("network", [Staged, Intermediate])
@pytest.mark.parametrize("changes", [{}, {"distill_features": 0.0}, {"distill_weight": 0.0}], ids=str)
def test_distillation_equals_a_plain_loop(tmp_path, teacher, network, changes):
    recipe = replace(TAUGHT, epochs=2, ema_decay=0.0, **changes)
    train(recipe, network, stripes(), tmp_path / "run", teacher=teacher)
    expected = _plain_loop(recipe, stripes(), network, teacher.model)
    torch.testing.assert_close(weights(tmp_path / "run"), dict(expected), rtol=1e-3, atol=1e-5)


def test_a_teacher_without_weight_leaves_every_bit_as_it_was(tmp_path, teacher):
    """It draws no random numbers and moves no statistics of the network: a weight too small for float32 changes nothing."""
    train(RECIPE, Staged, stripes(), tmp_path / "alone")
    train(replace(RECIPE, distill_weight=1e-30), Staged, stripes(), tmp_path / "taught", teacher=teacher)
    assert same(weights(tmp_path / "alone"), weights(tmp_path / "taught"))


def test_the_teacher_stays_as_it_is_and_out_of_the_checkpoint(tmp_path, runs, teacher):
    before = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    train(TAUGHT, Staged, stripes(), tmp_path / "run", teacher=teacher)
    assert same(teacher.model.state_dict(), before)
    assert not teacher.model.training
    assert all(p.requires_grad and p.grad is None for p in teacher.model.parameters())
    state = newest_checkpoint(tmp_path / "run/checkpoints")
    assert state["model"].keys() == Staged().state_dict().keys()
    assert len(state["optimizer"]["state"]) == len(list(Staged().parameters()))
    noted = read_sources(tmp_path / "run")["teacher"]
    assert noted["sha256"] == sha256(runs / "staged/model.safetensors")
    assert noted["scores"]["test_accuracy"] == json.loads((runs / "staged/summary.json").read_text())["test_accuracy"]


def test_the_teacher_sees_the_pixels_as_it_was_trained_to(tmp_path, teacher):
    """Another normalisation of the network's data changes the network's input, not the teacher's."""
    moved = replace(stripes(), mean=(0.1,), std=(0.7,))
    seen = []
    hook = Staged.forward

    class Watching(Staged):
        def forward(self, x):
            seen.append(x)
            return hook(self, x)

    watched = Watching()
    watched.load_state_dict(teacher.model.state_dict())
    inputs = []
    for data in (stripes(), moved):
        seen.clear()
        recipe = replace(RECIPE, epochs=1, distill_weight=0.5)
        train(recipe, tiny, data, tmp_path / str(len(inputs)), teacher=teacher._replace(model=watched))
        inputs.append(list(seen[1:]))  # the first call looks whether it fits
    assert len(inputs[0]) == len(inputs[1]) == STEPS_PER_EPOCH
    for a, b in zip(*inputs, strict=True):
        assert torch.equal(a, b)


def test_what_is_learnt_from_a_teacher_alone_is_its_opinion(tmp_path, teacher):
    """With weight 1 the labels play no part: other labels, the same bits."""
    data = stripes()
    wrong = replace(data, train=replace(data.train, labels=data.train.labels.roll(1)))
    for name, samples in (("a", data), ("b", wrong)):
        train(replace(RECIPE, epochs=2, distill_weight=1.0), Staged, samples, tmp_path / name, teacher=teacher)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


# Resuming


class _Stop(Exception):  # noqa: N818
    pass


def _stop_after(last):
    def on_step(step):
        if step == last:
            raise _Stop

    return on_step


@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("stops", [(2,), (STEPS_PER_EPOCH,), (4, 11, 30)], ids=str)
def test_a_run_with_teacher_and_start_that_is_stopped_ends_bit_identical(tmp_path, runs, teacher, precision, stops):
    recipe = replace(TAUGHT, precision=precision)
    given = {"teacher": teacher, "init": load_start(runs / "other")}
    train(recipe, Intermediate, stripes(), tmp_path / "whole", **given)
    for stop in stops:
        with pytest.raises(_Stop):
            train(recipe, Intermediate, stripes(), tmp_path / "run", on_step=_stop_after(stop), **given)
    train(recipe, Intermediate, stripes(), tmp_path / "run", **given)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_a_run_is_continued_with_the_same_teacher_and_start_only(tmp_path, runs, teacher):
    """Both come from outside the folder: their checksums tell them apart; no teacher is another teacher."""
    start, other = load_start(runs / "staged"), load_start(runs / "other")
    given = {"teacher": teacher, "init": start}
    run = tmp_path / "run"
    with pytest.raises(_Stop):
        train(TAUGHT, Staged, stripes(), run, on_step=_stop_after(5), **given)
    for change, message in (
        ({"teacher": load_network(runs / "other", build)}, "another teacher .sha256: '.*' there, '.*' asked"),
        ({"teacher": teacher._replace(data={**teacher.data, "mean": [0.5]})}, "another teacher .mean"),
        ({"init": other}, "another init .sha256"),
        ({"init": None}, "another init .sha256: '.*' there, None asked"),
        ({"init": start._replace(new_head=True)}, "another init .new_head"),
    ):
        with pytest.raises(UserError, match=message):
            train(TAUGHT, Staged, stripes(), run, **{**given, **change})
    # the same weights by another way are the same start
    given["init"] = load_start(runs / "staged/model.safetensors")
    train(TAUGHT, Staged, stripes(), run, **given)


def test_a_run_without_a_start_refuses_one_later_also_when_an_older_version_began_it(tmp_path, runs):
    run = tmp_path / "run"
    with pytest.raises(_Stop):
        train(RECIPE, Staged, stripes(), run, on_step=_stop_after(5))
    for _ in range(2):
        with pytest.raises(UserError, match=r"another init .sha256: None there"):
            train(RECIPE, Staged, stripes(), run, init=load_start(runs / "staged"))
        (run / "sources.json").unlink(missing_ok=True)
    train(RECIPE, Staged, stripes(), run)


# What does not fit


def test_what_cannot_be_learnt_is_one_error_before_the_folder_exists(tmp_path, runs, teacher):
    recipe, data = replace(RECIPE, distill_weight=0.5), stripes()
    numbers = replace(data, task=regression(3))
    named = replace(data, task=replace(data.task, classes=("a", "b", "c")))
    knows = {**teacher.data, "classes": ["a", "c", "b"]}
    cases = [
        (RECIPE, data, teacher, "distill_weight=0 and distill_features=0 leave the teacher no part"),
        (recipe, data, None, "distill_weight=0.5 and distill_features=0 need a teacher: --teacher RUN"),
        (recipe, numbers, teacher, "a teacher is for classification; stripes is for regression"),
        (recipe, data, teacher._replace(data={**teacher.data, "num_classes": 10}), "knows 10 classes, stripes has 3"),
        (recipe, named, teacher._replace(data=knows), "knows other classes than stripes: 'c' where that has 'b'"),
        (recipe, data, teacher._replace(data={**teacher.data, "input_size": [3, 8, 8]}), "sees 3 channels"),
        (recipe, data, teacher._replace(origin={"model": "staged"}), "the run is not finished"),
        (recipe, data, teacher._replace(model=Staged(classes=4)), r"the output of the teacher staged for two images"),
        (replace(TAUGHT), data, teacher, "the network has neither forward_intermediates nor stages"),
    ]
    for asked, what, whom, message in cases:
        with pytest.raises(UserError, match=message):
            train(asked, tiny, what, tmp_path / "run", teacher=whom)
    with pytest.raises(UserError, match="features are 5x4x4, 10x2x2, the teacher's 6x4x4, 12x2x2"):
        train(TAUGHT, lambda: Staged(width=5), data, tmp_path / "run", teacher=teacher)
    assert not (tmp_path / "run").exists()


# Weights to start from


def test_a_start_is_the_weights_of_the_run_from_the_first_step(tmp_path, runs):
    """With a vanishing rate the weights stay what they were; statistics move, so only the parameters are compared."""
    recipe = replace(RECIPE, epochs=1, lr=1e-30, weight_decay=0.0, ema_decay=0.0)
    train(recipe, Staged, stripes(), tmp_path / "run", init=load_start(runs / "staged"))
    there, here = weights(runs / "staged"), weights(tmp_path / "run")
    assert all(torch.equal(there[name], here[name]) for name, _ in Staged().named_parameters())
    noted = read_sources(tmp_path / "run")["init"]
    assert (noted["model"], noted["new_head"]) == ("staged", False)
    assert noted["sha256"] == sha256(runs / "staged/model.safetensors")


def test_a_new_head_leaves_the_classifier_as_its_seed_makes_it(tmp_path, runs):
    recipe = replace(RECIPE, epochs=1, lr=1e-30, weight_decay=0.0, ema_decay=0.0)
    torch.manual_seed(random_key("init", recipe.seed))
    fresh = Staged().state_dict()
    start = load_start(runs / "staged", new_head=True)
    train(recipe, Staged, stripes(), tmp_path / "run", init=start)
    there, here = weights(runs / "staged"), weights(tmp_path / "run")
    for name, _ in Staged().named_parameters():
        assert torch.equal(here[name], fresh[name] if name.startswith("fc.") else there[name]), name


def test_a_start_that_does_not_fit_names_the_first_names_and_shapes(tmp_path, runs):
    start = load_start(runs / "staged")
    cases = [
        (tiny, start, r"do not fit the network: 0.weight is missing there, \(6, 1, 3, 3\) here; .* and \d+ more"),
        (
            lambda: Staged(width=5),
            start,
            r"staged: its weights \(of staged\) do not fit the network: "
            r"stages.0.0.weight is \(6, 1, 3, 3\) there, \(5, 1, 3, 3\) here",
        ),
        (tiny, start._replace(new_head=True), "names no classifier"),
    ]
    for network, weights, message in cases:
        with pytest.raises(UserError, match=message):
            train(RECIPE, network, stripes(), tmp_path / "run", init=weights)
    save_weights(tmp_path / "ten.safetensors", Staged(classes=10))
    ten = load_start(tmp_path / "ten.safetensors")
    alone = r"in the classifier alone \(--new_head starts it afresh\): fc.weight is \(10, 12\) there, \(3, 12\) here"
    with pytest.raises(UserError, match=alone):
        train(RECIPE, Staged, stripes(), tmp_path / "run", init=ten)
    assert not (tmp_path / "run").exists()
    train(replace(RECIPE, epochs=1), Staged, stripes(), tmp_path / "run", init=ten._replace(new_head=True))


def test_starts_are_finished_runs_or_whole_files(tmp_path, runs):
    with pytest.raises(_Stop):
        train(RECIPE, Staged, stripes(), tmp_path / "part", on_step=_stop_after(5))
    file = tmp_path / "w.safetensors"
    save_weights(file, Staged())
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "cut.safetensors").write_bytes(damaged[:40])
    file.write_bytes(damaged)
    for place, kind, message in (
        (tmp_path / "part", UserError, "part: the run is not finished"),
        (tmp_path, UserError, "not a run folder"),
        (tmp_path / "absent", UserError, "absent: neither a run folder nor a .safetensors file"),
        (file, CorruptCheckpoint, "expected sha256"),
        (tmp_path / "cut.safetensors", CorruptCheckpoint, "expected safetensors"),
    ):
        with pytest.raises(kind, match=message):
            load_start(place)
    (tmp_path / "w.safetensors.sha256").unlink()
    assert load_start(file).origin == {"sha256": sha256(file)}


# The command line


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    y = np.arange(32) % 2
    x = (y[:, None, None] * 200 + np.random.RandomState(0).randint(0, 50, (32, 8, 8))).astype(np.uint8)
    np.savez(folder / "two.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    np.savez(folder / "three.npz", x_train=x, y_train=np.arange(32) % 3, x_test=x[:9], y_test=np.arange(9) % 3)
    return folder


def words(data, out, *more, model="mgic_resnet20"):
    return ["train", f"--data={data}", "--epochs=1", "--batch_size=16", f"--model={model}", "--out", str(out), *more]


def test_the_command_line_distils_and_the_record_says_from_whom(pixels, tmp_path, capsys):
    dense, two = tmp_path / "dense", pixels / "two.npz"
    assert main(words(two, dense, model="resnet20")) == 0
    record = tmp_path / "record.json"
    given = ["--teacher", str(dense), "--distill_features=0.5", "--record", str(record), "--seeds=[3]"]
    assert main(words(two, tmp_path / "a", *given)) == 0
    assert main(words(two, tmp_path / "a", *given)) == 0, "a finished seed is found again with its teacher"
    assert "finished before" in capsys.readouterr().err
    written = read_record(record)
    assert written["teacher"]["model"] == "resnet20"
    assert written["teacher"]["sha256"] == sha256(dense / "model.safetensors")
    assert (
        written["teacher"]["scores"]["test_accuracy"]
        == json.loads((dense / "summary.json").read_text())["test_accuracy"]
    )
    assert (written["recipe"]["distill_weight"], written["recipe"]["distill_features"]) == (0.0, 0.5)
    assert str(tmp_path) not in record.read_text()
    assert str(pixels) not in record.read_text()
    assert "--teacher dense" in written["command"]
    assert main(words(two, tmp_path / "b", "--teacher", str(dense))) == 0
    assert read_recipe(tmp_path / "b").distill_weight == 0.5
    assert main(words(two, tmp_path / "c", "--init", str(tmp_path / "b"), "--record", str(record))) == 0
    assert read_record(record)["init"]["model"] == "mgic_resnet20"
    three = words(pixels / "three.npz", tmp_path / "d", "--init", str(tmp_path / "b"))
    other = [str(tmp_path / "b") if word == str(dense) else word for word in given]
    for call, said in (
        (words(two, tmp_path / "d", "--teacher", str(dense), "--distill_weight=0"), "leave the teacher no part"),
        (words(two, tmp_path / "d", "--distill_weight=0.5"), "need a teacher: --teacher RUN"),
        (words(two, tmp_path / "d", "--teacher", str(tmp_path)), "not a run folder"),
        (words(pixels / "three.npz", tmp_path / "d", "--teacher", str(dense)), "knows 2 classes"),
        (words(two, tmp_path / "a", *other), "its run has another teacher (sha256"),
        (words(two, tmp_path / "d", "--new_head"), "--new_head belongs to --init"),
        (words(two, tmp_path / "d", "--init", str(dense)), "(of resnet20) do not fit the network"),
        (three, "in the classifier alone (--new_head starts it afresh): head.fc.weight is (2, 64) there, (3, 64) here"),
    ):
        capsys.readouterr()
        assert main(call) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
    assert not (tmp_path / "d").exists()
    assert main([*three, "--new_head"]) == 0
