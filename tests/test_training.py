"""The loop equals a plain PyTorch loop to the last bit, and recipes and records say exactly what was done."""

import csv
import itertools
import json
import math
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import RECIPE, STEPS_PER_EPOCH, stripes, tiny
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

import mgic
from mgic.data import Data, Images, augment_batch, classification, epoch_order, random_key
from mgic.errors import UserError
from mgic.training import (
    RECIPES,
    NonFiniteLoss,
    Recipe,
    evaluate,
    load_network,
    load_run,
    make_record,
    read_record,
    train,
    write_record,
)
from mgic.training.checkpoint import newest_checkpoint
from mgic.training.folder import read_recipe
from mgic.training.loop import average_
from mgic.training.records import training_metrics

# The loop


def _plain_loop(recipe, data):
    """The naive twin of ``train``: no Fabric, no checkpoints, torch's own scheduler, averages written out."""
    torch.manual_seed(random_key("init", recipe.seed))
    model, length = tiny(), len(data.train)
    per_epoch = length // recipe.batch_size
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov
    )
    schedule = lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * per_epoch)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    for step in range(recipe.epochs * per_epoch):
        epoch, batch = divmod(step, per_epoch)
        chosen = epoch_order(length, recipe.seed, epoch)[batch * recipe.batch_size :][: recipe.batch_size]
        generator = torch.Generator().manual_seed(random_key("augment", recipe.seed, step))
        images = augment_batch(data.train.images[chosen], generator, recipe.crop_padding, recipe.flip)
        torch.manual_seed(random_key("step", recipe.seed, step))
        logits = model((images / 255 - 0.3) / 0.2)
        loss = F.cross_entropy(logits, data.train.labels[chosen], label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        if recipe.clip_grad:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
        optimizer.step()
        schedule.step()
        for name, value in model.state_dict().items():
            old = average[name]
            average[name] = (
                recipe.ema_decay * old + (1 - recipe.ema_decay) * value if value.is_floating_point() else value
            )
    return model.state_dict(), average


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"label_smoothing": 0.1},
        {"nesterov": True, "weight_decay": 0.01},
        {"clip_grad": 0.05},
        {"momentum": 0.0, "flip": False, "crop_padding": 0},
    ],
    ids=str,
)
def test_training_equals_a_plain_loop(tmp_path, changes):
    recipe = replace(RECIPE, schedule="cosine", **changes)
    train(recipe, tiny, stripes(), tmp_path / "run")
    weights, average = _plain_loop(recipe, stripes())
    state = newest_checkpoint(tmp_path / "run/checkpoints")
    torch.testing.assert_close(state["model"], weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["average"], average, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(load_run(tmp_path / "run").state_dict, average, rtol=1e-4, atol=1e-5)


def test_channels_last_changes_the_layout_and_not_the_result(tmp_path):
    """Without dropout, whose mask follows the layout."""

    def build():
        model = tiny()
        model[3].p = 0.0
        return model

    for name, flag in (("a", False), ("b", True)):
        train(replace(RECIPE, channels_last=flag), build, stripes(), tmp_path / name)
    a, b = (load_run(tmp_path / name).state_dict for name in "ab")
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_norms_and_biases_are_spared_from_weight_decay_on_request(tmp_path):
    """With a zero gradient only the decay moves a weight."""

    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny()

        def forward(self, x):
            return 0 * self.inner(x)

    recipe = replace(RECIPE, schedule="cosine", weight_decay=0.1, decay_norms=False, ema_decay=0.0, epochs=1)
    torch.manual_seed(random_key("init", recipe.seed))
    before = Blind().inner
    train(recipe, Blind, stripes(), tmp_path / "run")
    after = load_run(tmp_path / "run").state_dict
    for name, value in before.named_parameters():
        assert torch.equal(after[f"inner.{name}"], value) == (value.ndim == 1), name


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_the_same_recipe_twice_gives_the_same_bits_and_another_seed_does_not(tmp_path, precision):
    recipe = replace(RECIPE, precision=precision)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(replace(recipe, seed=seed), tiny, stripes(), tmp_path / name)
    a, b, c = (load_run(tmp_path / name).state_dict for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["0.weight"], c["0.weight"])


def test_training_leaves_the_global_generator_alone(tmp_path):
    before = torch.get_rng_state()
    train(RECIPE, tiny, stripes(), tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_reports_what_it_did(tmp_path):
    data = stripes()
    summary = train(RECIPE, tiny, data, tmp_path / "run")
    assert summary.steps == RECIPE.epochs * STEPS_PER_EPOCH == summary.history[-1]["step"]
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {"schema": 1, **summary.to_dict()}
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "finished"
    with (tmp_path / "run/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [{k: float(v) for k, v in row.items()} for row in rows] == summary.history
    model = tiny()
    model.load_state_dict(load_run(tmp_path / "run").state_dict)
    for split, accuracy, loss in (
        ("train", summary.metrics["train_accuracy"], summary.metrics["train_loss"]),
        ("test", summary.metrics["test_accuracy"], summary.metrics["test_loss"]),
    ):
        again = evaluate(model, data, split)
        assert (again["accuracy"], again["loss"]) == (accuracy, loss)
    assert summary.metrics["test_accuracy"] > 60


def test_evaluation_equals_counting_by_hand_at_any_batch_size_and_keeps_the_mode():
    data, model = stripes(), tiny().train()
    with torch.no_grad():
        logits = model.eval()((data.test.images / 255 - 0.3) / 0.2)
    model.train()
    for batch_size in (1, 7, 100):
        metrics = evaluate(model, data, batch_size=batch_size)
        assert metrics["accuracy"] == 100 * int((logits.argmax(1) == data.test.labels).sum()) / 20
        assert metrics["loss"] == pytest.approx(F.cross_entropy(logits, data.test.labels).item(), rel=1e-5)
    assert model.training
    with pytest.raises(UserError, match="split must be 'train' or 'test', got 'val'"):
        evaluate(model, data, "val")


def test_the_average_is_the_closed_form_and_shared_weights_are_averaged_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(1, 1, bias=False)
            self.b = self.a
            self.register_buffer("count", torch.tensor(0))

    average, model, decay = Shared().requires_grad_(False), Shared(), 0.7
    average.a.weight.fill_(3.0)
    values = [1.0, -2.0, 5.0, 4.0]
    for value in values:
        model.a.weight.data.fill_(value)
        model.count += 1
        average_(average, model, decay)
    expected = decay**4 * 3 + sum((1 - decay) * decay ** (3 - k) * v for k, v in enumerate(values))
    assert average.b.weight.item() == pytest.approx(expected, rel=1e-6)
    assert average.count == 4


class _Sick(nn.Module):
    """Makes NaN in the given calls in training mode: everywhere, or only in the gradient."""

    calls: tuple[int, ...] = ()
    in_gradient = False

    def __init__(self):
        super().__init__()
        self.inner, self.call = tiny(), 0

    def forward(self, x):
        sick = self.training and self.call in self.calls
        self.call += self.training
        if sick and not self.in_gradient:
            x = x * math.nan
        y = self.inner(x)
        if sick and self.in_gradient:
            y.register_hook(lambda gradient: gradient * math.nan)
        return y


@pytest.mark.parametrize("in_gradient", [False, True])
@pytest.mark.parametrize("calls", [(0,), (15,), (9, 10), (31,), (30, 31), (3, 4, 6, 7)])
def test_r9_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, calls, in_gradient):
    kind = type("Sick", (_Sick,), {"calls": calls, "in_gradient": in_gradient})
    summary = train(RECIPE, kind, stripes(), tmp_path / "run")
    assert summary.skipped_steps == len(calls)
    assert all(v.isfinite().all() for v in load_run(tmp_path / "run").state_dict.values())


@pytest.mark.parametrize("in_gradient", [False, True])
@pytest.mark.parametrize("first", [0, 10, 29])
def test_r9_three_in_a_row_stop_the_run_and_the_last_checkpoint_is_finite(tmp_path, in_gradient, first):
    last, seen = first + 2, []

    class Seen(Images):
        """Notes which samples are asked for."""

        def to(self, device):
            return self

        def training_batches(self, batches, *rest):
            seen.extend(batch.tolist() for batch in batches)
            return super().training_batches(batches, *rest)

    data = stripes()
    data = replace(data, train=Seen(data.train.images, data.train.labels))
    kind = type("Sick", (_Sick,), {"calls": (first, first + 1, last), "in_gradient": in_gradient})
    place = rf"\(epoch {last // 8}, batch {last % 8}; status.json names the samples\)"
    with pytest.raises(NonFiniteLoss, match=f"3 steps in a row, last in step {last} {place}") as error:
        train(RECIPE, kind, data, tmp_path / "run")
    assert error.value.exit_code == 1
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["samples"]) == ("failed", seen[first : last + 1])
    state = newest_checkpoint(tmp_path / "run/checkpoints")
    if first == 0:
        assert state is None
        return
    assert state["step"] == last - last % 3
    assert all(v.isfinite().all() for part in ("model", "average") for v in state[part].values())


def test_r9_what_the_check_costs(tmp_path, trials):
    """The share of a step, measured by ``make faults`` alone: of ResNet-20 on 32x32 images, 32 at a time."""
    if not trials.full:
        return
    generator = torch.Generator().manual_seed(0)
    images = Images(
        torch.randint(256, (320, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.arange(320) % 10
    )
    data = Data("noise", images, images, classification(10), (3, 32, 32), "made up", (0.5,) * 3, (0.3,) * 3)
    times, kept = [time.perf_counter()], []

    def build():
        kept.append(mgic.create_model("resnet20"))
        return kept[0]

    recipe = Recipe(model="resnet20", data="noise", epochs=3, batch_size=32)
    train(recipe, build, data, tmp_path, progress=False, on_step=lambda step: times.append(time.perf_counter()))
    model = kept[0]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)

    def check():
        began = time.perf_counter()
        _ = [buffer.clone() for buffer in model.buffers()]
        assert nn.utils.get_total_norm([p.grad for p in model.parameters()]).isfinite()
        return time.perf_counter() - began

    step = sorted(b - a for a, b in itertools.pairwise(times))[len(times) // 2]
    trials.passes(percent_of_a_step=100 * sorted(check() for _ in range(50))[25] / step)


def test_r9_weights_that_are_not_finite_are_never_saved(tmp_path):
    class Overflowing(nn.Module):
        """The loss never sees the broken weight."""

        def __init__(self):
            super().__init__()
            self.inner, self.unused = tiny(), nn.Parameter(torch.tensor(math.inf))

        def forward(self, x):
            return self.inner(x)

    with pytest.raises(NonFiniteLoss, match=r"the weights are not finite \(unused"):
        train(RECIPE, Overflowing, stripes(), tmp_path / "run")
    assert newest_checkpoint(tmp_path / "run/checkpoints") is None


def _conv(channels, classes):
    return lambda: nn.Sequential(
        nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
    )


@pytest.mark.parametrize(
    ("recipe", "build", "accelerator", "message"),
    [
        (replace(RECIPE, batch_size=68), tiny, "cpu", "batch_size=68 is larger than the 67 training images"),
        (RECIPE, _conv(3, 3), "cpu", r"cannot read images of stripes, \(1, 8, 8\) \(C, H, W\)"),
        (RECIPE, _conv(1, 10), "cpu", r"stripes has 3 classes, but .* shape \(2, 10\); build it with num_classes=3"),
        (replace(RECIPE, precision="16"), tiny, "cpu", "precision '16' needs a GPU; on the CPU use 'bf16' or '32'"),
    ],
)
def test_what_does_not_fit_together_is_one_error_before_training(tmp_path, recipe, build, accelerator, message):
    with pytest.raises(UserError, match=message):
        train(recipe, build, stripes(), tmp_path / "run", accelerator=accelerator)


def test_r29_other_library_versions_at_resume_are_told(tmp_path, monkeypatch):
    from mgic.training import loop

    class Stop(Exception):  # noqa: N818
        pass

    def stop(step):
        raise Stop

    monkeypatch.setattr(loop, "versions", lambda: {"torch": "1.0"})
    with pytest.raises(Stop):
        train(replace(RECIPE, checkpoint_every=1), tiny, stripes(), tmp_path / "run", on_step=stop)
    monkeypatch.setattr(loop, "versions", lambda: {"torch": "2.0"})
    with pytest.warns(UserWarning, match=r"other versions \(torch 1.0 -> 2.0\)"):
        train(replace(RECIPE, checkpoint_every=1), tiny, stripes(), tmp_path / "run")


def test_a_progress_bar_is_shown_on_request_and_never_on_a_pipe(tmp_path, capsys):
    train(replace(RECIPE, epochs=1), tiny, stripes(), tmp_path / "quiet")
    assert capsys.readouterr() == ("", "")
    train(replace(RECIPE, epochs=1), tiny, stripes(), tmp_path / "shown", progress=True)
    out, shown = capsys.readouterr()
    assert out == ""
    assert "epoch 1/1" in shown
    assert "8/8" in shown


def test_r32_without_tensorboard_one_line_says_so(tmp_path, monkeypatch):
    from mgic.training import progress

    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="TensorBoard is not installed"):
        train(replace(RECIPE, epochs=1), tiny, stripes(), tmp_path / "run")


# Schedules


def _torch_rates(recipe, steps_per_epoch):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], recipe.lr)
    total = recipe.epochs * steps_per_epoch
    by_epoch = False
    if recipe.schedule == "onecycle":
        schedule = lr_scheduler.OneCycleLR(optimizer, recipe.lr, total, cycle_momentum=False)
    elif recipe.schedule == "cosine":
        schedule = lr_scheduler.CosineAnnealingLR(optimizer, total)
    elif recipe.schedule == "poly":
        schedule = lr_scheduler.PolynomialLR(optimizer, total, recipe.power)
    else:
        by_epoch = True
        schedule = (
            lr_scheduler.MultiStepLR(optimizer, recipe.milestones, recipe.gamma)
            if recipe.milestones
            else lr_scheduler.StepLR(optimizer, recipe.step_size, recipe.gamma)
        )
    warm = nn.Parameter(torch.zeros(1))
    warmup_steps = max(1, recipe.warmup_epochs * steps_per_epoch)
    warmup = torch.optim.SGD([warm], 1.0)
    factor = lr_scheduler.LinearLR(warmup, 0.01 if recipe.warmup_epochs else 1.0, total_iters=warmup_steps)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimiser never steps
        for step in range(total):
            rates.append(optimizer.param_groups[0]["lr"] * warmup.param_groups[0]["lr"])
            if not by_epoch or (step + 1) % steps_per_epoch == 0:
                schedule.step()
            factor.step()
    return rates


