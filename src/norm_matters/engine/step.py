"""One optimizer step: the only place with `backward()` and `step()`."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from norm_matters.core.errors import NumericalError
from norm_matters.core.faults import fault_point
from norm_matters.engine.compiled import compilation_explained
from norm_matters.engine.memory import TornExchangeError, is_out_of_memory, rehearse, within_memory
from norm_matters.engine.metrics import Meter
from norm_matters.engine.nonfinite import (
    PATIENCE,
    DeferredVerdicts,
    Policy,
    all_finite,
    describe_range,
    finite_flag,
    first_nonfinite,
)
from norm_matters.engine.replicas import unsynchronised
from norm_matters.engine.state import TrainingState
from norm_matters.norms import saving_memory

SETTLE_EVERY = 50
"""Steps after which the host learns at the latest what was decided on the device."""

Outcome = tuple[Tensor, Tensor, Tensor]
"""Loss, logits and labels of a chunk."""


@dataclass(frozen=True)
class StepOptions:
    """What a step does besides the plain one.

    Attributes:
        accumulate: the batch is split into this many chunks whose gradients are added: the step of the whole batch in
            the memory of one chunk. Batch norms see one chunk at a time.
        clip_norm: largest global norm of the gradient; None for no clipping.
        label_smoothing: share of the target spread evenly over the classes; in training only.
        save_memory: the outputs of norms are made again in the backward pass instead of being kept; the same bits.
        nonfinite: what is done when the loss, or a gradient that no loss scale explains, is not finite.
    """

    accumulate: int = 1
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    nonfinite: Policy = "stop"
    save_memory: bool = False


def train_step(state: TrainingState, images: Tensor, labels: Tensor, *, options: StepOptions, meter: Meter) -> float:
    """Train on one batch and move the clock by one step.

    Args:
        images: (N, C, H, W), normalised, on the device of `state`.
        labels: (N,) int64, likewise.
        meter: receives the loss and hits of the batch as trained; nothing of a batch whose loss is not finite.

    Returns:
        The learning rate of the first parameter group in this step.

    A weight never takes a step that is not finite. On a CPU the host looks at every step. On a GPU the step is left out
    on the device (`TrainingState.verdicts`), and the error comes when the host looks, at most `SETTLE_EVERY` steps
    later; with the policy to stop no step is taken in between.

    Raises:
        NumericalError: the step is not finite and the policy is to stop, or was so too often in a row; or gradients
            overflow at every loss scale. The weights are those before the step.
        UserError: the network cannot be compiled, and it was asked for; or there is no memory for the step.
    """
    learning_rate = state.optimizer.prepare(state.clock)
    state.optimizer.zero_grad()
    verdicts = state.verdicts(options.nonfinite)
    may_skip = state.scale is not None or options.nonfinite != "stop"
    if may_skip:
        state.statistics.commit()
    seen = _passes_within_memory(state, images, labels, options)
    state.gradients_to_masters()
    if verdicts is not None:
        _update_if_finite(state, options, seen, meter, verdicts, may_skip=may_skip)
    elif not state.group.all_true(finite_flag([loss for loss, _, _ in seen], state.device)):
        _give_up(state, options, "the training loss", images)
    else:
        for chunk in seen:
            meter.update(*chunk)
        _update(state, options, images)
    state.clock = state.clock.at_step(state.clock.step + 1)
    if state.clock.step % SETTLE_EVERY == 0:
        state.settle()
    return learning_rate


def _passes_within_memory(state: TrainingState, images: Tensor, labels: Tensor, options: StepOptions) -> list[Outcome]:
    """The passes of a step, in smaller pieces where there is no memory for them; see `memory`."""

    def fitting(exchange: bool) -> list[Outcome]:
        return within_memory(
            state,
            len(images),
            lambda: _passes(state, images, labels, options, exchange=exchange),
            trial=lambda count: _pass(state, images[:count], labels[:count], 1.0, options, exchange=False),
            accumulate=options.accumulate,
        )

    if not state.rehearsed:
        state.rehearsed = True
        rehearse(state, lambda: fitting(exchange=False))
    return fitting(exchange=True)


def _passes(
    state: TrainingState, images: Tensor, labels: Tensor, options: StepOptions, *, exchange: bool
) -> list[Outcome]:
    """Forward and backward passes of all chunks; gradients are exchanged once, at the last one."""
    fault_point("step", step=state.clock.step + 1, values=images)
    seen: list[Outcome] = []
    parts = state.parts(len(images), options.accumulate)
    sizes = [size for size, _ in parts]
    for (_, weight), image_chunk, label_chunk in zip(parts, images.split(sizes), labels.split(sizes), strict=True):
        last = len(seen) == len(parts) - 1
        seen.append(_pass(state, image_chunk, label_chunk, weight, options, exchange=exchange and last))
    return seen


def _pass(
    state: TrainingState, images: Tensor, labels: Tensor, weight: float, options: StepOptions, *, exchange: bool
) -> Outcome:
    """Forward and backward pass of a chunk, whose gradient is added to what is there, and exchanged or not."""
    saving = saving_memory() if options.save_memory else contextlib.nullcontext()
    # The forward pass decides too whether the backward pass exchanges gradients.
    with state.exchanging(exchange), saving, state.precision.context(state.device), compilation_explained():
        logits = state.forward(images.to(state.input_dtype))
        loss = functional.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)),
            labels,
            label_smoothing=options.label_smoothing,
        )
    with state.exchanging(exchange), compilation_explained():
        try:
            _scaled(loss, weight, state).backward()
        except RuntimeError as error:
            if exchange and state.group.world > 1 and is_out_of_memory(error):
                raise TornExchangeError from error
            raise
    return loss.detach(), logits.detach(), labels


def _scaled(loss: Tensor, weight: float, state: TrainingState) -> Tensor:
    """A chunk's loss as it is differentiated: weighted as it counts in the batch, times the loss scale."""
    if weight != 1:
        loss = loss * weight
    return loss if state.scale is None else loss * state.scale.factor


