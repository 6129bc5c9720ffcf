"""Tasks beside classification: the loop, its metrics and the arguments of data sets; files of earlier versions."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from tiny import RECIPE, stripes, tiny
from torch import nn
from torch.nn import functional as F

from mgic.data import WHOLE, Augmentation, Data, classification, epoch_order, load_data, random_key, regression
from mgic.data.reading import in_order, read_batches
from mgic.errors import UserError
from mgic.training import RunSummary, evaluate, load_run, train
from mgic.training.files import write_json
from mgic.training.folder import different, finished_run
from mgic.training.records import make_record, training_metrics


@dataclass(frozen=True)
class Numbers:
    """Inputs and targets in memory."""

    x: torch.Tensor
    y: torch.Tensor

    def __len__(self):
        return len(self.x)

    def to(self, device):
        return self

    def digest(self):
        return str(float(self.x.sum()))

    def check(self, augmentation):
        augmentation.refuse("numbers")

    def training_batches(self, batches, augmentation, epoch, step, workers, share=WHOLE):
        for indices in map(share.of, batches):
            yield self.x[indices], self.y[indices]

    def evaluation_batches(self, batch_size, workers, share=WHOLE):
        yield from share.turns(zip(self.x.split(batch_size), self.y.split(batch_size), strict=True))


def numbers(count, seed):
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    return Numbers(x, torch.stack((x[:, 0] - x[:, 1], 2 * x[:, 0] + 1), 1))


def linear_data():
    return Data("linear", numbers(40, 0), numbers(10, 1), regression(2, "numbers"), (2,), "made up")


LINEAR = replace(RECIPE, model="linear", data="linear", epochs=20, checkpoint_every=0, crop_padding=0, flip=False)
LINEAR = replace(LINEAR, ema_decay=0.0)


def test_a_regression_is_learnt_and_its_error_is_the_mean_square(tmp_path):
    data = linear_data()
    summary = train(LINEAR, lambda: nn.Linear(2, 2), data, tmp_path / "run")
    assert summary.metrics["test_mse"] < 0.01
    assert summary.metrics["test_mse"] == summary.metrics["test_loss"] == summary.history[-1]["test_mse"]
    model = nn.Linear(2, 2)
    for batch_size in (3, 10):
        expected = F.mse_loss(model(data.test.x), data.test.y).item()
        assert evaluate(model, data, batch_size=batch_size)["mse"] == pytest.approx(expected, rel=1e-6)
    record = make_record("c", data.note, [0], training_metrics([summary]))
    assert record["metrics"]["train_mse"]["mean"] == summary.metrics["train_mse"]


def test_adam_is_torchs(tmp_path):
    data, recipe = linear_data(), replace(LINEAR, optimizer="adam", epochs=3, lr=0.01, momentum=0.8, schedule="cosine")
    train(recipe, lambda: nn.Linear(2, 2), data, tmp_path / "run")
    torch.manual_seed(random_key("init", recipe.seed))
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters(), 0.01, (0.8, 0.999), weight_decay=recipe.weight_decay)
    for step in range(15):
        epoch, batch = divmod(step, 5)
        chosen = epoch_order(40, 0, epoch)[8 * batch :][:8]
        optimizer.param_groups[0]["lr"] = recipe.learning_rate(step, 5)
        optimizer.zero_grad()
        F.mse_loss(model(data.train.x[chosen]), data.train.y[chosen]).backward()
        optimizer.step()
    torch.testing.assert_close(load_run(tmp_path / "run").state_dict, dict(model.state_dict()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "build", "message"),
    [
        ({"label_smoothing": 0.1}, lambda: nn.Linear(2, 2), "label_smoothing=0.1 is for classes: regression has none"),
        ({"flip": True}, lambda: nn.Linear(2, 2), "flip=True are for images: numbers need 0 and False"),
        ({"batch_size": 41}, lambda: nn.Linear(2, 2), "batch_size=41 is larger than the 40 training numbers"),
        (
            {},
            lambda: nn.Linear(2, 3),
            r"2 classes, but the output of the network for two numbers has shape \(2, 3\); build it with num_classes=2",
        ),
        ({}, lambda: nn.Linear(3, 2), r"cannot read numbers of linear, \(2,\): "),
    ],
)
def test_what_does_not_fit_the_task_is_refused_before_training(tmp_path, changes, build, message):
    with pytest.raises(UserError, match=message):
        train(replace(LINEAR, **changes), build, linear_data(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_network_is_built_with_what_its_data_need():
    assert linear_data().model_arguments() == {"num_classes": 2, "in_chans": 2}
    assert load_data("digits").model_arguments() == {"num_classes": 10, "in_chans": 1}


def test_data_without_statistics_are_fed_as_they_are():
    x = torch.arange(4)
    assert torch.equal(linear_data().normalizer(torch.device("cpu"))(x), x.float())


def test_unknown_arguments_of_a_data_set_are_refused_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match=r"data 'digits' has no argument 'points'; it takes none"):
        load_data("digits", points=3)
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="has no argument 'imagesize'; did you mean image_size"):
        load_data(f"images:{tmp_path}", imagesize=3)
    with pytest.raises(UserError, match="image_size must be a positive integer, got 'big'"):
        load_data(f"images:{tmp_path}", image_size="big")
    with pytest.raises(UserError, match="num_classes must be a positive integer, got 0"):
        load_data("a.npz", num_classes=0)


# Files read by workers


def _read(index):
    if index == 5:
        raise UserError("five.txt: is five")
    return torch.tensor([index, int(torch.randint(1000, ()))]), torch.tensor(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_random_by_their_key_and_index_alone(workers):
    def draw(batches, key, workers=workers):
        return torch.cat([x for x, _ in read_batches(_read, batches, key, workers, "cpu")]).tolist()

    whole = draw([[0, 1], [2, 3]], ("a", 0), workers=0)
    assert draw([[0, 1], [2, 3]], ("a", 0)) == whole
    assert draw([[3, 1]], ("a", 0)) == [whole[3], whole[1]]
    assert draw([[0, 1], [2, 3]], ("a", 1)) != whole
    with pytest.raises(UserError, match=r"five\.txt: is five"):
        draw([[4, 5]], ("a", 0))


def test_all_indices_come_once_in_order():
    assert sum(in_order(7, 3), []) == list(range(7))  # noqa: RUF017
    assert [len(batch) for batch in in_order(7, 3)] == [3, 3, 1]


# Files of the first version


def test_a_finished_run_of_the_first_version_is_taken_as_it_is(tmp_path):
    """Its summary had no word on where the data is from, its notes on the data neither task nor class names."""
    train(RECIPE, tiny, stripes(), tmp_path)
    now = json.loads((tmp_path / "summary.json").read_text())
    first = {"model", "data", "seed", "epochs", "steps", "train_accuracy", "train_loss", "test_accuracy", "test_loss"}
    first |= {"seconds_per_epoch", "skipped_steps", "params", "history", "resumed_from", "origin", "schema"}
    assert now.keys() == first | {"data_note", "processes", "bad_samples"}
    write_json(tmp_path / "summary.json", {k: v for k, v in now.items() if k in first})
    noted = json.loads((tmp_path / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps({k: v for k, v in noted.items() if k not in ("task", "classes")}))
    recipe = (tmp_path / "recipe.yaml").read_text().replace("data_args: {}\n", "").replace("power: 0.9\n", "")
    assert "power" not in recipe
    (tmp_path / "recipe.yaml").write_text(recipe)
    summary = RunSummary.from_dict(finished_run(tmp_path, RECIPE, stripes().fingerprint()))
    assert {"schema": 1, **summary.to_dict()} == {**now, "data_note": ""}
    assert summary.metrics.keys() == {f"{s}_{m}" for s in ("train", "test") for m in ("accuracy", "loss")}


def test_a_change_in_anything_noted_down_makes_data_others():
    noted = stripes().fingerprint()
    assert different(noted, stripes().fingerprint()) is None
    assert different(noted, stripes(train=66).fingerprint()) == "train"
    assert different(noted, {**noted, "task": "segmentation"}) == "task"
    assert different({"name": "stripes"}, noted) is None


def test_augmentations_of_images_are_refused_for_others():
    Augmentation(seed=3).refuse("point clouds")
    with pytest.raises(UserError, match="crop_padding=2 and flip=False are for images: point clouds need 0 and False"):
        Augmentation(crop_padding=2).refuse("point clouds")


def test_class_names_are_noted_down():
    task = classification(2, ["cat", "dog"])
    assert replace(stripes(), task=task).fingerprint()["classes"] == ["cat", "dog"]
