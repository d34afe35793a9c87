"""When a run saves and when it stops, by steps, by the clock, by signals; and what status.json says meanwhile."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from norm_matters import keeping
from norm_matters.core import stopping
from norm_matters.core.clock import Clock
from norm_matters.core.config import TrainConfig
from norm_matters.core.errors import PreemptedError
from norm_matters.engine.state import TrainingState
from norm_matters.keeping import Keeper
from norm_matters.regimes import Regime


class Watch:
    """Stands in for `time`: it moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch()
    monkeypatch.setattr(keeping, "time", watch)
    return watch


def state(step: int = 0) -> TrainingState:
    regime = Regime([{"epoch": 0, "optimizer": "SGD", "lr": 0.1}])
    return TrainingState(nn.Linear(2, 2), regime, Clock(step, 10, 4), device=torch.device("cpu"))


def keeper(folder: Path, training: TrainingState, **settings) -> Keeper:
    return Keeper(TrainConfig(**settings), training, folder, started=keeping.time.monotonic(), recorded=0)


def steps_saved(folder: Path, watch: Watch, *, seconds: float = 1.0, **settings) -> list[int]:
    """After which of 40 steps of so many seconds it saves, epochs of ten; those at the end of an epoch are negative."""
    training, saved = state(), []
    looks = keeper(folder, training, **settings)
    for step in range(1, 41):
        watch.now += seconds
        training.clock = training.clock.at_step(step)
        due = looks.after_step()
        if step % 10 == 0:
            due = looks.due_after_epoch()
        if due:
            saved.append(step if step % 10 else -step)
            looks.begin_save()
            looks.saved(recorded=step // 10)
            looks.leave_if_asked()
    return saved


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        ("1ep", [-10, -20, -30, -40]),
        ("2ep", [-20, -40]),
        ("0.5ep", [5, -10, 15, -20, 25, -30, 35, -40]),
        ("15st", [15, -30]),
        ("0.1st", [*range(1, 10), -10, *range(11, 20), -20, *range(21, 30), -30, *range(31, 40), -40]),
        ("50%", [-20, -40]),
        ("7s", [7, 14, 21, 28, 35]),
        ("1min", []),
    ],
)
def test_when_it_saves(tmp_path: Path, watch: Watch, every: str, expected: list[int]) -> None:
    assert steps_saved(tmp_path, watch, checkpoint_every=every) == expected


def test_a_run_ends_before_its_time_is_over(tmp_path: Path, watch: Watch) -> None:
    """25 seconds for steps of one second each: the last step and its save must fit twice."""
    with pytest.raises(PreemptedError, match=r"end of its time \(train.max_time=25s\) after step 23 of 40"):
        steps_saved(tmp_path, watch, max_time="25s")
    assert watch.now < 1025


@pytest.mark.parametrize("number", stopping.PREEMPTING)
def test_a_signal_has_it_save_and_leave(tmp_path: Path, number: signal.Signals) -> None:
    training = state(3)
    looks = keeper(tmp_path, training)
    assert not looks.after_step()
    with stopping.listening(number):
        os.kill(os.getpid(), number)
        assert looks.leaves_evaluation()
        assert looks.after_step()
        looks.begin_save()
        looks.saved(recorded=0)
        with pytest.raises(
            PreemptedError, match=f"preempted by {number.name} after step 3 of 40; continue with"
        ) as end:
            looks.leave_if_asked()
    assert end.value.exit_status == 75


def test_ctrl_c_has_it_save_and_end(tmp_path: Path) -> None:
    looks = keeper(tmp_path, state(3))
    with stopping.listening(signal.SIGINT):
        os.kill(os.getpid(), signal.SIGINT)
        assert looks.after_step()
        looks.begin_save()
        looks.saved(recorded=0)
        with pytest.raises(KeyboardInterrupt):
            looks.leave_if_asked()


def test_nobody_is_asked_to_leave_without_reason(tmp_path: Path) -> None:
    looks = keeper(tmp_path, state())
    assert not looks.leaves_evaluation()
    looks.leave_if_asked()


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def test_status(tmp_path: Path, watch: Watch) -> None:
    training = state(3)
    looks = keeper(tmp_path, training)
    looks.tell("starting")
    said = status(tmp_path)
    assert said | {"host": "", "time": ""} == {
        "state": "starting", "epoch": 0, "step": 3, "of": 40, "exit_status": None, "error": None,
        "pid": os.getpid(), "host": "", "time": "",
    }  # fmt: skip
    looks.after_step()
    assert status(tmp_path)["state"] == "starting"
    watch.now += keeping.SECONDS_BETWEEN_STATES + 0.1
    looks.after_step()
    assert status(tmp_path)["state"] == "training"
    training.clock = training.clock.at_step(4)
    looks.after_step()
    assert status(tmp_path)["step"] == 3
    watch.now += keeping.SECONDS_BETWEEN_STEPS + 0.1
    looks.after_step()
    assert status(tmp_path)["step"] == 4
    watch.now += keeping.SECONDS_BETWEEN_STATES + 0.1
    looks.before_evaluation()
    assert status(tmp_path)["state"] == "evaluating"
    watch.now += keeping.SECONDS_BETWEEN_STATES + 0.1
    looks.begin_save()
    assert status(tmp_path)["state"] == "saving"
    looks.saved(recorded=1)
    looks.tell("failed", exit_status=74, error="disk full")
    assert [status(tmp_path)[key] for key in ("state", "epoch", "exit_status", "error")] == [
        "failed",
        1,
        74,
        "disk full",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_status_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    keeper(tmp_path / "gone", state()).tell("training")
