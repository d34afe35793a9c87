"""The lock of a run folder: one writer, named; gone with its process, whatever it leaves behind; readers need none."""

import errno
import fcntl
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from norm_matters.core.errors import RunInUseError, StorageError
from norm_matters.record.lock import LOCK_FILE, held, holder


@contextmanager
def other_process(action: Callable[[], None]) -> Iterator[int]:
    """A forked process that has done something and lives on, inside."""
    come, go = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        try:
            action()
            os.write(come[1], b"x")
            os.close(go[1])
            os.read(go[0], 1)
        finally:
            os._exit(0)
    os.close(come[1])
    assert os.read(come[0], 1) == b"x"
    try:
        yield pid
    finally:
        for descriptor in (come[0], *go):
            os.close(descriptor)
        os.waitpid(pid, 0)


def test_a_second_process_is_kept_out_and_told_by_whom(tmp_path: Path) -> None:
    lock = held(tmp_path)
    with other_process(lambda: assert_true(lock.__enter__())) as pid:
        words = rf"'{tmp_path}' is in use by process {pid} on {re.escape(socket.gethostname())} since \d{{4}}-.*Z$"
        with pytest.raises(RunInUseError, match=words) as caught, held(tmp_path):
            pass
        assert caught.value.exit_status == 73
        assert (holder(tmp_path / LOCK_FILE) or "").startswith(f"process {pid} on ")
    assert holder(tmp_path / LOCK_FILE) is None
    with held(tmp_path) as locked:
        assert locked


def assert_true(value: object) -> None:
    assert value is True


def test_a_killed_holder_keeps_nobody_out(tmp_path: Path) -> None:
    lock = held(tmp_path)
    with other_process(lambda: assert_true(lock.__enter__())) as pid:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with held(tmp_path):
            pass


def test_a_worker_that_outlives_its_trainer_does_not_keep_the_lock(tmp_path: Path) -> None:
    """The worker has inherited the descriptor; a lock by `flock` would live on with it."""
    told, lock = tmp_path / "worker", held(tmp_path)

    def trainer() -> None:
        lock.__enter__()
        worker = os.fork()
        if not worker:
            signal.pause()
        told.write_text(str(worker))

    with other_process(trainer) as pid:
        assert_refused(tmp_path)
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        worker = int(told.read_text())
        try:
            os.kill(worker, 0)  # it is alive
            with held(tmp_path):
                pass
        finally:
            os.kill(worker, signal.SIGKILL)


def test_a_look_takes_nothing_and_a_worker_gives_nothing_up(tmp_path: Path) -> None:
    with held(tmp_path):
        with other_process(lambda: assert_true(holder(tmp_path / LOCK_FILE) is not None)):
            pass

        def worker() -> None:
            # As at a worker's end: its copies of all descriptors are closed.
            os.closerange(3, 64)

        pid = os.fork()
        if not pid:
            worker()
            os._exit(0)
        os.waitpid(pid, 0)
        with other_process(lambda: assert_refused(tmp_path)):
            pass


def assert_refused(folder: Path) -> None:
    with pytest.raises(RunInUseError), held(folder):
        pass


def test_two_runs_of_one_process_keep_each_other_out(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with held(tmp_path):
        with pytest.raises(RunInUseError, match=rf"another run in this process \({os.getpid()}\)"), held(tmp_path):
            pass
        with pytest.raises(RunInUseError), held(tmp_path / "link"):
            pass
        with other_process(lambda: assert_refused(tmp_path)):
            pass  # what was refused here has not given the lock up
    with held(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with held(tmp_path) as locked:
        assert not locked


def test_a_lock_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"cannot write .*no/\.lock: No such file"), held(tmp_path / "no"):
        pass

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(StorageError, match="Input/output error"), held(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b'{"pid": "x", "host": 1, "since": 2}', b"\xff" * 2000, b"[]"])
def test_a_holder_that_says_nothing_of_itself_is_another_process(tmp_path: Path, content: bytes) -> None:
    kept, lock = list[int](), held(tmp_path)

    def hold() -> None:
        lock.__enter__()
        # Kept open: closing any descriptor of the file would give the lock up.
        kept.append(os.open(tmp_path / LOCK_FILE, os.O_WRONLY | os.O_TRUNC))
        os.write(kept[0], content)

    with other_process(hold), pytest.raises(RunInUseError, match=r"in use by another process$"), held(tmp_path):
        pass
