"""What came out of a sweep: a row per run, a row per arm with its statistics, and the arms beside their baseline."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from norm_matters.core.cells import plain_cell
from norm_matters.core.clock import Clock, Duration
from norm_matters.core.config import load_config
from norm_matters.core.errors import UserError, nearest
from norm_matters.experiments.cells import Cell, Complete, label, short_key, value_of
from norm_matters.experiments.grid import Settings, full_key
from norm_matters.experiments.statistics import Interval, compare_pairs, holm, mean_interval
from norm_matters.record.table import COLUMNS

LAST_EPOCH = "1ep"
_SHOWN = ("val_error1", "val_loss", "train_error1", "train_loss", "val_error5")
_HIGHER_IS_BETTER = ("images_per_second",)


@dataclass(frozen=True)
class Outcome:
    """A run when the sweep ends.

    Attributes:
        status: `done`, `failed`, or as far as it came when the sweep was interrupted.
        rows: of its results.csv.
        error: what it ended with, where it failed.
    """

    cell: Cell
    status: str
    rows: Sequence[Mapping[str, Any]]
    error: str = ""


@dataclass(frozen=True)
class Arm:
    """Runs that differ in the seed only.

    Attributes:
        label: for the eye, unique in the sweep.
        settings: the varied settings that they share.
        outcomes: all of its runs.
        row: of summary.csv.
    """

    label: str
    settings: Settings
    outcomes: Sequence[Outcome]
    row: Mapping[str, Any]

    def values(self, measure: "Measure", *, best: bool = False) -> list[float]:
        """The finite values of its finished runs, in the order of the runs."""
        return list(self.by_seed(measure, best=best).values())

    def by_seed(self, measure: "Measure", *, best: bool = False) -> dict[int, float]:
        """Seed -> value of the finished runs that have a finite one."""
        values = {
            outcome.cell.config.seed: measure.best(outcome.rows)[0] if best else measure.final(outcome.rows)
            for outcome in self.outcomes
            if outcome.status == "done"
        }
        return {seed: value for seed, value in values.items() if math.isfinite(value)}


@dataclass(frozen=True)
class Measure:
    """What is compared.

    Attributes:
        metric: a column of results.csv.
        last: over which last part of a run its mean is taken, such as `1ep`, `25%`.
    """

    metric: str = "val_error1"
    last: str = LAST_EPOCH

    def check(self) -> None:
        """Raise UserError with what is wrong."""
        problems = []
        names = [column for column in COLUMNS if column not in ("epoch", "step")]
        if self.metric not in names:
            problems.append(f"--metric: unknown '{self.metric}'{nearest(self.metric, names)}; there are: {names}")
        try:
            if Duration.parse(self.last).unit == "st":
                raise ValueError(f"'{self.last}' counts steps; write 5ep or 25%")
        except ValueError as error:
            problems.append(f"--last: {error}")
        if problems:
            raise UserError(*problems)

    def final(self, rows: Sequence[Mapping[str, Any]]) -> float:
        """The value of a finished run: the mean over its last epochs; NaN where one of them has none."""
        count = max(1, Duration.parse(self.last).steps(Clock(0, 1, len(rows))))
        values = [_number(row.get(self.metric)) for row in rows[-count:]]
        return math.fsum(values) / len(values)

    def best(self, rows: Sequence[Mapping[str, Any]]) -> tuple[float, int | None]:
        """The best value of all epochs, and the first epoch that has it; NaN and None where none is finite."""
        sign = -1 if self.metric in _HIGHER_IS_BETTER else 1
        found = [(sign * value, row["epoch"]) for row in rows if math.isfinite(value := _number(row.get(self.metric)))]
        if not found:
            return math.nan, None
        value, epoch = min(found)
        return sign * value, epoch


def find_baseline(given: Settings, cells: Sequence[Cell], complete: Complete) -> Settings:
    """Check the settings that make an arm the baseline, and bring them into the form in which runs record them.

    Args:
        given: key, dotted or of a common option -> value. Keys that it leaves out are those of each arm.

    Raises:
        UserError: keys that are not varied, or values that no arm has.
    """
    varied = {key: None for cell in cells for key in cell.arm}
    names = ", ".join(map(short_key, varied)) or "nothing but the seed"
    given = {full_key(key): value for key, value in given.items()}
    if unknown := [key for key in given if key not in varied]:
        raise UserError(*(f"--baseline: '{key}' is not varied in this sweep; it varies {names}" for key in unknown))
    settings = {
        key: value_of(complete(load_config(options={"train.epochs": 1, key: value})), key)
        for key, value in given.items()
    }
    if not any(_matches(cell.arm, settings) for cell in cells):
        there = dict.fromkeys(label({key: cell.arm[key] for key in settings}) for cell in cells)
        raise UserError(f"--baseline: no run has {label(settings)}; there are: {'; '.join(there)}")
    return settings


def summarise(outcomes: Sequence[Outcome], measure: Measure, baseline: Settings | None) -> list[Arm]:
    """Put the runs of each arm together, and beside the baseline's.

    Only runs with all their epochs count. Pairs are runs of the same seed.
    """
    members: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        members.setdefault(repr(outcome.cell.arm), []).append(outcome)
    arms = [_with_row(label(found[0].cell.arm), found, measure) for found in members.values()]
    if baseline is not None:
        arms = _beside_baseline(arms, measure, baseline)
    return arms


def run_rows(outcomes: Sequence[Outcome], measure: Measure) -> list[dict[str, Any]]:
    """The rows of runs.csv: varied settings, status, last and best values, time."""
    metrics = dict.fromkeys([measure.metric, *_SHOWN])
    rows = []
    for outcome in outcomes:
        last = outcome.rows[-1] if outcome.rows else {}
        best, best_epoch = measure.best(outcome.rows)
        rows.append(
            {
                "run": outcome.cell.name,
                **{short_key(key): _plain(value) for key, value in outcome.cell.settings.items()},
                "status": outcome.status,
                "epoch": last.get("epoch", 0),
                **{metric: last.get(metric) for metric in metrics},
                f"best_{measure.metric}": _or_none(best),
                "best_epoch": best_epoch,
                "seconds": round(math.fsum(_number(row.get("seconds")) for row in outcome.rows), 4),
                "images_per_second": last.get("images_per_second"),
                "error": outcome.error,
            }
        )
    return rows


def table_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table as CSV: numbers read back exactly, what is not there stays empty."""
    if not rows:
        return ""
    text = io.StringIO()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: plain_cell(value) for column, value in row.items()} for row in rows)
    return text.getvalue()