@pytest.mark.parametrize("steps_per_epoch", [1, 7, 40])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(epochs=9, schedule="onecycle", lr=0.3),
        Recipe(epochs=9, schedule="cosine", lr=0.3),
        Recipe(epochs=9, schedule="cosine", warmup_epochs=2),
        Recipe(epochs=9, schedule="poly", lr=0.3),
        Recipe(epochs=9, schedule="poly", power=2.0, warmup_epochs=2),
        Recipe(epochs=9, schedule="step", milestones=(3, 4, 8), gamma=0.2),
        Recipe(epochs=9, schedule="step", step_size=2, warmup_epochs=1),
        Recipe(epochs=1, schedule="onecycle"),
        RECIPES["cifar10_mgic"],
    ],
    ids=lambda r: f"{r.schedule}-{r.epochs}-{r.warmup_epochs}",
)
def test_schedules_equal_those_of_torch_at_every_step(recipe, steps_per_epoch):
    ours = [recipe.learning_rate(step, steps_per_epoch) for step in range(recipe.epochs * steps_per_epoch)]
    assert ours == pytest.approx(_torch_rates(recipe, steps_per_epoch), rel=1e-9, abs=1e-12)


# Recipes


def test_importing_recipes_imports_no_torch():
    code = "import sys, mgic.training.recipes; assert not {'torch', 'numpy', 'yaml', 'lightning'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


