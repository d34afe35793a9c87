"""Which norms of a network a tool acts on, and the report of what it did."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from norm_matters.norms.base import Capability, Norm
from norm_matters.norms.query import norms_of

Patterns = str | Sequence[str] | None
"""Glob patterns of dotted names (`layer1.*`); None for no condition."""

_LACKS: dict[Capability, str] = {
    "affine": "has no weight and no bias",
    "running_stats": "has no running statistics",
    "sync": "takes no statistics over the batch",
}


# Known by name: importing torch's compiler takes seconds.
_WRAPPERS = {
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
    "OptimizedModule",
    "ScriptModule",
}


class Row(NamedTuple):
    """What was done to one layer: its dotted name, what it was, what it is now, and what else there is to say."""

    name: str
    before: str
    after: str
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What a tool did.

    Attributes:
        rows: a row for each layer that it acted on, in the model's order.
        left: a row for each layer that it could not act on, with the reason as its note.
    """

    rows: list[Row]
    left: list[Row]

    @property
    def count(self) -> int:
        """How many layers it acted on."""
        return len(self.rows)

    def __str__(self) -> str:
        table = [Row("layer", "from", "to", "note"), *self.rows, *self.left]
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        return "\n".join(line.rstrip() for line in lines)


def refuse_wrapped(model: nn.Module, change: str) -> None:
    """Raise ValueError for a model that is wrapped or compiled: both hold on to the layers as they are.

    Args:
        change: what is to be done first, for the message: "convert its norms".
    """
    for name, module in model.named_modules():
        wrappers = [cls.__name__ for cls in type(module).__mro__ if cls.__name__ in _WRAPPERS]
        if getattr(module, "_compiled_call_impl", None) is not None:
            wrappers.append("compiled module")
        if wrappers:
            place = f"layer '{name}'" if name else "the model"
            raise ValueError(f"{place} is wrapped ({wrappers[0]}): {change} first, then wrap it")


def is_selected(names: Sequence[str], include: Patterns, exclude: Patterns) -> bool:
    """Whether any of a layer's names is included and none excluded."""
    return (include is None or _matches(names, include)) and not (exclude is not None and _matches(names, exclude))


def _matches(names: Sequence[str], patterns: str | Sequence[str]) -> bool:
    listed = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatchcase(name, pattern) for name in names for pattern in listed)


def norms_with(
    model: nn.Module, capability: Capability, tool: str, include: Patterns = None, exclude: Patterns = None
) -> tuple[dict[str, Norm], list[Row]]:
    """The norms that a tool acts on.

    Args:
        capability: what they must be able to do.
        tool: what it does, for the message: "freeze_norm(stats=True)".

    Returns:
        Dotted name -> norm, each norm once; and a row for each selected norm of ours without the capability.

    Raises:
        ValueError: none has the capability; names those there are, and what they lack.
    """
    able: dict[str, Norm] = {}
    left: list[Row] = []
    for name, norm in model.named_modules():
        if not isinstance(norm, Norm) or not is_selected([name], include, exclude):
            continue
        if capability in norm.capabilities():
            able[name] = norm
        else:
            left.append(Row(name, norm.spec, norm.spec, _LACKS[capability]))
    if not able:
        raise ValueError(f"{tool}: {_why_none(model, left, capability, include, exclude)}")
    return able, left


def _why_none(model: nn.Module, left: list[Row], capability: Capability, include: Patterns, exclude: Patterns) -> str:
    foreign = [(name, type(norm).__name__) for name, norm in norms_of(model) if is_selected([name], include, exclude)]
    if not left and not foreign:
        return "the model has no norm that is selected"
    if not left:
        shown = ", ".join(f"'{name}' ({kind})" for name, kind in foreign[:3])
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        return f"layer {shown}{more}: not a norm of ours; convert_norm makes it one (a batch norm becomes an l2)"
    shown = ", ".join(f"'{row.name}' ({row.before})" for row in left[:3])
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    return f"layer {shown}{more}: {_LACKS[capability]}"
