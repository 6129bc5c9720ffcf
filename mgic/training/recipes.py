"""Recipes: everything that decides the result of a training run, as frozen data. Standard library only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import UserError, suggest

# Fields that change how a run is executed or stored, never its numbers: a resumed run may change them.
EXECUTION_FIELDS = frozenset({"workers", "checkpoint_every", "keep_checkpoints"})


@dataclass(frozen=True)
class Recipe:
    """One training experiment: the same recipe, data and machine give the same weights bit for bit.

    Training batches are drawn from a fresh permutation in each epoch; the last, incomplete batch of an epoch is
    dropped, so an epoch has ``len(train) // batch_size`` steps.

    Args:
        model: Name of the network.
        model_args: Arguments of the network; plain YAML values.
        data: Name of the data set, ``NAME:FOLDER``, an ``.npz`` file or an image folder; see `mgic.data.load_data`.
        data_args: Arguments of the data set, such as the size of crops; plain YAML values.
        epochs: Passes over the training set.
        batch_size: Samples in one training step.
        lr: Learning rate: the initial one of ``step``, ``cosine`` and ``poly``, the largest one of ``onecycle``.
        optimizer: ``sgd``, ``adam``, or ``rmsprop`` as MobileNets are trained (TensorFlow's, decay 0.9, epsilon 1).
        momentum: Momentum of the optimizer; of ``adam`` the decay of the mean gradient.
        nesterov: Use Nesterov's momentum.
        weight_decay: L2 penalty.
        decay_norms: Penalise biases and normalisation weights too, as the papers do.
        schedule: ``step``, ``cosine``, ``poly`` or ``onecycle``.
        milestones: ``step``: epochs after which the rate is multiplied by ``gamma``.
        step_size: ``step``: multiply by ``gamma`` every so many epochs, instead of ``milestones``; 0 is off.
        gamma: ``step``: the factor.
        power: ``poly``: the rate falls like ``(1 - step / steps) ** power``.
        warmup_epochs: All but ``onecycle``: epochs of a linear rise from 1 % to 100 % of the schedule.
        label_smoothing: Probability mass spread over all classes.
        ema_decay: Decay of the exponential moving average of the weights per step; 0 is off.
        clip_grad: Largest norm of the gradient; 0 is off.
        distill_weight: Share of the loss that a teacher's logits have, where there is a teacher; 0 is off.
        distill_temperature: Of the softmax of both, for the logits alone.
        distill_features: Weight of the distance to the teacher's features, added to the loss; 0 is off.
        sync_norms: Where several processes share a batch, batch norms see the whole of it; else each its share, so that the
            result depends on their number, and the first one's statistics are kept.
        precision: ``32``, ``bf16`` or ``16`` (mixed precision; 16 needs a GPU).
        channels_last: Store activations as NHWC.
        compile: Use ``torch.compile``.
        pad_images: Images in memory: make all of them larger, for training and test, by so many black pixels on each side.
        crop_padding: Images in memory: pad them by so many pixels, then crop at random; 0 is off.
        flip: Mirror images at random.
        seed: Decides the initial weights, the order of the samples and the augmentation.
        eval_batch_size: Samples in one step of evaluation.
        workers: Processes that read files; they never change the result.
        checkpoint_every: Steps between checkpoints; 0: at the end of each epoch only.
        keep_checkpoints: Number of checkpoints kept.

    Raises:
        UserError: A field has a value outside its range.

    Examples:
        >>> Recipe(epochs=100, lr=1.0, schedule="step", step_size=30).learning_rate(step=310, steps_per_epoch=10)
        0.1
    """

    model: str = "mgic_resnet20"
    model_args: dict[str, Any] = field(default_factory=dict, hash=False)
    data: str = "digits"
    data_args: dict[str, Any] = field(default_factory=dict, hash=False)
    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay_norms: bool = True
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()
    step_size: int = 0
    gamma: float = 0.1
    power: float = 0.9
    warmup_epochs: int = 0
    label_smoothing: float = 0.0
    ema_decay: float = 0.0
    clip_grad: float = 0.0
    distill_weight: float = 0.0
    distill_temperature: float = 4.0
    distill_features: float = 0.0
    sync_norms: bool = True
    precision: str = "32"
    channels_last: bool = False
    compile: bool = False
    pad_images: int = 0
    crop_padding: int = 0
    flip: bool = False
    seed: int = 0
    eval_batch_size: int = 512
    workers: int = 0
    checkpoint_every: int = 0
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name, (accepts, words) in _RULES.items():
            value = getattr(self, name)
            if not accepts(value):
                raise UserError(f"recipe: {name} must be {words}, got {value!r}")
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for name in ("model_args", "data_args"):
            object.__setattr__(self, name, _plain(getattr(self, name), name))
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.schedule == "step" and bool(self.milestones) == bool(self.step_size):
            raise UserError(
                "recipe: schedule 'step' needs either milestones or step_size, "
                f"got milestones={self.milestones!r} and step_size={self.step_size!r}"
            )
        if self.schedule != "step" and (self.milestones or self.step_size):
            raise UserError(
                f"recipe: milestones={self.milestones!r} and step_size={self.step_size!r} belong to schedule 'step', "
                f"but schedule is {self.schedule!r}"
            )
        if self.milestones and self.milestones[-1] >= self.epochs:
            raise UserError(f"recipe: milestones must lie before epochs={self.epochs}, got {self.milestones!r}")
        if self.warmup_epochs and self.schedule == "onecycle":
            raise UserError(
                f"recipe: schedule 'onecycle' warms up by itself; warmup_epochs must be 0, got {self.warmup_epochs}"
            )
        if self.warmup_epochs > self.epochs:
            raise UserError(f"recipe: warmup_epochs={self.warmup_epochs} is more than epochs={self.epochs}")
        if self.nesterov and self.optimizer != "sgd":
            raise UserError(f"recipe: nesterov belongs to optimizer 'sgd', but optimizer is {self.optimizer!r}")
        if self.nesterov and self.momentum == 0:
            raise UserError("recipe: nesterov needs momentum > 0, got momentum=0")
        if self.compile and self.distill_features:
            raise UserError(
                f"recipe: distill_features={self.distill_features} reads features inside the network, which "
                "torch.compile does not give away; set compile to false"
            )

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The rate of step ``step`` (counted from 0): a pure function, so a resumed run needs no scheduler state.

        The schedules equal ``MultiStepLR``/``StepLR`` (by epoch), ``CosineAnnealingLR`` and ``PolynomialLR`` (by step,
        down to 0) and ``OneCycleLR`` (by step, its defaults, without momentum cycling) of PyTorch; the warm-up multiplies
        them by ``LinearLR(start_factor=0.01)``.
        """
        factor = _SCHEDULES[self.schedule](self, step, steps_per_epoch)
        warmup = self.warmup_epochs * steps_per_epoch
        if step < warmup:
            factor *= 0.01 + 0.99 * step / warmup
        return self.lr * factor

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain YAML and JSON values."""
        return {**asdict(self), "milestones": list(self.milestones)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Build a recipe from plain values; fields that are left out keep their defaults.

        Raises:
            UserError: A key is unknown (the nearest field is named) or a value is outside its range.
        """
        known = {f.name: f.type for f in fields(cls)}
        for key in values:
            if key not in known:
                raise UserError(f"recipe: unknown key {key!r}{suggest(str(key), known)}")
        return cls(**{k: _number_from_text(v) if known[k] == "float" else v for k, v in values.items()})

    def to_yaml(self) -> str:
        """The recipe as YAML, one field a line, in the order of the class."""
        import yaml  # with jsonargparse; imported here because `mgic --help` needs no YAML

        return str(yaml.safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def from_yaml(cls, text: str, source: str | Path = "recipe") -> Recipe:
        """Read what `to_yaml` wrote, or a hand-written part of it.

        Args:
            text: The YAML text.
            source: Where it comes from, for error messages.

        Raises:
            UserError: The text is no YAML mapping, or `from_dict` refuses it.
        """
        import yaml

        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise UserError(f"{source}: expected 'field: value' lines, got {type(values).__name__}")
        return cls.from_dict(values)


def _step(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    epoch = step // steps_per_epoch
    drops = epoch // recipe.step_size if recipe.step_size else sum(epoch >= m for m in recipe.milestones)
    return float(recipe.gamma**drops)


def _cosine(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    return (1 + math.cos(math.pi * step / (recipe.epochs * steps_per_epoch))) / 2


def _poly(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    return float((1 - step / (recipe.epochs * steps_per_epoch)) ** recipe.power)


def _onecycle(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    # OneCycleLR's defaults: rise from 1/25 over 30 % of the steps, then fall to 1e-4 of the start; both are cosines.
    last = recipe.epochs * steps_per_epoch - 1
    top = 0.3 * (last + 1) - 1
    if step <= top:
        start, end, passed = 1 / 25, 1.0, step / top
    else:
        start, end, passed = 1.0, 1 / 25 / 1e4, (step - top) / (last - top)
    return end + (start - end) * (1 + math.cos(math.pi * passed)) / 2


_SCHEDULES: dict[str, Callable[[Recipe, int, int], float]] = {
    "step": _step,
    "cosine": _cosine,
    "poly": _poly,
    "onecycle": _onecycle,
}

_Rule = tuple[Callable[[Any], bool], str]


def _integer(low: int) -> _Rule:
    return lambda v: type(v) is int and v >= low, f"an integer, at least {low}"


def _number(low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = True) -> _Rule:
    def accepts(value: Any) -> bool:
        if type(value) not in (int, float) or not math.isfinite(value):
            return False
        return bool((low < value if open_low else low <= value) and (value < high if open_high else value <= high))

    words = f"a number {'above' if open_low else 'at least'} {low:g}"
    if high < math.inf:
        words += f" and {'below' if open_high else 'at most'} {high:g}"
    return accepts, words


def _increasing(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and all(type(v) is int and v >= 1 for v in value)
        and all(a < b for a, b in itertools.pairwise(value))
    )


_FLAG: _Rule = (lambda v: type(v) is bool, "true or false")
_NAME: _Rule = (lambda v: isinstance(v, str) and v != "", "a name")
_ARGUMENTS: _Rule = (
    lambda v: isinstance(v, dict) and all(isinstance(k, str) for k in v),
    "a mapping of names to values",
)
_RULES: dict[str, _Rule] = {
    "model": _NAME,
    "model_args": _ARGUMENTS,
    "data": _NAME,
    "data_args": (
        lambda v: _ARGUMENTS[0](v) and not {"name", "root", "download"} & v.keys(),
        f"{_ARGUMENTS[1]}; root and download are flags of the command",
    ),
    "epochs": _integer(1),
    "batch_size": _integer(1),
    "lr": _number(0, open_low=True),
    "optimizer": (lambda v: v in ("sgd", "adam", "rmsprop"), "'sgd', 'adam' or 'rmsprop'"),
    "momentum": _number(0, 1),
    "nesterov": _FLAG,
    "weight_decay": _number(0),
    "decay_norms": _FLAG,
    "schedule": (lambda v: isinstance(v, str) and v in _SCHEDULES, f"one of {', '.join(_SCHEDULES)}"),
    "milestones": (_increasing, "a list of increasing epochs, each at least 1"),
    "step_size": _integer(0),
    "gamma": _number(0, 1, open_low=True, open_high=False),
    "power": _number(0, open_low=True),
    "warmup_epochs": _integer(0),
    "label_smoothing": _number(0, 1),
    "ema_decay": _number(0, 1),
    "clip_grad": _number(0),
    "distill_weight": _number(0, 1, open_high=False),
    "distill_temperature": _number(0, open_low=True),
    "distill_features": _number(0),
    "sync_norms": _FLAG,
    "precision": (lambda v: v in ("32", "bf16", "16"), "'32', 'bf16' or '16' (text)"),
    "channels_last": _FLAG,
    "compile": _FLAG,
    "pad_images": _integer(0),
    "crop_padding": _integer(0),
    "flip": _FLAG,
    "seed": _integer(0),
    "eval_batch_size": _integer(1),
    "workers": _integer(0),
    "checkpoint_every": _integer(0),
    "keep_checkpoints": _integer(1),
}


def _plain(value: Any, where: str) -> Any:
    """``value`` with tuples as lists, so that it survives YAML; other than plain values are refused."""
    if isinstance(value, dict):
        return {k: _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v, where) for v in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise UserError(f"recipe: {where} must be plain values (numbers, text, lists), got {type(value).__name__}")


def _number_from_text(value: Any) -> Any:
    """YAML 1.1 reads ``1e-4`` (without a point) as text; everybody who writes it means the number."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


DIGITS = Recipe(
    data="digits",
    epochs=20,
    batch_size=32,
    lr=0.1,
    nesterov=True,
    weight_decay=5e-4,
    schedule="onecycle",
    crop_padding=1,
)
"""scikit-learn's digits, about a minute on a CPU: no flips, because mirrored digits are other signs."""

FASHION_MNIST = Recipe(
    data="fashion_mnist",
    epochs=5,
    batch_size=128,
    lr=0.1,
    nesterov=True,
    weight_decay=5e-4,
    schedule="onecycle",
    crop_padding=2,
    flip=True,
    channels_last=True,
)
"""FashionMNIST at 28x28 with its official test set; channels last, because small batches train faster so on CPUs."""

CIFAR10_MGIC = Recipe(
    model="mgic_resnet56",
    data="cifar10",
    epochs=100,
    batch_size=128,
    lr=0.001,
    weight_decay=1e-4,
    schedule="step",
    step_size=30,
    crop_padding=4,
    flip=True,
)
"""The CIFAR-10 experiments of Eliasof et al. 2023, Sec. 4.3 and 4.6 (Tables 3 and 12): 100 epochs, rate / 10 every 30.

The rate is the one printed for CIFAR, 0.001. It is a hundredth of what is usual for SGD on these networks (0.1, as in
He et al. 2016); the constant keeps what is printed, and whoever wants the usual rate overrides ``lr``. The paper trains
each network once, as far as it says.
"""

IMAGENET_MGIC_RESNET50 = Recipe(
    model="mgic_resnet50",
    data="imagenet",
    epochs=100,
    batch_size=256,
    lr=0.1,
    weight_decay=1e-4,
    schedule="step",
    step_size=30,
    flip=True,
    workers=8,
    channels_last=True,
)
"""MGIC-ResNet-50 on ImageNet (Eliasof et al. 2023, Sec. 4.3.2, Table 5); ``data`` is an image folder."""

IMAGENET_MGIC_MOBILENETV3 = replace(IMAGENET_MGIC_RESNET50, model="mgic_mobilenetv3_100")
"""MGIC-MobileNetV3 on ImageNet (the same section, Tables 7 and 13)."""

IMAGENET_MGIC_MOBILENETV3_150 = replace(IMAGENET_MGIC_MOBILENETV3, epochs=150)
"""The longer training of Fig. 6 (Sec. 4.6): 150 epochs by the same policy."""

CIFAR10_MG2020 = Recipe(
    model="mg_resnet_cifar",
    data="cifar10",
    epochs=180,
    batch_size=128,
    lr=0.1,
    weight_decay=1e-4,
    schedule="step",
    step_size=30,
    crop_padding=4,
    flip=True,
)
"""MG-ResNet on CIFAR-10 (Ephrath et al. 2020, Sec. 5, Table 1).

The paper gives the ImageNet strategy (rate 0.1, / 10 every 30 epochs, 180 epochs) and says that of CIFAR is similar, with
slight changes in epochs, batch size and the times of the drops, which it does not print: this constant takes the ImageNet
schedule and the usual batch size, 128.
"""

CIFAR100_MG2020 = replace(
    CIFAR10_MG2020,
    data="cifar100",
    model_args={"channels": [64, 128, 256, 512], "repeats": [3, 5, 7, 4], "group_size": 16, "coarsest": 64},
)
"""MG-ResNet on CIFAR-100 (the same table), its lightest row."""

IMAGENET_MG_RESNET34 = replace(IMAGENET_MGIC_RESNET50, model="mg_resnet34", epochs=180, batch_size=200)
"""MG-ResNet-34 on ImageNet (Ephrath et al. 2020, Sec. 5, Table 2): batch 200, 180 epochs."""

IMAGENET_MG_MOBILENETV2 = Recipe(
    model="mg_mobilenetv2",
    data="imagenet",
    epochs=180,
    batch_size=96,
    optimizer="rmsprop",
    lr=0.045,
    weight_decay=4e-5,
    schedule="step",
    step_size=1,
    gamma=0.98,
    flip=True,
    workers=8,
    channels_last=True,
)
"""MG-MobileNetV2 on ImageNet (the same table), trained "like" MobileNetV2: RMSProp, rate 0.045 times 0.98 an epoch.

These are the values of Sandler et al. 2018, Sec. 6.1 (there with 16 GPUs, batch 96 each); the epochs are those of the
section.
"""

CIFAR10_MGIAD = Recipe(
    model="mgiad18",
    data="cifar10",
    epochs=400,
    batch_size=128,
    lr=0.05,
    weight_decay=1e-4,
    schedule="cosine",
    crop_padding=4,
    flip=True,
)
"""MGiaD, MgNet and their ResNets on CIFAR-10 (van Betteray et al. 2022, Sec. IV.a, Tables I, II and VI to VIII).

The paper does not state its augmentation; its accuracies (training below test) need one, so this constant takes padded
crops and flips. The number of runs behind the printed deviations is not stated either.
"""

CIFAR100_MGIAD = replace(CIFAR10_MGIAD, data="cifar100")
"""The same on CIFAR-100 (Tables V and IX)."""

FASHION_MNIST_MGIAD = Recipe(
    model="mgiad18",
    data="fashion_mnist",
    epochs=400,
    batch_size=128,
    lr=0.05,
    weight_decay=1e-4,
    schedule="step",
    step_size=25,
    pad_images=2,
)
"""MGiaD on FashionMNIST with four resolutions (Sec. IV.d, Table III): rate 0.05, / 10 every 25 epochs.

The section speaks of images of 32 x 32; those of the set are 28 x 28, so they are padded by two pixels. No augmentation:
the training accuracies are 100 %.
"""

FASHION_MNIST_MGIAD20 = replace(FASHION_MNIST_MGIAD, model="mgiad20", model_args={"coarsest": 16})
"""The same with three resolutions (Table IV)."""

MODELNET10 = Recipe(
    model="mgic_diffgcn",
    data="modelnet:data/ModelNet10",
    data_args={"points": 1024, "scale": 0.3},
    epochs=250,
    batch_size=32,
    lr=0.1,
    weight_decay=1e-4,
    schedule="cosine",
    label_smoothing=0.2,
    eval_batch_size=32,
)
"""Point clouds of ModelNet10 (Eliasof et al. 2023, Sec. 4.5, Table 11).

The paper prints nothing of its training but 1,024 points a shape: the rest is how DGCNN (Wang et al. 2019) is trained.
"""

SOLIDS = Recipe(
    model="mgic_diffgcn",
    data="solids",
    data_args={"points": 128, "train": 100, "test": 40},
    epochs=30,
    batch_size=16,
    optimizer="adam",
    lr=0.01,
    weight_decay=0.0,
    schedule="onecycle",
    label_smoothing=0.1,
    eval_batch_size=100,
)
"""Generated solids, sized for minutes on one core of a CPU: 1,000 training clouds, another 128 of their points each epoch."""

CITYSCAPES_LRASPP = Recipe(
    model="mgic_lraspp_large",
    data="cityscapes",
    data_args={"crop_size": [769, 769], "scale": [0.5, 2.0]},
    epochs=486,
    batch_size=16,
    lr=0.007,
    weight_decay=4e-5,
    schedule="poly",
    power=0.9,
    flip=True,
    eval_batch_size=1,
    workers=8,
)
"""Segmentation of Cityscapes (Eliasof et al. 2023, Sec. 4.4, Table 9), trained as DeepLabV3 (Chen et al. 2017).

The paper names that work for augmentation and optimization and prints nothing else: crops of 769, scales from a half to
two, flips, batch 16, rate 0.007 with the poly schedule of power 0.9, and 90,000 steps, which are 486 epochs of 185.
DeepLabV3 starts from ImageNet's weights; whether the paper's networks did is not said.
"""

CAMVID = Recipe(
    model="mgic_lraspp_small",
    data="camvid",
    data_args={"crop_size": [176, 240], "scale": [0.5, 2.0]},
    epochs=100,
    batch_size=16,
    lr=0.1,
    weight_decay=1e-4,
    schedule="poly",
    power=0.9,
    flip=True,
    eval_batch_size=16,
)
"""CamVid at 240x180 from scratch, the same recipe made small enough for a CPU: about an hour, not a number of the paper's.

The rate is that of training from scratch, and an epoch has 22 steps, so these are 2,200 steps of 90,000.
"""

FUNCTIONS = Recipe(
    model="mgic_function_net",
    model_args={"c_max": 128},
    data="cos_sin_family",
    epochs=1000,
    batch_size=20_000,
    lr=0.0001,
    momentum=0.0,
    weight_decay=0.0,
    schedule="step",
    step_size=1,
    gamma=1.0,
    eval_batch_size=20_000,
)
"""Approximation of the functions a cos(bx) sin(cy) (Eliasof et al. 2023, Sec. 4.2, Figure 4): SGD at a constant rate.

Ten folds are the paper's: ``data_args.fold`` 0 to 9. Neither momentum nor weight decay is mentioned, so there is none.
"""

FUNCTIONS_WORKSHOP = replace(
    FUNCTIONS,
    model_args={"widths": [192, 192], "expansion": 2},
    data="cos_sin",
    batch_size=128,
)
"""Approximation of cos(x) sin(20y) by the workshop paper's network (Sec. B.1, Table 4), with alpha = 1.2."""

FUNCTIONS_SMALL = replace(
    FUNCTIONS,
    data="cos_sin",
    epochs=40,
    batch_size=1000,
    lr=0.1,
    momentum=0.9,
    nesterov=True,
    schedule="onecycle",
    step_size=0,
    ema_decay=0.98,
)
"""The function of the workshop paper by the networks of Table 2, small enough for a CPU: 1,880 steps instead of 475,000.

The weights are averaged, and with them the statistics of the batch norms: those of the last few batches alone, a per cent
off, would shift the steep function by more than a network's own error.
"""

RECIPES: dict[str, Recipe] = {
    "digits": DIGITS,
    "fashion_mnist": FASHION_MNIST,
    "cifar10_mgic": CIFAR10_MGIC,
    "imagenet_mgic_resnet50": IMAGENET_MGIC_RESNET50,
    "imagenet_mgic_mobilenetv3": IMAGENET_MGIC_MOBILENETV3,
    "imagenet_mgic_mobilenetv3_150": IMAGENET_MGIC_MOBILENETV3_150,
    "cifar10_mg2020": CIFAR10_MG2020,
    "cifar100_mg2020": CIFAR100_MG2020,
    "imagenet_mg_resnet34": IMAGENET_MG_RESNET34,
    "imagenet_mg_mobilenetv2": IMAGENET_MG_MOBILENETV2,
    "cifar10_mgiad": CIFAR10_MGIAD,
    "cifar100_mgiad": CIFAR100_MGIAD,
    "fashion_mnist_mgiad": FASHION_MNIST_MGIAD,
    "fashion_mnist_mgiad20": FASHION_MNIST_MGIAD20,
    "cityscapes_lraspp": CITYSCAPES_LRASPP,
    "camvid": CAMVID,
    "modelnet10": MODELNET10,
    "solids": SOLIDS,
    "functions": FUNCTIONS,
    "functions_workshop": FUNCTIONS_WORKSHOP,
    "functions_small": FUNCTIONS_SMALL,
}
"""Every recipe by its name on the command line: our own, and one per published experiment."""
