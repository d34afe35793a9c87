"""A sweep of 4 norms x 3 seeds (resnet8 on digits) by all three executors, and killed half way: are the tables equal?

    .venv/bin/python benchmarks/sweep_executors.py [--epochs N] [FOLDER]

Compared are runs.csv, summary.csv and every results.csv, in all columns but those of time. The killed sweeps end by
SIGKILL, or by Ctrl-C, when half of their runs are done, and are started again; no finished run may be trained twice.
"""

import argparse
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from norm_matters.record import TIMING_COLUMNS

GRID = ["norm=l2,l1,linf,topk:k=10", "seed=0..2", "--device", "cpu", "--baseline", "norm=l2"]
RUNS = 12
EXECUTORS = {
    "local": [],
    "slurm (submitit's local mode)": ["--executor", "slurm", "--slurm", "cluster=local", "--jobs", "2"],
    "ray": ["--executor", "ray"],
}
KILLS = {"local, SIGKILL half way": signal.SIGKILL, "local, Ctrl-C half way": signal.SIGINT}


def tables(output: Path) -> dict[str, list[dict[str, str]]]:
    """Name -> rows of each CSV of a sweep, without the columns of time."""
    found = {}
    for path in [output / "runs.csv", output / "summary.csv", *sorted(output.glob("*/results.csv"))]:
        with path.open() as stream:
            rows = csv.DictReader(stream)
            found[str(path.relative_to(output))] = [
                {key: cell for key, cell in row.items() if key not in TIMING_COLUMNS} for row in rows
            ]
    return found


def command(output: Path, epochs: int, arguments: list[str]) -> list[str]:
    """The command line of a sweep."""
    words = ["sweep", *GRID, "--epochs", str(epochs), *arguments, "--output", str(output)]
    return [sys.executable, "-m", "norm_matters", *words]


def kill_half_way(output: Path, epochs: int, sent: signal.Signals) -> int:
    """Start a sweep and end it when half of its runs are done; returns how many were."""
    process = subprocess.Popen(command(output, epochs, []), stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout
    done = 0
    for line in process.stdout:
        done += ": done" in line
        if done == RUNS // 2:
            break
    os.kill(process.pid, sent)
    process.communicate()
    return done


def trained_twice(output: Path) -> list[str]:
    """Runs whose processes have told the end of the same epoch more than once."""
    found = []
    for log in (output / "logs").iterdir():
        epochs = [line.split("/")[0] for line in log.read_text().splitlines() if line.startswith("epoch ")]
        found += [log.stem] * (len(set(epochs)) < len(epochs))
    return found


def main() -> int:
    """Run all sweeps and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("folder", nargs="?", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="sweep-"))
    reference, equal = None, True
    for number, (name, options) in enumerate({**EXECUTORS, **KILLS}.items()):
        output, start, told = folder / str(number), time.perf_counter(), ""
        if isinstance(options, signal.Signals):
            told = f", {kill_half_way(output, arguments.epochs, options)} done when it was killed"
            options = []
        subprocess.run(command(output, arguments.epochs, options), check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        found = tables(output)
        reference = reference or found
        same, repeated = found == reference, trained_twice(output)
        equal = equal and same and not repeated
        print(
            f"{name:34} {seconds:6.1f} s  {len(found) - 2} runs  tables {'equal' if same else 'DIFFER'}  "
            f"epochs trained twice: {len(repeated)}{told}",
            flush=True,
        )
    print(folder)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
