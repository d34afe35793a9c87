"""Whose Python files are run: those that a user names, and those whose very content somebody vouched for."""

import hashlib
import os
from pathlib import Path

import pytest

from norm_matters.cli import main
from norm_matters.core.config import ModelConfig, RunConfig
from norm_matters.core.errors import StorageError, UserError
from norm_matters.models import build_model, create_model, trust
from norm_matters.models.trust import check_trusted, trust_file, trust_named_file, trusted_list

MODEL = """
from pathlib import Path

from torch import nn

Path(__file__).with_name("canary").write_text("it was run")


def model(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes), nn.BatchNorm1d(num_classes))
"""


@pytest.fixture(autouse=True)
def nobody_vouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(trust, "_trusted", set())


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A model file that leaves a mark when it is run."""
    path = tmp_path / "files" / "own.py"
    path.parent.mkdir()
    path.write_text(MODEL)
    return path


def was_run(own: Path) -> bool:
    return own.with_name("canary").exists()


def build(path: Path):
    return build_model(ModelConfig(name=str(path)), num_classes=10, in_channels=1, input_size=8)


def test_a_file_that_nobody_vouched_for_is_not_run(own: Path) -> None:
    with pytest.raises(
        UserError, match=f"not vouched for; read it, and if you trust it, say: norm-matters trust {own}$"
    ):
        build(own)
    assert not was_run(own)


def test_vouching_is_for_the_content_not_for_the_name(own: Path, tmp_path: Path) -> None:
    digest = trust_file(own)
    assert digest == hashlib.sha256(own.read_bytes()).hexdigest()
    build(own)
    assert was_run(own)
    own.rename(tmp_path / "moved.py")
    build(tmp_path / "moved.py")
    (tmp_path / "moved.py").write_text(MODEL + "# changed\n")
    with pytest.raises(UserError, match="not vouched for"):
        build(tmp_path / "moved.py")


def test_later_processes_know(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = trust_file(own)
    trust_file(own)
    assert trusted_list().read_text() == f"{digest}  '{own}'\n"
    assert trusted_list().stat().st_mode & 0o777 == 0o640
    monkeypatch.setattr(trust, "_trusted", set())
    check_trusted(own, digest)
    with pytest.raises(UserError):
        check_trusted(own, digest[::-1])


def test_a_home_that_cannot_be_written(own: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("in the way")
    digest = trust_file(own, lasting=False)
    check_trusted(own, digest)
    with pytest.raises(StorageError, match="cannot write"):
        trust_file(own)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"x" * 100, b""])
def test_a_list_that_is_none_names_nothing(content: bytes, own: Path) -> None:
    trusted_list().parent.mkdir(parents=True)
    trusted_list().write_bytes(content)
    with pytest.raises(UserError, match="not vouched for"):
        build(own)


def test_naming_it_in_python_vouches_for_it(own: Path) -> None:
    create_model(str(own), num_classes=10, in_channels=1)
    assert was_run(own)


@pytest.mark.parametrize(
    ("options", "overrides", "named"),
    [
        ({"model.name": "own.py"}, [], True),
        ({}, ["model.name=own.py"], True),
        ({}, ["model.name='own.py'", "seed=1"], True),
        ({"model.name": "resnet8"}, [], False),
        ({"model.name": 3}, ["model.name=[own.py]", "model.name=[", "model.name"], False),
        ({"model.name": "none.py"}, ["model.norm=own.py"], False),
    ],
)
def test_words_of_the_command_line_vouch(
    options: dict, overrides: list[str], named: bool, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own.parent)
    trust_named_file(options, overrides)
    assert trusted_list().exists() == named


def test_a_configuration_of_a_strangers_runs_nothing_until_its_user_says_so(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {{name: {own}}}\ntrain: {{epochs: 1}}\noutput: {tmp_path / 'runs'}\n")
    common = ["--batch-size=512", "--device=cpu", "train.instruments=none"]
    assert main(["train", f"--config={config}", *common]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"norm-matters trust {own}" in line
    assert not was_run(own)
    assert not (tmp_path / "runs").exists()
    assert main(["trust", str(own)]) == 0
    assert main(["train", f"--config={config}", "--name=run", *common]) == 0
    assert was_run(own)
    # What the user has trained is evaluated, and resumed, without another word.
    run = tmp_path / "runs" / "run"
    assert main(["eval", str(run), "--device=cpu"]) == 0
    assert main(["train", f"--resume={run}", "--epochs=2", "--extend"]) == 0
    # Somebody else, to whom the run is given, is asked.
    os.remove(trusted_list())
    trust._trusted.clear()
    own.with_name("canary").unlink()
    capsys.readouterr()
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"base: {{model: {{name: {own}}}, train: {{epochs: 1}}}}\ngrid: {{seed: [0, 1]}}\n")
    for arguments in (
        ["eval", str(run)],
        ["predict", str(run), str(config)],
        ["train", f"--resume={run}"],
        ["verify", str(run)],
        ["sweep", str(grid), f"--output={tmp_path / 'sweep'}"],
    ):
        assert main(arguments) == 2, arguments
        assert "not vouched for" in capsys.readouterr().err
    assert not was_run(own)
    assert not (tmp_path / "sweep").exists()


def test_a_run_of_a_strangers_that_says_it_is_known_is_not_believed(own: Path, tmp_path: Path) -> None:
    from norm_matters.run import train

    with pytest.raises(UserError, match="not vouched for"):
        train(RunConfig(model=ModelConfig(name=str(own)), output=str(tmp_path / "runs")))
    assert not was_run(own)
