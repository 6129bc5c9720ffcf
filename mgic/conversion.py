"""Multigrid in channels put into an existing network: with given group sizes, or with those that meet a budget.

For a budget of parameters, multiply-adds or milliseconds a network is cut into stages, by the resolution of its features.
Every stage gets one setting; the settings are those that stay within the budget and shrink the stages as evenly as they can:
the sum over stages of (share of the cost) times (log of the remaining part) is largest. With some dozens of settings and a
few stages the best choice is found, to within 1/20,000 of the cost. Parameters and multiply-adds are counted; milliseconds
are measured, layer by layer, on the machine that will run the network.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .conversion_report import Conversion, ConversionReport, LayerReport
from .errors import UserError
from .runtime.accelerate import accelerate
from .surgery import Where, apply_, made, plan, rebuild_
from .survey import Survey, checked_size, copied, input_size_of, refuse

DEFAULT = Conversion()
"""Groups of 32, down to 64 channels, residual blocks whole."""
GROUP_SIZES = (64, 32, 16, 8)
COARSEST = (128, 64, 32, 16)
PATHS = ("eager", "onnxruntime", "openvino", "engine")
ROUNDS = 15
"""Calls that a time is the median of."""
TRIES = 4
"""How often a choice is measured and the table corrected by what was found."""
WITHIN = 0.05
"""Relative distance from the milliseconds asked for at which the search ends."""
Time = Callable[[nn.Module, Tensor], float]
"""``(module, example_input) -> milliseconds`` of one call."""
Clock = Callable[[nn.Module, Tensor], tuple[float, str]]
"""The same, and the path it was measured in."""


@dataclass(frozen=True)
class Choice:
    """The setting of one stage.

    Args:
        stage: Height and width of its features.
        group_size: ``s_g``; 0 where the stage stays dense.
        coarsest: ``s_c``; 0 where the stage stays dense.
        before: Its cost before, in the unit of the budget.
        after: Its cost afterwards.
    """

    stage: str
    group_size: int
    coarsest: int
    before: float
    after: float


def convert_(
    model: nn.Module,
    conversion: Conversion = DEFAULT,
    *,
    where: Where | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    input_size: Sequence[int] | None = None,
    dry_run: bool = False,
    target_params: float | None = None,
    target_macs: float | None = None,
    target_ms: float | None = None,
    threads: int = 1,
    time: Time | None = None,
) -> ConversionReport:
    """Put multigrid into a network, in place.

    New layers start with random weights, drawn as widely as those they replace were spread, and can be fitted to them by
    `mgic.warm_start_`; norms inside a block keep the first channels of theirs. Nothing is replaced that would not become
    cheaper in parameters and multiply-adds. Where the converted network does not run, the layers that broke it are kept, and
    their rows say so.

    With a target, each stage gets a setting of its own, group sizes up to 64 and coarsest widths up to 128; of ``conversion``
    only ``blocks`` and ``linear`` count.

    Args:
        model: Any network.
        conversion: Group size, coarsest width and what to replace.
        where: ``(name, module) -> bool``: whether a residual block, or a layer, may be replaced; all by default.
        optimizer: An optimizer of the network: refused if it holds parameters that would be replaced.
        input_size: Size of one input without the batch; see `input_size_of`.
        dry_run: Only report.
        target_params: Most trainable parameters.
        target_macs: Most multiply-adds of one input.
        target_ms: Milliseconds of one call on one input, in the fastest runtime found here; met within 5 % where it can be:
            ``report.budget`` says what was measured.
        threads: CPU threads for ``target_ms``.
        time: For ``target_ms``, measures one call of a module; by default in the path of `mgic.accelerate` that is the
            converted network's fastest. A layer that this path cannot run is timed in eager PyTorch;
            ``report.budget["layers"]`` says where each was timed.

    Warns:
        UserWarning: If nothing was replaced, or layers were timed in eager PyTorch for want of their path.

    Raises:
        UserError: The network is compiled, scripted, quantised or wrapped, does not run on inputs of this size, or the
            optimizer holds parameters that would be replaced. More than one target is given, it is not a positive number, or
            no setting meets it.

    Examples:
        >>> from mgic.blocks import BasicBlock
        >>> model = nn.Sequential(BasicBlock(64))
        >>> report = convert_(model, Conversion(group_size=8, coarsest=16), input_size=(64, 8, 8))
        >>> print(type(model[0]).__name__, report.rows[0].widths, report.after.params)
        MGICBlock (64, 32, 16) 19840
    """
    targets = {"params": target_params, "macs": target_macs, "ms": target_ms}
    given = {unit: value for unit, value in targets.items() if value is not None}
    if not given:
        report = apply_(model, lambda name: conversion, where, optimizer, input_size, dry_run)
    else:
        refuse(model)
        unit, target = _target(given)
        size = input_size_of(model) if input_size is None else checked_size(input_size)
        survey = Survey(model, size)
        table = _Table(survey, conversion, where)
        timed = unit == "ms"
        found = _within_time(model, table, target, threads, time) if timed else _within_count(table, unit, target)
        report = apply_(model, table.chooser(found["choices"]), where, optimizer, size, dry_run=True)
        if not timed:
            found["measured"] = getattr(report.after, unit)
            if found["measured"] > target:
                kept = [row.name for row in report.rows if row.reason.startswith("the network does not run")]
                raise UserError(f"target_{unit}={target:,.6g} cannot be met: {', '.join(kept[:3])} cannot be replaced")
        found["choices"] = [asdict(choice) for choice in found["choices"]]
        report = replace(report, budget=found)
        if not dry_run:
            rebuild_(model, report.layers)
    if not dry_run and not report.layers:
        warnings.warn("nothing was replaced: the rows of the report say why", stacklevel=2)
    return report


def convert(model: nn.Module, conversion: Conversion = DEFAULT, **options: Any) -> tuple[nn.Module, ConversionReport]:
    """Return a converted copy and the report; arguments as of `convert_`. The network itself is left as it is."""
    refuse(model)
    twin = copied(model)
    return twin, convert_(twin, conversion, **options)


def _target(given: Mapping[str, Any]) -> tuple[str, float]:
    """Return the unit and the value of the one target that is given."""
    if len(given) != 1:
        raise UserError(f"give one of target_params, target_macs and target_ms, got {len(given)} of them")
    ((unit, target),) = given.items()
    if isinstance(target, bool) or not isinstance(target, int | float) or not 0 < target < math.inf:
        raise UserError(f"target_{unit} must be a positive number, got {target!r}")
    return unit, target


def _within_count(table: "_Table", unit: str, target: float) -> dict[str, Any]:
    """Choose by counted parameters or multiply-adds."""
    before = getattr(table.survey.cost, unit)
    options = table.options(lambda row, done: getattr(row, f"{unit}_after" if done else unit))
    fixed = before - sum(options[None].values())
    choices = choose(options, fixed, target, f"target_{unit}")
    predicted = fixed + sum(choice.after for choice in choices)
    return {"unit": unit, "target": target, "before": before, "choices": choices, "predicted": predicted}


class _Table:
    """What every setting makes of every layer, and which stage a layer belongs to."""

    def __init__(self, survey: Survey, conversion: Conversion, where: Where | None) -> None:
        self.survey = survey
        self.rows: dict[Conversion | None, tuple[LayerReport, ...]] = {}
        for setting in [None, *_settings(conversion)]:
            rows = plan(survey, partial(_same, setting), where)
            if setting is None or any(row.replaced for row in rows):
                self.rows[setting] = tuple(rows)

    def stage(self, name: str) -> str:
        """Height and width of a layer's output."""
        call = self.survey.calls.get(name)
        return "x".join(map(str, call.output[2:])) if call is not None and call.output is not None else ""

    def options(self, cost: Callable[[LayerReport, bool], float]) -> dict[Conversion | None, dict[str, float]]:
        """Cost of each stage under every setting: that of its layers, and what replacing some of them changes.

        Args:
            cost: ``(row, after) -> cost`` of a layer before, or after it was replaced.
        """
        dense: dict[str, float] = {}
        for row in self.rows[None]:
            dense[self.stage(row.name)] = dense.get(self.stage(row.name), 0.0) + cost(row, False)
        found = {}
        for setting, rows in self.rows.items():
            found[setting] = dict(dense)
            for row in rows:
                if row.replaced:
                    found[setting][self.stage(row.name)] += cost(row, True) - cost(row, False)
        return found

    def chooser(self, choices: Iterable[Choice]) -> Callable[[str], Conversion | None]:
        """Settings by the name of a layer."""
        template = next((setting for setting in self.rows if setting is not None), Conversion())
        by_stage = {
            choice.stage: replace(template, group_size=choice.group_size, coarsest=choice.coarsest)
            for choice in choices
            if choice.group_size
        }
        return lambda name: by_stage.get(self.stage(name))


