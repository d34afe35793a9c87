"""Whole runs: what they write, and that nothing but their settings decides the result."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from norm_matters import inference
from norm_matters.cli import main
from norm_matters.core.config import load_config
from norm_matters.core.errors import NumericalError, UserError
from norm_matters.record import find_checkpoint, load_checkpoint, read_table
from norm_matters.run import CHECKS, RunResult, train

SMALL = ["data.name=digits", "data.batch_size=128", "train.epochs=2", "device=cpu", "deterministic=true"]


def run(output: Path, *overrides: str, **options) -> RunResult:
    return train(load_config(overrides=[*SMALL, f"output={output}", *overrides], checks=CHECKS), **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(find_checkpoint(folder, prefer="last")).model


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(tmp_path_factory.mktemp("runs"), "model.norm=l1")


def test_the_run_folder_is_complete(finished: RunResult) -> None:
    folder = finished.folder
    assert folder.name == "resnet8-l1-digits-s0"
    for name in ("config.yaml", "provenance.json", "log.txt", "results.csv", "report.html"):
        assert (folder / name).stat().st_size > 0
    assert [row["epoch"] for row in finished.rows] == [1, 2]
    last = finished.last
    assert last["step"] == 2 * (1438 // 128)
    assert 0 <= last["val_error1"] <= 100
    assert last["val_error5"] is not None
    assert last["lr"] > 0
    assert last["images_per_second"] > 0


def test_its_config_fed_back_gives_the_same_weights(finished: RunResult) -> None:
    again = train(load_config(finished.folder / "config.yaml", checks=CHECKS))
    assert again.folder == finished.folder.with_name("resnet8-l1-digits-s0-2")
    assert same(weights(again.folder), weights(finished.folder))


def test_another_seed_gives_other_weights(finished: RunResult, tmp_path: Path) -> None:
    assert not same(weights(run(tmp_path, "model.norm=l1", "seed=1").folder), weights(finished.folder))


@pytest.mark.slow
def test_workers_and_the_display_do_not_change_the_result(image_folder: Path, tmp_path: Path) -> None:
    events = []
    images = [f"data.name=imagefolder:{image_folder}", "data.input_size=16", "model.norm=l1"]
    plain = run(tmp_path, *images, "data.workers=0")
    other = run(tmp_path, *images, "data.workers=2", on_progress=events.append)
    assert same(weights(other.folder), weights(plain.folder))
    assert [event.kind for event in events if event.kind != "batch"] == ["start", "epoch", "epoch"]


def test_a_checkpoint_evaluates_to_its_row(finished: RunResult) -> None:
    best = min(finished.rows, key=lambda row: row["val_error1"])
    scores = inference.evaluate(finished.folder, device="cpu")
    assert (scores["epoch"], scores["images"], scores["split"]) == (best["epoch"], 359, "test")
    assert scores["loss"] == pytest.approx(best["val_loss"], rel=1e-6)
    assert scores["error1"] == best["val_error1"]
    assert inference.evaluate(finished.folder / "checkpoints" / "best", batch_size=7)["error1"] == scores["error1"]


def test_a_network_is_scored_on_images_in_another_place_and_on_others(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = shutil.copytree(image_folder, tmp_path / "photos")
    images = [f"data.name=imagefolder:{photos}", "data.input_size=16", "data.workers=0", "train.epochs=1"]
    trained = run(tmp_path / "runs", "model.norm=l1", *images)
    moved = photos.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="photos"):
        inference.evaluate(trained.folder, device="cpu")
    place = f"imagefolder:{moved}"
    scores = inference.evaluate(trained.folder, dataset=place, device="cpu")
    assert (scores["dataset"], scores["images"], scores["error1"]) == (place, 80, trained.last["val_error1"])

    def eval_command(dataset: str) -> tuple[int, str, str]:
        status = main(["eval", str(trained.folder), "--dataset", dataset, "--device", "cpu", "--json"])
        return status, *capsys.readouterr()

    for path in (moved / "val").glob("*/[0-3].png"):
        path.unlink()
    status, out, _ = eval_command(place)
    assert (status, json.loads(out)["images"]) == (0, 40)
    for source in ("train", "val"):
        (moved / source / "class7").rename(moved / source / "seven")
    status, _, error = eval_command(place)
    assert status == 2
    assert "not those the network was trained on" in error
    status, _, error = eval_command("imagefoldr:photos")
    assert status == 2
    assert "imagefolder" in error


def test_images_of_another_form_are_refused(finished: RunResult, image_folder: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        for label in range(10):
            shutil.copytree(image_folder / part / f"class{label}", tmp_path / part / str(label))
    with pytest.raises(UserError, match=r"have 3 channels; the network takes 1$"):
        inference.evaluate(finished.folder, dataset=f"imagefolder:{tmp_path}", device="cpu")


def test_a_checkpoint_folder_works_alone(finished: RunResult, tmp_path: Path) -> None:
    alone = (finished.folder / "checkpoints" / "best").resolve().rename(tmp_path / "alone")
    try:
        loaded = inference.load_run(alone, device="cpu")
    finally:
        alone.rename(finished.folder / "checkpoints" / (finished.folder / "checkpoints" / "best").readlink())
    assert loaded.classes == [str(digit) for digit in range(10)]
    assert loaded.results == []


def test_predictions_name_classes_and_skip_broken_images(finished: RunResult, tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i in range(6):
        pixels = (digits.images[i] * 255 / 16).round().astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{digits.target[i]}.png")
    (tmp_path / "broken.png").write_text("no image")
    predictions = list(inference.predict(finished.folder, [tmp_path], top=3, device="cpu"))
    assert len(predictions) == 7
    broken = [p for p in predictions if p.error]
    assert len(broken) == 1
    assert "broken.png" in broken[0].error
    for prediction in predictions:
        if not prediction.error:
            assert len(prediction.classes) == 3
            assert prediction.probabilities == sorted(prediction.probabilities, reverse=True)
            assert math.isclose(sum(p for p in prediction.probabilities), 1, abs_tol=1)
    run = inference.load_run(finished.folder, device="cpu")
    image = Image.open(tmp_path / "0.png")
    first = next(p for p in predictions if p.path.endswith("0.png"))
    probabilities = run.logits(run.transform(image)[None]).softmax(1)[0]
    assert first.probabilities[0] == pytest.approx(probabilities.max().item(), rel=1e-5)


def test_a_missing_image_or_an_empty_folder_is_refused_before_the_first_prediction(finished, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        inference.predict(finished.folder, [tmp_path / "none.png"])
    with pytest.raises(UserError, match="holds no images"):
        inference.predict(finished.folder, [tmp_path])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    phases = "regime.phases=[{epoch: 0, optimizer: SGD, lr: 0.1}, {epoch: 1, lr: 1e30}]"
    with pytest.raises(NumericalError, match=r"loss is not finite in epoch 2, step \d+: the .* is not finite"):
        run(tmp_path, "model.norm=none", phases, "train.epochs=3", "name=nan")
    rows = read_table(tmp_path / "nan" / "results.csv")
    assert [row["epoch"] for row in rows] == [1]
    assert load_checkpoint(find_checkpoint(tmp_path / "nan", prefer="last")).state["epoch"] == 1
    assert (tmp_path / "nan" / "report.html").is_file()


def test_ctrl_c_leaves_a_record_that_resumes(tmp_path: Path) -> None:
    def interrupt(progress) -> None:
        if progress.kind == "epoch" and progress.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "name=stopped", on_progress=interrupt)
    assert len(read_table(tmp_path / "stopped" / "results.csv")) == 1
    assert (tmp_path / "stopped" / "report.html").is_file()
    assert "KeyboardInterrupt" in (tmp_path / "stopped" / "log.txt").read_text()


def test_ctrl_c_while_the_report_is_drawn_is_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def interrupted(folder: Path) -> None:
        drawn.append(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr("norm_matters.run._write_report", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "name=drawing", "train.epochs=1")
    status = json.loads((tmp_path / "drawing" / "status.json").read_text())
    assert (status["state"], status["exit_status"]) == ("preempted", 130)
    assert len(drawn) == 1, "the report was begun again for whoever wants to leave"


def test_a_process_that_dies_before_its_record_leaves_no_name_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking git what the code is takes its time."""

    def dies(*arguments, **facts) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("norm_matters.run.collect_provenance", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "name=claimed")
    assert not (tmp_path / "claimed").exists()


@pytest.mark.parametrize(
    "precision",
    ["fp32", *[pytest.param(p, marks=pytest.mark.slow) for p in ("amp-bf16", "bf16", "amp-fp16", "fp16")]],
)
def test_every_precision_learns_the_digits(tmp_path: Path, precision: str) -> None:
    result = run(tmp_path, "model.norm=l1", f"train.precision={precision}", "train.epochs=14")
    assert result.last["val_error1"] <= 5
    scores = inference.evaluate(find_checkpoint(result.folder, prefer="last"), device="cpu")
    assert scores["error1"] == result.last["val_error1"]
