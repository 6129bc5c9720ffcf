"""The evidence: what the papers claim, the runs whose differences test it, and what came of it.

An `Experiment` is data: variants of one recipe, and claims, each of which says that one variant reaches more than another.
Variants are trained with the same seeds, so differences are taken seed by seed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from .errors import UserError, suggest
from .training import Recipe, read_record
from .training.recipes import EXECUTION_FIELDS, FASHION_MNIST, FASHION_MNIST_MGIAD20
from .training.records import runs_of

if TYPE_CHECKING:
    from .training import RunSummary

CONFIDENCE = 0.95
QUANTITIES: dict[str, Callable[[Mapping[str, float]], float]] = {
    "test accuracy": lambda metrics: metrics["test_accuracy"],
    "gap": lambda metrics: metrics["test_accuracy"] - metrics["train_accuracy"],
}
"""What may be claimed of a run, the more the better: percent right, and how little less on test than on training samples."""


@dataclass(frozen=True)
class Claim:
    """``better`` reaches more of a quantity than ``other``.

    Args:
        says: The claim, as a sentence.
        source: Who makes it, with the printed numbers.
        better: Variant, or the family of variants that are compared at equal ``cost``.
        other: Variant or family it is compared with.
        quantity: One of `QUANTITIES`.
        margin: ``better`` may reach so much less: what is claimed is that nothing more is lost.
        cost: ``params``, ``macs`` or ``ms``: each variant of the family is compared with what the other family reaches at
            the same cost, between two of its variants on the line over the cost's logarithm.
    """

    says: str
    source: str
    better: str
    other: str
    quantity: str = "test accuracy"
    margin: float = 0.0
    cost: str = ""


@dataclass(frozen=True)
class Experiment:
    """Variants of a recipe, and what is claimed of them.

    Args:
        question: What the runs are to tell.
        base: The recipe all share.
        variants: By name, the fields of the recipe that differ. ``family: rest`` belongs to a family.
        claims: What is tested.
        seeds: Of each variant.
    """

    question: str
    base: Recipe
    variants: Mapping[str, Mapping[str, Any]]
    claims: Sequence[Claim]
    seeds: Sequence[int] = (0, 1, 2)

    def recipe(self, variant: str) -> Recipe:
        """What is trained for a variant.

        Raises:
            UserError: There is no such variant.
        """
        if variant not in self.variants:
            raise UserError(f"there is no variant {variant!r}{suggest(variant, self.variants)}")
        return replace(self.base, **self.variants[variant])


CIFAR = replace(FASHION_MNIST, data="cifar10", data_args={"train_images": 20_000}, epochs=10, crop_padding=4)
"""Sized for a CPU: 20,000 images, 10 epochs of a one-cycle schedule; what is usual is 50,000 images and 100 to 400 epochs."""

_FASHION = replace(
    FASHION_MNIST_MGIAD20,
    data_args={"train_images": 20_000},
    epochs=10,
    schedule="cosine",
    step_size=0,
    pad_images=0,
    channels_last=True,
)
_SHARED = {"share_a": True, "share_b": True}
_CYCLES = {"channels": [16, 32, 64, 128], "repeats": [1, 1, 1, 1], "group_size": 8, "coarsest": 16}


def _network(name: str, **arguments: Any) -> dict[str, Any]:
    return {"model": name, "model_args": arguments}


def _smoothing_in_channels(group_size: int, **more: Any) -> dict[str, Any]:
    return _network("mgiad20", coarsest=16, group_size=group_size, **more)


def _narrow(width: float = 0.5, group_size: int = 8, coarsest: int = 32, **more: Any) -> dict[str, Any]:
    """MGIC-ResNet-18 on images of 32 x 32, by default half as wide: 32, 64, 128, 256 channels at 8, 4, 2 and 1 pixels."""
    return _network("mgic_resnet18", width=width, group_size=group_size, coarsest=coarsest, **more)


def _dense(width: float) -> dict[str, Any]:
    return _narrow(width, scheme={"plan": {"maximum": 0}})


EXPERIMENTS: dict[str, Experiment] = {
    "overfitting": Experiment(
        "Do networks with fewer weights overfit less? MGiaD and MgNet beside ResNet-20, FashionMNIST without augmentation.",
        _FASHION,
        {
            "ResNet-20": _network("resnet20"),
            "MgNet-AB": _network("mgnet20", **_SHARED),
            "MGiaD g_s 4": _smoothing_in_channels(4),
            "MGiaD g_s 8": _smoothing_in_channels(8),
            "MGiaD g_s 16": _smoothing_in_channels(16),
        },
        (
            Claim(
                "MGiaD (g_s 8) loses less from training to test images than ResNet-20",
                "van Betteray et al. 2022, Table IV: 97.63 to 93.35 % against 100 to 93.02 %",
                "MGiaD g_s 8",
                "ResNet-20",
                "gap",
            ),
            Claim(
                "MGiaD (g_s 8) loses less from training to test images than MgNet",
                "Table IV: 97.63 to 93.35 % against 100 to 93.29 %",
                "MGiaD g_s 8",
                "MgNet-AB",
                "gap",
            ),
            Claim(
                "MGiaD (g_s 8) is as accurate as ResNet-20 with a seventh of the weights",
                "Table IV: 93.35 against 93.02 %",
                "MGiaD g_s 8",
                "ResNet-20",
                margin=0.5,
            ),
            Claim(
                "MGiaD gains accuracy from g_s 4 to g_s 8",
                "Table IV: 92.85 to 93.35 %",
                "MGiaD g_s 8",
                "MGiaD g_s 4",
            ),
            Claim(
                "MGiaD overfits less with g_s 4 than with g_s 16",
                "Table IV: 97.07 to 92.85 % against 98.48 to 93.29 %",
                "MGiaD g_s 4",
                "MGiaD g_s 16",
                "gap",
            ),
        ),
    ),
    "effects": Experiment(
        "Do the papers' largest effects show at this budget? CIFAR-10.",
        CIFAR,
        {
            "multiplicative": _network("mg_resnet_cifar", **_CYCLES),
            "additive": _network("mg_resnet_cifar", scheme={"cycle": "additive"}, **_CYCLES),
            "MGiaD": _smoothing_in_channels(8),
            "MgNet": _network("mgnet20", **_SHARED),
            "MgNet in groups": _network("mgnet20", group_a=8, group_b=8, **_SHARED),
            "s_g 8, s_c 32": _narrow(),
            "s_g 4": _narrow(group_size=4),
            "s_g 16": _narrow(group_size=16),
            "s_c 16": _narrow(coarsest=16),
            "s_c 64": _narrow(coarsest=64),
        },
        (
            Claim(
                "the multiplicative cycle beats the additive one",
                "Ephrath et al. 2020, Table 1, three times as deep: 91.5 against 89.4 %",
                "multiplicative",
                "additive",
            ),
            Claim(
                "smoothing in channels beats plain grouping of MgNet (of half its weights)",
                "van Betteray et al. 2022, Tables II and VI, four resolutions: 92.62 against 87.02 %",
                "MGiaD",
                "MgNet in groups",
            ),
            Claim(
                "MGiaD is as accurate as MgNet with a third of its weights",
                "Table IV, FashionMNIST: 93.35 against 93.29 % (Table II, four resolutions: 92.62 against 95.28 %)",
                "MGiaD",
                "MgNet",
                margin=1.0,
            ),
            Claim(
                "larger groups are more accurate: s_g 8 beats 4",
                "Eliasof et al. 2023, Table 12, MGIC-ResNet-56: 94.2 against 92.8 %",
                "s_g 8, s_c 32",
                "s_g 4",
            ),
            Claim(
                "larger groups are more accurate: s_g 16 beats 8",
                "Table 12, MGIC-ResNet-56: 94.7 against 94.2 %",
                "s_g 16",
                "s_g 8, s_c 32",
            ),
            Claim(
                "a wider coarsest grid is more accurate: s_c 32 beats 16",
                "Table 12, MGIC-ResNet-56: 94.6 against 94.3 %",
                "s_g 8, s_c 32",
                "s_c 16",
            ),
            Claim(
                "a wider coarsest grid is more accurate: s_c 64 beats 32",
                "Table 12, MGIC-ResNet-56: 94.7 against 94.6 %",
                "s_c 64",
                "s_g 8, s_c 32",
            ),
        ),
    ),
    "width": Experiment(
        "Does linear cost buy accuracy? MGIC-ResNet-18 of four widths against its dense twin of five, CIFAR-10.",
        CIFAR,
        {
            "MGIC: width 0.25": _narrow(0.25),
            "MGIC: width 0.5": _narrow(0.5),
            "MGIC: width 0.75": _narrow(0.75),
            "MGIC: width 1": _narrow(1.0),
            "dense: width 0.125": _dense(0.125),
            "dense: width 0.1875": _dense(0.1875),
            "dense: width 0.25": _dense(0.25),
            "dense: width 0.375": _dense(0.375),
            "dense: width 0.5": _dense(0.5),
        },
        tuple(
            Claim(f"MGIC is more accurate than dense at equal {words}", source, "MGIC", "dense", cost=cost)
            for cost, words, source in (
                ("params", "parameters", "ours; the papers print no dense network of equal cost"),
                ("macs", "multiply-adds", "ours, likewise"),
                ("ms", "milliseconds", "ours; Eliasof et al. 2023, Table 8: run times on par with light networks"),
            )
        ),
    ),
    "parts": Experiment(
        "What is each part worth? MGIC-ResNet-18 and MGiaD with one of them changed, CIFAR-10.",
        CIFAR,
        {
            "whole": _narrow(),
            "no hierarchy": _narrow(scheme={"plan": "plan_groups"}),
            "plain prolongation": _narrow(correction="plain_prolongation"),
            "frozen transfers": _narrow(scheme={"transfer": "frozen_averaging_pair"}),
            "pre-activation": _narrow(block="PreActBasicBlock"),
            "corrections from zero": _narrow(scheme={"norm": "ZeroBatchNorm2d"}),
            "a level more": _narrow(coarsest=16),
            "a level less": _narrow(coarsest=64),
            "MGiaD": _smoothing_in_channels(8),
            "MGiaD, line 7 as printed": _smoothing_in_channels(8, correction="plain_prolongation"),
        },
        (
            Claim(
                "a hierarchy beats groups alone, of half its weights",
                "Eliasof et al. 2023, Sec. 3",
                "whole",
                "no hierarchy",
            ),
            Claim("the tau-correction is worth it", "Eliasof et al. 2023, eq. (3.3)", "whole", "plain prolongation"),
            Claim("transfers gain by training", "Eliasof et al. 2023, Sec. 3.3: learned", "whole", "frozen transfers"),
            Claim("post-activation is no worse than the printed order", "ours", "whole", "pre-activation", margin=0.5),
            Claim("corrections that start at zero cost nothing", "ours", "corrections from zero", "whole", margin=0.5),
            Claim("a level more costs nothing", "ours", "a level more", "whole", margin=0.5),
            Claim("a level less gains nothing", "ours", "whole", "a level less", margin=0.5),
            Claim(
                "the full approximation scheme beats the printed line 7",
                "van Betteray et al. 2022, Algorithm 2, and its text",
                "MGiaD",
                "MGiaD, line 7 as printed",
            ),
        ),
    ),
    "lightweight": Experiment(
        "Who is the best light network by one recipe? CIFAR-10; networks for ImageNet, whose last maps have one pixel here.",
        CIFAR,
        {
            "MGIC-MobileNetV3 0.6": _network("mgic_mobilenetv3_060"),
            "MGIC-MobileNetV3 1.0": _network("mgic_mobilenetv3_100"),
            "MGIC-MobileNetV3 1.0, ReLU": _network("mgic_mobilenetv3_100", act="relu"),
            "MobileNetV3-Large 0.75": _network("mobilenetv3_large_075"),
            "GhostNet 1.0": _network("ghostnet_100"),
            "ShuffleNetV2 1.0": _network("torchvision:shufflenet_v2_x1_0"),
            "MobileNetV4-Conv-Small": _network("mobilenetv4_conv_small"),
            "MGIC-MobileNetV3 0.6, longer": {**_network("mgic_mobilenetv3_060"), "epochs": 15},
            "MobileNetV3-Large 0.75, longer": {**_network("mobilenetv3_large_075"), "epochs": 15},
        },
        (
            Claim(
                "MGIC 1.0 beats MobileNetV3",
                "Eliasof et al. 2023, Fig. 5 and Table 7",
                "MGIC-MobileNetV3 1.0",
                "MobileNetV3-Large 0.75",
            ),
            Claim("MGIC 1.0 beats GhostNet", "Fig. 5", "MGIC-MobileNetV3 1.0", "GhostNet 1.0"),
            Claim(
                "MGIC 1.0 beats ShuffleNetV2 1.0",
                "Table 7: 74.8 against 69.4 %",
                "MGIC-MobileNetV3 1.0",
                "ShuffleNetV2 1.0",
            ),
            Claim(
                "ReLU is about as good as h-swish",
                "Table 7: 74.3 against 74.8 %",
                "MGIC-MobileNetV3 1.0, ReLU",
                "MGIC-MobileNetV3 1.0",
                margin=1.0,
            ),
            Claim(
                "half as many epochs again add little to MGIC",
                "Fig. 6, 100 and 150 epochs: 75.02 and 75.08 %",
                "MGIC-MobileNetV3 0.6",
                "MGIC-MobileNetV3 0.6, longer",
                margin=0.5,
            ),
            Claim(
                "half as many epochs again add little to MobileNetV3",
                "Fig. 6, 100 and 150 epochs: 73.34 and 73.36 %",
                "MobileNetV3-Large 0.75",
                "MobileNetV3-Large 0.75, longer",
                margin=0.5,
            ),
        ),
    ),
}
"""By name, as `mgic experiment NAME` takes it."""


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences with the interval that holds it, by Student's t, in 95 of 100 repetitions.

    Args:
        mean: Of the differences.
        low: Of the interval; minus infinity for fewer than two pairs.
        high: Likewise.
        n: Pairs.
    """

    mean: float
    low: float
    high: float
    n: int

    def verdict(self, margin: float = 0.0) -> str:
        """Whether more than ``-margin`` is what the difference is: ``holds``, ``does not hold`` or ``undecided``."""
        if self.low > -margin:
            return "holds"
        return "does not hold" if self.high < -margin else "undecided"

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})" if self.n > 1 else f"{self.mean:+.2f}"


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Compare pairs of values.

    Args:
        ours: One value a seed.
        theirs: One value a seed, the same seeds.

    Raises:
        ValueError: There is no pair, or one has more values than the other.

    Examples:
        >>> print(difference([92.0, 92.5, 92.2], [91.0, 91.4, 91.5]))
        +0.93 (+0.42 to +1.45)
    """
    pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
    if not pairs:
        raise ValueError("no pair to compare")
    mean, n = fmean(pairs), len(pairs)
    if n < 2:
        return Difference(mean, -math.inf, math.inf, n)
    from scipy.special import stdtrit

    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * stdev(pairs) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class Outcome:
    """What is known of one variant.

    Args:
        record: The record of its runs.
        costs: ``params``, ``macs`` and, where it was measured, ``ms``.
    """

    record: Mapping[str, Any]
    costs: Mapping[str, float] = field(default_factory=dict)

    def values(self, quantity: str) -> dict[int, float]:
        """The quantity by seed."""
        metrics = self.record["metrics"]
        each = [{name: m["values"][k] for name, m in metrics.items()} for k in range(self.record["n"])]
        return {seed: QUANTITIES[quantity](found) for seed, found in zip(self.record["seeds"], each, strict=True)}


@dataclass(frozen=True)
class Finding:
    """A claim and what came of it.

    Args:
        claim: The claim.
        difference: Of ``better`` to ``other``; None where runs are missing.
        note: What the difference is of, where that needs saying.
    """

    claim: Claim
    difference: Difference | None
    note: str = ""

    @property
    def verdict(self) -> str:
        """``holds``, ``does not hold``, ``undecided``, ``not run``, or ``no common cost``."""
        if self.difference is None:
            return self.note or "not run"
        return self.difference.verdict(self.claim.margin)


def file_name(variant: str) -> str:
    """A variant's name as that of its record.

    Examples:
        >>> file_name("MGIC: width 0.25")
        'mgic-width-0.25.json'
    """
    kept = "".join(c if c.isalnum() or c == "." else " " for c in variant.lower())
    return "-".join(kept.split()) + ".json"


def read_outcomes(name: str, folder: Path) -> dict[str, Outcome]:
    """What ``folder`` holds of an experiment, by variant.

    Args:
        name: The experiment.
        folder: Where its records are, and ``costs.json``.

    Raises:
        UserError: A record is none, or of another recipe than the variant's.
    """
    experiment, found = EXPERIMENTS[name], {}
    costs = read_record(folder / "costs.json")["costs"] if (folder / "costs.json").exists() else {}
    for variant in experiment.variants:
        path = folder / file_name(variant)
        if not path.exists():
            continue
        record, asked = read_record(path), experiment.recipe(variant)
        _refuse_other(path, variant, record, asked)
        found[variant] = Outcome(record, costs.get(variant, {}))
    return found


def recorded_runs(name: str, variant: str, folder: Path, data: str) -> "dict[int, RunSummary]":
    """Runs of a variant that records hold, by seed: its own record's, then those of experiments with the same recipe.

    A run counts whatever commit it is of. Other experiments' records that are of another recipe or other data are left alone.

    Args:
        name: The experiment.
        variant: The variant.
        folder: Where the experiments' folders are.
        data: Provenance of the data the runs must be of, `mgic.data.Data.note`.

    Raises:
        UserError: The variant's own record is none, or of another recipe or of other data.
    """
    asked, own = EXPERIMENTS[name].recipe(variant), folder / name / file_name(variant)
    runs: dict[int, RunSummary] = {}
    if own.exists():
        record = read_record(own)
        _refuse_other(own, variant, record, asked)
        if record["data"] != data:
            raise UserError(
                f"{own}: of other data: {record['data']}, not {data}; remove the record, or give another --results"
            )
        runs |= {run.seed: run for run in runs_of(record, own)}
    shared = [(o, v) for o, e in EXPERIMENTS.items() if o != name for v in e.variants if e.recipe(v) == asked]
    for path in (folder / other / file_name(same) for other, same in shared):
        record = read_record(path) if path.exists() else {}
        if record and record["data"] == data and _differs(record, asked) is None:
            runs = {run.seed: run for run in runs_of(record, path)} | runs
    return runs


def _differs(record: Mapping[str, Any], asked: Recipe) -> tuple[str, Any, Any] | None:
    """A record counts for the recipe it is of, wherever its data lay and however it was run."""
    free, stated = {"seed", "data", *EXECUTION_FIELDS}, record.get("recipe", {})
    for key, value in asked.to_dict().items():
        if key not in free and stated.get(key) != value:
            return key, stated.get(key), value
    return None


def _refuse_other(path: Path, variant: str, record: Mapping[str, Any], asked: Recipe) -> None:
    if (found := _differs(record, asked)) is not None:
        key, stated, value = found
        raise UserError(f"{path}: {key} is {stated!r}, but {variant!r} has {value!r}; remove the record")


def findings(name: str, outcomes: Mapping[str, Outcome]) -> list[Finding]:
    """Test each claim of an experiment against its runs."""
    return [
        _at_equal_cost(claim, outcomes) if claim.cost else _side_by_side(claim, outcomes)
        for claim in EXPERIMENTS[name].claims
    ]


def _side_by_side(claim: Claim, outcomes: Mapping[str, Outcome]) -> Finding:
    if claim.better not in outcomes or claim.other not in outcomes:
        return Finding(claim, None)
    ours, theirs = (outcomes[variant].values(claim.quantity) for variant in (claim.better, claim.other))
    seeds = sorted(ours.keys() & theirs.keys())
    return Finding(claim, difference([ours[s] for s in seeds], [theirs[s] for s in seeds]) if seeds else None)


def _at_equal_cost(claim: Claim, outcomes: Mapping[str, Outcome]) -> Finding:
    """Each variant of a family against the other family's line, where that reaches; the mean over them, seed by seed."""
    families = [
        [o for variant, o in outcomes.items() if variant.startswith(f"{family}:") and claim.cost in o.costs]
        for family in (claim.better, claim.other)
    ]
    if not families[0] or len(families[1]) < 2:
        return Finding(claim, None)
    values = [[o.values(claim.quantity) for o in family] for family in families]
    seeds = sorted(set.intersection(*(set(v) for family in values for v in family)))
    costs = [[o.costs[claim.cost] for o in family] for family in families]
    low, high = min(costs[1]), max(costs[1])
    inside = [k for k, cost in enumerate(costs[0]) if low <= cost <= high]
    if not (seeds and inside):
        return Finding(claim, None, "no common cost")
    theirs = [fmean(_between(costs[0][k], costs[1], [v[seed] for v in values[1]]) for k in inside) for seed in seeds]
    ours = [fmean(values[0][k][seed] for k in inside) for seed in seeds]
    return Finding(claim, difference(ours, theirs), f"mean over {len(inside)} of {len(costs[0])} widths")


def _between(cost: float, costs: Sequence[float], values: Sequence[float]) -> float:
    """The value at ``cost`` on the broken line through points, over the logarithm of the cost."""
    points = sorted(zip((math.log(c) for c in costs), values, strict=True))
    place = math.log(cost)
    for (left, before), (right, after) in pairwise(points):
        if left <= place <= right:
            share = (place - left) / (right - left) if right > left else 0.0
            return before + share * (after - before)
    raise ValueError(f"{cost} is outside {min(costs)} ... {max(costs)}")