def _update(state: TrainingState, options: StepOptions, images: Tensor) -> None:
    """Move the weights, unless the gradients are not finite."""
    parameters, gradients = _with_gradients(state)
    if state.scale is not None:
        finite = state.scale.unscale(gradients)
        state.scale.update(finite)
        state.scale.check()
        if not finite:
            state.statistics.rollback()
            state.skipped_steps += 1
            return
    elif not all_finite(gradients):
        _give_up(state, options, "a gradient", images)
        return
    if options.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, options.clip_norm)
    state.update()
    state.project_weights()
    state.masters_to_weights()
    state.given_up_in_a_row = 0


def _update_if_finite(
    state: TrainingState,
    options: StepOptions,
    seen: Sequence[Outcome],
    meter: Meter,
    verdicts: DeferredVerdicts,
    *,
    may_skip: bool,
) -> None:
    """As `_update` and what leads to it, with every decision made on the device; the host learns of them later."""
    parameters, gradients = _with_gradients(state)
    loss_finite = state.group.all_true(finite_flag([loss for loss, _, _ in seen], state.device))
    for chunk in seen:
        meter.update(*chunk, counted=loss_finite)
    number = state.clock.step + 1
    if state.scale is not None:
        fits = state.scale.unscale(gradients)
        state.scale.update(fits, counted=loss_finite)
        leave_out = verdicts.record(loss_finite, step=number, fits_scale=fits)
    else:
        leave_out = verdicts.record(loss_finite & finite_flag(gradients, state.device), step=number)
    if may_skip:
        state.statistics.rollback(where=leave_out)
    if options.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, options.clip_norm)
    state.update(leave_out)
    state.masters_to_weights()


def _with_gradients(state: TrainingState) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that have a gradient, and these."""
    pairs = [(parameter, parameter.grad) for parameter in state.optimizer.parameters() if parameter.grad is not None]
    return [parameter for parameter, _ in pairs], [gradient for _, gradient in pairs]


def _give_up(state: TrainingState, options: StepOptions, what: str, images: Tensor) -> None:
    """Leave a step out that is not finite, as the policy says."""
    state.given_up_in_a_row += 1
    message = f"{what} is not finite in epoch {state.clock.epoch + 1}, step {state.clock.step + 1}"
    if options.nonfinite == "stop" or state.given_up_in_a_row == 1:
        # Only the first of a row is looked into: this costs a forward pass.
        message += f": {_where_on_any_rank(state, options, images)}"
    if options.nonfinite == "stop":
        raise NumericalError(message)
    if state.given_up_in_a_row > PATIENCE:
        raise NumericalError(f"{message}; {PATIENCE} steps before were given up too (nonfinite={options.nonfinite})")
    if options.nonfinite == "skip":
        state.statistics.rollback()
    else:
        state.roll_back()
    state.skipped_steps += 1
    state.incidents.append(f"{message}; {'step skipped' if options.nonfinite == 'skip' else 'rolled back'}")


def _where_on_any_rank(state: TrainingState, options: StepOptions, images: Tensor) -> str:
    """Where in the network the values stop being finite; each rank looks at its own part of the batch.

    Synchronised norms take the statistics of that part alone meanwhile: what one rank does, no other waits for.
    """
    if state.group.world == 1:
        return _where(state, options, images)[1]
    with unsynchronised(state.module):
        try:
            found = _where(state, options, images)
        except Exception as error:
            found = False, f"the step cannot be repeated on one rank: {error}"
    findings = state.group.gather(found)
    rank = next((rank for rank, (in_forward, _) in enumerate(findings) if in_forward), 0)
    return f"on rank {rank}, {findings[rank][1]}"


def _where(state: TrainingState, options: StepOptions, images: Tensor) -> tuple[bool, str]:
    """Whether it is in the forward pass that values stop being finite, and where."""
    sizes = [size for size, _ in state.parts(len(images), options.accumulate)]
    for chunk in images.to(state.input_dtype).split(sizes):
        where = first_nonfinite(state.module, chunk, lambda: state.precision.context(state.device))
        if where is not None:
            return True, where
    # The last parameter is the first that the backward pass reaches.
    for name, parameter in reversed((dict(state.module.named_parameters()) | state.masters).items()):
        if parameter.grad is not None and not all_finite([parameter.grad]):
            return (
                False,
                f"the forward pass is finite; the gradient of '{name}' is not: {describe_range(parameter.grad)}",
            )
    return False, "a second forward pass is finite"
