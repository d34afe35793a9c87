"""`bench train`: the arms train what they say, in processes that have the setting of malloc they say."""

import csv
import io
import json

import pytest
import torch
from torch import nn

from norm_matters.bench import train, train_arms
from norm_matters.bench.train import TrainMeasurement, best_plain, default_arms, measure_train, write_train
from norm_matters.bench.train_arms import Arm, TrainCase, build_arm, plain_step, serve
from norm_matters.cli import main
from norm_matters.core.errors import UserError

SMALL = TrainCase(model="resnet8", norm="l1", batch_size=4, image_size=16, images=8, options={"width": 4})


def test_every_form_of_the_plain_loop_is_an_arm() -> None:
    arms = default_arms(SMALL)
    assert arms[0] == Arm("ours", "kept")
    plain = {(arm.pages, arm.layout, arm.compiled) for arm in arms if arm.side == "plain"}
    assert plain == {
        (pages, layout, compiled)
        for pages in ("kept", "returned")
        for layout in ("contiguous", "channels_last")
        for compiled in (False, True)
    }
    assert not any(arm.compiled for arm in default_arms(SMALL, quick=True))
    whole = default_arms(TrainCase(end_to_end=True))
    assert {arm.workers for arm in whole if arm.side == "plain"} == {0, 1, 2}
    assert {arm.pages for arm in whole if arm.side == "plain"} == {"returned"}
    assert len({arm.name for arm in arms}) == len(arms)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_plain_step_is_torchs_own(layout, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: seen.append(self))
    assert plain_step(SMALL, Arm("plain", "kept", layout))() == 4
    (optimizer,) = seen
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], group["fused"]) == (0.01, 0.9, 0, None)
    weight = next(p for p in group["params"] if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
    assert all(parameter.grad is not None for parameter in group["params"])


def test_the_plain_network_has_torchs_norms(monkeypatch) -> None:
    built = []
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: built.append(type(self)) or x)
    plain_step(SMALL, Arm("plain", "kept"))()
    assert len(built) == 9


@pytest.mark.parametrize("side", ["ours", "plain"])
@pytest.mark.parametrize("end_to_end", [False, True])
def test_an_arm_tells_how_many_images_it_trained_on(side, end_to_end) -> None:
    case = TrainCase(**{**vars(SMALL), "end_to_end": end_to_end, "images": 11})
    assert build_arm(case, Arm(side, "returned"))() == (8 if end_to_end else 4)


def answers_to(*requests: dict) -> list[dict]:
    answers = io.StringIO()
    serve(iter([json.dumps(request) + "\n" for request in requests]), answers)  # type: ignore[arg-type]
    return [json.loads(line) for line in answers.getvalue().splitlines()]


@pytest.mark.parametrize("pages", ["kept", "returned"])
def test_a_process_sets_malloc_up_once_and_answers_each_request(pages, monkeypatch) -> None:
    kept, built = [], []
    monkeypatch.setattr(train_arms, "keep_pages", lambda: kept.append(1))
    monkeypatch.setattr(train_arms, "build_arm", lambda case, arm: built.append((case, arm)) or (lambda: 4))
    arm = {"side": "ours", "pages": pages}
    first = {"case": vars(SMALL), "pages": pages}
    assert answers_to(first, {"arm": arm, "times": 1}, {"arm": arm, "times": 3}) == [{"images": 4}, {"images": 12}]
    assert kept == ([1] if pages == "kept" else [])
    assert built == [(SMALL, Arm("ours", pages))]


def test_a_process_tells_what_is_wrong_with_the_input() -> None:
    case = {"case": {"model": "resnet9"}, "pages": "returned"}
    (answer,) = answers_to(case, {"arm": {"side": "ours", "pages": "returned"}, "times": 1})
    assert answer == {"error": ["unknown model 'resnet9'; did you mean 'resnet8'?"]}


def test_what_cannot_be_compiled_is_an_answer_and_what_else_fails_an_error(monkeypatch) -> None:
    def broken(case: TrainCase, arm: Arm):
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(train_arms, "build_arm", broken)
    case = {"case": {}, "pages": "returned"}
    arm = {"side": "plain", "pages": "returned", "compiled": True}
    (answer,) = answers_to(case, {"arm": arm, "times": 1})
    assert answer["error"][0].endswith(": no compiler")
    with pytest.raises(RuntimeError, match="no compiler"):
        answers_to(case, {"arm": {**arm, "compiled": False}, "times": 1})


@pytest.mark.slow
def test_both_processes_measure_and_the_rows_agree_with_each_other(tmp_path) -> None:
    arms = [Arm("ours", "kept"), Arm("plain", "kept"), Arm("plain", "returned", "contiguous")]
    rows, notes = measure_train(SMALL, arms, repeats=3, warm_up=0)
    assert [(row.side, row.pages, row.layout) for row in rows] == [(a.side, a.pages, a.layout) for a in arms]
    assert notes == []
    assert rows[0].ours_is_faster_by == 1
    for row in rows:
        assert row.images_per_second == pytest.approx(4 / row.seconds)
        assert row.norm == ("l1" if row.side == "ours" else "nn.BatchNorm2d")
        assert row.rounds == 3
    assert best_plain(rows) == min(rows[1:], key=lambda row: row.ours_is_faster_by)
    with write_train(tmp_path, rows).open() as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == list(TrainMeasurement.__dataclass_fields__)
    assert [float(row["seconds"]) for row in read] == [row.seconds for row in rows]


def test_arms_that_cannot_be_compiled_are_left_out_and_named(monkeypatch) -> None:
    run = train._Process.run

    def refuse(self, arm, times):
        return ["no compiler"] if arm.compiled else run(self, arm, times)

    monkeypatch.setattr(train._Process, "run", refuse)
    arms = [Arm("ours", "returned"), Arm("plain", "returned"), Arm("plain", "returned", compiled=True)]
    rows, notes = measure_train(SMALL, arms, repeats=1, warm_up=0)
    assert [row.compiled for row in rows] == [False, False]
    assert notes == ["no compiler"]


def test_a_ratio_is_that_of_one_round(monkeypatch) -> None:
    """Three times as long is three times as fast for ours, however many images a call has."""
    monkeypatch.setattr(
        train, "time_in_turns", lambda calls, **_: dict(zip(calls, ([1.0, 2.0], [3.0, 6.0]), strict=True))
    )
    rows, _ = measure_train(SMALL, [Arm("ours", "returned"), Arm("plain", "returned")])
    assert [row.ours_is_faster_by for row in rows] == [1, 3]
    assert rows[0].seconds == pytest.approx(1.5 / train.STEPS_PER_CALL)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch-size", "x", "--against", "z"], ["--batch-size: value 'x'", "--against: value 'z'"]),
        (["--image-size", "4"], ["--image-size: value '4'", "from 8"]),
    ],
)
def test_wrong_arguments_are_told_at_once(arguments, words, capsys) -> None:
    assert main(["bench", "train", *arguments]) == UserError.exit_status
    errors = capsys.readouterr().err
    assert all(word in errors for word in words)


def test_the_command_prints_the_arms_and_writes_the_table(tmp_path, monkeypatch, capsys) -> None:
    measure = train.measure_train
    monkeypatch.setattr(
        train, "measure_train", lambda case, arms, repeats: measure(SMALL, arms[:2], repeats=1, warm_up=0)
    )
    assert main(["bench", "train", "--quick", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "times as fast as the best plain loop (contiguous, eager, pages returned, 0 workers)" in printed
    assert (tmp_path / "train.csv").is_file()
