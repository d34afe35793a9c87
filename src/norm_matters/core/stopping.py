"""Asked to stop: a signal is remembered until the run comes to a place where it can be left. Imports no torch.

SIGTERM, SIGUSR1 and SIGHUP say that the machine is wanted back, SIGINT that the user has had enough. A handler only
notes what came; whoever trains asks `requested` wherever the work can be left in good order. The same signal a second
time ends the process at once (SIGTERM, SIGINT).
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PREEMPTING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""What asks a run to make room: it saves, and ends with the status that says that it can be continued."""

INTERRUPTING = (signal.SIGINT,)
"""What the user's Ctrl-C sends."""

ECHO = 1.0
"""Seconds within which a rank takes the same signal for the same wish: the launcher and SLURM may both have sent it."""

_FATAL_TWICE = (signal.SIGTERM, signal.SIGINT)


class StopRequestedError(Exception):
    """Raised where the run waits for something, when it is asked to stop meanwhile. No error of anybody's."""


class _Heard:
    """What this process listens to, and what it has heard: signals are the process's, so there is one of these."""

    def __init__(self) -> None:
        self.signals: frozenset[int] = frozenset()
        self.request: signal.Signals | None = None
        self.first: dict[int, float] = {}


_heard = _Heard()


def requested() -> signal.Signals | None:
    """The signal that asked this process to stop; None as long as none did."""
    return _heard.request


def wait(seconds: float) -> None:
    """Wait so long, or until the process is asked to stop."""
    end = time.monotonic() + seconds
    while not requested() and time.monotonic() < end:
        time.sleep(min(0.05, seconds))


def listened_to() -> frozenset[int]:
    """The signals that only ask at present, and that the processes of this run must leave to it."""
    return _heard.signals


@contextmanager
def listening(*signals: signal.Signals) -> Iterator[None]:
    """Inside, these signals only ask, by `requested`. What was asked is forgotten at the end of the outermost block.

    Left alone are signals that are ignored (`nohup`, a background shell) or that the program handles itself; and all
    of them outside the main thread, which alone may choose.
    """
    before = {}
    outermost = not _heard.signals
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in signals if number not in _heard.signals}
        ours = [number for number, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
        before = {number: before[number] for number in ours}
    _heard.signals |= before.keys()
    for number in before:
        signal.signal(number, _hear)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _heard.signals -= before.keys()
        if outermost:
            _heard.request = None
            _heard.first.clear()


def _hear(number: int, frame: FrameType | None) -> None:
    """Note the signal, and no more: it may have come in the middle of anything."""
    now = time.monotonic()
    if _heard.request is None:
        _heard.request = signal.Signals(number)
    if number not in _FATAL_TWICE:
        return
    if not _launched():
        # The next one needs no Python, which may be waiting for something that never comes.
        signal.signal(number, signal.SIG_DFL)
    elif now - _heard.first.setdefault(number, now) > ECHO:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _launched() -> bool:
    """Whether somebody may pass signals on to this process beside whoever sends them to all."""
    return "RANK" in os.environ or "SLURM_STEP_ID" in os.environ
