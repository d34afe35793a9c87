"""Replace the norms of a built network by norms of another spec.

What becomes of which layer is a table in docs/convert.md; what is known of other libraries' layers is in describe.py.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from norm_matters.core.errors import UserError, nearest
from norm_matters.norms.base import AFFINE_OPTIONS, Norm
from norm_matters.norms.batchwise import BATCH_OPTIONS, BatchwiseNorm
from norm_matters.norms.build import create_norm, resolve_spec
from norm_matters.norms.carry import carry_over, device_and_dtype
from norm_matters.norms.describe import KINDS, Description, Kind, describe, is_known, kind_of
from norm_matters.norms.fuse import fuse_activations
from norm_matters.norms.selection import Patterns, Report, Row, is_selected, refuse_wrapped
from norm_matters.norms.spec import format_spec


class _Converted(NamedTuple):
    """A norm that waits to be placed; whether weight and bias are trained from then on, None for as they were."""

    norm: Norm
    note: str
    trained: bool | None


def convert_norm(
    model: nn.Module,
    spec: str,
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    kinds: Kind | Sequence[Kind] = "batch",
    dry_run: bool = False,
    **options: Any,
) -> Report:
    """Replace norms (ours, torch's, timm's, torchvision's) in place.

    The statistic changes; where it is taken stays, unless `spec` says that too: `l1` makes of a batch norm an `l1`, of
    a LayerNorm a `position:statistic=l1`, of a GroupNorm a `group:statistic=l1` of as many groups; `group:groups=8`
    makes of each a `group:groups=8`. A new norm takes over what it has a use for: the parameter objects themselves,
    running statistics, eps, momentum, device, dtype, training or evaluation, hooks, a fused activation and drop layer;
    and it applies a ReLU that follows it in an `nn.Sequential` (see `fuse_activations`).
    A layer used in several places stays one layer. What `spec` states goes before what the old layer had. On an error
    the model is unchanged.

    Args:
        model: changed in place.
        spec: e.g. `l1`.
        include: glob patterns of dotted names (`layer1.*`); only matching layers are converted.
        exclude: glob patterns of layers to leave.
        kinds: which kinds of norms: "batch", "layer" (LayerNorm, LayerNorm2d), "group", "instance", "rms" (RMSNorm).
        dry_run: change nothing; the report is the same.
        options: options of the norms that `spec` does not say; they go before what the old layer had.

    Returns:
        The report; `print` shows a table. `left` has the norms of other kinds.

    Raises:
        ValueError: nothing was converted; `model` is wrapped (DistributedDataParallel, compiled ...) or is itself a
            norm, which can only be replaced where it is held; or a layer does something that no norm here does.
        UserError: the spec or a kind is wrong.
    """
    check_kinds(kinds)
    asked = set(_listed(kinds))
    refuse_wrapped(model, "convert its norms")
    if is_known(model):
        raise ValueError("the model is itself a norm and cannot be replaced in place; use create_norm")
    found = _find_norms(model)
    selected = {norm: names for norm, names in found.items() if is_selected(names, include, exclude)}
    chosen = {norm: names for norm, names in selected.items() if kind_of(norm) in asked}
    if not chosen:
        raise ValueError(f"nothing was converted to '{spec}': {_why_nothing(found, selected, asked)}")
    closed = {layer: _has_fast_path(model, names) for layer, names in chosen.items()}
    new = {old: _convert(model, old, names, spec, options) for old, names in chosen.items()}
    if not dry_run:
        for old, names in chosen.items():
            _place(model, names, new[old])
        _close_fast_paths(model)
        fuse_activations(model, only={converted.norm for converted in new.values()})
    rows, left = [], []
    for old, names in selected.items():
        before = old.spec if isinstance(old, Norm) else type(old).__name__
        if old not in chosen:
            left.append(Row(names[0], before, before, f"left: {_why_left(old)}"))
            continue
        notes = [new[old].note, "torch's fused encoder layer switched off" if closed[old] else ""]
        notes += [f"also {name}" for name in names[1:]]
        rows.append(Row(names[0], before, new[old].norm.spec, ", ".join(filter(None, notes))))
    return Report(rows, left)


def kinds_to_convert(model: nn.Module) -> tuple[Kind, ...]:
    """The kinds that a conversion means when nobody says: batch norms; in a network without, layer and group norms."""
    return ("batch",) if any(kind_of(norm) == "batch" for norm in _find_norms(model)) else ("layer", "group")


def check_kinds(kinds: str | Sequence[str]) -> None:
    """Raise UserError with the nearest kind unless each of them, or the only one, is a kind of norms."""
    problems = []
    for kind in _listed(kinds):
        if kind not in KINDS:
            hint = nearest(kind, KINDS) or f"; there are: {', '.join(KINDS)}"
            problems.append(f"there is no kind of norm '{kind}'{hint}")
    if problems:
        raise UserError(*problems)


def _listed(kinds: str | Sequence[str]) -> list[str]:
    return [kinds] if isinstance(kinds, str) else list(kinds)


def _find_norms(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every norm and all its dotted names, in the model's order; norms within a norm are part of it."""
    found: dict[nn.Module, list[str]] = {}
    last = None
    for name, module in model.named_modules(remove_duplicate=False):
        if is_known(module) and not (last and name.startswith(f"{last}.")):
            found.setdefault(module, []).append(name)
            last = name
    return found


def _why_nothing(found: dict[nn.Module, list[str]], selected: dict[nn.Module, list[str]], asked: set[str]) -> str:
    wanted = [names[0] for norm, names in found.items() if kind_of(norm) in asked]
    if wanted:
        return f"include and exclude leave none of {', '.join(wanted[:5])}{' ...' if len(wanted) > 5 else ''}"
    other = [kind for norm in selected if (kind := kind_of(norm)) is not None]
    counts = ", ".join(f"{other.count(kind)} of kind '{kind}'" for kind in KINDS if kind in other)
    hint = f", but {counts}; name them in kinds" if counts else ""
    return f"the model has no {' or '.join(kind for kind in KINDS if kind in asked)} norm{hint}"


def _why_left(norm: nn.Module) -> str:
    kind = kind_of(norm)
    return "it is of no kind that is converted" if kind is None else f"kinds has no '{kind}'"


def _convert(model: nn.Module, old: Any, names: list[str], spec: str, options: dict[str, Any]) -> _Converted:
    """A norm of that spec with the state of `old`."""
    try:
        description = describe(old)
    except ValueError as error:
        kind = old.spec if isinstance(old, Norm) else type(old).__name__
        raise ValueError(f"layer '{names[0]}' ({kind}) {error}; to leave it, exclude it") from error
    target, unused = _target(description, spec)
    kind, stated = resolve_spec(target, **options)
    kept = _options_for(kind, description)
    new = create_norm(target, description.num_features, **{**device_and_dtype(old, model), **kept, **options})
    if new.channel_dim != description.channel_dim:
        at = {1: "at dimension 1", -1: "last"}
        raise ValueError(
            f"layer '{names[0]}' has its channels {at[description.channel_dim]}, "
            f"and '{new.spec}' takes them {at[new.channel_dim]}; to leave it, exclude it"
        )
    notes = [description.note, f"{', '.join(unused)} has no use" if unused else "", *carry_over(old, new)]
    new.layer_name = getattr(old, "layer_name", "") or names[0]
    new.training = old.training
    frozen = "frozen" in kind.OPTIONS and new.settings()["frozen"] in ("affine", "all")
    trained = False if frozen else True if "frozen" in stated else None
    return _Converted(new, ", ".join(filter(None, notes)), trained)


def _target(description: Description, spec: str) -> tuple[str, list[str]]:
    """The whole spec of what a layer becomes, and the options of the given spec that it has no use for."""
    norm, stated = resolve_spec(spec)
    if not description.where or not issubclass(norm, BatchwiseNorm) or norm.composite:
        return spec, []
    statistic = format_spec(norm.name, {key: value for key, value in stated.items() if key not in BATCH_OPTIONS})
    shared = {key: value for key, value in stated.items() if key in AFFINE_OPTIONS}
    unused = [key for key in stated if key in BATCH_OPTIONS and key not in AFFINE_OPTIONS]
    return format_spec(description.where, {"statistic": statistic, **shared}), unused


def _options_for(norm: type[Norm], description: Description) -> dict[str, Any]:
    """What the old layer had and the new one has an option for."""
    had = {**description.options, "channel_dim": description.channel_dim}
    valid = norm.OPTIONS
    if norm.name != description.where:
        had.pop("groups", None)
    frozen = had.pop("frozen", None)
    # A norm may be frozen by its name; and one that takes no running statistics has none to freeze.
    if frozen and "frozen" in valid and valid["frozen"].default is None:
        accepted = valid["frozen"].accepts(frozen)
        had["frozen"] = frozen if accepted else "affine" if frozen == "all" else None
    return {key: value for key, value in had.items() if key in valid}


def _place(model: nn.Module, names: list[str], converted: _Converted) -> None:
    """Put a norm where the old one was."""
    new = converted.norm
    for name in names:
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._modules[child] = new
    for parameter in (getattr(new, "weight", None), getattr(new, "bias", None)):
        if parameter is None or converted.trained is None:
            continue
        parameter.requires_grad_(converted.trained)
        # An optimizer built before would go on with a gradient that is left.
        parameter.grad = parameter.grad if converted.trained else None


def _has_fast_path(model: nn.Module, names: list[str]) -> bool:
    parents = [model.get_submodule(name.rpartition(".")[0]) for name in names]
    return any(isinstance(parent, nn.TransformerEncoderLayer) for parent in parents)


def _close_fast_paths(model: nn.Module) -> None:
    """Make torch's encoder layers call their norms: in evaluation they compute LayerNorm themselves, by its weights."""
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and any(isinstance(norm, Norm) for norm in layer.children()):
            layer.activation_relu_or_gelu = 0
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            layers = encoder.layers.children()
            encoder.use_nested_tensor &= all(getattr(layer, "activation_relu_or_gelu", True) for layer in layers)
