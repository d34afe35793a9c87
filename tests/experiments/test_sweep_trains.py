"""Sweeps that train: equal results wherever they run, and none lost or repeated when they are killed."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from norm_matters.cli import main
from norm_matters.record.table import TIMING_COLUMNS

GRID = ["norm=l2,l1", "seed=0,1", "--epochs", "2", "--batch-size", "256", "--device", "cpu", "--baseline", "norm=l2"]


def table(path: Path) -> list[dict[str, str]]:
    """A CSV without the columns of time."""
    with path.open() as stream:
        return [{key: cell for key, cell in row.items() if key not in TIMING_COLUMNS} for row in csv.DictReader(stream)]


def tables(output: Path) -> dict[str, Any]:
    """All tables of a sweep: its own, and those of its runs."""
    names = [
        "runs.csv",
        "summary.csv",
        *sorted(f"{path.parent.name}/results.csv" for path in output.glob("*/results.csv")),
    ]
    return {name: table(output / name) for name in names}


def starts(output: Path) -> dict[str, int]:
    """Run -> how often its training was started, as the logs of the processes tell."""
    return {path.stem: path.read_text().count(": norm-matters train ") for path in output.glob("logs/*.txt")}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that nothing disturbed."""
    output = tmp_path_factory.mktemp("local")
    assert main(["sweep", *GRID, "--output", str(output)]) == 0
    return output


@pytest.mark.slow
def test_one_run_is_trained_by_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sweep", "norm=l1", "--epochs", "1", "--batch-size=256", "--device=cpu", "--output", str(tmp_path)]
    assert main(arguments) == 0
    name = "resnet8-l1-digits-1ep-batch_size256-s0"
    assert f"[1/1] {name}: done, val_error1 " in capsys.readouterr().out
    provenance = json.loads((tmp_path / name / "provenance.json").read_text())
    assert provenance["machine"]["threads"] == 1
    assert provenance["command"][:2] == ["norm-matters", "train"]
    assert (tmp_path / name / "report.html").exists()
    assert main(arguments) == 0
    assert starts(tmp_path) == {name: 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [["--executor", "slurm", "--slurm", "cluster=local", "--jobs", "2"], ["--executor", "ray"], ["--jobs", "1"]],
    ids=["slurm", "ray", "one after the other"],
)
def test_tables_are_equal_wherever_the_runs_are(arguments: list[str], local: Path, tmp_path: Path) -> None:
    if "ray" in arguments:
        pytest.importorskip("ray")
    if "slurm" in arguments:
        pytest.importorskip("submitit")
    # In a process of its own: what these libraries leave open is theirs.
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "norm_matters",
        "sweep",
        *GRID,
        *arguments,
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(tables(local)) == 6
    assert tables(tmp_path) == tables(local)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=["kill", "ctrl-c", "preempted"])
def test_a_killed_sweep_goes_on_and_repeats_no_finished_run(
    sent: signal.Signals, local: Path, tmp_path: Path, command: Callable[..., subprocess.Popen]
) -> None:
    process = command("sweep", *GRID, "--output", str(tmp_path), start_new_session=True)
    line = ""
    while ": done" not in line:
        line = process.stdout.readline()
        assert line, process.stderr.read()
    os.kill(process.pid, sent)
    _, error = process.communicate(timeout=100)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 75}[sent]
    if sent != signal.SIGKILL:
        assert "the same command goes on from here" in error
        assert len(table(tmp_path / "runs.csv")) == 4
    finished = line.split("] ")[1].split(":")[0]
    before = (tmp_path / finished / "results.csv").stat()
    again = command("sweep", *GRID, "--output", str(tmp_path))
    out, error = again.communicate(timeout=200)
    assert (again.returncode, error) == (0, "")
    assert f"] {finished}: " not in out
    assert starts(tmp_path)[finished] == 1
    assert (tmp_path / finished / "results.csv").stat().st_mtime_ns == before.st_mtime_ns
    assert tables(tmp_path) == tables(local)


@pytest.mark.slow
def test_two_sweeps_on_one_folder_share_the_work(
    local: Path, tmp_path: Path, command: Callable[..., subprocess.Popen]
) -> None:
    both = [command("sweep", *GRID, "--jobs", "1", "--output", str(tmp_path)) for _ in range(2)]
    for process in both:
        _, error = process.communicate(timeout=250)
        assert (process.returncode, error) == (0, "")
    assert starts(tmp_path) == dict.fromkeys((run["run"] for run in table(local / "runs.csv")), 1)
    assert tables(tmp_path) == tables(local)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "library"),
    [(["slurm", "--slurm", "cluster=local", "--jobs", "2"], "submitit"), (["ray"], "ray")],
    ids=["slurm", "ray"],
)
def test_ctrl_c_reaches_the_trainings_of_every_executor(
    arguments: list[str], library: str, tmp_path: Path, command: Callable[..., subprocess.Popen]
) -> None:
    pytest.importorskip(library)
    process = command(
        "sweep", "seed=0,1", "--epochs=500", "--batch-size=256", "--device=cpu", "--output", str(tmp_path),
        "--executor", *arguments, start_new_session=True,
    )  # fmt: skip
    for _ in range(1500):
        if len(list(tmp_path.glob("*/results.csv"))) == 2:
            break
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=100)
    assert process.returncode == 130
    for log in tmp_path.glob("*/log.txt"):
        assert "stopped: KeyboardInterrupt" in log.read_text().splitlines()[-1]


@pytest.mark.slow
def test_an_estimate_where_nothing_is_recorded_comes_from_a_trial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "nothing"
    assert main(["sweep", *GRID, "--dry-run", "--output", str(output)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(
        r"about \d+ (s|min) \(a few steps of resnet8-l2-digits-2ep-batch_size256-s0, trained alone\)", last
    )
    assert not output.exists()
