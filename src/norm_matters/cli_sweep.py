"""The command `sweep`. Only typer is imported at the top: `--help` answers without torch."""

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from norm_matters.cli_options import AsJson, DataDir, number, setting
from norm_matters.core import stopping
from norm_matters.core.errors import INTERRUPTED, PreemptedError, UserError
from norm_matters.progress import say

if TYPE_CHECKING:
    from norm_matters.experiments.grid import Grid
    from norm_matters.experiments.sweeping import SweepPlan, SweepResult

FAILED = 1

_STATES = {"new": "new", "cut off": "resume", "done": "done", "elsewhere": "in use"}

Values = Annotated[str | None, typer.Option(metavar="VALUE,...")]


def sweep(
    context: typer.Context,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[GRID.yaml] [KEY=VALUE,...]...",
            help="a file with the grid, and any settings: norm=l2,l1 seed=0..4",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="settings that all runs share; the config.yaml of a run is one"),
    ] = None,
    model: Values = None,
    norm: Values = None,
    weight_norm: Values = None,
    pretrained: Values = None,
    dataset: Values = None,
    data_dir: DataDir = None,
    download: Annotated[bool, typer.Option("--download", help="fetch the dataset if it is missing")] = False,
    epochs: Values = None,
    batch_size: Values = None,
    lr: Values = None,
    seed: Annotated[str | None, typer.Option(metavar="VALUE,...", help="such as 0..4")] = None,
    device: Values = None,
    precision: Values = None,
    nonfinite: Values = None,
    compile: Annotated[bool, typer.Option("--compile", help="train compiled code")] = False,
    save_memory: Annotated[bool, typer.Option("--save-memory", help="make the norms' outputs again")] = False,
    executor: Annotated[str, typer.Option(metavar="local|slurm|ray|inline", help="where the runs are")] = "local",
    jobs: Annotated[
        str | None, typer.Option(metavar="N", help="runs side by side; as many as fit the cores or GPUs by default")
    ] = None,
    threads: Annotated[
        str, typer.Option(metavar="N", help="of each run; equal numbers give equal results, to the bit")
    ] = "1",
    slurm: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="of the jobs, such as partition=gpu, time=4:00:00")
    ] = None,
    ray_address: Annotated[str | None, typer.Option(metavar="ADDRESS", help="of a cluster, such as auto")] = None,
    baseline: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="arm to compare the others with, such as norm=l2")
    ] = None,
    metric: Annotated[str, typer.Option(metavar="COLUMN", help="of results.csv")] = "val_error1",
    last: Annotated[str, typer.Option(metavar="LENGTH", help="mean over the last 1ep, 5ep, 25% of each run")] = "1ep",
    retries: Annotated[str, typer.Option(metavar="N", help="start a run that failed again, so often")] = "0",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the runs and how long they would take")] = False,
    output: Annotated[Path, typer.Option(metavar="DIR", help="where the runs and the summary lie")] = Path(
        "runs/sweep"
    ),
    as_json: AsJson = False,
) -> None:
    """Train every combination of settings with every seed, and compare them.

    Runs that are done are skipped, those that were cut off go on: the same command again finishes a sweep, and a
    larger grid trains only what is new.
    """
    from norm_matters.experiments.executors import Placement
    from norm_matters.experiments.summary import Measure
    from norm_matters.experiments.sweeping import estimate_sweep, plan_sweep
    from norm_matters.models.trust import trust_named_file

    grid, given = _grid(settings or [], config, context.params)
    for name in given.get("model.name", []):
        trust_named_file({"model.name": name})
    plan = plan_sweep(
        grid,
        output=output,
        placement=Placement(
            executor,
            number("--jobs", jobs) if jobs is not None else None,
            number("--threads", threads),
            dict(setting("--slurm", text) for text in slurm or []),
            ray_address,
        ),
        measure=Measure(metric, last),
        baseline=dict(setting("--baseline", text) for text in baseline or []) or None,
    )
    again = number("--retries", retries, least=0)
    if dry_run:
        _show_plan(plan, estimate_sweep(plan), as_json=as_json)
        return
    result = _run(plan, context.obj, again, as_json=as_json)
    if as_json:
        print(json.dumps({"runs": list(result.runs), "summary": result.summary, "failed": dict(result.failed)}))
    else:
        _show_result(plan, result)
    if result.failed:
        raise typer.Exit(FAILED)


