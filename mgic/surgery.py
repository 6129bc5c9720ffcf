"""Layers replaced in an existing network: residual blocks whole, other convolutions one by one.

Nothing is known about the network but what running it on torch's meta device shows (shapes, calls, multiply-adds) and what
its blocks' programs show (`torch.fx`). A residual block of equal input and output shape becomes an `MGICBlock` whose levels
are copies of the block itself, narrower and in groups; any other wide convolution becomes an `MGICConv`. Every layer is
reported: replaced, or kept and why.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from .conversion_report import Conversion, ConversionReport, LayerReport, Setting
from .counting import Cost, count_trainable
from .cycle import AdditiveChannelChange, MGICBlock, MGICConv, MGICLinear
from .errors import BROKEN, ChannelConfigError, UserError
from .hierarchy import Level
from .smoothing import Smoothing
from .survey import Survey, checked_size, first_line, heads, input_size_of, is_residual, name_of, refuse
from .twins import CONVOLUTIONS, Kept, make_block, make_conv, make_linear, unknown

Where = Callable[[str, nn.Module], bool]
"""``(name, module) -> bool``: whether a block or a layer may be replaced."""
_BY_CHOICE = "dense by choice"
_MERGERS = ("reparameterize", "switch_to_deploy")
"""Methods of modules that merge their branches to one convolution after training."""
_MULTIGRID = (MGICBlock, MGICConv, MGICLinear, AdditiveChannelChange, Smoothing)

_MAKERS: dict[str, Callable[[nn.Module, Setting], nn.Module]] = {
    "block": lambda module, new: make_block(module, new.widths[0], new.group_size, new.coarsest, new.pooled),
    "conv": lambda module, new: make_conv(module, new.group_size, new.coarsest),
    "linear": lambda module, new: make_linear(module, new.group_size, new.coarsest),
}
"""By the action of a report."""


def rebuild_(model: nn.Module, layers: Sequence[Mapping[str, Any]]) -> nn.Module:
    """Replace exactly the layers of a report (`ConversionReport.layers`) in a network built anew, and return it.

    Raises:
        UserError: The network has no such layer, or it cannot be replaced as the report says.
    """
    if not isinstance(layers, list | tuple):
        raise UserError(f"conversion: layers must be a list of layers, got {type(layers).__name__}")
    modules = dict(model.named_modules())
    for layer in layers:
        try:
            name = str(layer["name"])
            setting = Setting(
                action=str(layer["action"]),
                group_size=int(layer["group_size"]),
                coarsest=int(layer["coarsest"]),
                widths=tuple(map(int, layer["widths"])),
                pooled=tuple(map(str, layer.get("pooled", ()))),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"conversion: a layer has name, action, group_size, coarsest, widths, not {layer!r}"
            ) from error
        if name not in modules:
            raise UserError(f"conversion: the network has no layer {name!r}; is it the network that was converted?")
        if setting.action not in _MAKERS:
            raise UserError(f"conversion: {name} has action {setting.action!r}; known: {', '.join(_MAKERS)}")
        try:
            model = _put(model, name, made(setting, modules[name]))
        except Kept as reason:
            raise UserError(f"conversion: {name} cannot be replaced: {reason}") from reason
    return model


def made(setting: Setting, old: nn.Module) -> nn.Module:
    """Make what stands in for a module: on its device, of its type, in its mode, frozen where all of it is."""
    like = next(old.parameters())
    with torch.device(like.device):
        new = _MAKERS[setting.action](old, setting)
    new.to(like.device, like.dtype).train(old.training)
    if isinstance(new, MGICBlock):
        for relax in new.relax:  # a part of a block may be in another mode: frozen norms
            for one, other in zip(relax.modules(), old.modules(), strict=True):
                one.training = other.training
    return _frozen_like(old, new)


def _frozen_like(old: nn.Module, new: nn.Module) -> nn.Module:
    if not any(p.requires_grad for p in old.parameters()):
        new.requires_grad_(False)
    return new


def plan(survey: "Survey", choose: Callable[[str], Conversion | None], where: Where | None = None) -> list[LayerReport]:
    """Return the rows of a conversion that nobody has run: `apply_` knows of layers that cannot be replaced after all."""
    planner = _Planner(survey, choose, where)
    planner.visit_all()
    return planner.rows


def apply_(
    model: nn.Module,
    choose: Callable[[str], Conversion | None],
    where: Where | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    input_size: Sequence[int] | None = None,
    dry_run: bool = False,
) -> ConversionReport:
    """Convert with settings that may differ from layer to layer; arguments else as of `mgic.convert_`.

    Args:
        model: Any network.
        choose: Settings for the layer or block of a name; None to keep it.
        where: Whether a block or layer may be replaced.
        optimizer: Refused if it holds parameters that would be replaced.
        input_size: Size of one input without the batch.
        dry_run: Only report.
    """
    refuse(model)
    size = input_size_of(model) if input_size is None else checked_size(input_size)
    survey = Survey(model, size)
    planner = _Planner(survey, choose, where)
    rows, after = planner.finish()
    replaced = {row.name for row in rows if row.replaced}
    if optimizer is not None:
        _check_optimizer(model, replaced, optimizer)
    if not dry_run:
        modules = dict(model.named_modules())
        for row in rows:
            if row.replaced:
                _put(model, row.name, made(row.setting, modules[row.name]))
    name = name_of(model)
    return ConversionReport(name, tuple(rows), survey.cost, after, tuple(_notes(rows, survey)))


def _check_optimizer(model: nn.Module, replaced: set[str], optimizer: torch.optim.Optimizer) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name in sorted(replaced):
        if any(id(p) in held for p in model.get_submodule(name).parameters()):
            raise UserError(
                f"the optimizer holds parameters of {name}, which would be replaced: make it after converting"
            )


class _Planner:
    """Decides layer by layer, on a copy of the network on the meta device."""

    def __init__(self, survey: Survey, choose: Callable[[str], Conversion | None], where: Where | None) -> None:
        self.survey, self.choose, self.where = survey, choose, where
        self.modules = dict(survey.meta.named_modules())
        self.places: dict[nn.Module, list[str]] = {}
        for name, module in survey.meta.named_modules(remove_duplicate=False):
            self.places.setdefault(module, []).append(name)
        owners: dict[Tensor, set[nn.Module]] = {}
        originals = dict(survey.model.named_modules())  # the copy on the meta device has untied what is tied
        for module in originals.values():
            for p in module.parameters(recurse=False):
                owners.setdefault(p, set()).add(module)
        tied = {m for modules in owners.values() if len(modules) > 1 for m in modules}
        self.tied = {name for name, module in originals.items() if module in tied}
        self.heads = heads(survey)
        self.broken: dict[str, str] = {}
        self.rows: list[LayerReport] = []
        self.new: dict[str, nn.Module] = {}

    def finish(self) -> tuple[list[LayerReport], Cost]:
        """Return the rows, and the cost of the converted network."""
        while True:
            self.visit_all()
            macs = self._run(self.new)
            if isinstance(macs, int):
                before = self.survey.cost
                params = before.params + sum(row.params_after - row.params for row in self.rows)
                return self.rows, Cost(params, macs, before.input_size)
            if not self.new:
                raise UserError(f"{type(self.survey.model).__name__} runs once and not again: {macs}")
            self._find_broken()

    def visit_all(self) -> None:
        """Decide on every layer."""
        self.rows, self.new = [], {}
        self._visit("", self.survey.meta, "")

    def _run(self, new: Mapping[str, nn.Module]) -> int | str:
        """Run the network with modules replaced; return its multiply-adds, or what it raised."""
        meta = copy.deepcopy(self.survey.meta)
        for name, module in new.items():
            meta = _put(meta, name, copy.deepcopy(module))
        counter = FlopCounterMode(display=False)
        try:
            with counter, torch.no_grad():
                meta.eval()(torch.empty(1, *self.survey.size, device="meta"))
        except BROKEN as error:
            return f"{type(error).__name__}: {first_line(error)}"
        return int(counter.get_total_flops() // 2)

    def _find_broken(self) -> None:
        """Find the layers whose replacement breaks the network; they are kept the next time."""
        alone = {name: self._run({name: new}) for name, new in self.new.items()}
        failed = {name: found for name, found in alone.items() if isinstance(found, str)}
        self.broken |= failed or dict.fromkeys(alone, "the network does not run with all of them replaced")

    def _visit(self, name: str, module: nn.Module, because: str) -> None:
        if isinstance(module, _MULTIGRID):
            self._keep(name, module, "multigrid already")
            return
        reason = ""
        conversion = self.choose(name)
        if conversion is not None and conversion.blocks and not self._unfit(name, module):
            reason = self._try_block(name, module, conversion)
            if name in self.new:
                return
        computed = parametrize.is_parametrized(module)
        if computed or any(p.ndim > 1 for p in module.parameters(recurse=False)):
            self._layer(name, module, because)
        if computed:  # its weights live in modules that are nobody's layers
            return
        because = f"its block ({type(module).__name__}) cannot be multigrid: {reason}" if reason else because
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            if self.places[child][0] == path:
                self._visit(path, child, because)

    def _unfit(self, name: str, module: nn.Module) -> bool:
        """Whether a module cannot be a residual block of equal shapes, said without a reason."""
        call = self.survey.calls.get(name)
        return (
            call is None
            or call.inputs is None
            or call.inputs != call.output
            or len(call.inputs) != 4
            or not any(isinstance(m, nn.Conv2d) for m in module.modules())
            or not is_residual(module)
        )

    def _try_block(self, name: str, module: nn.Module, conversion: Conversion) -> str:
        """Replace a residual block; return the reason where that cannot be."""
        try:
            self._check(name, module)
            for inner, child in module.named_modules(prefix=name):
                if inner != name:
                    self._check(inner, child, called=bool(list(child.parameters(recurse=False))))
            pooled, shape = self._pooled(name, module), self.survey.calls[name].inputs
            if shape is None:
                raise Kept("it does not take and return one tensor")
            with torch.device("meta"):
                new = make_block(module, shape[1], conversion.group_size, conversion.coarsest, pooled)
            self._judge(name, new, "block", conversion, pooled=pooled)
        except (Kept, ChannelConfigError) as kept:
            return str(kept)
        return ""

    def _pooled(self, name: str, module: nn.Module) -> tuple[str, ...]:
        """Names in a block of the convolutions that work on one pixel: attention."""
        whole = self.survey.calls[name].inputs or ()
        found = []
        for inner, child in module.named_modules():
            call = self.survey.calls.get(f"{name}.{inner}" if name else inner)
            if isinstance(child, nn.Conv2d) and call is not None and call.inputs is not None and whole[2:] != (1, 1):
                found += [inner] if call.inputs[2:] == (1, 1) else []
        return tuple(found)

    def _check(self, name: str, module: nn.Module, called: bool = True) -> None:
        """Refuse what no replacement could stand in for.

        Raises:
            Kept: with the reason.
        """
        if name in self.broken:
            raise Kept(f"the network does not run with it replaced ({self.broken[name]})")
        if len(self.places[module]) > 1:
            raise Kept(f"shared: the same module stands at {', '.join(self.places[module])}")
        if name in self.tied:
            raise Kept("shared: its weights are those of another module too")
        if called and name not in self.survey.calls:
            raise Kept("functional: it is not called as a module in eval mode")
        if parametrize.is_parametrized(module):
            raise Kept("its weights are computed (torch.nn.utils.parametrize)")
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks):
            raise Kept("it has hooks, which would be lost")
        if merger := _merger(module):
            raise Kept(f"its branches are merged by {merger}(): merge them first")

    def _layer(self, name: str, module: nn.Module, because: str) -> None:
        """Replace a single layer, or keep it with the reason."""
        conversion = self.choose(name)
        try:
            self._check(name, module)
            for parent in _parents(name):
                if merger := _merger(self.modules[parent]):
                    raise Kept(f"it is merged with others by the {merger}() of {parent or 'the network'}")
            if any(_inside(name, head) for head in self.heads):
                raise Kept("head: the classifier")
            if type(module) in CONVOLUTIONS:
                self._check_convolution(name, module)  # type: ignore[arg-type]
                if conversion is None:
                    raise Kept(_BY_CHOICE)
                with torch.device("meta"):
                    new: nn.Module = make_conv(module, conversion.group_size, conversion.coarsest)
                action = "conv"
            elif type(module) is nn.Linear:
                if conversion is None:
                    raise Kept(_BY_CHOICE)
                if not conversion.linear:
                    raise Kept("linear: replaced with linear=True only")
                with torch.device("meta"):
                    new = make_linear(module, conversion.group_size, conversion.coarsest)
                action = "linear"
            else:
                raise Kept(unknown(module))
            self._judge(name, new, action, conversion, because)
        except (Kept, ChannelConfigError) as kept:
            self._keep(name, module, str(kept))

    def _check_convolution(self, name: str, conv: nn.Conv2d) -> None:
        call = self.survey.calls[name]
        if conv.groups == conv.in_channels and conv.groups > 1:
            raise Kept("depthwise")
        if conv.groups > 1:
            raise Kept(f"grouped: {conv.groups} groups of {conv.in_channels // conv.groups} channels")
        pointwise = conv.kernel_size == (1, 1) and self.survey.size[1:] != (1, 1)
        if pointwise and call.inputs is not None and call.inputs[2:] == (1, 1):
            raise Kept("attention or head: it works on one pixel")

    def _judge(
        self,
        name: str,
        new: nn.Module,
        action: str,
        conversion: Conversion,
        note: str = "",
        pooled: tuple[str, ...] = (),
    ) -> None:
        """Measure what would stand in for a layer, and note it as its replacement if it fits and is cheaper.

        Raises:
            Kept: It does not, with the reason.
        """
        module = self.modules[name]
        if self.where is not None and not self.where(name, self.survey.model.get_submodule(name)):
            raise Kept("excluded by where=")
        if not name:
            raise Kept("the network itself: put it into an nn.Sequential")
        call = self.survey.calls[name]
        if call.inputs is None:
            raise Kept("it does not take and return one tensor")
        macs_after = 0
        try:
            for inputs, times in call.seen.items():
                counter = FlopCounterMode(display=False)
                with counter, torch.no_grad():
                    shape = tuple(new.eval()(torch.empty(inputs or (), device="meta")).shape)
                if inputs == call.inputs and shape != call.output:
                    raise Kept(f"its copy would return {shape} instead of {call.output}")
                macs_after += times * counter.get_total_flops() // 2
        except BROKEN as error:
            raise Kept(f"a narrower copy does not run ({type(error).__name__}: {first_line(error)})") from error
        _frozen_like(module, new)
        params, macs = count_trainable(module), self.survey.macs.get(name, 0)
        weights = [sum(p.numel() for p in m.parameters()) for m in (module, new)]
        if weights[1] >= weights[0] or macs_after >= macs:
            raise Kept(f"it would cost as much: {weights[1]:,} parameters, {macs_after:,} MACs")
        levels: list[Level] = new.cycle.levels if isinstance(new, MGICLinear) else new.levels  # type: ignore[assignment]
        self.new[name] = new
        self.rows.append(
            LayerReport(
                name=name,
                kind=type(module).__name__,
                action=action,
                reason=note,
                params=params,
                macs=macs,
                params_after=count_trainable(new),
                macs_after=macs_after,
                group_size=conversion.group_size,
                coarsest=conversion.coarsest,
                widths=tuple(level.channels for level in levels),
                effective=tuple(level.group_size for level in levels),
                pooled=pooled,
            )
        )

    def _keep(self, name: str, module: nn.Module, reason: str) -> None:
        whole = isinstance(module, _MULTIGRID) or parametrize.is_parametrized(module)
        own = count_trainable(module) if whole else sum(p.numel() for p in module.parameters(False) if p.requires_grad)
        macs = self.survey.macs.get(name, 0)
        if not whole:  # those of the modules in it are in their own rows
            macs -= sum(
                self.survey.macs.get(f"{name}.{child}" if name else child, 0) for child, _ in module.named_children()
            )
        kind = type(module).__name__
        self.rows.append(
            LayerReport(name, kind, "kept", reason, params=own, macs=macs, params_after=own, macs_after=macs)
        )


def _merger(module: nn.Module) -> str | None:
    """Name of the method by which a module merges its branches, if it has one."""
    return next((method for method in _MERGERS if hasattr(module, method)), None)


def _parents(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _put(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Set the module of a path; return the network (the new module itself where the path is empty)."""
    if not name:
        return new
    model.set_submodule(name, new)
    return model