def _same(setting: Conversion | None, name: str) -> Conversion | None:
    return setting


def _settings(conversion: Conversion) -> list[Conversion]:
    return [
        replace(conversion, group_size=group_size, coarsest=coarsest)
        for group_size in GROUP_SIZES
        for coarsest in COARSEST
    ]


Options = Mapping[Conversion | None, Mapping[str, float]]
"""Cost of every stage under every setting; None is the dense network."""


def choose(options: Options, fixed: float, target: float, name: str) -> list[Choice]:
    """Return the settings within the target that shrink the stages most evenly.

    States are (cost, score, settings so far); one that costs more and scores less than another is dropped.
    """
    dense = options[None]
    total = sum(dense.values()) + fixed
    states: list[tuple[float, float, tuple[Conversion | None, ...]]] = [(fixed, 0.0, ())]
    for stage, before in dense.items():
        found = [
            (cost + after[stage], score + _score(before, after[stage], total), (*settings, setting))
            for cost, score, settings in states
            for setting, after in options.items()
        ]
        states = _frontier(found, total)
    within = [state for state in states if state[0] <= target]
    if not within:
        least = min(state[0] for state in states)
        raise UserError(
            f"{name}={target:,.6g} cannot be met: groups of {min(GROUP_SIZES)} and a coarsest width of {min(COARSEST)} leave "
            f"{least:,.6g} of {total:,.6g}"
        )
    settings = max(within, key=lambda state: state[1])[2]
    return [
        Choice(stage, *((0, 0) if s is None else (s.group_size, s.coarsest)), dense[stage], options[s][stage])
        for stage, s in zip(dense, settings, strict=True)
    ]


