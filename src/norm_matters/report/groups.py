"""Runs that differ in the seed only, taken together: mean, spread and how many."""

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from norm_matters.report.read import METRICS, RunFiles, not_finite, show

# What tells runs apart without being a setting of the training: chance, and the place of the files.
_NO_SETTING = ("seed", "name", "output")


@dataclass(frozen=True)
class Group:
    """Runs with one and the same config, but for the seed.

    Attributes:
        label: a short name, unique among the groups: the folder's, without its seed.
        runs: in the order given.
    """

    label: str
    runs: Sequence[RunFiles]

    @property
    def counted(self) -> list[RunFiles]:
        """The runs that have ended an epoch."""
        return [run for run in self.runs if run.last_epoch]

    @property
    def seeds(self) -> list[str]:
        """The seeds of the runs that are counted."""
        return [show(run.config.get("seed")) for run in self.counted]

    @property
    def epoch(self) -> int | None:
        """The last epoch that all the counted runs have ended: the one at which their figures can be compared."""
        return min((run.last_epoch for run in self.counted), default=None)

    def curve(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Return how a metric develops.

        Returns:
            (epochs,) the epochs that any run has, and (3, epochs) mean, minimum and maximum over the runs that have the
            epoch; NaN where one of these is not finite, rather than a mean of the others.
        """
        epochs = np.unique([epoch for run in self.runs for epoch in run.results["epoch"]])
        values = [self._values(metric, epoch) for epoch in epochs]
        with np.errstate(over="ignore"):
            statistics = [(column.mean(), column.min(), column.max()) for column in values]
        return epochs.astype(int), np.array(statistics, float).reshape(-1, 3).T

    def row(self) -> dict[str, Any]:
        """The group's row of the table: every metric at `epoch` as mean and `_std` (of a sample; NaN for one run)."""
        row: dict[str, Any] = {
            "run": self.label,
            "n": len(self.counted),
            "seeds": ", ".join(self.seeds),
            "epoch": self.epoch,
        }
        for metric in METRICS:
            values = self._values(metric, self.epoch)
            with np.errstate(over="ignore", invalid="ignore"):
                row[metric] = float(values.mean()) if len(values) else np.nan
                row[f"{metric}_std"] = float(values.std(ddof=1)) if len(values) > 1 else np.nan
        return row

    def notes(self) -> list[str]:
        """What a reader of the group's mean should know."""
        notes = []
        missing = len(self.runs) - len(self.counted)
        if missing:
            notes.append(f"{self.label}: {missing} of {len(self.runs)} runs without an ended epoch, not counted.")
        if len({run.last_epoch for run in self.counted}) > 1:
            lengths = ", ".join(f"{run.name}: {run.last_epoch}" for run in self.counted)
            notes.append(f"{self.label}: the runs are not equally long ({lengths}); compared at epoch {self.epoch}.")
        if len(set(self.seeds)) < len(self.seeds):
            notes.append(f"{self.label}: a seed occurs twice; the spread is smaller than that of different seeds.")
        notes += [f"{run.name}: {sentence}" for run in self.runs for sentence in not_finite(run)]
        return notes

    def _values(self, metric: str, epoch: int | None) -> np.ndarray:
        """The finite values (others: NaN) of a metric at an epoch, from the runs that have it."""
        found = [run.results[metric][run.results["epoch"] == epoch] for run in self.counted]
        values = np.concatenate(found) if found else np.array([], float)
        return np.where(np.isfinite(values), values, np.nan)


def group_runs(runs: Sequence[RunFiles]) -> list[Group]:
    """Put runs that differ in the seed only together, in the order in which they come first."""
    members: dict[Hashable, list[RunFiles]] = {}
    for run in runs:
        members.setdefault(frozenset(_settings(run).items()), []).append(run)
    labels = _labels([found[0] for found in members.values()])
    return [Group(label, found) for label, found in zip(labels, members.values(), strict=True)]


def differing_keys(groups: Sequence[Group]) -> list[str]:
    """The config keys in which the groups differ, in the order of the config."""
    settings = [_settings(group.runs[0]) for group in groups]
    keys = dict.fromkeys(key for setting in settings for key in setting)
    return [key for key in keys if len({setting.get(key) for setting in settings}) > 1]


def _settings(run: RunFiles) -> dict[str, str]:
    """The settings in a form that can be compared: the text 1 is not the number 1."""
    return {key: repr(value) for key, value in run.config.items() if key not in _NO_SETTING}


def _labels(runs: Sequence[RunFiles]) -> list[str]:
    """Folder names without the seed; equal ones get a number."""
    stems = [re.sub(rf"-s{re.escape(show(run.config.get('seed')))}(?!\d)", "", run.name) for run in runs]
    numbers = [stems[:index].count(stem) + 1 for index, stem in enumerate(stems)]
    return [stem if number == 1 else f"{stem} ({number})" for stem, number in zip(stems, numbers, strict=True)]
