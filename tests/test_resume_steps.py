"""A run that is left after every single step, and taken up again each time, equals one that was not, to the bit."""

import csv
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from norm_matters import run as running
from norm_matters.core.config import RunConfig, load_config
from norm_matters.core.errors import PreemptedError, UserError
from norm_matters.engine import loop
from norm_matters.models.trust import trust_file
from norm_matters.record import TIMING_COLUMNS, find_checkpoint, load_checkpoint, save_checkpoint
from norm_matters.resuming import load_state
from norm_matters.run import CHECKS, resume, train
from norm_matters.verification import verify

MODEL = """
import torch.nn as nn


def model(num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3),
        nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )
"""
# A schedule that changes in the middle of epochs, and an optimizer that is replaced there.
PHASES = (
    "[{step: 0, optimizer: SGD, lr: {schedule: cosine, from: 0.1, to: 0.01}, momentum: 0.9, weight_decay: 1e-4}, "
    "{step: 4, optimizer: Adam, lr: 0.01}]"
)
EPOCHS, STEPS = 2, 3


@pytest.fixture(scope="module", autouse=True)
def no_reports() -> Iterator[None]:
    """Their pages take longer than these runs do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("norm_matters.run._write_report", lambda folder: folder / "report.html")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "own.py").write_text(MODEL)
    trust_file(folder / "own.py")
    (folder / "images").symlink_to(image_folder)
    return folder


def config(folder: Path, name: str, *more: str) -> RunConfig:
    settings = [
        f"model.name={folder / 'own.py'}",
        "model.norm=l1",
        "data.batch_size=450",
        "data.workers=0",
        f"regime.phases={PHASES}",
        f"train.epochs={EPOCHS}",
        "train.instruments=all",
        "device=cpu",
        f"output={folder}",
        f"name={name}",
        *more,
    ]
    return load_config(overrides=settings, checks=CHECKS)


def images(folder: Path, workers: int) -> list[str]:
    """Settings of images that are decoded; three steps per epoch of these too."""
    return [
        f"data.name=imagefolder:{folder / 'images'}",
        "data.input_size=16",
        "data.batch_size=130",
        f"data.workers={workers}",
    ]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps after which this process gets SIGTERM."""
    steps: list[int] = []
    whole = loop.train_step

    def train_step(state, *arguments, **options):
        learning_rate = whole(state, *arguments, **options)
        if state.clock.step in steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate

    monkeypatch.setattr(loop, "train_step", train_step)
    return steps


def table(run: Path) -> list[dict[str, str]]:
    with (run / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key not in TIMING_COLUMNS} for row in rows]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = load_checkpoint(find_checkpoint(run, prefer="last"))
    return checkpoint.model | checkpoint.training


