"""Replace the batch norms of a built network by norms of another spec."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from norm_matters.norms.base import FUSED, Norm
from norm_matters.norms.batchwise import BATCH_OPTIONS, BatchwiseNorm
from norm_matters.norms.build import create_norm

_TORCH_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# timm's batch norms with a fused activation, known by name so that timm is not imported.
_FUSED_BATCH_NORMS = ("BatchNormAct2d", "SyncBatchNormAct")


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_norm` did.

    Attributes:
        rows: per converted layer its dotted name, its class or spec before, and its spec now.
    """

    rows: list[tuple[str, str, str]]

    @property
    def count(self) -> int:
        """How many layers were converted."""
        return len(self.rows)

    def __str__(self) -> str:
        table = [("layer", "from", "to"), *self.rows]
        widths = [max(len(row[column]) for row in table) for column in range(3)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        return "\n".join(line.rstrip() for line in lines)


def convert_norm(
    model: nn.Module,
    spec: str,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    **options: Any,
) -> ConversionReport:
    """Replace batch norms (torch's, timm's with a fused activation, ours) in place.

    A new norm takes over what it has a use for: the parameter objects themselves, running statistics, eps, momentum,
    device, dtype, training or evaluation, a fused activation and drop layer. A layer used in several places stays
    one layer. What `spec` states goes before what the old layer had. On an error the model is unchanged.

    Args:
        model: changed in place.
        spec: e.g. `l1`.
        include: glob patterns of dotted names (`layer1.*`); only matching layers are converted.
        exclude: glob patterns of layers to leave.
        options: options of the norm that neither `spec` nor the old layer says.

    Returns:
        The report; `print` shows a table.

    Raises:
        ValueError: nothing was converted; `model` is itself a norm, which can only be replaced where it is held; or a
            layer is a batch norm of a class this function does not know.
        UserError: the spec is wrong.
    """
    if _is_batch_norm(model, ""):
        raise ValueError("the model is itself a norm and cannot be replaced in place; use create_norm")
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_batch_norm(module, name):
            found.setdefault(module, []).append(name)
    chosen = {module: names for module, names in found.items() if _selected(names, include, exclude)}
    if not chosen:
        raise ValueError(f"nothing was converted to '{spec}': " + _why_nothing(found))
    new = {module: _converted(module, spec, options) for module in chosen}
    for module, names in chosen.items():
        for name in names:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new[module])
    return ConversionReport([(names[0], _describe(old), new[old].spec) for old, names in chosen.items()])


def _is_batch_norm(module: nn.Module, name: str) -> bool:
    """Whether a module is to be converted; a batch norm that does more than is known here is refused."""
    if isinstance(module, BatchwiseNorm) or type(module) in _TORCH_BATCH_NORMS or _is_fused(module):
        return True
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise ValueError(f"layer '{name}' is a {type(module).__name__}, a batch norm that convert_norm does not know")
    return False


def _is_fused(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ in _FUSED_BATCH_NORMS and kind.__module__.startswith("timm.")


def _selected(names: list[str], include: str | Sequence[str] | None, exclude: str | Sequence[str] | None) -> bool:
    """Whether any of a layer's names is included and none excluded."""
    return (include is None or _matches(names, include)) and not (exclude is not None and _matches(names, exclude))


def _matches(names: list[str], patterns: str | Sequence[str]) -> bool:
    listed = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatchcase(name, pattern) for name in names for pattern in listed)


def _why_nothing(found: dict[nn.Module, list[str]]) -> str:
    if not found:
        return "the model has no batch norm"
    names = [name for several in found.values() for name in several]
    return f"include and exclude leave none of {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"


def _describe(module: nn.Module) -> str:
    return module.spec if isinstance(module, Norm) else type(module).__name__


def _converted(old: Any, spec: str, options: dict[str, Any]) -> Norm:
    """A norm of that spec with the state of the batch norm `old`."""
    tensors = [tensor for tensor in (*old.parameters(), *old.buffers()) if tensor.is_floating_point()]
    place = {"device": tensors[0].device, "dtype": tensors[0].dtype} if tensors else {}
    new = create_norm(spec, old.num_features, **{**place, **_settings(old), **options})
    for key in ("weight", "bias"):
        if getattr(old, key) is not None and getattr(new, key, None) is not None:
            setattr(new, key, getattr(old, key))
    if isinstance(new, BatchwiseNorm):
        _carry_running_stats(old, new)
    for key in FUSED:
        if old._modules.get(key) is not None:
            new.add_module(key, old._modules[key])
    new.layer_name = getattr(old, "layer_name", "")
    return new.train(old.training)


def _settings(old: Any) -> dict[str, Any]:
    """The options that a batch norm, torch's or ours, has in common with the others."""
    if isinstance(old, BatchwiseNorm):
        return {key: value for key, value in old.settings().items() if key in BATCH_OPTIONS}
    settings = {key: getattr(old, key) for key in ("eps", "momentum", "affine", "track_running_stats")}
    return {**settings, "bias": old.bias is not None or not old.affine}


def _carry_running_stats(old: Any, new: BatchwiseNorm) -> None:
    if old.running_mean is None or new.running_mean is None:
        return
    dtype = new.running_mean.dtype
    new.running_mean = old.running_mean.to(dtype)
    if new.estimates_sigma:
        new.running_var = old.running_var.to(dtype)
    new.num_batches_tracked = old.num_batches_tracked
