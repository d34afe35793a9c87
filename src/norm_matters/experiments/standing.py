"""Where a run of a sweep stands, as its files tell it, and where these files lie. Imports no torch."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from norm_matters.core.config import RunConfig, differences, load_config
from norm_matters.core.errors import UserError
from norm_matters.experiments.cells import Cell, show_value, value_of
from norm_matters.experiments.locks import holder
from norm_matters.record.files import TEMPORARY, remove_folder
from norm_matters.record.folder import is_run, latest_checkpoint
from norm_matters.record.lock import LOCK_FILE
from norm_matters.record.state import read_state
from norm_matters.record.table import read_table

Status = Literal["new", "cut off", "elsewhere", "queued", "running", "done", "failed"]
LOGS = "logs"
LOCKS = ".locks"
_PLACE = ("output", "name")


@dataclass(frozen=True)
class Standing:
    """A run as it was found.

    Attributes:
        status: `new`, `cut off`, `elsewhere` (a living process trains it) or `done`.
        rows: of its results.csv, one per epoch.
        holder: who trains it.
    """

    cell: Cell
    status: Status
    rows: list[dict[str, Any]]
    holder: str | None = None


def lock_path(output: Path, cell: Cell) -> Path:
    """The file that the process of a run holds."""
    return output / LOCKS / cell.name


def trained_by(cell: Cell, output: Path) -> str | None:
    """Who trains a run, in words: the process of a sweep, or one that was started by hand; None where nobody does."""
    return holder(lock_path(output, cell)) or holder(output / cell.name / LOCK_FILE)


def log_path(output: Path, cell: Cell) -> Path:
    """What the process of a run prints."""
    return output / LOGS / f"{cell.name}.txt"


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's table; none where it is damaged, of which resuming the run tells."""
    try:
        return read_table(folder / "results.csv")
    except UserError:
        return []


def find_standing(cell: Cell, output: Path) -> Standing:
    """Look at the folder of a cell."""
    folder = output / cell.name
    rows = read_rows(folder)
    held_by = trained_by(cell, output)
    status: Status = "new"
    if held_by:
        status = "elsewhere"
    elif is_done(folder, cell.epochs):
        status = "done"
    elif is_run(folder):
        status = "cut off"
    return Standing(cell, status, rows, held_by)


def is_done(folder: Path, epochs: int) -> bool:
    """Whether a run has all its epochs: in the table, and in its last checkpoint unless all have been deleted."""
    rows = read_rows(folder)
    if not is_run(folder) or not rows or rows[-1].get("epoch") != epochs:
        return False
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        # The row comes before the checkpoint: of a single epoch there may never have been one.
        return epochs > 1
    try:
        # A process that died after its last row, and before its last checkpoint, is one epoch short of the end.
        return read_state(checkpoint)["state"].get("epoch") == epochs
    except UserError:
        return False


def conflicts(cell: Cell, output: Path, free: Collection[str]) -> list[str]:
    """What is wrong with the folder of a cell: one line for each setting that its run does not share.

    Args:
        free: keys that are not compared unless they are varied.
    """
    folder = output / cell.name
    if not folder.exists():
        return []
    if not is_run(folder):
        return [] if is_unborn(folder) else [f"'{folder}' is in the way: it is no run folder"]
    try:
        recorded = load_config(folder / "config.yaml")
    except UserError as error:
        return [f"'{folder}': {problem}" for problem in error.problems]
    own = {key for key in free if key not in cell.settings} | {*_PLACE}
    return [
        f"{key}: the run in '{folder}' has {show_value(value_of(recorded, key))}, "
        f"not {show_value(value_of(cell.config, key))}; choose another --output, or move that folder away"
        for key in differences(_with_full_path(recorded), _with_full_path(cell.config))
        if key not in own
    ]


def _with_full_path(config: RunConfig) -> RunConfig:
    """The configuration with the full path of its data folder, which may be written in several ways."""
    if config.data.dir is None:
        return config
    folder = str(Path(config.data.dir).expanduser().resolve())
    return config.model_copy(update={"data": config.data.model_copy(update={"dir": folder})})


def is_unborn(folder: Path) -> bool:
    """Whether a folder is what a process leaves that dies while it starts: no provenance yet, and nothing of worth."""
    return folder.is_dir() and all(
        path.name == "config.yaml" or path.name.startswith(TEMPORARY) for path in folder.iterdir()
    )


def remove_unborn(folder: Path) -> None:
    """Remove such a folder. Only for the process that holds the lock of the run."""
    if is_unborn(folder):
        remove_folder(folder)
