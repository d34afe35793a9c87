"""How long an epoch takes, from the epochs that were measured; and how long a sweep will."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from norm_matters.core.config import RunConfig, load_config
from norm_matters.core.errors import UserError
from norm_matters.experiments.cells import Cell
from norm_matters.experiments.executors.base import thread_variables
from norm_matters.experiments.standing import read_rows
from norm_matters.record.folder import is_run

START_SECONDS = 4.0
"""What a process takes before its first step and after its last, unless measured."""
TRIAL_LIMIT = 600.0


@dataclass
class Pace:
    """Seconds per epoch, by what they depend on: model, norm, dataset, batch; else without the norm."""

    _seconds: dict[tuple[str | None, ...], list[float]] = field(default_factory=dict)

    def add(self, config: RunConfig, rows: Sequence[Mapping[str, Any]]) -> None:
        """Learn from the epochs of a run."""
        seconds = [float(row["seconds"]) for row in rows if row.get("seconds") is not None]
        for key in _keys(config):
            self._seconds.setdefault(key, []).extend(seconds)

    def of(self, config: RunConfig) -> float | None:
        """Seconds per epoch; None where no run of this model on this dataset is known."""
        for key in _keys(config):
            if known := self._seconds.get(key):
                return sum(known) / len(known)
        return None


@dataclass(frozen=True)
class Estimate:
    """How long what is left takes.

    Attributes:
        seconds: of wall time; None where nothing is known.
        source: in words.
    """

    seconds: float | None
    source: str


def recorded_pace(output: Path) -> Pace:
    """What the runs tell that lie in a folder already."""
    pace = Pace()
    for folder in sorted(output.iterdir()) if output.is_dir() else []:
        if is_run(folder) and (rows := read_rows(folder)):
            try:
                pace.add(load_config(folder / "config.yaml"), rows)
            except UserError:
                continue  # of another version, or damaged: no matter here
    return pace


def seconds_left(work: Sequence[tuple[Cell, int]], pace: Pace, parallel: int, start: float) -> float | None:
    """Wall seconds for what is left.

    Args:
        work: cells, and how many epochs each has left.
        parallel: how many run side by side.
        start: seconds of each before its first step and after its last.

    Returns:
        None where the pace of one is unknown.
    """
    seconds = []
    for cell, epochs in work:
        each = pace.of(cell.config)
        if each is None:
            return None
        seconds.append(start + epochs * each)
    return max(sum(seconds) / max(1, min(parallel, len(seconds))), max(seconds)) if seconds else 0.0


def estimate(work: Sequence[tuple[Cell, int]], output: Path, *, parallel: int, threads: int) -> Estimate:
    """Estimate the time of a sweep before it starts.

    From the runs of the same models and datasets that lie in the output folder; where there are none, a few steps of
    one run of each are trained in a process of their own, into nowhere.
    """
    if not work:
        return Estimate(0.0, "nothing is left to train")
    pace = recorded_pace(output)
    # The first cell of each; the last entry of a key is the one that a dict keeps.
    unknown = {_keys(cell.config)[-1]: cell for cell, _ in reversed(work) if pace.of(cell.config) is None}
    failures = []
    for cell in unknown.values():
        found = _trial(cell, threads)
        if isinstance(found, float):
            pace.add(cell.config, [{"seconds": found}])
        else:
            failures.append(found)
    if failures:
        return Estimate(None, f"unknown: a trial failed: {failures[0]}")
    sources = []
    if len(unknown) < len({_keys(cell.config)[-1] for cell, _ in work}):
        sources.append(f"the epochs of runs in {output}")
    if unknown:
        names = ", ".join(cell.name for cell in unknown.values())
        sources.append(f"a few steps of {names}, trained alone")
    return Estimate(seconds_left(work, pace, parallel, START_SECONDS), " and ".join(sources))


def show_seconds(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `2 d 5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _keys(config: RunConfig) -> list[tuple[str | None, ...]]:
    """From the closest likeness to the farthest that still tells something."""
    model, data = config.model, config.data
    name = f"{model.name} {model.options}" if model.options else model.name
    size, batch = f"{data.input_size}", f"{data.batch_size}"
    # Statistics in simulated formats take several times as long as any others.
    simulated = "simulated" if "_format=" in (model.norm or "") else None
    return [
        (name, data.name, size, model.norm, config.train.precision, batch, config.device),
        (name, data.name, size, model.norm, batch),
        (name, data.name, batch, simulated),
    ]


def _trial(cell: Cell, threads: int) -> float | str:
    """Seconds per epoch of a cell as a short training measures it; or what went wrong."""
    command = [sys.executable, "-P", "-m", "norm_matters.experiments.trial", *cell.overrides()]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **thread_variables(threads)},
            capture_output=True,
            text=True,
            timeout=TRIAL_LIMIT,
        )
    except subprocess.TimeoutExpired:
        return f"no step had ended after {TRIAL_LIMIT:.0f} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit status {done.returncode}"
    return float(json.loads(done.stdout.splitlines()[-1])["seconds_per_epoch"])
