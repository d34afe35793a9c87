"""`status.json` of a run: where it stands, for whoever looks from outside. Imports no torch.

Replaced in a single step, never awaited: after a power cut it may be old. A process that was killed leaves its last
word, so a reader asks whether process `pid` of `host` still runs.
"""

import json
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from norm_matters.core.errors import StorageError
from norm_matters.record.files import write_file

STATUS_FILE = "status.json"

State = Literal["starting", "training", "evaluating", "saving", "done", "failed", "preempted"]


def write_status(
    run: Path,
    state: State,
    *,
    epoch: int,
    step: int,
    of: int,
    exit_status: int | None = None,
    error: str | None = None,
) -> None:
    """Say where a run stands. A file that cannot be written is no error: the run has others that tell of it.

    Args:
        state: what the process does, or how it ended: `preempted` can be continued.
        epoch: epochs done.
        step: optimizer steps done.
        of: optimizer steps of the whole run.
        exit_status: of a process that ended.
        error: the last line of what it told.
    """
    status = {
        "state": state,
        "epoch": epoch,
        "step": step,
        "of": of,
        "exit_status": exit_status,
        "error": error,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    with suppress(StorageError):
        write_file(run / STATUS_FILE, json.dumps(status) + "\n", lasting=False)
