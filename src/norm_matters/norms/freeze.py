"""Norms that training leaves alone: their running statistics, their weight and bias, or both."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from norm_matters.norms.base import FUSED, Capability, Norm
from norm_matters.norms.selection import Patterns, Report, Row, norms_with

Part = Literal["stats", "affine"]

_CAPABILITY: Mapping[Part, Capability] = {"stats": "running_stats", "affine": "affine"}
# The values of the option `frozen`.
_PARTS: Mapping[str | None, frozenset[Part]] = {
    None: frozenset(),
    "stats": frozenset({"stats"}),
    "affine": frozenset({"affine"}),
    "all": frozenset({"stats", "affine"}),
}
_WORD = {parts: word for word, parts in _PARTS.items()}


def freeze_norm(
    model: nn.Module, stats: bool = True, affine: bool = True, *, include: Patterns = None, exclude: Patterns = None
) -> Report:
    """Freeze norms in place; what is frozen already stays so.

    The option `frozen` of each norm is set, so that its spec says it: `freeze_norm(model, affine=False)` makes `l1`
    an `l1:frozen=stats`, which can as well be built that way (`--norm l1:frozen=stats`). It holds in `.train()` too.

    Args:
        model: changed in place.
        stats: normalise by the running statistics in training too, and leave them.
        affine: do not train weight and bias; gradients they have are dropped, so that an optimizer built before
            leaves them too.
        include, exclude: glob patterns of dotted names.

    Returns:
        A row for each norm with its spec before and after, and what of it cannot be frozen; `left` has those of which
        nothing can.

    Raises:
        ValueError: no norm has what is to be frozen, or nothing is to be.
    """
    parts = _asked(stats, affine, "freeze_norm")
    able, left = _norms_with_any(model, parts, f"freeze_norm(stats={stats}, affine={affine})", include, exclude)
    return Report([_freeze(name, norm, parts) for name, norm in able.items()], left)


def unfreeze_norm(
    model: nn.Module, stats: bool = True, affine: bool = True, *, include: Patterns = None, exclude: Patterns = None
) -> Report:
    """Take `freeze_norm` back, wholly or in part; arguments, report and errors alike.

    Weight and bias train again where they did before they were frozen. Those of a norm that was not frozen are left.
    """
    parts = _asked(stats, affine, "unfreeze_norm")
    able, left = _norms_with_any(model, parts, f"unfreeze_norm(stats={stats}, affine={affine})", include, exclude)
    return Report([_unfreeze(name, norm, parts) for name, norm in able.items()], left)


def _asked(stats: bool, affine: bool, tool: str) -> list[Part]:
    asked: dict[Part, bool] = {"stats": stats, "affine": affine}
    if not any(asked.values()):
        raise ValueError(
            f"{tool}(stats=False, affine=False) names nothing; freeze_norm and unfreeze_norm are opposites"
        )
    return [part for part, named in asked.items() if named]


def _norms_with_any(
    model: nn.Module, parts: list[Part], tool: str, include: Patterns, exclude: Patterns
) -> tuple[dict[str, Norm], list[Row]]:
    """`norms_with`, for norms of which one part or the other can be frozen."""
    able: set[str] = set()
    left: dict[str, Row] = {}
    errors = []
    for part in parts:
        try:
            found, unable = norms_with(model, _CAPABILITY[part], tool, include, exclude)
        except ValueError as error:
            errors.append(error)
            continue
        able |= found.keys()
        left |= {row.name: row for row in unable}
    if not able:
        raise errors[0]
    in_order = {name: norm for name, norm in model.named_modules() if name in able and isinstance(norm, Norm)}
    return in_order, [row for name, row in left.items() if name not in able]


def _freeze(name: str, norm: Any, parts: list[Part]) -> Row:
    before, frozen = norm.spec, _frozen_parts(norm)
    done: list[Part] = []
    notes = []
    for part in parts:
        if _CAPABILITY[part] not in norm.capabilities():
            notes.append(f"no {part} to freeze")
            continue
        if part == "affine" and part not in frozen:
            norm.untrained_before = [key for key, tensor in _parameters(norm).items() if not tensor.requires_grad]
            for tensor in _parameters(norm).values():
                tensor.requires_grad_(False)
                tensor.grad = None
        done.append(part)
    norm.frozen = _WORD[frozen.union(done)]
    return Row(name, before, norm.spec, ", ".join(notes))


def _unfreeze(name: str, norm: Any, parts: list[Part]) -> Row:
    before, frozen = norm.spec, _frozen_parts(norm)
    if "affine" in frozen and "affine" in parts:
        # A norm that was built frozen has no such list: all of it would train.
        untrained = getattr(norm, "untrained_before", [])
        for key, tensor in _parameters(norm).items():
            tensor.requires_grad_(key not in untrained)
    norm.frozen = _WORD[frozen.difference(parts)]
    return Row(name, before, norm.spec)


def _frozen_parts(norm: Norm) -> frozenset[Part]:
    if "frozen" not in norm.OPTIONS:
        raise ValueError(f"{norm.label()} has no option 'frozen', which every norm with statistics or parameters needs")
    return _PARTS[norm.settings()["frozen"]]


def _parameters(norm: Norm) -> dict[str, nn.Parameter]:
    """The norm's own: a fused activation may have some too."""
    return {key: tensor for key, tensor in norm.named_parameters() if key.partition(".")[0] not in FUSED}
