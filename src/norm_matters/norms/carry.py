"""What a norm takes over from the one that it replaces."""

from typing import Any

import torch
from torch import nn

from norm_matters.norms.base import FUSED

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "num_batches_rejected")


def device_and_dtype(old: nn.Module, model: nn.Module) -> dict[str, torch.device | torch.dtype]:
    """Those of the layer, or of the model where the layer has no tensors."""
    for module in (old, model):
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                return {"device": tensor.device, "dtype": tensor.dtype}
    return {}


def carry_over(old: Any, new: Any) -> list[str]:
    """Give a new norm the tensors, fused layers and hooks of the old one; what could not be given, in words.

    The old norm is not changed: hooks are the same mappings, so that their handles remove them from the new one.
    """
    notes = []
    for key in ("weight", "bias"):
        value = getattr(old, key, None)
        if value is not None and getattr(new, key, None) is None:
            notes.append(f"{key} dropped")
        elif value is not None:
            trained = getattr(new, key).requires_grad
            setattr(new, key, value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=trained))
    notes += _carry_statistics(old, new)
    own = {**old._parameters, **old._buffers}.keys() - {"weight", "bias", *_STATISTICS}
    notes += [f"{key} dropped" for key in sorted(own - new._buffers.keys())]
    for key in FUSED:
        if old._modules.get(key) is not None:
            new.add_module(key, old._modules[key])
    count = sum(len(getattr(old, hooks)) for hooks in _HOOKS if not hooks.endswith(("_kwargs", "_called")))
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    new._is_full_backward_hook = old._is_full_backward_hook
    return [*notes, f"hooks kept: {count}" if count else ""]


def _carry_statistics(old: Any, new: Any) -> list[str]:
    had, has = (getattr(norm, "running_mean", None) is not None for norm in (old, new))
    if not has:
        return ["running statistics dropped"] if had else []
    if not had:
        return ["running statistics start anew"]
    for key in _STATISTICS:
        value, place = getattr(old, key, None), getattr(new, key)
        if value is not None and (key != "running_var" or new.estimates_sigma):
            setattr(new, key, value.to(place.dtype) if value.is_floating_point() else value)
    return [] if new.estimates_sigma else ["running variance dropped"]
