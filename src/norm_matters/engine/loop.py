"""The training loop: a generator of rows, one per epoch. Whoever consumes it decides what is kept."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from norm_matters.engine.evaluate import ImageBatch, evaluate
from norm_matters.engine.instruments.collect import Instruments
from norm_matters.engine.metrics import Meter
from norm_matters.engine.state import TrainingState
from norm_matters.engine.step import StepOptions, train_step


class Batches(Protocol):
    """A source of batches: `len` per epoch, and the batches of one epoch as a function of its number (from 0)."""

    def __len__(self) -> int: ...
    def epoch(self, epoch: int) -> Iterator[ImageBatch]: ...


@dataclass(frozen=True)
class Progress:
    """What a display needs to know.

    Attributes:
        kind: `start` once, `batch` several times a second at most, `epoch` at the end of each epoch.
        epoch: the epoch under way, from 1, of `epochs`.
        step: optimizer steps done in this epoch, of `steps`.
        loss, error1: means over this epoch so far (error in percent).
        images, seconds: trained on in this epoch so far, and the time that took.
        row: the finished epoch's row of results.csv (`kind == "epoch"`).
        message: what is about to happen (`kind == "start"`).
    """

    kind: Literal["start", "batch", "epoch"]
    epoch: int
    epochs: int
    step: int = 0
    steps: int = 0
    loss: float = float("nan")
    error1: float = float("nan")
    images: int = 0
    seconds: float = 0.0
    row: dict[str, Any] | None = None
    message: str | None = None


OnProgress = Callable[[Progress], None]
SECONDS_BETWEEN_REPORTS = 0.25


def training_rows(
    state: TrainingState,
    *,
    train: Batches,
    val: Batches,
    options: StepOptions,
    instruments: Instruments | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[dict[str, Any]]:
    """Train from the clock's position to its last epoch, yielding one row (see `record.table.COLUMNS`) per epoch.

    The state stands at the end of the epoch whenever a row is yielded, so the consumer can save it; `instruments.row`
    then holds what they measured in that epoch. With ranks every rank goes through it, each with its own batches, and
    gets the same row but for the times.

    Raises:
        NumericalError: see `train_step`.
    """
    for epoch in range(state.clock.epoch, state.clock.epochs):
        start = time.perf_counter()
        meter, learning_rate = _train_epoch(state, train, epoch, options, instruments, on_progress)
        state.settle()
        trained = meter.scores(state.group)
        seconds_train = time.perf_counter() - start
        spread = state.share_statistics()
        if spread:
            state.notes.append(
                f"running statistics: those of the ranks differed by up to {100 * spread:.3g}%; the first's are kept"
            )
        scores = evaluate(
            state.module,
            val.epoch(0),
            device=state.device,
            precision=state.precision,
            input_dtype=state.input_dtype,
            group=state.group,
        )
        seconds = time.perf_counter() - start
        yield {
            "epoch": epoch + 1,
            "step": state.clock.step,
            "train_loss": trained.loss,
            "val_loss": scores.loss,
            "train_error1": trained.error1,
            "val_error1": scores.error1,
            "train_error5": trained.error5,
            "val_error5": scores.error5,
            "lr": learning_rate,
            "seconds": round(seconds, 4),
            "images_per_second": round(trained.images / seconds_train, 2),
            "val_seconds": round(seconds - seconds_train, 4),
            "loss_scale": state.scale.scale if state.scale else None,
            "skipped_steps": state.skipped_steps,
            "rejected_updates": state.rejected_updates(),
        }


def _train_epoch(
    state: TrainingState,
    train: Batches,
    epoch: int,
    options: StepOptions,
    instruments: Instruments | None,
    on_progress: OnProgress | None,
) -> tuple[Meter, float]:
    """Train one epoch; return its meter and the learning rate of its last step."""
    state.module.train()
    if options.nonfinite == "rollback":
        state.remember()
    meter = Meter(state.device)
    learning_rate, batch = 0.0, None
    start = last_report = time.perf_counter()
    for done, batch in enumerate(train.epoch(epoch), start=1):
        with instruments.step(done) if instruments else contextlib.nullcontext():
            learning_rate = train_step(state, batch.images, batch.labels, options=options, meter=meter)
        now = time.perf_counter()
        if on_progress and now - last_report >= SECONDS_BETWEEN_REPORTS:
            last_report = now
            if state.group.world == 1:
                # It may end the training, which one rank does not do by itself.
                state.settle()
            scores = meter.scores()
            on_progress(
                Progress(
                    "batch",
                    epoch + 1,
                    state.clock.epochs,
                    done,
                    len(train),
                    scores.loss,
                    scores.error1,
                    scores.images * state.group.world,
                    now - start,
                )
            )
    if instruments and batch is not None:
        instruments.end_epoch(batch.images)
    return meter, learning_rate
