"""Faults on demand: what the variable may say, and when it counts."""

import os
import time

import pytest
import torch

from norm_matters.core import faults
from norm_matters.core.errors import UserError
from norm_matters.core.faults import KINDS, POINTS, VARIABLE, check_faults, fault_point, read_faults


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_passed", type(faults._passed)())
    monkeypatch.setattr(faults, "_done", set())
    for name in ("RANK", "SLURM_PROCID", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def test_without_the_variable_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(faults, "_come_to", None)  # would fail
    fault_point("step", step=1)
    check_faults()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stop:0:1:kill", r"no point 'stop'; did you mean 'step'\?; there are: start, "),
        ("step:0:1:kil", r"no kind 'kil'; did you mean 'kill'\?; there are: kill, "),
        ("step:0:kill", "'step:0:kill' is not of the form POINT:RANK:STEP:KIND"),
        ("step:x:1:kill", "rank 'x' is neither a whole number from 0 nor"),
        ("step:0:-1:kill", "step '-1' is neither"),
        ("save:0:1:nan", "there is nothing to spoil at 'save'"),
        ("step:0:1:kill=3", "no kind 'kill=3'"),
        ("step:0:1:sleep=x", "'x' is no number of seconds"),
        ("step:0:1:kill,nonsense", "'nonsense' is not of the form"),
    ],
)
def test_what_names_nothing_is_told(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        check_faults({VARIABLE: text})
    assert len(caught.value.problems) == 1


def test_every_point_and_kind_can_be_asked_for() -> None:
    text = ",".join(f"{point}:*:1:{kind}" for point in POINTS for kind in KINDS if kind != "nan" or point == "step")
    assert len(read_faults(text)) == len(POINTS) * (len(KINDS) - 1) + 1
    check_faults({VARIABLE: ""})


def test_a_step_counts_once_and_a_star_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "step:0:3:raise, save:*:*:eio")
    fault_point("step", step=2)
    with pytest.raises(RuntimeError, match="a fault at step, by NORM_MATTERS_FAULTS"):
        fault_point("step", step=3)
    fault_point("step", step=3)
    for step in (3, 3, 4):
        with pytest.raises(OSError, match="Input/output error"):
            fault_point("save", step=step)


def test_points_without_a_number_count_how_often_they_are_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "table:0:2:enospc")
    fault_point("table")
    with pytest.raises(OSError, match="No space left"):
        fault_point("table")
    fault_point("table")


@pytest.mark.parametrize(
    ("environment", "fails"),
    [
        ({"RANK": "1"}, True),
        ({"RANK": "0"}, False),
        ({"SLURM_PROCID": "1"}, True),
        ({"RANK": "1", "TORCHELASTIC_RESTART_COUNT": "0"}, True),
        ({"RANK": "1", "TORCHELASTIC_RESTART_COUNT": "1"}, False),
        ({"RANK": "1", "SLURM_RESTART_COUNT": "2"}, False),
    ],
)
def test_only_the_rank_that_is_meant_and_its_first_attempt(
    environment: dict[str, str], fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "start:1:*:raise")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if fails:
        with pytest.raises(RuntimeError):
            fault_point("start")
    else:
        fault_point("start")


def test_kinds_that_leave_the_process_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "step:0:1:nan,step:0:2:oom,step:0:3:sleep=1.5")
    values, waits = torch.ones(3), []
    monkeypatch.setattr(time, "sleep", waits.append)
    fault_point("step", step=1, values=values)
    assert values.isnan().all()
    with pytest.raises(torch.OutOfMemoryError):
        fault_point("step", step=2)
    fault_point("step", step=3)
    assert waits == [1.5]


@pytest.mark.parametrize(("kind", "status"), [("kill", -9), ("term", -15), ("exit0", 0)])
def test_kinds_that_end_the_process(kind: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"log:0:1:{kind}")
    pid = os.fork()
    if not pid:
        fault_point("log")
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
