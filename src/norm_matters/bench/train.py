"""How fast a network trains by our engine, and by a plain torch loop in every form that it has."""

import contextlib
import csv
import io
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from norm_matters.bench.timing import REPEATS, speedup, time_in_turns
from norm_matters.bench.train_arms import Arm, TrainCase
from norm_matters.core.errors import UserError
from norm_matters.record.files import make_folder, write_file

TABLE = "train.csv"
STEPS_PER_CALL = 4
WORKERS = (0, 1, 2)


@dataclass(frozen=True)
class TrainMeasurement:
    """One arm of one case.

    Attributes:
        model, norm, batch_size, image_size, dataset, device: of the case; the norm is `nn.BatchNorm2d` on the plain
            side, `its own` where a library's network was not converted; image_size is None with a dataset.
        what: `step`, or `end to end`.
        side, layout, compiled, pages, workers: of the arm.
        threads: torch's.
        seconds: per step, the median.
        images_per_second: at that.
        ours_is_faster_by: how many times as fast our first arm is, the median over rounds; 1 for itself.
        rounds: how many.
    """

    model: str
    norm: str
    batch_size: int
    image_size: int | None
    dataset: str
    device: str
    what: Literal["step", "end to end"]
    side: Literal["ours", "plain"]
    layout: str
    compiled: bool
    pages: str
    workers: int
    threads: int
    seconds: float
    images_per_second: float
    ours_is_faster_by: float
    rounds: int


def default_arms(case: TrainCase, *, quick: bool = False) -> list[Arm]:
    """Ours as `train` sets it up first, then every form of the plain loop.

    Args:
        quick: without compiled code.
    """
    compiled = (False,) if quick else (False, True)
    layouts = ("contiguous", "channels_last")
    ours = [Arm("ours", "kept", compiled=form) for form in compiled]
    if case.end_to_end:
        return [ours[0], *(Arm("plain", "returned", layout, workers=n) for layout in layouts for n in WORKERS)]
    pages = ("returned", "kept") if case.device == "cpu" else ("returned",)
    return [*ours, *(Arm("plain", page, layout, form) for page in pages for layout in layouts for form in compiled)]


def measure_train(
    case: TrainCase, arms: Sequence[Arm] | None = None, *, repeats: int = REPEATS, warm_up: int = 2
) -> tuple[list[TrainMeasurement], list[str]]:
    """Time the arms in turns, each setting of malloc in a process of its own, from outside these.

    Args:
        case: what is trained.
        arms: the first is what the others are compared with; by default `default_arms`.
        repeats: rounds that count.
        warm_up: rounds before; the first compiles.

    Returns:
        A row for each arm that ran, and a sentence for each that could not be compiled.

    Raises:
        UserError: an unknown model, norm or dataset.
    """
    arms = default_arms(case) if arms is None else arms
    times = 1 if case.end_to_end else STEPS_PER_CALL
    notes: list[str] = []
    with contextlib.ExitStack() as stack:
        processes = {
            pages: stack.enter_context(_process(case, pages)) for pages in dict.fromkeys(arm.pages for arm in arms)
        }
        running = []
        for arm in arms:
            problems = processes[arm.pages].run(arm, times)
            if problems and not arm.compiled:
                raise UserError(*problems)
            notes += problems
            if not problems:
                running.append(arm)
        calls = {arm.name: partial(processes[arm.pages].run, arm, times) for arm in running}
        seconds = time_in_turns(calls, repeats=repeats, warm_up=warm_up)
        images = processes[running[0].pages].images
    return [_measurement(case, arm, running[0], seconds, images) for arm in running], notes


def best_plain(measurements: Sequence[TrainMeasurement]) -> TrainMeasurement:
    """The plain arm that is hardest to beat."""
    return min((row for row in measurements if row.side == "plain"), key=lambda row: row.ours_is_faster_by)


def write_train(folder: Path, measurements: Sequence[TrainMeasurement]) -> Path:
    """Write `train.csv`; what was there is replaced.

    Raises:
        StorageError: it cannot be written.
    """
    make_folder(folder)
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(TrainMeasurement)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in measurements)
    write_file(folder / TABLE, text.getvalue())
    return folder / TABLE


def _measurement(
    case: TrainCase, arm: Arm, first: Arm, seconds: Mapping[str, list[float]], images: int
) -> TrainMeasurement:
    per_image = statistics.median(seconds[arm.name]) / images
    own = "its own" if ":" in case.model else "l2"
    return TrainMeasurement(
        model=case.model,
        norm=(case.norm or own) if arm.side == "ours" else "nn.BatchNorm2d",
        batch_size=case.batch_size,
        image_size=None if case.dataset else case.image_size,
        dataset=case.dataset or "noise",
        device=case.device,
        what="end to end" if case.end_to_end else "step",
        side=arm.side,
        layout=arm.layout,
        compiled=arm.compiled,
        pages=arm.pages,
        workers=arm.workers,
        threads=torch.get_num_threads(),
        seconds=per_image * case.batch_size,
        images_per_second=1 / per_image,
        ours_is_faster_by=speedup(seconds, first.name, arm.name),
        rounds=len(seconds[arm.name]),
    )


@contextlib.contextmanager
def _process(case: TrainCase, pages: str) -> Iterator["_Process"]:
    """A process with that setting of malloc, ended when it is left."""
    command = [sys.executable, "-P", "-m", "norm_matters.bench.train_arms"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield _Process(process, case, pages)
        finally:
            process.kill()


class _Process:
    """Asks a process that runs `train_arms.serve`.

    Attributes:
        images: trained on by the last call.
    """

    def __init__(self, process: "subprocess.Popen[str]", case: TrainCase, pages: str) -> None:
        self._process = process
        self.images = 0
        self._send({"case": asdict(case), "pages": pages})

    def run(self, arm: Arm, times: int) -> list[str]:
        """Call an arm so often, and return when it is done; what is wrong with it, if anything."""
        self._send({"arm": asdict(arm), "times": times})
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that measures '{arm.name}' has ended; its error is above")
        answer = json.loads(line)
        self.images = answer.get("images", 0)
        return answer.get("error", [])

    def _send(self, request: dict[str, object]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
