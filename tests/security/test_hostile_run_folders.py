"""The folder of a stranger's run: links in it lead no write elsewhere, and nothing beside it is read or removed."""

import os
import shutil
from pathlib import Path

import pytest

from norm_matters.calibration import calibrate_run
from norm_matters.cli import main
from norm_matters.core.errors import StorageError, UserError
from norm_matters.record import files, read_measurements
from norm_matters.record.checkpoint import save_checkpoint
from norm_matters.record.folder import claim_run_folder
from norm_matters.record.lock import take_lock
from norm_matters.record.trace import read_trace
from norm_matters.record.weight_norms import read_weight_norms
from norm_matters.report import write_report

HOSTILE_NAMES = [
    *("..", ".", "", "../x", "a/../../x", "/etc/passwd", "a\\b", "a\0b", "a\nb", "x" * 300, "\u202etxt.exe"),
    *("-rf", ".hidden", "CON", "nul.txt", "com1", "run.", "a b", "~root", "C:x", "a*"),
]
SECRET = "private\n"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of the user's."""
    path = tmp_path / "home" / ".profile"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


def resume(run: Path, capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    capsys.readouterr()
    assert main(["train", f"--resume={run}", "--epochs=2", "--extend"]) == status
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "log.txt",
        "results.csv",
        "trace.csv",
        "config.yaml",
        "provenance.json",
        "report.html",
        ".lock",
        "status.json",
        "new",
    ],
)
def test_a_link_in_the_place_of_a_file_is_not_written_through(
    name: str, stolen: Path, victim: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stolen / name
    content = path.read_text() if path.exists() else ""
    if name in ("config.yaml", "provenance.json"):
        victim.write_text(content)  # so that it reads well
    path.unlink(missing_ok=True)
    path.symlink_to(victim)
    before = victim.read_text()
    error = resume(stolen, capsys, 74 if name == ".lock" else 2)
    assert name in error
    assert victim.read_text() == before


def test_the_folder_of_checkpoints_is_no_link(
    stolen: Path, tmp_path: Path, good_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(good_run / "checkpoints", tmp_path / "other", symlinks=True)
    shutil.rmtree(stolen / "checkpoints")
    (stolen / "checkpoints").symlink_to(other)
    before = sorted(other.rglob("*"))
    assert "checkpoints is a link" in resume(stolen, capsys)
    with pytest.raises(StorageError, match="it is a link"):
        save_checkpoint(stolen, step=9, model={}, training={}, state={}, best=True)
    with pytest.raises(UserError, match="is a link"):
        calibrate_run(stolen)
    assert sorted(other.rglob("*")) == before


def test_links_are_removed_not_followed(tmp_path: Path, victim: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "link").symlink_to(victim.parent)
    (folder / "file").symlink_to(victim)
    (tmp_path / ".tmp-x").symlink_to(victim.parent)
    files.remove_folder(folder)
    files.remove_temporaries(tmp_path)
    link = tmp_path / "step-000000001"
    link.symlink_to(victim.parent)
    files.remove_folder(link)
    assert victim.read_text() == SECRET


def test_a_lock_and_a_log_are_not_opened_through_links(tmp_path: Path, victim: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(victim)
    with pytest.raises(StorageError):
        take_lock(link)
    with pytest.raises(StorageError):
        files.append_file(link, b"$(touch canary)\n")
    assert victim.read_text() == SECRET
    # Files are replaced by a rename: it is the link that goes.
    files.write_file(link, "new")
    assert (victim.read_text(), link.read_text(), link.is_symlink()) == (SECRET, "new", False)


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "name", ["results.csv", "trace.csv", "instruments.json", "log.txt", "weight_norms/epoch-0001.safetensors"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_waited_for(
    name: str, kind: str, stolen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stolen / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    read = {"results.csv": write_report, "trace.csv": read_trace, "instruments.json": read_measurements}
    read |= {"weight_norms/epoch-0001.safetensors": read_weight_norms}
    if name in read:
        with pytest.raises(UserError, match=name):
            read[name](stolen)
    capsys.readouterr()
    if name not in ("instruments.json", "weight_norms/epoch-0001.safetensors"):  # which this run does not read
        assert main(["train", f"--resume={stolen}", "--epochs=2", "--extend"]) in (2, 74)
        assert name in capsys.readouterr().err


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_a_hostile_name_claims_no_folder(name: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.parent.iterdir())
    with pytest.raises(UserError, match="names no run"):
        claim_run_folder(tmp_path / "runs", name, "default")
    assert sorted(tmp_path.parent.iterdir()) == before
    assert not list(tmp_path.iterdir())


def test_files_and_folders_are_not_for_others(good_run: Path) -> None:
    for path in [good_run, *good_run.rglob("*")]:
        if not path.is_symlink():
            assert path.stat().st_mode & 0o777 & ~(0o750 if path.is_dir() else 0o640) == 0, path


def test_a_temporary_file_lies_beside_its_own_and_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, int]] = []
    real = os.open

    def spy(path, flags, *rest, **options):
        opened.append((str(path), flags))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", spy)
    files.write_file(tmp_path / "file", "x")
    written = [(Path(path), flags) for path, flags in opened if flags & os.O_WRONLY]
    assert written
    for path, flags in written:
        assert path.parent == tmp_path
        assert path.name.startswith(".tmp-file-")
        assert flags & os.O_EXCL


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    ['{"a": 1, "a": 2}', "[" * 5000 + "]" * 5000, '{"events": 7}', "[]", "null", "", "\x00", '{"events": [[[[]]]]}'],
    ids=["twice", "deep", "events", "list", "null", "empty", "nul", "nested"],
)
def test_provenance_that_is_none(text: str, stolen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stolen / "provenance.json").write_text(text)
    for arguments in (["report", str(stolen)], ["verify", str(stolen)], ["train", f"--resume={stolen}"]):
        capsys.readouterr()
        status = main(arguments)
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert status in (0, 2)
        assert (status == 2) == error.startswith("error: ")
