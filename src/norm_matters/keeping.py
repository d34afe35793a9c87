"""When a run saves, and when it stops: after so many steps or minutes, when asked by a signal, when its time is over.

With ranks all must decide alike. Each tells the others what it has heard, several times a second, and acts one step
later on what all have said: nobody waits for an answer, and all stop after the same step.
"""

import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, final

from norm_matters.core import stopping
from norm_matters.core.clock import Duration, parse_interval, parse_seconds
from norm_matters.core.config import TrainConfig
from norm_matters.core.errors import INTERRUPTED, PreemptedError
from norm_matters.core.ranks import note_stop
from norm_matters.engine.loop import Attendant
from norm_matters.engine.state import TrainingState
from norm_matters.record.status import State, write_status

SECONDS_BETWEEN_STEPS = 2.0
"""How old status.json gets while nothing changes but the steps."""

SECONDS_BETWEEN_STATES = 1.0
"""How old it is at least when the state is told to have changed: epochs may take milliseconds."""

SECONDS_BETWEEN_EXCHANGES = 0.25
"""How often ranks tell each other what they have heard, where steps take less."""

STEPS_TO_LEARN = 10
"""After so many steps the ranks know how long a step takes."""

SHARE_IN_RESERVE = 0.02
"""Of the time that a run has: kept for its last step and save, before it is known how long they take."""


class _Wishes(NamedTuple):
    """What a rank wants: to stop (the number of a signal, 0 for none), to save, to end in time. Larger is stronger."""

    stop: int = 0
    save: int = 0
    over: int = 0


_NONE = _Wishes()


