"""One rank that misbehaves as it is told: `python run_worker.py HOW ARGUMENTS...` runs `norm-matters ARGUMENTS`.

HOW is `no`, or `RANK:PLACE:WHAT`: what goes wrong on that rank, and where (`prepare`, `step`, `save`).
"""

import os
import signal
import sys
from typing import Any

from norm_matters import recording, run
from norm_matters.cli import main
from norm_matters.core import joining
from norm_matters.core.errors import StorageError, UserError
from norm_matters.engine import loop

WHAT = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "user": lambda: _raise(UserError("an image cannot be read")),
    "storage": lambda: _raise(StorageError("disk full")),
    "bug": lambda: _raise(TypeError("a bug")),
    "exit": lambda: os._exit(0),
}


def _raise(error: Exception) -> None:
    raise error


def misbehave(rank: int, place: str, what: str) -> None:
    """Replace the function that is called there by one that fails at its third call, on that rank."""
    if os.environ.get("RANK") != str(rank) or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        return
    module, name = {"prepare": (run, "prepare"), "step": (loop, "train_step"), "save": (recording, "save_checkpoint")}[
        place
    ]
    whole, calls = getattr(module, name), []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == {"prepare": 1, "step": 15, "save": 2}[place]:
            WHAT[what]()
        return whole(*arguments, **options)

    setattr(module, name, failing)


if __name__ == "__main__":
    # Nobody here ends a rank that has lost another.
    joining.PATIENCE, joining.MOMENT = 0.5, 0.1
    how, *rest = sys.argv[1:]
    if how != "no":
        number, place, what = how.split(":")
        misbehave(int(number), place, what)
    sys.exit(main(rest))
