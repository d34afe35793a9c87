"""A fault at every named place of a run: the status that is promised, and afterwards a run to the same bits."""

import json
from pathlib import Path

import pytest

# A run of two epochs of 11 steps that saves every three.
SETTINGS = ("train.checkpoint_every=3st",)
AT_LEAST_ONCE = [
    "start:0:1",
    "step:0:5",
    "step:0:11",
    "eval:0:2",
    "table:0:2",
    "log:0:2",
    "save:0:12",
    "save.part:0:5",
    "save.rename:0:3",
    "save.renamed:0:4",
    "report:0:1",
]
# Of these, where all the training is done: the run comes to its end.
AFTER_TRAINING = ("table:0:2", "report:0:1")
# Where the run writes.
WRITING = ["table:0:2", "log:0:2", "save:0:12", "save.part:0:5", "save.rename:0:3", "save.renamed:0:4"]


@pytest.fixture(scope="module")
def expected(zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    zygote.train(folder, *SETTINGS)
    return zygote.ask("fingerprint", run=folder / "runs" / "run")


def goes_on(zygote, folder: Path, expected: dict[str, str]) -> None:
    """The run is continued, or begun where it had no folder yet, and ends as if nothing had happened."""
    zygote.train(folder, *([] if (folder / "runs" / "run").exists() else SETTINGS), resume=(folder / "runs").exists())
    assert zygote.ask("fingerprint", run=folder / "runs" / "run") == expected


@pytest.mark.parametrize("point", AT_LEAST_ONCE)
def test_killed_there(point: str, zygote, tmp_path: Path, expected: dict[str, str]) -> None:
    zygote.train(tmp_path, *SETTINGS, faults=f"{point}:kill", status=-9)
    goes_on(zygote, tmp_path, expected)


def test_killed_while_it_is_taken_up_again(zygote, tmp_path: Path, expected: dict[str, str]) -> None:
    zygote.train(tmp_path, *SETTINGS, faults="step:0:14:kill", status=-9)
    zygote.train(tmp_path, resume=True, faults="restore:0:1:kill", status=-9)
    goes_on(zygote, tmp_path, expected)


SELDOM = [
    pytest.param(point, marks=() if place % 3 == 1 else pytest.mark.slow) for place, point in enumerate(AT_LEAST_ONCE)
]


@pytest.mark.parametrize("point", SELDOM)
def test_asked_to_end_there(point: str, zygote, tmp_path: Path, expected: dict[str, str]) -> None:
    """SIGTERM: a checkpoint within a step, and the status that says that it goes on; at the very end it is done."""
    done = point in AFTER_TRAINING
    text = zygote.train(tmp_path, *SETTINGS, faults=f"{point}:term", status=0 if done else 75)
    if not done:
        assert text.count("preempted by SIGTERM") == 1
    goes_on(zygote, tmp_path, expected)


@pytest.mark.parametrize("point", WRITING)
def test_the_disk_is_full_there(point: str, zygote, tmp_path: Path, expected: dict[str, str]) -> None:
    text = zygote.train(tmp_path, *SETTINGS, faults=f"{point}:enospc", status=74)
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: cannot write {tmp_path}/runs/run/")
    assert "No space left on device (" in line
    assert " MB free there" in line
    goes_on(zygote, tmp_path, expected)


@pytest.mark.slow
@pytest.mark.parametrize("point", WRITING)
def test_the_disk_does_not_answer_there(point: str, zygote, tmp_path: Path, expected: dict[str, str]) -> None:
    text = zygote.train(tmp_path, *SETTINGS, faults=f"{point}:eio", status=74)
    assert "Input/output error" in text
    goes_on(zygote, tmp_path, expected)


@pytest.mark.slow
@pytest.mark.parametrize("point", AT_LEAST_ONCE[:-1])
def test_a_bug_there(point: str, zygote, tmp_path: Path, expected: dict[str, str]) -> None:
    text = zygote.train(tmp_path, *SETTINGS, faults=f"{point}:raise", status=1)
    assert f"RuntimeError: a fault at {point.split(':')[0]}, by NORM_MATTERS_FAULTS" in text
    goes_on(zygote, tmp_path, expected)


@pytest.mark.parametrize("kind", ["raise", "enospc", "eio"])
def test_a_report_that_fails_costs_no_more_than_a_warning(kind: str, zygote, tmp_path: Path, expected) -> None:
    text = zygote.train(tmp_path, *SETTINGS, faults=f"report:0:1:{kind}")
    assert text.count("warning: no report: ") == 1
    assert "norm-matters report" in text
    assert not (tmp_path / "runs" / "run" / "report.html").exists()
    assert "warning: no report: " in (tmp_path / "runs" / "run" / "log.txt").read_text()
    assert zygote.ask("fingerprint", run=tmp_path / "runs" / "run") == expected


def test_a_report_that_fails_does_not_hide_why_the_run_ended(zygote, tmp_path: Path) -> None:
    text = zygote.train(tmp_path, *SETTINGS, faults="step:0:2:nan,report:0:1:raise", status=76)
    assert "Traceback" not in text
    assert text.count("warning: no report: RuntimeError") == text.count("error: the training loss is not finite") == 1
    assert last_word(tmp_path) == ("failed", 76)


def last_word(folder: Path) -> tuple[str, int]:
    status = json.loads((folder / "runs" / "run" / "status.json").read_text())
    return status["state"], status["exit_status"]


def test_a_disk_that_is_full_at_the_first_line_is_the_last_word(zygote, tmp_path: Path) -> None:
    zygote.train(tmp_path, *SETTINGS, faults="log:0:1:enospc", status=74)
    assert last_word(tmp_path) == ("failed", 74)


@pytest.mark.parametrize("fault", ["nowhere:0:1:kill", "step:0:1:explode"])
def test_faults_that_do_not_exist_are_wrong_input(fault: str, zygote, tmp_path: Path) -> None:
    text = zygote.train(tmp_path, faults=fault, status=2)
    assert text.startswith("error: NORM_MATTERS_FAULTS: there is no ")
    assert not (tmp_path / "runs").exists()
