"""Runs of sweeps as a training leaves them, without training."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from norm_matters.core.config import dump_config
from norm_matters.experiments.cells import Cell
from norm_matters.record import save_checkpoint
from norm_matters.record.table import append_row


def row(epoch: int, val_error1: float | None = None, seconds: float = 2.0) -> dict[str, float | None]:
    """A row of results.csv."""
    return {
        "epoch": epoch,
        "step": 11 * epoch,
        "train_loss": 2 / epoch,
        "val_loss": 3 / epoch,
        "train_error1": 60 / epoch,
        "val_error1": 80 / epoch if val_error1 is None else val_error1,
        "lr": 0.1,
        "seconds": seconds,
        "images_per_second": 500.0,
    }


@pytest.fixture
def make_run() -> Callable[..., Path]:
    """A function that makes the folder of a cell's run, with these errors, an epoch each."""

    def make(output: Path, cell: Cell, errors: Sequence[float] = (), *, checkpoint: int | None = None) -> Path:
        folder = output / cell.name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(dump_config(cell.config))
        (folder / "provenance.json").write_text("{}")
        for epoch, error in enumerate(errors, start=1):
            append_row(folder / "results.csv", row(epoch, error))
        last = len(errors) if checkpoint is None else checkpoint
        if last:
            save_checkpoint(folder, step=11 * last, model={}, training={}, state={"epoch": last}, best=False)
        return folder

    return make
