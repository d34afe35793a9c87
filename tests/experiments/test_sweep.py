"""The command `sweep` over runs that are there already: nothing trains here."""

import csv
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import norm_matters as nm
from norm_matters.cli import main
from norm_matters.cli_sweep import terminable
from norm_matters.core import stopping
from norm_matters.core.errors import UserError
from norm_matters.core.yaml import read_yaml
from norm_matters.experiments.cells import Cell
from norm_matters.experiments.executors import Placement, make_executor, parallel_runs
from norm_matters.experiments.pace import Estimate
from norm_matters.experiments.sweeping import as_grid, plan_sweep

GRID = ["norm=l2,l1", "seed=0..2", "--epochs", "2", "--device", "cpu"]
ERRORS = {"l2": (10.0, 12.0, 11.0), "l1": (10.5, 12.8, 11.2)}


@pytest.fixture
def finished(tmp_path: Path, make_run: Callable[..., Path]) -> Path:
    """The output folder of a sweep whose runs are all done."""
    for cell in cells_in(tmp_path):
        make_run(tmp_path, cell, [50.0, ERRORS[cell.settings["model.norm"]][cell.settings["seed"]]])
    return tmp_path


def cells_in(output: Path) -> list[Cell]:
    grid = as_grid({"norm": ["l2", "l1"], "seed": range(3), "epochs": 2, "device": "cpu"})
    return list(plan_sweep(grid, output=output).cells)


