"""Running cells, with an executor that only pretends: what is started, what is repeated, and what is told."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from norm_matters.core.config import RunConfig
from norm_matters.core.errors import UserError
from norm_matters.experiments import runner
from norm_matters.experiments.cells import Cell, make_cells
from norm_matters.experiments.executors.base import Task
from norm_matters.experiments.grid import parse_grid
from norm_matters.experiments.locks import IN_USE, holder
from norm_matters.experiments.runner import Run, run_cells, runs_of
from norm_matters.experiments.standing import conflicts, find_standing, is_done, is_unborn, lock_path, log_path
from norm_matters.record import save_checkpoint
from norm_matters.run import complete

# Holds a lock, says so, and waits for the end of its input.
HOLD = """
import sys
from pathlib import Path
from norm_matters.experiments.locks import hold
assert hold(Path(sys.argv[1])) is None
print("held", flush=True)
sys.stdin.read()
"""
# Holds a lock, and goes on as another program that says so and waits, with workers that come and go.
HOLD_AND_EXEC = """
import os, sys
from pathlib import Path
from norm_matters.experiments.locks import hold
from norm_matters.record import save_checkpoint
assert hold(Path(sys.argv[1])) is None
program = "import os, sys; os.fork() or os._exit(0); os.wait(); print('held', flush=True); sys.stdin.read()"
os.execv(sys.executable, [sys.executable, "-c", program])
"""


def filled(config: RunConfig) -> RunConfig:
    return complete(config, epochs=2)


@pytest.fixture
def cells() -> list[Cell]:
    return make_cells(parse_grid({"grid": {"norm": ["l2", "l1"], "seed": [0, 1]}}), complete=filled, checks={})


class PretendJob:
    """Ends with a status at the second look."""

    def __init__(self, end: Callable[[], int]) -> None:
        self._end = end
        self._looks = 0

    def status(self) -> int | None:
        self._looks += 1
        return None if self._looks == 1 else self._end()


class PretendExecutor:
    """Calls `train` with each task when its job ends."""

    def __init__(self, train: Callable[[Task], int], capacity: int = 2) -> None:
        self.capacity = capacity
        self.started: list[str] = []
        self.stopped = 0
        self._train = train

    def start(self, task: Task) -> PretendJob:
        self.started.append(task.name)
        return PretendJob(lambda: self._train(task))

    def stop(self, jobs: Sequence[object]) -> None:
        self.stopped = len(jobs)

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "POLL", 0.01)


@pytest.fixture
def train(tmp_path: Path, cells: list[Cell], make_run: Callable[..., Path]) -> Callable[[Task], int]:
    """Leaves a finished run."""

    def finish(task: Task) -> int:
        cell = next(cell for cell in cells if cell.name == task.name)
        if (tmp_path / cell.name).exists():
            shutil.rmtree(tmp_path / cell.name)
        make_run(tmp_path, cell, [50.0, 40.0])
        return 0

    return finish


def runs_in(output: Path, cells: Sequence[Cell]) -> list[Run]:
    return runs_of([find_standing(cell, output) for cell in cells])


def test_standings(tmp_path: Path, cells: list[Cell], make_run: Callable[..., Path]) -> None:
    done, cut_off, no_checkpoint_of_its_end, new = cells
    make_run(tmp_path, done, [50.0, 40.0])
    make_run(tmp_path, cut_off, [50.0])
    make_run(tmp_path, no_checkpoint_of_its_end, [50.0, 40.0], checkpoint=1)
    assert [find_standing(cell, tmp_path).status for cell in cells] == ["done", "cut off", "cut off", "new"]
    shutil.rmtree(tmp_path / done.name / "checkpoints")  # deleted to save space
    assert is_done(tmp_path / done.name, 2)
    assert not is_done(tmp_path / new.name, 2)
    # Paused in the evaluation of its last epoch, and killed after that epoch's row: the step is that of the end.
    half = make_run(tmp_path / "other", done, [50.0, 40.0])
    save_checkpoint(half, step=22, model={}, training={}, state={"epoch": 1}, best=False)
    assert not is_done(half, 2)
    # Of one epoch, and the disk was full when its checkpoint was to be written.
    assert not is_done(make_run(tmp_path / "another", done, [50.0], checkpoint=0), 1)
    with (tmp_path / cut_off.name / "results.csv").open("a") as stream:
        stream.write("no,row\n")
    assert find_standing(cut_off, tmp_path).status == "cut off"


def test_only_what_is_not_done_is_started(
    tmp_path: Path, cells: list[Cell], make_run: Callable[..., Path], train: Callable[[Task], int]
) -> None:
    make_run(tmp_path, cells[1], [50.0, 40.0])
    make_run(tmp_path, cells[2], [50.0])
    executor, runs, seen = PretendExecutor(train), runs_in(tmp_path, cells), []
    run_cells(
        runs, tmp_path, executor, on_change=lambda _, run: seen.append((run.cell.name, run.status)) if run else None
    )
    assert executor.started == [cells[0].name, cells[2].name, cells[3].name]
    assert [run.status for run in runs] == ["done"] * 4
    assert [status for name, status in seen if name == cells[0].name] == ["queued", "done"]
    run_cells(again := runs_in(tmp_path, cells), tmp_path, executor)
    assert len(executor.started) == 3
    assert [run.outcome().rows[-1]["val_error1"] for run in again] == [40.0] * 4


def test_no_more_are_started_than_there_is_room_for(
    tmp_path: Path, cells: list[Cell], train: Callable[[Task], int]
) -> None:
    most = 0

    def count(runs: Sequence[Run], _: Run | None) -> None:
        nonlocal most
        most = max(most, sum(run.job is not None for run in runs))

    run_cells(runs_in(tmp_path, cells), tmp_path, PretendExecutor(train, capacity=3), on_change=count)
    assert most == 3


@pytest.mark.parametrize(("exit_status", "starts"), [(74, 2), (76, 1)], ids=["failed", "diverged"])
def test_a_failure_does_not_stop_the_rest_and_is_told(
    exit_status: int, starts: int, tmp_path: Path, cells: list[Cell], train: Callable[[Task], int]
) -> None:
    bad = cells[1]

    def sometimes(task: Task) -> int:
        if task.name != bad.name:
            return train(task)
        log = Path(task.log)
        log.parent.mkdir(exist_ok=True)
        log.write_text("error: of an earlier start\nnow: norm-matters train x\nerror: the loss is nan\nbye\n")
        return exit_status

    runs = runs_in(tmp_path, cells)
    executor = PretendExecutor(sometimes)
    run_cells(runs, tmp_path, executor, retries=1)
    assert [run.status for run in runs] == ["done", "failed", "done", "done"]
    assert runs[1].error == f"the loss is nan (exit status {exit_status}; {log_path(tmp_path, bad)})"
    assert executor.started.count(bad.name) == starts


class FullExecutor(PretendExecutor):
    """Refuses what is more than `limit` jobs."""

    def __init__(self, train: Callable[[Task], int], limit: int) -> None:
        super().__init__(self._ending(train), capacity=10)
        self.limit, self.running, self.refused = limit, 0, 0

    def _ending(self, train: Callable[[Task], int]) -> Callable[[Task], int]:
        def end(task: Task) -> int:
            self.running -= 1
            return train(task)

        return end

    def start(self, task: Task) -> PretendJob:
        if self.running == self.limit:
            self.refused += 1
            raise UserError("--executor slurm: the queue is full")
        self.running += 1
        return super().start(task)


def test_what_is_refused_is_started_when_a_job_has_ended(
    tmp_path: Path, cells: list[Cell], train: Callable[[Task], int]
) -> None:
    executor, runs = FullExecutor(train, limit=2), runs_in(tmp_path, cells)
    run_cells(runs, tmp_path, executor)
    assert [run.status for run in runs] == ["done"] * 4
    assert executor.started == [cell.name for cell in cells]
    assert (executor.refused, executor.stopped) == (1, 0)
    shutil.rmtree(tmp_path / cells[0].name)
    with pytest.raises(UserError, match="the queue is full"):
        run_cells(runs_in(tmp_path, cells), tmp_path, FullExecutor(train, limit=0))


def test_a_preempted_run_is_resumed_as_long_as_it_comes_further(
    tmp_path: Path, cells: list[Cell], make_run: Callable[..., Path], train: Callable[[Task], int]
) -> None:
    starts = []

    def preempted_twice(task: Task) -> int:
        starts.append(task.name)
        if len(starts) == 3:
            return train(task)
        shutil.rmtree(tmp_path / task.name, ignore_errors=True)
        make_run(tmp_path, cells[0], [50.0], checkpoint=len(starts))
        return 75

    runs = runs_in(tmp_path, cells[:1])
    run_cells(runs, tmp_path, PretendExecutor(preempted_twice))
    assert (runs[0].status, len(starts)) == ("done", 3)

    executor, again = PretendExecutor(lambda task: 75), runs_in(tmp_path, cells[1:2])
    run_cells(again, tmp_path, executor)
    assert (again[0].status, len(executor.started)) == ("failed", 1)


def test_a_failure_without_words_is_told(tmp_path: Path, cells: list[Cell]) -> None:
    runs = runs_in(tmp_path, cells[:1])
    run_cells(runs, tmp_path, PretendExecutor(lambda _: -9))
    assert runs[0].error.startswith("it printed nothing (signal 9; ")


def test_an_interrupt_ends_the_jobs_and_tells_how_far_they_came(
    tmp_path: Path, cells: list[Cell], make_run: Callable[..., Path], train: Callable[[Task], int]
) -> None:
    executor, runs = PretendExecutor(train), runs_in(tmp_path, cells)
    make_run(tmp_path, cells[1], [50.0])

    def interrupt(runs: Sequence[Run], changed: Run | None) -> None:
        if changed is not None and changed.status == "done":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cells(runs, tmp_path, executor, on_change=interrupt)
    assert executor.stopped == 1
    assert [run.status for run in runs] == ["done", "cut off", "new", "new"]
    assert runs[1].epoch == 1


def test_an_interrupt_while_a_run_is_started_tells_how_far_it_came(
    tmp_path: Path, cells: list[Cell], make_run: Callable[..., Path]
) -> None:
    class Interrupted(PretendExecutor):
        def start(self, task: Task) -> PretendJob:
            make_run(tmp_path, cells[0], [50.0], checkpoint=1)
            raise KeyboardInterrupt

    runs = runs_in(tmp_path, cells)
    with pytest.raises(KeyboardInterrupt):
        run_cells(runs, tmp_path, Interrupted(lambda _: 0))
    assert [(run.status, run.epoch) for run in runs[:2]] == [("cut off", 1), ("new", 0)]


def test_a_lock_lasts_as_long_as_its_process_whatever_program_that_goes_on_with(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    assert holder(lock) is None
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_AND_EXEC, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        assert (holder(lock) or "").startswith(f"process {process.pid} on ")
        process.kill()
    assert holder(lock) is None


def test_what_another_process_trains_is_left_to_it_and_taken_over_when_it_dies(
    tmp_path: Path, cells: list[Cell], train: Callable[[Task], int]
) -> None:
    lock = lock_path(tmp_path, cells[0])
    lock.parent.mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        runs, seen = runs_in(tmp_path, cells), []
        assert runs[0].status == "elsewhere"
        assert str(other.pid) in (runs[0].holder or "")

        def follow(runs: Sequence[Run], changed: Run | None) -> None:
            if changed:
                seen.append((changed.cell.name, changed.status))
            if all(run.ended for run in runs[1:]) and other.poll() is None:
                other.kill()
                other.wait()

        executor = PretendExecutor(train)
        run_cells(runs, tmp_path, executor, on_change=follow)
    assert executor.started[-1] == cells[0].name
    assert [status for name, status in seen if name == cells[0].name] == ["cut off", "queued", "done"]
    assert holder(lock) is None


def test_a_job_that_finds_its_run_in_use_is_no_failure(
    tmp_path: Path, cells: list[Cell], make_run: Callable[..., Path]
) -> None:
    def elsewhere(task: Task) -> int:
        # Between the look at the run and the job's start another sweep has taken it, and finishes it.
        make_run(tmp_path, cells[0], [50.0], checkpoint=1)
        return IN_USE

    runs = runs_in(tmp_path, cells[:1])
    seen = []

    def follow(_: Sequence[Run], changed: Run | None) -> None:
        if changed:
            seen.append(changed.status)
        if seen[-1:] == ["elsewhere"]:
            shutil.rmtree(tmp_path / cells[0].name)
            make_run(tmp_path, cells[0], [50.0, 40.0])

    run_cells(runs, tmp_path, PretendExecutor(elsewhere), on_change=follow)
    assert seen == ["queued", "elsewhere", "done"]


def test_a_run_that_is_trained_by_hand_is_waited_for(
    tmp_path: Path, cells: list[Cell], make_run: Callable[..., Path], train: Callable[[Task], int]
) -> None:
    """`norm-matters train --resume` holds the lock of the run folder, and none of a sweep."""
    folder, by_hand = make_run(tmp_path, cells[0], [50.0]), list[subprocess.Popen[str]]()

    def hold() -> None:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder / ".lock")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        by_hand.append(process)

    def taken(task: Task) -> int:
        # Between the look at the run and the job's start.
        if by_hand:
            return train(task)
        hold()
        return IN_USE

    looks = 0

    def follow(runs: Sequence[Run], _: Run | None) -> None:
        nonlocal looks
        looks += runs[0].status == "elsewhere"
        if looks == 1:
            assert str(by_hand[0].pid) in (runs[0].holder or "")
            assert find_standing(cells[0], tmp_path).status == "elsewhere"
        if looks == 5:
            by_hand[0].communicate("")

    executor, runs = PretendExecutor(taken), runs_in(tmp_path, cells[:1])
    run_cells(runs, tmp_path, executor, on_change=follow)
    assert runs[0].status == "done"
    assert len(executor.started) == 2


def test_a_folder_of_another_configuration_is_an_error_that_names_the_keys(
    tmp_path: Path, cells: list[Cell], make_run: Callable[..., Path]
) -> None:
    cell = cells[0]
    make_run(tmp_path, cell)
    assert conflicts(cell, tmp_path, ()) == []
    other = filled(RunConfig.model_validate({"data": {"batch_size": 7, "workers": 1}}))
    changed = Cell(cell.name, other, {})
    (problem,) = conflicts(changed, tmp_path, {"data.workers"})
    assert problem.startswith(f"data.batch_size: the run in '{tmp_path / cell.name}' has 128, not 7")
    assert len(conflicts(changed, tmp_path, ())) == 2


def test_a_data_folder_is_the_same_however_it_is_written(
    tmp_path: Path, make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def cell_of(folder: str | None) -> Cell:
        return Cell("run", filled(RunConfig.model_validate({"data": {"dir": folder}})), {})

    make_run(tmp_path, cell_of("images"))
    for same in ("./images/", str(tmp_path / "images")):
        assert conflicts(cell_of(same), tmp_path, ()) == []
    for other in ("photos", None):
        (problem,) = conflicts(cell_of(other), tmp_path, ())
        assert problem.startswith("data.dir: the run in ")
    assert conflicts(cell_of("photos"), tmp_path, {"data.dir"}) == []


def test_what_a_process_leaves_that_dies_at_its_start_is_no_run_and_not_in_the_way(
    tmp_path: Path, cells: list[Cell]
) -> None:
    folder = tmp_path / cells[0].name
    folder.mkdir()
    (folder / "config.yaml").touch()
    (folder / ".tmp-provenance.json-0123").touch()
    assert is_unborn(folder)
    assert find_standing(cells[0], tmp_path).status == "new"
    assert conflicts(cells[0], tmp_path, ()) == []
    (folder / "photos").mkdir()
    assert conflicts(cells[0], tmp_path, ()) == [f"'{folder}' is in the way: it is no run folder"]


def test_a_run_starts_when_those_before_it_are_done(
    tmp_path: Path, cells: list[Cell], train: Callable[[Task], int]
) -> None:
    executor = PretendExecutor(train, capacity=4)
    first, second, third, fourth = (cell.name for cell in cells)
    run_cells(
        runs_of([find_standing(cell, tmp_path) for cell in cells]),
        tmp_path,
        executor,
        after={first: [third], second: [first, third]},
    )
    assert executor.started == [third, fourth, first, second]


def test_a_run_after_one_that_failed_fails_with_its_name(
    tmp_path: Path, cells: list[Cell], train: Callable[[Task], int]
) -> None:
    executor = PretendExecutor(lambda task: 1 if task.name == cells[0].name else train(task))
    runs = runs_of([find_standing(cell, tmp_path) for cell in cells])
    names = [cell.name for cell in cells]
    run_cells(runs, tmp_path, executor, after={names[1]: [names[0]], names[2]: [names[1]]})
    assert [run.status for run in runs] == ["failed", "failed", "failed", "done"]
    assert runs[1].error == f"it comes after {names[0]}, which failed"
    assert executor.started == [names[0], names[3]]