@final
class Keeper(Attendant):
    """Looks after one training; every rank has one.

    Args:
        config: of the run.
        state: the training.
        folder: of the run.
        started: when the process began to work on it (`time.monotonic`).
        recorded: epochs that have their row.
    """

    def __init__(
        self, config: TrainConfig, state: TrainingState, folder: Path, *, started: float, recorded: int
    ) -> None:
        self._state, self._folder, self._started, self._recorded = state, folder, started, recorded
        every = parse_interval(config.checkpoint_every)
        self._every_steps = max(1, every.steps(state.clock)) if isinstance(every, Duration) else None
        self._every_seconds = None if isinstance(every, Duration) else every
        self._limit = None if config.max_time is None else parse_seconds(config.max_time)
        self._limit_text = config.max_time
        self._agreed = _NONE
        self._coming: Callable[[], list[int]] | None = None
        self._exchange_every, self._steps = 1, 0
        # Times (monotonic): of the last save, the last look, the last status; and the longest between two looks.
        now = time.monotonic()
        self._saved_at, self._looked_at, self._told_at = now, now, 0.0
        self._longest_look, self._longest_save, self._looks = 0.0, 0.0, 0
        self._first_step_at = self._save_began = now
        self._status: State = "starting"

    def after_step(self) -> bool:
        """See `Attendant`."""
        now = self._look()
        self._steps += 1
        self._show("training", now)
        if self._state.group.world == 1:
            self._agree(self._wishes(now))
        else:
            self._settle()
            if self._steps == 1:
                self._first_step_at = now
            elif self._steps == STEPS_TO_LEARN:
                # By the same number of steps on all ranks: looks are not, which come in evaluation too.
                each = self._state.group.largest((now - self._first_step_at) / (STEPS_TO_LEARN - 1))
                self._exchange_every = max(1, int(SECONDS_BETWEEN_EXCHANGES / max(each, 1e-6)))
            if self._state.clock.step % self._exchange_every == 0:
                self._coming = self._state.group.begin_largest(self._wishes(now))
        return self._due()

    def before_evaluation(self) -> None:
        """See `Attendant`."""
        self._show("evaluating", self._look())

    def leaves_evaluation(self) -> bool:
        """See `Attendant`."""
        now = self._look()
        self._show("evaluating", now)
        wishes = self._wishes(now)
        return bool(self._agreed.stop or self._agreed.over or wishes.stop or wishes.over)

    def due_after_epoch(self) -> bool:
        """Whether to save at the end of an epoch; all ranks ask, and get the same answer."""
        self._settle()
        self._agree(_Wishes(*self._state.group.begin_largest(self._wishes(time.monotonic()))()))
        return self._due()

    def begin_save(self) -> None:
        """To be called before a save, by all ranks."""
        self._settle()
        # What made another rank leave an evaluation is known here by now, or never.
        self._agree(_Wishes(*self._state.group.begin_largest(self._wishes(time.monotonic()))()))
        now = self._save_began = time.monotonic()
        # Of a long save there is no other occasion to tell.
        self._show("saving", now, always=self._longest_save > SECONDS_BETWEEN_STATES)

    def saved(self, *, recorded: int) -> None:
        """To be called after it.

        Args:
            recorded: epochs that have their row.
        """
        now = time.monotonic()
        self._recorded = recorded
        self._longest_save = max(self._longest_save, now - self._save_began)
        self._saved_at = self._looked_at = now
        self._agreed = self._agreed._replace(save=0)

    def leave_if_asked(self) -> None:
        """Raise what ends the run, after a save, if it was asked to end.

        Raises:
            PreemptedError: for a signal that wants the machine back, and when the time is over.
            KeyboardInterrupt: for Ctrl-C.
        """
        stop, _, over = self._agreed
        if stop == signal.SIGINT:
            note_stop(INTERRUPTED)
            raise KeyboardInterrupt
        if stop or over:
            reason = signal.Signals(stop).name if stop else f"the end of its time (train.max_time={self._limit_text})"
            clock = self._state.clock
            raise preempted(
                f"preempted by {reason} after step {clock.step} of {clock.total_steps}; "
                f"continue with: norm-matters train --resume {shlex.quote(str(self._folder))}"
            )

    def tell(self, state: State, *, exit_status: int | None = None, error: str | None = None) -> None:
        """Write status.json, in the first rank."""
        self._status, self._told_at = state, time.monotonic()
        if self._state.group.first:
            clock = self._state.clock
            write_status(
                self._folder,
                state,
                epoch=self._recorded,
                step=clock.step,
                of=clock.total_steps,
                exit_status=exit_status,
                error=error,
            )

    def _show(self, state: State, now: float, *, always: bool = False) -> None:
        """Write status.json, unless it was written a moment ago."""
        age = SECONDS_BETWEEN_STEPS if state == self._status else SECONDS_BETWEEN_STATES
        if always or now - self._told_at > age:
            self.tell(state)

    def _due(self) -> bool:
        by_step = self._every_steps is not None and self._state.clock.step % self._every_steps == 0
        return by_step or (self._agreed is not _NONE and any(self._agreed))

    def _agree(self, wishes: _Wishes) -> None:
        """Remember what all ranks know now; only a save is ever forgotten."""
        if wishes is not _NONE:
            self._agreed = _Wishes(*map(max, self._agreed, wishes))

    def _settle(self) -> None:
        """Hear what the other ranks have said last."""
        if self._coming:
            coming, self._coming = self._coming, None
            self._agree(_Wishes(*coming()))

    def _look(self) -> float:
        """The time; remembers how long looks lie apart at most, but for the first, which may wait for a compiler."""
        now = time.monotonic()
        self._looks += 1
        if self._looks > 1:
            self._longest_look = max(self._longest_look, now - self._looked_at)
        self._looked_at = now
        return now

    def _wishes(self, now: float) -> _Wishes:
        """What this rank wants; of time only the first speaks, since clocks differ."""
        stop = stopping.requested() or 0
        if not self._state.group.first or (self._every_seconds is None and self._limit is None):
            return _Wishes(stop) if stop else _NONE
        save = self._every_seconds is not None and now - self._saved_at >= self._every_seconds
        over = False
        if self._limit is not None:
            reserve = max(SHARE_IN_RESERVE * self._limit, 2 * (self._longest_look + self._longest_save))
            over = now - self._started >= self._limit - reserve
        return _Wishes(stop, save, over)


def preempted(words: str) -> PreemptedError:
    """What ends a run that makes room, on all ranks together.

    Args:
        words: what to tell.
    """
    error = PreemptedError(words)
    error.shared = True
    note_stop(error.exit_status)
    return error
