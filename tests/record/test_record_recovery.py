"""Whatever is wrong with a checkpoint, it is named, and the newest whole one is found; retention leaves one to find."""

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from norm_matters.core.errors import StorageError, UserError
from norm_matters.record import checkpoint as checkpoint_module
from norm_matters.record import (
    files,
    has_checkpoints,
    load_checkpoint,
    newest_whole,
    save_checkpoint,
    set_aside,
)
from norm_matters.record import state as state_module
from norm_matters.record.state import VersionError, seal_state

PARTS = ("model.safetensors", "training.safetensors", "state.json")


def save(run: Path, step: int, *, best: bool = False, finite: bool = True, **options) -> Path:
    weight = torch.full((50,), float(step) if finite else float("nan"))
    tensors = {"model": {"weight": weight}, "training": {"momentum": weight / 3}}
    return save_checkpoint(run, step=step, **tensors, state={"step": step}, best=best, **options)


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("step-*"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(0).randrange(len(data))] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


DAMAGES = [flip, cut, empty, lengthen, Path.unlink, replace_by_folder, replace_by_pipe]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.__name__ for damage in DAMAGES])
def test_any_damage_is_named_in_one_line_and_the_one_before_is_found(
    tmp_path: Path, damage: Callable[[Path], None], part: str
) -> None:
    save(tmp_path, 10, best=True)
    save(tmp_path, 20)
    last = save(tmp_path, 30)
    damage(last / part)
    found = newest_whole(tmp_path)
    assert found.checkpoint is not None
    assert found.checkpoint.step == 20
    assert list(found.damaged) == [last.name]
    (words,) = found.damaged.values()
    assert words.startswith(str(last / part))
    assert "\n" not in words
    set_aside(tmp_path, found.damaged, found.checkpoint.folder)
    assert (tmp_path / "checkpoints" / f"damaged-{last.name}").is_dir()
    again = newest_whole(tmp_path)
    assert (again.checkpoint.step, again.damaged) == (20, {})  # pyright: ignore[reportOptionalMemberAccess]
    save(tmp_path, 30)
    assert newest_whole(tmp_path).checkpoint.step == 30  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("part", PARTS)
def test_a_disk_that_does_not_answer_is_named_and_the_one_before_is_found(
    tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 10)
    last, read = save(tmp_path, 20), state_module.read_regular

    def read_regular(path: Path, **options: int) -> bytes:
        if path == last / part:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path, **options)

    monkeypatch.setattr(state_module, "read_regular", read_regular)
    found = newest_whole(tmp_path)
    assert (found.checkpoint.step, list(found.damaged)) == (10, [last.name])  # pyright: ignore
    assert found.damaged[last.name] == f"cannot read {last / part}: Input/output error"
    with pytest.raises(StorageError, match="Input/output error"):
        load_checkpoint(last)


@pytest.mark.parametrize("part", PARTS[:2])
def test_a_part_that_grew_is_told_by_its_sizes(tmp_path: Path, part: str) -> None:
    path = save(tmp_path, 10) / part
    size = path.stat().st_size
    lengthen(path)
    with pytest.raises(UserError, match=rf"{part} is damaged: it has {size + 1:,} bytes instead of {size:,}$"):
        load_checkpoint(path.parent)


def test_a_checkpoint_folder_that_is_gone_counts_as_damaged(tmp_path: Path) -> None:
    save(tmp_path, 10, best=True)
    files.remove_folder(save(tmp_path, 20))
    found = newest_whole(tmp_path)
    assert (found.checkpoint.step, list(found.damaged)) == (10, ["step-000000020"])  # pyright: ignore
    files.remove_folder(tmp_path / "checkpoints" / "step-000000010")
    assert has_checkpoints(tmp_path)
    assert newest_whole(tmp_path).checkpoint is None


