"""`eval --calibrate`: statistics from the run's own training images, in a checkpoint that others can use."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

import norm_matters as nm
from norm_matters.calibration import calibrate_run
from norm_matters.cli import main
from norm_matters.core.config import load_config
from norm_matters.core.errors import UserError
from norm_matters.datasets import Loader, load_dataset
from norm_matters.norms import calibrate_norm
from norm_matters.record import load_checkpoint, write_checkpoint
from norm_matters.run import CHECKS

SMALL = ["data.name=digits", "data.batch_size=256", "train.epochs=1", "device=cpu", "model.options.width=4"]
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def train(output: Path, *overrides: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("norm_matters.report.write_report", lambda folder: folder / "report.html")
        return nm.train(load_config(overrides=[*SMALL, f"output={output}", *overrides], checks=CHECKS)).folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs"), "model.norm=l1", "data.batch_size=64", "train.epochs=3")


@pytest.fixture
def wrong(trained: Path, tmp_path: Path) -> Path:
    """Its checkpoint with statistics that are deliberately wrong, alone in a folder."""
    old = load_checkpoint(trained / "checkpoints" / "best")
    spoilt = {
        key: value * 30 + 5 if key.endswith("running_var") else value + 1 if key.endswith("running_mean") else value
        for key, value in old.model.items()
    }
    write_checkpoint(tmp_path / "wrong", step=old.step, model=spoilt, training={}, state=old.state, best=False)
    return tmp_path / "wrong"


def contents(folder: Path, digest: Callable[[Path], str]) -> dict[str, str]:
    return {str(path.relative_to(folder)): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_new_checkpoint_beside_the_old_one(trained: Path, digest: Callable[[Path], str]) -> None:
    before = contents(trained, digest)
    links = [(trained / "checkpoints" / name).readlink() for name in ("last", "best")]
    result = calibrate_run(trained, device="cpu")
    assert result.checkpoint == trained / "checkpoints" / "step-000000066-calibrated"
    after = contents(trained, digest)
    assert {key: after[key] for key in before} == before
    assert [(trained / "checkpoints" / name).readlink() for name in ("last", "best")] == links
    old, new = load_checkpoint(trained / "checkpoints" / "best"), load_checkpoint(result.checkpoint)
    assert old.model.keys() == new.model.keys()
    changed = {key for key in old.model if not torch.equal(old.model[key], new.model[key])}
    assert changed == {key for key in old.model if key.rpartition(".")[2] in STATISTICS}
    assert all(value == 22 for key, value in new.model.items() if key.endswith("num_batches_tracked"))
    errors = {"before": result.before["error1"], "after": result.after["error1"]}
    assert new.state["calibration"] == {
        "from": "step-000000066",
        "dataset": "digits",
        "batches": 22,
        "rejected": 0,
        "error1": errors,
    }
    # It is used as any other; and a second one gets a name of its own.
    scores = nm.evaluate(result.checkpoint, device="cpu")
    assert scores == result.after
    again = calibrate_run(result.checkpoint, device="cpu")
    assert again.checkpoint.name == "step-000000066-calibrated-2"
    assert again.before == scores
    assert again.after["loss"] == scores["loss"], "what was there before does not count"


def test_statistics_are_those_of_the_training_batches(wrong: Path) -> None:
    result = calibrate_run(wrong, device="cpu", batches=3)
    loaded = nm.load_run(wrong, device="cpu")
    data = load_dataset(loaded.config.data)
    loader = Loader(data.train, loaded.preprocessing, batch_size=64, train=True, seed=loaded.config.seed)
    calibrate_norm(loaded.model, islice(loader.epoch(0), 3))
    found = load_checkpoint(result.checkpoint).model
    assert all(torch.equal(value, found[key]) for key, value in loaded.model.state_dict().items())
    assert result.report.batches == 3
    assert result.batch_size == 64


def test_the_error_comes_back(trained: Path, wrong: Path) -> None:
    """Whatever the statistics were, calibrated ones are the same; and here far better than the wrong ones."""
    result = calibrate_run(wrong, device="cpu")
    assert result.checkpoint == wrong.with_name("wrong-calibrated")
    assert result.after["loss"] < result.before["loss"] - 0.5
    assert result.after["loss"] == calibrate_run(trained, device="cpu").after["loss"]


def test_low_precision_keeps_full_weights(tmp_path: Path) -> None:
    folder = train(tmp_path, "model.norm=l1", "train.precision=bf16", "data.batch_size=512")
    result = calibrate_run(folder, device="cpu")
    old, new = (load_checkpoint(path).model for path in (folder / "checkpoints" / "best", result.checkpoint))
    assert all(torch.equal(value, new[key]) for key, value in old.items() if key.rpartition(".")[2] not in STATISTICS)
    assert {value.dtype for key, value in new.items() if key.endswith("weight")} == {torch.float32}


def test_the_command_prints_both_errors(wrong: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(wrong), "--calibrate", "--batches", "2", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("before digits (test, 359 images): loss ")
    assert lines[1].startswith("after digits (test, 359 images): loss ")
    assert lines[2:] == [
        "calibrated on 2 batches of 64 training images",
        f"checkpoint {wrong.with_name('wrong-calibrated')}",
    ]
    assert main(["eval", str(wrong), "--calibrate", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["before"]["checkpoint"] == str(wrong)
    assert found["after"]["checkpoint"] == str(wrong.with_name("wrong-calibrated-2"))
    assert found["after"]["loss"] < found["before"]["loss"]


@pytest.mark.parametrize("batches", ["0", "-1", "many"])
def test_a_wrong_number_of_batches(trained: Path, batches: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(trained), "--calibrate", f"--batches={batches}"]) == 2
    assert "--batches: value" in capsys.readouterr().err


def test_a_network_without_running_statistics_is_refused(tmp_path: Path) -> None:
    folder = train(tmp_path, "model.norm=layer", "data.batch_size=512")
    with pytest.raises(UserError, match=r"\(layer\).*has no running statistics"):
        calibrate_run(folder, device="cpu")
    assert not list((folder / "checkpoints").glob("*-calibrated"))
