"""The process of one run of a sweep: `python -m norm_matters.experiments.start`, wherever an executor starts it.

It takes the run's lock, sees under the lock whether the run is new, cut off or done, and becomes
`python -m norm_matters train` (the same process, by `exec`, so that lock and signals stay with the training).
"""

import argparse
import ctypes
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from norm_matters.experiments.locks import IN_USE, hold
from norm_matters.experiments.standing import is_done, remove_unborn
from norm_matters.record.folder import is_run
from norm_matters.record.provenance import without_secrets

_PR_SET_PDEATHSIG = 1
# What tells a process that it is one of several of a run (see core.ranks): a run of a sweep is one process, wherever
# the sweep itself was started.
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_RESTART_COUNT")
_TRIES = 10  # whoever only looks at a lock holds it for an instant


def main(argv: Sequence[str] | None = None) -> int:
    """Take the lock and become the training; returns an exit status where there is nothing to train."""
    arguments = parse(argv)
    folder: Path = arguments.folder
    # Background shells have their children ignore Ctrl-C, and ray blocks it; Python would leave it so.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    if not _tie_to_parent(arguments.parent):
        return 128 + signal.SIGINT
    if arguments.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core) for core in arguments.cores.split(",")})
    holder = _hold(arguments.lock)
    if holder:
        print(f"error: '{folder}' is in use by {holder}", file=sys.stderr)
        return IN_USE
    if is_done(folder, arguments.epochs):
        return 0
    command = train_command(folder, arguments.settings)
    if not is_run(folder):
        remove_unborn(folder)
    for name in _RANKS:
        os.environ.pop(name, None)
    announce(command)
    return os.execv(sys.executable, [sys.executable, "-P", "-m", "norm_matters", *command])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """What a process of a run is told."""
    parser = argparse.ArgumentParser(prog="norm_matters.experiments.start")
    parser.add_argument("--parent", type=int, required=True, help="process that started this one")
    parser.add_argument("--cores", default="", help="such as 0,1")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--lock", type=Path, required=True)
    parser.add_argument("folder", type=Path)
    parser.add_argument("settings", nargs="*")
    return parser.parse_args(argv)


def train_command(folder: Path, settings: Sequence[str]) -> list[str]:
    """The command that makes a run of a folder, or goes on with it."""
    if is_run(folder):
        return ["train", "--resume", str(folder), *settings]
    return ["train", *settings, "--output", str(folder.parent), "--name", folder.name]


def announce(command: Sequence[str]) -> None:
    """Say, for the log, what is run; `runner` looks for this line."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    print(f"{now} process {os.getpid()}: norm-matters {shlex.join(without_secrets(command))}", flush=True)


def _hold(lock: Path) -> str | None:
    holder = hold(lock)
    for _ in range(_TRIES):
        if holder is None:
            break
        time.sleep(0.1)
        holder = hold(lock)
    return holder


def _tie_to_parent(parent: int) -> bool:
    """Have this process interrupted, as by Ctrl-C, when the one that started it dies; False where that has happened.

    Where the system cannot (it is Linux's), a run goes on without its sweep; its lock keeps others off.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
    return os.getppid() == parent


if __name__ == "__main__":
    sys.exit(main())
