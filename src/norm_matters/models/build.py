"""From the configuration to a network that is known to work, whatever its origin."""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from norm_matters.core.config import ModelConfig
from norm_matters.core.errors import UserError
from norm_matters.models import MODELS, weights
from norm_matters.models.entry import Network, read_options
from norm_matters.models.libraries import LIBRARIES, build_library_model, check_library_model
from norm_matters.models.trust import trust_file
from norm_matters.models.user_file import describe_error, load_user_model
from norm_matters.norms import (
    canonical_spec,
    convert_norm,
    fuse_activations,
    has_spec,
    kinds_to_convert,
    name_norms,
    norm_factory,
    norms_of,
    spec_of,
    sync_norm,
)
from norm_matters.weights import normalise_weights

_SMALL = 64
"""Images up to this side are padded and cropped in training; larger ones get crops of random size and shape."""


@dataclass(frozen=True)
class BuiltModel:
    """A network and what goes with it.

    Attributes:
        module: the network, float32, on the CPU, in training mode.
        regime: name of the regime it is trained with unless another is asked for.
        crop: the augmentation that suits its input.
        phases: the user's own regime (a list of phases or a function); None where the file has none.
        input_transform: the user's own functions from a PIL image to a tensor, under `train` and `eval`.
        converted: norm layers that were converted to the norm asked for (0 where they were built with it).
        conversion: in place of which norms, in words.
        weight_norms: layers whose weight is normalised as asked for.
        source: path and SHA-256 of a user's file.
        weights: path and SHA-256 of the initial weights, and the names of the parameters they do not cover.
    """

    module: nn.Module
    regime: str
    crop: Literal["pad", "inception"] = "pad"
    phases: list[dict[str, Any]] | Callable[..., Any] | None = None
    input_transform: Mapping[str, Callable[..., Any]] | None = None
    converted: int = 0
    conversion: str = ""
    weight_norms: int = 0
    source: Mapping[str, str] | None = None
    weights: Mapping[str, Any] | None = None


def check_model(name: str) -> None:
    """Raise UserError unless there is a network of that name: ours, a library's (`timm:...`), or a `.py` file."""
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise UserError(f"there is no file '{name}'")
    elif ":" in name:
        check_library_model(name)
    else:
        MODELS.check(name)


def create_model(
    name: str,
    *,
    num_classes: int,
    norm: str | None = None,
    weight_norm: str | None = None,
    in_channels: int = 3,
    norm_kinds: list[str] | None = None,
    norm_precision: Literal["float32", "input"] = "float32",
    pretrained: bool | str = False,
    **options: Any,
) -> nn.Module:
    """Build a network.

    Args:
        name: of ours (`resnet20`), `timm:NAME`, `torchvision:NAME`, or the path of a `.py` file, which is run: naming
            it here is to vouch for it (see `models.trust`).
        num_classes: number of scores per image.
        norm: spec of the norm (`l1`, `topk:k=10`); None is `l2` in our networks and leaves others as they are.
        weight_norm: spec of the weight norm (`bounded`, `bounded:p=1`) of every layer but the last; None for plain
            weights.
        in_channels: channels of the images.
        norm_kinds: which of a library's or your own network's norms become `norm`, see `convert_norm`; None for batch
            norms, or layer and group norms in a network without.
        norm_precision: the statistics' precision: at least float32, or the input's own.
        pretrained: a safetensors file, or True for the weights in the library's own cache.
        options: of that network, e.g. `width=32`.

    Returns:
        The network, float32, on the CPU, in training mode; images (N, C, H, W) to scores (N, num_classes).

    Raises:
        UserError: an unknown name, norm or option, or weights that do not fit.
    """
    if name.endswith(".py") and Path(name).is_file():
        trust_file(Path(name), lasting=False)
    config = ModelConfig(
        name=name,
        norm=norm,
        weight_norm=weight_norm,
        norm_kinds=norm_kinds,
        norm_precision=norm_precision,
        pretrained=pretrained,
        options=options,
    )
    return build_model(config, num_classes=num_classes, in_channels=in_channels, input_size=None).module


