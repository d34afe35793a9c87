"""What a norm layer is in the terms of this package, be it ours, torch's, timm's or torchvision's.

The classes of other libraries are known by name, so that neither timm nor torchvision is imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from norm_matters.norms.base import AFFINE_OPTIONS, FUSED, Norm
from norm_matters.norms.batchwise import BATCH_OPTIONS, BatchwiseNorm
from norm_matters.norms.imagewise import ImagewiseNorm

Kind = Literal["batch", "layer", "group", "instance", "rms"]
"""Where a norm takes its statistics: per channel over the batch; over the channels at each position; over groups of
channels of each image; per channel of each image; or, as the second, without a mean."""

KINDS: tuple[Kind, ...] = get_args(Kind)


def _each(names: str, *, kind: Kind, channel_dim: int = 1) -> dict[str, tuple[Kind, int]]:
    return dict.fromkeys(names.split(), (kind, channel_dim))


# Class -> its kind and the dimension of the channels in its input.
_CLASSES: Mapping[str, tuple[Kind, int]] = {
    **_each("torch._BatchNorm torch.BatchNorm1d torch.BatchNorm2d torch.BatchNorm3d torch.SyncBatchNorm", kind="batch"),
    **_each("timm.BatchNormAct2d timm.SyncBatchNormAct", kind="batch"),
    **_each("timm.FrozenBatchNormAct2d torchvision.FrozenBatchNorm2d", kind="batch"),
    **_each("torch.LayerNorm timm.LayerNorm timm.LayerNormFp32", kind="layer", channel_dim=-1),
    **_each("timm.LayerNormAct timm.LayerNormActFp32", kind="layer", channel_dim=-1),
    **_each("timm.LayerNorm2d timm.LayerNorm2dFp32 timm.LayerNormExp2d torchvision.LayerNorm2d", kind="layer"),
    **_each("timm.LayerNormAct2d timm.LayerNormAct2dFp32", kind="layer"),
    **_each("torch.GroupNorm timm.GroupNorm timm.GroupNorm1 timm.GroupNormAct timm.GroupNorm1Act", kind="group"),
    **_each("torch.InstanceNorm1d torch.InstanceNorm2d torch.InstanceNorm3d", kind="instance"),
    **_each("torch.RMSNorm timm.RmsNorm timm.RmsNormFp32", kind="rms", channel_dim=-1),
    **_each("timm.RmsNormAct timm.RmsNormActFp32", kind="rms", channel_dim=-1),
    **_each("timm.RmsNorm2d timm.RmsNorm2dFp32 timm.RmsNormAct2d timm.RmsNormAct2dFp32", kind="rms"),
}
# Norms that have no counterpart here. timm's GlobalResponseNorm is none: it adds to its input.
_OTHERS = frozenset(
    [
        *("torch._NormBase", "torch.LocalResponseNorm", "torch.CrossMapLRN2d"),
        *("timm.SimpleNorm", "timm.SimpleNormFp32", "timm.SimpleNorm2d", "timm.SimpleNorm2dFp32"),
        *("timm.FilterResponseNormTlu2d", "timm.FilterResponseNormAct2d"),
        *("timm.EvoNorm2dB0", "timm.EvoNorm2dB1", "timm.EvoNorm2dB2"),
        *("timm.EvoNorm2dS0", "timm.EvoNorm2dS1", "timm.EvoNorm2dS2"),
    ]
)
_OUR_KINDS: Mapping[str, Kind] = {"position": "layer", "group": "group", "layer": "group", "instance": "instance"}
_WHERE: Mapping[Kind, str] = {"layer": "position", "group": "group", "instance": "instance", "rms": "position"}

# What a subclass may define without being another norm.
_HARMLESS = {
    "__init__",
    "__repr__",
    "_get_name",
    "extra_repr",
    "reset_parameters",
    "_check_input_dim",
    "__annotate_func__",
}
_TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass(frozen=True)
class Description:
    """What a norm layer is.

    Attributes:
        num_features: channels.
        where: name of our norm that takes its statistics in the same place; empty for those over the batch.
        channel_dim: the dimension of the channels in its input: 1 or -1.
        options: what our norms have by that name: eps, momentum ...
        note: what cannot be said by options.
    """

    num_features: int
    where: str
    channel_dim: int
    options: dict[str, Any]
    note: str = ""


def is_known(module: nn.Module) -> bool:
    """Whether a module is a norm of ours, of torch's, timm's or torchvision's, or of a class derived from one."""
    return isinstance(module, Norm) or any(
        _key(cls) in _CLASSES or _key(cls) in _OTHERS for cls in type(module).__mro__
    )


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a norm; None for a norm without counterpart here, and for what is no norm."""
    if isinstance(module, BatchwiseNorm):
        return "batch"
    if isinstance(module, ImagewiseNorm):
        rms = module.name == "position" and module.statistic == "rms"
        return "rms" if rms else _OUR_KINDS.get(module.name)
    known = _known_class(module)
    return None if known is None else _CLASSES[_key(known)][0]


def describe(module: nn.Module) -> Description:
    """Say what a norm that has a kind is.

    Raises:
        ValueError: it does something that is not known here, so that a norm of ours could not take its place.
    """
    known = type(module) if isinstance(module, Norm) else _known_class(module)
    assert known is not None
    obstacle = _obstacle(module, known)
    if obstacle:
        raise ValueError(obstacle)
    if isinstance(module, Norm):
        return _describe_ours(module)
    kind, channel_dim = _CLASSES[_key(known)]
    if kind == "batch":
        return _describe_batch_norm(module)
    return _describe_image_norm(module, _WHERE[kind], channel_dim)


def _key(cls: type) -> str:
    """`timm.LayerNorm2d` for a class of that name anywhere in timm; for torch, in `torch.nn.modules` only."""
    library = cls.__module__.partition(".")[0]
    if library == "torch" and not cls.__module__.startswith("torch.nn.modules."):
        return ""
    return f"{library}.{cls.__name__}"


def _known_class(module: nn.Module) -> type | None:
    return next((cls for cls in type(module).__mro__ if _key(cls) in _CLASSES), None)


def _obstacle(module: nn.Module, known: type) -> str:
    """What keeps a norm of ours from taking the place of `module`, which behaves as `known` otherwise; or nothing."""
    if isinstance(module, LazyModuleMixin):
        return "has no channels yet; run a batch through the network first"
    if parametrize.is_parametrized(module):
        return "has a parametrized weight; remove the parametrization first"
    changed = {"forward", "train", "eval"} & vars(module).keys()
    for cls in type(module).__mro__[: type(module).__mro__.index(known)]:
        changed |= {name for name, value in vars(cls).items() if _is_behaviour(value) and name not in _HARMLESS}
    if changed:
        return f"has its own {', '.join(sorted(changed))}, which convert_norm does not know"
    if any(getattr(module, hooks) for hooks in _STATE_HOOKS):
        return "has hooks on its state, which cannot move to another layer"
    if isinstance(module, Norm):
        return ""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    surplus = [name for name in tensors if name not in _TENSORS and name.partition(".")[0] not in FUSED]
    surplus += [name for name, _ in module.named_children() if name not in FUSED]
    if surplus:
        return f"has {', '.join(surplus)}, which convert_norm does not know"
    if getattr(module, "weight", None) is None and getattr(module, "bias", None) is not None:
        return "has a bias but no weight"
    return ""


def _is_behaviour(value: Any) -> bool:
    return callable(value) or isinstance(value, (property, staticmethod, classmethod))


def _describe_ours(module: Norm) -> Description:
    settings = module.settings()
    shared = BATCH_OPTIONS if isinstance(module, BatchwiseNorm) else {"groups", *AFFINE_OPTIONS}
    options = {key: value for key, value in settings.items() if key in shared}
    where = "" if isinstance(module, BatchwiseNorm) else module.name
    return Description(module.num_features, where, module.channel_dim, options)


def _describe_batch_norm(module: Any) -> Description:
    """A batch norm of torch, or one made from it, or a frozen one, which keeps weight and bias as buffers."""
    channels = module.running_mean.numel() if module.running_mean is not None else module.num_features
    if "weight" in module._buffers:
        return Description(channels, "", 1, {"eps": module.eps, "frozen": "all"})
    if module.track_running_stats != (module.running_mean is not None):
        raise ValueError("had its track_running_stats changed after it was built")
    options = {key: getattr(module, key) for key in ("eps", "momentum", "track_running_stats")}
    options |= _affine(module)
    if not isinstance(module, nn.SyncBatchNorm):
        return Description(channels, "", 1, options)
    note = "" if module.process_group is None else "process group dropped"
    return Description(channels, "", 1, {**options, "sync": True}, note)


def _describe_image_norm(module: Any, where: str, channel_dim: int) -> Description:
    """A norm within each image."""
    # RMSNorm's default
    eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
    options = {"eps": eps, **_affine(module)}
    if where == "position":
        if len(module.normalized_shape) != 1:
            raise ValueError(f"normalises over {len(module.normalized_shape)} dimensions, {module.normalized_shape}")
        return Description(module.normalized_shape[0], where, channel_dim, options)
    if where == "group":
        return Description(module.num_channels, where, channel_dim, {**options, "groups": module.num_groups})
    if module.running_mean is not None:
        raise ValueError("is an instance norm with running statistics, which norms here do not have")
    return Description(module.num_features, where, channel_dim, options)


def _affine(module: Any) -> dict[str, bool]:
    affine = module.weight is not None
    return {"affine": affine, "bias": not affine or getattr(module, "bias", None) is not None}
