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

TEMPORARY = ".tmp-"
# Runs may hold private names and paths: nobody outside the group reads them. The umask may take away more.
FILE_MODE = 0o640
FOLDER_MODE = 0o750


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError that names `path` and the reason."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            with suppress(OSError):
                reason += f" ({shutil.disk_usage(path.parent).free / 1e6:.1f} MB free there)"
        raise StorageError(f"cannot write {path}: {reason}") from error


def write_file(path: Path, data: bytes | str) -> None:
    """Write a whole file, replacing an older one in a single step.

    Args:
        path: its folder must exist.
        data: text is written as UTF-8.

    Raises:
        StorageError: it could not be written; an older version is intact and nothing is left behind.
    """
    temporary = _temporary(path)
    with storing(path):
        try:
            _create_file(temporary, data.encode() if isinstance(data, str) else data)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
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
    with storing(path):
        try:
            os.mkdir(temporary, FOLDER_MODE)
            for name, data in contents.items():
                _create_file(temporary / name, data)
            _sync_folder(temporary)
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
    with storing(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
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


def make_folder(path: Path) -> None:
    """Make a folder and its parents where they are missing.

    Raises:
        StorageError: it could not be made, or a file is in the way.
    """
    if path.is_dir():
        return
    with storing(path):
        os.makedirs(path, FOLDER_MODE, exist_ok=True)
        _sync_folder(path.parent)


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


def remove_folder(path: Path) -> None:
    """Remove a folder if it exists; links in it are removed, not followed.

    It is renamed first, so that no half of it is ever found under its name. A failure is no error: it costs only
    space, and `remove_temporaries` tries again.
    """
    temporary = _temporary(path)
    with suppress(OSError):
        os.rename(path, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes left in a folder. Only for the process that owns the folder."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                os.unlink(path)


def _temporary(path: Path) -> Path:
    """A name beside `path` that nobody else uses: process ids repeat across containers that share a disk."""
    return path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")


def _create_file(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        _write_all(descriptor, data)
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
