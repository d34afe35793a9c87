"""Who trains a run: a lock that its process holds itself, so that it lasts exactly as long as the process.

A POSIX record lock: it survives `exec`, no child inherits it, the kernel frees it when the process dies in any way,
and it works across machines where the file system's locks do (NFS). It is lost when the process closes any descriptor
of the file, so whoever holds a lock never looks at it again.
"""

import fcntl
import os
import socket
from pathlib import Path

from norm_matters.record.files import FILE_MODE, storing

IN_USE = 73
"""Exit status of a process that finds its run in use."""


def hold(path: Path) -> str | None:
    """Take the lock for the rest of this process, whatever program it goes on with (`exec`).

    Returns:
        None, or who holds it already.

    Raises:
        StorageError: the file cannot be made, or the file system has no locks.
    """
    with storing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, FILE_MODE)
        if not _try(descriptor):
            held_by = _holder(descriptor)
            os.close(descriptor)
            return held_by
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        os.set_inheritable(descriptor, True)
    return None


def holder(path: Path) -> str | None:
    """Who holds the lock; None where nobody does. Not for the process that holds it.

    Raises:
        StorageError: the file system has no locks.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        with storing(path):
            return None if _try(descriptor) else _holder(descriptor)
    finally:
        os.close(descriptor)


def _try(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # either, by POSIX
        return False
    return True


def _holder(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