def test_a_link_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    save(tmp_path, 10)
    for name in ("last", "best"):
        (tmp_path / "checkpoints" / name).unlink(missing_ok=True)
        (tmp_path / "checkpoints" / name).symlink_to("../../elsewhere")
    found = newest_whole(tmp_path)
    assert (found.checkpoint.step, list(found.damaged), found.best_lost) == (10, ["last", "best"], True)  # pyright: ignore
    set_aside(tmp_path, found.damaged, found.checkpoint.folder)  # pyright: ignore[reportOptionalMemberAccess]
    save(tmp_path, 20)
    assert steps(tmp_path) == [10, 20]


def test_a_newer_version_is_no_damage(tmp_path: Path) -> None:
    save(tmp_path, 10)
    document = {"format_version": 99, "step": 20, "best": False, "parts": {}, "state": {}}
    (save(tmp_path, 20) / "state.json").write_bytes(seal_state(document))
    with pytest.raises(VersionError, match="format version 99; this norm-matters reads 1 to 2: a newer one wrote it"):
        newest_whole(tmp_path)


def test_version_1_is_read(tmp_path: Path) -> None:
    folder = save(tmp_path, 10)
    state = load_checkpoint(folder)
    text = (folder / "state.json").read_bytes().replace(b'"format_version": 2', b'"format_version": 1')
    import hashlib
    import re

    blank = re.sub(rb'"sha256": "[0-9a-f]{64}",\n "format', b'"sha256": "' + b"0" * 64 + b'",\n "format', text, count=1)
    (folder / "state.json").write_bytes(blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1))
    assert load_checkpoint(folder).step == state.step


def test_what_is_not_written_as_it_was_given_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk, or a memory, that changes a byte on the way: the older checkpoints stay, and `last` with them."""
    save(tmp_path, 10)
    save(tmp_path, 20)
    write = files.write_folder

    def write_wrongly(path: Path, contents) -> None:
        write(path, {**contents, "model.safetensors": contents["model.safetensors"][:-1] + b"\0"})

    monkeypatch.setattr(files, "write_folder", write_wrongly)
    with pytest.raises(StorageError, match=r"read back is not what was written: .*model\.safetensors is damaged"):
        save(tmp_path, 30)
    assert steps(tmp_path) == [10, 20]
    assert os.readlink(tmp_path / "checkpoints" / "last") == "step-000000020"


def test_as_many_are_kept_as_are_asked_for(tmp_path: Path) -> None:
    save(tmp_path, 1, best=True, keep=4)
    for step in range(2, 9):
        save(tmp_path, step, keep=4)
    assert steps(tmp_path) == [1, 5, 6, 7, 8]
    save(tmp_path, 9, keep=2)
    assert steps(tmp_path) == [1, 8, 9]


def test_a_removal_that_fails_is_only_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    for step in (10, 20):
        save(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr(files, "remove_folder", lambda path: False)
        save(tmp_path, 30, on_note=notes.append)
    (note,) = notes
    assert note.endswith("step-000000010 could not be removed; it costs only space")
    save(tmp_path, 40, on_note=notes.append)
    assert (steps(tmp_path), len(notes)) == ([30, 40], 1)


def test_what_is_newer_than_last_was_left_by_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.files, "replace_link", lambda path, target: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(tmp_path, 20)
    assert steps(tmp_path) == [10, 20]
    # A run that saves at other times now.
    save(tmp_path, 15)
    assert steps(tmp_path) == [10, 15]


@settings(deadline=None, max_examples=40)
@given(
    script=st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(1, 9)), min_size=1, max_size=10),
    keep=st.integers(2, 4),
)
def test_the_last_the_best_and_the_last_finite_are_never_removed(
    tmp_path_factory: pytest.TempPathFactory, script: list[tuple[bool, bool, int]], keep: int
) -> None:
    run = tmp_path_factory.mktemp("run")
    step, saved, best, finite = 0, [], None, None
    for is_best, is_finite, distance in script:
        step += distance
        save(run, step, best=is_best, finite=is_finite, keep=keep)
        saved.append(step)
        best, finite = (step if is_best else best), (step if is_finite else finite)
        assert set(steps(run)) == {*saved[-keep:], *(each for each in (best, finite) if each is not None)}
        found = newest_whole(run)
        assert (found.checkpoint.step, found.damaged, found.best_lost) == (step, {}, False)  # pyright: ignore