_numbers = st.floats(1e-9, 0.999)
_recipes = st.builds(
    Recipe,
    model=st.text(min_size=1, max_size=20),
    model_args=st.dictionaries(
        st.text(max_size=5), st.none() | st.booleans() | st.integers() | st.text() | st.lists(_numbers)
    ),
    epochs=st.integers(1, 10**6),
    batch_size=st.integers(1, 10**6),
    lr=st.floats(1e-12, 1e6),
    momentum=_numbers,
    weight_decay=_numbers,
    label_smoothing=_numbers,
    ema_decay=_numbers,
    schedule=st.sampled_from(("cosine", "onecycle")),
    precision=st.sampled_from(("32", "bf16", "16")),
    flip=st.booleans(),
    seed=st.integers(0, 2**64),
) | st.builds(
    lambda milestones: Recipe(schedule="step", epochs=50, milestones=tuple(sorted(milestones))),
    st.sets(st.integers(1, 49), min_size=1),
)


@settings(max_examples=60, deadline=None)
@given(_recipes)
def test_recipes_survive_yaml_and_json(recipe):
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_yaml_numbers_without_a_point_are_numbers():
    assert Recipe.from_yaml("lr: 1e-3\nweight_decay: 5E-4").lr == 0.001


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 3", "recipe: unknown key 'batchsize'; did you mean batch_size"),
        ("xyzzy: 3", "recipe: unknown key 'xyzzy'; known: batch_size, channels_last"),
        ("- 1", "expected 'field: value' lines, got list"),
        ("lr: [", "not valid YAML"),
        ("lr: fast", "lr must be a number above 0, got 'fast'"),
        ("epochs: 1.5", "epochs must be an integer, at least 1, got 1.5"),
        ("epochs: true", "epochs must be an integer, at least 1, got True"),
    ],
)
def test_wrong_yaml_is_one_line_that_names_key_and_value(text, message):
    with pytest.raises(UserError, match=message) as error:
        Recipe.from_yaml(text)
    assert "\n" not in str(error.value)


