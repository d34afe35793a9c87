"""One optimizer step: the only place with `backward()` and `step()`."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from norm_matters.engine.metrics import Meter
from norm_matters.engine.state import TrainingState


@dataclass(frozen=True)
class StepOptions:
    """What a step does besides the plain one.

    Attributes:
        accumulate: the batch is split into this many chunks whose gradients are added: the step of the whole batch in
            the memory of one chunk. Batch norms see one chunk at a time.
        clip_norm: largest global norm of the gradient; None for no clipping.
        label_smoothing: share of the target spread evenly over the classes; in training only.
    """

    accumulate: int = 1
    clip_norm: float | None = None
    label_smoothing: float = 0.0


def train_step(state: TrainingState, images: Tensor, labels: Tensor, *, options: StepOptions, meter: Meter) -> float:
    """Train on one batch and move the clock by one step.

    Args:
        images: (N, C, H, W), normalised, on the device of `state`.
        labels: (N,) int64, likewise.
        meter: receives the loss and hits of the batch as trained.

    Returns:
        The learning rate of the first parameter group in this step.

    Raises:
        NumericalError: gradients overflow at every loss scale.
    """
    learning_rate = state.optimizer.prepare(state.clock)
    state.optimizer.zero_grad()
    for image_chunk, label_chunk in zip(
        images.chunk(options.accumulate), labels.chunk(options.accumulate), strict=True
    ):
        with state.precision.context(state.device):
            logits = state.module(image_chunk.to(state.input_dtype))
            loss = functional.cross_entropy(
                logits.to(torch.promote_types(logits.dtype, torch.float32)),
                label_chunk,
                label_smoothing=options.label_smoothing,
            )
        weight = len(label_chunk) / len(labels)
        (loss * (weight * (state.scale.scale if state.scale else 1.0))).backward()
        meter.update(loss.detach(), logits.detach(), label_chunk)
    _update(state, options.clip_norm)
    state.clock = state.clock.at_step(state.clock.step + 1)
    return learning_rate


def _update(state: TrainingState, clip_norm: float | None) -> None:
    state.gradients_to_masters()
    parameters = [parameter for parameter in state.optimizer.parameters() if parameter.grad is not None]
    if state.scale is not None:
        finite = state.scale.unscale([parameter.grad for parameter in parameters if parameter.grad is not None])
        state.scale.update(finite)
        if not finite:
            state.skipped_steps += 1
            return
    if clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    state.optimizer.step()
    state.masters_to_weights()
