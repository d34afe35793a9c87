"""Who writes a run folder: a lock that its process holds, so that it lasts exactly as long as the process.

A POSIX record lock: it survives `exec`, no forked worker inherits it, the kernel frees it when the process dies in any
way, and it works across machines where the file system's locks do (NFS). It is lost when the process closes any
descriptor of the file, so whoever holds a lock never looks at it again. Readers need none.
"""

import errno
import fcntl
import json
import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from norm_matters.core.errors import RunInUseError
from norm_matters.record.files import FILE_MODE, storing

LOCK_FILE = ".lock"
# What systems say where a file system has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# `struct flock` of 64-bit Linux: type, whence, start, length, pid.
_FLOCK = "hhqqi4x"
# A record lock does not keep its own process out: these folders have a run in this one.
_held: set[Path] = set()


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold the lock of a run folder.

    Yields:
        False where the file system has no locks: then nobody is kept out.

    Raises:
        RunInUseError: another process has it, or another run in this one; it is named.
        StorageError: the lock's file cannot be made.
    """
    folder = folder.resolve()
    if folder in _held:
        raise RunInUseError(f"'{folder}' is in use by another run in this process ({os.getpid()})")
    descriptor, held_by = take_lock(folder / LOCK_FILE)
    if held_by:
        raise RunInUseError(f"'{folder}' is in use by {held_by}")
    _held.add(folder)
    try:
        yield descriptor is not None
    finally:
        _held.discard(folder)
        if descriptor is not None:
            os.close(descriptor)


def take_lock(path: Path) -> tuple[int | None, str | None]:
    """Take a lock, until the descriptor is closed or the process ends.

    Args:
        path: the lock's file. It is made where it is missing, and nobody removes it: else two could each hold a file
            of that name.

    Returns:
        The descriptor, None where the file system has no locks; or who has the lock: process, machine, since when.

    Raises:
        StorageError: the file cannot be made.
    """
    with storing(path):
        # Not through a link, which could lead to any file of the user's: it is emptied.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _own_words(), 0)
        except OSError as error:
            taken = isinstance(error, BlockingIOError | PermissionError)  # either, by POSIX
            held_by = _words_of(descriptor) if taken else None
            os.close(descriptor)
            if not taken and error.errno not in _NO_LOCKS:
                raise
            return None, held_by
    return descriptor, None


def holder(path: Path) -> str | None:
    """Who holds a lock, in words; None where nobody does. Not for the process that does: it would lose it.

    On Linux a look takes nothing, so that whoever wants the lock meanwhile gets it.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return _words_of(descriptor) if _is_taken(descriptor) else None
    finally:
        os.close(descriptor)


def _is_taken(descriptor: int) -> bool:
    """Whether another process has the lock of an open file."""
    with suppress(OSError):
        if sys.platform == "linux" and struct.calcsize("P") == 8:
            question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, question)
            return struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
    return False


def _own_words() -> bytes:
    since = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode()


def _words_of(descriptor: int) -> str:
    """What the holder of a lock has written of itself."""
    try:
        found = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {int(found['pid'])} on {found['host']!s} since {found['since']!s}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # it has just taken it
