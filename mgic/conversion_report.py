"""What a conversion was asked for, and its report: every layer, replaced or kept and why. Plain values, as JSON too."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from .counting import Cost
from .errors import UserError
from .hierarchy import check_positive

SCHEMA = 1


@dataclass(frozen=True)
class Conversion:
    """How wide layers are replaced.

    Args:
        group_size: Channels per group on the finest level (``s_g``).
        coarsest: Width at which to stop coarsening (``s_c``); narrower layers are kept.
        blocks: Replace residual blocks whole, as in the papers; otherwise each convolution apart, which can be fitted to
            trained weights more closely (`mgic.warm_start_`).
        linear: Replace wide linear layers too, but the classifier.
    """

    group_size: int = 32
    coarsest: int = 64
    blocks: bool = True
    linear: bool = False

    def __post_init__(self) -> None:
        check_positive(group_size=self.group_size, coarsest=self.coarsest)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Conversion":
        """Read plain values; unknown names are errors."""
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise UserError(f"conversion has no {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
        return cls(**values)


class Setting(NamedTuple):
    """What a layer is replaced by.

    Args:
        action: ``block``, ``conv`` or ``linear``.
        group_size: ``s_g`` asked for.
        coarsest: ``s_c`` asked for.
        widths: Channels of the levels, finest first.
        pooled: Names, in a block, of the convolutions on one pixel (attention), which stay dense on every level.
    """

    action: str
    group_size: int
    coarsest: int
    widths: tuple[int, ...]
    pooled: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer, or of one block with all that is in it.

    Args:
        name: Path of the module in the network.
        kind: Its class.
        action: ``block``, ``conv`` or ``linear`` where it was replaced, ``kept`` where not.
        reason: Why it was kept; of a replaced layer, what else is to be said.
        params: Trainable parameters before.
        macs: Multiply-adds of one input before.
        params_after: The same afterwards.
        macs_after: The same afterwards.
        group_size: ``s_g`` asked for; 0 where it was kept.
        coarsest: ``s_c`` asked for; 0 where it was kept.
        widths: Channels of the levels, finest first.
        effective: Channels per group there.
        pooled: Names, in a replaced block, of the convolutions on one pixel (attention), which stay dense on every level.
    """

    name: str
    kind: str
    action: str
    reason: str
    params: int
    macs: int
    params_after: int
    macs_after: int
    group_size: int = 0
    coarsest: int = 0
    widths: tuple[int, ...] = ()
    effective: tuple[int, ...] = ()
    pooled: tuple[str, ...] = ()

    @property
    def replaced(self) -> bool:
        """Whether the layer is another one now."""
        return self.action != "kept"

    @property
    def setting(self) -> Setting:
        """What it was replaced by."""
        return Setting(self.action, self.group_size, self.coarsest, self.widths, self.pooled)


@dataclass(frozen=True)
class ConversionReport:
    """Every layer of a converted network, and what it cost before and after.

    Args:
        model: Class of the network, or the name it was built by.
        rows: The layers in the order of the network.
        before: Cost of the network before.
        after: Cost afterwards.
        notes: What the converted network keeps that the papers' networks have not, and what else is to be said.
        budget: What was asked for, predicted and measured, where a target was given.
    """

    model: str
    rows: tuple[LayerReport, ...]
    before: Cost
    after: Cost
    notes: tuple[str, ...] = ()
    budget: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[dict[str, Any]]:
        """What to replace and how: with the name of the network all that is needed to build it again."""
        return [{"name": row.name, **row.setting._asdict()} for row in self.rows if row.replaced]

    def __str__(self) -> str:
        replaced = sum(row.replaced for row in self.rows)
        lines = [
            f"{self.model}: {replaced} of {len(self.rows)} layers and blocks replaced",
            f"before {self.before}",
            f"after  {self.after}",
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_json(self) -> str:
        """The report as JSON, with a schema version."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str, source: str = "conversion") -> "ConversionReport":
        """Read what `to_json` wrote.

        Raises:
            UserError: The text is no report, or of another schema version.
        """
        try:
            values = json.loads(text)
            if values.get("schema") != SCHEMA:
                raise UserError(f"{source}: conversion of schema {values.get('schema')!r}; this mgic reads {SCHEMA}")
            rows = tuple(
                LayerReport(**{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()})  # type: ignore[arg-type]
                for row in values["rows"]
            )
            before, after = (
                Cost(**{**values[key], "input_size": tuple(values[key]["input_size"])}) for key in ("before", "after")
            )
            return cls(values["model"], rows, before, after, tuple(values["notes"]), values["budget"])
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{source}: not the report of a conversion ({type(error).__name__}: {error})") from error
