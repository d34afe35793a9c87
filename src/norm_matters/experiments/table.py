"""A sweep on the console: a table that follows all runs on a terminal, a line per event anywhere else."""

import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from norm_matters.experiments.pace import START_SECONDS, Pace, seconds_left, show_seconds
from norm_matters.experiments.runner import Run
from norm_matters.experiments.summary import Measure
from norm_matters.progress import printable, say

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

_STYLES = {"done": "green", "failed": "bold red", "running": "cyan", "elsewhere": "magenta"}
_FIRST = ("failed", "running", "elsewhere", "queued", "done", "cut off", "new")
_AROUND = 6  # lines of a terminal that are not the table's rows
_REFRESH = 0.5


class SweepTable:
    """Shows the runs of a sweep (`runner.OnChange`). A context manager, so that the terminal is always left well.

    Args:
        measure: whose best value is shown.
        pace: what is known of the time of epochs; learns while the sweep goes on.
        parallel: how many runs there are side by side.
        stream: where to; standard output by default.
    """

    def __init__(self, measure: Measure, pace: Pace, parallel: int, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self._measure = measure
        self._pace = pace
        self._parallel = parallel
        self._live: Live | None = None
        self._open = True
        self._begun = self._drawn = time.monotonic()
        self._known: dict[str, int] = {}
        self._starts: list[float] = []

    def __enter__(self) -> "SweepTable":
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(self, runs: Sequence[Run], changed: Run | None) -> None:
        """Show where the runs stand."""
        self._learn(runs, changed)
        if not self._open:
            return
        try:
            if self.stream.isatty():
                self._draw(runs, changed)
            elif changed is not None and changed.status != "queued":
                say(self._line(runs, changed), self.stream)
        except BrokenPipeError:
            self._open = False

    def _learn(self, runs: Sequence[Run], changed: Run | None) -> None:
        """Take the time of the epochs that have ended since."""
        for run in runs:
            known = self._known.setdefault(run.cell.name, run.found)
            if run.epoch > known:
                self._pace.add(run.cell.config, run.rows[known:])
                self._known[run.cell.name] = run.epoch
        if changed is not None and changed.status == "done" and changed.started is not None:
            trained = math.fsum(row["seconds"] or 0.0 for row in changed.rows[changed.found :])
            self._starts.append(max(0.0, time.monotonic() - changed.started - trained))

    def _line(self, runs: Sequence[Run], run: Run) -> str:
        count = Counter(each.status for each in runs)
        text = f"[{count['done'] + count['failed']}/{len(runs)}] {run.cell.name}: "
        if run.status == "running":
            text += "resumed after epoch " + str(run.epoch) if run.epoch else "started"
        elif run.status == "done":
            last = run.rows[-1][self._measure.metric]
            text += f"done, {self._measure.metric} {_number(last)}"
            text += f" (best {_number(self._measure.best(run.rows)[0])}), {_speed(run)} images/s"
        elif run.status == "elsewhere":
            text += f"left to {run.holder or 'another process'}"
        elif run.status == "failed":
            text += f"failed: {run.error}"
        else:
            text += f"{run.status}: {run.error}" if run.error else run.status
        return text + (f"; {left}" if run.ended and (left := self._left(runs)) else "")

    def _left(self, runs: Sequence[Run]) -> str:
        """The time that is left, from measured epochs; nothing where there are none."""
        work = [(run.cell, run.cell.epochs - run.epoch) for run in runs if not run.ended]
        start = sum(self._starts) / len(self._starts) if self._starts else START_SECONDS
        seconds = seconds_left(work, self._pace, self._parallel, start)
        return f"about {show_seconds(seconds)} left" if seconds else ""

    def _draw(self, runs: Sequence[Run], changed: Run | None) -> None:
        now = time.monotonic()
        if self._live is not None and changed is None and now - self._drawn < _REFRESH:
            return
        self._drawn = now
        # Only a terminal needs rich, so only a terminal waits for its import.
        if self._live is None:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self.stream), auto_refresh=False)
            self._live.start()
        if changed is not None and changed.status == "failed":
            # Above the table, where it has room, and stays.
            line = printable(self._line(runs, changed))
            self._live.console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
        self._live.update(self._table(runs, self._live.console.height - _AROUND), refresh=True)

    def _table(self, runs: Sequence[Run], height: int) -> "Table":
        """The table; where it is too high for the terminal, what has nothing to tell is counted only."""
        from rich.table import Table
        from rich.text import Text

        count = Counter(run.status for run in runs)
        parts = [f"{count[status]} {status}" for status in _FIRST if count[status]]
        caption = ", ".join([*parts, f"{show_seconds(time.monotonic() - self._begun)} so far", self._left(runs)])
        table = Table(caption=caption.removesuffix(", "), caption_justify="left", box=None, pad_edge=False)
        for title in ("run", "state"):
            table.add_column(title, overflow="ellipsis", no_wrap=True)
        for title in ("epoch", f"best {self._measure.metric}", "images/s"):
            table.add_column(title, justify="right", no_wrap=True)
        by_interest = sorted(runs, key=lambda run: _FIRST.index(run.status))
        shown = {run.cell.name for run in by_interest[: max(1, height)]}
        for run in runs:
            if run.cell.name not in shown:
                continue
            table.add_row(
                run.cell.name,
                Text(run.status, _STYLES.get(run.status, "")),
                f"{run.epoch}/{run.cell.epochs}",
                _number(self._measure.best(run.rows)[0]),
                _speed(run),
            )
        if len(shown) < len(runs):
            table.add_row(f"... and {len(runs) - len(shown)} more", "", "", "", "")
        return table


def _number(value: Any) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _speed(run: Run) -> str:
    speed = run.rows[-1].get("images_per_second") if run.rows else None
    return "" if speed is None else f"{speed:,.0f}"