def _with_row(name: str, outcomes: Sequence[Outcome], measure: Measure) -> Arm:
    """The arm with its row of the summary, as far as that concerns this arm alone."""
    arm = Arm(name, outcomes[0].cell.arm, outcomes, {})
    final, best = arm.values(measure), arm.values(measure, best=True)
    seconds = [
        math.fsum(_number(row.get("seconds")) for row in outcome.rows)
        for outcome in outcomes
        if outcome.status == "done"
    ]
    row = {
        **{short_key(key): _plain(value) for key, value in arm.settings.items()},
        "runs": len(outcomes),
        "n": len(final),
        **_interval_columns(measure.metric, mean_interval(final)),
        **_interval_columns(f"best_{measure.metric}", mean_interval(best)),
        "seconds": round(math.fsum(seconds) / len(seconds), 4) if seconds else None,
    }
    return replace(arm, row=row)


def _beside_baseline(arms: Sequence[Arm], measure: Measure, baseline: Settings) -> list[Arm]:
    """The arms with what sets them apart from their baseline, p values adjusted for as many tests as there are."""
    rows = [_comparison_columns(arm, _baseline_of(arm, arms, baseline), measure) for arm in arms]
    for best in ("", "best_"):
        adjusted = holm([row[f"{best}p_t"] for row in rows])
        for row, p in zip(rows, adjusted, strict=True):
            row[f"{best}p_holm"] = p
    return [
        replace(arm, row={**arm.row, **{key: _or_none(value) for key, value in row.items()}})
        for arm, row in zip(arms, rows, strict=True)
    ]


def _baseline_of(arm: Arm, arms: Sequence[Arm], baseline: Settings) -> Arm | None:
    """The arm to compare with: the one that is the baseline, or, of several, that which shares all other settings."""
    matching = [other for other in arms if _matches(other.settings, baseline)]
    if len(matching) > 1:
        wanted = {**arm.settings, **baseline}
        matching = [other for other in matching if other.settings == wanted]
    return matching[0] if matching and matching[0] is not arm else None


def _comparison_columns(arm: Arm, baseline: Arm | None, measure: Measure) -> dict[str, Any]:
    """The difference of the pairs of the same seed, for the final and the best values."""
    columns: dict[str, Any] = {"baseline": baseline.label if baseline else None}
    for best in (False, True):
        values, others = (each.by_seed(measure, best=best) if each else {} for each in (arm, baseline))
        seeds = [seed for seed in values if seed in others]
        found = compare_pairs([values[seed] for seed in seeds], [others[seed] for seed in seeds])
        prefix = "best_" if best else ""
        columns |= {
            f"{prefix}pairs": found.difference.n if baseline else None,
            f"{prefix}difference": found.difference.mean,
            f"{prefix}difference_sd": found.difference.sd,
            f"{prefix}difference_low": found.difference.low,
            f"{prefix}difference_high": found.difference.high,
            f"{prefix}p_t": found.p_t,
            f"{prefix}p_wilcoxon": found.p_wilcoxon,
            f"{prefix}p_holm": math.nan,
        }
    return columns


def _interval_columns(name: str, interval: Interval) -> dict[str, Any]:
    columns = {"mean": interval.mean, "sd": interval.sd, "low": interval.low, "high": interval.high}
    return {f"{name}_{column}": _or_none(value) for column, value in columns.items()}


def _matches(settings: Settings, wanted: Settings) -> bool:
    return all(key in settings and settings[key] == value for key, value in wanted.items())


def _plain(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict | bool) else value


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
