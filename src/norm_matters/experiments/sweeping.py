"""A sweep from grid to summary: the file that joins this room, top to bottom."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from norm_matters.core.config import RunConfig
from norm_matters.core.errors import UserError
from norm_matters.experiments.cells import Cell, Complete, make_cells
from norm_matters.experiments.executors import ON_THIS_MACHINE, Placement, make_executor, parallel_runs
from norm_matters.experiments.grid import (
    Grid,
    Settings,
    full_key,
    override,
    points,
    read_grid,
    read_mapping,
)
from norm_matters.experiments.pace import Estimate, estimate
from norm_matters.experiments.runner import OnChange, run_cells, runs_of
from norm_matters.experiments.standing import Standing, conflicts, find_standing
from norm_matters.experiments.summary import Arm, Measure, Outcome, find_baseline, run_rows, summarise, table_csv
from norm_matters.models.trust import check_trusted, read_code, trust_named_file
from norm_matters.record.files import make_folder, write_file

SWEEP_FILE = "sweep.yaml"
# A resume may name them anew, since it looks at what it finds there; nobody looks for a run that is done.
_SOURCES = {"data.dir", "regime.norms"}
_MOST_CONFLICTS = 20


@dataclass(frozen=True)
class SweepPlan:
    """A sweep with everything checked, and nothing run or written.

    Attributes:
        output: folder of the runs.
        grid: what was asked for.
        cells: its runs.
        standings: where each stands.
        placement: where they are to run.
        measure: what is compared.
        baseline: settings of the arm that the others are compared with.
    """

    output: Path
    grid: Grid
    cells: Sequence[Cell]
    standings: Sequence[Standing]
    placement: Placement
    measure: Measure
    baseline: Settings | None

    def look(self) -> list[Standing]:
        """Where each run stands now."""
        return [find_standing(cell, self.output) for cell in self.cells]

    def work(self) -> list[tuple[Cell, int]]:
        """The cells that this sweep has to train, and how many epochs each has left."""
        return [
            (standing.cell, standing.cell.epochs - len(standing.rows))
            for standing in self.standings
            if standing.status in ("new", "cut off")
        ]


@dataclass(frozen=True)
class SweepResult:
    """What a sweep left behind.

    Attributes:
        folder: of the runs, of `runs.csv`, `summary.csv` and `summary.html`.
        runs: rows of runs.csv.
        arms: with their rows of summary.csv.
        failed: runs that failed, and why.
        page: summary.html; None where the sweep was interrupted.
    """

    folder: Path
    runs: Sequence[Mapping[str, Any]]
    arms: Sequence[Arm]
    failed: Mapping[str, str] = field(default_factory=dict)
    page: Path | None = None

    @property
    def summary(self) -> list[Mapping[str, Any]]:
        """The rows of summary.csv."""
        return [arm.row for arm in self.arms]


def sweep(
    grid: Grid | Path | Mapping[str, Any],
    *,
    output: Path | str = "runs/sweep",
    executor: str = "local",
    jobs: int | None = None,
    threads: int = 1,
    baseline: Mapping[str, Any] | None = None,
    metric: str = "val_error1",
    last: str = "1ep",
    retries: int = 0,
    slurm: Mapping[str, Any] | None = None,
    ray_address: str | None = None,
    command: Sequence[str] = (),
    on_change: OnChange | None = None,
) -> SweepResult:
    """Train every run of a grid that is not done yet, and compare its arms.

    Args:
        grid: a GRID.yaml, or setting -> value or list of values: `{"norm": ["l2", "l1"], "seed": range(3)}`. Keys
            are dotted ones or the names of common options.
        output: folder of the runs.
        executor: `local`, `slurm` or `ray`.
        jobs, threads, slurm, ray_address: see `Placement`.
        baseline: settings of the arm that all others are compared with, such as `{"norm": "l2"}`.
        metric, last: see `Measure`.
        retries: how often a run that failed is started again.
        command: the command line, for the record.
        on_change: called as the sweep goes on.

    Returns:
        also where runs have failed: see `failed`.

    Raises:
        UserError: anything that is wrong with the input; then nothing has been run.
        StorageError: the folder cannot be written.
    """
    plan = plan_sweep(
        as_grid(grid),
        output=Path(output),
        placement=Placement(executor, jobs, threads, slurm or {}, ray_address),
        measure=Measure(metric, last),
        baseline=baseline,
    )
    return run_sweep(plan, command=command, retries=retries, on_change=on_change)


def as_grid(given: Grid | Path | Mapping[str, Any]) -> Grid:
    """A grid from any of the forms in which `sweep` takes it."""
    if isinstance(given, Grid):
        return given
    if isinstance(given, Path):
        return read_grid(given)
    settings = {
        key: list(value) if isinstance(value, list | tuple | range) else [value] for key, value in given.items()
    }
    listed = {
        key: [point[full_key(key)] for point in points(full_key(key), values)] for key, values in settings.items()
    }
    for key, values in listed.items():
        for name in values if full_key(key) == "model.name" else ():
            trust_named_file({"model.name": name})
    return override(Grid({}, {}), listed)


def plan_sweep(
    grid: Grid,
    *,
    output: Path,
    placement: Placement | None = None,
    measure: Measure | None = None,
    baseline: Mapping[str, Any] | None = None,
) -> SweepPlan:
    """Check everything and see where each run stands; nothing is written.

    Raises:
        UserError: with every mistake that can be found, one line each.
    """
    # The checks know every model and norm, and need torch.
    from norm_matters.run import CHECKS, FREE_TO_CHANGE

    placement, measure = placement or Placement(), measure or Measure()
    placement.check()
    measure.check()
    complete = completion()
    free = FREE_TO_CHANGE - {"train.epochs"}
    # Elsewhere there may be devices that this machine has not.
    checks = {key: check for key, check in CHECKS.items() if key != "device" or placement.executor in ON_THIS_MACHINE}
    cells = make_cells(grid, complete=complete, checks=checks, free=free)
    # Here, for on the command lines of the runs their names are the user's own words.
    for name in {cell.config.model.name for cell in cells}:
        if name.endswith(".py"):
            check_trusted(Path(name), hashlib.sha256(read_code(Path(name))).hexdigest())
    compared = find_baseline(baseline, cells, complete) if baseline else None
    problems = [problem for cell in cells for problem in conflicts(cell, output, free - _SOURCES)]
    if len(problems) > _MOST_CONFLICTS:
        problems[_MOST_CONFLICTS:] = [f"and {len(problems) - _MOST_CONFLICTS} more like these"]
    if problems:
        raise UserError(*problems)
    standings = [find_standing(cell, output) for cell in cells]
    return SweepPlan(output, grid, cells, standings, placement, measure, compared)


def completion() -> Complete:
    """A function that completes configurations; a dataset is read only where it must say how long to train."""
    from norm_matters.datasets import load_dataset
    from norm_matters.run import complete

    own_epochs: dict[str, int] = {}

    def fill_in(config: RunConfig) -> RunConfig:
        key = config.data.model_dump_json()
        if config.train.epochs is None and key not in own_epochs:
            own_epochs[key] = load_dataset(config.data).epochs
        return complete(config, epochs=config.train.epochs or own_epochs[key])

    return fill_in


def estimate_sweep(plan: SweepPlan) -> Estimate:
    """How long the plan takes; may train a few steps (see `pace.estimate`)."""
    parallel = parallel_runs(plan.placement, [cell.config for cell in plan.cells])
    return estimate(plan.work(), plan.output, parallel=parallel, threads=plan.placement.threads)


def run_sweep(
    plan: SweepPlan, *, command: Sequence[str] = (), retries: int = 0, on_change: OnChange | None = None
) -> SweepResult:
    """Run what is left of a plan, and write the tables and the page.

    Raises:
        KeyboardInterrupt: after all processes have ended, and the tables have been written.
    """
    make_folder(plan.output)
    _record(plan, command)
    runs = runs_of(plan.standings)
    if not all(run.ended for run in runs):
        executor = make_executor(plan.placement, [cell.config for cell in plan.cells], plan.output)
        try:
            run_cells(runs, plan.output, executor, threads=plan.placement.threads, retries=retries, on_change=on_change)
        except BaseException:
            _write_tables(plan, [run.outcome() for run in runs])
            raise
        finally:
            executor.close()
    outcomes = [run.outcome() for run in runs]
    rows, arms = _write_tables(plan, outcomes)
    failed = {outcome.cell.name: outcome.error for outcome in outcomes if outcome.status == "failed"}
    page = write_page(plan, outcomes, rows, arms)
    return SweepResult(plan.output, rows, arms, failed, page)


def write_page(
    plan: SweepPlan, outcomes: Sequence[Outcome], rows: Sequence[Mapping[str, Any]], arms: Sequence[Arm]
) -> Path:
    """Write summary.html."""
    # It needs bokeh, whose import nothing else here waits for.
    from norm_matters.report.groups import Group
    from norm_matters.report.read import read_run
    from norm_matters.report.sweep import SweepArm, write_sweep_page

    shown = []
    for arm in arms:
        found = [outcome for outcome in arm.outcomes if outcome.rows]
        group = Group(arm.label, [read_run(plan.output / outcome.cell.name) for outcome in found])
        shown.append(SweepArm(group, arm.values(plan.measure), arm.row))
    notes = [f"{outcome.cell.name}: failed: {outcome.error}" for outcome in outcomes if outcome.status == "failed"]
    page = plan.output / "summary.html"
    count = sum(outcome.status == "done" for outcome in outcomes)
    measured = "last epoch" if plan.measure.last == "1ep" else f"mean over the last {plan.measure.last}"
    write_sweep_page(
        page,
        f"Sweep {plan.output.resolve().name}",
        f"{count} of {len(outcomes)} runs, {len(arms)} arms: runs that differ in the seed only are one arm",
        shown,
        metric=plan.measure.metric,
        measured=measured,
        runs=rows,
        notes=notes,
    )
    return page


def _record(plan: SweepPlan, command: Sequence[str]) -> None:
    """Write sweep.yaml: the grid, and who asked for it, with the earlier ones below."""
    from norm_matters.core.yaml import write_yaml
    from norm_matters.record.provenance import collect_provenance

    path = plan.output / SWEEP_FILE
    earlier = read_mapping(path).get("history") if path.exists() else []
    facts = collect_provenance(command)
    entry = {
        "time": facts["started"],
        "command": facts["command"],
        "executor": plan.placement.executor,
        "threads": plan.placement.threads,
        "package": facts["package"],
        "versions": {name: facts["versions"].get(name) for name in ("python", "torch")},
    }
    history = [entry, *(earlier if isinstance(earlier, list) else [])]
    # By way of JSON, for it must be plain data.
    document = json.loads(json.dumps({**plan.grid.document(), "history": history}))
    write_file(path, write_yaml(document))


def _write_tables(plan: SweepPlan, outcomes: Sequence[Outcome]) -> tuple[list[dict[str, Any]], list[Arm]]:
    """Write runs.csv and summary.csv."""
    rows = run_rows(outcomes, plan.measure)
    arms = summarise(outcomes, plan.measure, plan.baseline)
    write_file(plan.output / "runs.csv", table_csv(rows))
    write_file(plan.output / "summary.csv", table_csv([arm.row for arm in arms]))
    return rows, arms
