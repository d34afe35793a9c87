import errno
import os
from pathlib import Path

import pytest

from norm_matters.core.errors import StorageError, UserError
from norm_matters.record.files import stream_file


def test_a_file_written_piece_by_piece_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(b"old")
    with stream_file(path) as stream:
        for piece in (b"new", b" ", b"text"):
            stream.write(piece)
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new text"
    assert [file.name for file in tmp_path.iterdir()] == ["large"]


def write_and_raise(path: Path, error: BaseException) -> None:
    with stream_file(path) as stream:
        stream.write(b"new")
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("no"), ValueError("no")])
def test_whoever_gives_up_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "large"
    path.write_bytes(b"old")
    with pytest.raises(type(error)):
        write_and_raise(path, error)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["large"]


def test_a_full_disk_is_a_clear_error(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    words = r"cannot write .*large: No space left on device \(.* MB free there\)"
    with pytest.raises(StorageError, match=words), stream_file(tmp_path / "large") as stream:
        stream.write(b"new")
    assert not list(tmp_path.iterdir())