def _grid(arguments: list[str], config: Path | None, parameters: dict[str, Any]) -> tuple["Grid", dict[str, list[Any]]]:
    """The grid of file, options and settings, and what the command line alone says.

    Raises:
        UserError: with every mistake of their form.
    """
    from norm_matters.core.config import OPTION_KEYS
    from norm_matters.experiments.grid import (
        Grid,
        flat_settings,
        override,
        read_grid,
        read_mapping,
        read_setting,
        read_values,
    )

    grid, shared, given, problems = Grid({}, {}), dict[str, Any](), dict[str, list[Any]](), list[str]()
    files = [text for text in arguments if "=" not in text]
    if len(files) > 1:
        problems.append(f"'{files[1]}': one GRID.yaml is taken, and settings of the form KEY=VALUE,VALUE")
    try:
        grid = read_grid(Path(files[0])) if files else grid
        shared = flat_settings(read_mapping(config)) if config else shared
    except UserError as error:
        problems += error.problems
    for option, key in OPTION_KEYS.items():
        value = parameters.get(option)
        if option in ("output", "name") or value is None or value is False:
            continue
        try:
            given[key] = [True] if value is True else read_values(value, f"--{option.replace('_', '-')}")
        except UserError as error:
            problems += error.problems
    for text in arguments:
        if "=" in text:
            try:
                key, values = read_setting(text)
                given[key] = values
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(*problems)
    # The config of a run names a folder, which is no setting.
    shared = {key: value for key, value in shared.items() if key not in ("output", "name")}
    return override(replace(grid, base={**shared, **grid.base}), given), given


def _run(plan: "SweepPlan", command: list[str], retries: int, *, as_json: bool) -> "SweepResult":
    """Run the sweep with its display; SIGTERM (a machine is taken away) ends it as Ctrl-C does."""
    from norm_matters.experiments.executors import parallel_runs
    from norm_matters.experiments.pace import recorded_pace
    from norm_matters.experiments.sweeping import run_sweep
    from norm_matters.experiments.table import SweepTable

    parallel = parallel_runs(plan.placement, [cell.config for cell in plan.cells])
    stream = sys.stderr if as_json else sys.stdout
    table = SweepTable(plan.measure, recorded_pace(plan.output), parallel, stream=stream)
    with terminable() as signals:
        try:
            with table:
                return run_sweep(plan, command=command, retries=retries, on_change=table)
        except KeyboardInterrupt:
            done = sum(standing.status == "done" for standing in plan.look())
            print(f"{done} of {len(plan.cells)} runs are done; the same command goes on from here", file=sys.stderr)
            raise typer.Exit(PreemptedError.exit_status if signal.SIGTERM in signals else INTERRUPTED) from None


@contextmanager
def terminable() -> Iterator[list[int]]:
    """Within, SIGTERM does what Ctrl-C does there; yields the signals that came."""
    came: list[int] = []
    first = 0.0

    def interrupt(number: int, _: object) -> None:
        nonlocal first
        now = time.monotonic()
        if came and now - first <= stopping.ECHO:
            return  # SLURM sends it to all processes, and srun passes it on
        first = first if came else now
        came.append(number)
        # A run in this very process listens to it, and saves first.
        signal.raise_signal(signal.SIGINT)

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    # A background shell has its children ignore Ctrl-C; whoever sends it means it.
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, ctrl_c)


def _show_plan(plan: "SweepPlan", estimate: Any, *, as_json: bool) -> None:
    from norm_matters.experiments.pace import show_seconds

    if as_json:
        runs = [
            {
                "run": each.cell.name,
                "state": _STATES[each.status],
                "epoch": len(each.rows),
                "epochs": each.cell.epochs,
                **each.cell.settings,
            }
            for each in plan.standings
        ]
        print(json.dumps({"runs": runs, "seconds": estimate.seconds, "source": estimate.source}))
        return
    width = max(len(cell.name) for cell in plan.cells)
    for each in plan.standings:
        done = f" from {len(each.rows)}" if each.status == "cut off" else ""
        say(f"{each.cell.name:{width}}  {_STATES[each.status]:6}  {each.cell.epochs} epochs{done}")
    work = plan.work()
    print(f"{len(plan.cells)} runs, {len(work)} to train, {sum(epochs for _, epochs in work)} epochs")
    time = "time unknown" if estimate.seconds is None else f"about {show_seconds(estimate.seconds)}"
    say(f"{time} ({estimate.source})")


def _show_result(plan: "SweepPlan", result: "SweepResult") -> None:
    """Print the arms and what failed."""
    metric = plan.measure.metric
    compared = plan.baseline is not None
    lines = [["arm", "n", f"{metric} ± SD", "95% interval", *(["difference", "95% interval", "p (Holm)"] * compared)]]
    for arm in result.arms:
        row = arm.row
        lines.append([arm.label, f"{row['n']}/{row['runs']}", _pair(row, metric), _interval(row, metric)])
        if compared:
            p = row["p_holm"]
            lines[-1] += [
                _pair(row, "difference", mean=""),
                _interval(row, "difference"),
                "-" if p is None else f"{p:.2g}",
            ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        say("  ".join(cells).rstrip())
    for name, error in result.failed.items():
        say(f"failed: {name}: {error}", sys.stderr)
    say(f"summary {result.page}")


def _pair(row: Any, name: str, mean: str = "_mean") -> str:
    value, deviation = row[f"{name}{mean}"], row[f"{name}_sd"]
    if value is None:
        return "-"
    return f"{value:.4g}" if deviation is None else f"{value:.4g} ± {deviation:.2g}"


def _interval(row: Any, name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "-" if low is None else f"{low:.4g} to {high:.4g}"