WRONG = {
    "model": ["", 3],
    "sync_norms": [1, "yes"],
    "model_args": [[], {1: 2}, {"a": {1, 2}}],
    "data": [""],
    "data_args": [[], {1: 2}, {"a": {1, 2}}],
    "epochs": [0, -1, 2.0, "3"],
    "batch_size": [0],
    "lr": [0, -0.1, math.nan, math.inf, "0.1"],
    "optimizer": ["adamw", None],
    "momentum": [-0.1, 1.0],
    "nesterov": [1, "yes"],
    "weight_decay": [-1e-9],
    "decay_norms": [0],
    "schedule": ["linear", None, []],
    "milestones": [(3, 2), (0,), (1, 1), 5, (1.5,)],
    "step_size": [-1, 3],
    "gamma": [0, 1.1],
    "power": [0, -1],
    "warmup_epochs": [-1, 31],
    "label_smoothing": [1.0, -0.1],
    "ema_decay": [1.0],
    "clip_grad": [-1],
    "distill_weight": [-0.1, 1.1],
    "distill_temperature": [0],
    "distill_features": [-1],
    "precision": ["64", 32, None],
    "channels_last": [None],
    "compile": [2],
    "pad_images": [-1],
    "crop_padding": [-1],
    "flip": ["no"],
    "seed": [-1, 0.5],
    "eval_batch_size": [0],
    "workers": [-1],
    "checkpoint_every": [-5],
    "keep_checkpoints": [0],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in WRONG.items() for v in values], ids=str)
