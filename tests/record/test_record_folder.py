"""The run folder: names stay inside the output folder, and no two runs share one."""

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from norm_matters.core.errors import StorageError, UserError
from norm_matters.core.names import is_plain_name
from norm_matters.record import (
    claim_run_folder,
    default_name,
    find_begun,
    find_checkpoint,
    has_checkpoints,
    is_run,
    latest_checkpoint,
)
from norm_matters.record.folder import check_links

BAD_NAMES = [
    "", ".", "..", "../x", "a/b", "/etc", "a\\b", "-x", ".hidden", "x" * 129,
    "a b", "a\0b", "a\n", "é", "a\u202eb", "~",
]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    folder = claim_run_folder(tmp_path, "run", "default")
    (folder / "config.yaml").write_text("")
    (folder / "provenance.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_none_is_refused_and_makes_nothing(tmp_path, name):
    with pytest.raises(UserError, match="name: ") as caught:
        claim_run_folder(tmp_path / "runs", name, "default")
    assert caught.value.exit_status == 2
    assert len(caught.value.problems[0].splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_given_name_is_used_once_and_a_default_one_is_counted(tmp_path):
    output = tmp_path / "new" / "runs"
    assert claim_run_folder(output, "mine", "default") == output / "mine"
    with pytest.raises(UserError, match=r"name: 'mine' is taken .* no run is recorded in it"):
        claim_run_folder(output, "mine", "default")
    for file in ("config.yaml", "provenance.json"):
        (output / "mine" / file).write_text("{}")
    with pytest.raises(UserError, match=r"name: 'mine' is taken .* --resume"):
        claim_run_folder(output, "mine", "default")
    names = [claim_run_folder(output, None, "default").name for _ in range(3)]
    assert names == ["default", "default-2", "default-3"]
    assert claim_run_folder(output, "x" * 128, "default").is_dir()


def test_fifty_starts_at_once_get_fifty_folders(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(lambda _: claim_run_folder(tmp_path / "runs", None, "run"), range(50)))
    assert len(set(folders)) == 50


def test_an_output_that_is_a_file_is_a_storage_error(tmp_path):
    (tmp_path / "runs").write_text("")
    for output in (tmp_path / "runs", tmp_path / "runs" / "deeper"):
        with pytest.raises(StorageError, match="cannot write"):
            claim_run_folder(output, None, "run")


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        (("resnet8", "l1", "digits", 0), "resnet8-l1-digits-s0"),
        (("resnet20", "topk:k=10", "fashion-mnist", 3), "resnet20-topk-k10-fashion-mnist-s3"),
        (("timm:resnet18", None, "imagefolder:/data/my cats/", 0), "timm-resnet18-default-imagefolder-my-cats-s0"),
        (("../nets/My_Net.py", "lp:p=1.5", "parquet:../cifar10", 1), "My_Net-lp-p1.5-parquet-cifar10-s1"),
        (("m", "ghost:size=32,base=(topk:k=10)", "imagefolder:.", 1), "m-ghost-size32-base-topk-k10-imagefolder-s1"),
    ],
)
def test_a_run_is_named_after_what_it_does(facts, name):
    assert default_name(*facts) == name


@settings(deadline=None, max_examples=30)
@given(st.text(), st.none() | st.text(), st.text(), st.integers(0, 2**63))
def test_any_default_name_is_a_name(model, norm, dataset, seed):
    name = default_name(model, norm, dataset, seed)
    assert is_plain_name(name + "-999")
    assert name.endswith(f"-s{seed}")


def test_what_is_no_run_is_refused_by_name(tmp_path, run):
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("")
    for name, text in (("file", "is neither"), ("other", "is neither"), ("absent", "does not exist"), ("a\0", "does")):
        with pytest.raises(UserError, match=text) as caught:
            find_checkpoint(tmp_path / name)
        assert caught.value.exit_status == 2
    assert is_run(run)
    assert latest_checkpoint(run) is None
    with pytest.raises(UserError, match="no checkpoint yet"):
        find_checkpoint(run)


@pytest.fixture
def closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder into which one may not look; permissions would not keep root out."""
    folder = tmp_path / "closed"
    folder.mkdir()

    def kept_out(call):
        def inner(path, *arguments, **options):
            if folder in Path(os.fsdecode(path)).parents:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return call(path, *arguments, **options)

        return inner

    with monkeypatch.context() as patch:
        for name in ("stat", "lstat"):
            patch.setattr(os, name, kept_out(getattr(os, name)))
        yield folder


@pytest.mark.parametrize("looks", [is_run, find_checkpoint, latest_checkpoint, has_checkpoints, check_links])
@pytest.mark.parametrize("inside", [".", "run"])
def test_where_one_may_not_look_is_named(closed: Path, looks, inside: str):
    with pytest.raises(UserError, match=r"^'\S+/closed/\S+' cannot be read: Permission denied$"):
        looks(closed / inside)


def test_a_path_too_long_for_the_disk_is_one_clear_line(tmp_path: Path):
    path = tmp_path / ("x" * 300)
    assert not is_run(path)
    assert find_begun(path, "launch", "settings") is None
    with pytest.raises(UserError, match="does not exist"):
        find_checkpoint(path)
    with pytest.raises(StorageError, match=r"cannot write .*: File name too long"):
        claim_run_folder(path, None, "run")


def test_a_lost_checkpoint_is_not_taken_for_none(run):
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last").symlink_to("step-000000010")
    assert latest_checkpoint(run) == run / "checkpoints" / "step-000000010"


def test_a_run_copied_without_its_links_still_has_its_newest_checkpoint(run):
    for name in ("step-000000010", "step-000000020", ".tmp-step-000000030", "step-x"):
        (run / "checkpoints" / name).mkdir(parents=True)
    assert find_checkpoint(run, "last").name == "step-000000020"
    for name in ("step-000000020-2", "step-000000020-10"):
        (run / "checkpoints" / name).mkdir()
    assert find_checkpoint(run, "last").name == "step-000000020-10"


def test_a_run_may_be_named_like_a_checkpoint(tmp_path, run):
    named = tmp_path / "step-000000001"
    run.rename(named)
    with pytest.raises(UserError, match="no checkpoint yet"):
        find_checkpoint(named)
