"""Writes are atomic and durable, and every failure is one clear line."""

import errno
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from norm_matters.core.errors import StorageError
from norm_matters.record import files


@contextmanager
def file_size_limit(size):
    """The disk is full for every file longer than `size` bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "report.html"
    files.write_file(path, "first, long")
    files.write_file(path, b"second \xff")
    assert path.read_bytes() == b"second \xff"
    assert os.listdir(tmp_path) == ["report.html"]
    files.write_file(path, "Zürich")
    assert path.read_bytes() == "Zürich".encode()


def test_a_full_disk_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "report.html"
    files.write_file(path, b"old")
    with file_size_limit(1000), pytest.raises(StorageError, match=r"cannot write .*report\.html: File too large"):
        files.write_file(path, b"x" * 5000)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_an_append_that_does_not_fit_is_taken_back(tmp_path):
    path = tmp_path / "log.txt"
    files.append_file(path, b"first\n", header=b"head\n")
    with file_size_limit(15), pytest.raises(StorageError):
        files.append_file(path, b"second, which is longer\n", header=b"head\n")
    assert path.read_bytes() == b"head\nfirst\n"
    files.append_file(path, b"third\n", header=b"head\n")
    assert path.read_bytes() == b"head\nfirst\nthird\n"


@pytest.mark.parametrize(
    "write",
    [
        lambda path: files.write_file(path, b"x"),
        lambda path: files.append_file(path, b"x"),
        lambda path: files.write_folder(path, {"a": b"x"}),
        lambda path: files.make_folder(path),
        lambda path: files.claim_folder(path),
        lambda path: files.replace_link(path, "target"),
    ],
)
def test_a_path_under_a_regular_file_is_one_clear_line(tmp_path, write):
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "inside"
    with pytest.raises(StorageError) as caught:
        write(path)
    assert caught.value.problems == (f"cannot write {path}: Not a directory",)
    assert caught.value.exit_status == 74
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_says_how_much_is_free(tmp_path):
    path = tmp_path / "x"
    with (
        pytest.raises(StorageError, match=r"x: No space left on device \(\d+\.\d MB free there\)$"),
        files.storing(path),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "step"
    with file_size_limit(1000), pytest.raises(StorageError):
        files.write_folder(path, {"small": b"x", "large": b"x" * 2000})
    assert os.listdir(tmp_path) == []
    files.write_folder(path, {"small": b"x", "large": b"x" * 2000})
    assert sorted(os.listdir(path)) == ["large", "small"]


def test_a_link_is_replaced_also_where_a_copy_made_it_a_folder(tmp_path):
    link = tmp_path / "last"
    files.replace_link(link, "one")
    files.replace_link(link, "two")
    assert os.readlink(link) == "two"
    link.unlink()
    link.mkdir()
    (link / "state.json").write_text("copied")
    files.replace_link(link, "three")
    assert os.readlink(link) == "three"
    assert os.listdir(tmp_path) == ["last"]


def test_removal_follows_no_link(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("data")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(outside)
    (tmp_path / ".tmp-link").symlink_to(outside)
    (tmp_path / ".tmp-folder").mkdir()
    files.remove_folder(inside)
    files.remove_temporaries(tmp_path)
    files.remove_folder(tmp_path / "never was")
    assert os.listdir(tmp_path) == ["outside"]
    assert (outside / "precious").read_text() == "data"


def test_strangers_may_not_read_a_run(tmp_path):
    old = os.umask(0o022)
    try:
        files.write_folder(tmp_path / "folder", {"file": b""})
    finally:
        os.umask(old)
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "folder" / "file").stat().st_mode & 0o777 == 0o640


def test_everything_but_checkpoints_works_without_torch(tmp_path):
    code = f"""
import sys
sys.modules["torch"] = None
from pathlib import Path
from types import SimpleNamespace
import norm_matters.record as record
run = record.claim_run_folder(Path({str(tmp_path)!r}), "a", "b")
record.write_file(run / "config.yaml", "")
record.append_row(run / "results.csv", {{"epoch": 1}})
record.RunLog(run / "log.txt").write("hello")
record.write_provenance(run, {{}})
record.append_event(run, {{}})
assert record.is_run(run) and record.read_table(run / "results.csv")
assert record.latest_checkpoint(run) is None
assert not set(sys.modules) & {{"pandas", "bokeh", "numpy", "safetensors", "pydantic"}}
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_disk_without_room_for_three_is_refused_with_numbers(tmp_path, monkeypatch):
    free = files.shutil.disk_usage(tmp_path).free
    files.check_room(tmp_path / "not" / "yet", free // 4)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda place: SimpleNamespace(free=2_999_999))
    files.check_room(tmp_path, 999_999)
    words = rf"^{tmp_path}: 3\.0 MB are free, and 3\.0 MB are needed, for 3 checkpoints of 1\.0 MB each; make room, or"
    with pytest.raises(StorageError, match=words) as caught:
        files.check_room(tmp_path / "not" / "yet", 1_000_000)
    assert caught.value.exit_status == 74


def test_room_is_looked_for_above_what_one_may_not_enter(tmp_path, monkeypatch):
    closed, stat = tmp_path / "closed", os.stat
    closed.mkdir()

    def kept_out(path, *arguments, **options):
        if closed in Path(os.fsdecode(path)).parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", kept_out)
        files.check_room(closed / "deeper" / "runs", 1)
    files.check_room(tmp_path / ("x" * 300) / "runs", 1)