def test_a_wrong_value_is_refused_with_its_field_and_value(field, value):
    with pytest.raises(UserError, match=f"recipe: .*{field}") as error:
        Recipe(**{field: value})
    assert repr(value) in str(error.value) or type(value) is dict


def test_every_field_of_a_recipe_is_checked():
    assert WRONG.keys() == {f.name for f in fields(Recipe)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "step"}, "needs either milestones or step_size"),
        ({"schedule": "step", "milestones": (3,), "step_size": 2}, "needs either milestones or step_size"),
        ({"milestones": (3,)}, "belong to schedule 'step', but schedule is 'cosine'"),
        ({"schedule": "step", "milestones": (30,)}, "milestones must lie before epochs=30"),
        ({"schedule": "onecycle", "warmup_epochs": 1}, "warms up by itself"),
        ({"compile": True, "distill_features": 1.0}, "distill_features=1.0 reads features"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov needs momentum > 0"),
        ({"nesterov": True, "optimizer": "rmsprop"}, "nesterov belongs to optimizer 'sgd', but optimizer is 'rmsprop'"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        Recipe(**values)


def test_the_cifar_recipe_is_the_printed_one():
    """Eliasof et al. 2023, Sec. 4.3."""
    r = RECIPES["cifar10_mgic"]
    assert (r.epochs, r.batch_size, r.lr, r.momentum, r.weight_decay) == (100, 128, 0.001, 0.9, 0.0001)
    rates = [r.learning_rate(epoch * 390, 390) for epoch in range(100)]
    assert rates == pytest.approx([0.001] * 30 + [1e-4] * 30 + [1e-5] * 30 + [1e-6] * 10)


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "lr", "decay", "rates"),
    [  # rates: (epoch, factor) where the schedule prints one
        ("imagenet_mgic_resnet50", 100, 256, 0.1, 1e-4, {0: 1, 29: 1, 30: 0.1, 60: 0.01, 90: 0.001}),
        ("imagenet_mgic_mobilenetv3", 100, 256, 0.1, 1e-4, {30: 0.1}),
        ("imagenet_mgic_mobilenetv3_150", 150, 256, 0.1, 1e-4, {149: 1e-4}),
        ("cifar10_mg2020", 180, 128, 0.1, 1e-4, {179: 1e-5}),
        ("cifar100_mg2020", 180, 128, 0.1, 1e-4, {179: 1e-5}),
        ("imagenet_mg_resnet34", 180, 200, 0.1, 1e-4, {29: 1, 30: 0.1}),
        ("imagenet_mg_mobilenetv2", 180, 96, 0.045, 4e-5, {0: 1, 1: 0.98, 10: 0.98**10}),
        ("cifar10_mgiad", 400, 128, 0.05, 1e-4, {0: 1, 200: 0.5}),
        ("cifar100_mgiad", 400, 128, 0.05, 1e-4, {200: 0.5}),
        ("fashion_mnist_mgiad", 400, 128, 0.05, 1e-4, {24: 1, 25: 0.1, 50: 0.01}),
        ("fashion_mnist_mgiad20", 400, 128, 0.05, 1e-4, {25: 0.1}),
    ],
)
def test_the_recipes_of_the_papers_are_the_printed_ones(name, epochs, batch, lr, decay, rates):
    """Eliasof et al. 2023, Sec. 4.3; Ephrath et al. 2020, Sec. 5; van Betteray et al. 2022, Sec. IV."""
    r = RECIPES[name]
    assert (r.epochs, r.batch_size, r.lr, r.momentum, r.weight_decay) == (epochs, batch, lr, 0.9, decay)
    for epoch, factor in rates.items():
        assert r.learning_rate(epoch * 100, 100) == pytest.approx(lr * factor)


