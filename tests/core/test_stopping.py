"""Signals only ask, once; the second ends the process at once; what is ignored stays ignored."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from norm_matters.core import stopping
from norm_matters.core.clock import Duration, parse_interval, parse_seconds


@pytest.mark.parametrize("number", [*stopping.PREEMPTING, *stopping.INTERRUPTING])
def test_a_signal_asks_and_is_forgotten_at_the_end(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stopping.listening(number):
        assert stopping.requested() is None
        assert stopping.listened_to() == {number}
        os.kill(os.getpid(), number)
        assert stopping.requested() == number
        with stopping.listening(signal.SIGUSR2):
            pass
        assert stopping.requested() == number
    assert stopping.requested() is None
    assert stopping.listened_to() == set()
    assert signal.getsignal(number) == before


def test_the_first_of_several_counts() -> None:
    with stopping.listening(*stopping.PREEMPTING):
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert stopping.requested() == signal.SIGUSR1


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None])
def test_what_is_ignored_or_handled_already_is_left_alone(handler) -> None:
    before = signal.signal(signal.SIGHUP, handler)
    try:
        with stopping.listening(signal.SIGHUP):
            os.kill(os.getpid(), signal.SIGHUP)
            assert stopping.requested() is None
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_listens_to_nothing() -> None:
    heard = []

    def listen() -> None:
        with stopping.listening(signal.SIGTERM):
            heard.append(stopping.listened_to())

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert heard == [set()]


def test_waiting_ends_when_one_is_asked() -> None:
    with stopping.listening(signal.SIGUSR1):
        stopping.wait(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)
        stopping.wait(1000)


# Sends itself the same signal twice, so many seconds apart.
TWICE = """
import os, signal, sys, time
from norm_matters.core import stopping
number, apart = int(sys.argv[1]), float(sys.argv[2])
with stopping.listening(signal.Signals(number)):
    os.kill(os.getpid(), number)
    time.sleep(apart)
    os.kill(os.getpid(), number)
    time.sleep(0.01)
    print("alive")
"""


@pytest.mark.parametrize(
    ("number", "apart", "rank", "ends"),
    [
        (signal.SIGTERM, 0.0, None, True),
        (signal.SIGINT, 0.0, None, True),
        (signal.SIGUSR1, 0.0, None, False),
        (signal.SIGTERM, 0.0, "1", False),  # its launcher and SLURM may have sent one each
        (signal.SIGTERM, 1.2 * stopping.ECHO, "1", True),
    ],
)
def test_the_second_ends_the_process_at_once(number: int, apart: float, rank: str | None, ends: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "SLURM_STEP_ID")}
    done = subprocess.run(
        [sys.executable, "-c", TWICE, str(int(number)), str(apart)],
        env=environment | ({"RANK": rank} if rank else {}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == ((-number, "", "") if ends else (0, "alive\n", ""))


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("5min", 300), ("1.5h", 5400), (" 2 h ", 7200)])
def test_times(text: str, seconds: float) -> None:
    assert parse_seconds(text) == parse_interval(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "0min", "-1s", "5 m", "1d", "nan s", "9" * 400 + "h"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="is no time above zero; write 30s, 5min or 2h"):
        parse_seconds(text)


def test_intervals() -> None:
    assert [parse_interval(text) for text in ("1ep", "500st", "10%")] == [
        Duration.parse(text) for text in ("1ep", "500st", "10%")
    ]
    for text in ("0ep", "0s", "soon"):
        with pytest.raises(ValueError, match=f"'{text}' is no interval above zero"):
            parse_interval(text)
