"""What to do about a step that is not finite, and where in the network it began."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

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

    with preserved_rng(), kept_buffers(module), _watched(module, look), torch.no_grad(), context():
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
    return not tensors or bool(finite_flag(tensors, tensors[0].device))


def finite_flag(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Whether all values of all tensors are finite, as a flag (no dimension) on their device; nothing waits for it."""
    if not tensors:
        return torch.ones((), dtype=torch.bool, device=device)
    largest = torch._foreach_norm(tensors, math.inf)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack([value.float() for value in largest]).isfinite().all()


class Verdicts(NamedTuple):
    """What was found since the last reading.

    Attributes:
        given_up: steps left out because they were not finite.
        overflowed: steps left out because their gradients were not finite at the loss scale.
        first: the first step given up, counted from 1; 0 where there is none.
        in_a_row: steps given up at the end of the time, without one that was taken.
        longest: most steps given up in a row.
    """

    given_up: int
    overflowed: int
    first: int
    in_a_row: int
    longest: int


class DeferredVerdicts:
    """Decides on the device whether a step is taken, so that the host need not wait for it at every step.

    Args:
        device: of the training.
        policy: stop or skip. With stop, no step is taken after the first that is not finite.
        in_a_row: steps given up immediately before.
    """

    def __init__(self, device: torch.device, policy: Policy, in_a_row: int = 0) -> None:
        assert policy != "rollback", "the host has to act at once"
        self.policy: Policy = policy
        self._given_up, self._overflowed, self._first, self._in_a_row, self._longest = (
            torch.tensor(value, device=device) for value in (0, 0, 0, in_a_row, in_a_row)
        )

    def record(self, finite: Tensor, *, step: int, fits_scale: Tensor | None = None) -> Tensor:
        """Judge a step.

        Args:
            finite: flag, whether loss and gradients are; with a loss scale, whether the loss is.
            step: its number, from 1.
            fits_scale: flag, whether the gradients are finite at the loss scale.

        Returns:
            Flag, whether the step must be left out.
        """
        bad = ~finite
        if self.policy == "stop":
            bad = bad | (self._given_up > 0)
        overflowed = torch.zeros_like(bad) if fits_scale is None else ~bad & ~fits_scale
        self._first = torch.where(bad & (self._first == 0), step, self._first)
        # An overflow is neither a step that was taken nor one that was given up.
        self._in_a_row = torch.where(bad, self._in_a_row + 1, torch.where(overflowed, self._in_a_row, 0))
        self._longest = torch.maximum(self._longest, self._in_a_row)
        self._given_up = self._given_up + bad
        self._overflowed = self._overflowed + overflowed
        return bad | overflowed

    def read(self) -> Verdicts:
        """What was found since the last call; waits for the device."""
        found = [self._given_up, self._overflowed, self._first, self._in_a_row, self._longest]
        verdicts = Verdicts(*torch.stack(found).tolist())
        self._given_up, self._overflowed, self._first = (torch.zeros_like(self._first) for _ in range(3))
        self._longest = self._in_a_row
        return verdicts


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
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Put every buffer back at the end."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, kept in before:
                buffer.copy_(kept)
