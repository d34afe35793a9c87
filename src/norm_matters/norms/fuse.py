"""A norm and the ReLU behind it as one operation: fewer passes over memory, and one tensor less to keep."""

from collections import Counter
from collections.abc import Container
from itertools import pairwise

from torch import Tensor, nn

from norm_matters.norms.base import Norm, activate, has_listeners, is_plain_relu


def normalise_and_activate(norm: nn.Module, activation: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """`activation(norm(x) + residual)`, in one operation where the norm is ours and the activation a ReLU.

    Modules that somebody has put hooks on are called one after the other, so that each hook sees what it expects.

    Args:
        norm: any layer.
        activation: what follows.
        x: (N, C, *).
        residual: of the shape of the norm's output, or None.
    """
    if isinstance(norm, Norm) and is_plain_relu(activation) and not has_listeners(norm):
        return norm(x, residual, relu=True)
    return activation(activate(norm(x), residual, relu=False))


def fuse_activations(model: nn.Module, only: Container[nn.Module] | None = None) -> list[str]:
    """Let norms apply the ReLU that follows them in an `nn.Sequential`, in place.

    The ReLU becomes the norm's `act`, and an identity takes its place: names, states and what later layers see stay
    as they were; only the output of the norm itself is now activated. A norm that is used in several places, or that
    brought an activation or a drop layer along, is left alone, and so are modules with hooks.

    Args:
        model: changed in place.
        only: the norms to look at; None for all.

    Returns:
        The dotted names of the norms, in the model's order.
    """
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    fused = []
    for name, sequence in model.named_modules():
        if type(sequence).forward is not nn.Sequential.forward:
            continue
        layers = list(sequence._modules.items())
        for (key, norm), (after, activation) in pairwise(layers):
            if (
                isinstance(norm, Norm)
                and (only is None or norm in only)
                and places[norm] == 1
                and not norm._modules
                and is_plain_relu(activation)
                and not has_listeners(norm)
            ):
                norm.add_module("act", activation)
                sequence._modules[after] = nn.Identity()
                fused.append(f"{name}.{key}".lstrip("."))
    return fused
