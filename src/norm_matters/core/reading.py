"""Reading whole files that strangers may have made: a pipe does not hang the reader, a device does not fill memory."""

import errno
import os
import stat
from pathlib import Path

from norm_matters.core.errors import UserError

APPENDED = 2**16


def kind_of(path: Path) -> int:
    """What is at a path, links followed: `stat.S_IFREG`, `stat.S_IFDIR` and so on; 0 where there is nothing.

    Raises:
        UserError: one may not look; `Path.is_file` and the like raise PermissionError then.
    """
    try:
        return stat.S_IFMT(os.stat(path).st_mode)
    except PermissionError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}") from error
    except (OSError, ValueError):  # too long for a name, a NUL in it: nothing has it
        return 0


def read_regular(path: Path, *, limit: int) -> bytes:
    """The bytes of a file.

    Args:
        limit: bytes of the largest file that is read.

    Raises:
        ValueError: it is a pipe, socket or device, or has more than `limit` bytes.
        OSError: as `open` raises it; IsADirectoryError for a folder.
    """
    # Without waiting for somebody to write into a pipe.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    try:
        facts = os.fstat(descriptor)
        if stat.S_ISDIR(facts.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("it is no regular file")
        if facts.st_size > limit:
            raise ValueError(f"{facts.st_size:,} bytes; {limit:,} are the limit")
        with open(descriptor, "rb", closefd=False) as stream:
            # As much room as there are bytes, and what somebody may append meanwhile.
            data = stream.read(min(facts.st_size + APPENDED, limit + 1))
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise ValueError(f"more than {limit:,} bytes")
    return data