def test_a_finished_sweep_is_summarised(
    finished: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["sweep", *GRID, "--output", str(finished), "--baseline", "norm=l2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(None, 2)[:2] == ["arm", "n"]
    assert lines[0].endswith("p (Holm)")
    assert lines[2].split()[:5] == ["l1", "3/3", "11.5", "±", "1.2"]
    assert lines[3] == f"summary {finished / 'summary.html'}"
    with (finished / "summary.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["norm"] for row in rows] == ["l2", "l1"]
    assert float(rows[1]["difference"]) == pytest.approx(0.5)
    with (finished / "runs.csv").open() as stream:
        runs = list(csv.DictReader(stream))
    assert [(run["norm"], run["seed"], run["status"]) for run in runs] == [
        (norm, str(seed), "done") for norm in ("l2", "l1") for seed in range(3)
    ]
    page = (finished / "summary.html").read_text()
    for words in ("l1", "paired t test", "resnet8-l1-digits-2ep-s2", "p (Holm)"):
        assert words in page
    assert not caplog.records  # bokeh logs what is wrong with a plot
    assert not list(finished.glob("logs/*"))  # nothing was started


def test_sweep_yaml_is_a_grid_and_keeps_the_history(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", *GRID, "--output", str(finished)]) == 0
    first = read_yaml((finished / "sweep.yaml").read_text(), "sweep.yaml")
    assert first["grid"] == {"model.norm": ["l2", "l1"], "seed": [0, 1, 2]}
    assert first["history"][0]["command"][:2] == ["norm-matters", "sweep"]
    assert main(["sweep", str(finished / "sweep.yaml"), "--output", str(finished), "--json"]) == 0
    again = read_yaml((finished / "sweep.yaml").read_text(), "sweep.yaml")
    assert len(again.pop("history")) == 2
    assert again.items() <= first.items()
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["n"] for row in printed["summary"]] == [3, 3]
    assert printed["failed"] == {}


def test_dry_run_tells_new_done_and_resumed_runs_and_writes_nothing(
    finished: Path, make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    cells = cells_in(finished)
    (finished / cells[1].name).rename(finished / "elsewhere")
    (finished / cells[2].name / "results.csv").unlink()
    (finished / cells[2].name / "checkpoints" / "last").unlink()
    before = sorted(finished.rglob("*"))
    assert main(["sweep", *GRID, "--output", str(finished), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:6]] == ["done", "new", "resume", "done", "done", "done"]
    assert lines[6] == "6 runs, 2 to train, 4 epochs"
    # Two runs side by side or one after the other, of two epochs of two seconds, and the start of a process.
    seconds = 8 if len(os.sched_getaffinity(0)) > 1 else 16
    assert lines[7] == f"about {seconds} s (the epochs of runs in {finished})"
    assert sorted(finished.rglob("*")) == before


def test_dry_run_as_json_with_a_trial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "norm_matters.experiments.sweeping.estimate", lambda work, *_, **__: Estimate(3.5 * len(work), "a guess")
    )
    output = tmp_path / "nothing"
    assert main(["sweep", *GRID, "--output", str(output), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["seconds"], plan["source"]) == (21, "a guess")
    assert plan["runs"][0] == {
        "run": "resnet8-l2-digits-2ep-s0", "state": "new", "epoch": 0, "epochs": 2, "model.norm": "l2", "seed": 0,
    }  # fmt: skip
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["norm=l2,l3"], ["unknown norm 'l3'"]),
        (["norm=l3", "seed=-1", "train.clipnorm=1"], ["unknown norm 'l3'", "seed: value -1", "train.clipnorm"]),
        (["seed=0,,1", "--norm", "l1,"], ["seed: an empty value", "--norm: an empty value"]),
        (["nowhere.yaml"], ["nowhere.yaml: cannot be read"]),
        (["a.yaml", "b.yaml"], ["'b.yaml': one GRID.yaml is taken"]),
        (["name=x"], ["a sweep names its runs itself"]),
        (["norm=l2,l1", "--baseline", "norm=linf"], ["no run has linf; there are: l2; l1"]),
        (["norm=l2,l1", "--baseline", "seed=1"], ["'seed' is not varied"]),
        (["norm=l2,l1", "--baseline", "l2"], ["it takes KEY=VALUE"]),
        (["--executor", "slrum"], ["did you mean 'slurm'?"]),
        (["--jobs", "0"], ["--jobs: value '0'"]),
        (["--threads", "two"], ["--threads: value 'two'"]),
        (["--retries", "-1"], ["--retries: value '-1'"]),
        (["--slurm", "partition=gpu"], ["it needs --executor slurm"]),
        (["--ray-address", "auto"], ["it needs --executor ray"]),
        (["--metric", "val_eror1"], ["did you mean 'val_error1'?"]),
        (["--last", "10st"], ["counts steps"]),
    ],
)
def test_wrong_inputs_end_with_a_line_each_and_create_nothing(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "runs"
    assert main(["sweep", *arguments, "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert all(line.startswith("error: ") for line in error.splitlines())
    for each in words:
        assert each in error
    assert not output.exists()


def test_a_run_with_other_settings_under_the_same_name_is_refused(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = finished / cells_in(finished)[3].name / "config.yaml"
    config.write_text(config.read_text().replace("batch_size: 128", "batch_size: 64"))
    assert main(["sweep", *GRID, "--output", str(finished)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "data.batch_size: the run in" in line
    assert "resnet8-l1-digits-2ep-s0' has 64, not 128" in line


@pytest.mark.parametrize(("key", "option"), [("regime.norms", "regime.norms={}"), ("data.dir", "data.dir={}")])
def test_a_run_made_from_other_files_under_the_same_name_is_refused(
    key: str,
    option: str,
    tmp_path: Path,
    make_run: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    grid = as_grid({"epochs": 2, "device": "cpu", key: "a"})
    (cell,) = plan_sweep(grid, output=tmp_path).cells
    assert cell.name == "resnet8-l2-digits-2ep-s0"
    make_run(tmp_path, cell, [50.0, 40.0])
    arguments = ["sweep", "--epochs=2", "--device=cpu", "--dry-run", "--output", str(tmp_path)]
    assert main([*arguments, option.format("b")]) == 2
    assert f"error: {key}: the run in '{tmp_path / cell.name}' has " in capsys.readouterr().err
    for same in ("a", f"{tmp_path}/a"):
        assert main([*arguments, option.format(same)]) == 0
        assert capsys.readouterr().out.startswith(f"{cell.name}  done")


def test_sweep_yaml_of_settings_given_anew_is_a_grid(
    finished: Path, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("grid") / "grid.yaml"
    file.write_text("grid: {norm: [l2, l1], seed: 0..4}\nexclude: [{norm: l1, seed: [3, 4]}]\n")
    options = ["--device", "cpu", "--output", str(finished)]
    assert main(["sweep", str(file), "seed=0..2", "--epochs", "2", *options]) == 0
    assert main(["sweep", str(finished / "sweep.yaml"), *options]) == 0
    assert capsys.readouterr().err == ""


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminable() as signals:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals == [signal.SIGTERM]
        monkeypatch.setattr(stopping, "ECHO", 0.0)
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_failed_runs_are_listed_and_the_status_is_1(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = cells_in(finished)[0]
    (finished / cell.name / "results.csv").unlink()
    # A real process, that finds a damaged run and ends with status 2 before it trains.
    (finished / cell.name / "checkpoints" / "last").unlink()
    (finished / cell.name / "checkpoints" / "last").symlink_to("step-000000099")
    assert main(["sweep", *GRID, "--output", str(finished)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"failed: {cell.name}: ")
    assert "(exit status 2; " in captured.err
    assert "[6/6] resnet8-l2-digits-2ep-s0: failed: " in captured.out
    with (finished / "summary.csv").open() as stream:
        assert [(row["runs"], row["n"]) for row in csv.DictReader(stream)] == [("3", "2"), ("3", "3")]
    assert f"{cell.name}: failed: " in (finished / "summary.html").read_text()


def test_sweep_in_python(finished: Path) -> None:
    result = nm.sweep(
        {"norm": ["l2", "l1"], "seed": range(3), "epochs": 2, "device": "cpu"},
        output=finished,
        baseline={"norm": "l2"},
        last="2ep",
    )
    assert [arm.label for arm in result.arms] == ["l2", "l1"]
    assert result.summary[1]["val_error1_mean"] == pytest.approx((50 + 11.5) / 2)
    assert len(result.runs) == 6
    assert not result.failed


def test_placements() -> None:
    configs = [cell.config for cell in cells_in(Path("nowhere"))]
    cores = len(os.sched_getaffinity(0))
    assert parallel_runs(Placement(), configs) == cores
    assert parallel_runs(Placement(threads=cores), configs) == 1
    assert parallel_runs(Placement(jobs=5), configs) == 5
    assert parallel_runs(Placement("slurm"), configs) == 6
    assert parallel_runs(Placement("ray"), configs) == cores
    assert parallel_runs(Placement("ray", ray_address="auto"), configs) == 6
    executor = make_executor(Placement(jobs=3), configs, Path("nowhere"))
    assert executor.capacity == 3


def test_devices_are_those_of_the_machines_that_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    grid = as_grid({"device": "cuda", "epochs": 1})
    assert len(plan_sweep(grid, output=tmp_path, placement=Placement("slurm")).cells) == 1
    with pytest.raises(UserError, match="cuda"):
        plan_sweep(grid, output=tmp_path)
