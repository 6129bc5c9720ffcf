"""The frame of every image classifier here, with timm's whole contract; networks differ only in the parts they pass in."""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..cycle import checkpointed
from ..errors import UserError
from .inputs import check_images
from .parts import with_parts


class Classifier(nn.Module):
    """Stem, stages, head: ``forward_head(stages(stem(x)))``.

    Args:
        stem: First layers.
        stages: One sequence of blocks per resolution (or what a subclass runs there).
        head: Pooling and classifier, with timm's ``reset(num_classes, pool_type)``, ``fc``, ``num_features``.
        channels: Width after the stem and after each stage.
        reductions: Stride after the stem and after each stage.

    Shape:
        ``(N, in_chans, H, W) -> (N, num_classes)``
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        head: nn.Module,
        channels: Sequence[int],
        reductions: Sequence[int],
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.head = head
        # a head that does not pool has a 1x1 convolution here, one without classes the identity
        self.num_classes: int = getattr(head.fc, "out_features", getattr(head.fc, "out_channels", 0))
        self.num_features = channels[-1]
        self.stride = reductions[-1]
        self.head_hidden_size: int = head.num_features  # type: ignore[assignment]
        self.grad_checkpointing = False
        names = ["stem", *(f"stages.{i}" for i in range(len(stages)))]
        # one feature per resolution: the last module that has it
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": name}
            for i, (name, width, reduction) in enumerate(zip(names, channels, reductions, strict=True))
            if reduction not in reductions[i + 1 :]
        ]
        self.apply(init_weights)

    def forward_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        """Run one stage, recomputing its blocks in the backward pass where checkpointing is on."""
        if not (self.grad_checkpointing and self.training):
            return stage(x)  # type: ignore[no-any-return]
        for block in stage.children():
            x = checkpointed(block, x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """``(N, in_chans, H, W) -> (N, num_features, H / reduction, W / reduction)``."""
        x = self.stem(x)
        for stage in self.stages:
            x = self.forward_stage(stage, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """``(N, num_features, h, w) -> (N, num_classes)``; the pooled features where ``pre_logits``."""
        return self.head(x, pre_logits=pre_logits)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_chans, H, W) -> (N, num_classes)``."""
        check_images(self, x, self.stride)
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the last features and those of the resolutions asked for, as timm does.

        Args:
            x: Images, ``(N, in_chans, H, W)``.
            indices: The last so many features, or their places in ``feature_info``; all by default.
            norm: timm's argument; these features are normed already.
            stop_early: Stop after the last one asked for.
            output_fmt: Only ``"NCHW"``.
            intermediates_only: Return the list alone.
        """
        if output_fmt != "NCHW":
            raise UserError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.feature_info), indices)
        wanted = {self.feature_info[i]["module"] for i in take}
        stop = self.feature_info[last]["module"] if stop_early else None
        x = self.stem(x)
        intermediates = [x] if "stem" in wanted else []
        for i, stage in enumerate(self.stages):
            if stop == ("stem" if i == 0 else f"stages.{i - 1}"):
                break
            x = self.forward_stage(stage, x)
            if f"stages.{i}" in wanted:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the features asked for do not need, and return their places."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        module = str(self.feature_info[last]["module"])
        keep = 0 if module == "stem" else int(module.removeprefix("stages.")) + 1
        self.stages = self.stages[:keep]
        self.stride = int(str(self.feature_info[last]["reduction"]))
        if prune_head:
            self.num_classes = 0
            self.head.reset(0, pool_type="", reset_other=True)  # type: ignore[operator]
        return take

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head.fc  # type: ignore[return-value]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last linear layer by a new one for ``num_classes``; 0 removes it."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)  # type: ignore[operator]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for the backward pass."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's grouping of parameters into layers: the stem, then stages (or their blocks)."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}


def init_weights(module: nn.Module) -> None:
    """Initialise convolutions as He et al. 2015 (fan out, of one group); transfers keep the start they were built with."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.weight[:, 0].numel() // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def default_cfg(input_size: tuple[int, int, int], num_classes: int, **more: Any) -> dict[str, Any]:
    """Return timm's description of a network without weights: input, normalisation, first and last layer."""
    return {
        "url": "",
        "num_classes": num_classes,
        "input_size": input_size,
        "pool_size": None,
        "crop_pct": 0.875 if input_size[-1] > 64 else 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "license": "mit",
        **more,
    }


def build(
    make: Callable[..., nn.Module], name: str, pretrained: bool, defaults: dict[str, Any], given: Any
) -> nn.Module:
    """Build a registered network through timm; unknown arguments are errors that name the known ones.

    Args:
        make: Function that assembles the network.
        name: Its registered name.
        pretrained: Load the weights that the caller's ``pretrained_cfg`` (or overlay) points to, as timm's ``local-dir:`` and
            ``hf-hub:`` do. The networks come with none of their own, so without such a place this is refused.
        defaults: The network's own arguments.
        given: What the caller gave, timm's own keywords among them.
    """
    cfg = resolve_pretrained_cfg(name, given.get("pretrained_cfg"), given.get("pretrained_cfg_overlay"))
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        raise UserError(
            f"no pretrained weights exist for {name!r}: train it (mgic train --model {name} ...), "
            "load your own (checkpoint_path=), or take a pretrained network of timm"
        )
    timm_keys = {
        *("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only", "out_indices", "feature_cls"),
        *("pretrained_strict", "pretrained_filter_fn", "pretrained_model_args", "kwargs_filter"),
    }
    known = known_arguments(make, name, given.keys() - timm_keys)
    given = with_parts(make, given)
    for argument, least in (("num_classes", 0), ("in_chans", 1)):
        value = given.get(argument, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{name}: {argument} must be an integer, at least {least}, got {value!r}")
    feature_cfg = {"feature_cls": "getter", "out_indices": None}
    model: Any = build_model_with_cfg(
        make, name, pretrained=pretrained, feature_cfg=feature_cfg, **{**defaults, **given}
    )
    model.arguments = known  # what create_model takes for this network
    return model  # type: ignore[no-any-return]


def known_arguments(make: Callable[..., nn.Module], name: str, given: Iterable[str]) -> tuple[str, ...]:
    """Return the arguments of a network's function; names given that are not among them are an error."""
    known = tuple(inspect.signature(make).parameters)
    if unknown := sorted(set(given) - set(known)):
        raise UserError(f"{name} has no argument {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
    return known
