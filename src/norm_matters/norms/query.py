"""Questions about the norms of a network: which there are, and of which spec."""

from torch import nn

from norm_matters.norms.base import Norm
from norm_matters.norms.batchwise import BatchwiseNorm
from norm_matters.norms.build import resolve_spec
from norm_matters.norms.describe import is_known, kind_of
from norm_matters.norms.imagewise import ImagewiseNorm
from norm_matters.norms.none import NoNorm


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: ours, torch's, or one of timm's or torchvision's, with a fused activation or without.

    The one answer that weight-decay groups, precision filters and conversion ask for.
    """
    return is_known(module)


def norms_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Dotted name and module of every norm in a model, each module once, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if is_norm(module)]


def spec_of(module: nn.Module) -> str | None:
    """Canonical spec of one of our norms, with its options as they are now; None for any other module."""
    return module.spec if isinstance(module, Norm) else None


def has_spec(module: nn.Module, spec: str) -> bool:
    """Whether a module is the norm that `spec` names, with every option that `spec` states.

    Options the spec does not state may have any value: a converted norm keeps the eps and momentum it had.
    """
    norm, options = resolve_spec(spec)
    if type(module) is not norm:
        return False
    settings = module.settings()
    return all(settings[key] == value for key, value in options.items())


def name_norms(model: nn.Module) -> None:
    """Tell each of our norms its dotted name in the model, for error messages."""
    for name, module in model.named_modules():
        if isinstance(module, Norm):
            module.layer_name = name


def takes_batch_statistics(model: nn.Module) -> bool:
    """Whether what a network in training makes of an image may depend on the others in the batch, by its norms.

    So do running statistics that are updated: each part of a batch would move them. Norms of other libraries that are
    not known to look at one image only count as such.
    """
    return any(_looks_at_the_batch(norm) for _, norm in norms_of(model))


def _looks_at_the_batch(norm: nn.Module) -> bool:
    if isinstance(norm, BatchwiseNorm):
        return not norm.stats_frozen
    if isinstance(norm, ImagewiseNorm | NoNorm) or type(norm).__name__.startswith("Frozen"):
        return False
    kind = kind_of(norm)
    return kind in (None, "batch") or (kind == "instance" and getattr(norm, "running_mean", None) is not None)
