"""What to do about a step that is not finite, and where in the network it began."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from norm_matters.engine.rng import preserved_rng

Policy = Literal["stop", "skip", "rollback"]
"""stop: the run ends. skip: the step is left out. rollback: weights, optimizer and statistics return to the beginning
of the epoch, and training goes on with the next batch."""

PATIENCE = 20
"""Steps given up in a row before the run ends whatever the policy: the weights are past saving."""


def first_nonfinite(
    module: nn.Module, images: Tensor, context: Callable[[], contextlib.AbstractContextManager]
) -> str | None:
    """Where non-finite values begin in a forward pass; the network and the random streams are left as they were.

    Args:
        module: in training mode.
        images: (N, C, H, W), the batch that gave a non-finite loss.
        context: the context of the forward pass (autocast).

    Returns:
        A sentence that names the first such layer with the range of its input and output; None where the pass is
        finite (the loss itself overflowed, or a random layer drew otherwise).
    """
    if not _is_finite(images):
        return f"the images are not finite: {describe_range(images)}"
    for name, parameter in module.named_parameters():
        if not _is_finite(parameter):
            return f"the parameter '{name}' is not finite: {describe_range(parameter)}"
    found: list[str] = []

    def look(name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not found and isinstance(output, Tensor) and not _is_finite(output):
            given = [describe_range(value) for value in inputs if isinstance(value, Tensor)]
            kind = type(layer).__name__
            found.append(
                f"the first output that is not finite is that of layer '{name}' ({kind}): {describe_range(output)}; "
                f"its input: {', '.join(given)}"
            )

    with preserved_rng(), _kept_buffers(module), _watched(module, look), torch.no_grad(), context():
        module(images)
    return found[0] if found else None


def describe_range(values: Tensor) -> str:
    """`3 of 512 values not finite, the others from -1.5 to 2.25`."""
    finite = values.detach()[torch.isfinite(values.detach())].double()
    bad = values.numel() - finite.numel()
    count = f"{bad} of {values.numel()} values not finite" if bad else f"{values.numel()} values"
    if not finite.numel():
        return count
    return f"{count}, {'the others ' if bad else ''}from {finite.min():.4g} to {finite.max():.4g}"


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether all values of all tensors are finite; waits for the device once."""
    if not tensors:
        return True
    largest = torch._foreach_norm(tensors, math.inf)  # pyright: ignore[reportPrivateImportUsage]
    return bool(torch.stack([value.float() for value in largest]).isfinite().all())


def _is_finite(values: Tensor) -> bool:
    return not values.is_floating_point() or bool(values.isfinite().all())


@contextlib.contextmanager
def _watched(module: nn.Module, look: Callable[..., None]) -> Iterator[None]:
    """Have `look` called with each layer's name, itself, its inputs and its output, innermost layers first."""
    handles = []
    for name, layer in module.named_modules():
        handles.append(layer.register_forward_hook(lambda *call, name=name: look(name, *call)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _kept_buffers(module: nn.Module) -> Iterator[None]:
    """Put every buffer back at the end."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, kept in before:
                buffer.copy_(kept)