def assert_equal(a: Path, b: Path) -> None:
    assert table(a) == table(b)
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    for name in ("instruments.f32", "trace.csv"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    numbers = [load_checkpoint(find_checkpoint(run, prefer="last")).state["training"] for run in (a, b)]
    assert numbers[0] == numbers[1]


def leave_after_every_step(asked: list[int], wanted: RunConfig, *, steps: Sequence[int]) -> Path:
    """Train until the first of the steps, resume until the next, and so on to the end; the run's folder."""
    asked[:] = [steps[0]]
    with pytest.raises(PreemptedError, match=f"preempted by SIGTERM after step {steps[0]} of {EPOCHS * STEPS};"):
        train(wanted)
    run = Path(wanted.output) / str(wanted.name)
    for step in steps[1:]:
        asked[:] = [step]
        with pytest.raises(PreemptedError, match=f"after step {step} of"):
            resume(run)
    asked.clear()
    resume(run)
    return run


ALL = range(1, EPOCHS * STEPS)
VARIANTS = {
    "plain": [],
    "amp-fp16": ["train.precision=amp-fp16", "train.accumulate=3", "train.clip_norm=1"],
    "fp16": ["train.precision=fp16", "model.norm=l2"],
}


@pytest.mark.parametrize("variant", ["plain", "amp-fp16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_left_after_every_step(folder: Path, asked: list[int], variant: str) -> None:
    more = VARIANTS[variant]
    whole = train(config(folder, f"{variant}-whole", *more)).folder
    left = leave_after_every_step(asked, config(folder, f"{variant}-left", *more), steps=ALL)
    assert_equal(left, whole)
    assert [row["epoch"] for row in table(left)] == ["1", "2"]


def test_left_between_steps_that_the_instruments_measure(folder: Path, asked: list[int]) -> None:
    """In an epoch of 44 steps they measure two."""
    more = ["data.batch_size=32", "train.epochs=1"]
    whole = train(config(folder, "measured-whole", *more)).folder
    asked[:] = [30]
    with pytest.raises(PreemptedError):
        train(config(folder, "measured-left", *more))
    asked.clear()
    resume(folder / "measured-left")
    assert_equal(folder / "measured-left", whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_left_with_images_that_are_read_ahead(folder: Path, asked: list[int], workers: int) -> None:
    """Whoever reads ahead has read batches that were never trained on; what is left out is read again."""
    whole = train(config(folder, f"read-{workers}-whole", *images(folder, 0))).folder
    wanted = config(folder, f"read-{workers}-left", *images(folder, workers))
    assert_equal(leave_after_every_step(asked, wanted, steps=[1, 2, 5]), whole)


def poison(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the images of a step not finite."""
    whole = loop.train_step

    def train_step(state, images, labels, **options):
        if state.clock.step + 1 == step:
            images = images * float("nan")
        return whole(state, images, labels, **options)

    monkeypatch.setattr(loop, "train_step", train_step)


@pytest.mark.parametrize("policy", ["rollback", pytest.param("skip", marks=pytest.mark.slow)])
def test_left_between_the_beginning_of_an_epoch_and_a_step_that_is_given_up(
    folder: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """What is rolled back to, and what the norms have refused so far, are part of the state."""
    more = [f"train.nonfinite={policy}", "regime.phases=null", "regime.name=constant"]
    poison(monkeypatch, 6)
    whole = train(config(folder, f"{policy}-whole", *more)).folder
    assert table(whole)[-1]["skipped_steps"] == "1"
    left = leave_after_every_step(asked, config(folder, f"{policy}-left", *more), steps=[4, 5])
    assert_equal(left, whole)
    lines = (left / "log.txt").read_text().splitlines()
    assert len([line for line in lines if "is not finite in epoch 2, step 6" in line]) == 1


def test_asked_in_the_evaluation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left before the epoch's row: the evaluation is done again, and nothing is trained again."""
    whole = train(config(folder, "evaluation-whole")).folder
    monkeypatch.setenv("NORM_MATTERS_FAULTS", "eval:0:1:term")
    with pytest.raises(PreemptedError, match="after step 3 of 6"):
        train(config(folder, "evaluation-left"))
    monkeypatch.delenv("NORM_MATTERS_FAULTS")
    run = folder / "evaluation-left"
    assert not (run / "results.csv").exists()
    state = load_checkpoint(find_checkpoint(run, prefer="last")).state
    assert (state["epoch"], state["training"]["step"]) == (0, 3)
    resume(run)
    assert_equal(run, whole)


def test_asked_at_the_end_of_the_last_epoch_the_run_is_done(folder: Path, asked: list[int]) -> None:
    asked[:] = [EPOCHS * STEPS]
    with pytest.raises(PreemptedError):
        train(config(folder, "late"))
    assert len(table(folder / "late")) == 1
    assert resume(folder / "late").last["epoch"] == EPOCHS


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    return train(config(folder, "undisturbed", "train.checkpoint_every=1st", "train.keep=9")).folder


def test_saving_at_every_step_changes_nothing(folder: Path, undisturbed: Path) -> None:
    steps = [f"step-{step:09d}" for step in range(1, EPOCHS * STEPS + 1)]
    assert sorted(path.name for path in (undisturbed / "checkpoints").glob("step-*")) == steps
    assert_equal(undisturbed, train(config(folder, "seldom", "train.checkpoint_every=10ep")).folder)


def tampered(folder: Path, undisturbed: Path, name: str, step: int, change) -> Path:
    """A copy of the run that stands after a step, its checkpoint having gone through `change(checkpoint, earlier)`."""
    run = folder / name
    shutil.copytree(undisturbed, run, symlinks=True)
    now, earlier = (load_checkpoint(run / "checkpoints" / f"step-{at:09d}") for at in (step, step - 1))
    shutil.rmtree(run / "checkpoints")
    model, training, state = change(now, earlier)
    save_checkpoint(run, step=step, model=model, training=training, state=state, best=False)
    return run


def nothing(now, earlier):
    return now.model, now.training, now.state


def a_step(now, earlier):
    """The position is that after the step, all else that before it."""
    return earlier.model, earlier.training, now.state


def the_meter(now, earlier):
    epoch = {**now.state["training"]["epoch"], "sums": [[0.0] * 4]}
    return now.model, now.training, {**now.state, "training": {**now.state["training"], "epoch": epoch}}


def the_random_streams(now, earlier):
    return now.model, now.training | {"rng/torch": earlier.training["rng/torch"]}, now.state


@pytest.mark.parametrize(
    ("lost", "noticed"),
    [(nothing, False), (a_step, True), (the_meter, True), (the_random_streams, True)],
)
def test_the_comparison_notices_what_is_lost(folder: Path, undisturbed: Path, lost, noticed: bool) -> None:
    run = tampered(folder, undisturbed, f"lost-{lost.__name__}", 2, lost)
    resume(run)
    if noticed:
        with pytest.raises(AssertionError):
            assert_equal(run, undisturbed)
    else:
        assert_equal(run, undisturbed)


def test_fewer_epochs_than_have_begun_are_refused(folder: Path, undisturbed: Path) -> None:
    run = tampered(folder, undisturbed, "fewer", 5, nothing)
    with pytest.raises(UserError, match="1 epochs asked for, but the run is in epoch 2 already"):
        resume(run, overrides=["train.epochs=1"], extend=True)


def flip(part: str):
    def damage(folder: Path) -> None:
        data = bytearray((folder / part).read_bytes())
        data[len(data) // 2] ^= 4
        (folder / part).write_bytes(data)

    return damage


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(
    folder: Path, undisturbed: Path, capsys: pytest.CaptureFixture
) -> None:
    run = folder / "damaged"
    shutil.copytree(undisturbed, run, symlinks=True)
    for step, part in ((6, "model.safetensors"), (5, "training.safetensors")):
        flip(part)(run / "checkpoints" / f"step-{step:09d}")
    resume(run)
    assert_equal(run, undisturbed)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert re.fullmatch(r"warning: .*/step-000000006/model.safetensors is damaged: .*; going on .* of step 4", told[0])
    assert all(line in (run / "log.txt").read_text() for line in told)
    event = json.loads((run / "provenance.json").read_text())["events"][-1]
    assert (event["event"], event["epoch"], event["step"]) == ("resumed", 1, 4)
    assert list(event["damaged"]) == ["step-000000006", "step-000000005"]
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert {"damaged-step-000000006", "damaged-step-000000005", "step-000000006", "last", "best"} <= names


def test_where_all_are_damaged_each_is_named_and_nothing_is_begun_unasked(folder: Path, undisturbed: Path) -> None:
    run = folder / "all-damaged"
    shutil.copytree(undisturbed, run, symlinks=True)
    for place in (run / "checkpoints").glob("step-*"):
        flip("state.json")(place)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(UserError, match=r"no checkpoint of .* can be read; --restart begins the run again") as caught:
        resume(run)
    assert len(caught.value.problems) == 1 + EPOCHS * STEPS
    assert all("state.json is damaged" in problem for problem in caught.value.problems[1:])
    assert {path: path.read_bytes() for path in before} == before
    resume(run, restart=True)
    assert_equal(run, undisturbed)


def test_a_run_that_begins_again_has_its_pretrained_weights_again(folder: Path, undisturbed: Path) -> None:
    weights = folder / "weights.safetensors"
    model = load_checkpoint(undisturbed / "checkpoints" / "last").model
    save_file({name: tensor.contiguous() for name, tensor in model.items()}, weights)
    run = train(config(folder, "pretrained", f"model.pretrained={weights}")).folder
    whole = shutil.copytree(run, folder / "pretrained-whole", symlinks=True)
    for place in (run / "checkpoints").glob("step-*"):
        flip("state.json")(place)
    resume(run, restart=True)
    assert_equal(run, whole)


def numbers_with(**changed):
    """The checkpoint's own state, but for these of its numbers."""

    def change(now, earlier):
        return now.model, now.training, {**now.state, "training": {**now.state["training"], **changed}}

    return change


def epoch_with(number: int, *, done: int | None = None):
    """The state of a checkpoint in the middle of an epoch of that number."""

    def change(now, earlier):
        training = {**now.state["training"], "epoch": {**now.state["training"]["epoch"], "number": number}}
        state = {**now.state, "training": training}
        return now.model, now.training, state if done is None else {**state, "epoch": done}

    return change


FORGED = {
    "a later epoch": epoch_with(1000),
    "an epoch beyond all numbers": epoch_with(10**30),
    "an epoch before the first": epoch_with(-3),
    "more epochs done": epoch_with(3, done=3),
    "fewer epochs done": epoch_with(0, done=0),
    "between two epochs": numbers_with(epoch=None),
    "pieces of a batch that its norms see whole": numbers_with(pieces=[2]),
    "more pieces than images": numbers_with(pieces=[10**10]),
    "pieces that are none": numbers_with(pieces=[0]),
    "no pieces": numbers_with(pieces=[]),
}


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
def test_a_forged_position_is_refused(folder: Path, undisturbed: Path, tmp_path: Path, forged) -> None:
    """Its seals are right: a stranger made it. It would train without end, or end in a traceback."""
    run = tampered(tmp_path, undisturbed, "forged", 5, forged)
    before = (run / "results.csv").read_bytes()
    with pytest.raises(UserError, match=r"step-000000005.* is damaged: ValueError: "):
        resume(run, overrides=["train.epochs=4"], extend=True)
    assert (run / "results.csv").read_bytes() == before


def test_no_memory_for_a_checkpoint_is_no_damage(folder: Path) -> None:
    class State:
        device = torch.device("cpu")

        def load(self, *arguments, **options):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    class Plan:
        state, config = State(), RunConfig()

    with pytest.raises(UserError, match=r"there is no memory on cpu for the state of .*: CUDA out of memory\. Tried"):
        load_state(Plan(), folder, {}, {}, {})  # type: ignore[arg-type]


def test_a_table_that_was_lost_is_told_and_the_training_goes_on(
    folder: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tampered(tmp_path, undisturbed, "tableless", 5, nothing)
    (run / "results.csv").unlink()
    assert resume(run).last["epoch"] == EPOCHS
    first, second = tensors(run), tensors(undisturbed)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    told = capsys.readouterr().err.strip()
    assert told.startswith(f"warning: {run / 'results.csv'} has 0 rows of the 1 epochs that were done; ")
    assert told in (run / "log.txt").read_text()
    assert table(run) == table(undisturbed)[1:]
    # Nothing is left to train now; of what there is, it is told again.
    assert resume(run).last["epoch"] == EPOCHS
    assert "has 1 rows of the 2 epochs" in capsys.readouterr().err
    (run / "results.csv").unlink()
    with pytest.raises(UserError, match=r"results\.csv has 0 rows of the 2 epochs .* nothing is left to train; put it"):
        resume(run)


def test_unreadable_images_met_before_a_pause_count(
    folder: Path, asked: list[int], image_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(image_folder, tmp_path / "images")
    bad = sorted((tmp_path / "images" / "train").rglob("*.png"))[3::150]
    for path in bad:
        path.write_bytes(b"<html>404</html>")
    more = [*images(tmp_path, 0), "data.batch_size=50", "train.epochs=1", f"data.bad_images=skip:{len(bad)}"]
    asked[:] = [7]
    with pytest.raises(PreemptedError):
        train(config(folder, "unreadable", *more))
    asked.clear()
    resume(folder / "unreadable")
    listed = json.loads((folder / "unreadable" / "provenance.json").read_text())["unreadable_images"]
    assert sorted(entry["image"] for entry in listed) == sorted(map(str, bad))


def test_images_that_moved_are_named_and_known_by_their_fingerprint(
    folder: Path, asked: list[int], image_folder: Path, tmp_path: Path
) -> None:
    whole = train(config(folder, "stayed", *images(folder, 0))).folder
    old = shutil.copytree(image_folder, tmp_path / "old")
    asked[:] = [2]
    with pytest.raises(PreemptedError):
        train(config(folder, "moved", *images(folder, 0), f"data.name=imagefolder:{old}"))
    asked.clear()
    run, new = folder / "moved", old.rename(tmp_path / "new")
    with pytest.raises(UserError, match="old is no folder"):
        resume(run)
    with pytest.raises(UserError, match=r"data\.name: the run .*; a resumed run keeps its settings"):
        resume(run, overrides=["data.name=digits"])
    gone = new / "train" / "class3" / "7.png"
    content = gone.read_bytes()
    gone.unlink()
    with pytest.raises(UserError, match="has 399 images instead of 400"):
        resume(run, overrides=[f"data.name=imagefolder:{new}"])
    gone.write_bytes(content)
    resume(run, overrides=[f"data.name=imagefolder:{new}"])
    assert_equal(run, whole)
    event = json.loads((run / "provenance.json").read_text())["events"][-1]
    assert event["changed"] == {"data.name": [f"imagefolder:{old}", f"imagefolder:{new}"]}
    new.rename(tmp_path / "newest")
    assert verify(run, steps=2, dataset=f"imagefolder:{tmp_path / 'newest'}").equal
    with pytest.raises(UserError, match=r"--dataset: 'digits' is no other place of .*; write imagefolder:PATH"):
        verify(run, dataset="digits")


def test_ranks_meet_for_as_long_as_they_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []

    def joined(*, timeout):
        waits.append(timeout)
        raise UserError("nobody came")

    monkeypatch.setattr(running, "joined", joined)
    for overrides in (["train.rank_timeout=7", "regime.lr_rule=linear"], ["train.keep=3"]):
        with pytest.raises(UserError, match="nobody came"):
            resume(folder, overrides=overrides)
    with pytest.raises(UserError, match="nobody came"):
        resume(folder, options={"train.rank_timeout": 8.0})
    assert waits == [7.0, 600.0, 8.0]


def a_better_best(now, earlier):
    return now.model, now.training, {**now.state, "best": {"epoch": 1, "val_error1": 0.0}}


def test_a_lost_best_checkpoint_is_not_waited_for(folder: Path, undisturbed: Path) -> None:
    """Its score counts no more: otherwise none that comes might be called the best."""
    run = tampered(folder, undisturbed, "best-lost", 5, a_better_best)
    best = shutil.copytree(undisturbed / "checkpoints" / "step-000000003", run / "checkpoints" / "step-000000003")
    (run / "checkpoints" / "best").symlink_to(best.name)
    flip("model.safetensors")(best)
    resume(run)
    assert os.readlink(run / "checkpoints" / "best") == "step-000000006"
    assert load_checkpoint(run / "checkpoints" / "best").state["best"]["epoch"] == 2


@pytest.mark.parametrize(
    ("workers", "fault"), [(0, "data:*:*:sleep=0.01"), (2, "data:*:*:sleep=60")], ids=["between images", "worker stuck"]
)
def test_asked_while_it_waits_for_images(
    folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int, fault: str
) -> None:
    """Nobody waits for a batch that takes long; what was trained on is saved."""
    more = [*images(folder, workers), "train.instruments=none"]
    whole = folder / f"waits-{workers}-whole"
    train(config(folder, whole.name, *more))
    run = folder / f"waits-{workers}-left"
    monkeypatch.setenv("NORM_MATTERS_FAULTS", fault)

    def ask() -> None:
        while not (run / "log.txt").exists():
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(PreemptedError, match="preempted by SIGTERM after step"):
        train(config(folder, run.name, *more))
    monkeypatch.delenv("NORM_MATTERS_FAULTS")
    assert load_checkpoint(find_checkpoint(run, prefer="last")).step < EPOCHS * STEPS
    resume(run)
    assert table(run) == table(whole)
    first, second = tensors(run), tensors(whole)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
