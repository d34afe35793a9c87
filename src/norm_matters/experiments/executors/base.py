"""What an executor is, and the one way in which all of them start a process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from norm_matters.record.files import FILE_MODE, make_folder, storing

LAUNCHER = "norm_matters.experiments.start"
LOST = 70
"""Exit status told for a task that ended without one: cancelled, out of time, or its machine died."""


@dataclass(frozen=True)
class Task:
    """A process to start, in plain data.

    Attributes:
        name: of the run.
        arguments: of `LAUNCHER`, but for `--parent`.
        environment: variables to set.
        log: file that takes what it prints.
        folder: to work in.
    """

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    log: str
    folder: str


class Job(Protocol):
    """A task that was started."""

    def status(self) -> int | None:
        """Exit status as subprocess has it; None while it waits or runs. A number other than 0 where it was lost."""
        ...


class Executor(Protocol):
    """Starts tasks somewhere.

    Attributes:
        capacity: how many to start before one has ended.
    """

    capacity: int

    def start(self, task: Task) -> Job:
        """Start a task, or put it into a queue that will; UserError where it is not taken."""
        ...

    def stop(self, jobs: Sequence[Job]) -> None:
        """End jobs as Ctrl-C ends a training, and wait for them."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


def thread_variables(threads: int) -> dict[str, str]:
    """What tells a process how many threads to compute with.

    The same number everywhere, so that runs are equal to the bit wherever they run.
    """
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))


def spawn(task: Task, *options: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a task's process on this machine, in a process group of its own.

    A terminal's Ctrl-C thus reaches the sweep alone, which passes it on once.

    Args:
        options: further ones of `LAUNCHER`.
        environment: further variables.

    Raises:
        StorageError: the log cannot be written.
    """
    descriptor = open_log(Path(task.log))
    try:
        return subprocess.Popen(
            # -P: the folder that it is started in may be full of a stranger's files, modules among them.
            [sys.executable, "-P", "-m", LAUNCHER, "--parent", str(os.getpid()), *options, *task.arguments],
            env={**os.environ, **task.environment, **(environment or {})},
            cwd=task.folder,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            process_group=0,
        )
    finally:
        os.close(descriptor)


def open_log(path: Path) -> int:
    """A descriptor that appends to the log of a task.

    Raises:
        StorageError: it cannot be written.
    """
    make_folder(path.parent)
    with storing(path):
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, FILE_MODE)


def first_line(error: Exception) -> str:
    """What a library's error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """Send Ctrl-C's signal to a process of `spawn` and its workers, unless it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)


def run_task(name: str, arguments: Sequence[str], environment: Mapping[str, str], log: str, folder: str) -> int:
    """Run a task to its end on whatever machine this is called; what submitit and ray send there.

    A plain function of plain arguments, since both of them pickle what they send.

    Returns:
        its exit status.
    """
    process = spawn(Task(name, tuple(arguments), environment, log, folder))
    try:
        # Not `wait()`: ray interrupts a task without a signal, which would not wake it.
        while process.poll() is None:
            time.sleep(0.1)
        return process.returncode
    except BaseException:
        interrupt(process)
        process.wait()
        raise
