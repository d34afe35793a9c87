"""Networks of timm and torchvision: `timm:resnet18`, `torchvision:resnet18`."""

import importlib.util
from collections.abc import Mapping
from typing import Any

from torch import nn

from norm_matters.core.errors import UserError, nearest

LIBRARIES = ("timm", "torchvision")

_RESERVED = {
    "timm": ("num_classes", "in_chans", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path",
             "cache_dir", "norm_layer"),
    "torchvision": ("num_classes", "weights", "weights_backbone", "progress", "norm_layer"),
}  # fmt: skip
"""Options that have a setting of their own here, or would load or fetch files."""


def library_models(library: str) -> list[str]:
    """All names of a library's networks for classification, with its prefix: `timm:resnet18`.

    Args:
        library: `timm` or `torchvision`; imported by this call.

    Raises:
        UserError: another library, or timm is not installed.
    """
    if library not in LIBRARIES:
        raise UserError(f"unknown library '{library}'{nearest(library, LIBRARIES)}")
    from norm_matters.core.torchvision import torchvision  # before timm, which needs it importable

    if library == "torchvision":
        return [f"torchvision:{name}" for name in torchvision.models.list_models(module=torchvision.models)]
    if importlib.util.find_spec("timm") is None:
        raise UserError("timm is not installed; pip install 'norm-matters[timm]'")
    import timm

    return [f"timm:{name}" for name in timm.list_models()]


def check_library_model(name: str) -> None:
    """Raise UserError with the nearest name unless the library of `name` (`timm:...`) has that network."""
    library, _, model = name.partition(":")
    names = library_models(library)
    if library == "timm":
        import timm

        known = timm.is_model(model)  # also with the tag of its weights: resnet18.a1_in1k
    else:
        known = name in names
    if not known:
        raise UserError(f"unknown model '{name}'{nearest(name, names)}")


def build_library_model(name: str, *, num_classes: int, in_channels: int, options: Mapping[str, Any]) -> nn.Module:
    """Build the network as the library does, without weights.

    Args:
        name: checked by `check_library_model`.
        options: keyword arguments of the library's function.

    Raises:
        UserError: an option that the library refuses, or that has a setting of its own here.
    """
    library, _, model = name.partition(":")
    for option in options:
        if option in _RESERVED[library]:
            raise UserError(f"model.options.{option}: is set by other settings here, and is no option")
    try:
        if library == "timm":
            import timm

            return timm.create_model(model, num_classes=num_classes, in_chans=in_channels, **options)
        return _build_torchvision(model, num_classes=num_classes, in_channels=in_channels, options=options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"model.options: {name} cannot be built with {dict(options)}: {error}") from error


def _build_torchvision(model: str, *, num_classes: int, in_channels: int, options: Mapping[str, Any]) -> nn.Module:
    from norm_matters.core.torchvision import torchvision

    # these two give a tuple in training unless their auxiliary heads are off
    special = {"aux_logits": False, "init_weights": True} if model in ("googlenet", "inception_v3") else {}
    network = torchvision.models.get_model(model, num_classes=num_classes, **special, **options)
    if in_channels != 3:
        replace_first_convolution(network, in_channels)
    return network


def replace_first_convolution(network: nn.Module, in_channels: int) -> None:
    """Give the first convolution, built for 3 channels, that many input channels and fresh weights."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            fresh = nn.Conv2d(
                in_channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                stride=module.stride,  # type: ignore[arg-type]
                padding=module.padding,  # type: ignore[arg-type]
                bias=module.bias is not None,
            )
            parent, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(parent), attribute, fresh)
            return
