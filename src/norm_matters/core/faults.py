"""Faults on demand, for tests: named places in a run, and what may go wrong there.

`NORM_MATTERS_FAULTS=POINT:RANK:STEP:KIND,...` makes the process with that rank fail when it comes to that place:
`step:1:37:kill`. RANK may be `*` (any), and so may STEP (every time); a STEP that is a number counts once. It is the
number that the place gives (of `NUMBERED`, in the words of `POINTS`), elsewhere how often the process has come there.
A launch that was started again after a failure goes undisturbed.
"""

import errno
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from norm_matters.core.errors import UserError, nearest
from norm_matters.core.numbers import is_whole

VARIABLE = "NORM_MATTERS_FAULTS"

POINTS = {
    "start": "before anything is built",
    "restore": "a resumed run has read its checkpoint and brings its record back to it",
    "data": "before an image is decoded; its number in the dataset, from 0",
    "step": "before an optimizer step; its number, from 1",
    "eval": "before a batch of evaluation",
    "table": "before a row of results.csv is written",
    "log": "before lines of log.txt are written",
    "save": "before a checkpoint is written; optimizer steps done",
    "save.part": "before each file of a checkpoint",
    "save.rename": "a checkpoint is complete, under its temporary name",
    "save.renamed": "a checkpoint has its name, and no link leads to it",
    "report": "before report.html is written",
}
"""Place -> when a run comes there."""

NUMBERED = ("data", "step", "save")

KINDS = {
    "kill": "SIGKILL",
    "stop": "SIGSTOP",
    "term": "SIGTERM",
    "raise": "an exception that nobody expects",
    "exit0": "the process ends as if all were well",
    "enospc": "the disk is full",
    "eio": "the disk does not answer",
    "nan": "the images of the batch are not numbers (at `step`)",
    "oom": "torch has no memory left",
    "sleep": "nothing happens for 10 seconds; `sleep=SECONDS` for others",
}
"""What may go wrong -> what that is."""

_WITH_VALUES = ("step",)


class Fault(NamedTuple):
    """One entry of the variable; None stands for `*`."""

    point: str
    rank: int | None
    step: int | None
    kind: str
    seconds: float = 10.0


_passed: Counter[str] = Counter()
_done: set[Fault] = set()


def fault_point(point: str, *, step: int | None = None, values: Any = None) -> None:
    """A place where something may go wrong on demand.

    Args:
        point: a key of `POINTS`.
        step: its number there, for those of `NUMBERED`.
        values: a tensor, for the kind `nan` to spoil.
    """
    if VARIABLE in os.environ:
        _come_to(point, step, values)


def check_faults(environment: Mapping[str, str] | None = None) -> None:
    """Raise UserError for faults that name no place, or nothing that may happen there."""
    text = (os.environ if environment is None else environment).get(VARIABLE)
    if text:
        read_faults(text)


@cache
def read_faults(text: str) -> tuple[Fault, ...]:
    """The entries of the variable.

    Raises:
        UserError: naming the part that is wrong and the nearest that is right.
    """
    return tuple(_read_fault(entry.strip()) for entry in text.split(",") if entry.strip())


def _read_fault(entry: str) -> Fault:
    parts = entry.split(":")
    if len(parts) != 4:
        raise UserError(f"{VARIABLE}: '{entry}' is not of the form POINT:RANK:STEP:KIND, such as step:0:37:kill")
    point, rank, step, kind = parts
    kind, equals, seconds = kind.partition("=")
    if point not in POINTS:
        raise UserError(
            f"{VARIABLE}: there is no point '{point}'{nearest(point, POINTS)}; there are: {', '.join(POINTS)}"
        )
    if kind not in KINDS or (equals and kind != "sleep"):
        raise UserError(
            f"{VARIABLE}: there is no kind '{parts[3]}'{nearest(kind, KINDS)}; there are: {', '.join(KINDS)}"
        )
    if kind == "nan" and point not in _WITH_VALUES:
        raise UserError(f"{VARIABLE}: '{entry}': there is nothing to spoil at '{point}', only at 'step'")
    for name, number in (("rank", rank), ("step", step)):
        if number != "*" and not is_whole(number):
            raise UserError(f"{VARIABLE}: '{entry}': {name} '{number}' is neither a whole number from 0 nor *")
    try:
        wait = float(seconds) if equals else Fault._field_defaults["seconds"]
    except ValueError:
        raise UserError(f"{VARIABLE}: '{entry}': '{seconds}' is no number of seconds") from None
    rank_number, step_number = (None if number == "*" else int(number) for number in (rank, step))
    return Fault(point, rank_number, step_number, kind, wait)


def _come_to(point: str, step: int | None, values: Any) -> None:
    assert point in POINTS, point
    assert (step is None) == (point not in NUMBERED), point
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT") or os.environ.get("SLURM_RESTART_COUNT") or "0"
    if restarts != "0":
        return
    _passed[point] += 1
    number = _passed[point] if step is None else step
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    for fault in read_faults(os.environ[VARIABLE]):
        here = fault.point == point and fault.rank in (None, rank) and fault.step in (None, number)
        if here and fault not in _done:
            if fault.step is not None:
                _done.add(fault)
            _happen(fault, values)


def _happen(fault: Fault, values: Any) -> None:
    where = f"{fault.point}, by {VARIABLE}"
    match fault.kind:
        case "kill" | "stop" | "term":
            os.kill(os.getpid(), signal.Signals[f"SIG{fault.kind.upper()}"])
        case "exit0":
            os._exit(0)
        case "enospc" | "eio":
            number = getattr(errno, fault.kind.upper())
            raise OSError(number, os.strerror(number), where)
        case "nan":
            values.fill_(float("nan"))
        case "oom":
            # Not imported here: the record, which comes to such places, does without.
            raise sys.modules["torch"].OutOfMemoryError(f"no memory at {where}")
        case "sleep":
            time.sleep(fault.seconds)
        case _:
            raise RuntimeError(f"a fault at {where}")
