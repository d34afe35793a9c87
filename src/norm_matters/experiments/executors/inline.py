"""Runs in this very process, one after the other: for many that are so short that starting a process takes longer."""

import contextlib
import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from norm_matters.core import stopping
from norm_matters.core.config import load_config
from norm_matters.core.errors import UserError
from norm_matters.experiments import start
from norm_matters.experiments.executors.base import Executor, Job, Task, open_log
from norm_matters.experiments.locks import IN_USE, hold
from norm_matters.experiments.standing import is_done, remove_unborn
from norm_matters.record.folder import is_run


@final
@dataclass(frozen=True)
class InlineJob(Job):
    """A run that has ended."""

    exit_status: int

    def status(self) -> int:
        """See `Job`."""
        return self.exit_status


@final
class InlineExecutor(Executor):
    """Trains while `start` is called; what it prints goes to the log as from a process.

    Locks are of processes: this one holds those of all its runs to its end.

    Args:
        threads: to compute with, for the time of each run.
    """

    capacity = 1

    def __init__(self, *, threads: int) -> None:
        self._threads = threads

    def start(self, task: Task) -> InlineJob:
        """See `Executor`."""
        log = os.fdopen(open_log(Path(task.log)), "a")
        with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            return InlineJob(self._train(task))

    def stop(self, jobs: Sequence[Job]) -> None:
        """See `Executor`: what has been started has ended."""

    def close(self) -> None:
        """See `Executor`."""

    def _train(self, task: Task) -> int:
        """Do what the process of a run does (`experiments.start`)."""
        import torch

        arguments = start.parse(["--parent", str(os.getpid()), *task.arguments])
        held_by = hold(arguments.lock)
        if held_by:
            print(f"error: '{arguments.folder}' is in use by {held_by}")
            return IN_USE
        if is_done(arguments.folder, arguments.epochs):
            return 0
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            # Around the run, so that a signal that ends it is not forgotten with it.
            with stopping.listening(*stopping.PREEMPTING):
                status = _status_of_run(arguments.folder, arguments.settings)
                if stopping.requested():
                    # It is the sweep that has been asked to end.
                    raise KeyboardInterrupt
                return status
        finally:
            torch.set_num_threads(before)


def _status_of_run(folder: Path, settings: Sequence[str]) -> int:
    """Train; the exit status of a process that had done it."""
    try:
        _train_or_resume(folder, settings)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}")
        return error.exit_status
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _train_or_resume(folder: Path, settings: Sequence[str]) -> None:
    from norm_matters import run

    command = start.train_command(folder, settings)
    start.announce(command)
    if is_run(folder):
        run.resume(folder, overrides=settings, command=["norm-matters", *command])
        return
    remove_unborn(folder)
    options = {"output": str(folder.parent), "name": folder.name}
    run.train(load_config(options=options, overrides=settings, checks=run.CHECKS), command=["norm-matters", *command])
