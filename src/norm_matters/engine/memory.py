"""Steps that do not fit into memory: taken in pieces where that changes nothing, else told with what would fit."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from norm_matters.core.errors import UserError
from norm_matters.engine.nonfinite import kept_buffers
from norm_matters.engine.replicas import unsynchronised
from norm_matters.engine.rng import preserved_rng
from norm_matters.norms import takes_batch_statistics

if TYPE_CHECKING:
    from norm_matters.engine.state import TrainingState

T = TypeVar("T")

REHEARSED_ON = ("cuda",)
"""Kinds of devices on which ranks try a step before the first: one that has no memory left in the middle of an exchange
of gradients cannot go back."""


class TornExchangeError(RuntimeError):
    """A rank ran out of memory while it exchanged gradients with the others."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory for a tensor, on a GPU or on the CPU."""
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return isinstance(error, torch.OutOfMemoryError) or on_cpu


def within_memory(
    state: "TrainingState", images: int, attempt: Callable[[], T], *, trial: Callable[[int], object], accumulate: int
) -> T:
    """What `attempt` returns; where there is no memory for it, chunks are taken in ever smaller pieces.

    Each piece's gradient counts by its share of the batch, so the step is the same but for rounding: with norms within
    each image, and frozen ones. Norms over the batch would see another one; then this is an error.

    Args:
        images: of this rank in the batch.
        attempt: all forward and backward passes of a step; changes nothing but gradients.
        trial: those of so many images at once, without an exchange; to find out how many fit.
        accumulate: chunks that the batch is taken in already.

    Raises:
        UserError: it cannot be split, or an image alone does not fit; says how many do.
    """
    while True:
        torn = False
        try:
            return attempt()
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            torn = isinstance(error, TornExchangeError)
            if not torn and not is_out_of_memory(error):
                raise
        # Not in the handler, where the error would keep tensors alive.
        _forget_gradients(state)
        chunk = -(-images // accumulate)
        if torn or not _can_split(state) or state.pieces >= chunk:
            raise UserError(_explanation(state, images, accumulate, trial, torn=torn))
        state.pieces = min(2 * state.pieces, chunk)
        state.notes.append(
            f"step {state.clock.step + 1}: no memory for {chunk} images at once; they are taken in {state.pieces} "
            "pieces from here on: the same step but for rounding"
        )


def rehearse(state: "TrainingState", attempt: Callable[[], object]) -> None:
    """Try the first step on ranks, so that all agree on the pieces before any exchange; leaves no trace.

    Args:
        attempt: as `within_memory`, which it calls, without an exchange.
    """
    if state.group.world > 1 and state.device.type in REHEARSED_ON and _can_split(state):
        with _without_trace(state):
            state.group.together(attempt)
        state.agree_on_pieces()


def in_parts(attempt: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """What `attempt` makes of a batch; where there is no memory for it, of its halves, and so on.

    Only for evaluation, where no image sees another.

    Raises:
        UserError: an image alone does not fit.
    """
    try:
        return attempt(images)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    _empty_caches()
    if len(images) == 1:
        size = "x".join(map(str, images.shape[1:]))
        raise UserError(f"data.input_size: there is no memory on {images.device} to evaluate one image of {size}")
    return torch.cat([in_parts(attempt, half) for half in images.chunk(2)])


def _can_split(state: "TrainingState") -> bool:
    # CUDA graphs that were recorded have their one size.
    return isinstance(state.forward, nn.Module) and not takes_batch_statistics(state.module)


def _explanation(
    state: "TrainingState", images: int, accumulate: int, trial: Callable[[int], object], *, torn: bool
) -> str:
    """Why a step does not fit, and what would."""
    chunk = -(-images // accumulate)
    whole = f"data.batch_size: there is no memory on {state.device} for a step with {chunk} images at once"
    if torn:
        return f"{whole}, noticed in the middle of an exchange between ranks; take a larger train.accumulate"
    if _can_split(state):
        return f"{whole}, nor with one"
    fits = _largest_that_fits(state, chunk, trial)
    if not fits:
        return f"{whole}, nor for any smaller half of it down to one"
    return (
        f"{whole}; its norms take statistics over the batch, so it is not split unasked. {fits} images fit (tried): "
        f"data.batch_size={fits * accumulate * state.group.world}, or train.accumulate={-(-images // fits)} for the "
        "same batch in chunks, of which these norms see one at a time; train.save_memory=true takes less, too"
    )


def _largest_that_fits(state: "TrainingState", images: int, trial: Callable[[int], object]) -> int:
    """How many images there is memory for, found by trying halves; 0 where not even for one."""
    with _without_trace(state):
        while images := images // 2:
            try:
                trial(images)
                return images
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            _forget_gradients(state)
    return 0


@contextlib.contextmanager
def _without_trace(state: "TrainingState") -> Iterator[None]:
    """Inside, passes leave no gradients, statistics or draws behind, and wait for no other rank."""
    with preserved_rng(), kept_buffers(state.module), unsynchronised(state.module):
        yield
    _forget_gradients(state)


def _forget_gradients(state: "TrainingState") -> None:
    for parameter in (*state.module.parameters(), *state.optimizer.parameters()):
        parameter.grad = None
    _empty_caches()


def _empty_caches() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