def _score(before: float, after: float, total: float) -> float:
    return before / total * math.log(max(after, 1e-12) / before) if before > 0 else 0.0


def _frontier(
    states: list[tuple[float, float, tuple[Conversion | None, ...]]], total: float
) -> list[tuple[float, float, tuple[Conversion | None, ...]]]:
    """Drop states that another one beats; of those within 1/20,000 of the total cost, keep the best."""
    kept: list[tuple[float, float, tuple[Conversion | None, ...]]] = []
    for state in sorted(states, key=lambda s: (s[0], -s[1])):
        if kept and state[1] <= kept[-1][1]:
            continue
        if len(kept) > 1 and int(20_000 * state[0] / total) == int(20_000 * kept[-1][0] / total):
            kept.pop()  # a better one that costs the same, but for the last digits
        kept.append(state)
    return kept


def _within_time(model: nn.Module, table: _Table, target: float, threads: int, time: Time | None) -> dict[str, Any]:
    """Choose by measured times of layers, measure what was chosen, correct the table by it, choose again."""
    others = {f"{p.dtype} on {p.device}" for p in model.parameters()} - {"torch.float32 on cpu"}
    if others:
        raise UserError(f"target_ms measures float32 networks on the CPU, this one is {', '.join(sorted(others))}")
    x = torch.randn(1, *table.survey.size)
    if time is None:
        path, before, base = _fastest(model, table, x, threads)
        clock = partial(time_in_path, path, threads)
    else:
        path, before = "given", time(model, x)
        base = before
        clock = partial(_given, time)
    times = _Times(model, table, clock)
    options = table.options(times)
    dense = options[None]
    factor, best, error = 1.0, None, math.inf
    tried = []
    for _ in range(TRIES):
        scaled = {
            setting: {stage: dense[stage] - factor * (dense[stage] - ms) for stage, ms in stages.items()}
            for setting, stages in options.items()
        }
        fixed = base - sum(dense.values())
        choices = choose(scaled, fixed, target, "target_ms")
        predicted = fixed + sum(choice.after for choice in choices)
        twin = _converted(model, table, choices)
        measured, _ = clock(twin, x)
        tried.append({"predicted": predicted, "measured": measured})
        if abs(measured - target) < error:
            error = abs(measured - target)
            best = {"choices": choices, "predicted": predicted, "measured": measured}
        if abs(measured - target) <= WITHIN * target or base <= predicted:
            break
        factor *= (base - measured) / (base - predicted)
        if factor <= 0:
            raise UserError(f"target_ms={target:g} cannot be met: {base:.3g} ms became {measured:.3g} ms by conversion")
    assert best is not None
    layers: list[dict[str, Any]] = [
        {"layer": layer, "group_size": group_size, "coarsest": coarsest, "ms": ms, "path": way}
        for (layer, group_size, coarsest), (ms, way) in sorted(times.seen.items())
    ]
    if slower := sorted({entry["layer"] for entry in layers if entry["path"] != path}):
        warnings.warn(
            f"target_ms: timed in eager PyTorch, since {path} does not run them: {', '.join(slower)}", stacklevel=3
        )
    facts = {"unit": "ms", "target": target, "before": before, "path": path, "threads": threads}
    return {**facts, **best, "tried": tried, "layers": layers}