def test_rmsprop_is_timms(tmp_path):
    """The optimizer MobileNets are trained with: one step from the same weights is the same step."""
    from timm.optim import RMSpropTF

    recipe = replace(RECIPE, optimizer="rmsprop", nesterov=False, epochs=1, lr=0.045, batch_size=len(stripes().train))
    recipe = replace(recipe, ema_decay=0.0, clip_grad=0.0, label_smoothing=0.0, flip=False, crop_padding=0)
    train(recipe, tiny, stripes(), tmp_path / "run")
    torch.manual_seed(random_key("init", recipe.seed))
    model, data = tiny(), stripes().train
    optimizer = RMSpropTF(
        model.parameters(), recipe.learning_rate(0, 1), 0.9, 1.0, recipe.weight_decay, recipe.momentum
    )
    chosen = epoch_order(len(data), recipe.seed, 0)
    F.cross_entropy(model((data.images[chosen] / 255 - 0.3) / 0.2), data.labels[chosen]).backward()
    optimizer.step()
    state = newest_checkpoint(tmp_path / "run/checkpoints")
    torch.testing.assert_close(state["model"], model.state_dict(), rtol=1e-4, atol=1e-6)


# Records


def test_a_record_comes_back_from_disk_and_states_mean_and_sample_std(tmp_path):
    record = make_record(
        "mgic train", "made up", [0, 1, 2], {"test_accuracy": [90.0, 92.0, 94.0]}, ["tiny"], recipe={"lr": 1}
    )
    write_record(tmp_path / "new/folder/r.json", record)
    assert read_record(tmp_path / "new/folder/r.json") == record
    assert record["metrics"]["test_accuracy"] == {"mean": 92.0, "std": 2.0, "values": [90.0, 92.0, 94.0]}
    assert make_record("c", "d", [4], {"x": [1.5]})["metrics"]["x"]["std"] == 0.0
    assert {"torch", "python"} <= record["versions"].keys()


def test_a_record_names_no_machine_and_no_path(tmp_path):
    import platform
    from pathlib import Path

    text = json.dumps(make_record("mgic train", "d", [0], {"x": [1.0]}))
    for private in (platform.node(), str(Path.home()), str(Path.cwd()), sys.prefix):
        assert len(private) < 3 or private not in text


