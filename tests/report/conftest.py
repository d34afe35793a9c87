"""Run folders as a training leaves them, without training."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from norm_matters.core.config import DataConfig, ModelConfig, RunConfig, TrainConfig, dump_config
from norm_matters.record.table import append_row

PROVENANCE = {
    "command": ["norm-matters", "train", "--name", "two words"],
    "package": {"version": "0.1.0", "commit": "0123abc", "dirty": False},
    "data": {"val": "test", "classes": ["cat", "dog"]},
    "events": [{"event": "resumed", "epoch": 2}],
}


def _row(epoch: int) -> dict[str, float | None]:
    """A row of results.csv whose values tell its epoch."""
    return {
        "epoch": epoch,
        "step": 11 * epoch,
        "train_loss": 2 / epoch,
        "val_loss": 3 / epoch,
        "train_error1": 60 / epoch,
        "val_error1": 80 / epoch,
        "train_error5": 20 / epoch,
        "val_error5": 30 / epoch,
        "lr": 0.1,
        "seconds": 2.0,
        "images_per_second": 500.0 + epoch,
        "val_seconds": 0.5,
    }


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A function that makes the folder of a run; `rows` says how each epoch's row differs from the usual one."""

    def make(
        name: str,
        rows: Sequence[Mapping[str, float | None]] = (),
        *,
        norm: str | None = "l1",
        model: str = "resnet8",
        dataset: str = "digits",
        seed: int = 0,
        epochs: int | None = 3,
        provenance: Any = PROVENANCE,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = RunConfig(
            model=ModelConfig(name=model, norm=norm),
            data=DataConfig(name=dataset),
            train=TrainConfig(epochs=epochs),
            seed=seed,
        )
        (folder / "config.yaml").write_text(dump_config(config))
        (folder / "provenance.json").write_text(json.dumps(provenance))
        for epoch, changes in enumerate(rows, start=1):
            append_row(folder / "results.csv", _row(epoch) | dict(changes))
        return folder

    return make


@pytest.fixture
def runs_in_all_states(make_run: Callable[..., Path]) -> dict[str, Path]:
    """A finished run, one in its first epoch, one after it, and some whose loss or everything is lost."""
    lost = {"train_loss": math.nan, "val_loss": math.inf}
    metrics = set(_row(1)) - {"epoch"}
    return {
        "done": make_run("done", [{}, {}, {}]),
        "none": make_run("none", seed=1),
        "one": make_run("one", [{"train_error5": None, "val_error5": None}], seed=2),
        "lost": make_run("lost", [{}, lost, lost], seed=3),
        "huge": make_run("huge", [{}, dict.fromkeys(metrics, 1e308), dict.fromkeys(metrics, -1e308)], seed=4),
        "all lost": make_run("all lost", [dict.fromkeys(metrics, math.nan)], norm="l2"),
        "all infinite": make_run("all infinite", [dict.fromkeys(metrics, math.inf)], norm="l2", seed=1),
        "all empty": make_run("all empty", [dict.fromkeys(metrics)], norm="l2", seed=2),
    }
