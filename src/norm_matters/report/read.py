"""What a run folder says, read without knowing how the run was made: any run, also one in progress, also an old one."""

import json
import math
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from norm_matters.core.errors import UserError
from norm_matters.core.json import MAX_BYTES, parse_json
from norm_matters.core.reading import kind_of, read_regular
from norm_matters.core.yaml import read_yaml
from norm_matters.record.table import read_table

METRICS = (
    "train_loss", "val_loss", "train_error1", "val_error1", "train_error5", "val_error5",
    "lr", "seconds", "images_per_second",
)  # fmt: skip
"""Columns of results.csv that the pages show, besides `epoch`."""

_MAX_EPOCH = 10**9  # beyond it a table is damaged, and its numbers would not fit an array


@dataclass(frozen=True)
class RunFiles:
    """One run, as its files tell it.

    Attributes:
        folder: where they are.
        config: dotted key -> value, from config.yaml.
        provenance: dotted key -> value, from provenance.json; empty where there is none yet.
        results: columns of one value per epoch, in order: `epoch` (int) and `METRICS` (float; NaN where there is none).
    """

    folder: Path
    config: dict[str, Any]
    provenance: dict[str, Any]
    results: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def last_epoch(self) -> int:
        """The last epoch that has ended; 0 before the first has."""
        return int(self.results["epoch"].max(initial=0))

    @property
    def planned_epochs(self) -> int | None:
        """The length that the config asks for; None where the run took a default that it does not tell."""
        epochs = self.config.get("train.epochs")
        return epochs if isinstance(epochs, int) else None


def read_run(folder: Path) -> RunFiles:
    """Read the files of a run.

    Raises:
        UserError: the folder is no run, or a file in it cannot be read; names the file.
    """
    config_file = folder / "config.yaml"
    if kind_of(config_file) != stat.S_IFREG:
        raise UserError(f"'{folder}' is not a run: it has no config.yaml")
    config = read_yaml(_read_text(config_file), str(config_file))
    if not isinstance(config, dict):
        raise UserError(f"{config_file}: not a config, which is a mapping of keys to values")
    return RunFiles(folder, dict(flatten(config)), _read_provenance(folder / "provenance.json"), _read_results(folder))


def columns_of(rows: Sequence[Mapping[str, int | float | None]]) -> dict[str, np.ndarray]:
    """The columns of `RunFiles.results`, from the rows of a table; columns that a row lacks are NaN."""
    columns = {column: np.array([_number(row.get(column)) for row in rows], float) for column in METRICS}
    return {"epoch": np.array([row["epoch"] for row in rows], int), **columns}


def flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every leaf of nested mappings and lists of mappings; other lists are leaves."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from flatten(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from flatten(item, f"{key}.{index}")
    else:
        yield key, value


def show(value: Any) -> str:
    """A value of a config or of the provenance as text; lists without brackets."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(map(show, value)) or "[]"
    return json.dumps(value, ensure_ascii=False)


def best_epoch(run: RunFiles) -> int | None:
    """The epoch of the lowest validation error@1, the first of equal ones; None where there is none."""
    errors = run.results["val_error1"]
    return None if np.isnan(errors).all() else int(run.results["epoch"][np.nanargmin(errors)])


def not_finite(run: RunFiles) -> list[str]:
    """Say for each loss in which epochs it is not a finite number, if any."""
    sentences = []
    for column, title in (("train_loss", "training loss"), ("val_loss", "validation loss")):
        epochs = run.results["epoch"][~np.isfinite(run.results[column])]
        if len(epochs):
            more = f" and {len(epochs) - 1} later" if len(epochs) > 1 else ""
            sentences.append(f"The {title} is not a finite number in epoch {epochs[0]}{more}.")
    return sentences


def _read_text(path: Path) -> str:
    try:
        return read_regular(path, limit=MAX_BYTES).decode()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _read_provenance(path: Path) -> dict[str, Any]:
    """The provenance, flattened; a run that is just starting may have none."""
    if kind_of(path) != stat.S_IFREG:
        return {}
    try:
        value = parse_json(_read_text(path), nan=True)
    except ValueError as error:
        raise UserError(f"{path}: broken JSON: {error}") from None
    return dict(flatten(value)) if isinstance(value, dict) else {"provenance": value}


def _read_results(folder: Path) -> dict[str, np.ndarray]:
    """The columns of results.csv that the pages need; empty ones where the run has not ended an epoch."""
    path = folder / "results.csv"
    rows = read_table(path)
    epochs = [epoch for row in rows if isinstance(epoch := row.get("epoch"), int) and 0 < epoch < _MAX_EPOCH]
    if len(epochs) < len(rows) or epochs != sorted(set(epochs)):
        raise UserError(f"{path}: damaged: the column 'epoch' does not count up from 1")
    return columns_of(rows)


def _number(value: float | None) -> float:
    """The number of a cell; NaN for an empty one."""
    try:
        return math.nan if value is None else float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf
