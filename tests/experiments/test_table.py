"""What a sweep shows."""

import io
import re
from pathlib import Path

import pytest

from norm_matters.core.config import RunConfig
from norm_matters.experiments.cells import Cell
from norm_matters.experiments.pace import Pace, estimate, seconds_left, show_seconds
from norm_matters.experiments.runner import Run
from norm_matters.experiments.summary import Measure
from norm_matters.experiments.table import SweepTable


def a_run(name: str, status, errors: list[float], epochs: int = 4, **options) -> Run:
    config = RunConfig.model_validate({"train": {"epochs": epochs}})
    rows = [
        {"epoch": epoch, "val_error1": error, "seconds": 10.0, "images_per_second": 1234.5}
        for epoch, error in enumerate(errors, start=1)
    ]
    return Run(Cell(name, config, {}), status, rows, 0, **options)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    runs = [a_run("a", "done", [9.0, 5.0, 6.0, 7.0]), a_run("b", "running", [])]
    with SweepTable(Measure(), Pace(), 1, stream) as table:
        table(runs, None)
        table(runs, runs[1])
        table(runs, runs[0])
        bad = a_run("c\x1b[31m", "failed", [], error="no disk (exit status 74; log)")
        table([*runs, bad], bad)
    started, done, failed = stream.getvalue().splitlines()
    assert started == "[1/2] b: started"
    # Four epochs of ten seconds, and the start of a process.
    assert done == "[1/2] a: done, val_error1 7 (best 5), 1,234 images/s; about 44 s left"
    assert failed == "[2/3] c\\x1b[31m: failed: no disk (exit status 74; log); about 44 s left"


def test_a_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "12")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    runs = [a_run(f"run{index}", "new", []) for index in range(30)]
    runs[20] = a_run("the-running-one", "running", [9.0, 8.0])
    runs[21] = a_run("the-failed-one", "failed", [7.0], error="a long line " * 20)
    with SweepTable(Measure(), Pace(), 2, stream) as table:
        table(runs, runs[21])
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert re.search(r"the-running-one +running +2/4 +8 +1,23[45]", text)
    assert re.search(r"the-failed-one +failed +1/4 +7 +1,23[45]", text)
    assert "the-failed-one: failed: " + "a long line " * 20 in text
    assert "... and 24 more" in text
    assert "1 failed, 1 running, 28 new" in text
    assert len(re.findall(r"^run\d+ ", text, re.MULTILINE)) == 2 * 4  # drawn twice: when it changes, and at the end


def test_a_reader_that_leaves_does_not_end_the_sweep() -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    runs = [a_run("a", "done", [1.0] * 4)]
    table = SweepTable(Measure(), Pace(), 1, Gone())
    table(runs, runs[0])
    table(runs, runs[0])


def test_time_left_is_that_of_the_busiest_slot() -> None:
    pace = Pace()
    known, unknown = a_run("a", "new", []).cell, Cell("b", RunConfig.model_validate({"model": {"name": "vgg11"}}), {})
    assert seconds_left([(known, 4)], pace, 1, start=2) is None
    pace.add(known.config, [{"seconds": 1.0}, {"seconds": 3.0}, {"seconds": None}])
    assert seconds_left([(known, 4)] * 6, pace, 2, start=2) == 30
    assert seconds_left([(known, 1), (known, 10)], pace, 2, start=0) == 20
    assert seconds_left([(known, 1)], pace, 64, start=0) == 2
    assert seconds_left([(known, 1), (unknown, 1)], pace, 1, start=0) is None
    other_norm = RunConfig.model_validate({"model": {"norm": "l1"}})
    assert pace.of(other_norm) == 2  # of the same model and dataset
    pace.add(other_norm, [{"seconds": 5.0}])
    assert (pace.of(other_norm), pace.of(known.config)) == (5, 2)


def test_nothing_left_takes_no_time(tmp_path: Path) -> None:
    assert estimate([], tmp_path, parallel=1, threads=1).seconds == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (100, "2 min"), (5400, "1 h 30 min"), (200_000, "2 d 7 h"), (7190, "2 h 00 min")],
)
def test_seconds_for_the_eye(seconds: float, text: str) -> None:
    assert show_seconds(seconds) == text
