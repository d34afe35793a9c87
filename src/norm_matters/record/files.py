"""Every write of a run goes through here: atomic, durable, and a failure is one clear line.

A file or folder is written under a temporary name beside its final one, synced, renamed, and the rename is synced.
Whoever dies in between leaves the old version, or the new one, and perhaps something named `.tmp-*`.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from norm_matters.core.errors import StorageError
from norm_matters.core.faults import fault_point

TEMPORARY = ".tmp-"
# Runs may hold private names and paths: nobody outside the group reads them. The umask may take away more.
FILE_MODE = 0o640
FOLDER_MODE = 0o750
# The last, the best, and the one that is being written.
CHECKPOINTS_THAT_MUST_FIT = 3


@contextmanager
def storing(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError that names `path` and the reason.

    Args:
        needed: bytes that were to be written; told where the disk is full, if they are many.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            with suppress(OSError):
                needs = f", {needed / 1e6:.1f} MB needed" if needed >= 1e5 else ""
                reason += f" ({shutil.disk_usage(path.parent).free / 1e6:.1f} MB free there{needs})"
        raise StorageError(f"cannot write {path}: {reason}") from error


def write_file(path: Path, data: bytes | str, *, lasting: bool = True) -> None:
    """Write a whole file, replacing an older one in a single step.

    Args:
        path: its folder must exist.
        data: text is written as UTF-8.
        lasting: it must survive a power cut; otherwise nothing waits for the disk.

    Raises:
        StorageError: it could not be written; an older version is intact and nothing is left behind.
    """
    temporary, content = _temporary(path), data.encode() if isinstance(data, str) else data
    with storing(path, len(content)):
        try:
            _create_file(temporary, content, sync=lasting)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        if lasting:
            _sync_folder(path.parent)


@contextmanager
def stream_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file that is too large for memory, piece by piece; it replaces an older one when the block is done.

    Args:
        path: its folder must exist.

    Raises:
        StorageError: it could not be written; an older version is intact and nothing is left behind.
    """
    temporary = _temporary(path)
    with storing(path):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
            with open(descriptor, "wb", buffering=2**20) as stream:
                yield stream
                stream.flush()
                os.fsync(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_folder(path.parent)


def write_folder(path: Path, contents: Mapping[str, bytes]) -> None:
    """Write a folder of files that appears complete or not at all.

    Args:
        path: must not exist yet.
        contents: file name -> bytes.

    Raises:
        StorageError: it could not be written; nothing is left behind.
    """
    temporary = _temporary(path)
    with storing(path, sum(map(len, contents.values()))):
        try:
            os.mkdir(temporary, FOLDER_MODE)
            for name, data in contents.items():
                fault_point("save.part")
                _create_file(temporary / name, data)
            _sync_folder(temporary)
            fault_point("save.rename")
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_folder(path.parent)


def append_file(path: Path, data: bytes, *, header: bytes = b"") -> None:
    """Append to a file and sync it; `header` goes first where the file is new or empty.

    One write on an O_APPEND descriptor: a reader sees whole lines, whatever else is appended. After a failure the
    file has its old length again.

    Raises:
        StorageError: it could not be written.
    """
    with storing(path, len(data)):
        # Not through a link, which in the folder of a stranger's run could lead to any file of the user's.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, FILE_MODE)
        try:
            size = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, data if size else header + data)
                os.fsync(descriptor)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
        if not size:
            _sync_folder(path.parent)


def check_room(folder: Path, checkpoint: int) -> None:
    """Raise StorageError where a disk has no room for `CHECKPOINTS_THAT_MUST_FIT`: a run would end by it.

    Args:
        folder: on that disk; the nearest folder above it that exists is asked.
        checkpoint: bytes of one.
    """
    place = next(place for place in (folder, *folder.absolute().parents) if os.path.isdir(place))
    with storing(folder):
        free = shutil.disk_usage(place).free
    needed = CHECKPOINTS_THAT_MUST_FIT * checkpoint
    if free < needed:
        raise StorageError(
            f"{place}: {free / 1e6:.1f} MB are free, and {needed / 1e6:.1f} MB are needed, for "
            f"{CHECKPOINTS_THAT_MUST_FIT} checkpoints of {checkpoint / 1e6:.1f} MB each; make room, or choose another "
            "--output"
        )


def make_folder(path: Path) -> None:
    """Make a folder and its parents where they are missing.

    Raises:
        StorageError: it could not be made, or a file is in the way.
    """
    if os.path.isdir(path):  # unlike Path.is_dir, also where one may not look: to make it then says so
        return
    with storing(path):
        os.makedirs(path, FOLDER_MODE, exist_ok=True)
        _sync_folder(path.parent)


def make_own_folder(path: Path) -> None:
    """Make a folder where it is missing, and be sure that it is one: things are removed in it.

    Raises:
        StorageError: it could not be made, a file is in the way, or a link that may lead anywhere.
    """
    if os.path.islink(path):
        raise StorageError(f"cannot write {path}: it is a link; put the folder that it leads to in its place")
    make_folder(path)


def claim_folder(path: Path) -> bool:
    """Make a folder that nobody else made: of several processes that ask for the same one, a single one gets True.

    Raises:
        StorageError: it could not be made, for another reason than that it exists.
    """
    with storing(path):
        try:
            os.mkdir(path, FOLDER_MODE)
        except FileExistsError:
            return False
        _sync_folder(path.parent)
    return True


def replace_link(path: Path, target: str) -> None:
    """Make `path` a symbolic link to `target` (relative to the link), replacing an older link in a single step.

    A real folder in its place (links become folders when a run is copied with `cp -L`) is removed.

    Raises:
        StorageError: the link could not be made; an older one is intact.
    """
    temporary = _temporary(path)
    with storing(path):
        os.symlink(target, temporary)
        if path.is_dir() and not path.is_symlink():
            remove_folder(path)
        os.replace(temporary, path)
        _sync_folder(path.parent)


def remove_folder(path: Path) -> bool:
    """Remove a folder if it exists; links in it are removed, not followed.

    It is renamed first, so that no half of it is ever found under its name. A failure is no error: it costs only
    space, and `remove_temporaries` tries again.

    Returns:
        Whether nothing is found under its name any more.
    """
    temporary = _temporary(path)
    with suppress(OSError):
        os.rename(path, temporary)
    shutil.rmtree(temporary, ignore_errors=True)
    return not os.path.exists(path)


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes left in a folder. Only for the process that owns the folder."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                os.unlink(path)


def _temporary(path: Path) -> Path:
    """A name beside `path` that nobody else uses: process ids repeat across containers that share a disk."""
    return path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")


def _create_file(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write a new file, and wait until it is on the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        _write_all(descriptor, data)
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    """`os.write` may take only a part: 2 GiB at most, or what fits below a limit (the next call then says so)."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync folders and say EINVAL; they order renames themselves.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
