"""Runs within the process of their sweep: the same results, logs and failures as of processes of their own."""

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from norm_matters import run as run_module
from norm_matters.cli_sweep import terminable
from norm_matters.core.errors import NumericalError, PreemptedError
from norm_matters.experiments import runner, sweep
from norm_matters.experiments.executors import Placement, make_executor, parallel_runs
from norm_matters.experiments.locks import IN_USE
from norm_matters.experiments.runner import _task
from norm_matters.experiments.sweeping import as_grid, plan_sweep
from norm_matters.record.table import TIMING_COLUMNS

SETTINGS: dict[str, Any] = {"norm": ["l2", "l1"], "epochs": 2, "batch_size": 512, "device": "cpu", "seed": 3}
# Holds a lock, says so, and waits for the end of its input.
HOLD = """
import sys
from pathlib import Path
from norm_matters.experiments.locks import hold
assert hold(Path(sys.argv[1])) is None
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "POLL", 0.0)


def results(output: Path) -> dict[str, list[dict[str, str]]]:
    """Run -> rows of its table without the columns of time."""
    found = {}
    for path in sorted(output.glob("*/results.csv")):
        with path.open() as stream:
            rows = [
                {key: cell for key, cell in row.items() if key not in TIMING_COLUMNS} for row in csv.DictReader(stream)
            ]
        found[path.parent.name] = rows
    return found


def test_a_sweep_within_its_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    settings = {**SETTINGS, "epochs": 1}
    found = sweep(settings, output=tmp_path, executor="inline")
    assert not found.failed
    assert [len(rows) for rows in results(tmp_path).values()] == [1, 1]
    (log, _) = sorted((tmp_path / "logs").iterdir())
    assert ": norm-matters train " in log.read_text()
    assert capfd.readouterr().out == ""
    assert torch.get_num_threads() == threads
    before = results(tmp_path)
    assert not sweep(settings, output=tmp_path, executor="inline").failed
    assert results(tmp_path) == before
    assert log.read_text().count(": norm-matters train ") == 1  # done runs are left alone


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sweep({**SETTINGS, "norm": "l1"}, output=tmp_path / "whole", executor="inline")
    train = run_module.train

    def stop_after_an_epoch(*arguments: Any, **options: Any) -> Any:
        def stop(event: Any) -> None:
            if event.row is not None:
                raise NumericalError("enough")

        return train(*arguments, **{**options, "on_progress": stop})

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "train", stop_after_an_epoch)
        cut = sweep({**SETTINGS, "norm": "l1"}, output=tmp_path / "cut", executor="inline")
    (error,) = cut.failed.values()
    assert error.startswith("enough (exit status 76; ")
    assert not sweep({**SETTINGS, "norm": "l1"}, output=tmp_path / "cut", executor="inline").failed
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    assert not whole.failed


def test_an_error_of_ours_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr(run_module, "train", fail)
    found = sweep({**SETTINGS, "norm": "l1"}, output=tmp_path, executor="inline")
    (error,) = found.failed.values()
    assert error.startswith("ZeroDivisionError: a mistake (exit status 1; ")


def test_what_ends_a_run_from_outside_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise PreemptedError("preempted by SIGTERM")

    monkeypatch.setattr(run_module, "train", fail)
    with pytest.raises(KeyboardInterrupt):
        sweep(SETTINGS, output=tmp_path, executor="inline")


def after_an_epoch(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Have new runs do this when they have their first epoch."""
    train = run_module.train

    def acting(*arguments: Any, **options: Any) -> Any:
        def follow(event: Any) -> None:
            if event.row is not None and event.row["epoch"] == 1:
                act()

        return train(*arguments, **{**options, "on_progress": follow})

    monkeypatch.setattr(run_module, "train", acting)


def test_sigterm_ends_a_run_as_its_own_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after_an_epoch(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt), terminable() as signals:
        sweep(SETTINGS, output=tmp_path, executor="inline")
    assert signals == [signal.SIGTERM]
    with (tmp_path / "runs.csv").open() as stream:
        first, second = csv.DictReader(stream)
    assert (first["status"], first["epoch"]) == ("cut off", "1")
    assert (second["status"], second["epoch"]) == ("new", "0")
    # Of the two steps of an epoch: it was asked after the second.
    assert os.readlink(tmp_path / first["run"] / "checkpoints" / "last") == "step-000000003"
    assert "stopped: KeyboardInterrupt" in (tmp_path / first["run"] / "log.txt").read_text().splitlines()[-1]


@pytest.mark.slow
def test_a_run_whose_time_is_over_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def time_is_over() -> None:
        raise PreemptedError("preempted by the end of its time (train.max_time=1h)")

    with monkeypatch.context() as patch:
        after_an_epoch(patch, time_is_over)
        assert not sweep(SETTINGS, output=tmp_path / "cut", executor="inline").failed
    assert [log.read_text().count(": norm-matters train ") for log in (tmp_path / "cut" / "logs").iterdir()] == [2, 2]
    sweep(SETTINGS, output=tmp_path / "whole", executor="inline")
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


def test_a_run_in_use_is_left_alone(tmp_path: Path) -> None:
    plan = plan_sweep(as_grid({**SETTINGS, "norm": "l1"}), output=tmp_path, placement=Placement("inline"))
    executor = make_executor(plan.placement, [cell.config for cell in plan.cells], tmp_path)
    lock = tmp_path / ".locks" / plan.cells[0].name
    lock.parent.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert executor.start(_task(plan.cells[0], tmp_path, {})).status() == IN_USE
        process.communicate(b"")
    assert not (tmp_path / plan.cells[0].name).exists()


def test_one_at_a_time_whatever_is_asked() -> None:
    assert parallel_runs(Placement("inline", jobs=4), []) == 1


@pytest.mark.slow
def test_results_are_those_of_processes(tmp_path: Path) -> None:
    sweep(SETTINGS, output=tmp_path / "inline", executor="inline")
    sweep(SETTINGS, output=tmp_path / "local", executor="local", jobs=1)
    assert results(tmp_path / "inline") == results(tmp_path / "local")