def build_model(config: ModelConfig, *, num_classes: int, in_channels: int, input_size: int | None) -> BuiltModel:
    """Build the network of a run and try it on two images.

    Args:
        num_classes: number of classes of the dataset.
        in_channels: channels of the images.
        input_size: side of the images in pixels; None leaves the trial out.

    Raises:
        UserError: whatever is wrong with the name, the norm, the options, the weights, the user's file, or the
            size of the images for this network.
    """
    _check_norm_settings(config)
    check_model(config.name)
    build = _build_user_file if config.name.endswith(".py") else _build_library if ":" in config.name else _build_own
    built = build(config, num_classes, in_channels)
    if config.norm is not None and not built.converted and not _has_norm(built.module, config.norm):
        # never train another norm silently
        raise UserError(f"model.norm: '{config.norm}': {config.name} ends with no norm of that spec")
    name_norms(built.module)
    if config.sync_norm:
        _synchronise(built.module)
    if config.weight_norm is not None:
        built = replace(built, weight_norms=_normalise_weights(built.module, config.weight_norm))
    if input_size is not None:
        _try_out(config.name, built.module, (2, in_channels, input_size, input_size), num_classes)
        built = replace(built, crop="pad" if input_size <= _SMALL else "inception")
    return built


def _check_norm_settings(config: ModelConfig) -> None:
    """Refuse what is said of norms that this network has not."""
    foreign = ":" in config.name or config.name.endswith(".py")
    if foreign and config.norm is None and config.norm_precision != "float32":
        raise UserError(f"model.norm_precision: '{config.norm_precision}' needs a norm of ours; set model.norm too")
    if config.norm_kinds and config.norm is None:
        raise UserError("model.norm_kinds: says which norms become model.norm; set that too")
    if config.norm_kinds and not foreign:
        raise UserError(f"model.norm_kinds: {config.name} is built with its norm, and nothing is converted")


def _build_own(config: ModelConfig, num_classes: int, in_channels: int) -> BuiltModel:
    entry = MODELS.get(config.name)
    factory = norm_factory(config.norm, stats_dtype=config.norm_precision)
    options = read_options(entry.build, config.options)
    module = entry.build(num_classes=num_classes, in_channels=in_channels, norm=factory, **options)
    fuse_activations(module)
    record = None
    if config.pretrained is True:
        if entry.published is None:
            raise UserError(f"model.pretrained: no weights of {config.name} are published; name a safetensors file")
        path = weights.cached_torchvision_file(entry.published)
        record = _load(module, path, weights.read_torchvision_file(path), num_classes)
    elif config.pretrained:
        record = _load_file(module, config.pretrained, num_classes)
    return BuiltModel(module, entry.regime, weights=record)


def _build_library(config: ModelConfig, num_classes: int, in_channels: int) -> BuiltModel:
    library, _, name = config.name.partition(":")
    assert library in LIBRARIES
    module = build_library_model(config.name, num_classes=num_classes, in_channels=in_channels, options=config.options)
    record = None
    if config.pretrained is True:
        if library == "timm":
            path = weights.cached_timm_file(module)
            tensors = weights.read_weights(path)
        else:
            path = weights.cached_torchvision_file(name)
            tensors = weights.read_torchvision_file(path)
        record = _load(module, path, tensors, num_classes)
    elif config.pretrained:
        record = _load_file(module, config.pretrained, num_classes)
    return BuiltModel(module, "cosine", weights=record, **_convert(config, module))


