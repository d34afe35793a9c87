"""A run that was killed and resumed equals one that was not, to the bit; and the test would notice if it did not."""

import csv
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from norm_matters import resuming
from norm_matters.core.config import RunConfig, dump_config, load_config
from norm_matters.core.errors import UserError
from norm_matters.models.trust import trust_file
from norm_matters.record import TIMING_COLUMNS, find_checkpoint, load_checkpoint, save_checkpoint, trim_table
from norm_matters.resuming import read_run
from norm_matters.run import CHECKS, complete, resume, train

MODEL = """
import torch.nn as nn


class Model(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3),
            nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
        )
        self.regime = [
            {"epoch": 0, "optimizer": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
            {"epoch": 2, "lr": 0.03},
            {"epoch": 4, "lr": 0.01},
        ]

    def forward(self, images):
        return self.model(images)


def model(num_classes, in_channels):
    return Model(num_classes)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "own.py").write_text(MODEL)
    trust_file(folder / "own.py")
    (folder / "images").symlink_to(image_folder)
    return folder


def settings(folder: Path, name: str, epochs: int = 6, workers: int = 0) -> list[str]:
    return [
        f"model.name={folder / 'own.py'}",
        "model.norm=l1",
        f"data.name=imagefolder:{folder / 'images'}",
        "data.input_size=16",
        "data.batch_size=64",
        f"data.workers={workers}",
        f"train.epochs={epochs}",
        "deterministic=true",
        "device=cpu",
        f"output={folder}",
        f"name={name}",
    ]


def config(folder: Path, name: str, epochs: int = 6, workers: int = 0) -> RunConfig:
    return load_config(overrides=settings(folder, name, epochs, workers), checks=CHECKS)


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    return train(config(folder, "undisturbed")).folder


@pytest.fixture(scope="module")
def halfway(folder: Path) -> Path:
    return train(config(folder, "halfway", epochs=3)).folder


def table(run: Path) -> list[dict[str, str]]:
    with (run / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key not in TIMING_COLUMNS} for row in rows]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(find_checkpoint(run, prefer="last")).model


def same_weights(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_equals_undisturbed_to_the_bit(folder, undisturbed, command, workers: int) -> None:
    run = folder / f"killed-{workers}"
    process = command("train", *settings(folder, run.name, workers=workers))
    deadline = time.monotonic() + 120
    while not (run / "results.csv").is_file() or len((run / "results.csv").read_text().splitlines()) < 3:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(table(run)) < 6, "the run was over before it was killed; make it longer"
    resume(run)
    assert [row["epoch"] for row in table(run)] == ["1", "2", "3", "4", "5", "6"]
    assert table(run) == table(undisturbed)
    assert same_weights(run, undisturbed)


def test_a_run_killed_before_its_first_checkpoint_starts_again(folder, undisturbed, halfway) -> None:
    run = folder / "early"
    shutil.copytree(halfway, run, symlinks=True)
    shutil.rmtree(run / "checkpoints")
    # The row of an epoch is written before its checkpoint.
    trim_table(run / "results.csv", 1)
    resume(run, overrides=["train.epochs=6"])
    assert table(run) == table(undisturbed)
    assert same_weights(run, undisturbed)


def test_a_run_that_has_lost_its_checkpoints_is_not_begun_again_unasked(folder, undisturbed, halfway) -> None:
    run = folder / "lost"
    shutil.copytree(halfway, run, symlinks=True)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no checkpoints any more, though 3 epochs were done; --restart"):
        resume(run, overrides=["train.epochs=6"])
    resume(run, overrides=["train.epochs=6"], restart=True)
    assert table(run) == table(undisturbed)
    assert same_weights(run, undisturbed)


def tampered(folder: Path, halfway: Path, name: str, change) -> Path:
    """A copy of the half-way run whose last checkpoint went through `change(model, training, state)`."""
    run = folder / name
    shutil.copytree(halfway, run, symlinks=True)
    checkpoint = load_checkpoint(find_checkpoint(run, prefer="last"))
    step = checkpoint.state["training"]["step"]
    shutil.rmtree(run / "checkpoints")
    change(checkpoint.model, checkpoint.training, checkpoint.state)
    save_checkpoint(
        run, step=step, model=checkpoint.model, training=checkpoint.training, state=checkpoint.state, best=True
    )
    return run


def keep_all(model, training, state) -> None:
    pass


def forget_momentum(model, training, state) -> None:
    for name in training:
        if name.endswith("momentum_buffer"):
            training[name] = torch.zeros_like(training[name])


def forget_rng(model, training, state) -> None:
    training["rng/torch"] = torch.Generator().manual_seed(99).get_state()


def forget_norm_buffers(model, training, state) -> None:
    for name in model:
        if name.endswith("running_mean"):
            model[name] = torch.zeros_like(model[name])


@pytest.mark.parametrize(
    ("change", "same"), [(keep_all, True), (forget_momentum, False), (forget_rng, False), (forget_norm_buffers, False)]
)
def test_the_comparison_notices_what_a_checkpoint_lacks(folder, undisturbed, halfway, change, same: bool) -> None:
    run = tampered(folder, halfway, change.__name__, change)
    resume(run, overrides=["train.epochs=6"])
    assert same_weights(run, undisturbed) == same
    assert (table(run) == table(undisturbed)) == same


def drop_momentum(model, training, state) -> None:
    del training[next(name for name in training if name.endswith("momentum_buffer"))]


def drop_norm_buffer(model, training, state) -> None:
    del model[next(name for name in model if name.endswith("running_var"))]


@pytest.mark.parametrize("change", [drop_momentum, drop_norm_buffer])
def test_a_checkpoint_with_a_part_missing_is_refused_by_name(folder, halfway, change) -> None:
    run = tampered(folder, halfway, change.__name__, change)
    with pytest.raises(UserError, match=r"momentum_buffer|running_var"):
        resume(run, overrides=["train.epochs=6"])


def test_a_finished_run_resumes_to_itself(folder, undisturbed) -> None:
    before = (undisturbed / "results.csv").read_bytes()
    result = resume(undisturbed)
    assert result.last["epoch"] == 6
    assert (undisturbed / "results.csv").read_bytes() == before


@pytest.mark.parametrize("override", ["seed=1", "model.norm=l2", "data.batch_size=32", "train.precision=amp-bf16"])
def test_settings_that_contradict_the_run_are_refused(undisturbed, override: str) -> None:
    with pytest.raises(UserError, match=override.partition("=")[0]):
        resume(undisturbed, overrides=[override])


def test_settings_may_be_repeated_as_they_were_given(folder, undisturbed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record has full paths and canonical norms."""
    monkeypatch.chdir(folder)
    resume(undisturbed, overrides=["model.name=own.py", "data.name=imagefolder:images", "name=undisturbed"])
    with pytest.raises(UserError, match=r"name: the run in .* has None, not 'other'"):
        resume(undisturbed, overrides=["name=other"])
    (folder / "another.py").write_text(MODEL)
    with pytest.raises(UserError, match=r"model\.name: the run in .*/own\.py', not '.*/another\.py'"):
        resume(undisturbed, overrides=["model.name=another.py"])