def _inside(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _notes(rows: Sequence[LayerReport], survey: Survey) -> list[str]:
    """Say what the converted network keeps that the papers' networks have not."""
    total = max(survey.cost.macs, 1)
    modules = dict(survey.meta.named_modules())
    notes = []
    groups: dict[str, list[LayerReport]] = {}
    for row in rows:
        conv: Any = modules[row.name]
        if row.replaced or not isinstance(conv, nn.Conv2d) or conv.groups > 1 or not row.macs:
            continue
        pointwise = conv.kernel_size == (1, 1) and max(conv.stride) > 1
        kind = "strided 1x1 convolutions (shortcuts)" if pointwise else "other convolutions"
        groups.setdefault(f"dense {kind}", []).append(row)
    for kind, kept in groups.items():
        macs = sum(row.macs for row in kept)
        notes.append(f"keeps {len(kept)} {kind}: {macs:,} MACs, {100 * macs / total:.1f} % of the network before")
    strided = sum(1 for row in rows if row.action == "conv" and max(getattr(modules[row.name], "stride", (1,))) > 1)
    if strided:
        notes.append(
            f"additive multigrid layers stand for {strided} of the strided convolutions; the MGIC networks have a depthwise "
            "convolution between stages"
        )
    if not any(row.replaced for row in rows):
        notes.append("nothing was replaced")
    return notes
