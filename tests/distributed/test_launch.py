"""`train --processes N`: restarts to the same bits, the culprit's last word, and nobody left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from norm_matters.core.errors import UserError
from norm_matters.launch import check_numbers, without_options
from norm_matters.record import find_checkpoint, load_checkpoint

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "kill_ranks.py"
sys.path.insert(0, str(BENCHMARK.parent))
from kill_ranks import Trial, ranks_of  # noqa: E402  (scripts are no package)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["train", "--processes", "2", "--norm", "l1"], ["train", "--norm", "l1"]),
        (["train", "--processes=2", "--max-restarts", "3"], ["train"]),
        (["train", "a=1", "--max-restarts=3", "--lr", "1"], ["train", "a=1", "--lr", "1"]),
    ],
)
def test_ranks_get_the_same_arguments_without_these_two(given: list[str], kept: list[str]) -> None:
    assert without_options(given, "--processes", "--max-restarts") == kept


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("none", None), "--processes: value 'none'"),
        (("0", None), "--processes: value '0'"),
        (("2", "-1"), "--max-restarts: value '-1'"),
        ((None, "1"), "--max-restarts: it needs --processes"),
    ],
)
def test_wrong_numbers_are_told(given: tuple[str | None, str | None], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_numbers(*given)
    assert check_numbers("2", None) == (2, 0)


def train(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "norm_matters", "train", "--processes=2", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        start_new_session=True,
    )


def test_wrong_settings_start_nothing(tmp_path: Path) -> None:
    done = train("--max-restarts=3", "--norm", "l9", "--output", str(tmp_path / "runs"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: model.norm: unknown norm 'l9'")
    assert done.stderr.count("error") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_what_must_fail_again_is_told_once_with_its_status(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    done = train("--max-restarts=3", "--norm=none", "--lr=1e30", "--output", str(tmp_path / "runs"), "data.workers=0")
    assert done.returncode == 76
    assert done.stderr.count("error:") == 1
    assert done.stderr.startswith("error: the training loss is not finite in epoch 1")
    assert len(list((tmp_path / "runs").iterdir())) == 1
    # Neither ours nor torchrun's folder stays.
    assert not [path for path in (tmp_path / "tmp").iterdir() if "norm-matters" in path.name or "elastic" in path.name]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", [(), ("--torchrun",)])
def test_a_killed_rank_costs_nothing_but_time(launcher: tuple[str, ...]) -> None:
    """Two kills with restarts, one without; `benchmarks/kill_ranks.py` does thirty."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "2", *launcher], capture_output=True, text=True, start_new_session=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [False, True])
def test_no_rank_outlives_its_launcher(torchrun: bool, tmp_path: Path) -> None:
    trial = Trial(tmp_path, restarts=3, torchrun=torchrun)
    trial.wait_for_ranks()
    time.sleep(2)  # the first thing that a rank does, once Python has started
    pids = ranks_of(trial.process.pid).values()
    assert len(pids) == 2
    os.kill(trial.process.pid, signal.SIGKILL)
    trial.process.wait()
    trial.close()
    time.sleep(5)
    assert [pid for pid in pids if alive(pid)] == []


@pytest.mark.slow
def test_ctrl_c_ends_all(tmp_path: Path) -> None:
    trial = Trial(tmp_path, restarts=3, torchrun=False)
    trial.wait_for_ranks()
    time.sleep(6)
    pids = ranks_of(trial.process.pid).values()
    os.kill(trial.process.pid, signal.SIGINT)
    assert trial.process.wait(timeout=60) == 130
    assert [pid for pid in pids if alive(pid)] == []
    text = trial.text()
    trial.close()
    assert "Traceback" not in text


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("number", "whom"),
    [(signal.SIGTERM, "launcher"), (signal.SIGUSR1, "launcher"), (signal.SIGTERM, "a rank"), (signal.SIGTERM, "all")],
)
def test_a_preempted_run_is_saved_and_not_started_again(number: signal.Signals, whom: str, tmp_path: Path) -> None:
    """Whoever gets the signal, all ranks stop after the same step, and the launcher says 75."""
    trial = Trial(tmp_path, restarts=3, torchrun=False)
    trial.wait_for_ranks()
    while not list(trial.output.glob("*/results.csv")):
        assert trial.process.poll() is None, trial.text()
        time.sleep(0.05)
    ranks = list(ranks_of(trial.process.pid).values())
    for pid in {"launcher": [trial.process.pid], "a rank": ranks[:1], "all": [trial.process.pid, *ranks]}[whom]:
        os.kill(pid, number)
    assert trial.process.wait(timeout=100) == 75
    text = trial.text()
    trial.close()
    assert [pid for pid in ranks if alive(pid)] == []
    assert "Traceback" not in text
    assert text.count(f"preempted by {number.name} after step") == 1
    (run,) = trial.output.iterdir()
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_status"]) == ("preempted", 75)
    assert "events" not in json.loads((run / "provenance.json").read_text())
    assert load_checkpoint(find_checkpoint(run, "last")).step == status["step"]


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
