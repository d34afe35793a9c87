"""What must hold of a run that was killed: at every moment, after every kill, and at the end."""

import csv
import hashlib
import json
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from norm_matters.core.errors import UserError
from norm_matters.record import TIMING_COLUMNS, find_checkpoint, latest_checkpoint, load_checkpoint, read_table
from norm_matters.record.files import TEMPORARY
from norm_matters.record.folder import is_run
from norm_matters.report.read import read_run

_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ")


def fingerprint(run: str | Path) -> dict[str, str]:
    """Digests of all that must be equal to the bit in equal runs, part by part."""
    run = Path(run)
    checkpoint = load_checkpoint(find_checkpoint(run, prefer="last"))
    with (run / "results.csv").open(newline="") as stream:
        rows = [[row[key] for key in row if key not in TIMING_COLUMNS] for row in csv.DictReader(stream)]
    state = checkpoint.state
    parts = {
        "weights": _digest(checkpoint.model),
        "training": _digest(checkpoint.training),
        "numbers": hashlib.sha256(json.dumps(state["training"], sort_keys=True).encode()).hexdigest(),
        "position": f"step {checkpoint.step}, best {state.get('best')}",
        "table": hashlib.sha256(repr(rows).encode()).hexdigest(),
    }
    measured = run / "instruments.f32"
    if measured.exists():
        parts["instruments"] = hashlib.sha256(measured.read_bytes()).hexdigest()
    return parts


def _digest(tensors: Any) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Watch:
    """What must never get worse from one kill to the next.

    Attributes:
        newest: optimizer steps of the newest checkpoint that could be read so far; -1 before there was one.
        problems: what was found.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.newest = -1
        self.problems: list[str] = []

    def after_a_kill(self) -> None:
        """Look at what the dead process left."""
        if not self.run.is_dir():
            return
        try:
            read_table(self.run / "results.csv")
        except UserError as error:
            self.problems.append(f"after a kill: {error}")
        steps = readable_steps(self.run)
        if self.newest >= 0 and not steps:
            self.problems.append("after a kill: no checkpoint is left")
        if max(steps, default=-1) < self.newest:
            self.problems.append(f"after a kill: the newest checkpoint is of step {max(steps)}, it was {self.newest}")
        self.newest = max([*steps, self.newest])

    def at_the_end(self) -> None:
        """Look at what the last process left."""
        left = [path for path in self.run.rglob("*") if path.name.startswith(TEMPORARY)]
        self.problems += [f"at the end: {path.relative_to(self.run)} is left" for path in left]
        events = json.loads((self.run / "provenance.json").read_text()).get("events", [])
        resumed = [event["step"] if "step" in event else event["epoch"] for event in events if "epoch" in event]
        if resumed != sorted(resumed):
            self.problems.append(f"at the end: it was resumed from {resumed}")
        epochs = [row["epoch"] for row in read_table(self.run / "results.csv")]
        if epochs != list(range(1, len(epochs) + 1)):
            self.problems.append(f"at the end: the table has the epochs {epochs}")


def readable_steps(run: Path) -> list[int]:
    """Optimizer steps of the checkpoints of a run that can be read whole."""
    steps = []
    for folder in (run / "checkpoints").glob("step-*"):
        try:
            steps.append(load_checkpoint(folder).step)
        except UserError:
            continue
    return steps


def read_everything(run: Path) -> None:
    """Read every file of a run that may be under way.

    Raises:
        UserError, ValueError, AssertionError: one is not whole.
    """
    if not is_run(run):
        return
    read_run(run)
    for place in (run / "log.txt", run / "report.html", run / "status.json"):
        if not place.exists():
            continue
        text = place.read_text()
        if place.suffix == ".txt":
            assert not text or text.endswith("\n"), f"{place} ends within a line"
            assert all(map(_LINE.match, text.splitlines())), f"{place} has a line without its time"
        elif place.suffix == ".json":
            json.loads(text)
        else:
            assert text.rstrip().endswith("</html>"), f"{place} is not whole"
    for prefer in ("last", "best"):
        _read_linked(run, prefer)


def _read_linked(run: Path, prefer: str) -> None:
    """Read a checkpoint; it may be removed meanwhile, when the link leads to another already."""
    for _ in range(20):
        folder = latest_checkpoint(run, prefer)
        if folder is None:
            return
        try:
            load_checkpoint(folder)
            return
        except UserError:
            if latest_checkpoint(run, prefer) == folder and run.is_dir():
                raise


def read_on(pointer: Path, outcome: Path) -> None:
    """Read the run that a file names, again and again, until SIGTERM; then write what was found, as JSON.

    Args:
        pointer: has the path of a run folder; a run that the file does not name any more may be half gone.
    """
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    reads, problems = 0, list[str]()
    while not stop:
        run = Path(pointer.read_text())
        try:
            read_everything(run)
            reads += 1
        except Exception as error:
            if Path(pointer.read_text()) == run:
                place = traceback.extract_tb(error.__traceback__)[-1]
                problems.append(f"a reader met {type(error).__name__}: {error} ({place.name}:{place.lineno})")
        time.sleep(0.004)
    outcome.write_text(json.dumps({"reads": reads, "problems": problems[:20]}))
    sys.stdout.flush()
    os._exit(0)
