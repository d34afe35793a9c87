"""Runs cells through an executor until each is done or has failed, whoever else works on the same folder."""

import os
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from norm_matters.core.errors import NumericalError, PreemptedError, UserError
from norm_matters.experiments.cells import Cell
from norm_matters.experiments.executors.base import Executor, Job, Task, thread_variables
from norm_matters.experiments.locks import IN_USE
from norm_matters.experiments.standing import (
    LOCKS,
    Standing,
    Status,
    is_done,
    lock_path,
    log_path,
    read_rows,
    trained_by,
)
from norm_matters.experiments.summary import Outcome
from norm_matters.record.files import make_folder
from norm_matters.record.folder import CHECKPOINTS, LAST, is_run

POLL = 0.2
"""Seconds between two looks at the jobs."""
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass
class Run:
    """A cell on its way.

    Attributes:
        status: where it stands.
        rows: of its results.csv, as last read.
        started: time (monotonic) of its start here; None before that.
        found: epochs that it had when the sweep began.
        error: the last error line and where the log is.
        starts: how often it was started here.
        holder: who trains it, where that is not this sweep.
        saved: where its last checkpoint was when it was started last; None before there is one.
    """

    cell: Cell
    status: Status
    rows: list[dict[str, Any]]
    found: int
    started: float | None = None
    error: str = ""
    starts: int = 0
    holder: str | None = None
    saved: str | None = None
    job: Job | None = field(default=None, repr=False)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return int(self.rows[-1]["epoch"]) if self.rows else 0

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to it."""
        return self.status in ("done", "failed")

    def outcome(self) -> Outcome:
        """How it ended, or how far it came."""
        return Outcome(self.cell, self.status, self.rows, self.error)


OnChange = Callable[[Sequence[Run], Run | None], None]
"""Called with all runs, and with the one whose status has changed; with None now and then, for what is measured."""


def runs_of(standings: Sequence[Standing]) -> list[Run]:
    """What a sweep begins with."""
    return [
        Run(standing.cell, standing.status, standing.rows, len(standing.rows), holder=standing.holder)
        for standing in standings
    ]


def run_cells(
    runs: Sequence[Run],
    output: Path,
    executor: Executor,
    *,
    threads: int = 1,
    retries: int = 0,
    after: Mapping[str, Sequence[str]] | None = None,
    on_change: OnChange | None = None,
) -> None:
    """Bring all runs to their end; those that another process trains are waited for, and taken over if it dies.

    Args:
        runs: changed in place; whatever ends this function, they tell how far each came.
        output: folder of the runs.
        threads: of each process.
        retries: how often a run that failed is started again; one that diverged is not.
        after: name of a run -> those of `runs` that must be done before it starts.

    Raises:
        KeyboardInterrupt: passed on, after the processes have been ended cleanly.
        UserError: the executor takes not even one run.
    """
    assert {name for names in (after or {}).values() for name in names} <= {run.cell.name for run in runs}
    make_folder(output / LOCKS)
    environment = thread_variables(threads)
    waiting = deque(run for run in runs if run.status in ("new", "cut off"))
    tell = on_change or (lambda _runs, _run: None)
    room = executor.capacity
    try:
        while not all(run.ended for run in runs):
            active = [run for run in runs if run.job]
            if len(active) < room:
                room = executor.capacity
            for run in _give_up(waiting, runs, after or {}):
                tell(runs, run)
            while len(active) < room and (run := _next_ready(waiting, runs, after or {})):
                # Before the start, during which an executor may train it.
                saved, started = _last_saved(output / run.cell.name), time.monotonic()
                try:
                    run.job = executor.start(_task(run.cell, output, environment))
                except UserError:
                    if not active:
                        raise
                    # A queue that is full, most likely: there is room again when a job has ended.
                    waiting.appendleft(run)
                    room = len(active)
                    break
                run.starts, run.started, run.saved = run.starts + 1, started, saved
                run.status = "queued"
                active.append(run)
                tell(runs, run)
            for run in active:
                if _look_at_job(run, output, retries):
                    tell(runs, run)
                if run.status in ("new", "cut off"):
                    waiting.append(run)
            for run in runs:
                if run.status == "elsewhere" and _look_elsewhere(run, output):
                    tell(runs, run)
                    if run.status == "cut off":
                        waiting.append(run)
            tell(runs, None)
            # Many jobs are looked at less often: their files may lie on a disk that many share.
            time.sleep(max(POLL, 0.02 * len(active)))
    except BaseException:
        executor.stop([run.job for run in runs if run.job])
        for run in runs:
            if not run.ended:
                _look_at_last(run, output)
        raise


def _next_ready(waiting: deque[Run], runs: Sequence[Run], after: Mapping[str, Sequence[str]]) -> Run | None:
    """Take the first waiting run out of the queue that has nothing to wait for; None where there is none."""
    done = {run.cell.name for run in runs if run.status == "done"}
    for run in waiting:
        if done.issuperset(after.get(run.cell.name, ())):
            waiting.remove(run)
            return run
    return None


def _give_up(waiting: deque[Run], runs: Sequence[Run], after: Mapping[str, Sequence[str]]) -> list[Run]:
    """Take the waiting runs out of the queue that wait for one that has failed; they have failed too."""
    failed = {run.cell.name for run in runs if run.status == "failed"}
    lost = [run for run in waiting if failed.intersection(after.get(run.cell.name, ()))]
    for run in lost:
        waiting.remove(run)
        first = next(name for name in after[run.cell.name] if name in failed)
        run.status, run.error = "failed", f"it comes after {first}, which failed"
    return lost


def _look_at_job(run: Run, output: Path, retries: int) -> bool:
    """Bring a run up to date with its job; whether its status has changed."""
    folder, before = output / run.cell.name, run.status
    assert run.job
    # Asked before the files are read: what has ended writes nothing more.
    exit_status = run.job.status()
    run.rows = read_rows(folder)
    if exit_status is None:
        run.status = "running" if folder.is_dir() else "queued"
        return run.status != before
    run.job = None
    if is_done(folder, run.cell.epochs):
        run.status, run.error = "done", ""
    elif exit_status == IN_USE:
        run.status, run.holder = "elsewhere", trained_by(run.cell, output)
    elif exit_status == PreemptedError.exit_status and _last_saved(folder) != run.saved:
        # It was asked to stop, or its time was over, and it came further: no failure.
        run.status, run.starts = "cut off", run.starts - 1
    else:
        run.error = _last_error(log_path(output, run.cell), exit_status)
        # Numbers that are not finite come again to the bit.
        again = run.starts <= retries and exit_status != NumericalError.exit_status
        run.status = "cut off" if again else "failed"
    return True


def _look_at_last(run: Run, output: Path) -> None:
    """Bring a run up to date for which nothing more is done."""
    folder = output / run.cell.name
    run.job, run.rows = None, read_rows(folder)
    if is_done(folder, run.cell.epochs):
        run.status = "done"
    elif run.status != "elsewhere":
        run.status = "cut off" if is_run(folder) else "new"


def _last_saved(folder: Path) -> str | None:
    """The name of a run's last checkpoint; None where there is none."""
    try:
        return os.readlink(folder / CHECKPOINTS / LAST)
    except OSError:
        return None