def _converted(model: nn.Module, table: _Table, choices: list[Choice]) -> nn.Module:
    twin = copy.deepcopy(model)
    apply_(twin, table.chooser(choices), None, None, table.survey.size)
    return twin.eval()


class _Times:
    """Milliseconds of layers, each kind of layer measured once."""

    def __init__(self, model: nn.Module, table: _Table, clock: Clock) -> None:
        self.table, self.clock = table, clock
        self.modules = dict(model.named_modules())
        self.cache: dict[str, tuple[float, str]] = {}
        self.seen: dict[tuple[str, int, int], tuple[float, str]] = {}

    def __call__(self, row: LayerReport, after: bool) -> float:
        """Milliseconds of a layer before or after it was replaced; layers without multiply-adds take none."""
        call = self.table.survey.calls.get(row.name)
        if call is None or call.inputs is None or not row.macs:
            return 0.0
        module = self.modules[row.name]
        if after:
            module = made(row.setting, module)
        total = 0.0
        for inputs, times in call.seen.items():
            key = f"{inputs} {module!r}"
            if key not in self.cache:
                self.cache[key] = self.clock(copy.deepcopy(module).eval(), torch.randn(inputs or ()))
                self.seen[(row.name, row.group_size, row.coarsest) if after else (row.name, 0, 0)] = self.cache[key]
            total += times * self.cache[key][0]
        return total


def _fastest(model: nn.Module, table: _Table, x: Tensor, threads: int) -> tuple[str, float, float]:
    """Return the fastest path of a converted network, the dense network's least time in any, and its time in that one."""
    setting = next((setting for setting in reversed(list(table.rows)) if setting is not None), None)
    if setting is None:
        raise UserError("target_ms: there is no layer that could be replaced")
    twin = copy.deepcopy(model)
    apply_(twin, partial(_same, setting), None, None, table.survey.size)
    times = []
    for network in (twin, model):
        report = accelerate(network, x, threads=threads, paths=PATHS).report
        times.append({one.path: one.milliseconds for one in report.results if one.milliseconds is not None})
    path = min(times[0].keys() & times[1].keys(), key=lambda name: times[0][name])
    return path, min(times[1].values()), times[1][path]


def time_in_path(path: str, threads: int, module: nn.Module, x: Tensor) -> tuple[float, str]:
    """Return the median milliseconds of one call in a path, or in eager PyTorch where it is not for it, and which."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # who calls is told by the path that is returned
        fast = accelerate(module, x, threads=threads, paths=[path], rounds=ROUNDS)
    (ms,) = (one.milliseconds for one in fast.report.results if one.milliseconds is not None)
    return ms, fast.path


def _given(time: Time, module: nn.Module, x: Tensor) -> tuple[float, str]:
    return time(module, x), "given"
