"""Fingerprints of a training at a few of its steps, by which the same training is known when it is done again."""

import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, final

import torch
from torch import Tensor

from norm_matters.engine.metrics import Meter
from norm_matters.engine.state import TrainingState


class Fingerprint(NamedTuple):
    """What a training was after a step.

    Attributes:
        step: optimizer steps done.
        loss: mean over the images of the epoch so far, of all ranks.
        weight_norm: square root of the sum of squares of all weights and statistics: how far apart two trainings are.
        digest: BLAKE2b, 256 bits, of the names, shapes, types and bytes of these; equal where all bits are.
    """

    step: int
    loss: float
    weight_norm: float
    digest: str


def is_traced(step: int) -> bool:
    """Whether a fingerprint is taken after a step: 1, 2, 5, 10, 20, 50 and so on, three for each power of ten."""
    return str(step).rstrip("0") in ("1", "2", "5")


def fingerprint(tensors: Mapping[str, Tensor]) -> tuple[float, str]:
    """The norm of tensors taken together, and the digest of their names, shapes, types and bytes."""
    # Twice as fast as SHA-256 on processors without instructions for that.
    digest, squares = hashlib.blake2b(digest_size=32), 0.0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode(errors="surrogateescape"))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        if tensor.is_floating_point():
            squares += float(torch.linalg.vector_norm(tensor.float())) ** 2
    return squares**0.5, digest.hexdigest()


class EnoughStepsError(Exception):
    """A training was to end here."""


@final
class Trace:
    """Takes the fingerprints as the training goes on; changes nothing of it.

    Args:
        write: gets each fingerprint, on the first rank.
        until: the step after which the training ends by an `EnoughStepsError`; None: it goes on.
    """

    def __init__(self, write: Callable[[Fingerprint], None], *, until: int | None = None) -> None:
        self._write = write
        self._until = until

    def step_done(self, state: TrainingState, meter: Meter) -> None:
        """Look at a training after a step; all ranks call this.

        Args:
            meter: that of the epoch under way.

        Raises:
            EnoughStepsError: on all ranks, after the step `until`.
        """
        step = state.clock.step
        if is_traced(step):
            loss = meter.scores(state.group).loss
            state.group.alone(lambda: self._write(Fingerprint(step, loss, *fingerprint(state.model_tensors()))))
        if self._until is not None and step >= self._until:
            raise EnoughStepsError
