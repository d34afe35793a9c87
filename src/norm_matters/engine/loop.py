"""The training loop: a generator of rows, one per epoch. Whoever consumes it decides what is kept."""

import abc
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, final

from norm_matters.core.stopping import StopRequestedError
from norm_matters.engine.epoch import EpochSoFar
from norm_matters.engine.evaluate import ImageBatch, evaluate_unless
from norm_matters.engine.instruments.collect import Instruments
from norm_matters.engine.metrics import Scores
from norm_matters.engine.state import TrainingState
from norm_matters.engine.step import StepOptions, train_step
from norm_matters.engine.trace import Trace


class Batches(Protocol):
    """A source of batches: `len` per epoch, and the batches of one epoch as a function of its number (from 0).

    They may end with StopRequestedError, where the process is asked to stop while it waits for one.
    """

    def __len__(self) -> int: ...
    def epoch(self, epoch: int, start: int = 0) -> Iterator[ImageBatch]: ...


class Attendant(abc.ABC):
    """Who looks after a training from outside, at the places where it can be left.

    Every rank has one, and all of them answer alike, but for `leaves_evaluation`.
    """

    @abc.abstractmethod
    def after_step(self) -> bool:
        """Whether to pause after this step. Asked after every step, also where a pause comes anyway."""

    @abc.abstractmethod
    def before_evaluation(self) -> None:
        """Called when an epoch's training is done."""

    @abc.abstractmethod
    def leaves_evaluation(self) -> bool:
        """Whether to leave the evaluation; asked before each of its batches. When one rank does, all do."""


@final
class Nobody(Attendant):
    """Trains on to the end."""

    def after_step(self) -> bool:
        """Never."""
        return False

    def before_evaluation(self) -> None:
        """Nothing."""

    def leaves_evaluation(self) -> bool:
        """Never."""
        return False


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
    trace: Trace | None = None,
    on_progress: OnProgress | None = None,
    attendant: Attendant | None = None,
) -> Iterator[dict[str, Any] | None]:
    """Train from where the state stands to the clock's last epoch; yields a row per epoch (see `record.table.COLUMNS`).

    The state stands at the end of the epoch whenever a row is yielded, so the consumer can save it; `instruments.row`
    then holds what they measured in that epoch. With ranks every rank goes through it, each with its own batches, and
    gets the same row but for the times.

    Args:
        trace: is shown the state after every step.
        attendant: has it pause where it can be left; None is yielded then, and the consumer can save the state, and
            what the instruments have so far, in the middle of an epoch.

    Raises:
        NumericalError: see `train_step`.
    """
    attendant = attendant or Nobody()
    while state.so_far is not None or state.clock.step < state.clock.total_steps:
        if state.so_far is None:
            state.so_far = EpochSoFar(state.clock.epoch, state.device)
            if options.nonfinite == "rollback":
                state.remember()
        so_far = state.so_far
        shown = _Shown(state, len(train), instruments, trace, on_progress)
        yield from _train_rest(state, so_far, train, options, shown, attendant)
        start = time.perf_counter()
        state.settle()
        state.agree_on_pieces()
        trained = so_far.meter.scores(state.group)
        # What the steps have begun on the device is over now.
        so_far.seconds += time.perf_counter() - start
        start = time.perf_counter()
        spread = state.share_statistics()
        if spread:
            state.notes.append(
                f"running statistics: those of the ranks differed by up to {100 * spread:.3g}%; the first's are kept"
            )
        attendant.before_evaluation()
        while (scores := _evaluate(state, val, attendant)) is None:
            yield None
            start = time.perf_counter()
        state.so_far = None
        yield _row(state, so_far, trained, scores, time.perf_counter() - start)


def _evaluate(state: TrainingState, val: Batches, attendant: Attendant) -> Scores | None:
    """The scores of the network, unless the evaluation was left."""
    return evaluate_unless(
        attendant.leaves_evaluation,
        state.module,
        val.epoch(0),
        device=state.device,
        precision=state.precision,
        input_dtype=state.input_dtype,
        group=state.group,
    )


def _row(
    state: TrainingState, so_far: EpochSoFar, trained: Scores, scores: Scores, val_seconds: float
) -> dict[str, Any]:
    return {
        "epoch": so_far.number + 1,
        "step": state.clock.step,
        "train_loss": trained.loss,
        "val_loss": scores.loss,
        "train_error1": trained.error1,
        "val_error1": scores.error1,
        "train_error5": trained.error5,
        "val_error5": scores.error5,
        "lr": so_far.learning_rate,
        "seconds": round(so_far.seconds + val_seconds, 4),
        "images_per_second": round(trained.images / so_far.seconds, 2),
        "val_seconds": round(val_seconds, 4),
        "loss_scale": state.scale.scale if state.scale else None,
        "skipped_steps": state.skipped_steps,
        "rejected_updates": state.rejected_updates(),
    }


def _train_rest(
    state: TrainingState,
    so_far: EpochSoFar,
    train: Batches,
    options: StepOptions,
    shown: "_Shown",
    attendant: Attendant,
) -> Iterator[None]:
    """Train what is left of an epoch; yields at every pause."""
    state.module.train()
    before, start = so_far.seconds, time.perf_counter()
    batch, steps = None, len(train)
    while (done := state.clock.step - so_far.number * steps) < steps:
        try:
            for batch in train.epoch(so_far.number, done):
                done += 1
                with shown.instruments.step(done) if shown.instruments else contextlib.nullcontext():
                    so_far.learning_rate = train_step(
                        state, batch.images, batch.labels, options=options, meter=so_far.meter
                    )
                now = time.perf_counter()
                so_far.seconds = before + now - start
                shown.step_done(so_far, done, now)
                if attendant.after_step() and done < steps:
                    yield None
                    before, start = so_far.seconds, time.perf_counter()
        except StopRequestedError:
            yield None
            before, start = so_far.seconds, time.perf_counter()
    if shown.instruments and batch is not None:
        shown.instruments.end_epoch(batch.images)
        so_far.seconds = before + time.perf_counter() - start


class _Shown:
    """Who looks at an epoch's training: the instruments, the trace, and a display, several times a second at most."""

    def __init__(
        self,
        state: TrainingState,
        steps: int,
        instruments: Instruments | None,
        trace: Trace | None,
        on_progress: OnProgress | None,
    ) -> None:
        self.instruments = instruments
        self._state, self._steps, self._trace, self._tell = state, steps, trace, on_progress
        self._last = time.perf_counter()

    def step_done(self, so_far: EpochSoFar, done: int, now: float) -> None:
        """Show a step; to the display not when it saw one a moment ago."""
        state = self._state
        if self._trace:
            self._trace.step_done(state, so_far.meter)
        if not self._tell or now - self._last < SECONDS_BETWEEN_REPORTS:
            return
        self._last = now
        if state.group.world == 1:
            # It may end the training, which one rank does not do by itself.
            state.settle()
        scores = so_far.meter.scores()
        images = scores.images * state.group.world
        epoch, epochs = so_far.number + 1, state.clock.epochs
        self._tell(
            Progress("batch", epoch, epochs, done, self._steps, scores.loss, scores.error1, images, so_far.seconds)
        )
