"""Norms in evaluation folded into the layers before them, so that inference does without."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from norm_matters.norms.base import FUSED, Norm
from norm_matters.norms.batchwise import BatchwiseNorm
from norm_matters.norms.calibrate import images_of
from norm_matters.norms.fold import folded
from norm_matters.norms.selection import Patterns, Report, Row, is_selected
from norm_matters.norms.trace import LayerUse, NormUse, tensors_in, trace

_TORCH_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class AbsorptionReport(Report):
    """What `absorb_norm` did.

    Attributes:
        difference: the largest difference that it made to the output for the example.
        relative: that difference over the largest output.
    """

    difference: float
    relative: float

    def __str__(self) -> str:
        return f"{super().__str__()}\nlargest output difference {self.difference:.3g} ({self.relative:.3g} relative)"


def absorb_norm(
    model: nn.Module, example: Any, *, include: Patterns = None, exclude: Patterns = None
) -> AbsorptionReport:
    """Fold norms into the convolution or linear layer that feeds them, in place: for inference.

    In evaluation a norm with running statistics is one scale and one shift per channel, which its layer can take into
    its weight and bias. What is fused to the norm (timm's activations) takes its place, or else an identity. Which
    layer feeds which norm is seen by running the example; a norm is left, with the reason in the report, where its
    input comes from anything but a layer (an activation, a sum), or where something else uses that layer's output or
    weight. The parameters of changed layers are new objects; take a `copy.deepcopy` before to keep the model.

    Args:
        model: in evaluation mode.
        example: images (N, ...), or a batch of a loader: one on which the model does all that it ever does.
        include, exclude: glob patterns of dotted names of norms. torch's own batch norms are folded too.

    Returns:
        A row for each norm with the layer it went into; `left` has the others; and the largest output difference.

    Raises:
        ValueError: no norm can be folded, or the model is in training mode, wrapped or compiled.
    """
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise ValueError("absorb_norm: the model is compiled; absorb its norms first, then compile")
    norms, left = _norms_with_running_stats(model, include, exclude)
    if model.training or any(norm.training for norm in norms.values()):
        raise ValueError("absorb_norm folds norms as they are in evaluation: call model.eval() first")
    tensor = next((tensor for tensor in model.parameters()), torch.empty(0))
    images = images_of(example).to(tensor.device)
    traced = trace(model, norms, images)
    owners = _owners_of_parameters(model)
    rows, changes = [], []
    for name, norm in norms.items():
        reason = _why_not(traced.norms[name], model, owners)
        if reason is not None:
            left.append(Row(name, _describe(norm), _describe(norm), reason))
            continue
        source = traced.norms[name].source
        assert isinstance(source, LayerUse)
        layer, remains = model.get_submodule(source.name), _what_remains(norm)
        changes.append((layer, folded(layer, *_affine_map(norm)), norm, remains))
        rows.append(Row(name, _describe(norm), type(remains).__name__, f"in {type(layer).__name__} '{source.name}'"))
    if not rows:
        shown = "; ".join(f"layer '{row.name}' ({row.before}): {row.note}" for row in left[:3])
        raise ValueError(f"absorb_norm: {shown or 'the model has no norm that is selected'}")
    for layer, (weight, bias), norm, remains in changes:
        layer.weight, layer.bias = weight, bias
        _replace(model, norm, remains)
    with torch.no_grad():
        pairs = list(zip(tensors_in(traced.output), tensors_in(model(images)), strict=True))
    difference = max((_largest(old.double() - new.double()) for old, new in pairs), default=0.0)
    scale = max((_largest(old.double()) for old, _ in pairs), default=0.0)
    return AbsorptionReport(rows, left, difference, difference / scale if scale else difference)


def _norms_with_running_stats(
    model: nn.Module, include: Patterns, exclude: Patterns
) -> tuple[dict[str, nn.Module], list[Row]]:
    able: dict[str, nn.Module] = {}
    left = []
    for name, module in model.named_modules():
        if not isinstance(module, (Norm, *_TORCH_BATCH_NORMS)) or not is_selected([name], include, exclude):
            continue
        if isinstance(module, Norm):
            can, why = "running_stats" in module.capabilities(), "has no running statistics"
        else:
            # A class that derives from torch's may do more than it does.
            can, why = type(module) in _TORCH_BATCH_NORMS, "is no norm of ours; convert_norm makes it one"
            can, why = (can, why) if module.running_mean is not None else (False, "has no running statistics")
        if can:
            able[name] = module
        else:
            left.append(Row(name, _describe(module), _describe(module), why))
    return able, left


def _why_not(norm: NormUse, model: nn.Module, owners: Mapping[int, list[str]]) -> str | None:
    """Why a norm cannot be folded; None if it can."""
    if norm.calls != 1:
        return "the example does not reach it" if norm.calls == 0 else f"is used {norm.calls} times"
    use = norm.source
    if not isinstance(use, LayerUse):
        return f"follows {use}, no convolution or linear layer" if use else "follows no convolution or linear layer"
    layer: Any = model.get_submodule(use.name)
    if use.calls != 1:
        return f"'{use.name}' before it is used {use.calls} times"
    if use.readers or len(use.norms) > 1:
        return f"'{use.name}' before it is also read by {', '.join([*use.readers, *use.norms[1:]])}"
    if not use.per_channel:
        return f"'{use.name}' before it has its channels in another dimension"
    if "weight" not in layer._parameters:
        return f"the weight of '{use.name}' before it is parametrised; make it plain first (remove_weight_norm)"
    if not use.scales:
        return f"'{use.name}' before it ({type(layer).__name__}) changes its weight itself"
    holders = [name for tensor in (layer.weight, layer.bias) for name in owners.get(id(tensor), [])]
    others = [name for name in holders if name.rpartition(".")[0] != use.name]
    return f"'{use.name}' before it shares its parameters with {', '.join(others)}" if others else None


def _owners_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Id of each parameter -> its names by the modules that hold it, each module once."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{key}")
    return owners


def _affine_map(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,), float64, of a norm in evaluation."""
    if isinstance(norm, BatchwiseNorm):
        return norm.eval_affine()
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def _what_remains(norm: nn.Module) -> nn.Module:
    """What a norm does after normalising: its fused layers, or nothing."""
    fused = [layer for layer in (norm._modules.get(key) for key in FUSED) if layer is not None]
    fused = [layer for layer in fused if not isinstance(layer, nn.Identity)]
    if len(fused) == 1:
        return fused[0]
    return nn.Sequential(*fused).eval() if fused else nn.Identity().eval()


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, key, new)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _describe(norm: nn.Module) -> str:
    return norm.spec if isinstance(norm, Norm) else type(norm).__name__
