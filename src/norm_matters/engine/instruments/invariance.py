"""Which weights can be scaled without changing the output: those that a norm follows, as the network really is."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from norm_matters.core.errors import UserError
from norm_matters.engine.instruments.instrument import Column, Instrument
from norm_matters.engine.instruments.tracked import tracked_weights
from norm_matters.engine.rng import preserved_rng
from norm_matters.engine.state import TrainingState

FACTOR = 2.0
"""Exact in every number format."""

TOLERANCE = 1e-3
"""Largest relative change of the output that counts as none: eps of the norms makes one of 1e-4 or less."""


def scale_invariant_weights(
    model: nn.Module, batch: Tensor, *, factor: float = FACTOR, tolerance: float = TOLERANCE
) -> list[str]:
    """Names of the weights that can be multiplied by a factor without changing the output in training.

    Only for these is `lr / |w|^2` an effective learning rate, and only these come to the equilibrium of weight decay.
    The network is asked as it trains: training mode (norms use the batch's statistics), dropout with equal draws.
    It is left as it was, its running statistics and the random streams included.

    Args:
        model: takes `batch`, and returns a tensor or (nested) tuples, lists and dicts of them.
        batch: what training would give it: (N, C, H, W) on the model's device, in its dtype.
        factor: what each weight is multiplied by in turn, all its channels alike.
        tolerance: largest relative change (2-norm) of the output.

    Returns:
        Names as in `model.named_parameters()`, in its order, of weights with two or more dimensions. Behind a
        parametrization the tensor that the optimizer moves is scaled: the direction of a weight norm is invariant.

    Raises:
        UserError: `factor` is 1, or not a positive finite number.
    """
    changes = output_changes(model, batch, factor=factor)
    return [name for name, change in changes.items() if change <= tolerance]


def output_changes(model: nn.Module, batch: Tensor, *, factor: float = FACTOR) -> dict[str, float]:
    """The relative change of the output when each weight in turn is multiplied by `factor`.

    Args, Raises: as for `scale_invariant_weights`.

    Returns:
        Full name of the parameter -> |y' - y| / |y|; NaN where that is none.
    """
    if not 0 < factor < float("inf") or factor == 1:
        raise UserError(f"factor: {factor!r} is no positive finite number other than 1")
    names = [weight.parameter for weight in tracked_weights(model) if weight.parameter is not None]
    plain = _output(model, batch)
    length = plain.norm().item()
    changes = {}
    for name in names:
        change = (_output(model, batch, name, factor) - plain).norm().item()
        changes[name] = change / length if length > 0 else float("nan")
    return changes


@torch.no_grad()
def _output(model: nn.Module, batch: Tensor, name: str | None = None, factor: float = 1.0) -> Tensor:
    """All that a copy of the network puts out in training, as one vector; every call draws the same random numbers."""
    # A copy for every trial: whatever a forward pass changes, buffers or Python state, it changes for no other.
    trial = copy.deepcopy(model).train()
    if name is not None:
        trial.get_parameter(name).mul_(factor)
    with preserved_rng():
        values = [tensor.flatten() for tensor in _tensors(trial(batch))]
    return torch.cat([value.to(torch.promote_types(value.dtype, torch.float32)) for value in values])


def _tensors(output: Any) -> Iterator[Tensor]:
    """The floating tensors in what a network returned."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for item in output:
            yield from _tensors(item)


class ScaleInvariance(Instrument):
    """`scale_change` (1): `output_changes` for each weight, on (a part of) the epoch's last batch."""

    def __init__(self, state: TrainingState, *, images: int = 64) -> None:
        self._state, self._images = state, images
        self._weights = tracked_weights(state.module)
        self.columns = [Column("scale_change", weight.layer, 1) for weight in self._weights]

    def end_epoch(self, images: Tensor) -> list[np.ndarray]:
        """See the class."""
        with self._state.precision.context(self._state.device):
            changes = output_changes(self._state.module, images[: self._images].to(self._state.input_dtype))
        return [np.array([changes.get(weight.parameter or "", np.nan)]) for weight in self._weights]