def test_a_training_record_holds_both_accuracies_epochs_and_seconds(tmp_path):
    runs = [train(replace(RECIPE, seed=s, epochs=1), tiny, stripes(), tmp_path / str(s)) for s in range(2)]
    metrics = make_record("c", "d", [0, 1], training_metrics(runs))["metrics"]
    assert {"train_accuracy", "test_accuracy", "epochs", "seconds_per_epoch"} <= metrics.keys()
    assert metrics["test_accuracy"]["values"] == [run.metrics["test_accuracy"] for run in runs]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "record of schema 2; this version of mgic reads 1"),
        ({"schema": None}, "record of schema None"),
        ({"n": 3}, "n is 3 but there are 1 seeds"),
        ({"command": 7}, "command must be a str, got 7"),
        ({"metrics": {"x": [1]}}, "metric x must have mean, std and values"),
        ({"metrics": {"x": {"mean": 1, "std": 0, "values": [1, 2]}}}, "metric x has 2 values for n = 1"),
    ],
)
def test_damaged_records_are_refused_when_read_and_when_written(tmp_path, change, message):
    record = {**make_record("c", "d", [0], {"x": [1.0]}), **change}
    (tmp_path / "r.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        read_record(tmp_path / "r.json")
    with pytest.raises(UserError, match=message):
        write_record(tmp_path / "new.json", record)
    assert not (tmp_path / "new.json").exists()


def test_unreadable_records_and_uneven_metrics_are_refused(tmp_path):
    (tmp_path / "r.json").write_text("{")
    for path in (tmp_path / "r.json", tmp_path / "absent.json"):
        with pytest.raises(UserError, match="not a readable record"):
            read_record(path)
    (tmp_path / "r.json").write_text("[]")
    with pytest.raises(UserError, match="a record is a JSON object, got list"):
        read_record(tmp_path / "r.json")
    with pytest.raises(UserError, match="x has 1 values for 2 seeds"):
        make_record("c", "d", [0, 1], {"x": [1.0]})
    with pytest.raises(UserError, match="no run to record"):
        make_record("c", "d", [], {})


def test_a_run_killed_after_its_last_checkpoint_still_leaves_every_row(tmp_path):
    """The kill may come between the last checkpoint and the last row of metrics.csv: the next start writes it."""
    run = tmp_path / "run"
    train(RECIPE, tiny, stripes(), run)
    rows = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text("".join(rows.splitlines(keepends=True)[:-1]))
    (run / "summary.json").unlink()
    (run / "status.json").write_text('{"state": "running"}')
    train(RECIPE, tiny, stripes(), run)
    assert (run / "metrics.csv").read_text() == rows


def test_a_commit_is_that_of_this_package_and_of_nobody_else(tmp_path, monkeypatch):
    """A package installed inside another project's repository has no commit of its own."""
    import subprocess

    from mgic.training import records

    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run(
        [
            "git",
            "-C",
            str(tmp_path),
            *("-c", "user.name=a", "-c", "user.email=a@b.c"),
            "commit",
            "-q",
            "--allow-empty",
            "-m",
            "x",
        ],
        check=True,
    )
    monkeypatch.setattr(records, "__file__", str(tmp_path / "mgic" / "training" / "records.py"))
    (tmp_path / "mgic" / "training").mkdir(parents=True)
    (tmp_path / "mgic" / "training" / "records.py").write_text("")
    assert records.commit() == {"id": None, "dirty": None}


# Runs of earlier releases

RELEASES = sorted((Path(__file__).parent / "data").glob("run-*"))


def closed_form(*shape):
    """Numbers that no generator has made: the same on every machine and in every version."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(0.37 * count + 0.01 * count.square() % 1).view(shape)


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_r29_an_unfinished_run_of_every_release_loads_and_gives_the_same_logits(release, trials):
    assert sum(file.stat().st_size for file in release.rglob("*")) < 2**20
    network = load_network(release, mgic.create_model)
    with torch.no_grad():
        found = network.model.double()(closed_form(3, 1, 8, 8))
    expected = torch.tensor(json.loads((release / "logits.json").read_text()), dtype=torch.float64)
    difference = float((found - expected).abs().max())
    assert difference <= 1e-6
    trials.passes(difference=difference)


@pytest.mark.filterwarnings("ignore:continuing a run of other versions")
@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_r29_an_unfinished_run_of_every_release_goes_on(release, tmp_path):
    shutil.copytree(release, tmp_path / "run")
    (tmp_path / "run/logits.json").unlink()
    recipe, data = read_recipe(tmp_path / "run"), stripes()
    arguments = {**data.model_arguments(), **recipe.model_args}
    summary = train(
        recipe, lambda: mgic.create_model(recipe.model, **arguments), data, tmp_path / "run", progress=False
    )
    assert (summary.resumed_from, summary.steps) == (8, 16)
    assert len(summary.history) == 2


def test_r29_this_release_has_a_run_to_be_kept():
    assert f"run-{mgic.__version__}" in {path.name for path in RELEASES}