def _build_user_file(config: ModelConfig, num_classes: int, in_channels: int) -> BuiltModel:
    own = load_user_model(
        Path(config.name),
        num_classes=num_classes,
        in_channels=in_channels,
        norm=None if config.norm is None else canonical_spec(config.norm),
        options=config.options,
    )
    if config.pretrained is True:
        raise UserError("model.pretrained: no weights of your own network are published; name a safetensors file")
    record = _load_file(own.module, config.pretrained, num_classes) if config.pretrained else None
    return BuiltModel(
        own.module,
        "cosine",
        phases=own.phases,
        input_transform=own.input_transform,
        source=own.source,
        weights=record,
        **_convert(config, own.module),
    )


def _load_file(module: nn.Module, file: str, num_classes: int) -> dict[str, Any]:
    path = Path(file)
    return _load(module, path, weights.read_weights(path), num_classes)


def _load(module: nn.Module, path: Path, tensors: Mapping[str, Tensor], num_classes: int) -> dict[str, Any]:
    replaced = weights.load_weights(module, tensors, num_classes=num_classes)
    return {**weights.describe_file(path), "fresh": replaced}


def _convert(config: ModelConfig, module: nn.Module) -> dict[str, Any]:
    """Convert the network's norms to the norm asked for; what `BuiltModel` says of it."""
    if config.norm is None:
        return {}
    kinds: Any = config.norm_kinds or kinds_to_convert(module)
    try:
        report = convert_norm(module, config.norm, kinds=kinds, stats_dtype=config.norm_precision)
    except ValueError as error:
        ours = all(spec_of(layer) is not None for _, layer in norms_of(module))
        if ours and _has_norm(module, config.norm):
            return {}  # nothing to convert, since the file built the norm itself
        raise UserError(f"model.norm: '{config.norm}': {error}") from error
    text = _count([row.before for row in report.rows if row.before != row.after])
    left = _count([row.before for row in report.left])
    words = [f"in place of {text}" if text else "", f"{left} left" if left else ""]
    return {"converted": report.count, "conversion": ", ".join(filter(None, words))}


def _count(names: list[str]) -> str:
    return " and ".join(f"{count} {name}" for name, count in Counter(names).items())


def _synchronise(module: nn.Module) -> None:
    """Let the norms share their statistics over the ranks; on one process this changes nothing."""
    try:
        sync_norm(module)
    except ValueError as error:
        raise UserError(f"model.sync_norm: 'true': {error}") from error


def _normalise_weights(module: nn.Module, spec: str) -> int:
    """Normalise the weights, which have their initial or pretrained values by now; how many layers there are."""
    try:
        return normalise_weights(module, spec).count
    except ValueError as error:
        raise UserError(f"model.weight_norm: '{spec}': {error}") from error


def _has_norm(module: nn.Module, norm: str) -> bool:
    return any(has_spec(layer, norm) for layer in module.modules())


def _try_out(name: str, module: nn.Module, shape: tuple[int, int, int, int], num_classes: int) -> None:
    """Run images of that shape through the network; the network, its mode and the random state stay as they are."""
    _, channels, height, width = shape
    if isinstance(module, Network) and min(height, width) < module.min_input_size:
        raise UserError(
            f"data.input_size: {height}x{width} images are too small for {name}, "
            f"which needs {module.min_input_size}x{module.min_input_size}"
        )
    modes = [(layer, layer.training) for layer in module.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            scores = module.eval()(torch.zeros(shape))
    except Exception as error:
        where = describe_error(Path(name).absolute(), error) if name.endswith(".py") else str(error).split("\n")[0]
        raise UserError(f"model.name: {name} fails on {channels}x{height}x{width} images: {where}") from error
    finally:
        for layer, training in modes:
            layer.training = training
    if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != shape[0]:
        given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise UserError(f"model.name: {name} gives {given} for 2 images, not one row of scores per image")
    if scores.shape[1] < num_classes:
        raise UserError(f"model.name: {name} gives {scores.shape[1]} scores per image for {num_classes} classes")
    if scores.shape[1] > num_classes:
        warnings.warn(f"{name} gives {scores.shape[1]} scores per image for {num_classes} classes", stacklevel=3)
