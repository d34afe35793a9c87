"""Trains a few steps into a folder that is thrown away: `python -m norm_matters.experiments.trial KEY=VALUE ...`.

Prints, as JSON, how long an epoch would take. The first quarter second, in which caches fill, does not count.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence

from norm_matters import run
from norm_matters.core.config import load_config
from norm_matters.engine.loop import Progress
from norm_matters.models.trust import trust_named_file

SECONDS = 3.0
_EVALUATION = 0.1  # of an epoch's time: forward passes of fewer images


class _EnoughError(Exception):
    """The trial has seen what it needs."""


class Stopwatch:
    """Takes the time of steps, and ends the training when it has seen `SECONDS` of them, or an epoch."""

    def __init__(self) -> None:
        self.seconds_per_epoch = 0.0
        self._first: Progress | None = None

    def __call__(self, event: Progress) -> None:
        """See `engine.loop.OnProgress`."""
        if event.row is not None:
            self.seconds_per_epoch = event.row["seconds"]
            raise _EnoughError
        if event.kind != "batch":
            return
        if self._first is None:
            self._first = event
        elif event.seconds - self._first.seconds >= SECONDS:
            each = (event.seconds - self._first.seconds) / (event.step - self._first.step)
            self.seconds_per_epoch = each * event.steps * (1 + _EVALUATION)
            raise _EnoughError


def main(settings: Sequence[str]) -> None:
    """Train and print."""
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(options={"output": folder}, overrides=settings)
        trust_named_file({}, settings)
        with contextlib.suppress(_EnoughError):
            run.train(config, on_progress=stopwatch)
    print(json.dumps({"seconds_per_epoch": stopwatch.seconds_per_epoch}))


if __name__ == "__main__":
    main(sys.argv[1:])
