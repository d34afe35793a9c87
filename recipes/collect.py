"""Collect finished runs into one CSV of results: `python recipes/collect.py RUN... > results/NAME.csv`.

One row per run, the figures of its last epoch (never the best one), with what is needed to judge and repeat it.
"""

import csv
import json
import shlex
import sys
from pathlib import Path

from norm_matters.core.config import load_config
from norm_matters.record import read_table

COLUMNS = [
    "dataset",
    "model",
    "norm",
    "seed",
    "epochs",
    "val_accuracy",
    "val_loss",
    "train_loss",
    "seconds",
    "images_per_second",
    "threads",
    "device",
    "torch",
    "commit",
    "command",
]


def row(run: Path) -> dict[str, object]:
    """The figures of a run's last epoch and where they come from."""
    config = load_config(run / "config.yaml")
    provenance = json.loads((run / "provenance.json").read_text())
    rows = read_table(run / "results.csv")
    last = rows[-1]
    if last["epoch"] != config.train.epochs:
        raise SystemExit(f"{run} is not finished: epoch {last['epoch']} of {config.train.epochs}")
    speeds = sorted(row["images_per_second"] for row in rows)
    return {
        "dataset": config.data.name.rpartition("/")[2],
        "model": config.model.name,
        "norm": config.model.norm,
        "seed": config.seed,
        "epochs": last["epoch"],
        "val_accuracy": round(100 - last["val_error1"], 2),
        "val_loss": round(last["val_loss"], 4),
        "train_loss": round(last["train_loss"], 4),
        "seconds": round(sum(row["seconds"] for row in rows)),
        "images_per_second": speeds[len(speeds) // 2],
        "threads": provenance["machine"]["threads"],
        "device": provenance["machine"]["cpu"],
        "torch": provenance["versions"]["torch"],
        "commit": str(provenance["package"]["commit"])[:10] + ("+" if provenance["package"]["dirty"] else ""),
        "command": shlex.join(provenance["command"]),
    }


def main() -> None:
    """Print one CSV row per run folder given."""
    writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row(Path(run)) for run in sys.argv[1:])


if __name__ == "__main__":
    main()
