"""Whenever a save is cut off, by a kill, a full disk or a power cut, `last` and `best` lead to whole checkpoints."""

import errno
import os
import re
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from norm_matters.core.errors import StorageError
from norm_matters.record import files as files_module
from norm_matters.record import find_checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint

PRIMITIVES = {"open", "write", "fsync", "replace", "rename", "mkdir", "makedirs", "symlink", "unlink", "ftruncate"}


def _unlink_one(folder: Path) -> None:
    """A removal that got as far as its first file; a folder may be empty, where a kill came before its first."""
    for file in list(folder.iterdir())[:1]:
        file.unlink()


class KilledError(BaseException):
    """The process is gone: nothing catches this, and whatever cleans up on its way fails in the same manner."""


class Disk:
    """Stands in for `os` and `shutil` in record.files and counts the calls that touch the disk.

    The n-th one fails: `fault` is an errno (that one call fails), or None (it and all later calls raise
    KilledError, and of a write or a removal the first half is done).
    """

    disk_usage = staticmethod(shutil.disk_usage)

    def __init__(self, n=10**9, fault=None):
        self.n, self.fault, self.calls = n, fault, []

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in PRIMITIVES:
            return real

        def primitive(*arguments, **options):
            target = arguments[0]
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
            half = (
                (lambda: os.write(target, bytes(arguments[1][: len(arguments[1]) // 2]))) if name == "write" else None
            )
            self._touch(name, path, half)
            self.calls[-1] += tuple(map(str, arguments[1:2]))
            return real(*arguments, **options)

        return primitive

    def rmtree(self, path, ignore_errors):
        assert ignore_errors
        self._touch("rmtree", str(path), lambda: _unlink_one(Path(path)), silent=True)
        shutil.rmtree(path, ignore_errors=True)

    def _touch(self, name, path, half, silent=False):
        self.calls.append((name, path))
        if len(self.calls) == self.n and half and Path(path).exists():
            half()
        if len(self.calls) >= self.n and self.fault is None:
            raise KilledError
        if len(self.calls) == self.n and not silent:
            raise OSError(self.fault, os.strerror(self.fault))


@pytest.fixture
def disk(monkeypatch):
    def install(n=10**9, fault=None):
        disk = Disk(n, fault)
        monkeypatch.setattr(files_module, "os", disk)
        monkeypatch.setattr(files_module, "shutil", disk)
        return disk

    return install


def new_run(folder):
    folder.mkdir()
    (folder / "config.yaml").write_text("")
    (folder / "provenance.json").write_text("{}")
    return folder


def save(run, step, best):
    model = {"weight": torch.full((100,), float(step))}
    return save_checkpoint(run, step=step, model=model, training={"m": model["weight"] / 3}, state={}, best=best)


def save_three(run):
    """The best, one that the next save removes, and the last."""
    save(run, 10, True)
    save(run, 15, False)
    save(run, 20, False)


def step_of(run, prefer):
    checkpoint = load_checkpoint(find_checkpoint(run, prefer))
    assert set(checkpoint.model["weight"].tolist()) == {checkpoint.step}
    return checkpoint.step


def assert_clean(run):
    """There are the two newest and the best, and nothing that a kill has left."""
    names = {path.name for path in (run / "checkpoints").iterdir()}
    steps = sorted(name for name in names if name.startswith("step-"))
    links = {os.readlink(run / "checkpoints" / name) for name in ("last", "best")}
    assert names == links | {"last", "best"} | set(steps[-2:])
    for name in steps:
        load_checkpoint(run / "checkpoints" / name)


def count_calls(disk, tmp_path, best):
    run = new_run(tmp_path / "count")
    save_three(run)
    counter = disk()
    save(run, 30, best)
    return len(counter.calls)


@pytest.mark.parametrize("best", [False, True])
def test_a_kill_at_any_call_leaves_the_old_or_the_new_checkpoint(disk, tmp_path, best):
    total = count_calls(disk, tmp_path, best)
    assert total > 20
    seen = set()
    for n in range(1, total + 1):
        disk()
        run = new_run(tmp_path / str(n))
        save_three(run)
        disk(n)
        with pytest.raises(KilledError):
            save(run, 30, best)
        disk()
        last, best_step = step_of(run, "last"), step_of(run, "best")
        assert (last, best_step) in {(20, 10), (30, 30 if best else 10)}
        seen.add(last)
        # The resumed run saves what was lost again, or goes on.
        save(run, 30 if last == 20 else 40, best)
        assert step_of(run, "best") == (step_of(run, "last") if best else 10)
        assert_clean(run)
    assert seen == {20, 30}


def test_a_kill_in_the_first_save_leaves_none_or_the_whole(disk, tmp_path):
    counter = disk()
    save(new_run(tmp_path / "count"), 10, True)
    for n in range(1, len(counter.calls) + 1):
        run = new_run(tmp_path / str(n))
        disk(n)
        with pytest.raises(KilledError):
            save(run, 10, True)
        disk()
        assert latest_checkpoint(run) is None or step_of(run, "last") == step_of(run, "best") == 10
        save(run, 20, True)
        assert_clean(run)


@settings(deadline=None, max_examples=25)
@given(script=st.lists(st.tuples(st.booleans(), st.none() | st.integers(1, 32)), min_size=1, max_size=8))
@example(script=[(True, 19), (False, None)])
@example(script=[(True, 23), (False, None)])
@example(script=[(True, None), (True, 24), (False, 24), (False, None)])
def test_any_history_of_saves_and_kills_keeps_last_and_best(tmp_path_factory, script):
    """Model: a save counts from the moment `last` moves; `best` is the newest counting save that was one."""
    run = new_run(tmp_path_factory.mktemp("history") / "run")
    last, best, step = None, None, 0
    for is_best, kill in script:
        step = (last or 0) + 10
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(kill or 10**9)
            patch.setattr(files_module, "os", disk)
            patch.setattr(files_module, "shutil", disk)
            try:
                save(run, step, is_best)
                killed = False
            except KilledError:
                killed = True
        found = latest_checkpoint(run)
        if not killed or (found is not None and step_of(run, "last") == step):
            last, best = step, step if is_best else best
        assert (step_of(run, "last") if found else None) == last
        if last is not None:
            assert step_of(run, "best") == (best or last)


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO])
def test_an_error_at_any_call_is_one_line_and_keeps_the_old_checkpoint(disk, tmp_path, fault):
    refused = 0
    for n in range(1, count_calls(disk, tmp_path, True) + 1):
        disk()
        run = new_run(tmp_path / str(n))
        save_three(run)
        disk(n, fault)
        message = None
        try:
            save(run, 30, True)
        except StorageError as error:
            message = str(error)
        disk()
        if message is not None:
            refused += 1
            assert re.fullmatch(rf"cannot write {run}/.*: {os.strerror(fault)}( \(.*\))?", message)
        assert (step_of(run, "last"), step_of(run, "best")) in {(20, 10), (30, 30)}
        save(run, 40, True)
        assert_clean(run)
    assert refused > 15


def test_data_is_on_the_disk_before_its_name_is(disk, tmp_path):
    """Power may fail anywhere: nothing is renamed before it is synced, nothing removed before the rename is."""
    run = new_run(tmp_path / "run")
    save_three(run)
    counter = disk()
    save(run, 30, False)
    files_module.write_file(run / "report.html", b"x" * 10)
    dirty, renamed = set(), set()
    for name, path, *second in counter.calls:
        parent = str(Path(path).parent)
        if name in ("write", "mkdir"):
            dirty.add(path)
        elif name == "open" and ".tmp-" in parent:
            dirty.add(parent)
        elif name == "fsync":
            dirty.discard(path)
            renamed.discard(path)
        elif name in ("rename", "replace"):
            assert parent not in renamed, f"{path}: renamed before the rename before it was safe"
            assert not {entry for entry in dirty if entry.startswith(path)}, f"{path}: renamed before it was synced"
            if ".tmp-" not in second[0]:  # a removal may be lost
                renamed.add(parent)
    assert not dirty
    assert not renamed
    assert [call[0] for call in counter.calls].count("write") == 4


def test_a_disk_full_at_any_byte_keeps_the_old_checkpoint(tmp_path):
    run = new_run(tmp_path / "run")
    folder = save(run, 10, True)
    largest = max(path.stat().st_size for path in folder.iterdir())
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in range(0, largest, 41):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
        try:
            with pytest.raises(StorageError, match=r"cannot write .*step-000000020: File too large$"):
                save(run, 20, True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert step_of(run, "last") == step_of(run, "best") == 10
        assert_clean(run)


def test_a_full_tmpfs_keeps_the_old_checkpoint(tmp_path):
    mounted = tmp_path / "small"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(mounted)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs root and the right to mount; the file size limit above covers the code")
    try:
        run = new_run(mounted / "run")
        save(run, 10, True)
        large = {"weight": torch.zeros(50_000)}
        with pytest.raises(
            StorageError, match=r"No space left on device \(0\.\d MB free there, 0\.2 MB needed\)"
        ) as caught:
            save_checkpoint(run, step=20, model=large, training={}, state={}, best=True)
        assert caught.value.exit_status == 74
        assert step_of(run, "last") == step_of(run, "best") == 10
        assert_clean(run)
        save(run, 30, True)
        assert step_of(run, "last") == 30
    finally:
        subprocess.run(["umount", str(mounted)], check=True)