def _look_elsewhere(run: Run, output: Path) -> bool:
    """See whether a run that another process trains is done, or free; whether its status has changed."""
    folder = output / run.cell.name
    run.rows = read_rows(folder)
    run.holder = trained_by(run.cell, output)
    if run.holder:
        return False
    run.status = "done" if is_done(folder, run.cell.epochs) else "cut off"
    return True


def _task(cell: Cell, output: Path, environment: Mapping[str, str]) -> Task:
    output = output.resolve()
    options = ("--epochs", str(cell.epochs), "--lock", str(lock_path(output, cell)), str(output / cell.name))
    return Task(cell.name, (*options, *cell.overrides()), environment, str(log_path(output, cell)), os.getcwd())


def _last_error(log: Path, exit_status: int) -> str:
    """The last line that tells of an error, else the last line, with the exit status and the place of the log."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - 65536))
            lines = [_ANSI.sub("", line).strip() for line in stream.read().decode(errors="replace").splitlines()]
    except OSError:
        lines = []
    lines = [line for line in lines if line]
    # Only what came after the last start: a log has all of them.
    starts = [index for index, line in enumerate(lines) if ": norm-matters train " in line]
    lines = lines[starts[-1] + 1 :] if starts else lines
    told = [line for line in lines if line.startswith("error: ")] or lines[-1:] or ["it printed nothing"]
    how = f"signal {-exit_status}" if exit_status < 0 else f"exit status {exit_status}"
    return f"{told[-1].removeprefix('error: ')} ({how}; {log})"
