"""Who trains a run of a sweep: a lock (see `record.lock`) that a process takes before it becomes the training."""

import os
from pathlib import Path

from norm_matters.core.errors import RunInUseError
from norm_matters.record.lock import holder, take_lock

__all__ = ["IN_USE", "hold", "holder"]

IN_USE = RunInUseError.exit_status
"""Exit status of a process that finds its run in use."""


def hold(path: Path) -> str | None:
    """Take the lock for the rest of this process, whatever program it goes on with (`exec`).

    Returns:
        None, or who holds it already.

    Raises:
        StorageError: the file cannot be made.
    """
    descriptor, held_by = take_lock(path)
    if descriptor is not None:
        os.set_inheritable(descriptor, True)
    return held_by
