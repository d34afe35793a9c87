"""What a training leaves in its run folder: rows, measurements, log lines, and checkpoints at any step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

from torch import Tensor

from norm_matters.core.distributed import Group
from norm_matters.core.errors import NumericalError
from norm_matters.datasets.standing_in import check_unreadable, images_to_skip
from norm_matters.engine.instruments.collect import Instruments
from norm_matters.keeping import Keeper
from norm_matters.plan import Plan, saved_state
from norm_matters.record import RunLog, append_measurements, append_row, note_unreadable, save_checkpoint
from norm_matters.record.weight_norms import write_weight_norms


class _Saved(NamedTuple):
    """A training's state, gathered from all ranks."""

    training: Mapping[str, Tensor]
    numbers: dict[str, Any]


@final
class Recorder:
    """Records one training. All ranks call the methods; the first writes.

    Args:
        folder: of the run.
        keeper: says when to save.
        instruments: what they measured is recorded.
        best: the best epoch so far.
        recorded: epochs that have their row.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        group: Group,
        log: RunLog,
        keeper: Keeper,
        instruments: Instruments | None,
        *,
        best: dict[str, Any] | None,
        recorded: int,
    ) -> None:
        self._plan, self._folder, self._group, self._log = plan, folder, group, log
        self._keeper, self._instruments = keeper, instruments
        self._best, self._recorded = best, recorded

    def epoch(self, row: dict[str, Any]) -> None:
        """Record an epoch; a checkpoint too where one is due, and after the best epoch so far and the last."""
        improved = self._best is None or row["val_error1"] < self._best["val_error1"]
        if improved:
            self._best = {"epoch": row["epoch"], "val_error1": row["val_error1"]}
        last = row["epoch"] == self._plan.state.clock.epochs
        saved = self._gathered() if self._keeper.due_after_epoch() or improved or last else None
        self._recorded = row["epoch"]
        self._note_unreadable()
        self._group.alone(lambda: self._write_epoch(row, saved, improved=improved))
        self._done(saved)

    def pause(self) -> None:
        """Save a checkpoint in the middle of an epoch."""
        saved = self._gathered()
        # What is read before it, no later process reads again.
        self._note_unreadable()
        self._group.alone(lambda: self._write_pause(saved))
        self._done(saved)

    def _gathered(self) -> _Saved:
        self._keeper.begin_save()
        state = self._plan.state
        return _Saved(state.training_tensors(), state.numbers())

    def _done(self, saved: _Saved | None) -> None:
        if saved:
            self._keeper.saved(recorded=self._recorded)
        self._plan.state.notes.clear()
        self._plan.state.incidents.clear()

    def _write_epoch(self, row: dict[str, Any], saved: _Saved | None, *, improved: bool) -> None:
        append_row(self._folder / "results.csv", row)
        if self._instruments and self._instruments.columns:
            append_measurements(self._folder, row["epoch"], self._instruments.row)
        if self._instruments and self._instruments.norms:
            write_weight_norms(self._folder, row["epoch"], self._instruments.norms.take())
        self._log.write(" ".join(f"{key}={value:g}" for key, value in row.items() if value is not None))
        self._write_notes()
        if saved:
            self._save(saved, improved=improved)

    def _write_pause(self, saved: _Saved) -> None:
        self._write_notes()
        measured = self._instruments.tensors() if self._instruments else {}
        self._save(saved._replace(training={**saved.training, **measured}), improved=False)

    def _note_unreadable(self) -> None:
        """Tell of training images for which others stood in, on any rank.

        Raises:
            UserError: there are more of them than are allowed, in the whole run.
        """
        allowed = images_to_skip(self._plan.config.data.bad_images)
        if not allowed:
            return
        found = {
            name: reason for part in self._group.gather(self._plan.train.unreadable) for name, reason in part.items()
        }

        def note() -> None:
            new, every = note_unreadable(self._folder, found)
            for reason in new:
                self._log.write(f"warning: {reason}; another image of its class stands in (data.bad_images)")
            check_unreadable(every, allowed)

        self._group.alone(note)

    def _write_notes(self) -> None:
        state = self._plan.state
        for note in state.notes:
            self._log.write(note)
        for incident in state.incidents:
            self._log.write(f"warning: {incident}")

    def _save(self, saved: _Saved, *, improved: bool) -> None:
        spoiled = self._plan.state.first_not_finite()
        if spoiled:
            step = self._plan.state.clock.step
            raise NumericalError(f"the network is not finite after step {step}, and not saved: {spoiled}")
        save_checkpoint(
            self._folder,
            step=self._plan.state.clock.step,
            model=self._plan.state.model_tensors(),
            training=saved.training,
            state=saved_state(self._plan, saved.numbers, epoch=self._recorded, best=self._best),
            best=improved,
            keep=self._plan.config.train.keep,
            on_note=self._log.write,
        )
