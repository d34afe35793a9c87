"""How training looks on the console: a bar on a terminal, a plain line per epoch anywhere else."""

import math
import sys
from typing import TYPE_CHECKING, Any, TextIO

from norm_matters.record.log import printable_line as printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from norm_matters.engine.loop import Progress


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line at once, control characters escaped; to standard output by default."""
    print(printable(text), file=stream, flush=True)


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """One epoch's row of results.csv for the eye."""
    return (
        f"epoch {row['epoch']}/{epochs}: "
        f"train loss {row['train_loss']:.4f} error {row['train_error1']:.2f}%, "
        f"val loss {row['val_loss']:.4f} error {row['val_error1']:.2f}%, "
        f"lr {row['lr']:.4g}, {row['images_per_second']:,.0f} images/s, {row['seconds']:.1f} s"
    )


class ConsoleProgress:
    """Shows the events of a run (`engine.loop.Progress`). Use as a context manager, so that the bar is always closed.

    The display is no part of the run: once nobody reads it (`norm-matters train | head`), it goes quiet.

    Args:
        stream: where to; standard output by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._open = True
        self._val = ""

    def __enter__(self) -> "ConsoleProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __call__(self, event: "Progress") -> None:
        """Show one event."""
        if not self._open:
            return
        try:
            if event.kind == "start":
                say(event.message or "", self.stream)
            if self.stream.isatty():
                self._update(event)
            elif event.row is not None:
                print(epoch_line(event.row, event.epochs), file=self.stream, flush=True)
        except BrokenPipeError:
            self._open = False

    def _update(self, event: "Progress") -> None:
        """Move the bar, which counts epochs; the time left is that of the whole run, evaluation included."""
        if self._bar is None:
            self._bar = _new_bar(self.stream)
            self._task = self._bar.add_task("", total=event.epochs, completed=event.epoch - 1, numbers="")
            self._bar.start()
            # A second Ctrl-C ends the process at once, and could not bring a hidden cursor back.
            self._bar.console.show_cursor()
        assert self._task is not None
        done = event.epoch - 1.0
        numbers = ""
        if event.row is not None:
            done = event.epoch
            self._val = f", val error {event.row['val_error1']:.2f}%"
            numbers = _numbers(event.row["images_per_second"], event.row["train_loss"], event.row["train_error1"])
        elif event.kind == "batch":
            done += event.step / event.steps
            numbers = _numbers(event.images / event.seconds, event.loss, event.error1)
        epoch = f"epoch {event.epoch}/{event.epochs}"
        self._bar.update(self._task, description=epoch, completed=done, numbers=f"{numbers}{self._val}")


def _numbers(images_per_second: float, loss: float, error1: float) -> str:
    error = "" if math.isnan(error1) else f", error {error1:.2f}%"
    return f"{images_per_second:,.0f} images/s, loss {loss:.4f}{error}"


def _new_bar(stream: TextIO) -> "Bar":
    # Only a terminal needs rich, so only a terminal waits for its import.
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[numbers]}", markup=False),
        console=Console(file=stream),
        speed_estimate_period=300,
    )