@pytest.mark.parametrize(("norm", "same"), [("topk", True), ("topk: k=10", True), ("topk:k=9", False)])
def test_a_norm_may_be_repeated_in_other_words(tmp_path: Path, norm: str, same: bool) -> None:
    recorded = complete(load_config(overrides=["model.norm=topk:k=10"]), epochs=3)
    (tmp_path / "config.yaml").write_text(dump_config(recorded))
    if same:
        read_run(tmp_path, {"model.norm": norm}, [], restart=False)
    else:
        with pytest.raises(UserError, match=r"model\.norm: .* has 'topk:k=10', not 'topk:k=9'"):
            read_run(tmp_path, {"model.norm": norm}, [], restart=False)


def test_a_change_is_in_the_history_before_it_is_made(folder, halfway, monkeypatch: pytest.MonkeyPatch) -> None:
    run = shutil.copytree(halfway, folder / "between", symlinks=True)

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(resuming, "write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        resume(run, overrides=["train.epochs=6"])
    assert load_config(run / "config.yaml").train.epochs == 3
    event = json.loads((run / "provenance.json").read_text())["events"][-1]
    assert event["changed"] == {"train.epochs": [3, 6]}


def test_fewer_epochs_than_done_are_refused(undisturbed) -> None:
    with pytest.raises(UserError, match=r"train\.epochs"):
        resume(undisturbed, overrides=["train.epochs=2"])


def test_a_relative_schedule_is_planned_anew_only_on_request(folder) -> None:
    overrides = ["model.name=resnet8", "data.name=digits", "data.batch_size=512", "train.epochs=2", "device=cpu"]
    run = train(load_config(overrides=[*overrides, f"output={folder}", "name=relative"], checks=CHECKS)).folder
    with pytest.raises(UserError, match="--extend"):
        resume(run, overrides=["train.epochs=3"])
    assert len(table(run)) == 2
    result = resume(run, overrides=["train.epochs=3"], extend=True)
    assert result.last["epoch"] == 3
    assert load_config(run / "config.yaml").train.epochs == 3
    assert '"resumed"' in (run / "provenance.json").read_text()
