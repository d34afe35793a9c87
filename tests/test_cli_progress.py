"""The display: a bar on a terminal, lines elsewhere, silence when nobody reads."""

import io
import re

import pytest

from norm_matters.engine.loop import Progress
from norm_matters.progress import ConsoleProgress, epoch_line, printable

ROW = {
    "epoch": 2,
    "train_loss": 0.123456,
    "train_error1": 4.5,
    "val_loss": 0.2,
    "val_error1": 6.25,
    "lr": 0.05,
    "images_per_second": 12345.6,
    "seconds": 3.21,
}
EVENTS = [
    Progress("start", 1, 3, message="runs/x: resnet8 [red]with\x1b[2J l1"),
    Progress("batch", 1, 3, 5, 10, 2.3, 90.0, 640, 0.5),
    Progress("batch", 2, 3, 5, 10, 0.5, 12.5, 640, 0.5),
    Progress("epoch", 2, 3, row=ROW),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(stream: io.StringIO) -> str:
    with ConsoleProgress(stream) as progress:
        for event in EVENTS:
            progress(event)
    return stream.getvalue()


def test_a_pipe_gets_one_plain_line_per_epoch() -> None:
    assert show(io.StringIO()).splitlines() == [
        "runs/x: resnet8 [red]with\\x1b[2J l1",
        "epoch 2/3: train loss 0.1235 error 4.50%, val loss 0.2000 error 6.25%, lr 0.05, 12,346 images/s, 3.2 s",
    ]


def test_a_terminal_gets_a_bar_with_time_left_speed_loss_and_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    text = show(Terminal())
    assert "[red]with\\x1b[2J" in text
    final = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).split("\r")[-1]
    assert "epoch 2/3" in final
    assert re.search(r"\d:\d\d:\d\d|-:--:--", final)
    assert "12,346 images/s, loss 0.1235, error 4.50%, val error 6.25%" in final


def test_the_bar_counts_the_epochs_of_the_whole_run() -> None:
    done = []
    with ConsoleProgress(Terminal()) as progress:
        for event in EVENTS:
            progress(event)
            (task,) = progress._bar.tasks  # type: ignore[union-attr]
            done.append((task.completed, task.total))
    assert done == [(0, 3), (0.5, 3), (1.5, 3), (2, 3)]


def test_the_bar_is_taken_down_at_the_end() -> None:
    # As after an error: the last event is in the middle of an epoch.
    stream = Terminal()
    with ConsoleProgress(stream) as progress:
        progress(EVENTS[1])
    assert stream.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is shown again


def test_a_reader_that_left_is_no_error() -> None:
    class Broken(io.StringIO):
        calls = 0

        def write(self, _: str) -> int:
            self.calls += 1
            raise BrokenPipeError

    stream = Broken()
    with ConsoleProgress(stream) as progress:
        for event in EVENTS:
            progress(event)
    assert stream.calls == 1


def test_a_loss_that_is_not_finite_is_shown() -> None:
    assert "train loss nan" in epoch_line({**ROW, "train_loss": float("nan")}, 3)


def test_printable_is_one_harmless_line() -> None:
    assert printable("a\x1b[2Jb\nc\u202ed\u2028 é 漢字") == "a\\x1b[2Jb\\nc\\u202ed\\u2028 é 漢字"
